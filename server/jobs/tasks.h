/* tasks: long work of requests (checking a file of half a gigabyte) on a thread of its own, niced, one piece after another, so that the
 * workers of the HTTP server stay free.
 * Thread: add from any; run and drop are called on the tasks' thread, drop in any case.  Owns: its thread, waiting tasks.
 * Fails: start PL_EIO; add PL_EFULL, PL_ESTOPPED, PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_TASKS_H
#define PL_JOBS_TASKS_H

#include <stdatomic.h>
#include <stdbool.h>

#include "server/http.h"

struct pl_tasks;

enum { PL_TASKS_WAITING = 256 };

struct pl_task {
    /* resp: status 200 and no body; what is filled in is the answer. NULL when no request waits for it. */
    void (*run)(void *arg, struct pl_http_resp *resp);
    void (*drop)(void *arg); /* NULL = nothing to do */
    void *arg;
};

pl_status pl_tasks_start(struct pl_tasks **out, struct pl_err *err) PL_MUST_CHECK;
/* Set when the running task is to end soon: for one that takes long to look at. */
const atomic_bool *pl_tasks_stopping(const struct pl_tasks *t);
/* Sets it if the running task has that name. */
void pl_tasks_interrupt(struct pl_tasks *t, const char *name);
/* Waits for the running task and drops the others; their requests are answered 503. */
void pl_tasks_stop(struct pl_tasks *t);
/* The answer of the task becomes that of the request, which waits. The task is taken in any case. */
void pl_tasks_answer(struct pl_tasks *t, const struct pl_task *task, struct pl_http_req *req, struct pl_http_resp *resp);
/* A task that nobody waits for. Dropped at once on failure. name: for pl_tasks_interrupt, alive until it is dropped. */
pl_status pl_tasks_add(struct pl_tasks *t, const struct pl_task *task, const char *name, struct pl_err *err) PL_MUST_CHECK;

#endif
