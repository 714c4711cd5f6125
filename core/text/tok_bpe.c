/* tok_bpe: byte-level byte pair encoding: each byte of a fragment is a symbol, and the adjacent pair with the lowest rank
 * is joined until none is left. A heap of candidate pairs keeps this at O(n log n) for any text.
 * Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; GPT-2's byte alphabet.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/text/tok_int.h"

struct symbol {
    int32_t id; /* -1 = joined to the left */
    int32_t prev, next;
};

struct candidate {
    uint32_t rank;
    int32_t at; /* left symbol */
    int32_t left, right, joined;
};

struct work {
    const struct pl_tok *t;
    struct pl_ids *ids;
    size_t max;
    struct symbol *symbols;
    struct candidate *heap;
    size_t n_heap, cap;
};

static bool before(const struct candidate *a, const struct candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

/* The heap never holds more than two candidates per symbol: room is there. */
static void heap_push(struct work *w, struct candidate c)
{
    size_t i = w->n_heap++;
    for (; i > 0 && before(&c, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
}

static struct candidate heap_pop(struct work *w)
{
    struct candidate top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && before(&w->heap[child + 1], &w->heap[child]))
            child++;
        if (!before(&w->heap[child], &last))
            break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

static const struct pl_tok_merge *find_merge(const struct pl_tok *t, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint32_t i = (uint32_t)((pair * 0x9e3779b97f4a7c15u) >> 32) & t->merge_mask;; i = (i + 1) & t->merge_mask) {
        if (t->merges[i].pair == pair)
            return &t->merges[i];
        if (t->merges[i].pair == UINT64_MAX)
            return NULL;
    }
}

static void consider(struct work *w, int32_t left)
{
    int32_t right = left >= 0 ? w->symbols[left].next : -1;
    if (right < 0)
        return;
    const struct pl_tok_merge *m = find_merge(w->t, w->symbols[left].id, w->symbols[right].id);
    if (m != NULL)
        heap_push(w, (struct candidate){m->rank, left, w->symbols[left].id, w->symbols[right].id, m->id});
}

static void join_all(struct work *w)
{
    while (w->n_heap > 0) {
        struct candidate c = heap_pop(w);
        struct symbol *left = &w->symbols[c.at];
        if (left->id != c.left || left->next < 0 || w->symbols[left->next].id != c.right)
            continue; /* one of the two was joined meanwhile */
        struct symbol *right = &w->symbols[left->next];
        left->id = c.joined;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            w->symbols[left->next].prev = c.at;
        consider(w, left->prev);
        consider(w, c.at);
    }
}

static pl_status reserve(struct work *w, size_t n)
{
    if (n <= w->cap)
        return PL_OK;
    if (n > INT32_MAX / 4)
        return PL_ERANGE;
    size_t cap = n * 2;
    void *symbols = realloc(w->symbols, cap * sizeof *w->symbols);
    if (symbols != NULL)
        w->symbols = symbols;
    void *heap = realloc(w->heap, 3 * cap * sizeof *w->heap);
    if (heap != NULL)
        w->heap = heap;
    if (symbols == NULL || heap == NULL)
        return PL_ENOMEM;
    w->cap = cap;
    return PL_OK;
}

static pl_status fragment(void *arg, const char *s, size_t n)
{
    struct work *w = arg;
    if (w->max > 0 && (w->ids->n > w->max || pl_tok_exceeds(w->t, n, w->max, w->ids->n)))
        return PL_ETOOLONG;
    if (w->max > 0 && n > PL_TOK_MAX_WORD)
        return PL_ERANGE;
    int32_t whole = n == 1 ? w->t->byte_id[(unsigned char)s[0]] : w->t->ignore_merges ? pl_tok_map_find(w->t, s, n) : -1;
    if (whole >= 0)
        return pl_ids_push(w->ids, whole);
    pl_status st = reserve(w, n);
    if (st != PL_OK)
        return st;
    int32_t count = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = w->t->byte_id[(unsigned char)s[i]];
        if (id < 0 && (id = w->t->unk) < 0)
            continue; /* the vocabulary has no way to write this byte */
        w->symbols[count] = (struct symbol){id, count - 1, count + 1};
        count++;
    }
    if (count == 0)
        return PL_OK;
    w->symbols[count - 1].next = -1;
    w->n_heap = 0;
    for (int32_t i = 0; i + 1 < count; i++)
        consider(w, i);
    join_all(w);
    for (int32_t i = 0; i >= 0 && st == PL_OK; i = w->symbols[i].next)
        st = pl_ids_push(w->ids, w->symbols[i].id);
    return st;
}

pl_status pl_tok_bpe(const struct pl_tok *t, const char *s, size_t n, size_t max, struct pl_ids *ids)
{
    struct work w = {.t = t, .ids = ids, .max = max};
    if (pl_tok_exceeds(t, n, max, ids->n))
        return PL_ETOOLONG;
    pl_status st = pl_pretok_split(t->pretok, s, n, fragment, &w);
    free(w.symbols);
    free(w.heap);
    return st;
}
