/* jobs: everything behind the Files and fine-tuning routes: opening and ending, a job's birth, its checks, and what clients ask of it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/jobs.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/machine.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/base/pool.h"
#include "core/base/utf8.h"
#include "core/train/general.h"
#include "core/train/job.h"
#include "server/jobs/files.h"
#include "server/jobs/supervisor.h"
#include "server/server.h"

#define PL_LOG_MODULE "jobs"

char *pl_jobs_folder(struct pl_jobs *j, const char *id)
{
    return pl_jobs_path(j->store, "jobs", id);
}

void pl_jobs_poke(struct pl_jobs *j)
{
    struct pl_supervisor *s = j->supervisor;
    if (s != NULL)
        pl_supervisor_poke(s);
}

void pl_jobs_make_utf8(char *s)
{
    const size_t n = strlen(s);
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        const int len = pl_utf8_decode(s + i, n - i, &cp);
        if (len == 0) {
            s[i] = '\0'; /* a character that was cut */
            return;
        }
        if (len < 0)
            s[i] = '?';
        i += len > 0 ? (size_t)len : 1;
    }
}

pl_status pl_jobs_event(struct pl_jobs *j, const char *job, const char *level, const char *type, const char *data, int64_t at, struct pl_err *err,
                        const char *fmt, ...)
{
    struct pl_event_row e = {.created_at = time(NULL), .at = at};
    char id[PL_ID_MAX], message[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    pl_jobs_make_utf8(message);
    pl_store_new_id(id, "ftevent-");
    pl_row_set(&e.id, id);
    pl_row_set(&e.job, job);
    pl_row_set(&e.level, level);
    pl_row_set(&e.type, type);
    pl_row_set(&e.message, message);
    pl_row_set(&e.data, data);
    const pl_status st = pl_store_insert(j->store, PL_TABLE_EVENTS, &e, err);
    pl_row_fini(PL_TABLE_EVENTS, &e);
    return st;
}

/* ---- a job's birth ------------------------------------------------------------------------------------------------- */

static pl_status link_file(struct pl_jobs *j, const char *file, const char *folder, const char *name, struct pl_err *err)
{
    char *from = pl_jobs_path(j->store, "files", file), *to = NULL;
    const pl_status st = asprintf(&to, "%s/%s", folder, name) >= 0 ? pl_files_link(from, to, err) : pl_fail(err, PL_ENOMEM, "out of memory");
    free(from);
    free(to);
    return st;
}

static pl_status link_into(const char *from_dir, const char *from_name, const char *to_dir, const char *to_name, struct pl_err *err)
{
    char *from = NULL, *to = NULL;
    const pl_status st = asprintf(&from, "%s%s%s", from_dir, from_name != NULL ? "/" : "", from_name != NULL ? from_name : "") < 0 ||
                                 asprintf(&to, "%s/%s", to_dir, to_name) < 0
                             ? pl_fail(err, PL_ENOMEM, "out of memory")
                         : access(from, F_OK) != 0 ? PL_ENOENT
                                                   : pl_files_link(from, to, err);
    free(from);
    free(to);
    return st;
}

/* What this job goes on from, as links in FOLDER/base, so that it may be deleted: a whole model that a job made, and the adapter on it. Sets
 * row->base_adapter to the folder, or to the model when there is no adapter. */
static pl_status link_base(struct pl_jobs *j, struct pl_job_row *row, const char *folder, struct pl_err *err)
{
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors"};
    struct pl_base base;
    char *dir = NULL, *source = row->base_adapter;
    size_t n_linked = 0;
    pl_status st = pl_jobs_base(j, row, &base, err);
    if (st != PL_OK)
        return st;
    if (source == NULL && !base.made)
        goto out;
    if (asprintf(&dir, "%s/base", folder) < 0) {
        st = pl_fail(err, PL_ENOMEM, "out of memory");
        goto out;
    }
    st = mkdir(dir, 0700) == 0 ? PL_OK : pl_fail(err, pl_status_of_errno(errno), "cannot make %s: %s", dir, strerror(errno));
    if (st == PL_OK && base.made && (st = link_into(base.path, NULL, dir, "model.gguf", err)) == PL_OK)
        n_linked += source == NULL;
    for (size_t i = 0; i < PL_COUNT_OF(names) && st == PL_OK && source != NULL; i++) {
        st = link_into(source, names[i], dir, names[i], err);
        n_linked += st == PL_OK;
        st = st == PL_ENOENT ? PL_OK : st;
    }
    if (st == PL_OK)
        st = pl_sync_folder(dir, err);
    if (st == PL_ENOENT || (st == PL_OK && n_linked == 0))
        st = pl_fail_param(err, PL_EINVAL, "model", "the model '%.200s' has no files to go on from", row->model);
    row->base_adapter = NULL;
    if (st == PL_OK && asprintf(&row->base_adapter, "%s%s", dir, source != NULL ? "" : "/model.gguf") < 0)
        st = pl_fail(err, PL_ENOMEM, "out of memory");
    free(source);
out:
    free(dir);
    pl_base_fini(&base);
    return st;
}

static pl_status insert_job(struct pl_jobs *j, struct pl_job_row *row, struct pl_err *err)
{
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_insert(j->store, PL_TABLE_JOBS, row, err);
    if (st == PL_OK)
        st = pl_jobs_event(j, row->id, "info", "message", NULL, -1, err, "Created fine-tuning job: %s", row->id);
    if (st == PL_OK)
        st = pl_jobs_event(j, row->id, "info", "message", NULL, -1, err, "Validating training file: %s", row->training_file);
    return pl_store_end(j->store, st, err);
}

pl_status pl_jobs_create(struct pl_jobs *j, struct pl_job_row *row, struct pl_err *err)
{
    char *folder = pl_jobs_folder(j, row->id), *parent = pl_jobs_path(j->store, "jobs", "");
    row->created_at = time(NULL);
    pl_row_set(&row->status, "validating_files");
    pl_status st = mkdir(folder, 0700) == 0 ? PL_OK : pl_fail(err, pl_status_of_errno(errno), "cannot make %s: %s", folder, strerror(errno));
    if (st == PL_OK)
        st = link_file(j, row->training_file, folder, "training.jsonl", err);
    if (st == PL_OK && row->validation_file != NULL)
        st = link_file(j, row->validation_file, folder, "validation.jsonl", err);
    if (st == PL_OK)
        st = link_base(j, row, folder, err);
    if (st == PL_OK)
        st = pl_sync_folder(folder, err);
    if (st == PL_OK)
        st = pl_sync_folder(parent, err);
    if (st == PL_OK)
        st = insert_job(j, row, err);
    if (st != PL_OK)
        pl_files_remove_tree(folder);
    free(folder);
    free(parent);
    return st;
}

/* ---- checks -------------------------------------------------------------------------------------------------------- */

/* FOLDER/base/model.gguf, when the job has a base of its own; free(). */
static char *own_base(struct pl_jobs *j, const struct pl_job_row *row)
{
    char *folder = row->id != NULL ? pl_jobs_folder(j, row->id) : NULL, *path = NULL;
    if (folder != NULL && asprintf(&path, "%s/base/model.gguf", folder) < 0)
        path = NULL;
    if (path != NULL && access(path, R_OK) != 0) {
        free(path);
        path = NULL;
    }
    free(folder);
    return path;
}

pl_status pl_jobs_base(struct pl_jobs *j, const struct pl_job_row *row, struct pl_base *base, struct pl_err *err)
{
    char *own = own_base(j, row);
    pl_status st = pl_registry_base(j->server->models, row->base_id, row->base_id != NULL ? row->model : NULL, base, err);
    if (own == NULL)
        return st;
    if (st != PL_OK) { /* it was deleted */
        const char *template = j->server->config->chat_template;
        *base = (struct pl_base){.name = pl_xstrdup(row->model), .template = template[0] != '\0' ? pl_xstrdup(template) : NULL, .made = true};
    }
    free(base->path);
    base->path = own;
    return pl_train_base_id(own, base->id, err);
}

uint64_t pl_jobs_memory(const struct pl_jobs *j)
{
    const int mb = j->server->config->train_memory_mb;
    return mb > 0 ? (uint64_t)mb << 20 : pl_machine_memory();
}

pl_status pl_jobs_plan(struct pl_jobs *j, const struct pl_train_spec *method, const struct pl_job_row *row, const char *training, const char *validation,
                       struct pl_model_file *file, struct pl_train_plan *plan, struct pl_err *err)
{
    const int set = j->server->config->train_threads;
    struct pl_base base;
    *file = (struct pl_model_file){0};
    pl_status st = pl_jobs_base(j, row, &base, err);
    if (st == PL_OK && !method->scratch)
        st = pl_model_file_open(file, base.path, base.template, err);
    const struct pl_train_base from = {
        .path = base.path, .tok = file->tok, .chat = file->chat, .spec = &file->spec, .n_ctx = file->spec.n_ctx, .n_params = file->n_params,
        .n_file = file->n_bytes, .stop = pl_tasks_stopping(j->tasks),
    };
    if (st == PL_OK)
        st = pl_train_plan(plan, method, training, validation, &from, set > 0 ? (unsigned)set : (pl_pool_cpus() + 1) / 2, pl_jobs_memory(j), err);
    plan->base.path = NULL; /* it goes */
    pl_base_fini(&base);
    return st;
}

json_t *pl_jobs_estimate(const struct pl_train_plan *p)
{
    /* What a processor of today does in products of this kind; a running job's estimated_finish is measured. */
    const double flops_per_thread = p->spec.precision == PL_PRECISION_BF16 ? 200e9 : 60e9;
    json_t *e = json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "examples", (json_int_t)p->training.n_examples, "validation_examples",
                     (json_int_t)p->validation.n_examples, "tokens", (json_int_t)p->training.n_tokens, "loss_tokens", (json_int_t)p->training.n_loss_tokens,
                     "cut_examples", (json_int_t)p->training.n_cut, "total_steps", (json_int_t)p->total_steps, "trained_tokens",
                     (json_int_t)p->trained_tokens, "trained_parameters", (json_int_t)p->n_trained_params, "memory_bytes", (json_int_t)p->memory, "seconds",
                     (json_int_t)(p->flops / (flops_per_thread * p->spec.threads)) + 1);
    if (p->spec.scratch)
        json_object_set_new(e, "tokenizer_bytes", json_integer((json_int_t)p->scratch.tokenizer_bytes));
    return e;
}

