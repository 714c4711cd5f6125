/* jinja_lib: the filters and tests of templates. Each is one row of a table and one function.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/text/jinja_int.h"

typedef struct pl_jval val;
typedef struct jinja_ev ev;
typedef const struct jinja_args args;

static val *boolean(ev *e, bool b)
{
    return ev_made(e, pl_jval_bool(e->a, b));
}

static val *integer(ev *e, int64_t i)
{
    return ev_made(e, pl_jval_int(e->a, i));
}

static val *as_list(ev *e, val *v)
{
    val *items = ev_iter(e, v), *out = items != NULL ? ev_made(e, pl_jval_list(e->a)) : NULL;
    for (size_t i = 0; out != NULL && i < items->list.n; i++)
        if (!ev_step(e, 1) || !jv_push(e->a, out, items->list.v[i]))
            return ev_made(e, NULL);
    return out;
}

static bool flag(args *a, size_t i, const char *name, bool def)
{
    val *v = arg_get(a, i, name);
    return v != NULL ? jv_truth(v) : def;
}

static int64_t number(args *a, size_t i, const char *name, int64_t def)
{
    val *v = arg_get(a, i, name);
    return v != NULL && jv_is_num(v) ? (v->kind == JV_REAL ? (int64_t)v->r : jv_int(v)) : def;
}

/* "a.b.0" of v */
static val *attribute(ev *e, val *v, const val *path)
{
    if (path->kind == JV_INT)
        return ev_item(e, v, (val *)(uintptr_t)path);
    for (size_t i = 0; v != NULL && i <= path->str.n;) {
        const char *dot = memchr(path->str.s + i, '.', path->str.n - i);
        size_t end = dot != NULL ? (size_t)(dot - path->str.s) : path->str.n;
        val *key = ev_made(e, pl_jval_str(e->a, path->str.s + i, end - i, false));
        if (key != NULL && key->str.n > 0 && strspn(key->str.s, "0123456789") == key->str.n)
            key = integer(e, atoll(key->str.s));
        v = key != NULL ? ev_item(e, v, key) : NULL;
        i = end + 1;
    }
    return v;
}

/* ---- filters: text ------------------------------------------------------------------------------------------------- */

static val *method_of(ev *e, const char *name, val *v, args *a)
{
    val *s = ev_string(e, v);
    return s != NULL ? jinja_method(e, s, name, a) : NULL;
}

static val *f_trim(ev *e, val *v, args *a) { return method_of(e, "strip", v, a); }
static val *f_upper(ev *e, val *v, args *a) { return method_of(e, "upper", v, a); }
static val *f_lower(ev *e, val *v, args *a) { return method_of(e, "lower", v, a); }
static val *f_capitalize(ev *e, val *v, args *a) { return method_of(e, "capitalize", v, a); }
static val *f_replace(ev *e, val *v, args *a) { return method_of(e, "replace", v, a); }
static val *f_string(ev *e, val *v, args *a)
{
    (void)a;
    return ev_string(e, v);
}

/* Each word's first letter up, the rest down; words end at white space and - ( { [ <. */
static val *f_title(ev *e, val *v, args *a)
{
    (void)a;
    val *s = ev_string(e, v), *chars = s != NULL ? ev_iter(e, s) : NULL;
    struct jinja_text t = {0};
    struct jinja_args none = {.n = 0};
    bool start = true;
    for (size_t i = 0; chars != NULL && i < chars->list.n; i++) {
        val *c = jinja_method(e, chars->list.v[i], start ? "upper" : "lower", &none);
        if (c == NULL) {
            jt_fini(&t);
            return NULL;
        }
        jt_add_str(&t, c);
        start = c->str.n == 1 && strchr(" \t\n\v\f\r-({[<", c->str.s[0]) != NULL;
    }
    return chars != NULL ? ev_text(e, &t) : NULL;
}

