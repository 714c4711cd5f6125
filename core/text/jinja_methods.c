/* jinja_methods: what can be called on strings, lists, dicts and loops. Methods that change a list or dict in place are
 * refused, as Jinja's immutable sandbox does.
 * SPDX-License-Identifier: Apache-2.0 */
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <wctype.h>

#include "core/base/utf8.h"
#include "core/text/jinja_int.h"

typedef struct pl_jval val;
typedef struct jinja_ev ev;
typedef const struct jinja_args args;

static bool is_space_at(const val *s, size_t i)
{
    unsigned char c = (unsigned char)s->str.s[i];
    return c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1c && c <= 0x1f);
}

/* Bytes of the white space character that starts at i (0 = none); back: that ends before i. */
static size_t space_at(const val *s, size_t i, bool back)
{
    static const char *const wide[] = {"\xc2\x85", "\xc2\xa0", "\xe1\x9a\x80", "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};
    if (back ? i == 0 : i >= s->str.n)
        return 0;
    if (is_space_at(s, back ? i - 1 : i))
        return 1;
    for (size_t k = 0; k < PL_COUNT_OF(wide); k++) {
        size_t n = strlen(wide[k]), from = back ? i - n : i;
        if ((back ? n <= i : n <= s->str.n - i) && memcmp(s->str.s + from, wide[k], n) == 0)
            return n;
    }
    size_t from = back ? i - 3 : i;
    if ((back ? i >= 3 : s->str.n - i >= 3) && memcmp(s->str.s + from, "\xe2\x80", 2) == 0 && (unsigned char)s->str.s[from + 2] >= 0x80 &&
        (unsigned char)s->str.s[from + 2] <= 0x8a)
        return 3;
    return 0;
}

/* Bytes of the character at i (or before i) when it is one of set (NULL = white space), else 0. */
static size_t in_set(const val *s, size_t i, bool back, const val *set)
{
    if (set == NULL || set->kind == JV_NONE)
        return space_at(s, i, back);
    if (back ? i == 0 : i >= s->str.n)
        return 0;
    size_t from = back ? i - 1 : i, n = 1;
    while (back && from > 0 && (s->str.s[from] & 0xc0) == 0x80)
        from--;
    while (from + n < s->str.n && (s->str.s[from + n] & 0xc0) == 0x80)
        n++;
    return set->str.n > 0 && memmem(set->str.s, set->str.n, s->str.s + from, n) != NULL ? n : 0;
}

static val *strip(ev *e, val *s, args *a, bool left, bool right)
{
    const val *set = arg_get(a, 0, "chars");
    size_t from = 0, to = s->str.n, n;
    if (set != NULL && set->kind != JV_STR && set->kind != JV_NONE)
        return ev_fail(e, PL_EFORMAT, "strip arg must be None or str");
    while (left && from < to && (n = in_set(s, from, false, set)) > 0)
        from += n;
    while (right && to > from && (n = in_set(s, to, true, set)) > 0)
        to -= n;
    return ev_made(e, jv_sub(e->a, s, from, to - from));
}

static val *m_strip(ev *e, val *s, args *a) { return strip(e, s, a, true, true); }
static val *m_lstrip(ev *e, val *s, args *a) { return strip(e, s, a, true, false); }
static val *m_rstrip(ev *e, val *s, args *a) { return strip(e, s, a, false, true); }

static uint32_t change_case(uint32_t cp, bool up)
{
    if (cp < 0x80)
        return up ? (cp >= 'a' && cp <= 'z' ? cp - 32 : cp) : (cp >= 'A' && cp <= 'Z' ? cp + 32 : cp);
    static locale_t utf8;
    if (utf8 == NULL)
        utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", NULL);
    if (utf8 == NULL)
        return cp;
    return (uint32_t)(up ? towupper_l((wint_t)cp, utf8) : towlower_l((wint_t)cp, utf8));
}

/* first: for the first character, rest: for the others; 'u', 'l'. */
static val *recase(ev *e, val *s, char first, char rest)
{
    struct jinja_text t = {0};
    for (size_t i = 0; i < s->str.n;) {
        uint32_t cp;
        char out[4];
        int n = pl_utf8_decode(s->str.s + i, s->str.n - i, &cp);
        bool user = s->str.user != NULL && s->str.user[i];
        if (n <= 0) {
            jt_add(&t, s->str.s + i, 1, user);
            i++;
            continue;
        }
        jt_add(&t, out, pl_utf8_encode(change_case(cp, (i == 0 ? first : rest) == 'u'), out), user);
        i += (size_t)n;
    }
    return ev_text(e, &t);
}

static val *m_upper(ev *e, val *s, args *a) { (void)a; return recase(e, s, 'u', 'u'); }
static val *m_lower(ev *e, val *s, args *a) { (void)a; return recase(e, s, 'l', 'l'); }
static val *m_capitalize(ev *e, val *s, args *a) { (void)a; return recase(e, s, 'u', 'l'); }
static val *m_title(ev *e, val *s, args *a)
{
    struct jinja_text t = {0};
    bool start = true;
    (void)a;
    for (size_t i = 0; i < s->str.n;) {
        uint32_t cp;
        char out[4];
        int n = pl_utf8_decode(s->str.s + i, s->str.n - i, &cp);
        cp = n > 0 ? cp : (unsigned char)s->str.s[i];
        bool letter = change_case(cp, true) != cp || change_case(cp, false) != cp;
        jt_add(&t, out, pl_utf8_encode(change_case(cp, start), out), s->str.user != NULL && s->str.user[i]);
        start = !letter;
        i += n > 0 ? (size_t)n : 1;
    }
    return ev_text(e, &t);
}

static val *need_str(ev *e, val *v)
{
    return v != NULL && v->kind == JV_STR ? v : ev_fail(e, PL_EFORMAT, "a string is needed, not %s", v != NULL ? jv_type_name(v) : "nothing");
}

static int64_t count_arg(args *a, size_t i, const char *name)
{
    val *v = arg_get(a, i, name);
    return v != NULL && jv_is_num(v) ? jv_int(v) : -1;
}

static val *m_replace(ev *e, val *s, args *a)
{
    val *old = arg_get(a, 0, "old"), *new = arg_get(a, 1, "new");
    int64_t left = count_arg(a, 2, "count");
    old = old != NULL ? ev_string(e, old) : need_str(e, NULL);
    new = old != NULL && new != NULL ? ev_string(e, new) : need_str(e, NULL);
    if (old == NULL || new == NULL)
        return NULL;
    struct jinja_text t = {0};
    size_t i = 0;
    while (i <= s->str.n && left != 0) {
        const char *hit = old->str.n <= s->str.n - i ? memmem(s->str.s + i, s->str.n - i, old->str.s, old->str.n) : NULL;
        if (hit == NULL || t.bytes.len > e->out_bytes)
            break;
        size_t at = (size_t)(hit - s->str.s);
        val *before = jv_sub(e->a, s, i, at - i);
        if (ev_made(e, before) == NULL)
            break;
        jt_add_str(&t, before);
        jt_add_str(&t, new);
        left--;
        if (old->str.n == 0) { /* between all characters */
            size_t n = at < s->str.n ? 1 : 0;
            while (at + n < s->str.n && (s->str.s[at + n] & 0xc0) == 0x80)
                n++;
            val *one = jv_sub(e->a, s, at, n);
            if (ev_made(e, one) == NULL)
                break;
            jt_add_str(&t, one);
            i = at + (n > 0 ? n : 1);
        } else {
            i = at + old->str.n;
        }
        if (!ev_step(e, 1))
            break;
    }
    val *tail = i < s->str.n ? jv_sub(e->a, s, i, s->str.n - i) : NULL;
    if (tail != NULL)
        jt_add_str(&t, tail);
    return ev_text(e, &t);
}

/* Split at white space (sep NULL) or at sep; from the right when asked. */
static val *split(ev *e, val *s, args *a, bool right)
{
    val *sep = arg_get(a, 0, "sep"), *out = ev_made(e, pl_jval_list(e->a));
    int64_t max = count_arg(a, 1, "maxsplit");
    bool spaces = sep == NULL || sep->kind == JV_NONE;
    if (out == NULL || (!spaces && (need_str(e, sep) == NULL || sep->str.n == 0)))
        return ev_fail(e, PL_EFORMAT, "empty separator");
    size_t from = 0, to = s->str.n;
    while (ev_step(e, 1)) {
        size_t n, i;
        while (spaces && !right && (n = space_at(s, from, false)) > 0 && from < to)
            from += n;
        while (spaces && right && to > from && (n = space_at(s, to, true)) > 0)
            to -= n;
        if (spaces && from >= to)
            break;
        bool found = false;
        size_t cut = 0, width = 0;
        for (i = 0; max != 0 && i + (spaces ? 0 : sep->str.n) <= to - from && !found; i++) {
            size_t at = right ? to - i - (spaces ? 0 : sep->str.n) : from + i;
            width = spaces ? (at < to ? space_at(s, at, false) : 0) : memcmp(s->str.s + at, sep->str.s, sep->str.n) == 0 ? sep->str.n : 0;
            found = width > 0;
            cut = at;
        }
        val *piece = !found ? jv_sub(e->a, s, from, to - from) : right ? jv_sub(e->a, s, cut + width, to - cut - width) : jv_sub(e->a, s, from, cut - from);
        if (ev_made(e, piece) == NULL || !jv_push(e->a, out, piece))
            return ev_made(e, NULL);
        if (!found)
            break;
        if (right)
            to = cut;
        else
            from = cut + width;
        max -= max > 0;
    }
    for (size_t i = 0; right && i < out->list.n / 2; i++) {
        val *t = out->list.v[i];
        out->list.v[i] = out->list.v[out->list.n - 1 - i];
        out->list.v[out->list.n - 1 - i] = t;
    }
    return e->st == PL_OK ? out : NULL;
}

static val *m_split(ev *e, val *s, args *a) { return split(e, s, a, false); }
static val *m_rsplit(ev *e, val *s, args *a) { return split(e, s, a, true); }

static val *m_splitlines(ev *e, val *s, args *a)
{
    val *out = ev_made(e, pl_jval_list(e->a)), *keep = arg_get(a, 0, "keepends");
    for (size_t i = 0; out != NULL && i < s->str.n;) {
        size_t end = i;
        while (end < s->str.n && s->str.s[end] != '\n' && s->str.s[end] != '\r')
            end++;
        size_t next = end + (end < s->str.n) + (end + 1 < s->str.n && s->str.s[end] == '\r' && s->str.s[end + 1] == '\n');
        if (!jv_push(e->a, out, jv_sub(e->a, s, i, (keep != NULL && jv_truth(keep) ? next : end) - i)))
            return ev_made(e, NULL);
        i = next;
    }
    return out;
}

static val *affix(ev *e, val *s, args *a, bool end)
{
    val *x = arg_get(a, 0, NULL);
    size_t n = x != NULL && x->kind == JV_TUPLE ? x->list.n : 1;
    bool yes = false;
    for (size_t i = 0; i < n; i++) {
        val *y = x != NULL && x->kind == JV_TUPLE ? x->list.v[i] : x;
        if (need_str(e, y) == NULL)
            return NULL;
        yes |= y->str.n <= s->str.n && memcmp(end ? s->str.s + s->str.n - y->str.n : s->str.s, y->str.s, y->str.n) == 0;
    }
    return ev_made(e, pl_jval_bool(e->a, yes));
}

static val *m_startswith(ev *e, val *s, args *a) { return affix(e, s, a, false); }
static val *m_endswith(ev *e, val *s, args *a) { return affix(e, s, a, true); }

static val *remove_affix(ev *e, val *s, args *a, bool end)
{
    val *x = need_str(e, arg_get(a, 0, NULL)), *has = x != NULL ? affix(e, s, a, end) : NULL;
    if (has == NULL)
        return NULL;
    return has->b ? ev_made(e, jv_sub(e->a, s, end ? 0 : x->str.n, s->str.n - x->str.n)) : s;
}

static val *m_removeprefix(ev *e, val *s, args *a) { return remove_affix(e, s, a, false); }
static val *m_removesuffix(ev *e, val *s, args *a) { return remove_affix(e, s, a, true); }

static val *m_join(ev *e, val *s, args *a)
{
    val *x = arg_get(a, 0, NULL), *items = x != NULL ? ev_iter(e, x) : need_str(e, NULL);
    struct jinja_text t = {0};
    for (size_t i = 0; items != NULL && i < items->list.n; i++) {
        if (need_str(e, items->list.v[i]) == NULL) {
            jt_fini(&t);
            return NULL;
        }
        if (i > 0)
            jt_add_str(&t, s);
        jt_add_str(&t, items->list.v[i]);
    }
    return items != NULL ? ev_text(e, &t) : NULL;
}

static int64_t characters(const val *s, size_t bytes)
{
    int64_t n = 0;
    for (size_t i = 0; i < bytes; i++)
        n += (s->str.s[i] & 0xc0) != 0x80;
    return n;
}

static val *m_find(ev *e, val *s, args *a)
{
    val *x = need_str(e, arg_get(a, 0, NULL));
    const char *hit = x != NULL ? (x->str.n == 0 ? s->str.s : memmem(s->str.s, s->str.n, x->str.s, x->str.n)) : NULL;
    return x == NULL ? NULL : ev_made(e, pl_jval_int(e->a, hit != NULL ? characters(s, (size_t)(hit - s->str.s)) : -1));
}

static val *m_index(ev *e, val *s, args *a)
{
    val *i = m_find(e, s, a);
    return i != NULL && i->i < 0 ? ev_fail(e, PL_EFORMAT, "substring not found") : i;
}

static val *m_count(ev *e, val *s, args *a)
{
    val *x = need_str(e, arg_get(a, 0, NULL));
    int64_t n = 0;
    if (x == NULL)
        return NULL;
    if (x->str.n == 0)
        return ev_made(e, pl_jval_int(e->a, characters(s, s->str.n) + 1));
    for (const char *p = s->str.s, *end = p + s->str.n; (p = memmem(p, (size_t)(end - p), x->str.s, x->str.n)) != NULL; p += x->str.n)
        n++;
    return ev_made(e, pl_jval_int(e->a, n));
}

static val *m_getitem(ev *e, val *s, args *a)
{
    val *chars = ev_iter(e, s);
    int64_t i = jv_int(a->v[0]);
    if (chars == NULL)
        return NULL;
    i += i < 0 ? (int64_t)chars->list.n : 0;
    return i >= 0 && i < (int64_t)chars->list.n ? chars->list.v[i] : ev_made(e, jv_undef(e->a, "index"));
}

static val *digits(ev *e, const val *s, const char *set)
{
    bool all = s->str.n > 0;
    for (size_t i = 0; i < s->str.n; i++)
        all &= s->str.s[i] != '\0' && strchr(set, s->str.s[i]) != NULL;
    return ev_made(e, pl_jval_bool(e->a, all));
}

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
static val *m_isdigit(ev *e, val *s, args *a) { (void)a; return digits(e, s, "0123456789"); }
static val *m_isalpha(ev *e, val *s, args *a) { (void)a; return digits(e, s, LETTERS); }
static val *m_isalnum(ev *e, val *s, args *a) { (void)a; return digits(e, s, LETTERS "0123456789"); }
static val *m_isspace(ev *e, val *s, args *a) { (void)a; return digits(e, s, " \t\n\v\f\r"); }

/* "{} {0} {name}".format(…), without conversions or format specifications */
static val *m_format(ev *e, val *s, args *a)
{
    struct jinja_text t = {0};
    size_t next = 0;
    for (size_t i = 0; i < s->str.n; i++) {
        char c = s->str.s[i];
        bool twice = i + 1 < s->str.n && s->str.s[i + 1] == c;
        if ((c != '{' && c != '}') || twice) {
            jt_add(&t, &c, 1, s->str.user != NULL && s->str.user[i]);
            i += (c == '{' || c == '}') && twice;
            continue;
        }
        char name[64];
        const char *close = c == '{' ? memchr(s->str.s + i, '}', s->str.n - i) : NULL;
        size_t n = close != NULL ? (size_t)(close - s->str.s) - i - 1 : sizeof name;
        val *v = NULL;
        if (n < sizeof name) {
            memcpy(name, s->str.s + i + 1, n);
            name[n] = '\0';
            bool number = strspn(name, "0123456789") == n;
            v = n == 0 ? arg_get(a, next++, NULL) : number ? arg_get(a, strtoul(name, NULL, 10), NULL) : arg_get(a, 99, name);
        }
        if (v == NULL) {
            jt_fini(&t);
            return ev_fail(e, PL_EFORMAT, "format() has no argument for a field");
        }
        jt_add_value(&t, v, false, 0);
        i += n + 1;
    }
    return ev_text(e, &t);
}

/* ---- dicts, lists, loops ------------------------------------------------------------------------------------------- */

static val *m_keys(ev *e, val *d, args *a) { (void)a; return ev_iter(e, d); }

static val *m_values(ev *e, val *d, args *a)
{
    val *out = ev_made(e, pl_jval_list(e->a));
    (void)a;
    for (size_t i = 0; out != NULL && i < d->dict.n; i++)
        if (!jv_push(e->a, out, d->dict.values[i]))
            return ev_made(e, NULL);
    return out;
}

static val *m_items(ev *e, val *d, args *a)
{
    val *out = ev_made(e, pl_jval_list(e->a));
    (void)a;
    for (size_t i = 0; out != NULL && i < d->dict.n; i++) {
        val *pair = jv_new(e->a, JV_TUPLE);
        if (!jv_push(e->a, pair, d->dict.keys[i]) || !jv_push(e->a, pair, d->dict.values[i]) || !jv_push(e->a, out, pair))
            return ev_made(e, NULL);
    }
    return out;
}

static val *m_get(ev *e, val *d, args *a)
{
    val *key = arg_get(a, 0, NULL), *def = arg_get(a, 1, NULL), *v = key != NULL ? jv_get(d, key) : need_str(e, NULL);
    if (key == NULL)
        return NULL;
    return v != NULL ? v : def != NULL ? def : ev_made(e, pl_jval_none(e->a));
}

static val *m_copy(ev *e, val *v, args *a)
{
    val *out = ev_made(e, jv_new(e->a, v->kind));
    (void)a;
    for (size_t i = 0; out != NULL && v->kind == JV_DICT && i < v->dict.n; i++)
        if (!jv_set(e->a, out, v->dict.keys[i], v->dict.values[i]))
            return ev_made(e, NULL);
    for (size_t i = 0; out != NULL && v->kind == JV_LIST && i < v->list.n; i++)
        if (!jv_push(e->a, out, v->list.v[i]))
            return ev_made(e, NULL);
    return out;
}

static val *list_find(ev *e, val *v, args *a, bool count)
{
    val *x = arg_get(a, 0, NULL);
    int64_t n = 0;
    for (size_t i = 0; x != NULL && i < v->list.n; i++)
        if (jv_equal(v->list.v[i], x, 0)) {
            if (!count)
                return ev_made(e, pl_jval_int(e->a, (int64_t)i));
            n++;
        }
    return count ? ev_made(e, pl_jval_int(e->a, n)) : ev_fail(e, PL_EFORMAT, "the value is not in list");
}

static val *l_index(ev *e, val *v, args *a) { return list_find(e, v, a, false); }
static val *l_count(ev *e, val *v, args *a) { return list_find(e, v, a, true); }

static val *m_cycle(ev *e, val *loop, args *a)
{
    return a->n > 0 ? a->v[loop->loop.at % a->n] : ev_fail(e, PL_EFORMAT, "no items for cycling given");
}

static val *m_changed(ev *e, val *loop, args *a)
{
    val *now = ev_made(e, jv_new(e->a, JV_TUPLE));
    for (size_t i = 0; now != NULL && i < a->n; i++)
        if (!jv_push(e->a, now, a->v[i]))
            return ev_made(e, NULL);
    bool changed = now != NULL && (loop->loop.last == NULL || !jv_equal(loop->loop.last, now, 0));
    loop->loop.last = now;
    return now != NULL ? ev_made(e, pl_jval_bool(e->a, changed)) : NULL;
}

static val *m_refused(ev *e, val *v, args *a)
{
    (void)a;
    return ev_fail(e, PL_EFORMAT, "a %s must not be changed in a template; use + or namespace()", jv_type_name(v));
}

static const struct {
    pl_jkind kind;
    const char *name;
    val *(*fn)(ev *e, val *self, args *a);
} methods[] = {
    {JV_STR, "strip", m_strip}, {JV_STR, "lstrip", m_lstrip}, {JV_STR, "rstrip", m_rstrip}, {JV_STR, "upper", m_upper}, {JV_STR, "lower", m_lower},
    {JV_STR, "capitalize", m_capitalize}, {JV_STR, "title", m_title}, {JV_STR, "replace", m_replace}, {JV_STR, "split", m_split},
    {JV_STR, "rsplit", m_rsplit}, {JV_STR, "splitlines", m_splitlines}, {JV_STR, "startswith", m_startswith}, {JV_STR, "endswith", m_endswith},
    {JV_STR, "removeprefix", m_removeprefix}, {JV_STR, "removesuffix", m_removesuffix}, {JV_STR, "join", m_join}, {JV_STR, "find", m_find},
    {JV_STR, "index", m_index}, {JV_STR, "count", m_count}, {JV_STR, "isdigit", m_isdigit}, {JV_STR, "isnumeric", m_isdigit},
    {JV_STR, "isalpha", m_isalpha}, {JV_STR, "isalnum", m_isalnum}, {JV_STR, "isspace", m_isspace}, {JV_STR, "format", m_format},
    {JV_STR, "__getitem__", m_getitem}, {JV_DICT, "keys", m_keys}, {JV_DICT, "values", m_values}, {JV_DICT, "items", m_items}, {JV_DICT, "get", m_get},
    {JV_DICT, "copy", m_copy}, {JV_DICT, "update", m_refused}, {JV_DICT, "pop", m_refused}, {JV_DICT, "clear", m_refused},
    {JV_DICT, "setdefault", m_refused}, {JV_DICT, "popitem", m_refused}, {JV_LIST, "index", l_index}, {JV_LIST, "count", l_count},
    {JV_LIST, "copy", m_copy}, {JV_LIST, "append", m_refused}, {JV_LIST, "extend", m_refused}, {JV_LIST, "insert", m_refused},
    {JV_LIST, "pop", m_refused}, {JV_LIST, "remove", m_refused}, {JV_LIST, "clear", m_refused}, {JV_LIST, "reverse", m_refused},
    {JV_LIST, "sort", m_refused}, {JV_TUPLE, "index", l_index}, {JV_TUPLE, "count", l_count}, {JV_LOOP, "cycle", m_cycle},
    {JV_LOOP, "changed", m_changed},
};

bool jinja_has_method(const val *v, const char *name)
{
    for (size_t i = 0; i < PL_COUNT_OF(methods); i++)
        if (methods[i].kind == v->kind && strcmp(methods[i].name, name) == 0 && name[0] != '_')
            return true;
    return false;
}

val *jinja_method(ev *e, val *self, const char *name, args *a)
{
    for (size_t i = 0; i < PL_COUNT_OF(methods); i++)
        if (methods[i].kind == self->kind && strcmp(methods[i].name, name) == 0)
            return methods[i].fn(e, self, a);
    return ev_fail(e, PL_EFORMAT, "'%s' has no method '%.60s'", jv_type_name(self), name);
}
