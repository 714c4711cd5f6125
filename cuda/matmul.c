/* matmul: products, part by part. f16 and bf16 weights with more than a few rows of x go to cuBLAS, which chooses an algorithm by
 * the shape: there alone a row's bits may depend on how many rows there are. All else goes to kernels of ours.
 * SPDX-License-Identifier: Apache-2.0 */
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

static pl_status blas_product(struct product *p, struct pl_cuda_mat out, const struct pl_cuda_part *w, const float *bias, bool add)
{
    struct pl_cuda *c = p->c;
    const size_t T = p->x.rows, K = p->x.cols, N = w->rows, halves = (2 * T * K * sizeof(uint16_t) + 255) / 256 * 256;
    uint8_t *work = pl_cuda_scratch(c, PL_CUDA_SCRATCH_SPLIT, halves + (2 * T * N + T) * sizeof(float));
    if (work == NULL)
        return pl_cuda_failed(c);
    float *y = (float *)(work + halves), *scale = y + 2 * T * N;
    const pl_status rc = pl_cuda_check(c, pl_cuda_split(c->stream, w->dtype, p->x, work, scale), "splitting activations");
    if (rc != PL_OK)
        return rc;
    if (c->blas.product(&c->blas, w->dtype, (int)(2 * T), (int)N, (int)K, work, w->data, y) != 0)
        return pl_cuda_check(c, cudaErrorLaunchFailure, "a product by cuBLAS");
    return pl_cuda_check(c, pl_cuda_finish(c->stream, out, y, scale, bias, add), "finishing a product");
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

static pl_status product(struct pl_cuda *c, struct pl_cuda_mat out, struct pl_cuda_mat x, const struct pl_weight *w, const float *bias, bool add)
{
    struct product p = {.c = c, .x = x};
    pl_status rc = PL_OK;
    for (uint32_t i = 0; rc == PL_OK && i < w->n_parts; i++) {
        const struct pl_cuda_part *part = &w->parts[i];
        out.cols = part->rows;
        if (!is_float(part->dtype))
            rc = block_product(&p, out, part, bias, add);
        else if (part->dtype == PL_F32 || x.rows <= PL_CUDA_FEW)
            rc = pl_cuda_check(c, pl_cuda_dense(c->stream, out, x, part, bias, add), "a product");
        else
            rc = blas_product(&p, out, part, bias, add);
        out.p += part->rows;
        bias = bias != NULL ? bias + part->rows : NULL;
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
    if (x.rows <= PL_CUDA_QUANT_FEW && w->n_parts == 2 && w->parts[0].dtype == w->parts[1].dtype && !is_float(w->parts[0].dtype)) {
        struct product p = {.c = c, .x = pl_cuda_mat(x)};
        const pl_status rc = round_x(&p);
        return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_product_glu(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(out), p.act, &w->parts[0], &w->parts[1],
                                                                       pl_cuda_vector(bias), values, rows), "a gated product");
    }
    const struct pl_cuda_mat both = {pl_cuda_scratch(c, PL_CUDA_SCRATCH_PRODUCT, (size_t)x.rows * w->rows * sizeof(float)), x.rows, w->rows, w->rows};
    if (both.p == NULL)
        return pl_cuda_failed(c);
    const pl_status rc = product(c, both, pl_cuda_mat(x), w, NULL, false);
    return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_glu(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(out), both, pl_cuda_vector(bias), values, rows),
                                            "a gated activation");
}
