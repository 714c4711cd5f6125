/* jinja_parse: from tokens to a program. Recursive descent with a depth bound; what is not supported is refused by name.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/text/jinja_int.h"

struct parser {
    struct pl_arena *a;
    const struct jinja_token *t; /* the next token */
    struct pl_err *err;
    pl_status st;
    int depth, loops;
};

typedef struct jinja_node node;

static node *fail(struct parser *p, pl_status st, const char *what, const char *extra)
{
    if (p->st == PL_OK)
        p->st = pl_fail(p->err, st, "chat template, line %d: %s%.80s", p->t->line, what, extra);
    return NULL;
}

static node *unexpected(struct parser *p, const char *expected)
{
    char what[120];
    strcpy(what, "expected ");
    strncat(what, expected, 60);
    strcat(what, ", found ");
    return fail(p, PL_EFORMAT, what, p->t->s != NULL && p->t->s[0] != '\0' ? p->t->s : "something else");
}

static node *make(struct parser *p, jinja_kind kind)
{
    node *n = pl_arena_zalloc(p->a, sizeof *n);
    if (n == NULL)
        return fail(p, PL_ENOMEM, "the template is too large", "");
    n->kind = kind;
    n->line = p->t->line;
    return n;
}

static bool is_op(const struct parser *p, const char *op)
{
    return p->t->kind == TK_OP && strcmp(p->t->s, op) == 0;
}

static bool is_word(const struct parser *p, const char *word)
{
    return p->t->kind == TK_NAME && strcmp(p->t->s, word) == 0;
}

static bool take_op(struct parser *p, const char *op)
{
    bool is = is_op(p, op);
    p->t += is;
    return is;
}

static bool take_word(struct parser *p, const char *word)
{
    bool is = is_word(p, word);
    p->t += is;
    return is;
}

static bool need_op(struct parser *p, const char *op)
{
    if (take_op(p, op))
        return true;
    unexpected(p, op);
    return false;
}

static void append(node **list, node *n)
{
    while (*list != NULL)
        list = &(*list)->next;
    *list = n;
}

/* ---- expressions --------------------------------------------------------------------------------------------------- */

static node *expression(struct parser *p);
static node *unary(struct parser *p, bool filters);

static bool enter(struct parser *p)
{
    if (++p->depth <= PL_JINJA_MAX_DEPTH)
        return true;
    fail(p, PL_ERANGE, "the template is nested too deeply", "");
    return false;
}

static node *constant(struct parser *p, struct pl_jval *v)
{
    node *n = make(p, N_CONST);
    if (n == NULL || v == NULL)
        return fail(p, PL_ENOMEM, "the template is too large", "");
    n->value = v;
    return n;
}

/* Elements up to `close`; a comma may end them. *comma: there was one. */
static node *elements(struct parser *p, const char *close, bool *comma)
{
    node *list = NULL;
    *comma = false;
    while (p->st == PL_OK && !is_op(p, close)) {
        append(&list, expression(p));
        if (!take_op(p, ","))
            break;
        *comma = true;
    }
    need_op(p, close);
    return list;
}

static node *dict(struct parser *p)
{
    node *d = make(p, N_DICT);
    while (d != NULL && p->st == PL_OK && !is_op(p, "}")) {
        node *pair = make(p, N_PAIR);
        if (pair == NULL)
            return NULL;
        pair->a = expression(p);
        if (!need_op(p, ":"))
            return NULL;
        pair->b = expression(p);
        append(&d->list, pair);
        if (!take_op(p, ","))
            break;
    }
    need_op(p, "}");
    return d;
}

static node *strings(struct parser *p)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    for (; p->t->kind == TK_STR; p->t++)
        pl_buf_add(&b, p->t->s, p->t->n);
    node *n = constant(p, pl_jval_str(p->a, pl_buf_str(&b), b.len, false));
    pl_buf_fini(&b);
    return n;
}

