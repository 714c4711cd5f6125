/* check_detok: text that leaves token by token is the whole text cut at its first stop string, valid UTF-8 at every step,
 * with nothing of a stop string let out early and nothing held back without need.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/utf8.h"
#include "core/model/gguf.h"
#include "core/text/detok.h"
#include "core/text/tok.h"
#include "tests/tools/tiny_vocab.h"

Suite *suite_detok(void);

static struct pl_tok *tok;
static struct pl_gguf *gguf;
static void *bytes;

static void setup(void)
{
    size_t n;
    struct pl_err err = {0};
    struct gguf_out *o = gguf_out_new();
    tiny_vocab_bpe(o, "gpt-2");
    bytes = gguf_out_bytes(o, &n);
    gguf_out_free(o);
    ck_assert_msg(pl_gguf_open_memory(&gguf, bytes, n, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_tok_load(&tok, gguf, &err) == PL_OK, "%s", err.msg);
}

static void teardown(void)
{
    pl_tok_free(tok);
    pl_gguf_close(gguf);
    free(bytes);
}

/* The token of exactly these bytes. */
static int32_t id_of(const char *s, size_t n)
{
    int32_t id = pl_tok_find(tok, s, n);
    ck_assert_int_ge(id, 0);
    return id;
}

static uint64_t rng = 88172645463325252u;

static uint32_t below(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)((rng >> 32) * n >> 32);
}

/* ---- the plain definition ---- */

/* The end of the first complete stop string in s, and which: the longest of those that end there. */
static bool first_stop(const char *s, size_t n, const struct pl_stop *stops, size_t n_stops, size_t *end, int *which)
{
    *which = -1;
    for (*end = 1; *end <= n && *which < 0; ++*end)
        for (size_t k = 0; k < n_stops; k++)
            if (stops[k].n <= *end && memcmp(s + *end - stops[k].n, stops[k].s, stops[k].n) == 0 &&
                (*which < 0 || stops[k].n > stops[*which].n))
                *which = (int)k;
    --*end;
    return *which >= 0;
}

/* How many bytes at the beginning of s are one character, or the longest beginning of one, or one bad byte. */
static size_t unit(const unsigned char *s, size_t n, bool *whole)
{
    *whole = true;
    if (s[0] < 0x80)
        return 1;
    *whole = false;
    size_t len = s[0] >= 0xc2 && s[0] <= 0xdf ? 2 : s[0] >= 0xe0 && s[0] <= 0xef ? 3 : s[0] >= 0xf0 && s[0] <= 0xf4 ? 4 : 1;
    size_t i = 1;
    for (; i < len && i < n; i++) {
        bool second = i == 1, ok = s[i] >= 0x80 && s[i] <= 0xbf;
        ok = ok && !(second && ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
                                (s[0] == 0xf4 && s[1] > 0x8f)));
        if (!ok)
            break;
    }
    *whole = i == len && len > 1;
    return i;
}

static void lossy(const char *s, size_t n, struct pl_buf *out)
{
    for (size_t i = 0, len; i < n; i += len) {
        bool whole;
        len = unit((const unsigned char *)s + i, n - i, &whole);
        if (whole)
            pl_buf_add(out, s + i, len);
        else
            pl_buf_adds(out, "\xef\xbf\xbd");
    }
}

/* ---- helpers ---- */

/* Feeds ids; the text that left. *stopped says whether a stop string ended it. Each piece must be valid UTF-8. */
static struct pl_buf run(const int32_t *ids, size_t n, const struct pl_stop *stops, size_t n_stops, bool include, int *matched)
{
    struct pl_detok d;
    struct pl_buf out, piece;
    pl_buf_init(&out, 0);
    pl_buf_init(&piece, 0);
    ck_assert_int_eq(pl_detok_init(&d, tok, stops, n_stops), PL_OK);
    d.include_stop = include;
    bool stopped = false;
    for (size_t i = 0; i < n && !stopped; i++) {
        pl_buf_clear(&piece);
        stopped = pl_detok_push(&d, ids[i], &piece);
        ck_assert(pl_utf8_valid(pl_buf_str(&piece), piece.len));
        pl_buf_add(&out, pl_buf_str(&piece), piece.len);
    }
    if (!stopped) {
        pl_buf_clear(&piece);
        pl_detok_flush(&d, &piece);
        ck_assert(pl_utf8_valid(pl_buf_str(&piece), piece.len));
        pl_buf_add(&out, pl_buf_str(&piece), piece.len);
    }
    ck_assert_int_eq(stopped, d.matched >= 0);
    ck_assert_uint_eq(d.pending.len, 0);
    *matched = d.matched;
    pl_detok_fini(&d);
    pl_buf_fini(&piece);
    return out;
}

/* ids of single bytes, so that the test decides where borders are. */
static size_t single(const char *s, size_t n, int32_t *ids)
{
    for (size_t i = 0; i < n; i++)
        ids[i] = id_of(s + i, 1);
    return n;
}

/* ---- tests ---- */

