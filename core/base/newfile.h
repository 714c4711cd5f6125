/* newfile: a file that appears whole or not at all: written beside its place under another name, flushed to the disk, then
 * renamed, and the folder flushed.
 * Thread: one at a time.  Owns: the temporary file until commit or abandon.
 * Fails: PL_ENOSPC, or PL_EIO, with path and reason, PL_ENOMEM; what stood in its place before stays.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_NEWFILE_H
#define PL_BASE_NEWFILE_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_newfile {
    int fd;
    char *path, *temporary;
};

pl_status pl_newfile_open(struct pl_newfile *f, const char *path, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_newfile_put(struct pl_newfile *f, uint64_t at, const void *bytes, size_t n, struct pl_err *err) PL_MUST_CHECK;
/* Both end the use of f. */
pl_status pl_newfile_commit(struct pl_newfile *f, struct pl_err *err) PL_MUST_CHECK;
void pl_newfile_abandon(struct pl_newfile *f);

/* All of it for bytes in memory. */
pl_status pl_newfile_write(const char *path, const void *bytes, size_t n, struct pl_err *err) PL_MUST_CHECK;

/* Writes all of it at the file's position. PL_ENOSPC or PL_EIO, and errno says why. */
pl_status pl_write_all(int fd, const void *bytes, size_t n, struct pl_err *err) PL_MUST_CHECK;
/* Flushes a folder's own entries to the disk. */
pl_status pl_sync_folder(const char *path, struct pl_err *err) PL_MUST_CHECK;

#endif
