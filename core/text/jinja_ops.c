/* jinja_ops: operators, attributes, items and iteration, as Python has them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "core/text/jinja_int.h"

typedef struct pl_jval val;

/* ---- attributes and items ------------------------------------------------------------------------------------------ */

static val *loop_attr(struct jinja_ev *e, val *v, const char *name)
{
    size_t at = v->loop.at, n = v->loop.items->list.n;
    val **items = v->loop.items->list.v;
    static const char *const numbers[] = {"index", "index0", "revindex", "revindex0", "length", "depth", "depth0"};
    const size_t values[] = {at + 1, at, n - at, n - at - 1, n, v->loop.depth + 1, v->loop.depth};
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++)
        if (strcmp(name, numbers[i]) == 0)
            return ev_made(e, pl_jval_int(e->a, (int64_t)values[i]));
    if (strcmp(name, "first") == 0 || strcmp(name, "last") == 0)
        return ev_made(e, pl_jval_bool(e->a, name[0] == 'f' ? at == 0 : at + 1 == n));
    if (strcmp(name, "previtem") == 0)
        return at > 0 ? items[at - 1] : ev_made(e, jv_undef(e->a, name));
    if (strcmp(name, "nextitem") == 0)
        return at + 1 < n ? items[at + 1] : ev_made(e, jv_undef(e->a, name));
    return NULL;
}

static val *method(struct jinja_ev *e, val *self, const char *name)
{
    val *m = ev_made(e, jv_new(e->a, JV_METHOD));
    if (m != NULL) {
        m->method.self = self;
        m->method.name = name;
    }
    return m;
}

val *ev_attr(struct jinja_ev *e, val *v, const char *name)
{
    val *found = NULL;
    if (v->kind == JV_UNDEF)
        return ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", v->func);
    if (v->kind == JV_LOOP && (found = loop_attr(e, v, name)) != NULL)
        return found;
    if (e->st != PL_OK)
        return NULL;
    if (jinja_has_method(v, name))
        return method(e, v, name);
    if (v->kind == JV_DICT || v->kind == JV_SPACE)
        found = jv_gets(v, name);
    return found != NULL ? found : ev_made(e, jv_undef(e->a, name));
}

val *ev_item(struct jinja_ev *e, val *v, val *key)
{
    val *found = NULL;
    if (v->kind == JV_UNDEF)
        return ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", v->func);
    if ((jv_is_seq(v) || v->kind == JV_STR) && (key->kind == JV_INT || key->kind == JV_BOOL)) {
        if (v->kind == JV_STR)
            return jinja_method(e, v, "__getitem__", &(struct jinja_args){.v = {key}, .n = 1});
        int64_t i = jv_int(key), n = (int64_t)v->list.n;
        i += i < 0 ? n : 0;
        found = i >= 0 && i < n ? v->list.v[i] : NULL;
    } else if (v->kind == JV_DICT || v->kind == JV_SPACE) {
        found = jv_get(v, key);
    }
    if (found == NULL && key->kind == JV_STR && key->str.n < 64) {
        const char *name = pl_arena_strndup(e->a, key->str.s, key->str.n);
        if (name != NULL && jinja_has_method(v, name))
            return method(e, v, name);
    }
    return found != NULL ? found : ev_made(e, jv_undef(e->a, "item"));
}

val *ev_iter(struct jinja_ev *e, val *v)
{
    if (jv_is_seq(v))
        return v;
    val *out = ev_made(e, pl_jval_list(e->a));
    if (out == NULL)
        return NULL;
    bool ok = true;
    if (v->kind == JV_DICT) {
        for (size_t i = 0; i < v->dict.n; i++)
            ok &= jv_push(e->a, out, v->dict.keys[i]);
    } else if (v->kind == JV_STR) {
        for (size_t i = 0, n; i < v->str.n && ok; i += n) {
            n = 1;
            while (i + n < v->str.n && (v->str.s[i + n] & 0xc0) == 0x80)
                n++;
            if (!ev_step(e, 1))
                return NULL;
            ok = jv_push(e->a, out, jv_sub(e->a, v, i, n));
        }
    } else if (v->kind != JV_UNDEF) {
        return ev_fail(e, PL_EFORMAT, "'%s' object is not iterable", jv_type_name(v));
    }
    return ok ? out : ev_made(e, NULL);
}