static val *f_indent(ev *e, val *v, args *a)
{
    val *s = ev_string(e, v), *w = arg_get(a, 0, "width");
    bool first = flag(a, 1, "first", false), blank = flag(a, 2, "blank", false);
    int64_t width = w != NULL && w->kind == JV_STR ? 0 : number(a, 0, "width", 4);
    if (s == NULL || width < 0 || width > 1000)
        return s == NULL ? NULL : ev_fail(e, PL_ERANGE, "indent() takes a width up to 1000");
    struct jinja_text t = {0};
    for (size_t i = 0; i <= s->str.n;) {
        const char *nl = memchr(s->str.s + i, '\n', s->str.n - i);
        size_t end = nl != NULL ? (size_t)(nl - s->str.s) : s->str.n;
        if (i == 0 ? first : (blank || end > i)) {
            if (w != NULL && w->kind == JV_STR)
                jt_add_str(&t, w);
            for (int64_t k = 0; k < width; k++)
                jt_add(&t, " ", 1, false);
        }
        val *line = jv_sub(e->a, s, i, end + (nl != NULL) - i);
        if (ev_made(e, line) == NULL || t.bytes.len > e->out_bytes)
            break;
        jt_add_str(&t, line);
        i = end + 1;
        if (nl == NULL)
            break;
    }
    return ev_text(e, &t);
}

static val *f_escape(ev *e, val *v, args *a)
{
    (void)a;
    val *s = ev_string(e, v);
    struct jinja_text t = {0};
    for (size_t i = 0; s != NULL && i < s->str.n; i++) {
        char c = s->str.s[i];
        const char *r = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '\'' ? "&#39;" : c == '"' ? "&#34;" : NULL;
        jt_add(&t, r != NULL ? r : &c, r != NULL ? strlen(r) : 1, s->str.user != NULL && s->str.user[i]);
    }
    return s != NULL ? ev_text(e, &t) : NULL;
}

static val *f_safe(ev *e, val *v, args *a)
{
    (void)a;
    return ev_string(e, v);
}

static val *f_wordcount(ev *e, val *v, args *a)
{
    (void)a;
    val *s = ev_string(e, v);
    int64_t n = 0;
    for (size_t i = 0; s != NULL && i < s->str.n; i++) {
        unsigned char c = (unsigned char)s->str.s[i];
        bool word = c == '_' || c >= 0x80 || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
        unsigned char p = i > 0 ? (unsigned char)s->str.s[i - 1] : ' ';
        bool before = p == '_' || p >= 0x80 || (p >= '0' && p <= '9') || ((p | 32) >= 'a' && (p | 32) <= 'z');
        n += word && !before;
    }
    return s != NULL ? integer(e, n) : NULL;
}

/* %s %d %i %r %f %g %x %% with flags and width. */
static val *f_format(ev *e, val *v, args *a)
{
    struct jinja_text t = {0};
    size_t used = 0;
    for (size_t i = 0; v->kind == JV_STR && i < v->str.n; i++) {
        if (v->str.s[i] != '%') {
            jt_add(&t, v->str.s + i, 1, v->str.user != NULL && v->str.user[i]);
            continue;
        }
        size_t k = i + 1, n = 0;
        char spec[24] = "%", text[512];
        while (k < v->str.n && strchr("-+ 0123456789.#", v->str.s[k]) != NULL && n < 8)
            spec[++n] = v->str.s[k++];
        char c = k < v->str.n ? v->str.s[k] : 0;
        val *x = c != '%' && used < a->n ? a->v[used++] : NULL;
        i = k;
        if (c == '%') {
            jt_add(&t, "%", 1, false);
        } else if (x != NULL && (c == 's' || c == 'r') && n == 0) {
            jt_add_value(&t, x, c == 'r', 0);
        } else if (x != NULL && jv_is_num(x) && strchr("dixX", c) != NULL && c != 0 && atoi(spec + 1) < 200) {
            strcpy(spec + n + 1, "lld");
            spec[n + 3] = c == 'i' ? 'd' : c;
            snprintf(text, sizeof text, spec, (long long)(x->kind == JV_REAL ? (int64_t)x->r : jv_int(x)));
            jt_add(&t, text, strlen(text), false);
        } else if (x != NULL && jv_is_num(x) && strchr("feg", c) != NULL && c != 0 && atoi(spec + 1) < 200) {
            spec[n + 1] = c;
            spec[n + 2] = '\0';
            snprintf(text, sizeof text, spec, jv_real(x));
            jt_add(&t, text, strlen(text), false);
        } else {
            jt_fini(&t);
            return ev_fail(e, PL_EFORMAT, "the format and its arguments do not fit");
        }
    }
    if (used < a->n) {
        jt_fini(&t);
        return ev_fail(e, PL_EFORMAT, "not all arguments converted during string formatting");
    }
    return ev_text(e, &t);
}

