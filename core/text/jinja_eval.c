/* jinja_eval: runs a program. Every node costs a step of fuel, every call a level of depth, every string its bytes.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/text/jinja_int.h"

enum { DEFAULT_STEPS = 1000000 };

typedef const struct jinja_node node;
typedef struct pl_jval val;

static val *eval(struct jinja_ev *e, node *n);
static bool run(struct jinja_ev *e, node *list);

val *ev_fail(struct jinja_ev *e, pl_status st, const char *fmt, ...)
{
    if (e->st != PL_OK)
        return NULL;
    char msg[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    e->st = pl_fail(e->err, st, "chat template, line %d: %s", e->line, msg);
    return NULL;
}

bool ev_step(struct jinja_ev *e, uint64_t n)
{
    if (e->steps < n) {
        e->steps = 0;
        ev_fail(e, PL_ERANGE, "the template takes too many steps");
        return false;
    }
    e->steps -= n;
    return e->st == PL_OK;
}

val *ev_made(struct jinja_ev *e, val *v)
{
    return v != NULL ? v : ev_fail(e, PL_ENOMEM, "the template needs too much memory");
}

val *ev_text(struct jinja_ev *e, struct jinja_text *t)
{
    e->made += t->bytes.len;
    if (e->made > 64 * e->out_bytes || t->bytes.len > e->out_bytes) {
        jt_fini(t);
        return ev_fail(e, PL_ERANGE, "the template makes too much text");
    }
    return ev_made(e, jt_take(t, e->a));
}

val *ev_string(struct jinja_ev *e, val *v)
{
    if (v->kind == JV_STR)
        return v;
    struct jinja_text t = {0};
    jt_add_value(&t, v, false, 0);
    return ev_text(e, &t);
}

val *arg_get(const struct jinja_args *a, size_t i, const char *name)
{
    for (size_t k = 0; name != NULL && k < a->n_kw; k++)
        if (strcmp(a->kw[k].name, name) == 0)
            return a->kw[k].v;
    return i < a->n ? a->v[i] : NULL;
}

/* ---- names --------------------------------------------------------------------------------------------------------- */

static bool push_scope(struct jinja_ev *e, struct jinja_scope *s)
{
    *s = (struct jinja_scope){e->scope, pl_jval_dict(e->a)};
    if (ev_made(e, s->vars) == NULL)
        return false;
    e->scope = s;
    return true;
}

/* A scope that outlives the C frame: what macros close over. */
static struct jinja_scope *heap_scope(struct jinja_ev *e)
{
    struct jinja_scope *s = pl_arena_alloc(e->a, sizeof *s);
    if (s == NULL) {
        ev_made(e, NULL);
        return NULL;
    }
    return push_scope(e, s) ? s : NULL;
}

static bool assign_name(struct jinja_ev *e, const char *name, val *v)
{
    return ev_made(e, jv_set(e->a, e->scope->vars, jv_lit(e->a, name), v) ? v : NULL) != NULL;
}

static val *lookup(struct jinja_ev *e, const char *name)
{
    static const char *const functions[] = {"range", "namespace", "dict", "raise_exception", "strftime_now"};
    for (const struct jinja_scope *s = e->scope; s != NULL; s = s->parent) {
        val *v = jv_gets(s->vars, name);
        if (v != NULL)
            return v;
    }
    for (size_t i = 0; i < PL_COUNT_OF(functions); i++)
        if (strcmp(name, functions[i]) == 0) {
            val *f = jv_new(e->a, JV_FUNC);
            if (f != NULL)
                f->func = functions[i];
            return ev_made(e, f);
        }
    return ev_made(e, jv_undef(e->a, name));
}

static bool assign(struct jinja_ev *e, node *target, val *v)
{
    if (target->kind == N_NAME)
        return assign_name(e, target->name, v);
    if (target->kind == N_ATTR) {
        val *space = eval(e, target->a);
        if (space == NULL)
            return false;
        if (space->kind != JV_SPACE) {
            ev_fail(e, PL_EFORMAT, "cannot assign attribute on non-namespace object");
            return false;
        }
        return ev_made(e, jv_set(e->a, space, jv_lit(e->a, target->name), v) ? v : NULL) != NULL;
    }
    val *items = ev_iter(e, v);
    size_t i = 0;
    for (node *t = target->list; items != NULL && t != NULL; t = t->next, i++) {
        if (i >= items->list.n)
            return ev_fail(e, PL_EFORMAT, "not enough values to unpack") != NULL;
        if (!assign(e, t, items->list.v[i]))
            return false;
    }
    if (items != NULL && i < items->list.n)
        return ev_fail(e, PL_EFORMAT, "too many values to unpack") != NULL;
    return items != NULL;
}

