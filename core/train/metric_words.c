/* metric: the words of a text.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "core/train/metric.h"

struct range {
    uint32_t from, to;
};

static bool in_ranges(uint32_t c, const struct range *r, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (c >= r[i].from && c <= r[i].to)
            return true;
    return false;
}

/* What Python's str.split() takes for space. */
static bool is_space(uint32_t c)
{
    static const struct range spaces[] = {{0x09, 0x0d},     {0x1c, 0x20},     {0x85, 0x85},     {0xa0, 0xa0},     {0x1680, 0x1680},
                                          {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f}, {0x3000, 0x3000}};
    return in_ranges(c, spaces, PL_COUNT_OF(spaces));
}

/* sacrebleu's table as it works. It was meant to have U+20000 to U+2A6D6 and U+2F800 to U+2FA1D, but its strings say 2001 to 2A6D and 2F81 to
 * 2FA1: dashes, quotation marks and arrows are words of their own, and rare ideographs are not. */
static bool is_chinese(uint32_t c)
{
    static const struct range chinese[] = {
        {0x2001, 0x2a6d}, {0x2e80, 0x2fff}, {0x3000, 0x303f}, {0x3100, 0x312f}, {0x31a0, 0x31bf}, {0x31c0, 0x31ef}, {0x3200, 0x33ff}, {0x3400, 0x4db5},
        {0x4e00, 0x9fbb}, {0xf900, 0xfa2d}, {0xfa30, 0xfa6a}, {0xfa70, 0xfad9}, {0xfe10, 0xfe1f}, {0xfe30, 0xfe4f}, {0xff00, 0xffef},
    };
    return in_ranges(c, chinese, PL_COUNT_OF(chinese));
}

/* The character at s; bytes that are none stand for themselves. */
static size_t next(const char *s, size_t n, uint32_t *c)
{
    const int width = pl_utf8_decode(s, n, c);
    if (width > 0)
        return (size_t)width;
    *c = (unsigned char)*s;
    return 1;
}

