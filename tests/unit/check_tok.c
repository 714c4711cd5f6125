/* check_tok: ids equal to those of Hugging Face tokenizers and sentencepiece (tests/oracle/make_tokenizer.py) on ugly text;
 * what a user writes never becomes a control token; any bytes, any length; faulty vocabularies refused by name. Runs in the
 * repository's root. SmolLM2's own vocabulary is compared where its file is: PARLEY_TEST_MODEL, or the cache folder.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/model/gguf.h"
#include "core/text/tok.h"
#include "core/text/tok_train.h"
#include "tests/tools/tiny_vocab.h"

Suite *suite_tok(void);

#define FIXTURES "tests/oracle/fixtures/tokenizer/"

/* ---- fixtures ---- */

static json_t *fixture(const char *name)
{
    char path[256];
    json_error_t error;
    snprintf(path, sizeof path, FIXTURES "%s", name);
    json_t *j = json_load_file(path, JSON_ALLOW_NUL, &error);
    ck_assert_msg(j != NULL, "%s: %s (run this in the repository's root)", path, error.text);
    return j;
}

struct vocab {
    void *bytes;
    struct pl_gguf *g;
    struct pl_tok *tok;
};

/* Takes o. */
static pl_status open_vocab(struct vocab *v, struct gguf_out *o, struct pl_err *err)
{
    size_t n;
    *v = (struct vocab){.bytes = gguf_out_bytes(o, &n)};
    gguf_out_free(o);
    ck_assert_msg(pl_gguf_open_memory(&v->g, v->bytes, n, err) == PL_OK, "%s", err->msg);
    return pl_tok_load(&v->tok, v->g, err);
}

static void close_vocab(struct vocab *v)
{
    pl_tok_free(v->tok);
    pl_gguf_close(v->g);
    free(v->bytes);
}

static void add_strings(struct gguf_out *o, const char *key, const json_t *list)
{
    size_t n = json_array_size(list);
    const char **v = calloc(n + 1, sizeof *v);
    for (size_t i = 0; i < n; i++)
        v[i] = json_string_value(json_array_get(list, i));
    gguf_out_strs(o, key, v, n);
    free(v);
}

static struct gguf_out *vocab_of(const json_t *j, const char *pre)
{
    struct gguf_out *o = gguf_out_new();
    const json_t *types = json_object_get(j, "types"), *scores = json_object_get(j, "scores");
    size_t n = json_array_size(types);
    int32_t *t = calloc(n, sizeof *t);
    float *s = calloc(n, sizeof *s);
    gguf_out_str(o, "tokenizer.ggml.model", json_string_value(json_object_get(j, "model")));
    add_strings(o, "tokenizer.ggml.tokens", json_object_get(j, "tokens"));
    for (size_t i = 0; i < n; i++) {
        t[i] = (int32_t)json_integer_value(json_array_get(types, i));
        s[i] = (float)json_number_value(json_array_get(scores, i));
    }
    gguf_out_i32s(o, "tokenizer.ggml.token_type", t, n);
    if (scores != NULL) {
        gguf_out_f32s(o, "tokenizer.ggml.scores", s, n);
        gguf_out_bool(o, "tokenizer.ggml.add_space_prefix", json_is_true(json_object_get(j, "prefix")));
        gguf_out_u32(o, "tokenizer.ggml.unknown_token_id", (uint32_t)json_integer_value(json_object_get(j, "unknown")));
        gguf_out_u32(o, "tokenizer.ggml.bos_token_id", (uint32_t)json_integer_value(json_object_get(j, "bos")));
        gguf_out_u32(o, "tokenizer.ggml.eos_token_id", (uint32_t)json_integer_value(json_object_get(j, "eos")));
    } else {
        gguf_out_str(o, "tokenizer.ggml.pre", pre);
        add_strings(o, "tokenizer.ggml.merges", json_object_get(j, "merges"));
    }
    free(t);
    free(s);
    return o;
}

/* ---- comparing ---- */

static void print_ids(const char *what, const int32_t *v, size_t n)
{
    printf("  %s", what);
    for (size_t i = 0; i < n; i++)
        printf(" %d", v[i]);
    printf("\n");
}

static void same_ids(const struct pl_ids *got, const json_t *want, const char *name, size_t text)
{
    size_t n = json_array_size(want);
    int32_t *v = calloc(n + 1, sizeof *v);
    for (size_t i = 0; i < n; i++)
        v[i] = (int32_t)json_integer_value(json_array_get(want, i));
    bool same = got->n == n && (n == 0 || memcmp(got->v, v, n * sizeof *v) == 0);
    if (!same) {
        print_ids("want", v, n);
        print_ids("got ", got->v, got->n);
    }
    free(v);
    ck_assert_msg(same, "%s: text %zu has other tokens", name, text);
}

