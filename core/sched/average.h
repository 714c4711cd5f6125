/* average: a running average of measured times, which one value far off (the machine was busy with something else) moves no
 * more than a near one.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_AVERAGE_H
#define PL_SCHED_AVERAGE_H

/* bound: the furthest from the mean that a value counts. */
static inline void pl_average(float *mean, float value, float weight, float bound)
{
    float step = value - *mean;
    step = step > bound ? bound : step < -bound ? -bound : step;
    *mean += weight * step;
}

#endif
