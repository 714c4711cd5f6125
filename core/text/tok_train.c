/* tok_train: learns a byte-level BPE vocabulary from text.
 *
 * The distinct fragments lie in one row of cells, a cell for each byte, with a border between two fragments:
 *
 *     | t h e | t h e r e |          | t h e | t he . r e |         a cell: the id of the token that begins there, ~begin at
 *                                                                   the last byte of a longer token, BORDER
 *
 * Each pair of neighbours knows its number (every place weighted by how often its fragment stands in the text) and the cells
 * where it begins, ascending. Joining a pair looks at its own cells alone; cells that have changed since are told by what
 * stands there. A heap keeps the pairs by number; a number that has fallen is put right when the pair comes up. All together
 * takes O(n log n) for n bytes of distinct fragments.
 * Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/tok_train.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/text/tok_int.h"

/* ---- counting ------------------------------------------------------------------------------------------------------- */

struct fragment {
    uint32_t at, n; /* in text */
    uint64_t count;
};

struct pl_tok_trainer {
    struct pl_pretok *pretok;
    struct fragment *fragments;
    uint32_t n, cap;
    uint32_t *slots; /* index + 1, 0 = empty */
    uint32_t mask;
    char *text; /* each fragment between two borders */
    uint32_t n_text, cap_text;
    bool full;
};

pl_status pl_tok_trainer_new(struct pl_tok_trainer **out, const char *pre, struct pl_err *err)
{
    bool ignore_merges;
    struct pl_tok_trainer *t = pl_xcalloc(1, sizeof *t);
    const pl_status st = pl_pretok_new(&t->pretok, pre, strlen(pre), &ignore_merges, err);
    t->n_text = 1;
    if (st == PL_OK)
        *out = t;
    else
        pl_tok_trainer_free(t);
    return st;
}

void pl_tok_trainer_free(struct pl_tok_trainer *t)
{
    if (t == NULL)
        return;
    pl_pretok_free(t->pretok);
    free(t->fragments);
    free(t->slots);
    free(t->text);
    free(t);
}

static uint32_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
    return (uint32_t)(h ^ h >> 32);
}

static bool grow_slots(struct pl_tok_trainer *t)
{
    const uint32_t cap = t->slots != NULL ? 2 * (t->mask + 1) : 1 << 12;
    uint32_t *slots = calloc(cap, sizeof *slots);
    if (slots == NULL)
        return false;
    for (uint32_t k = 0; k < t->n; k++) {
        uint32_t i = hash_bytes(t->text + t->fragments[k].at, t->fragments[k].n) & (cap - 1);
        while (slots[i] != 0)
            i = (i + 1) & (cap - 1);
        slots[i] = k + 1;
    }
    free(t->slots);
    t->slots = slots;
    t->mask = cap - 1;
    return true;
}

static bool reserve(struct pl_tok_trainer *t, size_t n)
{
    if ((t->slots == NULL || 2 * t->n > t->mask) && !grow_slots(t))
        return false;
    if (t->n == t->cap) {
        const uint32_t cap = t->cap > 0 ? 2 * t->cap : 1 << 10;
        struct fragment *fragments = realloc(t->fragments, cap * sizeof *fragments);
        if (fragments == NULL)
            return false;
        t->fragments = fragments;
        t->cap = cap;
    }
    if (t->n_text + n + 1 > t->cap_text) {
        const size_t cap = 2 * (t->n_text + n + 1) + 4096;
        char *text = realloc(t->text, cap);
        if (text == NULL)
            return false;
        t->text = text;
        t->cap_text = (uint32_t)cap;
    }
    return true;
}

static pl_status count_fragment(void *arg, const char *s, size_t n)
{
    struct pl_tok_trainer *t = arg;
    if (n < 2) /* no pair in it */
        return PL_OK;
    if (!reserve(t, n < PL_BPE_MAX_TEXT ? n : 0))
        return PL_ENOMEM;
    uint32_t i = hash_bytes(s, n) & t->mask;
    for (; t->slots[i] != 0; i = (i + 1) & t->mask) {
        struct fragment *f = &t->fragments[t->slots[i] - 1];
        if (f->n == n && memcmp(t->text + f->at, s, n) == 0) {
            f->count++;
            return PL_OK;
        }
    }
    if (n >= PL_BPE_MAX_TEXT - t->n_text) {
        t->full = true;
        return PL_EFULL;
    }
    memcpy(t->text + t->n_text, s, n);
    t->fragments[t->n] = (struct fragment){t->n_text, (uint32_t)n, 1};
    t->n_text += (uint32_t)n + 1;
    t->slots[i] = ++t->n;
    return PL_OK;
}

