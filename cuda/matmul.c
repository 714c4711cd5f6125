/* matmul: products, part by part. f16 and bf16 weights with more than a few rows of x go to cuBLAS, which takes x rounded to the weight's
 * type, and chooses an algorithm by the shape: there alone a row's bits may depend on how many rows there are. All else goes to kernels of ours.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "cuda/cuda.h"

/* A product's x in the forms that its parts need, each made once. */
struct product {
    struct pl_cuda *c;
    struct pl_cuda_mat x;
    struct pl_cuda_act act; /* q NULL = not made */
    void *narrow;           /* [T][K] of narrow_dtype; NULL = not made */
    float *scale;           /* of its rows; NULL = 1 */
    int narrow_dtype;
};

static bool is_float(int dtype)
{
    return dtype == PL_F32 || dtype == PL_F16 || dtype == PL_BF16;
}

/* Products by cuBLAS whose sums are not yet the result are made so many columns at a time that they take no more than this, or a few. */
enum { MAX_SUMS = 16 << 20 /* floats */, SUMS_STEP = 256 };

static size_t sums_columns(size_t T, size_t N)
{
    const size_t fit = MAX_SUMS / T / SUMS_STEP * SUMS_STEP, n = fit > SUMS_STEP ? fit : SUMS_STEP;
    return N < n ? N : n;
}

static size_t numbers_bytes(size_t T, size_t K)
{
    return (T * K * sizeof(uint16_t) + 255) / 256 * 256;
}

size_t pl_cuda_narrow_bytes(size_t T, size_t K)
{
    return numbers_bytes(T, K) + T * sizeof(float);
}

/* Fewer rows, or columns, may fill it better. */
size_t pl_cuda_sums_bytes(size_t T, size_t N)
{
    const size_t most = T * SUMS_STEP > MAX_SUMS ? T * SUMS_STEP : MAX_SUMS;
    return (T * N < most ? T * N : most) * sizeof(float);
}

pl_status pl_cuda_check_blas(struct pl_cuda *c, int status)
{
    char what[100];
    if (status == 0)
        return PL_OK;
    if (status == PL_CUBLAS_NO_MEMORY)
        return pl_cuda_check(c, cudaErrorMemoryAllocation, "a product by cuBLAS");
    snprintf(what, sizeof what, "a product by cuBLAS: %s (%d)", c->blas.status_name(status), status);
    const cudaError_t e = cudaGetLastError(); /* it may say more */
    return pl_cuda_check(c, e != cudaSuccess && e != cudaErrorMemoryAllocation ? e : cudaErrorUnknown, what);
}

static pl_status narrow_x(struct product *p, int dtype)
{
    struct pl_cuda *c = p->c;
    if (p->narrow != NULL && p->narrow_dtype == dtype)
        return PL_OK;
    p->narrow = pl_cuda_scratch(c, PL_CUDA_SCRATCH_NARROW, pl_cuda_narrow_bytes(p->x.rows, p->x.cols));
    if (p->narrow == NULL)
        return pl_cuda_failed(c);
    p->narrow_dtype = dtype;
    p->scale = dtype == PL_F16 ? (float *)((uint8_t *)p->narrow + numbers_bytes(p->x.rows, p->x.cols)) : NULL;
    return pl_cuda_check(c, pl_cuda_narrow(c->stream, dtype, p->x, p->narrow, p->scale), "rounding activations");
}

/* out (+)= x rounded · rows of the weight from n on */
static pl_status multiply(const struct product *p, struct pl_cuda_mat out, const struct pl_cuda_part *w, size_t n, bool add)
{
    const struct pl_cublas_product all = {.dtype = w->dtype, .m = (int)out.rows, .n = (int)out.cols, .k = (int)p->x.cols, .alpha = 1, .beta = add ? 1 : 0,
                                          .a = {p->narrow, p->x.cols, true}, .b = {w->data + n * w->row_bytes, p->x.cols, true},
                                          .c = out.p, .stride = out.stride};
    return pl_cuda_check_blas(p->c, p->c->blas.product(&p->c->blas, &all));
}