json_t *pl_jobs_lines(const struct pl_data_report *r)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < r->n_faults; i++) {
        const struct pl_data_fault *f = &r->faults[i];
        struct pl_buf reason; /* may end in the middle of a character */
        pl_buf_init(&reason, 0);
        pl_buf_adds(&reason, "\"");
        pl_buf_add_json_lossy(&reason, f->reason, strlen(f->reason));
        pl_buf_adds(&reason, "\"");
        json_t *message = f->message >= 0 ? json_integer(f->message + 1) : json_null();
        json_array_append_new(list, json_pack("{s:I,s:o,s:o}", "line", (json_int_t)f->line, "message", message, "reason",
                                              json_loadb(reason.data, reason.len, JSON_DECODE_ANY, NULL)));
        pl_buf_fini(&reason);
    }
    return list;
}

const char *pl_jobs_code(pl_status st, const struct pl_err *err)
{
    const bool validation = strcmp(err->param, "validation_file") == 0, training = strcmp(err->param, "training_file") == 0;
    if (st == PL_ERANGE && (training || validation))
        return "invalid_n_examples";
    if (training)
        return "invalid_training_file";
    if (validation)
        return "invalid_validation_file";
    return st == PL_EINVAL ? "invalid_hyperparameters" : "server_error";
}

