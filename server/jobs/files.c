/* files: uploaded files and results.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/base/sha256.h"

#define PL_LOG_MODULE "files"

char *pl_jobs_path(const struct pl_store *s, const char *folder, const char *name)
{
    char *path = NULL;
    if (asprintf(&path, "%s/%s%s%s", pl_store_dir(s), folder, name[0] != '\0' ? "/" : "", name) < 0)
        return pl_xstrdup("");
    return path;
}

pl_status pl_files_adopt(const struct pl_store *s, const char *from, const char *id, struct pl_err *err)
{
    char *to = pl_jobs_path(s, "files", id), *dir = pl_jobs_path(s, "files", "");
    pl_status st = PL_OK;
    if (rename(from, to) != 0)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot rename %s to %s: %s", from, to, strerror(errno));
    if (st == PL_OK)
        st = pl_sync_folder(dir, err);
    free(to);
    free(dir);
    return st;
}

void pl_files_discard(const struct pl_store *s, const char *id)
{
    char *path = pl_jobs_path(s, "files", id);
    if (unlink(path) != 0 && errno != ENOENT)
        pl_log_warn("cannot remove %s: %s", path, strerror(errno));
    free(path);
}

pl_status pl_files_remove(struct pl_store *s, const char *id, struct pl_err *err)
{
    struct pl_file_row row;
    pl_status st = pl_store_get(s, PL_TABLE_FILES, "id", id, &row, err);
    if (st == PL_OK)
        st = pl_store_delete(s, PL_TABLE_FILES, row.seq, err); /* the row first: bytes without one are swept */
    if (st == PL_OK)
        pl_files_discard(s, id);
    pl_row_fini(PL_TABLE_FILES, &row);
    return st;
}

void pl_files_expire(struct pl_store *s, int64_t now)
{
    void *rows;
    size_t n;
    bool more;
    struct pl_err err = {0};
    const struct pl_store_query late = {.past_column = "expires_at", .past = now, .ascending = true};
    if (pl_store_list(s, PL_TABLE_FILES, &late, &rows, &n, &more, &err) != PL_OK) {
        pl_log_error("%s", err.msg);
        return;
    }
    const struct pl_file_row *f = rows;
    for (size_t i = 0; i < n; i++) {
        if (pl_files_remove(s, f[i].id, &err) == PL_OK)
            pl_log_info("%s expired", f[i].id);
        else if (err.code != PL_ENOENT) /* somebody deleted it a moment ago */
            pl_log_error("%s", err.msg);
    }
    pl_rows_free(PL_TABLE_FILES, rows, n);
}

pl_status pl_files_copy(const char *from, const char *to, uint64_t max, uint64_t *n, char *sha256, struct pl_err *err)
{
    char block[65536];
    struct pl_sha256 hash;
    ssize_t got;
    pl_status st = PL_OK;
    errno = 0;
    const int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    *n = 0;
    pl_sha256_init(&hash);
    if (in < 0 || out < 0)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot copy %s to %s: %s", from, to, strerror(errno));
    while (st == PL_OK && (got = read(in, block, sizeof block)) != 0) {
        if (got > 0 && *n + (uint64_t)got > max)
            st = pl_fail(err, PL_EIO, "cannot copy %s to %s: it is larger than %llu bytes", from, to, (unsigned long long)max);
        else if (got < 0 || (st = pl_write_all(out, block, (size_t)got, err)) != PL_OK)
            st = pl_fail(err, st != PL_OK ? st : PL_EIO, "cannot copy %s to %s: %s", from, to, strerror(errno));
        if (st == PL_OK) {
            pl_sha256_add(&hash, block, (size_t)got);
            *n += (uint64_t)got;
        }
    }
    if (st == PL_OK && fsync(out) != 0)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot flush %s: %s", to, strerror(errno));
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    if (st != PL_OK)
        unlink(to);
    pl_sha256_hex(&hash, sha256);
    return st;
}

pl_status pl_files_link(const char *from, const char *to, struct pl_err *err)
{
    char hash[PL_SHA256_HEX];
    uint64_t n;
    if (link(from, to) == 0)
        return PL_OK;
    if (errno == EPERM || errno == EXDEV || errno == EMLINK || errno == ENOSYS || errno == EOPNOTSUPP)
        return pl_files_copy(from, to, UINT64_MAX, &n, hash, err);
    return pl_fail(err, pl_status_of_errno(errno), "cannot link %s to %s: %s", from, to, strerror(errno));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *where)
{
    (void)st, (void)where;
    if ((type == FTW_DP ? rmdir(path) : unlink(path)) != 0)
        pl_log_warn("cannot remove %s: %s", path, strerror(errno));
    return 0;
}

void pl_files_remove_tree(const char *path)
{
    enum { OPEN_FOLDERS = 8 };
    nftw(path, remove_one, OPEN_FOLDERS, FTW_DEPTH | FTW_PHYS);
}

/* True also when the store cannot say. */
static bool may_be_known(struct pl_store *s, pl_table t, const char *id)
{
    void *row = pl_xcalloc(1, pl_store_row_size(t));
    const bool yes = pl_store_get(s, t, "id", id, row, NULL) != PL_ENOENT;
    pl_row_fini(t, row);
    free(row);
    return yes;
}

/* known: the table whose rows' files stay; -1 = none do. */
static void sweep_folder(struct pl_store *s, const char *folder, const char *prefix, int known)
{
    char *path = pl_jobs_path(s, folder, "");
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        if (!pl_store_is_id(e->d_name, prefix)) /* somebody else's */
            continue;
        if (known >= 0 && may_be_known(s, (pl_table)known, e->d_name))
            continue;
        if (unlinkat(dirfd(d), e->d_name, 0) == 0)
            pl_log_info("removed %s/%s, which was left unfinished", folder, e->d_name);
    }
    if (d != NULL)
        closedir(d);
    free(path);
}

void pl_files_sweep(struct pl_store *s)
{
    sweep_folder(s, "uploads", "upload-", -1);
    sweep_folder(s, "uploads", "file-", -1); /* a job's results on their way */
    sweep_folder(s, "uploads", "part_", PL_TABLE_PARTS);
    sweep_folder(s, "files", "file-", PL_TABLE_FILES);
}