START_TEST(characters)
{
    static const char text[] = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z"; /* 1, 2, 3, 4, 1 bytes */
    static const size_t leave[] = {1, 0, 2, 0, 0, 3, 0, 0, 0, 4, 1};
    int32_t ids[16];
    struct pl_detok d;
    struct pl_buf out;
    pl_buf_init(&out, 0);
    ck_assert_int_eq(pl_detok_init(&d, tok, NULL, 0), PL_OK);
    size_t n = single(text, sizeof text - 1, ids);
    for (size_t i = 0; i < n; i++) {
        size_t before = out.len;
        ck_assert(!pl_detok_push(&d, ids[i], &out));
        ck_assert_uint_eq(out.len - before, leave[i]);
    }
    ck_assert_str_eq(pl_buf_str(&out), text);
    pl_detok_fini(&d);
    pl_buf_fini(&out);
}
END_TEST

START_TEST(broken)
{
    static const struct {
        const char *in, *out;
    } rows[] = {
        {"\xe2\x82", "\xef\xbf\xbd"},                         /* unfinished at the end: one */
        {"\xe2\x82 x", "\xef\xbf\xbd x"},                     /* broken off */
        {"\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd"},             /* bytes that begin nothing: one each */
        {"\xff" "a", "\xef\xbf\xbd" "a"},
        {"\xc0\xaf", "\xef\xbf\xbd\xef\xbf\xbd"},             /* overlong */
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, /* surrogate */
        {"\xf0\x9f\x98\xf0\x9f\x98\x80", "\xef\xbf\xbd\xf0\x9f\x98\x80"},
    };
    int32_t ids[16];
    int matched;
    struct pl_buf out = run(ids, single(rows[_i].in, strlen(rows[_i].in), ids), NULL, 0, false, &matched);
    ck_assert_str_eq(pl_buf_str(&out), rows[_i].out);
    pl_buf_fini(&out);
}
END_TEST

START_TEST(stop_strings)
{
    static const struct {
        const char *in, *stops[4], *out, *with;
        int matched;
    } rows[] = {
        {"one two", {"two"}, "one ", "one two", 0},
        {"one tw", {"two"}, "one tw", "one tw", -1},
        {"aaab", {"aab"}, "a", "aaab", 0},                      /* the search falls back inside the pattern */
        {"ababac", {"abac"}, "ab", "ababac", 0},
        {"abcd", {"abcd", "bc"}, "a", "abc", 1},                /* complete first, though it begins later */
        {"xabc", {"bc", "abc", "c"}, "x", "xabc", 1},           /* the same end: the longest */
        {"stop", {"stop"}, "", "stop", 0},
        {"a\xc3\xa9\xc3\xa9z", {"\xc3\xa9z"}, "a\xc3\xa9", "a\xc3\xa9\xc3\xa9z", 0},
        {"\xe2\x82STOP", {"STOP"}, "\xef\xbf\xbd", "\xef\xbf\xbdSTOP", 0},
        {"\n\nx", {"\n\n", "\n"}, "", "\n", 1},
    };
    struct pl_stop list[4];
    size_t n_stops = 0;
    for (; n_stops < 4 && rows[_i].stops[n_stops] != NULL; n_stops++)
        list[n_stops] = (struct pl_stop){rows[_i].stops[n_stops], strlen(rows[_i].stops[n_stops])};
    int32_t ids[16];
    size_t n = single(rows[_i].in, strlen(rows[_i].in), ids);
    int matched;
    struct pl_buf out = run(ids, n, list, n_stops, false, &matched);
    ck_assert_str_eq(pl_buf_str(&out), rows[_i].out);
    ck_assert_int_eq(matched, rows[_i].matched);
    pl_buf_fini(&out);
    out = run(ids, n, list, n_stops, true, &matched);
    ck_assert_str_eq(pl_buf_str(&out), rows[_i].with);
    pl_buf_fini(&out);
}
END_TEST

/* What can be no part of a stop string leaves at once; control tokens are no text. */
START_TEST(prompt_release)
{
    struct pl_stop stop = {"\n\nUser:", 7};
    struct pl_detok d;
    struct pl_buf out;
    pl_buf_init(&out, 0);
    ck_assert_int_eq(pl_detok_init(&d, tok, &stop, 1), PL_OK);
    ck_assert(!pl_detok_push(&d, id_of("Hello", 5), &out));
    ck_assert_str_eq(pl_buf_str(&out), "Hello");
    ck_assert(!pl_detok_push(&d, id_of("\n\n", 2), &out));
    ck_assert(!pl_detok_push(&d, id_of("<|im_start|>", 12), &out));
    ck_assert(!pl_detok_push(&d, -1, &out));
    ck_assert(!pl_detok_push(&d, pl_tok_count(tok), &out));
    ck_assert_str_eq(pl_buf_str(&out), "Hello");
    ck_assert(!pl_detok_push(&d, id_of("x", 1), &out));
    ck_assert_str_eq(pl_buf_str(&out), "Hello\n\nx");
    pl_detok_fini(&d);
    pl_buf_fini(&out);
}
END_TEST

