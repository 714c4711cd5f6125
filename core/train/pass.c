/* pass: the forward and backward pass of a micro-batch. The backward of each part stands next to its forward; norms and
 * activations that are cheap to make again are not kept.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/mem.h"
#include "core/train/net.h"

/* Runs the operation unless an earlier one failed; the first failure ends the pass. */
#define STEP(op, ...)                                                                                                  \
    do {                                                                                                               \
        const pl_status step_rc = n->t->op(n->dev, __VA_ARGS__);                                                       \
        if (step_rc != PL_OK)                                                                                          \
            return step_rc;                                                                                            \
    } while (0)
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        const pl_status try_rc = (call);                                                                               \
        if (try_rc != PL_OK)                                                                                           \
            return try_rc;                                                                                             \
    } while (0)

static pl_view top(pl_view v, uint32_t rows)
{
    return v.buf != NULL ? pl_view_rows(v, 0, rows) : v;
}

static pl_view first_cols(pl_view v, uint32_t cols)
{
    return pl_view_cols(v, 0, cols);
}

/* One of a layer's four products with its bias and adapters. */
struct product {
    struct pl_net_mat *w;
    struct pl_net_vec *bias;
    const struct pl_net_lora *lora;
    uint32_t n_lora;
    uint64_t key; /* of dropout */
};

static struct product product_of(struct pl_net *n, uint32_t layer, pl_product p)
{
    struct pl_net_layer *l = &n->layers[layer];
    struct pl_net_mat *const w[] = {&l->qkv, &l->attn_out, &l->ff_in, &l->ff_out};
    struct pl_net_vec *const bias[] = {&l->qkv_b, &l->attn_out_b, &l->ff_in_b, &l->ff_out_b};
    return (struct product){.w = w[p], .bias = bias[p], .lora = l->lora[p], .n_lora = n->adapters_off ? 0 : l->n_lora[p],
                            .key = n->dropout_key + ((uint64_t)layer * PL_PRODUCT_COUNT + p) * PL_TARGET_COUNT};
}

static bool drops(const struct pl_net *n)
{
    return n->dropout_key != 0 && n->o.dropout > 0;
}

/* What an adapter reads: x, or x with a share of it left out. */
static pl_status lora_input(struct pl_net *n, const struct product *p, uint32_t i, pl_view x, pl_view *out)
{
    *out = x;
    if (!drops(n))
        return PL_OK;
    *out = first_cols(top(n->drop, x.rows), x.cols);
    out->stride = x.cols;
    STEP(dropout, *out, x, n->o.dropout, p->key + i + 1, false);
    return PL_OK;
}

/* What the products that follow read, until it may change again. */
static void stays(struct pl_net *n, pl_view x, pl_view dy)
{
    if (n->t->stays != NULL)
        n->t->stays(n->dev, x, dy);
}

/* y = x · wᵀ + bias + Σ scale * (x · aᵀ) · bᵀ */
static pl_status all_products(struct pl_net *n, const struct product *p, pl_view y, pl_view x)
{
    STEP(linear, y, x, &p->w->w, p->bias->w, 1, false);
    for (uint32_t i = 0; i < p->n_lora; i++) {
        const struct pl_net_lora *l = &p->lora[i];
        const pl_view u = first_cols(top(n->u, x.rows), l->a.w.rows);
        pl_view in;
        TRY(lora_input(n, p, i, x, &in));
        STEP(linear, u, in, &l->a.w, pl_view_none(), l->scale, false);
        STEP(linear, pl_view_cols(y, l->place.first, l->place.rows), u, &l->b.w, pl_view_none(), 1, true);
    }
    return PL_OK;
}

static pl_status product(struct pl_net *n, const struct product *p, pl_view y, pl_view x)
{
    stays(n, x, pl_view_none());
    const pl_status rc = all_products(n, p, y, x);
    stays(n, pl_view_none(), pl_view_none());
    return rc;
}

/* dx = …, if wanted; gradients of weights, bias and adapters are added to */
static pl_status all_products_d(struct pl_net *n, const struct product *p, pl_view dx, pl_view dy, pl_view x)
{
    STEP(linear_dw, p->w->d, p->bias->d, dy, x);
    if (dx.buf != NULL)
        STEP(linear_dx, dx, dy, &p->w->w, 1, false);
    for (uint32_t i = 0; i < p->n_lora; i++) {
        const struct pl_net_lora *l = &p->lora[i];
        const pl_view u = top(n->u, x.rows), du = top(n->du, x.rows), part = pl_view_cols(dy, l->place.first, l->place.rows);
        pl_view in;
        TRY(lora_input(n, p, i, x, &in));
        STEP(linear, u, in, &l->a.w, pl_view_none(), l->scale, false);
        STEP(linear_dw, l->b.d, pl_view_none(), part, u);
        STEP(linear_dx, du, part, &l->b.w, l->scale, false);
        STEP(linear_dw, l->a.d, pl_view_none(), du, in);
        if (dx.buf == NULL)
            continue;
        STEP(linear_dx, drops(n) ? in : dx, du, &l->a.w, 1, !drops(n)); /* the adapter's input is not needed any more */
        if (drops(n))
            STEP(dropout, dx, in, n->o.dropout, p->key + i + 1, true);
    }
    return PL_OK;
}

