/* adapters: loading and unloading adapters while the server runs, by the routes that vLLM has for it.
 *   POST /v1/load_lora_adapter    {"lora_name", "lora_path", "load_inplace": bool, "base_model_name"}   -> the model, as GET /v1/models/{id} shows it
 *   POST /v1/unload_lora_adapter  {"lora_name"}                                      -> {"id", "object": "model", "deleted": true}
 *   GET  /v1/lora_adapters                                                           -> {"object": "list", "data": [...]}
 * Thread: microhttpd's workers; what is read is read by the registry's.  Owns: nothing beyond the call but a load that is waited for, the
 * connection's producer.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "server/api/api.h"
#include "server/apierr.h"
#include "server/models.h"
#include "server/schema.h"
#include "server/server.h"

static pl_status text_field(const json_t *root, const char *name, const char **v, struct pl_err *err)
{
    const json_t *x = json_object_get(root, name);
    if (!json_is_string(x) || json_string_length(x) == 0)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' must be a string that is not empty; it is %s", name, pl_json_kind(x));
    *v = json_string_value(x);
    return PL_OK;
}

static pl_status known_fields(const json_t *root, const char *const *known, struct pl_err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value)
    {
        size_t i = 0;
        while (known[i] != NULL && strcmp(known[i], key) != 0)
            i++;
        if (known[i] == NULL && !json_is_null(value))
            return pl_fail_param(err, PL_ENOTSUP, key, "'%.60s' is not a field of this request", key);
    }
    return PL_OK;
}

/* The real path of an adapter that lies inside adapter-dir, whatever links and dots lead there; a relative path begins there. */
static pl_status allowed_path(const struct pl_server *s, const char *given, char **path, struct pl_err *err)
{
    const char *dir = s->config->adapter_dir;
    char folder[PATH_MAX], *whole = NULL, *real = NULL;
    pl_status rc = PL_OK;
    if (realpath(dir, folder) == NULL)
        return pl_fail_param(err, PL_EINVAL, "lora_path", "the server's adapter-dir cannot be read: %s", strerror(errno));
    if (asprintf(&whole, "%s%s%s", given[0] == '/' ? "" : folder, given[0] == '/' ? "" : "/", given) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    const size_t n = strlen(folder);
    real = realpath(whole, NULL);
    if (real != NULL && strncmp(real, folder, n) == 0 && (real[n] == '/' || strcmp(folder, "/") == 0)) {
        *path = real;
        real = NULL;
    } else { /* what lies outside is nobody's business, not even whether it is there */
        rc = pl_fail_param(err, PL_EINVAL, "lora_path", "'%.200s' is no folder or file inside the server's adapter-dir", given);
    }
    free(whole);
    free(real);
    return rc;
}

/* A file's fault is the request's: nothing is wrong with the server. */
static pl_status as_request_fault(pl_status rc, struct pl_err *err)
{
    if (rc != PL_EFORMAT && rc != PL_EIO && rc != PL_ENOENT && rc != PL_ENOTSUP)
        return rc;
    struct pl_err cause = *err;
    return pl_fail_param(err, PL_EINVAL, "lora_path", "%s", cause.msg);
}

static void show(void *arg, const struct pl_model_info *m)
{
    pl_models_add(arg, m);
}

/* *base: NULL = the first model. */
static pl_status read_load(const json_t *root, const char **name, const char **path, const char **base, struct pl_err *err)
{
    static const char *const known[] = {"lora_name", "lora_path", "load_inplace", "base_model_name", NULL};
    const json_t *replace = json_object_get(root, "load_inplace"), *model = json_object_get(root, "base_model_name");
    pl_status rc = known_fields(root, known, err);
    if (rc == PL_OK && replace != NULL && !json_is_null(replace) && !json_is_boolean(replace))
        rc = pl_fail_param(err, PL_EINVAL, "load_inplace", "'load_inplace' must be a boolean, not %s", pl_json_kind(replace));
    if (rc == PL_OK && model != NULL && !json_is_null(model))
        rc = text_field(root, "base_model_name", base, err);
    if (rc == PL_OK)
        rc = text_field(root, "lora_name", name, err);
    return rc == PL_OK ? text_field(root, "lora_path", path, err) : rc;
}

static pl_status check_base(const struct pl_server *s, const char *name, struct pl_err *err)
{
    struct pl_base base;
    const pl_status rc = pl_registry_base(s->models, NULL, name, &base, err);
    pl_base_fini(&base);
    return rc == PL_OK ? rc : pl_fail_param(err, PL_EINVAL, "base_model_name", "'base_model_name': there is no whole model '%.200s'", name);
}

/* The producer of a request whose adapter is being read: that takes long, and is done elsewhere. */
struct loading {
    struct pl_producer base; /* first: http gives it back */
    struct pl_http_req *req;
    struct pl_want want;
    struct pl_adapter_load load;
    char *name, *path;
    struct pl_buf shown; /* under the registry's lock until the want is over */
};

static pl_produced produce(struct pl_producer *self, struct pl_buf *out)
{
    struct loading *l = (struct loading *)self;
    if (!pl_registry_finished(l->req->server->models, &l->want))
        return PL_PRODUCE_WAIT;
    struct pl_http_resp resp = {.status = 200, .fd = -1};
    pl_buf_init(&resp.body, 0);
    if (l->want.status == PL_OK) {
        pl_buf_add(&resp.body, pl_buf_str(&l->shown), l->shown.len);
    } else {
        l->want.err.code = as_request_fault(l->want.status, &l->want.err);
        pl_apierr_answer(l->req, &resp, &l->want.err);
    }
    self->status = resp.status;
    self->retry_after = resp.retry_after;
    self->final = resp.final;
    pl_buf_add(out, pl_buf_str(&resp.body), resp.body.len);
    out->failed |= resp.body.failed || l->shown.failed;
    pl_buf_fini(&resp.body);
    return PL_PRODUCE_END;
}

static void free_loading(struct pl_producer *self)
{
    struct loading *l = (struct loading *)self;
    pl_registry_forget(l->req->server->models, &l->want);
    pl_buf_fini(&l->shown);
    free(l->name);
    free(l->path);
    free(l);
}

static void wake(void *conn)
{
    pl_http_wake(conn);
}

/* Takes the target over. */
static pl_status load(struct pl_http_req *req, struct pl_http_resp *resp, struct pl_target *t, const char *name, const char *given, bool replace,
                      struct pl_err *err)
{
    char *path = NULL;
    pl_status rc = allowed_path(req->server, given, &path, err);
    if (rc != PL_OK) {
        pl_registry_release(req->server->models, t);
        return rc;
    }
    struct loading *l = pl_xcalloc(1, sizeof *l);
    l->base = (struct pl_producer){.produce = produce, .free = free_loading};
    l->req = req;
    l->name = pl_xstrdup(name);
    l->path = path;
    pl_buf_init(&l->shown, 0);
    l->load = (struct pl_adapter_load){.path = path, .replace = replace, .show = show, .arg = &l->shown};
    l->want = (struct pl_want){.name = l->name, .load = &l->load, .done = wake, .arg = req->conn, .target = *t};
    rc = pl_registry_want(req->server->models, &l->want, err);
    if (rc == PL_OK)
        resp->producer = &l->base;
    else
        free_loading(&l->base);
    return rc;
}

static pl_status unload(struct pl_server *s, const json_t *root, struct pl_buf *out, struct pl_err *err)
{
    static const char *const known[] = {"lora_name", NULL};
    const char *name;
    pl_status rc = known_fields(root, known, err);
    if (rc != PL_OK || (rc = text_field(root, "lora_name", &name, err)) != PL_OK || (rc = pl_registry_unload_adapter(s->models, name, err)) != PL_OK)
        return rc;
    pl_buf_adds(out, "{\"id\":\"");
    pl_buf_add_json(out, name, strlen(name));
    pl_buf_adds(out, "\",\"object\":\"model\",\"deleted\":true}");
    return PL_OK;
}

void pl_api_load_adapter(struct pl_http_req *req, struct pl_http_resp *resp)
{
    if (req->server->config->adapter_dir[0] == '\0') {
        static const char off[] = "{\"error\":{\"message\":\"Loading adapters over HTTP is off: start the server with --adapter-dir FOLDER, and "
                                  "put the adapters there.\",\"type\":\"permission_error\",\"param\":null,\"code\":\"adapter_dir_not_set\"}}";
        resp->status = 403;
        req->usage->error = "adapter_dir_not_set";
        pl_buf_adds(&resp->body, off);
        return;
    }
    struct pl_err err = {0};
    struct pl_target t;
    json_t *root = NULL;
    const char *name, *path, *base = NULL;
    pl_status rc = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (rc == PL_OK)
        rc = read_load(root, &name, &path, &base, &err);
    if (rc == PL_OK && base != NULL)
        rc = check_base(req->server, base, &err);
    if (rc == PL_OK && pl_models_find(req, resp, base, false, pl_api_load_adapter, &t))
        rc = load(req, resp, &t, name, path, json_is_true(json_object_get(root, "load_inplace")), &err);
    json_decref(root);
    if (rc != PL_OK)
        pl_apierr_answer(req, resp, &err);
}

void pl_api_unload_adapter(struct pl_http_req *req, struct pl_http_resp *resp)
{
    json_t *root = NULL;
    struct pl_err err = {0};
    pl_status rc = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (rc == PL_OK)
        rc = unload(req->server, root, &resp->body, &err);
    json_decref(root);
    if (rc != PL_OK)
        pl_apierr_answer(req, resp, &err);
}

struct listing {
    struct pl_buf *out;
    const char *comma, *base;
};

static void add(void *arg, struct pl_served *a)
{
    struct listing *l = arg;
    pl_buf_addf(l->out, "%s{\"id\":\"", l->comma);
    pl_buf_add_json(l->out, a->name, strlen(a->name));
    pl_buf_adds(l->out, "\",\"object\":\"lora_adapter\",\"base_model_name\":\"");
    pl_buf_add_json(l->out, l->base, strlen(l->base));
    pl_buf_adds(l->out, "\",\"path\":\"");
    pl_buf_add_json_lossy(l->out, a->path, strlen(a->path));
    pl_buf_addf(l->out, "\",\"status\":\"%s\",\"requests\":%u,\"max_rank\":%u,\"n_params\":%llu,\"created\":%lld}",
                a->state == PL_SERVED_LISTED ? "loaded" : "unloading", a->refs, a->max_rank, (unsigned long long)a->n_params, (long long)a->created);
    l->comma = ",";
}

static void add_all(void *arg, const char *name, struct pl_instance *m, uint64_t n_loads)
{
    struct listing *l = arg;
    (void)n_loads;
    l->base = name;
    pl_adapters_each(m->adapters, true, add, l);
}

void pl_api_adapters(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct listing l = {&resp->body, "", NULL};
    pl_buf_adds(&resp->body, "{\"object\":\"list\",\"data\":[");
    pl_registry_each_loaded(req->server->models, add_all, &l);
    pl_buf_adds(&resp->body, "]}");
}