static val *f_tojson(ev *e, val *v, args *a)
{
    val *indent = arg_get(a, 1, "indent"), *seps = arg_get(a, 2, "separators");
    if (a->n == 1) /* transformers' order: ensure_ascii, indent, separators, sort_keys */
        indent = arg_get(a, 9, "indent");
    char item[16] = ", ", key[16] = ": ";
    int width = indent != NULL && jv_is_num(indent) ? (int)jv_int(indent) : -1;
    if (width > 64)
        return ev_fail(e, PL_ERANGE, "tojson() takes an indent up to 64");
    if (width >= 0)
        strcpy(item, ",");
    if (seps != NULL && jv_is_seq(seps) && seps->list.n == 2 && seps->list.v[0]->kind == JV_STR && seps->list.v[1]->kind == JV_STR) {
        snprintf(item, sizeof item, "%.*s", (int)seps->list.v[0]->str.n, seps->list.v[0]->str.s);
        snprintf(key, sizeof key, "%.*s", (int)seps->list.v[1]->str.n, seps->list.v[1]->str.s);
    }
    struct jinja_text t = {0};
    if (!jv_to_json(&t, v, width, flag(a, 3, "sort_keys", false), item, key, 0)) {
        jt_fini(&t);
        return ev_fail(e, PL_EFORMAT, "Object of type %s is not JSON serializable", jv_type_name(v));
    }
    return ev_text(e, &t);
}

/* ---- filters: numbers ---------------------------------------------------------------------------------------------- */

static val *f_int(ev *e, val *v, args *a)
{
    char text[64];
    if (jv_is_num(v))
        return v->kind == JV_REAL && !(fabs(v->r) < 9e18) ? ev_fail(e, PL_ERANGE, "an integer is too large")
                                                           : integer(e, v->kind == JV_REAL ? (int64_t)v->r : jv_int(v));
    if (v->kind == JV_STR && v->str.n < sizeof text) {
        char *end;
        memcpy(text, v->str.s, v->str.n);
        text[v->str.n] = '\0';
        long long i = strtoll(text, &end, (int)number(a, 1, "base", 10));
        if (end != text && end[strspn(end, " \t\n\r")] == '\0')
            return integer(e, i);
        double d = strtod(text, &end);
        if (end != text && end[strspn(end, " \t\n\r")] == '\0' && fabs(d) < 9e18)
            return integer(e, (int64_t)d);
    }
    val *def = arg_get(a, 0, "default");
    return def != NULL ? def : integer(e, 0);
}

static val *f_float(ev *e, val *v, args *a)
{
    char text[64], *end;
    if (jv_is_num(v))
        return ev_made(e, pl_jval_real(e->a, jv_real(v)));
    if (v->kind == JV_STR && v->str.n > 0 && v->str.n < sizeof text) {
        memcpy(text, v->str.s, v->str.n);
        text[v->str.n] = '\0';
        double d = strtod(text, &end);
        if (end != text && end[strspn(end, " \t\n\r")] == '\0')
            return ev_made(e, pl_jval_real(e->a, d));
    }
    val *def = arg_get(a, 0, "default");
    return def != NULL ? def : ev_made(e, pl_jval_real(e->a, 0));
}

static val *f_abs(ev *e, val *v, args *a)
{
    (void)a;
    if (!jv_is_num(v))
        return ev_fail(e, PL_EFORMAT, "bad operand type for abs(): '%s'", jv_type_name(v));
    return v->kind == JV_REAL ? ev_made(e, pl_jval_real(e->a, fabs(v->r))) : integer(e, jv_int(v) < 0 ? -jv_int(v) : jv_int(v));
}

