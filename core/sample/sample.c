/* sample: from a row of logits to a token.
 *
 * Bias, penalties and bans concern few tokens; with them the row is copied once and changed there. Greedy takes the maximum.
 * Otherwise weights exp((x - max) / temperature) are computed once, and each filter gives a weight below which no token can
 * matter: min_p itself, the k-th best maximum of groups of the row for top_k, a share of the mass for top_p. Selection goes
 * on among the few candidates above it; nothing is sorted.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sample/sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/sample/scan.h"

enum { CHUNK = 1024 }; /* of a row, that is gathered from at once */

struct count {
    int32_t token; /* -1 = empty */
    uint32_t n_output; /* times in the output; 0 = only in the prompt */
};

struct pl_sampler {
    struct pl_sampling p;
    struct count *seen; /* open addressing */
    uint32_t n_seen, mask;
};

typedef uint64_t candidate; /* weight (not negative) and inverted id: the larger of two is the better, ties by lower id */

struct pl_sample_scratch {
    float *x;               /* [n_vocab] logits, then weights */
    float *sums, *most;     /* of weights: scan.h */
    candidate *list;        /* [n_vocab] */
};

/* ---- state --------------------------------------------------------------------------------------------------------- */

pl_status pl_sample_scratch_new(struct pl_sample_scratch **out, uint32_t n_vocab)
{
    struct pl_sample_scratch *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PL_ENOMEM;
    s->x = malloc(n_vocab * sizeof *s->x);
    s->sums = malloc(pl_scan_sums(n_vocab) * sizeof *s->sums);
    s->most = malloc(pl_scan_groups(n_vocab) * sizeof *s->most);
    s->list = malloc(n_vocab * sizeof *s->list);
    if (s->x == NULL || s->sums == NULL || s->most == NULL || s->list == NULL) {
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
    free(s->sums);
    free(s->most);
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

/* Keeps the best n of the row in out->top, by insertion: n is small and most of the row fails the first comparison. */
static void find_top(const float *logits, uint32_t n_vocab, uint32_t n, double lse, struct pl_choice *out)
{
    const struct pl_scan *scan = pl_scan_best();
    uint32_t at[CHUNK];
    out->n_top = 0;
    for (uint32_t from = 0; n > 0 && from < n_vocab; from += CHUNK) {
        const float least = out->n_top == n ? out->top[n - 1].logprob : -INFINITY;
        const uint32_t found = scan->gather(logits + from, n_vocab - from < CHUNK ? n_vocab - from : CHUNK, least, at);
        for (uint32_t f = 0; f < found; f++) {
            const uint32_t i = from + at[f];
            if (out->n_top == n && !(logits[i] > out->top[n - 1].logprob))
                continue;
            uint32_t k = out->n_top < n ? out->n_top++ : n - 1;
            for (; k > 0 && logits[i] > out->top[k - 1].logprob; k--)
                out->top[k] = out->top[k - 1];
            out->top[k] = (struct pl_top){(int32_t)i, logits[i]};
        }
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
    const struct pl_scan *scan = pl_scan_best();
    if (!scan->max(logits, n_vocab, &max, &at))
        return PL_EFORMAT;
    double lse = max + log(scan->sum_exp(logits, n_vocab, max));
    out->token = token;
    out->logprob = (float)((double)logits[token] - lse);
    find_top(logits, n_vocab, n_top < n_vocab ? n_top : n_vocab, lse, out);
    return PL_OK;
}

/* ---- choosing ------------------------------------------------------------------------------------------------------ */

/* What n uses in the output cost a token. */
static float taken_off(const struct pl_sampling *p, uint32_t n)
{
    return (float)n * p->frequency_penalty + (n > 0 ? p->presence_penalty : 0);
}

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
        *v -= taken_off(&s->p, c->n_output);
    }
    for (size_t i = 0; i < n_banned; i++)
        if ((uint32_t)banned[i] < n_vocab)
            x[banned[i]] = -INFINITY;
}

/* Uniform in [0, 1), in 2^-53, from (seed, index): two rounds of splitmix64 (Steele et al. 2014). */
static uint64_t uniform(uint64_t seed, uint32_t index)
{
    uint64_t z = seed;
    for (int round = 0; round < 2; round++) {
        z += 0x9e3779b97f4a7c15u * (round == 0 ? 1 : (uint64_t)index + 1);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
    }
    return z >> 11;
}

static candidate make(float weight, uint32_t id)
{
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return (candidate)bits << 32 | ~id;
}

static float weight_of(candidate c)
{
    const uint32_t bits = (uint32_t)(c >> 32);
    float weight;
    memcpy(&weight, &bits, sizeof weight);
    return weight;
}

static uint64_t amount_of(candidate c)
{
    return (uint64_t)(weight_of(c) * PL_DRAW_AMOUNT);
}

static uint64_t amount_of_all(const candidate *list, uint32_t n)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += amount_of(list[i]);
    return sum;
}

