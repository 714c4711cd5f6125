/* check_dtype: the meaning of every tensor type, bit for bit as the gguf package has it (tests/oracle/make_dtype.py), half
 * precision over all values, and what quantizing loses. Runs in the repository's root.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/model/dtype.h"

Suite *suite_dtype(void);

#define FIXTURE "tests/oracle/fixtures/dtype/blocks.bin"

static const struct {
    const char *name;
    pl_dtype type;
    uint32_t block, bytes;
    double worst; /* root mean square error of normally distributed values, relative to theirs */
} types[] = {
    {"F32", PL_F32, 1, 4, 0},          {"F16", PL_F16, 1, 2, 3e-4},       {"BF16", PL_BF16, 1, 2, 2.5e-3},
    {"Q4_0", PL_Q4_0, 32, 18, 0.11},   {"Q4_1", PL_Q4_1, 32, 20, 0.10},   {"Q5_0", PL_Q5_0, 32, 22, 0.055},
    {"Q5_1", PL_Q5_1, 32, 24, 0.05},   {"Q8_0", PL_Q8_0, 32, 34, 0.007},  {"Q2_K", PL_Q2_K, 256, 84, 0.4},
    {"Q3_K", PL_Q3_K, 256, 110, 0.22}, {"Q4_K", PL_Q4_K, 256, 144, 0.11}, {"Q5_K", PL_Q5_K, 256, 176, 0.055},
    {"Q6_K", PL_Q6_K, 256, 210, 0.03},
};

enum { N_TYPES = sizeof types / sizeof types[0] };

/* ---- the fixture ---- */

static uint8_t *fixture, *at;
static size_t left;

static void setup(void)
{
    FILE *f = fopen(FIXTURE, "rb");
    ck_assert_msg(f != NULL, "cannot open " FIXTURE ": run this in the repository's root");
    fseek(f, 0, SEEK_END);
    left = (size_t)ftell(f);
    rewind(f);
    at = fixture = malloc(left);
    ck_assert_uint_eq(fread(fixture, 1, left, f), left);
    fclose(f);
}

static void teardown(void)
{
    free(fixture);
}

static void *take(size_t n)
{
    ck_assert_uint_le(n, left);
    void *p = malloc(n); /* a copy of its own: aligned, and its bounds are watched by the sanitizer */
    memcpy(p, at, n);
    at += n;
    left -= n;
    return p;
}

static uint32_t take_u32(void)
{
    uint32_t *p = take(4), v = *p;
    free(p);
    return v;
}

/* Calls each for every record; leaves `at` behind them. */
static void records(void (*each)(pl_dtype t, uint8_t *blocks, float *values, size_t n, size_t n_bytes))
{
    uint32_t n_records = take_u32();
    ck_assert_uint_eq(n_records, N_TYPES);
    for (uint32_t i = 0; i < n_records; i++) {
        uint32_t t = take_u32(), n = take_u32(), n_bytes = take_u32();
        uint8_t *blocks = take(n_bytes);
        float *values = take(4 * (size_t)n);
        ck_assert_uint_eq(pl_dtype_row_bytes(t, n), n_bytes);
        if (each != NULL)
            each(t, blocks, values, n, n_bytes);
        free(blocks);
        free(values);
    }
}

/* ---- tests ---- */

START_TEST(table)
{
    for (int i = 0; i < N_TYPES; i++) {
        ck_assert_str_eq(pl_dtype_name(types[i].type), types[i].name);
        ck_assert_uint_eq(pl_dtype_block(types[i].type), types[i].block);
        ck_assert_uint_eq(pl_dtype_block_bytes(types[i].type), types[i].bytes);
        ck_assert_uint_eq(pl_dtype_row_bytes(types[i].type, 1024), 1024 / types[i].block * types[i].bytes);
    }
    static const uint32_t unknown[] = {4, 5, 9, 15, 16, 29, 31, 39, 1000, 0x80000000u, UINT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        ck_assert_ptr_null(pl_dtype_name(unknown[i]));
        ck_assert_uint_eq(pl_dtype_block(unknown[i]), 0);
        ck_assert_uint_eq(pl_dtype_block_bytes(unknown[i]), 0);
        ck_assert_uint_eq(pl_dtype_sub(unknown[i]), 0);
    }
}
END_TEST

