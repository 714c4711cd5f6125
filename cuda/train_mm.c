/* train_mm: products of training, and the fused head. An operand is read where it lies if it is of the precision that was set; else it is
 * made so in memory to work in, a weight panel by panel, so that there is never a whole one.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

int pl_cuda_train_precision(const struct pl_cuda *c)
{
    return c->bf16 ? PL_BF16 : PL_F32;
}

size_t pl_cuda_train_element(const struct pl_cuda *c)
{
    return c->bf16 ? sizeof(uint16_t) : sizeof(float);
}

size_t pl_cuda_train_padded(size_t cols)
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

static pl_status expand(struct pl_cuda *c, const struct pl_cuda_part *w, uint32_t first, uint32_t n, void *to, size_t stride)
{
    return pl_cuda_check(c, pl_cuda_expand(c->stream, w, first, n, c->bf16, to, stride), "expanding an operand");
}

/* Rows [first, first + n) of a part as an operand, in scratch memory of that kind where they are not yet of the precision. */
static pl_status take(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, const struct pl_cuda_part *w, uint32_t first, uint32_t n,
                      struct pl_cublas_operand *out)
{
    const size_t one = pl_cuda_train_element(c), stride = pl_cuda_train_padded(w->cols);
    if (w->dtype == pl_cuda_train_precision(c)) {
        *out = (struct pl_cublas_operand){.p = w->data + first * w->row_bytes, .stride = w->row_bytes / one};
        return PL_OK;
    }
    void *work = pl_cuda_scratch(c, kind, n * stride * one);
    *out = (struct pl_cublas_operand){.p = work, .stride = stride};
    return work == NULL ? pl_cuda_failed(c) : expand(c, w, first, n, work, stride);
}

/* The one that x is, or columns of it are; NULL = none. */
static struct pl_cuda_stay *stay_of(struct pl_cuda *c, struct pl_cuda_mat x)
{
    for (int i = 0; i < PL_CUDA_STAY; i++) {
        struct pl_cuda_stay *s = &c->stays[i];
        if (s->m.p != NULL && x.stride == s->m.stride && x.rows == s->m.rows && x.p >= s->m.p && (size_t)(x.p - s->m.p) + x.cols <= s->m.cols)
            return s;
    }
    return NULL;
}

/* A matrix of activations, or of their gradients. */
static pl_status take_rows(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, struct pl_cuda_mat x, struct pl_cublas_operand *out)
{
    const struct pl_cuda_part all = part_of(x);
    struct pl_cuda_stay *s = c->bf16 ? stay_of(c, x) : NULL;
    if (s == NULL)
        return take(c, kind, &all, 0, x.rows, out);
    const enum pl_cuda_scratch_kind place = s == &c->stays[0] ? PL_CUDA_SCRATCH_X : PL_CUDA_SCRATCH_DY;
    const struct pl_cuda_part whole = part_of(s->m);
    if (!s->made) {
        const pl_status rc = take(c, place, &whole, 0, s->m.rows, out);
        if (rc != PL_OK)
            return rc;
        s->made = true;
    }
    *out = (struct pl_cublas_operand){.p = (uint16_t *)c->scratch[place].p + (x.p - s->m.p), .stride = pl_cuda_train_padded(s->m.cols)};
    return PL_OK;
}

static void set_stay(struct pl_cuda_stay *s, struct pl_cuda_mat m)
{
    *s = (struct pl_cuda_stay){.m = m};
}

void pl_cuda_train_stays(struct pl_device *dev, pl_view x, pl_view dy)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    set_stay(&c->stays[0], pl_cuda_mat_or_none(x));
    set_stay(&c->stays[1], pl_cuda_mat_or_none(dy));
}

static pl_status multiply(struct pl_cuda *c, struct pl_cublas_product p)
{
    p.dtype = pl_cuda_train_precision(c);
    return pl_cuda_check_blas(c, c->blas.product(&c->blas, &p));
}

/* A weight expanded as a whole, panel by panel as they are first read. */
struct whole {
    uint8_t *p; /* NULL = it is not */
    uint32_t made; /* rows */
};

/* A weight's panels: rows of it as operands, one after the other. */
struct panels {
    struct pl_cuda_parts parts;
    struct whole *whole; /* NULL = there is none */
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
    const size_t stride = pl_cuda_train_padded(w->cols), more = PL_CUDA_PANEL / stride / PL_CUDA_PANEL_STEP * PL_CUDA_PANEL_STEP;
    const size_t fit = more > PL_CUDA_PANEL_STEP ? more : PL_CUDA_PANEL_STEP;
    const bool as_it_is = w->dtype == pl_cuda_train_precision(c);
    const uint32_t left = w->rows - p->row, row = p->row;
    p->first += p->n;
    p->n = as_it_is || left < fit ? left : (uint32_t)fit;
    p->row += p->n;
    if (p->row == w->rows)
        p->part++, p->row = 0;
    if (as_it_is || p->whole == NULL || p->whole->p == NULL)
        return take(c, PL_CUDA_SCRATCH_RIGHT, w, row, p->n, &p->w);
    uint8_t *at = p->whole->p + p->first * stride * pl_cuda_train_element(c);
    const bool made = p->first < p->whole->made;
    p->w = (struct pl_cublas_operand){.p = at, .stride = stride};
    p->whole->made = made ? p->whole->made : p->first + p->n;
    return made ? PL_OK : expand(c, w, row, p->n, at, stride);
}

