/* reply: the bounded ring of events through which the engine answers one request, and the only thing that both sides of
 * the inbox hold. The engine pushes and never waits; the consumer (an HTTP worker, a terminal) pops when woken.
 * Every admitted request gets, for each choice, exactly one PL_EV_DONE or, for all of them, one PL_EV_ERROR.
 * Thread: push side engine, pop side one consumer; cancel from anywhere.  Owns: ring, text bytes, prompt log-probabilities.
 * A full ring pauses that request's sequences, not the engine.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_REPLY_H
#define PL_SCHED_REPLY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/sample/sample.h"

typedef enum { PL_FINISH_STOP, PL_FINISH_LENGTH, PL_FINISH_CANCELLED } pl_finish;

typedef enum {
    PL_EV_PROMPT, /* prompt log-probabilities of a choice are complete (only when asked for); comes before its tokens */
    PL_EV_TOKEN,  /* one token; its text may be empty while bytes are held back */
    PL_EV_DONE,   /* the choice is finished; text = what was still held back */
    PL_EV_ERROR,  /* the request failed; nothing follows for any choice */
} pl_event_kind;

struct pl_event {
    pl_event_kind kind;
    uint32_t choice; /* prompt index * n + i */
    struct pl_choice sampled; /* TOKEN: the token, and log-probabilities when asked for */
    const char *text; /* valid until the next pl_reply_next; whole UTF-8 characters */
    size_t n_text;
    pl_finish finish;  /* DONE */
    int stop_index;    /* DONE: which stop string matched, -1 = none (EOS, length, cancel) */
    uint32_t n_prompt, n_cached, n_completion; /* DONE: tokens */
    uint64_t queue_ns, ttft_ns, total_ns;      /* DONE: since submit; ttft 0 = no token came */
    const struct pl_choice *prompt_logprobs;   /* PROMPT: [n_prompt]; entry 0 has n_top 0 and logprob 0; valid as long as the reply */
    struct pl_err error; /* ERROR */
};

struct pl_reply;

/* Per choice: its prompt log-probabilities, a token and its end; and an error. A ring of just that size works, slowly. */
static inline size_t pl_reply_needs(size_t n_choices)
{
    return 3 * n_choices + 1;
}

/* wake(udata) is called (from the engine's thread, must not block or call back) when the ring goes from empty to
 * non-empty. capacity: events, at least pl_reply_needs(choices of the request). NULL when memory is out. The caller holds one reference. */
struct pl_reply *pl_reply_new(size_t capacity, void (*wake)(void *udata), void *udata);
void pl_reply_ref(struct pl_reply *r);
void pl_reply_unref(struct pl_reply *r);
/* Pops the oldest event into *ev; false when there is none now. */
bool pl_reply_next(struct pl_reply *r, struct pl_event *ev);
/* The consumer is gone or wants no more: the engine ends its sequences within one iteration. */
void pl_reply_cancel(struct pl_reply *r);
bool pl_reply_cancelled(const struct pl_reply *r);
/* Blocks until an event is there (for callers without an event loop: cli, tests); false after timeout_ms (-1 = never). */
bool pl_reply_wait(struct pl_reply *r, int timeout_ms);

#endif
