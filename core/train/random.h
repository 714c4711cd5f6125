/* random: numbers that follow from a seed alone, the same on every machine (SplitMix64).
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_RANDOM_H
#define PL_TRAIN_RANDOM_H

#include <stdint.h>

static inline uint64_t pl_random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* In [0, 1), 24 random bits. */
static inline double pl_random_unit(uint64_t *state)
{
    return (double)(pl_random_next(state) >> 40) * 0x1p-24;
}

/* The start of a stream of its own for each name. */
static inline uint64_t pl_random_stream(uint64_t seed, const char *name)
{
    uint64_t h = 0xcbf29ce484222325u ^ seed;
    for (; *name != '\0'; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return pl_random_next(&h);
}

/* 0 .. n - 1, evenly. */
static inline uint32_t pl_random_below(uint64_t *state, uint32_t n)
{
    return (uint32_t)((pl_random_next(state) >> 32) * n >> 32);
}

#endif
