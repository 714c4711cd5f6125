/* adapter: low-rank adapters as plain data: the table of what can be adapted, and what all kinds of files have in common.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/adapter.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/model/adapter_int.h"

bool pl_target_find(const struct pl_spec *spec, pl_target target, struct pl_target_place *place)
{
    const uint32_t C = spec->n_embd, F = spec->n_ff, Q = spec->n_heads * spec->head_dim, K = spec->n_kv_heads * spec->head_dim;
#define X(id, architecture, fused, tensor, path, short_name, from, n_rows, n_cols)                                     \
    if (target == PL_TARGET_##id && strcmp(spec->arch, architecture) == 0) {                                           \
        *place = (struct pl_target_place){tensor, path, short_name, PL_PRODUCT_##fused, from, n_rows, n_cols};         \
        return true;                                                                                                   \
    }
    PL_ADAPTER_TARGETS(X)
#undef X
    (void)K;
    return false;
}

uint32_t pl_target_heads(const struct pl_spec *spec, pl_target target)
{
    if (strcmp(spec->arch, "llama") != 0)
        return 0;
    return target == PL_TARGET_Q ? spec->n_heads : target == PL_TARGET_K ? spec->n_kv_heads : 0;
}

void pl_adapter_rows_to_pairs(const float *in, float *out, uint32_t n_heads, uint32_t head_dim, size_t n)
{
    const uint32_t half = head_dim / 2;
    for (uint32_t h = 0; h < n_heads; h++)
        for (uint32_t i = 0; i < head_dim; i++)
            memcpy(out + ((size_t)h * head_dim + (i % half * 2 + i / half)) * n, in + ((size_t)h * head_dim + i) * n, n * sizeof *out);
}

void pl_adapter_rows_to_halves(const float *in, float *out, uint32_t n_heads, uint32_t head_dim, size_t n)
{
    const uint32_t half = head_dim / 2;
    for (uint32_t h = 0; h < n_heads; h++)
        for (uint32_t i = 0; i < head_dim; i++)
            memcpy(out + ((size_t)h * head_dim + i) * n, in + ((size_t)h * head_dim + (i % half * 2 + i / half)) * n, n * sizeof *out);
}

/* ---- parts --------------------------------------------------------------------------------------------------------- */

pl_status pl_adapter_parts_init(struct pl_adapter_parts *p, const struct pl_spec *spec, struct pl_err *err)
{
    p->spec = spec;
    p->slots = calloc((size_t)spec->n_layers * PL_TARGET_COUNT, sizeof *p->slots);
    return p->slots != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
}

void pl_adapter_parts_fini(struct pl_adapter_parts *p)
{
    free(p->slots);
    p->slots = NULL;
}

static int shown(size_t n)
{
    return n < PL_ADAPTER_NAME ? (int)n : PL_ADAPTER_NAME;
}

pl_status pl_adapter_parts_add(struct pl_adapter_parts *p, const char *name, size_t n_name, uint64_t layer, pl_target target,
                               pl_lora_half half, uint64_t rows, uint64_t cols, const void *tensor, struct pl_err *err)
{
    struct pl_target_place place;
    if (!pl_target_find(p->spec, target, &place))
        return pl_fail(err, PL_EFORMAT, "tensor %.*s adapts what a %s model does not have: it was made for another base model", shown(n_name),
                       name, p->spec->arch);
    if (layer >= p->spec->n_layers)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s is for layer %llu; the base model has %u: the adapter was made for another base model",
                       shown(n_name), name, (unsigned long long)layer, p->spec->n_layers);
    const uint64_t rank = half == PL_LORA_A ? rows : cols, wide = half == PL_LORA_A ? cols : rows;
    const uint32_t wanted = half == PL_LORA_A ? place.cols : place.rows;
    if (wide != wanted)
        return pl_fail(err, PL_EFORMAT,
                       "tensor %.*s has the shape [%llu, %llu]; the base model needs %u %s: the adapter was made for another base model",
                       shown(n_name), name, (unsigned long long)rows, (unsigned long long)cols, wanted,
                       half == PL_LORA_A ? "columns" : "rows");
    if (rank < 1 || rank > PL_ADAPTER_MAX_RANK)
        return pl_fail(err, PL_ENOTSUP, "tensor %.*s has rank %llu; 1 to %d are supported", shown(n_name), name, (unsigned long long)rank,
                       PL_ADAPTER_MAX_RANK);
    struct pl_adapter_slot *s = &p->slots[layer * PL_TARGET_COUNT + target];
    if (s->half[half].tensor != NULL)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s is there a second time, as %.*s", shown(n_name), name,
                       shown(s->half[half].n_name), s->half[half].name);
    s->half[half].tensor = tensor;
    s->half[half].rank = rank;
    s->half[half].name = name;
    s->half[half].n_name = n_name;
    return PL_OK;
}

static pl_status check_pair(const struct pl_adapter_slot *s, struct pl_err *err)
{
    for (int i = 0; i < 2; i++)
        if (s->half[i].tensor == NULL)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s has no lora_%c beside it: the file is incomplete", shown(s->half[!i].n_name),
                           s->half[!i].name, i == PL_LORA_A ? 'A' : 'B');
    if (s->half[PL_LORA_A].rank != s->half[PL_LORA_B].rank)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s has rank %llu, but the lora_B beside it %llu", shown(s->half[0].n_name), s->half[0].name,
                       (unsigned long long)s->half[PL_LORA_A].rank, (unsigned long long)s->half[PL_LORA_B].rank);
    return PL_OK;
}

