/* models: GET /v1/models, GET and DELETE /v1/models/{model}: the base model and the adapters.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/models.h"

#include <string.h>

#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/jobs.h"
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

void pl_api_model_delete(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return;
    pl_status st = PL_OK;
    if (strcmp(req->path_arg, req->server->model_id) == 0)
        st = pl_fail_param(&err, PL_EINVAL, "model", "The model '%.200s' is the one that this server was started with; only tuned models can be deleted",
                           req->path_arg);
    if (st == PL_OK)
        st = pl_jobs_delete_model(req->server->jobs, req->path_arg, &err);
    if (st == PL_OK)
        pl_listing_write(&resp->body, json_pack("{s:s,s:s,s:b}", "id", req->path_arg, "object", "model", "deleted", 1));
    else
        pl_apierr_answer(req, resp, &err);
}
