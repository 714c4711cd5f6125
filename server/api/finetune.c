/* finetune: /v1/fine_tuning/jobs: create, check, list, get, cancel, pause, resume, events, checkpoints.
 * Thread: microhttpd's workers, and the tasks' thread where named.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "core/base/json.h"
#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/checks.h"
#include "server/jobs/files.h"
#include "server/jobs/tuned.h"
#include "server/jobs/waits.h"
#include "server/server.h"

enum { MAX_SUFFIX = 64, MAX_PAIRS = 16, MAX_KEY = 64, MAX_VALUE = 512, MAX_INTEGRATIONS = 5, MAX_PREVIEW = 100, PREVIEW = 3 };

/* ---- objects ------------------------------------------------------------------------------------------------------- */

static json_t *parsed(const char *text)
{
    json_t *v = text != NULL ? json_loads(text, JSON_DECODE_ANY, NULL) : NULL;
    return v != NULL ? v : json_null();
}

static json_t *number_or_null(int64_t n)
{
    return n > 0 ? json_integer(n) : json_null();
}

static json_t *job_json(const void *data)
{
    const struct pl_job_row *r = data;
    struct pl_train_spec spec;
    json_t *method = parsed(r->method), *results = json_array();
    const bool done = strcmp(r->status, "succeeded") == 0;
    json_t *hyper = pl_train_spec_read(&spec, method, NULL, NULL) == PL_OK ? pl_train_spec_hyperparameters(&spec) : json_object();
    if (r->result_file != NULL)
        json_array_append_new(results, json_string(r->result_file));
    json_t *o = json_pack("{s:s,s:s,s:s,s:I,s:o,s:s?,s:s,s:s,s:o,s:o,s:I,s:s,s:o}", "object", "fine_tuning.job", "id", r->id, "model", r->model, "created_at",
                          (json_int_t)r->created_at, "finished_at", number_or_null(r->finished_at), "fine_tuned_model", done ? r->name : NULL,
                          "organization_id", "parley", "status", r->status, "result_files", results, "error", parsed(r->error), "seed", (json_int_t)r->seed,
                          "training_file", r->training_file, "hyperparameters", hyper);
    json_object_set_new(o, "validation_file", r->validation_file != NULL ? json_string(r->validation_file) : json_null());
    json_object_set_new(o, "method", method);
    json_object_set_new(o, "trained_tokens", number_or_null(r->trained_tokens));
    json_object_set_new(o, "estimated_finish", number_or_null(r->estimated_finish));
    json_object_set_new(o, "integrations", r->integrations != NULL ? parsed(r->integrations) : json_array());
    json_object_set_new(o, "metadata", parsed(r->metadata));
    json_object_set_new(o, "user_provided_suffix", r->suffix != NULL ? json_string(r->suffix) : json_null());
    json_object_set_new(o, "waiting", pl_waits_json(r));
    json_object_set_new(o, "step", json_integer(r->step));
    json_object_set_new(o, "total_steps", number_or_null(r->total_steps));
    json_t *outcome = done ? parsed(r->outcome) : NULL, *evaluation = json_object_get(outcome, "evaluation");
    json_object_set(o, "evaluation", evaluation != NULL ? evaluation : json_null());
    json_decref(outcome);
    return o;
}

static json_t *event_json(const void *data)
{
    const struct pl_event_row *e = data;
    return json_pack("{s:s,s:s,s:I,s:s,s:s,s:s,s:o}", "object", "fine_tuning.job.event", "id", e->id, "created_at", (json_int_t)e->created_at,
                     "level", e->level, "message", e->message, "type", e->type, "data", parsed(e->data));
}