/* ---- operators ----------------------------------------------------------------------------------------------------- */

static val *bad_operands(struct jinja_ev *e, const char *op, const val *a, const val *b)
{
    const val *u = a->kind == JV_UNDEF ? a : b->kind == JV_UNDEF ? b : NULL;
    if (u != NULL)
        return ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", u->func);
    return ev_fail(e, PL_EFORMAT, "unsupported operand type(s) for %s: '%s' and '%s'", op, jv_type_name(a), jv_type_name(b));
}

static val *int_result(struct jinja_ev *e, jinja_op op, int64_t a, int64_t b)
{
    int64_t r = 0;
    bool over = false;
    switch (op) {
    case OP_ADD: over = __builtin_add_overflow(a, b, &r); break;
    case OP_SUB: over = __builtin_sub_overflow(a, b, &r); break;
    case OP_MUL: over = __builtin_mul_overflow(a, b, &r); break;
    case OP_FLOOR:
    case OP_MOD:
        if (b == 0)
            return ev_fail(e, PL_EFORMAT, "integer division or modulo by zero");
        if (b == -1) {
            over = op == OP_FLOOR && __builtin_sub_overflow((int64_t)0, a, &r);
            break;
        }
        r = op == OP_FLOOR ? a / b : a % b;
        if (a % b != 0 && (a < 0) != (b < 0))
            r += op == OP_FLOOR ? -1 : b;
        break;
    default: /* OP_POW, b >= 0 */
        for (r = 1; b > 0 && !over; b >>= 1) {
            over = (b & 1) && __builtin_mul_overflow(r, a, &r);
            over |= b > 1 && __builtin_mul_overflow(a, a, &a);
        }
    }
    return over ? ev_fail(e, PL_ERANGE, "an integer is too large") : ev_made(e, pl_jval_int(e->a, r));
}

static val *real_result(struct jinja_ev *e, jinja_op op, double a, double b)
{
    if ((op == OP_DIV || op == OP_FLOOR || op == OP_MOD) && b == 0)
        return ev_fail(e, PL_EFORMAT, "division by zero");
    double r = op == OP_ADD   ? a + b
               : op == OP_SUB ? a - b
               : op == OP_MUL ? a * b
               : op == OP_DIV ? a / b
               : op == OP_POW ? pow(a, b)
                              : floor(a / b);
    if (op == OP_MOD) {
        r = fmod(a, b);
        r += r != 0 && (r < 0) != (b < 0) ? b : 0;
    }
    return ev_made(e, pl_jval_real(e->a, r));
}

static val *repeat(struct jinja_ev *e, val *v, int64_t n)
{
    n = n < 0 ? 0 : n;
    if (v->kind == JV_STR) {
        size_t total;
        struct jinja_text t = {0};
        if (__builtin_mul_overflow(v->str.n, (size_t)n, &total) || total > e->out_bytes)
            return ev_fail(e, PL_ERANGE, "the template makes too much text");
        for (int64_t i = 0; i < n && v->str.n > 0; i++)
            jt_add_str(&t, v);
        return ev_text(e, &t);
    }
    val *out = ev_made(e, jv_new(e->a, v->kind));
    if (v->list.n > 0 && n > (int64_t)(PL_JINJA_MAX_LIST / v->list.n))
        return ev_fail(e, PL_ERANGE, "a list is too long");
    for (int64_t i = 0; out != NULL && i < n; i++)
        for (size_t k = 0; k < v->list.n; k++)
            if (!ev_step(e, 1) || !jv_push(e->a, out, v->list.v[k]))
                return ev_made(e, NULL);
    return out;
}

