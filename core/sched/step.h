/* step: the memory that an iteration's batch is built in, and the building.
 * Thread: engine only.  Owns: its arrays; the batch borrows them until the next step is built.
 * Fails: PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_STEP_H
#define PL_SCHED_STEP_H

#include "core/device/device.h"
#include "core/sched/plan.h"
#include "core/sched/seq.h"

struct pl_step {
    struct pl_seq **seqs;      /* [max_sequences] of this step, set by the engine; NULL = has ended since */
    struct pl_plan_item *plan; /* [max_sequences] */
    int32_t *tokens;
    uint32_t *pos, *slot, *rows, *q_start, *ctx, *page_start, *pages, *adapter;
    uint32_t *first_row; /* [max_sequences] of each sequence, in rows */
    uint32_t n_seqs;
    size_t pages_cap;
};

pl_status pl_step_init(struct pl_step *st, uint32_t batch_tokens, uint32_t max_sequences) PL_MUST_CHECK;
void pl_step_fini(struct pl_step *st);
/* seqs[0..n_seqs) with their takes and guesses, whose pages are there and whose sum is at most batch_tokens. */
pl_status pl_step_build(struct pl_step *st, uint32_t n_seqs, struct pl_batch *b) PL_MUST_CHECK;
/* s ends while the step's results are taken. */
void pl_step_forget(struct pl_step *st, const struct pl_seq *s);

#endif
