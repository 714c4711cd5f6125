/* tiny_vocab: the tokenizers of tiny models: a complete byte-level BPE with a few merges, and a SentencePiece-style
 * vocabulary with byte tokens, both with the special tokens of the ChatML template.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/tools/tiny_vocab.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/utf8.h"

enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN = 2, TOKEN_CONTROL = 3, TOKEN_BYTE = 6, MAX_VOCAB = 400 };

static const char chatml[] =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}";

/* Left and right half of each merge, in rank order; a space is written as Ġ by add_merge. */
static const char *const merges[][2] = {
    {" ", "t"},  {"h", "e"},   {"i", "n"},  {" ", "a"},   {"r", "e"},   {" t", "he"}, {"o", "n"},   {"e", "r"},
    {"n", "d"},  {" ", "s"},   {" ", "w"},  {" ", "o"},   {"o", "r"},   {"a", "t"},   {"e", "s"},   {"i", "s"},
    {" ", "c"},  {"in", "g"},  {" a", "nd"}, {"i", "t"},  {"o", "u"},   {" ", "b"},   {" ", "p"},   {" ", "f"},
    {"e", "n"},  {"a", "n"},   {" ", "i"},  {" t", "o"},  {"a", "r"},   {"e", "d"},   {" ", "h"},   {" ", "m"},
    {"l", "l"},  {" o", "f"},  {" ", "d"},  {"a", "l"},   {" ", "l"},   {"i", "c"},   {" ", "y"},  {" y", "ou"}, {" ", "e"},
    {"o", "m"},  {"l", "e"},   {" ", "n"},  {"s", "t"},   {" ", "g"},   {"h", "at"},  {" ", "re"},  {"e", "c"},
    {"v", "e"},  {"i", "on"},  {"u", "t"},  {" s", "t"},  {"l", "y"},   {"t", "ion"}, {" ", "is"},  {" ", " "},
    {"  ", "  "}, {"\n", "\n"}, {"H", "e"}, {"He", "ll"}, {"Hell", "o"}, {" w", "or"}, {"l", "d"},  {" wor", "ld"},
};

/* Pieces of the SentencePiece kind, likeliest first; a space is written as ▁. */
static const char *const pieces[] = {
    " t",  "he",  "in",  " a",   " the", "re",   "on",  "er",   "nd",   " s",   " w",   " o",     "or",    "at",
    "es",  "is",  " c",  "ing",  " and", "it",   "ou",  " b",   " p",   " f",   "en",   "an",     " i",    " to",
    "ar",  "ed",  " h",  " m",   "ll",   " of",  " d",  "al",   " l",   "ic",   " you", "om",     "le",    "st",
    "He",  "llo", " He", " Hello", "ld", " wor", " world", " ", "e",    "t",    "a",    "o",      "i",     "n",
    "s",   "h",   "r",   "d",    "l",    "u",    "c",   "m",    "f",    "w",    "g",    "y",      "p",     "b",
    "v",   "k",   ".",   ",",    "H",    "I",    "T",   "A",    "S",    "'",    "!",    "?",      "-",     "0",
    "1",   "2",   "3",   "\xc3\xa9", "x", "q",   "j",   "z",    ":",    "user", "system",
};

struct vocab {
    char *tokens[MAX_VOCAB];
    float scores[MAX_VOCAB];
    int32_t types[MAX_VOCAB];
    size_t n;
};

static int32_t add(struct vocab *v, const char *text, float score, int32_t type)
{
    PL_ASSERT(v->n < MAX_VOCAB);
    v->tokens[v->n] = pl_xstrdup(text);
    v->scores[v->n] = score;
    v->types[v->n] = type;
    return (int32_t)v->n++;
}

/* The printable stand-in that byte-level BPE uses for a byte: itself where it is visible in Latin-1, else the next free
 * code point from U+0100 on. */
static uint32_t byte_char(unsigned byte)
{
    uint32_t next = 0x100;
    for (unsigned b = 0; b < 256; b++) {
        const bool visible = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
        const uint32_t c = visible ? b : next++;
        if (b == byte)
            return c;
    }
    return 0;
}

static void byte_text(const char *s, char *out)
{
    for (; *s != '\0'; s++)
        out += pl_utf8_encode(byte_char((unsigned char)*s), out);
    *out = '\0';
}

