/* hist: a histogram with fixed upper bounds, as Prometheus exposes it.
 * Thread: one writer; copied under its owner's lock.  Owns: nothing (bounds are static).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_HIST_H
#define PL_BASE_HIST_H

#include <stddef.h>
#include <stdint.h>

enum { PL_HIST_MAX = 24 };

struct pl_hist {
    const double *bounds; /* borrowed, ascending upper bounds (le) */
    size_t n_bounds;      /* <= PL_HIST_MAX */
    uint64_t counts[PL_HIST_MAX + 1]; /* not cumulative; the last one is +Inf */
    double sum;
};

static inline void pl_hist_add(struct pl_hist *h, double v)
{
    size_t i = 0;
    while (i < h->n_bounds && v > h->bounds[i])
        i++;
    h->counts[i]++;
    h->sum += v;
}

#endif
