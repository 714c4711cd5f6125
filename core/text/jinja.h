/* jinja: a sandboxed interpreter for the Jinja2 subset that chat templates are written in. There are no host objects,
 * no imports and no files; steps, nesting depth and output are bounded.
 * Thread: a compiled template is read-only and may be rendered by many threads; a value tree belongs to one.
 * Owns: the compiled program.  Fails: compile PL_ENOTSUP/PL_EFORMAT naming construct, line and column; render
 * PL_EINVAL with the template's own raise_exception message, PL_ERANGE when a bound is hit, PL_EFORMAT otherwise.
 * Source: the Jinja template designer documentation (Jinja 3.1), with trim_blocks and lstrip_blocks on, as
 * transformers' apply_chat_template renders.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_JINJA_H
#define PL_TEXT_JINJA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "core/base/status.h"

struct pl_arena;
struct pl_jinja;
struct pl_jval; /* a value: none, bool, int, float, string, list, dict; lives in an arena */

pl_status pl_jinja_compile(struct pl_jinja **out, const char *source, size_t n, struct pl_err *err) PL_MUST_CHECK;
void pl_jinja_free(struct pl_jinja *t);

struct pl_jval *pl_jval_none(struct pl_arena *a);
struct pl_jval *pl_jval_bool(struct pl_arena *a, bool v);
struct pl_jval *pl_jval_int(struct pl_arena *a, int64_t v);
struct pl_jval *pl_jval_real(struct pl_arena *a, double v);
/* Copies. user: the string came from a request, not from the template or the model; the mark survives concatenation,
 * slicing and filters, byte range by byte range, so that the output can be split into trusted and user pieces. */
struct pl_jval *pl_jval_str(struct pl_arena *a, const char *s, size_t n, bool user);
struct pl_jval *pl_jval_list(struct pl_arena *a);
struct pl_jval *pl_jval_dict(struct pl_arena *a); /* keeps insertion order */
/* NULL values or keys (memory out) make these fail with PL_ENOMEM. */
pl_status pl_jval_append(struct pl_arena *a, struct pl_jval *list, struct pl_jval *v) PL_MUST_CHECK;
pl_status pl_jval_set(struct pl_arena *a, struct pl_jval *dict, const char *key, struct pl_jval *v) PL_MUST_CHECK;

struct pl_jinja_limits {
    uint64_t steps;   /* evaluated nodes and loop turns; 0 = 1,000,000 */
    size_t out_bytes; /* 0 = 4 × bytes of all strings in vars + 1 MiB */
    time_t *now;      /* for strftime_now; NULL = the clock */
};

/* The output as alternating pieces; text is contiguous, piece i ends at ends[i]. */
struct pl_jinja_out {
    const char *text; /* in the arena, NUL-terminated */
    size_t n;
    const size_t *ends;
    const bool *trusted;
    size_t n_pieces;
};

/* vars: a dict. Everything made while rendering lives in a (give it a limit). */
pl_status pl_jinja_render(const struct pl_jinja *t, struct pl_jval *vars, const struct pl_jinja_limits *limits,
                          struct pl_arena *a, struct pl_jinja_out *out, struct pl_err *err) PL_MUST_CHECK;

#endif