struct validation {
    struct pl_jobs *j;
    char id[PL_ID_MAX];
};

static pl_status plan_row(struct pl_jobs *j, const struct pl_job_row *row, struct pl_train_plan *plan, struct pl_err *err)
{
    struct pl_train_spec asked;
    struct pl_model_file file = {0};
    char *folder = pl_jobs_folder(j, row->id), *training = NULL, *validation = NULL;
    json_t *method = json_loads(row->method, 0, NULL);
    *plan = (struct pl_train_plan){0};
    pl_status st = pl_train_spec_read(&asked, method, NULL, err);
    if (st == PL_OK && (asprintf(&training, "%s/training.jsonl", folder) < 0 || asprintf(&validation, "%s/validation.jsonl", folder) < 0))
        st = pl_fail(err, PL_ENOMEM, "out of memory");
    if (st == PL_OK)
        st = pl_jobs_plan(j, &asked, row, training, row->validation_file != NULL ? validation : NULL, &file, plan, err);
    pl_model_file_close(&file); /* the caller asks for numbers only */
    json_decref(method);
    free(folder);
    free(training);
    free(validation);
    return st;
}

static void set_faults(struct pl_job_row *row, pl_status st, const struct pl_train_plan *plan, const struct pl_err *why)
{
    const struct pl_data_report *r = strcmp(why->param, "validation_file") == 0 ? &plan->validation : &plan->training;
    const bool files = strcmp(why->param, "training_file") == 0 || strcmp(why->param, "validation_file") == 0;
    struct pl_buf message;
    pl_buf_init(&message, 0);
    pl_buf_adds(&message, "\"");
    if (st == PL_EFORMAT && files)
        pl_buf_addf(&message, "The job failed due to an invalid %s file. ", strcmp(why->param, "validation_file") == 0 ? "validation" : "training");
    pl_buf_add_json_lossy(&message, why->msg, strlen(why->msg));
    pl_buf_adds(&message, "\"");
    json_t *e = json_pack("{s:s,s:o,s:s?}", "code", pl_jobs_code(st, why), "message", json_loadb(message.data, message.len, JSON_DECODE_ANY, NULL), "param",
                          why->param[0] != '\0' ? why->param : NULL);
    if (r->n_faults > 0) {
        json_object_set_new(e, "n_bad_lines", json_integer(r->n_bad));
        json_object_set_new(e, "lines", pl_jobs_lines(r));
    }
    char *text = json_dumps(e, JSON_COMPACT);
    pl_row_set(&row->error, text);
    free(text);
    json_decref(e);
    pl_buf_fini(&message);
}

