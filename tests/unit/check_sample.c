/* check_sample: sampling against a naive implementation in double that sorts the whole row, and its corner cases.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdbool.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/sample/sample.h"
#include "core/sample/scan.h"

Suite *suite_sample(void);

enum { V = 2501 }; /* no multiple of anything that the loops are cut by */

static uint64_t state;

static double uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

static struct pl_sampling plain(void)
{
    return (struct pl_sampling){.temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_top_logprobs = -1};
}

static pl_status sample(const struct pl_sampling *p, const float *logits, uint32_t index, struct pl_choice *out)
{
    struct pl_sample_scratch *scratch;
    struct pl_sampler *s = pl_sampler_new(p, NULL, 0);
    ck_assert_int_eq(pl_sample_scratch_new(&scratch, V), PL_OK);
    pl_status st = pl_sample(s, scratch, logits, V, index, NULL, 0, out);
    pl_sampler_free(s);
    pl_sample_scratch_free(scratch);
    return st;
}

static void random_row(float *x)
{
    for (int i = 0; i < V; i++)
        x[i] = (float)(8 * uniform() - 4 + (uniform() < 0.02 ? 6 : 0));
}

/* Which tokens may come out, by sorting everything. */
static void allowed(const struct pl_sampling *p, const float *logits, bool ok[V])
{
    int order[V];
    double w[V], total = 0, sum = 0, max = -INFINITY;
    for (int i = 0; i < V; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < V; i++) {
        w[i] = exp((logits[i] - max) / p->temperature);
        order[i] = i;
        ok[i] = false;
    }
    for (int i = 1; i < V; i++)
        for (int k = i; k > 0 && w[order[k]] > w[order[k - 1]]; k--) {
            int t = order[k];
            order[k] = order[k - 1];
            order[k - 1] = t;
        }
    int n = p->top_k > 0 && p->top_k < V ? (int)p->top_k : V;
    for (int i = 0; i < n; i++)
        total += w[order[i]];
    for (int i = 0; i < n; i++) {
        ok[order[i]] = w[order[i]] >= p->min_p - 1e-6;
        sum += w[order[i]];
        if (p->top_p < 1 && sum >= total * p->top_p + 1e-6 * total)
            break;
    }
}

START_TEST(filters)
{
    static const struct {
        float temperature, top_p, min_p;
        uint32_t top_k;
    } rows[] = {{1, 1, 0, 0}, {0.7f, 0.9f, 0, 0}, {1, 1, 0, 5}, {1.5f, 0.5f, 0.01f, 40}, {1, 1, 0.1f, 0}, {0.3f, 0.01f, 0, 0}, {2, 0.999f, 0, 100},
              {1, 0, 0, 0}};
    struct pl_sampling p = plain();
    float x[V];
    bool ok[V], seen[V] = {false};
    double mass = 0;
    state = (uint64_t)_i + 1;
    random_row(x);
    p.temperature = rows[_i].temperature, p.top_p = rows[_i].top_p, p.min_p = rows[_i].min_p, p.top_k = rows[_i].top_k;
    allowed(&p, x, ok);
    for (uint32_t i = 0; i < 3000; i++) {
        struct pl_choice c;
        p.seed = i;
        ck_assert_int_eq(sample(&p, x, i % 7, &c), PL_OK);
        ck_assert_msg(ok[c.token], "row %d: token %d must not come out", _i, c.token);
        seen[c.token] = true;
    }
    for (int i = 0; i < V; i++)
        mass += ok[i] ? exp(x[i] / p.temperature) : 0;
    for (int i = 0; i < V; i++)
        ck_assert_msg(!ok[i] || seen[i] || 3000 * exp(x[i] / p.temperature) < 20 * mass, "row %d: token %d never came out", _i, i);
}
END_TEST

