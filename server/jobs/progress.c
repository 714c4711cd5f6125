/* progress: what a worker writes becomes events, checkpoints and numbers of the job.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/progress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "server/jobs/tuned.h"
#include "server/jobs/waits.h"

#define PL_LOG_MODULE "jobs"

enum { MAX_TAKE = 16 << 20 }; /* bytes at once */

struct taker {
    struct pl_jobs *j;
    struct pl_job_row *row;
    bool again; /* the file is read a second time */
    char **pruned; /* names of checkpoints that are gone */
    size_t n_pruned;
};

static int64_t integer(const json_t *o, const char *name)
{
    const json_t *v = json_object_get(o, name);
    return json_is_number(v) ? (int64_t)json_number_value(v) : 0;
}

static bool known(const struct taker *t, const char *message, int64_t at)
{
    return pl_store_has_event(t->j->store, t->row->id, message, at);
}

/* Metrics go to clients as OpenAI has them, without the line's own type. */
static char *data_of(json_t *line)
{
    json_object_del(line, "type");
    return json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(9));
}

static pl_status take_metrics(struct taker *t, json_t *line, int64_t at, struct pl_err *err)
{
    struct pl_job_row *row = t->row;
    char message[200];
    const int64_t step = integer(line, "step"), total = integer(line, "total_steps");
    const json_t *loss = json_object_get(line, "train_loss"), *valid = json_object_get(line, "valid_loss"), *full = json_object_get(line, "full_valid_loss");
    int n = snprintf(message, sizeof message, "Step %lld/%lld:", (long long)step, (long long)total);
    if (json_is_number(loss))
        n += snprintf(message + n, sizeof message - (size_t)n, " training loss=%.4g", json_number_value(loss));
    if (json_is_number(valid))
        n += snprintf(message + n, sizeof message - (size_t)n, "%s validation loss=%.4g", json_is_number(loss) ? "," : "", json_number_value(valid));
    if (json_is_number(full))
        snprintf(message + n, sizeof message - (size_t)n, "%s full validation loss=%.4g", json_is_number(loss) || json_is_number(valid) ? "," : "",
                 json_number_value(full));
    if (step < row->step || (step == row->step && known(t, message, -2)))
        return PL_OK;
    row->step = step;
    row->total_steps = total > 0 ? total : row->total_steps;
    if (integer(line, "trained_tokens") > row->trained_tokens)
        row->trained_tokens = integer(line, "trained_tokens");
    if (json_is_number(json_object_get(line, "eta_s")))
        row->estimated_finish = time(NULL) + integer(line, "eta_s");
    char *data = data_of(line);
    const pl_status st = pl_jobs_event(t->j, row->id, "info", "metrics", data, at, err, "%s", message);
    free(data);
    return st;
}

/* Figures of the model before the job (step 0) or after it: an event with data. */
static pl_status take_evaluation(struct taker *t, json_t *line, int64_t at, struct pl_err *err)
{
    const int64_t step = integer(line, "step");
    struct pl_buf message;
    const char *key;
    json_t *v;
    pl_buf_init(&message, 0);
    pl_buf_adds(&message, step == 0 ? "Evaluation before training" : "Evaluation after training");
    json_object_del(line, "time");
    json_object_foreach(line, key, v)
        if (json_is_number(v) && strcmp(key, "step") != 0 && strcmp(key, "answers") != 0 && (strcmp(key, "answers_cut") != 0 || json_integer_value(v) > 0))
            pl_buf_addf(&message, "%s %.40s=%.4g", strchr(pl_buf_str(&message), '=') == NULL ? ":" : ",", key, json_number_value(v));
    pl_status st = PL_OK;
    if (!known(t, pl_buf_str(&message), -2)) {
        char *data = data_of(line);
        st = pl_jobs_event(t->j, t->row->id, "info", "message", data, at, err, "%s", pl_buf_str(&message));
        free(data);
    }
    pl_buf_fini(&message);
    return st;
}

