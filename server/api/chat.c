/* chat: POST /v1/chat/completions.
 * Thread: microhttpd's workers.  Owns: nothing beyond the call.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/mem.h"
#include "server/api/api.h"
#include "server/apierr.h"
#include "server/generate.h"
#include "server/models.h"
#include "server/prompt.h"
#include "server/server.h"

void pl_api_chat(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_params p;
    struct pl_err err = {0};
    struct pl_prompt prompt;
    pl_status st = pl_params_read(&p, PL_EP_CHAT, req->body, req->n_body, &err);
    if (st != PL_OK) {
        pl_apierr_answer(req, resp, &err);
        return;
    }
    struct pl_target t;
    if (!pl_models_find(req, resp, p.model, p.stream, pl_api_chat, &t)) {
        pl_params_fini(&p);
        return;
    }
    struct pl_arena *a = pl_arena_new(PL_GEN_ARENA);
    st = a != NULL ? pl_prompt_chat(t.instance, p.messages, p.add_generation_prompt, pl_engine_max_context(t.instance->engine), a, &prompt, &err)
                   : pl_fail(&err, PL_ENOMEM, "out of memory");
    struct pl_prompt *kept = st == PL_OK ? pl_arena_alloc(a, sizeof *kept) : NULL;
    if (st == PL_OK && kept == NULL)
        st = pl_fail(&err, PL_ENOMEM, "out of memory");
    if (st == PL_OK) {
        *kept = prompt;
        pl_gen_start(req, resp, &p, &t, a, kept, 1);
    } else {
        pl_registry_release(req->server->models, &t);
        pl_arena_free(a);
        pl_apierr_answer(req, resp, &err);
    }
    pl_params_fini(&p);
}