START_TEST(distribution)
{
    struct pl_sampling p = plain();
    float x[V];
    int counts[V] = {0}, draws = 40000, cells = 0;
    double total = 0, chi = 0;
    state = 3;
    random_row(x);
    p.temperature = 0.8f;
    for (int i = 0; i < V; i++)
        total += exp(x[i] / 0.8);
    for (int i = 0; i < draws; i++) {
        struct pl_choice c;
        p.seed = (uint64_t)i * 7919;
        ck_assert_int_eq(sample(&p, x, 0, &c), PL_OK);
        counts[c.token]++;
    }
    for (int i = 0; i < V; i++) {
        double e = draws * exp(x[i] / 0.8) / total;
        if (e < 5)
            continue;
        chi += (counts[i] - e) * (counts[i] - e) / e;
        cells++;
    }
    ck_assert_int_gt(cells, 20);
    ck_assert_msg(chi < cells + 5 * sqrt(2.0 * cells), "chi square %.1f over %d cells", chi, cells);
}
END_TEST

START_TEST(seeds)
{
    struct pl_sampling p = plain();
    struct pl_choice a, b, c;
    float x[V];
    int same = 0;
    state = 9;
    random_row(x);
    for (uint32_t i = 0; i < 200; i++) {
        p.seed = 5;
        ck_assert_int_eq(sample(&p, x, i, &a), PL_OK);
        ck_assert_int_eq(sample(&p, x, i, &b), PL_OK);
        p.seed = 6;
        ck_assert_int_eq(sample(&p, x, i, &c), PL_OK);
        ck_assert_int_eq(a.token, b.token);
        same += a.token == c.token;
    }
    ck_assert_int_lt(same, 150);
}
END_TEST

START_TEST(corners)
{
    struct pl_sampling p = plain();
    struct pl_choice c;
    float x[V];
    for (int i = 0; i < V; i++)
        x[i] = 1;
    p.temperature = 0;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_OK);
    ck_assert_int_eq(c.token, 0); /* ties: lowest id */
    x[7] = NAN;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_EFORMAT);
    p.temperature = 1;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_EFORMAT);
    for (int i = 0; i < V; i++)
        x[i] = -INFINITY;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_EFORMAT);
    x[33] = -1000;
    for (uint32_t i = 0; i < 20; i++) {
        ck_assert_int_eq(sample(&p, x, i, &c), PL_OK);
        ck_assert_int_eq(c.token, 33);
    }
    x[34] = INFINITY;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_EFORMAT);
}
END_TEST

START_TEST(bias_and_penalties)
{
    struct pl_sampling p = plain();
    struct pl_logit_bias bias[] = {{3, -100}, {4, 100}};
    struct pl_sample_scratch *scratch;
    struct pl_choice c;
    float x[V] = {0};
    p.temperature = 0;
    x[3] = 50;
    p.bias = bias, p.n_bias = 1;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_OK);
    ck_assert_int_eq(c.token, 0);
    p.n_bias = 2;
    ck_assert_int_eq(sample(&p, x, 0, &c), PL_OK);
    ck_assert_int_eq(c.token, 4);
    ck_assert_float_eq(x[4], 0); /* the row itself is not touched */
    /* frequency: each use costs; presence: once; repetition: prompt tokens too */
    p = plain();
    p.temperature = 0, p.frequency_penalty = 1, p.presence_penalty = 0.5f, p.repetition_penalty = 2;
    int32_t prompt[] = {9};
    float y[V] = {0};
    y[9] = 3, y[10] = 2, y[11] = 1.4f;
    ck_assert_int_eq(pl_sample_scratch_new(&scratch, V), PL_OK);
    struct pl_sampler *s = pl_sampler_new(&p, prompt, 1);
    static const int32_t want[] = {10, 9, 11, 0};
    for (uint32_t i = 0; i < 4; i++) { /* 9 counts 3/2 from the start; 10 becomes 2/2-1.5, 9 becomes 1.5-1.5, 11 1.4/2-1.5 */
        ck_assert_int_eq(pl_sample(s, scratch, y, V, i, NULL, 0, &c), PL_OK);
        ck_assert_int_eq(c.token, want[i]);
        pl_sampler_accept(s, c.token);
    }
    int32_t banned[] = {1, 2};
    ck_assert_int_eq(pl_sample(s, scratch, y, V, 4, banned, 2, &c), PL_OK);
    ck_assert_int_eq(c.token, 3);
    pl_sampler_free(s);
    pl_sample_scratch_free(scratch);
}
END_TEST

