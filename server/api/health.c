/* health: GET /health. 200 only when a request sent now would be served: loaded, not draining, and the engines move.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/api/api.h"
#include "server/registry.h"
#include "server/server.h"

enum { STUCK_MS = 30000 };

void pl_api_health(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_server *s = req->server;
    const char *status = "ok";
    if (atomic_load(&s->draining))
        status = "draining";
    else if (!atomic_load_explicit(&s->ready, memory_order_acquire))
        status = "loading";
    else if (!pl_registry_healthy(s->models, STUCK_MS))
        status = "unhealthy";
    if (status[0] != 'o') {
        resp->status = 503;
        resp->retry_after = 1;
    }
    pl_buf_adds(&resp->body, "{\"status\":\"");
    pl_buf_adds(&resp->body, status);
    pl_buf_adds(&resp->body, "\"}");
}
