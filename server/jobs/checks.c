/* checks: a new job's files against its model.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/checks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "server/jobs/share.h"
#include "server/server.h"

#define PL_LOG_MODULE "jobs"

static pl_status open_model(struct pl_model_file *file, const struct pl_base *base, struct pl_err *err)
{
    const pl_status st = pl_model_file_open(file, base->path, base->template, "chat-template", err);
    if (st != PL_OK && st != PL_ENOMEM && err->param[0] == '\0')
        strcpy(err->param, "model");
    return st;
}

pl_status pl_checks_plan(struct pl_jobs *j, const struct pl_train_spec *method, const struct pl_job_row *row, const char *training, const char *validation,
                       struct pl_model_file *file, struct pl_train_plan *plan, struct pl_err *err)
{
    struct pl_base base;
    *file = (struct pl_model_file){0};
    pl_status st = pl_jobs_base(j, row, &base, err);
    if (st == PL_OK && !method->scratch)
        st = open_model(file, &base, err);
    struct pl_train_base from = pl_train_base_of(file, base.path);
    from.stop = pl_tasks_stopping(j->tasks);
    const bool gpu = pl_jobs_on_gpu(j);
    const uint64_t available = pl_jobs_memory(j);
    const struct pl_train_place place = {.n_threads = pl_share_threads(j->server->config->train_threads), .available = available, .gpu = gpu,
                                         .room = gpu ? 0 : available, /* the worker asks the GPU */
                                         .bf16 = gpu || pl_train_has_bf16()};
    if (st == PL_OK)
        st = pl_train_plan(plan, method, training, validation, &from, &place, err);
    plan->base.path = NULL; /* it goes */
    pl_base_fini(&base);
    return st;
}

json_t *pl_checks_estimate(const struct pl_train_plan *p)
{
    /* What a processor's thread, or a GPU, of today does in products of this kind; a running job's estimated_finish is measured. */
    const bool bf16 = p->spec.precision == PL_PRECISION_BF16;
    const double flops = p->place.gpu ? (bf16 ? 30e12 : 8e12) : (bf16 ? 200e9 : 60e9) * p->spec.threads;
    json_t *e = json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "examples", (json_int_t)p->training.n_examples, "validation_examples",
                     (json_int_t)p->validation.n_examples, "tokens", (json_int_t)p->training.n_tokens, "loss_tokens", (json_int_t)p->training.n_loss_tokens,
                     "cut_examples", (json_int_t)p->training.n_cut, "total_steps", (json_int_t)p->total_steps, "trained_tokens",
                     (json_int_t)p->trained_tokens, "trained_parameters", (json_int_t)p->n_trained_params, "memory_bytes", (json_int_t)p->memory, "seconds",
                     (json_int_t)(p->flops / flops) + 1);
    if (p->spec.scratch)
        json_object_set_new(e, "tokenizer_bytes", json_integer((json_int_t)p->scratch.tokenizer_bytes));
    return e;
}

json_t *pl_checks_lines(const struct pl_data_report *r)
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

const char *pl_checks_code(pl_status st, const struct pl_err *err)
{
    const bool validation = strcmp(err->param, "validation_file") == 0, training = strcmp(err->param, "training_file") == 0;
    if (st == PL_ENOMEM || st == PL_ENOSPC)
        return "server_error";
    if (st == PL_ERANGE && (training || validation))
        return "invalid_n_examples";
    if (training)
        return "invalid_training_file";
    if (validation)
        return "invalid_validation_file";
    if (strcmp(err->param, "model") == 0)
        return "model_not_available";
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
        st = pl_checks_plan(j, &asked, row, training, row->validation_file != NULL ? validation : NULL, &file, plan, err);
    if (st == PL_OK && pl_scratch_keep(&plan->scratch, &plan->spec, training, folder, NULL) != PL_OK)
        pl_log_debug("%s: its worker learns the tokenizer once more", row->id);
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
    json_t *e = json_pack("{s:s,s:o,s:s?}", "code", pl_checks_code(st, why), "message", json_loadb(message.data, message.len, JSON_DECODE_ANY, NULL), "param",
                          why->param[0] != '\0' ? why->param : NULL);
    if (r->n_faults > 0) {
        json_object_set_new(e, "n_bad_lines", json_integer(r->n_bad));
        json_object_set_new(e, "lines", pl_checks_lines(r));
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
        json_t *method = pl_train_spec_json(&plan->spec), *estimate = pl_checks_estimate(plan);
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

void pl_checks_later(struct pl_jobs *j, const struct pl_job_row *row)
{
    struct pl_err err = {0};
    struct validation *v = pl_xcalloc(1, sizeof *v);
    v->j = j;
    snprintf(v->id, sizeof v->id, "%s", row->id);
    atomic_fetch_add(&j->n_checks, 1);
    const struct pl_task task = {validate, drop_validation, v};
    if (pl_tasks_add(j->tasks, &task, v->id, &err) != PL_OK)
        pl_log_debug("%s: %s", row->id, err.msg);
}

void pl_checks_waiting(struct pl_jobs *j)
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
        pl_checks_later(j, (const struct pl_job_row *)rows + i);
    pl_rows_free(PL_TABLE_JOBS, rows, n);
}
