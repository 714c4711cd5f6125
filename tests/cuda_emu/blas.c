/* blas: the product that cuda/blas.c asks cuBLAS for, in plain loops. PARLEY_EMU_FAULT=blas:STATUS makes each one fail so;
 * no-cublas: it is not installed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blas.h"

#include <stdlib.h>
#include <string.h>

#include "core/model/dtype.h"
#include "tests/cuda_emu/graphs.h"

static float *widen(int dtype, const void *from, size_t n)
{
    float *to = malloc(n * sizeof *to + 1);
    if (to != NULL)
        pl_dequant_row((pl_dtype)dtype, from, to, (uint32_t)n);
    return to;
}

struct call {
    int dtype;
    size_t T, N, K;
    const void *x, *w;
    float *y;
};

static int multiply(const struct call *c)
{
    float *fx = widen(c->dtype, c->x, c->T * c->K), *fw = widen(c->dtype, c->w, c->N * c->K);
    const bool ok = fx != NULL && fw != NULL;
    for (size_t t = 0; ok && t < c->T; t++)
        for (size_t n = 0; n < c->N; n++) {
            float sum = 0;
            for (size_t k = 0; k < c->K; k++)
                sum += fx[t * c->K + k] * fw[n * c->K + k];
            c->y[t * c->N + n] = sum;
        }
    free(fx), free(fw);
    return ok ? 0 : PL_CUBLAS_NO_MEMORY;
}

static void run(void *call)
{
    if (multiply(call) != 0)
        abort();
}

static int product(const struct pl_cublas *b, int dtype, int n_rows, int n_out, int n_in, const void *x, const void *w, float *y)
{
    const struct call c = {dtype, (size_t)n_rows, (size_t)n_out, (size_t)n_in, x, w, y};
    const char *fault = getenv("PARLEY_EMU_FAULT");
    if (fault != NULL && strncmp(fault, "blas:", 5) == 0)
        return atoi(fault + 5);
    if (!emu_capturing(b->handle))
        return multiply(&c);
    emu_capture_bytes(run, &c, sizeof c);
    return 0;
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
    const char *fault = getenv("PARLEY_EMU_FAULT");
    if (fault != NULL && strcmp(fault, "no-cublas") == 0)
        return pl_fail(err, PL_ENOTSUP, PL_CUBLAS_MISSING);
    *blas = (struct pl_cublas){.handle = stream, .product = product, .work_in = work_in, .status_name = status_name, .close = close_blas};
    return PL_OK;
}
