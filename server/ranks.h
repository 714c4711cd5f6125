/* ranks: the other ranks of a model that is cut over several (core/sched/ranks.h): threads of this process, each with a device
 * and a share of the processors, or the other processes that mpirun or srun has started, of which rank 0 alone has requests.
 * Thread: join and leave on main; open and close as for the model; a rank in threads lives from open to close.
 * Owns: the threads with all they made; borrows the model's file.
 * Fails: PL_EINVAL with param "tensor-parallel" or "ranks"; PL_ENOTSUP (no MPI here); PL_ERANK (core/comm/comm.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_RANKS_H
#define PL_SERVER_RANKS_H

#include <stdbool.h>

#include "core/comm/comm.h"

struct pl_config;
struct pl_device;
struct pl_gguf;
struct pl_ranks;

/* *world: this process among the others, NULL when it is alone. Ahead of everything else that starts threads. */
pl_status pl_ranks_join(struct pl_comm **world, const struct pl_config *c, struct pl_err *err) PL_MUST_CHECK;
/* Rank 0: the others end too. NULL is nothing. */
void pl_ranks_leave(struct pl_comm *world);
/* The life of a process of another rank, after join: PL_OK when rank 0 has left. chosen: how the choice of path went (err). Errors are in the
 * log. On PL_ERANK the processes are to end: rank 0 has had time to answer its clients. */
pl_status pl_ranks_follow(struct pl_comm *world, const struct pl_config *c, const char *path, pl_status chosen, struct pl_err *err) PL_MUST_CHECK;

/* How many ranks the model is cut over; 1 = none but this. */
unsigned pl_ranks_count(const struct pl_comm *world, const struct pl_config *c);
/* Threads that a rank may compute with. */
unsigned pl_ranks_threads(const struct pl_comm *world, const struct pl_config *c);
/* Rank 0, ahead of the model's load: the others begin to load their parts. dev: the one that rank 0 uses. What *out is set to is to be
 * closed after a failure too. */
pl_status pl_ranks_open(struct pl_ranks **out, struct pl_comm *world, const struct pl_config *c, const struct pl_gguf *g,
                        struct pl_device *dev, struct pl_err *err) PL_MUST_CHECK;
struct pl_comm *pl_ranks_comm(struct pl_ranks *r);
/* After the engine and before the file. False: a rank's thread stands still; it keeps all it has, the file too. NULL is nothing. */
bool pl_ranks_close(struct pl_ranks *r) PL_MUST_CHECK;

#endif
