/* report: what a job says while it runs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/report.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/train/tfevents.h"

/* Every measured number: its name here and in TensorBoard. */
static const struct {
    const char *name, *tag;
    size_t offset;
} numbers[] = {
#define AT(field) offsetof(struct pl_train_metrics, field)
    {"epoch", "train/epoch", AT(epoch)},
    {"train_loss", "train/loss", AT(train_loss)},
    {"train_mean_token_accuracy", "train/mean_token_accuracy", AT(train_accuracy)},
    {"learning_rate", "train/learning_rate", AT(learning_rate)},
    {"grad_norm", "train/grad_norm", AT(grad_norm)},
    {"tokens_per_s", "train/tokens_per_s", AT(tokens_per_s)},
    {"eta_s", NULL, AT(eta_s)},
    {"valid_loss", "eval/loss", AT(valid_loss)},
    {"valid_mean_token_accuracy", "eval/mean_token_accuracy", AT(valid_accuracy)},
    {"full_valid_loss", "eval/full_loss", AT(full_valid_loss)},
    {"full_valid_mean_token_accuracy", "eval/full_mean_token_accuracy", AT(full_valid_accuracy)},
    {"full_valid_perplexity", "eval/full_perplexity", AT(full_valid_perplexity)},
    {"reward_accuracy", "rewards/accuracies", AT(reward_accuracy)},
    {"reward_margin", "rewards/margins", AT(reward_margin)},
    {"reward_chosen", "rewards/chosen", AT(reward_chosen)},
    {"reward_rejected", "rewards/rejected", AT(reward_rejected)},
#undef AT
};

static double *number_of(struct pl_train_metrics *m, size_t i)
{
    return (double *)((char *)m + numbers[i].offset);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

struct path {
    char s[PATH_MAX];
};

static struct path in(const char *folder, const char *name)
{
    struct path p;
    snprintf(p.s, sizeof p.s, "%s/%s", folder, name);
    return p;
}

/* ---- lines --------------------------------------------------------------------------------------------------------- */

static pl_status io_failed(struct pl_err *err, const char *name, int why)
{
    return pl_fail(err, pl_status_of_errno(why), "cannot write %s: %s", name, strerror(why));
}

/* A line is there whole or not at all, also on a full disk. */
static pl_status put_line(int fd, struct pl_buf *b, bool flush, struct pl_err *err)
{
    struct stat before;
    pl_buf_addc(b, '\n');
    if (b->failed || fstat(fd, &before) != 0) {
        pl_buf_fini(b);
        return pl_fail(err, PL_ENOMEM, "no memory for a line of progress.jsonl");
    }
    const ssize_t n = write(fd, pl_buf_str(b), b->len);
    const bool whole = n == (ssize_t)b->len, ok = whole && (!flush || fsync(fd) == 0);
    const int why = n >= 0 && !whole ? ENOSPC : errno;
    pl_buf_fini(b);
    if (n > 0 && !whole && ftruncate(fd, before.st_size) != 0)
        return io_failed(err, "progress.jsonl", errno);
    return ok ? PL_OK : io_failed(err, "progress.jsonl", why);
}

static void add_metrics(struct pl_buf *b, const struct pl_train_metrics *m)
{
    struct pl_train_metrics copy = *m;
    pl_buf_addf(b, "\"step\":%u,\"total_steps\":%u,\"trained_tokens\":%llu", m->step, m->total_steps, (unsigned long long)m->trained_tokens);
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++)
        if (isfinite(*number_of(&copy, i)))
            pl_buf_addf(b, ",\"%s\":%.9g", numbers[i].name, *number_of(&copy, i));
}

static struct pl_buf line(const char *type)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_addf(&b, "{\"type\":\"%s\"", type);
    return b;
}

