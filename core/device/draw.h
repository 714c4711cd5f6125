/* draw: what of a row of logits a token is drawn by, as plain data, for devices that sample in their own memory
 * (pl_device_ops.sample), and the definition that all samplers share, so that every one takes the same token of the same row:
 *
 *   edits    first what is added (bias), then penalties of seen tokens, then what is set (bans); ids within each are distinct
 *   greedy   the largest value; ties by lowest id
 *   weights  w = exp((x - max) * inverse) in float32, and their sum, as scan.h computes both
 *   ranks    by weight, ties by lowest id. top_k keeps the first k; top_p then the fewest of the first whose amounts reach top_p of
 *            the amount of what top_k kept (without it: of the sum of weights), at least one; min_p then those with w >= min_p
 *   amounts  weights as whole numbers of 2^-44, so that sums do not depend on their order
 *   draw     without a filter: the first id at which the sum of weights, taken as scan.h and sample.c do, exceeds u * sum;
 *            with one: the first kept id at which the sum of kept amounts exceeds u of all of them
 *
 * Thread: any.  Owns: nothing but what pl_draws_fini frees.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_DRAW_H
#define PL_DEVICE_DRAW_H

#include <stddef.h>
#include <stdint.h>

enum { PL_MAX_TOP_LOGPROBS = 20 };

#define PL_DRAW_AMOUNT 0x1p44f /* of weight 1; up to 2^19 weights have a sum of 63 bits */

struct pl_top {
    int32_t id;
    float logprob;
};

struct pl_edit {
    int32_t id;
    float value;
};

struct pl_draw {
    int32_t given;  /* the token whose log-probability is wanted; -1 = one is to be drawn */
    int32_t n_top;  /* log-probabilities: -1 = none, else the token's own and this many alternatives */
    float inverse;  /* 1 / temperature; 0 = greedy */
    float top_p, min_p; /* 1 and 0 = off */
    uint32_t top_k;     /* 0 = off */
    float repetition;   /* penalty: positive values of seen tokens are divided by it, others multiplied */
    uint32_t add, seen, set, end; /* its edits: [add, seen) value is added; [seen, set) tokens seen, value is what is taken off after
                                   * the repetition penalty; [set, end) value is what the logit becomes */
    uint64_t u; /* uniform in [0, 1), in 2^-53 */
};

/* What a device found, in raw logits; pl_drawn_choice makes log-probabilities of it. */
struct pl_drawn {
    int32_t token; /* -1 = the row has a NaN or no finite value */
    uint32_t n_top;
    float max, own; /* of the row; of the token */
    double sum;     /* of exp(x - max) */
    struct pl_top top[PL_MAX_TOP_LOGPROBS];
};

/* Of the rows of a batch. */
struct pl_draws {
    struct pl_draw *rows; /* [n_rows] */
    struct pl_edit *edits; /* [n_edits] */
    uint32_t n_rows, n_edits, edits_cap;
};

#endif
