/* step: the memory that an iteration's batch is built in, and the building.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/step.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/sched/adapters.h"

pl_status pl_step_init(struct pl_step *s, uint32_t batch_tokens, uint32_t max_sequences)
{
    const size_t t = batch_tokens, n = max_sequences;
    *s = (struct pl_step){.pages_cap = 16 * n};
    s->tokens = malloc(t * sizeof *s->tokens);
    s->pos = malloc(t * sizeof *s->pos);
    s->slot = malloc(t * sizeof *s->slot);
    s->rows = malloc(t * sizeof *s->rows);
    s->q_start = malloc((n + 1) * sizeof *s->q_start);
    s->ctx = malloc(n * sizeof *s->ctx);
    s->first_row = malloc(n * sizeof *s->first_row);
    s->page_start = malloc((n + 1) * sizeof *s->page_start);
    s->adapter = malloc(n * sizeof *s->adapter);
    s->pages = malloc(s->pages_cap * sizeof *s->pages);
    s->seqs = malloc(n * sizeof(void *));
    s->plan = malloc(n * sizeof *s->plan);
    bool all = s->tokens != NULL && s->pos != NULL && s->slot != NULL && s->rows != NULL && s->q_start != NULL && s->ctx != NULL && s->first_row != NULL &&
               s->page_start != NULL && s->adapter != NULL && s->pages != NULL && s->seqs != NULL && s->plan != NULL;
    return all ? PL_OK : PL_ENOMEM; /* what is there is freed by pl_step_fini */
}

void pl_step_fini(struct pl_step *s)
{
    void *const blocks[] = {s->tokens, s->pos, s->slot, s->rows, s->q_start, s->ctx, s->page_start, s->pages, s->seqs, s->plan, s->first_row, s->adapter};
    for (size_t i = 0; i < PL_COUNT_OF(blocks); i++)
        free(blocks[i]);
    *s = (struct pl_step){0};
}

pl_status pl_step_build(struct pl_step *st, uint32_t n_seqs, struct pl_batch *b)
{
    uint32_t t = 0, rows = 0, n_pages = 0;
    bool adapted = false;
    st->n_seqs = n_seqs;
    st->q_start[0] = st->page_start[0] = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        const struct pl_seq *s = st->seqs[i];
        if (!pl_reserve_words(&st->pages, &st->pages_cap, (size_t)n_pages + s->table.n_pages))
            return PL_ENOMEM;
        memcpy(st->pages + n_pages, s->table.pages, s->table.n_pages * sizeof *st->pages);
        n_pages += s->table.n_pages;
        st->first_row[i] = rows;
        const uint32_t end = s->n_done + s->take + s->draft.n;
        for (uint32_t pos = s->n_done; pos < end; pos++, t++) {
            st->tokens[t] = pos < s->n_tokens ? s->tokens[pos] : s->draft.ids[pos - s->n_tokens];
            st->pos[t] = pos;
            st->slot[t] = s->table.pages[pos / PL_KV_PAGE] * PL_KV_PAGE + pos % PL_KV_PAGE;
            if (pl_seq_wants_all_rows(s) || pos + 1 >= s->n_tokens)
                st->rows[rows++] = t;
        }
        st->q_start[i + 1] = t;
        st->ctx[i] = end;
        st->adapter[i] = s->job->req->adapter != NULL ? s->job->req->adapter->slot : 0;
        adapted |= st->adapter[i] != 0;
        st->page_start[i + 1] = n_pages;
    }
    *b = (struct pl_batch){.n_tokens = t, .n_seqs = n_seqs, .n_rows = rows, .tokens = st->tokens, .pos = st->pos, .slot = st->slot,
                           .q_start = st->q_start, .ctx = st->ctx, .page_start = st->page_start, .pages = st->pages, .rows = st->rows,
                           .adapter = adapted ? st->adapter : NULL};
    return PL_OK;
}

void pl_step_forget(struct pl_step *st, const struct pl_seq *s)
{
    for (uint32_t i = 0; i < st->n_seqs; i++)
        if (st->seqs[i] == s)
            st->seqs[i] = NULL;
}
