/* runner: the engine over a real model: chooses the number of cache pages and holds them on the device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/runner.h"

#include <stdlib.h>

#include "core/base/log.h"
#include "core/base/machine.h"
#include "core/kv/kv.h"
#include "core/model/model.h"
#include "core/sched/ranks.h"

#define PL_LOG_MODULE "engine"

struct model_runner {
    struct pl_device *dev;   /* borrowed */
    struct pl_model *model;  /* borrowed */
    struct pl_kvdev *kv;
    struct pl_leader leader; /* of several ranks */
    uint32_t n_pages;        /* of the cache that were written to: it hands them out in order */
};

static pl_status forward(void *self, const struct pl_batch *b, const float **logits)
{
    struct model_runner *r = self;
    r->n_pages = pl_batch_pages(b, r->n_pages);
    return pl_model_forward(r->model, r->kv, b, logits);
}

static bool prepare(void *self)
{
    struct model_runner *r = self;
    return r->dev->ops->kv_prepare(r->dev, r->kv, r->n_pages + PL_RANKS_PAGES_AHEAD);
}

static pl_status kv_copy(void *self, uint32_t from, uint32_t to)
{
    struct model_runner *r = self;
    return r->dev->ops->kv_copy(r->dev, r->kv, from, to);
}

static pl_status forward_all(void *self, const struct pl_batch *b, const float **logits)
{
    struct model_runner *r = self;
    pl_status rc = pl_leader_pass(&r->leader, b);
    if (rc == PL_OK)
        rc = forward(self, b, logits);
    if (rc == PL_OK)
        return PL_OK;
    r->leader.comm->ops->give_up(r->leader.comm);
    if (rc != PL_ENOMEM)
        return rc;
    pl_log_error("rank 0 of %u has no memory for a pass of %u sequences: lower --batch-tokens, --cuda-memory-percent or --kv-cache-mb",
                 r->leader.comm->size, b->n_seqs);
    return PL_ERANK; /* the others wait in that pass: there is no later one */
}

static pl_status kv_copy_all(void *self, uint32_t from, uint32_t to)
{
    struct model_runner *r = self;
    const pl_status rc = pl_leader_kv_copy(&r->leader, from, to);
    return rc == PL_OK ? r->dev->ops->kv_copy(r->dev, r->kv, from, to) : rc;
}

static pl_status adapter_add_all(void *self, uint32_t slot, struct pl_lora_set *a, struct pl_err *err)
{
    struct model_runner *r = self;
    pl_status rc = pl_leader_adapter_add(&r->leader, slot, pl_model_adapter_wire(a));
    if (rc != PL_OK)
        return pl_fail(err, rc, "not every rank could add the adapter: %s", pl_status_text(rc));
    rc = pl_model_adapter_add(r->model, slot, a, err);
    return rc != PL_OK && pl_leader_adapter_remove(&r->leader, slot) != PL_OK ? PL_ERANK : rc;
}

static void adapter_remove_all(void *self, uint32_t slot)
{
    struct model_runner *r = self;
    if (pl_leader_adapter_remove(&r->leader, slot) != PL_OK)
        pl_log_warn("an adapter could not be removed from the other ranks"); /* the next pass or beat fails too */
    pl_model_adapter_remove(r->model, slot);
}

static pl_status beat(void *self)
{
    struct model_runner *r = self;
    return pl_leader_beat(&r->leader);
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
    pl_leader_fini(&r->leader);
    if (r->kv != NULL)
        r->dev->ops->kv_free(r->dev, r->kv);
    free(r);
}

enum { USUAL_TOKENS = 2048 }; /* of a sequence, where the cache's size is not set */

static uint64_t pages_of(uint64_t n_tokens)
{
    return (n_tokens + PL_KV_PAGE - 1) / PL_KV_PAGE;
}

/* A usual length for each of max_sequences, at least one whole context, at most half of free memory. */
static uint64_t pages_on_host(const struct pl_engine_opts *o, uint64_t page_bytes)
{
    const uint64_t most = pl_machine_memory() / 2 / page_bytes, longest = pages_of(o->max_context);
    const uint64_t usual = pages_of(o->max_context < USUAL_TOKENS ? o->max_context : USUAL_TOKENS);
    const uint64_t wanted = o->max_sequences * usual > longest ? o->max_sequences * usual : longest;
    return wanted < most ? wanted : most;
}

/* As many as the rank with the least room has room for. */
static pl_status pages_on_device(struct model_runner *r, struct pl_comm *comm, const struct pl_engine_opts *o, uint64_t *n, struct pl_err *err)
{
    struct pl_device *dev = r->dev;
    const struct pl_room want = {.page_size = PL_KV_PAGE, .dtype = o->kv_dtype, .percent = o->device_percent};
    size_t free_bytes = 0, total = 0;
    uint32_t n_pages = 0;
    pl_status rc = dev->ops->memory(dev, &free_bytes, &total);
    if (rc == PL_OK)
        rc = comm->size > 1 ? pl_leader_room(&r->leader, dev, r->model, &want, &n_pages) : pl_rank_room(comm, dev, r->model, &want, &n_pages);
    if (rc == PL_ERANK)
        return pl_fail(err, rc, "a rank was lost while its part of the model was loaded");
    if (rc != PL_OK)
        return pl_fail(err, rc, "%s does not say how much memory it has", dev->ops->name);
    *n = n_pages;
    if (*n < pages_of(o->max_context))
        pl_log_warn("%s has room for %llu tokens of KV cache, less than one context of %u: lower --context, take --kv-type q8_0 or raise --cuda-memory-percent",
                    dev->ops->name, (unsigned long long)*n * PL_KV_PAGE, o->max_context);
    if (*n >= PL_ENGINE_MIN_PAGES)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, "cuda-memory-percent",
                         "%s has %llu of %llu MiB left for the KV cache after the weights, too little: take a smaller model or a more quantized file, "
                         "a larger GPU, or --device cpu",
                         dev->ops->name, (unsigned long long)free_bytes >> 20, (unsigned long long)total >> 20);
}

