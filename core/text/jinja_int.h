/* jinja_int: what the interpreter's files share. See jinja.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_JINJA_INT_H
#define PL_TEXT_JINJA_INT_H

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/text/jinja.h"

enum { PL_JINJA_MAX_DEPTH = 100, PL_JINJA_MAX_LIST = 1 << 20 };

/* ---- values -------------------------------------------------------------------------------------------------------- */

typedef enum { JV_UNDEF, JV_NONE, JV_BOOL, JV_INT, JV_REAL, JV_STR, JV_LIST, JV_TUPLE, JV_DICT, JV_SPACE, JV_LOOP, JV_MACRO, JV_METHOD, JV_FUNC } pl_jkind;

struct jinja_ev;
struct jinja_node;
struct jinja_scope;

struct pl_jval {
    pl_jkind kind;
    union {
        bool b;
        int64_t i;
        double r;
        struct {
            const char *s;
            size_t n;
            const unsigned char *user; /* NULL = all trusted; else one byte per byte */
        } str;
        struct {
            struct pl_jval **v;
            size_t n, cap;
        } list; /* JV_LIST, JV_TUPLE */
        struct {
            struct pl_jval **keys, **values;
            size_t n, cap;
        } dict; /* JV_DICT, JV_SPACE (namespace) */
        struct {
            struct pl_jval *items; /* a list */
            size_t at, depth;
            struct pl_jval *last; /* what changed() saw */
        } loop;
        struct {
            const struct jinja_node *node;
            struct jinja_scope *scope;
        } macro;
        struct {
            struct pl_jval *self;
            const char *name;
        } method;
        const char *func; /* a global function's name; for JV_UNDEF the missing name */
    };
};

struct pl_jval *jv_new(struct pl_arena *a, pl_jkind kind);
struct pl_jval *jv_undef(struct pl_arena *a, const char *name);
struct pl_jval *jv_lit(struct pl_arena *a, const char *s); /* trusted, not copied */
struct pl_jval *jv_sub(struct pl_arena *a, const struct pl_jval *s, size_t from, size_t n); /* shares the bytes */
struct pl_jval *jv_get(const struct pl_jval *dict, const struct pl_jval *key); /* NULL = absent */
struct pl_jval *jv_gets(const struct pl_jval *dict, const char *key);
bool jv_set(struct pl_arena *a, struct pl_jval *dict, struct pl_jval *key, struct pl_jval *v);
bool jv_push(struct pl_arena *a, struct pl_jval *list, struct pl_jval *v);
bool jv_truth(const struct pl_jval *v);
bool jv_equal(const struct pl_jval *a, const struct pl_jval *b, int depth);
bool jv_is_seq(const struct pl_jval *v);
static inline bool jv_is_num(const struct pl_jval *v)
{
    return v->kind == JV_INT || v->kind == JV_REAL || v->kind == JV_BOOL;
}
static inline double jv_real(const struct pl_jval *v)
{
    return v->kind == JV_REAL ? v->r : v->kind == JV_INT ? (double)v->i : (double)v->b;
}
static inline int64_t jv_int(const struct pl_jval *v)
{
    return v->kind == JV_INT ? v->i : v->kind == JV_BOOL ? v->b : 0;
}
const char *jv_type_name(const struct pl_jval *v);
bool jv_is(const struct pl_jval *v, const char *s); /* a string equal to s */

/* Text being built, with its marks. */
struct jinja_text {
    struct pl_buf bytes, user;
    bool any_user;
};
void jt_add(struct jinja_text *t, const char *s, size_t n, bool user);
void jt_add_str(struct jinja_text *t, const struct pl_jval *str);
void jt_add_value(struct jinja_text *t, const struct pl_jval *v, bool repr, int depth); /* Python's str() or repr() */
struct pl_jval *jt_take(struct jinja_text *t, struct pl_arena *a); /* NULL = memory out; t is empty afterwards */
void jt_fini(struct jinja_text *t);
void jv_add_real(struct pl_buf *b, double v); /* Python's repr of a float */
/* json.dumps(v, ensure_ascii=False); indent < 0 = none. False: a value that is no JSON. */
bool jv_to_json(struct jinja_text *t, const struct pl_jval *v, int indent, bool sort, const char *item_sep, const char *key_sep, int depth);

/* ---- program ------------------------------------------------------------------------------------------------------- */

typedef enum {
    N_TEXT, N_OUT, N_IF, N_BRANCH, N_FOR, N_SET, N_SETBLOCK, N_MACRO, N_PARAM, N_CALLBLOCK, N_FILTERBLOCK, N_WITH, N_BREAK, N_CONTINUE, N_BODY,
    N_CONST, N_NAME, N_LIST, N_TUPLE, N_DICT, N_PAIR, N_ATTR, N_ITEM, N_SLICE, N_CALL, N_KWARG, N_FILTER, N_TEST, N_BIN, N_NOT, N_NEG, N_POS, N_AND,
    N_OR, N_COND, N_CMP, N_OPERAND
} jinja_kind;

