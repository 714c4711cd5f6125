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

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "core/base/buf.h"
#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"
#include "core/sched/draft.h"
#include "core/sched/runner.h"
#include "core/sched/seq.h"
#include "core/sched/step.h"
#include "core/text/tok.h"

#define PL_LOG_MODULE "engine"

struct pl_engine {
    struct pl_engine_opts opts;
    struct pl_runner runner;
    const struct pl_tok *tok; /* borrowed */
    struct pl_kv *kv;
    struct pl_sample_scratch *scratch;
    struct pl_buf text;
    int32_t *eog; /* ids that end a generation */
    size_t n_eog;

    /* engine thread only */
    struct pl_job *waiting, **waiting_end; /* jobs with sequences that were never admitted */
    struct pl_seq **running;               /* [n_running] oldest first */
    struct pl_seq **preempted;             /* [n_preempted] newest first: taken from the end; also those whose client reads nothing */
    uint32_t n_running, n_preempted, preempted_cap;
    uint64_t stamp;
    struct pl_step step;
    struct pl_draft_cost cost;
    pthread_t thread;
    bool thread_made;

    /* inbox: under lock. Rank: a reply's lock may be held when this one is taken, never the other way round. */
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    struct pl_job *inbox, **inbox_end;
    uint32_t n_queued; /* jobs of which nothing was admitted yet */
    uint32_t n_jobs;
    bool kicked, draining, abort_all, stop;

    pthread_mutex_t stats_lock;
    struct pl_engine_stats stats;
    atomic_uint_fast64_t busy_since; /* when the step that runs began; 0 = none runs */
    atomic_bool device_lost;
};

/* ---- inbox --------------------------------------------------------------------------------------------------------- */