static pl_status take_message(struct taker *t, const json_t *line, int64_t at, struct pl_err *err)
{
    const char *level = json_string_value(json_object_get(line, "level")), *message = json_string_value(json_object_get(line, "message"));
    if (message == NULL || (t->again && known(t, message, at)))
        return PL_OK;
    if (level == NULL || (strcmp(level, "warn") != 0 && strcmp(level, "error") != 0))
        level = "info";
    return pl_jobs_event(t->j, t->row->id, level, "message", NULL, at, err, "%s", message);
}

/* Checkpoints that the worker has removed lose their rows, and are forgotten after the transaction. */
static pl_status prune(struct taker *t, struct pl_err *err)
{
    void *rows;
    size_t n;
    bool more;
    const struct pl_store_query q = {.column = "job", .value = t->row->id};
    pl_status st = pl_store_list(t->j->store, PL_TABLE_CHECKPOINTS, &q, &rows, &n, &more, err);
    if (st != PL_OK)
        return st;
    const struct pl_checkpoint_row *c = rows;
    char *folder = pl_jobs_folder(t->j, t->row->id);
    t->pruned = pl_xcalloc(n + 1, sizeof *t->pruned);
    for (size_t i = 0; i < n && st == PL_OK; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", folder, c[i].path) >= 0 && access(path, F_OK) != 0 && errno == ENOENT) {
            st = pl_tuned_delete_checkpoint(t->j, &c[i], err);
            t->pruned[t->n_pruned++] = pl_xstrdup(c[i].name);
        }
        free(path);
    }
    free(folder);
    pl_rows_free(PL_TABLE_CHECKPOINTS, rows, n);
    return st;
}

static bool is_inside(const char *path)
{
    return path != NULL && path[0] != '/' && path[0] != '\0' && strstr(path, "..") == NULL;
}

static pl_status take_checkpoint(struct taker *t, const json_t *line, int64_t at, struct pl_err *err)
{
    const char *path = json_string_value(json_object_get(line, "path"));
    const int64_t step = integer(line, "step");
    char id[PL_ID_MAX], message[64];
    if (!is_inside(path)) {
        pl_log_warn("%s: a checkpoint's path is not inside the job's folder", t->row->id);
        return PL_OK;
    }
    snprintf(message, sizeof message, "Checkpoint created at step %lld", (long long)step);
    if (known(t, message, -2))
        return PL_OK;
    pl_store_new_id(id, "ftckpt_");
    struct pl_checkpoint_row c = {.created_at = time(NULL), .step = step};
    char *metrics = json_dumps(json_object_get(line, "metrics"), JSON_COMPACT | JSON_REAL_PRECISION(9));
    char *name = NULL;
    if (asprintf(&name, "%s:ckpt-step-%lld", t->row->name, (long long)step) < 0)
        name = NULL;
    pl_row_set(&c.id, id);
    pl_row_set(&c.job, t->row->id);
    pl_row_set(&c.name, name);
    pl_row_set(&c.path, path);
    pl_row_set(&c.metrics, metrics != NULL ? metrics : "{}");
    pl_status st = pl_store_insert(t->j->store, PL_TABLE_CHECKPOINTS, &c, err);
    if (st == PL_OK)
        st = pl_jobs_event(t->j, t->row->id, "info", "message", NULL, at, err, "%s", message);
    free(metrics);
    free(name);
    pl_row_fini(PL_TABLE_CHECKPOINTS, &c);
    return st;
}

static pl_status take_object(struct taker *t, json_t *line, int64_t at, struct pl_err *err)
{
    const char *type = json_string_value(json_object_get(line, "type"));
    if (type == NULL)
        type = "";
    if (t->row->waits != NULL && strcmp(type, "failed") != 0) { /* it has what it waited for */
        const pl_status st = pl_waits_end(t->j, t->row, err);
        if (st != PL_OK)
            return st;
    }
    if (strcmp(type, "metrics") == 0)
        return take_metrics(t, line, at, err);
    if (strcmp(type, "evaluation") == 0)
        return take_evaluation(t, line, at, err);
    if (strcmp(type, "message") == 0)
        return take_message(t, line, at, err);
    if (strcmp(type, "checkpoint") == 0)
        return take_checkpoint(t, line, at, err);
    if (strcmp(type, "done") == 0 || strcmp(type, "failed") == 0) {
        char *outcome = json_dumps(line, JSON_COMPACT);
        pl_row_set(&t->row->outcome, outcome);
        free(outcome);
        if (integer(line, "trained_tokens") > 0)
            t->row->trained_tokens = integer(line, "trained_tokens");
    } else {
        pl_log_warn("%s: progress.jsonl at byte %lld: unknown type \"%.40s\"", t->row->id, (long long)at, type);
    }
    return PL_OK;
}