static pl_status product_d(struct pl_net *n, const struct product *p, pl_view dx, pl_view dy, pl_view x)
{
    stays(n, x, dy);
    const pl_status rc = all_products_d(n, p, dx, dy, x);
    stays(n, pl_view_none(), pl_view_none());
    return rc;
}

static pl_status norm(struct pl_net *n, pl_view out, pl_view x, const struct pl_net_vec *gain, const struct pl_net_vec *bias)
{
    STEP(norm, n->spec.norm, out, x, gain->w, bias->w, n->spec.norm_eps);
    return PL_OK;
}

static pl_status activate(struct pl_net *n, pl_view out, pl_view x)
{
    if (n->spec.gated)
        STEP(glu, n->spec.act, out, x);
    else
        STEP(act, n->spec.act, out, x);
    return PL_OK;
}

static pl_status activate_d(struct pl_net *n, pl_view dx, pl_view dout, pl_view x)
{
    if (n->spec.gated)
        STEP(glu_d, n->spec.act, dx, dout, x);
    else
        STEP(act_d, n->spec.act, dx, dout, x);
    return PL_OK;
}

static pl_status rotate(struct pl_net *n, pl_view qkv, bool inverse)
{
    const uint32_t D = n->spec.head_dim;
    if (n->spec.rope != PL_ROPE_NONE)
        STEP(rope, n->spec.rope, first_cols(qkv, (n->spec.n_heads + n->spec.n_kv_heads) * D), D, top(n->rope, qkv.rows), inverse);
    return PL_OK;
}

static struct pl_net_saved saved_of(const struct pl_net *n, uint32_t layer, uint32_t T)
{
    const struct pl_net_saved *s = &n->saved[layer];
    return (struct pl_net_saved){top(s->x, T), top(s->qkv, T), top(s->att, T), top(s->lse, T), top(s->mid, T), top(s->ff, T)};
}

/* mid = x + attention(norm(x));  ff = input product of norm(mid) */
static pl_status layer_upto_ff(struct pl_net *n, const struct pl_micro *b, uint32_t layer)
{
    const struct pl_net_layer *l = &n->layers[layer];
    const struct pl_net_saved s = saved_of(n, layer, b->n_tokens);
    const pl_view h = top(n->h, b->n_tokens);
    const struct product qkv = product_of(n, layer, PL_PRODUCT_QKV), out = product_of(n, layer, PL_PRODUCT_ATTN_OUT);
    const struct product in = product_of(n, layer, PL_PRODUCT_FF_IN);
    TRY(norm(n, h, s.x, &l->attn_norm, &l->attn_norm_b));
    TRY(product(n, &qkv, s.qkv, h));
    TRY(rotate(n, s.qkv, false));
    STEP(attn, s.att, s.lse, s.qkv, n->spec.head_dim, n->attn_scale, &b->seqs);
    TRY(product(n, &out, s.mid, s.att));
    STEP(add, s.mid, s.x);
    TRY(norm(n, h, s.mid, &l->ff_norm, &l->ff_norm_b));
    return product(n, &in, s.ff, h);
}

/* out = mid + output product of the activation */
static pl_status layer_out(struct pl_net *n, const struct pl_micro *b, uint32_t layer, pl_view out)
{
    const struct pl_net_saved s = saved_of(n, layer, b->n_tokens);
    const struct product p = product_of(n, layer, PL_PRODUCT_FF_OUT);
    TRY(activate(n, top(n->act, b->n_tokens), s.ff));
    TRY(product(n, &p, out, top(n->act, b->n_tokens)));
    STEP(add, out, s.mid);
    return PL_OK;
}