/* What the checks found goes into the row as it is now; a client may have cancelled or paused the job meanwhile. */
static pl_status record(struct pl_jobs *j, const char *id, pl_status checked, const struct pl_train_plan *plan, const struct pl_err *why, struct pl_err *err)
{
    struct pl_job_row row;
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(j->store, PL_TABLE_JOBS, "id", id, &row, err);
    const bool waiting = st == PL_OK && (strcmp(row.status, "validating_files") == 0 || strcmp(row.status, "paused") == 0);
    if (st == PL_OK && waiting && checked == PL_OK) {
        json_t *method = pl_train_spec_json(&plan->spec), *estimate = pl_jobs_estimate(plan);
        char *text = json_dumps(method, JSON_COMPACT), *data = json_dumps(estimate, JSON_COMPACT);
        row.validated = 1;
        row.total_steps = plan->total_steps;
        pl_row_set(&row.method, text);
        if (strcmp(row.status, "validating_files") == 0)
            pl_row_set(&row.status, "queued");
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
        if (st == PL_OK)
            st = pl_jobs_event(j, id, "info", "message", data, -1, err, "Files validated, moving job to queued state");
        free(text);
        free(data);
        json_decref(method);
        json_decref(estimate);
    } else if (st == PL_OK && waiting) {
        set_faults(&row, checked, plan, why);
        pl_row_set(&row.status, "failed");
        row.finished_at = time(NULL);
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
        if (st == PL_OK)
            st = pl_jobs_event(j, id, "error", "message", NULL, -1, err, "The job failed: %s", why->msg);
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    return pl_store_end(j->store, st, err);
}

static void validate(void *arg, struct pl_http_resp *resp)
{
    struct validation *v = arg;
    struct pl_job_row row;
    struct pl_train_plan plan = {0};
    struct pl_err why = {0}, err = {0};
    (void)resp;
    if (pl_store_get(v->j->store, PL_TABLE_JOBS, "id", v->id, &row, &err) == PL_OK && strcmp(row.status, "validating_files") == 0) {
        if (!pl_jobs_has_base(v->j, &row)) {
            if (pl_jobs_park(v->j, v->id, &err) == PL_OK)
                pl_log_warn("%s was made for another model", v->id);
            goto out;
        }
        const pl_status checked = plan_row(v->j, &row, &plan, &why);
        if (checked != PL_ESTOPPED /* made anew by the next daemon */ && record(v->j, v->id, checked, &plan, &why, &err) == PL_OK)
            pl_log_info("%s %s%s", v->id, checked == PL_OK ? "queued" : "failed: ", checked == PL_OK ? "" : why.msg);
        pl_train_plan_fini(&plan);
    }
out:
    if (err.msg[0] != '\0')
        pl_log_error("%s: %s", v->id, err.msg);
    pl_row_fini(PL_TABLE_JOBS, &row);
    pl_jobs_poke(v->j);
}

static void drop_validation(void *arg)
{
    struct validation *v = arg;
    atomic_fetch_sub(&v->j->n_checks, 1);
    free(v);
}

void pl_jobs_validate_later(struct pl_jobs *j, const struct pl_job_row *row)
{
    struct pl_err err = {0};
    struct validation *v = pl_xcalloc(1, sizeof *v);
    v->j = j;
    snprintf(v->id, sizeof v->id, "%s", row->id);
    atomic_fetch_add(&j->n_checks, 1);
    const struct pl_task task = {validate, drop_validation, v};
    if (pl_tasks_add(j->tasks, &task, &err) != PL_OK)
        pl_log_debug("%s: %s", row->id, err.msg);
}

void pl_jobs_validate_waiting(struct pl_jobs *j)
{
    const struct pl_store_query q = {.column = "status", .value = "validating_files", .ascending = true, .limit = PL_TASKS_WAITING};
    struct pl_err err = {0};
    void *rows;
    size_t n;
    bool more;
    if (atomic_load(&j->n_checks) > 0)
        return;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, &err) != PL_OK) {
        pl_log_error("%s", err.msg);
        return;
    }
    for (size_t i = 0; i < n; i++)
        pl_jobs_validate_later(j, (const struct pl_job_row *)rows + i);
    pl_rows_free(PL_TABLE_JOBS, rows, n);
}

