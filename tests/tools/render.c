/* render: the template interpreter as a filter, for the template oracle. Each input line is JSON {"template": text, "vars":
 * {...}, "now": seconds}; each output line is {"text": ..., "user": [[from, to], ...]} or {"error": ...}. Strings in vars that begin with
 * "\u0001" lose that mark and count as a user's.
 * SPDX-License-Identifier: Apache-2.0 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/text/jinja.h"

static struct pl_jval *convert(struct pl_arena *a, const json_t *v)
{
    const char *key;
    json_t *item;
    size_t i;
    struct pl_jval *out;
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        out = pl_jval_dict(a);
        json_object_foreach((json_t *)(uintptr_t)v, key, item)
        {
            if (pl_jval_set(a, out, key, convert(a, item)) != PL_OK)
                return NULL;
        }
        return out;
    case JSON_ARRAY:
        out = pl_jval_list(a);
        json_array_foreach(v, i, item)
        {
            if (pl_jval_append(a, out, convert(a, item)) != PL_OK)
                return NULL;
        }
        return out;
    case JSON_STRING: {
        bool user = json_string_length(v) > 0 && json_string_value(v)[0] == 1;
        return pl_jval_str(a, json_string_value(v) + user, json_string_length(v) - user, user);
    }
    case JSON_INTEGER: return pl_jval_int(a, json_integer_value(v));
    case JSON_REAL: return pl_jval_real(a, json_real_value(v));
    case JSON_TRUE:
    case JSON_FALSE: return pl_jval_bool(a, json_is_true(v));
    case JSON_NULL: return pl_jval_none(a);
    }
    return NULL;
}

static json_t *render(const json_t *in)
{
    struct pl_err err = {0};
    struct pl_jinja *t = NULL;
    struct pl_jinja_out out;
    const json_t *source = json_object_get(in, "template");
    time_t now = (time_t)json_integer_value(json_object_get(in, "now"));
    struct pl_jinja_limits limits = {.now = now != 0 ? &now : NULL};
    struct pl_arena *a = pl_arena_new((size_t)256 << 20);
    json_t *result = NULL;
    pl_status st = pl_jinja_compile(&t, json_string_value(source), json_string_length(source), &err);
    if (st == PL_OK)
        st = pl_jinja_render(t, convert(a, json_object_get(in, "vars")), &limits, a, &out, &err);
    if (st == PL_OK) {
        json_t *user = json_array();
        for (size_t i = 0; i < out.n_pieces; i++)
            if (!out.trusted[i])
                json_array_append_new(user, json_pack("[I,I]", (json_int_t)(i > 0 ? out.ends[i - 1] : 0), (json_int_t)out.ends[i]));
        result = json_pack("{s:o,s:o}", "text", json_stringn_nocheck(out.text, out.n), "user", user);
    }
    if (result == NULL)
        result = json_pack("{s:s}", "error", st != PL_OK ? err.msg : "not JSON");
    pl_jinja_free(t);
    pl_arena_free(a);
    return result;
}

int main(void)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, stdin)) > 0) {
        json_t *in = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, NULL);
        json_t *out = in != NULL ? render(in) : json_pack("{s:s}", "error", "the line is not JSON");
        json_dumpf(out, stdout, JSON_COMPACT);
        putchar('\n');
        json_decref(in);
        json_decref(out);
    }
    free(line);
    return 0;
}
