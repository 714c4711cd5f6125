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
    return st == PL_OK ? PL_OK : st == PL_ENOENT ? pl_registry_no_model(name, err) : pl_fail(err, st, "%s", pl_status_text(st));
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

pl_status pl_tuned_load(struct pl_jobs *j, const struct pl_job_row *row, const char *name, const char *path, struct pl_want *w, struct pl_err *err)
{
    const pl_status st = make_known(j, row, name, path, err);
    w->name = name;
    w->finished = true;
    w->status = PL_OK;
    if (st == PL_OK && pl_registry_is_of_first(j->server->models, name))
        (void)!pl_registry_want(j->server->models, w, &w->err); /* which is over if it fails */
    return st;
}

pl_status pl_tuned_loaded(struct pl_jobs *j, struct pl_want *w, struct pl_err *err)
{
    const pl_status st = w->status;
    if (st == PL_OK || st == PL_ESTOPPED || st == PL_EFULL) /* no fault of its own: it is read when it is asked for */
        return PL_OK;
    *err = w->err;
    pl_registry_remove(j->server->models, w->name);
    return st;
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

pl_status pl_tuned_delete_checkpoint(struct pl_jobs *j, const struct pl_checkpoint_row *c, struct pl_err *err)
{
    const pl_status st = pl_store_delete(j->store, PL_TABLE_CHECKPOINTS, c->seq, err);
    return st == PL_OK ? pl_store_delete_all(j->store, PL_TABLE_PERMISSIONS, "checkpoint", c->name, err) : st;
}

void pl_tuned_forget(struct pl_jobs *j, const char *name)
{
    pthread_mutex_lock(&j->serve_lock);
    pl_registry_remove(j->server->models, name);
    pthread_mutex_unlock(&j->serve_lock);
}

/* What a model's name stands for: the job that made it, and the rows that go with the name. */
struct doomed {
    struct pl_job_row job;
    struct pl_checkpoint_row *checkpoints;
    size_t n;
};

static void free_doomed(struct doomed *d)
{
    pl_rows_free(PL_TABLE_CHECKPOINTS, d->checkpoints, d->n);
    pl_row_fini(PL_TABLE_JOBS, &d->job);
}

static pl_status find_doomed(struct pl_jobs *j, const char *name, struct doomed *d, struct pl_err *err)
{
    struct pl_store_query q = {.column = "job"};
    void *rows;
    bool more;
    *d = (struct doomed){0};
    pl_status st = pl_tuned_job(j, name, &d->job, err);
    if (st == PL_OK && strcmp(d->job.name, name) == 0 && (strcmp(d->job.status, "succeeded") != 0 || d->job.deleted))
        st = PL_ENOENT;
    if (st != PL_OK)
        return st == PL_ENOENT ? pl_registry_no_model(name, err) : st;
    q.value = d->job.id;
    if (strcmp(d->job.name, name) != 0)
        q = (struct pl_store_query){.column = "name", .value = name};
    st = pl_store_list(j->store, PL_TABLE_CHECKPOINTS, &q, &rows, &d->n, &more, err);
    d->checkpoints = rows;
    return st;
}

/* The files go when the job is tidied. */
static pl_status delete_rows(struct pl_jobs *j, const char *name, struct doomed *d, struct pl_err *err)
{
    pl_status st = find_doomed(j, name, d, err);
    if (st == PL_OK && strcmp(d->job.name, name) == 0) {
        d->job.deleted = 1;
        st = pl_store_delete_all(j->store, PL_TABLE_PERMISSIONS, "checkpoint", name, err);
    }
    d->job.tidied = 0;
    if (st == PL_OK)
        st = pl_store_update(j->store, PL_TABLE_JOBS, &d->job, err);
    for (size_t i = 0; i < d->n && st == PL_OK; i++)
        st = pl_tuned_delete_checkpoint(j, &d->checkpoints[i], err);
    return st;
}

/* It answers no new request; those that run end as they would have. */
pl_status pl_tuned_delete(struct pl_jobs *j, const char *name, struct pl_err *err)
{
    struct doomed d = {0};
    pthread_mutex_lock(&j->serve_lock);
    pl_status st = pl_store_begin(j->store, err);
    if (st == PL_OK)
        st = pl_store_end(j->store, delete_rows(j, name, &d, err), err);
    if (st == PL_OK)
        pl_registry_remove(j->server->models, name);
    for (size_t i = 0; i < d.n && st == PL_OK; i++)
        pl_registry_remove(j->server->models, d.checkpoints[i].name);
    pthread_mutex_unlock(&j->serve_lock);
    if (st == PL_OK)
        pl_log_info("model %s deleted", name);
    free_doomed(&d);
    return st;
}

void pl_tuned_serve_all(struct pl_jobs *j, const atomic_bool *stop)
{
    const struct pl_store_query q = {.column = "status", .value = "succeeded"};
    struct pl_err err = {0};
    void *rows;
    size_t n, n_served = 0;
    bool more;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, &err) != PL_OK) {
        pl_log_error("%s", err.msg);
        return;
    }
    for (size_t i = 0; i < n && !atomic_load(stop); i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        if (row->deleted)
            continue;
        if (pl_tuned_serve(j, row->name, &err) == PL_OK)
            n_served++;
        else
            pl_log_warn("%s is not served: %s", row->name, err.msg);
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
    if (n_served > 0)
        pl_log_info("%zu tuned models are served", n_served);
}
