/* blas: the product that cuda/blas.c asks cuBLAS for, in plain loops. PARLEY_EMU_FAULT=blas:STATUS makes each one fail so;
 * no-cublas: it is not installed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blas.h"

#include <stdlib.h>
#include <string.h>

#include "core/model/dtype.h"
#include "tests/cuda_emu/emu.h"
#include "tests/cuda_emu/graphs.h"

/* The operand as floats [k][n] of its own; NULL: memory is out */
static float *widen(int dtype, const struct pl_cublas_operand *o, size_t k, size_t n)
{
    const size_t rows = o->along ? n : k, cols = o->along ? k : n, bytes = dtype == PL_F32 ? 4 : 2;
    float *to = malloc(rows * cols * sizeof *to + 1), *row = malloc(cols * sizeof *row + 1);
    for (size_t r = 0; to != NULL && row != NULL && r < rows; r++) {
        pl_dequant_row((pl_dtype)dtype, (const char *)o->p + r * o->stride * bytes, row, (uint32_t)cols);
        for (size_t c = 0; c < cols; c++)
            to[o->along ? c * n + r : r * n + c] = row[c];
    }
    free(row);
    return to;
}

enum { PIECE = 256 }; /* of a sum: a GPU does not add one by one either */

static int multiply(const struct pl_cublas_product *p)
{
    const size_t m = (size_t)p->m, n = (size_t)p->n, k = (size_t)p->k;
    float *a = widen(p->dtype, &p->a, k, m), *b = widen(p->dtype, &p->b, k, n), *sums = malloc(2 * n * sizeof *sums + 1), *piece = sums + n;
    const bool ok = a != NULL && b != NULL && sums != NULL;
    for (size_t r = 0; ok && r < m; r++) {
        float *c = p->c + r * p->stride;
        memset(sums, 0, 2 * n * sizeof *sums);
        for (size_t i = 0; i < k; i++) {
            for (size_t j = 0; j < n; j++)
                piece[j] += a[i * m + r] * b[i * n + j];
            for (size_t j = 0; (i % PIECE == PIECE - 1 || i + 1 == k) && j < n; j++) {
                sums[j] += piece[j];
                piece[j] = 0;
            }
        }
        for (size_t j = 0; j < n; j++)
            c[j] = p->beta != 0 ? p->alpha * sums[j] + p->beta * c[j] : p->alpha * sums[j];
    }
    free(a), free(b), free(sums);
    return ok ? 0 : PL_CUBLAS_NO_MEMORY;
}

static void run(void *product)
{
    if (multiply(product) != 0)
        abort();
}

static bool fits(const struct pl_cublas_operand *o, int k, int n)
{
    return o->stride >= (size_t)(o->along ? k : n);
}

static int product(const struct pl_cublas *b, const struct pl_cublas_product *p)
{
    if (p->m <= 0 || p->n <= 0 || p->k <= 0 || !fits(&p->a, p->k, p->m) || !fits(&p->b, p->k, p->n) || p->stride < (size_t)p->n)
        return 7; /* CUBLAS_STATUS_INVALID_VALUE */
    struct pl_cublas_product copy = *p;
    const char *fault = emu_fault();
    if (fault != NULL && strncmp(fault, "blas:", 5) == 0)
        return atoi(fault + 5);
    emu_enqueue_bytes(b->handle, run, &copy, sizeof copy);
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
    const char *fault = emu_fault();
    if (fault != NULL && strcmp(fault, "no-cublas") == 0)
        return pl_fail(err, PL_ENOTSUP, PL_CUBLAS_MISSING);
    *blas = (struct pl_cublas){.handle = stream, .product = product, .work_in = work_in, .status_name = status_name, .close = close_blas};
    return PL_OK;
}
