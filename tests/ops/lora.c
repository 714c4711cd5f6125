/* lora: low-rank changes of a product on each instruction set: against sums in double, rows without an adapter untouched,
 * and bit for bit the same whatever else is in the batch and however many threads there are.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/lora.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/device.h"
#include "tests/tools/emulated.h"

/* Outputs 0 … N - 1 in parts with a gap; adapters: rows of x by number modulo ADAPTERS + 1, the rest is the base's. */
enum { N = 700, PARTS = 3, ADAPTERS = 2, MAX_T = 61, MAX_K = 600, MAX_RANK = 4000, PAD = 3 };

static const struct {
    uint32_t T, K, rank[PARTS];
} shapes[] = {{1, 64, {4, 16, 1}}, {7, 67, {1, 2, 3}}, {61, 576, {16, 16, 16}}, {34, 600, {40, 5, 0}}, {12, 9, {8, 0, 0}}, {2, 9, {4000, 96, 20}}};
static const uint32_t first[PARTS] = {0, 530, 563}, rows_of_part[PARTS] = {530, 33, 100}; /* 663 … 699 are in none */

struct world {
    float *x, *out, *a[ADAPTERS][PARTS], *b[ADAPTERS][PARTS];
};

static uint64_t state;

static float *fill(size_t n)
{
    float *v = pl_xmalloc((n + 1) * sizeof *v);
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        v[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    return v;
}

static float scale_of(int adapter, int part)
{
    return 0.3f + (float)adapter + 0.7f * (float)part;
}

static void world_make(struct world *w, size_t s)
{
    state = s + 1;
    w->x = fill((size_t)shapes[s].T * (shapes[s].K + PAD));
    w->out = fill((size_t)shapes[s].T * (N + PAD));
    for (int i = 0; i < ADAPTERS * PARTS; i++) {
        w->a[i / PARTS][i % PARTS] = fill((size_t)shapes[s].rank[i % PARTS] * shapes[s].K);
        w->b[i / PARTS][i % PARTS] = fill((size_t)shapes[s].rank[i % PARTS] * rows_of_part[i % PARTS]);
    }
}

static void world_free(struct world *w)
{
    free(w->x), free(w->out);
    for (int i = 0; i < ADAPTERS * PARTS; i++)
        free(w->a[i / PARTS][i % PARTS]), free(w->b[i / PARTS][i % PARTS]);
}

static int adapter_of(uint32_t row)
{
    return (int)(row * 7 % 3) - 1; /* -1: the base */
}

static void expect(const struct world *w, size_t s, float *out)
{
    const uint32_t K = shapes[s].K;
    memcpy(out, w->out, (size_t)shapes[s].T * (N + PAD) * sizeof *out);
    for (uint32_t t = 0; t < shapes[s].T; t++)
        for (int p = 0; adapter_of(t) >= 0 && p < PARTS; p++) {
            const float *a = w->a[adapter_of(t)][p], *b = w->b[adapter_of(t)][p];
            double y[MAX_RANK];
            for (uint32_t r = 0; r < shapes[s].rank[p]; r++) {
                y[r] = 0;
                for (uint32_t k = 0; k < K; k++)
                    y[r] += (double)w->x[(size_t)t * (K + PAD) + k] * a[(size_t)r * K + k];
            }
            for (uint32_t c = 0; c < rows_of_part[p]; c++) {
                double sum = 0;
                for (uint32_t r = 0; r < shapes[s].rank[p]; r++)
                    sum += y[r] * b[(size_t)c * shapes[s].rank[p] + r];
                out[(size_t)t * (N + PAD) + first[p] + c] += (float)(sum * (double)scale_of(adapter_of(t), p));
            }
        }
}

/* Rows from … from + n of the whole, each with its adapter. False when an operation fails. */
static bool run(struct pl_device *dev, const struct world *w, size_t s, uint32_t from, uint32_t n, bool add, float *out)
{
    const struct pl_device_ops *ops = dev->ops;
    const uint32_t K = shapes[s].K, T = shapes[s].T;
    struct pl_dbuf *bx = NULL, *bo = NULL;
    struct pl_lora *lora[ADAPTERS] = {NULL};
    struct pl_lora_use uses[ADAPTERS];
    uint32_t rows[ADAPTERS][MAX_T];
    size_t n_uses = 0;
    bool ok = ops->buf_new(dev, (size_t)T * (K + PAD), &bx) == PL_OK && ops->buf_new(dev, (size_t)T * (N + PAD), &bo) == PL_OK &&
              ops->put(dev, bx, 0, w->x, (size_t)T * (K + PAD)) == PL_OK && ops->put(dev, bo, 0, w->out, (size_t)T * (N + PAD)) == PL_OK;
    for (int i = 0; i < ADAPTERS && ok; i++) {
        struct pl_lora_src parts[PARTS];
        size_t n_parts = 0;
        uint32_t n_rows = 0;
        for (int p = 0; p < PARTS; p++)
            if (shapes[s].rank[p] > 0)
                parts[n_parts++] = (struct pl_lora_src){w->a[i][p], w->b[i][p], shapes[s].rank[p], first[p], rows_of_part[p], scale_of(i, p)};
        ok = ops->lora_new(dev, K, parts, n_parts, &lora[i], NULL) == PL_OK;
        for (uint32_t t = from; t < from + n; t++)
            if (adapter_of(t) == i)
                rows[i][n_rows++] = t;
        if (n_rows > 0)
            uses[n_uses++] = (struct pl_lora_use){lora[i], rows[i], n_rows};
    }
    const pl_view x = {bx, 0, T, K, K + PAD}, o = {bo, 0, T, N, N + PAD};
    ok = ok && ops->lora(dev, o, x, uses, n_uses, add) == PL_OK && ops->get(dev, bo, 0, out, (size_t)T * (N + PAD)) == PL_OK;
    for (int i = 0; i < ADAPTERS; i++)
        ops->lora_free(dev, lora[i]);
    ops->buf_free(dev, bx), ops->buf_free(dev, bo);
    return ok;
}

/* Sums of thousands of terms round more. */
static bool close_to(size_t s, const float *v, const float *ref, const float *before, size_t n)
{
    const double most = shapes[s].rank[0] > 1000 ? 2e-11 : 1e-12;
    double d = 0, change = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)v[i] - ref[i]) * ((double)v[i] - ref[i]);
        change += ((double)ref[i] - before[i]) * ((double)ref[i] - before[i]);
    }
    return d == 0 || d / change <= most;
}