/* ---- slices ----------------------------------------------------------------------------------------------------------- */

/* Resolves a slice's bounds as Python does. */
static void slice_bounds(int64_t n, val *start, val *stop, int64_t step, int64_t *from, int64_t *to)
{
    int64_t lo = step > 0 ? 0 : -1, hi = step > 0 ? n : n - 1;
    int64_t bounds[2] = {step > 0 ? lo : hi, step > 0 ? hi : lo};
    val *given[2] = {start, stop};
    for (int k = 0; k < 2; k++)
        if (given[k] != NULL && given[k]->kind != JV_NONE) {
            int64_t i = jv_int(given[k]);
            i += i < 0 ? n : 0;
            bounds[k] = i < lo ? lo : i > hi ? hi : i;
        }
    *from = bounds[0];
    *to = bounds[1];
}

static val *slice(struct jinja_ev *e, node *n)
{
    val *v = eval(e, n->list), *part[3] = {NULL};
    node *nodes[3] = {n->a, n->b, n->c};
    for (int i = 0; i < 3; i++) {
        if (nodes[i] != NULL && (part[i] = eval(e, nodes[i])) == NULL)
            return NULL;
        if (part[i] != NULL && part[i]->kind != JV_NONE && part[i]->kind != JV_INT && part[i]->kind != JV_BOOL)
            return ev_fail(e, PL_EFORMAT, "slice indices must be integers or None");
    }
    if (v == NULL)
        return NULL;
    if (v->kind == JV_UNDEF)
        return ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", v->func);
    int64_t step = part[2] != NULL && part[2]->kind != JV_NONE ? jv_int(part[2]) : 1, from, to;
    if (step == 0)
        return ev_fail(e, PL_EFORMAT, "slice step cannot be zero");
    if (v->kind != JV_STR && !jv_is_seq(v))
        return ev_made(e, jv_undef(e->a, "slice"));
    val *chars = v->kind == JV_STR ? ev_iter(e, v) : v, *out = ev_made(e, jv_new(e->a, v->kind == JV_TUPLE ? JV_TUPLE : JV_LIST));
    if (chars == NULL || out == NULL)
        return NULL;
    slice_bounds((int64_t)chars->list.n, part[0], part[1], step, &from, &to);
    for (int64_t i = from; step > 0 ? i < to : i > to; i += step)
        if (!jv_push(e->a, out, chars->list.v[i]))
            return ev_made(e, NULL);
    if (v->kind != JV_STR)
        return out;
    struct jinja_text t = {0};
    for (size_t i = 0; i < out->list.n; i++)
        jt_add_str(&t, out->list.v[i]);
    return ev_text(e, &t);
}

/* ---- comparisons ------------------------------------------------------------------------------------------------------ */

static val *compare_chain(struct jinja_ev *e, node *n)
{
    val *left = eval(e, n->a);
    bool truth = true;
    for (node *o = n->list; left != NULL && o != NULL && truth; o = o->next) {
        val *right = eval(e, o->a);
        if (right == NULL)
            return NULL;
        switch (o->op) {
        case OP_EQ:
        case OP_NE: truth = jv_equal(left, right, 0) == (o->op == OP_EQ); break;
        case OP_IN:
        case OP_NOT_IN: truth = ev_contains(e, right, left) == (o->op == OP_IN); break;
        case OP_LT: truth = ev_compare(e, left, right) < 0; break;
        case OP_LE: truth = ev_compare(e, left, right) <= 0; break;
        case OP_GT: truth = ev_compare(e, left, right) > 0; break;
        default: truth = ev_compare(e, left, right) >= 0;
        }
        left = right;
    }
    return left != NULL && e->st == PL_OK ? ev_made(e, pl_jval_bool(e->a, truth)) : NULL;
}

/* ---- calls --------------------------------------------------------------------------------------------------------- */

static bool add_arg(struct jinja_ev *e, struct jinja_args *args, const char *name, val *v)
{
    if (name != NULL ? args->n_kw == PL_COUNT_OF(args->kw) : args->n == PL_COUNT_OF(args->v))
        return ev_fail(e, PL_ERANGE, "too many arguments") != NULL;
    if (name != NULL) {
        args->kw[args->n_kw].name = name;
        args->kw[args->n_kw++].v = v;
    } else {
        args->v[args->n++] = v;
    }
    return true;
}