/* ---- changes of state ---------------------------------------------------------------------------------------------- */

static bool is_one_of(const char *status, const char *words)
{
    const size_t n = strlen(status);
    for (const char *w = words; w != NULL; w = strchr(w, '|') != NULL ? strchr(w, '|') + 1 : NULL)
        if (strncmp(w, status, n) == 0 && (w[n] == '|' || w[n] == '\0'))
            return true;
    return false;
}

pl_status pl_jobs_change(struct pl_jobs *j, const char *id, pl_job_wish wish, struct pl_job_row *row, struct pl_err *err)
{
    static const struct {
        const char *from, *to, *verb, *level, *event;
    } changes[] = {
        [PL_JOB_CANCEL] = {"validating_files|queued|running|paused", "cancelled", "cancelled", "warn", "Fine tuning process stopping due to job cancellation"},
        [PL_JOB_PAUSE] = {"validating_files|queued|running", "paused", "paused", "info", "The job was paused"},
        [PL_JOB_RESUME] = {"paused", "queued", "resumed", "info", "The job was resumed"},
    };
    bool again = false;
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(j->store, PL_TABLE_JOBS, "id", id, row, err);
    if (st == PL_OK && !is_one_of(row->status, changes[wish].from))
        st = pl_fail(err, PL_EINVAL, "Job %s is %s and cannot be %s", id, row->status, changes[wish].verb);
    if (st == PL_OK) {
        again = wish == PL_JOB_RESUME && !row->validated;
        pl_row_set(&row->status, again ? "validating_files" : changes[wish].to);
        row->estimated_finish = 0;
        if (wish == PL_JOB_CANCEL)
            row->finished_at = time(NULL);
        if (wish == PL_JOB_RESUME)
            row->crashes = 0;
        st = pl_store_update(j->store, PL_TABLE_JOBS, row, err);
    }
    if (st == PL_OK)
        st = pl_jobs_event(j, id, changes[wish].level, "message", NULL, -1, err, "%s", changes[wish].event);
    st = pl_store_end(j->store, st, err);
    if (st == PL_OK && again)
        pl_jobs_validate_later(j, row);
    if (st == PL_OK)
        pl_log_info("%s %s", id, changes[wish].verb);
    else
        pl_row_fini(PL_TABLE_JOBS, row);
    pl_jobs_poke(j);
    return st;
}

