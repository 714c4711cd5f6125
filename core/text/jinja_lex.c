/* jinja_lex: cuts a template into text and the tokens of its tags, with white space control: a minus strips, trim_blocks
 * and lstrip_blocks are on, a plus switches them off for one tag; one newline at the template's end is dropped.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/text/jinja_int.h"

struct lexer {
    struct pl_arena *a;
    struct jinja_tokens *out;
    struct pl_err *err;
    const char *s;
    size_t n, at;
    int line;
    bool line_start; /* the last tag took the newline behind it with it, or nothing came yet */
};

static pl_status bad(struct lexer *l, const char *what)
{
    return pl_fail(l->err, PL_EFORMAT, "chat template, line %d: %s", l->line, what);
}

static pl_status push(struct lexer *l, struct jinja_token t)
{
    struct jinja_tokens *o = l->out;
    if (o->n == o->cap) {
        size_t cap = o->cap ? 2 * o->cap : 256;
        struct jinja_token *v = pl_arena_alloc(l->a, cap * sizeof *v);
        if (v == NULL)
            return pl_fail(l->err, PL_ENOMEM, "the chat template is too large");
        if (o->n > 0)
            memcpy(v, o->v, o->n * sizeof *v);
        o->v = v;
        o->cap = cap;
    }
    t.line = l->line;
    o->v[o->n++] = t;
    return PL_OK;
}

