/* uploads: POST /v1/uploads and its parts, complete, cancel: a file of any size in pieces, put together on the tasks' thread.
 * Thread: microhttpd's workers, and the tasks' thread where named.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/uploads.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "core/base/json.h"
#include "core/base/md5.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "server/api/api.h"
#include "server/api/filing.h"
#include "server/api/intake.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/files.h"
#include "server/jobs/room.h"
#include "server/server.h"

enum { MAX_PART = 64 << 20, MAX_TEXT = 255 };

/* file: NULL = none. */
static json_t *upload_json(const struct pl_upload_row *u, const struct pl_file_row *file)
{
    return json_pack("{s:s,s:s,s:I,s:I,s:I,s:s,s:s,s:s,s:o}", "id", u->id, "object", "upload", "bytes", (json_int_t)u->bytes, "created_at",
                     (json_int_t)u->created_at, "expires_at", (json_int_t)u->expires_at, "filename", u->filename, "purpose", u->purpose, "status", u->status,
                     "file", file != NULL ? pl_filing_json(file) : json_null());
}

static bool is_missing(pl_status st, const char *id, struct pl_err *err)
{
    if (st == PL_ENOENT)
        (void)pl_fail_param(err, PL_ENOENT, "upload_id", "No such Upload object: %.100s", id);
    return st == PL_ENOENT;
}

static void refuse(struct pl_http_req *req, struct pl_http_resp *resp, pl_status st, struct pl_err *err)
{
    if (is_missing(st, req->path_arg, err))
        pl_apierr_answer_as(req, resp, 404, NULL, err);
    else
        pl_apierr_answer(req, resp, err);
}

/* ---- create -------------------------------------------------------------------------------------------------------- */

static pl_status read_text(const json_t *root, const char *name, char **out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, name);
    const char *s = json_string_value(v);
    if (v == NULL)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' is required", name);
    if (s == NULL || s[0] == '\0' || strlen(s) > MAX_TEXT)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' must be a string of 1 to %d bytes", name, MAX_TEXT);
    for (const char *p = s; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return pl_fail_param(err, PL_EINVAL, name, "'%s' has control characters", name);
    pl_row_set(out, s);
    return PL_OK;
}

static pl_status read_bytes(const struct pl_server *s, const json_t *root, int64_t *out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, "bytes");
    const int64_t most = (int64_t)s->config->max_file_mb << 20;
    if (v == NULL)
        return pl_fail_param(err, PL_EINVAL, "bytes", "'bytes' is required");
    if (!json_is_integer(v) || json_integer_value(v) < 1 || json_integer_value(v) > most)
        return pl_fail_param(err, PL_EINVAL, "bytes", "'bytes' must be an integer from 1 to %lld (max-file-mb)", (long long)most);
    *out = json_integer_value(v);
    return PL_OK;
}

static pl_status read_expiry(const json_t *root, int64_t *out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, "expires_after");
    const char *anchor = json_string_value(json_object_get(v, "anchor")), *key;
    const json_t *seconds = json_object_get(v, "seconds");
    json_t *member;
    *out = 0;
    if (v == NULL || json_is_null(v))
        return PL_OK;
    if (!json_is_object(v))
        return pl_fail_param(err, PL_EINVAL, "expires_after", "'expires_after' must be an object with anchor and seconds, not %s", pl_json_kind(v));
    json_object_foreach((json_t *)(uintptr_t)v, key, member)
    {
        char param[64];
        snprintf(param, sizeof param, "expires_after.%.40s", key);
        if (strcmp(key, "anchor") != 0 && strcmp(key, "seconds") != 0)
            return pl_fail_param(err, PL_EINVAL, param, "'%s' is not a member of expires_after; it has anchor and seconds", param);
    }
    if (anchor == NULL || strcmp(anchor, "created_at") != 0)
        return pl_fail_param(err, PL_EINVAL, "expires_after.anchor", "'expires_after.anchor' must be \"created_at\"");
    *out = json_is_integer(seconds) ? json_integer_value(seconds) : -1;
    return pl_filing_expiry("expires_after.seconds", *out, err);
}

static pl_status read_upload(const struct pl_server *s, const json_t *root, struct pl_upload_row *row, struct pl_err *err)
{
    static const char *const names[] = {"filename", "purpose", "bytes", "mime_type", "expires_after", NULL};
    pl_status st = pl_json_known(root, names, err);
    if (st == PL_OK)
        st = read_text(root, "filename", &row->filename, err);
    if (st == PL_OK && strchr(row->filename, '/') != NULL)
        st = pl_fail_param(err, PL_EINVAL, "filename", "'filename' must be a name without folders");
    if (st == PL_OK)
        st = read_text(root, "purpose", &row->purpose, err);
    if (st == PL_OK)
        st = pl_filing_purpose(row->purpose, err);
    if (st == PL_OK)
        st = read_bytes(s, root, &row->bytes, err);
    if (st == PL_OK)
        st = read_text(root, "mime_type", &row->mime_type, err);
    return st == PL_OK ? read_expiry(root, &row->expires_after, err) : st;
}

