/* files: uploaded files and results: bytes in DIR/files/<id>, the rest in the store. A file is there whole or not at all.
 * Thread: any.  Owns: nothing.
 * Fails: PL_EIO naming the path and the reason (a full disk), PL_ENOENT.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_FILES_H
#define PL_JOBS_FILES_H

#include "server/jobs/store.h"

/* DIR/folder/name; free(). */
char *pl_jobs_path(const struct pl_store *s, const char *folder, const char *name);

/* The file at from (of the same file system, flushed to the disk) becomes the bytes of id, which a transaction of the caller makes a row. When
 * either fails: pl_files_discard. */
pl_status pl_files_adopt(const struct pl_store *s, const char *from, const char *id, struct pl_err *err) PL_MUST_CHECK;
/* Removes a file's bytes. */
void pl_files_discard(const struct pl_store *s, const char *id);
pl_status pl_files_remove(struct pl_store *s, const char *id, struct pl_err *err) PL_MUST_CHECK;
/* Removes files that have expired. */
void pl_files_expire(struct pl_store *s, int64_t now);
/* Removes what a killed daemon left behind: half uploads, bytes without a row. */
void pl_files_sweep(struct pl_store *s);
/* Copies a file of at most max bytes, flushed to the disk; its size and SHA-256. */
pl_status pl_files_copy(const char *from, const char *to, uint64_t max, uint64_t *n, char *sha256, struct pl_err *err) PL_MUST_CHECK;
/* The same bytes under another name: a link where the file system can, else a copy. */
pl_status pl_files_link(const char *from, const char *to, struct pl_err *err) PL_MUST_CHECK;
/* Removes a folder and what is in it. */
void pl_files_remove_tree(const char *path);

#endif
