/* cpu/train: the training operations of the CPU device: products, the row operations with their backward, the fused head, and
 * the optimizer. Attention has a file of its own.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cpu/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROWS_PER_ITEM = 8,
    COLS_PER_ITEM = 64,
    FLAT_PER_ITEM = 1 << 14,
    LOGITS_AT_ONCE = 1 << 24 /* floats of the head's scratch memory */
};

/* ---- state --------------------------------------------------------------------------------------------------------- */

static const struct pl_train_kernels *kernels_of(const struct pl_cpu *cpu)
{
    if (cpu->k == &pl_cpu_kernels_ref)
        return &pl_train_kernels_ref;
    if (cpu->k == &pl_cpu_kernels_avx2 || cpu->k == &pl_cpu_kernels_avxvnni)
        return &pl_train_kernels_avx2;
    return __builtin_cpu_supports("avx512bf16") ? &pl_train_kernels_avx512bf16 : &pl_train_kernels_avx512;
}

struct pl_cpu_train *pl_cpu_train_of(struct pl_cpu *cpu)
{
    if (cpu->train != NULL)
        return cpu->train;
    struct pl_cpu_train *t = calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    t->n_workers = pl_pool_size(cpu->pool);
    t->k = kernels_of(cpu);
    t->own = calloc(t->n_workers, sizeof *t->own);
    t->scratch = calloc(t->n_workers, sizeof *t->scratch);
    t->scratch_cap = calloc(t->n_workers, sizeof *t->scratch_cap);
    if (t->own != NULL && t->scratch != NULL && t->scratch_cap != NULL)
        return cpu->train = t;
    pl_cpu_train_free(t);
    return NULL;
}

void pl_cpu_train_free(struct pl_cpu_train *t)
{
    if (t == NULL)
        return;
    for (unsigned i = 0; i < t->n_workers && t->own != NULL; i++)
        pl_mm_space_free(&t->own[i]);
    for (unsigned i = 0; i < t->n_workers && t->scratch != NULL && t->scratch_cap != NULL; i++)
        pl_cpu_release(t->scratch[i], t->scratch_cap[i] * sizeof(float));
    pl_mm_space_free(&t->space);
    pl_cpu_release(t->rows, t->rows_cap * sizeof(float));
    free(t->own);
    free(t->scratch);
    free(t->scratch_cap);
    free(t);
}

static bool has_bf16(struct pl_device *dev)
{
    return kernels_of(pl_cpu_of(dev))->tile[PL_MM_BF16] != NULL;
}

static pl_status set_precision(struct pl_device *dev, pl_mm_precision p, struct pl_err *err)
{
    struct pl_cpu_train *t = pl_cpu_train_of(pl_cpu_of(dev));
    if (t == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the training device");
    if (t->k->tile[p] == NULL)
        return pl_fail_param(err, PL_ENOTSUP, "precision", "this processor has no bf16 products (AVX512_BF16); use \"f32\" or \"auto\"");
    t->precision = p;
    return PL_OK;
}

static pl_status frozen_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n, struct pl_weight **out, struct pl_err *err)
{
    (void)dev;
    struct pl_weight *w = calloc(1, sizeof *w);
    if (w == NULL || (w->parts = calloc(n, sizeof *w->parts)) == NULL) {
        free(w);
        return pl_fail(err, PL_ENOMEM, "no memory for a weight");
    }
    w->cols = parts[0].cols;
    w->n_parts = (uint32_t)n;
    for (size_t i = 0; i < n; i++) {
        w->parts[i] = (struct pl_cpu_part){.dtype = parts[i].dtype,
                                           .rows = parts[i].rows,
                                           .cols = parts[i].cols,
                                           .src = parts[i].data,
                                           .src_stride = pl_weight_src_stride(&parts[i])};
        w->rows += parts[i].rows;
    }
    *out = w;
    return PL_OK;
}

/* ---- products ------------------------------------------------------------------------------------------------------ */

