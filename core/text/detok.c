/* detok: turns tokens into text one at a time, for one sequence.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/detok.h"

#include <string.h>

#include "core/base/utf8.h"
#include "core/text/tok.h"

void pl_detok_init(struct pl_detok *d, const struct pl_tok *tok, const struct pl_stop *stops, size_t n_stops)
{
    *d = (struct pl_detok){.tok = tok, .stops = stops, .n_stops = n_stops, .matched = -1};
    pl_buf_init(&d->pending, 0);
}

void pl_detok_fini(struct pl_detok *d)
{
    pl_buf_fini(&d->pending);
}

/* The earliest stop string in pending; the first in the list where several begin there. */
static bool find_stop(struct pl_detok *d, size_t *at)
{
    for (size_t i = 0; i < d->pending.len; i++)
        for (size_t k = 0; k < d->n_stops; k++)
            if (d->stops[k].n <= d->pending.len - i && memcmp(d->pending.data + i, d->stops[k].s, d->stops[k].n) == 0) {
                d->matched = (int)k;
                *at = i;
                return true;
            }
    return false;
}

/* How many bytes at the front of pending can be no part of a stop string. */
static size_t safe_length(const struct pl_detok *d)
{
    for (size_t i = 0; i < d->pending.len; i++)
        for (size_t k = 0; k < d->n_stops; k++) {
            size_t left = d->pending.len - i;
            if (left < d->stops[k].n && memcmp(d->pending.data + i, d->stops[k].s, left) == 0)
                return i;
        }
    return d->pending.len;
}

/* Bytes [0, n) of pending leave as valid UTF-8. Keeps an unfinished character at the end unless `all`. */
static void release(struct pl_detok *d, size_t n, bool all, struct pl_buf *out)
{
    size_t i = 0;
    while (i < n) {
        uint32_t cp;
        int len = pl_utf8_decode(d->pending.data + i, n - i, &cp);
        if (len == 0 && !all && n == d->pending.len)
            break; /* the rest of it may still come */
        if (len > 0) {
            pl_buf_add(out, d->pending.data + i, (size_t)len);
            i += (size_t)len;
            continue;
        }
        pl_buf_adds(out, "\xef\xbf\xbd");
        /* an unfinished character is replaced as a whole, any other bad byte alone */
        i += len == 0 ? n - i : 1;
    }
    pl_buf_drop(&d->pending, i);
}

bool pl_detok_push(struct pl_detok *d, int32_t id, struct pl_buf *out)
{
    size_t n, at;
    const char *bytes = pl_tok_bytes(d->tok, id, false, &n);
    pl_buf_add(&d->pending, bytes, n);
    if (find_stop(d, &at)) {
        release(d, at + (d->include_stop ? d->stops[d->matched].n : 0), true, out);
        pl_buf_clear(&d->pending);
        return true;
    }
    size_t safe = safe_length(d);
    /* a character that a possible stop string begins inside of cannot be cut: stop strings are valid UTF-8 */
    release(d, safe, false, out);
    return false;
}

void pl_detok_flush(struct pl_detok *d, struct pl_buf *out)
{
    release(d, d->pending.len, true, out);
}