static node *primary(struct parser *p)
{
    const struct jinja_token *t = p->t;
    bool comma;
    if (t->kind == TK_STR)
        return strings(p);
    if (t->kind == TK_INT || t->kind == TK_REAL) {
        p->t++;
        return constant(p, t->kind == TK_INT ? pl_jval_int(p->a, t->i) : pl_jval_real(p->a, t->r));
    }
    if (t->kind == TK_NAME) {
        p->t++;
        if (strcmp(t->s, "true") == 0 || strcmp(t->s, "True") == 0 || strcmp(t->s, "false") == 0 || strcmp(t->s, "False") == 0)
            return constant(p, pl_jval_bool(p->a, (t->s[0] | 32) == 't'));
        if (strcmp(t->s, "none") == 0 || strcmp(t->s, "None") == 0)
            return constant(p, pl_jval_none(p->a));
        node *n = make(p, N_NAME);
        if (n != NULL)
            n->name = t->s;
        return n;
    }
    if (take_op(p, "(")) {
        node *list = elements(p, ")", &comma);
        if (list != NULL && list->next == NULL && !comma)
            return list;
        node *n = make(p, N_TUPLE);
        if (n != NULL)
            n->list = list;
        return n;
    }
    if (take_op(p, "[")) {
        node *n = make(p, N_LIST);
        if (n != NULL)
            n->list = elements(p, "]", &comma);
        return n;
    }
    if (take_op(p, "{"))
        return dict(p);
    return unexpected(p, "an expression");
}

static node *arguments(struct parser *p)
{
    node *list = NULL;
    while (p->st == PL_OK && !is_op(p, ")")) {
        node *arg;
        if (is_op(p, "*") || is_op(p, "**")) { /* a list's or a dict's items as arguments */
            if ((arg = make(p, N_KWARG)) == NULL)
                return NULL;
            arg->name = p->t->s;
            p->t++;
            arg->a = expression(p);
        } else if (p->t->kind == TK_NAME && p->t[1].kind == TK_OP && strcmp(p->t[1].s, "=") == 0) {
            if ((arg = make(p, N_KWARG)) == NULL)
                return NULL;
            arg->name = p->t->s;
            p->t += 2;
            arg->a = expression(p);
        } else {
            arg = expression(p);
        }
        append(&list, arg);
        if (!take_op(p, ","))
            break;
    }
    need_op(p, ")");
    return list;
}

static node *subscript(struct parser *p, node *of)
{
    node *n = make(p, N_ITEM), *parts[3] = {NULL};
    if (n == NULL)
        return NULL;
    n->a = of;
    size_t colons = 0;
    while (p->st == PL_OK && !is_op(p, "]")) {
        if (take_op(p, ":")) {
            if (++colons > 2)
                return unexpected(p, "]");
        } else {
            parts[colons] = expression(p);
        }
    }
    need_op(p, "]");
    if (colons == 0) {
        n->b = parts[0];
        return n->b != NULL ? n : unexpected(p, "a subscript");
    }
    n->kind = N_SLICE;
    n->list = of;
    n->a = parts[0];
    n->b = parts[1];
    n->c = parts[2];
    return n;
}

static node *postfix(struct parser *p, node *n)
{
    while (p->st == PL_OK && n != NULL) {
        node *of = n;
        if (take_op(p, ".")) {
            if (p->t->kind != TK_NAME && p->t->kind != TK_INT)
                return unexpected(p, "an attribute's name");
            if (p->t->kind == TK_INT) {
                n = make(p, N_ITEM);
                if (n != NULL)
                    n->b = constant(p, pl_jval_int(p->a, p->t->i));
            } else if ((n = make(p, N_ATTR)) != NULL) {
                n->name = p->t->s;
            }
            p->t++;
            if (n != NULL)
                n->a = of;
        } else if (take_op(p, "[")) {
            n = subscript(p, of);
        } else if (take_op(p, "(")) {
            if ((n = make(p, N_CALL)) != NULL) {
                n->a = of;
                n->list = arguments(p);
            }
        } else {
            break;
        }
    }
    return n;
}

static node *filter(struct parser *p, node *of)
{
    node *n = make(p, N_FILTER);
    if (n == NULL || p->t->kind != TK_NAME)
        return unexpected(p, "a filter's name");
    n->a = of;
    n->name = p->t->s;
    if (!jinja_is_filter(n->name))
        return fail(p, PL_ENOTSUP, "the filter is not supported: ", n->name);
    p->t++;
    if (take_op(p, "("))
        n->list = arguments(p);
    return n;
}

