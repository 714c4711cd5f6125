/* runner: what the engine needs of a model: one forward pass. The real one is a model with its cache pages on a device;
 * tests use a scripted one.
 * Thread: the engine's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_RUNNER_H
#define PL_SCHED_RUNNER_H

#include "core/comm/comm.h"
#include "core/device/device.h"
#include "core/sched/engine.h"

struct pl_runner {
    void *self;
    /* As pl_model_forward. */
    pl_status (*forward)(void *self, const struct pl_batch *b, const float **logits);
    /* As pl_device_ops.kv_copy; NULL = cached pages are shared whole only. */
    pl_status (*kv_copy)(void *self, uint32_t from, uint32_t to);
    /* Makes what is to come quicker, by some milliseconds of work between two passes. False = there was nothing to do. NULL =
     * there never is. */
    bool (*prepare)(void *self);
    /* As pl_model_adapter_add and remove; NULL = no adapters. */
    pl_status (*adapter_add)(void *self, uint32_t slot, struct pl_lora_set *a, struct pl_err *err);
    void (*adapter_remove)(void *self, uint32_t slot);
    void (*attach)(void *self); /* by the engine's thread, first; NULL = nothing to do */
    /* Called while nothing is computed, at least every beat_ms: whether what computes is still there. NULL = nothing to ask. */
    pl_status (*beat)(void *self);
    int beat_ms;
    void (*free)(void *self);
    uint32_t n_vocab;
    bool samples; /* forward takes the batch's draws, and gives no logits */
};

/* As pl_engine_new, for a model of which this is rank 0 of comm's: the others are in pl_rank_follow until the caller's
 * pl_ranks_stop, after pl_engine_free. comm: borrowed. */
pl_status pl_engine_new_ranks(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                              struct pl_comm *comm, const struct pl_tok *tok, struct pl_err *err) PL_MUST_CHECK;

/* opts->n_pages and max_context are set. The runner moves in on success. */
pl_status pl_engine_new_with(struct pl_engine **out, const struct pl_engine_opts *opts, const struct pl_runner *runner,
                             const struct pl_tok *tok, struct pl_err *err) PL_MUST_CHECK;

#endif
