/* pace: how many prompt tokens a pass takes while texts are streamed, so that it is over in about the time that is allowed
 * between two tokens of a stream. It follows what passes took: another model, longer contexts or a busy machine make the
 * pieces smaller. Pieces change when tokens come, never which.
 * Thread: engine only.  Owns: nothing.
 * Source: Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_PACE_H
#define PL_SCHED_PACE_H

#include <stdint.h>

enum { PL_PACE_LEAST = 16 }; /* tokens: below, passes do not get much shorter, and prompts take for ever */

/* 0 = not yet known */
struct pl_pace {
    float token_ns; /* of passes with prompts, by all their tokens */
    float plain_ns; /* a pass without */
};

/* Prompt tokens at most in a pass in which n_decode sequences decode, at least PL_PACE_LEAST. gap_ns: how long the pass may
 * take; where it takes more than half of that without prompts, twice as long as then. 0 = any time. */
uint32_t pl_pace_room(const struct pl_pace *p, uint64_t gap_ns, uint32_t n_decode);
/* A pass of n_tokens took ns. */
void pl_pace_learn(struct pl_pace *p, uint32_t n_tokens, uint64_t ns);
void pl_pace_learn_plain(struct pl_pace *p, uint64_t ns);

#endif
