/* ranks: one model run by several ranks. Rank 0 has the engine; it tells the others what it is about to compute, and they
 * compute their parts of the same. Between passes it lets them know that it is alive, and learns that they are.
 *
 * First they meet: each has opened its device, or tells why not, and all load their parts, or none.
 *
 *   rank 0       MEET, load, ROOM, agree, START, agree, PASS, PASS, BEAT, agree, ADD adapter, agree, … STOP
 *   the others         load, agree, cache, agree, pass, pass,       agree, make, add,   agree, … return
 *
 * Thread: a leader is the engine's thread's, from start to stop; follow keeps its thread until the end.
 * Owns: buffers; borrows communicator, device and model.
 * Fails: PL_ERANK, for good (comm.h); rank 0 then ends all requests, and the process is to end.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_RANKS_H
#define PL_SCHED_RANKS_H

#include "core/comm/comm.h"
#include "core/device/device.h"
#include "core/kv/kv.h"

struct pl_model;
struct pl_adapter_wire;

/* Models load at different speeds: until all have started, ranks wait so many times longer for each other. Ranks other than
 * 0 wait a while longer than it does, so that it is there to answer its clients. */
enum { PL_RANKS_LOADING = 20, PL_RANKS_GRACE_MS = 5000 };

/* Cache pages behind the last one in use whose memory is made ready (device.h, kv_prepare): sequences that began together need a new
 * one in the same pass. */
enum { PL_RANKS_PAGES_AHEAD = 64 };

/* Pages up to the last one that the batch, or what came before it, writes to. */
static inline uint32_t pl_batch_pages(const struct pl_batch *b, uint32_t before)
{
    for (uint32_t t = 0; t < b->n_tokens; t++)
        before = b->slot[t] / PL_KV_PAGE >= before ? b->slot[t] / PL_KV_PAGE + 1 : before;
    return before;
}

/* pl_comm_meet, by rank 0 when it is ready and by the others as soon as they are. PL_ESTOPPED: rank 0 has called pl_ranks_stop instead. */
pl_status pl_ranks_meet(struct pl_comm **out, struct pl_comm *host, struct pl_device *dev, pl_exchange exchange, pl_status own,
                        struct pl_err *err) PL_MUST_CHECK;

/* A cache of as many pages as fit into `percent` of what a device's memory has left. */
struct pl_room {
    uint32_t page_size, dtype, percent;
};
/* For this rank's part of it; as much as there is where the host's memory is used. */
pl_status pl_rank_room(const struct pl_comm *comm, struct pl_device *dev, const struct pl_model *model, const struct pl_room *want,
                       uint32_t *n_pages) PL_MUST_CHECK;

struct pl_leader {
    struct pl_comm *comm;
    uint32_t *words; /* the message */
    size_t cap;
    uint64_t told_ns; /* when the newest one was told */
    int timeout_ms;   /* once all have started */
};

pl_status pl_leader_init(struct pl_leader *l, struct pl_comm *comm) PL_MUST_CHECK;
void pl_leader_fini(struct pl_leader *l);
/* On devices with memory of their own, after the model's load: *n_pages is the least that any rank has room for. */
pl_status pl_leader_room(struct pl_leader *l, struct pl_device *dev, struct pl_model *model, const struct pl_room *want, uint32_t *n_pages) PL_MUST_CHECK;
/* After the model's load: the others make caches of as many pages as this rank's. own: how it went here. Returns the worst of all. */
pl_status pl_leader_start(struct pl_leader *l, const struct pl_kv_shape *cache, pl_status own) PL_MUST_CHECK;
/* Ahead of pl_model_forward with the same batch. */
pl_status pl_leader_pass(struct pl_leader *l, const struct pl_batch *b) PL_MUST_CHECK;
/* Ahead of the device's kv_copy. */
pl_status pl_leader_kv_copy(struct pl_leader *l, uint32_t from, uint32_t to) PL_MUST_CHECK;
/* The others add it first: PL_OK when all have. */
pl_status pl_leader_adapter_add(struct pl_leader *l, uint32_t slot, const struct pl_adapter_wire *wire) PL_MUST_CHECK;
pl_status pl_leader_adapter_remove(struct pl_leader *l, uint32_t slot) PL_MUST_CHECK;
/* Milliseconds between two beats, at most; to be called at least as often while nothing else is told. */
int pl_leader_beat_ms(const struct pl_leader *l);
pl_status pl_leader_beat(struct pl_leader *l) PL_MUST_CHECK;
/* The others return. Once, after the leader's last word, or instead of start. */
void pl_ranks_stop(struct pl_comm *comm);

/* The life of a rank other than 0. loaded: how the model's load went; it is NULL if it failed, and the others learn of it.
 * PL_OK when rank 0 says stop; any other status after the communicator was given up. */
pl_status pl_rank_follow(struct pl_comm *comm, struct pl_device *dev, struct pl_model *model, pl_status loaded);

#endif
