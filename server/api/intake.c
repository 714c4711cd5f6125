/* intake: a form with one file, read as it comes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/api/intake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/newfile.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/files.h"
#include "server/jobs/room.h"
#include "server/multipart.h"
#include "server/server.h"

enum { THE_FILE = PL_INTAKE_VALUES, ROOM_STEP = 1 << 20 };

pl_status pl_intake_fail(struct pl_intake *u, int http, const char *code, pl_status st)
{
    u->http = http;
    u->code = code;
    return st;
}

pl_status pl_intake_disk_failed(struct pl_err *err, int why)
{
    const pl_status st = pl_status_of_errno(why);
    return pl_fail(err, st, "the file cannot be stored: %s", st == PL_ENOSPC ? "the disk of the data directory is full" : strerror(why));
}

static pl_status begin_file(struct pl_intake *u, const char *filename, struct pl_err *err)
{
    const char *slash = filename != NULL ? strrchr(filename, '/') : NULL;
    char id[PL_ID_MAX];
    filename = slash != NULL ? slash + 1 : filename;
    if (u->form->named && (filename == NULL || filename[0] == '\0'))
        return pl_fail_param(err, PL_EINVAL, u->form->file, "'%s' must be a file with a name", u->form->file);
    for (const char *p = filename != NULL ? filename : ""; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return pl_fail_param(err, PL_EINVAL, u->form->file, "'%s': the file's name has control characters", u->form->file);
    pl_row_set(&u->filename, filename);
    pl_store_new_id(id, "upload-");
    u->path = pl_jobs_path(u->jobs->store, "uploads", id);
    u->fd = open(u->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return u->fd >= 0 ? PL_OK : pl_intake_disk_failed(err, errno);
}

static pl_status begin_part(void *arg, const char *name, const char *filename, struct pl_err *err)
{
    struct pl_intake *u = arg;
    u->part = 0;
    while (u->part < THE_FILE && (u->form->values[u->part] == NULL || strcmp(u->form->values[u->part], name) != 0))
        u->part++;
    if (u->part == THE_FILE && strcmp(u->form->file, name) != 0)
        return pl_fail_param(err, PL_EINVAL, name, "'%.60s' is not a field of this form; it has %s", name, u->form->all);
    if (u->seen[u->part])
        return pl_fail_param(err, PL_EINVAL, name, "'%s' comes twice", name);
    u->seen[u->part] = true;
    return u->part == THE_FILE ? begin_file(u, filename, err) : PL_OK;
}

static pl_status take_value(struct pl_intake *u, const char *bytes, size_t n, struct pl_err *err)
{
    char *value = u->values[u->part];
    const char *name = u->form->values[u->part];
    const size_t used = strlen(value);
    if (memchr(bytes, '\0', n) != NULL)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' has a NUL byte", name);
    if (used + n > PL_INTAKE_MAX_VALUE)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' must be a text of at most %d bytes", name, PL_INTAKE_MAX_VALUE);
    memcpy(value + used, bytes, n);
    value[used + n] = '\0';
    return PL_OK;
}

static pl_status take_room(struct pl_intake *u, size_t n, struct pl_err *err)
{
    if (u->n + n <= u->room)
        return PL_OK;
    uint64_t more = u->n + n - u->room;
    if (more < ROOM_STEP && pl_room_take(u->jobs, ROOM_STEP, "", NULL) == PL_OK) {
        u->room += ROOM_STEP;
        return PL_OK;
    }
    const pl_status st = pl_room_take(u->jobs, more, u->form->file, err);
    if (st != PL_OK)
        return pl_intake_fail(u, 400, "file_quota_exceeded", st);
    u->room += more;
    return PL_OK;
}

static pl_status take_data(void *arg, const char *bytes, size_t n, struct pl_err *err)
{
    struct pl_intake *u = arg;
    if (u->part != THE_FILE)
        return take_value(u, bytes, n, err);
    if (n > u->max - u->n) {
        (void)pl_fail_param(err, PL_EINVAL, u->form->file, "'%s' is larger than the %llu MiB that %s", u->form->file, (unsigned long long)(u->max >> 20),
                            u->form->limit);
        return pl_intake_fail(u, 413, "request_too_large", PL_EINVAL);
    }
    const pl_status st = take_room(u, n, err);
    if (st != PL_OK)
        return st;
    pl_sha256_add(&u->hash, bytes, n);
    u->n += n;
    return pl_write_all(u->fd, bytes, n, NULL) == PL_OK ? PL_OK : pl_intake_disk_failed(err, errno);
}

static pl_status end_part(void *arg, struct pl_err *err)
{
    struct pl_intake *u = arg;
    (void)err;
    u->part = -1;
    return PL_OK;
}

static void sink_take(struct pl_sink *self, const char *bytes, size_t n)
{
    struct pl_intake *u = (struct pl_intake *)self;
    if (u->st == PL_OK)
        u->st = pl_multipart_take(u->parser, bytes, n, &u->err);
}

void pl_intake_free(struct pl_intake *u)
{
    pl_multipart_free(u->parser);
    if (u->fd >= 0)
        close(u->fd);
    if (u->path != NULL)
        unlink(u->path); /* gone already when it was taken in */
    if (u->room > 0)
        pl_room_give(u->jobs, u->room);
    free(u->path);
    free(u->filename);
    free(u);
}