/* *list or **dict */
static bool unpack(struct jinja_ev *e, struct jinja_args *args, bool names, val *v)
{
    val *items = !names ? ev_iter(e, v) : v->kind == JV_DICT ? v : ev_fail(e, PL_EFORMAT, "argument after ** must be a mapping");
    for (size_t i = 0; items != NULL && i < (names ? items->dict.n : items->list.n); i++) {
        const val *key = names ? items->dict.keys[i] : NULL;
        const char *name = key != NULL && key->kind == JV_STR ? pl_arena_strndup(e->a, key->str.s, key->str.n) : NULL;
        if (names && name == NULL)
            return ev_fail(e, PL_EFORMAT, "keywords must be strings") != NULL;
        if (!add_arg(e, args, name, names ? items->dict.values[i] : items->list.v[i]))
            return false;
    }
    return items != NULL;
}

static bool eval_args(struct jinja_ev *e, node *list, struct jinja_args *args)
{
    args->n = args->n_kw = 0;
    for (node *n = list; n != NULL; n = n->next) {
        val *v = eval(e, n->kind == N_KWARG ? n->a : n);
        const char *name = n->kind == N_KWARG ? n->name : NULL;
        if (v == NULL || !(name != NULL && name[0] == '*' ? unpack(e, args, name[1] == '*', v) : add_arg(e, args, name, v)))
            return false;
    }
    return true;
}

/* Runs a body and returns what it printed. */
static val *capture(struct jinja_ev *e, node *list)
{
    struct jinja_text t = {0}, *outer = e->out;
    e->out = &t;
    bool ok = run(e, list);
    e->out = outer;
    if (!ok) {
        jt_fini(&t);
        return NULL;
    }
    return ev_text(e, &t);
}

static val *call_macro(struct jinja_ev *e, const val *m, const struct jinja_args *args, val *caller)
{
    node *def = m->macro.node;
    struct jinja_scope *outer = e->scope;
    e->scope = m->macro.scope;
    val *result = NULL;
    size_t i = 0, used = 0;
    if (heap_scope(e) == NULL)
        goto out;
    for (node *p = def->list2; p != NULL; p = p->next, i++) {
        val *v = i < args->n ? args->v[i] : NULL;
        for (size_t k = 0; v == NULL && k < args->n_kw; k++)
            if (strcmp(args->kw[k].name, p->name) == 0) {
                v = args->kw[k].v;
                used++;
            }
        if (v == NULL)
            v = p->a != NULL ? eval(e, p->a) : ev_made(e, jv_undef(e->a, p->name));
        if (v == NULL || !assign_name(e, p->name, v))
            goto out;
    }
    for (size_t k = 0; k < args->n_kw; k++)
        used += strcmp(args->kw[k].name, "caller") == 0;
    if (args->n > i || used < args->n_kw) {
        ev_fail(e, PL_EFORMAT, "macro '%.60s' was called with arguments that it does not take", def->name != NULL ? def->name : "caller");
        goto out;
    }
    if (caller != NULL && !assign_name(e, "caller", caller))
        goto out;
    int flow = e->flow;
    result = capture(e, def->list);
    e->flow = flow;
out:
    e->scope = outer;
    return result;
}

static val *call_range(struct jinja_ev *e, const struct jinja_args *a)
{
    int64_t from = 0, to, step = 1;
    for (size_t i = 0; i < a->n; i++)
        if (a->v[i]->kind != JV_INT && a->v[i]->kind != JV_BOOL)
            return ev_fail(e, PL_EFORMAT, "range() takes integers");
    if (a->n < 1 || a->n > 3)
        return ev_fail(e, PL_EFORMAT, "range() takes 1 to 3 arguments");
    to = jv_int(a->v[a->n > 1]);
    if (a->n > 1)
        from = jv_int(a->v[0]);
    if (a->n > 2)
        step = jv_int(a->v[2]);
    if (step == 0)
        return ev_fail(e, PL_EFORMAT, "range() arg 3 must not be zero");
    val *out = ev_made(e, pl_jval_list(e->a));
    for (int64_t i = from; out != NULL && (step > 0 ? i < to : i > to);) {
        if (out->list.n >= 100000)
            return ev_fail(e, PL_ERANGE, "range() is too long");
        if (!ev_step(e, 1) || !jv_push(e->a, out, pl_jval_int(e->a, i)))
            return ev_made(e, NULL);
        if (__builtin_add_overflow(i, step, &i))
            break;
    }
    return out;
}

