/* attn: attention's host side: cuts the batch into tiles, and decides whether their contexts are shared out.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "cuda/cuda.h"

enum {
    WARPS_PER_SM = 4,         /* fewer tiles than this for the whole GPU: their spans are shared out */
    MAX_PARTIAL = 16 << 20    /* floats of results that wait to be folded, of thousands of warps; more tiles go in several rounds */
};

bool pl_cuda_reserve_tiles(struct pl_cuda *c, uint32_t n)
{
    if (n <= c->tiles_cap)
        return true;
    struct pl_cuda_attn_tile *grown = realloc(c->tiles, n * sizeof *grown);
    if (grown == NULL)
        return false;
    c->tiles = grown;
    c->tiles_cap = n;
    return true;
}

static bool make_tiles(struct pl_cuda *c, const struct pl_batch *b, uint32_t tokens, uint32_t *n_tiles)
{
    if (!pl_cuda_reserve_tiles(c, b->n_tokens))
        return false;
    *n_tiles = 0;
    for (uint32_t s = 0; s < b->n_seqs; s++)
        for (uint32_t t = b->q_start[s], end = b->q_start[s + 1]; t < end; t += tokens)
            c->tiles[(*n_tiles)++] = (struct pl_cuda_attn_tile){s, t, end - t < tokens ? end - t : tokens};
    return true;
}

uint32_t pl_cuda_spans(const struct pl_batch *b)
{
    uint32_t most = 0;
    for (uint32_t t = 0; t < b->n_tokens; t++)
        most = b->pos[t] > most ? b->pos[t] : most;
    return most / PL_CUDA_SPAN + 1;
}

struct attn {
    struct pl_cuda_mat out, q;
    const struct pl_kvdev *kv;
    uint32_t layer;
    float scale;
    struct pl_cuda_batch batch;
    struct pl_cuda_attn_plan plan;
};

static pl_status launch(struct pl_cuda *c, const struct attn *a)
{
    return pl_cuda_check(c, pl_cuda_attn(c->stream, a->out, a->q, a->kv->kv, a->layer, a->scale, a->batch, a->plan), "attention");
}

/* How many tiles go at once, where each gives `one` floats */
static size_t tiles_at_once(size_t one, size_t n_tiles)
{
    const size_t fit = one < MAX_PARTIAL ? MAX_PARTIAL / one : 1;
    return n_tiles < fit ? n_tiles : fit;
}

size_t pl_cuda_attn_bytes(const struct pl_step_shape *s)
{
    const struct pl_cuda_kv kv = {.n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    const size_t one = pl_cuda_attn_partial(&kv, 1, pl_cuda_round_spans((s->n_ctx + PL_CUDA_SPAN - 1) / PL_CUDA_SPAN));
    const size_t most = one > MAX_PARTIAL ? one : MAX_PARTIAL; /* shorter contexts may fill it better than the longest */
    return (s->n_tokens * one < most ? s->n_tokens * one : most) * sizeof(float);
}

/* As many tiles at once as there is room for what their spans give */
static pl_status share_out(struct pl_cuda *c, struct attn *a)
{
    const struct pl_cuda_attn_plan all = a->plan;
    const size_t one = pl_cuda_attn_partial(&a->kv->kv, 1, all.n_spans);
    const uint32_t n = (uint32_t)tiles_at_once(one, all.n_tiles);
    a->plan.partial = pl_cuda_scratch(c, PL_CUDA_SCRATCH_ATTN, n * one * sizeof(float));
    if (a->plan.partial == NULL)
        return pl_cuda_failed(c);
    pl_status rc = PL_OK;
    for (uint32_t at = 0; rc == PL_OK && at < all.n_tiles; at += n) {
        a->plan.tiles = all.tiles + at;
        a->plan.n_tiles = all.n_tiles - at < n ? all.n_tiles - at : n;
        rc = launch(c, a);
    }
    return rc;
}

pl_status pl_cuda_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale, const struct pl_batch *b)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t G = kv->shape.n_kv_heads, per_kv = q.cols / kv->shape.head_dim / G;
    const struct pl_weight *next = pl_cuda_take_next(c);
    struct attn a = {.out = pl_cuda_mat(out), .q = pl_cuda_mat(q), .kv = kv, .layer = layer, .scale = scale};
    if (per_kv == 0 || per_kv > PL_MAX_QUERIES_PER_KV || kv->shape.head_dim % 8 != 0)
        return PL_ENOTSUP;
    if (b->n_tokens == 0)
        return PL_OK;
    const pl_status rc = pl_cuda_begin(c);
    if (rc != PL_OK || !pl_cuda_batch_on_device(c, b, &a.batch))
        return pl_cuda_failed(c);
    if (!make_tiles(c, b, PL_CUDA_QUERIES / per_kv, &a.plan.n_tiles))
        return PL_ENOMEM;
    a.plan.tiles = pl_cuda_upload(c, c->tiles, a.plan.n_tiles * sizeof *a.plan.tiles);
    if (a.plan.tiles == NULL)
        return pl_cuda_failed(c);
    if (kv->kv.rotate_bits > 0 && (a.plan.rotated = pl_cuda_scratch(c, PL_CUDA_SCRATCH_PRODUCT, (size_t)q.rows * q.cols * sizeof(float))) == NULL)
        return pl_cuda_failed(c);
    if (kv->kv.rotate_bits == 0 && pl_cuda_narrow_to(c, next, out, &a.plan.narrow) != PL_OK)
        return pl_cuda_failed(c);
    a.plan.shared = c->shared;
    a.plan.n_spans = c->record.n_spans > 0 ? c->record.n_spans : pl_cuda_spans(b);
    if (a.plan.n_spans > 1 && (a.plan.n_tiles == b->n_tokens || a.plan.n_tiles * (size_t)G < (size_t)WARPS_PER_SM * c->n_sms))
        return share_out(c, &a);
    return launch(c, &a);
}