static val *f_round(ev *e, val *v, args *a)
{
    val *how = arg_get(a, 1, "method");
    double scale = pow(10, (double)number(a, 0, "precision", 0)), x;
    if (!jv_is_num(v))
        return ev_fail(e, PL_EFORMAT, "type %s doesn't define __round__ method", jv_type_name(v));
    x = jv_real(v) * scale;
    x = how != NULL && jv_is(how, "ceil") ? ceil(x) : how != NULL && jv_is(how, "floor") ? floor(x) : nearbyint(x);
    return v->kind != JV_REAL && how == NULL && scale >= 1 ? v : ev_made(e, pl_jval_real(e->a, x / scale));
}

/* ---- filters: lists ------------------------------------------------------------------------------------------------ */

static val *f_length(ev *e, val *v, args *a)
{
    (void)a;
    if (v->kind == JV_DICT)
        return integer(e, (int64_t)v->dict.n);
    if (!jv_is_seq(v) && v->kind != JV_STR && v->kind != JV_UNDEF)
        return ev_fail(e, PL_EFORMAT, "object of type '%s' has no len()", jv_type_name(v));
    val *items = ev_iter(e, v);
    return items != NULL ? integer(e, (int64_t)items->list.n) : NULL;
}

static val *f_first(ev *e, val *v, args *a)
{
    (void)a;
    val *items = ev_iter(e, v);
    return items == NULL ? NULL : items->list.n > 0 ? items->list.v[0] : ev_made(e, jv_undef(e->a, "first"));
}

static val *f_last(ev *e, val *v, args *a)
{
    (void)a;
    val *items = ev_iter(e, v);
    return items == NULL ? NULL : items->list.n > 0 ? items->list.v[items->list.n - 1] : ev_made(e, jv_undef(e->a, "last"));
}

static val *f_join(ev *e, val *v, args *a)
{
    val *items = ev_iter(e, v), *d = arg_get(a, 0, "d"), *path = arg_get(a, 1, "attribute");
    struct jinja_text t = {0};
    for (size_t i = 0; items != NULL && i < items->list.n; i++) {
        val *item = path != NULL ? attribute(e, items->list.v[i], path) : items->list.v[i];
        if (item == NULL || !ev_step(e, 1)) {
            jt_fini(&t);
            return NULL;
        }
        if (i > 0 && d != NULL)
            jt_add_value(&t, d, false, 0);
        jt_add_value(&t, item, false, 0);
    }
    return items != NULL ? ev_text(e, &t) : NULL;
}

static val *f_default(ev *e, val *v, args *a)
{
    val *def = arg_get(a, 0, "default_value");
    bool missing = v->kind == JV_UNDEF || (flag(a, 1, "boolean", false) && !jv_truth(v));
    return !missing ? v : def != NULL ? def : ev_made(e, jv_lit(e->a, ""));
}

static val *f_list(ev *e, val *v, args *a)
{
    (void)a;
    return as_list(e, v);
}

static val *f_items(ev *e, val *v, args *a)
{
    if (v->kind == JV_UNDEF)
        return ev_made(e, pl_jval_list(e->a));
    if (v->kind != JV_DICT)
        return ev_fail(e, PL_EFORMAT, "Can only get item pairs from a mapping.");
    return jinja_method(e, v, "items", a);
}

static val *f_reverse(ev *e, val *v, args *a)
{
    (void)a;
    val *items = ev_iter(e, v), *out = items != NULL ? ev_made(e, pl_jval_list(e->a)) : NULL;
    struct jinja_text t = {0};
    for (size_t i = items != NULL ? items->list.n : 0; out != NULL && i-- > 0;) {
        if (v->kind == JV_STR)
            jt_add_str(&t, items->list.v[i]);
        else if (!jv_push(e->a, out, items->list.v[i]))
            return ev_made(e, NULL);
    }
    return out != NULL && v->kind == JV_STR ? ev_text(e, &t) : out;
}

/* What filters compare by: an attribute, and strings without case unless asked. */
static val *sort_key(ev *e, val *v, const val *path, bool cased)
{
    struct jinja_args none = {.n = 0};
    v = path != NULL ? attribute(e, v, path) : v;
    return v != NULL && v->kind == JV_STR && !cased ? jinja_method(e, v, "lower", &none) : v;
}