static val *call_function(struct jinja_ev *e, const char *name, const struct jinja_args *a)
{
    if (strcmp(name, "range") == 0)
        return call_range(e, a);
    if (strcmp(name, "raise_exception") == 0) {
        val *msg = arg_get(a, 0, "message"), *text = msg != NULL ? ev_string(e, msg) : NULL;
        if (text == NULL)
            return ev_fail(e, PL_EINVAL, "raise_exception");
        if (e->st == PL_OK)
            e->st = pl_fail_param(e->err, PL_EINVAL, "messages", "%.*s", (int)(text->str.n < 400 ? text->str.n : 400), text->str.s);
        return NULL;
    }
    if (strcmp(name, "strftime_now") == 0) {
        char out[256] = "", format[128];
        struct tm tm;
        val *f = arg_get(a, 0, "format");
        if (f == NULL || f->kind != JV_STR || f->str.n >= sizeof format)
            return ev_fail(e, PL_EFORMAT, "strftime_now() takes a short format");
        memcpy(format, f->str.s, f->str.n);
        format[f->str.n] = '\0';
        localtime_r(&e->now, &tm);
        size_t n = strftime(out, sizeof out, format, &tm);
        return ev_made(e, pl_jval_str(e->a, out, n, false));
    }
    val *d = ev_made(e, jv_new(e->a, strcmp(name, "namespace") == 0 ? JV_SPACE : JV_DICT));
    for (size_t i = 0; d != NULL && i < a->n; i++) {
        if (a->v[i]->kind != JV_DICT)
            return ev_fail(e, PL_ENOTSUP, "%s() takes a dict and names", name);
        for (size_t k = 0; k < a->v[i]->dict.n; k++)
            if (!jv_set(e->a, d, a->v[i]->dict.keys[k], a->v[i]->dict.values[k]))
                return ev_made(e, NULL);
    }
    for (size_t k = 0; d != NULL && k < a->n_kw; k++)
        if (!jv_set(e->a, d, jv_lit(e->a, a->kw[k].name), a->kw[k].v))
            return ev_made(e, NULL);
    return d;
}

val *ev_call(struct jinja_ev *e, val *fn, const struct jinja_args *args)
{
    if (++e->depth > PL_JINJA_MAX_DEPTH)
        return ev_fail(e, PL_ERANGE, "the template calls too deeply");
    val *r = NULL;
    if (fn->kind == JV_MACRO) {
        val *caller = NULL;
        for (size_t i = 0; i < args->n_kw; i++)
            if (strcmp(args->kw[i].name, "caller") == 0)
                caller = args->kw[i].v;
        r = call_macro(e, fn, args, caller);
    } else if (fn->kind == JV_METHOD) {
        r = jinja_method(e, fn->method.self, fn->method.name, args);
    } else if (fn->kind == JV_FUNC) {
        r = call_function(e, fn->func, args);
    } else if (fn->kind == JV_UNDEF) {
        ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", fn->func);
    } else {
        ev_fail(e, PL_EFORMAT, "'%s' object is not callable", jv_type_name(fn));
    }
    e->depth--;
    return r;
}

static val *eval_call(struct jinja_ev *e, node *n, val *caller)
{
    struct jinja_args args;
    val *fn = eval(e, n->a);
    if (fn == NULL || !eval_args(e, n->list, &args))
        return NULL;
    if (caller != NULL && args.n_kw < PL_COUNT_OF(args.kw)) {
        args.kw[args.n_kw].name = "caller";
        args.kw[args.n_kw++].v = caller;
    }
    return ev_call(e, fn, &args);
}

/* ---- expressions --------------------------------------------------------------------------------------------------- */

static val *eval_list(struct jinja_ev *e, node *n)
{
    val *out = ev_made(e, jv_new(e->a, n->kind == N_TUPLE ? JV_TUPLE : JV_LIST));
    for (node *i = n->list; out != NULL && i != NULL; i = i->next) {
        val *v = eval(e, i);
        if (v == NULL || !jv_push(e->a, out, v))
            return v == NULL ? NULL : ev_made(e, NULL);
    }
    return out;
}

