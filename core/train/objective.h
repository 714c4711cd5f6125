/* objective: losses of a batch and their gradients, micro-batch by micro-batch: supervised (mean over all tokens that carry loss)
 * and dpo (sigmoid loss of pairs against the model as it was before the job).
 * Thread: one.  Owns: scratch arrays; borrows net and batches.
 * Source: Rafailov et al. 2023, "Direct Preference Optimization".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_OBJECTIVE_H
#define PL_TRAIN_OBJECTIVE_H

#include "core/train/batch.h"

struct pl_objective_result {
    double loss;     /* mean over tokens; dpo: over pairs */
    double accuracy; /* share of tokens that were the likeliest (dpo: of the preferred answers) */
    uint64_t n_tokens, n_loss_tokens;
    double reward_accuracy, reward_margin, reward_chosen, reward_rejected; /* dpo */
};

struct pl_objective {
    struct pl_net *net; /* borrowed */
    double beta;        /* dpo */
    float *weight;
    double *logp;
    bool *best;
    uint32_t cap;
};

pl_status pl_objective_init(struct pl_objective *s, struct pl_net *net, double beta, uint32_t capacity, struct pl_err *err) PL_MUST_CHECK;
void pl_objective_fini(struct pl_objective *s);

/* sums[unit * 2 + i]: log-probability of each sequence of all pairs, as the net is now: the reference of a dpo job. */
pl_status pl_objective_reference(struct pl_objective *s, struct pl_batch_plan *b, double *sums) PL_MUST_CHECK;

/* The batch that was taken. gradients: add them to the net's. key: of dropout, 0 = none. reference: for pairs. */
pl_status pl_objective_run(struct pl_objective *s, struct pl_batch_plan *b, const double *reference, bool gradients, uint64_t key, struct pl_objective_result *r)
    PL_MUST_CHECK;

#endif