/* out: of these parts, which are of one type and lie one behind the other. What has no scale and no bias is summed up where it belongs. */
static pl_status blas_product(struct product *p, struct pl_cuda_mat out, const struct pl_cuda_part *w, const float *bias, bool add)
{
    struct pl_cuda *c = p->c;
    const size_t T = p->x.rows, N = out.cols, columns = sums_columns(T, N);
    pl_status rc = narrow_x(p, w->dtype);
    if (rc == PL_OK && p->scale == NULL && bias == NULL)
        return multiply(p, out, w, 0, add);
    float *y = rc == PL_OK ? pl_cuda_scratch(c, PL_CUDA_SCRATCH_WIDE, pl_cuda_sums_bytes(T, N)) : NULL;
    if (y == NULL)
        return rc != PL_OK ? rc : pl_cuda_failed(c);
    for (size_t n = 0; rc == PL_OK && n < N; n += columns) {
        out.cols = (uint32_t)(N - n < columns ? N - n : columns);
        rc = multiply(p, (struct pl_cuda_mat){y, out.rows, out.cols, out.cols}, w, n, false);
        if (rc == PL_OK)
            rc = pl_cuda_check(c, pl_cuda_finish(c->stream, out, y, p->scale, bias, add), "finishing a product");
        out.p += columns;
        bias = bias != NULL ? bias + columns : NULL;
    }
    return rc;
}

static pl_status round_x(struct product *p)
{
    struct pl_cuda *c = p->c;
    const uint32_t padded = pl_cuda_act_padded(p->x.cols);
    const size_t n = (size_t)p->x.rows * padded;
    if (p->act.q != NULL)
        return PL_OK;
    p->act.q = pl_cuda_scratch(c, PL_CUDA_SCRATCH_QUANT, n + n / 32 * sizeof *p->act.scale);
    if (p->act.q == NULL)
        return pl_cuda_failed(c);
    p->act.scale = (struct pl_cuda_act_scale *)(p->act.q + n);
    p->act.padded = padded;
    return pl_cuda_check(c, pl_cuda_quant(c->stream, p->x, p->act), "rounding activations");
}

static pl_status block_product(struct product *p, struct pl_cuda_mat out, struct pl_cuda_parts w, const float *bias, bool add)
{
    const pl_status rc = round_x(p);
    return rc != PL_OK ? rc : pl_cuda_check(p->c, pl_cuda_product(p->c->stream, out, p->act, w, bias, add), "a product");
}

/* Those from `first` on that are of one type */
static struct pl_cuda_parts parts_of(const struct pl_weight *w, uint32_t first)
{
    struct pl_cuda_parts p = {.n = 0};
    for (uint32_t i = first; i < w->n_parts && w->parts[i].dtype == w->parts[first].dtype; i++)
        p.part[p.n++] = w->parts[i];
    return p;
}

/* Whether our own kernel of float weights multiplies */
static bool is_dense(int dtype, uint32_t n_rows)
{
    return dtype == PL_F32 || (is_float(dtype) && n_rows <= PL_CUDA_FEW);
}

static pl_status product(struct pl_cuda *c, struct pl_cuda_mat out, struct pl_cuda_mat x, const struct pl_weight *w, const float *bias, bool add)
{
    struct product p = {.c = c, .x = x};
    pl_status rc = PL_OK;
    if (c->narrowed.from == x.p && c->narrowed.rows == x.rows && c->narrowed.cols == x.cols) {
        p.narrow = c->scratch[PL_CUDA_SCRATCH_NARROW].p;
        p.narrow_dtype = PL_BF16;
    }
    c->narrowed.from = NULL;
    for (uint32_t i = 0; rc == PL_OK && i < w->n_parts;) {
        const struct pl_cuda_parts parts = parts_of(w, i);
        const int dtype = parts.part[0].dtype;
        out.cols = 0;
        for (uint32_t k = 0; k < parts.n; k++)
            out.cols += parts.part[k].rows;
        if (is_dense(dtype, x.rows))
            rc = pl_cuda_check(c, pl_cuda_dense(c->stream, out, x, parts, bias, add), "a product");
        else if (is_float(dtype))
            rc = blas_product(&p, out, &w->parts[i], bias, add);
        else
            rc = block_product(&p, out, parts, bias, add);
        out.p += out.cols;
        bias = bias != NULL ? bias + out.cols : NULL;
        i += parts.n;
    }
    return rc;
}

