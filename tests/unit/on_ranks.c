/* on_ranks: a function on each rank of several, in threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/on_ranks.h"

#include <check.h>

#include "core/base/mem.h"

float *random_floats(uint64_t *seed, size_t n)
{
    float *v = pl_xmalloc(n * sizeof *v);
    for (size_t i = 0; i < n; i++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        v[i] = (float)(int32_t)(*seed >> 32) * 0x1p-31f;
    }
    return v;
}

static void *rank_main(void *arg)
{
    struct rank *r = arg;
    r->fn(r);
    return NULL;
}

void on_ranks(unsigned size, int timeout_ms, void (*fn)(struct rank *r), void *shared)
{
    struct rank ranks[MOST_RANKS];
    struct pl_comm *comms[MOST_RANKS];
    struct pl_err err;
    ck_assert_msg(pl_comm_threads_new(comms, size, timeout_ms, &err) == PL_OK, "%s", err.msg);
    for (unsigned r = 0; r < size; r++)
        ranks[r] = (struct rank){.comm = comms[r], .shared = shared, .fn = fn};
    for (unsigned r = 1; r < size; r++)
        ck_assert_int_eq(pthread_create(&ranks[r].thread, NULL, rank_main, &ranks[r]), 0);
    fn(&ranks[0]);
    for (unsigned r = 1; r < size; r++)
        pthread_join(ranks[r].thread, NULL);
    for (unsigned r = 0; r < size; r++)
        comms[r]->ops->close(comms[r]);
}
