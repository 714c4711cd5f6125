/* jinja_value: the values of a template, Python's way of printing them, and JSON.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/text/jinja_int.h"

struct pl_jval *jv_new(struct pl_arena *a, pl_jkind kind)
{
    struct pl_jval *v = pl_arena_zalloc(a, sizeof *v);
    if (v != NULL)
        v->kind = kind;
    return v;
}

struct pl_jval *jv_undef(struct pl_arena *a, const char *name)
{
    struct pl_jval *v = jv_new(a, JV_UNDEF);
    if (v != NULL)
        v->func = name;
    return v;
}

struct pl_jval *pl_jval_none(struct pl_arena *a)
{
    return jv_new(a, JV_NONE);
}

struct pl_jval *pl_jval_bool(struct pl_arena *a, bool b)
{
    struct pl_jval *v = jv_new(a, JV_BOOL);
    if (v != NULL)
        v->b = b;
    return v;
}

struct pl_jval *pl_jval_int(struct pl_arena *a, int64_t i)
{
    struct pl_jval *v = jv_new(a, JV_INT);
    if (v != NULL)
        v->i = i;
    return v;
}

struct pl_jval *pl_jval_real(struct pl_arena *a, double r)
{
    struct pl_jval *v = jv_new(a, JV_REAL);
    if (v != NULL)
        v->r = r;
    return v;
}

struct pl_jval *pl_jval_str(struct pl_arena *a, const char *s, size_t n, bool user)
{
    struct pl_jval *v = jv_new(a, JV_STR);
    char *copy = pl_arena_strndup(a, s, n);
    unsigned char *mark = user && n > 0 ? pl_arena_alloc(a, n) : NULL;
    if (v == NULL || copy == NULL || (user && n > 0 && mark == NULL))
        return NULL;
    if (mark != NULL)
        memset(mark, 1, n);
    v->str.s = copy;
    v->str.n = n;
    v->str.user = mark;
    return v;
}

struct pl_jval *jv_lit(struct pl_arena *a, const char *s)
{
    struct pl_jval *v = jv_new(a, JV_STR);
    if (v != NULL) {
        v->str.s = s;
        v->str.n = strlen(s);
    }
    return v;
}

struct pl_jval *jv_sub(struct pl_arena *a, const struct pl_jval *s, size_t from, size_t n)
{
    struct pl_jval *v = jv_new(a, JV_STR);
    if (v != NULL) {
        v->str.s = s->str.s + from;
        v->str.n = n;
        v->str.user = s->str.user != NULL ? s->str.user + from : NULL;
    }
    return v;
}

struct pl_jval *pl_jval_list(struct pl_arena *a)
{
    return jv_new(a, JV_LIST);
}

struct pl_jval *pl_jval_dict(struct pl_arena *a)
{
    return jv_new(a, JV_DICT);
}

/* Arrays grow by copying inside the arena; the old ones stay until it is freed. */
static bool grow(struct pl_arena *a, struct pl_jval ***v, size_t n, size_t cap)
{
    struct pl_jval **more = pl_arena_alloc(a, cap * sizeof *more);
    if (more != NULL && n > 0)
        memcpy(more, *v, n * sizeof *more);
    *v = more != NULL ? more : *v;
    return more != NULL;
}

bool jv_push(struct pl_arena *a, struct pl_jval *list, struct pl_jval *v)
{
    if (v == NULL || list == NULL)
        return false;
    if (list->list.n == list->list.cap) {
        size_t cap = list->list.cap ? 2 * list->list.cap : 8;
        if (!grow(a, &list->list.v, list->list.n, cap))
            return false;
        list->list.cap = cap;
    }
    list->list.v[list->list.n++] = v;
    return true;
}

bool jv_equal(const struct pl_jval *a, const struct pl_jval *b, int depth)
{
    if (depth > PL_JINJA_MAX_DEPTH)
        return false;
    if (jv_is_num(a) && jv_is_num(b))
        return a->kind == JV_REAL || b->kind == JV_REAL ? jv_real(a) == jv_real(b) : jv_int(a) == jv_int(b);
    if (a->kind != b->kind)
        return false;
    switch (a->kind) {
    case JV_UNDEF:
    case JV_NONE: return true;
    case JV_STR: return a->str.n == b->str.n && memcmp(a->str.s, b->str.s, a->str.n) == 0;
    case JV_LIST:
    case JV_TUPLE:
        if (a->list.n != b->list.n)
            return false;
        for (size_t i = 0; i < a->list.n; i++)
            if (!jv_equal(a->list.v[i], b->list.v[i], depth + 1))
                return false;
        return true;
    case JV_DICT:
        if (a->dict.n != b->dict.n)
            return false;
        for (size_t i = 0; i < a->dict.n; i++) {
            const struct pl_jval *other = jv_get(b, a->dict.keys[i]);
            if (other == NULL || !jv_equal(a->dict.values[i], other, depth + 1))
                return false;
        }
        return true;
    default: return a == b;
    }
}

