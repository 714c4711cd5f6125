/* share: the least that jobs get of the processors. A niced worker gets next to nothing beside chats that never pause. While workers get less than
 * their share, engines rest after each pass for a part of its time (pl_pool_rest), more at each look; it falls again as soon as they get more.
 * Thread: the supervisor's.  Owns: nothing.
 * Fails: never.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_SHARE_H
#define PL_JOBS_SHARE_H

#include <stdint.h>

struct pl_share {
    uint64_t at_ns; /* of the last look; 0 = none */
    unsigned rest;  /* thousandths of a pass */
};

/* Threads of a job that says nothing of them; set: train-threads. */
unsigned pl_share_threads(int set);

enum { PL_SHARE_EVERY_MS = 200 };

/* Since the last look workers ran and waited for a processor for so long, of threads processors' time; percent: their share of it, if they want
 * as much. Workers that others hold back (another program) cannot make engines rest for more than twice what the share needs. */
void pl_share_look(struct pl_share *s, uint64_t now_ns, uint64_t ran_ns, uint64_t waited_ns, unsigned threads, unsigned percent);

#endif