static val *eval_dict(struct jinja_ev *e, node *n)
{
    val *out = ev_made(e, pl_jval_dict(e->a));
    for (node *i = n->list; out != NULL && i != NULL; i = i->next) {
        val *k = eval(e, i->a), *v = k != NULL ? eval(e, i->b) : NULL;
        if (v == NULL || !jv_set(e->a, out, k, v))
            return v == NULL ? NULL : ev_made(e, NULL);
    }
    return out;
}

static val *eval_unary(struct jinja_ev *e, node *n)
{
    val *v = eval(e, n->a);
    if (v == NULL)
        return NULL;
    if (n->kind == N_NOT)
        return ev_made(e, pl_jval_bool(e->a, !jv_truth(v)));
    if (!jv_is_num(v))
        return v->kind == JV_UNDEF ? ev_fail(e, PL_EFORMAT, "'%.60s' is undefined", v->func)
                                   : ev_fail(e, PL_EFORMAT, "bad operand type for unary %c: '%s'", n->kind == N_NEG ? '-' : '+', jv_type_name(v));
    if (n->kind == N_POS)
        return v;
    return v->kind == JV_REAL ? ev_made(e, pl_jval_real(e->a, -v->r)) : ev_binary(e, OP_SUB, ev_made(e, pl_jval_int(e->a, 0)), v);
}

static val *eval_filter(struct jinja_ev *e, node *n)
{
    struct jinja_args args;
    val *v = n->a != NULL ? eval(e, n->a) : e->piped;
    if (v == NULL || !eval_args(e, n->list, &args))
        return NULL;
    return jinja_filter(e, n->name, v, &args);
}

static val *eval_test(struct jinja_ev *e, node *n)
{
    struct jinja_args args;
    val *v = eval(e, n->a);
    if (v == NULL || !eval_args(e, n->list, &args))
        return NULL;
    bool truth = jinja_test(e, n->name, v, &args) != n->negated;
    return e->st == PL_OK ? ev_made(e, pl_jval_bool(e->a, truth)) : NULL;
}

static val *eval_kind(struct jinja_ev *e, node *n)
{
    val *a, *b;
    switch (n->kind) {
    case N_CONST: return n->value;
    case N_NAME: return lookup(e, n->name);
    case N_LIST:
    case N_TUPLE: return eval_list(e, n);
    case N_DICT: return eval_dict(e, n);
    case N_ATTR: return (a = eval(e, n->a)) != NULL ? ev_attr(e, a, n->name) : NULL;
    case N_ITEM:
        a = eval(e, n->a);
        b = a != NULL ? eval(e, n->b) : NULL;
        return b != NULL ? ev_item(e, a, b) : NULL;
    case N_SLICE: return slice(e, n);
    case N_CALL: return eval_call(e, n, NULL);
    case N_FILTER: return eval_filter(e, n);
    case N_TEST: return eval_test(e, n);
    case N_BIN:
        a = eval(e, n->a);
        b = a != NULL ? eval(e, n->b) : NULL;
        return b != NULL ? ev_binary(e, n->op, a, b) : NULL;
    case N_NOT:
    case N_NEG:
    case N_POS: return eval_unary(e, n);
    case N_AND:
    case N_OR:
        a = eval(e, n->a);
        return a == NULL || jv_truth(a) == (n->kind == N_OR) ? a : eval(e, n->b);
    case N_COND:
        b = eval(e, n->b);
        if (b == NULL)
            return NULL;
        return jv_truth(b) ? eval(e, n->a) : n->c != NULL ? eval(e, n->c) : ev_made(e, jv_undef(e->a, "inline if without else"));
    case N_CMP: return compare_chain(e, n);
    default: return ev_fail(e, PL_EFORMAT, "not an expression");
    }
}

static val *eval(struct jinja_ev *e, node *n)
{
    if (n == NULL || !ev_step(e, 1))
        return NULL;
    e->line = n->line;
    return eval_kind(e, n);
}

/* ---- statements ---------------------------------------------------------------------------------------------------- */

static bool print(struct jinja_ev *e, const val *v)
{
    jt_add_value(e->out, v, false, 0);
    if (e->out->bytes.len > e->out_bytes)
        ev_fail(e, PL_ERANGE, "the template makes too much text");
    else if (e->out->bytes.failed)
        ev_made(e, NULL);
    return e->st == PL_OK;
}

