/* answers: what a model says to prompts, greedily, through the engine that serves; and the prompts of a data set.
 * Thread: one; the engine has a thread of its own meanwhile.  Owns: nothing after the call.
 * Fails: as pl_model_load and pl_adapter_read; PL_ESTOPPED when it was to stop; PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_ANSWERS_H
#define PL_TRAIN_ANSWERS_H

#include <signal.h>

#include "core/base/buf.h"
#include "core/sched/engine.h"
#include "core/train/dataset.h"

struct pl_gguf;

/* All borrowed. */
struct pl_answers_opts {
    const struct pl_gguf *gguf;
    const struct pl_tok *tok;
    const char *adapter; /* as pl_adapter_read; NULL = none */
    const char *device, *cuda_library; /* as pl_device_open takes them */
    uint32_t n_threads, max_tokens;
    const volatile sig_atomic_t *stop; /* give up when it is not 0; may be NULL */
};

/* texts[n]: added to. A prompt that fills the context gets no answer. */
pl_status pl_answers_make(const struct pl_answers_opts *o, const struct pl_prompt *prompts, uint32_t n, struct pl_buf *texts, struct pl_err *err) PL_MUST_CHECK;

/* What an example asks, all before its last run of tokens that count, and the text of that run. */
void pl_answers_part(const struct pl_example *e, const struct pl_tok *tok, struct pl_prompt *prompt, struct pl_buf *reference);

#endif