void pl_api_uploads_create(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_upload_row row = {.created_at = time(NULL)};
    struct pl_err err = {0};
    json_t *root = NULL;
    char id[PL_ID_MAX];
    if (!pl_listing_have_jobs(req, resp))
        return;
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (st == PL_OK)
        st = read_upload(req->server, root, &row, &err);
    if (st == PL_OK) {
        pl_store_new_id(id, "upload_");
        pl_row_set(&row.id, id);
        pl_row_set(&row.status, "pending");
        row.expires_at = row.created_at + PL_UPLOAD_LIFE_S;
        st = pl_store_insert(req->server->jobs->store, PL_TABLE_UPLOADS, &row, &err);
    }
    if (st == PL_OK)
        pl_listing_write(&resp->body, upload_json(&row, NULL));
    else
        pl_apierr_answer(req, resp, &err);
    json_decref(root);
    pl_row_fini(PL_TABLE_UPLOADS, &row);
}

/* ---- parts --------------------------------------------------------------------------------------------------------- */

struct part_task {
    struct pl_intake *u;
    char upload[PL_ID_MAX];
};

struct pl_sink *pl_api_uploads_sink(struct pl_http_req *req, const char *content_type)
{
    static const struct pl_intake_form usual = {.file = "data", .all = "data", .limit = "a part may have: send it in smaller ones"};
    static const struct pl_intake_form small = {.file = "data", .all = "data", .limit = "this server accepts (max-file-mb)"};
    const uint64_t most = (uint64_t)req->server->config->max_file_mb << 20;
    return pl_intake_sink(req, content_type, most < MAX_PART ? &small : &usual, most < MAX_PART ? most : MAX_PART);
}

static pl_status check_part(struct pl_intake *u, struct pl_err *err)
{
    return u->n > 0 ? PL_OK : pl_fail_param(err, PL_EINVAL, "data", "'data' is empty");
}

static void run_part(void *arg, struct pl_http_resp *resp)
{
    struct part_task *t = arg;
    struct pl_err err = {0};
    struct pl_part_row part = {.bytes = (int64_t)t->u->n};
    pl_status st = pl_intake_flush(t->u, &err);
    if (st == PL_OK)
        st = pl_uploads_add(t->u->jobs->store, t->upload, t->u->path, &part, &err);
    if (st == PL_OK)
        pl_listing_write(&resp->body, json_pack("{s:s,s:s,s:I,s:s}", "id", part.id, "object", "upload.part", "created_at", (json_int_t)part.created_at,
                                                "upload_id", part.upload));
    else
        pl_filing_refuse(resp, st, is_missing(st, t->upload, &err) ? 404 : 0, NULL, &err, NULL);
    pl_row_fini(PL_TABLE_PARTS, &part);
}

static void drop_part(void *arg)
{
    struct part_task *t = arg;
    pl_intake_free(t->u);
    free(t);
}

void pl_api_uploads_part(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_intake *u = pl_intake_end(req, resp, check_part);
    if (u == NULL)
        return;
    struct part_task *t = pl_xcalloc(1, sizeof *t);
    t->u = u;
    snprintf(t->upload, sizeof t->upload, "%s", req->path_arg);
    const struct pl_task task = {run_part, drop_part, t};
    pl_tasks_answer(u->jobs->tasks, &task, req, resp);
}

/* ---- complete ------------------------------------------------------------------------------------------------------ */

struct completion {
    struct pl_jobs *j;
    char id[PL_ID_MAX];
    json_t *body;
    struct pl_upload_row row;
    struct pl_part_row *parts; /* as they are stored */
    size_t n;
    char md5[PL_MD5_HEX], sha256[PL_SHA256_HEX];
    char *path;
    uint64_t room; /* taken for the file, which stands beside its parts until it is whole */
    bool no_room;
};

static const struct pl_part_row *part_named(const struct completion *c, const char *id)
{
    for (size_t i = 0; i < c->n; i++)
        if (strcmp(c->parts[i].id, id) == 0)
            return &c->parts[i];
    return NULL;
}

