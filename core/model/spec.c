/* spec: a model's hyper-parameters as plain data, read from a GGUF file and checked before anything is sized by them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/spec.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/gguf.h"
#include "core/model/weights.h"

/* Every key of the hyper-parameters, behind "<architecture>.". A value outside [min, max] is refused; MAY keeps the
 * default that pl_spec_read has set. */
#define PL_SPEC_KEYS(X) /* key, field, type, min, max, architectures, need */                                          \
    X("block_count", n_layers, U32, 1, 1024, PL_ARCH_ANY, MUST)                                                        \
    X("context_length", n_ctx, U32, 1, 1 << 24, PL_ARCH_ANY, MUST)                                                     \
    X("embedding_length", n_embd, U32, 1, 1 << 20, PL_ARCH_ANY, MUST)                                                  \
    X("feed_forward_length", n_ff, U32, 1, 1 << 22, PL_ARCH_ANY, MUST)                                                 \
    X("attention.head_count", n_heads, U32, 1, 4096, PL_ARCH_ANY, MUST)                                                \
    X("attention.head_count_kv", n_kv_heads, U32, 1, 4096, PL_ARCH_ANY, MAY)                                           \
    X("attention.key_length", head_dim, U32, 1, 4096, PL_ARCH_ANY, MAY)                                                \
    X("attention.layer_norm_rms_epsilon", norm_eps, F32, 1e-30, 1, PL_ARCH_LLAMA, MUST)                                \
    X("attention.layer_norm_epsilon", norm_eps, F32, 1e-30, 1, PL_ARCH_GPT2, MUST)                                     \
    X("rope.dimension_count", rope_dims, U32, 2, 4096, PL_ARCH_LLAMA, MAY)                                             \
    X("rope.freq_base", rope_base, F32, 1, 1e15, PL_ARCH_LLAMA, MAY)                                                   \
    X("rope.scale_linear", rope_factor, F32, 1e-6, 1e6, PL_ARCH_LLAMA, MAY)                                            \
    X("rope.scaling.factor", rope_factor, F32, 1e-6, 1e6, PL_ARCH_LLAMA, MAY)

/* Keys of features that this program lacks: fine when absent or at a value that means "off", else refused by name. */
static const struct {
    const char *key;
    double off[2];
} unsupported[] = {
    {"expert_count", {0, 0}},
    {"attention.max_alibi_bias", {0, 0}},
    {"attention.clamp_kqv", {0, 0}},
    {"attention.scale", {0, 0}},
    {"attention.causal", {1, 1}},
    {"attn_logit_softcapping", {0, 0}},
    {"final_logit_softcapping", {0, 0}},
    {"attention.temperature_length", {0, 0}},
    {"logit_scale", {0, 1}},
    {"residual_scale", {0, 1}},
    {"embedding_scale", {0, 1}},
    {"use_parallel_residual", {0, 0}},
    {"rope.scaling.attn_factor", {0, 1}},
};

static const struct {
    const char *name;
    unsigned bit;
    pl_norm_kind norm;
    pl_rope_kind rope;
    pl_act_kind act;
    bool gated;
} archs[] = {
#define X(name, id, norm, rope, act, gated) {name, PL_ARCH_##id, norm, rope, act, gated},
    PL_ARCH_LIST(X)
#undef X
};

