/* models: which model a request's name means: the base, or an adapter.
 * Thread: any after start.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_MODELS_H
#define PL_SERVER_MODELS_H

#include "core/base/buf.h"
#include "core/sched/adapters.h"

struct pl_server;

/* *adapter: with a reference, NULL = the base. PL_ENOENT with param "model" when there is no model of that name. */
pl_status pl_models_find(const struct pl_server *s, const char *name, struct pl_served **adapter, struct pl_err *err) PL_MUST_CHECK;
/* A model as /v1/models shows it. */
void pl_models_add(const struct pl_server *s, const struct pl_served *adapter, struct pl_buf *out);

#endif
