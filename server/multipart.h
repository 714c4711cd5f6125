/* multipart: reads multipart/form-data piece by piece, whatever the pieces' borders, in bounded memory.
 * Thread: one at a time.  Owns: its state; the callbacks' arg is the caller's.
 * Fails: new PL_ENOMEM; PL_EINVAL saying what is malformed; nothing may be given to it after that.
 * Source: RFC 7578, RFC 2046 section 5.1.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_MULTIPART_H
#define PL_SERVER_MULTIPART_H

#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

enum { PL_MULTIPART_MAX_PARTS = 64, PL_MULTIPART_MAX_HEAD = 8192 };

/* A part begins, goes on, ends. A status that is not PL_OK ends the reading with it. filename: NULL = none. */
struct pl_multipart_sink {
    pl_status (*begin)(void *arg, const char *name, const char *filename, struct pl_err *err);
    pl_status (*data)(void *arg, const char *bytes, size_t n, struct pl_err *err);
    pl_status (*end)(void *arg, struct pl_err *err);
    void *arg;
};

struct pl_multipart;

/* content_type: of the request, NULL = none; PL_EINVAL when it is not multipart/form-data with a boundary. */
pl_status pl_multipart_new(struct pl_multipart **out, const char *content_type, const struct pl_multipart_sink *sink, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_multipart_take(struct pl_multipart *m, const char *bytes, size_t n, struct pl_err *err) PL_MUST_CHECK;
/* The body is over: was it whole? */
pl_status pl_multipart_finish(const struct pl_multipart *m, struct pl_err *err) PL_MUST_CHECK;
void pl_multipart_free(struct pl_multipart *m);

#endif
