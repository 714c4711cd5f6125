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

/* Tokens grouped by the row they have, in their order: one array of rows [n], starts [n + 1] and tokens [T]; the last begin at T and 2 T + 1.
 * NULL: memory is out. */
static uint32_t *group(const uint32_t *idx, uint32_t T, uint32_t *n)
{
    struct use *uses = malloc(T * sizeof *uses);
    uint32_t *all = malloc((3 * (size_t)T + 1) * sizeof *all);
    *n = 0;
    if (uses == NULL || all == NULL) {
        free(uses), free(all);
        return NULL;
    }
    uint32_t *starts = all + T, *tokens = starts + T + 1;
    for (uint32_t t = 0; t < T; t++)
        uses[t] = (struct use){idx[t], t};
    qsort(uses, T, sizeof *uses, by_row);
    for (uint32_t t = 0; t < T; t++) {
        if (t == 0 || uses[t].row != uses[t - 1].row) {
            starts[*n] = t;
            all[(*n)++] = uses[t].row;
        }
        tokens[t] = uses[t].token;
    }
    starts[*n] = T;
    free(uses);
    return all;
}

pl_status pl_cuda_train_embed_dw(struct pl_device *dev, pl_view dw, pl_view dy, const uint32_t *idx)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t T = dy.rows;
    uint32_t n, *groups;
    if (T == 0)
        return PL_OK;
    const pl_status rc = pl_cuda_begin(c);
    if (rc != PL_OK)
        return rc;
    if ((groups = group(idx, T, &n)) == NULL)
        return PL_ENOMEM;
    const uint32_t *on_device = pl_cuda_upload(c, groups, (3 * (size_t)T + 1) * sizeof *groups);
    free(groups);
    return on_device == NULL ? pl_cuda_failed(c)
                             : pl_cuda_check(c, pl_cuda_embed_dw(c->stream, pl_cuda_mat(dw), pl_cuda_mat(dy), on_device, on_device + T,
                                                                 on_device + 2 * (size_t)T + 1, n), "the gradient of an embedding");
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