static size_t find_key(const struct pl_jval *dict, const struct pl_jval *key)
{
    size_t i = 0;
    while (i < dict->dict.n && !jv_equal(dict->dict.keys[i], key, 0))
        i++;
    return i;
}

struct pl_jval *jv_get(const struct pl_jval *dict, const struct pl_jval *key)
{
    size_t i = find_key(dict, key);
    return i < dict->dict.n ? dict->dict.values[i] : NULL;
}

struct pl_jval *jv_gets(const struct pl_jval *dict, const char *key)
{
    for (size_t i = 0; i < dict->dict.n; i++)
        if (jv_is(dict->dict.keys[i], key))
            return dict->dict.values[i];
    return NULL;
}

bool jv_set(struct pl_arena *a, struct pl_jval *dict, struct pl_jval *key, struct pl_jval *v)
{
    if (key == NULL || v == NULL || dict == NULL)
        return false;
    size_t i = find_key(dict, key);
    if (i < dict->dict.n) {
        dict->dict.values[i] = v;
        return true;
    }
    if (dict->dict.n == dict->dict.cap) {
        size_t cap = dict->dict.cap ? 2 * dict->dict.cap : 8;
        if (!grow(a, &dict->dict.keys, dict->dict.n, cap) || !grow(a, &dict->dict.values, dict->dict.n, cap))
            return false;
        dict->dict.cap = cap;
    }
    dict->dict.keys[dict->dict.n] = key;
    dict->dict.values[dict->dict.n++] = v;
    return true;
}

pl_status pl_jval_append(struct pl_arena *a, struct pl_jval *list, struct pl_jval *v)
{
    return jv_push(a, list, v) ? PL_OK : PL_ENOMEM;
}

pl_status pl_jval_set(struct pl_arena *a, struct pl_jval *dict, const char *key, struct pl_jval *v)
{
    return jv_set(a, dict, pl_jval_str(a, key, strlen(key), false), v) ? PL_OK : PL_ENOMEM;
}

bool jv_is(const struct pl_jval *v, const char *s)
{
    return v->kind == JV_STR && v->str.n == strlen(s) && memcmp(v->str.s, s, v->str.n) == 0;
}

bool jv_is_seq(const struct pl_jval *v)
{
    return v->kind == JV_LIST || v->kind == JV_TUPLE;
}

bool jv_truth(const struct pl_jval *v)
{
    switch (v->kind) {
    case JV_UNDEF:
    case JV_NONE: return false;
    case JV_BOOL: return v->b;
    case JV_INT: return v->i != 0;
    case JV_REAL: return v->r != 0;
    case JV_STR: return v->str.n > 0;
    case JV_LIST:
    case JV_TUPLE: return v->list.n > 0;
    case JV_DICT: return v->dict.n > 0;
    default: return true;
    }
}

const char *jv_type_name(const struct pl_jval *v)
{
    static const char *const names[] = {"Undefined", "NoneType", "bool", "int",       "float",       "str",   "list",
                                        "tuple",     "dict",     "Namespace", "LoopContext", "Macro", "builtin_function_or_method", "function"};
    return names[v->kind];
}

/* ---- text ---------------------------------------------------------------------------------------------------------- */

void jt_add(struct jinja_text *t, const char *s, size_t n, bool user)
{
    if (user && !t->any_user) { /* marks are kept from the first user byte on */
        while (t->user.len < t->bytes.len && !t->user.failed)
            pl_buf_addc(&t->user, 0);
        t->any_user = true;
    }
    pl_buf_add(&t->bytes, s, n);
    for (size_t i = 0; t->any_user && i < n; i++)
        pl_buf_addc(&t->user, (char)user);
}

void jt_add_str(struct jinja_text *t, const struct pl_jval *v)
{
    for (size_t i = 0; i < v->str.n;) {
        bool user = v->str.user != NULL && v->str.user[i];
        size_t end = i + 1;
        while (end < v->str.n && (v->str.user != NULL && v->str.user[end]) == user)
            end++;
        jt_add(t, v->str.s + i, end - i, user);
        i = end;
    }
}