static json_t *checkpoint_json(const void *data)
{
    const struct pl_checkpoint_row *c = data;
    json_t *metrics = parsed(c->metrics);
    if (json_is_object(metrics) && json_object_get(metrics, "step") == NULL)
        json_object_set_new(metrics, "step", json_integer(c->step));
    return json_pack("{s:s,s:s,s:I,s:s,s:s,s:I,s:o}", "object", "fine_tuning.job.checkpoint", "id", c->id, "created_at", (json_int_t)c->created_at,
                     "fine_tuned_model_checkpoint", c->name, "fine_tuning_job_id", c->job, "step_number", (json_int_t)c->step, "metrics", metrics);
}

/* ---- reading a request --------------------------------------------------------------------------------------------- */

static pl_status want_string(const json_t *root, const char *name, bool required, const char **out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, name);
    *out = NULL;
    if (v == NULL || json_is_null(v))
        return required ? pl_fail_param(err, PL_EINVAL, name, "'%s' is required", name) : PL_OK;
    *out = json_string_value(v);
    return *out != NULL ? PL_OK : pl_fail_param(err, PL_EINVAL, name, "'%s' must be a string, not %s", name, pl_json_kind(v));
}

static pl_status read_suffix(const json_t *root, char **out, struct pl_err *err)
{
    const char *s;
    const pl_status st = want_string(root, "suffix", false, &s, err);
    if (st != PL_OK || s == NULL)
        return st;
    const size_t n = strlen(s);
    if (n < 1 || n > MAX_SUFFIX || strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != n)
        return pl_fail_param(err, PL_EINVAL, "suffix", "'suffix' must be 1 to %d letters, digits, '-', '_' or '.'", MAX_SUFFIX);
    pl_row_set(out, s);
    return PL_OK;
}

static pl_status read_seed(const json_t *root, int64_t *seed, struct pl_err *err)
{
    const json_t *v = json_object_get(root, "seed");
    uint32_t random = 0;
    if (v == NULL || json_is_null(v)) {
        while (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
            ;
        *seed = random & INT32_MAX;
        return PL_OK;
    }
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
        return pl_fail_param(err, PL_EINVAL, "seed", "'seed' must be an integer from 0 to %d", INT32_MAX);
    *seed = json_integer_value(v);
    return PL_OK;
}

static pl_status read_metadata(const json_t *root, char **out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, "metadata");
    const char *key;
    json_t *value;
    if (v == NULL || json_is_null(v))
        return PL_OK;
    if (!json_is_object(v))
        return pl_fail_param(err, PL_EINVAL, "metadata", "'metadata' must be an object, not %s", pl_json_kind(v));
    if (json_object_size(v) > MAX_PAIRS)
        return pl_fail_param(err, PL_EINVAL, "metadata", "'metadata' must have at most %d pairs, not %zu", MAX_PAIRS, json_object_size(v));
    json_object_foreach((json_t *)(uintptr_t)v, key, value)
    {
        if (pl_utf8_count(key) > MAX_KEY)
            return pl_fail_param(err, PL_EINVAL, "metadata", "a key of 'metadata' has more than %d characters", MAX_KEY);
        if (!json_is_string(value) || pl_utf8_count(json_string_value(value)) > MAX_VALUE)
            return pl_fail_param(err, PL_EINVAL, "metadata", "'metadata.%.40s' must be a string of at most %d characters", key, MAX_VALUE);
    }
    *out = json_dumps(v, JSON_COMPACT);
    return PL_OK;
}

static pl_status read_integrations(const json_t *root, char **out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, "integrations");
    if (v == NULL || json_is_null(v))
        return PL_OK;
    if (!json_is_array(v) || json_array_size(v) > MAX_INTEGRATIONS)
        return pl_fail_param(err, PL_EINVAL, "integrations", "'integrations' must be an array of at most %d objects", MAX_INTEGRATIONS);
    for (size_t i = 0; i < json_array_size(v); i++) {
        json_t *one = json_array_get(v, i), *ignored;
        const json_t *type = json_object_get(one, "type");
        const char *key;
        char param[80];
        snprintf(param, sizeof param, "integrations[%zu].type", i);
        if (!json_is_string(type))
            return pl_fail_param(err, PL_EINVAL, param, "'%s' must be a string", param);
        if (strcmp(json_string_value(type), "tensorboard") != 0)
            return pl_fail_param(err, PL_ENOTSUP, param, "integration %.40s is not supported by this server; every job writes TensorBoard files",
                                 json_string_value(type));
        json_object_foreach(one, key, ignored)
        {
            if (strcmp(key, "type") == 0)
                continue;
            snprintf(param, sizeof param, "integrations[%zu].%.40s", i, key);
            return pl_fail_param(err, PL_EINVAL, param, "'%s' is not a member of a tensorboard integration; it has only type", param);
        }
    }
    *out = json_dumps(v, JSON_COMPACT);
    return PL_OK;
}