/* The items that the loop's `if` lets through. */
static val *filter_items(struct jinja_ev *e, node *n, val *items)
{
    if (n->c == NULL)
        return items;
    val *out = ev_made(e, pl_jval_list(e->a));
    for (size_t i = 0; out != NULL && i < items->list.n; i++) {
        struct jinja_scope *outer = e->scope;
        if (heap_scope(e) == NULL)
            return NULL;
        val *truth = assign(e, n->a, items->list.v[i]) ? eval(e, n->c) : NULL;
        e->scope = outer;
        if (truth == NULL || (jv_truth(truth) && !jv_push(e->a, out, items->list.v[i])))
            return NULL;
    }
    return out;
}

static bool run_for(struct jinja_ev *e, node *n)
{
    val *seq = eval(e, n->b), *items = seq != NULL ? ev_iter(e, seq) : NULL;
    if (items == NULL || (items = filter_items(e, n, items)) == NULL)
        return false;
    if (items->list.n == 0)
        return run(e, n->list2);
    val *loop = ev_made(e, jv_new(e->a, JV_LOOP));
    if (loop == NULL)
        return false;
    loop->loop.items = items;
    for (size_t i = 0; i < items->list.n && e->flow != BREAK; i++) {
        struct jinja_scope *outer = e->scope;
        loop->loop.at = i;
        if (!ev_step(e, 1) || heap_scope(e) == NULL)
            return false;
        bool ok = assign_name(e, "loop", loop) && assign(e, n->a, items->list.v[i]) && run(e, n->list);
        e->scope = outer;
        if (!ok)
            return false;
        if (e->flow == CONTINUE)
            e->flow = GO_ON;
    }
    if (e->flow == BREAK)
        e->flow = GO_ON;
    return true;
}

static bool run_if(struct jinja_ev *e, node *n)
{
    for (node *b = n->list; b != NULL; b = b->next) {
        val *truth = b->a != NULL ? eval(e, b->a) : NULL;
        if (b->a != NULL && truth == NULL)
            return false;
        if (b->a == NULL || jv_truth(truth))
            return run(e, b->list);
    }
    return true;
}

/* What a block printed, through the filters behind it. */
static val *filtered(struct jinja_ev *e, node *filter, val *text)
{
    if (text == NULL || filter == NULL)
        return text;
    val *outer = e->piped;
    e->piped = text;
    val *v = eval(e, filter);
    e->piped = outer;
    return v;
}

static val *new_macro(struct jinja_ev *e, node *n)
{
    val *m = ev_made(e, jv_new(e->a, JV_MACRO));
    if (m != NULL) {
        m->macro.node = n;
        m->macro.scope = e->scope;
    }
    return m;
}

static bool run_with(struct jinja_ev *e, node *n)
{
    struct jinja_scope *outer = e->scope;
    if (heap_scope(e) == NULL)
        return false;
    struct jinja_scope *inner = e->scope;
    bool ok = true;
    for (node *s = n->list2; ok && s != NULL; s = s->next) {
        e->scope = outer; /* values do not see each other */
        val *v = eval(e, s->b);
        e->scope = inner;
        ok = v != NULL && assign(e, s->a, v);
    }
    ok = ok && run(e, n->list);
    e->scope = outer;
    return ok;
}

static bool run_one(struct jinja_ev *e, node *n)
{
    val *v;
    switch (n->kind) {
    case N_TEXT: return print(e, n->value);
    case N_OUT: return (v = eval(e, n->a)) != NULL && print(e, v);
    case N_IF: return run_if(e, n);
    case N_FOR: return run_for(e, n);
    case N_SET: return (v = eval(e, n->b)) != NULL && assign(e, n->a, v);
    case N_SETBLOCK: return (v = filtered(e, n->b, capture(e, n->list))) != NULL && assign(e, n->a, v);
    case N_MACRO: return (v = new_macro(e, n)) != NULL && assign_name(e, n->name, v);
    case N_CALLBLOCK: return (v = new_macro(e, n)) != NULL && (v = eval_call(e, n->a, v)) != NULL && print(e, v);
    case N_FILTERBLOCK: return (v = filtered(e, n->a, capture(e, n->list))) != NULL && print(e, v);
    case N_WITH: return run_with(e, n);
    case N_BODY: return run(e, n->list);
    case N_BREAK: e->flow = BREAK; return true;
    case N_CONTINUE: e->flow = CONTINUE; return true;
    default: return ev_fail(e, PL_EFORMAT, "not a statement") != NULL;
    }
}