static struct pl_ids encode(const struct pl_tok *tok, const char *s, size_t n, unsigned flags)
{
    struct pl_ids ids = {0};
    struct pl_err err = {0};
    ck_assert_msg(pl_tok_encode(tok, s, n, flags, 0, &ids, &err) == PL_OK, "%s", err.msg);
    return ids;
}

/* The text again, less the bytes that a byte-level vocabulary has no token for (`spm`: nothing is left out). */
static void decodes_to(const struct pl_tok *tok, bool spm, const struct pl_ids *ids, const char *s, size_t n)
{
    struct pl_buf text, want;
    pl_buf_init(&text, 0);
    pl_buf_init(&want, 0);
    bool known[256];
    for (int b = 0; b < 256; b++)
        known[b] = spm || pl_tok_find(tok, &(char){(char)b}, 1) >= 0;
    for (size_t i = 0; i < n; i++)
        if (known[(unsigned char)s[i]])
            pl_buf_addc(&want, s[i]);
    pl_tok_decode(tok, ids->v, ids->n, true, &text);
    ck_assert_uint_eq(text.len, want.len);
    ck_assert(memcmp(pl_buf_str(&text), pl_buf_str(&want), want.len) == 0);
    pl_buf_fini(&text);
    pl_buf_fini(&want);
}

/* "special", "plain" and "pieces" of one tokenizer against it. */
static void compare_bpe(const struct pl_tok *tok, const json_t *cases, const json_t *file, const char *name)
{
    const json_t *all = json_object_get(file, "texts"), *special = json_object_get(cases, "special"), *row;
    size_t i, n_plain = 0;
    ck_assert_uint_eq(json_array_size(special), json_array_size(all));
    json_array_foreach(special, i, row) {
        const json_t *text = json_array_get(all, i);
        const char *s = json_string_value(text);
        size_t n = json_string_length(text);
        struct pl_ids ids = encode(tok, s, n, PL_TOK_SPECIAL);
        same_ids(&ids, row, name, i);
        decodes_to(tok, false, &ids, s, n);
        pl_ids_fini(&ids);
        const json_t *plain = json_array_get(json_object_get(cases, "plain"), n_plain);
        bool differs = plain != NULL && (size_t)json_integer_value(json_array_get(plain, 0)) == i;
        n_plain += differs;
        ids = encode(tok, s, n, 0);
        same_ids(&ids, differs ? json_array_get(plain, 1) : row, name, i);
        decodes_to(tok, false, &ids, s, n);
        pl_ids_fini(&ids);
    }
    ck_assert_uint_eq(n_plain, json_array_size(json_object_get(cases, "plain")));
    ck_assert_uint_gt(n_plain, 3);
    json_array_foreach(json_object_get(cases, "pieces"), i, row) {
        const json_t *list = json_array_get(json_object_get(file, "pieces"), i), *piece;
        struct pl_piece pieces[8];
        struct pl_ids ids = {0};
        struct pl_err err = {0};
        size_t n = 0, k;
        json_array_foreach(list, k, piece) {
            const json_t *text = json_array_get(piece, 0);
            pieces[n++] = (struct pl_piece){json_string_value(text), json_string_length(text), json_is_true(json_array_get(piece, 1))};
        }
        ck_assert_int_eq(pl_tok_encode_pieces(tok, pieces, n, PL_TOK_SPECIAL, 0, &ids, &err), PL_OK);
        same_ids(&ids, row, name, i);
        pl_ids_fini(&ids);
    }
    ck_assert_uint_ge(i, 12);
}

static const char *const pres[] = {"gpt-2", "smollm", "llama-bpe", "qwen2"};

START_TEST(bpe)
{
    json_t *file = fixture("texts.json"), *j = fixture("bpe.json");
    struct vocab v;
    struct pl_err err = {0};
    ck_assert_msg(open_vocab(&v, vocab_of(json_object_get(j, "vocab"), pres[_i]), &err) == PL_OK, "%s", err.msg);
    compare_bpe(v.tok, json_object_get(json_object_get(j, "pre"), pres[_i]), file, pres[_i]);
    close_vocab(&v);
    json_decref(file);
    json_decref(j);
}
END_TEST

/* A vocabulary in which nearly any two neighbours are joined shows where the patterns cut. */
START_TEST(probes)
{
    json_t *j = fixture("probe.json"), *row;
    struct vocab v;
    struct pl_err err = {0};
    size_t i;
    ck_assert_msg(open_vocab(&v, vocab_of(json_object_get(j, "vocab"), pres[_i]), &err) == PL_OK, "%s", err.msg);
    json_array_foreach(json_object_get(json_object_get(j, "pre"), pres[_i]), i, row) {
        const json_t *text = json_array_get(json_object_get(j, "texts"), i);
        struct pl_ids ids = encode(v.tok, json_string_value(text), json_string_length(text), 0);
        same_ids(&ids, row, "probe.json", i);
        pl_ids_fini(&ids);
    }
    ck_assert_uint_ge(i, 200);
    close_vocab(&v);
    json_decref(j);
}
END_TEST

