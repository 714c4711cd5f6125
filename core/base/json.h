/* json: the door for every JSON text from outside: bounded before it is parsed.
 * Thread: any.  Owns: nothing; the caller owns the value.
 * Fails: PL_ENOMEM; PL_EINVAL saying where the text is wrong, or that it is nested or split up more than it may be.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_JSON_H
#define PL_BASE_JSON_H

#include <jansson.h>

#include "core/base/status.h"

/* An object. what: how messages call the text, "the body". Duplicate names and NUL are refused. */
pl_status pl_json_read(json_t **out, const char *what, const char *text, size_t n, struct pl_err *err) PL_MUST_CHECK;
/* An object of which these members are known (NULL-terminated). PL_EINVAL, with param, for another one. */
pl_status pl_json_known(const json_t *object, const char *const *names, struct pl_err *err) PL_MUST_CHECK;
/* What a value is, for messages: "a string", "null", … */
const char *pl_json_kind(const json_t *v);

#endif
