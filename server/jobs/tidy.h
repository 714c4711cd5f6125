/* tidy: a job that has ended gives back what only its worker needed: its data, the adapter it went on from, the state of its checkpoints (the
 * checkpoints themselves stay: they are served), the first weights of a model from nothing; and the files of models that were deleted.
 * Thread: the supervisor's.  Owns: nothing.
 * Fails: never; what could not be done is done at the next call.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_TIDY_H
#define PL_JOBS_TIDY_H

#include "server/jobs/jobs.h"

void pl_tidy_ended(struct pl_jobs *j);

#endif
