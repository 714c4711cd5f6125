/* filing: the last step of a new file, on the tasks' thread: its lines are checked, it becomes a row, the answer is written.
 * Thread: the tasks' thread.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_API_FILING_H
#define PL_SERVER_API_FILING_H

#include "core/base/sha256.h"
#include "server/http.h"
#include "server/jobs/jobs.h"

struct pl_filing {
    struct pl_jobs *jobs;
    const char *path; /* of the bytes, flushed to the disk; renamed when they are taken in */
    const char *filename, *purpose;
    const char *field; /* of the request, that the bytes came by */
    uint64_t n;
    int64_t expires_after; /* seconds, 0 = never */
    char sha256[PL_SHA256_HEX];
    pl_status (*also)(void *arg, const char *id, struct pl_err *err); /* in the same transaction, its error as told; NULL = nothing */
    void *arg;
};

/* "'purpose' must be one of …": PL_EINVAL. */
pl_status pl_filing_purpose(const char *purpose, struct pl_err *err);
/* Seconds after which a file expires: PL_EINVAL (param name) when out of range. */
pl_status pl_filing_expiry(const char *name, int64_t seconds, struct pl_err *err);
/* The file's object; the row is a struct pl_file_row. */
json_t *pl_filing_json(const void *row);
/* PL_OK: *row is the file, and nothing is answered yet. Else answered. */
pl_status pl_filing_store(const struct pl_filing *f, struct pl_file_row *row, struct pl_http_resp *resp);
/* Answers with an error of the tasks' thread. http 0 = by the status; more as for pl_apierr_write_as. */
void pl_filing_refuse(struct pl_http_resp *resp, pl_status st, int http, const char *code, const struct pl_err *err, const char *more);

#endif
