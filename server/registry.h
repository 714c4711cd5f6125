/* registry: what requests can ask for: whole models and their adapters, and which of them are in memory. The first model is read at start
 * and stays; a further one (add-model, or made by a job) is read when it is first asked for, at most max-models of them at a time. The least
 * recently used one makes room: requests for it wait from then on, those that run end as they would have. One that nobody asked for within
 * model-idle-timeout leaves memory. All reading and leaving happens on the registry's thread. Adapters come and go with their model; one that a job
 * made may also leave alone, when another one needs its place (max-adapters) and nobody uses it.
 *
 *   OUT --wanted, and there is room--> LOADING --> IN --others want its place, deleted, or long idle--> LEAVING --last reference--> OUT
 *
 * Thread: any, but new, start, drain, stop and free on main.  Owns: the instances, their pool of threads, its own thread.
 * Locks: its lock comes before those of adapters, engines and connections.
 * Fails: PL_ENOENT with param "model"; a model or adapter that cannot be read with the reason; PL_ESTOPPED; PL_EFULL (too many wait, or all
 * places for adapters are in use); PL_ENOPAGE: the model's cache is bounded to nothing that it could answer with; PL_ENOTSUP: a further model where the
 * first one is cut over several ranks, which have nothing else.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_REGISTRY_H
#define PL_SERVER_REGISTRY_H

#include <stdbool.h>
#include <time.h>

#include "core/base/sha256.h"
#include "core/sched/adapters.h"
#include "server/instance.h"

struct pl_registry;
struct pl_registry_model;
struct pl_server;

/* The file that --model or --model-dir means, and the name that it is served under (--alias or the file's name). free() both. */
pl_status pl_registry_choose(const struct pl_config *c, char **path, char **id, struct pl_err *err) PL_MUST_CHECK;
/* Knows the first model and those that the configuration adds, without reading them. */
pl_status pl_registry_new(struct pl_registry **out, struct pl_server *s, struct pl_err *err) PL_MUST_CHECK;
/* Begins to read the first model; s->ready tells when it is there. */
pl_status pl_registry_start(struct pl_registry *r, struct pl_err *err) PL_MUST_CHECK;
/* The first model is there, or cannot be (*rc, *err). */
bool pl_registry_settled(struct pl_registry *r, pl_status *rc, struct pl_err *err);
/* Ends what still runs, with PL_ESTOPPED; false when there was something. */
bool pl_registry_drain(struct pl_registry *r);
/* From now on nobody waits: who does, or begins to, is told PL_ESTOPPED, and nothing more is read. What is found is served on. */
void pl_registry_stop_reading(struct pl_registry *r);
/* Ends its thread and all engines. No target is held any more. False: the thread is in the middle of reading something large, which nothing can
 * interrupt; the registry stays as it is, and the process is to end without it. */
bool pl_registry_stop(struct pl_registry *r) PL_MUST_CHECK;
void pl_registry_free(struct pl_registry *r);

/* ---- requests ------------------------------------------------------------------------------------------------------ */

/* What answers a request, with references. */
struct pl_target {
    struct pl_instance *instance;
    struct pl_served *adapter;       /* NULL = the model itself, or moved on into the request */
    struct pl_registry_model *model; /* the registry's */
};

/* What there is to be seen of a model. */
struct pl_model_info {
    const char *name, *root, *parent; /* parent NULL = made from nothing here */
    time_t created;
    uint32_t context;
};

typedef enum { PL_FOUND, PL_FOUND_OUT /* not in memory: pl_registry_want */, PL_FOUND_NOT } pl_found;
/* name NULL = the first model. */
pl_found pl_registry_find(struct pl_registry *r, const char *name, struct pl_target *t);
void pl_registry_release(struct pl_registry *r, struct pl_target *t);

/* An adapter that an operator asks for, read at once or in the place of another; it comes back with its model when that had left. Borrowed by a want. */
struct pl_adapter_load {
    const char *path;
    bool replace;
    void (*show)(void *arg, const struct pl_model_info *m); /* called under the lock for what it became */
    void *arg;
};

