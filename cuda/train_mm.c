/* train_mm: products of training, and the fused head. An operand is read where it lies if it is of the precision that was set; else it is
 * made so in memory to work in, a weight panel by panel, so that there is never a whole one.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

enum { PANEL_STEP = 64 }; /* rows of a panel, at least; a multiple of PL_CUDA_EXPAND_STEP */

static int precision_of(const struct pl_cuda *c)
{
    return c->bf16 ? PL_BF16 : PL_F32;
}

static size_t element(const struct pl_cuda *c)
{
    return c->bf16 ? sizeof(uint16_t) : sizeof(float);
}

/* Rows of an expanded matrix begin at multiples of 16 bytes. */
static size_t padded(size_t cols)
{
    return (cols + 7) / 8 * 8;
}

static struct pl_cuda_part part_of(struct pl_cuda_mat v)
{
    return (struct pl_cuda_part){PL_F32, v.rows, v.cols, v.stride * sizeof(float), (uint8_t *)v.p};
}

struct pl_cuda_parts pl_cuda_train_parts(const struct pl_train_mat *w)
{
    struct pl_cuda_parts p = {.n = 1};
    if (w->frozen == NULL) {
        p.part[0] = part_of(pl_cuda_mat(w->values));
        return p;
    }
    p.n = w->frozen->n_parts;
    for (uint32_t i = 0; i < p.n; i++)
        p.part[i] = w->frozen->parts[i];
    return p;
}