static void swap(candidate *a, candidate *b)
{
    const candidate t = *a;
    *a = *b;
    *b = t;
}

/* Moves the best to the front, in any order, until there are k or their amounts reach the goal; at least one. Returns how
 * many. Selection as by Hoare: [0, lo) is in, [hi, n) is out. */
static uint32_t keep_best(candidate *list, uint32_t n, uint32_t k, uint64_t goal)
{
    uint32_t lo = 0, hi = n;
    uint64_t sum = 0;
    while (lo < hi && lo < k && (lo == 0 || sum < goal)) {
        swap(&list[lo], &list[lo + (hi - lo) / 2]);
        const candidate pivot = list[lo];
        uint32_t at = lo + 1;
        uint64_t better = 0;
        for (uint32_t i = lo + 1; i < hi; i++) {
            const candidate c = list[i];
            list[i] = list[at];
            list[at] = c;
            better += c > pivot ? amount_of(c) : 0;
            at += c > pivot;
        }
        swap(&list[lo], &list[at - 1]); /* the better ones, pivot, the others */
        if (at - 1 > lo && (at - 1 >= k || sum + better >= goal)) {
            hi = at - 1;
        } else {
            lo = at;
            sum += better + amount_of(pivot);
        }
    }
    return lo;
}

/* Lists the tokens whose weight is positive and at least `least`, by id. Returns how many. */
static uint32_t collect(struct pl_sample_scratch *s, uint32_t n_vocab, float least)
{
    const struct pl_scan *scan = pl_scan_best();
    uint32_t at[CHUNK], n = 0;
    least = least > 0 ? least : 0x1p-149f;
    for (uint32_t from = 0; from < n_vocab; from += CHUNK) {
        const uint32_t found = scan->gather(s->x + from, n_vocab - from < CHUNK ? n_vocab - from : CHUNK, least, at);
        for (uint32_t f = 0; f < found; f++)
            s->list[n++] = make(s->x[from + at[f]], from + at[f]);
    }
    return n;
}

/* Lists at least the k best: as many groups have a maximum that is no smaller than the k-th best maximum. */
static uint32_t collect_top_k(struct pl_sample_scratch *s, uint32_t n_vocab, uint32_t k)
{
    const uint32_t n_groups = pl_scan_groups(n_vocab);
    if (k > n_groups || n_groups > n_vocab)
        return collect(s, n_vocab, 0);
    pl_scan_best()->group_max(s->x, n_vocab, s->most);
    for (uint32_t i = 0; i < n_groups; i++)
        s->list[i] = make(s->most[i] > 0 ? s->most[i] : 0, i);
    keep_best(s->list, n_groups, k, UINT64_MAX);
    float least = 1; /* the best token's weight */
    for (uint32_t i = 0; i < k; i++)
        least = weight_of(s->list[i]) < least ? weight_of(s->list[i]) : least;
    return collect(s, n_vocab, least);
}

/* Lists at least the best whose amounts together reach the goal, which is top_p of the total: what is left out weighs less than
 * the rest of it, if each of it weighs less than that rest by the vocabulary's size. Mostly far fewer do. */
static uint32_t collect_top_p(struct pl_sample_scratch *s, uint32_t n_vocab, float top_p, double total, uint64_t goal)
{
    const double safe = (1 - (double)top_p) * total / n_vocab / 2;
    const float least[] = {256 * safe < 1 ? (float)(256 * safe) : 1, (float)safe, 0}; /* the best token's weight is 1 */
    uint32_t n = 0;
    for (int i = 0; i < 3 && (n == 0 || amount_of_all(s->list, n) < goal); i++)
        n = collect(s, n_vocab, least[i]);
    return n;
}

