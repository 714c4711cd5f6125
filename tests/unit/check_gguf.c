/* check_gguf: files that are cut short, lie about counts, lengths and offsets, or are of an unknown kind are refused with
 * their reason, and never read out of bounds (the sanitizer build runs this too).
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "core/model/gguf.h"
#include "core/text/tok.h"
#include "tests/tools/tiny_model.h"

Suite *suite_gguf(void);

/* A good file; the caller frees it. */
static uint8_t *good(size_t *n)
{
    struct pl_err err;
    struct tiny_options o = tiny_defaults();
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_ptr_nonnull(out);
    uint8_t *bytes = gguf_out_bytes(out, n);
    gguf_out_free(out);
    return bytes;
}

/* Opens a copy of exactly n bytes, so that a read past them is noticed. */
static pl_status open_copy(const uint8_t *bytes, size_t n, struct pl_err *err)
{
    uint8_t *copy = malloc(n ? n : 1);
    struct pl_gguf *g = NULL;
    memcpy(copy, bytes, n);
    memset(err, 0, sizeof *err);
    pl_status st = pl_gguf_open_memory(&g, copy, n, err);
    if (st == PL_OK) {
        struct pl_tok *tok = NULL;
        struct pl_err why;
        if (pl_tok_load(&tok, g, &why) == PL_OK)
            pl_tok_free(tok);
        for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
            const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
            ck_assert((const uint8_t *)t->data >= copy);
            ck_assert((const uint8_t *)t->data + t->n_bytes <= copy + n);
        }
        pl_gguf_close(g);
    }
    free(copy);
    return st;
}

START_TEST(opens)
{
    size_t n;
    struct pl_err err;
    struct pl_gguf *g;
    uint8_t *bytes = good(&n);
    ck_assert_int_eq(pl_gguf_open_memory(&g, bytes, n, &err), PL_OK);
    uint32_t v;
    struct pl_gguf_str s;
    ck_assert_int_eq(pl_gguf_u32(g, "llama.block_count", &v), PL_OK);
    ck_assert_uint_eq(v, 2);
    ck_assert_int_eq(pl_gguf_u32(g, "no.such.key", &v), PL_ENOENT);
    ck_assert_int_eq(pl_gguf_u32(g, "general.architecture", &v), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_string(g, "general.architecture", &s), PL_OK);
    ck_assert(s.n == 5 && memcmp(s.s, "llama", 5) == 0);
    ck_assert_ptr_nonnull(pl_gguf_tensor(g, "token_embd.weight"));
    ck_assert_ptr_null(pl_gguf_tensor(g, "token_embd"));
    pl_gguf_close(g);
    bytes[4] = 2; /* version 2 has the same layout */
    ck_assert_int_eq(open_copy(bytes, n, &err), PL_OK);
    free(bytes);
}
END_TEST

/* Cut at every byte of the first kilobyte and at a thousand places of the rest. */
START_TEST(truncated)
{
    size_t n;
    struct pl_err err;
    uint8_t *bytes = good(&n);
    for (size_t cut = 0; cut < n; cut += cut < 1024 ? 1 : 1 + n / 1009) {
        ck_assert_msg(open_copy(bytes, cut, &err) < 0, "cut at %zu of %zu", cut, n);
        ck_assert_str_ne(err.msg, "");
    }
    free(bytes);
}
END_TEST

/* Any byte of the header set to any of a few nasty values: refused, or opened with everything inside the file. */
START_TEST(damaged)
{
    static const uint8_t values[] = {0, 1, 0x7f, 0x80, 0xff};
    size_t n;
    struct pl_err err;
    uint8_t *bytes = good(&n);
    uint64_t seed = 7;
    for (int i = 0; i < 20000; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        size_t at = (seed >> 33) % (i % 2 ? 64 : n), v = (seed >> 20) % sizeof values;
        uint8_t was = bytes[at];
        bytes[at] = values[v];
        (void)open_copy(bytes, n, &err);
        bytes[at] = was;
    }
    free(bytes);
}
END_TEST

static void put64(uint8_t *at, uint64_t v)
{
    memcpy(at, &v, sizeof v);
}

/* Where a string stands in the file. */
static uint8_t *find(uint8_t *bytes, size_t n, const char *s)
{
    uint8_t *p = memmem(bytes, n, s, strlen(s));
    ck_assert_ptr_nonnull(p);
    return p;
}

static void refused(const uint8_t *bytes, size_t n, pl_status want, const char *word)
{
    struct pl_err err;
    ck_assert_int_eq(open_copy(bytes, n, &err), want);
    ck_assert_msg(strstr(err.msg, word) != NULL, "\"%s\" is not in \"%s\"", word, err.msg);
}

