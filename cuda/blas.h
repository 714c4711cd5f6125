/* blas: the few calls of cuBLAS that the device makes, found at run time, so that the library builds without cuBLAS and says
 * in one line when it is missing. A handle is one device's, and is used by one thread at a time, on that device.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_BLAS_H
#define PL_CUDA_BLAS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

struct pl_cublas {
    void *handle;
    /* y[T][N] = x[T][K] · w[N][K]ᵀ, float sums; x and w are of the same type, f16 or bf16. 0, or cuBLAS's status. */
    int (*product)(const struct pl_cublas *b, int dtype, int n_rows, int n_out, int n_in, const void *x, const void *w, float *y);
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
