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

/* False, with a line, where the emulated device was not built. */
static bool bed_open(struct bed *b)
{
    struct pl_err err = {0};
    *b = (struct bed){0};
    OK(pl_pool_new(&b->pool, 2, &err));
    OK(pl_cpu_open(&b->dev[REF], b->pool, "ref", &err));
    const pl_status rc = emulated_open(&b->dev[CUDA], &err);
    if (rc == PL_OK) {
        b->dev[BACKWARDS] = b->dev[CUDA];
        return true;
    }
    ck_assert_int_eq(rc, PL_ENOTSUP);
    printf("traincuda: skipped: %s\n", err.msg);
    b->dev[REF]->ops->close(b->dev[REF]);
    pl_pool_free(b->pool);
    return false;
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

/* The same matrix everywhere: waves that grow from half of size, its rows apart, with something in the gaps. */
struct mat {
    pl_view v[WAYS];
};

static struct mat new_mat_of(struct bed *b, uint32_t rows, uint32_t cols, float size, bool bf16)
{
    const uint32_t stride = rows > 1 ? cols + GAP : cols;
    const size_t n = (size_t)rows * stride + GAP;
    struct mat m;
    float *values = pl_xmalloc(n * sizeof *values);
    ck_assert_uint_lt(b->n_bufs, MOST);
    for (size_t i = 0; i < n; i++)
        values[i] = size * (0.5f + (float)i / (float)n) * (float)sin((double)i * 1.7 + (double)b->n_bufs);
    for (size_t i = 0; bf16 && i < n; i++) { /* that nothing is lost by rounding */
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        bits &= 0xffff0000;
        memcpy(&values[i], &bits, sizeof bits);
    }
    for (int w = 0; w < WAYS; w++) {
        OK(b->dev[w]->ops->buf_new(b->dev[w], n, &b->bufs[w][b->n_bufs]));
        OK(b->dev[w]->ops->put(b->dev[w], b->bufs[w][b->n_bufs], 0, values, n));
        m.v[w] = (pl_view){b->bufs[w][b->n_bufs], GAP, rows, cols, stride};
    }
    b->n_bufs++;
    free(values);
    return m;
}

static struct mat new_mat(struct bed *b, uint32_t rows, uint32_t cols, float size)
{
    return new_mat_of(b, rows, cols, size, false);
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
    if (!bed_open(&b))
        return;
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
    if (!bed_open(&b))
        return;
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
    if (!bed_open(&b))
        return;
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
    if (!bed_open(&b))
        return;
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
    if (!bed_open(&b))
        return;
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
    if (!bed_open(&b))
        return;
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

/* ---- products ---- */

static struct pl_train_mat plain(struct mat m, int w)
{
    return (struct pl_train_mat){.rows = m.v[w].rows, .cols = m.v[w].cols, .values = m.v[w]};
}

/* All ways to call for them. Where operands are rounded to bf16 they have only such values, so that the results are the same. */
static void check_products(struct bed *b, uint32_t T, uint32_t N, uint32_t K, bool bf16)
{
    const struct mat x = new_mat_of(b, T, K, 1, bf16), w_ = new_mat_of(b, N, K, 1, bf16), dy = new_mat_of(b, T, N, 1, bf16), bias = new_mat(b, 1, N, 1);
    const struct mat out = new_mat(b, T, N, 1), sum = new_mat(b, T, N, 1), with = new_mat(b, T, N, 1), dx = new_mat(b, T, K, 1), dsum = new_mat(b, T, K, 1);
    const struct mat dw = new_mat(b, N, K, 1), dbias = new_mat(b, 1, N, 1), alone = new_mat(b, 1, N, 1);
    EVERYWHERE (b) {
        const struct pl_train_mat m = plain(w_, w);
        OK(t->set_precision(dev, bf16 && w != REF ? PL_MM_BF16 : PL_MM_F32, NULL));
        OK(t->linear(dev, out.v[w], x.v[w], &m, pl_view_none(), 1, false));
        OK(t->linear(dev, sum.v[w], x.v[w], &m, pl_view_none(), 0.25f, true));
        OK(t->linear(dev, with.v[w], x.v[w], &m, bias.v[w], -2, false));
        OK(t->linear_dx(dev, dx.v[w], dy.v[w], &m, 0.5f, false));
        OK(t->linear_dx(dev, dsum.v[w], dy.v[w], &m, 3, true));
        OK(t->linear_dw(dev, dw.v[w], dbias.v[w], dy.v[w], x.v[w]));
        OK(t->linear_dw(dev, pl_view_none(), alone.v[w], dy.v[w], x.v[w]));
    }
    expect(b, "a product", out, false);
    expect(b, "a product added", sum, false);
    expect(b, "a product with a bias", with, false);
    expect(b, "a gradient of inputs", dx, false);
    expect(b, "one added", dsum, false);
    expect(b, "a weight's gradient", dw, false);
    expect(b, "a bias's gradient", dbias, false);
    expect(b, "that alone", alone, false);
    bed_clear(b);
}

START_TEST(products)
{
    static const uint32_t shapes[][3] = {{1, 1, 1}, {5, 70, 33}, {100, 33, 300}, {70, 129, 600}};
    struct bed b;
    if (!bed_open(&b))
        return;
    for (size_t i = 0; i < PL_COUNT_OF(shapes) * 2; i++)
        check_products(&b, shapes[i / 2][0], shapes[i / 2][1], shapes[i / 2][2], i % 2 != 0);
    bed_close(&b);
}
END_TEST

/* Operands in bf16 are the nearest there are, even ones where two are as near. */
START_TEST(operands_are_rounded)
{
    enum { T = 6 };
    static const float in[T] = {1, 1 + 0x1p-8f, 1 + 0x3p-8f, -1 - 0x1.02p-8f, 0x1.fffp9f, 0}, rounded[T] = {1, 1, 1 + 0x2p-7f, -1 - 0x1p-7f, 0x1p10f, 0};
    struct bed b;
    if (!bed_open(&b))
        return;
    struct pl_device *dev = b.dev[CUDA];
    const struct pl_train_ops *t = dev->ops->train;
    const struct mat x = new_mat(&b, T, 1, 1), one = new_mat(&b, 1, 1, 1), out = new_mat(&b, T, 1, 1);
    const struct pl_train_mat m = plain(one, CUDA);
    float got[T];
    OK(t->set_precision(dev, PL_MM_BF16, NULL));
    OK(dev->ops->put_rows(dev, x.v[CUDA], in));
    OK(dev->ops->put(dev, one.v[CUDA].buf, one.v[CUDA].offset, rounded, 1));
    OK(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false));
    OK(dev->ops->get_rows(dev, out.v[CUDA], got));
    ck_assert_mem_eq(got, rounded, sizeof got);
    bed_close(&b);
}
END_TEST

/* What stays is rounded once, as a whole, with the bits that each product would have made of it; and anew once it may have changed. */
START_TEST(operands_that_stay)
{
    enum { T = 37, K = 72, N = 48, FIRST = 8, SOME = 24 };
    struct bed b;
    unsigned long n[2];
    if (!bed_open(&b))
        return;
    const struct mat x = new_mat(&b, T, K, 1), dy = new_mat(&b, T, N, 1), u = new_mat(&b, T, 4, 1), w_ = new_mat(&b, N, K, 1), up = new_mat(&b, SOME, 4, 1);
    struct pl_device *dev = b.dev[CUDA];
    const struct pl_train_ops *t = dev->ops->train;
    float *got[2], first[T * K];
    OK(dev->ops->get_rows(dev, x.v[CUDA], first));
    OK(t->set_precision(dev, PL_MM_BF16, NULL));
    for (int stays = 0; stays < 2; stays++) {
        const struct mat out = new_mat(&b, T, N, 0), dx = new_mat(&b, T, K, 0), dw = new_mat(&b, N, K, 0), du = new_mat(&b, T, 4, 0);
        const struct mat db = new_mat(&b, SOME, 4, 0);
        const struct mat all[] = {out, dx, dw, du, db};
        const struct pl_train_mat m = plain(w_, CUDA), some = plain(up, CUDA);
        const pl_view part = pl_view_cols(dy.v[CUDA], FIRST, SOME);
        size_t at = 0;
        OK(dev->ops->put_rows(dev, x.v[CUDA], first));
        got[stays] = pl_xmalloc(PL_COUNT_OF(all) * T * (K + N) * sizeof *got[stays]);
        n[stays] = emulated_launches();
        for (int round = 0; round < 2; round++) { /* x is another one in the second */
            if (stays)
                t->stays(dev, x.v[CUDA], dy.v[CUDA]);
            OK(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false));
            OK(t->linear_dx(dev, dx.v[CUDA], dy.v[CUDA], &m, 1, false));
            OK(t->linear_dw(dev, dw.v[CUDA], pl_view_none(), dy.v[CUDA], x.v[CUDA]));
            OK(t->linear_dx(dev, du.v[CUDA], part, &some, 1, false));
            OK(t->linear_dw(dev, db.v[CUDA], pl_view_none(), part, u.v[CUDA]));
            t->stays(dev, pl_view_none(), pl_view_none());
            OK(t->add(dev, x.v[CUDA], x.v[CUDA]));
            if (stays) /* the product takes more rows than these */
                t->stays(dev, pl_view_rows(x.v[CUDA], 0, T / 2), pl_view_none());
            OK(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false));
        }
        for (size_t i = 0; i < PL_COUNT_OF(all); at += (size_t)all[i].v[CUDA].rows * all[i].v[CUDA].cols, i++)
            OK(dev->ops->get_rows(dev, all[i].v[CUDA], got[stays] + at));
        n[stays] = emulated_launches() - n[stays];
        if (stays)
            ck_assert_mem_eq(got[0], got[1], at * sizeof(float));
    }
    ck_assert_uint_eq(n[0] - n[1], 2 * (7 - 3)); /* of x, dy, dy, x, part, part and u in each round, x, dy and u are left */
    bed_close(&b);
    free(got[0]);
    free(got[1]);
}
END_TEST

