/* blas: the product that cuda/blas.c asks cuBLAS for, in plain loops. PARLEY_EMU_FAULT=blas:STATUS makes each one fail so.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blas.h"

#include <stdlib.h>
#include <string.h>

#include "core/model/dtype.h"

static float *widen(int dtype, const void *from, size_t n)
{
    float *to = malloc(n * sizeof *to + 1);
    if (to != NULL)
        pl_dequant_row((pl_dtype)dtype, from, to, (uint32_t)n);
    return to;
}

static int product(const struct pl_cublas *b, int dtype, int n_rows, int n_out, int n_in, const void *x, const void *w, float *y)
{
    const size_t K = (size_t)n_in, N = (size_t)n_out, T = (size_t)n_rows;
    const char *fault = getenv("PARLEY_EMU_FAULT");
    (void)b;
    if (fault != NULL && strncmp(fault, "blas:", 5) == 0)
        return atoi(fault + 5);
    float *fx = widen(dtype, x, T * K), *fw = widen(dtype, w, N * K);
    const bool ok = fx != NULL && fw != NULL;
    for (size_t t = 0; ok && t < T; t++)
        for (size_t n = 0; n < N; n++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++)
                sum += fx[t * K + k] * fw[n * K + k];
            y[t * N + n] = sum;
        }
    free(fx), free(fw);
    return ok ? 0 : PL_CUBLAS_NO_MEMORY;
}

static int work_in(const struct pl_cublas *b, void *memory, size_t n)
{
    (void)b, (void)memory, (void)n;
    return 0;
}

static const char *status_name(int status)
{
    return status == PL_CUBLAS_NO_MEMORY ? "CUBLAS_STATUS_ALLOC_FAILED" : status == 13 ? "CUBLAS_STATUS_EXECUTION_FAILED" : "another status";
}

static void close_blas(struct pl_cublas *b)
{
    (void)b;
}

pl_status pl_cublas_open(struct pl_cublas *blas, cudaStream_t stream, struct pl_err *err)
{
    (void)stream, (void)err;
    *blas = (struct pl_cublas){.product = product, .work_in = work_in, .status_name = status_name, .close = close_blas};
    return PL_OK;
}
