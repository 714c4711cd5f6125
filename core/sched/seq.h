/* seq: one sequence (a choice of a request) and the job (the request) it belongs to, inside the engine.
 * Thread: engine only, but for pl_job_new, which the submitting thread calls.
 * Owns: a job its request's arena, a reference to its reply and its sequences; a sequence its tokens, sampler and text state.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_SEQ_H
#define PL_SCHED_SEQ_H

#include "core/kv/kv.h"
#include "core/sched/draft.h"
#include "core/sched/engine.h"
#include "core/sched/reply_int.h"

typedef enum { PL_SEQ_NEW, PL_SEQ_RUNNING, PL_SEQ_PREEMPTED, PL_SEQ_ENDED } pl_seq_state;

struct pl_job;

struct pl_seq {
    struct pl_job *job; /* borrowed */
    uint32_t choice;
    pl_seq_state state;
    uint64_t stamp; /* order of first admission: who is newest */
    int32_t *tokens; /* prompt, then output */
    uint32_t n_tokens, n_prompt, max_new;
    uint32_t n_done;   /* tokens whose keys and values are in the cache */
    uint32_t n_cached; /* of the prompt, found at first admission */
    uint32_t take;     /* tokens of the step that is being built, without guesses */
    struct pl_draft draft;
    struct pl_kv_table table;
    struct pl_sampler *sampler;
    struct pl_detok detok;
    struct pl_choice *prompt_logprobs; /* [n_prompt] until handed to the reply */
    uint64_t admitted_ns, first_token_ns, last_token_ns;
    uint64_t full_since; /* when its reply was first seen without room for a step, 0 = it has room */
};

struct pl_job {
    struct pl_job *next; /* inbox or waiting list */
    struct pl_request *req;
    struct pl_reply *reply;
    uint64_t submit_ns;
    bool started; /* a sequence of it was admitted */
    uint32_t n_seqs, n_live, n_admitted;
    struct pl_seq seqs[];
};

/* max_context bounds prompt and output. On success the request's arena has moved in and a reference to reply is taken. */
pl_status pl_job_new(struct pl_job **out, struct pl_request *req, struct pl_reply *reply, uint32_t max_context, struct pl_err *err)
    PL_MUST_CHECK;
void pl_job_free(struct pl_job *job);
/* Of a job that no engine took: the request stays the caller's. */
void pl_job_forgo(struct pl_job *job);

/* Allocates what a sequence needs while it runs. */
pl_status pl_seq_prepare(struct pl_seq *s, const struct pl_tok *tok) PL_MUST_CHECK;
/* Frees that again (pages must have been released). */
void pl_seq_fini(struct pl_seq *s);

static inline const struct pl_prompt *pl_seq_prompt(const struct pl_seq *s)
{
    return &s->job->req->prompts[s->choice / s->job->req->n];
}

static inline uint32_t pl_seq_output(const struct pl_seq *s)
{
    return s->n_tokens - s->n_prompt;
}

/* Prompt log-probabilities are still to come: the logits of each position are wanted. */
static inline bool pl_seq_wants_all_rows(const struct pl_seq *s)
{
    return s->prompt_logprobs != NULL;
}

/* Its next token comes from this step, and nothing else does. */
static inline bool pl_seq_decodes(const struct pl_seq *s)
{
    return s->take == 1 && s->n_done + 1 == s->n_tokens && s->max_new > 0 && !pl_seq_wants_all_rows(s);
}

/* Pushes events; PL_ENOMEM: an event or a piece of text is missing, so that the request has failed.
 * What a step pushes for a sequence is at most pl_reply_needs(1) - 1 events, and one for each guess. */
pl_status pl_seq_push_prompt(struct pl_seq *s) PL_MUST_CHECK;
/* Appends the token, pushes its event; *over: the sequence is, with *finish set. */
pl_status pl_seq_append(struct pl_seq *s, const struct pl_tok *tok, const struct pl_choice *sampled, struct pl_buf *text, bool *over,
                        pl_finish *finish) PL_MUST_CHECK;
pl_status pl_seq_push_done(struct pl_seq *s, pl_finish finish, uint64_t now_ns, struct pl_buf *text) PL_MUST_CHECK;

#endif
