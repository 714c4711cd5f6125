/* runner: the engine over a real model: chooses the number of cache pages and holds them on the device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/runner.h"

#include <stdlib.h>

#include "core/base/machine.h"
#include "core/kv/kv.h"
#include "core/model/model.h"

struct model_runner {
    struct pl_device *dev;   /* borrowed */
    struct pl_model *model;  /* borrowed */
    struct pl_kvdev *kv;
};

static pl_status forward(void *self, const struct pl_batch *b, const float **logits)
{
    struct model_runner *r = self;
    return pl_model_forward(r->model, r->kv, b, logits);
}

static pl_status kv_copy(void *self, uint32_t from, uint32_t to)
{
    struct model_runner *r = self;
    return r->dev->ops->kv_copy(r->dev, r->kv, from, to);
}

static pl_status adapter_add(void *self, uint32_t slot, struct pl_lora_set *a, struct pl_err *err)
{
    struct model_runner *r = self;
    return pl_model_adapter_add(r->model, slot, a, err);
}

static void adapter_remove(void *self, uint32_t slot)
{
    struct model_runner *r = self;
    pl_model_adapter_remove(r->model, slot);
}

static void attach(void *self)
{
    struct model_runner *r = self;
    r->dev->ops->attach(r->dev);
}

static void free_runner(void *self)
{
    struct model_runner *r = self;
    r->dev->ops->kv_free(r->dev, r->kv);
    free(r);
}

enum { USUAL_TOKENS = 2048 }; /* of a sequence, where the cache's size is not set */

static uint64_t pages_of(uint64_t n_tokens)
{
    return (n_tokens + PL_KV_PAGE - 1) / PL_KV_PAGE;
}

pl_status pl_engine_new(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                        const struct pl_tok *tok, struct pl_err *err)
{
    struct pl_engine_opts o = *opts;
    struct pl_kv_shape shape = pl_model_kv_shape(model, PL_KV_PAGE, 1, o.kv_dtype);
    uint64_t page_bytes = dev->ops->kv_bytes(dev, &shape), wanted = o.n_pages;
    if (wanted == 0) {
        uint64_t most = pl_machine_memory() / 2 / page_bytes;
        const uint64_t longest = pages_of(o.max_context), usual = pages_of(o.max_context < USUAL_TOKENS ? o.max_context : USUAL_TOKENS);
        wanted = o.max_sequences * usual > longest ? o.max_sequences * usual : longest;
        most = o.max_pages > 0 && o.max_pages < most ? o.max_pages : most;
        wanted = wanted < most ? wanted : most;
    }
    if (wanted < 2 || wanted > INT32_MAX / PL_KV_PAGE)
        return pl_fail_param(err, PL_EINVAL, "kv-cache-mb", "the KV cache would have %llu pages of %llu bytes; 2 to %d are possible",
                             (unsigned long long)wanted, (unsigned long long)page_bytes, (int)(INT32_MAX / PL_KV_PAGE));
    o.n_pages = shape.n_pages = (uint32_t)wanted;
    struct model_runner *r = calloc(1, sizeof *r);
    if (r == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the engine");
    *r = (struct model_runner){.dev = dev, .model = model};
    pl_status st = dev->ops->kv_new(dev, &shape, &r->kv);
    if (st != PL_OK) {
        free(r);
        return pl_fail_param(err, st, "kv-cache-mb", "no memory for a KV cache of %llu MiB: lower kv-cache-mb",
                             (unsigned long long)(wanted * page_bytes >> 20));
    }
    struct pl_runner runner = {.self = r,
                               .forward = forward,
                               .kv_copy = dev->ops->kv_copy != NULL ? kv_copy : NULL,
                               .adapter_add = adapter_add,
                               .adapter_remove = adapter_remove,
                               .attach = attach,
                               .free = free_runner,
                               .n_vocab = pl_model_spec(model)->n_vocab};
    st = pl_engine_new_with(out, &o, &runner, tok, err);
    if (st != PL_OK)
        free_runner(r);
    return st;
}