/* A weight of two parts that takes several panels */
static void check_frozen(struct bed *b, pl_dtype type, uint32_t T, uint32_t N, uint32_t K, bool bf16)
{
    enum { FIRST = 3 };
    const size_t row = pl_dtype_row_bytes(type, K);
    uint8_t *bytes = pl_xmalloc(N * row);
    float *values = pl_xmalloc(K * sizeof *values);
    for (uint32_t r = 0; r < N; r++) {
        for (uint32_t k = 0; k < K; k++)
            values[k] = k % 32 == 0 ? 127 : (float)((r * 7 + k * 3) % 255) - 127; /* Q8_0 and bf16 hold them as they are */
        pl_quant_row(type, values, bytes + r * row, K);
    }
    const struct pl_weight_src src[] = {{.dtype = type, .rows = FIRST, .cols = K, .data = bytes},
                                        {.dtype = type, .rows = N - FIRST, .cols = K, .data = bytes + FIRST * row}};
    const struct mat x = new_mat_of(b, T, K, 1, bf16), dy = new_mat_of(b, T, N, 1, bf16), out = new_mat(b, T, N, 1), dx = new_mat(b, T, K, 1);
    EVERYWHERE (b) {
        struct pl_train_mat m = {.rows = N, .cols = K};
        struct pl_weight *frozen;
        OK(t->frozen_new(dev, src, 2, &frozen, NULL));
        m.frozen = frozen;
        OK(t->set_precision(dev, bf16 && w != REF ? PL_MM_BF16 : PL_MM_F32, NULL));
        OK(t->linear(dev, out.v[w], x.v[w], &m, pl_view_none(), 1, false));
        OK(t->linear_dx(dev, dx.v[w], dy.v[w], &m, 1, false));
        dev->ops->weight_free(dev, frozen);
    }
    expect(b, "a frozen weight's product", out, false);
    expect(b, "the gradient of its inputs", dx, false);
    bed_clear(b);
    free(bytes);
    free(values);
}