/* Stable insertion into order of keys; merge sort on (key, item) pairs. */
static bool merge_sort(ev *e, val **items, val **keys, size_t n, bool reverse)
{
    val **ti = malloc(2 * n * sizeof *ti + 1), **tk = ti != NULL ? ti + n : NULL;
    if (ti == NULL)
        return ev_made(e, NULL) != NULL;
    for (size_t width = 1; width < n && e->st == PL_OK; width *= 2) {
        for (size_t lo = 0; lo < n; lo += 2 * width) {
            size_t mid = lo + width < n ? lo + width : n, hi = lo + 2 * width < n ? lo + 2 * width : n, i = lo, j = mid;
            for (size_t k = lo; k < hi; k++) {
                int c = i < mid && j < hi ? ev_compare(e, keys[i], keys[j]) : 0;
                bool left = j >= hi || (i < mid && (reverse ? c >= 0 : c <= 0));
                ti[k] = items[left ? i : j];
                tk[k] = keys[left ? i : j];
                i += left;
                j += !left;
                (void)ev_step(e, 1);
            }
        }
        memcpy(items, ti, n * sizeof *items);
        memcpy(keys, tk, n * sizeof *keys);
    }
    free(ti);
    return e->st == PL_OK;
}

static val *sorted(ev *e, val *v, const val *path, bool cased, bool reverse)
{
    val *out = as_list(e, v), *keys = out != NULL ? ev_made(e, pl_jval_list(e->a)) : NULL;
    for (size_t i = 0; keys != NULL && i < out->list.n; i++) {
        val *k = sort_key(e, out->list.v[i], path, cased);
        if (k == NULL || !jv_push(e->a, keys, k))
            return NULL;
    }
    return keys != NULL && merge_sort(e, out->list.v, keys->list.v, out->list.n, reverse) ? out : NULL;
}

static val *f_sort(ev *e, val *v, args *a)
{
    return sorted(e, v, arg_get(a, 2, "attribute"), flag(a, 1, "case_sensitive", false), flag(a, 0, "reverse", false));
}

static val *f_dictsort(ev *e, val *v, args *a)
{
    struct jinja_args none = {.n = 0};
    val *by = arg_get(a, 1, "by");
    if (v->kind != JV_DICT)
        return ev_fail(e, PL_EFORMAT, "dictsort takes a mapping");
    val *pairs = jinja_method(e, v, "items", &none), *path = ev_made(e, pl_jval_int(e->a, by != NULL && jv_is(by, "value")));
    return pairs != NULL && path != NULL ? sorted(e, pairs, path, flag(a, 0, "case_sensitive", false), flag(a, 2, "reverse", false)) : NULL;
}

static val *f_unique(ev *e, val *v, args *a)
{
    val *items = ev_iter(e, v), *seen = ev_made(e, pl_jval_list(e->a)), *out = ev_made(e, pl_jval_list(e->a));
    for (size_t i = 0; items != NULL && out != NULL && i < items->list.n; i++) {
        val *k = sort_key(e, items->list.v[i], arg_get(a, 1, "attribute"), flag(a, 0, "case_sensitive", false));
        if (k == NULL)
            return NULL;
        if (!ev_contains(e, seen, k) && (!jv_push(e->a, seen, k) || !jv_push(e->a, out, items->list.v[i])))
            return ev_made(e, NULL);
        if (e->st != PL_OK)
            return NULL;
    }
    return items != NULL ? out : NULL;
}

static val *extreme(ev *e, val *v, args *a, int sign)
{
    val *items = ev_iter(e, v), *best = NULL, *best_key = NULL;
    for (size_t i = 0; items != NULL && i < items->list.n; i++) {
        val *k = sort_key(e, items->list.v[i], arg_get(a, 1, "attribute"), flag(a, 0, "case_sensitive", false));
        if (k == NULL)
            return NULL;
        if (best == NULL || sign * ev_compare(e, k, best_key) > 0) {
            best = items->list.v[i];
            best_key = k;
        }
    }
    return e->st != PL_OK ? NULL : best != NULL ? best : ev_made(e, jv_undef(e->a, "no items"));
}