/* Stop strings that count only later (min_tokens): none is found before, and none that began before. */
START_TEST(late_stops)
{
    struct pl_stop stop = {"ab", 2};
    struct pl_detok d;
    struct pl_buf out;
    pl_buf_init(&out, 0);
    ck_assert_int_eq(pl_detok_init(&d, tok, &stop, 1), PL_OK);
    for (const char *s = "abaXbab"; *s != '\0'; s++) {
        d.n_stops = *s == 'X' || out.len >= 3 ? 1 : 0;
        bool stopped = pl_detok_push(&d, id_of(s, 1), &out);
        ck_assert_int_eq(stopped, s[1] == '\0');
    }
    ck_assert_str_eq(pl_buf_str(&out), "abaXb");
    pl_detok_fini(&d);
    pl_buf_fini(&out);
}
END_TEST

/* Random tokens and random stop strings, many of them cut out of the text itself: equal to the plain definition. */
START_TEST(property)
{
    enum { MAX = 40 };
    static const char *const fodder[] = {"\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "ab", "aab", "aaa", "\n", " the", "Hello"};
    for (int round = 0; round < 20000; round++) {
        int32_t ids[MAX];
        size_t n = 0, goal = 1 + below(MAX);
        while (n < goal) {
            const char *s = fodder[below(sizeof fodder / sizeof fodder[0])];
            if (below(4) == 0)
                ids[n++] = (int32_t)below((uint32_t)pl_tok_count(tok) + 3) - 1;
            else
                for (; *s != '\0' && n < goal; s++)
                    ids[n++] = id_of(s, 1);
        }
        struct pl_buf whole, want;
        pl_buf_init(&whole, 0);
        pl_buf_init(&want, 0);
        for (size_t i = 0; i < n; i++) {
            size_t len;
            const char *s = pl_tok_bytes(tok, ids[i], false, &len);
            pl_buf_add(&whole, s, len);
        }
        char text[4][16];
        struct pl_stop stops[4];
        size_t n_stops = below(5), used = 0;
        for (size_t k = 0; k < n_stops; k++) {
            size_t from = whole.len > 0 ? below((uint32_t)whole.len) : 0, len = whole.len > 0 ? 1 + below(6) : 0;
            len = len < whole.len - from ? len : whole.len - from;
            if (below(3) == 0 || len == 0 || !pl_utf8_valid(whole.data + from, len)) {
                const char *s = fodder[below(sizeof fodder / sizeof fodder[0])];
                len = strlen(s);
                memcpy(text[used], s, len);
            } else {
                memcpy(text[used], whole.data + from, len);
            }
            stops[used] = (struct pl_stop){text[used], len};
            used++;
        }
        size_t end;
        int which;
        bool include = below(2), stop = first_stop(pl_buf_str(&whole), whole.len, stops, used, &end, &which);
        lossy(pl_buf_str(&whole), !stop ? whole.len : include ? end : end - stops[which].n, &want);
        int matched;
        struct pl_buf got = run(ids, n, stops, used, include, &matched);
        ck_assert_uint_eq(got.len, want.len);
        ck_assert(memcmp(pl_buf_str(&got), pl_buf_str(&want), want.len) == 0);
        ck_assert_int_eq(matched >= 0, stop);
        if (stop) /* of two equal stop strings either may be named */
            ck_assert(stops[matched].n == stops[which].n && memcmp(stops[matched].s, stops[which].s, stops[which].n) == 0);
        pl_buf_fini(&got);
        pl_buf_fini(&whole);
        pl_buf_fini(&want);
    }
}
END_TEST

/* A stop string that is nearly there all the time: the work per token must not grow with its length. */
START_TEST(linear)
{
    enum { STOP = 100000, N = 500000 };
    char *text = malloc(STOP);
    memset(text, 'a', STOP - 1);
    text[STOP - 1] = 'b';
    struct pl_stop stop = {text, STOP};
    struct pl_detok d;
    struct pl_buf out;
    pl_buf_init(&out, 0);
    ck_assert_int_eq(pl_detok_init(&d, tok, &stop, 1), PL_OK);
    int32_t a = id_of("a", 1);
    clock_t from = clock();
    for (int i = 0; i < N; i++)
        ck_assert(!pl_detok_push(&d, a, &out));
    ck_assert_uint_eq(out.len, N - (STOP - 1));
    ck_assert(pl_detok_push(&d, id_of("b", 1), &out));
    ck_assert_uint_eq(out.len, N - (STOP - 1));
    ck_assert_double_lt((double)(clock() - from) / CLOCKS_PER_SEC, 3);
    pl_detok_fini(&d);
    pl_buf_fini(&out);
    free(text);
}
END_TEST

Suite *suite_detok(void)
{
    Suite *s = suite_create("detok");
    TCase *c = tcase_create("detok");
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, characters);
    tcase_add_loop_test(c, broken, 0, 7);
    tcase_add_loop_test(c, stop_strings, 0, 10);
    tcase_add_test(c, prompt_release);
    tcase_add_test(c, late_stops);
    tcase_add_test(c, property);
    tcase_add_test(c, linear);
    suite_add_tcase(s, c);
    return s;
}
