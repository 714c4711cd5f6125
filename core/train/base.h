/* base: the model that a job trains, as far as its data needs it: the file, its tokenizer and chat template.
 * Thread: any.  Owns: all of it, until close.
 * Fails: as pl_gguf_open, pl_tok_load, pl_chat_new and pl_model_check; PL_EIO (param chat_template).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_BASE_H
#define PL_TRAIN_BASE_H

#include "core/model/gguf.h"
#include "core/text/chat.h"
#include "core/text/tok.h"
#include "core/train/plan.h"

struct pl_train_model {
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    struct pl_chat *chat; /* NULL = none: fine for data that is not chats */
    struct pl_spec spec;
    uint64_t n_params;
};

/* chat_template: file used instead of the model's own, NULL = none. */
pl_status pl_train_model_open(struct pl_train_model *m, const char *path, const char *chat_template, struct pl_err *err) PL_MUST_CHECK;
void pl_train_model_close(struct pl_train_model *m);
/* Borrows m and path. */
struct pl_train_base pl_train_model_base(const struct pl_train_model *m, const char *path);

#endif