static pl_status put_events(FILE *f, double time, const struct pl_train_metrics *m)
{
    struct pl_train_metrics copy = *m;
    struct pl_tf_scalar list[PL_COUNT_OF(numbers)];
    size_t n = 0;
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++)
        if (numbers[i].tag != NULL)
            list[n++] = (struct pl_tf_scalar){numbers[i].tag, *number_of(&copy, i)};
    return pl_tf_scalars(f, time, m->step, list, n);
}

static void draw_bar(const struct pl_train_metrics *m)
{
    enum { WIDTH = 24 };
    char bar[WIDTH + 1];
    const unsigned full = (unsigned)((uint64_t)m->step * WIDTH / (m->total_steps > 0 ? m->total_steps : 1)), eta = (unsigned)m->eta_s;
    for (unsigned i = 0; i < WIDTH; i++)
        bar[i] = i < full ? '#' : '.';
    bar[WIDTH] = '\0';
    fprintf(stderr, "\r[%s] %u/%u  loss %.4f  %.0f tok/s  %u:%02u:%02u left ", bar, m->step, m->total_steps, m->train_loss, m->tokens_per_s, eta / 3600,
            eta / 60 % 60, eta % 60);
    if (isfinite(m->valid_loss))
        fprintf(stderr, " valid loss %.4f\n", m->valid_loss);
    fflush(stderr);
}

pl_status pl_report_metrics(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err)
{
    struct pl_buf b = line("metrics");
    const double time = now();
    pl_buf_addf(&b, ",\"time\":%.3f,", time);
    add_metrics(&b, m);
    pl_buf_addc(&b, '}');
    if (r->bar)
        draw_bar(m);
    const pl_status rc = put_line(r->fd, &b, false, err);
    if (rc != PL_OK)
        return rc;
    return put_events(r->events, time, m) == PL_OK ? PL_OK : io_failed(err, "the tensorboard file", errno);
}

pl_status pl_report_message(struct pl_report *r, const char *level, struct pl_err *err, const char *fmt, ...)
{
    char text[512];
    struct pl_buf b = line("message");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    pl_buf_addf(&b, ",\"level\":\"%s\",\"message\":\"", level);
    pl_buf_add_json_lossy(&b, text, strlen(text));
    pl_buf_adds(&b, "\"}");
    if (r->bar)
        fprintf(stderr, "%s\n", text);
    return put_line(r->fd, &b, false, err);
}

pl_status pl_report_flush(struct pl_report *r, struct pl_err *err)
{
    return fsync(r->fd) == 0 ? PL_OK : io_failed(err, "progress.jsonl", errno);
}

static pl_status put_checkpoint(int fd, uint32_t step, const char *metrics, struct pl_err *err)
{
    struct pl_buf b = line("checkpoint");
    pl_buf_addf(&b, ",\"step\":%u,\"path\":\"checkpoints/step-%u\",\"metrics\":{%s}}", step, step, metrics);
    return put_line(fd, &b, true, err);
}

pl_status pl_report_checkpoint(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err)
{
    struct pl_buf metrics;
    pl_buf_init(&metrics, 0);
    add_metrics(&metrics, m);
    const pl_status rc = put_checkpoint(r->fd, m->step, pl_buf_str(&metrics), err);
    pl_buf_fini(&metrics);
    return rc;
}

void pl_report_failed(const char *folder, const char *code, const struct pl_err *why)
{
    const int fd = open(in(folder, "progress.jsonl").s, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    struct pl_buf b = line("failed");
    pl_buf_addf(&b, ",\"code\":\"%s\",\"param\":\"%s\",\"message\":\"", code, why->param);
    pl_buf_add_json_lossy(&b, why->msg, strlen(why->msg));
    pl_buf_adds(&b, "\"}");
    if (fd < 0 || put_line(fd, &b, true, NULL) != PL_OK)
        fprintf(stderr, "parley train: %s (and progress.jsonl cannot be written)\n", why->msg);
    if (fd >= 0)
        close(fd);
}

/* ---- what is there already ----------------------------------------------------------------------------------------- */

static const char *type_of(const json_t *o)
{
    const char *type = json_string_value(json_object_get(o, "type"));
    return type != NULL ? type : "";
}

static struct pl_train_metrics metrics_of(const json_t *o)
{
    struct pl_train_metrics m = {.step = (uint32_t)json_integer_value(json_object_get(o, "step")),
                                 .total_steps = (uint32_t)json_integer_value(json_object_get(o, "total_steps")),
                                 .trained_tokens = (uint64_t)json_integer_value(json_object_get(o, "trained_tokens"))};
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++) {
        const json_t *v = json_object_get(o, numbers[i].name);
        *number_of(&m, i) = v != NULL ? json_number_value(v) : NAN;
    }
    return m;
}

