/* load: everything between a model file and an engine that runs: file, tokenizer, template, threads, device, weights.
 * Thread: open on the loader's thread, close on main after it; what it made is read-only for others but the engine's.
 * Owns: all of it, until close.  Fails: with the remedy in the message; err->param names a configuration key when the
 * configuration is at fault.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_LOAD_H
#define PL_SERVER_LOAD_H

#include "core/base/status.h"

struct pl_config;
struct pl_device;
struct pl_load;
struct pl_pool;
struct pl_server;

/* The file that --model or --model-dir means, and the id it is served under (--alias or the file's name). free() both. */
pl_status pl_load_choose(const struct pl_server *s, char **path, char **id, struct pl_err *err) PL_MUST_CHECK;
/* Fills in tok, chat, model, engine, created and fingerprint of s; the engine runs when this returns. */
pl_status pl_load_open(struct pl_load **out, struct pl_server *s, const char *path, struct pl_err *err) PL_MUST_CHECK;
/* The device that the configuration asks for; local_rank: which of this machine's, where it has several. */
pl_status pl_load_device(struct pl_device **out, const struct pl_config *c, struct pl_pool *pool, unsigned local_rank, struct pl_err *err) PL_MUST_CHECK;
/* Ends the engine. */
void pl_load_stop_engine(struct pl_load *l, struct pl_server *s);
void pl_load_close(struct pl_load *l);

#endif
