/* supervisor: runs queued jobs as worker processes.
 *
 * What a job is, is in the store; here are only processes. A job's row says alive before its worker is started and until it is known to be
 * gone; a daemon that starts and finds such a row looks whether the folder's lock is held (adopted) or not (the worker is gone).
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/sha256.h"
#include "core/train/job.h"
#include "core/train/train.h"
#include "server/jobs/checks.h"
#include "server/jobs/files.h"
#include "server/jobs/progress.h"
#include "server/jobs/retry.h"
#include "server/jobs/serving.h"
#include "server/jobs/share.h"
#include "server/jobs/tidy.h"
#include "server/jobs/tuned.h"
#include "server/jobs/uploads.h"
#include "server/jobs/waits.h"
#include "server/jobs/worker.h"
#include "server/server.h"

#define PL_LOG_MODULE "jobs"

enum {
    TICK_MS = 250,
    EXPIRE_EVERY_NS = 1000000000,
    PAUSE_S = 120,       /* seconds that a worker has to write its checkpoint */
    MAX_CRASHES = 5,     /* without progress in between */
    QUIET_S = 60,        /* the same complaint is logged once in that time */
    MAX_RESULTS = 64 << 20,
};

struct job_worker {
    struct job_worker *next;
    char id[PL_ID_MAX];
    struct pl_worker w;
};

struct pl_supervisor {
    struct pl_jobs *j;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool poked;
    bool joined;
    atomic_bool stopping;
    atomic_uint stop_seconds;
    atomic_ullong restarts;
    cpu_set_t cpus;
    struct job_worker *workers;
    struct pl_serving *servings;
    struct pl_retry *retries;
    struct pl_share share;
    atomic_uint rest; /* the share's, for others */
    char *program;
    uint64_t expired_ns;
    char said[600];
    uint64_t said_ns;
};

static void complain(struct pl_supervisor *s, const char *id, const struct pl_err *err)
{
    char words[sizeof s->said];
    const uint64_t now = pl_now_ns();
    snprintf(words, sizeof words, "%s: %s", id, err->msg);
    if (strcmp(words, s->said) == 0 && now - s->said_ns < QUIET_S * UINT64_C(1000000000))
        return;
    pl_log_error("%s", words);
    strcpy(s->said, words);
    s->said_ns = now;
}

/* ---- starting ------------------------------------------------------------------------------------------------------ */

static char *worker_program(const char *setting)
{
    char self[4096];
    char *path = NULL;
    if (setting[0] != '\0')
        return pl_xstrdup(setting);
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash != NULL)
        *slash = '\0';
    return asprintf(&path, "%s/parley", self) >= 0 ? path : pl_xstrdup("");
}

static pl_status write_job(struct pl_jobs *j, const struct pl_job_row *row, const char *folder, struct pl_err *err)
{
    struct pl_train_job job = {.id = row->id, .name = row->name, .created_at = row->created_at};
    const struct pl_config *c = j->server->config;
    struct pl_base base;
    char *training = NULL, *validation = NULL;
    json_t *method = json_loads(row->method, 0, NULL);
    pl_status st = pl_train_spec_read(&job.spec, method, NULL, err);
    json_decref(method);
    if (st == PL_OK)
        st = pl_jobs_base(j, row, &base, err);
    if (st != PL_OK)
        return st;
    if (asprintf(&training, "%s/training.jsonl", folder) < 0 || asprintf(&validation, "%s/validation.jsonl", folder) < 0) {
        st = pl_fail(err, PL_ENOMEM, "out of memory");
        goto out;
    }
    const bool from_nothing = job.spec.scratch && job.spec.shape_tokenizer == PL_SHAPE_BPE;
    const bool adapter = row->base_adapter != NULL && strcmp(row->base_adapter, base.path) != 0; /* not the base itself */
    job.base = from_nothing ? NULL : base.path;
    job.base_id = from_nothing ? NULL : base.id;
    job.base_adapter = adapter ? row->base_adapter : NULL;
    job.chat_template = job.spec.scratch ? NULL : base.template;
    job.general_text = c->train_general_text[0] != '\0' ? (char *)(uintptr_t)c->train_general_text : NULL;
    job.training_file = training;
    job.validation_file = row->validation_file != NULL ? validation : NULL;
    job.spec.seed = (uint32_t)row->seed;
    st = pl_train_job_write(&job, folder, err);
out:
    free(training);
    free(validation);
    pl_base_fini(&base);
    return st;
}

