/* run_model: runs token sequences through a model without the engine.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/tools/run_model.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "tests/tools/emulated.h"

enum { PAGE = 32 };

pl_status runner_open(struct runner *r, const struct pl_gguf *g, const char *isa, unsigned n_threads, uint32_t max_tokens,
                      struct pl_err *err)
{
    return runner_open_part(r, g, &pl_comm_single, isa, n_threads, max_tokens, err);
}

pl_status runner_open_part(struct runner *r, const struct pl_gguf *g, struct pl_comm *comm, const char *isa, unsigned n_threads,
                           uint32_t max_tokens, struct pl_err *err)
{
    *r = (struct runner){.max_tokens = max_tokens};
    pl_status rc = pl_pool_new(&r->pool, n_threads, err);
    if (rc == PL_OK)
        rc = device_open(&r->dev, r->pool, isa, err); /* ranks share the first GPU */
    if (comm->size > 1)
        rc = pl_comm_meet(&comm, comm, r->dev, PL_EXCHANGE_AUTO, rc, err);
    if (rc == PL_OK)
        rc = pl_model_load_part(&r->model, g, r->dev, comm, max_tokens, max_tokens, err);
    if (rc != PL_OK)
        runner_close(r);
    return rc;
}

void runner_close(struct runner *r)
{
    pl_model_free(r->model);
    if (r->dev != NULL)
        r->dev->ops->close(r->dev);
    pl_pool_free(r->pool);
    *r = (struct runner){0};
}

/* A batch with room for max_tokens, and the pages of each sequence. */
struct stage {
    struct pl_batch b;
    int32_t *tokens;
    uint32_t *pos, *slot, *q_start, *ctx, *page_start, *pages, *rows, *adapter;
    uint32_t n_pages;
    uint32_t *first_page; /* [n_seqs] */
};

static uint32_t pages_of(uint32_t n_tokens)
{
    return (n_tokens + PAGE - 1) / PAGE;
}

/* Pages are handed out last to first, so that page order and token order never agree by chance. */
static uint32_t page_at(const struct stage *st, uint32_t seq, uint32_t i)
{
    return st->n_pages - 1 - (st->first_page[seq] + i);
}

static void stage_init(struct stage *st, const struct run_seq *seqs, uint32_t n_seqs, uint32_t max_tokens)
{
    *st = (struct stage){0};
    st->first_page = pl_xcalloc(n_seqs, sizeof(uint32_t));
    for (uint32_t s = 0; s < n_seqs; s++) {
        st->first_page[s] = st->n_pages;
        st->n_pages += pages_of(seqs[s].n);
    }
    st->tokens = pl_xcalloc(max_tokens, sizeof(int32_t));
    st->pos = pl_xcalloc(max_tokens, sizeof(uint32_t));
    st->slot = pl_xcalloc(max_tokens, sizeof(uint32_t));
    st->rows = pl_xcalloc(max_tokens, sizeof(uint32_t));
    st->q_start = pl_xcalloc(n_seqs + 1, sizeof(uint32_t));
    st->ctx = pl_xcalloc(n_seqs, sizeof(uint32_t));
    st->adapter = pl_xcalloc(n_seqs, sizeof(uint32_t));
    st->page_start = pl_xcalloc(n_seqs + 1, sizeof(uint32_t));
    st->pages = pl_xcalloc(st->n_pages + 1, sizeof(uint32_t));
}

static void stage_fini(struct stage *st)
{
    void *all[] = {st->tokens, st->pos, st->slot, st->rows, st->q_start, st->ctx, st->page_start, st->pages, st->adapter, st->first_page};
    for (size_t i = 0; i < PL_COUNT_OF(all); i++)
        free(all[i]);
}

/* The next chunk of sequence i as the batch's next sequence. */
static void stage_add(struct stage *st, struct run_seq *s, uint32_t i)
{
    struct pl_batch *b = &st->b;
    const uint32_t left = s->n - s->n_done, n = left < s->chunk ? left : s->chunk;
    for (uint32_t end = s->n_done + n; s->n_done < end; s->n_done++) {
        const uint32_t t = b->n_tokens++, p = s->n_done;
        st->tokens[t] = s->tokens[p];
        st->pos[t] = p;
        st->slot[t] = page_at(st, i, p / PAGE) * PAGE + p % PAGE;
        if (p >= s->from)
            st->rows[b->n_rows++] = t;
    }
    uint32_t n_pages = st->page_start[b->n_seqs];
    for (uint32_t k = 0; k < pages_of(s->n_done); k++)
        st->pages[n_pages++] = page_at(st, i, k);
    st->ctx[b->n_seqs] = s->n_done;
    st->adapter[b->n_seqs] = s->adapter;
    b->n_seqs++;
    st->page_start[b->n_seqs] = n_pages;
    st->q_start[b->n_seqs] = b->n_tokens;
}

/* One step; false when every sequence is through. */
static bool stage_fill(struct stage *st, struct run_seq *seqs, uint32_t n_seqs)
{
    st->b = (struct pl_batch){
        .tokens = st->tokens,
        .pos = st->pos,
        .slot = st->slot,
        .q_start = st->q_start,
        .ctx = st->ctx,
        .page_start = st->page_start,
        .pages = st->pages,
        .rows = st->rows,
        .adapter = st->adapter,
    };
    for (uint32_t i = 0; i < n_seqs; i++) {
        if (seqs[i].n_done < seqs[i].n)
            stage_add(st, &seqs[i], i);
    }
    return st->b.n_tokens > 0;
}

/* Hands the step's rows to the sequences that they belong to. */
static void collect(struct run_seq *seqs, uint32_t n_seqs, const float *logits, size_t V, const uint32_t *before)
{
    for (uint32_t i = 0; i < n_seqs; i++) {
        struct run_seq *s = &seqs[i];
        for (uint32_t p = before[i]; p < s->n_done; p++) {
            if (p < s->from)
                continue;
            memcpy(s->logits + (size_t)(p - s->from) * V, logits, V * sizeof *logits);
            logits += V;
        }
    }
}

pl_status run_seqs(struct runner *r, struct run_seq *seqs, uint32_t n_seqs, pl_dtype kv_type)
{
    const size_t V = pl_model_spec(r->model)->n_vocab;
    struct stage st;
    struct pl_kvdev *kv = NULL;
    uint32_t *before = pl_xcalloc(n_seqs, sizeof *before);
    uint64_t step = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        seqs[i].n_done = 0;
        step += seqs[i].chunk < seqs[i].n ? seqs[i].chunk : seqs[i].n;
    }
    stage_init(&st, seqs, n_seqs, r->max_tokens);
    const struct pl_kv_shape shape = pl_model_kv_part(r->model, PAGE, st.n_pages, kv_type);
    pl_status rc = step > r->max_tokens ? PL_EINVAL : r->dev->ops->kv_new(r->dev, &shape, &kv);
    while (rc == PL_OK) {
        for (uint32_t i = 0; i < n_seqs; i++)
            before[i] = seqs[i].n_done;
        if (!stage_fill(&st, seqs, n_seqs))
            break;
        const float *logits;
        rc = pl_model_forward(r->model, kv, &st.b, &logits);
        if (rc == PL_OK && logits != NULL)
            collect(seqs, n_seqs, logits, V, before);
    }
    if (kv != NULL)
        r->dev->ops->kv_free(r->dev, kv);
    stage_fini(&st);
    free(before);
    return rc;
}