START_TEST(frozen_weights)
{
    static const pl_dtype types[] = {PL_F32, PL_F16, PL_BF16, PL_Q8_0};
    struct bed b;
    if (!bed_open(&b))
        return;
    for (size_t i = 0; i < PL_COUNT_OF(types) * 2; i++)
        check_frozen(&b, types[i / 2], 9, 83, 1280, i % 2 != 0);
    check_frozen(&b, PL_Q8_0, 1, 75, 1 << 18, false); /* more than is expanded at once */
    check_frozen(&b, PL_F16, 1, 75, 1 << 18, true);
    bed_close(&b);
}
END_TEST

static void check_head(struct bed *b, uint32_t R, uint32_t V, uint32_t C)
{
    const struct mat h = new_mat(b, R, C, 1), w_ = new_mat(b, V, C, 2), dh = new_mat(b, R, C, 1), dw = new_mat(b, V, C, 1);
    double *logp[WAYS];
    bool *best = pl_xmalloc(R * sizeof *best);
    uint32_t *targets = pl_xmalloc(R * sizeof *targets), n_best = 0;
    float *weight = pl_xmalloc(R * sizeof *weight);
    for (uint32_t r = 0; r < R; r++) {
        targets[r] = r % 3 == 0 ? V - 1 - r % V : r * 31 % V;
        weight[r] = 0.5f + 4 * (float)r / (float)R;
    }
    EVERYWHERE (b) {
        const struct pl_train_mat m = plain(w_, w);
        logp[w] = pl_xmalloc(2 * R * sizeof *logp[w]);
        OK(t->set_precision(dev, PL_MM_F32, NULL));
        OK(t->head(dev, h.v[w], &m, targets, weight, logp[w], best, dh.v[w], dw.v[w]));
        OK(t->head(dev, h.v[w], &m, targets, NULL, logp[w] + R, best, pl_view_none(), pl_view_none()));
        for (uint32_t r = 0; r < R; r++)
            n_best += w == CUDA && best[r];
    }
    for (uint32_t r = 0; r < R; r++) {
        ck_assert_double_le(fabs(logp[CUDA][r] - logp[REF][r]), 1e-5 * fabs(logp[REF][r]));
        ck_assert(logp[CUDA][r] == logp[BACKWARDS][r] && logp[CUDA][r] == logp[CUDA][r + R]);
    }
    ck_assert(V > 1 || n_best == R);
    expect(b, "the gradient of what the head sees", dh, false);
    expect(b, "the head's gradient", dw, false);
    bed_clear(b);
    for (int w = 0; w < WAYS; w++)
        free(logp[w]);
    free(best);
    free(targets);
    free(weight);
}

