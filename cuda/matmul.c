/* matmul: products, part by part. f16 and bf16 weights with more than a few rows of x go to cuBLAS, which chooses an algorithm by
 * the shape: there alone a row's bits may depend on how many rows there are. All else goes to kernels of ours.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "cuda/cuda.h"

/* A product's x in the forms that its parts need, each made once. */
struct product {
    struct pl_cuda *c;
    struct pl_cuda_mat x;
    struct pl_cuda_act act; /* q NULL = not made */
};

static bool is_float(int dtype)
{
    return dtype == PL_F32 || dtype == PL_F16 || dtype == PL_BF16;
}

/* Products by cuBLAS are made so many columns at a time that what it writes takes no more than this, or a few. */
enum { MAX_SPLIT = 32 << 20 /* floats */, SPLIT_STEP = 256 };

static size_t split_columns(size_t T, size_t N)
{
    const size_t fit = MAX_SPLIT / (2 * T) / SPLIT_STEP * SPLIT_STEP, n = fit > SPLIT_STEP ? fit : SPLIT_STEP;
    return N < n ? N : n;
}

static size_t halves_bytes(size_t T, size_t K)
{
    return (2 * T * K * sizeof(uint16_t) + 255) / 256 * 256;
}

size_t pl_cuda_split_bytes(size_t T, size_t K, size_t N)
{
    return halves_bytes(T, K) + (2 * T * split_columns(T, N) + T) * sizeof(float);
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

static pl_status blas_product(struct product *p, struct pl_cuda_mat out, const struct pl_cuda_part *w, const float *bias, bool add)
{
    struct pl_cuda *c = p->c;
    const size_t T = p->x.rows, K = p->x.cols, N = w->rows, columns = split_columns(T, N), halves = halves_bytes(T, K);
    uint8_t *work = pl_cuda_scratch(c, PL_CUDA_SCRATCH_SPLIT, pl_cuda_split_bytes(T, K, N));
    if (work == NULL)
        return pl_cuda_failed(c);
    float *y = (float *)(work + halves), *scale = y + 2 * T * columns;
    pl_status rc = pl_cuda_check(c, pl_cuda_split(c->stream, w->dtype, p->x, work, scale), "splitting activations");
    for (size_t n = 0; rc == PL_OK && n < N; n += columns) {
        out.cols = (uint32_t)(N - n < columns ? N - n : columns);
        rc = pl_cuda_check_blas(c, c->blas.product(&c->blas, &(struct pl_cublas_product){
            .dtype = w->dtype, .m = (int)(2 * T), .n = (int)out.cols, .k = (int)K, .a = {work, K, true}, .b = {w->data + n * w->row_bytes, K, true}, .alpha = 1,
            .c = y, .stride = out.cols}));
        if (rc == PL_OK)
            rc = pl_cuda_check(c, pl_cuda_finish(c->stream, out, y, scale, bias, add), "finishing a product");
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

static pl_status block_product(struct product *p, struct pl_cuda_mat out, const struct pl_cuda_part *w, const float *bias, bool add)
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
    for (uint32_t i = 0; rc == PL_OK && i < w->n_parts;) {
        const struct pl_cuda_parts parts = parts_of(w, i);
        const uint32_t n = is_dense(parts.part[0].dtype, x.rows) ? parts.n : 1; /* together, or one by one */
        out.cols = 0;
        for (uint32_t k = 0; k < n; k++)
            out.cols += parts.part[k].rows;
        if (is_dense(parts.part[0].dtype, x.rows))
            rc = pl_cuda_check(c, pl_cuda_dense(c->stream, out, x, parts, bias, add), "a product");
        else if (is_float(parts.part[0].dtype))
            rc = blas_product(&p, out, &w->parts[i], bias, add);
        else
            rc = block_product(&p, out, &w->parts[i], bias, add);
        out.p += out.cols;
        bias = bias != NULL ? bias + out.cols : NULL;
        i += n;
    }
    return rc;
}

pl_status pl_cuda_matmul_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.cols != w->cols || out.cols != w->rows)
        return PL_EINVAL;
    return x.rows == 0 ? PL_OK : product(c, pl_cuda_mat(out), pl_cuda_mat(x), w, pl_cuda_vector(bias), add);
}

pl_status pl_cuda_matmul_glu_op(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                                const struct pl_plus *plus)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_cuda_mat values = {NULL, 0, 0, 0};
    const bool *rows = NULL;
    if (x.cols != w->cols || 2 * out.cols != w->rows)
        return PL_EINVAL;
    if (x.rows == 0)
        return PL_OK;
    if (plus != NULL) {
        const pl_status rc = pl_cuda_begin(c);
        rows = rc == PL_OK ? pl_cuda_upload(c, plus->rows, x.rows * sizeof *rows) : NULL;
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
        return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_product_glu(c->stream, gelu, pl_cuda_mat(out), p.act, &w->parts[0], &w->parts[1],
                                                                       pl_cuda_vector(bias), values, rows), "a gated product");
    }
    const struct pl_cuda_mat both = {pl_cuda_scratch(c, PL_CUDA_SCRATCH_PRODUCT, (size_t)x.rows * w->rows * sizeof(float)), x.rows, w->rows, w->rows};
    if (both.p == NULL)
        return pl_cuda_failed(c);
    const pl_status rc = product(c, both, pl_cuda_mat(x), w, NULL, false);
    return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_glu(c->stream, gelu, pl_cuda_mat(out), both, pl_cuda_vector(bias), values, rows),
                                            "a gated activation");
}
