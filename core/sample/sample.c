/* sample: from a row of logits to a token.
 *
 * A row is copied once into scratch with bias and penalties applied to the few tokens they concern. Greedy takes the
 * maximum. Otherwise weights exp((x - max) / temperature) are computed once; top_k and min_p give a threshold by selection,
 * top_p by sorting only the candidates that can matter, found by a growing partial selection, never the vocabulary.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sample/sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct count {
    int32_t token; /* -1 = empty */
    uint32_t n_output; /* times in the output; 0 = only in the prompt */
};

struct pl_sampler {
    struct pl_sampling p;
    struct count *seen; /* open addressing */
    uint32_t n_seen, mask;
};

struct candidate {
    float weight;
    int32_t id;
};

struct pl_sample_scratch {
    float *x;               /* [n_vocab] logits, then weights */
    struct candidate *list; /* [n_vocab] */
};

/* ---- state --------------------------------------------------------------------------------------------------------- */

pl_status pl_sample_scratch_new(struct pl_sample_scratch **out, uint32_t n_vocab)
{
    struct pl_sample_scratch *s = calloc(1, sizeof *s);
    if (s == NULL || (s->x = malloc(n_vocab * sizeof *s->x)) == NULL || (s->list = malloc(n_vocab * sizeof *s->list)) == NULL) {
        pl_sample_scratch_free(s);
        return PL_ENOMEM;
    }
    *out = s;
    return PL_OK;
}

void pl_sample_scratch_free(struct pl_sample_scratch *s)
{
    if (s == NULL)
        return;
    free(s->x);
    free(s->list);
    free(s);
}

static struct count *slot(const struct pl_sampler *s, int32_t token)
{
    uint32_t i = (uint32_t)token * 2654435769u & s->mask;
    while (s->seen[i].token != token && s->seen[i].token != -1)
        i = (i + 1) & s->mask;
    return &s->seen[i];
}

static bool alloc_seen(struct pl_sampler *s, uint32_t cap)
{
    s->seen = malloc(cap * sizeof *s->seen);
    s->mask = cap - 1;
    for (uint32_t i = 0; s->seen != NULL && i < cap; i++)
        s->seen[i] = (struct count){-1, 0};
    return s->seen != NULL;
}

/* Returns NULL when there is no memory to remember a further token; the penalties then ignore it. */
static struct count *see(struct pl_sampler *s, int32_t token)
{
    struct count *c = slot(s, token);
    if (c->token == token)
        return c;
    if (2 * (s->n_seen + 1) > s->mask) {
        struct pl_sampler old = *s;
        if (!alloc_seen(s, 2 * (old.mask + 1))) {
            s->seen = old.seen;
            s->mask = old.mask;
            return NULL;
        }
        for (uint32_t i = 0; i <= old.mask; i++)
            if (old.seen[i].token != -1)
                *slot(s, old.seen[i].token) = old.seen[i];
        free(old.seen);
        c = slot(s, token);
    }
    c->token = token;
    s->n_seen++;
    return c;
}

static bool has_penalties(const struct pl_sampling *p)
{
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
}

struct pl_sampler *pl_sampler_new(const struct pl_sampling *params, const int32_t *prompt, size_t n_prompt)
{
    struct pl_sampler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->p = *params;
    if (!alloc_seen(s, 64)) {
        free(s);
        return NULL;
    }
    for (size_t i = 0; params->repetition_penalty != 1 && i < n_prompt; i++)
        if (see(s, prompt[i]) == NULL) {
            pl_sampler_free(s);
            return NULL;
        }
    return s;
}

void pl_sampler_free(struct pl_sampler *s)
{
    if (s == NULL)
        return;
    free(s->seen);
    free(s);
}

void pl_sampler_accept(struct pl_sampler *s, int32_t token)
{
    if (!has_penalties(&s->p))
        return;
    struct count *c = see(s, token);
    if (c != NULL)
        c->n_output++;
}

/* ---- log-probabilities --------------------------------------------------------------------------------------------- */

/* exp in a form that compilers turn into vector code; relative error below 2^-21, 0 below -87. */
static inline float fast_exp(float x)
{
    float y = x < -87.f ? -87.f : x;
    float n = (y * 1.44269504088896341f + 12582912.f) - 12582912.f;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    union {
        int32_t i;
        float f;
    } scale = {.i = ((int32_t)n + 127) << 23};
    return x < -87.f ? 0.f : p * scale.f;
}