START_TEST(log_probabilities)
{
    float x[V];
    double total = 0;
    struct pl_choice c;
    state = 21;
    random_row(x);
    for (int i = 0; i < V; i++)
        total += exp(x[i]);
    ck_assert_int_eq(pl_logprobs(x, V, 17, 20, &c), PL_OK);
    ck_assert_double_eq_tol(c.logprob, x[17] - log(total), 1e-5);
    ck_assert_uint_eq(c.n_top, 20);
    for (uint32_t i = 0; i < 20; i++) {
        int better = 0;
        for (int k = 0; k < V; k++)
            better += x[k] > x[c.top[i].id];
        ck_assert_int_eq(better, (int)i);
        ck_assert_double_eq_tol(c.top[i].logprob, x[c.top[i].id] - log(total), 1e-5);
    }
    ck_assert_int_eq(pl_logprobs(x, V, V, 1, &c), PL_EINVAL);
    ck_assert_int_eq(pl_logprobs(x, V, -1, 1, &c), PL_EINVAL);
}
END_TEST

/* The loops of each instruction set that runs here give the bits of the plain ones, and those are right. */
START_TEST(scans)
{
    const struct pl_scan *const sets[] = {&pl_scan_base, pl_scan_best() == &pl_scan_base ? &pl_scan_base : &pl_scan_avx2, pl_scan_best()};
    float x[V], w[3][V], sums[3][(V + PL_SCAN_SUM - 1) / PL_SCAN_SUM], most[3][V + 2048], max;
    uint32_t at, found[3][V], n_found[3];
    double sum[3];
    state = 31;
    for (uint32_t n = 1; n <= V; n += n < 200 ? 1 : 97) {
        random_row(x);
        float largest = -INFINITY;
        double expected = 0;
        for (uint32_t i = 0; i < n; i++)
            largest = x[i] > largest ? x[i] : largest;
        for (uint32_t i = 0; i < n; i++)
            expected += exp((x[i] - largest) * 0.7f);
        for (int k = 0; k < 3; k++) {
            ck_assert(sets[k]->max(x, n, &max, &at) && max == largest && x[at] == largest);
            sum[k] = sets[k]->weigh(x, n, max, 0.7f, w[k], sums[k]);
            ck_assert_double_eq_tol(sum[k], expected, 1e-5 * expected);
            n_found[k] = sets[k]->gather(w[k], n, 0.1f, found[k]);
            sets[k]->group_max(w[k], n, most[k]);
            ck_assert(sum[k] == sum[0] && n_found[k] == n_found[0]);
            ck_assert_mem_eq(w[k], w[0], n * sizeof(float));
            ck_assert_mem_eq(sums[k], sums[0], pl_scan_sums(n) * sizeof(float));
            ck_assert_mem_eq(found[k], found[0], n_found[k] * sizeof(uint32_t));
            ck_assert_mem_eq(most[k], most[0], pl_scan_groups(n) * sizeof(float));
            ck_assert(sets[k]->sum_exp(x, n, max) == sets[0]->sum_exp(x, n, max));
        }
        uint32_t next = 0;
        for (uint32_t i = 0; i < n; i++)
            if (w[0][i] >= 0.1f)
                ck_assert_uint_eq(found[0][next++], i);
        ck_assert_uint_eq(next, n_found[0]);
        x[n - 1] = NAN;
        for (int k = 0; k < 3; k++)
            ck_assert(!sets[k]->max(x, n, &max, &at));
    }
}
END_TEST

Suite *suite_sample(void)
{
    Suite *s = suite_create("sample");
    TCase *t = tcase_create("sample");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, filters, 0, 8);
    tcase_add_test(t, distribution);
    tcase_add_test(t, seeds);
    tcase_add_test(t, corners);
    tcase_add_test(t, bias_and_penalties);
    tcase_add_test(t, log_probabilities);
    tcase_add_test(t, scans);
    suite_add_tcase(s, t);
    return s;
}
