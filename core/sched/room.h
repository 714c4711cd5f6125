/* room: how many pages a model's cache has: as many as the operator says, if there is memory for them, or as many as there is memory for,
 * or as are useful.
 * Thread: the one that makes the engine.  Owns: nothing.
 * Fails: PL_EINVAL, with the settings to change and to what; param kv-type, kv-cache-mb or cuda-memory-percent. PL_ERANK.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_ROOM_H
#define PL_SCHED_ROOM_H

#include "core/comm/comm.h"
#include "core/sched/engine.h"
#include "core/sched/ranks.h"

/* What a page takes, on all ranks together. */
pl_status pl_room_page_bytes(uint64_t *n, const struct pl_device *dev, const struct pl_model *model, pl_dtype dtype, struct pl_err *err) PL_MUST_CHECK;

/* Whose cache it is. */
struct pl_room_of {
    struct pl_device *dev;
    struct pl_model *model;
    struct pl_comm *comm;
    struct pl_leader *leader; /* of several ranks */
};
/* After the model's load: o->n_pages, where that is not given; where it is, whether it can be. */
pl_status pl_room_pages(const struct pl_room_of *r, struct pl_engine_opts *o, struct pl_err *err) PL_MUST_CHECK;

#endif
