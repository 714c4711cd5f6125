/* serving: jobs that are done, but for their results to be read by the registry's thread, which may be busy for minutes with another model's file.
 * Thread: the supervisor's, which has other jobs to tend meanwhile.  Owns: its entries, until forget or free.
 * Fails: as pl_tuned_load and pl_tuned_loaded.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_SERVING_H
#define PL_JOBS_SERVING_H

#include "server/jobs/tuned.h"

struct pl_serving {
    struct pl_serving *next;
    char id[PL_ID_MAX];
    char *name;
    struct pl_want want;
};

/* Makes the job's result known and, if it is an adapter of the first model, has it read. *now: false = that is under way; done is called (under the
 * registry's lock) when this is to be called again. A failure is the end of it. */
pl_status pl_serving_look(struct pl_serving **list, struct pl_jobs *j, const struct pl_job_row *row, void (*done)(void *arg), void *arg, bool *now,
                          struct pl_err *why) PL_MUST_CHECK;
/* Whether there is nothing to be looked at yet. */
bool pl_serving_waits(struct pl_serving *list, struct pl_jobs *j, const char *id);
/* False: there was none. What was made known stays so. */
bool pl_serving_forget(struct pl_serving **list, struct pl_jobs *j, const char *id);
void pl_serving_free(struct pl_serving **list, struct pl_jobs *j);

#endif