struct pl_jval *jt_take(struct jinja_text *t, struct pl_arena *a)
{
    struct pl_jval *v = NULL;
    if (!t->bytes.failed && !t->user.failed)
        v = pl_jval_str(a, pl_buf_str(&t->bytes), t->bytes.len, false);
    if (v != NULL && t->any_user) {
        unsigned char *marks = pl_arena_alloc(a, t->bytes.len + 1);
        if (marks != NULL)
            memcpy(marks, t->user.data, t->user.len);
        v->str.user = marks;
        if (marks == NULL)
            v = NULL;
    }
    jt_fini(t);
    return v;
}

void jt_fini(struct jinja_text *t)
{
    pl_buf_fini(&t->bytes);
    pl_buf_fini(&t->user);
    t->any_user = false;
}

void jv_add_real(struct pl_buf *b, double v)
{
    char text[40];
    if (!isfinite(v)) {
        pl_buf_adds(b, isnan(v) ? "nan" : v < 0 ? "-inf" : "inf");
        return;
    }
    int digits = 1;
    do
        snprintf(text, sizeof text, "%.*e", digits - 1, v);
    while (strtod(text, NULL) != v && digits++ < 17);
    int exponent = atoi(strchr(text, 'e') + 1);
    if (exponent >= -4 && exponent < 16) {
        snprintf(text, sizeof text, "%.*f", digits - 1 > exponent ? digits - 1 - exponent : 0, v);
        pl_buf_adds(b, text);
        if (strchr(text, '.') == NULL)
            pl_buf_adds(b, ".0");
        return;
    }
    *strchr(text, 'e') = '\0';
    pl_buf_addf(b, "%se%c%02d", text, exponent < 0 ? '-' : '+', abs(exponent));
}

