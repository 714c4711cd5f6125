/* check_kv: thousands of random operations on the page pool, its invariants proved after each, against a naive model of
 * what must be found.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "core/kv/kv.h"

Suite *suite_kv(void);

enum { SEQS = 12, TOKENS = 8 * PL_KV_PAGE, PAGES = 28 };

static uint64_t seed;

static uint32_t below(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

struct sequence {
    struct pl_kv_table table;
    int32_t tokens[TOKENS];
    uint32_t n, done;
    bool live;
};

static struct pl_kv *new_kv(uint32_t pages)
{
    struct pl_kv *kv;
    struct pl_err err;
    ck_assert_int_eq(pl_kv_new(&kv, pages, 42, &err), PL_OK);
    return kv;
}

START_TEST(random_operations)
{
    struct pl_kv *kv = new_kv(PAGES);
    static struct sequence seqs[SEQS];
    static int32_t owner_tokens[PAGES][TOKENS]; /* what was computed into a page, as the whole beginning up to its end */
    static uint32_t owner_n[PAGES];
    memset(seqs, 0, sizeof seqs);
    seed = (uint64_t)_i + 1;
    uint32_t hits = 0, refusals = 0;
    for (int step = 0; step < 4000; step++) {
        struct sequence *s = &seqs[below(SEQS)];
        if (!s->live) {
            s->n = 1 + below(TOKENS - 1);
            for (uint32_t i = 0; i < s->n; i++)
                s->tokens[i] = (int32_t)(i < 3 * PL_KV_PAGE ? (i / PL_KV_PAGE + 1) * below(2) * (i % PL_KV_PAGE == 0) : below(3));
            s->done = pl_kv_match(kv, &s->table, 0, s->tokens, s->n);
            ck_assert_uint_eq(s->done % PL_KV_PAGE, 0);
            ck_assert_uint_lt(s->done, s->n);
            for (uint32_t p = 0; p < s->done / PL_KV_PAGE; p++) { /* what was found holds exactly this beginning */
                uint32_t page = s->table.pages[p], len = (p + 1) * PL_KV_PAGE;
                ck_assert_uint_eq(owner_n[page], len);
                ck_assert(memcmp(owner_tokens[page], s->tokens, len * sizeof(int32_t)) == 0);
            }
            hits += s->done > 0;
            s->live = true;
        } else if (below(4) == 0) {
            pl_kv_release(kv, &s->table);
            ck_assert_uint_eq(s->table.n_pages, 0);
            s->live = false;
        } else if (s->done < s->n) {
            uint32_t take = 1 + below(s->n - s->done), before = s->table.n_pages;
            pl_status st = pl_kv_reserve(kv, &s->table, s->done + take);
            if (st != PL_OK) {
                ck_assert_int_eq(st, PL_ENOPAGE);
                ck_assert_uint_eq(s->table.n_pages, before);
                refusals++;
            } else {
                for (uint32_t i = s->done; i < s->done + take; i++) {
                    uint32_t page = s->table.pages[i / PL_KV_PAGE];
                    memcpy(owner_tokens[page], s->tokens, (i + 1) * sizeof(int32_t));
                    owner_n[page] = i + 1;
                }
                s->done += take;
                pl_kv_commit(kv, &s->table, s->tokens, s->done);
            }
        }
        pl_kv_check(kv);
        ck_assert_uint_eq(pl_kv_held(kv) + pl_kv_available(kv), pl_kv_total(kv));
    }
    ck_assert_uint_gt(hits, 20);
    ck_assert_uint_gt(refusals, 5);
    for (int i = 0; i < SEQS; i++)
        pl_kv_release(kv, &seqs[i].table);
    pl_kv_check(kv);
    ck_assert_uint_eq(pl_kv_held(kv), 0);
    pl_kv_free(kv);
}
END_TEST

START_TEST(shares_and_evicts)
{
    struct pl_kv *kv = new_kv(6);
    struct pl_kv_table a = {0}, b = {0}, c = {0};
    int32_t tokens[4 * PL_KV_PAGE];
    for (int i = 0; i < 4 * (int)PL_KV_PAGE; i++)
        tokens[i] = i;
    ck_assert_uint_eq(pl_kv_match(kv, &a, 0, tokens, 3 * PL_KV_PAGE), 0);
    ck_assert_int_eq(pl_kv_reserve(kv, &a, 3 * PL_KV_PAGE), PL_OK);
    pl_kv_commit(kv, &a, tokens, 3 * PL_KV_PAGE);
    /* never all of it: one token is left to compute */
    ck_assert_uint_eq(pl_kv_match(kv, &b, 0, tokens, 3 * PL_KV_PAGE), 2 * PL_KV_PAGE);
    ck_assert_uint_eq(b.pages[0], a.pages[0]);
    pl_kv_release(kv, &a);
    ck_assert_uint_eq(pl_kv_cached(kv), 1); /* b still holds two */
    pl_kv_release(kv, &b);
    ck_assert_uint_eq(pl_kv_cached(kv), 3);
    /* five new pages: three free ones and then the two that were not used for longest, the prompt's end first */
    ck_assert_int_eq(pl_kv_reserve(kv, &c, 5 * PL_KV_PAGE), PL_OK);
    ck_assert_uint_eq(pl_kv_cached(kv), 1);
    ck_assert_uint_eq(pl_kv_match(kv, &a, 0, tokens, 3 * PL_KV_PAGE), PL_KV_PAGE);
    ck_assert_int_eq(pl_kv_reserve(kv, &a, 2 * PL_KV_PAGE), PL_ENOPAGE);
    pl_kv_release(kv, &a), pl_kv_release(kv, &c);
    pl_kv_check(kv);
    pl_kv_free(kv);
}
END_TEST

Suite *suite_kv(void)
{
    Suite *s = suite_create("kv");
    TCase *t = tcase_create("kv");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, random_operations, 0, 8);
    tcase_add_test(t, shares_and_evicts);
    suite_add_tcase(s, t);
    return s;
}
