/* files: POST, GET, DELETE /v1/files. An upload goes to the disk as it comes; when it is whole it is checked and flushed on the tasks' thread.
 * Thread: microhttpd's workers, and the tasks' thread where named.  Owns: an upload in progress.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/base/sha256.h"
#include "core/base/utf8.h"
#include "core/train/dataset.h"
#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/files.h"
#include "server/jobs/jobs.h"
#include "server/multipart.h"
#include "server/server.h"

enum { MAX_VALUE = 256, EXPIRES_MIN = 3600, EXPIRES_MAX = 2592000 };

static const char *const purposes[] = {"fine-tune", "assistants", "batch", "vision", "user_data", "evals"};

/* ---- the object ---------------------------------------------------------------------------------------------------- */

static json_t *file_json(const void *row)
{
    const struct pl_file_row *f = row;
    return json_pack("{s:s,s:s,s:I,s:I,s:o,s:s,s:s,s:s,s:n,s:s}", "id", f->id, "object", "file", "bytes", (json_int_t)f->bytes, "created_at",
                     (json_int_t)f->created_at, "expires_at", f->expires_at > 0 ? json_integer(f->expires_at) : json_null(), "filename", f->filename,
                     "purpose", f->purpose, "status", f->status, "status_details", "sha256", f->sha256);
}

/* ---- upload -------------------------------------------------------------------------------------------------------- */

struct upload {
    struct pl_sink sink; /* first: http gives it back */
    struct pl_jobs *jobs;
    struct pl_multipart *form;
    char *path;
    int fd;
    uint64_t n, max;
    struct pl_sha256 hash;
    char sha256[PL_SHA256_HEX];
    char *filename;
    char values[3][MAX_VALUE + 1]; /* purpose, expires_after[anchor], expires_after[seconds] */
    bool seen[4];                  /* those and the file */
    int part;                      /* the one that is being read; 3 = file, -1 = none */
    int64_t expires_after;
    /* what went wrong first */
    pl_status st;
    struct pl_err err;
    int http; /* 0 = by the status */
    const char *code;
};

static const char *const fields[] = {"purpose", "expires_after[anchor]", "expires_after[seconds]", "file"};
enum { PURPOSE, ANCHOR, SECONDS, THE_FILE };

static pl_status fail(struct upload *u, int http, const char *code, pl_status st)
{
    u->http = http;
    u->code = code;
    return st;
}

static pl_status disk_failed(struct upload *u, struct pl_err *err, int why)
{
    const bool full = why == ENOSPC || why == EDQUOT || why == EFBIG || why == 0;
    (void)pl_fail(err, PL_EIO, "the file cannot be stored: %s", full ? "the disk of the data directory is full" : strerror(why));
    return fail(u, full ? 507 : 500, full ? "disk_full" : NULL, PL_EIO);
}