static pl_status forward(struct pl_cuda *c, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, struct whole *whole, const float *bias,
                         float alpha, bool add)
{
    struct panels p = {.parts = w, .whole = whole};
    struct pl_cublas_operand a;
    pl_status rc = take_rows(c, PL_CUDA_SCRATCH_LEFT, x, &a);
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
static pl_status backward(struct pl_cuda *c, struct pl_cuda_mat dx, struct pl_cuda_mat dy, struct pl_cuda_parts w, struct whole *whole, float alpha,
                          bool add)
{
    struct panels p = {.parts = w, .whole = whole};
    struct pl_cublas_operand all;
    pl_status rc = take_rows(c, PL_CUDA_SCRATCH_LEFT, dy, &all);
    while (rc == PL_OK && more(&p)) {
        rc = next(c, &p);
        const struct pl_cublas_operand a = {(const char *)all.p + p.first * pl_cuda_train_element(c), all.stride, true};
        if (rc == PL_OK)
            rc = multiply(c, (struct pl_cublas_product){.m = (int)dy.rows, .n = (int)dx.cols, .k = (int)p.n, .a = a, .b = p.w, .alpha = alpha,
                                                        .beta = add || p.first > 0, .c = dx.p, .stride = dx.stride});
    }
    return rc;
}

static pl_status weight_gradient(struct pl_cuda *c, struct pl_cuda_mat dw, struct pl_cuda_mat dy, struct pl_cuda_mat x)
{
    struct pl_cublas_operand a, b;
    pl_status rc = take_rows(c, PL_CUDA_SCRATCH_LEFT, dy, &a);
    if (rc == PL_OK)
        rc = take_rows(c, PL_CUDA_SCRATCH_RIGHT, x, &b);
    return rc != PL_OK ? rc : multiply(c, (struct pl_cublas_product){.m = (int)dy.cols, .n = (int)x.cols, .k = (int)x.rows, .a = a, .b = b, .alpha = 1,
                                                                     .beta = 1, .c = dw.p, .stride = dw.stride});
}

/* ---- the operations ------------------------------------------------------------------------------------------------------------ */

pl_status pl_cuda_train_linear(struct pl_device *dev, pl_view out, pl_view x, const struct pl_train_mat *w, pl_view bias, float alpha, bool add)
{
    if (x.cols != w->cols || out.cols != w->rows || out.rows != x.rows || (add && bias.buf != NULL))
        return PL_EINVAL;
    return x.rows == 0 ? PL_OK : forward(pl_cuda_of(dev), pl_cuda_mat(out), pl_cuda_mat(x), pl_cuda_train_parts(w), NULL, pl_cuda_vector(bias), alpha, add);
}

pl_status pl_cuda_train_linear_dx(struct pl_device *dev, pl_view dx, pl_view dy, const struct pl_train_mat *w, float alpha, bool add)
{
    if (dx.cols != w->cols || dy.cols != w->rows || dx.rows != dy.rows)
        return PL_EINVAL;
    return dy.rows == 0 ? PL_OK : backward(pl_cuda_of(dev), pl_cuda_mat(dx), pl_cuda_mat(dy), pl_cuda_train_parts(w), NULL, alpha, add);
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
    struct whole whole; /* of w; rows of h make their logits, and then their part of the gradients */
    struct pl_cuda_mat h, dh, dw; /* p NULL = not wanted */
    struct pl_cuda_loss_job loss;     /* of all rows; logits: room for some */
};

static struct pl_cuda_mat rows_of(struct pl_cuda_mat v, uint32_t from, uint32_t n)
{
    return (struct pl_cuda_mat){v.p + from * v.stride, n, v.cols, v.stride};
}

uint32_t pl_cuda_logits_rows(uint32_t n_vocab)
{
    return PL_CUDA_LOGITS_AT_ONCE / n_vocab > 0 ? PL_CUDA_LOGITS_AT_ONCE / n_vocab : 1;
}

static pl_status head_rows(struct head *h, uint32_t from, uint32_t n)
{
    const struct pl_cuda_mat x = rows_of(h->h, from, n), y = rows_of(h->loss.logits, 0, n);
    const struct pl_cuda_loss_job loss = {y, h->loss.targets + from, h->loss.weight != NULL ? h->loss.weight + from : NULL, h->loss.logp + from,
                                      h->loss.best + from};
    set_stay(&h->c->stays[0], x);
    pl_status rc = forward(h->c, y, x, h->w, &h->whole, NULL, 1, false);
    if (rc == PL_OK)
        rc = pl_cuda_check(h->c, pl_cuda_loss(h->c->stream, loss), "the loss");
    set_stay(&h->c->stays[1], y); /* the gradient that the logits have become */
    if (rc == PL_OK && loss.weight != NULL && h->dh.p != NULL)
        rc = backward(h->c, rows_of(h->dh, from, n), y, h->w, &h->whole, 1, false);
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
    const uint32_t R = h.rows, V = w->rows, fit = pl_cuda_logits_rows(V), at_once = fit < R ? fit : R;
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
    if (c->scratch[PL_CUDA_SCRATCH_HEAD].cap >= V * pl_cuda_train_padded(w->cols) * pl_cuda_train_element(c))
        j.whole.p = c->scratch[PL_CUDA_SCRATCH_HEAD].p;
    for (uint32_t r = 0; rc == PL_OK && r < R; r += at_once)
        rc = head_rows(&j, r, R - r < at_once ? R - r : at_once);
    pl_cuda_train_stays(dev, pl_view_none(), pl_view_none());
    if (rc == PL_OK)
        rc = fetch(c, logp, j.loss.logp, R * sizeof *logp);
    if (rc == PL_OK)
        rc = fetch(c, best, j.loss.best, R * sizeof *best);
    return rc != PL_OK ? rc : pl_cuda_sync(c, "the loss");
}
