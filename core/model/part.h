/* part: how a model is cut over ranks, so that each computes a part of every product:
 * key/value heads with their query heads, inner values of the feed-forward, rows of the vocabulary. The last column of the weight
 * tables (weights.h) says how each weight is cut; the ranges here say where.
 *
 *   x -- norm -- qkv -- attention -- attn_out -- sum, + -- norm -- ff_in -- act -- ff_out -- sum, +
 *   whole        outputs of its heads  inputs:   over             its F outputs    its F     over
 *                                      its heads ranks                             inputs    ranks
 *
 * Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
 * Thread: any.  Owns: nothing.  Fails: PL_EINVAL (param tensor-parallel) with the numbers of ranks that are possible.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_PART_H
#define PL_MODEL_PART_H

#include "core/model/spec.h"

struct pl_gguf;

typedef enum {
    PL_CUT_WHOLE,   /* every rank has all of it */
    PL_CUT_FIRST,   /* rank 0 alone has it: what is added once to a sum over ranks */
    PL_CUT_OUT_Q,   /* outputs (rows of a matrix, values of a vector) by query heads */
    PL_CUT_OUT_K,   /* by key/value heads */
    PL_CUT_OUT_QKV, /* both: Q rows, K of the keys, K of the values */
    PL_CUT_OUT_F,   /* of the feed-forward */
    PL_CUT_OUT_V,   /* of the vocabulary */
    PL_CUT_IN_Q,    /* inputs (columns of a matrix) by query heads */
    PL_CUT_IN_F,    /* of the feed-forward */
} pl_cut;

struct pl_range {
    uint32_t first, n;
};

struct pl_part {
    unsigned rank, size;
    struct pl_range q, k, f, v; /* of the sizes Q, K, F, V of weights.h */
};

enum { PL_PART_RANGES = 3 };

/* The part of rank `rank` of `size`. The file's types of weights decide where inputs can be cut. */
pl_status pl_part_make(struct pl_part *p, const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, unsigned rank, unsigned size,
                       struct pl_err *err) PL_MUST_CHECK;
/* The spec of the part alone: its heads, feed-forward width and vocabulary rows. */
struct pl_spec pl_part_spec(const struct pl_part *p, const struct pl_spec *s);
/* Where the rows of rank 0, 1, … of the vocabulary begin, and the end of all: first[size + 1]. */
void pl_part_vocab(uint32_t n_vocab, unsigned size, uint32_t *first);

/* Which of n outputs the part has of a weight that is cut so; how many ranges. */
size_t pl_cut_outputs(pl_cut cut, const struct pl_spec *s, const struct pl_part *p, uint32_t n, struct pl_range out[PL_PART_RANGES]);
struct pl_range pl_cut_inputs(pl_cut cut, const struct pl_part *p, uint32_t n);
/* How a layer's matrix is cut, by its name in GGUF without ".weight" ("attn_q"). */
pl_cut pl_cut_of(unsigned arch_bit, const char *name);

#endif
