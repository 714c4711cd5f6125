/* tok_int: what the tokenizer's files share. See tok.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TEXT_TOK_INT_H
#define PL_TEXT_TOK_INT_H

#include "core/text/tok.h"

struct pl_pretok;

enum { PL_TOK_NORMAL = 1, PL_TOK_UNKNOWN, PL_TOK_CONTROL, PL_TOK_USER, PL_TOK_UNUSED, PL_TOK_BYTE };

/* text -> id, open addressing */
struct pl_tok_map {
    int32_t *slots; /* id + 1, 0 = empty */
    uint32_t mask;
};

/* (left id, right id) -> rank and joined id */
struct pl_tok_merge {
    uint64_t pair; /* left << 32 | right; UINT64_MAX = empty */
    uint32_t rank;
    int32_t id;
};

struct pl_tok {
    bool spm;
    int32_t n;
    uint8_t *type;      /* [n] PL_TOK_NORMAL … */
    char *blob;         /* all texts one after another: running-text bytes, or the literal of control tokens */
    uint32_t *start;    /* [n + 1] into blob */
    struct pl_tok_map map; /* of the blob's texts, normal and user-defined tokens only */
    int32_t byte_id[256];
    size_t longest;     /* bytes of the longest normal token */
    bool complete;      /* every byte of a text is in some token: n bytes are n / longest tokens or more */
    /* byte-level BPE */
    struct pl_pretok *pretok;
    struct pl_tok_merge *merges;
    uint32_t merge_mask;
    bool ignore_merges; /* a fragment that is a token as a whole is taken at once (Llama 3) */
    /* SentencePiece */
    float *score;
    bool space_prefix;
    /* special tokens: control and user-defined, in the order of their bytes */
    int32_t *special;
    size_t n_special;
    bool has_user;
    bool special_start[256];
    int32_t bos, eos, unk;
    bool add_bos;
    uint8_t *eog; /* [n] */
};

static inline const char *pl_tok_text(const struct pl_tok *t, int32_t id, size_t *n)
{
    *n = t->start[id + 1] - t->start[id];
    return t->blob + t->start[id];
}

/* A text of n bytes is more tokens than max allows after `have`, whichever they are: known without looking at it. max 0 = all are allowed. */
static inline bool pl_tok_exceeds(const struct pl_tok *t, size_t n, size_t max, size_t have)
{
    return max > 0 && t->complete && (have > max || n / t->longest > max - have);
}

int32_t pl_tok_map_find(const struct pl_tok *t, const char *s, size_t n); /* -1 = none */
/* The longest special token that s begins with, -1 = none. Control tokens must lie in the first n_control bytes;
 * user-defined ones count if `user`. */
int32_t pl_tok_special_at(const struct pl_tok *t, const char *s, size_t n, size_t n_control, bool user);
pl_status pl_ids_push(struct pl_ids *ids, int32_t id) PL_MUST_CHECK;
/* GPT-2's alphabet for bytes: the byte that each character below U+0200 stands for, -1 = none. */
void pl_tok_byte_alphabet(int16_t byte_of[512]);

/* Ordinary text without special tokens, appended to ids. */
pl_status pl_tok_bpe(const struct pl_tok *t, const char *s, size_t n, size_t max, struct pl_ids *ids) PL_MUST_CHECK;
pl_status pl_tok_spm(const struct pl_tok *t, const char *s, size_t n, size_t max, struct pl_ids *ids) PL_MUST_CHECK;

/* pretok: cuts text into the fragments inside which byte pairs may be merged. */
pl_status pl_pretok_new(struct pl_pretok **out, const char *name, size_t n_name, bool *ignore_merges, struct pl_err *err)
    PL_MUST_CHECK;
void pl_pretok_free(struct pl_pretok *p);
/* The pattern of a stage, with \s for white space, appended to out. False: there are no more. */
struct pl_buf;
bool pl_pretok_pattern(const struct pl_pretok *p, size_t stage, struct pl_buf *out);
/* Calls fn for each fragment in order; stops at the first failure. */
pl_status pl_pretok_split(const struct pl_pretok *p, const char *s, size_t n, pl_status (*fn)(void *arg, const char *s, size_t n),
                          void *arg) PL_MUST_CHECK;

#endif