/* Calls each for every whole line, until it says no. */
static void each_line(const char *folder, bool (*each)(void *arg, const char *text, const json_t *o), void *arg)
{
    FILE *f = fopen(in(folder, "progress.jsonl").s, "re");
    char *text = NULL;
    size_t cap = 0;
    bool more = f != NULL;
    for (ssize_t n; more && (n = getline(&text, &cap, f)) > 0;) {
        json_t *o = text[n - 1] == '\n' ? json_loads(text, 0, NULL) : NULL;
        more = o != NULL && each(arg, text, o);
        json_decref(o);
    }
    free(text);
    if (f != NULL)
        fclose(f);
}

/* ---- figures of before and after ----------------------------------------------------------------------------------- */

enum { N_FIGURES = 6 + PL_ROUGE_COUNT };

struct figure {
    char name[32], tag[40];
    double value;
};

static size_t figures_of(const struct pl_scores *s, double before, struct figure list[N_FIGURES])
{
    struct figure all[N_FIGURES] = {{"valid_loss", "", s->valid_loss},
                                    {"valid_mean_token_accuracy", "", s->valid_accuracy},
                                    {"perplexity", "", s->perplexity},
                                    {"general_loss", "", s->general_loss},
                                    {"forgetting", "", s->general_loss - before}};
    size_t n = 5, kept = 0;
    if (s->n_answers > 0) {
        all[n].value = s->bleu;
        strcpy(all[n++].name, pl_metric_bleu_name(s->words).s);
    }
    for (int k = 0; k < PL_ROUGE_COUNT && s->n_answers > 0; k++) {
        all[n].value = s->rouge[k];
        strcpy(all[n++].name, pl_metric_rouge_name(s->words, (pl_rouge_kind)k).s);
    }
    for (size_t i = 0; i < n; i++)
        if (isfinite(all[i].value))
            list[kept++] = all[i];
    return kept;
}

static pl_status put_figures(FILE *f, double time, uint32_t step, struct figure *list, size_t n)
{
    struct pl_tf_scalar scalars[N_FIGURES];
    for (size_t i = 0; i < n; i++) {
        snprintf(list[i].tag, sizeof list[i].tag, "evaluation/%s", list[i].name);
        scalars[i] = (struct pl_tf_scalar){list[i].tag, list[i].value};
    }
    return pl_tf_scalars(f, time, step, scalars, n);
}

struct scores {
    json_t *before, *after;
};

static bool note_scores(void *arg, const char *text, const json_t *o)
{
    (void)text;
    struct scores *s = arg;
    if (strcmp(type_of(o), "evaluation") != 0)
        return true;
    json_t **place = json_integer_value(json_object_get(o, "step")) == 0 ? &s->before : &s->after;
    json_decref(*place);
    *place = json_deep_copy(o);
    json_object_del(*place, "type");
    json_object_del(*place, "time");
    return true;
}

static void scores_free(struct scores *s)
{
    json_decref(s->before);
    json_decref(s->after);
}

bool pl_report_has_scores(const char *folder)
{
    struct scores s = {0};
    each_line(folder, note_scores, &s);
    const bool has = s.before != NULL;
    scores_free(&s);
    return has;
}