static node *test(struct parser *p, node *of)
{
    node *n = make(p, N_TEST);
    if (n == NULL)
        return NULL;
    n->a = of;
    n->negated = take_word(p, "not");
    if (p->t->kind != TK_NAME)
        return unexpected(p, "a test's name");
    n->name = p->t->s;
    if (!jinja_is_test(n->name))
        return fail(p, PL_ENOTSUP, "the test is not supported: ", n->name);
    p->t++;
    static const char *const no_argument[] = {"else", "or", "and", "is", "if", "not", "in"};
    bool argument = p->t->kind == TK_NAME || p->t->kind == TK_STR || p->t->kind == TK_INT || p->t->kind == TK_REAL || is_op(p, "[") || is_op(p, "{");
    for (size_t i = 0; i < PL_COUNT_OF(no_argument); i++)
        argument &= !is_word(p, no_argument[i]);
    if (take_op(p, "("))
        n->list = arguments(p);
    else if (argument)
        n->list = postfix(p, primary(p));
    return n;
}

static node *filters_and_tests(struct parser *p, node *n)
{
    while (p->st == PL_OK && n != NULL) {
        if (take_op(p, "|"))
            n = filter(p, n);
        else if (take_word(p, "is"))
            n = test(p, n);
        else if (is_op(p, "("))
            n = postfix(p, n);
        else
            break;
    }
    return n;
}

static node *unary(struct parser *p, bool with_filters)
{
    if (!enter(p))
        return NULL;
    node *n;
    if (is_op(p, "-") || is_op(p, "+")) {
        bool minus = is_op(p, "-");
        p->t++;
        n = make(p, minus ? N_NEG : N_POS);
        if (n != NULL)
            n->a = unary(p, false);
    } else {
        n = primary(p);
    }
    n = postfix(p, n);
    if (with_filters)
        n = filters_and_tests(p, n);
    p->depth--;
    return n;
}

static node *binary(struct parser *p, jinja_op op, node *a, node *b)
{
    node *n = make(p, N_BIN);
    if (n != NULL) {
        n->op = op;
        n->a = a;
        n->b = b;
    }
    return n;
}

static node *power(struct parser *p)
{
    node *n = unary(p, true);
    while (p->st == PL_OK && take_op(p, "**"))
        n = binary(p, OP_POW, n, unary(p, true));
    return n;
}

static node *product(struct parser *p)
{
    static const struct {
        const char *s;
        jinja_op op;
    } ops[] = {{"*", OP_MUL}, {"/", OP_DIV}, {"//", OP_FLOOR}, {"%", OP_MOD}};
    node *n = power(p);
    for (size_t i = 0; p->st == PL_OK && i < PL_COUNT_OF(ops);) {
        if (!take_op(p, ops[i].s)) {
            i++;
            continue;
        }
        n = binary(p, ops[i].op, n, power(p));
        i = 0;
    }
    return n;
}

static node *concat(struct parser *p)
{
    node *n = product(p);
    while (p->st == PL_OK && take_op(p, "~"))
        n = binary(p, OP_CONCAT, n, product(p));
    return n;
}

static node *sum(struct parser *p)
{
    node *n = concat(p);
    while (p->st == PL_OK && (is_op(p, "+") || is_op(p, "-"))) {
        bool plus = is_op(p, "+");
        p->t++;
        n = binary(p, plus ? OP_ADD : OP_SUB, n, concat(p));
    }
    return n;
}

static bool comparison(struct parser *p, jinja_op *op)
{
    static const struct {
        const char *s;
        jinja_op op;
    } ops[] = {{"==", OP_EQ}, {"!=", OP_NE}, {"<", OP_LT}, {"<=", OP_LE}, {">", OP_GT}, {">=", OP_GE}};
    for (size_t i = 0; i < PL_COUNT_OF(ops); i++)
        if (take_op(p, ops[i].s)) {
            *op = ops[i].op;
            return true;
        }
    if (take_word(p, "in")) {
        *op = OP_IN;
        return true;
    }
    if (is_word(p, "not") && p->t[1].kind == TK_NAME && strcmp(p->t[1].s, "in") == 0) {
        p->t += 2;
        *op = OP_NOT_IN;
        return true;
    }
    return false;
}