static void kick(void *engine)
{
    struct pl_engine *e = engine;
    pthread_mutex_lock(&e->lock);
    e->kicked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

pl_status pl_engine_submit(struct pl_engine *e, struct pl_request *req, struct pl_reply *reply, struct pl_err *err)
{
    struct pl_job *job;
    uint32_t capacity = pl_engine_max_context(e);
    pl_status st = PL_OK;
    pthread_mutex_lock(&e->lock);
    if (e->draining || e->stop)
        st = pl_fail(err, PL_ESTOPPED, "the server is shutting down");
    else if (atomic_load(&e->device_lost))
        st = pl_fail(err, PL_EDEVICE, "the compute device failed; the server must be restarted");
    else if (e->n_queued >= e->opts.queue_limit)
        st = pl_fail(err, PL_EFULL, "%u requests are waiting already; try again later", e->n_queued);
    pthread_mutex_unlock(&e->lock);
    if (st == PL_OK)
        st = pl_job_new(&job, req, reply, capacity, err);
    if (st != PL_OK) {
        pthread_mutex_lock(&e->stats_lock);
        e->stats.n_refused++;
        pthread_mutex_unlock(&e->stats_lock);
        return st;
    }
    uint32_t n_choices = job->n_seqs; /* the job may be over as soon as it is in the inbox */
    pl_reply_attach(reply, kick, e);
    pthread_mutex_lock(&e->lock);
    *e->inbox_end = job;
    e->inbox_end = &job->next;
    e->n_queued++;
    e->n_jobs++;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    pthread_mutex_lock(&e->stats_lock);
    e->stats.n_submitted += n_choices;
    pthread_mutex_unlock(&e->stats_lock);
    return PL_OK;
}

/* ---- the end of sequences and jobs --------------------------------------------------------------------------------- */

static void drop_from(struct pl_seq **list, uint32_t *n, const struct pl_seq *s)
{
    for (uint32_t i = 0; i < *n; i++)
        if (list[i] == s) {
            memmove(list + i, list + i + 1, (*n - i - 1) * sizeof *list);
            --*n;
            return;
        }
}

static void remove_waiting(struct pl_engine *e, const struct pl_job *job)
{
    for (struct pl_job **at = &e->waiting; *at != NULL; at = &(*at)->next)
        if (*at == job) {
            if (e->waiting_end == &job->next)
                e->waiting_end = at;
            *at = job->next;
            return;
        }
}

static void finish_job(struct pl_engine *e, struct pl_job *job)
{
    bool queued = !job->started;
    if (job->n_admitted < job->n_seqs)
        remove_waiting(e, job);
    pl_reply_attach(job->reply, NULL, NULL);
    pl_job_free(job);
    pthread_mutex_lock(&e->lock);
    e->n_queued -= queued;
    if (--e->n_jobs == 0)
        pthread_cond_broadcast(&e->idle);
    pthread_mutex_unlock(&e->lock);
}

static void retire(struct pl_engine *e, struct pl_seq *s)
{
    pl_kv_release(e->kv, &s->table);
    if (s->state == PL_SEQ_RUNNING)
        drop_from(e->running, &e->n_running, s);
    else if (s->state == PL_SEQ_PREEMPTED)
        drop_from(e->preempted, &e->n_preempted, s);
    s->state = PL_SEQ_ENDED;
    s->job->n_live--;
}

static void count_end(struct pl_engine *e, const struct pl_seq *s, pl_finish finish, uint64_t now)
{
    struct pl_engine_stats *st = &e->stats;
    pthread_mutex_lock(&e->stats_lock);
    st->n_finished_stop += finish == PL_FINISH_STOP;
    st->n_finished_length += finish == PL_FINISH_LENGTH;
    st->n_cancelled += finish == PL_FINISH_CANCELLED;
    if (finish != PL_FINISH_CANCELLED) {
        pl_hist_add(&st->e2e, (double)(now - s->job->submit_ns) * 1e-9);
        pl_hist_add(&st->prompt_len, s->n_prompt);
        pl_hist_add(&st->output_len, pl_seq_output(s));
        if (s->first_token_ns != 0)
            pl_hist_add(&st->decode_time, (double)(now - s->first_token_ns) * 1e-9);
    }
    pthread_mutex_unlock(&e->stats_lock);
}

/* May free the job. */
static void end_seq(struct pl_engine *e, struct pl_seq *s, pl_finish finish)
{
    struct pl_job *job = s->job;
    uint64_t now = pl_now_ns();
    count_end(e, s, finish, now);
    pl_seq_push_done(s, finish, now, &e->text);
    retire(e, s);
    pl_seq_fini(s);
    if (job->n_live == 0)
        finish_job(e, job);
}

/* The whole request fails; other requests are not touched. Frees the job. */
static void fail_job(struct pl_engine *e, struct pl_job *job, pl_status code, const char *why)
{
    struct pl_event ev = {.kind = PL_EV_ERROR};
    pl_err_set(&ev.error, code, "", "%s", why);
    (void)pl_reply_push(job->reply, &ev, "", 0);
    pthread_mutex_lock(&e->stats_lock);
    e->stats.n_failed += job->n_live;
    pthread_mutex_unlock(&e->stats_lock);
    for (uint32_t i = 0; i < job->n_seqs; i++)
        if (job->seqs[i].state != PL_SEQ_ENDED)
            retire(e, &job->seqs[i]);
    finish_job(e, job);
}

static void cancel_job(struct pl_engine *e, struct pl_job *job)
{
    uint32_t n = job->n_seqs, live = job->n_live;
    for (uint32_t i = 0; i < n && live > 0; i++)
        if (job->seqs[i].state != PL_SEQ_ENDED) {
            live--;
            end_seq(e, &job->seqs[i], PL_FINISH_CANCELLED); /* the last one frees the job */
        }
}

/* Any job that is in some list, NULL when there is none. */
static struct pl_job *some_job(const struct pl_engine *e)
{
    return e->n_running > 0 ? e->running[0]->job : e->n_preempted > 0 ? e->preempted[0]->job : e->waiting;
}

static void fail_all(struct pl_engine *e, pl_status code, const char *why)
{
    for (struct pl_job *job; (job = some_job(e)) != NULL;)
        fail_job(e, job, code, why);
}

static void end_cancelled(struct pl_engine *e)
{
    for (uint32_t i = 0; i < e->n_running;) {
        if (!pl_reply_cancelled(e->running[i]->job->reply)) {
            i++;
            continue;
        }
        cancel_job(e, e->running[i]->job);
        i = 0;
    }
    while (e->n_preempted > 0) {
        uint32_t i = 0;
        while (i < e->n_preempted && !pl_reply_cancelled(e->preempted[i]->job->reply))
            i++;
        if (i == e->n_preempted)
            break;
        cancel_job(e, e->preempted[i]->job);
    }
    for (struct pl_job *job = e->waiting, *next; job != NULL; job = next) {
        next = job->next;
        if (pl_reply_cancelled(job->reply))
            cancel_job(e, job);
    }
}

/* ---- admission ----------------------------------------------------------------------------------------------------- */

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
    s->n_done = match ? pl_kv_match(e->kv, &s->table, s->tokens, s->n_tokens) : 0;
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
    pthread_mutex_lock(&e->stats_lock);
    e->stats.prompt_tokens += s->n_prompt;
    e->stats.cached_tokens += s->n_cached;
    e->stats.prefix_queries += s->n_prompt;
    e->stats.prefix_hits += s->n_cached;
    pl_hist_add(&e->stats.queue_time, (double)(s->admitted_ns - job->submit_ns) * 1e-9);
    pthread_mutex_unlock(&e->stats_lock);
}

