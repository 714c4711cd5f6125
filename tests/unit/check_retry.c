/* check_retry: when jobs that could not run are tried again.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <limits.h>

#include "core/base/mem.h"
#include "server/jobs/retry.h"

Suite *suite_retry(void);

static const uint64_t second = 1000000000;

START_TEST(waits_double_up_to_five_minutes)
{
    static const unsigned want[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300};
    struct pl_retry *list = NULL;
    uint64_t now = 7 * second;
    for (size_t i = 0; i < PL_COUNT_OF(want); i++) {
        unsigned seconds;
        ck_assert(pl_retry_due(list, "a", now));
        ck_assert_uint_eq(pl_retry_note(&list, "a", 5, now, UINT_MAX, &seconds)->n, i + 1);
        ck_assert_uint_eq(seconds, want[i]);
        ck_assert(!pl_retry_due(list, "a", now + seconds * second - 1));
        now += seconds * second;
    }
    pl_retry_free(&list);
    ck_assert_ptr_null(list);
}
END_TEST

START_TEST(progress_and_forgetting_begin_anew)
{
    struct pl_retry *list = NULL;
    unsigned seconds;
    for (int i = 0; i < 4; i++)
        pl_retry_note(&list, "a", 5, 0, UINT_MAX, &seconds);
    pl_retry_note(&list, "b", 0, 0, UINT_MAX, &seconds);
    ck_assert_uint_eq(seconds, 1); /* each job for itself */
    pl_retry_note(&list, "a", 6, 0, UINT_MAX, &seconds);
    ck_assert_uint_eq(seconds, 1);
    pl_retry_note(&list, "a", 6, 0, UINT_MAX, &seconds);
    ck_assert_uint_eq(seconds, 2);
    pl_retry_forget(&list, "a");
    pl_retry_forget(&list, "nobody");
    ck_assert_ptr_null(pl_retry_find(list, "a"));
    ck_assert_ptr_nonnull(pl_retry_find(list, "b"));
    ck_assert(pl_retry_due(list, "a", 0));
    pl_retry_free(&list);
}
END_TEST

START_TEST(waits_end_at_a_limit_and_when_room_is_left)
{
    struct pl_retry *list = NULL;
    unsigned seconds;
    for (int i = 0; i < 4; i++)
        pl_retry_note(&list, "a", 5, 0, 7, &seconds)->for_room = true;
    ck_assert_uint_eq(seconds, 7);
    pl_retry_note(&list, "b", 5, 0, UINT_MAX, &seconds);
    ck_assert(!pl_retry_due(list, "a", 1) && !pl_retry_due(list, "b", 1));
    pl_retry_hasten(list);
    ck_assert(pl_retry_due(list, "a", 1) && !pl_retry_due(list, "b", 1));
    pl_retry_free(&list);
}
END_TEST

Suite *suite_retry(void)
{
    Suite *s = suite_create("retry");
    TCase *c = tcase_create("all");
    tcase_add_test(c, waits_double_up_to_five_minutes);
    tcase_add_test(c, progress_and_forgetting_begin_anew);
    tcase_add_test(c, waits_end_at_a_limit_and_when_room_is_left);
    suite_add_tcase(s, c);
    return s;
}