pl_status pl_report_scores(struct pl_report *r, uint32_t step, const struct pl_scores *s, struct pl_err *err)
{
    struct figure list[N_FIGURES];
    struct scores said = {0};
    struct pl_buf b = line("evaluation");
    const double time = now();
    if (step > 0)
        each_line(r->folder, note_scores, &said);
    const json_t *before = json_object_get(said.before, "general_loss");
    const size_t n = figures_of(s, before != NULL ? json_number_value(before) : NAN, list);
    scores_free(&said);
    pl_buf_addf(&b, ",\"time\":%.3f,\"step\":%u", time, step);
    if (s->n_answers > 0)
        pl_buf_addf(&b, ",\"answers\":%u,\"answers_cut\":%u", s->n_answers, s->n_cut);
    if (r->bar)
        fprintf(stderr, "%s:", step == 0 ? "Before training" : "\nAfter training");
    for (size_t i = 0; i < n; i++) {
        pl_buf_addf(&b, ",\"%s\":%.9g", list[i].name, list[i].value);
        if (r->bar)
            fprintf(stderr, "%s %s %.4g", i > 0 ? "," : "", list[i].name, list[i].value);
    }
    if (r->bar)
        fputc('\n', stderr);
    pl_buf_addc(&b, '}');
    const pl_status rc = put_line(r->fd, &b, false, err);
    if (rc != PL_OK)
        return rc;
    return put_figures(r->events, time, step, list, n) == PL_OK ? PL_OK : io_failed(err, "the tensorboard file", errno);
}

/* The line's own figures. */
static pl_status put_again(FILE *f, const json_t *o)
{
    struct figure list[N_FIGURES] = {0};
    size_t n = 0;
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)o, key, v)
        if (json_is_number(v) && strcmp(key, "time") != 0 && strcmp(key, "step") != 0 && strncmp(key, "answers", 7) != 0 && n < N_FIGURES) {
            snprintf(list[n].name, sizeof list[n].name, "%s", key);
            list[n++].value = json_number_value(v);
        }
    return put_figures(f, json_number_value(json_object_get(o, "time")), (uint32_t)json_integer_value(json_object_get(o, "step")), list, n);
}