/* The parts that the body names are this upload's, each once, and have all of its bytes. */
static pl_status check_parts(struct completion *c, const json_t *ids, struct pl_err *err)
{
    int64_t sum = 0;
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const char *id = json_string_value(json_array_get(ids, i));
        const struct pl_part_row *p = id != NULL ? part_named(c, id) : NULL;
        if (p == NULL)
            return pl_fail_param(err, PL_EINVAL, "part_ids", "'part_ids[%zu]' is not a part of this upload", i);
        for (size_t k = 0; k < i; k++)
            if (strcmp(json_string_value(json_array_get(ids, k)), id) == 0)
                return pl_fail_param(err, PL_EINVAL, "part_ids", "'part_ids' has %.60s twice", id);
        sum += p->bytes;
    }
    return sum == c->row.bytes ? PL_OK
                               : pl_fail_param(err, PL_EINVAL, "part_ids", "the parts have %lld bytes together, but the upload was announced with %lld",
                                               (long long)sum, (long long)c->row.bytes);
}

static pl_status copy_part(const struct completion *c, const char *id, int out, struct pl_sha256 *sha, struct pl_md5 *md5, struct pl_err *err)
{
    char block[65536], *path = pl_jobs_path(c->j->store, "uploads", id);
    const int in = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = -1;
    pl_status st = PL_OK;
    while (st == PL_OK && in >= 0 && (got = read(in, block, sizeof block)) > 0) {
        pl_sha256_add(sha, block, (size_t)got);
        pl_md5_add(md5, block, (size_t)got);
        if (pl_write_all(out, block, (size_t)got, NULL) != PL_OK)
            st = pl_intake_disk_failed(err, errno);
        if (atomic_load(pl_tasks_stopping(c->j->tasks)))
            st = pl_fail(err, PL_ESTOPPED, "the server is shutting down");
    }
    if (st == PL_OK && got < 0)
        st = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    if (in >= 0)
        close(in);
    free(path);
    return st;
}

