/* readfile: the whole of a regular file in memory.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/readfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pl_status read_all(int fd, uint8_t *bytes, size_t n, const char *path, struct pl_err *err)
{
    size_t at = 0;
    for (ssize_t got; at < n; at += (size_t)got) {
        while ((got = read(fd, bytes + at, n - at)) < 0 && errno == EINTR)
            ;
        if (got < 0)
            return pl_fail(err, PL_EIO, "cannot read %.300s: %s", path, strerror(errno));
        if (got == 0)
            break;
    }
    struct stat now;
    if (at < n || fstat(fd, &now) != 0 || (size_t)now.st_size != n)
        return pl_fail(err, PL_EIO, "%.300s changed while it was read: try again when it is complete", path);
    return PL_OK;
}

pl_status pl_readfile(void **out, size_t *n, const char *path, size_t max, struct pl_err *err)
{
    struct stat info;
    void *bytes = NULL;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return pl_fail(err, errno == ENOENT ? PL_ENOENT : PL_EIO, "cannot open %.300s: %s", path, strerror(errno));
    pl_status rc;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        rc = pl_fail(err, PL_EIO, "%.300s is not a regular file", path);
    else if (info.st_size == 0)
        rc = pl_fail(err, PL_EFORMAT, "%.300s is empty", path);
    else if ((uintmax_t)info.st_size > max)
        rc = pl_fail(err, PL_EFORMAT, "%.300s has %jd bytes; at most %zu are possible", path, (intmax_t)info.st_size, max);
    else if ((bytes = malloc((size_t)info.st_size)) == NULL)
        rc = pl_fail(err, PL_ENOMEM, "no memory for the %jd bytes of %.300s", (intmax_t)info.st_size, path);
    else
        rc = read_all(fd, bytes, (size_t)info.st_size, path, err);
    close(fd);
    if (rc != PL_OK) {
        free(bytes);
        return rc;
    }
    *out = bytes;
    *n = (size_t)info.st_size;
    return PL_OK;
}
