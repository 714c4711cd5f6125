/* tok_export: writes a tokenizer as the files of a Hugging Face model folder.
 *
 * tokenizer.json says in the words of the tokenizers library what this program does: byte-level BPE with the patterns of pretok.c, or
 * SentencePiece's BPE, whose scores become merges: each way to join two tokens to a third, the likeliest third first.
 * Source: huggingface/tokenizers; huggingface/transformers, convert_slow_tokenizer.py.
 * SPDX-License-Identifier: Apache-2.0 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/model/gguf.h"
#include "core/text/tok_int.h"

#define PL_LOG_MODULE "tok"

struct export {
    const struct pl_tok *t;
    const struct pl_gguf *g;
    const char *folder;
    struct pl_err *err;
    struct pl_gguf_str *texts; /* [n] as the file has them */
};

struct joint {
    float score;
    int32_t whole, left, right;
};

static json_t *text_of(const struct export *x, int32_t id)
{
    return id >= 0 ? json_stringn(x->texts[id].s, x->texts[id].n) : json_null();
}

static pl_status write_json(const struct export *x, const char *name, json_t *j)
{
    char *path = NULL, *text = j != NULL ? json_dumps(j, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) : NULL;
    pl_status st;
    if (text == NULL || asprintf(&path, "%s/%s", x->folder, name) < 0)
        st = pl_fail(x->err, PL_ENOMEM, "no memory for %s", name);
    else
        st = pl_newfile_write(path, text, strlen(text), x->err);
    free(path);
    free(text);
    json_decref(j);
    return st;
}

/* ---- the model: vocabulary and merges ------------------------------------------------------------------------------ */

static pl_status make_vocab(const struct export *x, json_t *vocab)
{
    for (int32_t id = 0; id < x->t->n; id++) {
        char *key = strndup(x->texts[id].s, x->texts[id].n);
        const bool again = key != NULL && json_object_get(vocab, key) != NULL;
        const bool bad = key == NULL || strlen(key) != x->texts[id].n || json_object_set_new(vocab, key, json_integer(id)) != 0;
        free(key);
        if (again)
            return pl_fail(x->err, PL_ENOTSUP, "token %d has the text of an earlier one, which tokenizer.json cannot express", id);
        if (bad)
            return pl_fail(x->err, PL_EFORMAT, "the text of token %d is not valid UTF-8, or holds a NUL", id);
    }
    return PL_OK;
}

static pl_status file_merges(const struct export *x, json_t *merges)
{
    uint64_t n = 0;
    (void)pl_gguf_array_len(x->g, "tokenizer.ggml.merges", &n);
    struct pl_gguf_str *lines = pl_xcalloc(n + 1, sizeof *lines);
    pl_status st = pl_gguf_array_str(x->g, "tokenizer.ggml.merges", lines, n);
    for (uint64_t i = 0; i < n && st == PL_OK; i++) { /* checked when they were read */
        const char *space = memchr(lines[i].s + 1, ' ', lines[i].n - 1);
        const size_t left = (size_t)(space - lines[i].s);
        json_array_append_new(merges, json_pack("[s%, s%]", lines[i].s, left, space + 1, (size_t)lines[i].n - left - 1));
    }
    free(lines);
    return st;
}

static int by_score(const void *a, const void *b)
{
    const struct joint *x = a, *y = b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return x->whole != y->whole ? (x->whole > y->whole) - (x->whole < y->whole) : (x->left > y->left) - (x->left < y->left);
}

static pl_status score_merges(const struct export *x, json_t *merges)
{
    const struct pl_tok *t = x->t;
    struct joint *all = NULL;
    size_t n_all = 0, cap = 0;
    for (int32_t id = 0; id < t->n; id++) {
        size_t n;
        const char *s = pl_tok_text(t, id, &n);
        if (n < 2 || pl_tok_map_find(t, s, n) != id || t->type[id] == PL_TOK_USER)
            continue;
        for (size_t cut = 1; cut < n; cut++) {
            const int32_t left = pl_tok_map_find(t, s, cut), right = pl_tok_map_find(t, s + cut, n - cut);
            if (left < 0 || right < 0 || t->type[left] == PL_TOK_USER || t->type[right] == PL_TOK_USER)
                continue;
            if (n_all == cap) {
                cap = cap > 0 ? 2 * cap : 1024;
                struct joint *more = realloc(all, cap * sizeof *more);
                if (more == NULL) {
                    free(all);
                    return pl_fail(x->err, PL_ENOMEM, "no memory for the merges");
                }
                all = more;
            }
            all[n_all++] = (struct joint){t->score[id], id, left, right};
        }
    }
    qsort(all, n_all, sizeof *all, by_score);
    for (size_t i = 0; i < n_all; i++)
        json_array_append_new(merges, json_pack("[o, o]", text_of(x, all[i].left), text_of(x, all[i].right)));
    free(all);
    return PL_OK;
}

