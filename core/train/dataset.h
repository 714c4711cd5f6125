/* dataset: training files (JSONL) as token sequences with loss masks.
 *
 * Forms, one object a line: chat {"messages"}, completion {"prompt","completion"}, preference pairs {"input","preferred_output",
 * "non_preferred_output"} (also spelled preferred_completion, non_preferred_completion), text {"text"}.
 * Chats are rendered by the template that serves them. A turn of the assistant is what the template adds between the
 * messages before it with the generation prompt, and the messages up to it; its tokens count in the loss up to and with
 * the first one that ends a generation. Completions and texts end in EOS, which counts.
 * Longer than max_length: cut at the end; when no token with loss is left, the line is a bad one. Texts are cut into pieces
 * that overlap by the one token that has no prediction.
 * Thread: any.  Owns: a data set its sequences.  Memory: a line at a time, plus what is kept.
 * Fails: PL_EFORMAT when lines are bad (the report names every one), PL_ERANGE with too few examples, PL_EIO, PL_ENOMEM, PL_ESTOPPED.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_DATASET_H
#define PL_TRAIN_DATASET_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/text/chat.h"
#include "core/text/tok.h"
#include "core/train/spec.h"

struct pl_example {
    int32_t *ids;
    uint8_t *loss; /* loss[i]: predicting ids[i] from ids[0..i) counts; loss[0] = 0 */
    uint32_t n, line; /* line: of the file, from 1 */
    uint32_t n_left_out; /* tokens at the begin of its prompt, see prompt_limit */
};

struct pl_dataset {
    struct pl_example *examples;
    uint32_t n;
    bool pairs; /* examples 2i preferred, 2i + 1 not preferred */
    uint64_t n_tokens, n_loss_tokens;
};

enum {
    PL_DATA_MIN_EXAMPLES = 10,   /* of a training file */
    PL_DATA_MAX_LINE = 4 << 20,  /* bytes */
    PL_DATA_MAX_FAULTS = 1000,   /* kept; all are counted */
    PL_DATA_MAX_MESSAGES = 1024, /* of one example */
};

typedef enum { PL_DATA_NONE, PL_DATA_CHAT, PL_DATA_COMPLETION, PL_DATA_PREFERENCE, PL_DATA_TEXT } pl_data_form;
const char *pl_data_form_name(pl_data_form f); /* "fine-tune-chat", … as error messages name it */

struct pl_data_fault {
    uint32_t line;  /* from 1 */
    int message;    /* index in messages, -1 = the line as a whole */
    char reason[200];
};

struct pl_data_report {
    pl_data_form form;       /* of the first good line */
    uint32_t n_lines;        /* with something in them */
    uint32_t n_examples;     /* good lines, pairs as one; texts and chats that were cut into several, each piece */
    uint32_t n_bad, n_faults; /* bad lines; those in faults */
    struct pl_data_fault *faults;
    uint32_t n_cut;          /* examples cut to max_length */
    uint32_t longest;        /* tokens, before cutting */
    uint64_t n_tokens, n_loss_tokens;
};
void pl_data_report_fini(struct pl_data_report *r);

/* Anything but PL_OK ends the reading with that status. */
typedef pl_status pl_data_text(void *arg, const char *s, size_t n);

struct pl_data_opts {
    const struct pl_tok *tok;   /* borrowed; NULL = only the form of lines is checked, */
    pl_data_text *text;         /* and this is called with the whole text of each good completion or text; may be NULL */
    void *text_arg;
    const struct pl_chat *chat; /* borrowed; NULL = the model has no template: chats are bad lines */
    pl_train_method method;
    pl_train_on train_on;
    uint32_t max_length;   /* 0 = no limit */
    uint32_t prompt_limit; /* 0 = none; else the last answer is to be given again, and max_length does not count: of what stands before it so many
                            * tokens at most are kept: the oldest turns go first (system messages in front stay), then the begin of the last one */
    uint32_t min_examples; /* PL_DATA_MIN_EXAMPLES for a training file, 1 for validation */
    const atomic_bool *stop; /* borrowed; NULL = never: when it is set, PL_ESTOPPED within a line */
};

/* How many tokens stand before the last run of tokens with loss. */
uint32_t pl_data_prompt(const struct pl_example *e);

/* Called with each example (both of a pair in turn), which is the reader's: copy what is to stay. False stops the reading (PL_OK). */
typedef bool pl_data_visit(void *arg, const struct pl_example *e);

/* Reads the file from end to end, checks every line; visit may be NULL. The report is filled in on failure too (fini it). */
pl_status pl_data_scan(const char *path, const struct pl_data_opts *o, pl_data_visit *visit, void *arg, struct pl_data_report *r,
                       struct pl_err *err) PL_MUST_CHECK;
/* The same, keeping the examples. */
pl_status pl_dataset_read(struct pl_dataset **out, const char *path, const struct pl_data_opts *o, struct pl_data_report *r,
                          struct pl_err *err) PL_MUST_CHECK;
/* A text alone, cut into pieces of max_length. PL_EFORMAT when it has no second token. */
pl_status pl_dataset_from_text(struct pl_dataset **out, const char *text, size_t n, const struct pl_data_opts *o, struct pl_err *err) PL_MUST_CHECK;
void pl_dataset_free(struct pl_dataset *d);
/* "Line 3, message 2: 'role' is missing" and so on for the first bad lines, as far as there is room. */
void pl_data_describe(const struct pl_data_report *r, char *out, size_t n);

#endif
