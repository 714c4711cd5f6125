/* scan_loops: the loops of scan.h, over vectors of 16 values that the compiler maps to the registers of the instruction set
 * of the file that includes this. Everything here is static.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SAMPLE_SCAN_LOOPS_H
#define PL_SAMPLE_SCAN_LOOPS_H

#include <math.h>
#include <string.h>

#include "core/sample/scan.h"

enum { LANES = 16 };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

#define SCAN_INLINE static inline __attribute__((always_inline))

SCAN_INLINE lanes fill(float v)
{
    return v - (lanes){0};
}

SCAN_INLINE lanes load(const float *x)
{
    lanes v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* The first n of 16 values, the others `rest`. */
SCAN_INLINE lanes load_some(const float *x, uint32_t n, float rest)
{
    lanes v = fill(rest);
    memcpy(&v, x, n * sizeof *x);
    return v;
}

SCAN_INLINE lanes choose(mask m, lanes a, lanes b)
{
    return (lanes)((m & (mask)a) | (~m & (mask)b));
}

SCAN_INLINE lanes larger(lanes a, lanes b)
{
    return choose(a > b, a, b);
}

SCAN_INLINE float largest(lanes v)
{
    float most = v[0];
    for (int k = 1; k < LANES; k++)
        most = v[k] > most ? v[k] : most;
    return most;
}

SCAN_INLINE float total(lanes v)
{
    float sum = v[0];
    for (int k = 1; k < LANES; k++)
        sum += v[k];
    return sum;
}

SCAN_INLINE bool any(mask m)
{
    int64_t part[sizeof m / sizeof(int64_t)], all = 0;
    memcpy(part, &m, sizeof m);
    for (size_t k = 0; k < sizeof m / sizeof(int64_t); k++)
        all |= part[k];
    return all != 0;
}

/* exp(x) for x <= 0: x = n ln 2 + r, a polynomial for exp(r); relative error below 2^-21, 0 below -87. */
SCAN_INLINE lanes exp_of(lanes x)
{
    const lanes magic = fill(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer */
    lanes y = larger(x, fill(-87.f));
    lanes n = (y * 1.44269504088896341f + magic) - magic;
    lanes r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    mask scale = (__builtin_convertvector(n, mask) + 127) << 23;
    return choose(x < -87.f, fill(0), p * (lanes)scale);
}

static bool scan_max(const float *x, uint32_t n, float *max, uint32_t *at)
{
    enum { BLOCK = 1024 };
    mask bad = {0};
    float best = -INFINITY;
    uint32_t where = 0;
    for (uint32_t from = 0; from < n; from += BLOCK) {
        const uint32_t end = n - from < BLOCK ? n : from + BLOCK;
        lanes most[4] = {fill(-INFINITY), fill(-INFINITY), fill(-INFINITY), fill(-INFINITY)};
        uint32_t i = from;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (uint32_t k = 0; k < 4; k++) {
                lanes v = load(x + i + k * LANES);
                most[k] = larger(v, most[k]);
                bad |= v != v;
            }
        for (; i < end; i += LANES) {
            lanes v = load_some(x + i, end - i < LANES ? end - i : LANES, -INFINITY);
            most[0] = larger(v, most[0]);
            bad |= v != v;
        }
        float block = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        if (block > best) {
            best = block;
            where = from;
        }
    }
    if (any(bad) || !isfinite(best))
        return false;
    while (x[where] != best)
        where++;
    *max = best;
    *at = where;
    return true;
}

/* Weights of x[from .. end), at most PL_SCAN_SUM of them, and their sum; w may be NULL. */
SCAN_INLINE float weigh_block(const float *x, uint32_t from, uint32_t end, float max, float inverse, float *w)
{
    lanes sum[4] = {{0}, {0}, {0}, {0}};
    uint32_t i = from;
    for (; i + 4 * LANES <= end; i += 4 * LANES)
        for (uint32_t k = 0; k < 4; k++) {
            lanes v = exp_of((load(x + i + k * LANES) - max) * inverse);
            sum[k] += v;
            if (w != NULL)
                memcpy(w + i + k * LANES, &v, sizeof v);
        }
    for (; i < end; i += LANES) {
        const uint32_t some = end - i < LANES ? end - i : LANES;
        lanes v = exp_of((load_some(x + i, some, -INFINITY) - max) * inverse);
        sum[0] += v;
        if (w != NULL)
            memcpy(w + i, &v, some * sizeof *w);
    }
    return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static double scan_sum_exp(const float *x, uint32_t n, float max)
{
    double all = 0;
    for (uint32_t from = 0; from < n; from += PL_SCAN_SUM)
        all += weigh_block(x, from, n - from < PL_SCAN_SUM ? n : from + PL_SCAN_SUM, max, 1, NULL);
    return all;
}

static double scan_weigh(const float *x, uint32_t n, float max, float inverse, float *w, float *sums)
{
    double all = 0;
    for (uint32_t from = 0; from < n; from += PL_SCAN_SUM) {
        const float sum = weigh_block(x, from, n - from < PL_SCAN_SUM ? n : from + PL_SCAN_SUM, max, inverse, w);
        sums[from / PL_SCAN_SUM] = sum;
        all += sum;
    }
    return all;
}

static void scan_group_max(const float *x, uint32_t n, float *most)
{
    for (uint32_t from = 0; from < n; from += LANES * PL_SCAN_MAX, most += LANES) {
        const uint32_t end = n - from < LANES * PL_SCAN_MAX ? n : from + LANES * PL_SCAN_MAX;
        lanes v = fill(-INFINITY);
        uint32_t i = from;
        for (; i + LANES <= end; i += LANES)
            v = larger(load(x + i), v);
        if (i < end)
            v = larger(load_some(x + i, end - i, -INFINITY), v);
        memcpy(most, &v, sizeof v);
    }
}

static uint32_t scan_gather(const float *x, uint32_t n, float least, uint32_t *at)
{
    enum { BLOCK = 4 * LANES };
    uint32_t found = 0;
    for (uint32_t from = 0; from < n; from += BLOCK) {
        const uint32_t end = n - from < BLOCK ? n : from + BLOCK;
        mask m = {0};
        for (uint32_t k = 0; end == from + BLOCK && k < 4; k++)
            m |= load(x + from + k * LANES) >= least;
        if (end == from + BLOCK && !any(m))
            continue;
        for (uint32_t i = from; i < end; i++) {
            at[found] = i; /* overwritten unless it counts */
            found += x[i] >= least;
        }
    }
    return found;
}

#define PL_SCAN_SET \
    {.max = scan_max, .sum_exp = scan_sum_exp, .weigh = scan_weigh, .group_max = scan_group_max, .gather = scan_gather}

#endif
