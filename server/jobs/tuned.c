/* tuned: the models that jobs made.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/tuned.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/train/job.h"
#include "server/jobs/files.h"
#include "server/server.h"

#define PL_LOG_MODULE "jobs"

static pl_status no_model(const char *name, struct pl_err *err)
{
    return pl_fail_param(err, PL_ENOENT, "model", "The model '%.200s' does not exist", name);
}

pl_status pl_tuned_path(struct pl_jobs *j, const char *name, char **path, struct pl_err *err)
{
    struct pl_job_row row;
    struct pl_checkpoint_row c;
    pl_status st = pl_store_get(j->store, PL_TABLE_JOBS, "name", name, &row, NULL);
    if (st == PL_OK && (strcmp(row.status, "succeeded") != 0 || row.deleted))
        st = PL_ENOENT;
    if (st == PL_OK) {
        char *folder = pl_jobs_folder(j, row.id);
        st = asprintf(path, "%s/result", folder) >= 0 ? PL_OK : PL_ENOMEM;
        free(folder);
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    if (st != PL_ENOENT)
        return st == PL_OK ? PL_OK : pl_fail(err, st, "%s", pl_status_text(st));
    st = pl_store_get(j->store, PL_TABLE_CHECKPOINTS, "name", name, &c, NULL);
    if (st == PL_OK) {
        char *folder = pl_jobs_folder(j, c.job);
        st = asprintf(path, "%s/%s", folder, c.path) >= 0 ? PL_OK : PL_ENOMEM;
        free(folder);
    }
    pl_row_fini(PL_TABLE_CHECKPOINTS, &c);
    return st == PL_OK ? PL_OK : st == PL_ENOENT ? no_model(name, err) : pl_fail(err, st, "%s", pl_status_text(st));
}

pl_status pl_tuned_job(struct pl_jobs *j, const char *name, struct pl_job_row *row, struct pl_err *err)
{
    struct pl_checkpoint_row c;
    pl_status st = pl_store_get(j->store, PL_TABLE_JOBS, "name", name, row, err);
    if (st != PL_ENOENT)
        return st;
    st = pl_store_get(j->store, PL_TABLE_CHECKPOINTS, "name", name, &c, err);
    if (st == PL_OK)
        st = pl_store_get(j->store, PL_TABLE_JOBS, "id", c.job, row, err);
    pl_row_fini(PL_TABLE_CHECKPOINTS, &c);
    return st;
}

/* The template that the job was trained with, NULL = the model's own; free(). */
static char *template_of(struct pl_jobs *j, const struct pl_job_row *row)
{
    struct pl_train_job job = {0};
    struct pl_err none;
    char *folder = pl_jobs_folder(j, row->id), *template = NULL;
    if (pl_train_job_read(&job, folder, &none) == PL_OK && job.chat_template != NULL)
        template = pl_xstrdup(job.chat_template);
    pl_train_job_fini(&job);
    free(folder);
    return template;
}

/* The whole model under what the job began from, by the name that it had; free(). Adapters of one model all have its id. */
static char *base_name(struct pl_jobs *j, const struct pl_job_row *row)
{
    char *name = pl_xstrdup(row->model);
    bool adapter = row->base_id != NULL;
    while (adapter) {
        struct pl_job_row of;
        adapter = pl_tuned_job(j, name, &of, NULL) == PL_OK && of.base_id != NULL && strcmp(of.base_id, row->base_id) == 0;
        if (adapter) {
            free(name);
            name = pl_xstrdup(of.model);
        }
        pl_row_fini(PL_TABLE_JOBS, &of);
    }
    return name;
}

static bool is_from_nothing(const struct pl_job_row *row)
{
    struct pl_train_spec spec;
    json_t *method = json_loads(row->method, 0, NULL);
    const bool scratch = pl_train_spec_read(&spec, method, NULL, NULL) == PL_OK && spec.scratch;
    json_decref(method);
    return scratch;
}

/* Without reading it. */
static pl_status make_known(struct pl_jobs *j, const struct pl_job_row *row, const char *name, const char *path, struct pl_err *err)
{
    struct pl_registry *models = j->server->models;
    char *whole = NULL, *own = pl_jobs_own_base(j, row), *template = template_of(j, row), *under = base_name(j, row);
    pl_status st = asprintf(&whole, "%s/model.gguf", path) >= 0 ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
    if (st == PL_OK && access(whole, R_OK) == 0)
        st = pl_registry_add_model(models, name, whole, template, is_from_nothing(row) ? NULL : row->model, err);
    else if (st == PL_OK)
        st = pl_registry_add_adapter(models, name, path, row->base_id, under, own, template, err);
    if (st == PL_ENOENT)
        st = pl_fail_param(err, PL_ENOTSUP, "model", "it is an adapter of another model than those that this daemon has now: start parleyd with that one "
                           "as --model or --add-model again");
    free(whole);
    free(own);
    free(template);
    free(under);
    return st;
}