static float *values(pl_view v)
{
    return v.buf != NULL ? pl_cpu_row(v, 0) : NULL;
}

struct pl_mm_src pl_cpu_train_src(const struct pl_train_mat *w, bool along)
{
    return (struct pl_mm_src){.p = values(w->values), .w = w->frozen, .stride = w->values.stride, .along = along};
}

static pl_status product(struct pl_device *dev, struct pl_mm mm)
{
    struct pl_cpu_train *t = pl_cpu_train_of(pl_cpu_of(dev));
    return t == NULL ? PL_ENOMEM : pl_mm_run(t->k, t->precision, pl_cpu_of(dev)->pool, &t->space, &mm);
}

static struct pl_mm_src view_src(pl_view v, bool along)
{
    return (struct pl_mm_src){.p = values(v), .stride = v.stride, .along = along};
}

static pl_status linear(struct pl_device *dev, pl_view out, pl_view x, const struct pl_train_mat *w, pl_view bias, float alpha, bool add)
{
    return product(dev, (struct pl_mm){.m = x.rows, .n = w->rows, .k = w->cols, .a = view_src(x, true), .b = pl_cpu_train_src(w, true),
                                       .c = values(out), .ldc = out.stride, .alpha = alpha, .bias = values(bias), .add = add});
}

static pl_status linear_dx(struct pl_device *dev, pl_view dx, pl_view dy, const struct pl_train_mat *w, float alpha, bool add)
{
    return product(dev, (struct pl_mm){.m = dy.rows, .n = w->cols, .k = w->rows, .a = view_src(dy, true), .b = pl_cpu_train_src(w, false),
                                       .c = values(dx), .ldc = dx.stride, .alpha = alpha, .add = add});
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

struct job {
    const struct pl_cpu_train *t;
    void (*row)(const struct job *j, uint32_t row);
    void (*cols)(const struct job *j, uint32_t from, uint32_t n);
    void (*flat)(const struct job *j, size_t from, uint32_t n, double *sum);
    pl_view out, x, dy, gain, bias, dgain, dbias;
    pl_norm_kind norm;
    pl_act_kind act;
    pl_rope_kind rope;
    float eps, share;
    bool add, inverse;
    uint32_t head_dim;
    const uint32_t *idx;
    const struct pl_train_mat *w;
    uint64_t key;
    float *stats;
    size_t n;
    double *sums;
    const struct pl_adamw *adamw;
    pl_view g, m, v;
    const float *weight;
    double *logp;
    bool *best;
};

static void row_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct job *j = arg;
    const uint32_t from = (uint32_t)item * ROWS_PER_ITEM;
    for (uint32_t r = from; r < from + ROWS_PER_ITEM && r < j->x.rows; r++)
        j->row(j, r);
}

static void col_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct job *j = arg;
    const uint32_t from = (uint32_t)item * COLS_PER_ITEM, left = j->x.cols - from;
    j->cols(j, from, left < COLS_PER_ITEM ? left : COLS_PER_ITEM);
}

static void flat_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct job *j = arg;
    const size_t from = item * FLAT_PER_ITEM, left = j->n - from;
    j->flat(j, from, left < FLAT_PER_ITEM ? (uint32_t)left : FLAT_PER_ITEM, j->sums != NULL ? &j->sums[item] : NULL);
}

static size_t n_items(size_t n, size_t per)
{
    return (n + per - 1) / per;
}

/* Sets j->t and runs what j has: rows of x, then columns of x. */
static pl_status run(struct pl_device *dev, struct job *j)
{
    struct pl_pool *pool = pl_cpu_of(dev)->pool;
    if ((j->t = pl_cpu_train_of(pl_cpu_of(dev))) == NULL)
        return PL_ENOMEM;
    if (j->row != NULL)
        pl_pool_run(pool, row_item, j, n_items(j->x.rows, ROWS_PER_ITEM));
    if (j->cols != NULL)
        pl_pool_run(pool, col_item, j, n_items(j->x.cols, COLS_PER_ITEM));
    if (j->flat != NULL)
        pl_pool_run(pool, flat_item, j, n_items(j->n, FLAT_PER_ITEM));
    return PL_OK;
}

