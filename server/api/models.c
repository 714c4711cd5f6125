/* models: GET /v1/models, GET and DELETE /v1/models/{model}.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/model/model.h"
#include "core/sched/engine.h"
#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/jobs.h"
#include "server/server.h"

static void add_model(const struct pl_server *s, struct pl_buf *out)
{
    pl_buf_adds(out, "{\"id\":\"");
    pl_buf_add_json(out, s->model_id, strlen(s->model_id));
    pl_buf_addf(out, "\",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"parley\",\"root\":\"", (long long)s->created);
    pl_buf_add_json(out, s->model_id, strlen(s->model_id));
    pl_buf_addf(out, "\",\"parent\":null,\"max_model_len\":%u}", pl_engine_max_context(s->engine));
}

void pl_api_models(struct pl_http_req *req, struct pl_http_resp *resp)
{
    pl_buf_adds(&resp->body, "{\"object\":\"list\",\"data\":[");
    add_model(req->server, &resp->body);
    pl_buf_adds(&resp->body, "]}");
}

void pl_api_model(struct pl_http_req *req, struct pl_http_resp *resp)
{
    if (strcmp(req->path_arg, req->server->model_id) == 0) {
        add_model(req->server, &resp->body);
        return;
    }
    struct pl_err err = {0};
    (void)pl_fail_param(&err, PL_ENOENT, "model", "The model '%.200s' does not exist; this server has '%.200s'", req->path_arg,
                        req->server->model_id);
    pl_apierr_answer(req, resp, &err);
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
