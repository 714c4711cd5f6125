/* waits: jobs that cannot run for now. What may pass (a GPU that is away or full, a worker that crashed, a full disk, no process to be had) leaves a job
 * queued: its row, and `waiting` of its object, say what it waits for; it is tried again after pauses that grow (retry.h). It waits until its worker
 * says something, or a client changes its state. What cannot pass by itself is bounded by whoever makes it wait: GPUs that are away by time, crashes
 * by their number.
 * Thread: any; begin and end inside a transaction.  Owns: nothing.
 * Fails: as store.h says.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_WAITS_H
#define PL_JOBS_WAITS_H

#include "server/jobs/jobs.h"

/* For what; its code; whether it is for the device; when an event tells it: each time, for each CAUSE, or once (whose words have figures that change);
 * what it says, given the cause and seconds. */
#define PL_WAITS_LIST(X)                                                                                               \
    X(DEVICE, "device_not_available", true, CAUSE, "The job waits for its device: %s; it is tried again in %u s, then after longer pauses")    \
    X(BUSY, "device_busy", true, ONCE, "The job waits for room on its device: %s; it is tried again in %u s, then after longer pauses")       \
    X(LOST, "device_lost", false, EACH, "The device was lost: %s; the job goes on from its last checkpoint in %u s")   \
    X(CRASH, "worker_crashed", false, EACH, "%s; it starts again from its last checkpoint in %u s")                    \
    X(DISK, "disk_full", false, CAUSE, "There is no space left for the job's files: %s; it goes on from its last checkpoint in %u s (free some space)") \
    X(START, "worker_not_started", false, CAUSE, "The job could not be started: %s; it stays queued and is tried again, first in %u s")

typedef enum {
#define X(name, code, device, told, words) PL_WAIT_##name,
    PL_WAITS_LIST(X)
#undef X
    PL_WAIT_COUNT
} pl_wait;

const char *pl_wait_code(pl_wait w);
/* Which one a worker's failure of that code is; PL_WAIT_COUNT = none, it fails for good. */
pl_wait pl_wait_of(const char *code);
/* For how many seconds the job has waited for its device. */
int64_t pl_waits_for_device(const struct pl_job_row *row, int64_t now);

/* The row says what it waits for, as does an event, unless the last one did. The caller updates the row. */
pl_status pl_waits_begin(struct pl_jobs *j, struct pl_job_row *row, pl_wait w, const char *message, unsigned seconds, struct pl_err *err) PL_MUST_CHECK;
/* It runs: an event says so. */
pl_status pl_waits_end(struct pl_jobs *j, struct pl_job_row *row, struct pl_err *err) PL_MUST_CHECK;
void pl_waits_clear(struct pl_job_row *row);
/* "Fine-tuning job started", or resumed. */
const char *pl_waits_started_words(struct pl_jobs *j, const char *id);

/* {code, message, param} as an error has them, with times; null = it does not wait. A new reference. */
json_t *pl_waits_json(const struct pl_job_row *row);
void pl_waits_render_metrics(struct pl_jobs *j, struct pl_buf *out);

#endif
