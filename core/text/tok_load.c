/* tok_load: reads a tokenizer from a GGUF file into flat tables.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/model/gguf.h"
#include "core/text/tok_int.h"

enum { MAX_TOKENS = 1 << 24, MAX_TOKEN_BYTES = 1 << 16 };

/* End-of-turn tokens by name, for files that name only one of several. */
static const char *const eog_names[] = {"<|im_end|>", "<|eot_id|>",      "<|end|>",    "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
                                        "<|eom_id|>", "<|endofturn|>", "<EOT>", "<|return|>",    "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>"};

static uint32_t hash(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
    return (uint32_t)(h ^ h >> 32);
}

int32_t pl_tok_map_find(const struct pl_tok *t, const char *s, size_t n)
{
    for (uint32_t i = hash(s, n) & t->map.mask; t->map.slots[i] != 0; i = (i + 1) & t->map.mask) {
        size_t len;
        int32_t id = t->map.slots[i] - 1;
        const char *text = pl_tok_text(t, id, &len);
        if (len == n && memcmp(text, s, n) == 0)
            return id;
    }
    return -1;
}

/* ---- GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and up, in order ---- */

static bool is_plain(int byte)
{
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

void pl_tok_byte_alphabet(int16_t byte_of[512])
{
    int next = 256;
    for (int i = 0; i < 512; i++)
        byte_of[i] = -1;
    for (int b = 0; b < 256; b++)
        byte_of[is_plain(b) ? b : next++] = (int16_t)b;
}

/* A byte-level token's text to its bytes; its own UTF-8 where it does not use the alphabet. Returns the length. */
static size_t plain_bytes(const int16_t byte_of[512], struct pl_gguf_str in, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < in.n;) {
        uint32_t cp;
        int len = pl_utf8_decode(in.s + i, in.n - i, &cp);
        if (len <= 0 || cp >= 512 || byte_of[cp] < 0) {
            memcpy(out, in.s, in.n);
            return in.n;
        }
        out[n++] = (char)byte_of[cp];
        i += (size_t)len;
    }
    return n;
}

/* SentencePiece: U+2581 is a space. */
static size_t spaced_bytes(struct pl_gguf_str in, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < in.n;) {
        bool space = in.n - i >= 3 && memcmp(in.s + i, "\xe2\x96\x81", 3) == 0;
        out[n++] = space ? ' ' : in.s[i];
        i += space ? 3 : 1;
    }
    return n;
}

/* The byte that "<0x0A>" stands for, -1 = another text. */
static int byte_token(struct pl_gguf_str s)
{
    static const char digits[] = "0123456789ABCDEF";
    if (s.n != 6 || memcmp(s.s, "<0x", 3) != 0 || s.s[5] != '>')
        return -1;
    const char *high = memchr(digits, s.s[3], 16), *low = memchr(digits, s.s[4], 16);
    return high != NULL && low != NULL ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

/* ---- tables -------------------------------------------------------------------------------------------------------- */

struct loader {
    struct pl_tok *t;
    const struct pl_gguf *g;
    struct pl_err *err;
    struct pl_gguf_str *texts; /* [n] as the file has them */
};

static pl_status read_ids(struct loader *l)
{
    static const struct {
        const char *key;
        size_t offset;
    } ids[] = {{"tokenizer.ggml.bos_token_id", offsetof(struct pl_tok, bos)},
               {"tokenizer.ggml.eos_token_id", offsetof(struct pl_tok, eos)},
               {"tokenizer.ggml.unknown_token_id", offsetof(struct pl_tok, unk)}};
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        uint32_t v;
        int32_t *id = (int32_t *)((char *)l->t + ids[i].offset);
        pl_status st = pl_gguf_u32(l->g, ids[i].key, &v);
        *id = -1;
        if (st == PL_EFORMAT || (st == PL_OK && v >= (uint32_t)l->t->n && v != UINT32_MAX))
            return pl_fail(l->err, PL_EFORMAT, "key %s is not a token of the vocabulary", ids[i].key);
        if (st == PL_OK && v != UINT32_MAX)
            *id = (int32_t)v;
    }
    const struct {
        const char *key;
        bool *v;
    } flags[] = {{"tokenizer.ggml.add_bos_token", &l->t->add_bos}, {"tokenizer.ggml.add_space_prefix", &l->t->space_prefix}};
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++)
        if (pl_gguf_bool(l->g, flags[i].key, flags[i].v) == PL_EFORMAT)
            return pl_fail(l->err, PL_EFORMAT, "key %s is not a boolean", flags[i].key);
    return PL_OK;
}

