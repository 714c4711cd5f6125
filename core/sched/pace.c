/* pace: how many prompt tokens a pass takes while texts are streamed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/pace.h"

#include "core/sched/average.h"

static const float WEIGHT = 0.25f;

uint32_t pl_pace_room(const struct pl_pace *p, uint64_t gap_ns, uint32_t n_decode)
{
    if (gap_ns == 0)
        return UINT32_MAX;
    const float gap = (float)gap_ns, twice = 2 * p->plain_ns, ns = twice > gap ? twice : gap;
    const float least = (float)(n_decode + PL_PACE_LEAST), most = 1e9f;
    const float tokens = p->token_ns > 0 ? ns / p->token_ns : 0;
    return (uint32_t)(tokens < least ? least : tokens > most ? most : tokens) - n_decode;
}

static void learn(float *mean, float value)
{
    if (*mean == 0)
        *mean = value;
    else
        pl_average(mean, value, WEIGHT, *mean);
}

void pl_pace_learn(struct pl_pace *p, uint32_t n_tokens, uint64_t ns)
{
    if (n_tokens >= PL_PACE_LEAST) /* few tokens cost no less than reading the weights */
        learn(&p->token_ns, (float)ns / (float)n_tokens);
}

void pl_pace_learn_plain(struct pl_pace *p, uint64_t ns)
{
    learn(&p->plain_ns, (float)ns);
}