static val *f_min(ev *e, val *v, args *a) { return extreme(e, v, a, -1); }
static val *f_max(ev *e, val *v, args *a) { return extreme(e, v, a, 1); }

static val *f_sum(ev *e, val *v, args *a)
{
    val *items = ev_iter(e, v), *path = arg_get(a, 0, "attribute"), *sum = arg_get(a, 1, "start");
    sum = sum != NULL ? sum : integer(e, 0);
    for (size_t i = 0; items != NULL && sum != NULL && i < items->list.n; i++) {
        val *x = path != NULL ? attribute(e, items->list.v[i], path) : items->list.v[i];
        sum = x != NULL ? ev_binary(e, OP_ADD, sum, x) : NULL;
    }
    return items != NULL ? sum : NULL;
}

static val *f_batch(ev *e, val *v, args *a)
{
    val *items = ev_iter(e, v), *out = ev_made(e, pl_jval_list(e->a)), *row = NULL, *fill = arg_get(a, 1, "fill_with");
    int64_t n = number(a, 0, "linecount", 0);
    if (n < 1 || n > 100000)
        return ev_fail(e, PL_EFORMAT, "batch() takes a positive count");
    for (size_t i = 0; items != NULL && out != NULL && i < items->list.n; i++) {
        if ((int64_t)i % n == 0 && ((row = pl_jval_list(e->a)) == NULL || !jv_push(e->a, out, row)))
            return ev_made(e, NULL);
        if (!jv_push(e->a, row, items->list.v[i]))
            return ev_made(e, NULL);
    }
    while (row != NULL && fill != NULL && (int64_t)row->list.n < n)
        if (!jv_push(e->a, row, fill))
            return ev_made(e, NULL);
    return items != NULL ? out : NULL;
}

/* select, reject, selectattr, rejectattr: by a test (or truth), of the item or of its attribute. */
static val *select_items(ev *e, val *v, args *a, bool by_attr, bool wanted)
{
    val *items = ev_iter(e, v), *out = ev_made(e, pl_jval_list(e->a));
    size_t skip = by_attr;
    if (by_attr && a->n < 1)
        return ev_fail(e, PL_EFORMAT, "Missing parameter for attribute name");
    struct jinja_args rest = {.n = 0};
    for (size_t i = skip + 1; i < a->n; i++)
        rest.v[rest.n++] = a->v[i];
    char test[32] = "";
    if (a->n > skip && a->v[skip]->kind == JV_STR)
        snprintf(test, sizeof test, "%.*s", (int)a->v[skip]->str.n, a->v[skip]->str.s);
    if (a->n > skip && !jinja_is_test(test))
        return ev_fail(e, PL_EFORMAT, "No test named '%s'.", test);
    for (size_t i = 0; items != NULL && out != NULL && i < items->list.n && ev_step(e, 1); i++) {
        val *x = by_attr ? attribute(e, items->list.v[i], a->v[0]) : items->list.v[i];
        bool truth = x != NULL && (a->n > skip ? jinja_test(e, test, x, &rest) : jv_truth(x));
        if (e->st != PL_OK || (truth == wanted && !jv_push(e->a, out, items->list.v[i])))
            return ev_made(e, NULL);
    }
    return items != NULL ? out : NULL;
}

static val *f_select(ev *e, val *v, args *a) { return select_items(e, v, a, false, true); }
static val *f_reject(ev *e, val *v, args *a) { return select_items(e, v, a, false, false); }
static val *f_selectattr(ev *e, val *v, args *a) { return select_items(e, v, a, true, true); }
static val *f_rejectattr(ev *e, val *v, args *a) { return select_items(e, v, a, true, false); }

