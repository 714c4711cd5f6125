/* part: how a model is cut over ranks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/part.h"

#include <stdio.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/model/gguf.h"
#include "core/model/weights.h"

enum { WIDE = 32 /* values that products take at once */ };

/* The matrices of a layer. */
static const struct {
    unsigned archs;
    const char *name;
    pl_cut cut;
    bool matrix;
} layer_cuts[] = {
#define MATRIX true
#define VECTOR false
#define X(kind, field, archs, name, rows, cols, need, cut) {archs, name, PL_CUT_##cut, kind},
    PL_LAYER_WEIGHTS(X)
#undef X
#undef MATRIX
#undef VECTOR
};

pl_cut pl_cut_of(unsigned arch_bit, const char *name)
{
    const size_t n = strlen(name);
    for (size_t i = 0; i < PL_COUNT_OF(layer_cuts); i++)
        if (layer_cuts[i].matrix && (layer_cuts[i].archs & arch_bit) != 0 && strncmp(layer_cuts[i].name, name, n) == 0 &&
            strcmp(layer_cuts[i].name + n, ".weight") == 0)
            return layer_cuts[i].cut;
    return PL_CUT_WHOLE;
}

/* Where the share of rank r of n begins, in whole units; what is left over goes to the last one. */
static uint32_t cut_at(uint32_t n, uint32_t unit, unsigned r, unsigned size)
{
    return r == size ? n : (uint32_t)((uint64_t)(n / unit) * r / size * unit);
}

static struct pl_range share(const uint32_t *first, unsigned r)
{
    return (struct pl_range){first[r], first[r + 1] - first[r]};
}

/* Values that a block of the weights takes that are cut so, or of all matrices (PL_CUT_WHOLE); the largest of all layers. */
static uint32_t largest_block(const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, pl_cut cut)
{
    uint32_t most = 1;
    for (size_t i = 0; i < PL_COUNT_OF(layer_cuts); i++)
        for (uint32_t layer = 0; layer < s->n_layers; layer++) {
            if (!layer_cuts[i].matrix || (layer_cuts[i].archs & arch_bit) == 0 || (cut != PL_CUT_WHOLE && layer_cuts[i].cut != cut))
                break;
            char name[64];
            snprintf(name, sizeof name, "blk.%u.%s", layer, layer_cuts[i].name);
            const struct pl_gguf_tensor *t = pl_gguf_tensor(g, name);
            const uint32_t block = t != NULL ? pl_dtype_block(t->dtype) : 1;
            most = block > most ? block : most;
        }
    return most;
}

/* Values that stay together. */
struct units {
    uint32_t q, f;
};

static bool sums(const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, const struct pl_device *dev)
{
    return !dev->ops->rounds_inputs || largest_block(s, arch_bit, g, PL_CUT_WHOLE) == 1;
}

static struct units units_of(const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, const struct pl_device *dev)
{
    if (!sums(s, arch_bit, g, dev))
        return (struct units){1, 1};
    return (struct units){largest_block(s, arch_bit, g, PL_CUT_SUM_Q), largest_block(s, arch_bit, g, PL_CUT_SUM_F)};
}

/* Cuts elsewhere are possible, but products would be slow. */
static uint32_t wide(uint32_t n, uint32_t unit, unsigned size)
{
    return unit < WIDE && n / WIDE >= size ? WIDE : unit;
}

static bool possible(const struct pl_spec *s, struct units u, unsigned size)
{
    const uint32_t per_kv = s->n_heads / s->n_kv_heads * s->head_dim;
    bool ok = size <= PL_MAX_RANKS && size <= s->n_kv_heads && size <= s->n_ff / u.f && size <= s->n_vocab && size <= s->n_embd;
    for (unsigned r = 1; ok && r < size; r++)
        ok = cut_at(s->n_kv_heads, 1, r, size) * per_kv % u.q == 0;
    return ok;
}

