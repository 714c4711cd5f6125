/* newfile: a file that appears whole or not at all.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/newfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

pl_status pl_newfile_open(struct pl_newfile *f, const char *path, struct pl_err *err)
{
    *f = (struct pl_newfile){.fd = -1, .path = strdup(path)};
    if (f->path == NULL || asprintf(&f->temporary, "%s.%ld.tmp", path, (long)getpid()) < 0) {
        f->temporary = NULL;
        pl_newfile_abandon(f);
        return pl_fail(err, PL_ENOMEM, "out of memory");
    }
    f->fd = open(f->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (f->fd < 0) {
        const int why = errno;
        pl_newfile_abandon(f);
        return pl_fail(err, pl_status_of_errno(why), "cannot write %.200s: %s", path, strerror(why));
    }
    return PL_OK;
}

pl_status pl_newfile_put(struct pl_newfile *f, uint64_t at, const void *bytes, size_t n, struct pl_err *err)
{
    const char *p = bytes;
    while (n > 0) {
        const ssize_t done = pwrite(f->fd, p, n, (off_t)at);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            const int why = done == 0 ? ENOSPC : errno;
            return pl_fail(err, pl_status_of_errno(why), "cannot write %.200s: %s", f->path, strerror(why));
        }
        p += done;
        at += (uint64_t)done;
        n -= (size_t)done;
    }
    return PL_OK;
}

pl_status pl_write_all(int fd, const void *bytes, size_t n, struct pl_err *err)
{
    const char *p = bytes;
    while (n > 0) {
        const ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done == 0)
            errno = ENOSPC;
        if (done <= 0)
            return pl_fail(err, pl_status_of_errno(errno), "cannot write: %s", strerror(errno));
        p += done;
        n -= (size_t)done;
    }
    return PL_OK;
}

pl_status pl_sync_folder(const char *path, struct pl_err *err)
{
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool ok = fd >= 0 && fsync(fd) == 0;
    const int why = errno;
    if (fd >= 0)
        close(fd);
    return ok ? PL_OK : pl_fail(err, pl_status_of_errno(why), "cannot flush %.200s: %s", path, strerror(why));
}

/* The folder's own entry for the file has to reach the disk, too. */
static pl_status sync_parent(const char *path, struct pl_err *err)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash == NULL ? strdup(".") : slash == path ? strdup("/") : strndup(path, (size_t)(slash - path));
    const pl_status rc = folder != NULL ? pl_sync_folder(folder, err) : pl_fail(err, PL_ENOMEM, "out of memory");
    free(folder);
    return rc;
}

pl_status pl_newfile_commit(struct pl_newfile *f, struct pl_err *err)
{
    bool ok = fsync(f->fd) == 0;
    int why = errno;
    if (close(f->fd) != 0 && ok) {
        ok = false;
        why = errno;
    }
    f->fd = -1;
    if (ok && rename(f->temporary, f->path) != 0) {
        ok = false;
        why = errno;
    }
    const pl_status rc = ok ? sync_parent(f->path, err) : pl_fail(err, pl_status_of_errno(why), "cannot write %.200s: %s", f->path, strerror(why));
    pl_newfile_abandon(f);
    return rc;
}

void pl_newfile_abandon(struct pl_newfile *f)
{
    if (f->fd >= 0)
        close(f->fd);
    if (f->temporary != NULL)
        unlink(f->temporary); /* there is none after a commit */
    free(f->temporary);
    free(f->path);
    *f = (struct pl_newfile){.fd = -1};
}

pl_status pl_newfile_write(const char *path, const void *bytes, size_t n, struct pl_err *err)
{
    struct pl_newfile f;
    pl_status rc = pl_newfile_open(&f, path, err);
    if (rc != PL_OK)
        return rc;
    rc = pl_newfile_put(&f, 0, bytes, n, err);
    if (rc == PL_OK)
        return pl_newfile_commit(&f, err);
    pl_newfile_abandon(&f);
    return rc;
}
