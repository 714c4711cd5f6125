/* prompt: from the messages or the prompt field of a request to token ids.
 * Thread: any.  Owns: nothing; results live in the arena.
 * Fails: PL_EINVAL naming the message and field, PL_ENOTSUP (content that is not text), PL_ETOOLONG, PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_PROMPT_H
#define PL_SERVER_PROMPT_H

#include <jansson.h>

#include "core/sched/engine.h"
#include "core/text/chat.h"

struct pl_instance;

/* Checks messages and makes plain ones of them; texts borrow the JSON or live in a. */
pl_status pl_prompt_messages(const json_t *messages, struct pl_arena *a, struct pl_chat_message **out, struct pl_err *err) PL_MUST_CHECK;
/* Messages rendered by the chat template, as pieces. */
pl_status pl_prompt_render(const struct pl_instance *m, const json_t *messages, bool add_generation_prompt, struct pl_arena *a,
                           struct pl_piece **pieces, size_t *n, struct pl_err *err) PL_MUST_CHECK;
/* …and tokenized; max: PL_ETOOLONG (param "messages") above. */
pl_status pl_prompt_chat(const struct pl_instance *m, const json_t *messages, bool add_generation_prompt, uint32_t max,
                         struct pl_arena *a, struct pl_prompt *out, struct pl_err *err) PL_MUST_CHECK;
/* A completion's prompt field: one or several prompts. Text is tokenized as plain text (no special tokens but the BOS that
 * the model wants); token ids are checked against the model's vocabulary. texts[i]: the prompt as text, for echo. */
pl_status pl_prompt_completion(const struct pl_instance *m, const json_t *prompt, uint32_t max, struct pl_arena *a,
                               struct pl_prompt **out, uint32_t *n, struct pl_err *err) PL_MUST_CHECK;
/* Text of token ids, in the arena. */
const char *pl_prompt_text(const struct pl_instance *m, const struct pl_prompt *p, struct pl_arena *a, size_t *n);

#endif
