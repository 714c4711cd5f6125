/* batch: which examples a step takes, and how they are packed into micro-batches.
 * A unit is an example, or a pair of them that stays together. The order of an epoch follows from the seed alone.
 * Thread: one.  Owns: its arrays; borrows the data set.  Fails: PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_BATCH_H
#define PL_TRAIN_BATCH_H

#include "core/train/dataset.h"
#include "core/train/net.h"

struct pl_batch_plan {
    const struct pl_dataset *d; /* borrowed */
    uint32_t n_units, per_unit; /* per_unit: sequences */
    uint32_t capacity;          /* tokens of a micro-batch */
    uint32_t most_units;        /* of a micro-batch, 0 = as many as fit */
    uint32_t *order;            /* [n_units] of the epoch at hand */
    uint32_t epoch, seed;
    /* the units at hand, micro-batch by micro-batch */
    uint32_t *units, *first; /* micro-batch i has units[first[i] .. first[i + 1]) */
    uint32_t n_micro;
    uint64_t n_tokens, n_loss_tokens;
    /* the micro-batch at hand */
    struct pl_micro micro;
    uint32_t *tokens, *pos, *start, *rows, *targets, *row_start; /* row_start[n_seqs + 1]: rows of each sequence */
};

/* micro_batch units of at most max_length tokens (each sequence) fit into a micro-batch; pack: or more that are shorter. */
pl_status pl_batch_init(struct pl_batch_plan *b, const struct pl_dataset *d, uint32_t micro_batch, uint32_t max_length, bool pack, uint32_t seed,
                        struct pl_err *err) PL_MUST_CHECK;
void pl_batch_fini(struct pl_batch_plan *b);

/* Takes the units [from, from + n) of an epoch's order (epoch UINT32_MAX: the file's order). */
pl_status pl_batch_take(struct pl_batch_plan *b, uint32_t epoch, uint32_t from, uint32_t n) PL_MUST_CHECK;
/* Fills b->micro and what belongs to it. */
void pl_batch_micro(struct pl_batch_plan *b, uint32_t i);

#endif
