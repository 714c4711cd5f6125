/* check_gguf: files that are cut short, lie about counts, lengths and offsets, or are of an unknown kind are refused with
 * their reason, and never read out of bounds (the sanitizer build runs this too).
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/base/mapped.h"
#include "core/base/newfile.h"
#include "core/base/pool.h"
#include "core/device/device.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/text/tok.h"
#include "tests/tools/tiny_model.h"
#include "tests/unit/scratch.h"

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

/* ---- files written byte by byte: what no writer would write ---- */

struct raw {
    uint8_t b[2048];
    size_t n;
};

static void put(struct raw *r, const void *p, size_t n)
{
    memcpy(r->b + r->n, p, n);
    r->n += n;
}

static void u32(struct raw *r, uint32_t v)
{
    put(r, &v, sizeof v);
}

static void u64(struct raw *r, uint64_t v)
{
    put(r, &v, sizeof v);
}

static void str_n(struct raw *r, const char *s, size_t n)
{
    u64(r, n);
    put(r, s, n);
}

static void str(struct raw *r, const char *s)
{
    str_n(r, s, strlen(s));
}

static struct raw header(uint64_t n_tensors, uint64_t n_kv)
{
    struct raw r = {.n = 0};
    put(&r, "GGUF", 4);
    u32(&r, 3);
    u64(&r, n_tensors);
    u64(&r, n_kv);
    return r;
}

/* A tensor of one dimension. */
static void tensor(struct raw *r, const char *name, uint64_t ne, uint32_t type, uint64_t offset)
{
    str(r, name);
    u32(r, 1);
    u64(r, ne);
    u32(r, type);
    u64(r, offset);
}

/* Zero bytes up to the data section, then n of data. */
static void data(struct raw *r, size_t n)
{
    r->n = (r->n + 31) / 32 * 32 + n;
}

enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };

