/* model_file: what can be known of a model without its weights: the file, its hyper-parameters, its tokenizer and chat template.
 * Thread: any.  Owns: all of it, until close.
 * Fails: as pl_gguf_open, pl_model_check, pl_tok_load and pl_chat_new; PL_EIO; PL_EINVAL (a template of the caller's that cannot be read, with the
 * name that the caller has for it as param).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_MODEL_FILE_H
#define PL_TEXT_MODEL_FILE_H

#include <stdint.h>
#include <time.h>

#include "core/base/status.h"
#include "core/model/gguf.h"
#include "core/model/spec.h"
#include "core/text/chat.h"
#include "core/text/tok.h"

struct pl_model_file {
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    struct pl_chat *chat; /* NULL = it has no template: chats are refused */
    struct pl_spec spec;
    uint64_t n_params, n_bytes;
    time_t created; /* the file's time */
};

/* template: a file with the template to use instead of the model's own, "" or NULL = none. setting: what names such a file, for messages. */
pl_status pl_model_file_open(struct pl_model_file *f, const char *path, const char *template, const char *setting, struct pl_err *err) PL_MUST_CHECK;
void pl_model_file_close(struct pl_model_file *f);

#endif
