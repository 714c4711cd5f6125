/* link: how bytes get from one rank to another; what peers.c makes its collectives of.
 *
 * Between two ranks at most one message is under way in each direction, and messages arrive in the order in which they were
 * sent. Plain data and functions only: libparley_mpi.so is built against this header and calls nothing of parley's.
 * Thread: one at a time, but for give_up and end_processes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_COMM_LINK_H
#define PL_COMM_LINK_H

#include <stdbool.h>
#include <stddef.h>

enum { PL_LINK_MOST = 1 << 30 /* bytes of a message */, PL_LINK_RANKS = 64 /* PL_MAX_RANKS */ };

struct pl_link;

struct pl_link_ops {
    /* Both begin; the memory is the link's until done says true. */
    void (*send)(struct pl_link *l, unsigned to, const void *bytes, size_t n);
    void (*recv)(struct pl_link *l, unsigned from, void *bytes, size_t n);
    bool (*done)(struct pl_link *l, unsigned peer); /* what was begun with that rank, in both directions */
    void (*rest)(struct pl_link *l, unsigned us);   /* sleeps until something may have come; so long where nothing can wake it */
    bool (*gone)(struct pl_link *l, unsigned peer); /* known to have ended or given up; false is no promise */
    void (*give_up)(struct pl_link *l);
    void (*end_processes)(struct pl_link *l, int status);
    void (*close)(struct pl_link *l, bool failed); /* failed: without waiting for the others */
};

struct pl_link {
    const struct pl_link_ops *ops;
    const char *name;
    unsigned rank, size, local_rank, local_size;
};

/* What libparley_mpi.so exports. version: PL_LINK_VERSION of the caller. 0, or -1 with a line in why. */
#define PL_LINK_VERSION 1
#define PL_LINK_MPI_OPEN "pl_link_mpi_open"
typedef int pl_link_mpi_open_fn(struct pl_link **out, int version, char *why, size_t n_why);

#endif
