/* drive: forward passes without the engine, over sequences of made-up tokens with cache pages of their own.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cli/drive.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/base/mem.h"
#include "core/device/draw.h"
#include "core/kv/kv.h"

bool drive_open(struct drive *d, const struct cli_model *m, uint32_t n_tokens, uint32_t n_seqs, uint32_t longest, pl_dtype kv_type)
{
    *d = (struct drive){.m = m, .n_tokens = n_tokens, .pages_per_seq = (longest + PL_KV_PAGE - 1) / PL_KV_PAGE};
    const struct pl_kv_shape shape = pl_model_kv_shape(m->model, PL_KV_PAGE, n_seqs * d->pages_per_seq, kv_type);
    uint32_t n_ctx = pl_model_spec(m->model)->n_ctx;
    m->dev->ops->attach(m->dev);
    if (m->dev->ops->kv_bytes(m->dev, &shape) == 0) {
        fprintf(stderr, "parley: %s has no cache of this type: take --kv-type q8_0\n", m->dev->ops->name);
        return false;
    }
    if (longest > n_ctx) {
        fprintf(stderr, "parley: %u tokens are more than the model's context of %u\n", longest, n_ctx);
        return false;
    }
    if (m->dev->ops->kv_new(m->dev, &shape, &d->kv) != PL_OK) {
        fprintf(stderr, "parley: no memory for the cache of %u sequences of %u tokens\n", n_seqs, longest);
        return false;
    }
    d->pages = pl_xmalloc(shape.n_pages * sizeof *d->pages);
    for (uint32_t i = 0; i < shape.n_pages; i++)
        d->pages[i] = i;
    d->draws = pl_xcalloc(DRIVE_SEQS, sizeof *d->draws);
    d->drawn = pl_xcalloc(DRIVE_SEQS, sizeof *d->drawn);
    for (uint32_t i = 0; i < DRIVE_SEQS; i++)
        d->draws[i] = (struct pl_draw){.given = -1, .n_top = -1, .top_p = 1, .repetition = 1};
    return true;
}

void drive_close(struct drive *d)
{
    if (d->kv != NULL)
        d->m->dev->ops->kv_free(d->m->dev, d->kv);
    free(d->pages);
    free(d->draws);
    free(d->drawn);
}

bool drive_step(struct drive *d, uint32_t n_seqs, uint32_t at, uint32_t n, bool logits)
{
    uint32_t t = 0, vocab = pl_model_spec(d->m->model)->n_vocab, n_rows = 0;
    const float *out;
    for (uint32_t s = 0; s < n_seqs; s++) {
        d->q_start[s] = t;
        d->page_start[s] = s * d->pages_per_seq;
        d->ctx[s] = at + n;
        for (uint32_t i = 0; i < n; i++, t++) {
            d->tokens[t] = (int32_t)(((at + i) * 7919u + s * 104729u) % vocab);
            d->pos[t] = at + i;
            d->slot[t] = s * d->pages_per_seq * PL_KV_PAGE + at + i;
        }
        if (logits)
            d->rows[n_rows++] = t - 1;
    }
    d->q_start[n_seqs] = t;
    d->page_start[n_seqs] = n_seqs * d->pages_per_seq;
    const struct pl_draws draws = {.rows = d->draws, .n_rows = n_rows};
    const bool samples = n_rows > 0 && d->m->dev->ops->sample != NULL;
    const struct pl_batch batch = {t, n_seqs, n_rows, d->tokens, d->pos, d->slot, d->q_start, d->ctx, d->page_start, d->pages, d->rows, NULL,
                                   samples ? &draws : NULL, d->drawn};
    return pl_model_forward(d->m->model, d->kv, &batch, &out) == PL_OK;
}

bool drive_fill(struct drive *d, uint32_t n_seqs, uint32_t from, uint32_t to)
{
    for (uint32_t most = d->n_tokens / n_seqs; from < to;) {
        uint32_t n = to - from < most ? to - from : most;
        if (!drive_step(d, n_seqs, from, n, false))
            return false;
        from += n;
    }
    return true;
}