static pl_status take_line(struct taker *t, const char *text, size_t n, int64_t at, struct pl_err *err)
{
    json_t *line = NULL;
    struct pl_err why = {0};
    if (pl_json_read(&line, "the line", text, n, &why) != PL_OK) {
        pl_log_warn("%s: progress.jsonl at byte %lld: %s", t->row->id, (long long)at, why.msg);
        return PL_OK;
    }
    const pl_status st = take_object(t, line, at, err);
    json_decref(line);
    return st;
}

static pl_status take_lines(struct taker *t, const char *text, size_t n, struct pl_err *err)
{
    pl_status st = PL_OK;
    for (const char *end; st == PL_OK && (end = memchr(text, '\n', n)) != NULL;) {
        const size_t line = (size_t)(end - text);
        if (line > 0)
            st = take_line(t, text, line, t->row->at, err);
        t->row->at += (int64_t)line + 1;
        text = end + 1;
        n -= line + 1;
    }
    return st;
}

/* What the file has from row->at on; NULL = nothing new. */
static char *read_on(int fd, const struct stat *is, int64_t at, size_t *n)
{
    const int64_t left = is->st_size - at;
    *n = 0;
    if (left <= 0)
        return NULL;
    const size_t want = left < MAX_TAKE ? (size_t)left : MAX_TAKE;
    char *text = malloc(want);
    while (text != NULL && *n < want) {
        const ssize_t done = pread(fd, text + *n, want - *n, (off_t)(at + (int64_t)*n));
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            break;
        *n += (size_t)done;
    }
    return text;
}

pl_status pl_progress_take(struct pl_jobs *j, const char *id, struct pl_err *err)
{
    struct pl_job_row row;
    struct stat is;
    struct taker t = {.j = j, .row = &row};
    size_t n = 0;
    char *folder = pl_jobs_folder(j, id), *path = NULL, *text = NULL;
    const int fd = asprintf(&path, "%s/progress.jsonl", folder) >= 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    free(folder);
    free(path);
    if (fd < 0 || fstat(fd, &is) != 0) {
        if (fd >= 0)
            close(fd);
        return PL_OK; /* it has not written yet */
    }
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK) {
        close(fd);
        return st;
    }
    st = pl_store_get(j->store, PL_TABLE_JOBS, "id", id, &row, err);
    if (st == PL_OK) {
        t.again = row.inode != 0 && (row.inode != (int64_t)is.st_ino || is.st_size < row.at);
        if (t.again)
            row.at = 0;
        text = read_on(fd, &is, row.at, &n);
    }
    const bool news = st == PL_OK && (text != NULL || row.inode != (int64_t)is.st_ino);
    if (news) {
        row.inode = (int64_t)is.st_ino;
        st = text != NULL ? take_lines(&t, text, n, err) : PL_OK;
        if (st == PL_OK)
            st = prune(&t, err);
        if (st == PL_OK)
            st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
    }
    if (news || st != PL_OK)
        st = pl_store_end(j->store, st, err);
    else
        pl_store_rollback(j->store);
    for (size_t i = 0; i < t.n_pruned; i++) {
        if (st == PL_OK)
            pl_tuned_forget(j, t.pruned[i]);
        free(t.pruned[i]);
    }
    free(t.pruned);
    free(text);
    close(fd);
    pl_row_fini(PL_TABLE_JOBS, &row);
    return st;
}