pl_status pl_tok_trainer_add(struct pl_tok_trainer *t, const char *s, size_t n)
{
    return t->full ? PL_EFULL : pl_pretok_split(t->pretok, s, n, count_fragment, t);
}

/* ---- pairs ---------------------------------------------------------------------------------------------------------- */

static const int32_t BORDER = INT32_MIN;

struct pair {
    int32_t left, right;
    uint64_t count;
    uint32_t *at; /* cells */
    uint32_t n, cap;
};

struct pairs {
    struct pair *all;
    uint32_t n, cap;
    uint32_t *slots; /* index + 1 */
    uint32_t mask;
};

struct candidate {
    uint64_t count; /* when it was put in: at least what it is now */
    uint32_t pair;
};

struct learner {
    const struct pl_tok_trainer *t;
    struct pl_bpe *bpe;
    uint32_t n_special, n_vocab;
    uint64_t min_count;
    const atomic_bool *stop;
    int32_t *cells;
    uint32_t *fragment_of; /* of each cell */
    uint16_t *width;       /* bytes of each token */
    struct pairs pairs;    /* that can be joined yet */
    struct candidate *heap;
    uint32_t n_heap, cap_heap;
    /* The pairs that a step makes: all have the new token in them. with_left[x]: x and the new one; with_right[y]: the new
     * one and y, which may be the new one again. Index + 1. */
    int32_t made;
    uint32_t *with_left, *with_right;
    struct pair *fresh;
    uint32_t n_fresh, cap_fresh;
};

static bool stopped(const struct learner *l)
{
    return l->stop != NULL && atomic_load_explicit(l->stop, memory_order_relaxed);
}

