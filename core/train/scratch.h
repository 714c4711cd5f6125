/* scratch: a model from nothing: its tokenizer learned from the training file (or taken from another model), its
 * hyper-parameters from the job's shape, its first weights from the job's seed; written as a GGUF file that is trained and
 * served like any other.
 * Thread: any.  Owns: all of a struct pl_scratch, until fini.
 * Fails: PL_EINVAL naming the field of the shape (does not fit, too large for the memory, more tokens than the file yields),
 * as pl_data_scan for the file (err->param is training_file), PL_EIO, PL_ENOMEM (too little to learn the tokenizer, too), PL_ESTOPPED.
 * Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", 2.3, and the code that goes with it:
 * weights normal with deviation 0.02, those that end in the residual stream divided by the root of their number, 2 L.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_SCRATCH_H
#define PL_TRAIN_SCRATCH_H

#include "core/base/sha256.h"
#include "core/model/gguf_out.h"
#include "core/text/chat.h"
#include "core/train/dataset.h"
#include "core/train/spec.h"

struct pl_scratch {
    struct pl_spec model;
    uint64_t n_params;
    struct pl_tok *tok;
    struct pl_chat *chat;     /* NULL = none */
    uint64_t tokenizer_bytes; /* of text that the tokenizer was learned from; 0 = it was not */
    struct pl_gguf_out out;
    struct pl_buf head;     /* a file of the keys alone, */
    struct pl_gguf *gguf;   /* and as such open */
    struct pl_buf template; /* chat template, empty = none */
};

#define PL_SCRATCH_TOKENIZER "tokenizer.gguf" /* what pl_scratch_keep leaves in its folder */

/* All borrowed, during the call. */
struct pl_scratch_source {
    const char *training;    /* the file */
    const char *base;        /* GGUF file for tokenizer "base"; else may be NULL */
    const char *kept;        /* folder of pl_scratch_keep: what was learned there of the same text for the same shape is taken; NULL = none */
    uint64_t memory;         /* bytes of the host's that learning a tokenizer may take, 0 = not known */
    uint64_t room;           /* bytes, of a GPU or the host, that training may take, 0 = not known */
    const atomic_bool *stop; /* as in pl_data_opts */
};
/* s: with a shape; what is "auto" in it gets its value. The report is filled in on failure too (fini it); it stays empty when nothing was learned. */
pl_status pl_scratch_open(struct pl_scratch *x, struct pl_train_spec *s, const struct pl_scratch_source *from, struct pl_data_report *r,
                          struct pl_err *err) PL_MUST_CHECK;
void pl_scratch_fini(struct pl_scratch *x);
/* Leaves the tokenizer that was learned (if one was) in a folder, for who opens the same again. s: resolved. PL_EIO, PL_ENOMEM. */
pl_status pl_scratch_keep(const struct pl_scratch *x, const struct pl_train_spec *s, const char *training, const char *folder,
                          struct pl_err *err) PL_MUST_CHECK;
/* What a worker needs before a step: 16 bytes for each parameter, so that the first question can be answered early. */
uint64_t pl_scratch_params(const struct pl_train_spec *s);

/* What tells one such model from another: spec resolved. base: as above. PL_EIO. */
pl_status pl_scratch_origin(const struct pl_train_spec *s, const char *training, const char *base, char hex[PL_SHA256_HEX],
                            struct pl_err *err) PL_MUST_CHECK;
/* The whole model with its first weights in F32. origin is kept in the file, */
pl_status pl_scratch_write(struct pl_scratch *x, const char *path, uint32_t seed, const char *origin, struct pl_err *err) PL_MUST_CHECK;
/* so that a worker that starts again knows it. */
bool pl_scratch_is(const char *path, const char *origin);

#endif