/* The largest logit and its lowest id; false when a logit is NaN or +inf, or none is finite. */
static bool find_max(const float *x, uint32_t n, float *max, uint32_t *at)
{
    float best[16], check[16] = {0};
    uint32_t i = 0;
    for (int k = 0; k < 16; k++)
        best[k] = -INFINITY;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) {
            best[k] = x[i + k] > best[k] ? x[i + k] : best[k];
            check[k] += x[i + k] != x[i + k];
        }
    for (; i < n; i++) {
        best[0] = x[i] > best[0] ? x[i] : best[0];
        check[0] += x[i] != x[i];
    }
    for (int k = 1; k < 16; k++) {
        best[0] = best[k] > best[0] ? best[k] : best[0];
        check[0] += check[k];
    }
    if (check[0] != 0 || !isfinite(best[0]))
        return false;
    for (i = 0; x[i] != best[0]; i++)
        ;
    *max = best[0];
    *at = i;
    return true;
}

static double log_sum_exp(const float *x, uint32_t n, float max)
{
    double total = 0;
    for (uint32_t i = 0; i < n;) {
        float part[16] = {0};
        uint32_t end = n - i < 4096 ? n : i + 4096;
        for (; i + 16 <= end; i += 16)
            for (int k = 0; k < 16; k++)
                part[k] += fast_exp(x[i + k] - max);
        for (; i < end; i++)
            part[0] += fast_exp(x[i] - max);
        for (int k = 0; k < 16; k++)
            total += part[k];
    }
    return max + log(total);
}

/* Keeps the best n of the row in out->top, by insertion: n is small and most of the row fails the first comparison. */
static void find_top(const float *logits, uint32_t n_vocab, uint32_t n, double lse, struct pl_choice *out)
{
    out->n_top = 0;
    for (uint32_t i = 0; n > 0 && i < n_vocab; i++) {
        if (out->n_top == n && !(logits[i] > out->top[n - 1].logprob))
            continue;
        uint32_t at = out->n_top < n ? out->n_top++ : n - 1;
        for (; at > 0 && logits[i] > out->top[at - 1].logprob; at--)
            out->top[at] = out->top[at - 1];
        out->top[at] = (struct pl_top){(int32_t)i, logits[i]};
    }
    for (uint32_t i = 0; i < out->n_top; i++)
        out->top[i].logprob = (float)((double)out->top[i].logprob - lse);
}

pl_status pl_logprobs(const float *logits, uint32_t n_vocab, int32_t token, uint32_t n_top, struct pl_choice *out)
{
    float max;
    uint32_t at;
    if (token < 0 || (uint32_t)token >= n_vocab || n_top > PL_MAX_TOP_LOGPROBS)
        return PL_EINVAL;
    if (!find_max(logits, n_vocab, &max, &at))
        return PL_EFORMAT;
    double lse = log_sum_exp(logits, n_vocab, max);
    out->token = token;
    out->logprob = (float)((double)logits[token] - lse);
    find_top(logits, n_vocab, n_top < n_vocab ? n_top : n_vocab, lse, out);
    return PL_OK;
}

/* ---- choosing ------------------------------------------------------------------------------------------------------ */

static void adjust(const struct pl_sampler *s, float *x, uint32_t n_vocab, const int32_t *banned, size_t n_banned)
{
    for (size_t i = 0; i < s->p.n_bias; i++)
        if ((uint32_t)s->p.bias[i].id < n_vocab)
            x[s->p.bias[i].id] += s->p.bias[i].bias;
    for (uint32_t i = 0; has_penalties(&s->p) && i <= s->mask; i++) {
        const struct count *c = &s->seen[i];
        if (c->token < 0 || (uint32_t)c->token >= n_vocab)
            continue;
        float *v = &x[c->token];
        *v = *v > 0 ? *v / s->p.repetition_penalty : *v * s->p.repetition_penalty;
        *v -= (float)c->n_output * s->p.frequency_penalty + (c->n_output > 0 ? s->p.presence_penalty : 0);
    }
    for (size_t i = 0; i < n_banned; i++)
        if ((uint32_t)banned[i] < n_vocab)
            x[banned[i]] = -INFINITY;
}

/* Uniform in [0, 1) from (seed, index): two rounds of splitmix64 (Steele et al. 2014). */
static double uniform(uint64_t seed, uint32_t index)
{
    uint64_t z = seed;
    for (int round = 0; round < 2; round++) {
        z += 0x9e3779b97f4a7c15u * (round == 0 ? 1 : (uint64_t)index + 1);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
    }
    return (double)(z >> 11) * 0x1p-53;
}

