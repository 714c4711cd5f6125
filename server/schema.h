/* schema: reads a request's JSON body into plain values, by the table in fields.def. Every field has its effect or is
 * refused by name; unknown fields are passed over with one log line; null means absent.
 * Thread: any.  Owns: the parsed JSON until pl_params_fini; strings in pl_params borrow it.
 * Fails: PL_EINVAL (malformed JSON, wrong type, out of range, missing), PL_ENOTSUP (a feature this server lacks), both with
 * err->param; PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_SCHEMA_H
#define PL_SERVER_SCHEMA_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/json.h"
#include "core/base/status.h"

#define PL_PARAM_UNSET INT64_MIN

enum { PL_EP_CHAT = 1, PL_EP_COMPLETIONS = 2 };
enum { PL_MAX_STOPS = 4, PL_MAX_STOP_BYTES = 256, PL_MAX_MESSAGES = 4096, PL_MAX_CHOICES = 128, PL_MAX_BIAS = 1024 };
enum { PL_COMPLETIONS_MAX_TOKENS = 16 }; /* without max_tokens; a chat may go on to the end of the context */

struct pl_params {
    json_t *root;
    unsigned endpoint;
#define C
#define T
#define REAL(ep, name, def, min, max) double name;
#define INT(ep, name, def, min, max) int64_t name;
#define BOOL(ep, name, def) bool name;
#define OWN(ep, name)
#define TEXT(ep, name)
#define ONLY(ep, name, value)
#include "server/fields.def"
#undef C
#undef T
#undef REAL
#undef INT
#undef BOOL
#undef OWN
#undef TEXT
#undef ONLY
    /* fields with a shape of their own */
    const char *model;
    const json_t *messages; /* checked: see prompt.h */
    const json_t *prompt;
    bool include_usage;
    const char *stops[PL_MAX_STOPS];
    size_t stop_bytes[PL_MAX_STOPS], n_stops;
    const json_t *logit_bias; /* an object, or NULL */
    int top_logprobs_n;       /* -1 = no log-probabilities, else how many alternatives */
    bool has_tier;
};

pl_status pl_params_read(struct pl_params *p, unsigned endpoint, const char *body, size_t n, struct pl_err *err) PL_MUST_CHECK;
void pl_params_fini(struct pl_params *p);

/* The table's rows, for tests. kind: one of R I B O T N. */
struct pl_field_row {
    const char *name;
    char kind;
    unsigned endpoints;
    double min, max;
    const char *only; /* N: the one value, as JSON */
};
const struct pl_field_row *pl_fields(size_t *n);

#endif
