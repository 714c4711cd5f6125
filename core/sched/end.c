/* end: how sequences and jobs end: finished, failed or cancelled.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/base/clock.h"
#include "core/sched/engine_int.h"

void pl_engine_drop_from(struct pl_seq **list, uint32_t *n, const struct pl_seq *s)
{
    for (uint32_t i = 0; i < *n; i++)
        if (list[i] == s) {
            memmove(list + i, list + i + 1, (*n - i - 1) * sizeof *list);
            --*n;
            return;
        }
}

void pl_engine_remove_waiting(struct pl_engine *e, const struct pl_job *job)
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
        pl_engine_remove_waiting(e, job);
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
        pl_engine_drop_from(e->running, &e->n_running, s);
    else if (s->state == PL_SEQ_PREEMPTED)
        pl_engine_drop_from(e->preempted, &e->n_preempted, s);
    pl_step_forget(&e->step, s);
    s->state = PL_SEQ_ENDED;
    s->job->n_live--;
}

static void count_end(struct pl_engine *e, const struct pl_seq *s, pl_finish finish, uint64_t now)
{
    struct pl_model_stats *st = pl_engine_count(e, s->job);
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
    pl_engine_count_end(s->job);
    pl_engine_publish(e); /* who hears of the end may ask for the counters */
}

void pl_engine_end_seq(struct pl_engine *e, struct pl_seq *s, pl_finish finish)
{
    struct pl_job *job = s->job;
    uint64_t now = pl_now_ns();
    count_end(e, s, finish, now);
    const bool told = pl_seq_push_done(s, finish, now, &e->text) == PL_OK || finish == PL_FINISH_CANCELLED; /* then nobody is left to miss it */
    retire(e, s);
    if (!told) { /* this one is counted already */
        pl_engine_fail_job(e, job, PL_ENOMEM, "out of memory");
        return;
    }
    pl_seq_fini(s);
    if (job->n_live == 0)
        finish_job(e, job);
}

void pl_engine_fail_job(struct pl_engine *e, struct pl_job *job, pl_status code, const char *why)
{
    struct pl_event ev = {.kind = PL_EV_ERROR};
    pl_err_set(&ev.error, code, "", "%s", why);
    pl_engine_count(e, job)->n_failed += job->n_live;
    pl_engine_count_end(job);
    pl_engine_publish(e);
    (void)pl_reply_push(job->reply, &ev, "", 0);
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
            pl_engine_end_seq(e, &job->seqs[i], PL_FINISH_CANCELLED); /* the last one frees the job */
        }
}

/* Any job that is in some list, NULL when there is none. */
static struct pl_job *some_job(const struct pl_engine *e)
{
    return e->n_running > 0 ? e->running[0]->job : e->n_preempted > 0 ? e->preempted[0]->job : e->waiting;
}

void pl_engine_fail_all(struct pl_engine *e, pl_status code, const char *why)
{
    for (struct pl_job *job; (job = some_job(e)) != NULL;)
        pl_engine_fail_job(e, job, code, why);
}

void pl_engine_end_cancelled(struct pl_engine *e)
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
