/* registry_int: the registry's tables, and what its files call of each other: registry.c (what there is), registry_load.c (its thread:
 * reading, making room, leaving).
 * Thread: everything under r->lock.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_REGISTRY_INT_H
#define PL_SERVER_REGISTRY_INT_H

#include <pthread.h>

#include "server/registry.h"
#include "server/server.h"

/* A whole model. */
struct pl_registry_model {
    struct pl_registry_model *next;
    char *name, *path, *template, *parent; /* template and parent: NULL = none */
    char base_id[PL_SHA256_HEX];           /* "" = the file could not be read */
    time_t created;
    uint32_t context; /* 0 = as base_id */
    bool first, made; /* the one that stays; by a job */
    bool listed;      /* else it is there for its adapters, or about to go */
    enum { PL_MODEL_OUT, PL_MODEL_LOADING, PL_MODEL_IN, PL_MODEL_LEAVING } state;
    struct pl_instance *instance; /* IN, and LEAVING until it is closed */
    uint32_t refs;                /* of targets, and of the thread's work */
    uint64_t used_ns;             /* when the last one came or went */
    uint64_t patient_until_ns;    /* OUT: for memory that others are about to give back; 0 = it was not short of any */
    uint64_t n_loads;
};

/* An adapter that can be asked for; whether it is in memory its model's instance knows. */
struct pl_registry_adapter {
    struct pl_registry_adapter *next;
    char *name, *path;
    char *own_base; /* a file of its model that stays as long as the adapter does; NULL = none */
    struct pl_registry_model *model;
    time_t created;
    bool listed; /* false while an operator's is being read */
    bool made;   /* by a job: its files stay as they are, so that it can be read again */
};

struct pl_registry {
    struct pl_server *server;
    struct pl_pool *pool;
    pthread_t thread;
    bool thread_made;
    pthread_mutex_t lock;    /* of all that follows */
    pthread_cond_t work;     /* for the thread */
    pthread_cond_t over;     /* ended */
    struct pl_registry_model *models; /* the first one first */
    struct pl_registry_adapter *adapters; /* in order of arrival */
    struct pl_want *wants, **wants_end;
    unsigned n_wants;
    uint64_t last_want;
    bool stopping, ended; /* the thread is to go, and has gone */
    bool settled; /* the first model was read, or not: */
    pl_status first_status;
    struct pl_err first_err;
};

/* registry.c */
struct pl_registry_adapter *pl_registry_adapter_of(const struct pl_registry *r, const char *name);
/* With references; *m and *a are what name means, NULL = nothing. */
pl_found pl_registry_look(struct pl_registry *r, const char *name, struct pl_target *t, struct pl_registry_model **m, struct pl_registry_adapter **a);
/* Reads the file's header. */
pl_status pl_registry_probe(struct pl_registry_model *m, struct pl_err *err) PL_MUST_CHECK;
/* Frees models that nobody can ask for and that are not in memory. */
void pl_registry_tidy(struct pl_registry *r);
/* Takes the adapter out of the list and frees it; its instance is told by the caller. */
void pl_registry_forget_adapter(struct pl_registry *r, struct pl_registry_adapter *a);

/* An operator's adapter: a place for the name, that nobody sees yet; NULL in *made when it is replaced. */
pl_status pl_registry_reserve(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path, bool replace,
                              struct pl_registry_adapter **made, struct pl_err *err) PL_MUST_CHECK;
/* How it went: what it became, NULL on failure (then nothing is left of it). */
struct pl_registry_adapter *pl_registry_settle(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path,
                                               struct pl_registry_adapter *made, pl_status *st, struct pl_err *err);
void pl_registry_show_adapter(const struct pl_registry *r, const struct pl_registry_adapter *a, void (*fn)(void *arg, const struct pl_model_info *m),
                              void *arg);
/* Every want is over. */
void pl_registry_refuse_all(struct pl_registry *r);

/* registry_load.c: the thread */
void *pl_registry_main(void *registry);

#endif