static pl_status read_types(struct loader *l)
{
    struct pl_tok *t = l->t;
    int32_t *types = calloc((size_t)t->n, sizeof *types);
    if (types == NULL || (t->type = calloc((size_t)t->n, 1)) == NULL) {
        free(types);
        return pl_fail(l->err, PL_ENOMEM, "no memory for the tokenizer");
    }
    pl_status st = pl_gguf_array_i32(l->g, "tokenizer.ggml.token_type", types, (uint64_t)t->n);
    if (st == PL_ENOENT && t->spm)
        st = PL_EFORMAT; /* which tokens are bytes or control tokens cannot be told from their texts */
    for (int32_t i = 0; i < t->n; i++) {
        t->type[i] = st == PL_OK ? (uint8_t)types[i] : PL_TOK_NORMAL;
        if (st == PL_OK && (types[i] < 0 || types[i] > PL_TOK_BYTE))
            st = PL_EFORMAT;
    }
    free(types);
    if (st != PL_OK && st != PL_ENOENT)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.token_type is not one known type per token");
    if (t->unk >= 0 && t->type[t->unk] == PL_TOK_CONTROL)
        t->unk = -1; /* text must not become a control token: bytes that the vocabulary lacks are left out, as elsewhere */
    return PL_OK;
}

static pl_status read_texts(struct loader *l)
{
    struct pl_tok *t = l->t;
    int16_t byte_of[512];
    uint64_t total = 0;
    pl_tok_byte_alphabet(byte_of);
    for (int32_t i = 0; i < t->n; i++) {
        if (l->texts[i].n > MAX_TOKEN_BYTES)
            return pl_fail(l->err, PL_EFORMAT, "token %d has %llu bytes", i, (unsigned long long)l->texts[i].n);
        total += l->texts[i].n;
    }
    if (total >= UINT32_MAX || (t->blob = malloc(total + 1)) == NULL || (t->start = calloc((size_t)t->n + 1, sizeof *t->start)) == NULL)
        return pl_fail(l->err, PL_ENOMEM, "no memory for the vocabulary");
    uint32_t at = 0;
    for (int32_t i = 0; i < 256; i++)
        t->byte_id[i] = -1;
    for (int32_t i = 0; i < t->n; i++) {
        struct pl_gguf_str s = l->texts[i];
        char *out = t->blob + at;
        bool literal = t->type[i] == PL_TOK_CONTROL || t->type[i] == PL_TOK_UNKNOWN || (t->type[i] == PL_TOK_USER && !t->spm);
        int byte = t->spm && t->type[i] == PL_TOK_BYTE ? byte_token(s) : -1;
        size_t n = s.n;
        if (t->spm && t->type[i] == PL_TOK_BYTE && (byte < 0 || t->byte_id[byte] >= 0))
            return pl_fail(l->err, PL_EFORMAT, "token %d is of the byte type, but its text is not that of one more byte", i);
        if (byte >= 0) {
            *out = (char)byte;
            n = 1;
            t->byte_id[byte] = i;
        } else if (literal) {
            memcpy(out, s.s, s.n);
        } else {
            n = t->spm ? spaced_bytes(s, out) : plain_bytes(byte_of, s, out);
        }
        if (!t->spm && !literal && n == 1 && t->byte_id[(unsigned char)*out] < 0)
            t->byte_id[(unsigned char)*out] = i;
        if (!literal && n > t->longest)
            t->longest = n;
        t->start[i] = at;
        at += (uint32_t)n;
    }
    t->start[t->n] = at;
    t->blob[at] = '\0';
    return PL_OK;
}

static pl_status build_map(struct loader *l)
{
    struct pl_tok *t = l->t;
    uint32_t cap = 64;
    while (cap < 2 * (uint32_t)t->n)
        cap *= 2;
    t->map.mask = cap - 1;
    if ((t->map.slots = calloc(cap, sizeof *t->map.slots)) == NULL)
        return pl_fail(l->err, PL_ENOMEM, "no memory for the vocabulary");
    for (int32_t id = 0; id < t->n; id++) {
        size_t n;
        const char *s = pl_tok_text(t, id, &n);
        if ((t->type[id] != PL_TOK_NORMAL && t->type[id] != PL_TOK_USER && t->type[id] != PL_TOK_UNUSED) || n == 0)
            continue;
        uint32_t i = hash(s, n) & t->map.mask;
        while (t->map.slots[i] != 0) {
            size_t len;
            const char *have = pl_tok_text(t, t->map.slots[i] - 1, &len);
            if (len == n && memcmp(have, s, n) == 0)
                break; /* the first of two equal tokens stands */
            i = (i + 1) & t->map.mask;
        }
        if (t->map.slots[i] == 0)
            t->map.slots[i] = id + 1;
    }
    return PL_OK;
}

