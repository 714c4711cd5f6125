/* buf: a growing byte string. Length and capacity are kept apart; the bytes are always followed by a NUL.
 * Thread: one at a time.  Owns: its bytes.  Fails: an append that finds no memory or passes `limit` sets `failed`,
 * appends nothing more, and leaves what is there intact; check once at the end.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_BUF_H
#define PL_BASE_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pl_buf {
    char *data; /* NULL while empty; see pl_buf_str */
    size_t len, cap;
    size_t limit; /* 0 = none */
    bool failed;
};

void pl_buf_init(struct pl_buf *b, size_t limit);
void pl_buf_fini(struct pl_buf *b);
void pl_buf_clear(struct pl_buf *b); /* keeps the memory */
void pl_buf_add(struct pl_buf *b, const void *bytes, size_t n);
void pl_buf_adds(struct pl_buf *b, const char *s);
void pl_buf_addc(struct pl_buf *b, char c);
void pl_buf_addu(struct pl_buf *b, uint64_t v); /* decimal */
void pl_buf_addf(struct pl_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Removes the first n bytes. */
void pl_buf_drop(struct pl_buf *b, size_t n);
const char *pl_buf_str(const struct pl_buf *b); /* "" while empty */
/* Moves the bytes to the caller (free()); the buffer is empty afterwards. */
char *pl_buf_take(struct pl_buf *b);
/* Appends s as the inside of a JSON string (no quotes), RFC 8259; s must be valid UTF-8. */
void pl_buf_add_json(struct pl_buf *b, const char *s, size_t n);
/* The same for any bytes: those that are no character become U+FFFD, one each. */
void pl_buf_add_json_lossy(struct pl_buf *b, const char *s, size_t n);

#endif