/* dx: in, the gradient of the layer's output; out, that of its input (unless nothing below is trained) */
static pl_status layer_d(struct pl_net *n, const struct pl_micro *b, uint32_t layer, pl_view dx)
{
    const uint32_t T = b->n_tokens;
    struct pl_net_layer *l = &n->layers[layer];
    const struct pl_net_saved s = saved_of(n, layer, T);
    const struct product qkv = product_of(n, layer, PL_PRODUCT_QKV), out = product_of(n, layer, PL_PRODUCT_ATTN_OUT);
    const struct product in = product_of(n, layer, PL_PRODUCT_FF_IN), down = product_of(n, layer, PL_PRODUCT_FF_OUT);
    const pl_view h = top(n->h, T), dh = top(n->dh, T), act = top(n->act, T), dact = top(n->dact, T), dff = top(n->dff, T);
    const pl_view datt = top(n->datt, T), dqkv = top(n->dqkv, T);
    const bool below = n->o.full || layer > 0;

    TRY(activate(n, act, s.ff));
    TRY(product_d(n, &down, dact, dx, act));
    TRY(activate_d(n, dff, dact, s.ff));
    TRY(norm(n, h, s.mid, &l->ff_norm, &l->ff_norm_b));
    TRY(product_d(n, &in, dh, dff, h));
    STEP(norm_d, n->spec.norm, dx, l->ff_norm.d, l->ff_norm_b.d, dh, s.mid, l->ff_norm.w, n->spec.norm_eps, true);

    TRY(product_d(n, &out, datt, dx, s.att));
    STEP(attn_d, dqkv, datt, s.att, s.lse, s.qkv, n->spec.head_dim, n->attn_scale, &b->seqs);
    TRY(rotate(n, dqkv, true));
    TRY(norm(n, h, s.x, &l->attn_norm, &l->attn_norm_b));
    TRY(product_d(n, &qkv, below ? dh : pl_view_none(), dqkv, h));
    if (below)
        STEP(norm_d, n->spec.norm, dx, l->attn_norm.d, l->attn_norm_b.d, dh, s.x, l->attn_norm.w, n->spec.norm_eps, true);
    return PL_OK;
}

pl_status pl_net_forward(struct pl_net *n, const struct pl_micro *b)
{
    const uint32_t T = b->n_tokens, L = n->spec.n_layers;
    PL_ASSERT(T <= n->max_tokens && b->n_rows <= n->max_rows);
    const pl_view x = top(n->saved[0].x, T), last = top(n->last, T), rows = top(n->rows, b->n_rows);
    STEP(embed, x, &n->top.embed.w, b->tokens, false);
    if (n->top.position.w.rows > 0)
        STEP(embed, x, &n->top.position.w, b->pos, true);
    if (n->spec.rope != PL_ROPE_NONE)
        STEP(rope_table, top(n->rope, T), n->top.rope_freq, b->pos);
    for (uint32_t i = 0; i < L; i++) {
        TRY(layer_upto_ff(n, b, i));
        TRY(layer_out(n, b, i, i + 1 < L ? top(n->saved[i + 1].x, T) : last));
    }
    STEP(gather, rows, last, b->rows);
    return norm(n, top(n->h_rows, b->n_rows), rows, &n->top.out_norm, &n->top.out_norm_b);
}

static struct pl_net_mat *head_of(struct pl_net *n)
{
    return n->top.head.w.rows > 0 ? &n->top.head : &n->top.embed;
}

pl_status pl_net_loss(struct pl_net *n, const struct pl_micro *b, const float *weight, double *logp, bool *best)
{
    const struct pl_net_mat *head = head_of(n);
    STEP(head, top(n->h_rows, b->n_rows), &head->w, b->targets, weight, logp, best,
         weight != NULL ? top(n->dh_rows, b->n_rows) : pl_view_none(), head->d);
    return PL_OK;
}

pl_status pl_net_backward(struct pl_net *n, const struct pl_micro *b)
{
    const uint32_t T = b->n_tokens;
    const pl_view dx = top(n->dx, T), dh_rows = top(n->dh_rows, b->n_rows), rows = top(n->rows, b->n_rows);
    const pl_view drows = top(n->h_rows, b->n_rows); /* not needed any more */
    struct pl_net_top *t = &n->top;
    STEP(norm_d, n->spec.norm, drows, t->out_norm.d, t->out_norm_b.d, dh_rows, rows, t->out_norm.w, n->spec.norm_eps, false);
    STEP(gather_d, dx, drows, b->rows);
    for (uint32_t i = n->spec.n_layers; i-- > 0;) {
        if (n->o.recompute && i + 1 < n->spec.n_layers)
            TRY(layer_upto_ff(n, b, i));
        TRY(layer_d(n, b, i, dx));
    }
    if (!n->o.full)
        return PL_OK;
    STEP(embed_dw, t->embed.d, dx, b->tokens);
    if (t->position.w.rows > 0)
        STEP(embed_dw, t->position.d, dx, b->pos);
    return PL_OK;
}