/* U+2581 stands for a space in SentencePiece's files: it comes back as one. */
static char *spaced(const char *s, size_t *n)
{
    char *out = malloc(*n + 1);
    size_t len = 0;
    for (size_t i = 0; i < *n;) {
        bool space = *n - i >= 3 && memcmp(s + i, "\xe2\x96\x81", 3) == 0;
        out[len++] = space ? ' ' : s[i];
        i += space ? 3 : 1;
    }
    *n = len;
    return out;
}

START_TEST(sentencepiece)
{
    static const char *const names[] = {"spm.json", "spm-unknown.json", "spm-no-prefix.json"};
    json_t *file = fixture("texts.json"), *j = fixture(names[_i]), *row;
    struct vocab v;
    struct pl_err err = {0};
    size_t k;
    ck_assert_msg(open_vocab(&v, vocab_of(json_object_get(j, "vocab"), NULL), &err) == PL_OK, "%s", err.msg);
    json_array_foreach(json_object_get(j, "plain"), k, row) {
        size_t i = (size_t)json_integer_value(json_array_get(row, 0)), n;
        const json_t *text = json_array_get(json_object_get(file, "texts"), i);
        struct pl_ids ids = encode(v.tok, json_string_value(text), n = json_string_length(text), 0);
        same_ids(&ids, json_array_get(row, 1), names[_i], i);
        if (json_is_true(json_object_get(j, "decodes"))) {
            char *s = spaced(json_string_value(text), &n);
            decodes_to(v.tok, true, &ids, s, n);
            free(s);
        }
        pl_ids_fini(&ids);
    }
    ck_assert_uint_gt(k, 200);
    close_vocab(&v);
    json_decref(file);
    json_decref(j);
}
END_TEST

START_TEST(smollm2)
{
    char path[4096];
    const char *given = getenv("PARLEY_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    snprintf(path, sizeof path, "%s%s/parley/SmolLM2-135M-Instruct.Q4_1.gguf", cache && *cache ? cache : home ? home : "",
             cache && *cache ? "" : "/.cache");
    if (given != NULL && *given != '\0')
        snprintf(path, sizeof path, "%s", given);
    if (access(path, R_OK) != 0) {
        printf("tok: SmolLM2 skipped: no file %s (PARLEY_TEST_MODEL names another)\n", path);
        return;
    }
    struct vocab v = {0};
    struct pl_err err = {0};
    ck_assert_msg(pl_gguf_open(&v.g, path, &err) == PL_OK, "%s", err.msg);
    struct pl_gguf_str name = {0};
    if (pl_gguf_string(v.g, "tokenizer.ggml.pre", &name) != PL_OK || name.n != 6 || memcmp(name.s, "smollm", 6) != 0) {
        printf("tok: SmolLM2 skipped: %s is another model\n", path);
        pl_gguf_close(v.g);
        return;
    }
    clock_t from = clock();
    ck_assert_msg(pl_tok_load(&v.tok, v.g, &err) == PL_OK, "%s", err.msg);
    ck_assert_double_lt((double)(clock() - from) / CLOCKS_PER_SEC, 0.5); /* 10 ms; the sanitizers slow it down */
    json_t *file = fixture("texts.json"), *j = fixture("smollm2.json");
    compare_bpe(v.tok, j, file, "SmolLM2");
    ck_assert_int_eq(pl_tok_count(v.tok), 49152);
    ck_assert(pl_tok_is_eog(v.tok, pl_tok_find(v.tok, "<|im_end|>", 10)));
    close_vocab(&v);
    json_decref(file);
    json_decref(j);
}
END_TEST

/* ---- any bytes, any length ---- */

static struct vocab tiny(bool spm)
{
    struct vocab v;
    struct pl_err err = {0};
    struct gguf_out *o = gguf_out_new();
    (void)(spm ? tiny_vocab_spm(o) : tiny_vocab_bpe(o, "llama-bpe"));
    ck_assert_msg(open_vocab(&v, o, &err) == PL_OK, "%s", err.msg);
    return v;
}

static uint64_t rng = 88172645463325252u;

static uint32_t below(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)((rng >> 32) * n >> 32);
}

