/* models: which model a request's name means: the base, or an adapter.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/models.h"

#include <string.h>

#include "server/jobs/jobs.h"
#include "server/server.h"

pl_status pl_models_find(const struct pl_server *s, const char *name, struct pl_served **adapter, struct pl_err *err)
{
    *adapter = NULL;
    if (strcmp(name, s->model_id) == 0 || (*adapter = pl_adapters_find(s->adapters, name)) != NULL)
        return PL_OK;
    if (s->jobs != NULL && strncmp(name, "ft:", 3) == 0) { /* a tuned model or checkpoint that nobody has asked for yet */
        const pl_status st = pl_jobs_serve(s->jobs, name, adapter, err);
        if (st != PL_ENOENT)
            return st;
    }
    return pl_fail_param(err, PL_ENOENT, "model", "The model '%.200s' does not exist; this server has '%.200s', and GET /v1/models lists its adapters",
                         name, s->model_id);
}

static void add_text(struct pl_buf *out, const char *name, const char *value)
{
    pl_buf_addf(out, "\"%s\":\"", name);
    pl_buf_add_json(out, value, strlen(value));
    pl_buf_addc(out, '"');
}

/* root is the base model's name, parent what the model was made from: nothing for the base itself. */
void pl_models_add(const struct pl_server *s, const struct pl_served *adapter, struct pl_buf *out)
{
    pl_buf_addc(out, '{');
    add_text(out, "id", adapter != NULL ? adapter->name : s->model_id);
    pl_buf_addf(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"parley\",", (long long)(adapter != NULL ? adapter->created : s->created));
    add_text(out, "root", s->model_id);
    pl_buf_addc(out, ',');
    if (adapter != NULL)
        add_text(out, "parent", s->model_id);
    else
        pl_buf_adds(out, "\"parent\":null");
    pl_buf_addf(out, ",\"max_model_len\":%u}", pl_engine_max_context(s->engine));
}