static pl_status push_copy(struct lexer *l, jinja_tk kind, const char *s, size_t n)
{
    char *copy = pl_arena_strndup(l->a, s, n);
    return copy != NULL ? push(l, (struct jinja_token){.kind = kind, .s = copy, .n = n}) : pl_fail(l->err, PL_ENOMEM, "the chat template is too large");
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static void count_lines(struct lexer *l, size_t to)
{
    for (; l->at < to; l->at++)
        l->line += l->s[l->at] == '\n';
}

/* ---- inside a tag -------------------------------------------------------------------------------------------------- */

static pl_status lex_string(struct lexer *l)
{
    char quote = l->s[l->at];
    struct pl_buf b;
    pl_buf_init(&b, 0);
    size_t i = l->at + 1;
    for (; i < l->n && l->s[i] != quote; i++) {
        if (l->s[i] != '\\' || i + 1 >= l->n) {
            pl_buf_addc(&b, l->s[i]);
            continue;
        }
        char c = l->s[++i], hex[9] = {0};
        size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
        const char *plain = c != '\0' ? strchr("n\nt\tr\r\\\\'\'\"\"a\ab\bf\fv\v", c) : NULL;
        if (digits > 0 && i + digits < l->n) {
            char utf8[4];
            memcpy(hex, l->s + i + 1, digits);
            pl_buf_add(&b, utf8, pl_utf8_encode((uint32_t)strtoul(hex, NULL, 16), utf8));
            i += digits;
        } else if (c == '0') {
            pl_buf_addc(&b, '\0');
        } else if (plain != NULL && strchr("ntr\\'\"abfv", c) != NULL) {
            pl_buf_addc(&b, plain[1]);
        } else if (c != '\n') {
            pl_buf_addc(&b, '\\');
            pl_buf_addc(&b, c);
        }
    }
    if (i >= l->n) {
        pl_buf_fini(&b);
        return bad(l, "a string is not closed");
    }
    pl_status st = push_copy(l, TK_STR, pl_buf_str(&b), b.len);
    pl_buf_fini(&b);
    count_lines(l, i + 1);
    return st;
}

static pl_status lex_number(struct lexer *l)
{
    char text[64];
    size_t n = 0, i = l->at;
    bool real = false;
    while (i < l->n && n + 1 < sizeof text && ((l->s[i] >= '0' && l->s[i] <= '9') || l->s[i] == '_'))
        if (l->s[i++] != '_')
            text[n++] = l->s[i - 1];
    if (i + 1 < l->n && l->s[i] == '.' && l->s[i + 1] >= '0' && l->s[i + 1] <= '9') {
        real = true;
        do
            text[n++] = l->s[i++];
        while (i < l->n && n + 1 < sizeof text && l->s[i] >= '0' && l->s[i] <= '9');
    }
    if (i < l->n && (l->s[i] | 32) == 'e') {
        size_t k = i + 1 + (i + 1 < l->n && (l->s[i + 1] == '-' || l->s[i + 1] == '+'));
        if (k < l->n && l->s[k] >= '0' && l->s[k] <= '9') {
            real = true;
            while (i < l->n && n + 1 < sizeof text && (i <= k || (l->s[i] >= '0' && l->s[i] <= '9')))
                text[n++] = l->s[i++];
        }
    }
    text[n] = '\0';
    errno = 0;
    struct jinja_token t = {.kind = real ? TK_REAL : TK_INT, .s = "", .r = strtod(text, NULL), .i = strtoll(text, NULL, 10)};
    if (errno == ERANGE && !real)
        return bad(l, "a number is too large");
    l->at = i;
    return push(l, t);
}

static bool is_name(char c, bool first)
{
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (!first && c >= '0' && c <= '9') || (unsigned char)c >= 0x80;
}

/* Tokens up to `end` ("%}" or "}}"), which is taken with its white space control. */
static pl_status lex_tag(struct lexer *l, const char *end, jinja_tk end_kind)
{
    static const char *const operators[] = {"//", "**", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "<",
                                            ">",  "=",  "(",  ")",  "[",  "]",  "{", "}", ",", ".", ":", "|"};
    int open = 0;
    for (pl_status st = PL_OK; st == PL_OK;) {
        while (l->at < l->n && is_space(l->s[l->at]))
            count_lines(l, l->at + 1);
        if (l->at >= l->n)
            return bad(l, "a tag is not closed");
        const char *p = l->s + l->at;
        bool sign = *p == '-' || *p == '+';
        if (open == 0 && l->n - l->at >= 2 + (size_t)sign && memcmp(p + sign, end, 2) == 0) {
            bool strip = *p == '-', keep = *p == '+';
            st = push(l, (struct jinja_token){.kind = end_kind, .s = end});
            l->at += 2 + (size_t)sign;
            l->line_start = false;
            if (strip) {
                size_t to = l->at;
                while (to < l->n && is_space(l->s[to]))
                    to++;
                l->line_start = to > l->at && l->s[to - 1] == '\n';
                count_lines(l, to);
            } else if (end_kind == TK_BLOCK_END && !keep && l->at < l->n && l->s[l->at] == '\n') {
                count_lines(l, l->at + 1);
                l->line_start = true;
            }
            return st;
        }
        if (*p == '"' || *p == '\'') {
            st = lex_string(l);
        } else if (*p >= '0' && *p <= '9') {
            st = lex_number(l);
        } else if (is_name(*p, true)) {
            size_t n = 1;
            while (l->at + n < l->n && is_name(p[n], false))
                n++;
            st = push_copy(l, TK_NAME, p, n);
            l->at += n;
        } else {
            size_t i = 0, n_ops = sizeof operators / sizeof operators[0];
            while (i < n_ops && (strlen(operators[i]) > l->n - l->at || memcmp(p, operators[i], strlen(operators[i])) != 0))
                i++;
            if (i == n_ops)
                return bad(l, "an unexpected character in a tag");
            open += strchr("([{", *p) != NULL;
            open -= strchr(")]}", *p) != NULL;
            st = push(l, (struct jinja_token){.kind = TK_OP, .s = operators[i], .n = strlen(operators[i])});
            l->at += strlen(operators[i]);
        }
        if (open < 0)
            return bad(l, "a bracket is closed that was not opened");
        if (st != PL_OK)
            return st;
    }
    return PL_OK;
}

/* ---- text and tags ------------------------------------------------------------------------------------------------- */

/* Text [at, end) before a tag; sign: what follows the tag's first two characters. */
static pl_status lex_text(struct lexer *l, size_t end, char kind, char sign)
{
    size_t to = end;
    if (sign == '-') {
        while (to > l->at && is_space(l->s[to - 1]))
            to--;
    } else if (sign != '+' && kind != '{') { /* lstrip_blocks: a tag with only white space before it on its line */
        size_t i = end;
        while (i > l->at && is_space(l->s[i - 1]) && l->s[i - 1] != '\n')
            i--;
        if ((i > l->at && l->s[i - 1] == '\n') || (i == l->at && l->line_start))
            to = i;
    }
    pl_status st = to > l->at ? push_copy(l, TK_TEXT, l->s + l->at, to - l->at) : PL_OK;
    count_lines(l, end);
    return st;
}

static pl_status lex_comment(struct lexer *l)
{
    const char *end = memmem(l->s + l->at, l->n - l->at, "#}", 2);
    if (end == NULL)
        return bad(l, "a comment is not closed");
    char sign = end > l->s ? end[-1] : 0;
    size_t to = (size_t)(end - l->s) + 2;
    count_lines(l, to);
    l->line_start = false;
    if (sign == '-') {
        while (to < l->n && is_space(l->s[to]))
            to++;
        l->line_start = to > l->at && l->s[to - 1] == '\n';
        count_lines(l, to);
    } else if (sign != '+' && l->at < l->n && l->s[l->at] == '\n') {
        count_lines(l, l->at + 1);
        l->line_start = true;
    }
    return PL_OK;
}

/* After "{%": is this a raw block? Then its text is taken up to endraw. */
static bool at_raw(const struct lexer *l, size_t *body)
{
    size_t i = l->at;
    while (i < l->n && is_space(l->s[i]))
        i++;
    if (l->n - i < 3 || memcmp(l->s + i, "raw", 3) != 0)
        return false;
    for (i += 3; i < l->n && is_space(l->s[i]); i++)
        ;
    i += i < l->n && (l->s[i] == '-' || l->s[i] == '+');
    *body = i;
    return l->n - i >= 2 && memcmp(l->s + i, "%}", 2) == 0;
}

static pl_status lex_raw(struct lexer *l, size_t body)
{
    bool strip_left = l->s[body - 1] == '-';
    size_t from = body + 2, i = from;
    if (strip_left)
        while (from < l->n && is_space(l->s[from]))
            from++;
    else if (from < l->n && l->s[from] == '\n')
        from++;
    for (i = from; i + 2 < l->n; i++) {
        if (memcmp(l->s + i, "{%", 2) != 0)
            continue;
        size_t k = i + 2;
        bool strip = l->s[k] == '-';
        k += l->s[k] == '-' || l->s[k] == '+';
        while (k < l->n && is_space(l->s[k]))
            k++;
        if (l->n - k < 6 || memcmp(l->s + k, "endraw", 6) != 0)
            continue;
        size_t to = i;
        while (strip && to > from && is_space(l->s[to - 1]))
            to--;
        if (!strip && l->s[i + 2] != '+') {
            size_t t = i;
            while (t > from && is_space(l->s[t - 1]) && l->s[t - 1] != '\n')
                t--;
            if (t > from && l->s[t - 1] == '\n')
                to = t;
        }
        pl_status st = push_copy(l, TK_TEXT, l->s + from, to - from);
        size_t first = l->out->n;
        count_lines(l, k + 6);
        if (st == PL_OK)
            st = lex_tag(l, "%}", TK_BLOCK_END);
        l->out->n = first; /* the end tag's own tokens */
        return st;
    }
    return bad(l, "a raw block is not closed");
}

pl_status jinja_lex(struct pl_arena *a, const char *source, size_t n, struct jinja_tokens *out, struct pl_err *err)
{
    char *s = pl_arena_alloc(a, n + 1);
    size_t len = 0;
    if (s == NULL)
        return pl_fail(err, PL_ENOMEM, "the chat template is too large");
    for (size_t i = 0; i < n; i++) { /* newlines as Python's universal ones */
        if (source[i] == '\r') {
            s[len++] = '\n';
            i += i + 1 < n && source[i + 1] == '\n';
        } else {
            s[len++] = source[i];
        }
    }
    len -= len > 0 && s[len - 1] == '\n';
    s[len] = '\0';
    struct lexer l = {.a = a, .out = out, .err = err, .s = s, .n = len, .line = 1, .line_start = true};
    pl_status st = PL_OK;
    while (l.at < l.n && st == PL_OK) {
        size_t i = l.at;
        while (i + 1 < l.n && !(s[i] == '{' && (s[i + 1] == '{' || s[i + 1] == '%' || s[i + 1] == '#')))
            i++;
        if (i + 1 >= l.n) {
            st = push_copy(&l, TK_TEXT, s + l.at, l.n - l.at);
            break;
        }
        char kind = s[i + 1], sign = i + 2 < l.n ? s[i + 2] : 0;
        if (kind == '{' && sign == '+')
            sign = 0;
        st = lex_text(&l, i, kind, sign);
        size_t body;
        l.at = i + 2 + (sign == '-' || (sign == '+' && kind != '{'));
        if (st != PL_OK)
            break;
        if (kind == '#') {
            st = lex_comment(&l);
        } else if (kind == '%' && at_raw(&l, &body)) {
            st = lex_raw(&l, body);
        } else {
            st = push(&l, (struct jinja_token){.kind = kind == '%' ? TK_BLOCK : TK_VAR, .s = ""});
            if (st == PL_OK)
                st = lex_tag(&l, kind == '%' ? "%}" : "}}", kind == '%' ? TK_BLOCK_END : TK_VAR_END);
        }
    }
    return st == PL_OK ? push(&l, (struct jinja_token){.kind = TK_EOF, .s = "end of template"}) : st;
}