static pl_status put_together(struct completion *c, const json_t *ids, struct pl_err *err)
{
    struct pl_sha256 sha;
    struct pl_md5 md5;
    char id[PL_ID_MAX];
    pl_store_new_id(id, "upload-");
    c->path = pl_jobs_path(c->j->store, "uploads", id);
    const int out = open(c->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    pl_status st = out >= 0 ? PL_OK : pl_intake_disk_failed(err, errno);
    pl_sha256_init(&sha);
    pl_md5_init(&md5);
    for (size_t i = 0; i < json_array_size(ids) && st == PL_OK; i++)
        st = copy_part(c, json_string_value(json_array_get(ids, i)), out, &sha, &md5, err);
    if (st == PL_OK && fsync(out) != 0)
        st = pl_intake_disk_failed(err, errno);
    if (out >= 0)
        close(out);
    pl_sha256_hex(&sha, c->sha256);
    pl_md5_hex(&md5, c->md5);
    return st;
}

static pl_status complete_in_transaction(void *arg, const char *file, struct pl_err *err)
{
    struct completion *c = arg;
    struct pl_upload_row now;
    pl_status st = pl_uploads_pending(c->j->store, c->id, &now, err);
    (void)is_missing(st, c->id, err);
    if (st == PL_OK) { /* some may have come that the file is not made of */
        pl_rows_free(PL_TABLE_PARTS, c->parts, c->n);
        st = pl_uploads_parts(c->j->store, c->id, &c->parts, &c->n, err);
    }
    if (st == PL_OK)
        st = pl_uploads_end(c->j->store, &now, "completed", file, err);
    pl_row_fini(PL_TABLE_UPLOADS, &c->row);
    c->row = now;
    return st;
}

static pl_status take_room(struct completion *c, struct pl_err *err)
{
    struct pl_err why = {0};
    const uint64_t n = (uint64_t)c->row.bytes;
    const pl_status st = pl_room_take(c->j, n, "part_ids", &why);
    c->room = st == PL_OK ? n : 0;
    c->no_room = st != PL_OK;
    if (st == PL_OK)
        return st;
    return pl_fail_param(err, st, "part_ids", "The file's %llu bytes stand beside its parts until it is whole: %s", (unsigned long long)n, why.msg);
}

static pl_status prepare(struct completion *c, struct pl_err *err)
{
    const json_t *ids = json_object_get(c->body, "part_ids"), *md5 = json_object_get(c->body, "md5");
    pl_status st = pl_uploads_pending(c->j->store, c->id, &c->row, err);
    if (st == PL_OK)
        st = pl_uploads_parts(c->j->store, c->id, &c->parts, &c->n, err);
    if (st == PL_OK)
        st = check_parts(c, ids, err);
    if (st == PL_OK)
        st = take_room(c, err);
    if (st == PL_OK && (st = put_together(c, ids, err)) == PL_EIO) {
        struct pl_upload_row now;
        const pl_status is = pl_uploads_pending(c->j->store, c->id, &now, err); /* its parts go when it is cancelled */
        pl_row_fini(PL_TABLE_UPLOADS, &now);
        st = is != PL_OK ? is : st;
    }
    if (st == PL_OK && json_is_string(md5) && strcasecmp(json_string_value(md5), c->md5) != 0)
        st = pl_fail_param(err, PL_EINVAL, "md5", "the file's MD5 is %s, not \"%.40s\"", c->md5, json_string_value(md5));
    return st;
}

static void run_complete(void *arg, struct pl_http_resp *resp)
{
    struct completion *c = arg;
    struct pl_err err = {0};
    struct pl_file_row file = {0};
    const pl_status st = prepare(c, &err);
    if (st != PL_OK) {
        pl_filing_refuse(resp, st, is_missing(st, c->id, &err) ? 404 : c->no_room ? 400 : 0, c->no_room ? "file_quota_exceeded" : NULL, &err, NULL);
        return;
    }
    struct pl_filing filing = {.jobs = c->j, .path = c->path, .filename = c->row.filename, .purpose = c->row.purpose, .n = (uint64_t)c->row.bytes,
                               .field = "part_ids", .expires_after = c->row.expires_after, .also = complete_in_transaction, .arg = c};
    strcpy(filing.sha256, c->sha256);
    if (pl_filing_store(&filing, &file, resp) == PL_OK) {
        pl_uploads_discard(c->j->store, c->parts, c->n);
        pl_listing_write(&resp->body, upload_json(&c->row, &file));
    }
    pl_row_fini(PL_TABLE_FILES, &file);
}

static void drop_complete(void *arg)
{
    struct completion *c = arg;
    if (c->path != NULL)
        unlink(c->path); /* gone already when it was taken in */
    if (c->room > 0)
        pl_room_give(c->j, c->room);
    free(c->path);
    json_decref(c->body);
    pl_rows_free(PL_TABLE_PARTS, c->parts, c->n);
    pl_row_fini(PL_TABLE_UPLOADS, &c->row);
    free(c);
}

static pl_status read_completion(const json_t *root, struct pl_err *err)
{
    static const char *const names[] = {"part_ids", "md5", NULL};
    const json_t *ids = json_object_get(root, "part_ids"), *md5 = json_object_get(root, "md5");
    const pl_status st = pl_json_known(root, names, err);
    if (st != PL_OK)
        return st;
    if (!json_is_array(ids) || json_array_size(ids) == 0 || json_array_size(ids) > PL_UPLOAD_MAX_PARTS)
        return pl_fail_param(err, PL_EINVAL, "part_ids", "'part_ids' must be an array of 1 to %d ids", PL_UPLOAD_MAX_PARTS);
    for (size_t i = 0; i < json_array_size(ids); i++)
        if (!json_is_string(json_array_get(ids, i)))
            return pl_fail_param(err, PL_EINVAL, "part_ids", "'part_ids[%zu]' must be a string, not %s", i, pl_json_kind(json_array_get(ids, i)));
    if (md5 != NULL && !json_is_null(md5) && (!json_is_string(md5) || strlen(json_string_value(md5)) != PL_MD5_HEX - 1))
        return pl_fail_param(err, PL_EINVAL, "md5", "'md5' must be a string of %d hexadecimal digits", PL_MD5_HEX - 1);
    return PL_OK;
}

void pl_api_uploads_complete(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    json_t *root = NULL;
    if (!pl_listing_have_jobs(req, resp))
        return;
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (st == PL_OK)
        st = read_completion(root, &err);
    if (st != PL_OK) {
        pl_apierr_answer(req, resp, &err);
        json_decref(root);
        return;
    }
    struct completion *c = pl_xcalloc(1, sizeof *c);
    c->j = req->server->jobs;
    c->body = root;
    snprintf(c->id, sizeof c->id, "%s", req->path_arg);
    const struct pl_task task = {run_complete, drop_complete, c};
    pl_tasks_answer(c->j->tasks, &task, req, resp);
}

void pl_api_uploads_cancel(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_upload_row row;
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return;
    const pl_status st = pl_uploads_cancel(req->server->jobs->store, req->path_arg, &row, &err);
    if (st == PL_OK)
        pl_listing_write(&resp->body, upload_json(&row, NULL));
    else
        refuse(req, resp, st, &err);
    pl_row_fini(PL_TABLE_UPLOADS, &row);
}