static pl_status refuse(const struct pl_spec *s, struct units u, unsigned size, struct pl_err *err)
{
    struct pl_buf list;
    pl_buf_init(&list, 200);
    for (unsigned n = 1; n <= s->n_kv_heads; n++)
        if (possible(s, u, n))
            pl_buf_addf(&list, "%s%u", n > 1 ? ", " : "", n);
    const pl_status rc = pl_fail_param(err, PL_EINVAL, "tensor-parallel",
                                       "tensor-parallel %u does not fit this model (%u key/value heads, feed-forward of %u in blocks of %u): "
                                       "possible numbers of ranks are %s",
                                       size, s->n_kv_heads, s->n_ff, u.f, pl_buf_str(&list));
    pl_buf_fini(&list);
    return rc;
}

pl_status pl_part_make(struct pl_part *p, const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, const struct pl_device *dev,
                       unsigned rank, unsigned size, struct pl_err *err)
{
    const struct units u = units_of(s, arch_bit, g, dev);
    const uint32_t per_kv = s->n_heads / s->n_kv_heads * s->head_dim;
    PL_ASSERT(rank < size);
    if (size > 1 && !possible(s, u, size))
        return refuse(s, u, size, err);
    *p = (struct pl_part){.rank = rank, .size = size, .sums = sums(s, arch_bit, g, dev)};
    for (unsigned r = 0; r <= size; r++) {
        p->q_first[r] = cut_at(s->n_kv_heads, 1, r, size) * per_kv;
        p->f_first[r] = cut_at(s->n_ff, wide(s->n_ff, u.f, size), r, size);
        p->c_first[r] = cut_at(s->n_embd, wide(s->n_embd, 1, size), r, size);
        p->v_first[r] = cut_at(s->n_vocab, wide(s->n_vocab, 1, size), r, size);
    }
    const uint32_t k_first = cut_at(s->n_kv_heads, 1, rank, size), k_end = cut_at(s->n_kv_heads, 1, rank + 1, size);
    p->q = share(p->q_first, rank);
    p->k = (struct pl_range){k_first * s->head_dim, (k_end - k_first) * s->head_dim};
    p->f = share(p->f_first, rank);
    p->c = share(p->c_first, rank);
    p->v = share(p->v_first, rank);
    return PL_OK;
}

struct pl_spec pl_part_spec(const struct pl_part *p, const struct pl_spec *s)
{
    struct pl_spec own = *s;
    own.n_heads = p->q.n / s->head_dim;
    own.n_kv_heads = p->k.n / s->head_dim;
    own.n_ff = p->f.n;
    own.n_vocab = p->v.n;
    return own;
}

size_t pl_cut_outputs(pl_cut cut, const struct pl_spec *s, const struct pl_part *p, uint32_t n, struct pl_range out[PL_PART_RANGES])
{
    const uint32_t Q = s->n_heads * s->head_dim, K = s->n_kv_heads * s->head_dim;
    switch (p->size == 1 ? PL_CUT_WHOLE : cut) {
    case PL_CUT_WHOLE: out[0] = (struct pl_range){0, n}; return 1;
    case PL_CUT_FIRST: out[0] = (struct pl_range){0, n}; return p->rank == 0;
    case PL_CUT_SUM_Q:
    case PL_CUT_SUM_F: out[0] = p->sums ? (struct pl_range){0, n} : p->c; return 1;
    case PL_CUT_SUM: out[0] = p->sums ? (struct pl_range){0, n} : p->c; return p->rank == 0 || !p->sums;
    case PL_CUT_OUT_Q: out[0] = p->q; return 1;
    case PL_CUT_OUT_K: out[0] = p->k; return 1;
    case PL_CUT_OUT_F: out[0] = p->f; return 1;
    case PL_CUT_OUT_V: out[0] = p->v; return 1;
    case PL_CUT_OUT_QKV: break;
    }
    out[0] = p->q;
    out[1] = (struct pl_range){Q + p->k.first, p->k.n};
    out[2] = (struct pl_range){Q + K + p->k.first, p->k.n};
    return 3;
}

struct pl_range pl_cut_inputs(pl_cut cut, const struct pl_part *p, uint32_t n)
{
    return p->sums && cut == PL_CUT_SUM_Q ? p->q : p->sums && cut == PL_CUT_SUM_F ? p->f : (struct pl_range){0, n};
}