static void add_scores(struct pl_buf *b, const char *name, const json_t *scores)
{
    char *text = scores != NULL ? json_dumps(scores, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    pl_buf_addf(b, "\"%s\":%s", name, text != NULL ? text : "null");
    free(text);
}

pl_status pl_report_done(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err)
{
    struct pl_buf b = line("done");
    struct scores s = {0};
    each_line(r->folder, note_scores, &s);
    pl_buf_addf(&b, ",\"path\":\"result\",\"step\":%u,\"trained_tokens\":%llu,\"metrics\":{", m->step, (unsigned long long)m->trained_tokens);
    add_metrics(&b, m);
    pl_buf_adds(&b, "},\"evaluation\":{");
    add_scores(&b, "before", s.before);
    pl_buf_addc(&b, ',');
    add_scores(&b, "after", s.after);
    pl_buf_adds(&b, "}}");
    scores_free(&s);
    return put_line(r->fd, &b, true, err);
}

/* ---- going on ------------------------------------------------------------------------------------------------------ */

struct kept {
    uint32_t step;
    struct pl_buf lines;
    FILE *events;
    int why; /* errno of a write of events that failed, 0 = none did */
    bool has_checkpoint;
    struct pl_buf last; /* metrics of the last kept step, as members */
};

/* Lines up to the checkpoint; those that say how a run ended are dropped. */
static bool keep_line(void *arg, const char *text, const json_t *o)
{
    struct kept *k = arg;
    const char *type = type_of(o);
    if (strcmp(type, "done") == 0 || strcmp(type, "failed") == 0)
        return true;
    const uint32_t step = (uint32_t)json_integer_value(json_object_get(o, "step"));
    if (strcmp(type, "evaluation") == 0) { /* that of the end will be made again */
        if (step == 0 && put_again(k->events, o) != PL_OK)
            k->why = errno;
        if (step == 0)
            pl_buf_adds(&k->lines, text);
        return true;
    }
    if (k->step == 0)
        return true;
    if (step > k->step)
        return false;
    if (strcmp(type, "metrics") == 0) {
        const struct pl_train_metrics m = metrics_of(o);
        if (put_events(k->events, json_number_value(json_object_get(o, "time")), &m) != PL_OK)
            k->why = errno;
        pl_buf_clear(&k->last);
        add_metrics(&k->last, &m);
    }
    k->has_checkpoint |= strcmp(type, "checkpoint") == 0 && step == k->step;
    pl_buf_adds(&k->lines, text);
    return true;
}

pl_status pl_report_open(struct pl_report *r, const char *folder, uint32_t step, int64_t created_at, bool bar, struct pl_err *err)
{
    char name[96];
    *r = (struct pl_report){.folder = folder, .fd = -1, .bar = bar};
    snprintf(name, sizeof name, "tensorboard/events.out.tfevents.%010lld.parley", (long long)created_at);
    mkdir(in(folder, "tensorboard").s, 0750);
    if ((r->events = fopen(in(folder, name).s, "we")) == NULL || pl_tf_begin(r->events, now()) != PL_OK)
        return io_failed(err, name, errno);
    struct kept k = {.step = step, .events = r->events};
    pl_buf_init(&k.lines, 0);
    pl_buf_init(&k.last, 0);
    each_line(folder, keep_line, &k);
    pl_status rc = k.why != 0 ? io_failed(err, name, k.why) : k.lines.failed ? pl_fail(err, PL_ENOMEM, "no memory for progress.jsonl") : PL_OK;
    if (rc == PL_OK)
        rc = pl_newfile_write(in(folder, "progress.jsonl").s, pl_buf_str(&k.lines), k.lines.len, err);
    if (rc == PL_OK && (r->fd = open(in(folder, "progress.jsonl").s, O_WRONLY | O_APPEND | O_CLOEXEC)) < 0)
        rc = io_failed(err, "progress.jsonl", errno);
    if (rc == PL_OK && step > 0 && !k.has_checkpoint) /* it was written, and then the worker was killed */
        rc = put_checkpoint(r->fd, step, pl_buf_str(&k.last), err);
    pl_buf_fini(&k.lines);
    pl_buf_fini(&k.last);
    return rc;
}

void pl_report_close(struct pl_report *r)
{
    if (r->fd >= 0)
        close(r->fd);
    if (r->events != NULL)
        fclose(r->events);
    *r = (struct pl_report){.fd = -1};
}

static void add_cell(struct pl_buf *b, double v)
{
    if (isfinite(v))
        pl_buf_addf(b, ",%.6g", v);
    else
        pl_buf_addc(b, ',');
}

static bool csv_line(void *arg, const char *text, const json_t *o)
{
    (void)text;
    if (strcmp(type_of(o), "metrics") != 0)
        return true;
    const struct pl_train_metrics m = metrics_of(o);
    struct pl_buf *b = arg;
    pl_buf_addf(b, "%u", m.step);
    add_cell(b, m.train_loss);
    add_cell(b, m.train_accuracy);
    add_cell(b, m.valid_loss);
    add_cell(b, m.valid_accuracy);
    pl_buf_addc(b, '\n');
    return true;
}

pl_status pl_report_csv(const char *folder, struct pl_err *err)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n");
    each_line(folder, csv_line, &b);
    const pl_status rc = b.failed ? pl_fail(err, PL_ENOMEM, "no memory for results.csv")
                                  : pl_newfile_write(in(folder, "results.csv").s, pl_buf_str(&b), b.len, err);
    pl_buf_fini(&b);
    return rc;
}

static bool note_done(void *arg, const char *text, const json_t *o)
{
    (void)text;
    *(bool *)arg = strcmp(type_of(o), "done") == 0;
    return true;
}

bool pl_report_is_done(const char *folder)
{
    bool done = false;
    each_line(folder, note_done, &done);
    return done;
}
