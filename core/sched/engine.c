/* engine: the thread that owns scheduler, pages and device.
 *
 * DESIGN. Requests come in through the inbox (the only thing that is locked against other threads, beside the counters) and
 * become jobs; each choice of a job is a sequence. One iteration: take the inbox, end what was cancelled, admit, plan,
 * reserve pages (preempting the newest sequence when there are none left), guess (draft.h), one forward pass, sample and push.
 *
 *   waiting jobs --admit--> running sequences --end--> job done when its last sequence is
 *                              |        ^
 *                            preempt  admit (before any new one, oldest first)
 *                              v        |
 *                            preempted sequences: pages released, tokens and sampler kept, recomputed later
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/engine.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/sched/engine_int.h"
#include "core/text/tok.h"

#define PL_LOG_MODULE "engine"

/* ---- inbox --------------------------------------------------------------------------------------------------------- */

static void kick(void *engine)
{
    struct pl_engine *e = engine;
    pthread_mutex_lock(&e->lock);
    e->kicked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

/* Under the lock: whether a request can be taken. */
static pl_status may_take(const struct pl_engine *e, struct pl_err *err)
{
    if (e->draining || e->stop)
        return pl_fail(err, PL_ESTOPPED, "the server is shutting down");
    if (atomic_load(&e->device_lost))
        return pl_fail(err, e->lost_code, "%s; the server must be restarted", e->lost_text);
    if (e->n_queued >= e->opts.queue_limit)
        return pl_fail(err, PL_EFULL, "%u requests are waiting already; try again later", e->n_queued);
    return PL_OK;
}

pl_status pl_engine_submit(struct pl_engine *e, struct pl_request *req, struct pl_reply *reply, struct pl_err *err)
{
    struct pl_job *job = NULL;
    uint32_t n_choices = 0; /* the job may be over as soon as it is in the inbox */
    pthread_mutex_lock(&e->lock);
    pl_status st = may_take(e, err); /* before anything is allocated for it */
    pthread_mutex_unlock(&e->lock);
    if (st == PL_OK)
        st = pl_job_new(&job, req, reply, pl_engine_max_context(e), err);
    if (st == PL_OK) {
        n_choices = job->n_seqs;
        pl_reply_attach(reply, kick, e);
        pthread_mutex_lock(&e->lock);
        st = may_take(e, err); /* others came meanwhile, or the end: nobody would look at it any more */
        if (st == PL_OK) {
            *e->inbox_end = job;
            e->inbox_end = &job->next;
            e->n_queued++;
            e->n_jobs++;
            pthread_cond_signal(&e->wake);
        }
        pthread_mutex_unlock(&e->lock);
    }
    if (st == PL_OK) {
        atomic_fetch_add_explicit(&e->n_submitted, n_choices, memory_order_relaxed);
        return PL_OK;
    }
    if (job != NULL) {
        pl_reply_attach(reply, NULL, NULL);
        pl_job_forgo(job);
    }
    atomic_fetch_add_explicit(&e->n_refused, 1, memory_order_relaxed);
    return st;
}

pl_status pl_engine_post(struct pl_engine *e, struct pl_engine_task *task)
{
    task->next = NULL;
    pthread_mutex_lock(&e->lock);
    const bool stop = e->stop;
    if (!stop) {
        *e->tasks_end = task;
        e->tasks_end = &task->next;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
    return stop ? PL_ESTOPPED : PL_OK;
}

pl_status pl_engine_adapter_add(struct pl_engine *e, uint32_t slot, struct pl_lora_set *a, struct pl_err *err)
{
    if (e->runner.adapter_add == NULL)
        return pl_fail(err, PL_ENOTSUP, "this engine takes no adapters");
    return e->runner.adapter_add(e->runner.self, slot, a, err);
}

void pl_engine_adapter_remove(struct pl_engine *e, uint32_t slot)
{
    e->runner.adapter_remove(e->runner.self, slot);
}

/* ---- thread -------------------------------------------------------------------------------------------------------- */

void pl_engine_publish(struct pl_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->published = e->stats;
    pthread_mutex_unlock(&e->lock);
}

static void publish_all(struct pl_engine *e)
{
    e->stats.running = e->n_running;
    e->stats.waiting = e->n_preempted;
    e->stats.pages_held = pl_kv_held(e->kv);
    e->stats.pages_cached = pl_kv_cached(e->kv);
    pl_engine_publish(e);
}

/* Sleeps until somebody signals; where others wait for the place of running sequences, which then are all full, also until
 * these may be parked, or other ranks are to hear of this one. */
static void sleep_idle(struct pl_engine *e)
{
    int ms = e->n_running > 0 && (e->waiting != NULL || e->n_preempted > 0) ? PL_ENGINE_PARK_MS : 0;
    if (e->runner.beat != NULL && (ms == 0 || e->runner.beat_ms < ms))
        ms = e->runner.beat_ms;
    if (ms == 0) {
        pthread_cond_wait(&e->wake, &e->lock);
        return;
    }
    const struct timespec until = pl_time_after_ms(ms);
    e->kicked |= pthread_cond_timedwait(&e->wake, &e->lock, &until) == ETIMEDOUT;
}

/* Moves the inbox over; sleeps first while there is nothing to do. False when it is time to go. */
static bool take_inbox(struct pl_engine *e, bool idle)
{
    pthread_mutex_lock(&e->lock);
    while (idle && e->inbox == NULL && e->tasks == NULL && !e->kicked && !e->stop && !e->abort_all)
        sleep_idle(e);
    e->kicked = false;
    if (e->inbox != NULL) {
        *e->waiting_end = e->inbox;
        e->waiting_end = e->inbox_end;
        e->inbox = NULL;
        e->inbox_end = &e->inbox;
    }
    struct pl_engine_task *tasks = e->tasks;
    e->tasks = NULL;
    e->tasks_end = &e->tasks;
    bool stop = e->stop, abort_all = e->abort_all || stop;
    e->abort_all = false;
    pthread_mutex_unlock(&e->lock);
    for (struct pl_engine_task *next; tasks != NULL; tasks = next) {
        next = tasks->next;
        atomic_store(&e->busy_since, pl_now_ns());
        tasks->run(tasks, e); /* it is gone afterwards */
        atomic_store(&e->busy_since, 0);
    }
    if (abort_all)
        pl_engine_fail_all(e, PL_ESTOPPED, "the server is shutting down");
    return !stop;
}

void pl_engine_lose(struct pl_engine *e, pl_status code)
{
    e->lost_code = code == PL_ERANK ? code : PL_EDEVICE;
    e->lost_text = code == PL_ERANK ? "a rank that computes a part of the model was lost"
                   : code == PL_EIO ? "the model's file was cut off while it was used (a new one is put in its place by renaming it)"
                                    : "the compute device failed";
    pl_log_error("%s (%s); all requests end", e->lost_text, pl_status_text(code));
    atomic_store(&e->device_lost, true);
    pl_engine_fail_all(e, e->lost_code, e->lost_text);
    if (e->opts.lost != NULL)
        e->opts.lost(e->opts.lost_arg);
}

static void beat(struct pl_engine *e)
{
    const pl_status rc = atomic_load(&e->device_lost) ? PL_OK : e->runner.beat(e->runner.self);
    if (rc != PL_OK)
        pl_engine_lose(e, rc);
}

static void *engine_main(void *arg)
{
    struct pl_engine *e = arg;
    bool idle = false;
    if (e->runner.attach != NULL)
        e->runner.attach(e->runner.self);
    while (take_inbox(e, idle)) {
        atomic_store(&e->busy_since, pl_now_ns());
        pl_engine_end_cancelled(e);
        if (atomic_load(&e->device_lost))
            pl_engine_fail_all(e, e->lost_code, e->lost_text);
        pl_engine_admit(e);
        uint32_t n = pl_engine_plan(e);
        if (n > 0)
            pl_engine_run(e, n);
        const bool prepared = e->runner.prepare != NULL && e->runner.prepare(e->runner.self);
        idle = n == 0 && !prepared;
        if (idle && e->runner.beat != NULL)
            beat(e);
        publish_all(e);
        atomic_store(&e->busy_since, 0);
    }
    return NULL;
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static const double seconds_fine[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
static const double seconds_itl[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10};
static const double seconds_long[] = {0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480};
static const double tokens_wide[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};
static const double tokens_step[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};

#define HIST(h, b) s->h = (struct pl_hist){.bounds = b, .n_bounds = PL_COUNT_OF(b)}

void pl_model_stats_init(struct pl_model_stats *s)
{
    *s = (struct pl_model_stats){0};
    HIST(ttft, seconds_fine);
    HIST(itl, seconds_itl);
    HIST(e2e, seconds_long);
    HIST(queue_time, seconds_long);
    HIST(prefill_time, seconds_long);
    HIST(decode_time, seconds_long);
    HIST(prompt_len, tokens_wide);
    HIST(output_len, tokens_wide);
}

static void init_stats(struct pl_engine_stats *s)
{
    pl_model_stats_init(&s->base);
    HIST(step_tokens, tokens_step);
}

#undef HIST

static bool collect_eog(struct pl_engine *e)
{
    int32_t n = e->tok != NULL ? pl_tok_count(e->tok) : 0;
    for (int32_t id = 0; id < n; id++)
        e->n_eog += pl_tok_is_eog(e->tok, id);
    e->eog = malloc((e->n_eog + 1) * sizeof *e->eog);
    e->n_eog = 0;
    for (int32_t id = 0; e->eog != NULL && id < n; id++)
        if (pl_tok_is_eog(e->tok, id))
            e->eog[e->n_eog++] = id;
    return e->eog != NULL;
}

static bool prepare_sampling(struct pl_engine *e, const struct pl_runner *r)
{
    const uint32_t n_vocab = r->n_vocab;
    e->n_workers = e->opts.pool != NULL ? pl_pool_size(e->opts.pool) : 1;
    e->sampled = malloc(e->opts.max_sequences * sizeof *e->sampled);
    e->scratch = calloc(e->n_workers, sizeof(void *));
    for (unsigned i = 0; e->scratch != NULL && i < e->n_workers; i++)
        if (pl_sample_scratch_new(&e->scratch[i], n_vocab) != PL_OK)
            return false;
    if (r->samples && pl_draws_init(&e->draws, e->opts.batch_tokens) == PL_OK)
        e->drawn = malloc(e->opts.batch_tokens * sizeof *e->drawn);
    return e->sampled != NULL && e->scratch != NULL && (e->drawn != NULL || !r->samples);
}

pl_status pl_engine_new_with(struct pl_engine **out, const struct pl_engine_opts *opts, const struct pl_runner *runner,
                             const struct pl_tok *tok, struct pl_err *err)
{
    uint64_t salt = 0;
    if (opts->max_sequences < 1 || opts->batch_tokens < opts->max_sequences || opts->max_context < 2)
        return pl_fail(err, PL_EINVAL, "batch-tokens must be at least max-sequences, and the context at least 2");
    if (opts->max_draft > PL_DRAFT_MAX || opts->draft_sequences > PL_DRAFT_SEQS)
        return pl_fail(err, PL_EINVAL, "at most %d tokens can be guessed, for %d sequences", PL_DRAFT_MAX, PL_DRAFT_SEQS);
    if (getrandom(&salt, sizeof salt, 0) != (ssize_t)sizeof salt)
        return pl_fail(err, PL_EIO, "the system gives no random numbers");
    struct pl_engine *e = calloc(1, sizeof *e);
    if (e == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the engine");
    e->opts = *opts;
    e->tok = tok;
    e->waiting_end = &e->waiting;
    e->inbox_end = &e->inbox;
    e->tasks_end = &e->tasks;
    pthread_mutex_init(&e->lock, NULL);
    pl_timed_cond_init(&e->wake);
    pl_timed_cond_init(&e->idle);
    init_stats(&e->stats);
    pl_draft_cost_init(&e->cost);
    e->running = malloc(opts->max_sequences * sizeof(void *));
    e->preempted_cap = opts->max_sequences;
    e->preempted = malloc(e->preempted_cap * sizeof(void *));
    pl_status st = pl_kv_new(&e->kv, opts->n_pages, salt, err);
    if (st == PL_OK && (e->running == NULL || e->preempted == NULL || pl_step_init(&e->step, opts->batch_tokens, opts->max_sequences) != PL_OK ||
                        !collect_eog(e) || !prepare_sampling(e, runner)))
        st = pl_fail(err, PL_ENOMEM, "no memory for the engine");
    e->stats.pages_total = opts->n_pages;
    e->published = e->stats;
    if (st != PL_OK) {
        pl_engine_free(e);
        return st;
    }
    e->runner = *runner;
    *out = e;
    return PL_OK;
}

pl_status pl_engine_start(struct pl_engine *e, struct pl_err *err)
{
    if (pthread_create(&e->thread, NULL, engine_main, e) != 0)
        return pl_fail(err, PL_ENOMEM, "cannot start the engine's thread");
    e->thread_made = true;
    return PL_OK;
}

bool pl_engine_drain(struct pl_engine *e, int timeout_ms)
{
    const struct timespec until = pl_time_after_ms(timeout_ms);
    pthread_mutex_lock(&e->lock);
    e->draining = true;
    int rc = 0;
    while (e->n_jobs > 0 && rc == 0)
        rc = pthread_cond_timedwait(&e->idle, &e->lock, &until);
    bool done = e->n_jobs == 0;
    if (!done) {
        e->abort_all = true;
        pthread_cond_signal(&e->wake);
        while (e->n_jobs > 0)
            pthread_cond_wait(&e->idle, &e->lock);
    }
    pthread_mutex_unlock(&e->lock);
    return done;
}

void pl_engine_free(struct pl_engine *e)
{
    if (e == NULL)
        return;
    if (e->thread_made) {
        pthread_mutex_lock(&e->lock);
        e->stop = true;
        pthread_cond_signal(&e->wake);
        pthread_mutex_unlock(&e->lock);
        pthread_join(e->thread, NULL);
    }
    if (e->runner.free != NULL)
        e->runner.free(e->runner.self);
    pl_kv_free(e->kv);
    for (unsigned i = 0; e->scratch != NULL && i < e->n_workers; i++)
        pl_sample_scratch_free(e->scratch[i]);
    free(e->scratch);
    free(e->sampled);
    pl_draws_fini(&e->draws);
    free(e->drawn);
    pl_buf_fini(&e->text);
    pl_step_fini(&e->step);
    free(e->eog);
    free(e->running);
    free(e->preempted);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    pthread_cond_destroy(&e->idle);
    free(e);
}

void pl_engine_stats(struct pl_engine *e, struct pl_engine_stats *out)
{
    pthread_mutex_lock(&e->lock);
    *out = e->published;
    out->waiting += e->n_queued;
    pthread_mutex_unlock(&e->lock);
    out->n_submitted = atomic_load_explicit(&e->n_submitted, memory_order_relaxed);
    out->n_refused = atomic_load_explicit(&e->n_refused, memory_order_relaxed);
    out->device_lost = atomic_load(&e->device_lost);
}

uint32_t pl_engine_max_context(const struct pl_engine *e)
{
    uint64_t all = (uint64_t)e->opts.n_pages * PL_KV_PAGE;
    return all < e->opts.max_context ? (uint32_t)all : e->opts.max_context;
}

bool pl_engine_healthy(struct pl_engine *e, int max_ms)
{
    uint64_t since = atomic_load(&e->busy_since), now = pl_now_ns();
    bool stuck = since != 0 && now > since && now - since > (uint64_t)max_ms * 1000000;
    return !stuck && !atomic_load(&e->device_lost);
}