/* A further choice of a prompt waits until the first one's prompt is in the cache. */
static bool may_start(const struct pl_seq *s)
{
    const struct pl_seq *first = &s->job->seqs[s->choice - s->choice % s->job->req->n];
    return s == first || first->state == PL_SEQ_ENDED || (first->state == PL_SEQ_RUNNING && first->n_done >= first->n_prompt) ||
           s->job->req->prompt_logprobs;
}

/* Admits the next sequence of a waiting job; false when it has to wait. The job goes to the end of the list if it has more,
 * so that a request with many choices does not keep others out. */
static bool admit_from(struct pl_engine *e, struct pl_job *job)
{
    struct pl_seq *s = &job->seqs[job->n_admitted];
    if (!may_start(s) || !fits_now(e, s->n_prompt))
        return false;
    if (pl_seq_prepare(s, e->tok) != PL_OK) {
        fail_job(e, job, PL_ENOMEM, "out of memory");
        return true;
    }
    remove_waiting(e, job);
    if (++job->n_admitted < job->n_seqs) {
        job->next = NULL;
        *e->waiting_end = job;
        e->waiting_end = &job->next;
    }
    s->stamp = ++e->stamp;
    start_running(e, s);
    note_admission(e, s);
    if (s->max_new == 0 && s->prompt_logprobs == NULL)
        end_seq(e, s, PL_FINISH_LENGTH);
    return true;
}

/* Takes a running sequence out: its pages are released (and stay in the cache while nobody needs them), its tokens are kept.
 * False when there is no memory to remember it. */
static bool preempt(struct pl_engine *e, struct pl_seq *s)
{
    if (e->n_preempted == e->preempted_cap) {
        struct pl_seq **more = realloc(e->preempted, 2 * e->preempted_cap * sizeof *more);
        if (more == NULL)
            return false;
        e->preempted = more;
        e->preempted_cap *= 2;
    }
    pl_log_debug("preempt choice=%u tokens=%u free=%u", s->choice, s->n_tokens, pl_kv_available(e->kv));
    pl_kv_release(e->kv, &s->table);
    drop_from(e->running, &e->n_running, s);
    s->state = PL_SEQ_PREEMPTED;
    s->n_done = s->take = 0;
    uint32_t at = e->n_preempted++;
    for (; at > 0 && e->preempted[at - 1]->stamp < s->stamp; at--)
        e->preempted[at] = e->preempted[at - 1];
    e->preempted[at] = s;
    pthread_mutex_lock(&e->stats_lock);
    e->stats.n_preempted++;
    pthread_mutex_unlock(&e->stats_lock);
    return true;
}

