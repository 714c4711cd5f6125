/* version: GET /version.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/version.h"

#include <string.h>

#include "server/api/api.h"
#include "server/registry.h"
#include "server/server.h"

void pl_api_version(struct pl_http_req *req, struct pl_http_resp *resp)
{
    const struct pl_server *s = req->server;
    const char *model = pl_registry_first(s->models);
    struct pl_target t = {0};
    pl_buf_adds(&resp->body, "{\"version\":\"" PL_VERSION "\",\"model\":\"");
    pl_buf_add_json(&resp->body, model, strlen(model));
    pl_buf_adds(&resp->body, "\",\"system_fingerprint\":");
    if (pl_registry_find(s->models, NULL, &t) == PL_FOUND)
        pl_buf_addf(&resp->body, "\"%s\"}", t.instance->fingerprint);
    else
        pl_buf_adds(&resp->body, "null}");
    pl_registry_release(s->models, &t);
}
