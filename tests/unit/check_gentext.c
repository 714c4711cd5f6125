/* check_gentext: numbers and log-probabilities as they stand in answers.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "server/generate.h"

Suite *suite_gentext(void);

static const struct {
    double v;
    const char *text;
} reals[] = {
    {0, "0"}, {-0.0, "0"}, {0.1, "0.1"}, {0.1f, "0.1"}, {-0.89606446f, "-0.89606446"}, {-12.5, "-12.5"}, {-1e-7, "-1e-07"}, {-3.4e38, "-9999.0"},
    {-INFINITY, "-9999.0"}, {NAN, "-9999.0"}, {-9999, "-9999.0"}, {-9998.5, "-9998.5"},
};

START_TEST(test_reals)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_gen_add_real(&b, reals[_i].v);
    ck_assert_str_eq(pl_buf_str(&b), reals[_i].text);
    char *end;
    (void)strtod(b.data, &end);
    ck_assert_int_eq(*end, '\0');
    pl_buf_fini(&b);
}
END_TEST

START_TEST(test_chars)
{
    ck_assert_uint_eq(pl_gen_chars("", 0), 0);
    ck_assert_uint_eq(pl_gen_chars("abc", 3), 3);
    ck_assert_uint_eq(pl_gen_chars("\xe2\x82\xac", 3), 1);
    ck_assert_uint_eq(pl_gen_chars("\xe2", 1), 1);     /* a character begins here … */
    ck_assert_uint_eq(pl_gen_chars("\x82\xac", 2), 0); /* … and ends in the next token */
}
END_TEST

START_TEST(test_usage)
{
    struct pl_buf b;
    struct pl_gen *g = calloc(1, sizeof *g);
    pl_buf_init(&b, 0);
    g->prompt_tokens = 3;
    g->cached_tokens = 2;
    g->completion_tokens = 4;
    pl_gen_add_usage(g, &b);
    ck_assert_ptr_nonnull(strstr(pl_buf_str(&b), "{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7,"));
    ck_assert_ptr_nonnull(strstr(pl_buf_str(&b), "\"prompt_tokens_details\":{\"cached_tokens\":2,"));
    ck_assert_str_eq(pl_gen_finish_name(PL_FINISH_LENGTH), "length");
    ck_assert_str_eq(pl_gen_finish_name(PL_FINISH_STOP), "stop");
    pl_buf_fini(&b);
    free(g);
}
END_TEST

/* Bytes that are no character: one U+FFFD each, and nothing after them is lost. */
START_TEST(test_lossy)
{
    static const struct { const char *in, *out; } rows[] = {
        {"", ""}, {"a\"b", "a\\\"b"}, {"\xff", "\xef\xbf\xbd"}, {"a\xe2\x82z", "a\xef\xbf\xbd\xef\xbf\xbdz"}, {"\xe2\x82\xac\xe2", "\xe2\x82\xac\xef\xbf\xbd"},
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, {"\n\xc0\xaf", "\\n\xef\xbf\xbd\xef\xbf\xbd"},
    };
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        struct pl_buf b;
        pl_buf_init(&b, 0);
        pl_buf_add_json_lossy(&b, rows[i].in, strlen(rows[i].in));
        ck_assert_str_eq(pl_buf_str(&b), rows[i].out);
        pl_buf_fini(&b);
    }
}
END_TEST

Suite *suite_gentext(void)
{
    Suite *s = suite_create("gentext");
    TCase *t = tcase_create("pieces");
    tcase_add_loop_test(t, test_reals, 0, (int)PL_COUNT_OF(reals));
    tcase_add_test(t, test_chars);
    tcase_add_test(t, test_usage);
    tcase_add_test(t, test_lossy);
    suite_add_tcase(s, t);
    return s;
}