static bool has_room(const struct pl_seq *s)
{
    return pl_reply_has_room(s->job->reply, pl_reply_needs(s->job->n_live));
}

/* The sequence that would run next, NULL = none waits. */
static const struct pl_seq *next_waiting(const struct pl_engine *e)
{
    for (uint32_t i = e->n_preempted; i-- > 0;)
        if (has_room(e->preempted[i]))
            return e->preempted[i];
    for (const struct pl_job *job = e->waiting; job != NULL; job = job->next)
        if (may_start(&job->seqs[job->n_admitted]))
            return &job->seqs[job->n_admitted];
    return NULL;
}

/* Sequences whose client does not read give their place up when others wait for one: they go on, later, where they were. */
static void park_paused(struct pl_engine *e)
{
    const struct pl_seq *next = next_waiting(e);
    if (next == NULL || (e->n_running < e->opts.max_sequences && fits_now(e, next->n_tokens > 0 ? next->n_tokens : next->n_prompt)))
        return;
    for (uint32_t i = e->n_running; i-- > 0;)
        if (!has_room(e->running[i]) && !preempt(e, e->running[i]))
            return;
}

static void admit(struct pl_engine *e)
{
    park_paused(e);
    for (uint32_t i = e->n_preempted; i-- > 0 && e->n_running < e->opts.max_sequences;) {
        struct pl_seq *s = e->preempted[i];
        if (!has_room(s))
            continue; /* its client still reads nothing */
        if (!fits_now(e, s->n_tokens))
            return;
        drop_from(e->preempted, &e->n_preempted, s);
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

/* ---- a step -------------------------------------------------------------------------------------------------------- */

/* Pages for n guesses without taking from what the running sequences grow into next. */
static bool reserve_guesses(struct pl_engine *e, struct pl_seq *s, uint32_t n)
{
    uint32_t end = s->n_done + s->take + n;
    return end <= s->table.n_pages * PL_KV_PAGE ||
           (pl_kv_available(e->kv) > e->n_running && pl_kv_reserve(e->kv, &s->table, end) == PL_OK);
}

/* Guesses for sequences that decode, while these are few and the batch has room. */
static void guess(struct pl_engine *e, uint32_t n_seqs)
{
    uint32_t used = 0, n_decode = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        used += e->step.seqs[i]->take;
        n_decode += pl_seq_decodes(e->step.seqs[i]);
    }
    if (n_decode > e->opts.draft_sequences)
        return;
    for (uint32_t i = 0; i < n_seqs && used < e->opts.batch_tokens; i++) {
        struct pl_seq *s = e->step.seqs[i];
        if (!pl_seq_decodes(s))
            continue;
        size_t needs = pl_reply_needs(s->job->n_live), room = pl_reply_room(s->job->reply), most = e->opts.max_draft;
        size_t left = s->max_new - pl_seq_output(s) - 1, share = room > needs ? (room - needs) / s->job->n_live : 0;
        most = most < left ? most : left;
        most = most < share ? most : share;
        most = most < e->opts.batch_tokens - used ? most : e->opts.batch_tokens - used;
        uint32_t n = pl_draft_find(&s->draft, s->tokens, s->n_tokens, (uint32_t)most);
        n = pl_draft_worth(&s->draft, &e->cost, n, n_decode);
        s->draft.n = n > 0 && reserve_guesses(e, s, n) ? n : 0;
        used += s->draft.n;
    }
}

/* Sequences that get tokens now, with their takes, guesses and pages; oldest first. */
static uint32_t plan_step(struct pl_engine *e)
{
    for (uint32_t i = 0; i < e->n_running; i++) {
        struct pl_seq *s = e->running[i];
        e->step.plan[i] = (struct pl_plan_item){.left = has_room(s) ? s->n_tokens - s->n_done : 0};
    }
    (void)pl_plan(e->step.plan, e->n_running, e->opts.batch_tokens);
    for (uint32_t i = 0; i < e->n_running; i++)
        e->running[i]->take = e->step.plan[i].take, e->running[i]->draft.n = 0;
    for (uint32_t i = 0; i < e->n_running; i++) {
        struct pl_seq *s = e->running[i];
        while (s->take > 0 && pl_kv_reserve(e->kv, &s->table, s->n_done + s->take) != PL_OK)
            if (!preempt(e, e->running[e->n_running - 1])) /* maybe s itself, whose take is 0 then */
                s->take = 0;
    }
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->n_running; i++)
        if (e->running[i]->take > 0)
            e->step.seqs[n++] = e->running[i];
    if (e->opts.max_draft > 0)
        guess(e, n);
    return n;
}

