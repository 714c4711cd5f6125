/* forward: one pass of a batch through the model, for every architecture and device. Enqueues device operations only;
 * what differs between architectures is data (which weights are there, which kind of norm, rope and activation).
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/gguf.h"
#include "core/model/weights.h"

/* Runs the step `op(dev, …)` unless an earlier one failed; the first failure ends the pass. */
#define STEP(op, ...)                                                                                                  \
    do {                                                                                                               \
        const pl_status step_rc = m->dev->ops->op(m->dev, __VA_ARGS__);                                                \
        if (step_rc != PL_OK)                                                                                          \
            return step_rc;                                                                                            \
    } while (0)

/* out += what the adapters of the batch make of x, after the product that is in out. */
#define ADAPT(layer, product, out, x)                                                                                  \
    do {                                                                                                               \
        if (m->loras.n_groups > 0) {                                                                                   \
            const pl_status lora_rc = pl_loras_apply(&m->loras, m->dev, layer, product, out, x);                       \
            if (lora_rc != PL_OK)                                                                                      \
                return lora_rc;                                                                                        \
        }                                                                                                              \
    } while (0)

/* v = its sum over the ranks. Rank 0 has brought what is added once: residual and biases. */
#define SUM(v) COLLECTIVE(all_reduce, v)
/* v[T, n] = the columns [first[r], first[r + 1]) of each rank r. */
#define GATHER(v, first) COLLECTIVE(all_gather, v, first)
/* One rank alone says nothing, whatever its communicator: that might wait for the device, which steps that are recorded may not. */
#define COLLECTIVE(op, ...)                                                                                            \
    do {                                                                                                               \
        const pl_status comm_rc = m->part.size > 1 ? m->comm->ops->op(m->comm, m->dev, __VA_ARGS__) : PL_OK;           \
        if (comm_rc != PL_OK)                                                                                          \
            return comm_rc;                                                                                            \
    } while (0)

/* What the next operation makes goes into the product with w, and nowhere else where no adapter reads it as well. */
static void only_for(const struct pl_model *m, const struct pl_weight *w)
{
    if (m->dev->ops->only_for != NULL && m->loras.n_groups == 0)
        m->dev->ops->only_for(m->dev, w);
}

static pl_view first_rows(pl_view v, uint32_t n)
{
    return pl_view_rows(v, 0, n);
}

/* Rows of this rank's part of the embedding. */
static const uint32_t *own_tokens(const struct pl_model *m, const struct pl_batch *b)
{
    const uint32_t *tokens = (const uint32_t *)b->tokens; /* never negative: the caller's promise */
    if (m->part.size == 1)
        return tokens;
    for (uint32_t t = 0; t < b->n_tokens; t++)
        m->own_tokens[t] = tokens[t] - m->part.v.first < m->part.v.n ? tokens[t] - m->part.v.first : PL_NO_ROW;
    return m->own_tokens;
}

/* x = token embedding, plus the learned position where the architecture has one */
static pl_status embed(struct pl_model *m, const struct pl_batch *b, pl_view x)
{
    STEP(embed, x, m->top.embed, own_tokens(m, b), false);
    if (m->top.position != NULL)
        STEP(embed, x, m->top.position, b->pos, true);
    SUM(x);
    return PL_OK;
}

/* x += w · in (+ bias): what leads back to the residual stream; in[T, all inputs], of which this rank has computed some. */
static pl_status add_product(struct pl_model *m, uint32_t layer, pl_product product, pl_view x, pl_view in, const uint32_t *in_first,
                             const struct pl_weight *w, pl_view bias)
{
    const struct pl_part *p = &m->part;
    if (p->sums) {
        STEP(matmul, x, in, w, bias, p->rank == 0);
        ADAPT(layer, product, x, in);
        SUM(x);
        return PL_OK;
    }
    const pl_view own = pl_view_cols(x, p->c.first, p->c.n);
    GATHER(in, in_first);
    STEP(matmul, own, in, w, bias, true);
    ADAPT(layer, product, own, in);
    GATHER(x, p->c_first);
    return PL_OK;
}

