/* metrics: GET /metrics, for Prometheus.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/metrics.h"

#include "server/api/api.h"
#include "server/server.h"

void pl_api_metrics(struct pl_http_req *req, struct pl_http_resp *resp)
{
    resp->content_type = "text/plain; version=0.0.4; charset=utf-8";
    pl_metrics_render(req->server->metrics, req->server, &resp->body);
}
