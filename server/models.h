/* models: from the name in a request to the model that answers it: found at once, waited for, or refused.
 * Thread: microhttpd's workers.  Owns: nothing; a wait owns itself, as the connection's producer.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_MODELS_H
#define PL_SERVER_MODELS_H

#include "server/http.h"
#include "server/registry.h"

/* name NULL = the first model. True: *t is what answers, to be released (pl_registry_release). False: answered, by an error or by a producer that
 * waits until the model is in memory and then calls handler again; nothing of the request may be kept until then. stream: what the client asked for. */
bool pl_models_find(struct pl_http_req *req, struct pl_http_resp *resp, const char *name, bool stream, pl_http_handler *handler, struct pl_target *t);
/* One that a job made and nobody has asked for yet is made known first, PL_ENOENT when there is none. */
pl_status pl_models_info(const struct pl_server *s, const char *name, void (*fn)(void *arg, const struct pl_model_info *m), void *arg,
                         struct pl_err *err) PL_MUST_CHECK;
/* A model as /v1/models shows it. */
void pl_models_add(struct pl_buf *out, const struct pl_model_info *m);

#endif
