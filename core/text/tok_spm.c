/* tok_spm: SentencePiece's BPE: characters are symbols, and the adjacent pair whose joined text is the token with the
 * highest score is joined until none is left; what is no token then is written as byte tokens, or as one unknown token for
 * each run of such symbols where the vocabulary has no byte tokens. User-defined tokens are symbols that are never joined.
 * Source: Kudo and Richardson 2018, "SentencePiece".
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/text/tok_int.h"

struct symbol {
    size_t at;
    uint32_t n; /* bytes; 0 = joined to the left */
    bool whole; /* a user-defined token */
    int32_t prev, next;
};

struct candidate {
    float score;
    int32_t left;
    uint32_t n; /* bytes of the joined text: tells whether it is still current */
};

struct work {
    const struct pl_tok *t;
    const char *s;
    struct symbol *symbols;
    struct candidate *heap;
    size_t n_heap;
};

static bool before(const struct candidate *a, const struct candidate *b)
{
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

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

static void consider(struct work *w, int32_t left)
{
    int32_t right = left >= 0 ? w->symbols[left].next : -1;
    if (right < 0 || w->symbols[left].whole || w->symbols[right].whole)
        return;
    uint32_t n = w->symbols[left].n + w->symbols[right].n;
    int32_t id = n <= w->t->longest ? pl_tok_map_find(w->t, w->s + w->symbols[left].at, n) : -1;
    if (id >= 0)
        heap_push(w, (struct candidate){w->t->score[id], left, n});
}

static void join_all(struct work *w)
{
    while (w->n_heap > 0) {
        struct candidate c = heap_pop(w);
        struct symbol *left = &w->symbols[c.left];
        if (left->n == 0 || left->next < 0 || left->n + w->symbols[left->next].n != c.n)
            continue;
        struct symbol *right = &w->symbols[left->next];
        left->n = c.n;
        right->n = 0;
        left->next = right->next;
        if (left->next >= 0)
            w->symbols[left->next].prev = c.left;
        consider(w, left->prev);
        consider(w, c.left);
    }
}

/* unknown: whether the symbol before was written as the unknown token. */
static pl_status emit(const struct work *w, const struct symbol *sym, bool *unknown, struct pl_ids *ids)
{
    const struct pl_tok *t = w->t;
    int32_t id = pl_tok_map_find(t, w->s + sym->at, sym->n);
    bool again = *unknown;
    *unknown = id < 0 && t->byte_id[0] < 0; /* there are all byte tokens or none */
    if (id >= 0)
        return pl_ids_push(ids, id);
    if (*unknown)
        return again ? PL_OK : pl_ids_push(ids, t->unk);
    pl_status st = PL_OK;
    for (uint32_t i = 0; i < sym->n && st == PL_OK; i++)
        st = pl_ids_push(ids, t->byte_id[(unsigned char)w->s[sym->at + i]]);
    return st;
}

pl_status pl_tok_spm(const struct pl_tok *t, const char *s, size_t n, size_t max, struct pl_ids *ids)
{
    if (pl_tok_exceeds(t, n, max, ids->n))
        return PL_ETOOLONG;
    if (n > INT32_MAX / 4)
        return PL_ERANGE;
    struct work w = {.t = t, .s = s, .symbols = malloc((n + 1) * sizeof *w.symbols), .heap = malloc((3 * n + 1) * sizeof *w.heap)};
    pl_status st = w.symbols != NULL && w.heap != NULL ? PL_OK : PL_ENOMEM;
    int32_t count = 0;
    for (size_t i = 0; i < n && st == PL_OK; count++) {
        uint32_t cp;
        int32_t user = t->has_user ? pl_tok_special_at(t, s + i, n - i, 0, true) : -1;
        int len = pl_utf8_decode(s + i, n - i, &cp);
        size_t bytes = len > 0 ? (size_t)len : 1;
        if (user >= 0)
            (void)pl_tok_text(t, user, &bytes);
        w.symbols[count] = (struct symbol){i, (uint32_t)bytes, user >= 0, count - 1, count + 1};
        i += bytes;
    }
    if (count > 0 && st == PL_OK) {
        w.symbols[count - 1].next = -1;
        for (int32_t i = 0; i + 1 < count; i++)
            consider(&w, i);
        join_all(&w);
        bool unknown = false;
        for (int32_t i = 0; i >= 0 && st == PL_OK; i = w.symbols[i].next)
            st = max > 0 && ids->n > max ? PL_ETOOLONG : emit(&w, &w.symbols[i], &unknown, ids);
    }
    free(w.symbols);
    free(w.heap);
    return st;
}