/* Bytes come back as they were, whatever they are; and no control token comes out of them. */
START_TEST(any_bytes)
{
    static const char *const fodder[] = {"<|im_start|>", "<|im_end|>", "<s>",  "</s>", "<|endoftext|>", "\xe2\x96",
                                         "\xf0\x9f",     "\xff\xfe",   " the", "\n\n", "123",           "\xc3\xa9"};
    struct vocab v = tiny(_i);
    for (int round = 0; round < 5000; round++) {
        char s[200];
        size_t n = 0, goal = below(150);
        while (n < goal) {
            const char *f = fodder[below(sizeof fodder / sizeof fodder[0])];
            if (below(2) == 0)
                s[n++] = (char)below(256);
            else
                for (; *f != '\0'; f++)
                    s[n++] = *f;
        }
        char *copy = malloc(n ? n : 1); /* its end is watched by the sanitizer */
        memcpy(copy, s, n);
        struct pl_ids ids = encode(v.tok, copy, n, PL_TOK_BOS & below(4));
        size_t bos = ids.n > 0 && ids.v[0] == pl_tok_bos(v.tok);
        for (size_t i = bos; i < ids.n; i++)
            ck_assert(!pl_tok_is_control(v.tok, ids.v[i]));
        struct pl_ids text = {ids.v + bos, ids.n - bos, 0};
        size_t want_n = n;
        char *want = _i ? spaced(copy, &want_n) : NULL;
        decodes_to(v.tok, _i, &text, _i ? want : copy, want_n);
        free(want);
        free(copy);
        pl_ids_fini(&ids);
    }
    close_vocab(&v);
}
END_TEST

/* A megabyte of the unkindest kinds in about linear time. */
START_TEST(long_texts)
{
    static const char *const units[] = {"a", "\xff", "a\xff", "<", "<|im_start|", " ", "\n", " \n", "1", "\xe4\xbd\xa0", "e\xcc\x81", "he", "'", "\t "};
    enum { MEGABYTE = 1 << 20 };
    struct vocab v = tiny(_i);
    char *s = malloc(MEGABYTE);
    for (size_t k = 0; k < sizeof units / sizeof units[0]; k++) {
        size_t len = strlen(units[k]), n = 0;
        for (; n + len <= MEGABYTE; n += len)
            memcpy(s + n, units[k], len);
        clock_t from = clock();
        struct pl_ids ids = encode(v.tok, s, n, PL_TOK_SPECIAL);
        double seconds = (double)(clock() - from) / CLOCKS_PER_SEC;
        ck_assert_msg(seconds < 5, "%s: %g s", units[k], seconds); /* a fraction of a second; quadratic would be hours */
        decodes_to(v.tok, _i, &ids, s, n);
        pl_ids_fini(&ids);
        struct pl_err err;
        from = clock();
        ck_assert_int_eq(pl_tok_encode(v.tok, s, n, 0, 100, &ids, &err), PL_ETOOLONG);
        seconds = (double)(clock() - from) / CLOCKS_PER_SEC;
        ck_assert_msg(seconds < 0.1, "%s, of which 100 are allowed: %g s", units[k], seconds); /* most of it is not looked at */
        pl_ids_fini(&ids);
    }
    free(s);
    close_vocab(&v);
}
END_TEST

/* Where tokens are limited, as a client's are, no run of characters takes long to join. */
START_TEST(long_runs)
{
    enum { MOST = PL_TOK_MAX_WORD, MANY = 1 << 24 };
    struct vocab v = tiny(false);
    struct pl_err err = {0};
    char *s = malloc(2 * MOST);
    memset(s, _i == 0 ? 'a' : ' ', 2 * MOST);
    struct pl_ids ids = {0};
    ck_assert_int_eq(pl_tok_encode(v.tok, s, MOST, 0, MANY, &ids, &err), PL_OK);
    pl_ids_fini(&ids);
    ck_assert_int_eq(pl_tok_encode(v.tok, s, MOST + 2, 0, MANY, &ids, &err), PL_EINVAL);
    ck_assert_msg(strstr(err.msg, "256 KiB") != NULL, "%s", err.msg);
    pl_ids_fini(&ids);
    ck_assert_int_eq(pl_tok_encode(v.tok, s, MOST + 2, 0, 0, &ids, &err), PL_OK); /* a file for training may have anything */
    pl_ids_fini(&ids);
    for (int i = 0; i < 2 * MOST; i += 100) /* words */
        s[i] = _i == 0 ? ' ' : 'a';
    ck_assert_int_eq(pl_tok_encode(v.tok, s, 2 * MOST, 0, MANY, &ids, &err), PL_OK);
    pl_ids_fini(&ids);
    free(s);
    close_vocab(&v);
}
END_TEST

/* ---- contracts ---- */