static void equals_reference(pl_dtype t, uint8_t *blocks, float *values, size_t n, size_t n_bytes)
{
    (void)n_bytes;
    float *got = malloc(4 * n);
    pl_dequant_row(t, blocks, got, n);
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(got[i] == values[i], "%s element %zu: %.9g, the reference has %.9g", pl_dtype_name(t), i, (double)got[i],
                      (double)values[i]);
    free(got);
}

START_TEST(reference)
{
    records(equals_reference);
}
END_TEST

/* What pl_dtype_unpack says of a block gives the same values. */
static void unpacks(pl_dtype t, uint8_t *blocks, float *values, size_t n, size_t n_bytes)
{
    uint32_t block = pl_dtype_block(t), sub = pl_dtype_sub(t);
    if (block == 1) {
        ck_assert_uint_eq(sub, 0);
        return;
    }
    ck_assert_uint_eq(block % sub, 0);
    for (size_t b = 0; b < n / block; b++) {
        uint8_t q[256];
        float scale[16], min[16];
        pl_dtype_unpack(t, blocks + b * (n_bytes / (n / block)), q, scale, min);
        for (uint32_t e = 0; e < block; e++) {
            float v = scale[e / sub] * (float)(q[e] - (int)pl_dtype_offset(t)) + min[e / sub];
            ck_assert(v == values[b * block + e]);
            ck_assert(pl_dtype_offset(t) == 0 || min[e / sub] == 0);
        }
    }
}

START_TEST(unpack)
{
    records(unpacks);
}
END_TEST

static double rms_error(pl_dtype t, const float *x, size_t n, double *size)
{
    uint8_t *row = malloc(pl_dtype_row_bytes(t, n));
    float *back = malloc(4 * n);
    pl_quant_row(t, x, row, n);
    pl_dequant_row(t, row, back, n);
    double sum = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        ck_assert(isfinite(back[i]));
        sum += pow((double)back[i] - (double)x[i], 2);
        all += pow((double)x[i], 2);
    }
    free(row);
    free(back);
    *size = sqrt(all / (double)n);
    return sqrt(sum / (double)n);
}

/* Quantizing loses no more than the type's step allows, and no more than the reference's quantizer where it has one. */
START_TEST(quantize)
{
    records(NULL);
    uint32_t n = take_u32();
    float *x = take(4 * (size_t)n);
    double size;
    for (int i = 0; i < N_TYPES; i++) {
        double e = rms_error(types[i].type, x, n, &size);
        ck_assert_msg(e <= types[i].worst * size, "%s: error %g of %g", types[i].name, e, size);
    }
    uint32_t n_errors = take_u32();
    ck_assert_uint_ge(n_errors, 6);
    for (uint32_t i = 0; i < n_errors; i++) {
        uint32_t t = take_u32();
        float *theirs = take(4);
        ck_assert_double_le(rms_error(t, x, n, &size), (double)*theirs * 1.005);
        free(theirs);
    }
    ck_assert_uint_eq(left, 0);
    free(x);
}
END_TEST

/* Values that blocks of the type can hold come back nearly as they were, and exactly where there is no block. The types
 * without minimum reach one step further on the negative side of their scale, and that is what they may lose. */
static void survives(pl_dtype t, uint8_t *blocks, float *values, size_t n, size_t n_bytes)
{
    (void)blocks;
    uint8_t *row = malloc(n_bytes);
    float *back = malloc(4 * n);
    size_t block = pl_dtype_block(t);
    pl_quant_row(t, values, row, n);
    pl_dequant_row(t, row, back, n);
    for (size_t b = 0; b < n / block; b++) {
        double most = 0;
        for (size_t i = b * block; i < (b + 1) * block; i++)
            most = fmax(most, fabs((double)values[i]));
        for (size_t i = b * block; i < (b + 1) * block; i++) {
            double slack = most * (block == 1 ? 0 : block == 256 ? 0.34 : t == PL_Q4_0 ? 0.13 : t == PL_Q5_0 ? 0.07 : 0.04);
            ck_assert_msg(fabs((double)back[i] - (double)values[i]) <= slack, "%s element %zu: %.9g became %.9g", pl_dtype_name(t), i,
                          (double)values[i], (double)back[i]);
        }
    }
    free(row);
    free(back);
}

START_TEST(again)
{
    records(survives);
}
END_TEST

