/* perf: speed of the CPU device's products, of each type and instruction set.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/perf.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/device.h"

/* About a small model's head. What the last level of cache holds of it is read faster than memory. */
enum { OUTPUTS = 49152, INPUTS = 512, MAX_TOKENS = 128, ROWS = 257 };

static const pl_dtype dtypes[] = {PL_Q4_1, PL_Q4_0, PL_Q5_0, PL_Q5_1, PL_Q8_0, PL_Q2_K, PL_Q3_K,
                                  PL_Q4_K, PL_Q5_K, PL_Q6_K, PL_F16,  PL_BF16, PL_F32};
static const uint32_t counts[] = {1, 4, 16, MAX_TOKENS};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 257 different rows, repeated. */
static void *make_rows(pl_dtype t, size_t row_bytes)
{
    uint8_t *data = malloc(row_bytes * OUTPUTS);
    float values[INPUTS];
    unsigned seed = 1;
    for (size_t r = 0; data != NULL && r < OUTPUTS; r++) {
        for (size_t k = 0; r < ROWS && k < INPUTS; k++)
            values[k] = (float)((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
        if (r < ROWS)
            pl_quant_row(t, values, data + r * row_bytes, INPUTS);
        else
            for (size_t i = 0; i < row_bytes; i++)
                data[r * row_bytes + i] = data[(r - ROWS) * row_bytes + i];
    }
    return data;
}

/* Best of some runs, in seconds; negative when the device refuses. */
static double time_product(struct pl_device *dev, const struct pl_weight *w, pl_view x, pl_view out)
{
    double best = 1e9, end = now() + 0.1;
    do {
        double start = now();
        if (dev->ops->matmul(dev, out, x, w, pl_view_none(), false) != PL_OK)
            return -1;
        double t = now() - start;
        best = t < best ? t : best;
    } while (now() < end);
    return best;
}

static int measure(struct pl_device *dev, const char *isa, pl_dtype t)
{
    struct pl_err err;
    struct pl_weight *w = NULL;
    struct pl_dbuf *x = NULL, *out = NULL;
    size_t row_bytes = pl_dtype_row_bytes(t, INPUTS);
    struct pl_weight_src src = {.dtype = t, .rows = OUTPUTS, .cols = INPUTS, .data = make_rows(t, row_bytes)};
    int bad = 1;
    if (src.data == NULL || dev->ops->weight_new(dev, &src, 1, &w, &err) != PL_OK ||
        dev->ops->buf_new(dev, (size_t)MAX_TOKENS * INPUTS, &x) != PL_OK ||
        dev->ops->buf_new(dev, (size_t)MAX_TOKENS * OUTPUTS, &out) != PL_OK)
        goto out;
    printf("%-8s%-6s", isa, pl_dtype_name(t));
    for (size_t i = 0; i < PL_COUNT_OF(counts); i++) {
        double s = time_product(dev, w, (pl_view){x, 0, counts[i], INPUTS, INPUTS}, (pl_view){out, 0, counts[i], OUTPUTS, OUTPUTS});
        if (s < 0)
            goto out;
        if (counts[i] == 1)
            printf("%9.1f", 1e-9 * (double)row_bytes * OUTPUTS / s);
        printf("%9.0f", 2e-9 * INPUTS * OUTPUTS * counts[i] / s);
    }
    putchar('\n');
    bad = 0;
out:
    dev->ops->buf_free(dev, out);
    dev->ops->buf_free(dev, x);
    dev->ops->weight_free(dev, w);
    free((void *)src.data);
    return bad;
}

int ops_perf(void)
{
    static const char *const isas[] = {"avx512", "avxvnni", "avx2"};
    struct pl_pool *pool;
    int bad = 0;
    if (pl_pool_new(&pool, 0, NULL) != PL_OK)
        return 1;
    printf("%u threads, %d x %d; GB/s of the file's bytes and GOP/s with 1 token, then GOP/s with 4, 16 and %d\n",
           pl_pool_size(pool), OUTPUTS, INPUTS, MAX_TOKENS);
    for (size_t i = 0; i < PL_COUNT_OF(isas); i++) {
        struct pl_device *dev;
        if (pl_cpu_open(&dev, pool, isas[i], NULL) != PL_OK) {
            printf("%s: not on this processor\n", isas[i]);
            continue;
        }
        for (size_t d = 0; d < PL_COUNT_OF(dtypes); d++)
            bad |= measure(dev, isas[i], dtypes[d]);
        dev->ops->close(dev);
    }
    pl_pool_free(pool);
    return bad;
}
