/* progress: what a worker writes into FOLDER/progress.jsonl becomes events, checkpoints and numbers of the job.
 * Thread: the supervisor's.  Owns: nothing.
 * Fails: PL_EIO; nothing of the call has happened then.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_PROGRESS_H
#define PL_JOBS_PROGRESS_H

#include "server/jobs/jobs.h"

/* Takes what came since the last call, in one transaction with the place up to which it was read: a line is seen once, whatever happens in
 * between. A worker that starts again writes the file anew without the steps it will repeat; what is known already is passed over. */
pl_status pl_progress_take(struct pl_jobs *j, const char *id, struct pl_err *err) PL_MUST_CHECK;

#endif