bool pl_jobs_has_base(struct pl_jobs *j, const struct pl_job_row *row)
{
    struct pl_base base;
    const pl_status st = pl_jobs_base(j, row, &base, NULL);
    pl_base_fini(&base);
    return st == PL_OK;
}

pl_status pl_jobs_park(struct pl_jobs *j, const char *id, struct pl_err *err)
{
    struct pl_job_row row;
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(j->store, PL_TABLE_JOBS, "id", id, &row, err);
    if (st == PL_OK && is_one_of(row.status, "validating_files|queued") && !row.alive) {
        pl_row_set(&row.status, "paused");
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
        if (st == PL_OK)
            st = pl_jobs_event(j, id, "warn", "message", NULL, -1, err, "The job was paused: it was made for another model than those that this daemon "
                               "has now; resume it when parleyd runs with that model again");
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    return pl_store_end(j->store, st, err);
}

/* ---- tuned models -------------------------------------------------------------------------------------------------- */

static pl_status no_model(const char *name, struct pl_err *err)
{
    return pl_fail_param(err, PL_ENOENT, "model", "The model '%.200s' does not exist", name);
}

pl_status pl_jobs_model_path(struct pl_jobs *j, const char *name, char **path, struct pl_err *err)
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

pl_status pl_jobs_of_model(struct pl_jobs *j, const char *name, struct pl_job_row *row, struct pl_err *err)
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
        adapter = pl_jobs_of_model(j, name, &of, NULL) == PL_OK && of.base_id != NULL && strcmp(of.base_id, row->base_id) == 0;
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
    char *whole = NULL, *own = own_base(j, row), *template = template_of(j, row), *under = base_name(j, row);
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

pl_status pl_jobs_load(struct pl_jobs *j, const struct pl_job_row *row, const char *name, const char *path, struct pl_err *err)
{
    const pl_status st = make_known(j, row, name, path, err);
    return st == PL_OK ? read_now(j, name, err) : st;
}

pl_status pl_jobs_serve(struct pl_jobs *j, const char *name, struct pl_err *err)
{
    struct pl_job_row row = {0};
    char *path = NULL;
    pthread_mutex_lock(&j->serve_lock);
    pl_status st = pl_jobs_model_path(j, name, &path, err);
    if (st == PL_OK)
        st = pl_jobs_of_model(j, name, &row, err);
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
    pl_status st = pl_jobs_model_path(j, name, path, err);
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
pl_status pl_jobs_delete_model(struct pl_jobs *j, const char *name, struct pl_err *err)
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

/* ---- opening and ending -------------------------------------------------------------------------------------------- */

/* Folders of jobs that were never promised to anybody. */
static void sweep_jobs(struct pl_jobs *j)
{
    char *path = pl_jobs_path(j->store, "jobs", "");
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        struct pl_job_row row;
        if (!pl_store_is_id(e->d_name, "ftjob-")) /* somebody else's */
            continue;
        const pl_status st = pl_store_get(j->store, PL_TABLE_JOBS, "id", e->d_name, &row, NULL);
        pl_row_fini(PL_TABLE_JOBS, &row);
        if (st != PL_ENOENT)
            continue;
        char *folder = pl_jobs_folder(j, e->d_name);
        pl_log_info("removing jobs/%s, which was left unfinished", e->d_name);
        pl_files_remove_tree(folder);
        free(folder);
    }
    if (d != NULL)
        closedir(d);
    free(path);
}

/* Rather said at start than by every job. */
static pl_status check_general_text(const char *path, struct pl_err *err)
{
    char *text = NULL;
    size_t n;
    if (path[0] == '\0')
        return PL_OK;
    const pl_status st = pl_general_read(&text, &n, path, err);
    free(text);
    if (st != PL_OK)
        snprintf(err->param, sizeof err->param, "train-general-text");
    return st;
}

pl_status pl_jobs_open(struct pl_jobs **out, struct pl_server *s, struct pl_err *err)
{
    struct pl_jobs *j = pl_xcalloc(1, sizeof *j);
    char *dir = pl_config_data_dir(s->config);
    j->server = s;
    pthread_mutex_init(&j->serve_lock, NULL);
    pl_status st = dir != NULL ? pl_store_open(&j->store, dir, err)
                               : pl_fail_param(err, PL_EINVAL, "data-dir", "there is no place for files and jobs: name one with --data-dir");
    if (st == PL_OK)
        st = check_general_text(s->config->train_general_text, err);
    if (st == PL_OK)
        st = pl_tasks_start(&j->tasks, err);
    free(dir);
    if (st != PL_OK) {
        pl_jobs_close(j);
        return st;
    }
    pl_files_sweep(j->store); /* before anybody can make new ones */
    sweep_jobs(j);
    *out = j;
    return PL_OK;
}

/* Tuned models of former days are served again; checkpoints when somebody asks for them. */
static void serve_all(struct pl_jobs *j)
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
        pl_status st = pl_jobs_serve(j, row->name, &err);
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

pl_status pl_jobs_start(struct pl_jobs *j, struct pl_err *err)
{
    cpu_set_t cpus;
    serve_all(j);
    if (sched_getaffinity(getpid(), sizeof cpus, &cpus) != 0) /* of the main thread, which is tied to no processor */
        memset(&cpus, 0xff, sizeof cpus);
    struct pl_supervisor *supervisor;
    const pl_status st = pl_supervisor_start(&supervisor, j, &cpus, err);
    if (st == PL_OK)
        j->supervisor = supervisor;
    return st;
}

void pl_jobs_stop(struct pl_jobs *j, unsigned seconds)
{
    if (j == NULL)
        return;
    pl_supervisor_stop(j->supervisor, seconds);
}

void pl_jobs_close(struct pl_jobs *j)
{
    if (j == NULL)
        return;
    pl_supervisor_stop(j->supervisor, 0);
    pl_tasks_stop(j->tasks);
    pl_supervisor_free(j->supervisor);
    pl_store_close(j->store);
    pthread_mutex_destroy(&j->serve_lock);
    free(j);
}

void pl_jobs_render_metrics(struct pl_jobs *j, struct pl_buf *out)
{
    static const char *const states[] = {"validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"};
    uint64_t bytes, n;
    struct pl_supervisor *supervisor = j->supervisor;
    pl_store_usage(j->store, PL_TABLE_FILES, &bytes, &n);
    pl_buf_adds(out, "# HELP parley_jobs Fine-tuning jobs by state.\n# TYPE parley_jobs gauge\n");
    for (size_t i = 0; i < PL_COUNT_OF(states); i++)
        pl_buf_addf(out, "parley_jobs{status=\"%s\"} %llu\n", states[i], (unsigned long long)pl_store_count(j->store, PL_TABLE_JOBS, "status", states[i]));
    pl_buf_addf(out,
                "# HELP parley_files Uploaded files and results.\n# TYPE parley_files gauge\nparley_files %llu\n"
                "# HELP parley_files_bytes Bytes of all files.\n# TYPE parley_files_bytes gauge\nparley_files_bytes %llu\n"
                "# HELP parley_job_restarts_total Workers started again after a crash.\n# TYPE parley_job_restarts_total counter\n"
                "parley_job_restarts_total %llu\n",
                (unsigned long long)n, (unsigned long long)bytes,
                (unsigned long long)(supervisor != NULL ? pl_supervisor_restarts(supervisor) : 0));
}