static pl_status read_file(struct pl_jobs *j, const json_t *root, const char *name, bool required, char **out, struct pl_err *err)
{
    const char *id;
    struct pl_file_row f;
    pl_status st = want_string(root, name, required, &id, err);
    if (st != PL_OK || id == NULL)
        return st;
    st = pl_store_get(j->store, PL_TABLE_FILES, "id", id, &f, err);
    if (st == PL_ENOENT)
        st = pl_fail_param(err, PL_EINVAL, name, "'%s': there is no file '%.60s'", name, id);
    else if (st == PL_OK && strcmp(f.purpose, "fine-tune") != 0)
        st = pl_fail_param(err, PL_EINVAL, name, "'%s': the file %.60s has purpose %s, not fine-tune", name, id, f.purpose);
    if (st == PL_OK)
        pl_row_set(out, id);
    pl_row_fini(PL_TABLE_FILES, &f);
    return st;
}

static const char from_nothing[] = "scratch"; /* what a request calls the base of a model that is made from nothing */

static bool is_in(const char *folder, const char *name)
{
    char *path = NULL;
    const bool there = asprintf(&path, "%s/%s", folder, name) >= 0 && access(path, R_OK) == 0;
    free(path);
    return there;
}

/* The whole model under an adapter that a job made. */
static pl_status find_under(struct pl_jobs *j, const char *adapter, struct pl_base *base, struct pl_err *err)
{
    struct pl_job_row of = {0};
    pl_status st = pl_tuned_job(j, adapter, &of, err);
    if (st == PL_OK && (st = pl_jobs_base(j, &of, base, err)) == PL_ENOENT)
        st = pl_fail_param(err, PL_ENOENT, "model", "The model '%.100s' is not available for fine-tuning: it is an adapter of '%.100s' as that was then, "
                           "which this server does not have; start parleyd with it as --model or --add-model", adapter, of.model);
    pl_row_fini(PL_TABLE_JOBS, &of);
    return st;
}

/* The whole model that it names, or the one under the adapter that it names, which is *adapter then: a folder, free(). */
static pl_status find_base(struct pl_jobs *j, const char *model, struct pl_base *base, char **adapter, struct pl_err *err)
{
    struct pl_registry *models = j->server->models;
    char *path = NULL;
    pl_status st = pl_registry_base(models, NULL, model, base, err);
    if (st != PL_ENOENT)
        return st;
    st = pl_tuned_path(j, model, &path, err);
    if (st == PL_ENOENT)
        return pl_fail_param(err, PL_ENOENT, "model", "The model '%.100s' is not available for fine-tuning; this server has '%.100s', the models that were "
                             "added to it, those tuned from them, and \"%s\"", model, pl_registry_first(models), from_nothing);
    if (st != PL_OK)
        return st;
    if (is_in(path, "model.gguf")) {
        st = pl_tuned_serve(j, model, err);
        if (st == PL_OK)
            st = pl_registry_base(models, NULL, model, base, err);
    } else if (is_in(path, "adapter_config.json")) {
        st = find_under(j, model, base, err);
        if (st == PL_OK)
            st = pl_tuned_serve(j, model, err); /* and with it the model under it, also when that was deleted */
        *adapter = path;
        path = NULL;
    } else {
        st = pl_fail_param(err, PL_ENOENT, "model", "The model '%.100s' is not available for fine-tuning: its files are not there any more", model);
    }
    free(path);
    return st;
}