struct tally {
    unsigned *passed, *failed;
};

static void check(const struct tally *t, bool ok, const char *isa, size_t s, const char *what)
{
    *(ok ? t->passed : t->failed) += 1;
    if (!ok)
        printf("FAILED %s lora T %u K %u: %s\n", isa, shapes[s].T, shapes[s].K, what);
}

/* A NaN in one row of x, of an adapter, makes that row's changed outputs NaN and leaves the others' bits alone. */
static void check_nan(const struct tally *t, struct pl_device *dev, const char *isa, size_t s, struct world *w, const float *good, float *out)
{
    uint32_t bad = 0;
    while (bad < shapes[s].T && adapter_of(bad) < 0)
        bad++;
    if (bad == shapes[s].T)
        return;
    float *at = &w->x[(size_t)bad * (shapes[s].K + PAD) + shapes[s].K / 2], kept = *at;
    *at = NAN;
    bool ok = run(dev, w, s, 0, shapes[s].T, true, out);
    const size_t width = N + PAD, row = bad * width;
    ok = ok && memcmp(out, good, row * sizeof *out) == 0 &&
         memcmp(out + row + width, good + row + width, (shapes[s].T - bad - 1) * width * sizeof *out) == 0;
    for (uint32_t c = 0; c < rows_of_part[0]; c++)
        ok &= isnan(out[row + c]);
    check(t, ok, isa, s, "a NaN does not stay in its row");
    *at = kept;
}

/* Without add: what was there makes no difference; outputs in no part become 0. */
static void check_set(const struct tally *t, struct pl_device *dev, const char *isa, size_t s, struct world *w, float *zero, float *other)
{
    const size_t n = (size_t)shapes[s].T * (N + PAD);
    for (size_t i = 0; i < n; i++)
        w->out[i] = 0;
    bool ok = run(dev, w, s, 0, shapes[s].T, true, zero);
    for (size_t i = 0; i < n; i++)
        w->out[i] = NAN;
    ok = ok && run(dev, w, s, 0, shapes[s].T, false, other);
    for (size_t i = 0; i < n; i++)
        ok &= adapter_of((uint32_t)(i / (N + PAD))) < 0 || i % (N + PAD) >= N ? isnan(other[i]) : other[i] == zero[i];
    check(t, ok, isa, s, "set differs from added to zeros");
}

