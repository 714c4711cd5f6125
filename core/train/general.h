/* general: a text about this and that, on which a model's loss before and after a job says how much it has forgotten. Ours is part of the
 * program (data/general.txt); an operator may name a file with another.
 * Thread: any.  Owns: nothing.
 * Fails: read as pl_readfile; PL_EFORMAT when it is not UTF-8.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_GENERAL_H
#define PL_TRAIN_GENERAL_H

#include <stddef.h>

#include "core/base/status.h"

enum { PL_GENERAL_MAX = 256 << 10 /* bytes */ };

/* path: NULL = ours. *text is the caller's (free()). */
pl_status pl_general_read(char **text, size_t *n, const char *path, struct pl_err *err) PL_MUST_CHECK;

#endif