static bool run(struct jinja_ev *e, node *list)
{
    if (++e->depth > 2 * PL_JINJA_MAX_DEPTH)
        return ev_fail(e, PL_ERANGE, "the template calls too deeply") != NULL;
    for (node *n = list; n != NULL && e->flow == GO_ON; n = n->next) {
        e->line = n->line;
        if (!ev_step(e, 1) || !run_one(e, n))
            return false;
    }
    e->depth--;
    return true;
}

/* ---- public -------------------------------------------------------------------------------------------------------- */

pl_status pl_jinja_compile(struct pl_jinja **out, const char *source, size_t n, struct pl_err *err)
{
    struct jinja_tokens tokens = {0};
    struct pl_arena *a = pl_arena_new((size_t)64 << 20);
    struct pl_jinja *t = a != NULL ? pl_arena_zalloc(a, sizeof *t) : NULL;
    if (t == NULL) {
        pl_arena_free(a);
        return pl_fail(err, PL_ENOMEM, "no memory for the chat template");
    }
    t->arena = a;
    pl_status st = jinja_lex(a, source, n, &tokens, err);
    if (st == PL_OK)
        st = jinja_parse(a, &tokens, &t->body, err);
    if (st == PL_OK)
        *out = t;
    else
        pl_arena_free(a);
    return st;
}

void pl_jinja_free(struct pl_jinja *t)
{
    if (t != NULL)
        pl_arena_free(t->arena);
}

static size_t string_bytes(const val *v, int depth)
{
    size_t n = v->kind == JV_STR ? v->str.n : 0;
    for (size_t i = 0; jv_is_seq(v) && depth < PL_JINJA_MAX_DEPTH && i < v->list.n; i++)
        n += string_bytes(v->list.v[i], depth + 1);
    for (size_t i = 0; v->kind == JV_DICT && depth < PL_JINJA_MAX_DEPTH && i < v->dict.n; i++)
        n += string_bytes(v->dict.values[i], depth + 1);
    return n;
}

/* Cuts the text at the changes of its marks. */
static pl_status split(const val *v, struct pl_arena *a, struct pl_jinja_out *out)
{
    size_t n_pieces = 0;
    for (int pass = 0; pass < 2; pass++) {
        size_t *ends = pass == 1 ? pl_arena_alloc(a, (n_pieces + 1) * sizeof *ends) : NULL;
        bool *trusted = pass == 1 ? pl_arena_alloc(a, (n_pieces + 1) * sizeof *trusted) : NULL;
        if (pass == 1 && (ends == NULL || trusted == NULL))
            return PL_ENOMEM;
        n_pieces = 0;
        for (size_t i = 0; i < v->str.n;) {
            bool user = v->str.user != NULL && v->str.user[i];
            while (i < v->str.n && (v->str.user != NULL && v->str.user[i]) == user)
                i++;
            if (pass == 1) {
                ends[n_pieces] = i;
                trusted[n_pieces] = !user;
            }
            n_pieces++;
        }
        *out = (struct pl_jinja_out){v->str.s, v->str.n, ends, trusted, n_pieces};
    }
    return PL_OK;
}

pl_status pl_jinja_render(const struct pl_jinja *t, struct pl_jval *vars, const struct pl_jinja_limits *limits, struct pl_arena *a,
                          struct pl_jinja_out *out, struct pl_err *err)
{
    struct jinja_text text = {0};
    struct jinja_scope globals = {NULL, vars};
    struct jinja_ev e = {.a = a, .err = err, .out = &text, .scope = &globals};
    e.steps = limits != NULL && limits->steps != 0 ? limits->steps : DEFAULT_STEPS + string_bytes(vars, 0);
    e.out_bytes = limits != NULL && limits->out_bytes != 0 ? limits->out_bytes : 4 * string_bytes(vars, 0) + (1 << 20);
    e.now = limits != NULL && limits->now != NULL ? *limits->now : time(NULL);
    if (heap_scope(&e) == NULL || !run(&e, t->body->list)) {
        jt_fini(&text);
        return e.st != PL_OK ? e.st : pl_fail(err, PL_ENOMEM, "the chat template needs too much memory");
    }
    val *v = ev_text(&e, &text);
    if (v == NULL)
        return e.st;
    pl_status st = split(v, a, out);
    return st == PL_OK ? PL_OK : pl_fail(err, st, "no memory for the prompt");
}
