/* objective: losses of a batch and their gradients, micro-batch by micro-batch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/objective.h"

#include <math.h>
#include <stdlib.h>

pl_status pl_objective_init(struct pl_objective *s, struct pl_net *net, double beta, uint32_t capacity, struct pl_err *err)
{
    *s = (struct pl_objective){.net = net, .beta = beta, .cap = capacity, .weight = malloc(capacity * sizeof *s->weight),
                          .logp = malloc(capacity * sizeof *s->logp), .best = malloc(capacity * sizeof *s->best)};
    if (s->weight != NULL && s->logp != NULL && s->best != NULL)
        return pl_net_reserve(net, capacity, capacity, err);
    pl_objective_fini(s);
    return pl_fail(err, PL_ENOMEM, "no memory for batches of %u tokens", capacity);
}

void pl_objective_fini(struct pl_objective *s)
{
    free(s->weight);
    free(s->logp);
    free(s->best);
    *s = (struct pl_objective){0};
}

/* Σ logp of a sequence of the micro-batch at hand. */
static double sequence_sum(const struct pl_objective *s, const struct pl_batch_plan *b, uint32_t seq)
{
    double sum = 0;
    for (uint32_t i = b->row_start[seq]; i < b->row_start[seq + 1]; i++)
        sum += s->logp[i];
    return sum;
}

static pl_status look(struct pl_objective *s, struct pl_batch_plan *b, const float *weight)
{
    return pl_net_loss(s->net, &b->micro, weight, s->logp, s->best);
}

/* Between these, what a micro-batch's operations upload stays on the device. */
static pl_status begin(const struct pl_objective *s)
{
    return s->net->dev->ops->step_begin(s->net->dev, NULL);
}

static pl_status end(const struct pl_objective *s, pl_status rc)
{
    const pl_status ended = s->net->dev->ops->step_end(s->net->dev);
    return rc != PL_OK ? rc : ended;
}

pl_status pl_objective_reference(struct pl_objective *s, struct pl_batch_plan *b, double *sums)
{
    pl_status rc = pl_batch_take(b, UINT32_MAX, 0, b->n_units);
    s->net->dropout_key = 0;
    for (uint32_t i = 0; rc == PL_OK && i < b->n_micro; i++) {
        pl_batch_micro(b, i);
        if ((rc = begin(s)) != PL_OK)
            break;
        if ((rc = pl_net_forward(s->net, &b->micro)) == PL_OK)
            rc = look(s, b, NULL);
        if ((rc = end(s, rc)) != PL_OK)
            break;
        for (uint32_t seq = 0; seq < b->micro.seqs.n_seqs; seq++)
            sums[b->units[b->first[i] + seq / 2] * 2 + seq % 2] = sequence_sum(s, b, seq);
    }
    return rc;
}

/* log(1 + exp(-z)) without overflow */
static double softplus_minus(double z)
{
    return z > 0 ? log1p(exp(-z)) : log1p(exp(z)) - z;
}

/* loss = -log σ(z), z = β ((π_w - ref_w) - (π_l - ref_l));  ∂loss/∂π_w = -β σ(-z) */
static void pairs_loss(struct pl_objective *s, struct pl_batch_plan *b, uint32_t micro, const double *reference, uint32_t n_pairs,
                       struct pl_objective_result *r)
{
    for (uint32_t p = 0; p < b->micro.seqs.n_seqs / 2; p++) {
        const double *ref = reference + 2 * (size_t)b->units[b->first[micro] + p];
        const double chosen = s->beta * (sequence_sum(s, b, 2 * p) - ref[0]), rejected = s->beta * (sequence_sum(s, b, 2 * p + 1) - ref[1]);
        const double z = chosen - rejected, slope = s->beta / (1 + exp(z)) / n_pairs;
        r->loss += softplus_minus(z) / n_pairs;
        r->reward_accuracy += (z > 0) / (double)n_pairs;
        r->reward_margin += z / n_pairs;
        r->reward_chosen += chosen / n_pairs;
        r->reward_rejected += rejected / n_pairs;
        for (uint32_t i = b->row_start[2 * p]; i < b->row_start[2 * p + 1]; i++)
            s->weight[i] = (float)slope;
        for (uint32_t i = b->row_start[2 * p + 1]; i < b->row_start[2 * p + 2]; i++)
            s->weight[i] = (float)-slope;
    }
}

static pl_status run_micro(struct pl_objective *s, struct pl_batch_plan *b, uint32_t i, const double *reference, uint32_t n_units, bool gradients,
                           struct pl_objective_result *r, uint64_t *n_right, uint64_t *n_seen)
{
    const bool pairs = b->per_unit == 2;
    pl_batch_micro(b, i);
    pl_status rc = pl_net_forward(s->net, &b->micro);
    for (uint32_t k = 0; k < b->micro.n_rows; k++)
        s->weight[k] = (float)(1.0 / (double)b->n_loss_tokens);
    if (rc == PL_OK)
        rc = look(s, b, gradients && !pairs ? s->weight : NULL);
    if (rc != PL_OK)
        return rc;
    if (pairs)
        pairs_loss(s, b, i, reference, n_units, r);
    for (uint32_t seq = 0; seq < b->micro.seqs.n_seqs; seq += b->per_unit)
        for (uint32_t k = b->row_start[seq]; k < b->row_start[seq + 1]; k++, ++*n_seen) {
            *n_right += s->best[k];
            if (!pairs)
                r->loss -= s->logp[k] / (double)b->n_loss_tokens;
        }
    if (!gradients)
        return PL_OK;
    if (pairs && (rc = look(s, b, s->weight)) != PL_OK)
        return rc;
    return pl_net_backward(s->net, &b->micro);
}

pl_status pl_objective_run(struct pl_objective *s, struct pl_batch_plan *b, const double *reference, bool gradients, uint64_t key,
                           struct pl_objective_result *r)
{
    uint64_t n_right = 0, n_seen = 0;
    *r = (struct pl_objective_result){.n_tokens = b->n_tokens, .n_loss_tokens = b->n_loss_tokens};
    for (uint32_t i = 0; i < b->n_micro; i++) {
        s->net->dropout_key = key != 0 ? key + ((uint64_t)(i + 1) << 40) : 0;
        pl_status rc = begin(s);
        if (rc == PL_OK)
            rc = end(s, run_micro(s, b, i, reference, b->first[b->n_micro], gradients, r, &n_right, &n_seen));
        if (rc != PL_OK)
            return rc;
    }
    r->accuracy = n_seen > 0 ? (double)n_right / (double)n_seen : 0;
    return PL_OK;
}
