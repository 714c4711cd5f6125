/* blas: the one call of cuBLAS that the device makes, found at run time, so that the library builds without cuBLAS and says
 * in one line when it is missing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_BLAS_H
#define PL_CUDA_BLAS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

struct pl_cublas {
    void *handle, *library;
    /* y[T][N] = x[T][K] · w[N][K]ᵀ, float sums; x and w are of the same type, f16 or bf16. 0, or cuBLAS's error. */
    int (*product)(const struct pl_cublas *b, int dtype, int n_rows, int n_out, int n_in, const void *x, const void *w, float *y);
    void (*close)(struct pl_cublas *b);
};

pl_status pl_cublas_open(struct pl_cublas *blas, cudaStream_t stream, struct pl_err *err) PL_MUST_CHECK;

#endif
