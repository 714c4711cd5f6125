/* models: from the name in a request to the model that answers it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/models.h"

#include <stdlib.h>
#include <string.h>

#include "server/apierr.h"
#include "server/jobs/tuned.h"
#include "server/server.h"

/* ---- waiting ------------------------------------------------------------------------------------------------------- */

/* The producer of a request whose model is being read; then the handler's own producer speaks through it. */
struct waiting {
    struct pl_producer base; /* first: http gives it back */
    struct pl_http_req *req;
    pl_http_handler *handler;
    struct pl_want want;
    char *name;
    struct pl_producer *inner; /* NULL = the wait is not over */
};

static void refuse(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_err *err)
{
    if (err->code == PL_ENOENT || err->code == PL_ESTOPPED || err->code == PL_ENOMEM || err->code == PL_ENOPAGE || err->code == PL_EFULL)
        pl_apierr_answer(req, resp, err);
    else
        pl_apierr_answer_as(req, resp, 500, "model_load_failed", err);
}

/* The wait is over: the handler, or what went wrong. False when that was the whole answer. */
static bool go_on(struct waiting *w, struct pl_buf *out)
{
    struct pl_http_resp resp = {.status = 200, .fd = -1};
    pl_buf_init(&resp.body, 0);
    if (w->want.status == PL_OK) {
        w->req->granted = &w->want.target;
        w->handler(w->req, &resp);
        w->req->granted = NULL;
    } else {
        refuse(w->req, &resp, &w->want.err);
    }
    w->inner = resp.producer;
    if (resp.producer == NULL) {
        w->base.stream = false;
        w->base.status = resp.status;
        w->base.retry_after = resp.retry_after;
        w->base.final = resp.final;
        pl_buf_add(out, pl_buf_str(&resp.body), resp.body.len);
        out->failed |= resp.body.failed;
    }
    pl_buf_fini(&resp.body);
    return resp.producer != NULL;
}

static pl_produced produce(struct pl_producer *self, struct pl_buf *out)
{
    struct waiting *w = (struct waiting *)self;
    if (w->inner == NULL) {
        if (!pl_registry_finished(w->req->server->models, &w->want))
            return PL_PRODUCE_WAIT;
        if (!go_on(w, out))
            return PL_PRODUCE_END;
    }
    const pl_produced made = w->inner->produce(w->inner, out);
    w->base.stream = w->inner->stream;
    w->base.status = w->inner->status;
    w->base.retry_after = w->inner->retry_after;
    w->base.final = w->inner->final;
    return made;
}

static void free_waiting(struct pl_producer *self)
{
    struct waiting *w = (struct waiting *)self;
    if (w->inner != NULL)
        w->inner->free(w->inner);
    pl_registry_forget(w->req->server->models, &w->want);
    free(w->name);
    free(w);
}

static void wake(void *conn)
{
    pl_http_wake(conn);
}

static void wait_for(struct pl_http_req *req, struct pl_http_resp *resp, const char *name, bool stream, pl_http_handler *handler)
{
    struct waiting *w = calloc(1, sizeof *w);
    struct pl_err err = {0};
    char *copy = strdup(name != NULL ? name : pl_registry_first(req->server->models));
    if (w == NULL || copy == NULL) {
        free(w);
        free(copy);
        err.code = pl_fail(&err, PL_ENOMEM, "out of memory");
        refuse(req, resp, &err);
        return;
    }
    w->base = (struct pl_producer){.produce = produce, .free = free_waiting, .stream = stream};
    w->req = req;
    w->handler = handler;
    w->name = copy;
    w->want = (struct pl_want){.name = w->name, .done = wake, .arg = req->conn};
    if (pl_registry_want(req->server->models, &w->want, &err) == PL_OK) {
        resp->producer = &w->base;
        return;
    }
    free_waiting(&w->base);
    refuse(req, resp, &err);
}

/* ---- finding ------------------------------------------------------------------------------------------------------- */

/* A tuned model or checkpoint that nobody has asked for yet. */
static pl_status make_known(const struct pl_server *s, const char *name, struct pl_err *err)
{
    const pl_status st = s->jobs != NULL && strncmp(name, "ft:", 3) == 0 ? pl_tuned_serve(s->jobs, name, err) : PL_ENOENT;
    if (st != PL_ENOENT)
        return st;
    return pl_fail_param(err, PL_ENOENT, "model", "The model '%.200s' does not exist; this server has '%.200s', and GET /v1/models lists all", name,
                         pl_registry_first(s->models));
}

bool pl_models_find(struct pl_http_req *req, struct pl_http_resp *resp, const char *name, bool stream, pl_http_handler *handler, struct pl_target *t)
{
    const struct pl_server *s = req->server;
    struct pl_err err = {0};
    if (req->granted != NULL) {
        *t = *req->granted;
        *req->granted = (struct pl_target){0};
        req->granted = NULL;
        return true;
    }
    pl_found found = pl_registry_find(s->models, name, t);
    if (found == PL_FOUND_NOT && make_known(s, name, &err) == PL_OK)
        found = pl_registry_find(s->models, name, t);
    if (found == PL_FOUND_OUT) {
        wait_for(req, resp, name, stream, handler);
    } else if (found == PL_FOUND_NOT) {
        if (err.code == PL_OK) /* it went as it came */
            err.code = pl_registry_no_model(name, &err);
        pl_apierr_answer(req, resp, &err);
    }
    return found == PL_FOUND;
}

pl_status pl_models_info(const struct pl_server *s, const char *name, void (*fn)(void *arg, const struct pl_model_info *m), void *arg, struct pl_err *err)
{
    pl_status st = pl_registry_info(s->models, name, fn, arg, err);
    if (st == PL_ENOENT && (st = make_known(s, name, err)) == PL_OK)
        st = pl_registry_info(s->models, name, fn, arg, err);
    return st;
}

/* ---- showing ------------------------------------------------------------------------------------------------------- */

static void add_text(struct pl_buf *out, const char *name, const char *value)
{
    pl_buf_addc(out, '"');
    pl_buf_adds(out, name);
    pl_buf_adds(out, "\":\"");
    pl_buf_add_json(out, value, strlen(value));
    pl_buf_addc(out, '"');
}

/* root is where it comes from in the end, parent what it was made from: nothing for what was there before. */
void pl_models_add(struct pl_buf *out, const struct pl_model_info *m)
{
    pl_buf_addc(out, '{');
    add_text(out, "id", m->name);
    pl_buf_adds(out, ",\"object\":\"model\",\"created\":");
    pl_buf_addu(out, m->created > 0 ? (uint64_t)m->created : 0);
    pl_buf_adds(out, ",\"owned_by\":\"parley\",");
    add_text(out, "root", m->root);
    pl_buf_addc(out, ',');
    if (m->parent != NULL)
        add_text(out, "parent", m->parent);
    else
        pl_buf_adds(out, "\"parent\":null");
    pl_buf_adds(out, ",\"max_model_len\":");
    pl_buf_addu(out, m->context);
    pl_buf_addc(out, '}');
}
