/* models: GET /v1/models and /v1/models/{id}: the base model and the adapters.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/models.h"

#include "server/api/api.h"
#include "server/apierr.h"
#include "server/server.h"

struct listing {
    const struct pl_server *s;
    struct pl_buf *out;
};

static void add(void *arg, struct pl_served *a)
{
    struct listing *l = arg;
    pl_buf_addc(l->out, ',');
    pl_models_add(l->s, a, l->out);
}

void pl_api_models(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct listing l = {req->server, &resp->body};
    pl_buf_adds(&resp->body, "{\"object\":\"list\",\"data\":[");
    pl_models_add(req->server, NULL, &resp->body);
    pl_adapters_each(req->server->adapters, false, add, &l);
    pl_buf_adds(&resp->body, "]}");
}

void pl_api_model(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    struct pl_served *adapter;
    if (pl_models_find(req->server, req->path_arg, &adapter, &err) != PL_OK) {
        pl_apierr_answer(req, resp, &err);
        return;
    }
    pl_models_add(req->server, adapter, &resp->body);
    pl_served_unref(adapter);
}
