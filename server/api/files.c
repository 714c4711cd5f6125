/* files: POST, GET, DELETE /v1/files. An upload goes to the disk as it comes; when it is whole it is checked and flushed on the tasks' thread.
 * Thread: microhttpd's workers, and the tasks' thread where named.  Owns: an upload in progress.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/api/api.h"
#include "server/api/filing.h"
#include "server/api/intake.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/files.h"
#include "server/server.h"

/* ---- upload -------------------------------------------------------------------------------------------------------- */

enum { PURPOSE, ANCHOR, SECONDS };
static const struct pl_intake_form form = {
    .values = {[PURPOSE] = "purpose", [ANCHOR] = "expires_after[anchor]", [SECONDS] = "expires_after[seconds]"}, .file = "file", .named = true,
    .limit = "this server accepts (max-file-mb)", .all = "file, purpose, expires_after[anchor] and expires_after[seconds]",
};

struct pl_sink *pl_api_files_sink(struct pl_http_req *req, const char *content_type)
{
    return pl_intake_sink(req, content_type, &form, (uint64_t)req->server->config->max_file_mb << 20);
}

/* -1 = no number */
static int64_t seconds_of(const struct pl_intake *u)
{
    char *end;
    const char *text = u->values[SECONDS];
    errno = 0;
    const long long n = strtoll(text, &end, 10);
    return text[0] >= '0' && text[0] <= '9' && *end == '\0' && errno == 0 ? n : -1;
}

static pl_status check_fields(struct pl_intake *u, struct pl_err *err)
{
    if (!u->seen[PURPOSE])
        return pl_fail_param(err, PL_EINVAL, "purpose", "'purpose' is required");
    const pl_status st = pl_filing_purpose(u->values[PURPOSE], err);
    if (st != PL_OK || (!u->seen[ANCHOR] && !u->seen[SECONDS]))
        return st;
    if (strcmp(u->values[ANCHOR], "created_at") != 0)
        return pl_fail_param(err, PL_EINVAL, form.values[ANCHOR], "'expires_after[anchor]' must be created_at");
    return pl_filing_expiry(form.values[SECONDS], seconds_of(u), err);
}

static void run_upload(void *arg, struct pl_http_resp *resp)
{
    struct pl_intake *u = arg;
    struct pl_err err = {0};
    struct pl_file_row row = {0};
    struct pl_filing f = {.jobs = u->jobs, .path = u->path, .filename = u->filename, .purpose = u->values[PURPOSE], .n = u->n,
                          .field = form.file, .expires_after = u->seen[SECONDS] ? seconds_of(u) : 0};
    pl_sha256_hex(&u->hash, f.sha256);
    const pl_status st = pl_intake_flush(u, &err);
    if (st != PL_OK)
        pl_filing_refuse(resp, st, 0, NULL, &err, NULL);
    else if (pl_filing_store(&f, &row, resp) == PL_OK)
        pl_listing_write(&resp->body, pl_filing_json(&row));
    pl_row_fini(PL_TABLE_FILES, &row);
}

static void drop_upload(void *arg)
{
    pl_intake_free(arg);
}

void pl_api_files_create(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_intake *u = pl_intake_end(req, resp, check_fields);
    const struct pl_task task = {run_upload, drop_upload, u};
    if (u != NULL)
        pl_tasks_answer(u->jobs->tasks, &task, req, resp);
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

/* The row of the path's id. False = answered. */
static bool find_file(struct pl_http_req *req, struct pl_http_resp *resp, struct pl_file_row *row)
{
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return false;
    const pl_status st = pl_store_get(req->server->jobs->store, PL_TABLE_FILES, "id", req->path_arg, row, &err);
    if (st == PL_OK)
        return true;
    if (st == PL_ENOENT)
        (void)pl_fail_param(&err, PL_ENOENT, "id", "No such File object: %.100s", req->path_arg);
    pl_apierr_answer_as(req, resp, st == PL_ENOENT ? 404 : 500, NULL, &err);
    return false;
}

void pl_api_files_list(struct pl_http_req *req, struct pl_http_resp *resp)
{
    static const struct pl_listing files = {PL_TABLE_FILES, 10000, 10000, true, false};
    struct pl_store_query q = {0};
    if (!pl_listing_query(req, resp, &files, &q))
        return;
    q.value = pl_http_query(req, "purpose");
    q.column = q.value != NULL ? "purpose" : NULL;
    pl_listing_answer(req, resp, &files, &q, pl_filing_json);
}

void pl_api_files_get(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_file_row row;
    if (!find_file(req, resp, &row))
        return;
    pl_listing_write(&resp->body, pl_filing_json(&row));
    pl_row_fini(PL_TABLE_FILES, &row);
}

void pl_api_files_content(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_file_row row;
    struct stat st;
    struct pl_err err = {0};
    if (!find_file(req, resp, &row))
        return;
    char *path = pl_jobs_path(req->server->jobs->store, "files", row.id);
    resp->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (resp->fd < 0 || fstat(resp->fd, &st) != 0) {
        (void)pl_fail(&err, PL_EIO, "the content of %s cannot be read: %s", row.id, strerror(errno));
        if (resp->fd >= 0)
            close(resp->fd);
        resp->fd = -1;
        pl_apierr_answer_as(req, resp, 500, NULL, &err);
    } else {
        resp->n_file = (uint64_t)st.st_size;
        resp->content_type = "application/octet-stream";
    }
    free(path);
    pl_row_fini(PL_TABLE_FILES, &row);
}

void pl_api_files_delete(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_file_row row;
    struct pl_err err = {0};
    if (!find_file(req, resp, &row))
        return;
    if (pl_files_remove(req->server->jobs->store, row.id, &err) == PL_OK)
        pl_listing_write(&resp->body, json_pack("{s:s,s:s,s:b}", "id", row.id, "object", "file", "deleted", 1));
    else
        pl_apierr_answer_as(req, resp, 500, NULL, &err);
    pl_row_fini(PL_TABLE_FILES, &row);
}