static node *compare(struct parser *p)
{
    node *n = sum(p), *chain = NULL;
    jinja_op op;
    while (p->st == PL_OK && comparison(p, &op)) {
        if (chain == NULL) {
            if ((chain = make(p, N_CMP)) == NULL)
                return NULL;
            chain->a = n;
        }
        node *operand = make(p, N_OPERAND);
        if (operand == NULL)
            return NULL;
        operand->op = op;
        operand->a = sum(p);
        append(&chain->list, operand);
    }
    return chain != NULL ? chain : n;
}

static node *not_expr(struct parser *p)
{
    if (!take_word(p, "not"))
        return compare(p);
    if (!enter(p))
        return NULL;
    node *n = make(p, N_NOT);
    if (n != NULL)
        n->a = not_expr(p);
    p->depth--;
    return n;
}

static node *and_expr(struct parser *p)
{
    node *n = not_expr(p);
    while (p->st == PL_OK && take_word(p, "and")) {
        node *both = make(p, N_AND);
        if (both == NULL)
            return NULL;
        both->a = n;
        both->b = not_expr(p);
        n = both;
    }
    return n;
}

static node *or_expr(struct parser *p)
{
    node *n = and_expr(p);
    while (p->st == PL_OK && take_word(p, "or")) {
        node *either = make(p, N_OR);
        if (either == NULL)
            return NULL;
        either->a = n;
        either->b = and_expr(p);
        n = either;
    }
    return n;
}

static node *expression(struct parser *p)
{
    if (!enter(p))
        return NULL;
    node *n = or_expr(p);
    while (p->st == PL_OK && take_word(p, "if")) {
        node *choice = make(p, N_COND);
        if (choice == NULL)
            return NULL;
        choice->a = n;
        choice->b = or_expr(p);
        if (take_word(p, "else"))
            choice->c = expression(p);
        n = choice;
    }
    p->depth--;
    return n;
}

/* An expression, or several with commas between: a tuple. no_cond: what stands before a loop's `if`. */
static node *tuple_or_one(struct parser *p, bool no_cond)
{
    node *first = no_cond ? or_expr(p) : expression(p);
    if (!is_op(p, ","))
        return first;
    node *n = make(p, N_TUPLE);
    if (n == NULL)
        return NULL;
    n->list = first;
    while (p->st == PL_OK && take_op(p, ",")) {
        if (p->t->kind == TK_BLOCK_END || p->t->kind == TK_VAR_END || is_op(p, "="))
            break;
        append(&n->list, no_cond ? or_expr(p) : expression(p));
    }
    return n;
}

/* ---- statements ---------------------------------------------------------------------------------------------------- */

static node *body(struct parser *p, const char *const *ends);

static bool need_end(struct parser *p)
{
    if (p->t->kind == TK_BLOCK_END) {
        p->t++;
        return true;
    }
    unexpected(p, "the end of the tag");
    return false;
}

/* The body up to {% end %}, both taken. */
static node *block_body(struct parser *p, const char *end)
{
    const char *const ends[] = {end, NULL};
    if (!need_end(p))
        return NULL;
    node *list = body(p, ends);
    if (p->st != PL_OK)
        return NULL;
    p->t++;
    if (strcmp(end, "endmacro") == 0 || strcmp(end, "endblock") == 0) /* the name may be repeated */
        p->t += p->t->kind == TK_NAME;
    need_end(p);
    return list;
}

