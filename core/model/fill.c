/* fill: steps of decodes in a few sizes only.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/fill.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

bool pl_fill_decodes(const struct pl_batch *b)
{
    bool adapted = false;
    for (uint32_t i = 0; b->adapter != NULL && i < b->n_seqs; i++)
        adapted |= b->adapter[i] != 0;
    return b->n_tokens == b->n_seqs && b->n_rows == b->n_seqs && !adapted;
}

/* The array's next n words: the first `known` of them from `from`. */
static uint32_t *take(uint32_t **at, const void *from, uint32_t known, uint32_t n)
{
    uint32_t *const words = *at;
    memcpy(words, from, known * sizeof *words);
    *at += n;
    return words;
}

bool pl_fill(struct pl_fill *f, const struct pl_batch *b, uint32_t n, struct pl_batch *out)
{
    const uint32_t T = b->n_tokens, n_pages = b->page_start[T];
    if (!pl_reserve_words(&f->words, &f->cap, 8 * ((size_t)n + 1) + n_pages))
        return false;
    uint32_t *at = f->words;
    uint32_t *const tokens = take(&at, b->tokens, T, n), *const pos = take(&at, b->pos, T, n), *const slot = take(&at, b->slot, T, n);
    uint32_t *const q_start = take(&at, b->q_start, T + 1, n + 1), *const ctx = take(&at, b->ctx, T, n);
    uint32_t *const page_start = take(&at, b->page_start, T + 1, n + 1), *const rows = take(&at, b->rows, T, n);
    uint32_t *const pages = take(&at, b->pages, n_pages, n_pages + n - T);
    for (uint32_t i = T; i < n; i++) {
        tokens[i] = pos[i] = 0;
        slot[i] = PL_NO_ROW;
        q_start[i + 1] = i + 1;
        ctx[i] = 1;
        page_start[i + 1] = page_start[i] + 1;
        pages[page_start[i]] = 0;
        rows[i] = i;
    }
    *out = (struct pl_batch){.n_tokens = n, .n_seqs = n, .n_rows = n, .tokens = (const int32_t *)tokens, .pos = pos, .slot = slot, .q_start = q_start,
                             .ctx = ctx, .page_start = page_start, .pages = pages, .rows = rows};
    return true;
}

void pl_fill_fini(struct pl_fill *f)
{
    free(f->words);
    *f = (struct pl_fill){0};
}