static void sum_columns(const struct job *j, uint32_t from, uint32_t n)
{
    for (uint32_t t = 0; t < j->x.rows; t++)
        j->t->k->add(values(j->dbias) + from, pl_cpu_row(j->x, t) + from, 1, n);
}

static pl_status linear_dw(struct pl_device *dev, pl_view dw, pl_view dbias, pl_view dy, pl_view x)
{
    if (dbias.buf != NULL) {
        const pl_status rc = run(dev, &(struct job){.cols = sum_columns, .x = dy, .dbias = dbias});
        if (rc != PL_OK)
            return rc;
    }
    if (dw.buf == NULL)
        return PL_OK;
    return product(dev, (struct pl_mm){.m = dy.cols, .n = x.cols, .k = x.rows, .a = view_src(dy, false), .b = view_src(x, false),
                                       .c = values(dw), .ldc = dw.stride, .alpha = 1, .add = true});
}

static void add_row(const struct job *j, uint32_t r)
{
    j->t->k->add(pl_cpu_row(j->out, r), pl_cpu_row(j->x, r), 1, j->x.cols);
}

static pl_status add(struct pl_device *dev, pl_view out, pl_view x)
{
    return run(dev, &(struct job){.row = add_row, .out = out, .x = x});
}

static void embed_row(const struct job *j, uint32_t t)
{
    float *to = pl_cpu_row(j->out, t);
    const uint32_t n = j->out.cols;
    if (j->w->frozen == NULL) {
        if (!j->add)
            memset(to, 0, n * sizeof *to);
        j->t->k->add(to, pl_cpu_row(j->w->values, j->idx[t]), 1, n);
        return;
    }
    uint32_t row = j->idx[t], i = 0;
    while (row >= j->w->frozen->parts[i].rows)
        row -= j->w->frozen->parts[i++].rows;
    const struct pl_cpu_part *p = &j->w->frozen->parts[i];
    float *temp = j->stats + (size_t)t * n;
    pl_dequant_row(p->dtype, p->src + row * p->src_stride, j->add ? temp : to, n);
    if (j->add)
        j->t->k->add(to, temp, 1, n);
}

static pl_status rows_reserve(struct pl_device *dev, size_t n)
{
    struct pl_cpu_train *t = pl_cpu_train_of(pl_cpu_of(dev));
    return t == NULL ? PL_ENOMEM : pl_cpu_grow(&t->rows, &t->rows_cap, n);
}

static pl_status embed(struct pl_device *dev, pl_view out, const struct pl_train_mat *w, const uint32_t *idx, bool add)
{
    if (rows_reserve(dev, (size_t)out.rows * out.cols) != PL_OK)
        return PL_ENOMEM;
    return run(dev, &(struct job){.row = embed_row, .out = out, .x = out, .w = w, .idx = idx, .add = add, .stats = pl_cpu_of(dev)->train->rows});
}

static void embed_dw_cols(const struct job *j, uint32_t from, uint32_t n)
{
    for (uint32_t t = 0; t < j->x.rows; t++)
        j->t->k->add(pl_cpu_row(j->out, j->idx[t]) + from, pl_cpu_row(j->x, t) + from, 1, n);
}

static pl_status embed_dw(struct pl_device *dev, pl_view dw, pl_view dy, const uint32_t *idx)
{
    return run(dev, &(struct job){.cols = embed_dw_cols, .out = dw, .x = dy, .idx = idx});
}

static void norm_row(const struct job *j, uint32_t r)
{
    j->t->k->norm(j->norm, pl_cpu_row(j->out, r), pl_cpu_row(j->x, r), values(j->gain), values(j->bias), j->x.cols, j->eps);
}

static pl_status norm(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    return run(dev, &(struct job){.row = norm_row, .norm = kind, .out = out, .x = x, .gain = gain, .bias = bias, .eps = eps});
}