START_TEST(limits_and_bos)
{
    struct vocab v = tiny(true);
    struct pl_ids ids = {0};
    struct pl_err err = {0};
    int32_t bos = pl_tok_bos(v.tok);
    ck_assert(pl_tok_adds_bos(v.tok) && bos >= 0);
    ck_assert_int_eq(pl_tok_encode(v.tok, "Hello", 5, PL_TOK_BOS, 0, &ids, &err), PL_OK);
    ck_assert_uint_eq(ids.n, 2);
    ck_assert_int_eq(ids.v[0], bos);
    pl_ids_fini(&ids);
    /* not twice; but a user who writes its name has not written it */
    ck_assert_int_eq(pl_tok_encode(v.tok, "<s>Hello", 8, PL_TOK_BOS | PL_TOK_SPECIAL, 0, &ids, &err), PL_OK);
    ck_assert_uint_eq(ids.n, 2);
    pl_ids_fini(&ids);
    ck_assert_int_eq(pl_tok_encode(v.tok, "<s>", 3, PL_TOK_BOS, 0, &ids, &err), PL_OK);
    ck_assert_int_eq(ids.v[0], bos);
    ck_assert_uint_gt(ids.n, 2);
    pl_ids_fini(&ids);
    /* no text: no token but the BOS */
    ck_assert_int_eq(pl_tok_encode(v.tok, NULL, 0, PL_TOK_SPECIAL, 0, &ids, &err), PL_OK);
    ck_assert_uint_eq(ids.n, 0);
    ck_assert_int_eq(pl_tok_encode(v.tok, "", 0, PL_TOK_BOS, 0, &ids, &err), PL_OK);
    ck_assert_uint_eq(ids.n, 1);
    /* appends; max counts the new ones only */
    ck_assert_int_eq(pl_tok_encode(v.tok, "Hello", 5, 0, 1, &ids, &err), PL_OK);
    ck_assert_uint_eq(ids.n, 2);
    ck_assert_int_eq(pl_tok_encode(v.tok, "Hello Hello Hello", 17, 0, 2, &ids, &err), PL_ETOOLONG);
    ck_assert(strstr(err.msg, "more than 2 tokens") != NULL);
    pl_ids_fini(&ids);
    close_vocab(&v);
}
END_TEST

START_TEST(names)
{
    struct vocab v = tiny(false);
    size_t n;
    int32_t end = pl_tok_find(v.tok, "<|im_end|>", 10), eot = pl_tok_find(v.tok, "<|endoftext|>", 13), he = pl_tok_find(v.tok, "he", 2);
    ck_assert(end >= 0 && eot >= 0 && he >= 0);
    ck_assert_int_eq(pl_tok_find(v.tok, "<|im_end", 8), -1);
    ck_assert_int_eq(pl_tok_find(v.tok, "<|im_end|>x", 11), -1);
    ck_assert_int_eq(pl_tok_find(v.tok, "", 0), -1);
    ck_assert(pl_tok_is_control(v.tok, end) && !pl_tok_is_control(v.tok, he));
    ck_assert(pl_tok_is_eog(v.tok, end) && pl_tok_is_eog(v.tok, eot) && !pl_tok_is_eog(v.tok, he));
    ck_assert(!pl_tok_is_eog(v.tok, -1) && !pl_tok_is_control(v.tok, pl_tok_count(v.tok)));
    ck_assert_str_eq((pl_tok_bytes(v.tok, end, false, &n)), "");
    ck_assert_uint_eq(n, 0);
    ck_assert(memcmp(pl_tok_bytes(v.tok, end, true, &n), "<|im_end|>", 10) == 0 && n == 10);
    (void)pl_tok_bytes(v.tok, -1, true, &n);
    ck_assert_uint_eq(n, 0);
    (void)pl_tok_bytes(v.tok, pl_tok_count(v.tok), true, &n);
    ck_assert_uint_eq(n, 0);
    close_vocab(&v);
}
END_TEST

/* ---- faulty vocabularies ---- */