static val *f_map(ev *e, val *v, args *a)
{
    val *items = ev_iter(e, v), *out = ev_made(e, pl_jval_list(e->a)), *path = arg_get(a, 99, "attribute"), *def = arg_get(a, 99, "default");
    char name[32] = "";
    struct jinja_args rest = {.n = 0};
    for (size_t i = 1; i < a->n; i++)
        rest.v[rest.n++] = a->v[i];
    if (path == NULL && a->n > 0 && a->v[0]->kind == JV_STR)
        snprintf(name, sizeof name, "%.*s", (int)a->v[0]->str.n, a->v[0]->str.s);
    if (path == NULL && !jinja_is_filter(name))
        return ev_fail(e, PL_EFORMAT, "No filter named '%s'.", name);
    for (size_t i = 0; items != NULL && out != NULL && i < items->list.n && ev_step(e, 1); i++) {
        val *x = path != NULL ? attribute(e, items->list.v[i], path) : jinja_filter(e, name, items->list.v[i], &rest);
        if (x != NULL && x->kind == JV_UNDEF && def != NULL)
            x = def;
        if (x == NULL || !jv_push(e->a, out, x))
            return ev_made(e, NULL);
    }
    return items != NULL ? out : NULL;
}

static const struct {
    const char *name;
    val *(*fn)(ev *e, val *v, args *a);
} filters[] = {
    {"abs", f_abs},           {"batch", f_batch},       {"capitalize", f_capitalize}, {"count", f_length},     {"d", f_default},
    {"default", f_default},   {"dictsort", f_dictsort}, {"e", f_escape},              {"escape", f_escape},    {"first", f_first},
    {"float", f_float},       {"format", f_format},     {"indent", f_indent},         {"int", f_int},          {"items", f_items},
    {"join", f_join},         {"last", f_last},         {"length", f_length},         {"list", f_list},        {"lower", f_lower},
    {"map", f_map},           {"max", f_max},           {"min", f_min},               {"reject", f_reject},    {"rejectattr", f_rejectattr},
    {"replace", f_replace},   {"reverse", f_reverse},   {"round", f_round},           {"safe", f_safe},        {"select", f_select},
    {"selectattr", f_selectattr}, {"sort", f_sort},     {"string", f_string},         {"sum", f_sum},          {"title", f_title},
    {"tojson", f_tojson},     {"trim", f_trim},         {"unique", f_unique},         {"upper", f_upper},      {"wordcount", f_wordcount},
};

bool jinja_is_filter(const char *name)
{
    for (size_t i = 0; i < PL_COUNT_OF(filters); i++)
        if (strcmp(filters[i].name, name) == 0)
            return true;
    return false;
}

val *jinja_filter(ev *e, const char *name, val *v, args *a)
{
    for (size_t i = 0; i < PL_COUNT_OF(filters); i++)
        if (strcmp(filters[i].name, name) == 0)
            return filters[i].fn(e, v, a);
    return ev_fail(e, PL_ENOTSUP, "No filter named '%.60s'.", name);
}

/* ---- tests --------------------------------------------------------------------------------------------------------- */

typedef enum { T_DEFINED, T_UNDEFINED, T_NONE, T_STRING, T_NUMBER, T_INTEGER, T_FLOAT, T_BOOLEAN, T_TRUE, T_FALSE, T_MAPPING, T_SEQUENCE, T_ITERABLE,
               T_CALLABLE, T_EQ, T_NE, T_LT, T_LE, T_GT, T_GE, T_IN, T_ODD, T_EVEN, T_DIVISIBLE, T_LOWER, T_UPPER, T_FILTER, T_TEST, T_SAMEAS } test_id;

static const struct {
    const char *name;
    test_id id;
} tests[] = {
    {"defined", T_DEFINED}, {"undefined", T_UNDEFINED}, {"none", T_NONE},         {"string", T_STRING},     {"number", T_NUMBER},
    {"integer", T_INTEGER}, {"float", T_FLOAT},         {"boolean", T_BOOLEAN},   {"true", T_TRUE},         {"false", T_FALSE},
    {"mapping", T_MAPPING}, {"sequence", T_SEQUENCE},   {"iterable", T_ITERABLE}, {"callable", T_CALLABLE}, {"eq", T_EQ},
    {"equalto", T_EQ},      {"ne", T_NE},               {"lt", T_LT},             {"lessthan", T_LT},       {"le", T_LE},
    {"gt", T_GT},           {"greaterthan", T_GT},      {"ge", T_GE},             {"in", T_IN},             {"odd", T_ODD},
    {"even", T_EVEN},       {"divisibleby", T_DIVISIBLE}, {"lower", T_LOWER},     {"upper", T_UPPER},       {"filter", T_FILTER},
    {"test", T_TEST},       {"sameas", T_SAMEAS},
};

