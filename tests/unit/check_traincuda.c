/* check_traincuda: training's operations on the emulated CUDA device beside the CPU's scalar ones, at sizes that take more than one
 * tile, piece or block: the same numbers, and the same bits with a block's threads in the other order.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/train.h"
#include "tests/tools/emulated.h"

Suite *suite_traincuda(void);

enum { REF, CUDA, BACKWARDS, WAYS, MOST = 16, GAP = 3 };

/* An operation's matrices, on two devices; the second device computes twice. */
struct bed {
    struct pl_pool *pool;
    struct pl_device *dev[WAYS];
    struct pl_dbuf *bufs[WAYS][MOST];
    size_t n_bufs;
};

#define OK(call) ck_assert_int_eq(call, PL_OK)

static void bed_open(struct bed *b)
{
    struct pl_err err = {0};
    *b = (struct bed){0};
    OK(pl_pool_new(&b->pool, 2, &err));
    OK(pl_cpu_open(&b->dev[REF], b->pool, "ref", &err));
    ck_assert_msg(emulated_open(&b->dev[CUDA], &err) == PL_OK, "%s", err.msg);
    b->dev[BACKWARDS] = b->dev[CUDA];
}

static void bed_clear(struct bed *b)
{
    while (b->n_bufs > 0) {
        b->n_bufs--;
        for (int w = 0; w < WAYS; w++)
            b->dev[w]->ops->buf_free(b->dev[w], b->bufs[w][b->n_bufs]);
    }
}

static void bed_close(struct bed *b)
{
    bed_clear(b);
    b->dev[REF]->ops->close(b->dev[REF]);
    b->dev[CUDA]->ops->close(b->dev[CUDA]);
    pl_pool_free(b->pool);
}

/* The same matrix everywhere: waves between -size and size, its rows apart, with something in the gaps. */
struct mat {
    pl_view v[WAYS];
};

static struct mat new_mat(struct bed *b, uint32_t rows, uint32_t cols, float size)
{
    const uint32_t stride = rows > 1 ? cols + GAP : cols;
    const size_t n = (size_t)rows * stride + GAP;
    struct mat m;
    float *values = pl_xmalloc(n * sizeof *values);
    ck_assert_uint_lt(b->n_bufs, MOST);
    for (size_t i = 0; i < n; i++)
        values[i] = size * (float)sin((double)i * 1.7 + (double)b->n_bufs);
    for (int w = 0; w < WAYS; w++) {
        OK(b->dev[w]->ops->buf_new(b->dev[w], n, &b->bufs[w][b->n_bufs]));
        OK(b->dev[w]->ops->put(b->dev[w], b->bufs[w][b->n_bufs], 0, values, n));
        m.v[w] = (pl_view){b->bufs[w][b->n_bufs], GAP, rows, cols, stride};
    }
    b->n_bufs++;
    free(values);
    return m;
}

static const struct mat none;

/* Gaps and all. exact: the same bits as the scalar one's. */
static void expect(struct bed *b, const char *what, struct mat m, bool exact)
{
    const size_t n = (size_t)m.v[0].rows * m.v[0].stride + GAP;
    float *got[WAYS];
    double off = 0, size = 0;
    for (int w = 0; w < WAYS; w++) {
        got[w] = pl_xmalloc(n * sizeof *got[w]);
        OK(b->dev[w]->ops->get(b->dev[w], m.v[w].buf, 0, got[w], n));
    }
    for (size_t i = 0; i < n; i++) {
        off += pow((double)got[CUDA][i] - (double)got[REF][i], 2);
        size += pow((double)got[REF][i], 2);
    }
    ck_assert_msg(sqrt(off / size) <= 2e-5, "%s is off by %.2e", what, sqrt(off / size));
    ck_assert_msg(memcmp(got[CUDA], got[BACKWARDS], n * sizeof *got[CUDA]) == 0, "%s depends on the order of threads", what);
    ck_assert_msg(!exact || memcmp(got[CUDA], got[REF], n * sizeof *got[CUDA]) == 0, "%s: other bits than the CPU's", what);
    for (int w = 0; w < WAYS; w++)
        free(got[w]);
}

