/* train: runs a fine-tuning job: reads its folder, trains, writes progress, checkpoints and the result. A job can be killed
 * at any moment and run again: it goes on from its last whole checkpoint, and the bytes it ends with are the same.
 *
 * The folder: job.json (read), progress.jsonl (one JSON object a line: "metrics", "message", "evaluation", "checkpoint",
 * "done", "failed"), checkpoints/step-N/, result/, results.csv, tensorboard/. Files appear whole or not at all.
 * Thread: one; it makes a pool of its own.  Owns: the folder while it runs (two workers at once are refused).
 * Fails: PL_TRAIN_FAILED, with the last line of progress.jsonl saying why; the error says the same. Another run goes on from the last checkpoint
 * where that may help: after a GPU that was lost (its code is device_lost); after PL_TRAIN_NO_DEVICE, when the device that was asked for is not there
 * (device_not_available) or others have taken its memory (device_busy); after PL_TRAIN_NO_SPACE, of which the folder says nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_TRAIN_H
#define PL_TRAIN_TRAIN_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

/* Exit codes of the worker. */
typedef enum { PL_TRAIN_DONE = 0, PL_TRAIN_FAILED = 1, PL_TRAIN_NO_DEVICE = 2, PL_TRAIN_NO_SPACE = 74, PL_TRAIN_PAUSED = 75 } pl_train_exit;

/* What a line of type "metrics" says; NAN where nothing was measured. */
struct pl_train_metrics {
    uint32_t step, total_steps;
    double epoch;
    double train_loss, train_accuracy; /* mean over the step's tokens that carry loss */
    double learning_rate, grad_norm;   /* the norm before clipping */
    double tokens_per_s;
    uint64_t trained_tokens; /* since the job's start: all tokens of the examples, once per epoch */
    double eta_s;
    double valid_loss, valid_accuracy;           /* over one batch */
    double full_valid_loss, full_valid_accuracy; /* over the whole validation set */
    double full_valid_perplexity;                /* e to that loss, where it is of tokens */
    double reward_accuracy, reward_margin, reward_chosen, reward_rejected; /* dpo */
};

struct pl_train_options {
    const char *device, *cuda_library; /* as pl_device_open takes them; NULL = "cpu", and the usual file */
    bool progress_bar;                 /* on standard error */
    const volatile sig_atomic_t *stop; /* borrowed: when it is not 0, write a checkpoint and return PL_TRAIN_PAUSED */
};

pl_train_exit pl_train_run(const char *folder, const struct pl_train_options *options, struct pl_err *err) PL_MUST_CHECK;

#endif
