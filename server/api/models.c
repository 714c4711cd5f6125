/* models: GET /v1/models, GET and DELETE /v1/models/{model}: whole models and adapters.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/models.h"

#include <string.h>

#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/tuned.h"
#include "server/server.h"

struct listing {
    struct pl_buf *out;
    const char *comma;
};

static void add(void *arg, const struct pl_model_info *m)
{
    struct listing *l = arg;
    pl_buf_adds(l->out, l->comma);
    pl_models_add(l->out, m);
    l->comma = ",";
}

void pl_api_models(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct listing l = {&resp->body, ""};
    pl_buf_adds(&resp->body, "{\"object\":\"list\",\"data\":[");
    pl_registry_each(req->server->models, add, &l);
    pl_buf_adds(&resp->body, "]}");
}

void pl_api_model(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    struct listing l = {&resp->body, ""};
    if (pl_models_info(req->server, req->path_arg, add, &l, &err) != PL_OK)
        pl_apierr_answer(req, resp, &err);
}

void pl_api_model_delete(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    struct pl_base base;
    if (!pl_listing_have_jobs(req, resp))
        return;
    pl_status st = PL_OK;
    if (pl_registry_base(req->server->models, NULL, req->path_arg, &base, &err) == PL_OK && !base.made)
        st = pl_fail_param(&err, PL_EINVAL, "model", "The model '%.200s' is one that this server was started with; only tuned models can be deleted",
                           req->path_arg);
    pl_base_fini(&base);
    if (st == PL_OK)
        st = pl_tuned_delete(req->server->jobs, req->path_arg, &err);
    if (st == PL_OK)
        pl_listing_write(&resp->body, json_pack("{s:s,s:s,s:b}", "id", req->path_arg, "object", "model", "deleted", 1));
    else
        pl_apierr_answer(req, resp, &err);
}
