/* instance: one model in memory, with everything that answers for it: file, tokenizer, template, device, weights, engine,
 * adapters.
 * Thread: open and close on one thread at a time; what open made is read-only for others, but for the engine and the adapters, which lock
 * for themselves.
 * Owns: all of it, until close; the pool is borrowed (instances take turns with it).
 * Fails: with the remedy in the message; err->param names a configuration key when the configuration is at fault.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_INSTANCE_H
#define PL_SERVER_INSTANCE_H

#include <stdint.h>

#include "core/text/model_file.h"

struct pl_adapters;
struct pl_config;
struct pl_device;
struct pl_engine;
struct pl_model;
struct pl_pool;
struct pl_ranks;
struct pl_server;

struct pl_instance {
    struct pl_model_file file;
    const struct pl_tok *tok; /* the file's */
    const struct pl_chat *chat;
    struct pl_device *device;
    struct pl_ranks *ranks; /* that have other parts of the model */
    struct pl_model *model;
    struct pl_engine *engine;
    struct pl_adapters *adapters;
    char fingerprint[32]; /* "fp_" + hash of weights file, build and kernels */
};

struct pl_instance_opts {
    const struct pl_server *server;
    struct pl_pool *pool;
    const char *id, *path, *template;
    bool further; /* beside the first one: what is set for that one bounds it, and nothing more; memory is counted before it is taken */
};

/* The device that the configuration asks for; local_rank: which of this machine's, where it has several. */
pl_status pl_instance_device(struct pl_device **out, const struct pl_config *c, struct pl_pool *pool, bool ranks, unsigned local_rank,
                             struct pl_err *err) PL_MUST_CHECK;
/* The engine runs when this returns. PL_ENOMEM: the machine has no memory for it now. */
pl_status pl_instance_open(struct pl_instance **out, const struct pl_instance_opts *o, struct pl_err *err) PL_MUST_CHECK;
/* Ends the engine and what it still runs. */
void pl_instance_stop(struct pl_instance *m);
void pl_instance_close(struct pl_instance *m);

#endif