static node *if_statement(struct parser *p)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    node *n = make(p, N_IF);
    for (bool more = n != NULL, last = false; more && p->st == PL_OK;) {
        node *branch = make(p, N_BRANCH);
        if (branch == NULL)
            return NULL;
        if (!last)
            branch->a = expression(p);
        if (!need_end(p))
            return NULL;
        branch->list = body(p, ends);
        if (p->st != PL_OK)
            return NULL;
        append(&n->list, branch);
        if (last && !is_word(p, "endif"))
            return unexpected(p, "endif");
        more = !is_word(p, "endif");
        last = is_word(p, "else");
        p->t++;
    }
    return p->st == PL_OK && need_end(p) ? n : NULL;
}

static bool is_target(const node *n)
{
    if (n->kind == N_TUPLE || n->kind == N_LIST) {
        for (const node *e = n->list; e != NULL; e = e->next)
            if (!is_target(e))
                return false;
        return true;
    }
    return n->kind == N_NAME || (n->kind == N_ATTR && n->a->kind == N_NAME);
}

/* Names with commas between, up to `in` or `=`; no operators, so that `in` is not taken for one. */
static node *target(struct parser *p)
{
    node *first = postfix(p, primary(p));
    if (first != NULL && is_op(p, ",")) {
        node *n = make(p, N_TUPLE);
        if (n == NULL)
            return NULL;
        n->list = first;
        while (p->st == PL_OK && take_op(p, ",") && (p->t->kind == TK_NAME || is_op(p, "(")))
            append(&n->list, postfix(p, primary(p)));
        first = n;
    }
    if (first != NULL && p->st == PL_OK && !is_target(first))
        return fail(p, PL_EFORMAT, "this cannot be assigned to", "");
    return first;
}

static node *for_statement(struct parser *p)
{
    static const char *const ends[] = {"else", "endfor", NULL}, *const end[] = {"endfor", NULL};
    node *n = make(p, N_FOR);
    if (n == NULL)
        return NULL;
    n->a = target(p);
    if (!take_word(p, "in"))
        return unexpected(p, "in");
    n->b = tuple_or_one(p, true);
    if (take_word(p, "if"))
        n->c = expression(p);
    if (is_word(p, "recursive"))
        return fail(p, PL_ENOTSUP, "recursive loops are not supported", "");
    if (!need_end(p))
        return NULL;
    p->loops++;
    n->list = body(p, ends);
    p->loops--;
    if (p->st != PL_OK)
        return NULL;
    if (take_word(p, "else")) {
        if (!need_end(p))
            return NULL;
        n->list2 = body(p, end);
        if (p->st != PL_OK)
            return NULL;
    }
    p->t++;
    return need_end(p) ? n : NULL;
}

static node *set_statement(struct parser *p)
{
    node *n = make(p, N_SET);
    if (n == NULL)
        return NULL;
    n->a = target(p);
    if (take_op(p, "=")) {
        n->b = tuple_or_one(p, false);
        return need_end(p) ? n : NULL;
    }
    n->kind = N_SETBLOCK;
    while (p->st == PL_OK && take_op(p, "|"))
        n->b = filter(p, n->b);
    n->list = block_body(p, "endset");
    return n;
}

static node *parameters(struct parser *p)
{
    node *list = NULL;
    while (p->st == PL_OK && !is_op(p, ")")) {
        node *param = make(p, N_PARAM);
        if (param == NULL || p->t->kind != TK_NAME)
            return unexpected(p, "a parameter's name");
        param->name = p->t->s;
        p->t++;
        if (take_op(p, "="))
            param->a = expression(p);
        append(&list, param);
        if (!take_op(p, ","))
            break;
    }
    need_op(p, ")");
    return list;
}

static node *macro_statement(struct parser *p)
{
    node *n = make(p, N_MACRO);
    if (n == NULL || p->t->kind != TK_NAME)
        return unexpected(p, "the macro's name");
    n->name = p->t->s;
    p->t++;
    if (!need_op(p, "("))
        return NULL;
    n->list2 = parameters(p);
    int loops = p->loops;
    p->loops = 0;
    n->list = block_body(p, "endmacro");
    p->loops = loops;
    return n;
}

static node *call_statement(struct parser *p)
{
    node *n = make(p, N_CALLBLOCK);
    if (n == NULL)
        return NULL;
    if (take_op(p, "("))
        n->list2 = parameters(p);
    n->a = unary(p, false);
    if (n->a == NULL || n->a->kind != N_CALL)
        return unexpected(p, "a macro's call");
    n->list = block_body(p, "endcall");
    return n;
}