typedef enum { OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_FLOOR, OP_MOD, OP_POW, OP_CONCAT, OP_EQ, OP_NE, OP_LT, OP_LE, OP_GT, OP_GE, OP_IN, OP_NOT_IN } jinja_op;

struct jinja_node {
    jinja_kind kind;
    jinja_op op;
    bool negated;
    int line;
    const char *name;
    struct pl_jval *value;
    struct jinja_node *a, *b, *c;
    struct jinja_node *list;  /* first child: arguments, elements, body */
    struct jinja_node *list2; /* parameters; a loop's else */
    struct jinja_node *next;  /* sibling */
};

struct pl_jinja {
    struct pl_arena *arena;
    struct jinja_node *body;
};

/* Tokens of a template, from the lexer. */
typedef enum { TK_TEXT, TK_BLOCK, TK_BLOCK_END, TK_VAR, TK_VAR_END, TK_NAME, TK_STR, TK_INT, TK_REAL, TK_OP, TK_EOF } jinja_tk;

struct jinja_token {
    jinja_tk kind;
    int line;
    const char *s; /* name, operator or text; NUL-terminated */
    size_t n;
    int64_t i;
    double r;
};

struct jinja_tokens {
    struct jinja_token *v; /* in the arena */
    size_t n, cap;
};

pl_status jinja_lex(struct pl_arena *a, const char *source, size_t n, struct jinja_tokens *out, struct pl_err *err) PL_MUST_CHECK;
pl_status jinja_parse(struct pl_arena *a, const struct jinja_tokens *tokens, struct jinja_node **body, struct pl_err *err) PL_MUST_CHECK;

/* ---- evaluation ---------------------------------------------------------------------------------------------------- */

struct jinja_scope {
    struct jinja_scope *parent;
    struct pl_jval *vars; /* dict */
};

struct jinja_ev {
    struct pl_arena *a;
    struct pl_err *err;
    pl_status st; /* the first failure */
    uint64_t steps;
    size_t out_bytes, made; /* bound, and bytes of all strings made so far */
    int depth, line;
    struct jinja_scope *scope;
    struct jinja_text *out;
    struct pl_jval *piped; /* what a filter block filters */
    enum { GO_ON, BREAK, CONTINUE } flow;
    time_t now;
};

/* Sets the failure (the first one stands) and returns NULL. */
struct pl_jval *ev_fail(struct jinja_ev *e, pl_status st, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
bool ev_step(struct jinja_ev *e, uint64_t n); /* false = fuel is out */
/* v, or a failure when memory is out. */
struct pl_jval *ev_made(struct jinja_ev *e, struct pl_jval *v);
struct pl_jval *ev_text(struct jinja_ev *e, struct jinja_text *t); /* takes t as a value; bounded */

struct jinja_args {
    struct pl_jval *v[16];
    size_t n;
    struct {
        const char *name;
        struct pl_jval *v;
    } kw[16];
    size_t n_kw;
};
/* Argument number i or of that name; NULL = not given. */
struct pl_jval *arg_get(const struct jinja_args *a, size_t i, const char *name);

struct pl_jval *ev_call(struct jinja_ev *e, struct pl_jval *fn, const struct jinja_args *args);
struct pl_jval *ev_attr(struct jinja_ev *e, struct pl_jval *v, const char *name);
struct pl_jval *ev_item(struct jinja_ev *e, struct pl_jval *v, struct pl_jval *key);
struct pl_jval *ev_iter(struct jinja_ev *e, struct pl_jval *v); /* a list of what iterating v gives */
struct pl_jval *ev_binary(struct jinja_ev *e, jinja_op op, struct pl_jval *a, struct pl_jval *b);
int ev_compare(struct jinja_ev *e, const struct pl_jval *a, const struct pl_jval *b); /* <0, 0, >0; fails for mixed types */
bool ev_contains(struct jinja_ev *e, struct pl_jval *haystack, struct pl_jval *needle);
struct pl_jval *ev_string(struct jinja_ev *e, struct pl_jval *v); /* str(v) */

bool jinja_is_filter(const char *name);
bool jinja_is_test(const char *name);
bool jinja_has_method(const struct pl_jval *v, const char *name);
struct pl_jval *jinja_filter(struct jinja_ev *e, const char *name, struct pl_jval *v, const struct jinja_args *args);
bool jinja_test(struct jinja_ev *e, const char *name, struct pl_jval *v, const struct jinja_args *args);
struct pl_jval *jinja_method(struct jinja_ev *e, struct pl_jval *self, const char *name, const struct jinja_args *args);

#endif
