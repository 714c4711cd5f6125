/* report: what a job says while it runs: progress.jsonl, TensorBoard's event file, a bar on the terminal, and at the end
 * results.csv. After a restart from step S everything about later steps is dropped first, so that no step shows twice.
 * Thread: one.  Owns: the open files.  Fails: PL_EIO.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_REPORT_H
#define PL_TRAIN_REPORT_H

#include <stdio.h>

#include "core/train/evaluate.h"
#include "core/train/train.h"

struct pl_report {
    const char *folder; /* borrowed */
    int fd;             /* progress.jsonl */
    FILE *events;
    bool bar;
};

/* step: where the job goes on, 0 = from the start. */
pl_status pl_report_open(struct pl_report *r, const char *folder, uint32_t step, int64_t created_at, bool bar, struct pl_err *err) PL_MUST_CHECK;
void pl_report_close(struct pl_report *r);

pl_status pl_report_metrics(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_report_message(struct pl_report *r, const char *level, struct pl_err *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5))) PL_MUST_CHECK;
/* Before a checkpoint is written: what was said so far reaches the disk. */
pl_status pl_report_flush(struct pl_report *r, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_report_checkpoint(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err) PL_MUST_CHECK;
/* Figures of the model at a step: 0 = before the job (said once, kept by restarts), else after it. */
pl_status pl_report_scores(struct pl_report *r, uint32_t step, const struct pl_scores *s, struct pl_err *err) PL_MUST_CHECK;
/* Whether the folder's progress.jsonl has those of before the job. */
bool pl_report_has_scores(const char *folder);
/* With the scores of before and after. */
pl_status pl_report_done(struct pl_report *r, const struct pl_train_metrics *m, struct pl_err *err) PL_MUST_CHECK;
/* Appends to the folder's progress.jsonl whether or not a report is open. */
void pl_report_failed(const char *folder, const char *code, const struct pl_err *why);

/* step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy */
pl_status pl_report_csv(const char *folder, struct pl_err *err) PL_MUST_CHECK;
/* The folder's last line says "done". */
bool pl_report_is_done(const char *folder);

#endif
