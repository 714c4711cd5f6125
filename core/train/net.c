/* net: makes the trainable form of a model from its file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/net.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/model.h"
#include "core/model/weights.h"
#include "core/train/random.h"

enum { OTHERS_SHARE = 16 /* of a device's memory: what the driver itself has is less */ };
enum { MAX_ROWS = 32, MAX_PARTS = 4, ALIGN_FLOATS = 16, PUT_AT_ONCE = 1 << 18 /* values */ };

struct row {
    enum { MATRIX, VECTOR } kind;
    enum { MUST, MAY } need;
    size_t field; /* offset in struct pl_net_top or struct pl_net_layer */
    const char *name;
    uint32_t n_rows, n_cols;
};

/* Two passes over everything: the first counts, the second fills in. */
struct builder {
    struct pl_net *n;
    const struct pl_gguf *g;
    struct pl_err *err;
    bool filling;
    size_t decayed, plain, frozen; /* values so far */
    size_t frozen_bytes;           /* of matrices */
    uint32_t n_params;
};

static size_t aligned(size_t n)
{
    return (n + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
}

static pl_view view(struct pl_dbuf *buf, size_t offset, uint32_t rows, uint32_t cols)
{
    return (pl_view){.buf = buf, .offset = offset, .rows = rows, .cols = cols, .stride = cols};
}

/* Room for a trained tensor; where it begins. */
static size_t take_trained(struct builder *b, bool decay, uint32_t rows, uint32_t cols)
{
    size_t *at = decay ? &b->decayed : &b->plain;
    const size_t offset = *at + (decay ? 0 : b->n->n_decayed);
    *at += aligned((size_t)rows * cols);
    return offset;
}

static void name_param(struct builder *b, const char *name, const char *part, int layer, size_t offset, uint32_t rows, uint32_t cols)
{
    if (b->filling) {
        struct pl_net_param *p = &b->n->params[b->n_params];
        *p = (struct pl_net_param){.offset = offset, .rows = rows, .cols = cols};
        if (layer < 0)
            snprintf(p->name, sizeof p->name, "%s%s", name, part);
        else
            snprintf(p->name, sizeof p->name, "blk.%d.%s%s", layer, name, part);
    }
    b->n_params++;
}

/* Values of a tensor into a buffer, some rows at a time. */
static pl_status put_tensor(struct builder *b, struct pl_dbuf *buf, size_t offset, const struct pl_gguf_tensor *t, uint32_t rows, uint32_t cols)
{
    const uint32_t fit = PUT_AT_ONCE / cols > 0 ? PUT_AT_ONCE / cols : 1, at_once = fit < rows ? fit : rows;
    float *values = malloc((size_t)at_once * cols * sizeof *values);
    pl_status rc = values == NULL ? PL_ENOMEM : PL_OK;
    const size_t row_bytes = pl_dtype_row_bytes(t->dtype, cols);
    for (uint32_t r = 0, n; r < rows && rc == PL_OK; r += n) {
        n = rows - r < at_once ? rows - r : at_once;
        for (uint32_t i = 0; i < n; i++)
            pl_dequant_row(t->dtype, (const char *)t->data + (r + i) * row_bytes, values + (size_t)i * cols, cols);
        rc = b->n->dev->ops->put(b->n->dev, buf, offset + (size_t)r * cols, values, (size_t)n * cols);
    }
    free(values);
    return rc;
}

static pl_status build_matrix(struct builder *b, const struct row *r, size_t n, const struct pl_gguf_tensor *const *parts, int layer,
                              struct pl_net_mat *out)
{
    struct pl_net *net = b->n;
    struct pl_weight_src src[MAX_PARTS];
    uint32_t rows = 0;
    for (size_t i = 0; i < n; i++) {
        src[i] = (struct pl_weight_src){.dtype = parts[i]->dtype, .rows = r[i].n_rows, .cols = r[i].n_cols, .data = parts[i]->data};
        rows += r[i].n_rows;
    }
    if (!net->o.full) {
        out->w = (struct pl_train_mat){.rows = rows, .cols = r[0].n_cols};
        struct pl_weight *w;
        if (!b->filling) {
            b->frozen_bytes += net->t->frozen_bytes != NULL ? net->t->frozen_bytes(src, n) : 0;
            return PL_OK;
        }
        const pl_status rc = net->t->frozen_new(net->dev, src, n, &w, b->err);
        out->w.frozen = rc == PL_OK ? w : NULL;
        return rc;
    }
    size_t at = take_trained(b, true, rows, r[0].n_cols);
    out->w = (struct pl_train_mat){.rows = rows, .cols = r[0].n_cols, .values = view(net->w, at, rows, r[0].n_cols)};
    out->d = view(net->g, at, rows, r[0].n_cols);
    for (size_t i = 0; i < n; at += (size_t)r[i].n_rows * r[i].n_cols, i++) {
        name_param(b, r[i].name, "", layer, at, r[i].n_rows, r[i].n_cols);
        const pl_status rc = b->filling ? put_tensor(b, net->w, at, parts[i], r[i].n_rows, r[i].n_cols) : PL_OK;
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

static pl_status build_vector(struct builder *b, const struct row *r, size_t n, const struct pl_gguf_tensor *const *parts, int layer,
                              struct pl_net_vec *out)
{
    struct pl_net *net = b->n;
    const bool trained = net->o.full && (void *)out != (void *)&net->top.rope_factors;
    uint32_t width = 0;
    for (size_t i = 0; i < n; i++)
        width += r[i].n_cols;
    size_t at = b->frozen;
    if (trained)
        at = take_trained(b, false, 1, width);
    else
        b->frozen += aligned(width);
    struct pl_dbuf *buf = trained ? net->w : net->frozen;
    *out = (struct pl_net_vec){.w = view(buf, at, 1, width), .d = trained ? view(net->g, at, 1, width) : pl_view_none()};
    for (size_t i = 0; i < n; at += r[i++].n_cols) {
        if (parts[i] == NULL)
            continue;
        if (trained)
            name_param(b, r[i].name, "", layer, at, 1, r[i].n_cols);
        const pl_status rc = b->filling ? put_tensor(b, buf, at, parts[i], 1, r[i].n_cols) : PL_OK;
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

/* The rows of the table that share one field. */
static pl_status build_group(struct builder *b, const struct row *r, size_t n, int layer, void *base)
{
    const struct pl_gguf_tensor *parts[MAX_PARTS];
    char name[72];
    size_t n_found = 0;
    PL_ASSERT(n <= MAX_PARTS);
    for (size_t i = 0; i < n; i++) {
        if (layer < 0)
            snprintf(name, sizeof name, "%s", r[i].name);
        else
            snprintf(name, sizeof name, "blk.%d.%s", layer, r[i].name);
        parts[i] = pl_gguf_tensor(b->g, name);
        n_found += parts[i] != NULL;
    }
    if (n_found == 0)
        return PL_OK;
    void *field = (char *)base + r->field;
    return r->kind == MATRIX ? build_matrix(b, r, n, parts, layer, field) : build_vector(b, r, n, parts, layer, field);
}

static pl_status build_rows(struct builder *b, const struct row *r, size_t n, int layer, void *base)
{
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && r[end].field == r[i].field;)
            end++;
        const pl_status rc = build_group(b, r + i, end - i, layer, base);
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

static size_t table_fill(struct row *list, bool layer, const struct pl_spec *s, unsigned arch)
{
    const uint32_t V = s->n_vocab, C = s->n_embd, P = s->n_ctx, F = s->n_ff, W = s->rope_dims / 2;
    const uint32_t Q = s->n_heads * s->head_dim, K = s->n_kv_heads * s->head_dim;
    size_t n = 0;
    (void)V, (void)P, (void)W, (void)F, (void)Q, (void)K;
#define ADD(type, kind, field, archs, name, rows, cols, need, cut)                                                       \
    if (((archs) & arch) != 0)                                                                                         \
        list[n++] = (struct row){kind, need, offsetof(struct type, field), name, rows, cols};
#define X(...) ADD(pl_net_layer, __VA_ARGS__)
    if (layer) {
        PL_LAYER_WEIGHTS(X)
    }
#undef X
#define X(...) ADD(pl_net_top, __VA_ARGS__)
    if (!layer) {
        PL_TOP_WEIGHTS(X)
    }
#undef X
#undef ADD
    return n;
}

/* A random matrix as PEFT makes it: uniform within ±1 / √inputs. */
static pl_status init_a(struct builder *b, const char *name, size_t at, uint32_t rows, uint32_t cols)
{
    uint64_t state = pl_random_stream(b->n->o.seed, name);
    const double bound = 1 / sqrt((double)cols);
    float *values = malloc((size_t)rows * cols * sizeof *values);
    if (values == NULL)
        return PL_ENOMEM;
    for (size_t i = 0; i < (size_t)rows * cols; i++)
        values[i] = (float)(bound * (2 * pl_random_unit(&state) - 1));
    const pl_status rc = b->n->dev->ops->put(b->n->dev, b->n->w, at, values, (size_t)rows * cols);
    free(values);
    return rc;
}

static struct pl_net_mat lora_mat(struct builder *b, const char *name, const char *part, int layer, uint32_t rows, uint32_t cols)
{
    const size_t at = take_trained(b, true, rows, cols);
    name_param(b, name, part, layer, at, rows, cols);
    return (struct pl_net_mat){.w = {.rows = rows, .cols = cols, .values = view(b->n->w, at, rows, cols)}, .d = view(b->n->g, at, rows, cols)};
}

static const struct pl_lora_pair *pair_of(const struct pl_adapter *a, uint32_t layer, pl_target target)
{
    for (size_t i = 0; i < a->n_pairs; i++)
        if (a->pairs[i].layer == layer && a->pairs[i].target == target)
            return &a->pairs[i];
    return NULL;
}

/* Values of the adapter that inference goes with; else those that training begins with. */
static pl_status fill_lora(struct builder *b, const struct pl_net_lora *l, const struct pl_lora_pair *pair, const char *name)
{
    const struct pl_device_ops *ops = b->n->dev->ops;
    if (pair == NULL)
        return init_a(b, name, l->a.w.values.offset, l->a.w.rows, l->a.w.cols);
    const pl_status rc = ops->put(b->n->dev, b->n->w, l->a.w.values.offset, pair->a, (size_t)pair->rank * l->place.cols);
    return rc != PL_OK ? rc : ops->put(b->n->dev, b->n->w, l->b.w.values.offset, pair->b, (size_t)pair->rank * l->place.rows);
}

static pl_status build_lora(struct builder *b, struct pl_net_layer *l, int layer)
{
    struct pl_net *n = b->n;
    memset(l->n_lora, 0, sizeof l->n_lora);
    for (int target = 0; target < PL_TARGET_COUNT; target++) {
        struct pl_target_place p;
        const struct pl_lora_pair *pair = n->o.adapter != NULL ? pair_of(n->o.adapter, (uint32_t)layer, (pl_target)target) : NULL;
        if (n->o.inference ? pair == NULL : !(n->o.targets & 1u << target))
            continue;
        if (!pl_target_find(&n->spec, (pl_target)target, &p))
            return pl_fail_param(b->err, PL_EINVAL, "targets", "the %s architecture lacks one of the targets", n->spec.arch);
        const uint32_t rank = pair != NULL ? pair->rank : n->o.rank;
        struct pl_net_lora **list = &l->lora[p.product];
        if (*list == NULL)
            *list = pl_xcalloc(PL_TARGET_COUNT, sizeof **list);
        struct pl_net_lora *lora = &(*list)[l->n_lora[p.product]++];
        *lora = (struct pl_net_lora){.target = (pl_target)target, .place = p, .scale = pair != NULL ? pair->scale : n->lora_scale};
        lora->a = lora_mat(b, p.gguf, ".lora_a", layer, rank, p.cols);
        lora->b = lora_mat(b, p.gguf, ".lora_b", layer, p.rows, rank);
        const pl_status rc = b->filling ? fill_lora(b, lora, pair, n->params[b->n_params - 2].name) : PL_OK;
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

static pl_status build_rope(struct builder *b)
{
    struct pl_net *n = b->n;
    const uint32_t W = n->spec.rope_dims / 2;
    if (n->spec.rope == PL_ROPE_NONE)
        return PL_OK;
    n->top.rope_freq = view(n->frozen, b->frozen, 1, W);
    b->frozen += aligned(W);
    if (!b->filling)
        return PL_OK;
    float *freq = pl_xmalloc(2 * W * sizeof *freq), *factors = NULL;
    pl_status rc = PL_OK;
    if (n->top.rope_factors.w.buf != NULL) {
        factors = freq + W;
        rc = n->dev->ops->get(n->dev, n->frozen, n->top.rope_factors.w.offset, factors, W);
    }
    if (rc == PL_OK)
        rc = pl_model_rope_freq(&n->spec, factors, freq, b->err);
    if (rc == PL_OK)
        rc = n->dev->ops->put(n->dev, n->frozen, n->top.rope_freq.offset, freq, W);
    free(freq);
    return rc;
}

static pl_status build_all(struct builder *b)
{
    struct pl_net *n = b->n;
    struct row rows[MAX_ROWS];
    pl_status rc = build_rows(b, rows, table_fill(rows, false, &n->spec, n->arch_bit), -1, &n->top);
    const size_t n_rows = table_fill(rows, true, &n->spec, n->arch_bit);
    for (uint32_t i = 0; rc == PL_OK && i < n->spec.n_layers; i++) {
        rc = build_rows(b, rows, n_rows, (int)i, &n->layers[i]);
        if (rc == PL_OK && !n->o.full && (!n->o.inference || n->o.adapter != NULL))
            rc = build_lora(b, &n->layers[i], (int)i);
    }
    return rc != PL_OK ? rc : build_rope(b);
}

/* Whether a device with memory of its own has so much of it left; *free_mb: what it has. PL_EBUSY: others have taken it, PL_ENOMEM: it would be
 * too little without them, too. */
static pl_status check_room(const struct pl_net *n, size_t bytes, size_t *free_mb)
{
    size_t left, total;
    *free_mb = 0;
    if (n->dev->ops->memory == NULL)
        return PL_OK;
    const pl_status rc = n->dev->ops->memory(n->dev, &left, &total);
    *free_mb = left >> 20;
    if (rc != PL_OK || bytes <= left)
        return rc;
    const size_t own = n->left > left ? n->left - left : 0, others = total - n->left;
    return bytes + own > total || others <= total / OTHERS_SHARE ? PL_ENOMEM : PL_EBUSY;
}

/* What there was room for a moment ago. */
static pl_status taken_since(const struct pl_net *n, pl_status rc)
{
    return rc == PL_ENOMEM && n->dev->ops->memory != NULL ? PL_EBUSY : rc;
}

/* Before any of it is taken. */
static pl_status check_weights(const struct pl_net *n, const struct builder *counted, struct pl_err *err)
{
    const size_t trained = counted->decayed + counted->plain;
    const size_t bytes = counted->frozen_bytes + (counted->frozen + trained * (n->o.inference ? 1 : 4)) * sizeof(float);
    size_t free_mb;
    const pl_status rc = check_room(n, bytes, &free_mb);
    if (rc != PL_ENOMEM && rc != PL_EBUSY)
        return rc;
    return pl_fail_param(err, rc, "device", "the weights and what is trained of them take %zu MB but %s has %zu MB left%s: %s", bytes >> 20,
                         n->dev->ops->name, free_mb, rc == PL_EBUSY ? " by others" : "",
                         n->o.full ? "train an adapter (peft kind lora), or take a GPU with more room" : "take a GPU with more room");
}

static pl_status make_buffers(struct pl_net *n, const struct builder *counted)
{
    const struct pl_device_ops *ops = n->dev->ops;
    struct pl_dbuf **const trained[] = {&n->w, &n->g, &n->m, &n->v};
    n->n_decayed = counted->decayed;
    n->n_trained = counted->decayed + counted->plain;
    n->n_params = counted->n_params;
    n->params = pl_xcalloc(n->n_params + 1, sizeof *n->params);
    pl_status rc = ops->buf_new(n->dev, counted->frozen, &n->frozen);
    for (size_t i = 0; rc == PL_OK && i < (n->o.inference ? 1 : PL_COUNT_OF(trained)); i++)
        rc = ops->buf_new(n->dev, n->n_trained, trained[i]);
    return rc;
}

pl_status pl_net_new(struct pl_net **out, const struct pl_gguf *g, struct pl_device *dev, const struct pl_net_options *o, struct pl_err *err)
{
    *out = NULL;
    if (dev->ops->train == NULL)
        return pl_fail(err, PL_ENOTSUP, "the %s device cannot train", dev->ops->name);
    struct pl_net *n = pl_xcalloc(1, sizeof *n);
    n->dev = dev;
    n->t = dev->ops->train;
    n->o = *o;
    pl_status rc = pl_model_check(&n->spec, &n->arch_bit, NULL, g, err);
    if (rc == PL_OK && dev->ops->memory != NULL)
        rc = dev->ops->memory(dev, &n->left, &(size_t){0});
    if (rc != PL_OK)
        goto out;
    n->attn_scale = 1.0f / sqrtf((float)n->spec.head_dim);
    n->lora_scale = o->rank > 0 ? o->alpha / (o->rslora ? sqrtf((float)o->rank) : (float)o->rank) : 0;
    n->layers = pl_xcalloc(n->spec.n_layers, sizeof *n->layers);
    struct builder b = {.n = n, .g = g, .err = err};
    if ((rc = build_all(&b)) != PL_OK || (rc = check_weights(n, &b, err)) != PL_OK)
        goto out;
    if ((rc = make_buffers(n, &b)) != PL_OK) {
        rc = pl_fail(err, taken_since(n, rc), "no memory for the weights, gradients and moments of %zu trained values", n->n_trained);
        goto out;
    }
    b = (struct builder){.n = n, .g = g, .err = err, .filling = true};
    if ((rc = taken_since(n, build_all(&b))) != PL_OK) {
        if (err != NULL)
            err->code = rc;
        goto out;
    }
    n->o.adapter = NULL;
    *out = n;
    n = NULL;
out:
    pl_net_free(n);
    return rc;
}

static void free_frozen(struct pl_net *n, const struct row *r, size_t n_rows, void *base)
{
    for (size_t i = 0; i < n_rows; i++) {
        if (r[i].kind != MATRIX)
            continue;
        struct pl_net_mat *m = (struct pl_net_mat *)((char *)base + r[i].field);
        if (m->w.frozen != NULL)
            n->dev->ops->weight_free(n->dev, (struct pl_weight *)m->w.frozen);
        m->w.frozen = NULL;
    }
}

void pl_net_free(struct pl_net *n)
{
    if (n == NULL)
        return;
    struct row rows[MAX_ROWS];
    free_frozen(n, rows, table_fill(rows, false, &n->spec, n->arch_bit), &n->top);
    const size_t n_rows = table_fill(rows, true, &n->spec, n->arch_bit);
    for (uint32_t i = 0; n->layers != NULL && i < n->spec.n_layers; i++) {
        free_frozen(n, rows, n_rows, &n->layers[i]);
        for (int p = 0; p < PL_PRODUCT_COUNT; p++)
            free(n->layers[i].lora[p]);
    }
    struct pl_dbuf *const bufs[] = {n->w, n->g, n->m, n->v, n->frozen, n->work};
    for (size_t i = 0; i < PL_COUNT_OF(bufs); i++)
        if (bufs[i] != NULL)
            n->dev->ops->buf_free(n->dev, bufs[i]);
    free(n->saved);
    free(n->params);
    free(n->layers);
    free(n);
}

/* ---- adapters ------------------------------------------------------------------------------------------------------ */

pl_status pl_net_set_adapter(struct pl_net *n, const struct pl_adapter *a, struct pl_err *err)
{
    size_t used = 0;
    for (uint32_t i = 0; i < n->spec.n_layers; i++)
        for (int p = 0; p < PL_PRODUCT_COUNT; p++)
            for (uint32_t k = 0; k < n->layers[i].n_lora[p]; k++) {
                const struct pl_net_lora *l = &n->layers[i].lora[p][k];
                const struct pl_lora_pair *pair = pair_of(a, i, l->target);
                if (pair == NULL || pair->rank != n->o.rank || fabsf(pair->scale - n->lora_scale) > 1e-6f * n->lora_scale)
                    return pl_fail_param(err, PL_EINVAL, "base_adapter", "the base's adapter has another %s at layer %u, %s than the job asks for",
                                         pair == NULL ? "set of targets" : pair->rank != n->o.rank ? "rank" : "alpha", i, l->place.name);
                pl_status rc = n->dev->ops->put(n->dev, n->w, l->a.w.values.offset, pair->a, (size_t)pair->rank * l->place.cols);
                if (rc == PL_OK)
                    rc = n->dev->ops->put(n->dev, n->w, l->b.w.values.offset, pair->b, (size_t)pair->rank * l->place.rows);
                if (rc != PL_OK)
                    return rc;
                used++;
            }
    if (used != a->n_pairs)
        return pl_fail_param(err, PL_EINVAL, "base_adapter", "the base's adapter changes %zu projections, the job's targets are %zu", a->n_pairs, used);
    return PL_OK;
}

pl_status pl_net_adapter(const struct pl_net *n, struct pl_adapter *out, float **values, struct pl_err *err)
{
    float *w = *values = malloc((n->n_trained > 0 ? n->n_trained : 1) * sizeof *w);
    const pl_status rc = w == NULL ? PL_ENOMEM : n->dev->ops->get(n->dev, n->w, 0, w, n->n_trained);
    if (rc != PL_OK) {
        free(w);
        return pl_fail(err, rc, "the adapters' values: %s", pl_status_text(rc));
    }
    *out = (struct pl_adapter){.arch = n->spec.arch, .rslora = n->o.rslora, .pairs = pl_xcalloc(n->n_params / 2 + 1, sizeof *out->pairs)};
    for (uint32_t i = 0; i < n->spec.n_layers; i++)
        for (int target = 0; target < PL_TARGET_COUNT; target++)
            for (int p = 0; p < PL_PRODUCT_COUNT; p++)
                for (uint32_t k = 0; k < n->layers[i].n_lora[p]; k++) {
                    const struct pl_net_lora *l = &n->layers[i].lora[p][k];
                    if (l->target != (pl_target)target)
                        continue;
                    out->pairs[out->n_pairs++] = (struct pl_lora_pair){
                        .layer = i, .target = l->target, .rank = n->o.rank, .alpha = n->o.alpha, .scale = n->lora_scale,
                        .a = w + l->a.w.values.offset, .b = w + l->b.w.values.offset};
                }
    return PL_OK;
}

/* ---- activations --------------------------------------------------------------------------------------------------- */

static pl_view take(struct pl_dbuf *buf, size_t *at, uint32_t rows, uint32_t cols)
{
    const pl_view v = view(buf, *at, rows, cols);
    *at += aligned((size_t)rows * cols);
    return v;
}

static uint32_t lora_width(const struct pl_net *n)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < n->spec.n_layers; i++)
        for (int p = 0; p < PL_PRODUCT_COUNT; p++)
            for (uint32_t k = 0; k < n->layers[i].n_lora[p]; k++)
                most = n->layers[i].lora[p][k].a.w.rows > most ? n->layers[i].lora[p][k].a.w.rows : most;
    return most;
}

static void carve_saved(struct pl_net *n, struct pl_net_saved *s, size_t *at, uint32_t T, bool only_x)
{
    const struct pl_spec *p = &n->spec;
    const uint32_t Q = p->n_heads * p->head_dim, K = p->n_kv_heads * p->head_dim;
    s->x = take(n->work, at, T, p->n_embd);
    if (only_x)
        return;
    s->qkv = take(n->work, at, T, Q + 2 * K);
    s->att = take(n->work, at, T, Q);
    s->lse = take(n->work, at, T, p->n_heads);
    s->mid = take(n->work, at, T, p->n_embd);
    s->ff = take(n->work, at, T, p->gated ? 2 * p->n_ff : p->n_ff);
}

/* Lays all activations out in the work buffer; returns their number. */
static size_t carve(struct pl_net *n, struct pl_net_saved *saved, uint32_t T, uint32_t R)
{
    const struct pl_spec *p = &n->spec;
    const uint32_t C = p->n_embd, F = p->n_ff, Q = p->n_heads * p->head_dim, K = p->n_kv_heads * p->head_dim, r = lora_width(n);
    const bool shared = n->o.recompute || n->o.inference;
    size_t at = 0;
    for (uint32_t i = 0; i < p->n_layers; i++) {
        if (i > 0 && n->o.inference) {
            saved[i] = saved[0];
            continue;
        }
        carve_saved(n, &saved[i], &at, T, shared && i > 0);
        if (shared && i > 0) {
            const pl_view x = saved[i].x;
            saved[i] = saved[0];
            saved[i].x = x;
        }
    }
    n->last = take(n->work, &at, T, C);
    n->rope = p->rope == PL_ROPE_NONE ? pl_view_none() : take(n->work, &at, T, p->rope_dims);
    n->h = take(n->work, &at, T, C);
    n->act = take(n->work, &at, T, F);
    n->u = take(n->work, &at, T, r);
    n->drop = n->o.dropout > 0 ? take(n->work, &at, T, F > Q ? (F > C ? F : C) : Q > C ? Q : C) : pl_view_none();
    n->rows = take(n->work, &at, R, C);
    n->h_rows = take(n->work, &at, R, C);
    if (n->o.inference)
        return at;
    n->dh_rows = take(n->work, &at, R, C);
    n->dx = take(n->work, &at, T, C);
    n->dh = take(n->work, &at, T, C);
    n->dqkv = take(n->work, &at, T, Q + 2 * K);
    n->datt = take(n->work, &at, T, Q);
    n->dff = take(n->work, &at, T, p->gated ? 2 * F : F);
    n->dact = take(n->work, &at, T, F);
    n->du = take(n->work, &at, T, r);
    return at;
}

size_t pl_net_work_bytes(const struct pl_net *n, uint32_t max_tokens, uint32_t max_rows)
{
    struct pl_net copy = *n;
    struct pl_net_saved *saved = pl_xcalloc(n->spec.n_layers, sizeof *saved);
    copy.work = NULL;
    const size_t floats = carve(&copy, saved, max_tokens, max_rows);
    free(saved);
    return floats * sizeof(float);
}

/* What the device has to make room for beside that. With dropout, adapters read what is made for each of them. */
static struct pl_train_shape train_shape(const struct pl_net *n)
{
    const struct pl_spec *p = &n->spec;
    const uint32_t qkv = (p->n_heads + 2 * p->n_kv_heads) * p->head_dim, ff = p->gated ? 2 * p->n_ff : p->n_ff;
    const uint32_t widest = qkv > ff ? (qkv > p->n_embd ? qkv : p->n_embd) : ff > p->n_embd ? ff : p->n_embd;
    return (struct pl_train_shape){.n_tokens = n->max_tokens, .n_rows = n->max_rows, .n_seqs = n->max_tokens, .widest = widest, .n_embd = p->n_embd,
                                   .n_heads = p->n_heads, .passing = n->o.dropout > 0 ? widest : lora_width(n), .n_trained = n->n_trained,
                                   .head = &(n->top.head.w.rows > 0 ? &n->top.head : &n->top.embed)->w, .whole_head = true};
}

/* What a step takes of a device with memory of its own, if there is as much: with the head as a whole where there is room for it. */
static pl_status check_step(const struct pl_net *n, struct pl_train_shape *s, size_t activations, size_t *bytes, size_t *free_mb)
{
    pl_status rc = PL_ENOMEM;
    *bytes = activations;
    if (n->t->work_bytes == NULL)
        return PL_OK;
    for (int i = 0; i < 2 && (rc == PL_ENOMEM || rc == PL_EBUSY); i++) {
        s->whole_head = i == 0;
        *bytes = activations + n->t->work_bytes(n->dev, s);
        rc = check_room(n, *bytes, free_mb);
    }
    return rc;
}

pl_status pl_net_reserve(struct pl_net *n, uint32_t max_tokens, uint32_t max_rows, struct pl_err *err)
{
    if (n->work != NULL && max_tokens <= n->max_tokens && max_rows <= n->max_rows)
        return PL_OK;
    n->max_tokens = max_tokens > n->max_tokens ? max_tokens : n->max_tokens;
    n->max_rows = max_rows > n->max_rows ? max_rows : n->max_rows;
    if (n->work != NULL)
        n->dev->ops->buf_free(n->dev, n->work);
    n->work = NULL;
    if (n->saved == NULL)
        n->saved = pl_xcalloc(n->spec.n_layers, sizeof *n->saved);
    const size_t bytes = pl_net_work_bytes(n, n->max_tokens, n->max_rows);
    struct pl_train_shape shape = train_shape(n);
    size_t all, free_mb;
    pl_status rc = check_step(n, &shape, bytes, &all, &free_mb);
    if (rc == PL_ENOMEM || rc == PL_EBUSY)
        return pl_fail_param(err, rc, "micro_batch_size", "a step of %u tokens takes %zu MB but %s has %zu MB left%s; lower %s", n->max_tokens,
                             all >> 20, n->dev->ops->name, free_mb, rc == PL_EBUSY ? " by others" : "",
                             n->o.inference   ? "max-length, or take a device with more room"
                             : n->o.recompute ? "micro_batch_size or max_length"
                                              : "micro_batch_size or max_length, or set recompute");
    if (rc == PL_OK)
        rc = taken_since(n, n->dev->ops->buf_new(n->dev, bytes / sizeof(float), &n->work));
    if (rc == PL_OK && n->t->reserve != NULL)
        rc = taken_since(n, n->t->reserve(n->dev, &shape));
    if (rc != PL_OK)
        return pl_fail_param(err, rc, "micro_batch_size",
                             "no memory for the activations of %u tokens (%zu MB); lower micro_batch_size or max_length, or set recompute",
                             n->max_tokens, bytes >> 20);
    carve(n, n->saved, n->max_tokens, n->max_rows);
    return PL_OK;
}