static void count_token(struct pl_engine *e, struct pl_seq *s)
{
    uint64_t now = pl_now_ns();
    pthread_mutex_lock(&e->stats_lock);
    e->stats.generated_tokens++;
    if (s->first_token_ns == 0) {
        s->first_token_ns = now;
        pl_hist_add(&e->stats.ttft, (double)(now - s->job->submit_ns) * 1e-9);
        pl_hist_add(&e->stats.prefill_time, (double)(now - s->admitted_ns) * 1e-9);
    } else {
        pl_hist_add(&e->stats.itl, (double)(now - s->last_token_ns) * 1e-9);
    }
    pthread_mutex_unlock(&e->stats_lock);
    s->last_token_ns = now;
}

/* Samples the row that follows the sequence's last token. Returns whether the sequence goes on; if not, it and maybe its job
 * are gone. *token is what came out, -1 when nothing did. */
static bool sample_next(struct pl_engine *e, struct pl_seq *s, const float *logits, int32_t *token)
{
    const struct pl_request *req = s->job->req;
    bool ban = req->ignore_eos || pl_seq_output(s) < req->min_tokens;
    struct pl_choice choice;
    pl_finish finish;
    pl_status st = pl_sample(s->sampler, e->scratch, logits, e->runner.n_vocab, pl_seq_output(s), ban ? e->eog : NULL,
                             ban ? e->n_eog : 0, &choice);
    *token = st == PL_OK ? choice.token : -1;
    if (st != PL_OK) {
        fail_job(e, s->job, st, "the model's output is not a number for this request");
        return false;
    }
    count_token(e, s);
    if (!pl_seq_append(s, e->tok, &choice, &e->text, &finish))
        return true;
    end_seq(e, s, finish);
    return false;
}

/* The row after the sequence's last token, and as long as what comes out is what was guessed, the row after that guess: its
 * keys and values are those of the token. The first other token stays, the places of the guesses after it are written again. */
static void sample_rows(struct pl_engine *e, struct pl_seq *s, const float *logits)
{
    const uint32_t n = s->draft.n;
    uint32_t held = 0;
    int32_t guesses[PL_DRAFT_MAX], token;
    memcpy(guesses, s->draft.ids, sizeof guesses);
    s->draft.n = 0;
    bool on;
    while ((on = sample_next(e, s, logits + (size_t)held * e->runner.n_vocab, &token)) && held < n && token == guesses[held]) {
        held++;
        s->n_done++;
        pl_kv_commit(e->kv, &s->table, s->tokens, s->n_done);
    }
    if (n == 0)
        return;
    held += !on && held < n && token == guesses[held]; /* the guess that ended the text */
    if (on)
        pl_draft_learn(&s->draft, n, held);
    pthread_mutex_lock(&e->stats_lock);
    e->stats.draft_tokens += n;
    e->stats.draft_accepted += held;
    pthread_mutex_unlock(&e->stats_lock);
}

/* Log-probabilities of prompt tokens: row k of this step tells those of token n_done + k + 1. */
static pl_status take_prompt_rows(struct pl_engine *e, struct pl_seq *s, const float *logits)
{
    int32_t top = s->job->req->sampling.n_top_logprobs;
    for (uint32_t k = 0; k < s->take; k++) {
        uint32_t next = s->n_done + k + 1;
        if (next >= s->n_prompt)
            break;
        pl_status st = pl_logprobs(logits + (size_t)k * e->runner.n_vocab, e->runner.n_vocab, s->tokens[next],
                                   top > 0 ? (uint32_t)top : 0, &s->prompt_logprobs[next]);
        if (st != PL_OK)
            return st;
    }
    return s->n_done + s->take >= s->n_prompt ? pl_seq_push_prompt(s) : PL_OK;
}

