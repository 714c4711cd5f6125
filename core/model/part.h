/* part: how a model is cut over ranks, so that each computes a part of every product: key/value heads with their query heads,
 * inner values of the feed-forward, rows of the vocabulary. The last column of the weight tables (weights.h) says how each
 * weight is cut; the ranges here say where. What the two products that lead back to the residual stream need is either
 *
 *   summed:    x -- norm -- qkv -- attention -- attn_out, cut by inputs -- sum over ranks, + --      one exchange for each
 *   gathered:  x -- norm -- qkv -- attention -- gather -- attn_out, cut by outputs, + -- gather --   two exchanges
 *
 * and the same with ff_in and ff_out. Gathered, each value is computed by one rank as it would be without others: every bit
 * is that of one rank. So it is on a device that rounds activations, for files with block types; else ranks sum.
 * Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
 * Thread: any.  Owns: nothing.  Fails: PL_EINVAL (param tensor-parallel) with the numbers of ranks that are possible.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_PART_H
#define PL_MODEL_PART_H

#include "core/comm/comm.h"
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
    PL_CUT_SUM_Q,   /* where ranks sum: inputs (columns of a matrix) by query heads; else outputs */
    PL_CUT_SUM_F,   /* inputs by values of the feed-forward; else outputs */
    PL_CUT_SUM,     /* a vector that is added to such outputs: rank 0 alone has it; else cut as they are */
} pl_cut;

struct pl_range {
    uint32_t first, n;
};

struct pl_part {
    unsigned rank, size;
    bool sums;                     /* else parts are gathered */
    struct pl_range q, k, f, c, v; /* of the sizes Q, K, F, C, V of weights.h */
    /* [size + 1] where each rank's range begins */
    uint32_t q_first[PL_MAX_RANKS + 1], f_first[PL_MAX_RANKS + 1], c_first[PL_MAX_RANKS + 1], v_first[PL_MAX_RANKS + 1];
};

enum { PL_PART_RANGES = 3 };

/* The part of rank `rank` of `size` on such a device. Where ranks sum, the file's types decide where inputs can be cut. */
pl_status pl_part_make(struct pl_part *p, const struct pl_spec *s, unsigned arch_bit, const struct pl_gguf *g, const struct pl_device *dev,
                       unsigned rank, unsigned size, struct pl_err *err) PL_MUST_CHECK;
/* The spec of the part alone: its heads, feed-forward width and vocabulary rows. */
struct pl_spec pl_part_spec(const struct pl_part *p, const struct pl_spec *s);

/* Which of n outputs the part has of a weight that is cut so; how many ranges. */
size_t pl_cut_outputs(pl_cut cut, const struct pl_spec *s, const struct pl_part *p, uint32_t n, struct pl_range out[PL_PART_RANGES]);
struct pl_range pl_cut_inputs(pl_cut cut, const struct pl_part *p, uint32_t n);
/* How a layer's matrix is cut, by its name in GGUF without ".weight" ("attn_q"). */
pl_cut pl_cut_of(unsigned arch_bit, const char *name);

#endif
