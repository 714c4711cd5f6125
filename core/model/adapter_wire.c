/* adapter_wire: an adapter as one block of bytes:
 *
 *   n_pairs (8 bytes) | pair: layer, target, rank, scale (4 bytes each), a[rank][cols], b[rows][rank] | pair | …
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/adapter_wire.h"

#include <stdlib.h>
#include <string.h>

struct pair_head {
    uint32_t layer, target, rank;
    float scale;
};

static size_t values_of(const struct pl_lora_pair *p, const struct pl_target_place *place)
{
    return (size_t)p->rank * ((size_t)place->rows + place->cols);
}

pl_status pl_adapter_pack(struct pl_adapter_wire *w, const struct pl_adapter *a, const struct pl_spec *spec, struct pl_err *err)
{
    struct pl_target_place place = {0};
    const uint64_t n_pairs = a->n_pairs;
    size_t n = sizeof n_pairs;
    for (size_t i = 0; i < a->n_pairs; i++) {
        PL_ASSERT(pl_target_find(spec, a->pairs[i].target, &place));
        n += sizeof(struct pair_head) + values_of(&a->pairs[i], &place) * sizeof(float);
    }
    char *at = malloc(n);
    if (at == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    *w = (struct pl_adapter_wire){at, n};
    memcpy(at, &n_pairs, sizeof n_pairs);
    at += sizeof n_pairs;
    for (size_t i = 0; i < a->n_pairs; i++) {
        const struct pl_lora_pair *p = &a->pairs[i];
        PL_ASSERT(pl_target_find(spec, p->target, &place));
        const struct pair_head head = {p->layer, p->target, p->rank, p->scale};
        const size_t n_a = (size_t)p->rank * place.cols * sizeof *p->a, n_b = (size_t)p->rank * place.rows * sizeof *p->b;
        memcpy(at, &head, sizeof head);
        memcpy(at + sizeof head, p->a, n_a);
        memcpy(at + sizeof head + n_a, p->b, n_b);
        at += sizeof head + n_a + n_b;
    }
    return PL_OK;
}

void pl_adapter_wire_fini(struct pl_adapter_wire *w)
{
    free(w->bytes);
    *w = (struct pl_adapter_wire){0};
}

/* One pair; the bytes behind it, NULL when it does not fit. */
static char *take_pair(struct pl_lora_pair *p, char *at, const char *end, const struct pl_spec *spec)
{
    struct pair_head head;
    struct pl_target_place place;
    if ((size_t)(end - at) < sizeof head)
        return NULL;
    memcpy(&head, at, sizeof head);
    at += sizeof head;
    *p = (struct pl_lora_pair){.layer = head.layer, .target = (pl_target)head.target, .rank = head.rank, .scale = head.scale};
    if (!pl_target_find(spec, p->target, &place) || (size_t)(end - at) / sizeof(float) < values_of(p, &place))
        return NULL;
    p->a = (float *)(void *)at;
    p->b = p->a + (size_t)p->rank * place.cols;
    return at + values_of(p, &place) * sizeof(float);
}

pl_status pl_adapter_unpack(struct pl_adapter *a, const void *bytes, size_t n, const struct pl_spec *spec, struct pl_err *err)
{
    char *at = (char *)bytes;
    const char *end = at + n;
    uint64_t n_pairs = 0;
    if (n >= sizeof n_pairs)
        memcpy(&n_pairs, at, sizeof n_pairs);
    if (n < sizeof n_pairs || n_pairs > n / sizeof(struct pair_head))
        return pl_fail(err, PL_EFORMAT, "this is no adapter");
    at += sizeof n_pairs;
    *a = (struct pl_adapter){.arch = spec->arch, .n_pairs = n_pairs, .pairs = calloc(n_pairs + 1, sizeof *a->pairs)};
    if (a->pairs == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    for (size_t i = 0; i < n_pairs; i++)
        if ((at = take_pair(&a->pairs[i], at, end, spec)) == NULL) {
            free(a->pairs);
            return pl_fail(err, PL_EFORMAT, "the adapter is not of this model's shape");
        }
    return PL_OK;
}