/* The model's name, its files if it is an adapter, and what tells its base from others if the job depends on that. */
static pl_status read_model(struct pl_jobs *j, const json_t *root, struct pl_job_row *row, const struct pl_train_spec *spec, struct pl_err *err)
{
    const char *model;
    struct pl_base base = {0};
    const bool needed = !spec->scratch || spec->shape_tokenizer == PL_SHAPE_BASE;
    pl_status st = want_string(root, "model", true, &model, err);
    if (st != PL_OK)
        return st;
    if (spec->scratch && strcmp(model, from_nothing) != 0)
        return pl_fail_param(err, PL_EINVAL, "model", "'model' must be \"%s\" with method.pretrain.shape, which makes a model from nothing; to go on training "
                             "'%.100s' leave the shape out", from_nothing, model);
    st = spec->scratch ? pl_registry_base(j->server->models, NULL, NULL, &base, err) : find_base(j, model, &base, &row->base_adapter, err);
    if (st == PL_ENOENT && strcmp(model, from_nothing) == 0)
        return pl_fail_param(err, PL_EINVAL, "method", "model \"%s\" needs method {\"type\": \"pretrain\", \"pretrain\": {\"shape\": {…}}}; an empty "
                             "shape takes the defaults", from_nothing);
    if (st == PL_OK && needed && (base.id[0] == '\0' || access(base.path, R_OK) != 0))
        st = pl_fail_param(err, PL_ENOENT, "model", "The model '%.100s' is not available for fine-tuning: its file %.200s cannot be read", model, base.path);
    if (st == PL_OK) {
        pl_row_set(&row->model, model);
        if (needed)
            pl_row_set(&row->base_id, base.id);
    }
    pl_base_fini(&base);
    return st;
}

static pl_status read_method(const json_t *root, struct pl_job_row *row, struct pl_train_spec *spec, struct pl_err *err)
{
    const pl_status st = pl_train_spec_read(spec, json_object_get(root, "method"), json_object_get(root, "hyperparameters"), err);
    if (st != PL_OK)
        return st;
    json_t *method = pl_train_spec_json(spec);
    row->method = json_dumps(method, JSON_COMPACT);
    json_decref(method);
    return row->method != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
}

static pl_status name_job(struct pl_jobs *j, struct pl_job_row *row, const struct pl_train_spec *spec, struct pl_err *err)
{
    struct pl_base base;
    char id[PL_ID_MAX], *name = NULL;
    pl_status st = pl_jobs_base(j, row, &base, err);
    if (st != PL_OK)
        return st;
    pl_store_new_id(id, "ftjob-");
    pl_row_set(&row->id, id);
    const char *root = spec->scratch ? row->model : base.root;
    if (asprintf(&name, "ft:%s:parley:%s:%.8s", root, row->suffix != NULL ? row->suffix : "", id + strlen("ftjob-")) >= 0)
        row->name = name;
    else
        st = pl_fail(err, PL_ENOMEM, "out of memory");
    pl_base_fini(&base);
    return st;
}

