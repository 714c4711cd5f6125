/* kv: hands out fixed-size cache pages to sequences, and finds pages that already hold a prompt's beginning.
 *
 * Each page is in one of three states: free (in the list `free`), held (refs > 0), cached (refs 0, n_known > 0, in the LRU list).
 * Held or cached, named pages are in a hash table by their 128-bit chain hash, and pages with known tokens, full or not, in one
 * by the hash of what is before them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/kv/kv.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
    NONE = -1,
    MOST_SIBLINGS = 64 /* pages after the same beginning that are looked at, the newest first */
};

struct page {
    uint64_t chain[2]; /* hash of all tokens up to this page's end; valid when named */
    uint64_t before[2]; /* hash of all tokens before this page; valid when tokens are known */
    uint32_t refs;
    uint32_t n_known;      /* tokens that others may take from it */
    bool named;
    int32_t prev, next;    /* LRU list while cached (next = more recently used); next also links the free list */
    int32_t bucket_next;   /* hash bucket of named pages */
    int32_t sibling_prev, sibling_next; /* hash bucket of pages with known tokens */
    int32_t tokens[PL_KV_PAGE];
};

struct pl_kv {
    uint32_t n, n_free, n_cached;
    struct page *pages;
    int32_t free_head, lru_old, lru_new;
    int32_t *buckets;  /* named pages by `chain` */
    int32_t *siblings; /* pages with known tokens by `before` */
    uint32_t mask;     /* of both */
    uint64_t salt;
};

/* ---- hash chain ---------------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t a, uint64_t b)
{
    __uint128_t m = (__uint128_t)(a ^ 0x9e3779b97f4a7c15u) * (b ^ 0xd1b54a32d192ed03u);
    return (uint64_t)m ^ (uint64_t)(m >> 64);
}

/* out = hash(salt, before, tokens of a page): two independent 64-bit lanes. A hit is proved by comparing tokens and
 * `before`, so a collision costs a miss and never a wrong answer. */
static void chain_hash(const struct pl_kv *kv, const uint64_t before[2], const int32_t *tokens, uint64_t out[2])
{
    uint64_t a = mix(before[0], kv->salt), b = mix(before[1], ~kv->salt);
    for (uint32_t i = 0; i < PL_KV_PAGE; i += 2) {
        uint64_t two = (uint64_t)(uint32_t)tokens[i] | (uint64_t)(uint32_t)tokens[i + 1] << 32;
        a = mix(a ^ two, 0xa0761d6478bd642fu);
        b = mix(b + two, 0xe7037ed1a0b428dbu);
    }
    out[0] = a;
    out[1] = b;
}

static int32_t *bucket(const struct pl_kv *kv, const uint64_t chain[2])
{
    return &kv->buckets[chain[0] & kv->mask];
}

static int32_t find_named(const struct pl_kv *kv, const uint64_t before[2], const uint64_t chain[2], const int32_t *tokens)
{
    for (int32_t i = *bucket(kv, chain); i != NONE; i = kv->pages[i].bucket_next) {
        const struct page *p = &kv->pages[i];
        if (memcmp(p->chain, chain, sizeof p->chain) == 0 && memcmp(p->before, before, sizeof p->before) == 0 &&
            memcmp(p->tokens, tokens, sizeof p->tokens) == 0)
            return i;
    }
    return NONE;
}

static void set_name(struct pl_kv *kv, int32_t page, const uint64_t chain[2])
{
    struct page *p = &kv->pages[page];
    memcpy(p->chain, chain, sizeof p->chain);
    p->named = true;
    p->bucket_next = *bucket(kv, chain);
    *bucket(kv, chain) = page;
}

static void forget_name(struct pl_kv *kv, int32_t page)
{
    int32_t *at = bucket(kv, kv->pages[page].chain);
    while (*at != page)
        at = &kv->pages[*at].bucket_next;
    *at = kv->pages[page].bucket_next;
    kv->pages[page].named = false;
}

/* ---- known tokens -------------------------------------------------------------------------------------------------- */

