/* chat: the model's own chat template, from messages to prompt pieces.
 * Thread: any after load (read-only).  Owns: the compiled template.
 * Fails: load refuses a template it cannot run, naming the construct; render as pl_jinja_render.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_CHAT_H
#define PL_TEXT_CHAT_H

#include "core/text/jinja.h"
#include "core/text/tok.h"

struct pl_chat;

enum { PL_CHAT_MAX_TEMPLATE = 1 << 20 }; /* bytes that a template's file may have */

/* source: the template's text (tokenizer.chat_template, or a file that the operator named). bos/eos texts come from tok. */
pl_status pl_chat_new(struct pl_chat **out, const char *source, size_t n, const struct pl_tok *tok, struct pl_err *err)
    PL_MUST_CHECK;
void pl_chat_free(struct pl_chat *c);

struct pl_chat_message {
    const char *role;    /* system, developer, user, assistant, tool */
    const char *content; /* NULL = none; for several text parts the caller joins them */
    size_t n_content;
    const char *name;         /* NULL = none */
    const char *tool_call_id; /* NULL = none */
};

/* Renders messages with add_generation_prompt, bos_token, eos_token; *pieces and *n_pieces are set up for
 * pl_tok_encode_pieces and live in a. Template errors are PL_EINVAL with param "messages". "developer" is rendered as
 * "system" (before the template sees it). */
pl_status pl_chat_render(const struct pl_chat *c, const struct pl_chat_message *messages, size_t n_messages,
                         bool add_generation_prompt, struct pl_arena *a, struct pl_piece **pieces, size_t *n_pieces,
                         struct pl_err *err) PL_MUST_CHECK;

#endif
