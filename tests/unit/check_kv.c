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
    uint32_t hits = 0, copies = 0, refusals = 0;
    for (int step = 0; step < 4000; step++) {
        struct sequence *s = &seqs[below(SEQS)];
        if (!s->live) {
            s->n = 1 + below(TOKENS - 1);
            for (uint32_t i = 0; i < s->n; i++)
                s->tokens[i] = (int32_t)(i < 3 * PL_KV_PAGE ? (i / PL_KV_PAGE + 1) * below(2) * (i % PL_KV_PAGE == 0) : below(3));
            struct pl_kv_copy copy = {0};
            s->done = pl_kv_match(kv, &s->table, 0, s->tokens, s->n, below(4) ? &copy : NULL);
            ck_assert_uint_eq(s->done % PL_KV_PAGE, copy.n);
            ck_assert_uint_lt(s->done, s->n);
            if (copy.n > 0) { /* from a page that holds this beginning to one that nobody else has */
                ck_assert_uint_ge(owner_n[copy.from], s->done);
                ck_assert_uint_lt(owner_n[copy.from] - (s->done - copy.n), PL_KV_PAGE + 1);
                ck_assert(memcmp(owner_tokens[copy.from], s->tokens, s->done * sizeof(int32_t)) == 0);
                ck_assert_uint_ne(copy.from, copy.to);
                ck_assert_uint_eq(s->table.pages[s->done / PL_KV_PAGE], copy.to);
                for (int i = 0; i < SEQS; i++)
                    for (uint32_t p = 0; seqs[i].live && p < seqs[i].table.n_pages; p++)
                        ck_assert_uint_ne(seqs[i].table.pages[p], copy.to);
                memcpy(owner_tokens[copy.to], s->tokens, s->done * sizeof(int32_t));
                owner_n[copy.to] = s->done;
                copies++;
            }
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
    ck_assert_uint_gt(copies, 20);
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
    ck_assert_uint_eq(pl_kv_match(kv, &a, 0, tokens, 3 * PL_KV_PAGE, NULL), 0);
    ck_assert_int_eq(pl_kv_reserve(kv, &a, 3 * PL_KV_PAGE), PL_OK);
    pl_kv_commit(kv, &a, tokens, 3 * PL_KV_PAGE);
    /* never all of it: one token is left to compute */
    ck_assert_uint_eq(pl_kv_match(kv, &b, 0, tokens, 3 * PL_KV_PAGE, NULL), 2 * PL_KV_PAGE);
    ck_assert_uint_eq(b.pages[0], a.pages[0]);
    pl_kv_release(kv, &a);
    ck_assert_uint_eq(pl_kv_cached(kv), 1); /* b still holds two */
    pl_kv_release(kv, &b);
    ck_assert_uint_eq(pl_kv_cached(kv), 3);
    /* five new pages: three free ones and then the two that were not used for longest, the prompt's end first */
    ck_assert_int_eq(pl_kv_reserve(kv, &c, 5 * PL_KV_PAGE), PL_OK);
    ck_assert_uint_eq(pl_kv_cached(kv), 1);
    ck_assert_uint_eq(pl_kv_match(kv, &a, 0, tokens, 3 * PL_KV_PAGE, NULL), PL_KV_PAGE);
    ck_assert_int_eq(pl_kv_reserve(kv, &a, 2 * PL_KV_PAGE), PL_ENOPAGE);
    pl_kv_release(kv, &a), pl_kv_release(kv, &c);
    pl_kv_check(kv);
    pl_kv_free(kv);
}
END_TEST

/* A sequence of n tokens that count up from 0, but for token `other`, of which everything is computed. */
static void compute(struct pl_kv *kv, struct pl_kv_table *t, uint32_t n, uint32_t other)
{
    int32_t tokens[TOKENS];
    struct pl_kv_copy copy;
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = i == other ? -1 : (int32_t)i;
    (void)pl_kv_match(kv, t, 0, tokens, n, &copy);
    ck_assert_int_eq(pl_kv_reserve(kv, t, n), PL_OK);
    pl_kv_commit(kv, t, tokens, n);
}

/* The beginning of a page is copied: the longest one there is, of a full page or of one that is being filled, held or not; never
 * in another family, and never by taking the page that it comes from. */
START_TEST(copies_beginnings)
{
    enum { P = PL_KV_PAGE };
    struct pl_kv *kv = new_kv(8);
    struct pl_kv_table a = {0}, b = {0}, c = {0}, d = {0};
    struct pl_kv_copy copy;
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = i;
    compute(kv, &a, 2 * P, P + 20);
    compute(kv, &b, P + 12, P + 5);
    ck_assert_uint_eq(a.pages[0], b.pages[0]);
    ck_assert_uint_eq(pl_kv_match(kv, &c, 0, tokens, 4 * P, &copy), P + 20);
    ck_assert_uint_eq(copy.from, a.pages[1]);
    ck_assert_uint_eq(copy.n, 20);
    ck_assert(c.n_pages == 2 && c.pages[0] == a.pages[0] && c.pages[1] == copy.to && copy.to != copy.from);
    pl_kv_commit(kv, &c, tokens, P + 25); /* five tokens on, others find these too */
    ck_assert_uint_eq(pl_kv_match(kv, &d, 0, tokens, 4 * P, &copy), P + 25);
    ck_assert_uint_eq(copy.from, c.pages[1]);
    pl_kv_release(kv, &d);
    pl_kv_release(kv, &c);
    ck_assert_uint_eq(pl_kv_match(kv, &d, 0, tokens, P + 8, &copy), P + 7); /* one is left to compute */
    pl_kv_release(kv, &d);
    ck_assert_uint_eq(pl_kv_match(kv, &d, 1, tokens, 4 * P, &copy), 0);
    ck_assert_uint_eq(copy.n, 0);
    pl_kv_release(kv, &d);
    ck_assert_uint_eq(pl_kv_match(kv, &d, 0, tokens + 1, 4 * P, &copy), 0);
    pl_kv_release(kv, &d);
    /* the page that c left is the only one that nobody holds: nothing can be copied from it */
    ck_assert_int_eq(pl_kv_reserve(kv, &b, (2 + pl_kv_available(kv) - 1) * P), PL_OK);
    ck_assert_uint_eq(pl_kv_cached(kv), 1);
    ck_assert_uint_eq(pl_kv_match(kv, &d, 0, tokens, 4 * P, &copy), P);
    ck_assert(copy.n == 0 && d.n_pages == 1 && pl_kv_available(kv) == 1);
    pl_kv_release(kv, &d);
    pl_kv_check(kv);
    pl_kv_release(kv, &a), pl_kv_release(kv, &b);
    pl_kv_check(kv);
    ck_assert_uint_eq(pl_kv_held(kv), 0);
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
    tcase_add_test(t, copies_beginnings);
    suite_add_tcase(s, t);
    return s;
}
