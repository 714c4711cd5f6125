/* runner: the engine over a real model, whose cache it holds on the device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/runner.h"

#include <stdlib.h>

#include "core/base/log.h"
#include "core/kv/kv.h"
#include "core/model/model.h"
#include "core/sched/ranks.h"
#include "core/sched/room.h"

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

pl_status pl_engine_new(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                        const struct pl_tok *tok, struct pl_err *err)
{
    return pl_engine_new_ranks(out, opts, dev, model, &pl_comm_single, tok, err);
}

/* The device's cache; with several ranks, theirs too. key: the setting that its size follows from. */
static pl_status make_cache(struct model_runner *r, struct pl_comm *comm, const struct pl_engine_opts *o, const char *key, struct pl_err *err)
{
    const struct pl_kv_shape shape = pl_model_kv_part(r->model, PL_KV_PAGE, o->n_pages, o->kv_dtype);
    const pl_status own = r->dev->ops->kv_new(r->dev, &shape, &r->kv), all = comm->size > 1 ? pl_leader_start(&r->leader, &shape, own) : own;
    if (own == PL_ENOTSUP)
        return pl_fail_param(err, PL_EINVAL, "device", "%s has no cache for heads of %u elements: take --device cpu", r->dev->ops->name, shape.head_dim);
    if (own == PL_ENOMEM)
        return pl_fail_param(err, PL_EINVAL, key, "no memory for a KV cache of %llu MiB after all: lower --%s",
                             (unsigned long long)r->dev->ops->kv_bytes(r->dev, &shape) >> 20, key);
    if (own != PL_OK)
        return pl_fail(err, own, "%s cannot make a KV cache: %s", r->dev->ops->name, pl_status_text(own));
    if (all == PL_ERANK || all == PL_EDEVICE)
        return pl_fail(err, all, "not every rank could load its part of the model: %s", pl_status_text(all));
    return all == PL_OK ? PL_OK
                        : pl_fail_param(err, PL_EINVAL, key, "a rank could not load its part of the model: its own line in the log says what to change");
}

pl_status pl_engine_new_ranks(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                              struct pl_comm *comm, const struct pl_tok *tok, struct pl_err *err)
{
    struct pl_engine_opts o = *opts;
    struct model_runner *r = calloc(1, sizeof *r);
    if (r == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the engine");
    *r = (struct model_runner){.dev = dev, .model = model};
    const struct pl_room_of room = {.dev = dev, .model = model, .comm = comm, .leader = &r->leader};
    pl_status st = comm->size > 1 ? pl_leader_init(&r->leader, comm) : PL_OK;
    if (st == PL_OK)
        st = pl_room_pages(&room, &o, err);
    if (st == PL_OK)
        st = make_cache(r, comm, &o, opts->n_pages == 0 && dev->ops->memory != NULL ? "cuda-memory-percent" : "kv-cache-mb", err);
    if (st != PL_OK) {
        free_runner(r);
        return st;
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