static int by_text(const void *a, const void *b, void *tok)
{
    const int32_t ia = *(const int32_t *)a, ib = *(const int32_t *)b;
    size_t na, nb;
    const char *sa = pl_tok_text(tok, ia, &na), *sb = pl_tok_text(tok, ib, &nb);
    int c = memcmp(sa, sb, na < nb ? na : nb);
    return c != 0 ? c : na != nb ? (na > nb) - (na < nb) : ia - ib;
}

static pl_status collect_special(struct loader *l)
{
    struct pl_tok *t = l->t;
    if ((t->special = calloc((size_t)t->n, sizeof *t->special)) == NULL || (t->eog = calloc((size_t)t->n, 1)) == NULL)
        return pl_fail(l->err, PL_ENOMEM, "no memory for the vocabulary");
    for (int32_t id = 0; id < t->n; id++) {
        size_t n;
        const char *s = pl_tok_text(t, id, &n);
        if ((t->type[id] != PL_TOK_CONTROL && t->type[id] != PL_TOK_USER) || n == 0)
            continue;
        t->special_start[(unsigned char)s[0]] = true;
        t->special[t->n_special++] = id;
        t->has_user |= t->type[id] == PL_TOK_USER;
        for (size_t k = 0; k < sizeof eog_names / sizeof eog_names[0]; k++)
            t->eog[id] |= strlen(eog_names[k]) == n && memcmp(eog_names[k], s, n) == 0;
    }
    qsort_r(t->special, t->n_special, sizeof *t->special, by_text, t);
    static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    for (size_t k = 0; k < sizeof keys / sizeof keys[0]; k++) {
        uint32_t v;
        pl_status st = pl_gguf_u32(l->g, keys[k], &v);
        if (st == PL_ENOENT || (st == PL_OK && v == UINT32_MAX))
            continue;
        if (st != PL_OK || v >= (uint32_t)t->n)
            return pl_fail(l->err, PL_EFORMAT, "key %s is not a token of the vocabulary", keys[k]);
        t->eog[v] = 1;
    }
    return PL_OK;
}

static pl_status read_merges(struct loader *l)
{
    struct pl_tok *t = l->t;
    uint64_t n = 0;
    if (pl_gguf_array_len(l->g, "tokenizer.ggml.merges", &n) != PL_OK || n > MAX_TOKENS)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.merges is missing or not an array");
    struct pl_gguf_str *texts = calloc(n ? n : 1, sizeof *texts);
    uint32_t cap = 64;
    while (cap < 2 * n)
        cap *= 2;
    t->merge_mask = cap - 1;
    t->merges = malloc(cap * sizeof *t->merges);
    char *bytes = malloc(3 * MAX_TOKEN_BYTES);
    pl_status st = PL_OK;
    if (texts == NULL || t->merges == NULL || bytes == NULL)
        st = pl_fail(l->err, PL_ENOMEM, "no memory for the merges");
    else if (pl_gguf_array_str(l->g, "tokenizer.ggml.merges", texts, n) != PL_OK)
        st = pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.merges is not an array of strings");
    int16_t byte_of[512];
    pl_tok_byte_alphabet(byte_of);
    for (uint32_t i = 0; st == PL_OK && i < cap; i++)
        t->merges[i].pair = UINT64_MAX;
    for (uint64_t i = 0; st == PL_OK && i < n; i++) {
        const char *space = texts[i].n > 1 ? memchr(texts[i].s + 1, ' ', texts[i].n - 1) : NULL;
        if (space == NULL || texts[i].n > MAX_TOKEN_BYTES) {
            st = pl_fail(l->err, PL_EFORMAT, "merge %llu is not two tokens with a space between", (unsigned long long)i);
            break;
        }
        size_t nl = plain_bytes(byte_of, (struct pl_gguf_str){texts[i].s, (uint64_t)(space - texts[i].s)}, bytes);
        size_t nr = plain_bytes(byte_of, (struct pl_gguf_str){space + 1, texts[i].n - (uint64_t)(space + 1 - texts[i].s)}, bytes + nl);
        int32_t left = pl_tok_map_find(t, bytes, nl), right = pl_tok_map_find(t, bytes + nl, nr);
        int32_t joined = pl_tok_map_find(t, bytes, nl + nr);
        if (left < 0 || right < 0 || joined < 0) {
            st = pl_fail(l->err, PL_EFORMAT, "merge %llu (%.*s) is not about tokens of the vocabulary", (unsigned long long)i,
                         (int)(texts[i].n < 60 ? texts[i].n : 60), texts[i].s);
            break;
        }
        uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
        uint32_t slot = (uint32_t)((pair * 0x9e3779b97f4a7c15u) >> 32) & t->merge_mask;
        while (t->merges[slot].pair != UINT64_MAX && t->merges[slot].pair != pair)
            slot = (slot + 1) & t->merge_mask;
        if (t->merges[slot].pair == UINT64_MAX)
            t->merges[slot] = (struct pl_tok_merge){pair, (uint32_t)i, joined};
    }
    free(texts);
    free(bytes);
    return st;
}

