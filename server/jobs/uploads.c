/* uploads: files that come in parts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/uploads.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "server/jobs/files.h"

#define PL_LOG_MODULE "files"

pl_status pl_uploads_parts(struct pl_store *s, const char *upload, struct pl_part_row **parts, size_t *n, struct pl_err *err)
{
    const struct pl_store_query q = {.column = "upload", .value = upload, .ascending = true};
    bool more;
    void *rows;
    const pl_status st = pl_store_list(s, PL_TABLE_PARTS, &q, &rows, n, &more, err);
    *parts = rows;
    return st;
}

pl_status pl_uploads_pending(struct pl_store *s, const char *upload, struct pl_upload_row *row, struct pl_err *err)
{
    const pl_status st = pl_store_get(s, PL_TABLE_UPLOADS, "id", upload, row, err);
    if (st != PL_OK)
        return st;
    const bool late = strcmp(row->status, "pending") == 0 && row->expires_at <= time(NULL);
    if (!late && strcmp(row->status, "pending") == 0)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, "upload_id", "Upload %s is %s and takes nothing any more: create another one", upload,
                         late ? "expired" : row->status);
}

static pl_status add_row(struct pl_store *s, const char *upload, struct pl_part_row *part, struct pl_err *err)
{
    struct pl_upload_row row;
    struct pl_part_row *parts = NULL;
    size_t n = 0;
    int64_t sum = part->bytes;
    pl_status st = pl_uploads_pending(s, upload, &row, err);
    if (st == PL_OK)
        st = pl_uploads_parts(s, upload, &parts, &n, err);
    for (size_t i = 0; i < n; i++)
        sum += parts[i].bytes;
    if (st == PL_OK && sum > row.bytes)
        st = pl_fail_param(err, PL_EINVAL, "data", "with this part the upload has %lld bytes, but it was announced with %lld ('bytes')", (long long)sum,
                           (long long)row.bytes);
    if (st == PL_OK && n >= PL_UPLOAD_MAX_PARTS)
        st = pl_fail_param(err, PL_EINVAL, "data", "an upload has at most %d parts: cancel it, and send a new one in larger parts", PL_UPLOAD_MAX_PARTS);
    if (st == PL_OK)
        st = pl_store_insert(s, PL_TABLE_PARTS, part, err);
    pl_rows_free(PL_TABLE_PARTS, parts, n);
    pl_row_fini(PL_TABLE_UPLOADS, &row);
    return st;
}

pl_status pl_uploads_add(struct pl_store *s, const char *upload, const char *path, struct pl_part_row *part, struct pl_err *err)
{
    char id[PL_ID_MAX];
    pl_store_new_id(id, "part_");
    char *to = pl_jobs_path(s, "uploads", id), *dir = pl_jobs_path(s, "uploads", "");
    pl_row_set(&part->id, id);
    pl_row_set(&part->upload, upload);
    part->created_at = time(NULL);
    pl_status st = rename(path, to) == 0 ? pl_sync_folder(dir, err) : pl_fail(err, pl_status_of_errno(errno), "cannot rename %s: %s", path, strerror(errno));
    if (st == PL_OK)
        st = pl_store_begin(s, err);
    if (st == PL_OK)
        st = pl_store_end(s, add_row(s, upload, part, err), err);
    if (st != PL_OK)
        unlink(to);
    free(to);
    free(dir);
    return st;
}

pl_status pl_uploads_end(struct pl_store *s, struct pl_upload_row *row, const char *status, const char *file, struct pl_err *err)
{
    pl_row_set(&row->status, status);
    pl_row_set(&row->file, file);
    const pl_status st = pl_store_update(s, PL_TABLE_UPLOADS, row, err);
    return st == PL_OK ? pl_store_delete_all(s, PL_TABLE_PARTS, "upload", row->id, err) : st;
}

void pl_uploads_discard(struct pl_store *s, const struct pl_part_row *parts, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *path = pl_jobs_path(s, "uploads", parts[i].id);
        if (unlink(path) != 0 && errno != ENOENT)
            pl_log_warn("cannot remove %s: %s", path, strerror(errno));
        free(path);
    }
}

/* row: pending, as it was seen. */
static pl_status end(struct pl_store *s, struct pl_upload_row *row, const char *status, struct pl_err *err)
{
    struct pl_part_row *parts = NULL;
    size_t n = 0;
    pl_status st = pl_uploads_parts(s, row->id, &parts, &n, err);
    if (st == PL_OK)
        st = pl_uploads_end(s, row, status, NULL, err);
    st = pl_store_end(s, st, err);
    if (st == PL_OK)
        pl_uploads_discard(s, parts, n);
    pl_rows_free(PL_TABLE_PARTS, parts, n);
    return st;
}

pl_status pl_uploads_cancel(struct pl_store *s, const char *upload, struct pl_upload_row *row, struct pl_err *err)
{
    *row = (struct pl_upload_row){0};
    pl_status st = pl_store_begin(s, err);
    if (st != PL_OK)
        return st;
    st = pl_uploads_pending(s, upload, row, err);
    if (st != PL_OK) {
        pl_store_rollback(s);
        return st;
    }
    return end(s, row, "cancelled", err);
}

static void expire(struct pl_store *s, const char *upload)
{
    struct pl_upload_row row = {0};
    struct pl_err err = {0};
    pl_status st = pl_store_begin(s, &err);
    if (st == PL_OK) {
        st = pl_store_get(s, PL_TABLE_UPLOADS, "id", upload, &row, &err);
        if (st != PL_OK || strcmp(row.status, "pending") != 0)
            pl_store_rollback(s); /* completed or cancelled a moment ago */
        else if ((st = end(s, &row, "expired", &err)) == PL_OK)
            pl_log_info("%s expired", upload);
    }
    if (st != PL_OK)
        pl_log_debug("%s: %s", upload, err.msg);
    pl_row_fini(PL_TABLE_UPLOADS, &row);
}

void pl_uploads_expire(struct pl_store *s, int64_t now)
{
    const struct pl_store_query late = {.column = "status", .value = "pending", .past_column = "expires_at", .past = now, .ascending = true};
    const struct pl_store_query old = {.past_column = "expires_at", .past = now - PL_UPLOAD_KEPT_S, .ascending = true};
    struct pl_err err = {0};
    void *rows;
    size_t n;
    bool more;
    pl_status st = pl_store_list(s, PL_TABLE_UPLOADS, &late, &rows, &n, &more, &err);
    for (size_t i = 0; i < n; i++)
        expire(s, ((const struct pl_upload_row *)rows)[i].id);
    pl_rows_free(PL_TABLE_UPLOADS, rows, n);
    if (st == PL_OK)
        st = pl_store_list(s, PL_TABLE_UPLOADS, &old, &rows, &n, &more, &err);
    for (size_t i = 0; i < n && st == PL_OK; i++) {
        const struct pl_upload_row *row = (const struct pl_upload_row *)rows + i;
        if (strcmp(row->status, "pending") != 0) /* it could not be ended */
            st = pl_store_delete(s, PL_TABLE_UPLOADS, row->seq, &err);
    }
    pl_rows_free(PL_TABLE_UPLOADS, rows, n);
    if (st != PL_OK)
        pl_log_error("%s", err.msg);
}
