/* draft: guesses a sequence's next tokens from its own text, and decides how many guesses are worth computing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/draft.h"

#include "core/sched/average.h"

static const float FIRST_RATE = 0.5f, FIRST_SLOPE = 0.25f, WEIGHT = 0.125f;

void pl_draft_init(struct pl_draft *d)
{
    *d = (struct pl_draft){.rate = {FIRST_RATE, FIRST_RATE}, .rest = PL_DRAFT_RETRY};
}

void pl_draft_cost_init(struct pl_draft_cost *c)
{
    for (uint32_t i = 0; i <= PL_DRAFT_SEQS; i++) {
        c->base_ns[i] = 0;
        c->slope[i] = FIRST_SLOPE;
    }
}

uint32_t pl_draft_find(struct pl_draft *d, const int32_t *tokens, uint32_t n, uint32_t max)
{
    if (n < 3 || max == 0)
        return 0;
    const int32_t *end = tokens + n;
    const uint32_t lowest = n > PL_DRAFT_WINDOW ? n - PL_DRAFT_WINDOW : 0;
    uint32_t at = 0; /* what followed the same tokens; 0 = found none */
    d->gram = 0;
    for (uint32_t i = n - 1; i > lowest + 1; i--) {
        if (tokens[i - 1] != end[-1] || tokens[i - 2] != end[-2])
            continue;
        if (i > 2 && tokens[i - 3] == end[-3]) {
            at = i;
            d->gram = 3;
            break;
        }
        if (at == 0) {
            at = i;
            d->gram = 2;
        }
    }
    if (at == 0)
        return 0;
    if (max > PL_DRAFT_MAX)
        max = PL_DRAFT_MAX;
    for (uint32_t k = 0; k < max; k++) /* a short loop goes on into the guesses themselves */
        d->ids[k] = at + k < n ? tokens[at + k] : d->ids[at + k - n];
    return max;
}

static float *rate_of(struct pl_draft *d)
{
    return &d->rate[d->gram == 3];
}

uint32_t pl_draft_worth(struct pl_draft *d, const struct pl_draft_cost *c, uint32_t n, uint32_t n_seqs)
{
    if (n == 0 || n_seqs == 0 || n_seqs > PL_DRAFT_SEQS)
        return 0;
    /* tokens per time = (n_seqs + p + p² + …) / (1 + k * slope): one more guess as long as it raises that */
    const float p = *rate_of(d), slope = c->slope[n_seqs];
    float tokens = (float)n_seqs, time = 1, held = p;
    uint32_t k = 0;
    while (k < n && held * time > slope * tokens) {
        tokens += held;
        time += slope;
        held *= p;
        k++;
    }
    if (k == 0 && ++d->passed >= d->rest)
        k = 1;
    if (k > 0)
        d->passed = 0;
    return k;
}

void pl_draft_learn(struct pl_draft *d, uint32_t n, uint32_t n_held)
{
    float *rate = rate_of(d);
    for (uint32_t i = 0; i < n_held; i++)
        *rate += WEIGHT * (1 - *rate);
    if (n_held < n)
        *rate -= WEIGHT * *rate;
    if (n_held > 0)
        d->rest = PL_DRAFT_RETRY;
    else if (d->rest < PL_DRAFT_REST)
        d->rest *= 2;
}

void pl_draft_cost_learn(struct pl_draft_cost *c, uint32_t n_seqs, uint32_t n_guesses, uint64_t ns)
{
    if (n_seqs == 0 || n_seqs > PL_DRAFT_SEQS)
        return;
    float *base = &c->base_ns[n_seqs];
    if (n_guesses == 0 && *base == 0)
        *base = (float)ns;
    else if (n_guesses == 0)
        pl_average(base, (float)ns, WEIGHT, *base);
    else if (*base > 0) {
        float slope = ((float)ns / *base - 1) / (float)n_guesses;
        pl_average(&c->slope[n_seqs], slope < 0 ? 0 : slope > 1 ? 1 : slope, WEIGHT, 0.5f);
    }
}
