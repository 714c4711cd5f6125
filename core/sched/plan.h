/* plan: which sequences get how many tokens of the next iteration. A pure function: no page, clock or device is touched.
 * Decodes come first, so that a long prompt never stalls running streams; what remains of the budget goes to prefills,
 * oldest first. While anything decodes, prefills together get no more than a share of the budget, which bounds the time
 * between two tokens of a stream.
 * Source: Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_PLAN_H
#define PL_SCHED_PLAN_H

#include <stdint.h>

enum { PL_PLAN_SHARE = 4, PL_PLAN_MIN_CHUNK = 32 };

struct pl_plan_item {
    uint32_t left; /* tokens that are known and not yet computed; 0 = nothing to do (paused) */
    uint32_t take; /* result */
};

/* items: running sequences, oldest first. Returns the sum of all takes, at most budget. */
uint32_t pl_plan(struct pl_plan_item *items, uint32_t n, uint32_t budget);

#endif
