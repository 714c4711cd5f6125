/* retry: when jobs that wait (waits.h) are tried again.
 * Thread: the supervisor's.  Owns: its entries, until free. What is forgotten with the process is tried at once by the next.
 * Fails: never.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_RETRY_H
#define PL_JOBS_RETRY_H

#include <stdbool.h>
#include <stdint.h>

#include "server/jobs/store.h"

struct pl_retry {
    struct pl_retry *next;
    char id[PL_ID_MAX];
    unsigned n;     /* failures in a row */
    int64_t step;   /* of the job at the last one: progress begins the row anew */
    uint64_t at_ns; /* not before */
    bool stored;    /* the job's row says that it waits: a row that does not any more is not to */
    bool for_room;  /* that other jobs have taken */
};

/* Whether it may be tried now. */
bool pl_retry_due(const struct pl_retry *list, const char *id, uint64_t now_ns);
/* NULL = it has not failed. */
const struct pl_retry *pl_retry_find(const struct pl_retry *list, const char *id);
/* Notes a failure: twice as long a wait as after the one before, from a second to five minutes, or to `most`. *seconds: that wait. */
struct pl_retry *pl_retry_note(struct pl_retry **list, const char *id, int64_t step, uint64_t now_ns, unsigned most, unsigned *seconds);
/* Room was left: those that wait for it are tried at once. */
void pl_retry_hasten(struct pl_retry *list);
void pl_retry_forget(struct pl_retry **list, const char *id);
void pl_retry_free(struct pl_retry **list);

#endif