static void norm_d_row(const struct job *j, uint32_t r)
{
    j->t->k->norm_d(j->norm, pl_cpu_row(j->out, r), pl_cpu_row(j->dy, r), pl_cpu_row(j->x, r), values(j->gain), j->x.cols, j->eps, j->add,
                    j->stats + 2 * (size_t)r);
}

static void norm_d_cols(const struct job *j, uint32_t from, uint32_t n)
{
    float *dgain = values(j->dgain), *dbias = values(j->dbias);
    for (uint32_t t = 0; t < j->x.rows; t++) {
        const float *dy = pl_cpu_row(j->dy, t) + from, *x = pl_cpu_row(j->x, t) + from, mean = j->stats[2 * (size_t)t], r = j->stats[2 * (size_t)t + 1];
        for (uint32_t c = 0; dgain != NULL && c < n; c++)
            dgain[from + c] += dy[c] * ((x[c] - mean) * r);
        for (uint32_t c = 0; dbias != NULL && c < n; c++)
            dbias[from + c] += dy[c];
    }
}

static pl_status norm_d(struct pl_device *dev, pl_norm_kind kind, pl_view dx, pl_view dgain, pl_view dbias, pl_view dy, pl_view x, pl_view gain,
                        float eps, bool add)
{
    if (rows_reserve(dev, 2 * (size_t)x.rows) != PL_OK)
        return PL_ENOMEM;
    return run(dev, &(struct job){.row = norm_d_row, .cols = dgain.buf != NULL || dbias.buf != NULL ? norm_d_cols : NULL, .norm = kind, .out = dx,
                                  .dgain = dgain, .dbias = dbias, .dy = dy, .x = x, .gain = gain, .eps = eps, .add = add,
                                  .stats = pl_cpu_of(dev)->train->rows});
}

static void rope_table_row(const struct job *j, uint32_t t)
{
    float *out = pl_cpu_row(j->out, t), *freq = values(j->gain);
    const uint32_t n = j->out.cols / 2;
    for (uint32_t i = 0; i < n; i++) {
        const float angle = (float)j->idx[t] * freq[i];
        out[i] = cosf(angle);
        out[n + i] = sinf(angle);
    }
}

static pl_status rope_table(struct pl_device *dev, pl_view table, pl_view freq, const uint32_t *pos)
{
    return run(dev, &(struct job){.row = rope_table_row, .out = table, .x = table, .gain = freq, .idx = pos});
}

static void rope_row(const struct job *j, uint32_t t)
{
    const uint32_t half = j->gain.cols / 2, pair = j->rope == PL_ROPE_INTERLEAVED ? 1 : half, step = j->rope == PL_ROPE_INTERLEAVED ? 2 : 1;
    const float *cosine = pl_cpu_row(j->gain, t), *sine = cosine + half, sign = j->inverse ? -1 : 1;
    for (float *x = pl_cpu_row(j->x, t), *end = x + j->x.cols; x < end; x += j->head_dim)
        for (uint32_t i = 0; i < half; i++) {
            const float a = x[step * i], b = x[step * i + pair], s = sign * sine[i];
            x[step * i] = a * cosine[i] - b * s;
            x[step * i + pair] = a * s + b * cosine[i];
        }
}

static pl_status rope(struct pl_device *dev, pl_rope_kind kind, pl_view x, uint32_t head_dim, pl_view table, bool inverse)
{
    return run(dev, &(struct job){.row = rope_row, .rope = kind, .x = x, .head_dim = head_dim, .gain = table, .inverse = inverse});
}

static void glu_row(const struct job *j, uint32_t r)
{
    const float *x = pl_cpu_row(j->x, r);
    j->t->k->glu(j->act, pl_cpu_row(j->out, r), x, x + j->out.cols, j->out.cols);
}

static pl_status glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x)
{
    return run(dev, &(struct job){.row = glu_row, .act = kind, .out = out, .x = x});
}