/* Somebody waits for a name. In the caller's memory until pl_registry_forget. */
struct pl_want {
    struct pl_want *next;
    uint64_t id;               /* the registry's */
    const char *name;          /* borrowed */
    const struct pl_adapter_load *load; /* NULL = for the name to be in memory; else for this to be loaded under it, for the model of target */
    void (*done)(void *arg);   /* called once, under the registry's lock; NULL = nothing to do */
    void *arg;
    bool finished;             /* under the registry's lock, like what follows */
    pl_status status;
    struct pl_err err;
    struct pl_target target; /* on PL_OK; with load the caller's from the beginning */
};
pl_status pl_registry_want(struct pl_registry *r, struct pl_want *w, struct pl_err *err) PL_MUST_CHECK;
/* Whether it is over; a target then belongs to the caller. */
bool pl_registry_finished(struct pl_registry *r, struct pl_want *w);
/* Gives the wait up, and a target that came of it unless that was taken (instance NULL). Of one that pl_registry_want refused too. */
void pl_registry_forget(struct pl_registry *r, struct pl_want *w);

/* ---- what there is ------------------------------------------------------------------------------------------------- */

/* PL_ENOENT with param "model": nothing of that name. */
pl_status pl_registry_no_model(const char *name, struct pl_err *err);
/* Calls fn, under the lock, for each model that is to be seen, and then its adapters. */
void pl_registry_each(struct pl_registry *r, void (*fn)(void *arg, const struct pl_model_info *m), void *arg);
/* The same for one. PL_ENOENT. */
pl_status pl_registry_info(struct pl_registry *r, const char *name, void (*fn)(void *arg, const struct pl_model_info *m), void *arg,
                           struct pl_err *err) PL_MUST_CHECK;
/* Calls fn, under the lock, for each model in memory; n_loads: how often it was read. */
void pl_registry_each_loaded(struct pl_registry *r, void (*fn)(void *arg, const char *name, struct pl_instance *m, uint64_t n_loads), void *arg);
const char *pl_registry_first(const struct pl_registry *r); /* the first model's name */
/* Engines rest for so many thousandths of each pass's time after it. */
void pl_registry_rest(struct pl_registry *r, unsigned thousandths);
/* No engine is stuck or has lost its device. */
bool pl_registry_healthy(struct pl_registry *r, int max_ms);

/* A whole model: what a job begins from, and what an adapter belongs to. */
struct pl_base {
    char *name, *root, *path, *template; /* template NULL = the model's own */
    char id[PL_SHA256_HEX];              /* pl_train_base_id of the file */
    bool made;                           /* by a job */
};
/* id: the model with that id, rather the one of that name if there are several; NULL = the model of that name; both NULL = the first. PL_ENOENT. */
pl_status pl_registry_base(struct pl_registry *r, const char *id, const char *name, struct pl_base *b, struct pl_err *err) PL_MUST_CHECK;
void pl_base_fini(struct pl_base *b);

/* ---- changes ------------------------------------------------------------------------------------------------------- */

/* A whole model that a job made; PL_OK too when it is there already. parent: what it was made from. */
pl_status pl_registry_add_model(struct pl_registry *r, const char *name, const char *path, const char *template, const char *parent,
                                struct pl_err *err) PL_MUST_CHECK;
/* An adapter that a job made, of the model with base_id (as pl_registry_base; base_name as there). own_base: a file of that model that stays as long
 * as the adapter does, for when nobody else serves it; NULL = none. PL_OK too when it is there already; PL_ENOENT without a base. It is read when it
 * is asked for. */
pl_status pl_registry_add_adapter(struct pl_registry *r, const char *name, const char *path, const char *base_id, const char *base_name,
                                  const char *own_base, const char *template, struct pl_err *err) PL_MUST_CHECK;
/* Whether the adapter belongs to the model that is always in memory. */
bool pl_registry_is_of_first(struct pl_registry *r, const char *name);
/* Neither finds it from now on; what runs ends as it would have. Nothing happens when there is none of that name. */
void pl_registry_remove(struct pl_registry *r, const char *name);

/* It is found no more, as with pl_registry_remove. PL_ENOENT with param "lora_name". */
pl_status pl_registry_unload_adapter(struct pl_registry *r, const char *name, struct pl_err *err) PL_MUST_CHECK;

#endif
