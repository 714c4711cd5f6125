/* detok: turns tokens into text one at a time, for one sequence.
 * Stop strings are searched with the Knuth-Morris-Pratt automaton, one per string: `at` says how many bytes of it the text
 * so far ends with, and that many bytes must be held back. border[i] is the length of the longest proper prefix of the
 * string that its first i + 1 bytes end with.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/detok.h"

#include <stdlib.h>

#include "core/base/utf8.h"
#include "core/text/tok.h"

/* The automaton's step from `at` (< stop's length) by byte c. */
static uint32_t step(const struct pl_stop *stop, const uint32_t *border, uint32_t at, char c)
{
    while (at > 0 && stop->s[at] != c)
        at = border[at - 1];
    return stop->s[at] == c ? at + 1 : 0;
}

pl_status pl_detok_init(struct pl_detok *d, const struct pl_tok *tok, const struct pl_stop *stops, size_t n_stops)
{
    *d = (struct pl_detok){.tok = tok, .stops = stops, .n_stops = n_stops, .matched = -1};
    pl_buf_init(&d->pending, 0);
    size_t total = n_stops;
    for (size_t k = 0; k < n_stops; k++)
        total += stops[k].n;
    if (n_stops == 0)
        return PL_OK;
    d->at = calloc(total, sizeof *d->at);
    if (d->at == NULL)
        return PL_ENOMEM;
    d->borders = d->at + n_stops;
    uint32_t *border = d->borders;
    for (size_t k = 0; k < n_stops; border += stops[k++].n)
        for (size_t i = 1; i < stops[k].n; i++)
            border[i] = step(&stops[k], border, border[i - 1], stops[k].s[i]);
    return PL_OK;
}

void pl_detok_fini(struct pl_detok *d)
{
    pl_buf_fini(&d->pending);
    free(d->at);
    d->at = d->borders = NULL;
}

/* Moves every automaton by byte c. Returns the longest stop string that is complete with it, -1 = none. */
static int advance(struct pl_detok *d, char c)
{
    int found = -1;
    uint32_t *at = d->at;
    const uint32_t *border = d->borders;
    for (size_t k = 0; k < d->n_stops; border += d->stops[k++].n) {
        at[k] = step(&d->stops[k], border, at[k], c);
        if (at[k] == d->stops[k].n && (found < 0 || d->stops[k].n > d->stops[found].n))
            found = (int)k;
    }
    return found;
}

/* How many bytes at the end of pending may yet become a stop string. */
static size_t held_back(const struct pl_detok *d)
{
    uint32_t most = 0;
    for (size_t k = 0; k < d->n_stops; k++)
        most = d->at[k] > most ? d->at[k] : most;
    return most;
}

/* How many bytes one U+FFFD stands for: a character that breaks off is replaced as a whole, any other bad byte alone. */
static size_t bad_length(const char *s, size_t n)
{
    uint32_t cp;
    for (size_t len = n < 3 ? n : 3; len > 1; len--)
        if (pl_utf8_decode(s, len, &cp) == 0)
            return len;
    return 1;
}

/* Bytes of pending up to n leave as valid UTF-8. An unfinished character at pending's end stays unless `all`; one before
 * held-back bytes is broken for good, as stop strings begin with a character. */
static void release(struct pl_detok *d, size_t n, bool all, struct pl_buf *out)
{
    size_t i = d->gone;
    while (i < n) {
        uint32_t cp;
        const char *s = d->pending.data + i;
        int len = pl_utf8_decode(s, n - i, &cp);
        if (len == 0 && !all && n == d->pending.len)
            break;
        if (len > 0)
            pl_buf_add(out, s, (size_t)len);
        else
            pl_buf_adds(out, "\xef\xbf\xbd");
        i += len > 0 ? (size_t)len : bad_length(s, n - i);
    }
    d->gone = i;
    if (2 * i >= d->pending.len) { /* not each time: moving what is held back must cost no more than what has left */
        pl_buf_drop(&d->pending, i);
        d->gone = 0;
    }
}

bool pl_detok_push(struct pl_detok *d, int32_t id, struct pl_buf *out)
{
    size_t n, before = d->pending.len;
    const char *bytes = pl_tok_bytes(d->tok, id, false, &n);
    pl_buf_add(&d->pending, bytes, n);
    if (d->pending.failed) {
        out->failed = true;
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        int k = advance(d, bytes[i]);
        if (k < 0)
            continue;
        d->matched = k;
        release(d, before + i + 1 - (d->include_stop ? 0 : d->stops[k].n), true, out);
        pl_buf_clear(&d->pending);
        d->gone = 0;
        return true;
    }
    release(d, d->pending.len - held_back(d), false, out);
    return false;
}

void pl_detok_flush(struct pl_detok *d, struct pl_buf *out)
{
    release(d, d->pending.len, true, out);
}