START_TEST(heads)
{
    struct bed b;
    if (!bed_open(&b))
        return;
    check_head(&b, 1, 1, 3);
    check_head(&b, 7, 1000, 33);
    check_head(&b, 40, 300, 5);
    check_head(&b, 17, (1 << 21) + 1, 1); /* more logits than there are at once */
    bed_close(&b);
}
END_TEST

/* Whether a target is the likeliest token, ties and all */
START_TEST(best_tokens)
{
    enum { R = 3, V = 600, C = 4 };
    static const float h[R][C] = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}};
    static const uint32_t targets[R] = {599, 7, 8}; /* the largest alone, the same as another, another is larger */
    static float w_[V][C];
    struct bed b;
    if (!bed_open(&b))
        return;
    w_[599][0] = 2, w_[7][1] = w_[500][1] = 3, w_[500][2] = 1e-6f;
    const struct mat x = new_mat(&b, R, C, 1), m = new_mat(&b, V, C, 1);
    EVERYWHERE (&b) {
        double logp[R];
        bool best[R];
        const struct pl_train_mat head = plain(m, w);
        OK(dev->ops->put_rows(dev, x.v[w], h[0]));
        OK(dev->ops->put_rows(dev, m.v[w], w_[0]));
        OK(t->head(dev, x.v[w], &head, targets, NULL, logp, best, pl_view_none(), pl_view_none()));
        ck_assert(best[0] && best[1] && !best[2]);
        ck_assert_double_eq_tol(logp[0], 2 - log(exp(2) + 599), 1e-5);
        ck_assert_double_eq_tol(logp[1], 3 - log(2 * exp(3) + 598), 1e-5);
    }
    bed_close(&b);
}
END_TEST

/* ---- parameters ---- */

START_TEST(embeddings)
{
    enum { T = 300, V = 40, C = 150 };
    uint32_t idx[T], few[T];
    struct bed b;
    if (!bed_open(&b))
        return;
    for (uint32_t i = 0; i < T; i++)
        idx[i] = i * i * 7 % (i < 100 ? V : 3), few[i] = i % (V / 2) * 2; /* some rows are used often; none more than is one piece */
    const struct mat dfew = new_mat(&b, V, C, 1), w_ = new_mat(&b, V, C, 1), out = new_mat(&b, T, C, 1);
    const struct mat sum = new_mat(&b, T, C, 1), dy = new_mat(&b, T, C, 1), dw = new_mat(&b, V, C, 1);
    EVERYWHERE (&b) {
        const struct pl_train_mat m = plain(w_, w);
        OK(t->embed(dev, out.v[w], &m, idx, false));
        OK(t->embed(dev, sum.v[w], &m, idx, true));
        OK(t->embed_dw(dev, dfew.v[w], dy.v[w], few)); /* first: no memory for sums is there yet */
        OK(t->embed_dw(dev, dw.v[w], dy.v[w], idx));
        OK(t->embed_dw(dev, dw.v[w], pl_view_rows(dy.v[w], 0, 0), idx));
        OK(t->add(dev, dy.v[w], out.v[w]));
    }
    expect(&b, "an embedding", out, true);
    expect(&b, "one added", sum, true);
    expect(&b, "its gradient", dw, false);
    expect(&b, "one of rows with few uses", dfew, true);
    expect(&b, "a sum", dy, true);
    bed_close(&b);
}
END_TEST

