/* check_share: how long engines rest for jobs.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdbool.h>

#include "server/jobs/share.h"

Suite *suite_share(void);

static const uint64_t tick = 250 * UINT64_C(1000000);

/* Looks n times at a worker of one processor that gets this part of a rest, and floor_ns of each tick; it wants all, or just what it gets. */
static unsigned settle(struct pl_share *s, double part, uint64_t floor_ns, bool hungry, unsigned n)
{
    uint64_t now = s->at_ns != 0 ? s->at_ns : tick;
    for (unsigned i = 0; i < n; i++) {
        const double rest = s->rest / 1000.0;
        now += tick;
        const uint64_t ran = (uint64_t)((double)tick * part * rest / (1 + rest)) + floor_ns;
        pl_share_look(s, now, ran, hungry ? tick - ran : 0, 1, 20);
    }
    return s->rest;
}

START_TEST(a_starved_worker_gets_its_share)
{
    struct pl_share s = {0};
    pl_share_look(&s, tick, 0, tick, 1, 20);
    ck_assert_uint_eq(s.rest, 0); /* nothing is known yet */
    ck_assert_uint_gt(settle(&s, 1, 0, true, 4), 100);
    const unsigned rest = settle(&s, 1, 0, true, 40);
    ck_assert_uint_ge(rest, 245); /* a fifth of all time is a quarter of the passes' */
    ck_assert_uint_le(rest, 255);
    ck_assert_uint_ge(settle(&s, 0.7, 0, true, 40), 385); /* others take their part of a rest */
    ck_assert_uint_le(s.rest, 415);
}
END_TEST

START_TEST(no_rest_without_need_and_none_without_end)
{
    struct pl_share s = {0};
    ck_assert_uint_eq(settle(&s, 0, tick / 2, true, 20), 0);
    ck_assert_uint_eq(settle(&s, 0, 0, true, 100), 500); /* another program has all that rests leave */
    ck_assert_uint_eq(settle(&s, 0, tick, true, 20), 0);
    pl_share_look(&s, s.at_ns + tick, 0, tick, 1, 0);
    ck_assert_uint_eq(s.rest, 0);
    ck_assert_uint_eq(settle(&s, 0, 0, false, 20), 0); /* it sleeps */
    ck_assert_uint_eq(settle(&s, 0, tick / 50, false, 20), 0);
    pl_share_look(&s, s.at_ns, 0, 0, 1, 20); /* no time has passed */
    ck_assert_uint_eq(s.rest, 0);
}
END_TEST

Suite *suite_share(void)
{
    Suite *s = suite_create("share");
    TCase *tc = tcase_create("share");
    tcase_add_test(tc, a_starved_worker_gets_its_share);
    tcase_add_test(tc, no_rest_without_need_and_none_without_end);
    suite_add_tcase(s, tc);
    return s;
}
