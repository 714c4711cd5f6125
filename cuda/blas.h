/* blas: the few calls of cuBLAS that the device makes, found at run time, so that the library builds without cuBLAS and says
 * in one line when it is missing. A handle is one device's, and is used by one thread at a time, on that device.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_BLAS_H
#define PL_CUDA_BLAS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

/* A matrix as it lies, row by row. along: the reduction runs along its rows, else across them. */
struct pl_cublas_operand {
    const void *p;
    size_t stride; /* elements */
    bool along;
};

/* c[m][n] = alpha * a[m][k] · b[k][n] + beta * c, float sums; with beta 0 c is not read. Operands are of one type: f16, bf16, or f32, which is
 * multiplied as it is (no TF32). */
struct pl_cublas_product {
    int dtype, m, n, k;
    struct pl_cublas_operand a, b;
    float alpha, beta;
    float *c;
    size_t stride; /* of c */
};

struct pl_cublas {
    void *handle;
    /* 0, or cuBLAS's status. */
    int (*product)(const struct pl_cublas *b, const struct pl_cublas_product *p);
    /* Device memory to work in instead of cuBLAS's own, which it would take when it is first called. 0, or cuBLAS's status. */
    int (*work_in)(const struct pl_cublas *b, void *memory, size_t n);
    const char *(*status_name)(int status);
    void (*close)(struct pl_cublas *b);
};

#define PL_CUBLAS_MISSING \
    "libcublas.so.13 is missing: install CUDA 13's cuBLAS (libcublas-13-0, or the Python package nvidia-cublas with its folder in LD_LIBRARY_PATH), "  \
    "or take --device cpu"
enum { PL_CUBLAS_NO_MEMORY = 3 }; /* the status that only says so */

pl_status pl_cublas_open(struct pl_cublas *blas, cudaStream_t stream, struct pl_err *err) PL_MUST_CHECK;

#endif