/* preview: NULL where the field does not belong. */
static pl_status read_job(struct pl_jobs *j, const json_t *root, struct pl_job_row *row, struct pl_train_spec *spec, uint32_t *preview, struct pl_err *err)
{
    const char *const names[] = {"model", "training_file", "validation_file", "suffix", "seed", "method", "hyperparameters", "integrations", "metadata",
                                 preview != NULL ? "preview" : NULL, NULL};
    const json_t *n = json_object_get(root, "preview");
    pl_status st = pl_json_known(root, names, err);
    if (st == PL_OK && n != NULL && (!json_is_integer(n) || json_integer_value(n) < 0 || json_integer_value(n) > MAX_PREVIEW))
        st = pl_fail_param(err, PL_EINVAL, "preview", "'preview' must be an integer from 0 to %d", MAX_PREVIEW);
    if (st == PL_OK && n != NULL)
        *preview = (uint32_t)json_integer_value(n);
    if (st == PL_OK)
        st = read_method(root, row, spec, err);
    if (st == PL_OK)
        st = read_model(j, root, row, spec, err);
    if (st == PL_OK)
        st = read_file(j, root, "training_file", true, &row->training_file, err);
    if (st == PL_OK)
        st = read_file(j, root, "validation_file", false, &row->validation_file, err);
    if (st == PL_OK)
        st = read_suffix(root, &row->suffix, err);
    if (st == PL_OK)
        st = read_seed(root, &row->seed, err);
    if (st == PL_OK)
        st = read_integrations(root, &row->integrations, err);
    return st == PL_OK ? read_metadata(root, &row->metadata, err) : st;
}

static void refuse_job(struct pl_http_req *req, struct pl_http_resp *resp, pl_status st, const struct pl_err *err)
{
    if (st == PL_ENOENT)
        pl_apierr_answer_as(req, resp, 400, "model_not_available", err);
    else if (st == PL_EIO || st == PL_ENOSPC)
        pl_apierr_answer_as(req, resp, 507, st == PL_ENOSPC ? "disk_full" : "storage_failed", err);
    else
        pl_apierr_answer(req, resp, err);
}

void pl_api_jobs_create(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_jobs *j = req->server->jobs;
    struct pl_job_row row = {0};
    struct pl_train_spec spec;
    struct pl_err err = {0};
    json_t *root = NULL;
    if (!pl_listing_have_jobs(req, resp))
        return;
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (st == PL_OK)
        st = read_job(j, root, &row, &spec, NULL, &err);
    if (st == PL_OK)
        st = name_job(j, &row, &spec, &err);
    if (st == PL_OK)
        st = pl_jobs_create(j, &row, &err);
    if (st != PL_OK)
        refuse_job(req, resp, st, &err);
    else
        pl_listing_write(&resp->body, job_json(&row));
    if (st == PL_OK)
        pl_checks_later(j, &row);
    json_decref(root);
    pl_row_fini(PL_TABLE_JOBS, &row);
}

/* ---- the dry run ---------------------------------------------------------------------------------------------------- */

struct dry_run {
    struct pl_jobs *j;
    struct pl_job_row row;
    struct pl_train_spec spec;
    const struct pl_tok *tok; /* of the model that is trained */
    uint32_t n_preview;
    json_t *preview;
};

static json_t *text_json(const struct pl_buf *text)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_addc(&b, '"');
    pl_buf_add_json_lossy(&b, pl_buf_str(text), text->len);
    pl_buf_addc(&b, '"');
    json_t *v = json_loadb(pl_buf_str(&b), b.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    pl_buf_fini(&b);
    return v != NULL ? v : json_string("");
}

static bool preview_example(void *arg, const struct pl_example *e)
{
    struct dry_run *d = arg;
    json_t *segments = json_array();
    struct pl_buf text;
    json_int_t n_loss = 0;
    pl_buf_init(&text, 0);
    for (uint32_t i = 0; i < e->n; i++) {
        size_t n;
        const char *bytes = pl_tok_bytes(d->tok, e->ids[i], true, &n);
        pl_buf_add(&text, bytes, n);
        n_loss += e->loss[i];
        if (i + 1 == e->n || e->loss[i + 1] != e->loss[i]) {
            json_array_append_new(segments, json_pack("{s:o,s:b}", "text", text_json(&text), "loss", e->loss[i] != 0));
            pl_buf_clear(&text);
        }
    }
    pl_buf_fini(&text);
    json_array_append_new(d->preview, json_pack("{s:I,s:I,s:I,s:o}", "line", (json_int_t)e->line, "tokens", (json_int_t)e->n, "loss_tokens", n_loss,
                                                "segments", segments));
    return json_array_size(d->preview) < d->n_preview;
}

