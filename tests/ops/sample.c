/* sample: a device that samples gives the host's tokens and log-probabilities, bit for bit, whatever the order in which a
 * block's threads run; rows of every kind are sampled side by side.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/sample.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/device.h"
#include "core/sample/sample.h"
#include "tests/tools/emulated.h"

enum { MOST_V = 9000, GAP = 3, N_SEEN = 40 };

static uint64_t state = 1;

static double uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

typedef enum { USUAL, EQUAL /* a few different values */, FLAT /* one value */, PEAK, WITH_NAN, WITH_INFINITY, NOTHING /* finite */, ONE, BANNED_NAN } kind;

static void fill_row(float *x, uint32_t V, kind k)
{
    for (uint32_t i = 0; i < V; i++) {
        const double v = 8 * uniform() - 4 + (uniform() < 0.02 ? 6 : 0);
        x[i] = k == EQUAL ? (float)(int)(v / 2) : k == FLAT ? 1.5f : k == NOTHING || k == ONE ? -INFINITY : (float)v;
    }
    if (k == PEAK)
        x[V / 3] = 200, x[V / 2] = 60;
    if (k == WITH_NAN)
        x[V / 2] = NAN;
    if (k == WITH_INFINITY)
        x[V - 1] = INFINITY;
    if (k == ONE)
        x[V / 2] = -1000;
    if (k == BANNED_NAN)
        x[1] = NAN; /* see `banned` */
}

static const int32_t banned[] = {1, 5};

static const struct row {
    kind kind;
    float temperature, top_p, min_p;
    uint32_t top_k;
    float repetition, presence, frequency;
    uint32_t n_bias, n_banned, n_guesses; /* the last: accepted by the host, told as guesses to the device */
    int32_t n_top, given;                 /* given: -1 = sampled */
} rows[] = {
    {USUAL, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},          {USUAL, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},
    {USUAL, 0.7f, 0.9f, 0, 0, 1, 0, 0, 0, 0, 0, 3, -1},     {USUAL, 1.5f, 0.5f, 0.01f, 40, 1, 0, 0, 0, 0, 0, -1, -1},
    {USUAL, 1, 1, 0, 5, 1, 0, 0, 0, 0, 0, -1, -1},          {USUAL, 1, 1, 0.1f, 0, 1, 0, 0, 0, 0, 0, 20, -1},
    {USUAL, 2, 0.999f, 0, 100, 1, 0, 0, 0, 0, 0, -1, -1},   {USUAL, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},
    {USUAL, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, -1, -1},          {USUAL, 0.3f, 0.01f, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},
    {USUAL, 9, 0.9999f, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},    {USUAL, 1, 1, 0, 100000, 1, 0, 0, 0, 0, 0, -1, -1},
    {USUAL, 0, 1, 0, 0, 1.3f, 0.4f, 0.2f, 3, 2, 0, 5, -1},  {USUAL, 1, 0.95f, 0, 50, 1.3f, 0.4f, 0.2f, 3, 2, 2, 0, -1},
    {USUAL, 1, 1, 0, 0, 1, 0.4f, 1.2f, 0, 0, 3, -1, -1},    {USUAL, 0.8f, 1, 0, 0, 1, 0, 0, 5, 0, 0, -1, -1},
    {USUAL, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 20, 17},          {USUAL, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},
    {EQUAL, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 20, -1},          {EQUAL, 1, 1, 0, 30, 1, 0, 0, 0, 0, 0, -1, -1},
    {EQUAL, 1, 0.3f, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},       {EQUAL, 1, 0.3f, 0, 700, 1, 0, 0, 0, 0, 0, -1, -1},
    {FLAT, 1, 0.5f, 0, 0, 1, 0, 0, 0, 0, 0, 4, -1},         {FLAT, 1, 1, 0, 77, 1, 0, 0, 0, 0, 0, -1, -1},
    {FLAT, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},           {PEAK, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 20, -1},
    {PEAK, 1, 0.999f, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},      {PEAK, 1, 1, 0, 20, 1, 0, 0, 0, 0, 0, -1, -1},
    {WITH_NAN, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},       {WITH_NAN, 1, 0.5f, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},
    {WITH_NAN, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 2, 3},         {WITH_INFINITY, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},
    {NOTHING, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1},        {ONE, 1, 0.5f, 0, 0, 1, 0, 0, 0, 0, 0, 20, -1},
    {ONE, 1, 1, 0, 10, 1, 0, 0, 0, 0, 0, -1, -1},           {BANNED_NAN, 0, 1, 0, 0, 1, 0, 0, 0, 2, 0, -1, -1},
    {BANNED_NAN, 1, 0.5f, 0, 0, 1, 0, 0, 0, 2, 0, -1, -1},  {BANNED_NAN, 1, 0.5f, 0, 0, 1, 0, 0, 0, 2, 0, 1, -1},
};
enum { ROWS = PL_COUNT_OF(rows) };

struct expected {
    pl_status status;
    struct pl_choice choice;
};

