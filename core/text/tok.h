/* tok: text to token ids and back, as the model's own tokenizer does it: byte-level BPE (GGUF "gpt2" with its
 * pre-tokenizer pattern) and SentencePiece BPE (GGUF "llama": scores, byte fallback, space prefix).
 * Thread: any after load (read-only; PCRE2 match data is per call).  Owns: its tables; copies what it needs of the vocab.
 * Fails: load refuses an unknown model or pre-tokenizer by name; encode fails only for lack of memory or limits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_TOK_H
#define PL_TEXT_TOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_tok;
struct pl_gguf;

/* Reads tokenizer.ggml.*: model, pre, tokens, scores, token_type, merges, bos/eos/eot/unk/pad ids, add_bos_token,
 * add_space_prefix. */
pl_status pl_tok_load(struct pl_tok **out, const struct pl_gguf *g, struct pl_err *err) PL_MUST_CHECK;
void pl_tok_free(struct pl_tok *t);

struct pl_ids {
    int32_t *v; /* owned; free() */
    size_t n, cap;
};
void pl_ids_fini(struct pl_ids *ids);

enum {
    PL_TOK_SPECIAL = 1, /* control tokens in the text become their ids: text from templates. (User-defined tokens, which
                           are ordinary text with an entry of its own, are found everywhere.) */
    PL_TOK_BOS = 2,     /* put the BOS first if the model asks for it (add_bos_token) and it is not there already */
};
enum { PL_TOK_MAX_WORD = 256 << 10 /* bytes that are joined as one, where there is a limit of tokens */ };
/* Appends the tokens of s[0..n) to *ids. Without PL_TOK_SPECIAL no control token can come out whatever the text says.
 * max: give up with PL_ETOOLONG once more than max tokens are sure to come out (0 = no limit), or with PL_EINVAL at
 * a run of characters that would take too long to join. Text need not be valid UTF-8. */
pl_status pl_tok_encode(const struct pl_tok *t, const char *s, size_t n, unsigned flags, size_t max, struct pl_ids *ids,
                        struct pl_err *err) PL_MUST_CHECK;

/* A rendered prompt as pieces: trusted pieces (the template's own text, where special tokens are parsed) and user text
 * (where they never are). Tokenized as one text otherwise: pre-tokenization runs across the borders of pieces exactly
 * as on the joined string, except that a special token inside user text stays plain text. */
struct pl_piece {
    const char *s; /* borrowed */
    size_t n;
    bool trusted;
};
pl_status pl_tok_encode_pieces(const struct pl_tok *t, const struct pl_piece *pieces, size_t n_pieces, unsigned flags,
                               size_t max, struct pl_ids *ids, struct pl_err *err) PL_MUST_CHECK;

/* The bytes of one token as it stands in running text (leading space of SentencePiece included; a control token is ""
 * unless special). Borrowed, valid as long as t. *n receives the length. Out-of-range ids give "". */
const char *pl_tok_bytes(const struct pl_tok *t, int32_t id, bool special, size_t *n);
/* Whole text of ids, with the tokenizer's own rule for the first space (SentencePiece drops the added prefix). Appends. */
struct pl_buf;
void pl_tok_decode(const struct pl_tok *t, const int32_t *ids, size_t n, bool special, struct pl_buf *out);

int32_t pl_tok_count(const struct pl_tok *t);
int32_t pl_tok_bos(const struct pl_tok *t); /* -1 = none */
int32_t pl_tok_eos(const struct pl_tok *t);
bool pl_tok_adds_bos(const struct pl_tok *t);
/* Ends generation: EOS, EOT, and end-of-turn tokens known by name (<|im_end|>, <|eot_id|>, <|end|>, <end_of_turn> …). */
bool pl_tok_is_eog(const struct pl_tok *t, int32_t id);
bool pl_tok_is_control(const struct pl_tok *t, int32_t id);
/* Writes tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json into a folder that Hugging Face's libraries
 * read; g: the file that t was read from; context: tokens that the model takes. PL_ENOTSUP: two tokens have one text. */
pl_status pl_tok_export(const struct pl_tok *t, const struct pl_gguf *g, const char *folder, uint32_t context, struct pl_err *err) PL_MUST_CHECK;
/* The id of a token by its exact text, -1 = none. */
int32_t pl_tok_find(const struct pl_tok *t, const char *text, size_t n);

#endif
