/* adapter_gguf: reads an adapter from a GGUF file as llama.cpp's converter writes them: general.type "adapter", and for a
 * base tensor T the tensors T.lora_a (ne [cols, rank]) and T.lora_b (ne [rank, rows]), rows in the base tensor's order.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/readfile.h"
#include "core/model/adapter_int.h"
#include "core/model/gguf.h"

#define MAX_FILE ((size_t)4 << 30)

static void read_tensor(const void *tensor, float *out)
{
    const struct pl_gguf_tensor *t = tensor;
    pl_dequant_row(t->dtype, t->data, out, t->ne[0] * t->ne[1]); /* rows lie one after the other */
}

static pl_status read_alpha(void *self, const struct pl_target_place *place, uint32_t layer, uint32_t rank, float *alpha, struct pl_err *err)
{
    (void)place, (void)layer, (void)err;
    const float *stated = self;
    *alpha = *stated != 0 ? *stated : (float)rank; /* none: a scale of 1 */
    return PL_OK;
}

static pl_status want_text(const struct pl_gguf *g, const char *key, const char *value, struct pl_err *err)
{
    struct pl_gguf_str s;
    if (pl_gguf_string(g, key, &s) != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key %s is missing: not an adapter's file", key);
    if (s.n == strlen(value) && memcmp(s.s, value, s.n) == 0)
        return PL_OK;
    return pl_fail(err, PL_ENOTSUP, "key %s is \"%.*s\"; it must be \"%s\"", key, (int)(s.n < 64 ? s.n : 64), s.s, value);
}

static pl_status check_keys(const struct pl_gguf *g, const struct pl_spec *spec, float *alpha, struct pl_err *err)
{
    uint64_t n;
    struct pl_err cause = {0};
    pl_status rc = want_text(g, "general.type", "adapter", err);
    if (rc == PL_OK)
        rc = want_text(g, "adapter.type", "lora", err);
    if (rc != PL_OK)
        return rc;
    if (want_text(g, "general.architecture", spec->arch, &cause) != PL_OK)
        return pl_fail(err, PL_EFORMAT, "%.250s like the base model's: the adapter was made for another base model", cause.msg);
    if (pl_gguf_array_len(g, "adapter.alora.invocation_tokens", &n) != PL_ENOENT)
        return pl_fail(err, PL_ENOTSUP, "key adapter.alora.invocation_tokens: adapters that begin at certain tokens (aLoRA) are not supported");
    if (pl_gguf_f32(g, "adapter.lora.alpha", alpha) != PL_OK)
        return pl_fail(err, PL_EFORMAT, "key adapter.lora.alpha is missing or no floating-point number");
    return *alpha >= 0 && *alpha < 1e9f ? PL_OK : pl_fail(err, PL_EFORMAT, "key adapter.lora.alpha is %g", (double)*alpha);
}

/* "blk.<layer>.<tensor>.weight.lora_a" */
static bool parse_name(const struct pl_gguf_str *s, const struct pl_spec *spec, unsigned *layer, pl_target *target, pl_lora_half *half)
{
    char name[128], tensor[64];
    int end = -1;
    char letter;
    if (s->n >= sizeof name)
        return false;
    memcpy(name, s->s, s->n);
    name[s->n] = '\0';
    if (s->n < 5 || name[4] < '0' || name[4] > '9' ||
        sscanf(name, "blk.%9u.%63[a-z_].weight.lora_%c%n", layer, tensor, &letter, &end) != 3 || end != (int)s->n ||
        (letter != 'a' && letter != 'b'))
        return false;
    *half = letter == 'a' ? PL_LORA_A : PL_LORA_B;
    for (uint32_t t = 0; t < PL_TARGET_COUNT; t++) {
        struct pl_target_place place;
        *target = (pl_target)t;
        if (pl_target_find(spec, *target, &place) && strcmp(place.gguf, tensor) == 0)
            return true;
    }
    return false;
}

static pl_status collect(struct pl_adapter_parts *p, const struct pl_gguf *g, struct pl_err *err)
{
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        const int n = (int)(t->name.n < PL_ADAPTER_NAME ? t->name.n : PL_ADAPTER_NAME);
        unsigned layer;
        pl_target target;
        pl_lora_half half;
        if (!parse_name(&t->name, p->spec, &layer, &target, &half))
            return pl_fail(err, PL_ENOTSUP, "tensor %.*s cannot be adapted: only the attention and feed-forward weights of a %s model's layers can",
                           n, t->name.s, p->spec->arch);
        if (t->ne[2] != 1 || t->ne[3] != 1)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s is no matrix", n, t->name.s);
        const pl_status rc = pl_adapter_parts_add(p, t->name.s, t->name.n, layer, target, half, t->ne[1], t->ne[0], t, err);
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

pl_status pl_adapter_read_gguf(struct pl_adapter **out, const char *path, const struct pl_spec *spec, struct pl_err *err)
{
    struct pl_gguf *g = NULL;
    struct pl_adapter_parts parts = {0};
    struct pl_err cause = {0};
    void *data;
    size_t n;
    float alpha = 0;
    const struct pl_adapter_reader reader = {.read = read_tensor, .alpha = read_alpha, .self = &alpha};
    pl_status rc = pl_readfile(&data, &n, path, MAX_FILE, err);
    if (rc != PL_OK)
        return rc;
    if ((rc = pl_gguf_open_memory(&g, data, n, &cause)) == PL_OK && (rc = check_keys(g, spec, &alpha, &cause)) == PL_OK &&
        (rc = pl_adapter_parts_init(&parts, spec, &cause)) == PL_OK && (rc = collect(&parts, g, &cause)) == PL_OK)
        rc = pl_adapter_assemble(out, &parts, &reader, &cause);
    pl_adapter_parts_fini(&parts);
    pl_gguf_close(g);
    free(data);
    return rc == PL_OK ? rc : pl_fail(err, rc, "%.180s: %.310s", path, cause.msg);
}
