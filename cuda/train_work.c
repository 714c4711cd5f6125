/* train_work: the memory that training works in, known before it is taken, and taken before a step. What is counted here is what is taken: the
 * estimate says neither more nor less.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "cuda/train.h"

enum { PAGE = 2 << 20 /* what the driver rounds allocations up to, */, SMALL = 1 << 20 /* but for those below */ };

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t on_device(size_t n)
{
    return n < SMALL ? n : (n + PAGE - 1) / PAGE * PAGE;
}

size_t pl_cuda_train_frozen_bytes(const struct pl_weight_src *parts, size_t n_parts)
{
    return on_device(pl_cuda_weight_bytes(parts, n_parts));
}

/* Whether a weight has parts that are not of the precision that was set. */
static bool is_expanded(const struct pl_cuda *c, const struct pl_cuda_parts *w)
{
    bool is = false;
    for (uint32_t i = 0; i < w->n; i++)
        is = is || w->part[i].dtype != pl_cuda_train_precision(c);
    return is;
}

static void measure(const struct pl_cuda *c, const struct pl_train_shape *s, size_t n[PL_CUDA_SCRATCH_KINDS])
{
    const size_t one = pl_cuda_train_element(c), T = s->n_tokens, V = s->head->rows, rows = least(s->n_rows, pl_cuda_logits_rows(s->head->rows));
    const size_t wide = pl_cuda_train_padded(s->widest), C = pl_cuda_train_padded(s->n_embd);
    const size_t passing = c->bf16 ? T * pl_cuda_train_padded(s->passing) * one : 0;
    const size_t panel = least(most(PL_CUDA_PANEL, PL_CUDA_PANEL_STEP * wide), wide * most(s->widest, V)) * one; /* of a weight, or of the head */
    const struct pl_cuda_parts head = pl_cuda_train_parts(s->head);
    memset(n, 0, PL_CUDA_SCRATCH_KINDS * sizeof *n);
    n[PL_CUDA_SCRATCH_LEFT] = passing;
    n[PL_CUDA_SCRATCH_RIGHT] = most(passing, panel);
    n[PL_CUDA_SCRATCH_X] = c->bf16 ? most(T * wide, rows * C) * one : 0;
    n[PL_CUDA_SCRATCH_DY] = c->bf16 ? most(T * wide, rows * pl_cuda_train_padded(V)) * one : 0;
    n[PL_CUDA_SCRATCH_HEAD] = s->whole_head && is_expanded(c, &head) ? V * C * one : 0;
    n[PL_CUDA_SCRATCH_LOGITS] = rows * V * sizeof(float);
    n[PL_CUDA_SCRATCH_SUMS] = most(most(pl_cuda_norm_d_floats(s->n_tokens, s->n_embd), T * s->n_heads) * sizeof(float),
                                   most(most(pl_cuda_use_sums(T) * s->n_embd * sizeof(float), s->n_rows * (sizeof(double) + sizeof(bool))),
                                        (s->n_trained / PL_CUDA_SQUARES + 1) * sizeof(double)));
}

/* What a step's operations upload: tokens, positions, starts; rows (of the gather and of its backward), targets, weights; twice the uses of an
 * embedding's rows. */
static size_t uploads(const struct pl_train_shape *s)
{
    enum { ARRAYS = 10, ALIGN = 16 };
    const size_t T = s->n_tokens, pieces = T + pl_cuda_use_sums(T) * 2;
    return (2 * T + s->n_seqs + 1 + 4 * (size_t)s->n_rows) * sizeof(uint32_t) + 2 * (pieces * sizeof(struct pl_cuda_use_piece) + T * sizeof(uint32_t)) +
           ARRAYS * ALIGN;
}

size_t pl_cuda_train_work_bytes(struct pl_device *dev, const struct pl_train_shape *s)
{
    const struct pl_cuda *c = pl_cuda_of(dev);
    size_t n[PL_CUDA_SCRATCH_KINDS], all = on_device(pl_cuda_stage_bytes(c, uploads(s))) + pl_cuda_blas_bytes(c);
    measure(c, s, n);
    for (int i = 0; i < PL_CUDA_SCRATCH_KINDS; i++)
        if (n[i] > c->scratch[i].cap)
            all += on_device(n[i]) - on_device(c->scratch[i].cap);
    return all;
}

pl_status pl_cuda_train_reserve(struct pl_device *dev, const struct pl_train_shape *s)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    size_t n[PL_CUDA_SCRATCH_KINDS];
    pl_status rc = pl_cuda_reserve_stage(c, uploads(s));
    if (rc == PL_OK)
        rc = pl_cuda_reserve_blas(c);
    measure(c, s, n);
    for (int i = 0; rc == PL_OK && i < PL_CUDA_SCRATCH_KINDS; i++)
        rc = pl_cuda_scratch_grow(c, (enum pl_cuda_scratch_kind)i, n[i]);
    return rc;
}
