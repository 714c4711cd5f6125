/* tiny_flags: a tiny model's options as command-line flags, which is also how test fixtures name them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/mem.h"
#include "tests/tools/tiny_model.h"

static const struct flag {
    const char *name;
    enum { TEXT, TYPE, SEED, SIZE, REAL, SWITCH } kind;
    size_t offset;
} flags_known[] = {
    {"--arch", TEXT, offsetof(struct tiny_options, arch)},
    {"--tokenizer", TEXT, offsetof(struct tiny_options, tokenizer)},
    {"--pre", TEXT, offsetof(struct tiny_options, pre)},
    {"--type", TYPE, offsetof(struct tiny_options, dtype)},
    {"--seed", SEED, offsetof(struct tiny_options, seed)},
    {"--layers", SIZE, offsetof(struct tiny_options, n_layers)},
    {"--embd", SIZE, offsetof(struct tiny_options, n_embd)},
    {"--heads", SIZE, offsetof(struct tiny_options, n_heads)},
    {"--kv-heads", SIZE, offsetof(struct tiny_options, n_kv_heads)},
    {"--head-dim", SIZE, offsetof(struct tiny_options, head_dim)},
    {"--ff", SIZE, offsetof(struct tiny_options, n_ff)},
    {"--ctx", SIZE, offsetof(struct tiny_options, n_ctx)},
    {"--rope-base", REAL, offsetof(struct tiny_options, rope_base)},
    {"--rope-linear", REAL, offsetof(struct tiny_options, rope_linear)},
    {"--rope-factors", SWITCH, offsetof(struct tiny_options, rope_factors)},
    {"--untied", SWITCH, offsetof(struct tiny_options, untied)},
    {"--biases", SWITCH, offsetof(struct tiny_options, biases)},
};

static bool type_named(const char *s, pl_dtype *out)
{
    static const struct {
        const char *name;
        pl_dtype dtype;
    } types[] = {
#define X(name, number, elements, bytes) {#name, PL_##name},
        PL_DTYPE_LIST(X)
#undef X
    };
    for (size_t i = 0; i < PL_COUNT_OF(types); i++) {
        if (strcasecmp(types[i].name, s) == 0) {
            *out = types[i].dtype;
            return true;
        }
    }
    return false;
}

static bool number(const char *s, double min, double max, double *out)
{
    char *end;
    *out = strtod(s, &end);
    return end != s && *end == '\0' && *out >= min && *out <= max;
}

static bool set(const struct flag *f, void *field, const char *value)
{
    double v = 0;
    bool ok = true;
    switch (f->kind) {
    case TEXT:
        memcpy(field, &value, sizeof value);
        return true;
    case TYPE:
        return type_named(value, field);
    case SEED:
        ok = number(value, 0, 1e15, &v);
        *(uint64_t *)field = (uint64_t)v;
        return ok;
    case SIZE:
        ok = number(value, 1, 1 << 20, &v);
        *(uint32_t *)field = (uint32_t)v;
        return ok;
    case REAL:
        ok = number(value, 1e-3, 1e15, &v);
        *(float *)field = (float)v;
        return ok;
    case SWITCH:
        *(bool *)field = true;
        return true;
    }
    return false;
}

static const struct flag *known(const char *name)
{
    for (size_t i = 0; i < PL_COUNT_OF(flags_known); i++) {
        if (strcmp(flags_known[i].name, name) == 0)
            return &flags_known[i];
    }
    return NULL;
}

pl_status tiny_options_flags(struct tiny_options *o, const char *const *flags, size_t n, struct pl_err *err)
{
    const uint32_t embd = o->n_embd, ff = o->n_ff;
    for (size_t i = 0; i < n; i++) {
        const struct flag *f = known(flags[i]);
        if (f == NULL)
            return pl_fail(err, PL_EINVAL, "unknown flag %s", flags[i]);
        const char *value = f->kind == SWITCH ? "" : i + 1 < n ? flags[++i] : NULL;
        if (value == NULL || !set(f, (char *)o + f->offset, value))
            return pl_fail(err, PL_EINVAL, "bad value for %s", f->name);
    }
    if (pl_dtype_block(o->dtype) == 256) { /* the usual sizes are no multiples of a K-quant's block */
        o->n_embd = o->n_embd == embd ? 256 : o->n_embd;
        o->n_ff = o->n_ff == ff ? 512 : o->n_ff;
    }
    return PL_OK;
}