static pl_status begin_part(void *arg, const char *name, const char *filename, struct pl_err *err)
{
    struct upload *u = arg;
    u->part = 0;
    while (u->part <= THE_FILE && strcmp(fields[u->part], name) != 0)
        u->part++;
    if (u->part > THE_FILE)
        return pl_fail_param(err, PL_EINVAL, name, "'%.60s' is not a field of this form; it has file, purpose, expires_after[anchor] and "
                             "expires_after[seconds]", name);
    if (u->seen[u->part])
        return pl_fail_param(err, PL_EINVAL, name, "'%s' comes twice", name);
    u->seen[u->part] = true;
    if (u->part != THE_FILE)
        return PL_OK;
    const char *slash = filename != NULL ? strrchr(filename, '/') : NULL;
    filename = slash != NULL ? slash + 1 : filename;
    if (filename == NULL || filename[0] == '\0')
        return pl_fail_param(err, PL_EINVAL, "file", "'file' must be a file with a name");
    for (const char *p = filename; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return pl_fail_param(err, PL_EINVAL, "file", "the file's name has control characters");
    u->filename = pl_xstrdup(filename);
    char id[PL_ID_MAX];
    pl_store_new_id(id, "upload-");
    u->path = pl_jobs_path(u->jobs->store, "uploads", id);
    u->fd = open(u->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return u->fd >= 0 ? PL_OK : disk_failed(u, err, errno);
}

static pl_status take_value(struct upload *u, const char *bytes, size_t n, struct pl_err *err)
{
    char *value = u->values[u->part];
    const size_t used = strlen(value);
    if (memchr(bytes, '\0', n) != NULL || used + n > MAX_VALUE)
        return pl_fail_param(err, PL_EINVAL, fields[u->part], "'%s' must be a text of at most %d bytes", fields[u->part], MAX_VALUE);
    memcpy(value + used, bytes, n);
    value[used + n] = '\0';
    return PL_OK;
}

static pl_status take_data(void *arg, const char *bytes, size_t n, struct pl_err *err)
{
    struct upload *u = arg;
    if (u->part != THE_FILE)
        return take_value(u, bytes, n, err);
    if (n > u->max - u->n) {
        (void)pl_fail_param(err, PL_EINVAL, "file", "the file is larger than the %llu MiB that this server accepts (max-file-mb)",
                            (unsigned long long)(u->max >> 20));
        return fail(u, 413, "request_too_large", PL_EINVAL);
    }
    pl_sha256_add(&u->hash, bytes, n);
    u->n += n;
    while (n > 0) {
        const ssize_t done = write(u->fd, bytes, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return disk_failed(u, err, done < 0 ? errno : 0);
        bytes += done;
        n -= (size_t)done;
    }
    return PL_OK;
}

static pl_status end_part(void *arg, struct pl_err *err)
{
    struct upload *u = arg;
    (void)err;
    u->part = -1;
    return PL_OK;
}

static void sink_take(struct pl_sink *self, const char *bytes, size_t n)
{
    struct upload *u = (struct upload *)self;
    if (u->st == PL_OK)
        u->st = pl_multipart_take(u->form, bytes, n, &u->err);
}

static void free_upload(struct upload *u)
{
    pl_multipart_free(u->form);
    if (u->fd >= 0)
        close(u->fd);
    if (u->path != NULL)
        unlink(u->path); /* gone already when it was taken in */
    free(u->path);
    free(u->filename);
    free(u);
}

static void sink_free(struct pl_sink *self)
{
    free_upload((struct upload *)self);
}

static void nothing(struct pl_sink *self)
{
    (void)self;
}

struct pl_sink *pl_api_files_sink(struct pl_http_req *req, const char *content_type)
{
    struct upload *u = pl_xcalloc(1, sizeof *u);
    const struct pl_multipart_sink parts = {begin_part, take_data, end_part, u};
    u->sink = (struct pl_sink){sink_take, sink_free};
    u->jobs = req->server->jobs;
    u->fd = u->part = -1;
    u->max = (uint64_t)req->server->config->max_file_mb << 20;
    pl_sha256_init(&u->hash);
    u->st = u->jobs == NULL ? PL_ENOTSUP : pl_multipart_new(&u->form, content_type, &parts, &u->err);
    return &u->sink;
}

static pl_status check_fields(struct upload *u, struct pl_err *err)
{
    if (!u->seen[THE_FILE])
        return pl_fail_param(err, PL_EINVAL, "file", "'file' is required");
    if (!u->seen[PURPOSE])
        return pl_fail_param(err, PL_EINVAL, "purpose", "'purpose' is required");
    size_t i = 0;
    while (i < PL_COUNT_OF(purposes) && strcmp(purposes[i], u->values[PURPOSE]) != 0)
        i++;
    if (i == PL_COUNT_OF(purposes))
        return pl_fail_param(err, PL_EINVAL, "purpose", "'purpose' must be one of fine-tune, assistants, batch, vision, user_data, evals, not \"%.60s\"",
                             pl_utf8_valid(u->values[PURPOSE], strlen(u->values[PURPOSE])) ? u->values[PURPOSE] : "?");
    if (!u->seen[ANCHOR] && !u->seen[SECONDS])
        return PL_OK;
    if (strcmp(u->values[ANCHOR], "created_at") != 0)
        return pl_fail_param(err, PL_EINVAL, fields[ANCHOR], "'expires_after[anchor]' must be created_at");
    char *end;
    errno = 0;
    u->expires_after = strtoll(u->values[SECONDS], &end, 10);
    if (u->values[SECONDS][0] < '0' || u->values[SECONDS][0] > '9' || *end != '\0' || errno != 0 || u->expires_after < EXPIRES_MIN ||
        u->expires_after > EXPIRES_MAX)
        return pl_fail_param(err, PL_EINVAL, fields[SECONDS], "'expires_after[seconds]' must be a whole number from %d to %d", EXPIRES_MIN, EXPIRES_MAX);
    return PL_OK;
}

/* On the tasks' thread: the form of every line. OpenAI's words for the commonest mistake. */
static pl_status check_lines(struct upload *u, struct pl_data_report *r, struct pl_err *err)
{
    const struct pl_data_opts o = {.min_examples = 1};
    pl_status st = pl_data_scan(u->path, &o, NULL, NULL, r, err);
    if (st == PL_ERANGE)
        st = pl_fail(err, PL_EINVAL, "The file has no examples.");
    if (st == PL_EFORMAT && r->n_faults > 0 && strncmp(r->faults[0].reason, "the line is not a dictionary", 28) == 0)
        st = pl_fail(err, PL_EFORMAT, "Expected file to have JSONL format, where every line is a JSON dictionary. Line %u is not a dictionary%s.",
                     r->faults[0].line, r->faults[0].reason + 28);
    if (st == PL_EFORMAT || st == PL_EINVAL) {
        strcpy(err->param, "file");
        u->http = 400;
        u->code = "invalid_file";
    }
    return st;
}

static pl_status within_quota(struct upload *u, struct pl_err *err)
{
    uint64_t used, n;
    const uint64_t quota = (uint64_t)u->jobs->server->config->files_quota_mb << 20;
    pl_store_usage(u->jobs->store, &used, &n);
    if (used <= quota && u->n <= quota - used)
        return PL_OK;
    (void)pl_fail_param(err, PL_EINVAL, "file", "the file's %llu bytes do not fit: %llu of the %llu bytes for files are used (delete some, or raise "
                        "files-quota-mb)", (unsigned long long)u->n, (unsigned long long)used, (unsigned long long)quota);
    return fail(u, 400, "file_quota_exceeded", PL_EINVAL);
}

static pl_status store_upload(struct upload *u, struct pl_file_row *row, struct pl_err *err)
{
    struct pl_store *s = u->jobs->store;
    char id[PL_ID_MAX];
    if (fsync(u->fd) != 0)
        return disk_failed(u, err, errno);
    pl_store_new_id(id, "file-");
    pl_sha256_hex(&u->hash, u->sha256);
    row->bytes = (int64_t)u->n;
    row->created_at = time(NULL);
    row->expires_at = u->expires_after > 0 ? row->created_at + u->expires_after : 0;
    pl_row_set(&row->id, id);
    pl_row_set(&row->filename, u->filename);
    pl_row_set(&row->purpose, u->values[PURPOSE]);
    pl_row_set(&row->sha256, u->sha256);
    pl_row_set(&row->status, "processed");
    pl_status st = pl_store_begin(s, err);
    if (st != PL_OK)
        return fail(u, 507, "storage_failed", st);
    st = within_quota(u, err);
    if (st == PL_OK && (st = pl_files_adopt(s, u->path, row, err)) != PL_OK)
        fail(u, 507, "storage_failed", st);
    st = pl_store_end(s, st, err);
    if (st != PL_OK) {
        pl_files_discard(s, id);
        if (u->http == 0)
            fail(u, 507, "storage_failed", st);
    }
    return st;
}

static void run_upload(void *arg, struct pl_http_resp *resp)
{
    struct upload *u = arg;
    struct pl_err err = {0};
    struct pl_data_report r = {0};
    struct pl_file_row row = {0};
    pl_status st = strcmp(u->values[PURPOSE], "fine-tune") == 0 ? check_lines(u, &r, &err) : PL_OK;
    if (st == PL_OK)
        st = store_upload(u, &row, &err);
    if (st == PL_OK) {
        pl_listing_write(&resp->body, file_json(&row));
    } else {
        char *lines = NULL, *more = NULL;
        if (r.n_faults > 0) {
            json_t *list = pl_jobs_lines(&r);
            lines = json_dumps(list, 0);
            json_decref(list);
        }
        if (lines != NULL && asprintf(&more, ",\"n_bad_lines\":%u,\"lines\":%s", r.n_bad, lines) < 0)
            more = NULL;
        resp->status = u->http != 0 ? u->http : pl_apierr_of(st).http;
        resp->final = true;
        pl_apierr_write_as(&resp->body, &err, resp->status >= 500 ? "server_error" : "invalid_request_error", u->code, more);
        free(lines);
        free(more);
    }
    pl_data_report_fini(&r);
    pl_row_fini(PL_TABLE_FILES, &row);
}

static void drop_upload(void *arg)
{
    free_upload(arg);
}

void pl_api_files_create(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct upload *u = (struct upload *)req->sink;
    if (!pl_listing_have_jobs(req, resp))
        return;
    if (u->st == PL_OK)
        u->st = pl_multipart_finish(u->form, &u->err);
    if (u->st == PL_OK)
        u->st = check_fields(u, &u->err);
    if (u->st != PL_OK) {
        if (u->http != 0)
            pl_apierr_answer_as(req, resp, u->http, u->code, &u->err);
        else
            pl_apierr_answer(req, resp, &u->err);
        return;
    }
    /* The task owns the upload from here on; the connection keeps an empty sink. */
    struct upload *own = pl_xmalloc(sizeof *own);
    *own = *u;
    *u = (struct upload){.sink = {.take = sink_take, .free = sink_free}, .fd = -1, .st = PL_ESTOPPED};
    pl_multipart_free(own->form);
    own->form = NULL;
    own->sink.free = nothing;
    const struct pl_task task = {run_upload, drop_upload, own};
    pl_tasks_answer(own->jobs->tasks, &task, req, resp);
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
    static const struct pl_listing files = {PL_TABLE_FILES, 10000, 10000, true};
    struct pl_store_query q = {0};
    if (!pl_listing_query(req, resp, &files, &q))
        return;
    q.value = pl_http_query(req, "purpose");
    q.column = q.value != NULL ? "purpose" : NULL;
    pl_listing_answer(req, resp, &files, &q, file_json);
}

void pl_api_files_get(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_file_row row;
    if (!find_file(req, resp, &row))
        return;
    pl_listing_write(&resp->body, file_json(&row));
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