static bool before(struct candidate a, struct candidate b)
{
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

/* Moves the k first of list (by `before`) to its front, in any order (Hoare's selection). */
static void select_first(struct candidate *list, uint32_t n, uint32_t k)
{
    uint32_t lo = 0, hi = n;
    while (hi - lo > 1 && k > lo && k < hi) {
        struct candidate pivot = list[lo + (hi - lo) / 2];
        uint32_t i = lo, j = hi - 1;
        for (;;) {
            while (before(list[i], pivot))
                i++;
            while (before(pivot, list[j]))
                j--;
            if (i >= j)
                break;
            struct candidate t = list[i];
            list[i++] = list[j];
            list[j--] = t;
        }
        uint32_t cut = j + 1 > lo ? j + 1 : lo + 1; /* all before cut precede or equal the pivot */
        if (cut == hi)
            cut = hi - 1;
        if (k <= cut)
            hi = cut;
        else
            lo = cut;
    }
}

static int compare(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    return before(*x, *y) ? -1 : before(*y, *x);
}

/* Shortens the list to the smallest front whose weight reaches top_p of the total. Sorts a growing front only. */
static uint32_t keep_top_p(struct candidate *list, uint32_t n, float top_p)
{
    double total = 0, sum = 0;
    for (uint32_t i = 0; i < n; i++)
        total += list[i].weight;
    double goal = total * top_p;
    uint32_t done = 0;
    for (uint32_t front = 64; done < n; front *= 8) {
        uint32_t end = front < n ? front : n;
        select_first(list + done, n - done, end - done);
        qsort(list + done, end - done, sizeof *list, compare);
        for (; done < end; done++) {
            sum += list[done].weight;
            if (sum >= goal)
                return done + 1;
        }
    }
    return n;
}

static int32_t draw(const struct pl_sampler *s, struct pl_sample_scratch *scratch, uint32_t n_vocab, float max, uint32_t index)
{
    const struct pl_sampling *p = &s->p;
    float *x = scratch->x, inverse = 1 / p->temperature;
    struct candidate *list = scratch->list;
    for (uint32_t i = 0; i < n_vocab; i++)
        x[i] = fast_exp((x[i] - max) * inverse);
    float floor = p->min_p > 0 ? p->min_p : 0; /* the best token's weight is 1 */
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        list[n] = (struct candidate){x[i], (int32_t)i};
        n += x[i] > 0 && (x[i] >= floor || (p->top_p < 1) || p->top_k > 0);
    }
    if (p->top_k > 0 && p->top_k < n) {
        select_first(list, n, p->top_k);
        n = p->top_k;
    }
    if (p->top_p < 1)
        n = keep_top_p(list, n, p->top_p);
    uint32_t kept = 0;
    double total = 0;
    for (uint32_t i = 0; i < n; i++)
        if (list[i].weight >= floor) {
            list[kept++] = list[i];
            total += list[i].weight;
        }
    /* selection leaves an order that depends on the row only, so the draw is reproducible */
    double goal = uniform(p->seed, index) * total, sum = 0;
    for (uint32_t i = 0; i < kept; i++) {
        sum += list[i].weight;
        if (sum > goal)
            return list[i].id;
    }
    return list[kept - 1].id;
}

pl_status pl_sample(const struct pl_sampler *s, struct pl_sample_scratch *scratch, const float *logits, uint32_t n_vocab,
                    uint32_t index, const int32_t *banned, size_t n_banned, struct pl_choice *out)
{
    const struct pl_sampling *p = &s->p;
    bool plain = p->n_bias == 0 && n_banned == 0 && !has_penalties(p), greedy = p->temperature < 1e-5f;
    const float *x = logits;
    float max;
    uint32_t best;
    if (!plain || !greedy) {
        memcpy(scratch->x, logits, n_vocab * sizeof *logits);
        adjust(s, scratch->x, n_vocab, banned, n_banned);
        x = scratch->x;
    }
    if (!find_max(x, n_vocab, &max, &best))
        return PL_EFORMAT;
    int32_t token = greedy ? (int32_t)best : draw(s, scratch, n_vocab, max, index);
    out->token = token;
    out->logprob = 0;
    out->n_top = 0;
    return p->n_top_logprobs < 0 ? PL_OK : pl_logprobs(logits, n_vocab, token, (uint32_t)p->n_top_logprobs, out);
}
