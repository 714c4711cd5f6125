/* train: the table of the training operations, and those that work on parameters.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

#include <math.h>
#include <stdlib.h>

static bool has_bf16(struct pl_device *dev)
{
    return pl_cuda_of(dev)->id.arch >= 80; /* 7.5 multiplies f16 only */
}

static pl_status set_precision(struct pl_device *dev, pl_mm_precision p, struct pl_err *err)
{
    if (p == PL_MM_BF16 && !has_bf16(dev))
        return pl_fail_param(err, PL_ENOTSUP, "precision", "this GPU has no bf16 products (compute capability 8.0); use \"f32\" or \"auto\"");
    pl_cuda_of(dev)->bf16 = p == PL_MM_BF16;
    return PL_OK;
}

pl_status pl_cuda_train_add(struct pl_device *dev, pl_view out, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    return x.rows == 0 ? PL_OK : pl_cuda_check(c, pl_cuda_add(c->stream, pl_cuda_mat(out), pl_cuda_mat(x)), "add");
}

/* ---- embeddings ---------------------------------------------------------------------------------------------------------------- */

pl_status pl_cuda_train_embed(struct pl_device *dev, pl_view out, const struct pl_train_mat *w, const uint32_t *idx, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (out.rows == 0)
        return PL_OK;
    const uint32_t *rows = pl_cuda_bring(c, idx, out.rows * sizeof *idx);
    return rows == NULL ? pl_cuda_failed(c) : pl_cuda_check(c, pl_cuda_embed(c->stream, pl_cuda_mat(out), pl_cuda_train_parts(w), rows, add), "embed");
}

struct use { /* of a row of the embedding */
    uint32_t row, token;
};

static int by_row(const void *a, const void *b)
{
    const struct use *x = a, *y = b;
    return x->row != y->row ? (x->row > y->row) - (x->row < y->row) : (x->token > y->token) - (x->token < y->token);
}

/* The uses of an embedding's rows, cut into pieces. */
struct cut {
    struct pl_cuda_use_piece *all; /* pieces, totals, and behind them the tokens in order */
    size_t bytes;
    uint32_t n_pieces, n_totals, n_sums;
};

/* A row with more uses than one piece has at least two pieces, and of all of its pieces only the last may be short. */
size_t pl_cuda_use_sums(size_t T)
{
    return 2 * (T / PL_CUDA_USES);
}

/* Those of one row, from use `at` on: counted, and written where there is memory. */
static void cut_row(struct cut *c, struct pl_cuda_use_piece *totals, uint32_t row, uint32_t at, uint32_t end)
{
    const bool whole = end - at <= PL_CUDA_USES;
    const uint32_t first = c->n_sums;
    for (uint32_t n; at < end; at += n) {
        n = end - at < PL_CUDA_USES ? end - at : PL_CUDA_USES;
        if (c->all != NULL)
            c->all[c->n_pieces] = (struct pl_cuda_use_piece){row, at, at + n, whole ? PL_CUDA_NO_ROW : c->n_sums};
        c->n_pieces++;
        c->n_sums += !whole;
    }
    if (!whole && c->all != NULL)
        totals[c->n_totals] = (struct pl_cuda_use_piece){row, first, c->n_sums, PL_CUDA_NO_ROW};
    c->n_totals += !whole;
}

static void cut_all(struct cut *c, struct pl_cuda_use_piece *totals, const struct use *uses, uint32_t T)
{
    c->n_pieces = c->n_totals = c->n_sums = 0;
    for (uint32_t t = 0, end; t < T; t = end) {
        for (end = t + 1; end < T && uses[end].row == uses[t].row;)
            end++;
        cut_row(c, totals, uses[t].row, t, end);
    }
}

static pl_status cut_uses(struct cut *c, const uint32_t *idx, uint32_t T)
{
    struct use *uses = malloc(T * sizeof *uses);
    *c = (struct cut){0};
    if (uses == NULL)
        return PL_ENOMEM;
    for (uint32_t t = 0; t < T; t++)
        uses[t] = (struct use){idx[t], t};
    qsort(uses, T, sizeof *uses, by_row);
    cut_all(c, NULL, uses, T);
    const size_t n = (size_t)c->n_pieces + c->n_totals;
    c->bytes = n * sizeof *c->all + T * sizeof(uint32_t);
    if ((c->all = malloc(c->bytes)) != NULL) {
        uint32_t *order = (uint32_t *)(c->all + n);
        cut_all(c, c->all + c->n_pieces, uses, T);
        for (uint32_t t = 0; t < T; t++)
            order[t] = uses[t].token;
    }
    free(uses);
    return c->all != NULL ? PL_OK : PL_ENOMEM;
}