/* The n best, which lead the list, by id. */
static uint32_t by_id(struct pl_sample_scratch *s, uint32_t n_vocab, uint32_t n)
{
    candidate worst = UINT64_MAX;
    for (uint32_t i = 0; i < n; i++)
        worst = s->list[i] < worst ? s->list[i] : worst;
    const uint32_t found = collect(s, n_vocab, weight_of(worst));
    uint32_t kept = 0;
    for (uint32_t i = 0; i < found; i++) {
        s->list[kept] = s->list[i]; /* overwritten unless it counts */
        kept += s->list[i] >= worst;
    }
    return kept;
}

/* Draws from all tokens. */
static int32_t draw_any(const struct pl_sample_scratch *s, uint32_t n_vocab, double goal, int32_t best)
{
    double sum = 0;
    for (uint32_t from = 0; from < n_vocab; from += PL_SCAN_SUM) {
        const float block = s->sums[from / PL_SCAN_SUM];
        if (!(sum + block > goal)) {
            sum += block;
            continue;
        }
        const uint32_t end = n_vocab - from < PL_SCAN_SUM ? n_vocab : from + PL_SCAN_SUM;
        for (uint32_t i = from; i < end; i++)
            if ((sum += s->x[i]) > goal)
                return (int32_t)i;
    }
    return best; /* rounding alone leads here */
}

static int32_t draw_listed(const candidate *list, uint32_t n, uint64_t u)
{
    const uint64_t goal = (uint64_t)((unsigned __int128)(u << 11) * amount_of_all(list, n) >> 64);
    uint64_t sum = 0;
    uint32_t i = 0;
    while (i + 1 < n && (sum += amount_of(list[i])) <= goal)
        i++;
    return (int32_t)~(uint32_t)list[i];
}

static int32_t draw(const struct pl_sampler *s, struct pl_sample_scratch *scratch, const float *x, uint32_t n_vocab, float max, int32_t best,
                    uint32_t index)
{
    const struct pl_sampling *p = &s->p;
    const uint64_t u = uniform(p->seed, index);
    const double mass = pl_scan_best()->weigh(x, n_vocab, max, 1 / p->temperature, scratch->x, scratch->sums);
    candidate *list = scratch->list;
    if (p->top_k == 0 && p->top_p >= 1 && p->min_p <= 0)
        return draw_any(scratch, n_vocab, (double)u * 0x1p-53 * mass, best);
    uint64_t goal = (uint64_t)(mass * (double)PL_DRAW_AMOUNT * p->top_p);
    uint32_t n;
    if (p->top_k > 0) {
        n = keep_best(list, collect_top_k(scratch, n_vocab, p->top_k), p->top_k, UINT64_MAX);
        goal = (uint64_t)((double)amount_of_all(list, n) * p->top_p);
    } else {
        n = p->top_p < 1 ? collect_top_p(scratch, n_vocab, p->top_p, mass, goal) : collect(scratch, n_vocab, p->min_p);
    }
    if (p->top_p < 1)
        n = keep_best(list, n, n, goal);
    if (p->top_k > 0 || p->top_p < 1)
        n = by_id(scratch, n_vocab, n);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        list[kept] = list[i]; /* overwritten unless it counts */
        kept += weight_of(list[i]) >= p->min_p;
    }
    return draw_listed(list, kept, u);
}

static bool is_banned(int32_t token, const int32_t *banned, size_t n_banned)
{
    size_t i = 0;
    while (i < n_banned && banned[i] != token)
        i++;
    return i < n_banned;
}

pl_status pl_sample(const struct pl_sampler *s, struct pl_sample_scratch *scratch, const float *logits, uint32_t n_vocab,
                    uint32_t index, const int32_t *banned, size_t n_banned, struct pl_choice *out)
{
    const struct pl_sampling *p = &s->p;
    const struct pl_scan *scan = pl_scan_best();
    const bool plain = p->n_bias == 0 && !has_penalties(p), greedy = p->temperature < 1e-5f;
    const float *x = logits;
    float max;
    uint32_t best;
    bool found = plain && (greedy || n_banned == 0) && scan->max(x, n_vocab, &max, &best);
    if (!found || (greedy && is_banned((int32_t)best, banned, n_banned))) {
        memcpy(scratch->x, logits, n_vocab * sizeof *logits);
        adjust(s, scratch->x, n_vocab, banned, n_banned);
        x = scratch->x;
        found = scan->max(x, n_vocab, &max, &best);
    }
    if (!found)
        return PL_EFORMAT;
    out->token = greedy ? (int32_t)best : draw(s, scratch, x, n_vocab, max, (int32_t)best, index);
    out->logprob = 0;
    out->n_top = 0;
    return p->n_top_logprobs < 0 ? PL_OK : pl_logprobs(logits, n_vocab, out->token, (uint32_t)p->n_top_logprobs, out);
}

