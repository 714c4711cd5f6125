/* adapters: the adapters that are served beside the base model, by name. They come and go while the engine runs: a request
 * holds a reference to its adapter; one that is unloaded is found no more at once, and leaves the device when its last
 * request has ended.
 *
 *   load:    name taken (hidden) → file read, checked and copied to the device → given to the engine's thread → listed
 *   unload:  unlisted → last reference gone → removed from the device by the engine's thread → its slot is free again
 *
 * Thread: any; load waits for the engine's thread, so it is not called from there.  Owns: the entries; borrows the engine
 * (alive until pl_adapters_stop) and the model.
 * Fails: load PL_EINVAL (a name that cannot be or is in use, with param; no slot), PL_ESTOPPED, and as
 * pl_adapter_read, pl_model_adapter_make and pl_model_adapter_add do; unload PL_ENOENT.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_ADAPTERS_H
#define PL_SCHED_ADAPTERS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "core/model/model.h"
#include "core/sched/engine.h"

enum { PL_ADAPTER_NAME_MAX = 255 };

struct pl_adapters;

/* One load of an adapter. Read-only once it is listed, but for what is marked. */
struct pl_served {
    char *name, *path;
    uint64_t id;   /* unique for each load, never 0: pages computed with it are its alone */
    uint64_t hash; /* of its values */
    uint32_t slot, n_pairs, max_rank;
    uint64_t n_params;
    time_t created;

    pthread_mutex_t lock; /* of stats; nothing else is taken under it */
    struct pl_model_stats stats;

    struct pl_adapters *owner;
    struct pl_engine_task task;
    struct pl_lora_set *set; /* on the device, until the engine's thread has it */
    uint32_t refs;           /* of requests; under the owner's lock, like what follows */
    uint64_t found_ns;       /* when it was found last */
    enum { PL_SERVED_LOADING, PL_SERVED_LISTED, PL_SERVED_LEAVING } state;
    bool spare; /* pl_adapters_spare */
    bool added; /* the engine's thread is done with it */
    pl_status add_status;
    struct pl_err add_err;
    struct pl_served *next;
};

/* base_name: what the base model is called, so that no adapter is. max: adapters at a time, those that leave included. */
pl_status pl_adapters_new(struct pl_adapters **out, struct pl_engine *e, const struct pl_model *model, const char *base_name, uint32_t max,
                          struct pl_err *err) PL_MUST_CHECK;
/* The engine is about to be freed: nothing is loaded any more. */
void pl_adapters_stop(struct pl_adapters *as);
/* No request is left, and the engine is gone. */
void pl_adapters_free(struct pl_adapters *as);

/* PL_EINVAL (param lora_name): no adapter can have that name. */
pl_status pl_adapters_check_name(const char *name, struct pl_err *err) PL_MUST_CHECK;
/* path: as pl_adapter_read. replace: an adapter of that name gives the name up to the new one, once that is ready. */
pl_status pl_adapters_load(struct pl_adapters *as, const char *name, const char *path, bool replace, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_adapters_unload(struct pl_adapters *as, const char *name, struct pl_err *err) PL_MUST_CHECK;

/* With a reference; NULL when no adapter of that name is listed. */
struct pl_served *pl_adapters_find(struct pl_adapters *as, const char *name);
void pl_served_unref(struct pl_served *a); /* NULL is nothing */
/* The listed adapter of that name may leave when others need its place: it can be loaded again at any time. */
void pl_adapters_spare(struct pl_adapters *as, const char *name);
/* Whether a further one can be loaded now. When there is no place, the spare one goes for it that no request uses and that was found longest ago:
 * waits until its slot is free, and a moment for one that is in use. */
bool pl_adapters_make_room(struct pl_adapters *as);
/* Calls fn for each entry that is listed (or, with all, leaving), oldest first, under the lock: fn must not call back. */
void pl_adapters_each(struct pl_adapters *as, bool all, void (*fn)(void *arg, struct pl_served *a), void *arg);

static inline uint64_t pl_served_id(const struct pl_served *a)
{
    return a != NULL ? a->id : 0;
}

#endif
