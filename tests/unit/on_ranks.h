/* on_ranks: a function on each rank of several, in threads; and numbers that are the same for the same seed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_UNIT_ON_RANKS_H
#define PL_TESTS_UNIT_ON_RANKS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "core/comm/comm.h"

#define GPUS "cuda-emulated" /* of tests/tools/emulated.h */
enum { MOST_RANKS = 5, TIMEOUT_MS = 20000 };

struct rank {
    struct pl_comm *comm;
    void *shared;
    pthread_t thread;
    void (*fn)(struct rank *r);
};

/* fn on each rank, rank 0's on this thread. */
void on_ranks(unsigned size, int timeout_ms, void (*fn)(struct rank *r), void *shared);

/* n values in [-1, 1); free(). */
float *random_floats(uint64_t *seed, size_t n);

#endif