/* What came out of the forward pass for one sequence; its logits start at `logits`. */
static void take_result(struct pl_engine *e, struct pl_seq *s, const float *logits)
{
    bool all = pl_seq_wants_all_rows(s), complete = s->n_done + s->take == s->n_tokens;
    const float *last = logits + (size_t)(all && s->take > 0 ? s->take - 1 : 0) * e->runner.n_vocab;
    pl_status st = all ? take_prompt_rows(e, s, logits) : PL_OK;
    s->n_done += s->take;
    s->take = 0;
    pl_kv_commit(e->kv, &s->table, s->tokens, s->n_done);
    if (st != PL_OK)
        fail_job(e, s->job, st, "the model's output is not a number for this request");
    else if (complete && s->max_new == 0)
        end_seq(e, s, PL_FINISH_LENGTH);
    else if (complete)
        sample_rows(e, s, last);
}

static bool still_running(const struct pl_engine *e, const struct pl_seq *s)
{
    for (uint32_t i = 0; i < e->n_running; i++)
        if (e->running[i] == s)
            return true;
    return false;
}

static void finish_step(struct pl_engine *e, uint32_t n_tokens)
{
    struct pl_engine_stats *st = &e->stats;
    pthread_mutex_lock(&e->stats_lock);
    st->n_steps++;
    st->last_step_ns = pl_now_ns();
    pl_hist_add(&st->step_tokens, n_tokens);
    pthread_mutex_unlock(&e->stats_lock);
}

/* A pass of nothing but decodes and their guesses took ns. */
static void learn_cost(struct pl_engine *e, uint32_t n_seqs, uint64_t ns)
{
    uint32_t n_guesses = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        if (!pl_seq_decodes(e->step.seqs[i]))
            return;
        n_guesses += e->step.seqs[i]->draft.n;
    }
    pl_draft_cost_learn(&e->cost, n_seqs, n_guesses, ns);
}

static void run_step(struct pl_engine *e, uint32_t n_seqs)
{
    struct pl_batch b;
    const float *logits = NULL;
    pl_status st = pl_step_build(&e->step, n_seqs, &b);
    uint64_t began = pl_now_ns();
    if (st == PL_OK)
        st = e->runner.forward(e->runner.self, &b, &logits);
    if (st != PL_OK) {
        pl_log_error("a forward pass failed: %s; all requests end, restart the server", pl_status_text(st));
        atomic_store(&e->device_lost, true);
        fail_all(e, PL_EDEVICE, "the compute device failed");
        return;
    }
    learn_cost(e, n_seqs, pl_now_ns() - began);
    /* a failing request may take sequences with it that come later in this step: their rows are passed over */
    for (uint32_t i = 0, row = 0; i < n_seqs; i++) {
        struct pl_seq *s = e->step.seqs[i];
        uint32_t next = row;
        while (next < b.n_rows && b.rows[next] < b.q_start[i + 1])
            next++;
        if (still_running(e, s))
            take_result(e, s, logits + (size_t)row * e->runner.n_vocab);
        row = next;
    }
    finish_step(e, b.n_tokens);
}

/* ---- thread -------------------------------------------------------------------------------------------------------- */

static void update_gauges(struct pl_engine *e)
{
    pthread_mutex_lock(&e->lock);
    uint32_t queued = e->n_queued;
    pthread_mutex_unlock(&e->lock);
    pthread_mutex_lock(&e->stats_lock);
    e->stats.running = e->n_running;
    e->stats.waiting = queued + e->n_preempted;
    e->stats.pages_held = pl_kv_held(e->kv);
    e->stats.pages_cached = pl_kv_cached(e->kv);
    pthread_mutex_unlock(&e->stats_lock);
}