static void no_model(struct gguf_out *o) { gguf_out_remove_key(o, "tokenizer.ggml.model"); }
static void other_model(struct gguf_out *o) { gguf_out_str(o, "tokenizer.ggml.model", "bert"); }
static void other_pre(struct gguf_out *o) { gguf_out_str(o, "tokenizer.ggml.pre", "klingon"); }
static void number_pre(struct gguf_out *o) { gguf_out_u32(o, "tokenizer.ggml.pre", 1); }
static void no_tokens(struct gguf_out *o) { gguf_out_strs(o, "tokenizer.ggml.tokens", NULL, 0); }
static void number_tokens(struct gguf_out *o) { gguf_out_i32s(o, "tokenizer.ggml.tokens", (int32_t[]){1, 2}, 2); }
static void few_types(struct gguf_out *o) { gguf_out_i32s(o, "tokenizer.ggml.token_type", (int32_t[]){1, 1}, 2); }
static void no_types(struct gguf_out *o) { gguf_out_remove_key(o, "tokenizer.ggml.token_type"); }
static void no_merges(struct gguf_out *o) { gguf_out_remove_key(o, "tokenizer.ggml.merges"); }
static void odd_merge(struct gguf_out *o) { gguf_out_strs(o, "tokenizer.ggml.merges", (const char *[]){"h e", "he"}, 2); }
static void lost_merge(struct gguf_out *o) { gguf_out_strs(o, "tokenizer.ggml.merges", (const char *[]){"h e", "Q Q"}, 2); }
static void number_merges(struct gguf_out *o) { gguf_out_i32s(o, "tokenizer.ggml.merges", (int32_t[]){1}, 1); }
static void far_bos(struct gguf_out *o) { gguf_out_u32(o, "tokenizer.ggml.bos_token_id", 1u << 20); }
static void text_eos(struct gguf_out *o) { gguf_out_str(o, "tokenizer.ggml.eos_token_id", "</s>"); }
static void far_eot(struct gguf_out *o) { gguf_out_u32(o, "tokenizer.ggml.eot_token_id", 1u << 20); }
static void odd_flag(struct gguf_out *o) { gguf_out_u32(o, "tokenizer.ggml.add_bos_token", 1); }
static void few_scores(struct gguf_out *o) { gguf_out_f32s(o, "tokenizer.ggml.scores", (float[]){0}, 1); }
static void whole_scores(struct gguf_out *o) { gguf_out_i32s(o, "tokenizer.ggml.scores", (int32_t[]){0}, 1); }

/* A SentencePiece vocabulary of its own: unknown, control and three more tokens of these types. */
static void small_spm(struct gguf_out *o, const char *a, int32_t ta, const char *b, int32_t tb, float score)
{
    gguf_out_strs(o, "tokenizer.ggml.tokens", (const char *[]){"<unk>", "<s>", a, b}, 4);
    gguf_out_i32s(o, "tokenizer.ggml.token_type", (int32_t[]){2, 3, ta, tb}, 4);
    gguf_out_f32s(o, "tokenizer.ggml.scores", (float[]){0, 0, -1, score}, 4);
    static const char *const ids[] = {"eos", "padding"};
    for (size_t i = 0; i < 2; i++) {
        char key[64];
        snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id", ids[i]);
        gguf_out_u32(o, key, 1);
    }
}

static void nan_score(struct gguf_out *o) { small_spm(o, "a", 1, "b", 1, NAN); }
static void bad_byte(struct gguf_out *o) { small_spm(o, "a", 1, "<0xZZ>", 6, 0); }
static void signed_byte(struct gguf_out *o) { small_spm(o, "a", 1, "<0x+1>", 6, 0); }
static void double_byte(struct gguf_out *o) { small_spm(o, "<0x41>", 6, "<0x41>", 6, 0); }
static void few_bytes(struct gguf_out *o) { small_spm(o, "<0x41>", 6, "<0x42>", 6, 0); }
static void odd_type(struct gguf_out *o) { small_spm(o, "a", 1, "b", 7, 0); }

static void nothing_unknown(struct gguf_out *o)
{
    small_spm(o, "a", 1, "b", 1, 0);
    gguf_out_remove_key(o, "tokenizer.ggml.unknown_token_id");
}

static const struct fault {
    bool spm;
    void (*make)(struct gguf_out *o);
    pl_status status;
    const char *word;
} faults[] = {
    {0, no_model, PL_EFORMAT, "tokenizer.ggml.model"},
    {0, other_model, PL_ENOTSUP, "\"bert\""},
    {0, other_pre, PL_ENOTSUP, "\"klingon\""},
    {0, number_pre, PL_EFORMAT, "tokenizer.ggml.pre"},
    {0, no_tokens, PL_EFORMAT, "tokenizer.ggml.tokens"},
    {0, number_tokens, PL_EFORMAT, "tokenizer.ggml"},
    {0, few_types, PL_EFORMAT, "token_type"},
    {1, no_types, PL_EFORMAT, "token_type"},
    {0, no_merges, PL_EFORMAT, "tokenizer.ggml.merges"},
    {0, odd_merge, PL_EFORMAT, "merge 1"},
    {0, lost_merge, PL_EFORMAT, "merge 1 (Q Q)"},
    {0, number_merges, PL_EFORMAT, "tokenizer.ggml.merges"},
    {0, far_bos, PL_EFORMAT, "bos_token_id"},
    {0, text_eos, PL_EFORMAT, "eos_token_id"},
    {0, far_eot, PL_EFORMAT, "eot_token_id"},
    {0, odd_flag, PL_EFORMAT, "add_bos_token"},
    {1, few_scores, PL_EFORMAT, "tokenizer.ggml.scores"},
    {1, whole_scores, PL_EFORMAT, "tokenizer.ggml.scores"},
    {1, nan_score, PL_EFORMAT, "token 3"},
    {1, bad_byte, PL_EFORMAT, "token 3"},
    {1, signed_byte, PL_EFORMAT, "token 3"},
    {1, double_byte, PL_EFORMAT, "token 3"},
    {1, few_bytes, PL_EFORMAT, "2 of 256"},
    {1, odd_type, PL_EFORMAT, "token_type"},
    {1, nothing_unknown, PL_EFORMAT, "no unknown token"},
};