/* Rows [first, first + n) of a part as an operand, in scratch memory of that kind where they are not yet of the precision. */
static pl_status take(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, const struct pl_cuda_part *w, uint32_t first, uint32_t n,
                      struct pl_cublas_operand *out)
{
    if (w->dtype == precision_of(c)) {
        *out = (struct pl_cublas_operand){.p = w->data + first * w->row_bytes, .stride = w->row_bytes / element(c)};
        return PL_OK;
    }
    void *work = pl_cuda_scratch(c, kind, n * padded(w->cols) * element(c));
    *out = (struct pl_cublas_operand){.p = work, .stride = padded(w->cols)};
    return work == NULL ? pl_cuda_failed(c)
                        : pl_cuda_check(c, pl_cuda_expand(c->stream, w, first, n, c->bf16, work, out->stride), "expanding an operand");
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Both operands of a weight's gradient, or one and a panel; logits; and sums, of which a norm's gradient has most. */
size_t pl_cuda_train_work_bytes(struct pl_device *dev, const struct pl_train_shape *s)
{
    const struct pl_cuda *c = pl_cuda_of(dev);
    const size_t width = padded(s->widest), operand = c->bf16 ? s->n_tokens * width * element(c) : 0;
    const size_t panel = least(most(PL_CUDA_PANEL, PANEL_STEP * width), width * most(s->widest, s->n_vocab)) * element(c);
    const size_t logits = (size_t)s->n_vocab * least(s->n_rows, most(PL_CUDA_LOGITS_AT_ONCE / s->n_vocab, 1)) *
                          (sizeof(float) + (c->bf16 ? sizeof(uint16_t) : 0));
    return operand + most(operand, panel) + logits + pl_cuda_norm_d_floats(s->n_tokens, s->widest) * sizeof(float);
}

static pl_status multiply(struct pl_cuda *c, struct pl_cublas_product p)
{
    p.dtype = precision_of(c);
    return pl_cuda_check_blas(c, c->blas.product(&c->blas, &p));
}

/* A weight's panels: rows of it as operands, one after the other. */
struct panels {
    struct pl_cuda_parts parts;
    uint32_t part, row; /* of the next one */
    uint32_t first, n;  /* of this one: rows of the weight */
    struct pl_cublas_operand w;
};

static bool more(const struct panels *p)
{
    return p->part < p->parts.n;
}

static pl_status next(struct pl_cuda *c, struct panels *p)
{
    const struct pl_cuda_part *w = &p->parts.part[p->part];
    const size_t fit = most(PL_CUDA_PANEL / padded(w->cols) / PANEL_STEP * PANEL_STEP, PANEL_STEP);
    const uint32_t left = w->rows - p->row, row = p->row;
    p->first += p->n;
    p->n = w->dtype == precision_of(c) || left < fit ? left : (uint32_t)fit;
    p->row += p->n;
    if (p->row == w->rows)
        p->part++, p->row = 0;
    return take(c, PL_CUDA_SCRATCH_RIGHT, w, row, p->n, &p->w);
}

static pl_status forward(struct pl_cuda *c, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, const float *bias, float alpha, bool add)
{
    const struct pl_cuda_part left = part_of(x);
    struct panels p = {.parts = w};
    struct pl_cublas_operand a;
    pl_status rc = take(c, PL_CUDA_SCRATCH_LEFT, &left, 0, x.rows, &a);
    a.along = true;
    if (rc == PL_OK && bias != NULL)
        rc = pl_cuda_check(c, pl_cuda_bias(c->stream, out, bias), "a bias");
    while (rc == PL_OK && more(&p)) {
        rc = next(c, &p);
        p.w.along = true;
        if (rc == PL_OK)
            rc = multiply(c, (struct pl_cublas_product){.m = (int)x.rows, .n = (int)p.n, .k = (int)x.cols, .a = a, .b = p.w, .alpha = alpha,
                                                        .beta = add || bias != NULL, .c = out.p + p.first, .stride = out.stride});
    }
    return rc;
}

/* Panels are pieces of the reduction here, which are added first to last. */
static pl_status backward(struct pl_cuda *c, struct pl_cuda_mat dx, struct pl_cuda_mat dy, struct pl_cuda_parts w, float alpha, bool add)
{
    const struct pl_cuda_part left = part_of(dy);
    struct panels p = {.parts = w};
    struct pl_cublas_operand all;
    pl_status rc = take(c, PL_CUDA_SCRATCH_LEFT, &left, 0, dy.rows, &all);
    while (rc == PL_OK && more(&p)) {
        rc = next(c, &p);
        const struct pl_cublas_operand a = {(const char *)all.p + p.first * element(c), all.stride, true};
        if (rc == PL_OK)
            rc = multiply(c, (struct pl_cublas_product){.m = (int)dy.rows, .n = (int)dx.cols, .k = (int)p.n, .a = a, .b = p.w, .alpha = alpha,
                                                        .beta = add || p.first > 0, .c = dx.p, .stride = dx.stride});
    }
    return rc;
}

static pl_status weight_gradient(struct pl_cuda *c, struct pl_cuda_mat dw, struct pl_cuda_mat dy, struct pl_cuda_mat x)
{
    const struct pl_cuda_part left = part_of(dy), right = part_of(x);
    struct pl_cublas_operand a, b;
    pl_status rc = take(c, PL_CUDA_SCRATCH_LEFT, &left, 0, dy.rows, &a);
    if (rc == PL_OK)
        rc = take(c, PL_CUDA_SCRATCH_RIGHT, &right, 0, x.rows, &b);
    return rc != PL_OK ? rc : multiply(c, (struct pl_cublas_product){.m = (int)dy.cols, .n = (int)x.cols, .k = (int)x.rows, .a = a, .b = b, .alpha = 1,
                                                                     .beta = 1, .c = dw.p, .stride = dw.stride});
}

/* ---- the operations ------------------------------------------------------------------------------------------------------------ */

pl_status pl_cuda_train_linear(struct pl_device *dev, pl_view out, pl_view x, const struct pl_train_mat *w, pl_view bias, float alpha, bool add)
{
    if (x.cols != w->cols || out.cols != w->rows || out.rows != x.rows || (add && bias.buf != NULL))
        return PL_EINVAL;
    return x.rows == 0 ? PL_OK : forward(pl_cuda_of(dev), pl_cuda_mat(out), pl_cuda_mat(x), pl_cuda_train_parts(w), pl_cuda_vector(bias), alpha, add);
}

pl_status pl_cuda_train_linear_dx(struct pl_device *dev, pl_view dx, pl_view dy, const struct pl_train_mat *w, float alpha, bool add)
{
    if (dx.cols != w->cols || dy.cols != w->rows || dx.rows != dy.rows)
        return PL_EINVAL;
    return dy.rows == 0 ? PL_OK : backward(pl_cuda_of(dev), pl_cuda_mat(dx), pl_cuda_mat(dy), pl_cuda_train_parts(w), alpha, add);
}

pl_status pl_cuda_train_linear_dw(struct pl_device *dev, pl_view dw, pl_view dbias, pl_view dy, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_status rc = PL_OK;
    if (dw.buf != NULL && (dw.rows != dy.cols || dw.cols != x.cols || dy.rows != x.rows))
        return PL_EINVAL;
    if (dy.rows == 0)
        return PL_OK;
    if (dbias.buf != NULL)
        rc = pl_cuda_check(c, pl_cuda_sum_columns(c->stream, pl_cuda_vector(dbias), pl_cuda_mat(dy)), "the gradient of a bias");
    return rc != PL_OK || dw.buf == NULL ? rc : weight_gradient(c, pl_cuda_mat(dw), pl_cuda_mat(dy), pl_cuda_mat(x));
}

/* ---- head ---------------------------------------------------------------------------------------------------------------------- */

struct head {
    struct pl_cuda *c;
    struct pl_cuda_parts w;
    struct pl_cuda_mat h, dh, dw; /* p NULL = not wanted */
    struct pl_cuda_loss_job loss;     /* of all rows; logits: room for some */
};

static struct pl_cuda_mat rows_of(struct pl_cuda_mat v, uint32_t from, uint32_t n)
{
    return (struct pl_cuda_mat){v.p + from * v.stride, n, v.cols, v.stride};
}

static pl_status head_rows(const struct head *h, uint32_t from, uint32_t n)
{
    const struct pl_cuda_mat x = rows_of(h->h, from, n), y = rows_of(h->loss.logits, 0, n);
    const struct pl_cuda_loss_job loss = {y, h->loss.targets + from, h->loss.weight != NULL ? h->loss.weight + from : NULL, h->loss.logp + from,
                                      h->loss.best + from};
    pl_status rc = forward(h->c, y, x, h->w, NULL, 1, false);
    if (rc == PL_OK)
        rc = pl_cuda_check(h->c, pl_cuda_loss(h->c->stream, loss), "the loss");
    if (rc == PL_OK && loss.weight != NULL && h->dh.p != NULL)
        rc = backward(h->c, rows_of(h->dh, from, n), y, h->w, 1, false);
    if (rc == PL_OK && loss.weight != NULL && h->dw.p != NULL)
        rc = weight_gradient(h->c, h->dw, y, x);
    return rc;
}

static pl_status fetch(struct pl_cuda *c, void *to, const void *from, size_t n)
{
    const pl_status rc = pl_cuda_settle(c, "the loss");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToHost, c->stream), "fetching the loss");
}