/* Blocks of zeros stay zeros, one constant stays near, and what is no number ends the same way everywhere: no trap. */
START_TEST(edges)
{
    float x[256], back[256];
    uint8_t row[1024];
    for (int i = 0; i < N_TYPES; i++) {
        pl_dtype t = types[i].type;
        memset(x, 0, sizeof x);
        pl_quant_row(t, x, row, 256);
        pl_dequant_row(t, row, back, 256);
        for (int e = 0; e < 256; e++)
            ck_assert(back[e] == 0);
        for (int sign = -1; sign <= 1; sign += 2) {
            for (int e = 0; e < 256; e++)
                x[e] = (float)sign * 0.75f;
            pl_quant_row(t, x, row, 256);
            pl_dequant_row(t, row, back, 256);
            for (int e = 0; e < 256; e++)
                ck_assert_msg(fabsf(back[e] - x[e]) <= 0.01f, "%s: %g became %g", types[i].name, (double)x[e], (double)back[e]);
        }
        x[3] = NAN;
        x[40] = INFINITY;
        x[200] = -INFINITY;
        pl_quant_row(t, x, row, 256);
        pl_dequant_row(t, row, back, 256);
    }
}
END_TEST

/* Every half: its value by definition, and back. */
START_TEST(halves)
{
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = pl_f16_to_f32((uint16_t)h);
        int e = h >> 10 & 31, m = h & 0x3ff;
        double want = e == 31 ? (m ? (double)NAN : (double)INFINITY) : e == 0 ? ldexp(m, -24) : ldexp(1024 + m, e - 25);
        want = h & 0x8000 ? -want : want;
        if (e == 31 && m != 0) {
            ck_assert(isnan(f));
            uint16_t back = pl_f32_to_f16(f);
            ck_assert((back & 0x7c00) == 0x7c00 && (back & 0x3ff) != 0);
            continue;
        }
        ck_assert((double)f == want && !signbit(f) == !signbit(want));
        ck_assert_uint_eq(pl_f32_to_f16(f), h);
    }
}
END_TEST

/* Between two neighbouring halves: the nearer one, the even one from the middle. */
START_TEST(rounding)
{
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float a = pl_f16_to_f32((uint16_t)h), b = pl_f16_to_f32((uint16_t)(h + 1)), middle = (a + b) / 2;
        uint16_t even = (uint16_t)(h & 1 ? h + 1 : h);
        ck_assert_uint_eq(pl_f32_to_f16(middle), even);
        ck_assert_uint_eq(pl_f32_to_f16(nextafterf(middle, 0)), h);
        ck_assert_uint_eq(pl_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
        ck_assert_uint_eq(pl_f32_to_f16(-middle), even | 0x8000);
    }
    ck_assert_uint_eq(pl_f32_to_f16(65519.996f), 0x7bff);
    ck_assert_uint_eq(pl_f32_to_f16(65520.0f), 0x7c00);
    ck_assert_uint_eq(pl_f32_to_f16(INFINITY), 0x7c00);
    ck_assert_uint_eq(pl_f32_to_f16(-3e38f), 0xfc00);
    ck_assert_uint_eq(pl_f32_to_f16(1e-30f), 0);
    ck_assert_uint_eq(pl_f32_to_f16(-0.0f), 0x8000);
}
END_TEST

START_TEST(bfloat)
{
    static const struct {
        float in;
        uint16_t out;
    } rows[] = {{1.0f, 0x3f80},         {1.00390625f, 0x3f80},  {1.01171875f, 0x3f82}, {1.0039064f, 0x3f81}, {-2.5f, 0xc020},
                {3.4028235e38f, 0x7f80}, {INFINITY, 0x7f80}, {-INFINITY, 0xff80},   {0.0f, 0},            {-0.0f, 0x8000}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        uint16_t h;
        pl_quant_row(PL_BF16, &rows[i].in, &h, 1);
        ck_assert_uint_eq(h, rows[i].out);
    }
    float nan = NAN, back;
    uint16_t h;
    pl_quant_row(PL_BF16, &nan, &h, 1);
    pl_dequant_row(PL_BF16, &h, &back, 1);
    ck_assert(isnan(back));
}
END_TEST

Suite *suite_dtype(void)
{
    Suite *s = suite_create("dtype");
    TCase *c = tcase_create("dtype");
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_test(c, table);
    tcase_add_test(c, reference);
    tcase_add_test(c, unpack);
    tcase_add_test(c, quantize);
    tcase_add_test(c, again);
    tcase_add_test(c, edges);
    tcase_add_test(c, halves);
    tcase_add_test(c, rounding);
    tcase_add_test(c, bfloat);
    suite_add_tcase(s, c);
    return s;
}