/* ---- assembling ---------------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 29;
}

static uint64_t mix_floats(uint64_t h, const float *v, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &v[i], sizeof bits);
        h = mix(h, bits);
    }
    return h;
}

static bool all_finite(const float *v, size_t n)
{
    float sum = 0; /* x * 0 is 0, or not a number */
    for (size_t i = 0; i < n; i++)
        sum += v[i] * 0.0f;
    return sum == 0;
}

static pl_status read_half(const struct pl_adapter_slot *s, pl_lora_half half, const struct pl_adapter_reader *r, size_t n, float **out,
                           struct pl_err *err)
{
    *out = malloc(n * sizeof **out);
    if (*out == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter's %zu values", n);
    r->read(s->half[half].tensor, *out);
    if (!all_finite(*out, n))
        return pl_fail(err, PL_EFORMAT, "tensor %.*s holds values that are not finite numbers", shown(s->half[half].n_name), s->half[half].name);
    return PL_OK;
}

static pl_status assemble_pair(struct pl_lora_pair *pair, const struct pl_adapter_parts *p, const struct pl_adapter_reader *r, struct pl_err *err)
{
    const struct pl_spec *spec = p->spec;
    const struct pl_adapter_slot *s = &p->slots[(size_t)pair->layer * PL_TARGET_COUNT + pair->target];
    struct pl_target_place place = {0};
    PL_ASSERT(pl_target_find(spec, pair->target, &place));
    pl_status rc = check_pair(s, err);
    if (rc != PL_OK)
        return rc;
    pair->rank = (uint32_t)s->half[PL_LORA_A].rank;
    if ((rc = r->alpha(r->self, &place, pair->layer, pair->rank, &pair->alpha, err)) != PL_OK)
        return rc;
    pair->scale = pair->alpha / (r->rslora ? sqrtf((float)pair->rank) : (float)pair->rank);
    const size_t n = (size_t)place.rows * pair->rank;
    if ((rc = read_half(s, PL_LORA_A, r, (size_t)place.cols * pair->rank, &pair->a, err)) != PL_OK ||
        (rc = read_half(s, PL_LORA_B, r, n, &pair->b, err)) != PL_OK)
        return rc;
    const uint32_t heads = r->halves ? pl_target_heads(spec, pair->target) : 0;
    if (heads == 0)
        return PL_OK;
    float *ordered = malloc(n * sizeof *ordered);
    if (ordered == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter's %zu values", n);
    pl_adapter_rows_to_pairs(pair->b, ordered, heads, spec->head_dim, pair->rank);
    free(pair->b);
    pair->b = ordered;
    return PL_OK;
}

static uint64_t hash_of(const struct pl_adapter *a, const struct pl_spec *spec)
{
    uint64_t h = a->n_pairs;
    for (size_t i = 0; i < a->n_pairs; i++) {
        const struct pl_lora_pair *p = &a->pairs[i];
        struct pl_target_place place = {0};
        PL_ASSERT(pl_target_find(spec, p->target, &place));
        h = mix(mix(h, (uint64_t)p->layer << 32 | p->target), p->rank);
        h = mix_floats(mix_floats(mix_floats(h, &p->scale, 1), p->a, (size_t)p->rank * place.cols), p->b, (size_t)p->rank * place.rows);
    }
    return h;
}

pl_status pl_adapter_assemble(struct pl_adapter **out, const struct pl_adapter_parts *p, const struct pl_adapter_reader *r, struct pl_err *err)
{
    const struct pl_spec *spec = p->spec;
    struct pl_adapter *a = pl_xcalloc(1, sizeof *a);
    *a = (struct pl_adapter){.arch = spec->arch, .rslora = r->rslora};
    a->pairs = pl_xcalloc((size_t)spec->n_layers * PL_TARGET_COUNT, sizeof *a->pairs);
    pl_status rc = PL_OK;
    for (uint32_t layer = 0; layer < spec->n_layers && rc == PL_OK; layer++)
        for (uint32_t t = 0; t < PL_TARGET_COUNT && rc == PL_OK; t++) {
            const struct pl_adapter_slot *s = &p->slots[(size_t)layer * PL_TARGET_COUNT + t];
            if (s->half[0].tensor == NULL && s->half[1].tensor == NULL)
                continue;
            struct pl_lora_pair *pair = &a->pairs[a->n_pairs++];
            *pair = (struct pl_lora_pair){.layer = layer, .target = (pl_target)t};
            rc = assemble_pair(pair, p, r, err);
        }
    if (rc == PL_OK && a->n_pairs == 0)
        rc = pl_fail(err, PL_EFORMAT, "the file holds no adapter: there is no lora_A and lora_B in it");
    if (rc != PL_OK) {
        pl_adapter_free(a);
        return rc;
    }
    a->hash = hash_of(a, spec);
    *out = a;
    return PL_OK;
}

pl_status pl_adapter_read(struct pl_adapter **out, const char *path, const struct pl_spec *spec, struct pl_err *err)
{
    struct stat info;
    if (stat(path, &info) != 0)
        return pl_fail(err, errno == ENOENT ? PL_ENOENT : PL_EIO, "cannot open the adapter %.300s: %s", path, strerror(errno));
    return S_ISDIR(info.st_mode) ? pl_adapter_read_peft(out, path, spec, err) : pl_adapter_read_gguf(out, path, spec, err);
}

void pl_adapter_free(struct pl_adapter *a)
{
    if (a == NULL)
        return;
    for (size_t i = 0; i < a->n_pairs; i++) {
        free(a->pairs[i].a);
        free(a->pairs[i].b);
    }
    free(a->pairs);
    free(a);
}