static int32_t *siblings(const struct pl_kv *kv, const uint64_t before[2])
{
    return &kv->siblings[before[0] & kv->mask];
}

/* The first n of the tokens of a page after `before` have been computed. */
static void know(struct pl_kv *kv, int32_t page, const uint64_t before[2], const int32_t *tokens, uint32_t n)
{
    struct page *p = &kv->pages[page];
    if (p->n_known == 0) {
        int32_t *head = siblings(kv, before);
        memcpy(p->before, before, sizeof p->before);
        p->sibling_prev = NONE;
        p->sibling_next = *head;
        if (*head != NONE)
            kv->pages[*head].sibling_prev = page;
        *head = page;
    }
    memcpy(p->tokens + p->n_known, tokens + p->n_known, (n - p->n_known) * sizeof *tokens);
    p->n_known = n;
}

static void forget(struct pl_kv *kv, int32_t page)
{
    struct page *p = &kv->pages[page];
    if (p->named)
        forget_name(kv, page);
    if (p->n_known == 0)
        return;
    *(p->sibling_prev != NONE ? &kv->pages[p->sibling_prev].sibling_next : siblings(kv, p->before)) = p->sibling_next;
    if (p->sibling_next != NONE)
        kv->pages[p->sibling_next].sibling_prev = p->sibling_prev;
    p->n_known = 0;
}

/* The page after `before` that begins with most of tokens[0..n); *found = how many. */
static int32_t find_beginning(const struct pl_kv *kv, const uint64_t before[2], const int32_t *tokens, uint32_t n, uint32_t *found)
{
    int32_t best = NONE;
    uint32_t looked = 0;
    *found = 0;
    for (int32_t i = *siblings(kv, before); i != NONE && looked < MOST_SIBLINGS && *found < n; i = kv->pages[i].sibling_next, looked++) {
        const struct page *p = &kv->pages[i];
        uint32_t same = 0;
        if (memcmp(p->before, before, sizeof p->before) != 0)
            continue;
        while (same < n && same < p->n_known && p->tokens[same] == tokens[same])
            same++;
        if (same > *found) {
            best = i;
            *found = same;
        }
    }
    return best;
}

/* ---- lists --------------------------------------------------------------------------------------------------------- */

static void lru_remove(struct pl_kv *kv, int32_t i)
{
    struct page *p = &kv->pages[i];
    *(p->prev != NONE ? &kv->pages[p->prev].next : &kv->lru_old) = p->next;
    *(p->next != NONE ? &kv->pages[p->next].prev : &kv->lru_new) = p->prev;
    kv->n_cached--;
}

static void lru_append(struct pl_kv *kv, int32_t i)
{
    kv->pages[i].prev = kv->lru_new;
    kv->pages[i].next = NONE;
    *(kv->lru_new != NONE ? &kv->pages[kv->lru_new].next : &kv->lru_old) = i;
    kv->lru_new = i;
    kv->n_cached++;
}

static void free_push(struct pl_kv *kv, int32_t i)
{
    kv->pages[i].next = kv->free_head;
    kv->free_head = i;
    kv->n_free++;
}

/* A page for somebody to hold: a free one, else the cached one that was not used for longest. There is one. */
static int32_t take_page(struct pl_kv *kv)
{
    int32_t i = kv->free_head;
    if (i != NONE) {
        kv->free_head = kv->pages[i].next;
        kv->n_free--;
    } else {
        i = kv->lru_old;
        lru_remove(kv, i);
        forget(kv, i);
    }
    kv->pages[i].refs = 1;
    return i;
}

static void hold_page(struct pl_kv *kv, int32_t i)
{
    if (kv->pages[i].refs++ == 0)
        lru_remove(kv, i);
}

static void drop_page(struct pl_kv *kv, int32_t i)
{
    PL_ASSERT(kv->pages[i].refs > 0);
    if (--kv->pages[i].refs > 0)
        return;
    if (kv->pages[i].n_known > 0)
        lru_append(kv, i);
    else
        free_push(kv, i);
}

