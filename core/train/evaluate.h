/* evaluate: figures of a model beside its training loss: loss on a general text, and how near its answers are to references.
 * Thread: the net's.  Owns: nothing after the call.
 * Fails: as pl_general_read, pl_answers_make; PL_ENOMEM, PL_EDEVICE.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_EVALUATE_H
#define PL_TRAIN_EVALUATE_H

#include <stdio.h>

#include "core/train/answers.h"
#include "core/train/metric.h"
#include "core/train/net.h"

enum { PL_GENERAL_PIECE = 512 /* tokens; of a model with a smaller context, that */ };

/* NAN where nothing was measured. */
struct pl_scores {
    double valid_loss, valid_accuracy, perplexity; /* of the validation file; perplexity: e to the loss of a token */
    double general_loss;
    double bleu, rouge[PL_ROUGE_COUNT];
    uint32_t n_answers, n_cut; /* that were compared; of these, how many had a prompt that was cut */
    pl_words_kind words;
};
struct pl_scores pl_scores_none(void);

/* Mean loss of a token of a text (pl_general_read) under a net as it is. */
pl_status pl_evaluate_general(double *loss, struct pl_net *n, const struct pl_tok *tok, const char *path, struct pl_err *err) PL_MUST_CHECK;

/* Answers the first n examples of a file (of pairs, the preferred ones) and adds bleu and rouge to s, whose words are set. data: how the file is
 * read, but for train_on and lengths: a prompt may be as long as leaves room for max_tokens in the model's context n_ctx; of a longer one the begin
 * is left out (prompt_limit of dataset.h). show: a line of JSON for each, NULL = none. */
pl_status pl_evaluate_answers(struct pl_scores *s, const struct pl_answers_opts *o, const char *path, const struct pl_data_opts *data, uint32_t n_ctx,
                              uint32_t n, FILE *show, struct pl_err *err) PL_MUST_CHECK;

#endif