/* A user-defined token is whole: no token that it would be a part of. Without byte tokens a run of others is one <unk>. */
START_TEST(user_defined)
{
    static const struct {
        const char *text;
        int32_t ids[4];
        size_t n;
    } rows[] = {{"abc", {2, 3}, 2}, {"cab", {3, 2}, 2}, {"xyzab??", {0, 2, 0}, 3}, {"abab", {2, 2}, 2}};
    struct vocab v;
    struct pl_err err = {0};
    struct gguf_out *o = gguf_out_new();
    tiny_vocab_spm(o);
    gguf_out_strs(o, "tokenizer.ggml.tokens", (const char *[]){"<unk>", "<s>", "ab", "c", "abc", "cab", "abab"}, 7);
    gguf_out_i32s(o, "tokenizer.ggml.token_type", (int32_t[]){2, 3, 4, 1, 1, 1, 1}, 7);
    gguf_out_f32s(o, "tokenizer.ggml.scores", (float[]){0, 0, 0, 0, 0, 0, 0}, 7);
    gguf_out_u32(o, "tokenizer.ggml.eos_token_id", 1);
    gguf_out_u32(o, "tokenizer.ggml.padding_token_id", 1);
    gguf_out_bool(o, "tokenizer.ggml.add_space_prefix", 0);
    ck_assert_msg(open_vocab(&v, o, &err) == PL_OK, "%s", err.msg);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct pl_ids ids = encode(v.tok, rows[i].text, strlen(rows[i].text), 0);
        ck_assert_uint_eq(ids.n, rows[i].n);
        ck_assert(memcmp(ids.v, rows[i].ids, ids.n * sizeof *ids.v) == 0);
        pl_ids_fini(&ids);
    }
    close_vocab(&v);
}
END_TEST

START_TEST(refused)
{
    const struct fault *f = &faults[_i];
    struct vocab v;
    struct pl_err err = {0};
    struct gguf_out *o = gguf_out_new();
    (void)(f->spm ? tiny_vocab_spm(o) : tiny_vocab_bpe(o, "gpt-2"));
    f->make(o);
    ck_assert_int_eq(open_vocab(&v, o, &err), f->status);
    ck_assert_msg(strstr(err.msg, f->word) != NULL, "\"%s\" is not in \"%s\"", f->word, err.msg);
    v.tok = NULL;
    close_vocab(&v);
}
END_TEST

/* ---- learning a vocabulary ---- */

static void add_text(struct pl_tok_trainer *t, const json_t *text)
{
    ck_assert_int_eq(pl_tok_trainer_add(t, json_string_value(text), json_string_length(text)), PL_OK);
}

static void add_texts(struct pl_tok_trainer *t, const json_t *c, const json_t *every)
{
    const json_t *first = json_object_get(c, "first"), *own = json_object_get(c, "texts");
    const char *path = json_string_value(json_object_get(c, "file"));
    if (path != NULL) {
        static char text[1 << 18];
        FILE *f = fopen(path, "rb");
        ck_assert_msg(f != NULL, "%s", path);
        const size_t n = fread(text, 1, sizeof text, f);
        fclose(f);
        ck_assert_int_eq(pl_tok_trainer_add(t, text, n), PL_OK);
    }
    for (json_int_t i = 0; i < json_integer_value(first); i++)
        add_text(t, json_array_get(every, (size_t)i));
    for (size_t i = 0; i < json_array_size(own); i++)
        add_text(t, json_array_get(own, i));
}

