/* tok_train: learns a byte-level BPE vocabulary from text: the one that Hugging Face's BpeTrainer learns from the same text
 * (byte-level pre-tokenizer, an alphabet of all 256 bytes), merge for merge.
 *
 * The text is counted first, as distinct fragments of the pre-tokenizer; learning looks at these alone. Of each step's most
 * frequent pairs the one with the smallest ids is joined.
 * Thread: one.  Owns: what it has counted; a struct pl_bpe its arrays, until fini.
 * Fails: PL_ENOMEM, PL_ENOTSUP (a pre-tokenizer that is not known), PL_ESTOPPED; add PL_EFULL, see there.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_TOK_TRAIN_H
#define PL_TEXT_TOK_TRAIN_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

enum {
    PL_BPE_BYTES = 256,
    PL_BPE_MAX_TOKEN = 256,      /* bytes of a token; a pair that would be longer is never joined */
    PL_BPE_MAX_TEXT = 32 << 20,  /* bytes of distinct fragments that are kept */
};

/* Ids: n_special control tokens, the bytes in the order of GPT-2's alphabet, then a token for each merge, in order. */
struct pl_bpe {
    uint32_t n_special, n_merges;
    struct pl_bpe_merge {
        int32_t left, right;
    } *merges;
    char *bytes;     /* of all tokens but the special ones, one after another */
    uint32_t *start; /* [PL_BPE_BYTES + n_merges + 1] into bytes */
};

struct pl_tok_trainer;
/* pre: a pre-tokenizer's name in GGUF files, "gpt-2". */
pl_status pl_tok_trainer_new(struct pl_tok_trainer **out, const char *pre, struct pl_err *err) PL_MUST_CHECK;
void pl_tok_trainer_free(struct pl_tok_trainer *t);
/* Counts a text. PL_EFULL: there are more distinct fragments than are kept; this text was not counted to its end, and no
 * further one is. */
pl_status pl_tok_trainer_add(struct pl_tok_trainer *t, const char *s, size_t n) PL_MUST_CHECK;
/* Bytes that learning takes beside what was counted, about, at most. */
uint64_t pl_tok_trainer_memory(const struct pl_tok_trainer *t);
/* Joins pairs until there are n_vocab tokens, or none is left that stands min_count times. stop: borrowed, NULL = never; when it is set,
 * PL_ESTOPPED within a moment. */
pl_status pl_tok_trainer_learn(struct pl_bpe *out, const struct pl_tok_trainer *t, uint32_t n_special, uint32_t n_vocab, uint64_t min_count,
                               const atomic_bool *stop, struct pl_err *err) PL_MUST_CHECK;
void pl_bpe_fini(struct pl_bpe *b);

static inline uint32_t pl_bpe_n_tokens(const struct pl_bpe *b)
{
    return b->n_special + PL_BPE_BYTES + b->n_merges;
}

/* A token's text in GPT-2's alphabet, as GGUF files have it (id: not a special one). Appends. */
struct pl_buf;
void pl_bpe_text(const struct pl_bpe *b, int32_t id, struct pl_buf *out);

#endif