START_TEST(lies)
{
    static const uint64_t large[] = {1u << 20, UINT32_MAX, (uint64_t)1 << 60, (uint64_t)1 << 63, UINT64_MAX};
    size_t n;
    uint8_t *bytes = good(&n), *b = malloc(n);
#define FRESH() memcpy(b, bytes, n)
    FRESH(), b[0] = 'X', refused(b, n, PL_EFORMAT, "GGUF");
    FRESH(), b[4] = 1, refused(b, n, PL_ENOTSUP, "version 1");
    FRESH(), b[4] = 0, b[7] = 3, refused(b, n, PL_ENOTSUP, "big-endian");
    for (size_t i = 0; i < sizeof large / sizeof large[0]; i++) {
        FRESH(), put64(b + 8, large[i]), refused(b, n, PL_EFORMAT, "tensors");
        FRESH(), put64(b + 16, large[i]), refused(b, n, PL_EFORMAT, "keys");
        FRESH(), put64(b + 24, large[i]), refused(b, n, PL_EFORMAT, "key"); /* the first key's length */
        FRESH();
        uint8_t *tokens = find(b, n, "tokenizer.ggml.tokens");
        put64(tokens + strlen("tokenizer.ggml.tokens") + 8, large[i]);
        refused(b, n, PL_EFORMAT, "tokenizer.ggml.tokens");
        FRESH();
        uint8_t *tensor = find(b, n, "token_embd.weight") + strlen("token_embd.weight");
        put64(tensor + 4, large[i]); /* ne[0] */
        ck_assert_int_lt(open_copy(b, n, &(struct pl_err){0}), 0);
        FRESH(), put64(find(b, n, "token_embd.weight") + strlen("token_embd.weight") + 4 + 16 + 4, large[i] & ~(uint64_t)31);
        refused(b, n, PL_EFORMAT, "token_embd.weight"); /* its offset */
    }
    FRESH();
    uint8_t *shape = find(b, n, "token_embd.weight") + strlen("token_embd.weight");
    shape[0] = 5, refused(b, n, PL_EFORMAT, "5 dimensions");
    shape[0] = 0, refused(b, n, PL_EFORMAT, "0 dimensions");
    FRESH(), put64(shape + 4, 0), refused(b, n, PL_EFORMAT, "impossible shape");
    FRESH(), shape[4 + 16] = 20, refused(b, n, PL_ENOTSUP, "type number 20"); /* a type that is not supported */
    FRESH(), shape[4 + 16 + 4] |= 1, refused(b, n, PL_EFORMAT, "not aligned");
    FRESH();
    uint8_t *norm = find(b, n, "blk.0.attn_norm.weight");
    memcpy(norm, "blk.1.attn_norm.weight", strlen("blk.1.attn_norm.weight"));
    refused(b, n, PL_EFORMAT, "twice");
    free(b), free(bytes);
}
END_TEST

START_TEST(alignment)
{
    static const uint32_t bad[] = {0, 3, 33, 1u << 31};
    struct pl_err err;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        size_t n;
        struct tiny_options o = tiny_defaults();
        struct gguf_out *out = tiny_model(&o, &err);
        gguf_out_u32(out, "general.alignment", bad[i]);
        uint8_t *bytes = gguf_out_bytes(out, &n);
        refused(bytes, n, PL_EFORMAT, "general.alignment");
        free(bytes);
        gguf_out_free(out);
    }
}
END_TEST

START_TEST(tokenizers)
{
    static const struct {
        const char *key, *value, *word;
    } rows[] = {{"tokenizer.ggml.model", "t5", "\"t5\""}, {"tokenizer.ggml.pre", "klingon", "\"klingon\""}};
    struct pl_err err;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        size_t n;
        struct tiny_options o = tiny_defaults();
        struct gguf_out *out = tiny_model(&o, &err);
        gguf_out_str(out, rows[i].key, rows[i].value);
        uint8_t *bytes = gguf_out_bytes(out, &n);
        struct pl_gguf *g;
        struct pl_tok *tok;
        ck_assert_int_eq(pl_gguf_open_memory(&g, bytes, n, &err), PL_OK);
        ck_assert_int_eq(pl_tok_load(&tok, g, &err), PL_ENOTSUP);
        ck_assert_msg(strstr(err.msg, rows[i].word) != NULL, "%s", err.msg);
        pl_gguf_close(g);
        free(bytes);
        gguf_out_free(out);
    }
}
END_TEST

START_TEST(no_file)
{
    struct pl_err err;
    struct pl_gguf *g;
    ck_assert_int_eq(pl_gguf_open(&g, "/no/such/file.gguf", &err), PL_EIO);
    ck_assert_int_eq(pl_gguf_open(&g, "/", &err), PL_EIO);
    ck_assert_int_eq(pl_gguf_open(&g, "/dev/null", &err), PL_EIO);
}
END_TEST

Suite *suite_gguf(void)
{
    Suite *s = suite_create("gguf");
    TCase *t = tcase_create("gguf");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, opens);
    tcase_add_test(t, truncated);
    tcase_add_test(t, damaged);
    tcase_add_test(t, lies);
    tcase_add_test(t, alignment);
    tcase_add_test(t, tokenizers);
    tcase_add_test(t, no_file);
    suite_add_tcase(s, t);
    return s;
}
