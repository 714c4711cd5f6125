/* room: what the quota of files (files-quota-mb) counts: files, parts of uploads, what is coming in at this moment, and the data that jobs which
 * have not ended hold although their file was deleted.
 * Thread: any.  Owns: nothing.
 * Fails: PL_ENOSPC (param "file") naming both numbers and the remedy.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_ROOM_H
#define PL_JOBS_ROOM_H

#include "server/jobs/jobs.h"

/* Takes room for n further bytes, which are given back when they are counted otherwise, or gone. */
pl_status pl_room_take(struct pl_jobs *j, uint64_t n, struct pl_err *err) PL_MUST_CHECK;
void pl_room_give(struct pl_jobs *j, uint64_t n);

#endif
