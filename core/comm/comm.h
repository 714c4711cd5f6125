/* comm: what the ranks that hold parts of one model say to each other. All ranks make the same calls in the same order.
 * Results do not depend on who comes first: sums are taken in the order of ranks, element by element, so that a row's bits
 * depend on that row alone.
 *
 *   pl_comm_single     one rank: nothing is to be said
 *   peers (peers.c)    over links (link.h): threads of one process (threads.c), or processes under MPI (mpi.c), with
 *                      activations staged through the host's memory where a device's cannot be read in place
 *   the devices' own   (device.h's links) over peers: activations go from device to device, enqueued like any operation
 *
 * Thread: one at a time, but for give_up and end_processes, which any thread may call.  Owns: its buffers.  Borrows: what it is handed, during
 * the call.
 * Fails: PL_ERANK, for good: a rank has ended, given up, or let the others wait for more than timeout_ms; the log says which.
 * PL_ENOMEM and what the device fails with: the caller then gives up, for the others wait for it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_COMM_COMM_H
#define PL_COMM_COMM_H

#include <stddef.h>

#include "core/base/status.h"
#include "core/device/device.h"

enum { PL_MAX_RANKS = 64 };

struct pl_comm;

struct pl_comm_ops {
    const char *name;
    /* rank 0's bytes, to all; not ordered with the device */
    pl_status (*broadcast)(struct pl_comm *c, void *bytes, size_t n);
    /* all[size][n]: everybody's n bytes. The own ones are in their place, the others' come. */
    pl_status (*share)(struct pl_comm *c, void *all, size_t n);
    /* Returns when all ranks have called it; *value is then the least of what they brought. */
    pl_status (*agree)(struct pl_comm *c, int *value);
    /* Waits for nobody: PL_ERANK when a rank is known to have ended or given up. */
    pl_status (*check)(struct pl_comm *c);

    /* Ordered with the device's operations. */
    /* v (rows without gaps) becomes the sum of all ranks' */
    pl_status (*all_reduce)(struct pl_comm *c, struct pl_device *dev, pl_view v);
    /* v[R, first[size]]: each rank has its columns [first[r], first[r + 1]), and gets the others'. first: the same everywhere. */
    pl_status (*all_gather)(struct pl_comm *c, struct pl_device *dev, pl_view v, const uint32_t *first);
    /* Rank 0's out[R, all columns] gets each rank's part[R, first[r + 1] - first[r]] as its columns [first[r], first[r + 1]);
     * rank 0's own part is in out already. Other ranks' out is not looked at. first: [size + 1], the same everywhere. */
    pl_status (*gather)(struct pl_comm *c, struct pl_device *dev, pl_view out, pl_view part, const uint32_t *first);

    /* This rank takes no part any more: its calls fail, and those of the others, at once where they can learn of it, else after
     * their timeout. */
    void (*give_up)(struct pl_comm *c);
    /* Ends the processes of all ranks, if they are processes, this one too, with this status. */
    void (*end_processes)(struct pl_comm *c, int status);
    void (*close)(struct pl_comm *c);
};

struct pl_comm {
    const struct pl_comm_ops *ops;
    unsigned rank, size;
    unsigned local_rank, local_size; /* among those on this machine */
    int timeout_ms;                  /* changed by its user between calls */
    unsigned silent;                 /* after PL_ERANK: the rank that did not answer in time; this one = there is none */
    unsigned sharing;                /* how many ranks compute on this one's device */
    /* implementations put this first in their own struct */
};

extern struct pl_comm pl_comm_single;

/* out[size]: the ranks of one process, each for a thread of its own. Closed one by one. */
pl_status pl_comm_threads_new(struct pl_comm **out, unsigned size, int timeout_ms, struct pl_err *err) PL_MUST_CHECK;

/* This process as one of those that mpirun (or srun) has started, by way of libparley_mpi.so: NULL = where
 * core/base/library.h searches. On the thread that started the process. Fails: PL_ENOTSUP (no such library), PL_EIO. */
#define PL_COMM_MPI_LIBRARY "libparley_mpi.so"
pl_status pl_comm_mpi_open(struct pl_comm **out, const char *library, int timeout_ms, struct pl_err *err) PL_MUST_CHECK;

/* How ranks exchange activations. AUTO: between the devices where each rank has one of its own that can, else through the host. */
typedef enum { PL_EXCHANGE_AUTO, PL_EXCHANGE_DEVICES, PL_EXCHANGE_HOST } pl_exchange;

/* By all ranks of host's (peers), once each has opened its device or failed to (own, err; dev is not looked at then): PL_OK on all
 * of them, or on none, with the line of the first that failed. *out is what they compute over: host, or the devices' own, which lives as
 * long as dev. Rank 0's exchange counts. host->sharing is set. Fails: PL_ERANK; PL_EINVAL with param "device" or "rank-exchange". */
pl_status pl_comm_meet(struct pl_comm **out, struct pl_comm *host, struct pl_device *dev, pl_exchange exchange, pl_status own,
                       struct pl_err *err) PL_MUST_CHECK;

#endif