/* What the host makes of a row, and what the device is told. */
static bool expect(const struct row *r, const float *x, uint32_t V, uint64_t seed, struct pl_sample_scratch *scratch, struct pl_draws *draws,
                   struct expected *out)
{
    struct pl_logit_bias bias[5];
    int32_t prompt[N_SEEN], guesses[] = {2, 7, 2};
    out->choice = (struct pl_choice){0};
    if (r->given >= 0) {
        pl_draws_given(draws, r->given, r->n_top);
        out->status = pl_logprobs(x, V, r->given, (uint32_t)r->n_top < V ? (uint32_t)r->n_top : V, &out->choice);
        return true;
    }
    for (uint32_t i = 0; i < PL_COUNT_OF(bias); i++)
        bias[i] = (struct pl_logit_bias){(int32_t)((i * 577 + 3) % V), (float)i * 3 - 4};
    for (uint32_t i = 0; i < N_SEEN; i++)
        prompt[i] = (int32_t)((i * 31 + i / 5) % V);
    const struct pl_sampling p = {.temperature = r->temperature, .top_p = r->top_p, .min_p = r->min_p, .top_k = r->top_k, .repetition_penalty = r->repetition,
                                  .presence_penalty = r->presence, .frequency_penalty = r->frequency, .bias = bias, .n_bias = r->n_bias < V ? r->n_bias : 0,
                                  .seed = seed, .n_top_logprobs = r->n_top};
    struct pl_sampler *s = pl_sampler_new(&p, prompt, N_SEEN);
    if (s == NULL)
        return false;
    for (uint32_t i = 0; i < 9; i++)
        pl_sampler_accept(s, prompt[i * 4 % 7]);
    const bool told = pl_draws_sample(draws, s, guesses, r->n_guesses, 9 + r->n_guesses, banned, r->n_banned) == PL_OK;
    for (uint32_t i = 0; i < r->n_guesses; i++)
        pl_sampler_accept(s, guesses[i]);
    out->status = pl_sample(s, scratch, x, V, 9 + r->n_guesses, banned, r->n_banned, &out->choice);
    pl_sampler_free(s);
    return told;
}

static bool same(const struct expected *a, const struct expected *b)
{
    bool equal = a->status == b->status;
    if (!equal || a->status != PL_OK)
        return equal;
    equal = a->choice.token == b->choice.token && a->choice.logprob == b->choice.logprob && a->choice.n_top == b->choice.n_top;
    for (uint32_t i = 0; equal && i < a->choice.n_top; i++)
        equal = a->choice.top[i].id == b->choice.top[i].id && a->choice.top[i].logprob == b->choice.top[i].logprob;
    return equal;
}

/* All rows in one call, each of n seeds in its turn. Returns how many differ. */
static unsigned differences(struct pl_device *dev, uint32_t V, unsigned seeds, const char *name)
{
    const struct pl_device_ops *ops = dev->ops;
    struct pl_sample_scratch *scratch;
    struct pl_draws draws;
    struct pl_dbuf *buf;
    static struct expected expected[ROWS];
    static struct pl_drawn drawn[ROWS];
    unsigned bad = 0;
    float *x = calloc((size_t)ROWS * (V + GAP), sizeof *x);
    if (x == NULL || pl_draws_init(&draws, ROWS) != PL_OK || pl_sample_scratch_new(&scratch, V) != PL_OK ||
        ops->buf_new(dev, (size_t)ROWS * (V + GAP), &buf) != PL_OK)
        return 1;
    const pl_view logits = {buf, 0, ROWS, V, V + GAP};
    for (unsigned seed = 0; seed < seeds; seed++) {
        draws.n_rows = draws.n_edits = 0;
        for (uint32_t i = 0; i < ROWS; i++) {
            fill_row(x + (size_t)i * (V + GAP), V, V < 20 && rows[i].kind >= PEAK ? USUAL : rows[i].kind);
            bad += !expect(&rows[i], x + (size_t)i * (V + GAP), V, 1000 + seed, scratch, &draws, &expected[i]);
        }
        pl_status rc = ops->put(dev, buf, 0, x, (size_t)ROWS * (V + GAP));
        if (rc == PL_OK && (rc = ops->step_begin(dev, NULL)) == PL_OK) {
            rc = ops->sample(dev, logits, &draws, drawn);
            const pl_status end = ops->step_end(dev);
            rc = rc != PL_OK ? rc : end;
        }
        for (uint32_t i = 0; i < ROWS; i++) {
            struct expected got = {.status = rc};
            if (rc == PL_OK)
                got.status = pl_drawn_choice(&draws.rows[i], &drawn[i], &got.choice);
            if (same(&got, &expected[i]))
                continue;
            printf("FAILED %s sample row %u V %u: %s, token %d (%.9g), not %s, %d (%.9g)\n", name, i, V, pl_status_text(got.status), got.choice.token,
                   (double)got.choice.logprob, pl_status_text(expected[i].status), expected[i].choice.token, (double)expected[i].choice.logprob);
            bad++;
        }
    }
    ops->buf_free(dev, buf);
    pl_draws_fini(&draws);
    pl_sample_scratch_free(scratch);
    free(x);
    return bad;
}

void ops_sample(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped)
{
    static const char *const names[] = {"cuda-emulated", "cuda"};
    static const uint32_t sizes[] = {18, 255, 256, 257, 1000, 2501, MOST_V}; /* of vocabularies: pieces of 256, and what is left of them */
    for (size_t n = 0; n < PL_COUNT_OF(names); n++) {
        struct pl_pool *pool = NULL;
        struct pl_device *dev = NULL;
        struct pl_err err = {0};
        if (only != NULL && strcmp(only, names[n]) != 0)
            continue;
        if (pl_pool_new(&pool, 1, &err) != PL_OK || device_open(&dev, pool, names[n], &err) != PL_OK) {
            ++*skipped;
            pl_pool_free(pool);
            continue;
        }
        for (size_t i = 0; i < PL_COUNT_OF(sizes); i++) {
            emulated_reverse(i % 2 != 0);
            const unsigned bad = differences(dev, sizes[i], sizes[i] < 2000 ? 3 : 6, names[n]);
            *passed += bad == 0;
            *failed += bad != 0;
        }
        dev->ops->close(dev);
        pl_pool_free(pool);
    }
}
