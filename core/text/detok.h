/* detok: turns tokens into text one at a time, for one sequence. Never lets out half a UTF-8 character (bytes that can
 * never become one leave as U+FFFD), finds stop strings across token borders and never lets out any part of one. The
 * stop string that is complete first ends the text, wherever the borders of tokens lie; of several that end at the same
 * byte the longest counts. Time is linear in the text.
 * Thread: the one that owns it.  Owns: its pending bytes and search tables; borrows tokenizer and stop strings.
 * Fails: init PL_ENOMEM; when memory for pending bytes is out, *out is marked as failed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_DETOK_H
#define PL_TEXT_DETOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/buf.h"
#include "core/base/status.h"

struct pl_tok;

struct pl_stop {
    const char *s; /* valid UTF-8, not empty */
    size_t n;
};

struct pl_detok {
    const struct pl_tok *tok;
    const struct pl_stop *stops;
    size_t n_stops; /* the owner may hold this at 0 until stop strings count (min_tokens) */
    bool include_stop;     /* let the matched stop string out too */
    struct pl_buf pending; /* bytes not yet let out: an unfinished character or a possible stop string */
    size_t gone;           /* bytes at pending's front that have left already */
    int matched;           /* index of the stop string that was found, -1 = none */
    uint32_t *at;          /* per stop string: how many bytes of it the text ends with */
    uint32_t *borders;     /* in the same allocation: the search tables, see detok.c */
};

/* On failure there is nothing for fini to free. */
pl_status pl_detok_init(struct pl_detok *d, const struct pl_tok *tok, const struct pl_stop *stops, size_t n_stops) PL_MUST_CHECK;
void pl_detok_fini(struct pl_detok *d);
/* Feeds one token; appends what may leave now to *out. Returns true when a stop string is complete (nothing more
 * is to be fed then). */
bool pl_detok_push(struct pl_detok *d, int32_t id, struct pl_buf *out);
/* The end of the sequence: lets out everything that is pending (unfinished bytes as U+FFFD). */
void pl_detok_flush(struct pl_detok *d, struct pl_buf *out);

#endif