void pl_cuda_only_for(struct pl_device *dev, const struct pl_weight *w)
{
    pl_cuda_of(dev)->narrowed.next = w;
}

/* f16 is left out: its rows have a scale, which their makers do not know before the end. */
pl_status pl_cuda_narrow_to(struct pl_cuda *c, const struct pl_weight *next, pl_view out, void **to)
{
    *to = NULL;
    c->narrowed.from = NULL;
    if (next == NULL || next->cols != out.cols || out.rows <= PL_CUDA_FEW)
        return PL_OK;
    for (uint32_t i = 0; i < next->n_parts; i++)
        if (next->parts[i].dtype != PL_BF16)
            return PL_OK;
    *to = pl_cuda_scratch(c, PL_CUDA_SCRATCH_NARROW, pl_cuda_narrow_bytes(out.rows, out.cols));
    if (*to == NULL)
        return pl_cuda_failed(c);
    c->narrowed.from = pl_cuda_mat(out).p;
    c->narrowed.rows = out.rows;
    c->narrowed.cols = out.cols;
    return PL_OK;
}

pl_status pl_cuda_matmul_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    c->narrowed.next = NULL;
    if (x.cols != w->cols || out.cols != w->rows)
        return PL_EINVAL;
    return x.rows == 0 ? PL_OK : product(c, pl_cuda_mat(out), pl_cuda_mat(x), w, pl_cuda_vector(bias), add);
}

pl_status pl_cuda_matmul_glu_op(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                                const struct pl_plus *plus)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const struct pl_weight *next = pl_cuda_take_next(c);
    struct pl_cuda_mat values = {NULL, 0, 0, 0};
    const bool *rows = NULL;
    if (x.cols != w->cols || 2 * out.cols != w->rows)
        return PL_EINVAL;
    if (x.rows == 0)
        return PL_OK;
    if (plus != NULL) {
        rows = pl_cuda_bring(c, plus->rows, x.rows * sizeof *rows);
        if (rows == NULL)
            return pl_cuda_failed(c);
        values = pl_cuda_mat(plus->values);
    }
    const bool gelu = kind == PL_ACT_GELU_TANH, alike = w->n_parts == 2 && w->parts[0].dtype == w->parts[1].dtype && w->parts[0].rows == w->parts[1].rows;
    if (alike && is_dense(w->parts[0].dtype, x.rows))
        return pl_cuda_check(c, pl_cuda_dense_glu(c->stream, gelu, pl_cuda_mat(out), pl_cuda_mat(x), parts_of(w, 0), pl_cuda_vector(bias), values, rows),
                             "a gated product");
    if (alike && !is_float(w->parts[0].dtype) && x.rows <= PL_CUDA_QUANT_FEW) {
        struct product p = {.c = c, .x = pl_cuda_mat(x)};
        const pl_status rc = round_x(&p);
        return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_product_glu(c->stream, gelu, pl_cuda_mat(out), p.act, parts_of(w, 0),
                                                                       pl_cuda_vector(bias), values, rows), "a gated product");
    }
    const struct pl_cuda_mat both = {pl_cuda_scratch(c, PL_CUDA_SCRATCH_PRODUCT, (size_t)x.rows * w->rows * sizeof(float)), x.rows, w->rows, w->rows};
    if (both.p == NULL)
        return pl_cuda_failed(c);
    void *narrow;
    pl_status rc = product(c, both, pl_cuda_mat(x), w, NULL, false);
    if (rc == PL_OK)
        rc = pl_cuda_narrow_to(c, next, out, &narrow);
    return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_glu(c->stream, gelu, pl_cuda_mat(out), both, pl_cuda_vector(bias), values, rows, narrow),
                                            "a gated activation");
}
