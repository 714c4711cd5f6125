/* worker: the process of a job: started, found again after a restart of the daemon, told to stop.
 *
 * A worker holds the lock of FOLDER/worker.lock from before it is started until it is gone, whoever started it: that is how a daemon knows
 * whether one runs, without trusting process numbers.
 * Thread: the supervisor's.  Owns: nothing; a child is waited for by pl_worker_ended.
 * Fails: PL_EINVAL when the program cannot be run; PL_ENOSPC, PL_ENOMEM, PL_EIO with the reason (no process to be had), which may pass;
 * PL_EFULL when a worker already runs in the folder.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_WORKER_H
#define PL_JOBS_WORKER_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/base/status.h"

struct pl_worker {
    pid_t pid;
    bool child;      /* of this process: its end can be waited for */
    int status;      /* of waitpid, once it ended; -1 = not known */
    uint64_t term_ns; /* when it was told to stop, 0 = not */
    bool killed;
    uint64_t ran_ns, waited_ns; /* as the system counted at the last pl_worker_time */
};

struct pl_worker_opts {
    const char *program;  /* run as "PROGRAM train --job FOLDER", on a GPU with "--device NAME" and "--cuda-library FILE" */
    const char *folder;
    int nice;
    uint64_t memory;      /* bytes of address space, 0 = no limit; CUDA reserves more than any machine has */
    const cpu_set_t *cpus; /* it may run on these */
    const char *device, *cuda_library; /* "" = the usual file */
};

pl_status pl_worker_start(struct pl_worker *w, const struct pl_worker_opts *o, struct pl_err *err) PL_MUST_CHECK;
/* Finds the worker that runs in folder. PL_ENOENT when there is none. */
pl_status pl_worker_find(struct pl_worker *w, const char *folder) PL_MUST_CHECK;
/* True once it is gone; w->status is valid then. */
bool pl_worker_ended(struct pl_worker *w, const char *folder);
/* Since the last call, all threads together: how long it ran, and how long it waited for a processor. Both 0 where the system does not tell. */
void pl_worker_time(struct pl_worker *w, uint64_t *ran_ns, uint64_t *waited_ns);
void pl_worker_signal(struct pl_worker *w, int sig);

#endif
