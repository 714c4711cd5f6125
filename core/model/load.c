/* load: makes a model from a GGUF file. First every tensor of the table is found and checked, then the weights go to the
 * device and the work buffers are made, so that a file that lacks something is refused before the long part.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/model/gguf.h"
#include "core/model/weights.h"

#define PL_LOG_MODULE "model"

enum { MAX_ROWS = 32, MAX_PARTS = 4, ALIGN_FLOATS = 16 };

/* The weight table for one architecture with its sizes filled in. */
struct row {
    enum { MATRIX, VECTOR } kind;
    enum { MUST, MAY } need;
    pl_cut cut;
    size_t field; /* offset in struct pl_top or struct pl_layer */
    const char *name;
    uint32_t n_rows, n_cols;
};

struct table {
    struct row top[MAX_ROWS], layer[MAX_ROWS];
    size_t n_top, n_layer;
};

struct loader {
    struct pl_model *m;
    const struct pl_gguf *g;
    struct pl_err *err;
    struct table table;
    bool checking;  /* first pass: look, count, touch nothing */
    float *staging; /* second pass: what goes into m->vectors */
    size_t n_floats;
};

static void table_fill(struct table *t, const struct pl_spec *s, unsigned arch)
{
    const uint32_t V = s->n_vocab, C = s->n_embd, P = s->n_ctx, F = s->n_ff, W = s->rope_dims / 2;
    const uint32_t Q = s->n_heads * s->head_dim, K = s->n_kv_heads * s->head_dim;
    *t = (struct table){0};
#define ADD(where, type, kind, field, archs, name, rows, cols, need, cut)                                                   \
    if (((archs) & arch) != 0)                                                                                         \
        t->where[t->n_##where++] = (struct row){kind, need, PL_CUT_##cut, offsetof(struct type, field), name, rows, cols};
#define X(...) ADD(top, pl_top, __VA_ARGS__)
    PL_TOP_WEIGHTS(X)
#undef X
#define X(...) ADD(layer, pl_layer, __VA_ARGS__)
    PL_LAYER_WEIGHTS(X)
#undef X
#undef ADD
}

struct tensor_name {
    char s[64];
};

static struct tensor_name tensor_name(const struct row *r, int layer)
{
    struct tensor_name n;
    if (layer < 0)
        snprintf(n.s, sizeof n.s, "%s", r->name);
    else
        snprintf(n.s, sizeof n.s, "blk.%d.%s", layer, r->name);
    return n;
}

/* Sets *out to the tensor of a row, NULL when it is absent and may be; refuses a missing or misshapen one. */
static pl_status find(const struct loader *ld, const struct row *r, int layer, const struct pl_gguf_tensor **out)
{
    const struct tensor_name name = tensor_name(r, layer);
    const struct pl_gguf_tensor *t = pl_gguf_tensor(ld->g, name.s);
    *out = t;
    if (t == NULL)
        return r->need == MAY ? PL_OK : pl_fail(ld->err, PL_EFORMAT, "tensor %s is missing", name.s);
    if (t->ne[0] != r->n_cols || t->ne[1] != r->n_rows || t->ne[2] != 1 || t->ne[3] != 1)
        return pl_fail(ld->err, PL_EFORMAT,
                       "tensor %s has the shape [%llu, %llu, %llu, %llu]; the hyper-parameters ask for [%u, %u]", name.s,
                       (unsigned long long)t->ne[0], (unsigned long long)t->ne[1], (unsigned long long)t->ne[2],
                       (unsigned long long)t->ne[3], r->n_cols, r->n_rows);
    if (t->ne[0] % pl_dtype_block(t->dtype) != 0)
        return pl_fail(ld->err, PL_EFORMAT, "tensor %s has rows of %llu values, no multiple of %s blocks", name.s,
                       (unsigned long long)t->ne[0], pl_dtype_name(t->dtype));
    return PL_OK;
}

/* What this rank has of a tensor, as parts of a weight; how many. */
static size_t sources(const struct loader *ld, const struct row *r, const struct pl_gguf_tensor *t, struct pl_weight_src *src)
{
    struct pl_range out[PL_PART_RANGES];
    const struct pl_part *part = &ld->m->part;
    const size_t n = pl_cut_outputs(r->cut, &ld->m->spec, part, r->n_rows, out), stride = pl_dtype_row_bytes(t->dtype, r->n_cols);
    const struct pl_range in = pl_cut_inputs(r->cut, part, r->n_cols);
    for (size_t i = 0; i < n; i++)
        src[i] = (struct pl_weight_src){.dtype = t->dtype,
                                        .rows = out[i].n,
                                        .cols = in.n,
                                        .data = (const char *)t->data + out[i].first * stride + pl_dtype_row_bytes(t->dtype, in.first),
                                        .stride = stride};
    return n;
}

/* A matrix of stacked parts, all of them present. */
static pl_status load_matrix(struct loader *ld, const struct row *r, const struct pl_gguf_tensor *const *parts, size_t n, const char *name,
                             struct pl_weight **out)
{
    struct pl_weight_src src[MAX_PARTS * PL_PART_RANGES];
    size_t n_src = 0;
    for (size_t i = 0; i < n; i++)
        n_src += sources(ld, &r[i], parts[i], src + n_src);
    if (n_src == 0)
        return PL_OK;
    struct pl_err cause = {0};
    const pl_status rc = ld->m->dev->ops->weight_new(ld->m->dev, src, n_src, out, &cause);
    if (rc != PL_OK)
        return pl_fail(ld->err, rc, "tensor %s (%s): %s", name, pl_dtype_name(parts[0]->dtype),
                       cause.msg[0] != '\0' ? cause.msg : pl_status_text(rc));
    return PL_OK;
}

/* The next n floats of the vectors' buffer; in the second pass *values is where the host prepares them. */
static pl_view take_vector(struct loader *ld, uint32_t n, float **values)
{
    const pl_view v = {.buf = ld->m->vectors, .offset = ld->n_floats, .rows = 1, .cols = n, .stride = n};
    *values = ld->staging != NULL ? ld->staging + ld->n_floats : NULL;
    ld->n_floats += ((size_t)n + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    return v;
}

/* This rank's values of a vector. */
static void put_vector(const struct loader *ld, const struct row *r, const struct pl_gguf_tensor *t, float *values)
{
    struct pl_range part[PL_PART_RANGES];
    const size_t n = pl_cut_outputs(r->cut, &ld->m->spec, &ld->m->part, r->n_cols, part);
    float *all = pl_xmalloc(r->n_cols * sizeof *all);
    pl_dequant_row(t->dtype, t->data, all, r->n_cols);
    for (size_t i = 0; i < n; values += part[i++].n)
        memcpy(values, all + part[i].first, part[i].n * sizeof *all);
    free(all);
}

static uint32_t own_width(const struct loader *ld, const struct row *r)
{
    struct pl_range part[PL_PART_RANGES];
    uint32_t width = 0;
    for (size_t i = 0, n = pl_cut_outputs(r->cut, &ld->m->spec, &ld->m->part, r->n_cols, part); i < n; i++)
        width += part[i].n;
    return width;
}

/* Loads the rows r[0..n) that share one field; base is the struct pl_top or struct pl_layer. */
static pl_status load_group(struct loader *ld, const struct row *r, size_t n, int layer, void *base)
{
    const struct pl_gguf_tensor *parts[MAX_PARTS];
    size_t n_found = 0;
    uint32_t width = 0;
    PL_ASSERT(n <= MAX_PARTS);
    for (size_t i = 0; i < n; i++) {
        const pl_status rc = find(ld, &r[i], layer, &parts[i]);
        if (rc != PL_OK)
            return rc;
        n_found += parts[i] != NULL;
        width += r[i].kind == VECTOR ? own_width(ld, &r[i]) : 0;
        if (parts[i] != NULL && ld->checking)
            ld->m->n_params += (uint64_t)r[i].n_rows * r[i].n_cols;
    }
    if (n_found == 0)
        return PL_OK;
    void *field = (char *)base + r->field;
    if (r->kind == MATRIX) {
        PL_ASSERT(n_found == n);
        return ld->checking ? PL_OK : load_matrix(ld, r, parts, n, tensor_name(r, layer).s, field);
    }
    if (width == 0)
        return PL_OK;
    float *values;
    *(pl_view *)field = take_vector(ld, width, &values);
    for (size_t i = 0; i < n && values != NULL; values += own_width(ld, &r[i++])) {
        if (parts[i] != NULL)
            put_vector(ld, &r[i], parts[i], values);
    }
    return PL_OK;
}

static pl_status load_rows(struct loader *ld, const struct row *r, size_t n, int layer, void *base)
{
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && r[end].field == r[i].field;)
            end++;
        const pl_status rc = load_group(ld, r + i, end - i, layer, base);
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

/* base^(-2i / dims), slowed by linear scaling and the file's factors. */
pl_status pl_model_rope_freq(const struct pl_spec *s, const float *factors, float *freq, struct pl_err *err)
{
    for (uint32_t i = 0; i < s->rope_dims / 2; i++) {
        const double f = factors != NULL ? (double)factors[i] : 1.0;
        if (!(f > 0) || !isfinite(f))
            return pl_fail(err, PL_EFORMAT, "tensor rope_freqs.weight holds %g; factors must be above 0", f);
        freq[i] = (float)(pow((double)s->rope_base, -2.0 * i / s->rope_dims) / (double)s->rope_factor / f);
    }
    return PL_OK;
}

static pl_status make_rope_freq(struct loader *ld)
{
    struct pl_model *m = ld->m;
    const uint32_t W = m->spec.rope_dims / 2;
    float *freq;
    if (m->spec.rope == PL_ROPE_NONE)
        return PL_OK;
    const float *factors = NULL;
    if (m->top.rope_factors.cols == W && ld->staging != NULL)
        factors = ld->staging + m->top.rope_factors.offset;
    m->top.rope_freq = take_vector(ld, W, &freq);
    return freq != NULL ? pl_model_rope_freq(&m->spec, factors, freq, ld->err) : PL_OK;
}

/* One pass over everything in the table, in file-independent order. */
static pl_status load_all(struct loader *ld)
{
    struct pl_model *m = ld->m;
    pl_status rc = load_rows(ld, ld->table.top, ld->table.n_top, -1, &m->top);
    for (uint32_t i = 0; rc == PL_OK && i < m->spec.n_layers; i++)
        rc = load_rows(ld, ld->table.layer, ld->table.n_layer, (int)i, &m->layers[i]);
    return rc != PL_OK ? rc : make_rope_freq(ld);
}

static bool has_prefix(struct pl_gguf_str s, const char *prefix)
{
    return s.n >= strlen(prefix) && memcmp(s.s, prefix, strlen(prefix)) == 0;
}

/* "blk.<layer>.rest": the layer, and *rest set; -1 when the name is not of that form. */
static long block_of(struct pl_gguf_str name, struct pl_gguf_str *rest)
{
    if (!has_prefix(name, "blk."))
        return -1;
    uint64_t i = 4;
    long layer = 0;
    for (; i < name.n && i < 10 && name.s[i] >= '0' && name.s[i] <= '9'; i++)
        layer = layer * 10 + (name.s[i] - '0');
    if (i == 4 || i >= name.n || name.s[i] != '.')
        return -1;
    *rest = (struct pl_gguf_str){name.s + i + 1, name.n - i - 1};
    return layer;
}

static bool in_rows(struct pl_gguf_str name, const struct row *r, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (name.n == strlen(r[i].name) && memcmp(name.s, r[i].name, name.n) == 0)
            return true;
    }
    return false;
}

/* A tensor that the table does not know: refused where a model of another kind would use it in its forward pass (a
 * part of one of the layers, of the embedding, the head or the positions), else passed over with a warning. */
static pl_status check_extra(const struct loader *ld, struct pl_gguf_str name)
{
    static const char *const in_the_pass[] = {"token_", "position_", "output", "rope_", "per_layer_", "altup_"};
    struct pl_gguf_str rest;
    const long layer = block_of(name, &rest);
    bool matters = false;
    if (layer >= 0 && layer < (long)ld->m->spec.n_layers) {
        if (in_rows(rest, ld->table.layer, ld->table.n_layer))
            return PL_OK;
        matters = !has_prefix(rest, "attn_rot_embd."); /* the plain frequencies, which are computed here */
    } else {
        if (in_rows(name, ld->table.top, ld->table.n_top))
            return PL_OK;
        for (size_t i = 0; i < PL_COUNT_OF(in_the_pass); i++)
            matters |= has_prefix(name, in_the_pass[i]);
    }
    const int shown = (int)(name.n < 128 ? name.n : 128);
    if (matters)
        return pl_fail(ld->err, PL_ENOTSUP, "tensor %.*s is not part of the %s architecture as supported here", shown,
                       name.s, ld->m->spec.arch);
    pl_log_warn("tensor %.*s is not used", shown, name.s);
    return PL_OK;
}

static pl_status check_extras(const struct loader *ld)
{
    for (size_t i = 0; i < pl_gguf_n_tensors(ld->g); i++) {
        const pl_status rc = check_extra(ld, pl_gguf_tensor_at(ld->g, i)->name);
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

/* The vocabulary's size is what the embedding has; other places that tell it must agree. */
static pl_status read_vocab(struct pl_model *m, const struct pl_gguf *g, struct pl_err *err)
{
    const struct pl_gguf_tensor *embed = pl_gguf_tensor(g, "token_embd.weight");
    if (embed == NULL)
        return pl_fail(err, PL_EFORMAT, "tensor token_embd.weight is missing");
    if (embed->ne[1] < 1 || embed->ne[1] > 1 << 24)
        return pl_fail(err, PL_EFORMAT, "tensor token_embd.weight has %llu rows; a vocabulary has 1 to 16777216",
                       (unsigned long long)embed->ne[1]);
    m->spec.n_vocab = (uint32_t)embed->ne[1];
    m->spec.tied = pl_gguf_tensor(g, "output.weight") == NULL;

    uint64_t n_tokens;
    pl_status rc = pl_gguf_array_len(g, "tokenizer.ggml.tokens", &n_tokens);
    if (rc != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key tokenizer.ggml.tokens is %s", rc == PL_ENOENT ? "missing" : "not an array");
    if (n_tokens != m->spec.n_vocab)
        return pl_fail(err, PL_EFORMAT, "key tokenizer.ggml.tokens has %llu tokens, tensor token_embd.weight %u rows",
                       (unsigned long long)n_tokens, m->spec.n_vocab);
    char key[64];
    uint32_t told;
    snprintf(key, sizeof key, "%s.vocab_size", m->spec.arch);
    rc = pl_gguf_u32(g, key, &told);
    if (rc != PL_ENOENT && (rc != PL_OK || told != m->spec.n_vocab))
        return pl_fail(err, PL_EFORMAT, "key %s does not agree with the %u rows of tensor token_embd.weight", key,
                       m->spec.n_vocab);
    return PL_OK;
}

/* The first pass: everything is looked at, nothing loaded. */
static pl_status check(struct loader *ld)
{
    ld->checking = true;
    table_fill(&ld->table, &ld->m->spec, ld->m->arch_bit);
    const pl_status rc = load_all(ld);
    return rc != PL_OK ? rc : check_extras(ld);
}

pl_status pl_model_check(struct pl_spec *spec, unsigned *arch_bit, uint64_t *n_params, const struct pl_gguf *g, struct pl_err *err)
{
    struct pl_model m = {0};
    struct loader ld = {.m = &m, .g = g, .err = err};
    pl_status rc = pl_spec_read(&m.spec, &m.arch_bit, g, err);
    if (rc != PL_OK || (rc = read_vocab(&m, g, err)) != PL_OK)
        return rc;
    m.layers = pl_xcalloc(m.spec.n_layers, sizeof *m.layers);
    m.part = (struct pl_part){.size = 1};
    rc = check(&ld);
    free(m.layers);
    *spec = m.spec;
    *arch_bit = m.arch_bit;
    if (n_params != NULL)
        *n_params = m.n_params;
    return rc;
}

static pl_status load_weights(struct pl_model *m, const struct pl_gguf *g, struct pl_err *err)
{
    struct loader ld = {.m = m, .g = g, .err = err};
    const struct pl_device_ops *ops = m->dev->ops;
    pl_status rc = check(&ld);
    if (rc != PL_OK)
        return rc;

    ld.checking = false;
    ld.staging = calloc(ld.n_floats, sizeof *ld.staging);
    const size_t total = ld.n_floats;
    ld.n_floats = 0;
    if (ld.staging == NULL || (rc = ops->buf_new(m->dev, total, &m->vectors)) != PL_OK) {
        rc = pl_fail(err, rc != PL_OK ? rc : PL_ENOMEM, "no memory for the model's %zu vector values", total);
        goto out;
    }
    if ((rc = load_all(&ld)) != PL_OK)
        goto out;
    PL_ASSERT(ld.n_floats == total);
    if ((rc = ops->put(m->dev, m->vectors, 0, ld.staging, total)) != PL_OK)
        rc = pl_fail(err, rc, "copying the model's vectors to the device: %s", pl_status_text(rc));
out:
    free(ld.staging);
    return rc;
}

/* The activations of batches of T tokens, R of which want logits: a buffer each, since what a device keeps about a buffer then holds for
 * one kind of rows. Sizes cannot overflow: rows < 2^32 and cols < 2^27 by the hyper-parameters' ranges. */
struct work {
    pl_view *view;
    uint32_t rows, cols;
};

static void list_work(struct pl_model *m, uint32_t T, uint32_t R, struct work work[PL_COUNT_OF(m->work)])
{
    const struct pl_spec *s = &m->own;
    const uint32_t C = s->n_embd, F = s->n_ff, V = m->part.rank == 0 ? m->spec.n_vocab : s->n_vocab;
    const uint32_t Q = s->n_heads * s->head_dim, K = s->n_kv_heads * s->head_dim;
    const uint32_t all_Q = m->part.sums ? Q : m->part.q_first[m->part.size], all_F = m->part.sums ? F : m->spec.n_ff;
    const struct work all[] = {{&m->x, T, C},      {&m->h, T, C},      {&m->qkv, T, Q + 2 * K},  {&m->att, T, all_Q},
                               {&m->ff, T, all_F}, {&m->x_rows, R, C}, {&m->att_rows, R, all_Q}, {&m->logits, R, V}};
    _Static_assert(PL_COUNT_OF(all) == PL_COUNT_OF(m->work), "a buffer for each view");
    memcpy(work, all, sizeof all);
}

static struct pl_step_shape step_shape(struct pl_model *m, uint32_t T)
{
    const struct pl_spec *s = &m->own;
    struct work work[PL_COUNT_OF(m->work)];
    struct pl_step_shape shape = {.n_tokens = T, .n_gated = s->gated ? 2 * s->n_ff : 0, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads,
                                  .head_dim = s->head_dim, .n_ctx = m->spec.n_ctx};
    shape.n_out = shape.n_gated; /* no buffer has both parts */
    list_work(m, T, T, work);
    for (size_t i = 0; i < PL_COUNT_OF(work); i++) {
        const bool is_in = work[i].view == &m->h || work[i].view == &m->att || work[i].view == &m->ff;
        if (is_in && work[i].cols > shape.n_in)
            shape.n_in = work[i].cols;
        if (work[i].cols > shape.n_out)
            shape.n_out = work[i].cols;
    }
    return shape;
}

/* Bytes of the device for batches of T tokens */
static double work_bytes(struct pl_model *m, uint32_t T)
{
    const struct pl_step_shape shape = step_shape(m, T);
    struct work work[PL_COUNT_OF(m->work)];
    double n = m->dev->ops->work_bytes != NULL ? (double)m->dev->ops->work_bytes(m->dev, &shape) : 0;
    list_work(m, T, m->max_rows < T ? m->max_rows : T, work);
    for (size_t i = 0; i < PL_COUNT_OF(work); i++)
        n += (double)work[i].rows * work[i].cols * sizeof(float);
    return n;
}

enum { LEAST_TOKENS = 16 /* that --batch-tokens may be */ };

/* Where the device's memory is its own: whether the batches fit into what the weights have left, else how large ones would. */
static pl_status check_work(struct pl_model *m, struct pl_err *err)
{
    const char *name = m->dev->ops->name;
    size_t room, total;
    if (m->dev->ops->memory == NULL || m->dev->ops->memory(m->dev, &room, &total) != PL_OK || work_bytes(m, m->max_tokens) <= (double)room)
        return PL_OK;
    uint32_t fit = 0, more = m->max_tokens;
    while (fit + 1 < more) {
        const uint32_t between = fit + (more - fit) / 2;
        *(work_bytes(m, between) <= 0.8 * (double)room ? &fit : &more) = between; /* some is left for the cache */
    }
    char remedy[96] = "not even the smallest would fit";
    if (fit >= LEAST_TOKENS)
        snprintf(remedy, sizeof remedy, "lower --batch-tokens to %u, and --max-sequences to no more than that", fit);
    return pl_fail_param(err, PL_ENOMEM, "batch-tokens",
                         "%s has %zu of %zu MiB free after the weights, batches of %u tokens take %.0f to work in: %s, or take a more quantized file or a "
                         "larger GPU", name, room >> 20, total >> 20, m->max_tokens, work_bytes(m, m->max_tokens) / 1048576, remedy);
}

static pl_status make_work(struct pl_model *m, struct pl_err *err)
{
    const struct pl_step_shape shape = step_shape(m, m->max_tokens);
    struct work work[PL_COUNT_OF(m->work)];
    pl_status rc = check_work(m, err);
    if (rc != PL_OK)
        return rc;
    list_work(m, m->max_tokens, m->max_rows, work);
    for (size_t i = 0; i < PL_COUNT_OF(work); i++) {
        const size_t n = (size_t)work[i].rows * work[i].cols;
        rc = n > SIZE_MAX / sizeof(float) ? PL_ENOMEM : m->dev->ops->buf_new(m->dev, n, &m->work[i]);
        if (rc != PL_OK)
            return pl_fail(err, rc, "no memory for batches of %u tokens (%zu values)", m->max_tokens, n);
        *work[i].view = (pl_view){m->work[i], 0, work[i].rows, work[i].cols, work[i].cols};
    }
    if (m->dev->ops->reserve != NULL && (rc = m->dev->ops->reserve(m->dev, &shape)) != PL_OK)
        return pl_fail(err, rc, "no memory for what batches of %u tokens are worked on with", m->max_tokens);
    m->own_tokens = pl_xcalloc(m->max_tokens, sizeof *m->own_tokens);
    if (m->part.rank != 0 || m->dev->ops->host(m->dev, m->logits.buf) != NULL)
        return PL_OK;
    m->host_logits = malloc((size_t)m->max_rows * m->spec.n_vocab * sizeof *m->host_logits);
    return m->host_logits != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory for the logits of %u rows", m->max_rows);
}

pl_status pl_model_load(struct pl_model **out, const struct pl_gguf *g, struct pl_device *dev, uint32_t max_tokens,
                        uint32_t max_rows, struct pl_err *err)
{
    return pl_model_load_part(out, g, dev, &pl_comm_single, max_tokens, max_rows, err);
}

pl_status pl_model_load_part(struct pl_model **out, const struct pl_gguf *g, struct pl_device *dev, struct pl_comm *comm, uint32_t max_tokens,
                             uint32_t max_rows, struct pl_err *err)
{
    *out = NULL;
    if (max_tokens == 0 || max_rows == 0 || max_rows > max_tokens)
        return pl_fail(err, PL_EINVAL, "a batch of %u tokens cannot have %u rows", max_tokens, max_rows);
    struct pl_model *m = pl_xcalloc(1, sizeof *m);
    m->dev = dev;
    m->comm = comm;
    m->file = g;
    m->max_tokens = max_tokens;
    m->max_rows = max_rows;
    pl_status rc = pl_spec_read(&m->spec, &m->arch_bit, g, err);
    if (rc != PL_OK || (rc = read_vocab(m, g, err)) != PL_OK)
        goto out;
    if ((rc = pl_part_make(&m->part, &m->spec, m->arch_bit, g, dev, comm->rank, comm->size, err)) != PL_OK)
        goto out;
    m->own = pl_part_spec(&m->part, &m->spec);
    m->attn_scale = 1.0f / sqrtf((float)m->spec.head_dim);
    m->layers = pl_xcalloc(m->spec.n_layers, sizeof *m->layers);
    pl_loras_init(&m->loras, max_tokens);
    if ((rc = load_weights(m, g, err)) != PL_OK || (rc = make_work(m, err)) != PL_OK)
        goto out;
    if (!pl_gguf_is_whole(g)) {
        rc = pl_fail(err, PL_EIO, "the model's file was cut off while it was read: try again when it is complete");
        goto out;
    }
    *out = m;
    m = NULL;
out:
    pl_model_free(m);
    return rc;
}

/* Several rows may name one matrix (stacked parts): the field is NULL after the first. */
static void free_matrices(struct pl_device *dev, const struct row *r, size_t n, void *base)
{
    for (size_t i = 0; i < n; i++) {
        if (r[i].kind != MATRIX)
            continue;
        struct pl_weight **w = (struct pl_weight **)((char *)base + r[i].field);
        if (*w != NULL)
            dev->ops->weight_free(dev, *w);
        *w = NULL;
    }
}

void pl_model_free(struct pl_model *m)
{
    if (m == NULL)
        return;
    struct table t;
    table_fill(&t, &m->spec, m->arch_bit);
    free_matrices(m->dev, t.top, t.n_top, &m->top);
    for (uint32_t i = 0; m->layers != NULL && i < m->spec.n_layers; i++)
        free_matrices(m->dev, t.layer, t.n_layer, &m->layers[i]);
    pl_loras_fini(&m->loras, m->dev);
    if (m->vectors != NULL)
        m->dev->ops->buf_free(m->dev, m->vectors);
    for (size_t i = 0; i < PL_COUNT_OF(m->work); i++)
        if (m->work[i] != NULL)
            m->dev->ops->buf_free(m->dev, m->work[i]);
    free(m->host_logits);
    pl_fill_fini(&m->fill);
    free(m->own_tokens);
    free(m->layers);
    free(m);
}