bool jinja_is_test(const char *name)
{
    for (size_t i = 0; i < PL_COUNT_OF(tests); i++)
        if (strcmp(tests[i].name, name) == 0)
            return true;
    return false;
}

static bool has_case(ev *e, val *v, const char *method)
{
    struct jinja_args none = {.n = 0};
    val *s = ev_string(e, v), *same = s != NULL ? jinja_method(e, s, method, &none) : NULL;
    val *other = s != NULL ? jinja_method(e, s, strcmp(method, "lower") == 0 ? "upper" : "lower", &none) : NULL;
    return same != NULL && other != NULL && jv_equal(s, same, 0) && !jv_equal(s, other, 0);
}

static bool two_sided(ev *e, test_id id, val *v, args *a)
{
    val *x = a->n > 0 ? a->v[0] : NULL;
    if (x == NULL) {
        ev_fail(e, PL_EFORMAT, "the test needs an argument");
        return false;
    }
    switch (id) {
    case T_EQ: return jv_equal(v, x, 0);
    case T_NE: return !jv_equal(v, x, 0);
    case T_LT: return ev_compare(e, v, x) < 0;
    case T_LE: return ev_compare(e, v, x) <= 0;
    case T_GT: return ev_compare(e, v, x) > 0;
    case T_GE: return ev_compare(e, v, x) >= 0;
    case T_IN: return ev_contains(e, x, v);
    case T_SAMEAS: return v == x || (v->kind == x->kind && (v->kind == JV_NONE || v->kind == JV_BOOL) && jv_equal(v, x, 0));
    default:
        if (!jv_is_num(v) || !jv_is_num(x) || jv_int(x) == 0)
            return ev_fail(e, PL_EFORMAT, "divisibleby takes numbers") != NULL;
        return jv_int(v) % jv_int(x) == 0;
    }
}

static bool one_sided(ev *e, test_id id, val *v, args *a)
{
    switch (id) {
    case T_DEFINED: return v->kind != JV_UNDEF;
    case T_UNDEFINED: return v->kind == JV_UNDEF;
    case T_NONE: return v->kind == JV_NONE;
    case T_STRING: return v->kind == JV_STR;
    case T_NUMBER: return jv_is_num(v);
    case T_INTEGER: return v->kind == JV_INT;
    case T_FLOAT: return v->kind == JV_REAL;
    case T_BOOLEAN: return v->kind == JV_BOOL;
    case T_TRUE: return v->kind == JV_BOOL && v->b;
    case T_FALSE: return v->kind == JV_BOOL && !v->b;
    case T_MAPPING: return v->kind == JV_DICT;
    case T_SEQUENCE:
    case T_ITERABLE: return jv_is_seq(v) || v->kind == JV_DICT || v->kind == JV_STR || v->kind == JV_UNDEF;
    case T_CALLABLE: return v->kind == JV_MACRO || v->kind == JV_METHOD || v->kind == JV_FUNC;
    case T_LOWER: return has_case(e, v, "lower");
    case T_UPPER: return has_case(e, v, "upper");
    case T_ODD:
    case T_EVEN:
        if (!jv_is_num(v))
            return ev_fail(e, PL_EFORMAT, "odd and even take numbers") != NULL;
        return (jv_int(v) % 2 != 0) == (id == T_ODD);
    case T_FILTER:
    case T_TEST: {
        char name[64];
        snprintf(name, sizeof name, "%.*s", v->kind == JV_STR ? (int)v->str.n : 0, v->kind == JV_STR ? v->str.s : "");
        return id == T_FILTER ? jinja_is_filter(name) : jinja_is_test(name);
    }
    default: return two_sided(e, id, v, a);
    }
}

bool jinja_test(ev *e, const char *name, val *v, args *a)
{
    for (size_t i = 0; i < PL_COUNT_OF(tests); i++)
        if (strcmp(tests[i].name, name) == 0)
            return one_sided(e, tests[i].id, v, a);
    ev_fail(e, PL_ENOTSUP, "No test named '%.60s'.", name);
    return boolean(e, false) == NULL;
}