/* Merges and vocabulary are those of Hugging Face's trainer. */
START_TEST(learned)
{
    json_t *file = fixture("texts.json"), *j = fixture("learned.json"), *c;
    size_t k;
    json_array_foreach(json_object_get(j, "cases"), k, c)
    {
        const char *name = json_string_value(json_object_get(c, "name"));
        const json_t *merges = json_object_get(c, "merges");
        const uint32_t n_special = (uint32_t)json_integer_value(json_object_get(c, "special"));
        struct pl_tok_trainer *t;
        struct pl_bpe b;
        struct pl_buf text;
        struct pl_err err = {0};
        ck_assert_int_eq(pl_tok_trainer_new(&t, "gpt-2", &err), PL_OK);
        add_texts(t, c, json_object_get(file, "texts"));
        for (int again = 0; again < 2; again++) { /* what was counted stays */
            ck_assert_int_eq(pl_tok_trainer_learn(&b, t, n_special, (uint32_t)json_integer_value(json_object_get(c, "size")),
                                                  (uint64_t)json_integer_value(json_object_get(c, "least")), NULL, &err), PL_OK);
            pl_buf_init(&text, 0);
            for (uint32_t i = 0; i < b.n_merges && i < json_array_size(merges); i++) {
                pl_buf_clear(&text);
                pl_bpe_text(&b, b.merges[i].left, &text);
                pl_buf_addc(&text, ' ');
                pl_bpe_text(&b, b.merges[i].right, &text);
                ck_assert_msg(strcmp(pl_buf_str(&text), json_string_value(json_array_get(merges, i))) == 0, "%s, merge %u: %s instead of %s", name, i,
                              pl_buf_str(&text), json_string_value(json_array_get(merges, i)));
            }
            ck_assert_msg(b.n_merges == json_array_size(merges), "%s: %u merges instead of %zu", name, b.n_merges, json_array_size(merges));
            pl_buf_clear(&text); /* the alphabet's order */
            pl_bpe_text(&b, (int32_t)n_special, &text);
            pl_bpe_text(&b, (int32_t)n_special + 255, &text);
            ck_assert_str_eq(pl_buf_str(&text), "!\u0143");
            pl_buf_fini(&text);
            pl_bpe_fini(&b);
        }
        pl_tok_trainer_free(t);
    }
    json_decref(file);
    json_decref(j);
}
END_TEST

/* One fragment of a million bytes, and of two that alternate: neither takes quadratic time. Then more than is kept. */
START_TEST(learning_is_bounded)
{
    enum { N = 1 << 20 };
    char *text = malloc(N);
    struct pl_tok_trainer *t;
    struct pl_bpe b;
    struct pl_err err = {0};
    const clock_t begun = clock();
    ck_assert_int_eq(pl_tok_trainer_new(&t, "gpt-2", &err), PL_OK);
    memset(text, 'a', N);
    ck_assert_int_eq(pl_tok_trainer_add(t, text, N), PL_OK);
    for (size_t i = 0; i < N; i++)
        text[i] = (char)('a' + i % 2 + i % 3);
    ck_assert_int_eq(pl_tok_trainer_add(t, text, N), PL_OK);
    atomic_bool stop = true;
    ck_assert_int_eq(pl_tok_trainer_learn(&b, t, 1, 1000, 1, &stop, &err), PL_ESTOPPED);
    stop = false;
    ck_assert_int_eq(pl_tok_trainer_learn(&b, t, 1, 1000, 1, &stop, &err), PL_OK);
    for (uint32_t i = 0; i < PL_BPE_BYTES + b.n_merges; i++)
        ck_assert_uint_le(b.start[i + 1] - b.start[i], PL_BPE_MAX_TOKEN);
    ck_assert_uint_gt(b.n_merges, 10);
    pl_bpe_fini(&b);
    pl_status st = PL_OK;
    uint32_t state = 1;
    for (int k = 0; k < 64 && st == PL_OK; k++) {
        for (size_t i = 0; i < N; i++) {
            state = state * 1664525 + 1013904223;
            text[i] = (char)('a' + (state >> 24) % 26);
        }
        st = pl_tok_trainer_add(t, text, N);
    }
    ck_assert_int_eq(st, PL_EFULL);
    ck_assert_int_eq(pl_tok_trainer_add(t, "x", 1), PL_EFULL);
    pl_tok_trainer_free(t);
    free(text);
    ck_assert_int_lt((clock() - begun) / CLOCKS_PER_SEC, 60);
}
END_TEST

Suite *suite_tok(void)
{
    Suite *s = suite_create("tok");
    TCase *c = tcase_create("tok");
    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, bpe, 0, 4);
    tcase_add_loop_test(c, probes, 0, 4);
    tcase_add_loop_test(c, sentencepiece, 0, 3);
    tcase_add_test(c, smollm2);
    tcase_add_loop_test(c, any_bytes, 0, 2);
    tcase_add_loop_test(c, long_texts, 0, 2);
    tcase_add_loop_test(c, long_runs, 0, 2);
    tcase_add_test(c, limits_and_bos);
    tcase_add_test(c, names);
    tcase_add_test(c, user_defined);
    tcase_add_test(c, learned);
    tcase_add_test(c, learning_is_bounded);
    tcase_add_loop_test(c, refused, 0, (int)(sizeof faults / sizeof faults[0]));
    suite_add_tcase(s, c);
    return s;
}