/* A string's repr: single quotes unless it has those and no double ones. */
static void add_repr(struct jinja_text *t, const struct pl_jval *v)
{
    bool single = memchr(v->str.s, '\'', v->str.n) != NULL, twice = memchr(v->str.s, '"', v->str.n) != NULL;
    char quote = single && !twice ? '"' : '\'';
    jt_add(t, &quote, 1, false);
    for (size_t i = 0; i < v->str.n; i++) {
        unsigned char c = (unsigned char)v->str.s[i];
        bool user = v->str.user != NULL && v->str.user[i];
        char text[8];
        const char *s = text;
        if (c == '\n' || c == '\r' || c == '\t')
            s = c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
        else if (c == '\\' || c == (unsigned char)quote)
            snprintf(text, sizeof text, "\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            snprintf(text, sizeof text, "\\x%02x", c);
        else
            snprintf(text, sizeof text, "%c", c);
        jt_add(t, s, strlen(s), user);
    }
    jt_add(t, &quote, 1, false);
}

static void add_items(struct jinja_text *t, const struct pl_jval *v, int depth)
{
    bool tuple = v->kind == JV_TUPLE;
    jt_add(t, tuple ? "(" : "[", 1, false);
    for (size_t i = 0; i < v->list.n; i++) {
        if (i > 0)
            jt_add(t, ", ", 2, false);
        jt_add_value(t, v->list.v[i], true, depth + 1);
    }
    jt_add(t, tuple ? (v->list.n == 1 ? ",)" : ")") : "]", tuple && v->list.n == 1 ? 2 : 1, false);
}

void jt_add_value(struct jinja_text *t, const struct pl_jval *v, bool repr, int depth)
{
    char text[64];
    if (depth > PL_JINJA_MAX_DEPTH) {
        t->bytes.failed = true;
        return;
    }
    switch (v->kind) {
    case JV_UNDEF: snprintf(text, sizeof text, "%s", repr ? "Undefined" : ""); break;
    case JV_NONE: snprintf(text, sizeof text, "None"); break;
    case JV_BOOL: snprintf(text, sizeof text, "%s", v->b ? "True" : "False"); break;
    case JV_INT: snprintf(text, sizeof text, "%lld", (long long)v->i); break;
    case JV_REAL: {
        struct pl_buf b;
        pl_buf_init(&b, 0);
        jv_add_real(&b, v->r);
        jt_add(t, pl_buf_str(&b), b.len, false);
        pl_buf_fini(&b);
        return;
    }
    case JV_STR:
        if (repr)
            add_repr(t, v);
        else
            jt_add_str(t, v);
        return;
    case JV_LIST:
    case JV_TUPLE: add_items(t, v, depth); return;
    case JV_DICT:
        jt_add(t, "{", 1, false);
        for (size_t i = 0; i < v->dict.n; i++) {
            if (i > 0)
                jt_add(t, ", ", 2, false);
            jt_add_value(t, v->dict.keys[i], true, depth + 1);
            jt_add(t, ": ", 2, false);
            jt_add_value(t, v->dict.values[i], true, depth + 1);
        }
        jt_add(t, "}", 1, false);
        return;
    default: snprintf(text, sizeof text, "<%s>", jv_type_name(v)); break;
    }
    jt_add(t, text, strlen(text), false);
}

/* ---- JSON ---------------------------------------------------------------------------------------------------------- */

static void json_string(struct jinja_text *t, const struct pl_jval *v)
{
    jt_add(t, "\"", 1, false);
    for (size_t i = 0; i < v->str.n; i++) {
        unsigned char c = (unsigned char)v->str.s[i];
        bool user = v->str.user != NULL && v->str.user[i];
        char text[8];
        const char *at = c < 0x20 || c == '"' || c == '\\' ? strchr("\"\"\\\\\bb\ff\nn\rr\tt", c) : NULL;
        if (c == '\0')
            at = NULL;
        if (at != NULL)
            snprintf(text, sizeof text, "\\%c", c == '"' || c == '\\' ? c : at[1]);
        else if (c < 0x20)
            snprintf(text, sizeof text, "\\u%04x", c);
        else
            snprintf(text, sizeof text, "%c", c);
        jt_add(t, text, strlen(text), user);
    }
    jt_add(t, "\"", 1, false);
}

static void json_break(struct jinja_text *t, int indent, int depth)
{
    if (indent < 0)
        return;
    jt_add(t, "\n", 1, false);
    for (int i = 0; i < indent * depth; i++)
        jt_add(t, " ", 1, false);
}

static int by_key(const void *a, const void *b, void *dict)
{
    const struct pl_jval *d = dict, *x = d->dict.keys[*(const size_t *)a], *y = d->dict.keys[*(const size_t *)b];
    size_t n = x->str.n < y->str.n ? x->str.n : y->str.n;
    int c = memcmp(x->str.s, y->str.s, n);
    return c != 0 ? c : (x->str.n > y->str.n) - (x->str.n < y->str.n);
}

static bool json_dict(struct jinja_text *t, const struct pl_jval *v, int indent, bool sort, const char *item_sep, const char *key_sep, int depth)
{
    size_t *order = malloc((v->dict.n + 1) * sizeof *order);
    bool ok = order != NULL;
    for (size_t i = 0; ok && i < v->dict.n; i++) {
        order[i] = i;
        ok = v->dict.keys[i]->kind == JV_STR;
    }
    if (ok && sort)
        qsort_r(order, v->dict.n, sizeof *order, by_key, (void *)(uintptr_t)v);
    jt_add(t, "{", 1, false);
    for (size_t i = 0; ok && i < v->dict.n; i++) {
        if (i > 0)
            jt_add(t, item_sep, strlen(item_sep), false);
        json_break(t, indent, depth + 1);
        json_string(t, v->dict.keys[order[i]]);
        jt_add(t, key_sep, strlen(key_sep), false);
        ok = jv_to_json(t, v->dict.values[order[i]], indent, sort, item_sep, key_sep, depth + 1);
    }
    if (v->dict.n > 0)
        json_break(t, indent, depth);
    jt_add(t, "}", 1, false);
    free(order);
    return ok;
}

bool jv_to_json(struct jinja_text *t, const struct pl_jval *v, int indent, bool sort, const char *item_sep, const char *key_sep, int depth)
{
    if (depth > PL_JINJA_MAX_DEPTH)
        return false;
    switch (v->kind) {
    case JV_NONE: jt_add(t, "null", 4, false); return true;
    case JV_BOOL: jt_add(t, v->b ? "true" : "false", v->b ? 4 : 5, false); return true;
    case JV_INT:
    case JV_REAL: jt_add_value(t, v, false, 0); return true;
    case JV_STR: json_string(t, v); return true;
    case JV_DICT: return json_dict(t, v, indent, sort, item_sep, key_sep, depth);
    case JV_LIST:
    case JV_TUPLE:
        jt_add(t, "[", 1, false);
        for (size_t i = 0; i < v->list.n; i++) {
            if (i > 0)
                jt_add(t, item_sep, strlen(item_sep), false);
            json_break(t, indent, depth + 1);
            if (!jv_to_json(t, v->list.v[i], indent, sort, item_sep, key_sep, depth + 1))
                return false;
        }
        if (v->list.n > 0)
            json_break(t, indent, depth);
        jt_add(t, "]", 1, false);
        return true;
    default: return false;
    }
}