static val *join_lists(struct jinja_ev *e, const val *a, const val *b)
{
    val *out = ev_made(e, jv_new(e->a, a->kind));
    const val *parts[] = {a, b};
    for (int p = 0; out != NULL && p < 2; p++)
        for (size_t i = 0; i < parts[p]->list.n; i++)
            if (!ev_step(e, 1) || !jv_push(e->a, out, parts[p]->list.v[i]))
                return ev_made(e, NULL);
    return out;
}

static val *concat(struct jinja_ev *e, const val *a, const val *b)
{
    struct jinja_text t = {0};
    jt_add_value(&t, a, false, 0);
    jt_add_value(&t, b, false, 0);
    return ev_text(e, &t);
}

val *ev_binary(struct jinja_ev *e, jinja_op op, val *a, val *b)
{
    static const char *const names[] = {"+", "-", "*", "/", "//", "%", "** or pow()"};
    if (op == OP_CONCAT)
        return concat(e, a, b);
    if (jv_is_num(a) && jv_is_num(b)) {
        bool real = a->kind == JV_REAL || b->kind == JV_REAL || op == OP_DIV || (op == OP_POW && jv_int(b) < 0);
        return real ? real_result(e, op, jv_real(a), jv_real(b)) : int_result(e, op, jv_int(a), jv_int(b));
    }
    if (op == OP_ADD && a->kind == JV_STR && b->kind == JV_STR)
        return concat(e, a, b);
    if (op == OP_ADD && jv_is_seq(a) && a->kind == b->kind)
        return join_lists(e, a, b);
    if (op == OP_MUL && (a->kind == JV_STR || jv_is_seq(a)) && (b->kind == JV_INT || b->kind == JV_BOOL))
        return repeat(e, a, jv_int(b));
    if (op == OP_MUL && (b->kind == JV_STR || jv_is_seq(b)) && (a->kind == JV_INT || a->kind == JV_BOOL))
        return repeat(e, b, jv_int(a));
    if (op == OP_MOD && a->kind == JV_STR) {
        struct jinja_args args = {.v = {b}, .n = 1};
        if (b->kind == JV_TUPLE) {
            args.n = b->list.n < PL_COUNT_OF(args.v) ? b->list.n : PL_COUNT_OF(args.v);
            memcpy(args.v, b->list.v, args.n * sizeof args.v[0]);
        }
        return jinja_filter(e, "format", a, &args);
    }
    return bad_operands(e, names[op], a, b);
}

int ev_compare(struct jinja_ev *e, const val *a, const val *b)
{
    if (jv_is_num(a) && jv_is_num(b)) {
        double x = jv_real(a), y = jv_real(b);
        return (x > y) - (x < y);
    }
    if (a->kind == JV_STR && b->kind == JV_STR) {
        size_t n = a->str.n < b->str.n ? a->str.n : b->str.n;
        int c = memcmp(a->str.s, b->str.s, n);
        return c != 0 ? c : (a->str.n > b->str.n) - (a->str.n < b->str.n);
    }
    if (jv_is_seq(a) && a->kind == b->kind) {
        for (size_t i = 0; i < a->list.n && i < b->list.n && ev_step(e, 1); i++)
            if (!jv_equal(a->list.v[i], b->list.v[i], 0))
                return e->depth < PL_JINJA_MAX_DEPTH ? ev_compare(e, a->list.v[i], b->list.v[i]) : 0;
        return (a->list.n > b->list.n) - (a->list.n < b->list.n);
    }
    bad_operands(e, "comparison", a, b);
    return 0;
}

bool ev_contains(struct jinja_ev *e, val *in, val *v)
{
    if (in->kind == JV_STR) {
        if (v->kind != JV_STR)
            return ev_fail(e, PL_EFORMAT, "'in <string>' requires string as left operand, not %s", jv_type_name(v)) != NULL;
        return v->str.n == 0 || (in->str.n > 0 && memmem(in->str.s, in->str.n, v->str.s, v->str.n) != NULL);
    }
    if (in->kind == JV_DICT)
        return jv_get(in, v) != NULL;
    val *items = ev_iter(e, in);
    for (size_t i = 0; items != NULL && i < items->list.n && ev_step(e, 1); i++)
        if (jv_equal(items->list.v[i], v, 0))
            return true;
    return false;
}