START_TEST(optimizer)
{
    static const uint32_t sizes[] = {1, 255, 200001};
    struct bed b;
    if (!bed_open(&b))
        return;
    for (size_t i = 0; i < PL_COUNT_OF(sizes); i++) {
        const struct mat p = new_mat(&b, 1, sizes[i], 1), g = new_mat(&b, 1, sizes[i], 2), m = new_mat(&b, 1, sizes[i], 0.1f), v = new_mat(&b, 1, sizes[i], 0);
        double squares[WAYS];
        EVERYWHERE (&b) {
            struct pl_adamw o = {.rate = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .scale = 0.7f, .correct1 = 0.1f, .correct2 = 0.05f};
            OK(t->sum_squares(dev, g.v[w], &squares[w]));
            OK(t->adamw(dev, p.v[w], g.v[w], m.v[w], v.v[w], &o));
            OK(dev->ops->put(dev, g.v[w].buf, g.v[w].offset, &o.rate, 1));
            OK(t->adamw(dev, p.v[w], g.v[w], m.v[w], v.v[w], &o));
        }
        ck_assert_double_le(fabs(squares[CUDA] - squares[REF]), 1e-12 * squares[REF]);
        ck_assert(squares[CUDA] == squares[BACKWARDS]);
        expect(&b, "parameters", p, false);
        expect(&b, "first moments", m, false);
        expect(&b, "second moments", v, false);
        expect(&b, "gradients", g, true);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

/* ---- memory ---- */

static size_t left_on(struct pl_device *dev)
{
    size_t left, total;
    OK(dev->ops->memory(dev, &left, &total));
    return left;
}

/* All that a step of that shape may ask of the device. */
static void take_all(struct bed *b, const struct pl_train_shape *s, const struct pl_train_mat *head, float *dh_bits)
{
    enum { D = 8 };
    struct pl_device *dev = b->dev[CUDA];
    const struct pl_train_ops *t = dev->ops->train;
    const uint32_t T = s->n_tokens, C = s->n_embd, W = s->widest, R = s->n_rows, H = s->n_heads;
    const struct mat x = new_mat(b, T, W, 1), dy = new_mat(b, T, W, 1), w_ = new_mat(b, W, W, 1), dw = new_mat(b, W, W, 0), u = new_mat(b, T, s->passing, 1);
    const struct mat h = new_mat(b, R, C, 1), dh = new_mat(b, R, C, 0), gain = new_mat(b, 1, C, 1), dgain = new_mat(b, 1, C, 0), lse = new_mat(b, T, H, 1);
    const struct mat qkv = new_mat(b, T, 3 * H * D, 1), dqkv = new_mat(b, T, 3 * H * D, 0), out = new_mat(b, T, H * D, 1), table = new_mat(b, 4, W, 1);
    const struct mat params = new_mat(b, 1, (uint32_t)s->n_trained, 1);
    const uint32_t start[] = {0, T};
    const struct pl_train_seqs seqs = {1, start};
    const struct pl_train_mat m = plain(w_, CUDA), up = {.rows = W, .cols = s->passing, .values = pl_view_rows(u.v[CUDA], 0, W)};
    uint32_t *numbers = pl_xcalloc(T, sizeof *numbers), *more = pl_xcalloc(T, sizeof *more);
    float *weight = pl_xcalloc(R, sizeof *weight);
    double *logp = pl_xmalloc(R * sizeof *logp), squares;
    bool *best = pl_xmalloc(R * sizeof *best);
    for (uint32_t i = 0; i < R; i++)
        weight[i] = 0.5f, more[i] = i;
    const size_t left = left_on(dev);
    OK(dev->ops->step_begin(dev, NULL));
    OK(t->embed(dev, x.v[CUDA], &(struct pl_train_mat){.rows = 4, .cols = W, .values = table.v[CUDA]}, numbers, false));
    OK(t->gather(dev, h.v[CUDA], pl_view_cols(x.v[CUDA], 0, C), more));
    t->stays(dev, x.v[CUDA], dy.v[CUDA]);
    OK(t->linear(dev, dy.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false));
    OK(t->linear_dx(dev, u.v[CUDA], dy.v[CUDA], &up, 1, false));
    OK(t->linear_dw(dev, pl_view_cols(dw.v[CUDA], 0, s->passing), pl_view_none(), dy.v[CUDA], u.v[CUDA]));
    OK(t->linear_dw(dev, dw.v[CUDA], pl_view_none(), dy.v[CUDA], x.v[CUDA]));
    OK(t->linear_dw(dev, pl_view_rows(pl_view_cols(dw.v[CUDA], 0, s->passing), 0, s->passing), pl_view_none(), u.v[CUDA], u.v[CUDA]));
    t->stays(dev, pl_view_none(), pl_view_none());
    OK(t->attn_d(dev, dqkv.v[CUDA], out.v[CUDA], out.v[CUDA], lse.v[CUDA], qkv.v[CUDA], D, 1, &seqs));
    OK(t->norm_d(dev, PL_NORM_LAYER, dh.v[CUDA], dgain.v[CUDA], pl_view_none(), h.v[CUDA], h.v[CUDA], gain.v[CUDA], 1e-5f, false));
    OK(t->norm_d(dev, PL_NORM_LAYER, pl_view_cols(dy.v[CUDA], 0, C), dgain.v[CUDA], pl_view_none(), pl_view_cols(x.v[CUDA], 0, C),
                 pl_view_cols(x.v[CUDA], 0, C), gain.v[CUDA], 1e-5f, false));
    OK(t->head(dev, h.v[CUDA], head, numbers, weight, logp, best, dh.v[CUDA], pl_view_none()));
    OK(t->gather_d(dev, pl_view_cols(dy.v[CUDA], 0, C), h.v[CUDA], more));
    OK(t->embed_dw(dev, pl_view_rows(pl_view_cols(table.v[CUDA], 0, C), 0, 4), pl_view_cols(dy.v[CUDA], 0, C), numbers));
    OK(t->sum_squares(dev, params.v[CUDA], &squares));
    OK(dev->ops->step_end(dev));
    ck_assert_uint_eq(left_on(dev), left);
    OK(dev->ops->get_rows(dev, dh.v[CUDA], dh_bits));
    bed_clear(b);
    free(numbers), free(more), free(weight), free(logp), free(best);
}

/* What is said to be taken is taken, before the step, which takes nothing; the head expanded as a whole gives the bits of its panels. */
START_TEST(memory_is_taken_before_a_step)
{
    enum { V = (1 << 21) + 8, C = 8, R = 2, ROUNDING = 2 << 20 }; /* a head of two panels */
    const struct pl_train_shape shape = {.n_tokens = 330, .n_rows = R, .n_seqs = 1, .widest = 300, .n_embd = C, .n_heads = 40, .passing = 20,
                                         .n_trained = 200000};
    struct bed b;
    if (!bed_open(&b))
        return;
    struct pl_device *dev = b.dev[CUDA];
    const struct pl_train_ops *t = dev->ops->train;
    const size_t row = pl_dtype_row_bytes(PL_F16, C);
    uint16_t *halves = pl_xmalloc(V * row);
    for (size_t i = 0; i < (size_t)V * C; i++)
        halves[i] = (uint16_t)(0x2000 + i * 7919 % 4093); /* no row is that of another panel */
    const struct pl_weight_src src = {.dtype = PL_F16, .rows = V, .cols = C, .data = halves};
    const size_t before = left_on(dev), says = t->frozen_bytes(&src, 1);
    struct pl_weight *frozen;
    OK(t->frozen_new(dev, &src, 1, &frozen, NULL));
    ck_assert(before - left_on(dev) <= says && says <= before - left_on(dev) + ROUNDING);
    const struct pl_train_mat head = {.rows = V, .cols = C, .frozen = frozen};
    float *bits[2];
    unsigned long n[2];
    OK(t->set_precision(dev, PL_MM_BF16, NULL));
    for (int whole = 0; whole < 2; whole++) {
        struct pl_train_shape s = shape;
        s.head = &head, s.whole_head = whole;
        const size_t left = left_on(dev), wanted = t->work_bytes(dev, &s);
        OK(t->reserve(dev, &s));
        const size_t taken = left - left_on(dev);
        ck_assert_msg(taken <= wanted && wanted <= taken + 9 * (size_t)ROUNDING, "%zu bytes are taken, %zu were said", taken, wanted);
        ck_assert_uint_eq(t->work_bytes(dev, &s), 0);
        ck_assert(whole == 0 || taken == (size_t)V * C * 2);
        bits[whole] = pl_xmalloc(R * C * sizeof *bits[whole]);
        n[whole] = emulated_launches();
        take_all(&b, &s, &head, bits[whole]);
        n[whole] = emulated_launches() - n[whole];
    }
    ck_assert_uint_eq(n[0] - n[1], 2); /* each panel is expanded once, not for each direction */
    ck_assert_mem_eq(bits[0], bits[1], R * C * sizeof *bits[0]);
    dev->ops->weight_free(dev, frozen);
    bed_close(&b);
    free(halves);
    free(bits[0]);
    free(bits[1]);
}
END_TEST

/* ---- what goes wrong ---- */

START_TEST(failures)
{
    struct bed b;
    if (!bed_open(&b))
        return;
    const struct mat x = new_mat(&b, 2, 8, 1), w_ = new_mat(&b, 8, 8, 1), out = new_mat(&b, 2, 8, 1), wide = new_mat(&b, 2, 9, 1);
    const struct pl_train_mat m = plain(w_, CUDA);
    struct pl_device *dev = b.dev[CUDA];
    const struct pl_train_ops *t = dev->ops->train;
    double sum;
    ck_assert_int_eq(t->linear(dev, wide.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false), PL_EINVAL);
    ck_assert_int_eq(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_rows(w_.v[CUDA], 0, 1), 1, true), PL_EINVAL);
    ck_assert_int_eq(t->linear_dx(dev, wide.v[CUDA], x.v[CUDA], &m, 1, false), PL_EINVAL);
    ck_assert_int_eq(t->linear_dw(dev, w_.v[CUDA], pl_view_none(), wide.v[CUDA], x.v[CUDA]), PL_EINVAL);
    ck_assert_int_eq(t->sum_squares(dev, x.v[CUDA], &sum), PL_EINVAL);
    setenv("PARLEY_EMU_FAULT", "blas:3", 1);
    ck_assert_int_eq(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false), PL_ENOMEM);
    unsetenv("PARLEY_EMU_FAULT");
    OK(t->linear(dev, out.v[CUDA], x.v[CUDA], &m, pl_view_none(), 1, false));
    setenv("PARLEY_EMU_FAULT", "blas:13", 1);
    ck_assert_int_eq(t->linear_dw(dev, w_.v[CUDA], pl_view_none(), out.v[CUDA], x.v[CUDA]), PL_EDEVICE);
    unsetenv("PARLEY_EMU_FAULT");
    ck_assert_int_eq(t->add(dev, out.v[CUDA], x.v[CUDA]), PL_EDEVICE); /* lost for good */
    bed_close(&b);
}
END_TEST

