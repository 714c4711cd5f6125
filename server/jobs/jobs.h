/* jobs: everything behind the Files and fine-tuning routes: the store, the thread for long work, the supervisor of workers.
 *
 *   validating_files -> queued -> running -> succeeded | failed | cancelled        paused from any of the first three, and back to queued
 *
 * Thread: open, start, stop and close on main; the rest from any.
 * Owns: store, tasks, supervisor.
 * Fails: open PL_EINVAL (param "data-dir"): the daemon serves on without these routes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_JOBS_H
#define PL_JOBS_JOBS_H

#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>

#include "core/base/buf.h"
#include "server/jobs/room.h"
#include "server/jobs/store.h"
#include "server/jobs/tasks.h"
#include "server/registry.h"

struct pl_server;
struct pl_supervisor;

struct pl_jobs {
    struct pl_server *server; /* borrowed */
    struct pl_store *store;
    struct pl_tasks *tasks;
    _Atomic(struct pl_supervisor *) supervisor; /* NULL until the model is loaded; freed when nobody is left to ask */
    atomic_uint n_checks; /* jobs in the queue of checks */
    struct pl_room room;
    pthread_mutex_t serve_lock; /* from the look into the store until the model is known (or not) to the server; before the store's */
};

/* Opens the data directory. */
pl_status pl_jobs_open(struct pl_jobs **out, struct pl_server *s, struct pl_err *err) PL_MUST_CHECK;
/* The model is loaded: takes up what a former daemon left, and starts jobs. */
pl_status pl_jobs_start(struct pl_jobs *j, struct pl_err *err) PL_MUST_CHECK;
/* Workers are asked to write a checkpoint and leave, and ended after seconds; nothing of a job is lost. */
void pl_jobs_stop(struct pl_jobs *j, unsigned seconds);
void pl_jobs_close(struct pl_jobs *j);
/* For /metrics. */
void pl_jobs_render_metrics(struct pl_jobs *j, struct pl_buf *out);

/* Jobs run, or may run, on a GPU. */
bool pl_jobs_on_gpu(const struct pl_jobs *j);
/* Bytes that a worker may take: train-memory-mb, or what is free now. */
uint64_t pl_jobs_memory(const struct pl_jobs *j);
/* The whole model that the job begins from, or (with base_adapter) the one under the adapter that it begins from; the first model for one from
 * nothing. PL_ENOENT when this server has it no more. pl_base_fini. */
pl_status pl_jobs_base(struct pl_jobs *j, const struct pl_job_row *row, struct pl_base *base, struct pl_err *err) PL_MUST_CHECK;
/* FOLDER/base/model.gguf, when the job has a base of its own; free(). */
char *pl_jobs_own_base(struct pl_jobs *j, const struct pl_job_row *row);

/* A new job's folder with its files (as links, so that deleting a file does no harm), its row and first events. row's id, name, model, files, method,
 * seed, suffix, metadata, integrations, base_id and base_adapter are the caller's. */
pl_status pl_jobs_create(struct pl_jobs *j, struct pl_job_row *row, struct pl_err *err) PL_MUST_CHECK;

/* Changes of state that clients ask for. PL_ENOENT; PL_EINVAL when the job's state does not allow it. On PL_OK *row is the job as
 * the change left it, whatever the supervisor does next, and the caller's. */
typedef enum { PL_JOB_CANCEL, PL_JOB_PAUSE, PL_JOB_RESUME } pl_job_wish;
pl_status pl_jobs_change(struct pl_jobs *j, const char *id, pl_job_wish wish, struct pl_job_row *row, struct pl_err *err) PL_MUST_CHECK;
/* Adds an event. level: info, warn, error; data: JSON or NULL, type "message" or "metrics"; at as in the row. Inside or outside a transaction. */
pl_status pl_jobs_event(struct pl_jobs *j, const char *job, const char *level, const char *type, const char *data, int64_t at, struct pl_err *err,
                        const char *fmt, ...) __attribute__((format(printf, 8, 9))) PL_MUST_CHECK;
/* What is not UTF-8 becomes '?'; a character that is cut at the end goes. */
void pl_jobs_make_utf8(char *s);
/* Something changed that the supervisor should look at now. */
void pl_jobs_poke(struct pl_jobs *j);
/* DIR/jobs/<id>; free(). */
char *pl_jobs_folder(struct pl_jobs *j, const char *id);

/* Whether there is the model that the job was made for. */
bool pl_jobs_has_base(struct pl_jobs *j, const struct pl_job_row *row);
/* Pauses a job that waits and whose base is not there, with an event. */
pl_status pl_jobs_park(struct pl_jobs *j, const char *id, struct pl_err *err) PL_MUST_CHECK;

#endif
