/* check_safetensors: what Hugging Face's library has written is read, and written again byte for byte; files that are cut
 * short, lie about sizes, shapes and offsets, or are no safetensors are refused with their reason and never read out of
 * bounds (the sanitizer build runs this too); a file that is written appears whole or not at all.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/model/safetensors.h"
#include "tests/unit/scratch.h"

Suite *suite_safetensors(void);

#define THEIRS "tests/oracle/fixtures/adapter/llama-all/adapter_model.safetensors"

/* Opens a copy of exactly n bytes, so that a read past them is noticed, and reads all values. */
static pl_status open_copy(const uint8_t *bytes, size_t n, struct pl_err *err)
{
    uint8_t *copy = malloc(n ? n : 1);
    struct pl_safetensors *st = NULL;
    memcpy(copy, bytes, n);
    memset(err, 0, sizeof *err);
    const pl_status rc = pl_safetensors_open_memory(&st, copy, n, err);
    for (size_t i = 0; rc == PL_OK && i < pl_safetensors_n(st); i++) {
        const struct pl_st_tensor *t = pl_safetensors_at(st, i);
        float *values = malloc(pl_st_elements(t) * sizeof *values + 1);
        pl_st_read_f32(t, values);
        free(values);
        ck_assert_ptr_eq(pl_safetensors_find(st, t->name), t);
    }
    pl_safetensors_close(st);
    free(copy);
    return rc;
}

START_TEST(opens)
{
    struct pl_err err = {0};
    struct pl_safetensors *st;
    ck_assert_msg(pl_safetensors_open(&st, THEIRS, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(pl_safetensors_n(st), 28);
    ck_assert_str_eq(pl_safetensors_meta(st, "format"), "pt");
    ck_assert_ptr_null(pl_safetensors_meta(st, "other"));
    const struct pl_st_tensor *t = pl_safetensors_find(st, "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight");
    ck_assert_ptr_nonnull(t);
    ck_assert(t->dtype == PL_F32 && t->n_dims == 2 && t->dims[0] == 4 && t->dims[1] == 64);
    ck_assert_ptr_null(pl_safetensors_find(st, "base_model.model.model.layers.1.mlp.down_proj.lora_A"));
    for (size_t i = 1; i < pl_safetensors_n(st); i++)
        ck_assert_int_lt(strcmp(pl_safetensors_at(st, i - 1)->name, pl_safetensors_at(st, i)->name), 0);
    pl_safetensors_close(st);
}
END_TEST

START_TEST(truncated)
{
    size_t n;
    struct pl_err err;
    uint8_t *bytes = scratch_read(THEIRS, &n);
    ck_assert_int_eq(open_copy(bytes, n, &err), PL_OK);
    for (size_t cut = 0; cut < n; cut += cut < 4096 ? 1 : 97) {
        ck_assert_msg(open_copy(bytes, cut, &err) < 0, "cut at %zu of %zu", cut, n);
        ck_assert_str_ne(err.msg, "");
    }
    free(bytes);
}
END_TEST

/* Any byte of the header set to any of a few nasty values: refused, or opened with everything inside the file. */
START_TEST(damaged)
{
    static const uint8_t values[] = {0, 0x7f, 0x80, 0xff, '0', '9', '"', '{', '}', '[', ']', ',', '-', '.', 'e', '\\'};
    size_t n;
    struct pl_err err;
    uint8_t *bytes = scratch_read(THEIRS, &n);
    uint64_t seed = 7, head;
    memcpy(&head, bytes, sizeof head);
    for (int i = 0; i < 20000; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const size_t at = (seed >> 33) % (i % 16 == 0 ? 8 : head + 8), v = (seed >> 20) % sizeof values;
        const uint8_t was = bytes[at];
        bytes[at] = values[v];
        (void)open_copy(bytes, n, &err);
        bytes[at] = was;
    }
    free(bytes);
}
END_TEST

/* A file of this header and n_data bytes behind it. */
static pl_status open_text(const char *header, size_t n_data, struct pl_err *err)
{
    const size_t n = strlen(header);
    uint8_t *bytes = pl_xcalloc(8 + n + n_data, 1);
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)n >> 8 * i);
    memcpy(bytes + 8, header, n);
    const pl_status rc = open_copy(bytes, 8 + n + n_data, err);
    free(bytes);
    return rc;
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"

START_TEST(lies)
{
    static const struct {
        const char *header;
        size_t n_data;
        pl_status rc;
        const char *word; /* in the message */
    } rows[] = {
        {"{" A "}", 8, PL_OK, NULL},
        {"{" A "}     ", 8, PL_OK, NULL},
        {"{}", 0, PL_OK, NULL},
        {"{\"__metadata__\":{\"x\":\"y\"}," A "}", 8, PL_OK, NULL},
        {"{\"a\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[0,2]}}", 2, PL_OK, NULL},
        {"{\"a\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[0,0]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, PL_OK, NULL},
        {" {}", 0, PL_EFORMAT, "does not begin"},
        {"", 0, PL_EFORMAT, "does not begin"},
        {"[]", 0, PL_EFORMAT, "does not begin"},
        {"{" A, 8, PL_EFORMAT, "no JSON"},
        {"{" A "} x", 8, PL_EFORMAT, "no JSON"},
        {"{" A "," A "}", 8, PL_EFORMAT, "duplicate"},
        {"{\"a\":7}", 0, PL_EFORMAT, "tensor a"},
        {"{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "no dtype"},
        {"{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, PL_ENOTSUP, "I64"},
        {"{\"a\":{\"dtype\":\"f32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, PL_ENOTSUP, "f32"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "no shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "8 dimensions"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "whole number"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "whole number"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "impossible"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 8, PL_EFORMAT, "impossible"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]}}", 8, PL_EFORMAT, "no JSON"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, PL_EFORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,16]}}", 8, PL_EFORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, PL_EFORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, PL_EFORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}}", 8, PL_EFORMAT, "cut short"},
        {"{" A "}", 7, PL_EFORMAT, "cut short"},
        {"{" A "}", 9, PL_EFORMAT, "1 bytes at the file's end"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,7]}}", 8, PL_EFORMAT, "7 bytes"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, PL_EFORMAT, "overlaps"},
        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16, PL_EFORMAT, "gap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, PL_EFORMAT, "gap"},
        {"{\"__metadata__\":7}", 0, PL_EFORMAT, "__metadata__"},
        {"{\"__metadata__\":{\"x\":7}}", 0, PL_EFORMAT, "__metadata__"},
        {"{\"a\\u0000b\":{}}", 0, PL_EFORMAT, "no JSON"},
    };
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        struct pl_err err;
        const pl_status rc = open_text(rows[i].header, rows[i].n_data, &err);
        ck_assert_msg(rc == rows[i].rc, "row %zu: %d %s", i, rc, err.msg);
        if (rows[i].word != NULL)
            ck_assert_msg(strstr(err.msg, rows[i].word) != NULL, "row %zu: \"%s\" is not in \"%s\"", i, rows[i].word, err.msg);
    }
    char *deep = pl_xcalloc(1 << 20, 1);
    strcpy(deep, "{\"a\":");
    memset(deep + 5, '[', (1 << 20) - 6);
    struct pl_err err;
    ck_assert_int_eq(open_text(deep, 0, &err), PL_EFORMAT);
    free(deep);
    uint8_t huge[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, '{', '}'};
    ck_assert_int_eq(open_copy(huge, sizeof huge, &err), PL_EFORMAT);
    struct pl_safetensors *st;
    ck_assert_int_eq(pl_safetensors_open(&st, "/no/such/file", &err), PL_ENOENT);
    ck_assert_int_eq(pl_safetensors_open(&st, "/dev/null", &err), PL_EIO);
    ck_assert_int_eq(pl_safetensors_open(&st, "/", &err), PL_EIO);
}
END_TEST

