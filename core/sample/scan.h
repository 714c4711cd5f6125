/* scan: the loops over a whole row of logits. There is one set for each instruction set, chosen at run time; all give the
 * same bits, as every sum runs over the same lanes in the same order.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SAMPLE_SCAN_H
#define PL_SAMPLE_SCAN_H

#include <stdbool.h>
#include <stdint.h>

enum {
    PL_SCAN_SUM = 256, /* values that one partial sum of weigh covers */
    PL_SCAN_MAX = 64,  /* values of one group of group_max, at most */
};

static inline uint32_t pl_scan_sums(uint32_t n)
{
    return (n + PL_SCAN_SUM - 1) / PL_SCAN_SUM;
}

static inline uint32_t pl_scan_groups(uint32_t n)
{
    return (n + 16 * PL_SCAN_MAX - 1) / (16 * PL_SCAN_MAX) * 16;
}

struct pl_scan {
    /* The largest value and its lowest index; false when a value is NaN or +inf, or none is finite. */
    bool (*max)(const float *x, uint32_t n, float *max, uint32_t *at);
    /* Sum of exp(x - max). */
    double (*sum_exp)(const float *x, uint32_t n, float max);
    /* w[i] = exp((x[i] - max) * inverse), partial sums in sums[]. Returns the sum. w may be x. */
    double (*weigh)(const float *x, uint32_t n, float max, float inverse, float *w, float *sums);
    /* The values are parted into pl_scan_groups(n) groups; the largest of each, -inf for an empty one. */
    void (*group_max)(const float *x, uint32_t n, float *most);
    /* Indices of the values that are at least `least`, ascending. Returns how many. */
    uint32_t (*gather)(const float *x, uint32_t n, float least, uint32_t *at);
};

extern const struct pl_scan pl_scan_base, pl_scan_avx2, pl_scan_avx512;
/* The fastest that this processor runs. */
const struct pl_scan *pl_scan_best(void);

#endif
