/* json: the door for every JSON body.
 *
 * A parsed value takes up to eighty times its bytes (an empty object most of all), so a limit on the body is no limit on memory: brackets and commas are
 * counted, and the depth measured, before the parser sees the text.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "server/schema.h"

enum { MAX_DEPTH = 64, MAX_NESTED = 1 << 16, MAX_VALUES = 1 << 20 };

const char *pl_json_kind(const json_t *v)
{
    if (v == NULL)
        return "nothing";
    switch (json_typeof(v)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a number with a fraction";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    case JSON_NULL: return "null";
    }
    return "something else";
}

static pl_status measure(const char *s, size_t n, struct pl_err *err)
{
    size_t depth = 0, nested = 0, values = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        if (in_string) {
            if (s[i] == '\\')
                i++;
            else if (s[i] == '"')
                in_string = false;
            continue;
        }
        switch (s[i]) {
        case '"': in_string = true; break;
        case '{':
        case '[': depth++, nested++; break;
        case '}':
        case ']': depth -= depth > 0; break;
        case ',': values++; break;
        }
        if (depth > MAX_DEPTH)
            return pl_fail(err, PL_EINVAL, "the body is nested more than %d levels deep", MAX_DEPTH);
        if (nested > MAX_NESTED)
            return pl_fail(err, PL_EINVAL, "the body has more than %d objects and arrays", MAX_NESTED);
        if (values > MAX_VALUES)
            return pl_fail(err, PL_EINVAL, "the body has more than %d values", MAX_VALUES);
    }
    return PL_OK;
}

pl_status pl_json_read(json_t **out, const char *body, size_t n, struct pl_err *err)
{
    json_error_t why;
    if (n == 0)
        return pl_fail(err, PL_EINVAL, "the body is empty; a JSON object is expected");
    pl_status st = measure(body, n, err);
    if (st != PL_OK)
        return st;
    json_t *v = json_loadb(body, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
    if (v == NULL)
        return pl_fail(err, PL_EINVAL, "the body is not valid JSON: line %d, column %d: %s", why.line, why.column, why.text);
    if (!json_is_object(v)) {
        st = pl_fail(err, PL_EINVAL, "the body must be a JSON object, not %s", pl_json_kind(v));
        json_decref(v);
        return st;
    }
    *out = v;
    return PL_OK;
}
