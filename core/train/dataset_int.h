/* dataset_int: what the files of dataset share.
 * Thread: one reader at a time.  Owns: nothing; a line's parts live in its arena and its JSON.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_DATASET_INT_H
#define PL_TRAIN_DATASET_INT_H

#include <jansson.h>

#include "core/base/mem.h"
#include "core/train/dataset.h"

struct pl_data_text {
    const char *s;
    size_t n;
};

/* One line, checked. */
struct pl_data_line {
    pl_data_form form;
    struct pl_chat_message *messages; /* chat; preference: the input, with room for one more */
    bool *trained;                    /* chat: an assistant's message of weight 1 */
    size_t n_messages;
    struct pl_chat_message output[2];        /* preference: preferred, not preferred */
    struct pl_data_text prompt, completion;  /* completion; text: in completion */
};

/* fault->line is left alone. root: parsed, stays until the line is done with. False = a bad line, *fault says why. */
bool pl_data_parse(struct pl_data_line *l, const json_t *root, struct pl_arena *a, struct pl_data_fault *fault);

struct pl_data_encoder {
    const struct pl_data_opts *o;
    struct pl_data_report *report; /* n_cut, longest, n_examples and sums are kept here */
    uint32_t line;
    pl_data_visit *visit;
    void *arg;
    bool stopped; /* visit said no more */
    struct pl_err *err;
};
/* Tokens and masks of a checked line, each example visited. PL_EFORMAT = a bad line, *fault says why; else PL_OK, PL_ENOMEM. */
pl_status pl_data_encode(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault) PL_MUST_CHECK;

/* The same with prompt_limit. */
pl_status pl_data_encode_question(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault) PL_MUST_CHECK;

bool pl_data_bad(struct pl_data_fault *fault, int message, const char *fmt, ...) __attribute__((format(printf, 3, 4))); /* false */

#endif
