/* plan: which sequences get how many tokens of the next iteration. A pure function: no page, clock or device is touched.
 * Decodes come first, so that a long prompt never stalls running streams; what remains of the budget goes to prefills,
 * oldest first, while anything decodes no more than what is allowed beside it (pace.h).
 * Source: Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_PLAN_H
#define PL_SCHED_PLAN_H

#include <stdint.h>

struct pl_plan_item {
    uint32_t left; /* tokens that are known and not yet computed; 0 = nothing to do (paused) */
    uint32_t take; /* result */
};

/* items: running sequences, oldest first. beside: tokens of prefills, at most, if anything decodes. Returns the sum of all
 * takes, at most budget. */
uint32_t pl_plan(struct pl_plan_item *items, uint32_t n, uint32_t budget, uint32_t beside);

#endif