static void glu_d_row(const struct job *j, uint32_t r)
{
    const float *x = pl_cpu_row(j->x, r);
    float *dx = pl_cpu_row(j->out, r);
    const uint32_t F = j->dy.cols;
    j->t->k->glu_d(j->act, dx, dx + F, pl_cpu_row(j->dy, r), x, x + F, F);
}

static pl_status glu_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x)
{
    return run(dev, &(struct job){.row = glu_d_row, .act = kind, .out = dx, .dy = dout, .x = x});
}

static void act_row(const struct job *j, uint32_t r)
{
    j->t->k->act(j->act, pl_cpu_row(j->out, r), pl_cpu_row(j->x, r), j->x.cols);
}

static pl_status act(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x)
{
    return run(dev, &(struct job){.row = act_row, .act = kind, .out = out, .x = x});
}

static void act_d_row(const struct job *j, uint32_t r)
{
    j->t->k->act_d(j->act, pl_cpu_row(j->out, r), pl_cpu_row(j->dy, r), pl_cpu_row(j->x, r), j->x.cols);
}

static pl_status act_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x)
{
    return run(dev, &(struct job){.row = act_d_row, .act = kind, .out = dx, .dy = dout, .x = x});
}

/* A value's own random number (the finalizer of SplitMix64). */
static uint32_t random_of(uint64_t key, uint64_t at)
{
    uint64_t z = key + at * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

static void dropout_row(const struct job *j, uint32_t r)
{
    const float *x = pl_cpu_row(j->x, r), keep = 1 / (1 - j->share);
    float *out = pl_cpu_row(j->out, r);
    const uint32_t bound = (uint32_t)((double)j->share * 4294967296.0);
    for (uint32_t c = 0; c < j->x.cols; c++) {
        const float v = random_of(j->key, (uint64_t)r * j->x.cols + c) < bound ? 0 : x[c] * keep;
        out[c] = j->add ? out[c] + v : v;
    }
}

static pl_status dropout(struct pl_device *dev, pl_view out, pl_view x, float share, uint64_t key, bool add)
{
    return run(dev, &(struct job){.row = dropout_row, .out = out, .x = x, .share = share, .key = key, .add = add});
}

static void gather_row(const struct job *j, uint32_t r)
{
    memcpy(pl_cpu_row(j->out, r), pl_cpu_row(j->dy, j->idx[r]), j->out.cols * sizeof(float));
}

static pl_status gather(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows)
{
    return run(dev, &(struct job){.row = gather_row, .out = out, .x = out, .dy = x, .idx = rows});
}

static void zero_row(const struct job *j, uint32_t r)
{
    memset(pl_cpu_row(j->x, r), 0, j->x.cols * sizeof(float));
}

static void scatter_row(const struct job *j, uint32_t r)
{
    memcpy(pl_cpu_row(j->out, j->idx[r]), pl_cpu_row(j->x, r), j->x.cols * sizeof(float));
}

static pl_status gather_d(struct pl_device *dev, pl_view dx, pl_view dout, const uint32_t *rows)
{
    const pl_status rc = run(dev, &(struct job){.row = zero_row, .x = dx});
    return rc != PL_OK ? rc : run(dev, &(struct job){.row = scatter_row, .out = dx, .x = dout, .idx = rows});
}

/* ---- head ---------------------------------------------------------------------------------------------------------- */

static void loss_row(const struct job *j, uint32_t r)
{
    float *x = pl_cpu_row(j->x, r), max;
    const float lse = j->t->k->max_lse(x, j->x.cols, &max), at = x[j->idx[r]];
    j->logp[r] = (double)at - (double)lse;
    j->best[r] = at >= max;
    if (j->weight == NULL)
        return;
    j->t->k->prob(x, lse, j->weight[r], j->x.cols);
    x[j->idx[r]] -= j->weight[r];
}

pl_status pl_cpu_train_head(struct pl_device *dev, pl_view h, const struct pl_train_mat *w, const uint32_t *targets, const float *weight,
                            double *logp, bool *best, pl_view dh, pl_view dw)
{
    const uint32_t V = w->rows;
    uint32_t at_once = LOGITS_AT_ONCE / V > 0 ? LOGITS_AT_ONCE / V : 1;
    at_once = at_once < h.rows ? at_once : h.rows;
    if (rows_reserve(dev, (size_t)at_once * V) != PL_OK)
        return PL_ENOMEM;
    float *logits = pl_cpu_of(dev)->train->rows;
    struct pl_dbuf buf = {.data = logits, .n = (size_t)at_once * V};
    pl_status rc = PL_OK;
    for (uint32_t r = 0; r < h.rows && rc == PL_OK; r += at_once) {
        const uint32_t n = h.rows - r < at_once ? h.rows - r : at_once;
        const pl_view x = {.buf = &buf, .rows = n, .cols = V, .stride = V}, part = pl_view_rows(h, r, n);
        rc = linear(dev, x, part, w, pl_view_none(), 1, false);
        if (rc == PL_OK)
            rc = run(dev, &(struct job){.row = loss_row, .x = x, .idx = targets + r, .weight = weight != NULL ? weight + r : NULL,
                                        .logp = logp + r, .best = best + r});
        if (rc == PL_OK && weight != NULL && dh.buf != NULL)
            rc = linear_dx(dev, pl_view_rows(dh, r, n), x, w, 1, false);
        if (rc == PL_OK && weight != NULL && dw.buf != NULL)
            rc = linear_dw(dev, dw, pl_view_none(), x, part);
    }
    return rc;
}

/* ---- optimizer ----------------------------------------------------------------------------------------------------- */

static void squares(const struct job *j, size_t from, uint32_t n, double *sum)
{
    const float *g = values(j->g) + from;
    *sum = 0;
    for (uint32_t i = 0; i < n; i++)
        *sum += (double)g[i] * (double)g[i];
}

static pl_status sum_squares(struct pl_device *dev, pl_view g, double *sum)
{
    struct job j = {.flat = squares, .g = g, .n = (size_t)g.rows * g.cols};
    const size_t n = n_items(j.n, FLAT_PER_ITEM);
    PL_ASSERT(g.stride == g.cols || g.rows == 1);
    if ((j.sums = calloc(n > 0 ? n : 1, sizeof *j.sums)) == NULL)
        return PL_ENOMEM;
    const pl_status rc = run(dev, &j);
    *sum = 0;
    for (size_t i = 0; i < n; i++)
        *sum += j.sums[i];
    free(j.sums);
    return rc;
}

static void adamw_flat(const struct job *j, size_t from, uint32_t n, double *sum)
{
    (void)sum;
    j->t->k->adamw(values(j->out) + from, values(j->g) + from, values(j->m) + from, values(j->v) + from, j->adamw, n);
}

static pl_status adamw(struct pl_device *dev, pl_view w, pl_view g, pl_view m, pl_view v, const struct pl_adamw *o)
{
    PL_ASSERT(w.stride == w.cols || w.rows == 1);
    return run(dev, &(struct job){.flat = adamw_flat, .out = w, .g = g, .m = m, .v = v, .adamw = o, .n = (size_t)w.rows * w.cols});
}

const struct pl_train_ops pl_cpu_train_ops = {
    .set_precision = set_precision,
    .has_bf16 = has_bf16,
    .frozen_new = frozen_new,
    .linear = linear,
    .linear_dx = linear_dx,
    .linear_dw = linear_dw,
    .add = add,
    .embed = embed,
    .embed_dw = embed_dw,
    .norm = norm,
    .norm_d = norm_d,
    .rope_table = rope_table,
    .rope = rope,
    .attn = pl_cpu_train_attn,
    .attn_d = pl_cpu_train_attn_d,
    .glu = glu,
    .glu_d = glu_d,
    .act = act,
    .act_d = act_d,
    .dropout = dropout,
    .gather = gather,
    .gather_d = gather_d,
    .head = pl_cpu_train_head,
    .sum_squares = sum_squares,
    .adamw = adamw,
};