/* This rank's columns of what others compute the rest of. */
static pl_view own_cols(const struct pl_model *m, pl_view v, struct pl_range r)
{
    return m->part.sums ? v : pl_view_cols(v, r.first, r.n);
}

/* att = attention(norm(x)); the keys and values of this batch are in the cache afterwards */
static pl_status attention(struct pl_model *m, uint32_t layer, struct pl_kvdev *kv, const struct pl_batch *b, pl_view x,
                           pl_view att)
{
    const struct pl_spec *s = &m->own;
    const struct pl_layer *l = &m->layers[layer];
    const uint32_t T = b->n_tokens, D = s->head_dim, Q = s->n_heads * D, K = s->n_kv_heads * D;
    const pl_view h = first_rows(m->h, T), qkv = first_rows(m->qkv, T);
    const pl_view q = pl_view_cols(qkv, 0, Q), k = pl_view_cols(qkv, Q, K), v = pl_view_cols(qkv, Q + K, K);

    only_for(m, l->qkv);
    STEP(norm, s->norm, h, x, l->attn_norm, l->attn_norm_b, s->norm_eps);
    STEP(matmul, qkv, h, l->qkv, l->qkv_b, false);
    ADAPT(layer, PL_PRODUCT_QKV, qkv, h);
    const struct pl_rotation r = {s->rope, s->rope_dims, m->top.rope_freq};
    STEP(kv_write, kv, layer, &r, q, k, v, b);
    if (b->n_rows == 0 && layer + 1 == s->n_layers)
        return PL_OK; /* nobody reads what follows */
    if (layer + 1 < s->n_layers && (m->part.size == 1 || m->part.sums))
        only_for(m, l->attn_out);
    STEP(attn, own_cols(m, att, m->part.q), q, kv, layer, m->attn_scale, b);
    return PL_OK;
}

/* x += feed_forward(norm(x)) */
static pl_status feed_forward(struct pl_model *m, uint32_t layer, pl_view x)
{
    const struct pl_spec *s = &m->spec;
    const struct pl_layer *l = &m->layers[layer];
    const pl_view h = first_rows(m->h, x.rows), all = first_rows(m->ff, x.rows), ff = own_cols(m, all, m->part.f);

    only_for(m, l->ff_in);
    STEP(norm, s->norm, h, x, l->ff_norm, l->ff_norm_b, s->norm_eps);
    if (s->gated) {
        const struct pl_plus *plus = NULL;
        if (m->loras.n_groups > 0) {
            const pl_status rc = pl_loras_plus(&m->loras, m->dev, layer, h, &plus);
            if (rc != PL_OK)
                return rc;
        }
        if (m->part.size == 1 || m->part.sums)
            only_for(m, l->ff_out);
        STEP(matmul_glu, s->act, ff, h, l->ff_in, l->ff_in_b, plus);
    } else {
        STEP(matmul, ff, h, l->ff_in, l->ff_in_b, false);
        ADAPT(layer, PL_PRODUCT_FF_IN, ff, h);
        STEP(act, s->act, ff);
    }
    return add_product(m, layer, PL_PRODUCT_FF_OUT, x, all, m->part.f_first, l->ff_out, l->ff_out_b);
}

