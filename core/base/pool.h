/* pool: a team of threads that run one function together. The caller is worker 0; the others are made at start, spin
 * briefly for the next region, then sleep on a futex, so that an idle pool uses no CPU.
 * Thread: pl_pool_run is called by one thread at a time; several that share a pool take turns (pl_pool_turn).  Owns: its threads.
 * Fails: pl_pool_new PL_ENOMEM or PL_EINVAL.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_POOL_H
#define PL_BASE_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_pool;

/* n_threads 0 = as many as this process may use (affinity mask and cgroup quota). */
pl_status pl_pool_new(struct pl_pool **out, unsigned n_threads, struct pl_err *err) PL_MUST_CHECK;
/* Ties each thread of the team, the caller as worker 0, to a processor of its own, if there is one for each in the affinity
 * mask and the cgroup's quota allows as many; else does nothing. Two of them on one processor would halve the speed. What
 * the caller starts later inherits its processor. */
void pl_pool_pin(struct pl_pool *p);
void pl_pool_free(struct pl_pool *p);
unsigned pl_pool_size(const struct pl_pool *p);
unsigned pl_pool_cpus(void); /* what n_threads 0 means here */

/* Memory that a region to come will read, its items in this order: a thread that waits for a region fetches the beginning of its
 * share into its cache. Two stretches at most; a NULL or freed one does no harm. */
void pl_pool_ahead(struct pl_pool *p, const void *first, size_t first_bytes, const void *second, size_t second_bytes);

/* fn(arg, i) for each item i in [0, n), each worker a range of them and what others are late with; returns when all are done. What one item
 * writes must not depend on which worker runs it. Few items (or one worker) run on the caller alone. */
size_t pl_pool_first(const struct pl_pool *p, size_t n, unsigned worker); /* item of a worker's range */
void pl_pool_run(struct pl_pool *p, void (*fn)(void *arg, size_t item, unsigned worker), void *arg, size_t n);

/* Where several threads use one pool: waits until the team is the caller's, in the order in which they asked, so that two which always
 * have work alternate. What runs between the two calls has all threads to itself. Not nested. NULL = a pool of one's own. */
void pl_pool_turn(struct pl_pool *p);
void pl_pool_turn_end(struct pl_pool *p);
/* From now on at least so many thousandths of a turn's time pass between its end and the next one's begin, for processes that stand back
 * behind this one. Any thread. */
void pl_pool_rest(struct pl_pool *p, unsigned thousandths);

#endif