static void special_ids(struct gguf_out *o, int32_t start, int32_t end, int32_t unknown)
{
    gguf_out_u32(o, "tokenizer.ggml.bos_token_id", (uint32_t)start);
    gguf_out_u32(o, "tokenizer.ggml.eos_token_id", (uint32_t)end);
    gguf_out_u32(o, "tokenizer.ggml.unknown_token_id", (uint32_t)unknown);
    gguf_out_u32(o, "tokenizer.ggml.padding_token_id", (uint32_t)end);
    gguf_out_str(o, "tokenizer.chat_template", chatml);
}

static uint32_t finish(struct gguf_out *o, struct vocab *v, bool with_scores)
{
    gguf_out_strs(o, "tokenizer.ggml.tokens", (const char *const *)v->tokens, v->n);
    gguf_out_i32s(o, "tokenizer.ggml.token_type", v->types, v->n);
    if (with_scores)
        gguf_out_f32s(o, "tokenizer.ggml.scores", v->scores, v->n);
    for (size_t i = 0; i < v->n; i++)
        free(v->tokens[i]);
    return (uint32_t)v->n;
}

uint32_t tiny_vocab_bpe(struct gguf_out *o, const char *pre)
{
    struct vocab v = {.n = 0};
    char *lines[PL_COUNT_OF(merges)];
    const int32_t unknown = add(&v, "<|endoftext|>", 0, TOKEN_CONTROL);
    const int32_t start = add(&v, "<|im_start|>", 0, TOKEN_CONTROL);
    const int32_t end = add(&v, "<|im_end|>", 0, TOKEN_CONTROL);
    for (unsigned b = 0; b < 256; b++) {
        char text[8] = {0};
        pl_utf8_encode(byte_char(b), text);
        add(&v, text, 0, TOKEN_NORMAL);
    }
    for (size_t i = 0; i < PL_COUNT_OF(merges); i++) {
        char left[32], right[32], both[64], line[80];
        byte_text(merges[i][0], left);
        byte_text(merges[i][1], right);
        snprintf(both, sizeof both, "%s%s", left, right);
        snprintf(line, sizeof line, "%s %s", left, right);
        add(&v, both, 0, TOKEN_NORMAL);
        lines[i] = pl_xstrdup(line);
    }
    gguf_out_str(o, "tokenizer.ggml.model", "gpt2");
    gguf_out_str(o, "tokenizer.ggml.pre", pre);
    gguf_out_strs(o, "tokenizer.ggml.merges", (const char *const *)lines, PL_COUNT_OF(lines));
    for (size_t i = 0; i < PL_COUNT_OF(lines); i++)
        free(lines[i]);
    gguf_out_bool(o, "tokenizer.ggml.add_bos_token", 0);
    gguf_out_bool(o, "tokenizer.ggml.add_space_prefix", 0);
    special_ids(o, start, end, unknown);
    return finish(o, &v, false);
}

uint32_t tiny_vocab_spm(struct gguf_out *o)
{
    struct vocab v = {.n = 0};
    const int32_t unknown = add(&v, "<unk>", 0, TOKEN_UNKNOWN);
    const int32_t bos = add(&v, "<s>", 0, TOKEN_CONTROL);
    add(&v, "</s>", 0, TOKEN_CONTROL);
    for (unsigned b = 0; b < 256; b++) {
        char text[8];
        snprintf(text, sizeof text, "<0x%02X>", b);
        add(&v, text, 0, TOKEN_BYTE);
    }
    for (size_t i = 0; i < PL_COUNT_OF(pieces); i++) {
        char text[32] = {0}, *p = text;
        for (const char *s = pieces[i]; *s != '\0'; s++)
            p += *s == ' ' ? pl_utf8_encode(0x2581, p) : (size_t)(*p = *s, 1);
        *p = '\0';
        add(&v, text, -(float)i, TOKEN_NORMAL);
    }
    add(&v, "<|im_start|>", 0, TOKEN_CONTROL);
    const int32_t end = add(&v, "<|im_end|>", 0, TOKEN_CONTROL);
    gguf_out_str(o, "tokenizer.ggml.model", "llama");
    gguf_out_str(o, "tokenizer.ggml.pre", "default");
    gguf_out_bool(o, "tokenizer.ggml.add_bos_token", 1);
    gguf_out_bool(o, "tokenizer.ggml.add_space_prefix", 1);
    special_ids(o, bos, end, unknown);
    return finish(o, &v, true);
}