START_TEST(old_gpus_have_no_bf16)
{
    struct bed b;
    struct pl_err err = {0};
    setenv("PARLEY_EMU_FAULT", "turing", 1);
    const bool there = bed_open(&b);
    unsetenv("PARLEY_EMU_FAULT");
    if (!there)
        return;
    const struct pl_train_ops *t = b.dev[CUDA]->ops->train;
    ck_assert(!t->has_bf16(b.dev[CUDA]));
    ck_assert_int_eq(t->set_precision(b.dev[CUDA], PL_MM_BF16, &err), PL_ENOTSUP);
    ck_assert_str_eq(err.param, "precision");
    OK(t->set_precision(b.dev[CUDA], PL_MM_F32, &err));
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
    tcase_add_test(tc, products);
    tcase_add_test(tc, operands_are_rounded);
    tcase_add_test(tc, operands_that_stay);
    tcase_add_test(tc, frozen_weights);
    tcase_add_test(tc, heads);
    tcase_add_test(tc, best_tokens);
    tcase_add_test(tc, embeddings);
    tcase_add_test(tc, optimizer);
    tcase_add_test(tc, memory_is_taken_before_a_step);
    tcase_add_test(tc, failures);
    tcase_add_test(tc, old_gpus_have_no_bf16);
    suite_add_tcase(s, tc);
    return s;
}
