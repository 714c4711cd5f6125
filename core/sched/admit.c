/* admit: which sequences run: admission of waiting ones, preemption and its end.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/sched/engine_int.h"

#define PL_LOG_MODULE "engine"

static uint32_t pages_for(uint32_t n_tokens)
{
    return (n_tokens + PL_KV_PAGE - 1) / PL_KV_PAGE;
}

/* Room for what the sequence has to compute at once, and a page for each running one to grow into. */
static bool fits_now(const struct pl_engine *e, uint32_t n_tokens)
{
    uint32_t reserve = e->n_running < pl_kv_total(e->kv) / 8 ? e->n_running : pl_kv_total(e->kv) / 8;
    return e->n_running == 0 || pages_for(n_tokens) + reserve <= pl_kv_available(e->kv);
}

static void start_running(struct pl_engine *e, struct pl_seq *s)
{
    bool match = !(s->job->req->prompt_logprobs && s->prompt_logprobs != NULL);
    struct pl_kv_copy copy = {0};
    s->n_done = pl_kv_match(e->kv, &s->table, pl_served_id(s->job->req->adapter), s->tokens, match ? s->n_tokens : 0,
                            e->runner.kv_copy != NULL ? &copy : NULL);
    if (copy.n > 0 && e->runner.kv_copy(e->runner.self, copy.from, copy.to) != PL_OK)
        s->n_done -= copy.n; /* they are computed, by a device that will say so if it is lost */
    s->state = PL_SEQ_RUNNING;
    uint32_t at = e->n_running++;
    for (; at > 0 && e->running[at - 1]->stamp > s->stamp; at--)
        e->running[at] = e->running[at - 1];
    e->running[at] = s;
}

static void note_admission(struct pl_engine *e, struct pl_seq *s)
{
    struct pl_job *job = s->job;
    s->admitted_ns = pl_now_ns();
    s->n_cached = s->n_done;
    if (!job->started) {
        job->started = true;
        pthread_mutex_lock(&e->lock);
        e->n_queued--;
        pthread_mutex_unlock(&e->lock);
    }
    struct pl_model_stats *st = pl_engine_count(e, job);
    st->prompt_tokens += s->n_prompt;
    st->cached_tokens += s->n_cached;
    st->prefix_queries += s->n_prompt;
    st->prefix_hits += s->n_cached;
    pl_hist_add(&st->queue_time, (double)(s->admitted_ns - job->submit_ns) * 1e-9);
    pl_engine_count_end(job);
}

/* A further choice of a prompt waits until the first one's prompt is in the cache. */
static bool may_start(const struct pl_seq *s)
{
    const struct pl_seq *first = &s->job->seqs[s->choice - s->choice % s->job->req->n];
    return s == first || first->state == PL_SEQ_ENDED || (first->state == PL_SEQ_RUNNING && first->n_done >= first->n_prompt) ||
           s->job->req->prompt_logprobs;
}

/* Every sequence that runs may be preempted: there is a place for it before it begins. */
static bool reserve_place(struct pl_engine *e)
{
    if (e->n_running + e->n_preempted < e->preempted_cap)
        return true;
    struct pl_seq **more = realloc(e->preempted, 2 * e->preempted_cap * sizeof *more);
    if (more == NULL)
        return false;
    e->preempted = more;
    e->preempted_cap *= 2;
    return true;
}

/* Admits the next sequence of a waiting job; false when it has to wait. The job goes to the end of the list if it has more,
 * so that a request with many choices does not keep others out. */
static bool admit_from(struct pl_engine *e, struct pl_job *job)
{
    struct pl_seq *s = &job->seqs[job->n_admitted];
    if (!may_start(s) || !fits_now(e, s->n_prompt))
        return false;
    if (!reserve_place(e) || pl_seq_prepare(s, e->tok) != PL_OK) {
        pl_engine_fail_job(e, job, PL_ENOMEM, "out of memory");
        return true;
    }
    pl_engine_remove_waiting(e, job);
    if (++job->n_admitted < job->n_seqs) {
        job->next = NULL;
        *e->waiting_end = job;
        e->waiting_end = &job->next;
    }
    s->stamp = ++e->stamp;
    start_running(e, s);
    note_admission(e, s);
    if (s->max_new == 0 && s->prompt_logprobs == NULL)
        pl_engine_end_seq(e, s, PL_FINISH_LENGTH);
    return true;
}

void pl_engine_preempt(struct pl_engine *e, struct pl_seq *s)
{
    pl_log_debug("preempt choice=%u tokens=%u free=%u", s->choice, s->n_tokens, pl_kv_available(e->kv));
    pl_kv_release(e->kv, &s->table);
    pl_engine_drop_from(e->running, &e->n_running, s);
    s->state = PL_SEQ_PREEMPTED;
    s->n_done = s->take = 0;
    uint32_t at = e->n_preempted++;
    for (; at > 0 && e->preempted[at - 1]->stamp < s->stamp; at--)
        e->preempted[at] = e->preempted[at - 1];
    e->preempted[at] = s;
    e->stats.n_preempted++;
}

/* The sequence that would run next, NULL = none waits. */
static const struct pl_seq *next_waiting(const struct pl_engine *e)
{
    for (uint32_t i = e->n_preempted; i-- > 0;)
        if (pl_seq_has_room(e->preempted[i]))
            return e->preempted[i];
    for (const struct pl_job *job = e->waiting; job != NULL; job = job->next)
        if (may_start(&job->seqs[job->n_admitted]))
            return &job->seqs[job->n_admitted];
    return NULL;
}

/* Sequences whose client has not read for a while give their place up when others wait for one: they go on, later, where they
 * were. A client that is only a little late keeps it. */
static void park_paused(struct pl_engine *e)
{
    const struct pl_seq *next = next_waiting(e);
    if (next == NULL || (e->n_running < e->opts.max_sequences && fits_now(e, next->n_tokens > 0 ? next->n_tokens : next->n_prompt)))
        return;
    const uint64_t now = pl_now_ns();
    for (uint32_t i = e->n_running; i-- > 0;) {
        struct pl_seq *s = e->running[i];
        if (s->full_since != 0 && now - s->full_since >= PL_ENGINE_PARK_MS * 1000000ull && !pl_seq_has_room(s))
            pl_engine_preempt(e, s);
    }
}

void pl_engine_admit(struct pl_engine *e)
{
    park_paused(e);
    for (uint32_t i = e->n_preempted; i-- > 0 && e->n_running < e->opts.max_sequences;) {
        struct pl_seq *s = e->preempted[i];
        if (!pl_seq_has_room(s))
            continue; /* its client still reads nothing */
        if (!fits_now(e, s->n_tokens))
            return;
        pl_engine_drop_from(e->preempted, &e->n_preempted, s);
        start_running(e, s);
    }
    for (struct pl_job *job = e->waiting, *next; job != NULL && e->n_running < e->opts.max_sequences; job = next) {
        next = job->next;
        bool sibling_waits = !may_start(&job->seqs[job->n_admitted]);
        if (admit_from(e, job))
            next = e->waiting; /* from the front: the list has changed */
        else if (!sibling_waits)
            return; /* the oldest that could start does not fit: nobody overtakes it */
    }
}
