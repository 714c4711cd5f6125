/* intake: a form with one file, read as it comes: the file to the disk (uploads/), small values to memory, room of the quota taken meanwhile.
 * Thread: microhttpd's workers; a finished one anybody's.  Owns: the file until it is renamed away, and its room until free.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_API_INTAKE_H
#define PL_SERVER_API_INTAKE_H

#include "core/base/sha256.h"
#include "server/http.h"
#include "server/jobs/jobs.h"

enum { PL_INTAKE_VALUES = 3, PL_INTAKE_MAX_VALUE = 256 };

/* What a form may have. */
struct pl_intake_form {
    const char *values[PL_INTAKE_VALUES]; /* names of small values; NULL = no more */
    const char *file;                     /* name of the file */
    const char *all;                      /* all of them, for a message */
    const char *limit;                    /* whose the largest size is, and what to do: "… N MiB that" */
    bool named;                           /* the file must have a name */
};

struct pl_intake {
    struct pl_sink sink; /* first: http gives it back */
    const struct pl_intake_form *form;
    struct pl_jobs *jobs;
    struct pl_multipart *parser;
    char *path;
    int fd;
    uint64_t n, max, room; /* bytes so far, at most; taken of the quota */
    struct pl_sha256 hash;
    char *filename;
    char values[PL_INTAKE_VALUES][PL_INTAKE_MAX_VALUE + 1];
    bool seen[PL_INTAKE_VALUES + 1]; /* those, and the file */
    int part;                        /* the one that is being read; PL_INTAKE_VALUES = file, -1 = none */
    /* what went wrong first */
    pl_status st;
    struct pl_err err;
    int http; /* 0 = by the status */
    const char *code;
};

/* max: bytes of the file. form: static. */
struct pl_sink *pl_intake_sink(struct pl_http_req *req, const char *content_type, const struct pl_intake_form *form, uint64_t max);
/* The form is at its end: the intake is the caller's (pl_intake_free) and the connection keeps an empty sink. NULL: answered; check (may be
 * NULL) looks at the values first. */
struct pl_intake *pl_intake_end(struct pl_http_req *req, struct pl_http_resp *resp, pl_status (*check)(struct pl_intake *u, struct pl_err *err));
void pl_intake_free(struct pl_intake *u);
/* The status and code of the answer, where st does not say them. */
pl_status pl_intake_fail(struct pl_intake *u, int http, const char *code, pl_status st);
/* Flushed to the disk. */
pl_status pl_intake_flush(struct pl_intake *u, struct pl_err *err);
/* The same words for the disk's own failures everywhere. why: errno. */
pl_status pl_intake_disk_failed(struct pl_err *err, int why);

#endif