static pl_status preview(struct dry_run *d, const char *training, const struct pl_train_plan *plan, struct pl_err *err)
{
    const struct pl_data_opts o = {.tok = plan->base.tok, .chat = plan->base.chat, .method = plan->spec.method,
                                   .train_on = (pl_train_on)plan->spec.train_on, .max_length = plan->spec.max_length};
    struct pl_data_report r;
    if (d->n_preview == 0)
        return PL_OK;
    d->tok = plan->base.tok;
    const pl_status st = pl_data_scan(training, &o, preview_example, d, &r, err);
    pl_data_report_fini(&r);
    return st;
}

/* On the tasks' thread. */
static void run_dry(void *arg, struct pl_http_resp *resp)
{
    struct dry_run *d = arg;
    struct pl_train_plan plan = {0};
    struct pl_model_file file;
    struct pl_err err = {0};
    char *training = pl_jobs_path(d->j->store, "files", d->row.training_file);
    char *validation = d->row.validation_file != NULL ? pl_jobs_path(d->j->store, "files", d->row.validation_file) : NULL;
    d->preview = json_array();
    pl_status st = pl_checks_plan(d->j, &d->spec, &d->row, training, validation, &file, &plan, &err);
    if (st == PL_OK)
        st = preview(d, training, &plan, &err);
    if (st == PL_OK) {
        pl_listing_write(&resp->body, json_pack("{s:s,s:b,s:o,s:o,s:O}", "object", "fine_tuning.validation", "valid", 1, "method",
                                                pl_train_spec_json(&plan.spec), "estimate", pl_checks_estimate(&plan), "preview", d->preview));
    } else {
        const struct pl_data_report *r = strcmp(err.param, "validation_file") == 0 ? &plan.validation : &plan.training;
        json_t *list = pl_checks_lines(r);
        char *lines = json_dumps(list, JSON_COMPACT), *more = NULL;
        if (r->n_faults > 0 && lines != NULL && asprintf(&more, ",\"n_bad_lines\":%u,\"lines\":%s", r->n_bad, lines) < 0)
            more = NULL;
        resp->status = st == PL_EIO || st == PL_ENOMEM ? 500 : 400;
        pl_apierr_fill(resp, &err, pl_checks_code(st, &err), more);
        json_decref(list);
        free(lines);
        free(more);
    }
    json_decref(d->preview);
    pl_train_plan_fini(&plan);
    pl_model_file_close(&file);
    free(training);
    free(validation);
}

static void drop_dry(void *arg)
{
    struct dry_run *d = arg;
    pl_row_fini(PL_TABLE_JOBS, &d->row);
    free(d);
}

void pl_api_jobs_validate(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    json_t *root = NULL;
    if (!pl_listing_have_jobs(req, resp))
        return;
    struct dry_run *d = pl_xcalloc(1, sizeof *d);
    d->j = req->server->jobs;
    d->n_preview = PREVIEW;
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (st == PL_OK)
        st = read_job(d->j, root, &d->row, &d->spec, &d->n_preview, &err);
    json_decref(root);
    if (st != PL_OK) {
        refuse_job(req, resp, st, &err);
        drop_dry(d);
        return;
    }
    const struct pl_task task = {run_dry, drop_dry, d};
    pl_tasks_answer(d->j->tasks, &task, req, resp);
}

/* ---- the rest ------------------------------------------------------------------------------------------------------ */

/* Answers for a job that is not there, is in another state, or could not be read. */
static void refuse(struct pl_http_req *req, struct pl_http_resp *resp, pl_status st, struct pl_err *err)
{
    if (st == PL_ENOENT) {
        (void)pl_fail_param(err, PL_ENOENT, "fine_tuning_job_id", "Could not find fine tune: %.100s", req->path_arg);
        pl_apierr_answer_as(req, resp, 404, "fine_tune_not_found", err);
    } else {
        pl_apierr_answer_as(req, resp, st == PL_EINVAL ? 400 : 500, st == PL_EINVAL ? "invalid_job_state" : NULL, err);
    }
}