/* Enqueues the whole pass. After the last layer's attention only the rows that want logits go on. */
static pl_status enqueue(struct pl_model *m, struct pl_kvdev *kv, const struct pl_batch *b)
{
    const struct pl_spec *s = &m->spec;
    const uint32_t T = b->n_tokens, R = b->n_rows;
    pl_view x = first_rows(m->x, T), att = first_rows(m->att, T);

    pl_status rc = pl_loras_plan(&m->loras, b);
    if (rc == PL_OK)
        rc = embed(m, b, x);
    for (uint32_t layer = 0; rc == PL_OK && layer < s->n_layers; layer++) {
        const struct pl_layer *l = &m->layers[layer];
        if ((rc = attention(m, layer, kv, b, x, att)) != PL_OK)
            break;
        if (layer + 1 == s->n_layers) {
            if (R == 0)
                return PL_OK;
            if (R < T) {
                STEP(gather, first_rows(m->x_rows, R), x, b->rows);
                STEP(gather, first_rows(m->att_rows, R), att, b->rows);
                x = first_rows(m->x_rows, R);
                att = first_rows(m->att_rows, R);
            }
            pl_loras_narrow(&m->loras, b);
        }
        rc = add_product(m, layer, PL_PRODUCT_ATTN_OUT, x, att, m->part.q_first, l->attn_out, l->attn_out_b);
        if (rc == PL_OK)
            rc = feed_forward(m, layer, x);
    }
    if (rc != PL_OK)
        return rc;
    const pl_view h = first_rows(m->h, R);
    const struct pl_weight *head = m->top.head != NULL ? m->top.head : m->top.embed;
    only_for(m, head);
    STEP(norm, s->norm, h, x, m->top.out_norm, m->top.out_norm_b, s->norm_eps);
    const pl_view logits = first_rows(m->logits, R), part = pl_view_cols(logits, 0, m->own.n_vocab);
    STEP(matmul, part, h, head, pl_view_none(), false);
    COLLECTIVE(gather, logits, part, m->part.v_first);
    return PL_OK;
}

/* Does what b is filled up to as a step that is recorded, where that may be: what adapters need is uploaded by each step, and ranks
 * look after each other from the host while they exchange. */
static pl_status compute(struct pl_model *m, struct pl_kvdev *kv, const struct pl_batch *b)
{
    const struct pl_device_ops *ops = m->dev->ops;
    bool known = false;
    pl_status rc = ops->record != NULL && m->part.size == 1 && pl_fill_decodes(b) ? ops->record(m->dev, m, kv, b, &known) : PL_ENOTSUP;
    if (rc == PL_OK) {
        const pl_status made = known ? PL_OK : enqueue(m, kv, b);
        rc = ops->repeat(m->dev, made == PL_OK);
    }
    return rc == PL_ENOTSUP ? enqueue(m, kv, b) : rc;
}

/* The batch with which the device is called. */
static pl_status fill_up(struct pl_model *m, const struct pl_batch *b, struct pl_batch *filled)
{
    const bool may = m->dev->ops->record != NULL && m->part.size == 1 && pl_fill_decodes(b);
    const uint32_t n = may ? m->dev->ops->record_tokens(m->dev, b->n_tokens) : 0;
    *filled = *b;
    if (n <= b->n_tokens || n > m->max_tokens || n > m->max_rows)
        return PL_OK;
    return pl_fill(&m->fill, b, n, filled) ? PL_OK : PL_ENOMEM;
}

pl_status pl_model_forward(struct pl_model *m, struct pl_kvdev *kv, const struct pl_batch *b, const float **logits)
{
    *logits = NULL;
    if (b->n_tokens == 0 || b->n_tokens > m->max_tokens || b->n_rows > m->max_rows || b->n_rows > b->n_tokens)
        return PL_EINVAL;
    struct pl_batch filled;
    pl_status rc = fill_up(m, b, &filled);
    if (rc != PL_OK)
        return rc;
    STEP(step_begin, &filled);
    const bool wanted = b->n_rows > 0 && m->part.rank == 0;
    rc = compute(m, kv, &filled);
    if (rc == PL_OK && wanted && b->draws != NULL)
        rc = m->dev->ops->sample(m->dev, first_rows(m->logits, b->n_rows), b->draws, b->drawn);
    const pl_status end = m->dev->ops->step_end(m->dev);
    if (rc == PL_OK && !pl_gguf_is_whole(m->file))
        rc = PL_EIO;
    if (rc != PL_OK)
        return rc;
    if (end != PL_OK || !wanted || b->draws != NULL)
        return end;
    if (m->host_logits == NULL) {
        *logits = m->dev->ops->host(m->dev, m->logits.buf) + m->logits.offset;
        return PL_OK;
    }
    const size_t n = (size_t)b->n_rows * m->spec.n_vocab;
    STEP(get, m->logits.buf, m->logits.offset, m->host_logits, n);
    *logits = m->host_logits;
    return PL_OK;
}