static json_t *make_model(const struct export *x, json_t *vocab, json_t *merges)
{
    const struct pl_tok *t = x->t;
    return json_pack("{s:s, s:n, s:o, s:n, s:n, s:b, s:b, s:b, s:O, s:O}", "type", "BPE", "dropout", "unk_token", text_of(x, t->spm ? t->unk : -1),
                     "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", t->spm, "byte_fallback", t->spm && t->byte_id[0] >= 0,
                     "ignore_merges", t->ignore_merges, "vocab", vocab, "merges", merges);
}

/* ---- what stands around it ----------------------------------------------------------------------------------------- */

static json_t *make_added(const struct export *x)
{
    json_t *list = json_array();
    for (int32_t id = 0; id < x->t->n; id++)
        if ((x->t->type[id] == PL_TOK_CONTROL || x->t->type[id] == PL_TOK_USER) && x->texts[id].n > 0)
            json_array_append_new(list, json_pack("{s:i, s:o, s:b, s:b, s:b, s:b, s:b}", "id", id, "content", text_of(x, id), "single_word", 0, "lstrip", 0,
                                                  "rstrip", 0, "normalized", 0, "special", x->t->type[id] != PL_TOK_USER));
    return list;
}

static json_t *make_normalizer(const struct pl_tok *t)
{
    json_t *space = json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern", "String", " ", "content", "\xe2\x96\x81");
    if (!t->spm || !t->space_prefix)
        return t->spm ? space : (json_decref(space), json_null());
    return json_pack("{s:s, s:[{s:s, s:s}, o]}", "type", "Sequence", "normalizers", "type", "Prepend", "prepend", "\xe2\x96\x81", space);
}

static json_t *byte_level(void)
{
    return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0);
}

static json_t *make_pre_tokenizer(const struct pl_tok *t)
{
    if (t->spm)
        return json_null();
    json_t *list = json_array();
    struct pl_buf pattern;
    pl_buf_init(&pattern, 0);
    for (size_t i = 0; pl_pretok_pattern(t->pretok, i, &pattern); i++) {
        json_array_append_new(list, json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", pl_buf_str(&pattern), "behavior", "Isolated",
                                              "invert", 0));
        pl_buf_clear(&pattern);
    }
    pl_buf_fini(&pattern);
    json_array_append_new(list, byte_level());
    return json_pack("{s:s, s:o}", "type", "Sequence", "pretokenizers", list);
}

static json_t *make_decoder(const struct pl_tok *t)
{
    if (!t->spm)
        return byte_level();
    json_t *d = json_pack("{s:s, s:[{s:s, s:{s:s}, s:s}, {s:s}, {s:s}]}", "type", "Sequence", "decoders", "type", "Replace", "pattern", "String",
                          "\xe2\x96\x81", "content", " ", "type", "ByteFallback", "type", "Fuse");
    if (t->space_prefix)
        json_array_append_new(json_object_get(d, "decoders"), json_pack("{s:s, s:s, s:i, s:i}", "type", "Strip", "content", " ", "start", 1, "stop", 0));
    return d;
}