pl_status pl_cuda_train_head(struct pl_device *dev, pl_view h, const struct pl_train_mat *w, const uint32_t *targets, const float *weight,
                             double *logp, bool *best, pl_view dh, pl_view dw)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t R = h.rows, V = w->rows, fit = PL_CUDA_LOGITS_AT_ONCE / V > 0 ? PL_CUDA_LOGITS_AT_ONCE / V : 1, at_once = fit < R ? fit : R;
    struct head j = {.c = c, .w = pl_cuda_train_parts(w), .dh = pl_cuda_mat_or_none(dh), .dw = pl_cuda_mat_or_none(dw)};
    if (h.cols != w->cols)
        return PL_EINVAL;
    if (R == 0)
        return PL_OK;
    pl_status rc = pl_cuda_begin(c);
    if (rc != PL_OK)
        return rc;
    j.h = pl_cuda_mat(h);
    j.loss.targets = pl_cuda_upload(c, targets, R * sizeof *targets);
    j.loss.weight = j.loss.targets != NULL && weight != NULL ? pl_cuda_upload(c, weight, R * sizeof *weight) : NULL;
    j.loss.logp = j.loss.targets != NULL ? pl_cuda_scratch(c, PL_CUDA_SCRATCH_SUMS, R * (sizeof *logp + sizeof *best)) : NULL;
    j.loss.logits = (struct pl_cuda_mat){pl_cuda_scratch(c, PL_CUDA_SCRATCH_LOGITS, (size_t)at_once * V * sizeof(float)), at_once, V, V};
    if (j.loss.logp == NULL || j.loss.logits.p == NULL || (weight != NULL && j.loss.weight == NULL))
        return pl_cuda_failed(c);
    j.loss.best = (bool *)(j.loss.logp + R);
    for (uint32_t r = 0; rc == PL_OK && r < R; r += at_once)
        rc = head_rows(&j, r, R - r < at_once ? R - r : at_once);
    if (rc == PL_OK)
        rc = fetch(c, logp, j.loss.logp, R * sizeof *logp);
    if (rc == PL_OK)
        rc = fetch(c, best, j.loss.best, R * sizeof *best);
    return rc != PL_OK ? rc : pl_cuda_sync(c, "the loss");
}
