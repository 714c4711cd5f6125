/* engine_int: the engine's state, and what its files call of each other: engine.c (inbox, thread, life), admit.c (who runs),
 * pass.c (one forward pass), end.c (how sequences and jobs end). See engine.h and the design in engine.c.
 * Thread: engine only, but for what is marked.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_ENGINE_INT_H
#define PL_SCHED_ENGINE_INT_H

#include <pthread.h>
#include <stdatomic.h>

#include "core/base/buf.h"
#include "core/kv/kv.h"
#include "core/sched/adapters.h"
#include "core/sched/draft.h"
#include "core/sched/engine.h"
#include "core/sched/pace.h"
#include "core/sched/runner.h"
#include "core/sched/seq.h"
#include "core/sched/step.h"

struct pl_sampled {
    pl_status status;
    struct pl_choice choice;
};

/* A sequence whose client reads nothing for so long gives its place up when another waits for it. */
enum { PL_ENGINE_PARK_MS = 500 };

struct pl_engine {
    struct pl_engine_opts opts;
    struct pl_runner runner;
    const struct pl_tok *tok; /* borrowed */
    struct pl_kv *kv;
    struct pl_sample_scratch **scratch; /* [n_workers] of the pool */
    struct pl_sampled *sampled;         /* [max_sequences] of this step */
    struct pl_draws draws;              /* of this step's rows, where the runner samples */
    struct pl_drawn *drawn;             /* [batch_tokens] */
    unsigned n_workers;
    struct pl_buf text;
    int32_t *eog; /* ids that end a generation */
    size_t n_eog;

    /* engine thread only */
    struct pl_job *waiting, **waiting_end; /* jobs with sequences that were never admitted */
    struct pl_seq **running;               /* [n_running] oldest first */
    struct pl_seq **preempted;             /* [n_preempted] newest first: taken from the end; also those whose client reads nothing */
    uint32_t n_running, n_preempted, preempted_cap; /* cap: at least both together */
    uint64_t stamp;
    struct pl_step step;
    struct pl_draft_cost cost;
    struct pl_pace pace;
    struct pl_engine_stats stats; /* copied to `published` at the end of each iteration and before an end is told */
    pthread_t thread;
    bool thread_made;

    /* inbox: under lock. Rank: a reply's lock may be held when this one is taken, never the other way round. */
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    struct pl_job *inbox, **inbox_end;
    uint32_t n_queued; /* jobs of which nothing was admitted yet */
    uint32_t n_jobs;
    struct pl_engine_task *tasks, **tasks_end;
    bool kicked, draining, abort_all, stop;

    struct pl_engine_stats published; /* under lock */
    atomic_uint_fast64_t n_submitted, n_refused;
    atomic_uint_fast64_t busy_since; /* when the step that runs began; 0 = none runs */
    atomic_bool device_lost;
    pl_status lost_code; /* of what came to be lost; set before device_lost, like its words */
    const char *lost_text;
};

/* admit.c */
void pl_engine_admit(struct pl_engine *e);
/* Takes a running sequence out: its pages are released (and stay in the cache while nobody needs them), its tokens are kept. */
void pl_engine_preempt(struct pl_engine *e, struct pl_seq *s);

/* pass.c: plan returns how many sequences get tokens now, with their takes, guesses and pages; run computes them. */
uint32_t pl_engine_plan(struct pl_engine *e);
void pl_engine_run(struct pl_engine *e, uint32_t n_seqs);

/* The counters of the job's model, until end. */
static inline struct pl_model_stats *pl_engine_count(struct pl_engine *e, const struct pl_job *job)
{
    struct pl_served *a = job->req->adapter;
    if (a == NULL)
        return &e->stats.base;
    pthread_mutex_lock(&a->lock);
    return &a->stats;
}

static inline void pl_engine_count_end(const struct pl_job *job)
{
    if (job->req->adapter != NULL)
        pthread_mutex_unlock(&job->req->adapter->lock);
}

/* engine.c */
void pl_engine_publish(struct pl_engine *e);
/* Nothing can be computed any more: ends all requests, for good. */
void pl_engine_lose(struct pl_engine *e, pl_status code);

/* end.c */
void pl_engine_drop_from(struct pl_seq **list, uint32_t *n, const struct pl_seq *s);
void pl_engine_remove_waiting(struct pl_engine *e, const struct pl_job *job);
/* May free the job. */
void pl_engine_end_seq(struct pl_engine *e, struct pl_seq *s, pl_finish finish);
/* The whole request fails; other requests are not touched. Frees the job. */
void pl_engine_fail_job(struct pl_engine *e, struct pl_job *job, pl_status code, const char *why);
void pl_engine_fail_all(struct pl_engine *e, pl_status code, const char *why);
void pl_engine_end_cancelled(struct pl_engine *e);

/* Its client reads: what a pass may push has room. */
static inline bool pl_seq_has_room(const struct pl_seq *s)
{
    return pl_reply_has_room(s->job->reply, pl_reply_needs(s->job->n_live));
}

#endif
