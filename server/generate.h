/* generate: what chat and completions share: from checked parameters to a running request, and from its events to bytes.
 * Thread: one microhttpd worker at a time.  Owns: a generation owns its reply, its choices' text and its buffers; it is the
 * connection's producer and is freed through it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_GENERATE_H
#define PL_SERVER_GENERATE_H

#include "core/sched/engine.h"
#include "server/http.h"
#include "server/registry.h"
#include "server/schema.h"

/* What is known of one choice so far. */
struct pl_gen_choice {
    struct pl_buf text;                                 /* whole answers only */
    struct pl_buf logprobs;                             /* chat: entries; completions: "tokens" */
    struct pl_buf lp_values, lp_top, lp_offsets;        /* completions: the other arrays */
    size_t n_logprobs;                                  /* entries */
    int64_t n_chars; /* where the next token's text begins in the choice's text; below 0 for what is not shown (BOS) */
    bool opened, done;
    pl_finish finish;
    uint32_t n_completion;
    double sum_logprob;
};

struct pl_gen {
    struct pl_producer base;
    struct pl_registry *models; /* borrowed */
    struct pl_target target;    /* the adapter has moved on into the request */
    struct pl_http_usage *usage;    /* borrowed */
    struct pl_reply *reply;
    bool chat, stream, include_usage, logprobs, echo, has_tier, any_output;
    uint32_t n_choices;  /* that the engine makes */
    uint32_t n, best_of; /* of each prompt: shown, made */
    uint32_t n_planned; /* tokens of all prompts */
    size_t n_held; /* bytes of a whole answer's choices */
    uint32_t n_done, prompt_tokens, cached_tokens, completion_tokens;
    double queue_ms, ttft_ms, total_ms;
    char *model; /* as it was asked for */
    char id[48], fingerprint[32];
    long long created;
    struct pl_buf prefix; /* of every chunk: up to and including "choices":[{"index": */
    const char **prompt_texts; /* echo: of each prompt */
    size_t *prompt_bytes;
    struct pl_arena *arena; /* for them */
    struct pl_gen_choice choices[];
};

/* Takes prompts (in arena a, which moves in or is freed, like the references of t) and runs them; resp gets a producer or an error. */
void pl_gen_start(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_params *p, struct pl_target *t, struct pl_arena *a,
                  const struct pl_prompt *prompts, uint32_t n_prompts);
/* Memory that a request's prompt may take. */
enum { PL_GEN_ARENA = 256 << 20 };

/* gen_text.c: pieces of bodies. */
void pl_gen_add_token_string(struct pl_buf *out, const struct pl_instance *m, int32_t id, bool bytes_form);
void pl_gen_add_real(struct pl_buf *out, double v);
/* Characters that begin in s. */
size_t pl_gen_chars(const char *s, size_t n);
/* Appends one token's log-probabilities to the choice's buffers. */
void pl_gen_add_logprobs(struct pl_gen *g, struct pl_gen_choice *c, const struct pl_choice *t, bool known);
/* The "logprobs" member's value, from what the choice's buffers hold, which are empty afterwards; "null" without any. */
void pl_gen_take_logprobs(struct pl_gen *g, struct pl_gen_choice *c, struct pl_buf *out);
void pl_gen_add_usage(const struct pl_gen *g, struct pl_buf *out);
const char *pl_gen_finish_name(pl_finish f);

#endif
