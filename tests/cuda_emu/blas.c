/* blas: the product that cuda/blas.c asks cuBLAS for, in plain loops.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blas.h"

#include "core/model/dtype.h"

static float element(int dtype, const void *p, size_t i)
{
    float v;
    pl_dequant_row((pl_dtype)dtype, (const char *)p + i * pl_dtype_block_bytes((uint32_t)dtype), &v, 1);
    return v;
}

static int product(const struct pl_cublas *b, int dtype, int n_rows, int n_out, int n_in, const void *x, const void *w, float *y)
{
    (void)b;
    for (int t = 0; t < n_rows; t++)
        for (int n = 0; n < n_out; n++) {
            float sum = 0;
            for (int k = 0; k < n_in; k++)
                sum += element(dtype, x, (size_t)t * (size_t)n_in + (size_t)k) * element(dtype, w, (size_t)n * (size_t)n_in + (size_t)k);
            y[(size_t)t * (size_t)n_out + (size_t)n] = sum;
        }
    return 0;
}

static void close_blas(struct pl_cublas *b)
{
    (void)b;
}

pl_status pl_cublas_open(struct pl_cublas *blas, cudaStream_t stream, struct pl_err *err)
{
    (void)stream, (void)err;
    *blas = (struct pl_cublas){.product = product, .close = close_blas};
    return PL_OK;
}
