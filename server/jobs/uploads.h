/* uploads: files that come in parts: an upload is a row, each part a row and a file uploads/<part id>.
 *
 *   pending -> completed | cancelled | expired (an hour after its birth) -> gone (a day later; a file that it became stays)
 *
 * Thread: any.  Owns: nothing.
 * Fails: as the store does; PL_ENOENT.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_UPLOADS_H
#define PL_JOBS_UPLOADS_H

#include "server/jobs/store.h"

enum { PL_UPLOAD_LIFE_S = 3600, PL_UPLOAD_KEPT_S = 86400, PL_UPLOAD_MAX_PARTS = 1000 };

/* Takes the bytes at path (flushed) in as a part. PL_EINVAL (param "data"): the upload has ended, or would have more bytes or parts than it may. */
pl_status pl_uploads_add(struct pl_store *s, const char *upload, const char *path, struct pl_part_row *part, struct pl_err *err) PL_MUST_CHECK;
/* The upload's row when it is still pending. PL_EINVAL when it is not; inside or outside a transaction. */
pl_status pl_uploads_pending(struct pl_store *s, const char *upload, struct pl_upload_row *row, struct pl_err *err) PL_MUST_CHECK;
/* Ends a pending upload inside a transaction of the caller: status, and the file it became (NULL = none); its parts have no rows any more.
 * The parts' bytes go with pl_uploads_discard, after the commit. */
pl_status pl_uploads_end(struct pl_store *s, struct pl_upload_row *row, const char *status, const char *file, struct pl_err *err) PL_MUST_CHECK;
void pl_uploads_discard(struct pl_store *s, const struct pl_part_row *parts, size_t n);
/* Its parts, oldest first: pl_rows_free. */
pl_status pl_uploads_parts(struct pl_store *s, const char *upload, struct pl_part_row **parts, size_t *n, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_uploads_cancel(struct pl_store *s, const char *upload, struct pl_upload_row *row, struct pl_err *err) PL_MUST_CHECK;
/* Ends the pending ones whose hour is over, and forgets those that ended a day ago. */
void pl_uploads_expire(struct pl_store *s, int64_t now);

#endif