pl_status pl_cuda_train_embed_dw(struct pl_device *dev, pl_view dw, pl_view dy, const uint32_t *idx)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct cut cut;
    if (dy.rows == 0)
        return PL_OK;
    pl_status rc = pl_cuda_begin(c);
    if (rc == PL_OK)
        rc = cut_uses(&cut, idx, dy.rows);
    if (rc != PL_OK)
        return rc;
    const struct pl_cuda_use_piece *pieces = pl_cuda_upload(c, cut.all, cut.bytes);
    free(cut.all);
    float *sums = pieces != NULL && cut.n_sums > 0 ? pl_cuda_scratch(c, PL_CUDA_SCRATCH_SUMS, (size_t)cut.n_sums * dy.cols * sizeof *sums) : NULL;
    if (pieces == NULL || (cut.n_sums > 0 && sums == NULL))
        return pl_cuda_failed(c);
    const uint32_t *order = (const uint32_t *)(pieces + cut.n_pieces + cut.n_totals);
    return pl_cuda_check(c, pl_cuda_embed_dw(c->stream, pl_cuda_mat(dw), pl_cuda_mat(dy), pieces, cut.n_pieces, cut.n_totals, order, sums),
                         "the gradient of an embedding");
}

/* ---- optimizer ----------------------------------------------------------------------------------------------------------------- */

static bool is_flat(pl_view v)
{
    return v.stride == v.cols || v.rows <= 1;
}

pl_status pl_cuda_train_sum_squares(struct pl_device *dev, pl_view g, double *sum)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const size_t n = (size_t)g.rows * g.cols, n_sums = (n + PL_CUDA_SQUARES - 1) / PL_CUDA_SQUARES;
    *sum = 0;
    if (!is_flat(g))
        return PL_EINVAL;
    if (n == 0)
        return PL_OK;
    double *sums = malloc(n_sums * sizeof *sums), *work = pl_cuda_scratch(c, PL_CUDA_SCRATCH_SUMS, n_sums * sizeof *sums);
    pl_status rc = sums == NULL ? PL_ENOMEM : work == NULL ? pl_cuda_failed(c) : PL_OK;
    if (rc == PL_OK)
        rc = pl_cuda_check(c, pl_cuda_squares(c->stream, work, pl_cuda_vector(g), n), "the gradients' norm");
    if (rc == PL_OK)
        rc = pl_cuda_settle(c, "the gradients' norm");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemcpyAsync(sums, work, n_sums * sizeof *sums, cudaMemcpyDeviceToHost, c->stream), "the gradients' norm");
    if (rc == PL_OK)
        rc = pl_cuda_sync(c, "the gradients' norm");
    for (size_t i = 0; rc == PL_OK && i < n_sums; i++)
        *sum += sums[i];
    free(sums);
    return rc;
}

pl_status pl_cuda_train_adamw(struct pl_device *dev, pl_view w, pl_view g, pl_view m, pl_view v, const struct pl_adamw *o)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const size_t n = (size_t)w.rows * w.cols;
    const struct pl_cuda_adamw_step k = {o->beta1, o->beta2, o->eps, o->scale, 1 - o->rate * o->decay, o->rate / o->correct1, 1 / sqrtf(o->correct2)};
    if (!is_flat(w) || !is_flat(g) || !is_flat(m) || !is_flat(v))
        return PL_EINVAL;
    return n == 0 ? PL_OK : pl_cuda_check(c, pl_cuda_adamw(c->stream, pl_cuda_vector(w), pl_cuda_vector(g), pl_cuda_vector(m), pl_cuda_vector(v), n, k),
                                          "adamw");
}

const struct pl_train_ops pl_cuda_train_ops = {
    .work_bytes = pl_cuda_train_work_bytes,
    .reserve = pl_cuda_train_reserve,
    .frozen_bytes = pl_cuda_train_frozen_bytes,
    .stays = pl_cuda_train_stays,
    .set_precision = set_precision,
    .has_bf16 = has_bf16,
    .frozen_new = pl_cuda_weight_new,
    .linear = pl_cuda_train_linear,
    .linear_dx = pl_cuda_train_linear_dx,
    .linear_dw = pl_cuda_train_linear_dw,
    .head = pl_cuda_train_head,
    .add = pl_cuda_train_add,
    .embed = pl_cuda_train_embed,
    .embed_dw = pl_cuda_train_embed_dw,
    .sum_squares = pl_cuda_train_sum_squares,
    .adamw = pl_cuda_train_adamw,

    .norm = pl_cuda_train_norm,
    .norm_d = pl_cuda_train_norm_d,
    .rope_table = pl_cuda_train_rope_table,
    .rope = pl_cuda_train_rope,
    .attn = pl_cuda_train_attn,
    .attn_d = pl_cuda_train_attn_d,
    .glu = pl_cuda_train_glu,
    .glu_d = pl_cuda_train_glu_d,
    .act = pl_cuda_train_act,
    .act_d = pl_cuda_train_act_d,
    .dropout = pl_cuda_train_dropout,
    .gather = pl_cuda_train_gather,
    .gather_d = pl_cuda_train_gather_d,
};