/* ---- writing ---- */

/* In whatever order tensors are given and put, the bytes are those that Hugging Face's library has written. */
START_TEST(writes_what_others_write)
{
    static const char *const theirs[] = {THEIRS, "tests/oracle/fixtures/adapter/llama-bf16/adapter_model.safetensors",
                                         "tests/oracle/fixtures/adapter/llama-q8_0/adapter_model.safetensors"};
    const struct pl_st_meta meta = {"format", "pt"};
    struct pl_err err = {0};
    scratch_make();
    for (size_t i = 0; i < PL_COUNT_OF(theirs); i++) {
        struct pl_safetensors *st;
        ck_assert_int_eq(pl_safetensors_open(&st, theirs[i], &err), PL_OK);
        const size_t n = pl_safetensors_n(st);
        struct pl_st_tensor *tensors = pl_xcalloc(n, sizeof *tensors);
        for (size_t k = 0; k < n; k++)
            tensors[k] = *pl_safetensors_at(st, n - 1 - k);
        ck_assert_msg(pl_safetensors_write(scratch_path("x"), tensors, n, &meta, 1, &err) == PL_OK, "%s", err.msg);
        scratch_same(scratch_path("x"), theirs[i]);
        struct pl_st_writer *w;
        ck_assert_int_eq(pl_st_writer_new(&w, scratch_path("y"), tensors, n, &meta, 1, &err), PL_OK);
        for (size_t k = 0; k < n; k++) {
            const size_t at = k * 5 % n; /* each once: n is no multiple of 5 */
            float *values = pl_xcalloc(pl_st_elements(&tensors[at]), sizeof *values);
            pl_st_read_f32(&tensors[at], values);
            ck_assert_int_eq(pl_st_writer_put(w, at, values, &err), PL_OK);
            free(values);
        }
        ck_assert_int_eq(access(scratch_path("y"), F_OK), -1); /* not before it is whole */
        ck_assert_int_eq(pl_st_writer_commit(w, &err), PL_OK);
        pl_st_writer_free(w);
        scratch_same(scratch_path("y"), theirs[i]);
        ck_assert_int_eq(unlink(scratch_path("y")), 0);
        free(tensors);
        pl_safetensors_close(st);
    }
    ck_assert_int_eq(scratch_files(), 1);
    scratch_remove();
}
END_TEST