/* The BOS in front, where the model asks for it. */
static json_t *make_post_processor(const struct export *x)
{
    const int32_t bos = x->t->bos;
    if (!x->t->add_bos || bos < 0)
        return json_null();
    json_t *text = text_of(x, bos), *specials = json_object();
    json_object_set_new(specials, json_string_value(text), json_pack("{s:O, s:[i], s:[O]}", "id", text, "ids", bos, "tokens", text));
    json_t *p = json_pack("{s:s, s:[{s:{s:O, s:i}}, {s:{s:s, s:i}}], s:[{s:{s:O, s:i}}, {s:{s:s, s:i}}, {s:{s:s, s:i}}], s:o}", "type",
                          "TemplateProcessing", "single", "SpecialToken", "id", text, "type_id", 0, "Sequence", "id", "A", "type_id", 0, "pair",
                          "SpecialToken", "id", text, "type_id", 0, "Sequence", "id", "A", "type_id", 0, "Sequence", "id", "B", "type_id", 1, "special_tokens",
                          specials);
    json_decref(text);
    return p;
}

static pl_status write_tokenizer(const struct export *x)
{
    json_t *vocab = json_object(), *merges = json_array();
    json_t *whole = NULL;
    pl_status st = make_vocab(x, vocab);
    if (st == PL_OK)
        st = x->t->spm ? score_merges(x, merges) : file_merges(x, merges);
    if (st == PL_OK)
        whole = json_pack("{s:s, s:n, s:n, s:o, s:o, s:o, s:o, s:o, s:o}", "version", "1.0", "truncation", "padding", "added_tokens", make_added(x),
                          "normalizer", make_normalizer(x->t), "pre_tokenizer", make_pre_tokenizer(x->t), "post_processor", make_post_processor(x),
                          "decoder", make_decoder(x->t), "model", make_model(x, vocab, merges));
    if (st == PL_OK)
        st = write_json(x, "tokenizer.json", whole);
    json_decref(vocab);
    json_decref(merges);
    return st;
}

/* ---- the other files ----------------------------------------------------------------------------------------------- */

static int32_t pad_of(const struct export *x)
{
    uint32_t id;
    return pl_gguf_u32(x->g, "tokenizer.ggml.padding_token_id", &id) == PL_OK && id < (uint32_t)x->t->n ? (int32_t)id : -1;
}

/* Without unk_token, which would be found in texts as well. */
static pl_status write_config(const struct export *x, uint32_t context)
{
    const struct pl_tok *t = x->t;
    struct pl_gguf_str template;
    json_t *c = json_pack("{s:s, s:I, s:b, s:b, s:o, s:o, s:o}", "tokenizer_class", "PreTrainedTokenizerFast", "model_max_length", (json_int_t)context,
                          "clean_up_tokenization_spaces", 0, "add_bos_token", t->add_bos, "bos_token", text_of(x, t->bos), "eos_token", text_of(x, t->eos),
                          "pad_token", text_of(x, pad_of(x)));
    if (pl_gguf_string(x->g, "tokenizer.chat_template", &template) == PL_OK)
        json_object_set_new(c, "chat_template", json_stringn(template.s, template.n));
    return write_json(x, "tokenizer_config.json", c);
}

static pl_status write_generation(const struct export *x)
{
    json_t *ends = json_array(), *c = json_object();
    for (int32_t id = 0; id < x->t->n; id++)
        if (pl_tok_is_eog(x->t, id))
            json_array_append_new(ends, json_integer(id));
    if (x->t->bos >= 0)
        json_object_set_new(c, "bos_token_id", json_integer(x->t->bos));
    if (pad_of(x) >= 0)
        json_object_set_new(c, "pad_token_id", json_integer(pad_of(x)));
    json_object_set_new(c, "eos_token_id", ends);
    return write_json(x, "generation_config.json", c);
}

pl_status pl_tok_export(const struct pl_tok *t, const struct pl_gguf *g, const char *folder, uint32_t context, struct pl_err *err)
{
    struct export x = {t, g, folder, err, pl_xcalloc((size_t)t->n, sizeof *x.texts)};
    pl_status st = pl_gguf_array_str(g, "tokenizer.ggml.tokens", x.texts, (uint64_t)t->n);
    if (t->spm && t->has_user)
        pl_log_warn("tokenizer.json: what follows a user-defined token gets a space in front, which SentencePiece does not give it");
    if (st == PL_OK)
        st = write_tokenizer(&x);
    if (st == PL_OK)
        st = write_config(&x, context);
    if (st == PL_OK)
        st = write_generation(&x);
    free(x.texts);
    return st;
}