static uint32_t hash_pair(int32_t left, int32_t right)
{
    return (uint32_t)((((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u) >> 32);
}

static struct pair *find_pair(const struct pairs *p, int32_t left, int32_t right)
{
    for (uint32_t i = hash_pair(left, right) & p->mask; p->slots[i] != 0; i = (i + 1) & p->mask) {
        struct pair *x = &p->all[p->slots[i] - 1];
        if (x->left == left && x->right == right)
            return x;
    }
    return NULL;
}

static bool grow_pairs(struct pairs *p)
{
    const uint32_t cap = p->cap > 0 ? 2 * p->cap : 1 << 12;
    struct pair *all = realloc(p->all, cap * sizeof *all);
    if (all != NULL)
        p->all = all;
    uint32_t *slots = all != NULL ? calloc(2 * (size_t)cap, sizeof *slots) : NULL;
    if (slots == NULL)
        return false;
    free(p->slots);
    p->slots = slots;
    p->cap = cap;
    p->mask = 2 * cap - 1;
    for (uint32_t k = 0; k < p->n; k++) {
        uint32_t i = hash_pair(p->all[k].left, p->all[k].right) & p->mask;
        while (slots[i] != 0)
            i = (i + 1) & p->mask;
        slots[i] = k + 1;
    }
    return true;
}

/* Pairs come up in order of their numbers, and equal ones in order of their ids. */
static bool before(const struct learner *l, const struct candidate *a, const struct candidate *b)
{
    if (a->count != b->count)
        return a->count > b->count;
    const struct pair *x = &l->pairs.all[a->pair], *y = &l->pairs.all[b->pair];
    return x->left != y->left ? x->left < y->left : x->right < y->right;
}

static bool heap_push(struct learner *l, uint32_t pair)
{
    if (l->n_heap == l->cap_heap) {
        const uint32_t cap = l->cap_heap > 0 ? 2 * l->cap_heap : 1 << 12;
        struct candidate *heap = realloc(l->heap, cap * sizeof *heap);
        if (heap == NULL)
            return false;
        l->heap = heap;
        l->cap_heap = cap;
    }
    const struct candidate c = {l->pairs.all[pair].count, pair};
    uint32_t i = l->n_heap++;
    for (; i > 0 && before(l, &c, &l->heap[(i - 1) / 2]); i = (i - 1) / 2)
        l->heap[i] = l->heap[(i - 1) / 2];
    l->heap[i] = c;
    return true;
}

static struct candidate heap_pop(struct learner *l)
{
    const struct candidate top = l->heap[0], last = l->heap[--l->n_heap];
    uint32_t i = 0;
    for (uint32_t child; (child = 2 * i + 1) < l->n_heap; i = child) {
        if (child + 1 < l->n_heap && before(l, &l->heap[child + 1], &l->heap[child]))
            child++;
        if (!before(l, &l->heap[child], &last))
            break;
        l->heap[i] = l->heap[child];
    }
    l->heap[i] = last;
    return top;
}

/* Takes the pair over, with its cells, when it can be joined some time. */
static bool keep_pair(struct learner *l, struct pair *x)
{
    struct pairs *p = &l->pairs;
    if (x->count < l->min_count || x->n == 0) { /* numbers only fall */
        free(x->at);
        return true;
    }
    if (p->n == p->cap && !grow_pairs(p)) {
        free(x->at);
        return false;
    }
    uint32_t i = hash_pair(x->left, x->right) & p->mask;
    while (p->slots[i] != 0)
        i = (i + 1) & p->mask;
    p->all[p->n] = *x;
    p->slots[i] = ++p->n;
    return heap_push(l, p->n - 1);
}

static bool add_cell(struct pair *x, uint32_t at)
{
    if (x->n == x->cap) {
        const uint32_t cap = x->cap > 0 ? 2 * x->cap : 4;
        uint32_t *cells = realloc(x->at, cap * sizeof *cells);
        if (cells == NULL)
            return false;
        x->at = cells;
        x->cap = cap;
    }
    x->at[x->n++] = at;
    return true;
}

static uint32_t *fresh_slot(struct learner *l, int32_t left, int32_t right)
{
    return left == l->made ? &l->with_right[right] : &l->with_left[left];
}

static bool more_of(struct learner *l, int32_t left, int32_t right, uint64_t count, uint32_t at)
{
    if (l->width[left] + l->width[right] > PL_BPE_MAX_TOKEN)
        return true;
    uint32_t *slot = fresh_slot(l, left, right);
    if (*slot == 0) {
        if (l->n_fresh == l->cap_fresh) {
            const uint32_t cap = l->cap_fresh > 0 ? 2 * l->cap_fresh : 64;
            struct pair *fresh = realloc(l->fresh, cap * sizeof *fresh);
            if (fresh == NULL)
                return false;
            l->fresh = fresh;
            l->cap_fresh = cap;
        }
        l->fresh[l->n_fresh] = (struct pair){.left = left, .right = right};
        *slot = ++l->n_fresh;
    }
    struct pair *x = &l->fresh[*slot - 1];
    x->count += count;
    return add_cell(x, at);
}

static void less_of(struct learner *l, int32_t left, int32_t right, uint64_t count)
{
    struct pair *x = NULL;
    if (left == l->made || right == l->made) {
        const uint32_t slot = *fresh_slot(l, left, right);
        x = slot != 0 ? &l->fresh[slot - 1] : NULL;
    } else {
        x = find_pair(&l->pairs, left, right);
    }
    if (x != NULL)
        x->count -= count;
}

/* ---- learning ------------------------------------------------------------------------------------------------------- */

/* Joins the pair in all its cells. */
static bool join(struct learner *l, int32_t left, int32_t right, const uint32_t *at, uint32_t n)
{
    int32_t *cells = l->cells;
    bool ok = true;
    for (uint32_t i = 0; i < n && ok && !stopped(l); i++) {
        const uint32_t a = at[i], b = a + l->width[left];
        if (cells[a] != left || cells[b] != right)
            continue; /* one of the two was joined meanwhile */
        const uint32_t end = b + l->width[right];
        const uint64_t count = l->t->fragments[l->fragment_of[a]].count;
        const int32_t before_a = cells[a - 1];
        if (before_a != BORDER) {
            const uint32_t prev = before_a >= 0 ? a - 1 : (uint32_t)~before_a;
            less_of(l, cells[prev], left, count);
            ok = more_of(l, cells[prev], l->made, count, prev);
        }
        if (cells[end] != BORDER) {
            less_of(l, right, cells[end], count);
            ok = ok && more_of(l, l->made, cells[end], count, a);
        }
        cells[a] = l->made;
        cells[b] = cells[end - 1] = ~(int32_t)a;
    }
    return ok;
}

/* Takes over what the step has made, and forgets it. */
static bool end_step(struct learner *l, bool ok)
{
    for (uint32_t i = 0; i < l->n_fresh; i++) {
        struct pair *x = &l->fresh[i];
        *fresh_slot(l, x->left, x->right) = 0;
        if (ok)
            ok = keep_pair(l, x);
        else
            free(x->at);
    }
    l->n_fresh = 0;
    return ok;
}

static bool learn_all(struct learner *l)
{
    struct pl_bpe *bpe = l->bpe;
    bool ok = true;
    while (ok && pl_bpe_n_tokens(bpe) < l->n_vocab && l->n_heap > 0 && !stopped(l)) {
        const struct candidate c = heap_pop(l);
        struct pair x = l->pairs.all[c.pair];
        if (x.count >= l->min_count && x.count < c.count) {
            ok = heap_push(l, c.pair);
            continue;
        }
        l->pairs.all[c.pair].at = NULL;
        if (x.count >= l->min_count) {
            l->made = (int32_t)pl_bpe_n_tokens(bpe);
            l->width[l->made] = (uint16_t)(l->width[x.left] + l->width[x.right]);
            bpe->merges[bpe->n_merges++] = (struct pl_bpe_merge){x.left, x.right};
            ok = end_step(l, join(l, x.left, x.right, x.at, x.n));
        }
        free(x.at);
    }
    return ok;
}

/* The id of each byte among the 256, by its place in GPT-2's alphabet; order: the other way. */
static void byte_order(uint8_t order[PL_BPE_BYTES], int32_t id_of[PL_BPE_BYTES])
{
    int16_t byte_of[512];
    int n = 0;
    pl_tok_byte_alphabet(byte_of);
    for (int c = 0; c < 512; c++)
        if (byte_of[c] >= 0) {
            order[n] = (uint8_t)byte_of[c];
            id_of[byte_of[c]] = n++;
        }
}

/* Cells of single bytes, and the pairs that they make. */
static bool begin(struct learner *l)
{
    const struct pl_tok_trainer *t = l->t;
    uint8_t order[PL_BPE_BYTES];
    int32_t id_of[PL_BPE_BYTES];
    bool ok = true;
    struct pair *pairs = calloc((size_t)PL_BPE_BYTES * PL_BPE_BYTES, sizeof *pairs);
    if (pairs == NULL)
        return false;
    byte_order(order, id_of);
    for (uint32_t i = 0; i < PL_BPE_BYTES; i++)
        l->width[l->n_special + i] = 1;
    for (uint32_t i = 0; i < t->n_text; i++)
        l->cells[i] = BORDER;
    for (uint32_t k = 0; k < t->n && ok && !stopped(l); k++) {
        const struct fragment *f = &t->fragments[k];
        for (uint32_t i = 0; i < f->n && ok; i++) {
            const int32_t id = id_of[(unsigned char)t->text[f->at + i]];
            l->cells[f->at + i] = (int32_t)l->n_special + id;
            l->fragment_of[f->at + i] = k;
            if (i == 0)
                continue;
            struct pair *x = &pairs[(l->cells[f->at + i - 1] - (int32_t)l->n_special) * PL_BPE_BYTES + id];
            x->count += f->count;
            ok = add_cell(x, f->at + i - 1);
        }
    }
    for (int32_t i = 0; i < PL_BPE_BYTES * PL_BPE_BYTES; i++) {
        pairs[i].left = (int32_t)l->n_special + i / PL_BPE_BYTES;
        pairs[i].right = (int32_t)l->n_special + i % PL_BPE_BYTES;
        if (ok)
            ok = keep_pair(l, &pairs[i]);
        else
            free(pairs[i].at);
    }
    free(pairs);
    return ok;
}

/* What each token stands for. */
static bool write_bytes(struct pl_bpe *b, const uint16_t *width)
{
    uint8_t order[PL_BPE_BYTES];
    int32_t id_of[PL_BPE_BYTES];
    const uint32_t n = PL_BPE_BYTES + b->n_merges;
    size_t total = 0;
    byte_order(order, id_of);
    for (uint32_t i = 0; i < n; i++)
        total += width[b->n_special + i];
    if (total > UINT32_MAX || (b->bytes = malloc(total)) == NULL || (b->start = malloc((n + 1) * sizeof *b->start)) == NULL)
        return false;
    b->start[0] = 0;
    for (uint32_t i = 0; i < n; i++) {
        char *to = b->bytes + b->start[i];
        b->start[i + 1] = b->start[i] + width[b->n_special + i];
        if (i < PL_BPE_BYTES) {
            *to = (char)order[i];
            continue;
        }
        const struct pl_bpe_merge *m = &b->merges[i - PL_BPE_BYTES];
        const uint32_t left = (uint32_t)m->left - b->n_special, right = (uint32_t)m->right - b->n_special;
        const uint32_t n_left = b->start[left + 1] - b->start[left];
        memcpy(to, b->bytes + b->start[left], n_left);
        memcpy(to + n_left, b->bytes + b->start[right], b->start[right + 1] - b->start[right]);
    }
    return true;
}

static void learner_fini(struct learner *l)
{
    for (uint32_t i = 0; i < l->pairs.n; i++)
        free(l->pairs.all[i].at);
    free(l->pairs.all);
    free(l->pairs.slots);
    free(l->cells);
    free(l->fragment_of);
    free(l->width);
    free(l->heap);
    free(l->with_left);
    free(l->with_right);
    free(l->fresh);
}

uint64_t pl_tok_trainer_memory(const struct pl_tok_trainer *t)
{
    enum { PER_BYTE = 40 /* of text: cell, fragment, and its places in the lists of pairs, which are doubled as they grow */ };
    return (uint64_t)t->n_text * PER_BYTE;
}

pl_status pl_tok_trainer_learn(struct pl_bpe *out, const struct pl_tok_trainer *t, uint32_t n_special, uint32_t n_vocab, uint64_t min_count,
                               const atomic_bool *stop, struct pl_err *err)
{
    struct learner l = {.t = t, .bpe = out, .n_special = n_special, .n_vocab = n_vocab, .min_count = min_count > 0 ? min_count : 1, .stop = stop,
                        .made = -1};
    const size_t most = n_vocab > n_special + PL_BPE_BYTES ? n_vocab : n_special + PL_BPE_BYTES;
    *out = (struct pl_bpe){.n_special = n_special, .merges = malloc(most * sizeof *out->merges)};
    l.cells = malloc(t->n_text * sizeof *l.cells);
    l.fragment_of = malloc(t->n_text * sizeof *l.fragment_of);
    l.width = calloc(most, sizeof *l.width);
    l.with_left = calloc(most, sizeof *l.with_left);
    l.with_right = calloc(most, sizeof *l.with_right);
    bool ok = out->merges != NULL && l.cells != NULL && l.fragment_of != NULL && l.width != NULL && l.with_left != NULL && l.with_right != NULL;
    ok = ok && grow_pairs(&l.pairs) && begin(&l) && learn_all(&l) && write_bytes(out, l.width);
    learner_fini(&l);
    if (ok && !stopped(&l))
        return PL_OK;
    pl_bpe_fini(out);
    if (stopped(&l))
        return pl_fail(err, PL_ESTOPPED, "learning the vocabulary was stopped");
    return pl_fail(err, PL_ENOMEM, "no memory to learn a vocabulary from %u bytes of distinct fragments", t->n_text);
}

void pl_bpe_fini(struct pl_bpe *b)
{
    free(b->merges);
    free(b->bytes);
    free(b->start);
    *b = (struct pl_bpe){0};
}

void pl_bpe_text(const struct pl_bpe *b, int32_t id, struct pl_buf *out)
{
    int16_t byte_of[512];
    int char_of[PL_BPE_BYTES];
    pl_tok_byte_alphabet(byte_of);
    for (int c = 0; c < 512; c++)
        if (byte_of[c] >= 0)
            char_of[byte_of[c]] = c;
    const uint32_t k = (uint32_t)id - b->n_special;
    for (uint32_t i = b->start[k]; i < b->start[k + 1]; i++) {
        const int c = char_of[(unsigned char)b->bytes[i]];
        if (c < 0x80) {
            pl_buf_addc(out, (char)c);
        } else {
            pl_buf_addc(out, (char)(0xc0 | c >> 6));
            pl_buf_addc(out, (char)(0x80 | (c & 0x3f)));
        }
    }
}