enum key_type { KEY_U32, KEY_F32 };
enum key_need { KEY_MUST, KEY_MAY };
static const struct key {
    const char *key;
    enum key_type type;
    size_t offset;
    double min, max;
    unsigned archs;
    enum key_need need;
} keys[] = {
#define X(key, field, type, min, max, archs, need)                                                                     \
    {key, KEY_##type, offsetof(struct pl_spec, field), min, max, archs, KEY_##need},
    PL_SPEC_KEYS(X)
#undef X
};

struct key_name {
    char s[96];
};

static struct key_name key_name(const struct pl_spec *s, const char *key)
{
    struct key_name k;
    snprintf(k.s, sizeof k.s, "%s.%s", s->arch, key);
    return k;
}

/* A number of whatever type: PL_OK, PL_ENOENT or PL_EFORMAT. */
static pl_status number(const struct pl_gguf *g, const char *key, double *out)
{
    uint32_t u;
    float f;
    bool b;
    pl_status rc = pl_gguf_u32(g, key, &u);
    if (rc == PL_OK) {
        *out = u;
        return PL_OK;
    }
    if (rc == PL_ENOENT)
        return rc;
    if (pl_gguf_f32(g, key, &f) == PL_OK) {
        *out = (double)f;
        return PL_OK;
    }
    if (pl_gguf_bool(g, key, &b) == PL_OK) {
        *out = b;
        return PL_OK;
    }
    return PL_EFORMAT;
}

static pl_status read_key(struct pl_spec *s, const struct key *k, const struct pl_gguf *g, struct pl_err *err)
{
    const struct key_name name = key_name(s, k->key);
    void *field = (char *)s + k->offset;
    double value = 0;
    pl_status rc;
    if (k->type == KEY_U32) {
        uint32_t u = 0;
        rc = pl_gguf_u32(g, name.s, &u);
        value = u;
        if (rc == PL_OK)
            memcpy(field, &u, sizeof u);
    } else {
        float f = 0;
        rc = pl_gguf_f32(g, name.s, &f);
        value = (double)f;
        if (rc == PL_OK)
            memcpy(field, &f, sizeof f);
    }
    if (rc == PL_ENOENT)
        return k->need == KEY_MAY ? PL_OK : pl_fail(err, PL_EFORMAT, "key %s is missing", name.s);
    if (rc != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key %s is not %s", name.s,
                       k->type == KEY_U32 ? "a whole number from 0 to 4294967295" : "a floating-point number");
    if (!(value >= k->min && value <= k->max)) /* refuses NaN too */
        return pl_fail(err, PL_EFORMAT, "key %s is %g; it must lie between %g and %g", name.s, value, k->min, k->max);
    return PL_OK;
}

static pl_status find_arch(struct pl_spec *s, unsigned *bit, const struct pl_gguf *g, struct pl_err *err)
{
    struct pl_gguf_str v;
    pl_status rc = pl_gguf_string(g, "general.architecture", &v);
    if (rc != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key general.architecture is %s", rc == PL_ENOENT ? "missing" : "not a string");
    for (size_t i = 0; i < PL_COUNT_OF(archs); i++) {
        if (v.n != strlen(archs[i].name) || memcmp(v.s, archs[i].name, v.n) != 0)
            continue;
        s->arch = archs[i].name;
        s->norm = archs[i].norm;
        s->rope = archs[i].rope;
        s->act = archs[i].act;
        s->gated = archs[i].gated;
        *bit = archs[i].bit;
        return PL_OK;
    }
    return pl_fail(err, PL_ENOTSUP, "architecture \"%.*s\" is not supported (supported: llama, gpt2)",
                   (int)(v.n < 64 ? v.n : 64), v.s);
}

/* Reads a key that may be absent (then *present is false) and must be a number when it is there. */
static pl_status optional_number(const struct pl_gguf *g, const char *key, double *v, bool *present, struct pl_err *err)
{
    const pl_status rc = number(g, key, v);
    *present = rc == PL_OK;
    return rc == PL_OK || rc == PL_ENOENT ? PL_OK : pl_fail(err, PL_EFORMAT, "key %s is not a number", key);
}

static pl_status refuse_unsupported(const struct pl_spec *s, const struct pl_gguf *g, struct pl_err *err)
{
    double v;
    bool present;
    pl_status rc;
    for (size_t i = 0; i < PL_COUNT_OF(unsupported); i++) {
        const struct key_name name = key_name(s, unsupported[i].key);
        if ((rc = optional_number(g, name.s, &v, &present, err)) != PL_OK)
            return rc;
        if (present && v != unsupported[i].off[0] && v != unsupported[i].off[1])
            return pl_fail(err, PL_ENOTSUP, "key %s = %g: this feature is not supported", name.s, v);
    }
    const struct key_name window = key_name(s, "attention.sliding_window");
    if ((rc = optional_number(g, window.s, &v, &present, err)) != PL_OK)
        return rc;
    if (present && v != 0 && v < s->n_ctx)
        return pl_fail(err, PL_ENOTSUP, "key %s = %g: sliding-window attention is not supported", window.s, v);
    if ((rc = optional_number(g, "split.count", &v, &present, err)) != PL_OK)
        return rc;
    if (present && v > 1)
        return pl_fail(err, PL_ENOTSUP, "the file is one of %g parts (key split.count); merge them into one file first", v);
    return PL_OK;
}

static pl_status check_heads(struct pl_spec *s, const struct pl_gguf *g, struct pl_err *err)
{
    if (s->n_kv_heads == 0)
        s->n_kv_heads = s->n_heads;
    if (s->n_heads % s->n_kv_heads != 0)
        return pl_fail(err, PL_EFORMAT, "key %s.attention.head_count = %u is no multiple of head_count_kv = %u", s->arch,
                       s->n_heads, s->n_kv_heads);
    if (s->head_dim == 0) {
        if (s->n_embd % s->n_heads != 0)
            return pl_fail(err, PL_EFORMAT, "key %s.embedding_length = %u is no multiple of attention.head_count = %u",
                           s->arch, s->n_embd, s->n_heads);
        s->head_dim = s->n_embd / s->n_heads;
        if (s->head_dim > 4096)
            return pl_fail(err, PL_EFORMAT, "key %s.attention.head_count = %u makes heads of %u values; at most 4096",
                           s->arch, s->n_heads, s->head_dim);
    }
    if (s->head_dim > PL_MAX_HEAD_DIM || s->n_heads / s->n_kv_heads > PL_MAX_QUERIES_PER_KV)
        return pl_fail(err, PL_ENOTSUP, "the model has heads of %u values and %u query heads for each key/value head; at most %d and %d are supported",
                       s->head_dim, s->n_heads / s->n_kv_heads, PL_MAX_HEAD_DIM, PL_MAX_QUERIES_PER_KV);
    const struct key_name name = key_name(s, "attention.value_length");
    double v;
    bool present;
    const pl_status rc = optional_number(g, name.s, &v, &present, err);
    if (rc != PL_OK)
        return rc;
    if (present && v != s->head_dim)
        return pl_fail(err, PL_ENOTSUP, "key %s = %g differs from the key length %u", name.s, v, s->head_dim);
    return PL_OK;
}

static pl_status check_rope(struct pl_spec *s, const struct pl_gguf *g, struct pl_err *err)
{
    if (s->rope == PL_ROPE_NONE)
        return PL_OK;
    if (s->rope_dims == 0)
        s->rope_dims = s->head_dim;
    if (s->rope_dims % 2 != 0 || s->rope_dims > s->head_dim)
        return pl_fail(err, PL_EFORMAT, "key %s.rope.dimension_count = %u must be even and at most the head's %u", s->arch,
                       s->rope_dims, s->head_dim);
    const struct key_name name = key_name(s, "rope.scaling.type");
    struct pl_gguf_str v;
    const pl_status rc = pl_gguf_string(g, name.s, &v);
    if (rc == PL_ENOENT)
        return PL_OK;
    if (rc != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key %s is not a string", name.s);
    if (v.n == 4 && memcmp(v.s, "none", 4) == 0) {
        s->rope_factor = 1;
        return PL_OK;
    }
    if (v.n == 6 && memcmp(v.s, "linear", 6) == 0)
        return PL_OK;
    return pl_fail(err, PL_ENOTSUP, "key %s = \"%.*s\" is not supported (supported: none, linear)", name.s,
                   (int)(v.n < 64 ? v.n : 64), v.s);
}

pl_status pl_spec_read(struct pl_spec *s, unsigned *arch_bit, const struct pl_gguf *g, struct pl_err *err)
{
    *s = (struct pl_spec){.rope_base = 10000, .rope_factor = 1};
    pl_status rc = find_arch(s, arch_bit, g, err);
    if (rc != PL_OK)
        return rc;
    struct pl_gguf_str name;
    if (pl_gguf_string(g, "general.name", &name) == PL_OK)
        snprintf(s->name, sizeof s->name, "%.*s", (int)(name.n < sizeof s->name ? name.n : sizeof s->name), name.s);
    for (size_t i = 0; i < PL_COUNT_OF(keys); i++) {
        if ((keys[i].archs & *arch_bit) != 0 && (rc = read_key(s, &keys[i], g, err)) != PL_OK)
            return rc;
    }
    if ((rc = check_heads(s, g, err)) != PL_OK || (rc = check_rope(s, g, err)) != PL_OK)
        return rc;
    return refuse_unsupported(s, g, err);
}