/* What is known and belongs to the first model is read at once; when that fails, it is known no more. */
static pl_status read_now(struct pl_jobs *j, const char *name, struct pl_err *err)
{
    struct pl_registry *models = j->server->models;
    struct pl_target t = {0};
    if (!pl_registry_is_of_first(models, name))
        return PL_OK;
    const pl_status st = pl_registry_fetch(models, name, &t, err);
    pl_registry_release(models, &t);
    if (st != PL_OK)
        pl_registry_remove(models, name);
    return st;
}

pl_status pl_tuned_load(struct pl_jobs *j, const struct pl_job_row *row, const char *name, const char *path, struct pl_err *err)
{
    const pl_status st = make_known(j, row, name, path, err);
    return st == PL_OK ? read_now(j, name, err) : st;
}

pl_status pl_tuned_serve(struct pl_jobs *j, const char *name, struct pl_err *err)
{
    struct pl_job_row row = {0};
    char *path = NULL;
    pthread_mutex_lock(&j->serve_lock);
    pl_status st = pl_tuned_path(j, name, &path, err);
    if (st == PL_OK)
        st = pl_tuned_job(j, name, &row, err);
    if (st == PL_OK)
        st = make_known(j, &row, name, path, err);
    pthread_mutex_unlock(&j->serve_lock);
    pl_row_fini(PL_TABLE_JOBS, &row);
    free(path);
    return st;
}

static pl_status delete_checkpoints(struct pl_jobs *j, const char *job, const char *folder, struct pl_err *err)
{
    const struct pl_store_query q = {.column = "job", .value = job};
    void *rows;
    size_t n;
    bool more;
    pl_status st = pl_store_list(j->store, PL_TABLE_CHECKPOINTS, &q, &rows, &n, &more, err);
    if (st != PL_OK)
        return st;
    for (size_t i = 0; i < n && st == PL_OK; i++) {
        const struct pl_checkpoint_row *c = (const struct pl_checkpoint_row *)rows + i;
        char *path = NULL;
        st = pl_store_delete(j->store, PL_TABLE_CHECKPOINTS, c->seq, err);
        if (st == PL_OK)
            pl_registry_remove(j->server->models, c->name);
        if (st == PL_OK && asprintf(&path, "%s/%s", folder, c->path) >= 0)
            pl_files_remove_tree(path);
        free(path);
    }
    pl_rows_free(PL_TABLE_CHECKPOINTS, rows, n);
    return st;
}

static pl_status forget_model(struct pl_jobs *j, const char *name, char **path, struct pl_err *err)
{
    struct pl_job_row row;
    struct pl_checkpoint_row c;
    pl_status st = pl_tuned_path(j, name, path, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(j->store, PL_TABLE_JOBS, "name", name, &row, err);
    if (st == PL_OK) {
        char *folder = pl_jobs_folder(j, row.id);
        row.deleted = 1;
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
        if (st == PL_OK)
            st = delete_checkpoints(j, row.id, folder, err);
        free(folder);
    } else if (st == PL_ENOENT && (st = pl_store_get(j->store, PL_TABLE_CHECKPOINTS, "name", name, &c, err)) == PL_OK) {
        st = pl_store_delete(j->store, PL_TABLE_CHECKPOINTS, c.seq, err);
        pl_row_fini(PL_TABLE_CHECKPOINTS, &c);
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    return st;
}

/* It answers no new request; those that run end as they would have. */
pl_status pl_tuned_delete(struct pl_jobs *j, const char *name, struct pl_err *err)
{
    char *path = NULL;
    pthread_mutex_lock(&j->serve_lock);
    const pl_status st = forget_model(j, name, &path, err);
    if (st == PL_OK)
        pl_registry_remove(j->server->models, name);
    pthread_mutex_unlock(&j->serve_lock);
    if (st == PL_OK) {
        pl_files_remove_tree(path);
        pl_log_info("model %s deleted", name);
    }
    free(path);
    return st;
}
void pl_tuned_serve_all(struct pl_jobs *j)
{
    const struct pl_store_query q = {.column = "status", .value = "succeeded"};
    struct pl_err err = {0};
    void *rows;
    size_t n, n_loaded = 0;
    bool more;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, &err) != PL_OK) {
        pl_log_error("%s", err.msg);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        if (row->deleted)
            continue;
        pl_status st = pl_tuned_serve(j, row->name, &err);
        if (st == PL_OK)
            st = read_now(j, row->name, &err);
        if (st == PL_OK)
            n_loaded++;
        else
            pl_log_warn("%s is not served: %s", row->name, err.msg);
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
    if (n_loaded > 0)
        pl_log_info("%zu tuned models are served", n_loaded);
}