static void replace(struct pl_buf *b, const char *from, const char *to)
{
    struct pl_buf out;
    const char *s = pl_buf_str(b), *end = s + b->len, *hit;
    pl_buf_init(&out, 0);
    while ((hit = memmem(s, (size_t)(end - s), from, strlen(from))) != NULL) {
        pl_buf_add(&out, s, (size_t)(hit - s));
        pl_buf_adds(&out, to);
        s = hit + strlen(from);
    }
    pl_buf_add(&out, s, (size_t)(end - s));
    out.failed |= b->failed;
    pl_buf_fini(b);
    *b = out;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool is_stop(char c)
{
    return c == '.' || c == ',';
}

static bool is_mark(char c)
{
    return (c >= '{' && c <= '~') || (c >= '[' && c <= '`') || (c >= ' ' && c <= '&') || (c >= '(' && c <= '+') || (c >= ':' && c <= '@') || c == '/';
}

/* One of mteval's rules: where two neighbours match, they are written apart and the next pair begins after them. */
static void part(struct pl_buf *b, bool (*left)(char), bool is_left, bool (*right)(char), bool is_right, const char *how)
{
    struct pl_buf out;
    const char *s = pl_buf_str(b);
    pl_buf_init(&out, 0);
    for (size_t i = 0; i < b->len; i++) {
        if (i + 1 < b->len && left(s[i]) == is_left && right(s[i + 1]) == is_right) {
            for (const char *h = how; *h != '\0'; h++)
                pl_buf_addc(&out, *h == '1' ? s[i] : *h == '2' ? s[i + 1] : ' ');
            i++;
        } else {
            pl_buf_addc(&out, s[i]);
        }
    }
    out.failed |= b->failed;
    pl_buf_fini(b);
    *b = out;
}

static bool is_dash(char c)
{
    return c == '-';
}

static void part_western(struct pl_buf *b)
{
    struct pl_buf out;
    const char *s = pl_buf_str(b);
    pl_buf_init(&out, 0);
    for (size_t i = 0; i < b->len; i++) {
        const bool mark = is_mark(s[i]);
        if (mark)
            pl_buf_addc(&out, ' ');
        pl_buf_addc(&out, s[i]);
        if (mark)
            pl_buf_addc(&out, ' ');
    }
    out.failed |= b->failed;
    pl_buf_fini(b);
    *b = out;
    part(b, is_digit, false, is_stop, true, "1 2 ");
    part(b, is_stop, true, is_digit, false, " 1 2");
    part(b, is_digit, true, is_dash, true, "1 2 ");
}

/* Without the space at its ends. */
static void trim(const char **s, size_t *n, bool left)
{
    uint32_t c;
    size_t keep = 0;
    while (left && *n > 0) {
        const size_t width = next(*s, *n, &c);
        if (!is_space(c))
            break;
        *s += width;
        *n -= width;
    }
    for (size_t at = 0, width; at < *n; at += width) {
        width = next(*s + at, *n - at, &c);
        if (!is_space(c))
            keep = at + width;
    }
    *n = keep;
}

static void write_13a(struct pl_buf *b, const char *s, size_t n)
{
    static const char *const pairs[][2] = {{"<skipped>", ""}, {"-\n", ""}, {"\n", " "}, {"&quot;", "\""}, {"&amp;", "&"}, {"&lt;", "<"}, {"&gt;", ">"}};
    trim(&s, &n, false);
    pl_buf_add(b, s, n);
    for (size_t i = 0; i < PL_COUNT_OF(pairs); i++)
        replace(b, pairs[i][0], pairs[i][1]);
    struct pl_buf padded;
    pl_buf_init(&padded, 0);
    pl_buf_addc(&padded, ' ');
    pl_buf_add(&padded, pl_buf_str(b), b->len);
    pl_buf_addc(&padded, ' ');
    padded.failed |= b->failed;
    pl_buf_fini(b);
    *b = padded;
    part_western(b);
}

static void write_chars(struct pl_buf *b, const char *s, size_t n, bool chinese_only)
{
    uint32_t c;
    if (chinese_only)
        trim(&s, &n, true);
    for (size_t at = 0, width; at < n; at += width) {
        width = next(s + at, n - at, &c);
        const bool apart = !chinese_only || is_chinese(c);
        if (apart)
            pl_buf_addc(b, ' ');
        pl_buf_add(b, s + at, width);
        if (apart)
            pl_buf_addc(b, ' ');
    }
    if (chinese_only)
        part_western(b);
}

/* Lower case, a to z and 0 to 9 alone. Outside ASCII, only the Kelvin sign and the I with a dot have such letters in lower case. */
static void write_rouge(struct pl_buf *b, const char *s, size_t n)
{
    enum { KELVIN = 0x212a, DOTTED_I = 0x130 };
    uint32_t c;
    for (size_t at = 0; at < n;) {
        at += next(s + at, n - at, &c);
        if (c >= 'A' && c <= 'Z')
            pl_buf_addc(b, (char)(c - 'A' + 'a'));
        else if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'))
            pl_buf_addc(b, (char)c);
        else
            pl_buf_adds(b, c == KELVIN ? "k" : c == DOTTED_I ? "i " : " ");
    }
}

/* Cuts the text at its spaces. */
static pl_status cut(struct pl_words *w, struct pl_buf *b)
{
    const size_t n = b->len;
    uint32_t c;
    bool inside = false;
    size_t cap = 0;
    if (b->failed || (w->text = pl_buf_take(b)) == NULL)
        return b->failed ? PL_ENOMEM : PL_OK;
    for (size_t at = 0, width; at < n; at += width) {
        width = next(w->text + at, n - at, &c);
        if (is_space(c)) {
            inside = false;
            continue;
        }
        if (!inside && w->n == cap) {
            struct pl_word *all = realloc(w->list, (cap = 2 * cap + 64) * sizeof *all);
            if (all == NULL)
                return PL_ENOMEM;
            w->list = all;
        }
        if (!inside)
            w->list[w->n++] = (struct pl_word){w->text + at, 0};
        w->list[w->n - 1].n += width;
        inside = true;
    }
    return PL_OK;
}

pl_status pl_words_split(struct pl_words *w, pl_words_kind kind, const char *s, size_t n)
{
    struct pl_buf b;
    *w = (struct pl_words){0};
    pl_buf_init(&b, 0);
    switch (kind) {
    case PL_WORDS_13A: write_13a(&b, s, n); break;
    case PL_WORDS_ZH: write_chars(&b, s, n, true); break;
    case PL_WORDS_CHAR: write_chars(&b, s, n, false); break;
    case PL_WORDS_ROUGE: write_rouge(&b, s, n); break;
    }
    const pl_status rc = cut(w, &b);
    pl_buf_fini(&b);
    if (rc != PL_OK)
        pl_words_fini(w);
    return rc;
}

void pl_words_fini(struct pl_words *w)
{
    free(w->text);
    free(w->list);
    *w = (struct pl_words){0};
}

const char *pl_words_name(pl_words_kind kind)
{
    static const char *const names[] = {[PL_WORDS_13A] = "13a", [PL_WORDS_ZH] = "zh", [PL_WORDS_CHAR] = "char", [PL_WORDS_ROUGE] = "rouge"};
    return names[kind];
}