static node *filter_statement(struct parser *p)
{
    node *n = make(p, N_FILTERBLOCK);
    if (n == NULL)
        return NULL;
    do
        n->a = filter(p, n->a);
    while (p->st == PL_OK && take_op(p, "|"));
    n->list = block_body(p, "endfilter");
    return n;
}

static node *with_statement(struct parser *p)
{
    node *n = make(p, N_WITH);
    while (n != NULL && p->st == PL_OK && p->t->kind != TK_BLOCK_END) {
        node *set = make(p, N_SET);
        if (set == NULL)
            return NULL;
        set->a = target(p);
        if (!need_op(p, "="))
            return NULL;
        set->b = expression(p);
        append(&n->list2, set);
        if (!take_op(p, ","))
            break;
    }
    if (n != NULL)
        n->list = block_body(p, "endwith");
    return n;
}

static node *generation_statement(struct parser *p)
{
    node *n = make(p, N_BODY);
    if (n != NULL)
        n->list = block_body(p, "endgeneration");
    return n;
}

static node *flow_statement(struct parser *p, jinja_kind kind)
{
    node *n = make(p, kind);
    if (p->loops == 0)
        return fail(p, PL_EFORMAT, "break and continue stand inside loops only", "");
    return need_end(p) ? n : NULL;
}

static node *statement(struct parser *p)
{
    static const struct {
        const char *name;
        node *(*parse)(struct parser *p);
    } statements[] = {{"if", if_statement},       {"for", for_statement},       {"set", set_statement},   {"macro", macro_statement},
                      {"call", call_statement},   {"filter", filter_statement}, {"with", with_statement}, {"generation", generation_statement}};
    if (p->t->kind != TK_NAME)
        return unexpected(p, "a statement");
    for (size_t i = 0; i < PL_COUNT_OF(statements); i++)
        if (take_word(p, statements[i].name))
            return statements[i].parse(p);
    if (take_word(p, "break"))
        return flow_statement(p, N_BREAK);
    if (take_word(p, "continue"))
        return flow_statement(p, N_CONTINUE);
    return fail(p, PL_ENOTSUP, "the tag is unknown or not supported: ", p->t->s);
}

/* Up to one of the tags in `ends`, whose name is the next token then; NULL = up to the end of the template. */
static node *body(struct parser *p, const char *const *ends)
{
    node *list = NULL, **tail = &list;
    if (!enter(p))
        return NULL;
    while (p->st == PL_OK && p->t->kind != TK_EOF) {
        node *n = NULL;
        if (p->t->kind == TK_TEXT) {
            n = make(p, N_TEXT);
            if (n != NULL && (n->value = jv_new(p->a, JV_STR)) != NULL) {
                n->value->str.s = p->t->s;
                n->value->str.n = p->t->n;
            }
            p->t++;
        } else if (p->t->kind == TK_VAR) {
            p->t++;
            n = make(p, N_OUT);
            if (n != NULL)
                n->a = tuple_or_one(p, false);
            if (p->st == PL_OK && p->t->kind != TK_VAR_END)
                return unexpected(p, "}}");
            p->t++;
        } else {
            p->t++; /* {% */
            for (size_t i = 0; ends != NULL && ends[i] != NULL; i++)
                if (is_word(p, ends[i])) {
                    p->depth--;
                    return list;
                }
            n = statement(p);
        }
        if (n == NULL)
            return fail(p, PL_ENOMEM, "the template is too large", "");
        *tail = n;
        tail = &n->next;
    }
    if (ends != NULL && p->st == PL_OK)
        return unexpected(p, ends[0]);
    p->depth--;
    return list;
}

pl_status jinja_parse(struct pl_arena *a, const struct jinja_tokens *tokens, struct jinja_node **out, struct pl_err *err)
{
    struct parser p = {.a = a, .t = tokens->v, .err = err};
    *out = make(&p, N_BODY);
    if (*out != NULL)
        (*out)->list = body(&p, NULL);
    return p.st;
}