static void sink_free(struct pl_sink *self)
{
    pl_intake_free((struct pl_intake *)self);
}

static void nothing(struct pl_sink *self)
{
    (void)self;
}

struct pl_sink *pl_intake_sink(struct pl_http_req *req, const char *content_type, const struct pl_intake_form *form, uint64_t max)
{
    struct pl_intake *u = calloc(1, sizeof *u);
    if (u == NULL)
        return NULL;
    const struct pl_multipart_sink parts = {begin_part, take_data, end_part, u};
    u->sink = (struct pl_sink){sink_take, sink_free};
    u->form = form;
    u->jobs = req->server->jobs;
    u->fd = u->part = -1;
    u->max = max;
    pl_sha256_init(&u->hash);
    u->st = u->jobs == NULL ? PL_ENOTSUP : pl_multipart_new(&u->parser, content_type, &parts, &u->err);
    return &u->sink;
}

struct pl_intake *pl_intake_end(struct pl_http_req *req, struct pl_http_resp *resp, pl_status (*check)(struct pl_intake *u, struct pl_err *err))
{
    struct pl_intake *u = (struct pl_intake *)req->sink;
    if (!pl_listing_have_jobs(req, resp))
        return NULL;
    if (u->st == PL_OK)
        u->st = pl_multipart_finish(u->parser, &u->err);
    if (u->st == PL_OK && !u->seen[THE_FILE])
        u->st = pl_fail_param(&u->err, PL_EINVAL, u->form->file, "'%s' is required", u->form->file);
    if (u->st == PL_OK && check != NULL)
        u->st = check(u, &u->err);
    struct pl_intake *own = u->st == PL_OK ? malloc(sizeof *own) : NULL;
    if (u->st == PL_OK && own == NULL)
        u->st = pl_fail(&u->err, PL_ENOMEM, "out of memory");
    if (u->st != PL_OK) {
        if (u->http != 0)
            pl_apierr_answer_as(req, resp, u->http, u->code, &u->err);
        else if (u->st == PL_ENOSPC)
            pl_apierr_answer_as(req, resp, 507, "disk_full", &u->err);
        else
            pl_apierr_answer(req, resp, &u->err);
        return NULL;
    }
    *own = *u;
    *u = (struct pl_intake){.sink = {.take = sink_take, .free = sink_free}, .fd = -1, .st = PL_ESTOPPED};
    pl_multipart_free(own->parser);
    own->parser = NULL;
    own->sink.free = nothing;
    return own;
}

pl_status pl_intake_flush(struct pl_intake *u, struct pl_err *err)
{
    return fsync(u->fd) == 0 ? PL_OK : pl_intake_disk_failed(err, errno);
}