/* False = answered. */
static bool find_job(struct pl_http_req *req, struct pl_http_resp *resp, struct pl_job_row *row)
{
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return false;
    const pl_status st = pl_store_get(req->server->jobs->store, PL_TABLE_JOBS, "id", req->path_arg, row, &err);
    if (st != PL_OK)
        refuse(req, resp, st, &err);
    return st == PL_OK;
}

void pl_api_jobs_get(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_job_row row;
    if (!find_job(req, resp, &row))
        return;
    pl_listing_write(&resp->body, job_json(&row));
    pl_row_fini(PL_TABLE_JOBS, &row);
}

static bool add_filter(void *arg, const char *name, const char *value)
{
    json_t *filter = arg;
    const size_t n = strlen(name);
    if (strncmp(name, "metadata[", 9) == 0 && n > 10 && name[n - 1] == ']') {
        char key[4 * MAX_KEY + 1]; /* characters */
        snprintf(key, sizeof key, "%.*s", (int)(n - 10), name + 9);
        json_object_set_new(filter, key, json_string(value));
    }
    return true;
}

void pl_api_jobs_list(struct pl_http_req *req, struct pl_http_resp *resp)
{
    static const struct pl_listing jobs = {PL_TABLE_JOBS, 20, 1000, false, false};
    struct pl_store_query q = {0};
    if (!pl_listing_query(req, resp, &jobs, &q))
        return;
    json_t *filter = json_object();
    const char *none = pl_http_query(req, "metadata");
    pl_http_query_each(req, add_filter, filter);
    char *like = none != NULL && strcmp(none, "null") == 0 ? pl_xstrdup("null") : json_object_size(filter) > 0 ? json_dumps(filter, 0) : NULL;
    q.like_column = "metadata";
    q.like = like;
    pl_listing_answer(req, resp, &jobs, &q, job_json);
    json_decref(filter);
    free(like);
}

static void list_of_job(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_listing *l, json_t *(*json)(const void *row))
{
    struct pl_job_row row;
    struct pl_store_query q = {.column = "job"};
    if (!pl_listing_query(req, resp, l, &q) || !find_job(req, resp, &row))
        return;
    q.value = row.id;
    pl_listing_answer(req, resp, l, &q, json);
    pl_row_fini(PL_TABLE_JOBS, &row);
}

void pl_api_jobs_events(struct pl_http_req *req, struct pl_http_resp *resp)
{
    static const struct pl_listing events = {PL_TABLE_EVENTS, 20, 1000, false, false};
    list_of_job(req, resp, &events, event_json);
}

void pl_api_jobs_checkpoints(struct pl_http_req *req, struct pl_http_resp *resp)
{
    static const struct pl_listing checkpoints = {PL_TABLE_CHECKPOINTS, 10, 1000, true, false};
    list_of_job(req, resp, &checkpoints, checkpoint_json);
}

static void change(struct pl_http_req *req, struct pl_http_resp *resp, pl_job_wish wish)
{
    struct pl_job_row row;
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return;
    const pl_status st = pl_jobs_change(req->server->jobs, req->path_arg, wish, &row, &err);
    if (st != PL_OK) {
        refuse(req, resp, st, &err);
        return;
    }
    pl_listing_write(&resp->body, job_json(&row));
    pl_row_fini(PL_TABLE_JOBS, &row);
}

void pl_api_jobs_cancel(struct pl_http_req *req, struct pl_http_resp *resp)
{
    change(req, resp, PL_JOB_CANCEL);
}

void pl_api_jobs_pause(struct pl_http_req *req, struct pl_http_resp *resp)
{
    change(req, resp, PL_JOB_PAUSE);
}

void pl_api_jobs_resume(struct pl_http_req *req, struct pl_http_resp *resp)
{
    change(req, resp, PL_JOB_RESUME);
}
