/* jobs: everything behind the Files and fine-tuning routes: opening and ending, a job's birth, and what clients ask of it.
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
#include "core/base/utf8.h"
#include "core/train/general.h"
#include "core/train/job.h"
#include "server/jobs/checks.h"
#include "server/jobs/files.h"
#include "server/jobs/supervisor.h"
#include "server/jobs/tuned.h"
#include "server/jobs/waits.h"
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

/* ---- what a job begins from ---------------------------------------------------------------------------------------- */

char *pl_jobs_own_base(struct pl_jobs *j, const struct pl_job_row *row)
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
    char *own = pl_jobs_own_base(j, row);
    pl_status st = pl_registry_base(j->server->models, row->base_id, row->base_id != NULL ? row->model : NULL, base, err);
    if (own == NULL)
        return st;
    if (st != PL_OK) { /* it was deleted */
        const char *template = j->server->config->chat_template;
        *base = (struct pl_base){.name = pl_xstrdup(row->model), .template = template[0] != '\0' ? pl_xstrdup(template) : NULL, .made = true};
    }
    free(base->path);
    base->path = own;
    st = pl_train_base_id(own, base->id, err);
    if (st != PL_OK)
        pl_base_fini(base);
    return st;
}

bool pl_jobs_on_gpu(const struct pl_jobs *j)
{
    return strcmp(j->server->config->train_device, "cpu") != 0;
}

uint64_t pl_jobs_memory(const struct pl_jobs *j)
{
    const int mb = j->server->config->train_memory_mb;
    return mb > 0 ? (uint64_t)mb << 20 : pl_machine_memory();
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
        pl_waits_clear(row);
        if (wish == PL_JOB_CANCEL)
            row->finished_at = time(NULL);
        if (wish == PL_JOB_RESUME)
            row->crashes = 0;
        st = pl_store_update(j->store, PL_TABLE_JOBS, row, err);
    }
    if (st == PL_OK)
        st = pl_jobs_event(j, id, changes[wish].level, "message", NULL, -1, err, "%s", changes[wish].event);
    st = pl_store_end(j->store, st, err);
    if (st == PL_OK && wish != PL_JOB_RESUME)
        pl_tasks_interrupt(j->tasks, id);
    if (st == PL_OK && again)
        pl_checks_later(j, row);
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
        pl_waits_clear(&row);
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
        if (st == PL_OK)
            st = pl_jobs_event(j, id, "warn", "message", NULL, -1, err, "The job was paused: it was made for another model than those that this daemon "
                               "has now; resume it when parleyd runs with that model again");
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    return pl_store_end(j->store, st, err);
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
    pl_room_init(&j->room);
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

static void serve_all(void *arg, struct pl_http_resp *resp)
{
    struct pl_jobs *j = arg;
    (void)resp;
    pl_tuned_serve_all(j, pl_tasks_stopping(j->tasks));
}

pl_status pl_jobs_start(struct pl_jobs *j, struct pl_err *err)
{
    cpu_set_t cpus;
    const struct pl_task known = {serve_all, NULL, j}; /* beside all else: there may be many */
    pl_status st = pl_tasks_add(j->tasks, &known, NULL, err);
    if (st != PL_OK)
        return st;
    if (sched_getaffinity(getpid(), sizeof cpus, &cpus) != 0) /* of the main thread, which is tied to no processor */
        memset(&cpus, 0xff, sizeof cpus);
    struct pl_supervisor *supervisor;
    if ((st = pl_supervisor_start(&supervisor, j, &cpus, err)) == PL_OK)
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
    pl_room_fini(&j->room);
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
    pl_waits_render_metrics(j, out);
    pl_buf_addf(out,
                "# HELP parley_files Uploaded files and results.\n# TYPE parley_files gauge\nparley_files %llu\n"
                "# HELP parley_files_bytes Bytes of all files.\n# TYPE parley_files_bytes gauge\nparley_files_bytes %llu\n"
                "# HELP parley_job_restarts_total Workers started again after a crash, or after their GPU was lost.\n# TYPE parley_job_restarts_total counter\n"
                "parley_job_restarts_total %llu\n"
                "# HELP parley_job_rest_ratio Time that engines rest for jobs after a pass, as a part of the pass.\n# TYPE parley_job_rest_ratio gauge\n"
                "parley_job_rest_ratio %.3f\n",
                (unsigned long long)n, (unsigned long long)bytes,
                (unsigned long long)(supervisor != NULL ? pl_supervisor_restarts(supervisor) : 0),
                supervisor != NULL ? pl_supervisor_rest(supervisor) / 1e3 : 0.0);
}