/* ---- on a device --------------------------------------------------------------------------------------------------- */

pl_status pl_draws_init(struct pl_draws *d, uint32_t max_rows)
{
    *d = (struct pl_draws){.rows = malloc(max_rows * sizeof *d->rows)};
    return d->rows != NULL ? PL_OK : PL_ENOMEM;
}

void pl_draws_fini(struct pl_draws *d)
{
    free(d->rows);
    free(d->edits);
    *d = (struct pl_draws){0};
}

static bool reserve_edits(struct pl_draws *d, size_t n)
{
    if (n <= d->edits_cap - d->n_edits)
        return true;
    const size_t cap = 2 * (d->n_edits + n);
    struct pl_edit *more = cap <= UINT32_MAX ? realloc(d->edits, cap * sizeof *more) : NULL;
    if (more == NULL)
        return false;
    d->edits = more;
    d->edits_cap = (uint32_t)cap;
    return true;
}

static void add_edit(struct pl_draws *d, int32_t id, float value)
{
    d->edits[d->n_edits++] = (struct pl_edit){id, value};
}

static uint32_t times(const int32_t *ids, uint32_t n, int32_t id)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < n; i++)
        found += ids[i] == id;
    return found;
}

static void add_seen(struct pl_draws *d, const struct pl_sampler *s, const int32_t *more, uint32_t n_more)
{
    for (uint32_t i = 0; i <= s->mask; i++)
        if (s->seen[i].token >= 0)
            add_edit(d, s->seen[i].token, taken_off(&s->p, s->seen[i].n_output + times(more, n_more, s->seen[i].token)));
    for (uint32_t i = 0; i < n_more; i++)
        if (slot(s, more[i])->token != more[i] && times(more, i, more[i]) == 0)
            add_edit(d, more[i], taken_off(&s->p, times(more, n_more, more[i])));
}

pl_status pl_draws_sample(struct pl_draws *d, const struct pl_sampler *s, const int32_t *more, uint32_t n_more, uint32_t index, const int32_t *banned,
                          size_t n_banned)
{
    const struct pl_sampling *p = &s->p;
    const bool greedy = p->temperature < 1e-5f;
    if (!reserve_edits(d, p->n_bias + s->n_seen + n_more + n_banned))
        return PL_ENOMEM;
    struct pl_draw row = {.given = -1, .n_top = p->n_top_logprobs, .inverse = greedy ? 0 : 1 / p->temperature, .top_p = p->top_p, .min_p = p->min_p,
                          .top_k = p->top_k, .repetition = p->repetition_penalty, .add = d->n_edits, .u = uniform(p->seed, index)};
    for (size_t i = 0; i < p->n_bias; i++)
        add_edit(d, p->bias[i].id, p->bias[i].bias);
    row.seen = d->n_edits;
    if (has_penalties(p))
        add_seen(d, s, more, n_more);
    row.set = d->n_edits;
    for (size_t i = 0; i < n_banned; i++)
        add_edit(d, banned[i], -INFINITY);
    row.end = d->n_edits;
    d->rows[d->n_rows++] = row;
    return PL_OK;
}

void pl_draws_given(struct pl_draws *d, int32_t token, int32_t n_top)
{
    d->rows[d->n_rows++] = (struct pl_draw){.given = token, .n_top = n_top};
}

pl_status pl_drawn_choice(const struct pl_draw *draw, const struct pl_drawn *drawn, struct pl_choice *out)
{
    out->token = drawn->token;
    out->logprob = 0;
    out->n_top = 0;
    if (drawn->token < 0)
        return PL_EFORMAT;
    if (draw->n_top < 0)
        return PL_OK;
    const double lse = drawn->max + log(drawn->sum);
    out->logprob = (float)((double)drawn->own - lse);
    out->n_top = drawn->n_top;
    for (uint32_t i = 0; i < out->n_top; i++)
        out->top[i] = (struct pl_top){drawn->top[i].id, (float)((double)drawn->top[i].logprob - lse)};
    return PL_OK;
}
