/* share: the least that jobs get of the processors.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/share.h"

#include "core/base/pool.h"

unsigned pl_share_threads(int set)
{
    return set > 0 ? (unsigned)set : (pl_pool_cpus() + 1) / 2;
}

void pl_share_look(struct pl_share *s, uint64_t now_ns, uint64_t ran_ns, uint64_t waited_ns, unsigned threads, unsigned percent)
{
    const int64_t share = (int64_t)percent * 10, most = 2 * 1000 * share / (1000 - share);
    const uint64_t all = (now_ns - s->at_ns) / 1000 * threads;
    if (s->at_ns != 0 && all > 0) {
        const int64_t got = (int64_t)(ran_ns / all), asked = (int64_t)((ran_ns + waited_ns) / all);
        const int64_t rest = s->rest + ((asked < share ? asked : share) - got) / 2; /* half of what lacks, so that it does not swing */
        s->rest = rest < 0 ? 0 : rest > most ? (unsigned)most : (unsigned)rest;
    }
    s->at_ns = now_ns;
}
