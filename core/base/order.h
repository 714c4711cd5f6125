/* order: comparisons for qsort.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_ORDER_H
#define PL_BASE_ORDER_H

/* Doubles, the least first. */
static inline int pl_by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#endif