START_TEST(odd_keys)
{
    static const struct {
        const char *key;
        size_t n_key;
        uint32_t type;
        uint64_t v[3]; /* what follows: for an array the element type (u32), the count and one more word */
        const char *word;
    } rows[] = {
        {"", 0, U32, {0}, "a key of 0 bytes"},
        {"a\0b", 3, U32, {0}, "control character"},
        {"a\nb", 3, U32, {0}, "control character"},
        {"a\xff", 2, U32, {0}, "UTF-8"},
        {"flag", 4, BOOL, {2}, "key flag"},
        {"kind", 4, 13, {0}, "key kind"},
        {"kind", 4, UINT32_MAX, {0}, "key kind"},
        {"text", 4, STRING, {UINT64_MAX}, "key text"},
        {"text", 4, STRING, {(1u << 30) + 1}, "key text"},
        {"list", 4, ARRAY, {ARRAY, 1, 0}, "array of arrays"},
        {"list", 4, ARRAY, {13, 1, 0}, "key list"},
        {"list", 4, ARRAY, {U32, (uint64_t)1 << 62, 0}, "key list"},
        {"list", 4, ARRAY, {F64, UINT64_MAX / 8 + 2, 0}, "key list"},
        {"list", 4, ARRAY, {STRING, 1000000000, 0}, "key list"},
        {"list", 4, ARRAY, {STRING, 1, UINT64_MAX}, "key list"},
        {"list", 4, ARRAY, {BOOL, 8, 0x0301}, "key list"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct raw r = header(0, 1);
        str_n(&r, rows[i].key, rows[i].n_key);
        u32(&r, rows[i].type);
        if (rows[i].type == ARRAY)
            u32(&r, (uint32_t)rows[i].v[0]), u64(&r, rows[i].v[1]), u64(&r, rows[i].v[2]);
        else
            u64(&r, rows[i].v[0]);
        data(&r, 64);
        struct pl_err err;
        pl_status st = open_copy(r.b, r.n, &err);
        ck_assert_msg(st == PL_EFORMAT || st == PL_ENOTSUP, "row %zu", i);
        ck_assert_msg(strstr(err.msg, rows[i].word) != NULL, "row %zu: \"%s\" is not in \"%s\"", i, rows[i].word, err.msg);
    }
    struct raw r = header(0, 2);
    for (int i = 0; i < 2; i++)
        str(&r, "same.key"), u32(&r, U8), put(&r, "x", 1);
    refused(r.b, r.n, PL_EFORMAT, "same.key appears twice");
}
END_TEST

START_TEST(odd_tensors)
{
    static const struct {
        uint64_t ne[2], offset[2];
        uint32_t type;
        const char *word;
    } rows[] = {
        {{8, 8}, {0, 32}, 0, NULL},
        {{8, 8}, {32, 0}, 0, NULL}, /* in another order */
        {{8, 8}, {0, 0}, 0, "overlaps"},
        {{16, 8}, {0, 32}, 0, "overlaps"},
        {{8, 8}, {0, 16}, 0, "tensor b lies at offset 16"},
        {{8, 8}, {0, 128}, 0, "tensor b"},  /* behind the end */
        {{8, 64}, {0, 32}, 0, "tensor b"},  /* past the end */
        {{8, 8}, {0, (uint64_t)INT64_MAX - 31}, 0, "tensor b"},
        {{8, 8}, {0, UINT64_MAX - 31}, 0, "tensor b"},
        {{33, 32}, {0, 64}, 2, "tensor a has rows of 33 elements"},
        {{8, UINT64_MAX}, {0, 32}, 0, "tensor b has an impossible shape"},
        {{8, UINT64_MAX / 4}, {0, 32}, 0, "tensor b"},
        {{8, (uint64_t)1 << 62}, {0, 32}, 0, "tensor b"},
        {{8, 0}, {0, 32}, 0, "tensor b has an impossible shape"},
        {{8, 8}, {0, 32}, 4, "type number 4"}, /* removed from the format */
        {{8, 8}, {0, 32}, UINT32_MAX, "type number 4294967295"},
        {{8, 8}, {0, 32}, 1u << 31, "type number 2147483648"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct raw r = header(2, 0);
        tensor(&r, "a", rows[i].ne[0], rows[i].type, rows[i].offset[0]);
        tensor(&r, "b", rows[i].ne[1], rows[i].type, rows[i].offset[1]);
        data(&r, 96);
        struct pl_err err;
        pl_status st = open_copy(r.b, r.n, &err);
        ck_assert_msg((st == PL_OK) == (rows[i].word == NULL), "row %zu: %s", i, err.msg);
        if (rows[i].word != NULL)
            ck_assert_msg(strstr(err.msg, rows[i].word) != NULL, "row %zu: \"%s\" is not in \"%s\"", i, rows[i].word, err.msg);
    }
    char name[66];
    memset(name, 'n', 65), name[65] = '\0';
    struct raw r = header(1, 0);
    tensor(&r, name, 8, 0, 0), data(&r, 32);
    refused(r.b, r.n, PL_EFORMAT, "65 bytes");
    r = header(1, 0);
    tensor(&r, name + 1, 8, 0, 0), data(&r, 32);
    ck_assert_int_eq(open_copy(r.b, r.n, &(struct pl_err){0}), PL_OK);
    r = header(1, 0);
    tensor(&r, "", 8, 0, 0), data(&r, 32);
    refused(r.b, r.n, PL_EFORMAT, "tensor name of 0 bytes");
}
END_TEST

/* Numbers of every type through the getters: converted when in range, refused when not. */
START_TEST(numbers)
{
    struct raw r = header(0, 9);
    int64_t minus = -1;
    uint64_t big = (uint64_t)1 << 32;
    double half = 0.5;
    str(&r, "u8"), u32(&r, U8), put(&r, "\xff", 1);
    str(&r, "i8"), u32(&r, I8), put(&r, "\xff", 1);
    str(&r, "i64"), u32(&r, I64), put(&r, &minus, 8);
    str(&r, "u64"), u32(&r, U64), u64(&r, big);
    str(&r, "f64"), u32(&r, F64), put(&r, &half, 8);
    str(&r, "true"), u32(&r, BOOL), put(&r, "\1", 1);
    str(&r, "i16s"), u32(&r, ARRAY), u32(&r, I16), u64(&r, 2), put(&r, "\xfe\xff\x02\x00", 4);
    str(&r, "u64s"), u32(&r, ARRAY), u32(&r, U64), u64(&r, 1), u64(&r, big);
    str(&r, "none"), u32(&r, ARRAY), u32(&r, STRING), u64(&r, 0);
    struct pl_gguf *g;
    struct pl_err err = {0};
    ck_assert_msg(pl_gguf_open_memory(&g, r.b, r.n, &err) == PL_OK, "%s", err.msg);
    uint32_t u;
    float f;
    bool b;
    int32_t v[2];
    uint64_t n;
    ck_assert(pl_gguf_u32(g, "u8", &u) == PL_OK && u == 255);
    ck_assert_int_eq(pl_gguf_u32(g, "i8", &u), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_u32(g, "i64", &u), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_u32(g, "u64", &u), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_u32(g, "true", &u), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_u32(g, "i16s", &u), PL_EFORMAT);
    ck_assert(pl_gguf_f32(g, "f64", &f) == PL_OK && f == 0.5f);
    ck_assert_int_eq(pl_gguf_f32(g, "u8", &f), PL_EFORMAT);
    ck_assert(pl_gguf_bool(g, "true", &b) == PL_OK && b);
    ck_assert_int_eq(pl_gguf_bool(g, "u8", &b), PL_EFORMAT);
    ck_assert(pl_gguf_array_i32(g, "i16s", v, 2) == PL_OK && v[0] == -2 && v[1] == 2);
    ck_assert_int_eq(pl_gguf_array_i32(g, "i16s", v, 1), PL_EFORMAT); /* another length */
    ck_assert_int_eq(pl_gguf_array_i32(g, "u64s", v, 1), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_array_f32(g, "i16s", &f, 2), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_array_i32(g, "u8", v, 1), PL_EFORMAT);
    ck_assert_int_eq(pl_gguf_array_i32(g, "absent", v, 1), PL_ENOENT);
    ck_assert(pl_gguf_array_len(g, "none", &n) == PL_OK && n == 0);
    ck_assert_int_eq(pl_gguf_array_str(g, "none", NULL, 0), PL_OK);
    pl_gguf_close(g);
}
END_TEST

START_TEST(alignment)
{
    static const uint32_t bad[] = {0, 1, 4, 3, 33, 1u << 21, 1u << 31};
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

/* Somebody copies another file over a model's, which cuts it first: what has gone reads as zeros, and is known to. */
START_TEST(cut_off)
{
    struct pl_err err = {0};
    struct pl_gguf *g, *other;
    size_t n;
    uint8_t *bytes = good(&n);
    scratch_make();
    ck_assert_int_eq(pl_newfile_write(scratch_path("model.gguf"), bytes, n, &err), PL_OK);
    ck_assert_int_eq(pl_newfile_write(scratch_path("other.gguf"), bytes, n, &err), PL_OK);
    pl_mapped_guard();
    ck_assert_int_eq(pl_gguf_open(&g, scratch_path("model.gguf"), &err), PL_OK);
    ck_assert_int_eq(pl_gguf_open(&other, scratch_path("other.gguf"), &err), PL_OK);
    const struct pl_gguf_tensor *last = pl_gguf_tensor_at(g, pl_gguf_n_tensors(g) - 1);
    const volatile uint8_t *data = last->data;
    ck_assert_int_eq(truncate(scratch_path("model.gguf"), 5000), 0);
    ck_assert(pl_gguf_is_whole(g));
    for (uint64_t i = 0; i < last->n_bytes; i += 512)
        ck_assert_int_eq(data[i], 0);
    ck_assert(!pl_gguf_is_whole(g));
    ck_assert(pl_gguf_is_whole(other));
    pl_gguf_close(g);
    ck_assert_int_eq(pl_gguf_open(&g, scratch_path("other.gguf"), &err), PL_OK); /* in the place of that one */
    ck_assert(pl_gguf_is_whole(g));
    pl_gguf_close(g);
    pl_gguf_close(other);
    free(bytes);
    scratch_remove();
}
END_TEST

/* What is no model's file ends the process as it always did. */
START_TEST(other_bus_errors)
{
    pl_mapped_guard();
    kill(getpid(), SIGBUS);
}
END_TEST

START_TEST(other_mappings)
{
    scratch_make();
    const int fd = open(scratch_path("other"), O_RDWR | O_CREAT, 0600);
    ck_assert_int_eq(ftruncate(fd, 4096), 0);
    const volatile uint8_t *data = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
    ck_assert_int_eq(ftruncate(fd, 0), 0);
    scratch_remove();
    pl_mapped_guard();
    ck_assert_int_eq(data[0], 0);
}
END_TEST

/* The same while it is read. */
START_TEST(cut_off_while_it_is_read)
{
    struct pl_err err = {0};
    struct pl_gguf *g;
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_model *m;
    size_t n;
    uint8_t *bytes = good(&n);
    scratch_make();
    ck_assert_int_eq(pl_newfile_write(scratch_path("model.gguf"), bytes, n, &err), PL_OK);
    pl_mapped_guard();
    ck_assert_int_eq(pl_gguf_open(&g, scratch_path("model.gguf"), &err), PL_OK);
    ck_assert_int_eq(pl_pool_new(&pool, 1, &err), PL_OK);
    ck_assert_int_eq(pl_device_open(&dev, "cpu", "", pool, &err), PL_OK);
    ck_assert_int_eq(truncate(scratch_path("model.gguf"), (off_t)n / 2), 0);
    ck_assert_int_eq(pl_model_load(&m, g, dev, 16, 16, &err), PL_EIO);
    ck_assert_msg(strstr(err.msg, "cut off while it was read") != NULL, "%s", err.msg);
    dev->ops->close(dev);
    pl_pool_free(pool);
    pl_gguf_close(g);
    free(bytes);
    scratch_remove();
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
    tcase_add_test(t, odd_keys);
    tcase_add_test(t, odd_tensors);
    tcase_add_test(t, numbers);
    tcase_add_test(t, alignment);
    tcase_add_test(t, tokenizers);
    tcase_add_test(t, no_file);
    tcase_add_test(t, cut_off);
    tcase_add_test_raise_signal(t, other_bus_errors, SIGBUS);
    tcase_add_test_raise_signal(t, other_mappings, SIGBUS);
    tcase_add_test(t, cut_off_while_it_is_read);
    suite_add_tcase(s, t);
    return s;
}
