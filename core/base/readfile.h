/* readfile: the whole of a regular file in memory, for files that somebody may change or cut off meanwhile: to read a mapping of
 * one would kill the process.
 * Thread: any.  Owns: nothing.
 * Fails: PL_ENOENT, PL_EIO (also: no regular file, or its size changed while it was read), PL_EFORMAT (empty, or larger than
 * max), PL_ENOMEM; messages begin with or name the path.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_READFILE_H
#define PL_BASE_READFILE_H

#include <stddef.h>

#include "core/base/status.h"

/* *out is the caller's (free()). */
pl_status pl_readfile(void **out, size_t *n, const char *path, size_t max, struct pl_err *err) PL_MUST_CHECK;

#endif