static bool is_done(const json_t *outcome)
{
    const char *type = json_string_value(json_object_get(outcome, "type"));
    return type != NULL && strcmp(type, "done") == 0;
}

/* Begins a transaction that changes a job, with the row as it is now. PL_ESTOPPED: its status is not the one that was seen, because a client
 * has cancelled or paused the job meanwhile; that stands, and the next look finds the worker gone. */
static pl_status begin_change(struct pl_supervisor *s, struct pl_job_row *row, struct pl_err *err)
{
    struct pl_store *store = s->j->store;
    struct pl_job_row now;
    pl_status st = pl_store_begin(store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(store, PL_TABLE_JOBS, "id", row->id, &now, err);
    if (st == PL_OK && strcmp(now.status, row->status) != 0)
        st = pl_fail(err, PL_ESTOPPED, "%s is %s now", row->id, now.status);
    if (st != PL_OK) {
        pl_store_rollback(store);
        pl_row_fini(PL_TABLE_JOBS, &now);
        return st;
    }
    pl_row_fini(PL_TABLE_JOBS, row);
    *row = now;
    return PL_OK;
}

static void end_failed(struct pl_supervisor *s, const char *id, pl_status st, const struct pl_err *err)
{
    if (st == PL_ESTOPPED)
        pl_log_info("%s", err->msg);
    else
        complain(s, id, err);
}

/* Marks the row before the process exists, so that it is looked for after a crash of the daemon. A job that waits says so until its worker has
 * said something. */
static pl_status mark_running(struct pl_supervisor *s, struct pl_job_row *row, struct pl_err *err)
{
    struct pl_store *store = s->j->store;
    pl_status st = begin_change(s, row, err);
    if (st != PL_OK)
        return st;
    if (row->alive) {
        st = pl_fail(err, PL_ESTOPPED, "an earlier worker of %s has not gone yet", row->id);
    } else {
        row->alive = 1;
        pl_row_set(&row->status, "running");
        json_t *outcome = row->outcome != NULL ? json_loads(row->outcome, 0, NULL) : NULL;
        if (!is_done(outcome)) /* a job that was paused as it ended is done at once: its worker says so once only */
            pl_row_set(&row->outcome, NULL);
        json_decref(outcome);
        if (row->started_at == 0)
            row->started_at = time(NULL);
        st = pl_store_update(store, PL_TABLE_JOBS, row, err);
        if (st == PL_OK && row->waits == NULL)
            st = pl_jobs_event(s->j, row->id, "info", "message", NULL, -1, err, "%s", pl_waits_started_words(s->j, row->id));
    }
    return pl_store_end(store, st, err);
}

static void fail_job(struct pl_supervisor *s, struct pl_job_row *row, const char *code, const char *param, const char *message);

/* The job is queued and tried again after a while. crashes: how many there are now, at the row's step; 0 = it was not one. limit: seconds after
 * which it is not to wait any longer. */
static void wait_for(struct pl_supervisor *s, struct pl_job_row *row, pl_wait why, const char *message, int64_t crashes, unsigned limit)
{
    struct pl_err err = {0};
    const int64_t step = row->step;
    unsigned seconds;
    struct pl_retry *r = pl_retry_note(&s->retries, row->id, step, pl_now_ns(), limit, &seconds);
    r->for_room = why == PL_WAIT_BUSY;
    pl_status st = begin_change(s, row, &err);
    if (st == PL_OK) {
        if (crashes > 0) {
            row->crashes = crashes;
            row->crash_step = step;
        }
        pl_row_set(&row->status, "queued");
        row->alive = 0;
        st = pl_waits_begin(s->j, row, why, message, seconds, &err);
        if (st == PL_OK)
            st = pl_store_update(s->j->store, PL_TABLE_JOBS, row, &err);
        st = pl_store_end(s->j->store, st, &err);
    }
    r->stored = st == PL_OK;
    if (st == PL_ESTOPPED) /* a client has decided otherwise */
        pl_retry_forget(&s->retries, row->id);
    if (st != PL_OK)
        end_failed(s, row->id, st, &err);
    else
        pl_log_warn("%s waits %u s (%s): %s", row->id, seconds, pl_wait_code(why), message);
}

/* A job whose worker could not be started: what may be otherwise a while later is no space, no process, no memory. */
static void not_started(struct pl_supervisor *s, struct pl_job_row *row, const char *folder, pl_status st, const struct pl_err *why)
{
    const bool passes = st == PL_ENOSPC || st == PL_ENOMEM || st == PL_EIO || st == PL_EFULL;
    complain(s, row->id, why);
    if (!passes || access(folder, W_OK) != 0)
        fail_job(s, row, "worker_not_started", NULL, why->msg);
    else
        wait_for(s, row, PL_WAIT_START, why->msg, 0, UINT_MAX);
}

/* False: it could not be started. */
static bool launch(struct pl_supervisor *s, struct pl_job_row *row)
{
    struct pl_err err = {0};
    const struct pl_config *c = s->j->server->config;
    char *folder = pl_jobs_folder(s->j, row->id);
    struct job_worker *w = pl_xcalloc(1, sizeof *w);
    const struct pl_worker_opts o = {.program = s->program, .folder = folder, .nice = c->train_nice, .cpus = &s->cpus, .device = c->train_device,
                                     .cuda_library = c->cuda_library, .memory = pl_jobs_on_gpu(s->j) ? 0 : pl_jobs_memory(s->j)};
    pl_status st = write_job(s->j, row, folder, &err);
    if (st == PL_OK)
        st = mark_running(s, row, &err);
    if (st == PL_ESTOPPED)
        goto out; /* paused or cancelled a moment ago */
    if (st == PL_OK) {
        st = pl_worker_start(&w->w, &o, &err);
        if (st == PL_EFULL && pl_worker_find(&w->w, folder) == PL_OK)
            st = PL_OK;
    }
    if (st != PL_OK) {
        not_started(s, row, folder, st, &err);
        goto out;
    }
    snprintf(w->id, sizeof w->id, "%s", row->id);
    w->next = s->workers;
    s->workers = w;
    pl_log_info("%s: worker %ld started on %s, nice %d, sure of %d %% of %u threads' time, at most %llu MiB (0: no limit)", row->id, (long)w->w.pid,
                o.device, c->train_nice, c->train_share, pl_share_threads(c->train_threads), (unsigned long long)(o.memory >> 20));
    w = NULL;
out:
    free(w);
    free(folder);
    return st == PL_OK;
}

/* ---- endings ------------------------------------------------------------------------------------------------------- */

static void set_error(struct pl_job_row *row, const char *code, const char *param, const char *message)
{
    char *readable = pl_xstrdup(message);
    pl_jobs_make_utf8(readable);
    json_t *e = json_pack("{s:s,s:s,s:s?}", "code", code, "message", readable, "param", param != NULL && param[0] != '\0' ? param : NULL);
    char *text = e != NULL ? json_dumps(e, 0) : NULL;
    pl_row_set(&row->error, text);
    free(text);
    free(readable);
    json_decref(e);
}

static pl_status end_job(struct pl_supervisor *s, struct pl_job_row *row, const char *status, struct pl_err *err)
{
    pl_row_set(&row->status, status);
    row->alive = 0;
    row->finished_at = time(NULL);
    row->estimated_finish = 0;
    pl_waits_clear(row);
    return pl_store_update(s->j->store, PL_TABLE_JOBS, row, err);
}

static void fail_job(struct pl_supervisor *s, struct pl_job_row *row, const char *code, const char *param, const char *message)
{
    struct pl_err err = {0};
    pl_status st = begin_change(s, row, &err);
    if (st == PL_OK) {
        set_error(row, code, param, message);
        st = end_job(s, row, "failed", &err);
        if (st == PL_OK)
            st = pl_jobs_event(s->j, row->id, "error", "message", NULL, -1, &err, "The job failed: %s", message);
        st = pl_store_end(s->j->store, st, &err);
    }
    if (st != PL_OK)
        end_failed(s, row->id, st, &err);
    else
        pl_log_warn("%s failed: %s: %s", row->id, code, message);
    pl_retry_forget(&s->retries, row->id);
}

/* results.csv as the bytes of a file of the Files API; f: what its row will say, without id when the worker wrote none. */
static pl_status copy_results(struct pl_supervisor *s, const char *job, struct pl_file_row *f, struct pl_err *err)
{
    struct pl_store *store = s->j->store;
    char *from = NULL, id[PL_ID_MAX], hash[PL_SHA256_HEX];
    uint64_t n;
    char *folder = pl_jobs_folder(s->j, job);
    pl_status st = PL_OK;
    pl_store_new_id(id, "file-");
    char *to = pl_jobs_path(store, "uploads", id);
    if (asprintf(&from, "%s/results.csv", folder) < 0)
        from = NULL;
    if (from == NULL || access(from, R_OK) != 0)
        goto out;
    st = pl_files_copy(from, to, MAX_RESULTS, &n, hash, err);
    if (st != PL_OK)
        goto out;
    pl_row_set(&f->id, id);
    st = pl_files_adopt(store, to, id, err);
    if (st != PL_OK)
        unlink(to);
    f->created_at = time(NULL);
    f->bytes = (int64_t)n;
    pl_row_set(&f->filename, "step_metrics.csv");
    pl_row_set(&f->purpose, "fine-tune-results");
    pl_row_set(&f->status, "processed");
    pl_row_set(&f->sha256, hash);
out:
    free(from);
    free(to);
    free(folder);
    return st;
}

static void poke(void *supervisor)
{
    pl_supervisor_poke(supervisor);
}

/* The model answers before the job says so. *now: false = not yet, and this is to be called again. */
static pl_status serve(struct pl_supervisor *s, const struct pl_job_row *row, bool *now, struct pl_err *err)
{
    struct pl_err why = {0};
    const pl_status st = pl_serving_look(&s->servings, s->j, row, poke, s, now, &why);
    if (st == PL_OK)
        return st;
    pl_log_warn("%s: %s is not served: %s", row->id, row->name, why.msg);
    return pl_jobs_event(s->j, row->id, "warn", "message", NULL, -1, err, "The model is not served by this daemon: %s", why.msg);
}

static pl_status record_success(struct pl_supervisor *s, struct pl_job_row *row, struct pl_file_row *results, struct pl_err *err)
{
    pl_status st = begin_change(s, row, err);
    if (st != PL_OK)
        return st;
    if (results->id != NULL) {
        st = pl_store_insert(s->j->store, PL_TABLE_FILES, results, err);
        pl_row_set(&row->result_file, results->id);
    }
    if (st == PL_OK)
        st = end_job(s, row, "succeeded", err);
    if (st == PL_OK)
        st = pl_jobs_event(s->j, row->id, "info", "message", NULL, -1, err, "New fine-tuned model created: %s", row->name);
    if (st == PL_OK)
        st = pl_jobs_event(s->j, row->id, "info", "message", NULL, -1, err, "The job has successfully completed");
    return pl_store_end(s->j->store, st, err);
}

static void succeed(struct pl_supervisor *s, struct pl_job_row *row)
{
    struct pl_err err = {0};
    struct pl_file_row results = {0};
    bool served = false;
    if (pl_serving_waits(s->servings, s->j, row->id))
        return;
    pl_status st = serve(s, row, &served, &err);
    if (st == PL_OK && !served)
        return;
    if (st == PL_OK)
        st = copy_results(s, row->id, &results, &err);
    if (st == PL_OK)
        st = record_success(s, row, &results, &err);
    if (st == PL_OK) {
        pl_log_info("%s succeeded: %s, %lld tokens", row->id, row->name, (long long)row->trained_tokens);
        pl_retry_forget(&s->retries, row->id);
    } else { /* the row still says alive: tried again at the next look */
        end_failed(s, row->id, st, &err);
        pl_tuned_forget(s->j, row->name);
        if (results.id != NULL)
            pl_files_discard(s->j->store, results.id);
    }
    pl_row_fini(PL_TABLE_FILES, &results);
}

/* The last line that the worker wrote to its log, for the message. */
static void last_words(const char *folder, char *out, size_t n)
{
    char path[4096], text[2048];
    out[0] = '\0';
    if (snprintf(path, sizeof path, "%s/worker.log", folder) >= (int)sizeof path)
        return;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const off_t end = fd >= 0 ? lseek(fd, 0, SEEK_END) : 0;
    const off_t from = end > (off_t)sizeof text - 1 ? end - (off_t)sizeof text + 1 : 0;
    ssize_t got = fd >= 0 ? pread(fd, text, sizeof text - 1, from) : 0;
    if (fd >= 0)
        close(fd);
    while (got > 0 && (text[got - 1] == '\n' || text[got - 1] == '\r'))
        got--;
    text[got > 0 ? got : 0] = '\0';
    const char *line = strrchr(text, '\n');
    snprintf(out, n, "%.200s", line != NULL ? line + 1 : text);
    pl_jobs_make_utf8(out);
}

static void describe_end(int status, const char *folder, char *out, size_t n)
{
    char words[256];
    last_words(folder, words, sizeof words);
    if (WIFSIGNALED(status))
        snprintf(out, n, "the worker was ended by signal %s%s%s", sigabbrev_np(WTERMSIG(status)), words[0] != '\0' ? "; its last words: " : "", words);
    else
        snprintf(out, n, "the worker exited with status %d%s%s", WEXITSTATUS(status), words[0] != '\0' ? "; its last words: " : "", words);
}

static void interrupted(struct pl_supervisor *s, struct pl_job_row *row)
{
    struct pl_err err = {0};
    pl_status st = begin_change(s, row, &err);
    if (st == PL_OK) {
        pl_row_set(&row->status, "queued");
        row->alive = 0;
        st = pl_store_update(s->j->store, PL_TABLE_JOBS, row, &err);
        if (st == PL_OK)
            st = pl_jobs_event(s->j, row->id, "info", "message", NULL, -1, &err, "The job was interrupted; it goes on from its last checkpoint");
        st = pl_store_end(s->j->store, st, &err);
    }
    if (st != PL_OK)
        end_failed(s, row->id, st, &err);
}

/* why: PL_WAIT_CRASH, or PL_WAIT_LOST when it was the device that did. */
static void crashed(struct pl_supervisor *s, struct pl_job_row *row, pl_wait why, const char *what)
{
    char message[700];
    const int64_t crashes = row->step > row->crash_step ? 1 : row->crashes + 1;
    if (crashes >= MAX_CRASHES) {
        snprintf(message, sizeof message, "%s, %d times without progress", what, MAX_CRASHES);
        fail_job(s, row, pl_wait_code(why), NULL, message);
        return;
    }
    atomic_fetch_add(&s->restarts, 1);
    wait_for(s, row, why, what, crashes, UINT_MAX);
}

/* Nothing is lost: the checkpoints are there, and the worker goes on from the last one when there is room for the next. */
static void no_space(struct pl_supervisor *s, struct pl_job_row *row, const char *folder)
{
    char words[256];
    last_words(folder, words, sizeof words);
    wait_for(s, row, PL_WAIT_DISK, words[0] != '\0' ? words : "the disk is full", 0, UINT_MAX);
}

static void without_device(struct pl_supervisor *s, struct pl_job_row *row, pl_wait why, const char *param, const char *what)
{
    char message[800];
    const int64_t limit = s->j->server->config->train_device_wait, waited = pl_waits_for_device(row, time(NULL));
    if (waited < limit) {
        wait_for(s, row, why, what, 0, (unsigned)(limit - waited));
        return;
    }
    snprintf(message, sizeof message, "%s", what);
    if (limit > 0)
        snprintf(message, sizeof message, "%s; the job has waited %lld s for it (train-device-wait)", what, (long long)waited);
    fail_job(s, row, pl_wait_code(why), param, message);
}

static void failed_by_worker(struct pl_supervisor *s, struct pl_job_row *row, const json_t *outcome)
{
    const char *code = json_string_value(json_object_get(outcome, "code")), *param = json_string_value(json_object_get(outcome, "param"));
    const char *message = json_string_value(json_object_get(outcome, "message"));
    const pl_wait why = pl_wait_of(code);
    if (message == NULL)
        message = "the worker did not say why";
    if (why == PL_WAIT_LOST)
        crashed(s, row, why, message);
    else if (why != PL_WAIT_COUNT)
        without_device(s, row, why, param, message);
    else
        fail_job(s, row, code != NULL ? code : "failed", param, message);
}

/* The worker is gone. row is as in the store, everything it wrote has been taken. status: of waitpid, -1 = not known. */
static void settle(struct pl_supervisor *s, struct pl_job_row *row, int status, const char *folder)
{
    json_t *outcome = row->outcome != NULL ? json_loads(row->outcome, 0, NULL) : NULL;
    const char *type = json_string_value(json_object_get(outcome, "type"));
    struct pl_err err = {0};
    if (strcmp(row->status, "running") != 0) { /* paused, cancelled, or queued again meanwhile */
        if (pl_serving_forget(&s->servings, s->j, row->id))
            pl_tuned_forget(s->j, row->name);
        pl_status st = begin_change(s, row, &err);
        if (st == PL_OK) {
            row->alive = 0;
            st = pl_store_end(s->j->store, pl_store_update(s->j->store, PL_TABLE_JOBS, row, &err), &err);
        }
        if (st != PL_OK)
            end_failed(s, row->id, st, &err);
        else
            pl_log_info("%s: worker gone, %s", row->id, row->status);
    } else if (is_done(outcome)) {
        succeed(s, row);
    } else if (type != NULL) {
        failed_by_worker(s, row, outcome);
    } else if (status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == PL_TRAIN_NO_SPACE) {
        no_space(s, row, folder);
    } else if (status == -1 || (WIFEXITED(status) && WEXITSTATUS(status) == PL_TRAIN_PAUSED)) {
        interrupted(s, row);
    } else {
        char what[400];
        describe_end(status, folder, what, sizeof what);
        crashed(s, row, PL_WAIT_CRASH, what);
    }
    json_decref(outcome);
}

/* ---- watching ------------------------------------------------------------------------------------------------------ */

static struct job_worker *find_worker(struct pl_supervisor *s, const char *id)
{
    for (struct job_worker *w = s->workers; w != NULL; w = w->next)
        if (strcmp(w->id, id) == 0)
            return w;
    return NULL;
}

static void forget_worker(struct pl_supervisor *s, const char *id)
{
    for (struct job_worker **w = &s->workers; *w != NULL; w = &(*w)->next)
        if (strcmp((*w)->id, id) == 0) {
            struct job_worker *gone = *w;
            *w = gone->next;
            free(gone);
            return;
        }
}

/* After a restart of the daemon: the worker of a row that says alive, if it still runs. */
static struct job_worker *adopt(struct pl_supervisor *s, const char *id, const char *folder)
{
    struct job_worker *w = pl_xcalloc(1, sizeof *w);
    if (pl_worker_find(&w->w, folder) != PL_OK) {
        free(w);
        return NULL;
    }
    snprintf(w->id, sizeof w->id, "%s", id);
    w->next = s->workers;
    s->workers = w;
    pl_log_info("%s: worker %ld still runs and is taken over", id, (long)w->w.pid);
    return w;
}

static void steer(struct pl_supervisor *s, struct job_worker *w, const char *status)
{
    const bool stopping = atomic_load(&s->stopping);
    const uint64_t patience = (stopping ? atomic_load(&s->stop_seconds) : PAUSE_S) * UINT64_C(1000000000);
    if (strcmp(status, "cancelled") == 0 && !w->w.killed)
        pl_worker_signal(&w->w, SIGKILL);
    else if ((stopping || strcmp(status, "running") != 0) && w->w.term_ns == 0)
        pl_worker_signal(&w->w, SIGTERM);
    else if (w->w.term_ns > 0 && !w->w.killed && pl_now_ns() - w->w.term_ns > patience)
        pl_worker_signal(&w->w, SIGKILL);
}

static void set_rest(struct pl_supervisor *s, unsigned rest)
{
    if (rest != atomic_exchange(&s->rest, rest))
        pl_registry_rest(s->j->server->models, rest);
}

static void tend(struct pl_supervisor *s, const struct pl_job_row *seen)
{
    struct pl_err err = {0};
    struct pl_job_row row;
    char *folder = pl_jobs_folder(s->j, seen->id);
    struct job_worker *w = find_worker(s, seen->id);
    if (w == NULL)
        w = adopt(s, seen->id, folder);
    const bool ended = w == NULL || pl_worker_ended(&w->w, folder); /* looked at first: nothing is written after it */
    const bool taken = pl_progress_take(s->j, seen->id, &err) == PL_OK;
    if (!taken)
        complain(s, seen->id, &err);
    if (!ended) {
        steer(s, w, seen->status);
    } else if (!taken) { /* at the next look; or by the next daemon, for the row says alive */
        if (atomic_load(&s->stopping))
            forget_worker(s, seen->id);
        else if (w != NULL)
            w->w.child = false; /* waited for; its lock says the rest */
    } else if (pl_store_get(s->j->store, PL_TABLE_JOBS, "id", seen->id, &row, &err) == PL_OK) {
        const int status = w != NULL && !w->w.killed ? w->w.status : -1; /* killed by us: it was too slow to stop, and did not crash */
        forget_worker(s, seen->id);
        if (s->workers == NULL) /* what follows may take a while */
            set_rest(s, 0);
        const bool waited = row.waits != NULL;
        settle(s, &row, status, folder);
        if (!waited && pl_wait_of(row.waits) != PL_WAIT_BUSY) /* it had its device: what it has left is room for others */
            pl_retry_hasten(s->retries);
        pl_row_fini(PL_TABLE_JOBS, &row);
    } else {
        complain(s, seen->id, &err);
    }
    free(folder);
}

/* Without the store: workers are stopped, and the next daemon reads what they wrote. */
static size_t stop_unseen(struct pl_supervisor *s)
{
    size_t left = 0;
    for (struct job_worker *w = s->workers, *next; w != NULL; w = next) {
        char *folder = pl_jobs_folder(s->j, w->id);
        next = w->next;
        if (pl_worker_ended(&w->w, folder)) {
            forget_worker(s, w->id);
        } else {
            steer(s, w, "running");
            left++;
        }
        free(folder);
    }
    return left;
}

static size_t tend_all(struct pl_supervisor *s)
{
    const struct pl_store_query q = {.column = "alive", .value = "1", .ascending = true};
    struct pl_err err = {0};
    void *rows;
    size_t n, left = 0;
    bool more;
    if (pl_store_list(s->j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, &err) != PL_OK) {
        complain(s, "jobs", &err);
        return atomic_load(&s->stopping) ? stop_unseen(s) : 1;
    }
    for (size_t i = 0; i < n; i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        tend(s, row);
        left += find_worker(s, row->id) != NULL;
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
    return left;
}

static void launch_waiting(struct pl_supervisor *s, size_t running)
{
    const struct pl_store_query q = {.column = "status", .value = "queued", .ascending = true};
    const size_t limit = (size_t)s->j->server->config->train_jobs;
    struct pl_err err = {0};
    void *rows;
    size_t n;
    bool more;
    if (running >= limit)
        return;
    if (pl_store_list(s->j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, &err) != PL_OK) {
        complain(s, "jobs", &err);
        return;
    }
    for (size_t i = 0; i < n && running < limit; i++) {
        struct pl_job_row *row = (struct pl_job_row *)rows + i;
        const struct pl_retry *r = pl_retry_find(s->retries, row->id);
        if (r != NULL && r->stored && row->waits == NULL)
            pl_retry_forget(&s->retries, row->id); /* a client has resumed it */
        if (row->alive || !pl_retry_due(s->retries, row->id, pl_now_ns()))
            continue; /* an earlier worker has not gone yet, or it waits */
        if (pl_jobs_has_base(s->j, row)) {
            running += launch(s, row);
        } else if (pl_jobs_park(s->j, row->id, &err) != PL_OK) {
            complain(s, row->id, &err);
        }
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
}

static void keep_share(struct pl_supervisor *s)
{
    const struct pl_config *c = s->j->server->config;
    const uint64_t now = pl_now_ns();
    uint64_t ran = 0, waited = 0, r, d;
    unsigned n = 0;
    if (now - s->share.at_ns < PL_SHARE_EVERY_MS * UINT64_C(1000000))
        return;
    for (struct job_worker *w = s->workers; w != NULL; w = w->next, n++) {
        pl_worker_time(&w->w, &r, &d);
        ran += r;
        waited += d;
    }
    if (n > 0)
        pl_share_look(&s->share, now, ran, waited, n * pl_share_threads(c->train_threads), (unsigned)c->train_share);
    else
        s->share = (struct pl_share){0};
    set_rest(s, s->share.rest);
}

static void sleep_a_tick(struct pl_supervisor *s)
{
    const struct timespec until = pl_time_after_ms(TICK_MS);
    pthread_mutex_lock(&s->lock);
    int rc = 0;
    while (!s->poked && rc == 0)
        rc = pthread_cond_timedwait(&s->wake, &s->lock, &until);
    s->poked = false;
    pthread_mutex_unlock(&s->lock);
}

static void *supervise(void *arg)
{
    struct pl_supervisor *s = arg;
    for (;;) {
        const size_t running = tend_all(s);
        keep_share(s);
        if (atomic_load(&s->stopping)) {
            if (running == 0)
                return NULL;
        } else {
            launch_waiting(s, running);
            if (pl_now_ns() - s->expired_ns > EXPIRE_EVERY_NS) {
                pl_checks_waiting(s->j);
                pl_files_expire(s->j->store, time(NULL));
                pl_uploads_expire(s->j->store, time(NULL));
                pl_tidy_ended(s->j);
                s->expired_ns = pl_now_ns();
            }
        }
        sleep_a_tick(s);
    }
}

pl_status pl_supervisor_start(struct pl_supervisor **out, struct pl_jobs *j, const cpu_set_t *cpus, struct pl_err *err)
{
    struct pl_supervisor *s = pl_xcalloc(1, sizeof *s);
    s->j = j;
    s->cpus = *cpus;
    s->program = worker_program(j->server->config->train_worker);
    pthread_mutex_init(&s->lock, NULL);
    pl_timed_cond_init(&s->wake);
    const int why = pthread_create(&s->thread, NULL, supervise, s);
    if (why != 0) {
        free(s->program);
        free(s);
        return pl_fail(err, PL_EIO, "cannot start a thread: %s", strerror(why));
    }
    *out = s;
    return PL_OK;
}

void pl_supervisor_poke(struct pl_supervisor *s)
{
    pthread_mutex_lock(&s->lock);
    s->poked = true;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

void pl_supervisor_stop(struct pl_supervisor *s, unsigned seconds)
{
    if (s == NULL || s->joined)
        return;
    atomic_store(&s->stop_seconds, seconds);
    atomic_store(&s->stopping, true);
    pl_supervisor_poke(s);
    pthread_join(s->thread, NULL);
    s->joined = true;
}

void pl_supervisor_free(struct pl_supervisor *s)
{
    if (s == NULL)
        return;
    while (s->workers != NULL)
        forget_worker(s, s->workers->id);
    pl_serving_free(&s->servings, s->j);
    pl_retry_free(&s->retries);
    pthread_cond_destroy(&s->wake);
    pthread_mutex_destroy(&s->lock);
    free(s->program);
    free(s);
}

uint64_t pl_supervisor_restarts(const struct pl_supervisor *s)
{
    return atomic_load(&s->restarts);
}

unsigned pl_supervisor_rest(const struct pl_supervisor *s)
{
    return atomic_load(&s->rest);
}