/* Room for n pages in all. */
static bool table_reserve(struct pl_kv_table *t, uint32_t n)
{
    if (n <= t->cap)
        return true;
    const uint32_t cap = n > 2 * t->cap ? (n > 16 ? n : 16) : 2 * t->cap;
    uint32_t *more = realloc(t->pages, cap * sizeof *more);
    if (more == NULL)
        return false;
    t->pages = more;
    t->cap = cap;
    return true;
}

/* ---- public -------------------------------------------------------------------------------------------------------- */

pl_status pl_kv_new(struct pl_kv **out, uint32_t n_pages, uint64_t salt, struct pl_err *err)
{
    if (n_pages < 1 || n_pages > INT32_MAX / 2)
        return pl_fail(err, PL_EINVAL, "%u cache pages are not possible", n_pages);
    struct pl_kv *kv = calloc(1, sizeof *kv);
    uint32_t n_buckets = 16;
    while (n_buckets < n_pages)
        n_buckets *= 2;
    if (kv == NULL || (kv->pages = calloc(n_pages, sizeof *kv->pages)) == NULL ||
        (kv->buckets = malloc(n_buckets * sizeof *kv->buckets)) == NULL ||
        (kv->siblings = malloc(n_buckets * sizeof *kv->siblings)) == NULL) {
        pl_kv_free(kv);
        return pl_fail(err, PL_ENOMEM, "no memory for the book-keeping of %u cache pages", n_pages);
    }
    kv->n = n_pages;
    kv->mask = n_buckets - 1;
    kv->salt = salt;
    kv->free_head = kv->lru_old = kv->lru_new = NONE;
    for (uint32_t i = 0; i < n_buckets; i++)
        kv->buckets[i] = kv->siblings[i] = NONE;
    for (uint32_t i = n_pages; i-- > 0;)
        free_push(kv, (int32_t)i);
    *out = kv;
    return PL_OK;
}

void pl_kv_free(struct pl_kv *kv)
{
    if (kv == NULL)
        return;
    free(kv->pages);
    free(kv->buckets);
    free(kv->siblings);
    free(kv);
}

/* Gives the table a page of its own for the beginning of a cached page, if that has any of tokens[0..n). */
static void match_beginning(struct pl_kv *kv, struct pl_kv_table *t, const int32_t *tokens, uint32_t n, struct pl_kv_copy *copy)
{
    uint32_t found;
    const int32_t from = find_beginning(kv, t->chain, tokens, n, &found);
    if (from == NONE)
        return;
    hold_page(kv, from); /* else it might be the one that is taken */
    if (pl_kv_available(kv) > 0 && table_reserve(t, t->n_pages + 1)) {
        const uint32_t to = (uint32_t)take_page(kv);
        t->pages[t->n_pages++] = to;
        *copy = (struct pl_kv_copy){(uint32_t)from, to, found};
    }
    drop_page(kv, from);
}

uint32_t pl_kv_match(struct pl_kv *kv, struct pl_kv_table *t, uint64_t family, const int32_t *tokens, uint32_t n, struct pl_kv_copy *copy)
{
    PL_ASSERT(t->n_pages == 0);
    uint32_t done = 0;
    t->n_named = 0;
    t->chain[0] = family;
    t->chain[1] = 0;
    for (; done + PL_KV_PAGE < n; done += PL_KV_PAGE) {
        uint64_t chain[2];
        chain_hash(kv, t->chain, tokens + done, chain);
        int32_t i = find_named(kv, t->chain, chain, tokens + done);
        if (i == NONE || !table_reserve(t, t->n_pages + 1))
            break;
        hold_page(kv, i);
        t->pages[t->n_pages++] = (uint32_t)i;
        memcpy(t->chain, chain, sizeof chain);
        t->n_named++;
    }
    if (copy == NULL)
        return done;
    copy->n = 0;
    if (done + 1 < n)
        match_beginning(kv, t, tokens + done, n - done - 1, copy);
    return done + copy->n;
}