pl_status pl_engine_new(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                        const struct pl_tok *tok, struct pl_err *err)
{
    return pl_engine_new_ranks(out, opts, dev, model, &pl_comm_single, tok, err);
}

/* The device's cache; with several ranks, theirs too. */
static pl_status make_cache(struct model_runner *r, struct pl_comm *comm, uint32_t n_pages, pl_dtype dtype)
{
    const struct pl_kv_shape shape = pl_model_kv_part(r->model, PL_KV_PAGE, n_pages, dtype);
    const pl_status rc = r->dev->ops->kv_new(r->dev, &shape, &r->kv);
    return comm->size == 1 ? rc : pl_leader_start(&r->leader, PL_KV_PAGE, n_pages, dtype, rc);
}

/* o->n_pages, where it is not given: what there is room for, or what is useful. */
static pl_status choose_pages(struct model_runner *r, struct pl_comm *comm, struct pl_engine_opts *o, uint64_t page_bytes, struct pl_err *err)
{
    uint64_t wanted = o->n_pages;
    if (wanted == 0 && r->dev->ops->memory != NULL) {
        const pl_status rc = pages_on_device(r, comm, o, &wanted, err);
        if (rc != PL_OK)
            return rc;
    } else if (wanted == 0) {
        wanted = pages_on_host(o, page_bytes);
    }
    if (o->n_pages == 0 && o->max_pages > 0 && wanted > o->max_pages)
        wanted = o->max_pages;
    if (wanted < PL_ENGINE_MIN_PAGES || wanted > INT32_MAX / PL_KV_PAGE)
        return pl_fail_param(err, PL_EINVAL, "kv-cache-mb", "the KV cache would have %llu pages of %llu bytes; %d to %d are possible",
                             (unsigned long long)wanted, (unsigned long long)page_bytes, PL_ENGINE_MIN_PAGES, (int)(INT32_MAX / PL_KV_PAGE));
    o->n_pages = (uint32_t)wanted;
    return PL_OK;
}

pl_status pl_engine_new_ranks(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                              struct pl_comm *comm, const struct pl_tok *tok, struct pl_err *err)
{
    struct pl_engine_opts o = *opts;
    const struct pl_kv_shape shape = pl_model_kv_shape(model, PL_KV_PAGE, 1, o.kv_dtype);
    const uint64_t page_bytes = dev->ops->kv_bytes(dev, &shape);
    if (page_bytes == 0)
        return pl_fail_param(err, PL_EINVAL, "kv-type", "%s has no KV cache of this type: take --kv-type q8_0 or f16", dev->ops->name);
    struct model_runner *r = calloc(1, sizeof *r);
    if (r == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the engine");
    *r = (struct model_runner){.dev = dev, .model = model};
    pl_status st = comm->size > 1 ? pl_leader_init(&r->leader, comm) : PL_OK;
    if (st == PL_OK)
        st = choose_pages(r, comm, &o, page_bytes, err);
    if (st != PL_OK) {
        free_runner(r);
        return st;
    }
    st = make_cache(r, comm, o.n_pages, o.kv_dtype);
    if (st != PL_OK) {
        const bool own = r->kv == NULL;
        free_runner(r);
        if (!own)
            return pl_fail(err, st, "not every rank could load its part of the model: %s", pl_status_text(st));
        if (st == PL_ENOTSUP)
            return pl_fail_param(err, PL_EINVAL, "device", "%s has no cache for heads of %u elements: take --device cpu", dev->ops->name, shape.head_dim);
        return pl_fail_param(err, st, "kv-cache-mb", "no memory for a KV cache of %llu MiB: lower kv-cache-mb",
                             (unsigned long long)(o.n_pages * page_bytes >> 20));
    }
    struct pl_runner runner = {.self = r,
                               .forward = forward,
                               .kv_copy = dev->ops->kv_copy != NULL ? kv_copy : NULL,
                               .prepare = dev->ops->kv_prepare != NULL ? prepare : NULL,
                               .adapter_add = adapter_add,
                               .adapter_remove = adapter_remove,
                               .attach = attach,
                               .free = free_runner,
                               .n_vocab = pl_model_spec(model)->n_vocab,
                               .samples = dev->ops->sample != NULL};
    if (comm->size > 1) {
        runner.forward = forward_all;
        runner.kv_copy = dev->ops->kv_copy != NULL ? kv_copy_all : NULL;
        runner.adapter_add = adapter_add_all;
        runner.adapter_remove = adapter_remove_all;
        runner.beat = beat;
        runner.beat_ms = pl_leader_beat_ms(&r->leader);
    }
    st = pl_engine_new_with(out, &o, &runner, tok, err);
    if (st != PL_OK)
        free_runner(r);
    return st;
}
