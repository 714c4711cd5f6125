/* sample: from a row of logits to a token: penalties, bias, temperature, top-k, top-p, min-p, seeded draw, log-probabilities;
 * here, or on a device that samples in its own memory. draw.h defines which token comes out.
 * Order of operations: logit_bias, repetition/presence/frequency penalties, then (reported log-probabilities are of the raw
 * logits before any of this, as OpenAI and vLLM report them), temperature, top_k, top_p, min_p, draw.
 * Thread: the engine's; one state belongs to one sequence.  Owns: the state's token counts.
 * Fails: PL_EFORMAT when the row has a NaN or no finite value (that sequence ends with an error, nobody else's).
 * The draw depends on (seed, index of the token in its sequence) only: same seed, same text, whatever else runs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SAMPLE_SAMPLE_H
#define PL_SAMPLE_SAMPLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/device/draw.h"

struct pl_logit_bias {
    int32_t id;
    float bias;
};

struct pl_sampling {
    float temperature;        /* below 1e-5 = greedy, ties by lowest id */
    float top_p;              /* 1 = off */
    float min_p;              /* 0 = off */
    uint32_t top_k;           /* 0 = off */
    float repetition_penalty; /* 1 = off; over prompt and output tokens (Keskar et al. 2019, CTRL) */
    float presence_penalty, frequency_penalty; /* 0 = off; over output tokens (OpenAI) */
    const struct pl_logit_bias *bias; /* borrowed; ids are distinct, and checked against the logits' width */
    size_t n_bias;
    uint64_t seed;
    int32_t n_top_logprobs; /* -1 = no log-probabilities, 0.. = the token's own and this many alternatives */
};

struct pl_choice {
    int32_t token;
    float logprob;  /* natural; only when n_top_logprobs >= 0 */
    uint32_t n_top; /* descending, ties by lowest id */
    struct pl_top top[PL_MAX_TOP_LOGPROBS];
};

struct pl_sampler; /* per sequence: counts of seen tokens, scratch is shared */
struct pl_sample_scratch; /* per thread: two arrays of the vocabulary's size */

pl_status pl_sample_scratch_new(struct pl_sample_scratch **out, uint32_t n_vocab) PL_MUST_CHECK;
void pl_sample_scratch_free(struct pl_sample_scratch *s);

/* *params is copied, params->bias borrowed. prompt: for the repetition penalty. NULL when memory is out. */
struct pl_sampler *pl_sampler_new(const struct pl_sampling *params, const int32_t *prompt, size_t n_prompt);
void pl_sampler_free(struct pl_sampler *s);
/* Tells the sampler that token was appended to the output (also when tokens are replayed). */
void pl_sampler_accept(struct pl_sampler *s, int32_t token);
/* index: how many tokens the output has so far. banned: ids that must not come out (min_tokens, ignore_eos), may be NULL. */
pl_status pl_sample(const struct pl_sampler *s, struct pl_sample_scratch *scratch, const float *logits, uint32_t n_vocab,
                    uint32_t index, const int32_t *banned, size_t n_banned, struct pl_choice *out) PL_MUST_CHECK;
/* Log-probability of `token` in this row and the best n_top (for prompt log-probabilities). */
pl_status pl_logprobs(const float *logits, uint32_t n_vocab, int32_t token, uint32_t n_top, struct pl_choice *out) PL_MUST_CHECK;

/* The same on a device. draws: zero at first; a step's rows are added one by one, by one of these. PL_ENOMEM. */
pl_status pl_draws_init(struct pl_draws *d, uint32_t max_rows) PL_MUST_CHECK;
void pl_draws_fini(struct pl_draws *d);
/* A row that is sampled as pl_sample would after more[n_more] were accepted as well; index counts them. */
pl_status pl_draws_sample(struct pl_draws *d, const struct pl_sampler *s, const int32_t *more, uint32_t n_more, uint32_t index, const int32_t *banned,
                          size_t n_banned) PL_MUST_CHECK;
/* A row whose log-probabilities are wanted, as pl_logprobs; n_top -1 = a row of which nothing is wanted. */
void pl_draws_given(struct pl_draws *d, int32_t token, int32_t n_top);
/* What pl_sample, or pl_logprobs, gives of that row. */
pl_status pl_drawn_choice(const struct pl_draw *draw, const struct pl_drawn *drawn, struct pl_choice *out) PL_MUST_CHECK;

#endif
