/* room: what the quota of files (files-quota-mb) counts: files, parts of uploads, what is coming in at this moment, and the data that jobs which
 * have not ended hold although their file was deleted. What is stored is counted anew only after it has changed.
 * Thread: any, outside transactions.  Owns: nothing.  Locks: its lock comes before the store's.
 * Fails: PL_ENOSPC (param as given) naming both numbers and the remedy.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_ROOM_H
#define PL_JOBS_ROOM_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_jobs;

struct pl_room {
    pthread_mutex_t lock;
    uint64_t incoming; /* bytes that are taken */
    uint64_t stored;   /* as counted when the store's tables had these changes */
    uint64_t changes;
    bool counted;
};

void pl_room_init(struct pl_room *r);
void pl_room_fini(struct pl_room *r);
/* Takes room for n further bytes, which are given back when they are counted otherwise, or gone. param: the field that they come by. */
pl_status pl_room_take(struct pl_jobs *j, uint64_t n, const char *param, struct pl_err *err) PL_MUST_CHECK;
void pl_room_give(struct pl_jobs *j, uint64_t n);

#endif
