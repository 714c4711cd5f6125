/* optim: learning-rate schedules, clipping and AdamW over everything that a net trains.
 * Thread: the net's.  Owns: nothing; the moments are the net's.
 * Source: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_OPTIM_H
#define PL_TRAIN_OPTIM_H

#include "core/train/net.h"
#include "core/train/spec.h"

/* Learning rate of step `step` (from 0) of `total`: rises over the first warmup_steps (step s has (s + 1) / (warmup + 1) of the
 * highest), then follows the schedule down to min_ratio. */
double pl_optim_rate(const struct pl_train_spec *s, uint32_t step, uint32_t total);

/* Clips the gradients to max_grad_norm, makes step `step` (from 0) and zeroes them. *norm: before clipping. */
pl_status pl_optim_step(struct pl_net *n, const struct pl_train_spec *s, uint32_t step, double rate, double *norm) PL_MUST_CHECK;

#endif