/* For each device: dev, t, w. */
#define EVERYWHERE(b)                                                                                                  \
    for (int w = 0; w < WAYS; w++)                                                                                     \
        for (struct pl_device *dev = (emulated_reverse(w == BACKWARDS), (b)->dev[w]); dev != NULL; emulated_reverse(false), dev = NULL) \
            for (const struct pl_train_ops *t = dev->ops->train; t != NULL; t = NULL)

START_TEST(attention)
{
    static const struct {
        uint32_t D, H, G, n_seqs, start[5];
        float size;
    } cases[] = {
        {.D = 8, .H = 4, .G = 2, .n_seqs = 4, .start = {0, 1, 70, 70, 90}, .size = 1},
        {.D = 64, .H = 2, .G = 1, .n_seqs = 2, .start = {0, 64, 193}, .size = 1},
        {.D = 80, .H = 3, .G = 3, .n_seqs = 1, .start = {0, 65}, .size = 1},
        {.D = 192, .H = 4, .G = 1, .n_seqs = 1, .start = {0, 40}, .size = 1},
        {.D = PL_MAX_HEAD_DIM, .H = 1, .G = 1, .n_seqs = 2, .start = {0, 66, 67}, .size = 1},
    };
    struct bed b;
    bed_open(&b);
    for (size_t i = 0; i < PL_COUNT_OF(cases); i++) {
        const uint32_t D = cases[i].D, H = cases[i].H, G = cases[i].G, T = cases[i].start[cases[i].n_seqs];
        const struct pl_train_seqs s = {cases[i].n_seqs, cases[i].start};
        const struct mat qkv = new_mat(&b, T, (H + 2 * G) * D, cases[i].size), out = new_mat(&b, T, H * D, 1), lse = new_mat(&b, T, H, 1);
        const struct mat dout = new_mat(&b, T, H * D, 1), dqkv = new_mat(&b, T, (H + 2 * G) * D, 1);
        const float scale = 1 / sqrtf((float)D);
        EVERYWHERE (&b) {
            OK(t->attn(dev, out.v[w], lse.v[w], qkv.v[w], D, scale, &s));
            OK(t->attn_d(dev, dqkv.v[w], dout.v[w], out.v[w], lse.v[w], qkv.v[w], D, scale, &s));
        }
        expect(&b, "attention", out, false);
        expect(&b, "its sums of exponentials", lse, false);
        expect(&b, "its gradient", dqkv, false);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

START_TEST(norms)
{
    static const uint32_t shapes[][2] = {{1, 1}, {3, 255}, {200, 300}};
    struct bed b;
    bed_open(&b);
    for (size_t i = 0; i < PL_COUNT_OF(shapes) * 4; i++) {
        const uint32_t T = shapes[i / 4][0], C = shapes[i / 4][1];
        const bool layer = i % 2 == 1, add = i / 2 % 2 == 1;
        const pl_norm_kind kind = layer ? PL_NORM_LAYER : PL_NORM_RMS;
        const struct mat x = new_mat(&b, T, C, 2), gain = new_mat(&b, 1, C, 1), bias = layer ? new_mat(&b, 1, C, 1) : none;
        const struct mat out = new_mat(&b, T, C, 1), dout = new_mat(&b, T, C, 1), dx = new_mat(&b, T, C, 1), dgain = new_mat(&b, 1, C, 1);
        const struct mat dbias = layer ? new_mat(&b, 1, C, 1) : none;
        EVERYWHERE (&b) {
            OK(t->norm(dev, kind, out.v[w], x.v[w], gain.v[w], bias.v[w], 1e-5f));
            OK(t->norm_d(dev, kind, dx.v[w], dgain.v[w], dbias.v[w], dout.v[w], x.v[w], gain.v[w], 1e-5f, add));
            OK(t->norm_d(dev, kind, dx.v[w], pl_view_none(), pl_view_none(), dout.v[w], x.v[w], gain.v[w], 1e-5f, true));
        }
        expect(&b, "a norm", out, false);
        expect(&b, "its gradient", dx, false);
        expect(&b, "the gradient of its gain", dgain, false);
        if (layer)
            expect(&b, "the gradient of its bias", dbias, false);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

START_TEST(rotations)
{
    enum { T = 5, D = 300, H = 3, DIMS = 260 };
    static const uint32_t pos[T] = {0, 1, 7, 300, 4000};
    struct bed b;
    bed_open(&b);
    for (int i = 0; i < 2; i++) {
        const pl_rope_kind kind = i == 0 ? PL_ROPE_HALVES : PL_ROPE_INTERLEAVED;
        const struct mat x = new_mat(&b, T, H * D, 1), back = new_mat(&b, T, H * D, 1), freq = new_mat(&b, 1, DIMS / 2, 1), table = new_mat(&b, T, DIMS, 1);
        EVERYWHERE (&b) {
            OK(t->rope_table(dev, table.v[w], freq.v[w], pos));
            OK(t->rope(dev, kind, x.v[w], D, table.v[w], false));
            OK(t->rope(dev, kind, back.v[w], D, table.v[w], true));
        }
        expect(&b, "the table of rotations", table, false);
        expect(&b, "a rotation", x, false);
        expect(&b, "a rotation back", back, false);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

START_TEST(activations)
{
    enum { T = 3, F = 300 };
    struct bed b;
    bed_open(&b);
    for (int i = 0; i < 2; i++) {
        const pl_act_kind kind = i == 0 ? PL_ACT_SILU : PL_ACT_GELU_TANH;
        const struct mat x = new_mat(&b, T, 2 * F, 6), out = new_mat(&b, T, F, 1), dout = new_mat(&b, T, F, 1), dx = new_mat(&b, T, 2 * F, 1);
        const struct mat plain = new_mat(&b, T, F, 6), act = new_mat(&b, T, F, 1), dplain = new_mat(&b, T, F, 1);
        EVERYWHERE (&b) {
            OK(t->glu(dev, kind, out.v[w], x.v[w]));
            OK(t->glu_d(dev, kind, dx.v[w], dout.v[w], x.v[w]));
            OK(t->act(dev, kind, act.v[w], plain.v[w]));
            OK(t->act_d(dev, kind, dplain.v[w], dout.v[w], plain.v[w]));
        }
        expect(&b, "a gated activation", out, false);
        expect(&b, "its gradient", dx, false);
        expect(&b, "an activation", act, false);
        expect(&b, "its gradient", dplain, false);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

/* The very values that the CPU drops. */
START_TEST(dropout)
{
    enum { T = 7, C = 300 };
    struct bed b;
    bed_open(&b);
    const struct mat x = new_mat(&b, T, C, 1), out = new_mat(&b, T, C, 1), sum = new_mat(&b, T, C, 1);
    EVERYWHERE (&b) {
        OK(t->dropout(dev, out.v[w], x.v[w], 0.3f, 0x123456789abcdef0u, false));
        OK(t->dropout(dev, sum.v[w], x.v[w], 0.1f, UINT64_MAX - 2, true));
    }
    expect(&b, "dropout", out, true);
    expect(&b, "dropout added", sum, true);
    bed_close(&b);
}
END_TEST

START_TEST(gathers)
{
    enum { T = 9, C = 300, R = 4 };
    static const uint32_t rows[R] = {0, 3, 4, 8};
    struct bed b;
    bed_open(&b);
    const struct mat x = new_mat(&b, T, C, 1), out = new_mat(&b, R, C, 1), dx = new_mat(&b, T, C, 1), nothing = new_mat(&b, T, C, 1);
    EVERYWHERE (&b) {
        OK(t->gather(dev, out.v[w], x.v[w], rows));
        OK(t->gather_d(dev, dx.v[w], out.v[w], rows));
        OK(t->gather_d(dev, nothing.v[w], pl_view_rows(out.v[w], 0, 0), rows));
    }
    expect(&b, "gathered rows", out, true);
    expect(&b, "scattered rows", dx, true);
    expect(&b, "no rows scattered", nothing, true);
    bed_close(&b);
}
END_TEST

Suite *suite_traincuda(void)
{
    Suite *s = suite_create("traincuda");
    TCase *tc = tcase_create("operations");
    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, attention);
    tcase_add_test(tc, norms);
    tcase_add_test(tc, rotations);
    tcase_add_test(tc, activations);
    tcase_add_test(tc, dropout);
    tcase_add_test(tc, gathers);
    suite_add_tcase(s, tc);
    return s;
}
