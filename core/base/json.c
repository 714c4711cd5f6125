/* json: the door for every JSON text from outside.
 *
 * A parsed value takes up to eighty times its bytes (an empty object most of all), so a limit on the text is no limit on memory:
 * brackets, colons and commas are counted, and the depth measured, before the parser sees the text.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/json.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { MAX_DEPTH = 64, MAX_NESTED = 1 << 16, MAX_KEYS = 1 << 18, MAX_VALUES = 1 << 20 };

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

static pl_status measure(const char *what, const char *s, size_t n, struct pl_err *err)
{
    size_t depth = 0, nested = 0, keys = 0, values = 0;
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
        case ':': keys++; break;
        case ',': values++; break;
        case '\0': return pl_fail(err, PL_EINVAL, "%s is not valid JSON: it has a NUL byte", what); /* which the parser passes over after a number */
        }
        if (depth > MAX_DEPTH)
            return pl_fail(err, PL_EINVAL, "%s is nested more than %d levels deep", what, MAX_DEPTH);
        if (nested > MAX_NESTED)
            return pl_fail(err, PL_EINVAL, "%s has more than %d objects and arrays", what, MAX_NESTED);
        if (keys > MAX_KEYS)
            return pl_fail(err, PL_EINVAL, "%s has more than %d keys", what, MAX_KEYS);
        if (values > MAX_VALUES)
            return pl_fail(err, PL_EINVAL, "%s has more than %d values", what, MAX_VALUES);
    }
    return PL_OK;
}

pl_status pl_json_read(json_t **out, const char *what, const char *text, size_t n, struct pl_err *err)
{
    json_error_t why;
    if (n == 0)
        return pl_fail(err, PL_EINVAL, "%s is empty; a JSON object is expected", what);
    pl_status st = measure(what, text, n, err);
    if (st != PL_OK)
        return st;
    json_t *v = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
    if (v == NULL && why.text[0] == '\0') /* nothing is wrong with it */
        return pl_fail(err, PL_ENOMEM, "out of memory");
    if (v == NULL && strstr(why.text, "JSON_ALLOW_NUL") != NULL) /* the parser's flag means nothing to a client */
        return pl_fail(err, PL_EINVAL, "%s has the character \\u0000 in a string (line %d, column %d): leave it out", what, why.line, why.column);
    if (v == NULL)
        return pl_fail(err, PL_EINVAL, "%s is not valid JSON: line %d, column %d: %s", what, why.line, why.column, why.text);
    if (!json_is_object(v)) {
        st = pl_fail(err, PL_EINVAL, "%s must be a JSON object, not %s", what, pl_json_kind(v));
        json_decref(v);
        return st;
    }
    *out = v;
    return PL_OK;
}

pl_status pl_json_known(const json_t *object, const char *const *names, struct pl_err *err)
{
    const char *key;
    json_t *ignored;
    json_object_foreach((json_t *)(uintptr_t)object, key, ignored)
    {
        const char *const *name = names;
        while (*name != NULL && strcmp(*name, key) != 0)
            name++;
        if (*name == NULL)
            return pl_fail_param(err, PL_EINVAL, key, "Unrecognized request argument supplied: %.60s", key);
    }
    return PL_OK;
}