/* What a gated product adds to some rows: those rows are what a bias of the same values makes, the others are as without. */
static void check_plus(const struct tally *t, struct pl_device *dev, const char *isa, pl_dtype type)
{
    enum { T = 13, F = 80, K = 64 };
    const struct pl_device_ops *ops = dev->ops;
    struct pl_dbuf *b[4] = {NULL}; /* x, plus, out, a row */
    struct pl_weight *w = NULL;
    bool rows[T], ok = true;
    state = 3;
    float *x = fill(T * K), *plus = fill(T * 2 * F), *weights = fill(2 * F * K), got[2][T * F], row[F];
    const size_t bytes = pl_dtype_row_bytes(type, K);
    uint8_t *data = pl_xmalloc(2 * F * bytes);
    const struct pl_weight_src parts[2] = {{.dtype = type, .rows = F, .cols = K, .data = data},
                                           {.dtype = type, .rows = F, .cols = K, .data = data + F * bytes}};
    for (size_t i = 0; i < 2 * F; i++)
        pl_quant_row(type, weights + i * K, data + i * bytes, K);
    for (uint32_t i = 0; i < T; i++) {
        rows[i] = i % 3 == 1;
        for (uint32_t c = 0; !rows[i] && c < 2 * F; c++)
            plus[i * 2 * F + c] = NAN;
    }
    ok = ops->weight_new(dev, parts, 2, &w, NULL) == PL_OK && ops->buf_new(dev, T * K, &b[0]) == PL_OK && ops->buf_new(dev, T * 2 * F, &b[1]) == PL_OK &&
         ops->buf_new(dev, T * F, &b[2]) == PL_OK && ops->buf_new(dev, F, &b[3]) == PL_OK && ops->put(dev, b[0], 0, x, T * K) == PL_OK &&
         ops->put(dev, b[1], 0, plus, T * 2 * F) == PL_OK;
    const pl_view vx = {b[0], 0, T, K, K}, vo = {b[2], 0, T, F, F};
    const struct pl_plus p = {{b[1], 0, T, 2 * F, 2 * F}, rows};
    for (int i = 0; i < 2 && ok; i++)
        ok = ops->matmul_glu(dev, PL_ACT_SILU, vo, vx, w, pl_view_none(), i ? &p : NULL) == PL_OK && ops->get(dev, b[2], 0, got[i], T * F) == PL_OK;
    for (uint32_t i = 0; i < T && ok; i++) {
        const pl_view bias = {b[1], (size_t)i * 2 * F, 1, 2 * F, 2 * F}, one = {b[3], 0, 1, F, F};
        ok = ops->matmul_glu(dev, PL_ACT_SILU, one, pl_view_rows(vx, i, 1), w, rows[i] ? bias : pl_view_none(), NULL) == PL_OK &&
             ops->get(dev, b[3], 0, row, F) == PL_OK && memcmp(row, got[1] + i * F, sizeof row) == 0 &&
             (memcmp(row, got[0] + i * F, sizeof row) == 0) == !rows[i];
    }
    check(t, ok, isa, 0, "a gated product does not add what it is to add");
    for (int i = 0; i < 4; i++)
        ops->buf_free(dev, b[i]);
    ops->weight_free(dev, w);
    free(x), free(plus), free(weights), free(data);
}

static void check_shape(const struct tally *t, struct pl_device *dev, struct pl_device *one, const char *isa, size_t s)
{
    const size_t n = (size_t)shapes[s].T * (N + PAD);
    float *ref = pl_xcalloc(n, sizeof *ref), *all = pl_xcalloc(n, sizeof *all), *other = pl_xcalloc(n, sizeof *other);
    struct world w;
    world_make(&w, s);
    expect(&w, s, ref);
    check(t, run(dev, &w, s, 0, shapes[s].T, true, all) && close_to(s, all, ref, w.out, n), isa, s, "differs from sums in double");
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = (uint32_t)(i % (N + PAD));
        if (adapter_of((uint32_t)(i / (N + PAD))) < 0 || c >= first[2] + rows_of_part[2])
            same &= all[i] == w.out[i];
    }
    check(t, same, isa, s, "changes what no adapter is for");
    same = true;
    for (uint32_t row = 0; row < shapes[s].T; row++) {
        same &= run(dev, &w, s, row, 1, true, other);
        same &= memcmp(all + row * (N + PAD), other + row * (N + PAD), (N + PAD) * sizeof *all) == 0;
    }
    check(t, same, isa, s, "a row alone differs from the same row in a batch");
    check(t, run(one, &w, s, 0, shapes[s].T, true, other) && memcmp(all, other, n * sizeof *all) == 0, isa, s, "differs with the number of threads");
    check_nan(t, dev, isa, s, &w, all, other);
    check_set(t, dev, isa, s, &w, all, other);
    world_free(&w);
    free(ref), free(all), free(other);
}

void ops_lora(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped)
{
    static const char *const isas[] = {"ref", "avx2", "avxvnni", "avx512", "cuda-emulated", "cuda"};
    const struct tally t = {passed, failed};
    struct pl_pool *three = NULL, *alone = NULL;
    struct pl_err err;
    if (pl_pool_new(&three, 3, &err) != PL_OK || pl_pool_new(&alone, 1, &err) != PL_OK)
        ++*failed;
    for (size_t i = 0; three != NULL && alone != NULL && i < PL_COUNT_OF(isas); i++) {
        struct pl_device *dev = NULL, *one = NULL;
        if (only != NULL && strcmp(only, isas[i]) != 0)
            continue;
        if (device_open(&dev, three, isas[i], &err) != PL_OK || device_open(&one, alone, isas[i], &err) != PL_OK)
            ++*skipped;
        for (size_t s = 0; dev != NULL && one != NULL && s < PL_COUNT_OF(shapes); s++)
            check_shape(&t, dev, one, isas[i], s);
        if (dev != NULL) {
            check_plus(&t, dev, isas[i], PL_F32);
            check_plus(&t, dev, isas[i], PL_Q8_0); /* the CUDA device has another kernel for so many rows than for one */
            dev->ops->close(dev);
        }
        if (one != NULL)
            one->ops->close(one);
    }
    pl_pool_free(three), pl_pool_free(alone);
}
