/* version: GET /version.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/version.h"

#include <string.h>

#include "server/api/api.h"
#include "server/server.h"

void pl_api_version(struct pl_http_req *req, struct pl_http_resp *resp)
{
    const struct pl_server *s = req->server;
    pl_buf_adds(&resp->body, "{\"version\":\"" PL_VERSION "\",\"model\":\"");
    pl_buf_add_json(&resp->body, s->model_id, strlen(s->model_id));
    pl_buf_adds(&resp->body, "\",\"system_fingerprint\":");
    if (atomic_load_explicit(&req->server->ready, memory_order_acquire))
        pl_buf_addf(&resp->body, "\"%s\"}", s->fingerprint);
    else
        pl_buf_adds(&resp->body, "null}");
}