static pl_status load_bpe(struct loader *l)
{
    struct pl_gguf_str pre = {"default", 7};
    pl_status st = pl_gguf_string(l->g, "tokenizer.ggml.pre", &pre);
    if (st == PL_EFORMAT)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.pre is not a string");
    st = pl_pretok_new(&l->t->pretok, pre.s, pre.n, &l->t->ignore_merges, l->err);
    return st != PL_OK ? st : read_merges(l);
}

static pl_status load_spm(struct loader *l)
{
    struct pl_tok *t = l->t;
    if ((t->score = calloc((size_t)t->n, sizeof *t->score)) == NULL)
        return pl_fail(l->err, PL_ENOMEM, "no memory for the scores");
    if (pl_gguf_array_f32(l->g, "tokenizer.ggml.scores", t->score, (uint64_t)t->n) != PL_OK)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.scores is not one number per token");
    for (int32_t i = 0; i < t->n; i++)
        if (isnan(t->score[i]))
            return pl_fail(l->err, PL_EFORMAT, "the score of token %d is not a number", i);
    int n_bytes = 0;
    for (int i = 0; i < 256; i++)
        n_bytes += t->byte_id[i] >= 0;
    if (n_bytes != 256 && (n_bytes != 0 || t->unk < 0))
        return pl_fail(l->err, PL_EFORMAT, "the vocabulary has %d of 256 byte tokens and %s unknown token: not all text can be written", n_bytes,
                       t->unk < 0 ? "no" : "an");
    return PL_OK;
}

static pl_status load(struct loader *l)
{
    struct pl_gguf_str model;
    uint64_t n;
    pl_status st = pl_gguf_string(l->g, "tokenizer.ggml.model", &model);
    if (st != PL_OK)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.model is missing or not a string");
    l->t->spm = model.n == 5 && memcmp(model.s, "llama", 5) == 0;
    if (!l->t->spm && (model.n != 4 || memcmp(model.s, "gpt2", 4) != 0))
        return pl_fail(l->err, PL_ENOTSUP, "the tokenizer \"%.*s\" (key tokenizer.ggml.model) is not supported; gpt2 and llama are",
                       (int)(model.n < 80 ? model.n : 80), model.s);
    if (pl_gguf_array_len(l->g, "tokenizer.ggml.tokens", &n) != PL_OK || n == 0 || n > MAX_TOKENS)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.tokens is missing, empty or not an array");
    l->t->n = (int32_t)n;
    l->t->space_prefix = l->t->add_bos = l->t->spm;
    if ((l->texts = calloc(n, sizeof *l->texts)) == NULL)
        return pl_fail(l->err, PL_ENOMEM, "no memory for the vocabulary");
    if (pl_gguf_array_str(l->g, "tokenizer.ggml.tokens", l->texts, n) != PL_OK)
        return pl_fail(l->err, PL_EFORMAT, "key tokenizer.ggml.tokens is not an array of strings");
    if ((st = read_ids(l)) != PL_OK || (st = read_types(l)) != PL_OK || (st = read_texts(l)) != PL_OK ||
        (st = build_map(l)) != PL_OK || (st = collect_special(l)) != PL_OK)
        return st;
    st = l->t->spm ? load_spm(l) : load_bpe(l);
    l->t->complete = l->t->longest > 0;
    for (int i = 0; i < 256; i++)
        l->t->complete &= l->t->byte_id[i] >= 0 || (!l->t->spm && l->t->unk >= 0);
    return st;
}

pl_status pl_tok_load(struct pl_tok **out, const struct pl_gguf *g, struct pl_err *err)
{
    struct loader l = {.t = calloc(1, sizeof *l.t), .g = g, .err = err};
    if (l.t == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the tokenizer");
    pl_status st = load(&l);
    free(l.texts);
    if (st == PL_OK)
        *out = l.t;
    else
        pl_tok_free(l.t);
    return st;
}

void pl_tok_free(struct pl_tok *t)
{
    if (t == NULL)
        return;
    pl_pretok_free(t->pretok);
    free(t->type);
    free(t->blob);
    free(t->start);
    free(t->map.slots);
    free(t->merges);
    free(t->score);
    free(t->special);
    free(t->eog);
    free(t);
}
