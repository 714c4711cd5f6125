/* check_buf: growing strings: what is appended is there, and an append that fails leaves the rest as it was.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdio.h>
#include <string.h>

#include "core/base/buf.h"

Suite *suite_buf(void);

/* Whatever room is left, formatted text arrives whole. */
START_TEST(formats)
{
    char expected[1200] = "";
    struct pl_buf b;
    pl_buf_init(&b, 0);
    for (int i = 0; i < 60; i++) {
        pl_buf_addf(&b, "%*d|", i % 17, i);
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%*d|", i % 17, i);
        ck_assert_str_eq(pl_buf_str(&b), expected);
        ck_assert_uint_eq(b.len, strlen(expected));
    }
    ck_assert(!b.failed);
    pl_buf_fini(&b);
    pl_buf_addf(&b, "%s", ""); /* nothing, into nothing */
    ck_assert(b.len == 0 && !b.failed && pl_buf_str(&b)[0] == '\0');
    pl_buf_fini(&b);
}
END_TEST

START_TEST(limits)
{
    struct pl_buf b;
    pl_buf_init(&b, 10);
    pl_buf_addf(&b, "%s", "1234567");
    pl_buf_addf(&b, "%s", "abcd"); /* would fit the memory, not the limit */
    ck_assert(b.failed);
    ck_assert_str_eq(pl_buf_str(&b), "1234567");
    pl_buf_addf(&b, "x");
    pl_buf_addu(&b, 1);
    ck_assert_str_eq(pl_buf_str(&b), "1234567");
    pl_buf_fini(&b);
}
END_TEST

START_TEST(numbers)
{
    static const uint64_t values[] = {0, 7, 10, 1234567890, UINT64_MAX};
    char expected[100] = "";
    struct pl_buf b;
    pl_buf_init(&b, 0);
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        pl_buf_addu(&b, values[i]);
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%llu", (unsigned long long)values[i]);
    }
    ck_assert_str_eq(pl_buf_str(&b), expected);
    pl_buf_fini(&b);
}
END_TEST

Suite *suite_buf(void)
{
    Suite *s = suite_create("buf");
    TCase *t = tcase_create("buf");
    tcase_add_test(t, formats);
    tcase_add_test(t, limits);
    tcase_add_test(t, numbers);
    suite_add_tcase(s, t);
    return s;
}