/* Moves the inbox over; sleeps first while there is nothing to do. False when it is time to go. */
static bool take_inbox(struct pl_engine *e, bool idle)
{
    pthread_mutex_lock(&e->lock);
    while (idle && e->inbox == NULL && !e->kicked && !e->stop && !e->abort_all)
        pthread_cond_wait(&e->wake, &e->lock);
    e->kicked = false;
    if (e->inbox != NULL) {
        *e->waiting_end = e->inbox;
        e->waiting_end = e->inbox_end;
        e->inbox = NULL;
        e->inbox_end = &e->inbox;
    }
    bool stop = e->stop, abort_all = e->abort_all || stop;
    e->abort_all = false;
    pthread_mutex_unlock(&e->lock);
    if (abort_all)
        fail_all(e, PL_ESTOPPED, "the server is shutting down");
    return !stop;
}

static void *engine_main(void *arg)
{
    struct pl_engine *e = arg;
    bool idle = true;
    if (e->runner.attach != NULL)
        e->runner.attach(e->runner.self);
    while (take_inbox(e, idle)) {
        atomic_store(&e->busy_since, pl_now_ns());
        end_cancelled(e);
        if (atomic_load(&e->device_lost))
            fail_all(e, PL_EDEVICE, "the compute device failed");
        admit(e);
        uint32_t n = plan_step(e);
        if (n > 0)
            run_step(e, n);
        idle = n == 0;
        update_gauges(e);
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

static void init_stats(struct pl_engine_stats *s)
{
#define HIST(h, b) s->h = (struct pl_hist){.bounds = b, .n_bounds = PL_COUNT_OF(b)}
    HIST(ttft, seconds_fine);
    HIST(itl, seconds_itl);
    HIST(e2e, seconds_long);
    HIST(queue_time, seconds_long);
    HIST(prefill_time, seconds_long);
    HIST(decode_time, seconds_long);
    HIST(prompt_len, tokens_wide);
    HIST(output_len, tokens_wide);
    HIST(step_tokens, tokens_step);
#undef HIST
}

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
    pthread_mutex_init(&e->lock, NULL);
    pthread_mutex_init(&e->stats_lock, NULL);
    pthread_cond_init(&e->wake, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->idle, &attr);
    pthread_condattr_destroy(&attr);
    init_stats(&e->stats);
    pl_draft_cost_init(&e->cost);
    e->running = malloc(opts->max_sequences * sizeof(void *));
    e->preempted_cap = opts->max_sequences;
    e->preempted = malloc(e->preempted_cap * sizeof(void *));
    pl_status st = pl_kv_new(&e->kv, opts->n_pages, salt, err);
    if (st == PL_OK && (e->running == NULL || e->preempted == NULL || pl_step_init(&e->step, opts->batch_tokens, opts->max_sequences) != PL_OK ||
                        !collect_eog(e) ||
                        pl_sample_scratch_new(&e->scratch, runner->n_vocab) != PL_OK))
        st = pl_fail(err, PL_ENOMEM, "no memory for the engine");
    e->stats.pages_total = opts->n_pages;
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
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
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
    pl_sample_scratch_free(e->scratch);
    pl_buf_fini(&e->text);
    pl_step_fini(&e->step);
    free(e->eog);
    free(e->running);
    free(e->preempted);
    pthread_mutex_destroy(&e->lock);
    pthread_mutex_destroy(&e->stats_lock);
    pthread_cond_destroy(&e->wake);
    pthread_cond_destroy(&e->idle);
    free(e);
}

void pl_engine_stats(struct pl_engine *e, struct pl_engine_stats *out)
{
    pthread_mutex_lock(&e->stats_lock);
    *out = e->stats;
    pthread_mutex_unlock(&e->stats_lock);
    pthread_mutex_lock(&e->lock);
    if (e->n_queued > out->waiting)
        out->waiting = e->n_queued; /* the engine may be in the middle of a long step */
    pthread_mutex_unlock(&e->lock);
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