pl_status pl_kv_reserve(struct pl_kv *kv, struct pl_kv_table *t, uint32_t n_tokens)
{
    uint32_t need = n_tokens / PL_KV_PAGE + (n_tokens % PL_KV_PAGE != 0);
    if (need <= t->n_pages)
        return PL_OK;
    if (need - t->n_pages > pl_kv_available(kv))
        return PL_ENOPAGE;
    if (!table_reserve(t, need))
        return PL_ENOMEM;
    while (t->n_pages < need)
        t->pages[t->n_pages++] = (uint32_t)take_page(kv);
    return PL_OK;
}

void pl_kv_commit(struct pl_kv *kv, struct pl_kv_table *t, const int32_t *tokens, uint32_t n_done)
{
    for (uint32_t at; (at = t->n_named * PL_KV_PAGE) < n_done; t->n_named++) {
        const int32_t page = (int32_t)t->pages[t->n_named];
        know(kv, page, t->chain, tokens + at, n_done - at < PL_KV_PAGE ? n_done - at : PL_KV_PAGE);
        if (n_done - at < PL_KV_PAGE)
            return;
        uint64_t chain[2];
        chain_hash(kv, t->chain, tokens + at, chain);
        /* another sequence may have computed the same page meanwhile: one of the two is not found any more */
        if (find_named(kv, t->chain, chain, tokens + at) == NONE)
            set_name(kv, page, chain);
        else
            forget(kv, page);
        memcpy(t->chain, chain, sizeof chain);
    }
}

void pl_kv_release(struct pl_kv *kv, struct pl_kv_table *t)
{
    /* last page first, so that the beginning of a prompt outlives its end */
    for (uint32_t i = t->n_pages; i-- > 0;)
        drop_page(kv, (int32_t)t->pages[i]);
    free(t->pages);
    *t = (struct pl_kv_table){0};
}

uint32_t pl_kv_total(const struct pl_kv *kv)
{
    return kv->n;
}

uint32_t pl_kv_held(const struct pl_kv *kv)
{
    return kv->n - kv->n_free - kv->n_cached;
}

uint32_t pl_kv_cached(const struct pl_kv *kv)
{
    return kv->n_cached;
}

uint32_t pl_kv_available(const struct pl_kv *kv)
{
    return kv->n_free + kv->n_cached;
}

void pl_kv_check(const struct pl_kv *kv)
{
    uint32_t n_free = 0, n_cached = 0, n_held = 0, n_named = 0, n_hashed = 0, n_known = 0, n_siblings = 0;
    for (int32_t i = kv->free_head; i != NONE; i = kv->pages[i].next, n_free++)
        PL_ASSERT(kv->pages[i].refs == 0 && kv->pages[i].n_known == 0 && n_free < kv->n);
    for (int32_t i = kv->lru_old, prev = NONE; i != NONE; prev = i, i = kv->pages[i].next, n_cached++)
        PL_ASSERT(kv->pages[i].refs == 0 && kv->pages[i].n_known > 0 && kv->pages[i].prev == prev && n_cached < kv->n);
    for (uint32_t i = 0; i < kv->n; i++) {
        const struct page *p = &kv->pages[i];
        n_held += p->refs > 0;
        n_named += p->named;
        n_known += p->n_known > 0;
        PL_ASSERT(p->n_known <= PL_KV_PAGE && p->named == (p->n_known == PL_KV_PAGE));
    }
    for (uint32_t b = 0; b <= kv->mask; b++) {
        for (int32_t i = kv->buckets[b]; i != NONE; i = kv->pages[i].bucket_next, n_hashed++)
            PL_ASSERT(kv->pages[i].named && (kv->pages[i].chain[0] & kv->mask) == b && n_hashed < kv->n);
        for (int32_t i = kv->siblings[b], prev = NONE; i != NONE; prev = i, i = kv->pages[i].sibling_next, n_siblings++)
            PL_ASSERT(kv->pages[i].n_known > 0 && (kv->pages[i].before[0] & kv->mask) == b && kv->pages[i].sibling_prev == prev &&
                      n_siblings < kv->n);
    }
    PL_ASSERT(n_free == kv->n_free && n_cached == kv->n_cached && n_free + n_cached + n_held == kv->n);
    PL_ASSERT(n_named == n_hashed && n_known == n_siblings);
}
