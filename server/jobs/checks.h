/* checks: a new job's files against its model, and every "auto" gets its value: on the tasks' thread, or at once for a dry run.
 * Thread: any; pl_checks_plan takes as long as the files are large.  Owns: nothing.
 * Fails: PL_EINVAL, PL_EFORMAT, PL_ERANGE with the param of the job's request; PL_ENOENT without a base; PL_ESTOPPED.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_CHECKS_H
#define PL_JOBS_CHECKS_H

#include "core/text/model_file.h"
#include "core/train/dataset.h"
#include "core/train/plan.h"
#include "server/jobs/jobs.h"

/* row is as inserted, status validating_files. When the queue of checks is full, the supervisor asks again. */
void pl_checks_later(struct pl_jobs *j, const struct pl_job_row *row);
/* The same for every job that waits for its checks, unless some are being made. */
void pl_checks_waiting(struct pl_jobs *j);
/* The same at once, for a dry run and for the above. method: as read from the request; paths of the files, validation NULL = none. The plan is
 * fini'd by the caller in either case. file: of the model that is trained, if it is not made from nothing: borrowed by the plan and closed by the
 * caller after it. */
pl_status pl_checks_plan(struct pl_jobs *j, const struct pl_train_spec *method, const struct pl_job_row *row, const char *training, const char *validation,
                         struct pl_model_file *file, struct pl_train_plan *plan, struct pl_err *err) PL_MUST_CHECK;
/* What a plan says, as JSON: examples, tokens, steps, memory. A new reference. */
json_t *pl_checks_estimate(const struct pl_train_plan *plan);
/* The error code OpenAI has for what a plan complains about: "invalid_training_file", "invalid_n_examples", … */
const char *pl_checks_code(pl_status st, const struct pl_err *err);
/* Bad lines as JSON: [{"line":3,"message":2,"reason":"…"}]. A new reference. */
json_t *pl_checks_lines(const struct pl_data_report *r);

#endif
