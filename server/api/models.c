/* models: GET /v1/models and /v1/models/{id}.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/model/model.h"
#include "core/sched/engine.h"
#include "server/api/api.h"
#include "server/apierr.h"
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