START_TEST(writes_mixed_types)
{
    static const float f[] = {1.5f, -2}, g[] = {3};
    static const uint16_t h[] = {0x3c00}, b[] = {0x3f80, 0x4000};
    const struct pl_st_tensor tensors[] = {
        {.name = "z\"\n", .dtype = PL_F16, .n_dims = 1, .dims = {1}, .data = h},
        {.name = "a", .dtype = PL_BF16, .n_dims = 2, .dims = {1, 2}, .data = b},
        {.name = "m", .dtype = PL_F32, .n_dims = 1, .dims = {2}, .data = f},
        {.name = "e", .dtype = PL_F32, .n_dims = 2, .dims = {0, 7}, .data = f},
        {.name = "c", .dtype = PL_F32, .n_dims = 0, .data = g},
    };
    struct pl_err err = {0};
    scratch_make();
    ck_assert_msg(pl_safetensors_write(scratch_path("x"), tensors, 5, NULL, 0, &err) == PL_OK, "%s", err.msg);
    struct pl_safetensors *st;
    ck_assert_msg(pl_safetensors_open(&st, scratch_path("x"), &err) == PL_OK, "%s", err.msg);
    for (size_t i = 0; i < 5; i++) {
        const struct pl_st_tensor *t = pl_safetensors_find(st, tensors[i].name);
        ck_assert_ptr_nonnull(t);
        ck_assert(t->dtype == tensors[i].dtype && t->n_dims == tensors[i].n_dims && memcmp(t->dims, tensors[i].dims, sizeof t->dims) == 0);
        ck_assert_mem_eq(t->data, tensors[i].data, pl_st_elements(t) * pl_dtype_block_bytes(t->dtype));
    }
    ck_assert_int_eq(truncate(scratch_path("x"), 0), 0); /* what was opened does not change with the file */
    ck_assert_mem_eq(pl_safetensors_find(st, "m")->data, f, sizeof f);
    pl_safetensors_close(st);
    struct pl_st_tensor bad[2] = {tensors[2], tensors[2]};
    ck_assert_int_eq(pl_safetensors_write(scratch_path("x"), bad, 2, NULL, 0, &err), PL_EINVAL);
    bad[1].dtype = PL_F16;
    ck_assert_int_eq(pl_safetensors_write(scratch_path("x"), bad, 2, NULL, 0, &err), PL_EINVAL);
    bad[1].name = "n";
    bad[1].dtype = PL_Q4_0;
    ck_assert_int_eq(pl_safetensors_write(scratch_path("x"), bad, 2, NULL, 0, &err), PL_EINVAL);
    ck_assert_int_eq(scratch_files(), 1);
    scratch_remove();
}
END_TEST

/* The disk is full in the middle: what was there stays, and nothing else does. */
START_TEST(fails_whole)
{
    struct pl_err err = {0};
    float *values = pl_xcalloc(1 << 16, sizeof *values);
    const struct pl_st_tensor t = {.name = "a", .dtype = PL_F32, .n_dims = 1, .dims = {1 << 16}, .data = values};
    const struct rlimit small = {1 << 16, 1 << 16};
    scratch_make();
    ck_assert_int_eq(pl_newfile_write(scratch_path("x"), "before", 6, &err), PL_OK);
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &small), 0); /* this test has its own process */
    ck_assert_int_eq(pl_safetensors_write(scratch_path("x"), &t, 1, NULL, 0, &err), PL_ENOSPC);
    ck_assert_ptr_nonnull(strstr(err.msg, scratch_path("x")));
    ck_assert_int_eq(pl_safetensors_write("/no/such/folder/x", &t, 1, NULL, 0, &err), PL_EIO);
    ck_assert_int_eq(scratch_files(), 1);
    size_t n;
    uint8_t *bytes = scratch_read(scratch_path("x"), &n);
    ck_assert(n == 6 && memcmp(bytes, "before", 6) == 0);
    free(bytes), free(values);
    scratch_remove();
}
END_TEST

Suite *suite_safetensors(void)
{
    Suite *s = suite_create("safetensors");
    TCase *t = tcase_create("safetensors");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, opens);
    tcase_add_test(t, truncated);
    tcase_add_test(t, damaged);
    tcase_add_test(t, lies);
    tcase_add_test(t, writes_what_others_write);
    tcase_add_test(t, writes_mixed_types);
    tcase_add_test(t, fails_whole);
    suite_add_tcase(s, t);
    return s;
}
