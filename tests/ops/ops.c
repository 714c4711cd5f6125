/* ops: every operation of the device interface, in one table of rows (operation, type, shape, tolerance), on each
 * instruction set that this processor has and on the CUDA device (emulated, and on a GPU where there is one), compared with
 * the scalar reference; and rows that prove bit for bit that a result does not depend on the batch, on the number of threads
 * or, for kernels, on the order in which a block's threads run.
 *
 *     ops            all rows            ends with "N passed, N failed, N skipped"
 *     ops NAME       of one device only: avx2, avxvnni, avx512, cuda-emulated or cuda
 *     ops perf       speed of the products, of each type and instruction set
 *
 * The tolerance is the normalised mean squared error ‖fast − ref‖² / ‖ref‖². 1e-9 is what float32 sums of this length differ
 * by in another order; where a row is looser it says why.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/device.h"
#include "core/kv/kv.h"
#include "tests/ops/lora.h"
#include "tests/ops/narrow.h"
#include "tests/ops/perf.h"
#include "tests/ops/ranks.h"
#include "tests/ops/sample.h"
#include "tests/tools/emulated.h"

enum { MAX_FLOATS = 1 << 22, GUARD = 64 };

static uint64_t seed = 1;

static float uniform(void) /* [-1, 1) */
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(seed >> 32) * 0x1p-31f;
}

static float normal(void)
{
    return uniform() + uniform() + uniform();
}

/* ---- one device -------------------------------------------------------------------------------------------------------- */

struct machine {
    struct pl_pool *pool;
    struct pl_device *dev;
    const char *name;
    bool reverse; /* the emulated GPU's order of threads */
};

/* Prints why not. */
static bool machine_open(struct machine *m, const char *name, unsigned threads)
{
    struct pl_err err = {0};
    m->name = name;
    m->reverse = threads == 1;
    if (pl_pool_new(&m->pool, threads, &err) == PL_OK && device_open(&m->dev, m->pool, name, &err) == PL_OK)
        return true;
    if (threads > 1)
        printf("%s: %s\n", name, err.msg);
    return false;
}

static void machine_close(struct machine *m)
{
    if (m->dev != NULL)
        m->dev->ops->close(m->dev);
    pl_pool_free(m->pool);
}

static void must(pl_status st)
{
    if (st != PL_OK) {
        printf("an operation failed: %s\n", pl_status_text(st));
        exit(1);
    }
}

static pl_view new_view(struct machine *m, uint32_t rows, uint32_t cols, uint32_t stride, const float *values)
{
    struct pl_dbuf *buf;
    size_t n = (size_t)rows * stride + GUARD;
    must(m->dev->ops->buf_new(m->dev, n, &buf));
    float *poison = malloc(n * sizeof *poison);
    for (size_t i = 0; i < n; i++)
        poison[i] = values != NULL ? 1e30f : 2e30f; /* so that padding that is copied to padding shows */
    for (uint32_t r = 0; values != NULL && r < rows; r++)
        memcpy(poison + (size_t)r * stride, values + (size_t)r * cols, cols * sizeof *poison);
    must(m->dev->ops->put(m->dev, buf, 0, poison, n));
    free(poison);
    return (pl_view){buf, 0, rows, cols, stride};
}

static void read_view(struct machine *m, pl_view v, float *out)
{
    for (uint32_t r = 0; r < v.rows; r++)
        must(m->dev->ops->get(m->dev, v.buf, v.offset + (size_t)r * v.stride, out + (size_t)r * v.cols, v.cols));
}

/* Nothing may be written between the rows of a view, or behind the last one. */
static bool overrun;

static void free_view(struct machine *m, pl_view v)
{
    size_t n = (size_t)v.rows * v.stride + GUARD, width = v.stride;
    float *all = malloc(n * sizeof *all);
    must(m->dev->ops->get(m->dev, v.buf, 0, all, n));
    for (size_t i = 0; i < n; i++)
        overrun |= (i >= v.rows * width || i % width >= v.cols) && all[i] != all[n - 1];
    free(all);
    m->dev->ops->buf_free(m->dev, v.buf);
}

/* ---- the operations: inputs come from `seed`, so that two machines get the same ---------------------------------------- */

struct row {
    enum { MATMUL, MATMUL_GLU, NORM, ROPE, ACT, EMBED, GATHER, ATTN } op;
    int kind;        /* dtype, norm, rope (and a cache's dtype) or activation */
    uint32_t T, N, K; /* tokens, outputs, inputs; attention, rope: query heads, kv heads, head width */
    bool extra;      /* bias and residual; bias of a norm; accumulate; a second part of another type; half of each head */
    double tolerance;
    const uint32_t *ctx; /* attention: contexts of the sequences, 0 ends; the last one's T newest tokens are queries */
};

static float *fill(size_t n)
{
    float *v = malloc(n * sizeof *v);
    for (size_t i = 0; i < n; i++)
        v[i] = normal();
    return v;
}

/* Rows with a gap between them, as they are where a weight is cut along its inputs. */
static size_t row_stride(pl_dtype t, uint32_t K)
{
    return pl_dtype_row_bytes(t, K) + pl_dtype_block_bytes(t);
}

/* data: two pointers, to be freed after the weight */
static struct pl_weight *new_parts(struct machine *m, struct pl_weight_src parts[2], void **data)
{
    struct pl_weight *w;
    struct pl_err err;
    for (int p = 0; p < 2; p++) {
        uint32_t K = parts[p].cols;
        size_t bytes = row_stride(parts[p].dtype, K);
        data[p] = malloc(bytes * parts[p].rows + 1);
        for (uint32_t i = 0; i < parts[p].rows; i++) {
            float *v = fill(K);
            pl_quant_row(parts[p].dtype, v, (uint8_t *)data[p] + i * bytes, K);
            free(v);
        }
        parts[p].data = data[p];
        parts[p].stride = bytes;
    }
    must(m->dev->ops->weight_new(m->dev, parts, parts[1].rows > 0 ? 2 : 1, &w, &err));
    return w;
}

static const uint32_t alike[1]; /* as ctx of a product with `extra`: its parts are of one type */

static struct pl_weight *new_weight(struct machine *m, const struct row *r, void **data)
{
    uint32_t first = r->extra && r->N > 20 ? 20 : r->N;
    const pl_dtype second = r->ctx == alike ? (pl_dtype)r->kind : PL_F16;
    struct pl_weight_src parts[2] = {{.dtype = (pl_dtype)r->kind, .rows = first, .cols = r->K}, {.dtype = second, .rows = r->N - first, .cols = r->K}};
    return new_parts(m, parts, data);
}

static size_t run_matmul(struct machine *m, const struct row *r, float *out)
{
    void *data[2];
    float *x = fill((size_t)r->T * r->K), *bias = fill(r->N), *residual = fill((size_t)r->T * r->N);
    struct pl_weight *w = new_weight(m, r, data);
    pl_view vx = new_view(m, r->T, r->K, r->K + 5, x), vb = new_view(m, 1, r->N, r->N, bias);
    pl_view vo = new_view(m, r->T, r->N, r->N + 3, r->extra ? residual : NULL);
    must(m->dev->ops->matmul(m->dev, vo, vx, w, r->extra ? vb : pl_view_none(), r->extra));
    read_view(m, vo, out);
    free_view(m, vx), free_view(m, vb), free_view(m, vo);
    m->dev->ops->weight_free(m->dev, w);
    free(data[0]), free(data[1]), free(x), free(bias), free(residual);
    return (size_t)r->T * r->N;
}

/* extra: bias, a gate of another type, and the other activation */
static size_t run_matmul_glu(struct machine *m, const struct row *r, float *out)
{
    void *data[2];
    pl_act_kind act = r->extra ? PL_ACT_GELU_TANH : PL_ACT_SILU;
    float *x = fill((size_t)r->T * r->K), *bias = fill(2 * r->N);
    struct pl_weight_src parts[2] = {{.dtype = r->extra ? PL_F16 : (pl_dtype)r->kind, .rows = r->N, .cols = r->K},
                                     {.dtype = (pl_dtype)r->kind, .rows = r->N, .cols = r->K}};
    struct pl_weight *w = new_parts(m, parts, data);
    pl_view vx = new_view(m, r->T, r->K, r->K + 5, x), vb = new_view(m, 1, 2 * r->N, 2 * r->N, bias);
    pl_view vo = new_view(m, r->T, r->N, r->N, NULL);
    must(m->dev->ops->matmul_glu(m->dev, act, vo, vx, w, r->extra ? vb : pl_view_none(), NULL));
    read_view(m, vo, out);
    free_view(m, vx), free_view(m, vb), free_view(m, vo);
    m->dev->ops->weight_free(m->dev, w);
    free(data[0]), free(data[1]), free(x), free(bias);
    return (size_t)r->T * r->N;
}

static size_t run_rows(struct machine *m, const struct row *r, float *out)
{
    const struct pl_device_ops *ops = m->dev->ops;
    uint32_t n_out = r->op == GATHER ? (r->T + 1) / 2 : r->T, rows[512];
    float *x = fill((size_t)r->T * r->N), *gain = fill(r->N), *bias = fill(r->N);
    pl_view vx = new_view(m, r->T, r->N, r->N + 7, x), vo = new_view(m, n_out, r->N, r->N, NULL), result = vo;
    pl_view vg = new_view(m, 1, r->N, r->N, gain), vb = new_view(m, 1, r->N, r->N, bias);
    for (uint32_t t = 0; t < r->T; t++)
        rows[t / 2] = t / 2 * 2;
    must(ops->step_begin(m->dev, NULL));
    switch (r->op) {
    case NORM: must(ops->norm(m->dev, (pl_norm_kind)r->kind, vo, vx, vg, r->extra ? vb : pl_view_none(), 1e-5f)); break;
    case ACT: must(ops->act(m->dev, (pl_act_kind)r->kind, result = vx)); break;
    default: must(ops->gather(m->dev, vo, vx, rows));
    }
    must(ops->step_end(m->dev));
    read_view(m, result, out);
    free_view(m, vx), free_view(m, vo), free_view(m, vg), free_view(m, vb);
    free(x), free(gain), free(bias);
    return (size_t)result.rows * result.cols;
}

static size_t run_embed(struct machine *m, const struct row *r, float *out)
{
    void *data[2];
    uint32_t idx[64];
    float *before = fill((size_t)r->T * r->K);
    struct row w = *r;
    w.extra = false;
    struct pl_weight *weight = new_weight(m, &w, data);
    pl_view vo = new_view(m, r->T, r->K, r->K, before);
    for (uint32_t t = 0; t < r->T; t++)
        idx[t] = t % 5 == 3 ? PL_NO_ROW : t * 7 % r->N;
    must(m->dev->ops->embed(m->dev, vo, weight, idx, r->extra));
    read_view(m, vo, out);
    free_view(m, vo);
    m->dev->ops->weight_free(m->dev, weight);
    free(data[0]), free(data[1]), free(before);
    return (size_t)r->T * r->K;
}

/* The nearest number that e4m3 has, ties to the one with an even code; by trying all of them. */
static float nearest_f8(float x)
{
    float best = 0, least = INFINITY;
    for (int code = 0; code < 127; code++) {
        const float v = code < 8 ? (float)code * 0x1p-9f : ldexpf(1 + (float)(code % 8) / 8, code / 8 - 7), off = fabsf(fabsf(x) - v);
        if (off < least || (off == least && code % 2 == 0))
            least = off, best = v;
    }
    return copysignf(best, x);
}

/* Leaves four bits of mantissa: half of the numbers then lie just between two that F8 has. */
static void cut_mantissas(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= ~0x7ffffu;
        memcpy(x + i, &bits, sizeof bits);
    }
}

/* What a cache of F8 makes of keys or values. */
static void round_f8(float *x, size_t n, uint32_t D)
{
    for (size_t at = 0; at < n; at += D) {
        float max = 0, power = 0x1p-110f;
        for (uint32_t i = 0; i < D; i++)
            max = fmaxf(max, fabsf(x[at + i]));
        while (max > 448 * power)
            power *= 2;
        for (uint32_t i = 0; i < D; i++)
            x[at + i] = nearest_f8(x[at + i] / power) * power;
    }
}

/* Fills the pages of all sequences token by token, then attends with the newest tokens. only: run sequence `only` alone. */
static size_t run_attn_of(struct machine *m, const struct row *r, int only, float *out)
{
    const struct pl_device_ops *ops = m->dev->ops;
    uint32_t H = r->N, G = r->K >> 16, D = r->K & 0xffff, n_seqs = 0, T = 0, at = 0;
    uint32_t *pos = malloc(4096 * 8), *slot = pos + 4096, q_start[20] = {0}, page_start[20] = {0}, pages[1024], ctx[20];
    struct pl_kvdev *kv;
    const bool f8 = r->kind == PL_F8 && !device_is_cuda(m->name); /* the host's: numbers that F8 has, in F32 */
    struct pl_kv_shape shape = {2, G, D, PL_KV_PAGE, 1024, f8 ? PL_F32 : (pl_dtype)r->kind};
    must(ops->kv_new(m->dev, &shape, &kv));
    float *q_all = fill((size_t)64 * H * D);
    for (uint32_t s = 0; r->ctx[s] != 0; s++) {
        uint32_t n = r->ctx[s], n_pages = (n + PL_KV_PAGE - 1) / PL_KV_PAGE, first = at, one_pos[64], one_slot[64];
        for (uint32_t p = 0; p < n_pages; p++)
            pages[at++] = (first + p) * 7 % 1021;
        for (uint32_t i = 0; i < n; i += 64) { /* keys and values, 64 at a time */
            uint32_t c = n - i < 64 ? n - i : 64;
            float *k = fill((size_t)c * G * D), *v = fill((size_t)c * G * D);
            if (r->kind == PL_F8)
                cut_mantissas(k, (size_t)c * G * D), cut_mantissas(v, (size_t)c * G * D);
            if (f8)
                round_f8(k, (size_t)c * G * D, D), round_f8(v, (size_t)c * G * D, D);
            for (uint32_t t = 0; t < c; t++) {
                one_pos[t] = i + t;
                one_slot[t] = pages[first + (i + t) / PL_KV_PAGE] * PL_KV_PAGE + (i + t) % PL_KV_PAGE;
            }
            struct pl_batch b = {.n_tokens = c, .pos = one_pos, .slot = one_slot};
            pl_view vk = new_view(m, c, G * D, G * D, k), vv = new_view(m, c, G * D, G * D, v);
            must(ops->kv_write(m->dev, kv, 1, NULL, pl_view_none(), vk, vv, &b));
            free_view(m, vk), free_view(m, vv), free(k), free(v);
        }
        if (only >= 0 && (uint32_t)only != s)
            continue;
        uint32_t queries = r->ctx[s + 1] == 0 ? r->T : 1;
        page_start[n_seqs] = first;
        for (uint32_t t = 0; t < queries; t++, T++) {
            pos[T] = n - queries + t;
            slot[T] = 0;
        }
        ctx[n_seqs++] = n;
        q_start[n_seqs] = T;
        page_start[n_seqs] = at;
    }
    struct pl_batch b = {.n_tokens = T, .n_seqs = n_seqs, .pos = pos, .slot = slot, .q_start = q_start, .ctx = ctx, .page_start = page_start, .pages = pages};
    size_t skip = only > 0 ? (size_t)only * H * D : 0; /* each sequence has its own queries, alone or not */
    pl_view vq = new_view(m, T, H * D, H * D, q_all + skip), vo = new_view(m, T, H * D, H * D, NULL);
    must(ops->attn(m->dev, vo, vq, kv, 1, 1 / sqrtf((float)D), &b));
    read_view(m, vo, out);
    free_view(m, vq), free_view(m, vo);
    ops->kv_free(m->dev, kv);
    free(q_all), free(pos);
    return (size_t)T * H * D;
}

/* Turned queries, then what they find when they attend to the keys and values that were written with them. joined: all by one operation; else keys
 * are turned as queries are, and then written. */
static size_t run_rope(struct machine *m, const struct row *r, bool joined, float *out)
{
    enum { LAYER = 1, MOST = 64, PAGES = 5 };
    const struct pl_device_ops *ops = m->dev->ops;
    const uint32_t T = r->T, G = r->K >> 16, D = r->K & 0xffff, Q = r->N * D, K = G * D, n_dims = r->extra ? D / 2 : D;
    uint32_t at[MOST], pos[MOST], slot[MOST], q_start[] = {0, T}, page_start[] = {0, 2}, pages[] = {3, 1};
    const struct pl_kv_shape shape = {LAYER + 1, G, D, PL_KV_PAGE, PAGES, (pl_dtype)(r->kind >> 8)};
    struct pl_kvdev *kv;
    float *qkv = fill((size_t)T * (Q + 2 * K)), *freq = fill(n_dims / 2);
    for (uint32_t t = 0; t < T; t++) {
        at[t] = t * 37 % 4000;
        pos[t] = t;
        slot[t] = pages[t / PL_KV_PAGE] * PL_KV_PAGE + t % PL_KV_PAGE;
    }
    for (uint32_t i = 0; i < n_dims / 2; i++)
        freq[i] = powf(10000, -2.0f * (float)i / (float)n_dims);
    const struct pl_batch write = {.n_tokens = T, .pos = at, .slot = slot};
    const struct pl_batch read = {.n_tokens = T, .n_seqs = 1, .pos = pos, .slot = slot, .q_start = q_start, .ctx = &T, .page_start = page_start,
                                  .pages = pages};
    pl_view all = new_view(m, T, Q + 2 * K, Q + 2 * K + 7, qkv), vf = new_view(m, 1, n_dims / 2, n_dims / 2, freq), vo = new_view(m, T, Q, Q, NULL);
    const pl_view q = pl_view_cols(all, 0, Q), k = pl_view_cols(all, Q, K), v = pl_view_cols(all, Q + K, K);
    const struct pl_rotation rope = {(pl_rope_kind)(r->kind & 0xff), n_dims, vf};
    must(ops->kv_new(m->dev, &shape, &kv));
    must(ops->step_begin(m->dev, NULL));
    if (!joined) {
        const pl_view spare = new_view(m, T, K, K, qkv);
        must(ops->kv_write(m->dev, kv, LAYER, &rope, k, spare, v, &write));
        must(ops->kv_write(m->dev, kv, LAYER, &rope, q, spare, v, &write));
        free_view(m, spare);
        must(ops->kv_write(m->dev, kv, LAYER, NULL, pl_view_none(), k, v, &write));
    } else {
        must(ops->kv_write(m->dev, kv, LAYER, &rope, q, k, v, &write));
    }
    must(ops->attn(m->dev, vo, q, kv, LAYER, 1 / sqrtf((float)D), &read));
    must(ops->step_end(m->dev));
    read_view(m, q, out);
    read_view(m, vo, out + (size_t)T * Q);
    free_view(m, all), free_view(m, vf), free_view(m, vo);
    ops->kv_free(m->dev, kv);
    free(qkv), free(freq);
    return (size_t)2 * T * Q;
}

static uint64_t seed_of(const struct row *r)
{
    return 12345 + (uint64_t)r->op * 1000 + r->T * 10 + r->N;
}

static size_t run(struct machine *m, const struct row *r, float *out)
{
    if (device_is_cuda(m->name))
        emulated_reverse(m->reverse);
    seed = seed_of(r);
    switch (r->op) {
    case MATMUL: return run_matmul(m, r, out);
    case MATMUL_GLU: return run_matmul_glu(m, r, out);
    case EMBED: return run_embed(m, r, out);
    case ATTN: return run_attn_of(m, r, -1, out);
    case ROPE: return run_rope(m, r, true, out);
    default: return run_rows(m, r, out);
    }
}

/* ---- the table --------------------------------------------------------------------------------------------------------- */

#define GD(g, d) ((g) << 16 | (d))
#define CACHED(rope, type) ((rope) | (type) << 8)
static const uint32_t ctx_short[] = {1, 31, 32, 33, 5, 0}, ctx_long[] = {300, 700, 257, 40, 0}, ctx_one[] = {700, 0}, ctx_edge[] = {257, 0};

/* F16: the same; weights to 15 bits, and to 9 where 256 of them are equal */
#define ROUNDED16 2e-7
/* Q8_0: queries are rounded to 15 bits and weights to 14; where two sums differ in their last bit, a key may become another integer */
#define ROUNDED 1e-6

static const struct row fixed[] = {
    {NORM, PL_NORM_RMS, 5, 576, 0, false, 1e-11, NULL},  {NORM, PL_NORM_LAYER, 33, 100, 0, true, 1e-11, NULL},
    {NORM, PL_NORM_LAYER, 2, 48, 0, false, 1e-11, NULL}, {NORM, PL_NORM_LAYER, 3, 2112, 0, true, 1e-11, NULL},
    {MATMUL_GLU, PL_F32, 7, 37, 67, true, 1e-9, NULL},   {MATMUL_GLU, PL_Q4_1, 40, 1536, 96, false, 1e-9, NULL},
    {MATMUL_GLU, PL_Q4_1, 131, 80, 576, true, 1e-9, NULL}, {MATMUL_GLU, PL_Q6_K, 1, 64, 256, true, 1e-9, NULL},
    {ACT, PL_ACT_SILU, 1, 33, 0, false, 1e-11, NULL},    {ACT, PL_ACT_GELU_TANH, 9, 300, 0, false, 1e-11, NULL},
    {GATHER, 0, 9, 65, 0, false, 0, NULL},               {EMBED, PL_Q4_1, 5, 40, 64, false, 0, NULL},
    {EMBED, PL_F32, 5, 40, 64, true, 0, NULL},           {EMBED, PL_Q6_K, 3, 40, 256, true, 0, NULL},
    {ATTN, PL_F16, 5, 9, GD(3, 64), false, ROUNDED16, ctx_short}, {ATTN, PL_F32, 33, 4, GD(4, 16), false, 1e-10, ctx_long},
    {ATTN, PL_BF16, 17, 6, GD(2, 80), false, 1e-10, ctx_long}, {ATTN, PL_F16, 1, 9, GD(3, 64), false, ROUNDED16, ctx_one},
    {ATTN, PL_Q8_0, 5, 9, GD(3, 64), false, ROUNDED, ctx_short}, {ATTN, PL_Q8_0, 33, 4, GD(4, 16), false, ROUNDED, ctx_long},
    {ATTN, PL_Q8_0, 17, 6, GD(2, 80), false, ROUNDED, ctx_long}, {ATTN, PL_Q8_0, 1, 9, GD(3, 64), false, ROUNDED, ctx_one},
    {ATTN, PL_Q8_0, 3, 2, GD(1, 24), false, ROUNDED, ctx_short}, {ATTN, PL_Q8_0, 40, 9, GD(3, 128), false, ROUNDED, ctx_long},
    {MATMUL, PL_F32, 9, 19, 67, true, 1e-9, NULL},       {MATMUL, PL_F16, 3, 50, 1, false, 1e-9, NULL},
    {MATMUL, PL_BF16, 1, 1, 33, false, 1e-9, NULL},      {MATMUL, PL_Q4_1, 200, 600, 96, true, 1e-9, NULL},
    {ATTN, PL_F16, 3, 2, GD(1, 24), false, ROUNDED16, ctx_short}, {ATTN, PL_F16, 40, 9, GD(3, 64), false, ROUNDED16, ctx_long},
    /* the widest head and the most query heads of a key/value head; a width that is no multiple of 32 */
    {ATTN, PL_F16, 5, 16, GD(1, 256), false, ROUNDED16, ctx_long}, {ATTN, PL_F32, 3, 32, GD(2, 256), false, 1e-10, ctx_short},
    {ATTN, PL_BF16, 1, 16, GD(1, 256), false, 1e-10, ctx_one}, {ATTN, PL_Q8_0, 5, 16, GD(1, 256), false, ROUNDED, ctx_long},
    {ATTN, PL_F16, 17, 8, GD(2, 112), false, ROUNDED16, ctx_long}, {ATTN, PL_F32, 1, 8, GD(2, 112), false, 1e-10, ctx_one},
    {ATTN, PL_BF16, 5, 8, GD(2, 112), false, 1e-10, ctx_short}, {ATTN, PL_Q8_0, 17, 8, GD(2, 112), false, ROUNDED, ctx_long},
    {ATTN, PL_F8, 5, 9, GD(3, 64), false, 1e-10, ctx_short}, {ATTN, PL_F8, 17, 6, GD(2, 80), false, 1e-10, ctx_long},
    {ATTN, PL_F8, 1, 16, GD(1, 256), false, 1e-10, ctx_one}, {ATTN, PL_F8, 3, 2, GD(1, 24), false, 1e-10, ctx_short},
    {ATTN, PL_BF16, 1, 4, GD(2, 32), false, 1e-10, ctx_edge},
    {ROPE, CACHED(PL_ROPE_INTERLEAVED, PL_F32), 20, 6, GD(3, 64), false, 1e-11, NULL},
    {ROPE, CACHED(PL_ROPE_HALVES, PL_F32), 3, 5, GD(1, 16), false, 1e-11, NULL},
    {ROPE, CACHED(PL_ROPE_INTERLEAVED, PL_F32), 33, 16, GD(1, 256), true, 1e-11, NULL},
    {ROPE, CACHED(PL_ROPE_INTERLEAVED, PL_BF16), 1, 8, GD(2, 128), false, 1e-10, NULL},
    {ROPE, CACHED(PL_ROPE_HALVES, PL_F16), 40, 4, GD(4, 80), true, ROUNDED16, NULL},
    {ROPE, CACHED(PL_ROPE_HALVES, PL_Q8_0), 17, 9, GD(3, 64), false, ROUNDED, NULL},
    {ROPE, CACHED(PL_ROPE_INTERLEAVED, PL_Q8_0), 5, 2, GD(1, 24), true, ROUNDED, NULL},
    /* few rows of gates and their like, fused; rows whose lanes have several pieces and some that are left over */
    {MATMUL_GLU, PL_Q4_K, 3, 40, 512, false, 1e-9, NULL}, {MATMUL_GLU, PL_BF16, 1, 37, 2216, false, 1e-9, NULL},
    {MATMUL_GLU, PL_F16, 3, 41, 1064, false, 1e-9, NULL}, {MATMUL_GLU, PL_F32, 21, 9, 1100, false, 1e-9, NULL},
    {MATMUL, PL_F16, 2, 90, 1320, true, 1e-9, NULL},      {MATMUL, PL_BF16, 1, 70, 3080, false, 1e-9, NULL},
    /* rows of blocks so long that two and four warps share them, and have several pieces of them each */
    {MATMUL, PL_Q8_0, 1, 19, 3424, false, 1e-9, NULL},    {MATMUL, PL_Q4_K, 3, 21, 4864, true, 1e-9, NULL},
    {MATMUL, PL_Q6_K, 1, 9, 8960, false, 1e-9, NULL},     {MATMUL, PL_Q5_1, 7, 9, 8736, false, 1e-9, NULL},
    {MATMUL, PL_Q4_1, 20, 24, 8736, false, 1e-9, NULL},   {MATMUL_GLU, PL_Q4_K, 1, 24, 8960, false, 1e-9, NULL},
    {MATMUL, PL_Q4_K, 1, 61, 512, true, 1e-9, alike},     {MATMUL, PL_Q6_K, 7, 150, 4864, true, 1e-9, alike},
    {MATMUL, PL_Q8_0, 20, 37, 256, true, 1e-9, alike},
};
/* cuBLAS, which multiplies more rows than these with 16-bit weights, takes x rounded to their type, and chooses an algorithm by the number of rows. */
static bool is_cublas(const char *isa, pl_dtype t, uint32_t T)
{
    return device_is_cuda(isa) && T > 16 && (t == PL_F16 || t == PL_BF16);
}

/* Rounding x to n bits makes an error of 2^-2n / 3 of the square of its power of two, 0.43 of that of x: 2.2e-6 for the 8 bits of
 * bf16, 3.4e-8 for the 11 of f16. */
static double tolerance_of(const char *isa, const struct row *r)
{
    const bool second = r->extra && is_cublas(isa, PL_F16, r->T), product = r->op == MATMUL || r->op == MATMUL_GLU; /* the second part is of f16 */
    const double least = !product ? 0 : is_cublas(isa, (pl_dtype)r->kind, r->T) && r->kind == PL_BF16 ? 3e-6
                         : second || is_cublas(isa, (pl_dtype)r->kind, r->T) ? 6e-8 : 0;
    return r->tolerance > least ? r->tolerance : least;
}

static const pl_dtype dtypes[] = {PL_F32, PL_F16, PL_BF16, PL_Q4_0, PL_Q4_1, PL_Q5_0, PL_Q5_1, PL_Q8_0, PL_Q2_K, PL_Q3_K, PL_Q4_K, PL_Q5_K, PL_Q6_K};
static const uint32_t counts[] = {1, 2, 3, 5, 8, 13, 16, 31, 64};
static const char *const op_names[] = {"matmul", "matmul_glu", "norm", "rope", "act", "embed", "gather", "attn"};

static unsigned passed, failed, skipped;

static void check(bool ok, const char *isa, const struct row *r, const char *what, double error)
{
    passed += ok;
    failed += !ok;
    if (!ok)
        printf("FAILED %s %s kind %d T %u N %u K %u: %s %.3g (at most %.3g)\n", isa, op_names[r->op], r->kind, r->T, r->N, r->K, what, error, r->tolerance);
}

static double nmse(const float *a, const float *ref, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - ref[i]) * ((double)a[i] - ref[i]);
        s += (double)ref[i] * ref[i];
    }
    return d == 0 ? 0 : d / s;
}

static float *a, *b;

static void compare(struct machine *m, struct machine *ref, const char *isa, const struct row *given)
{
    struct row r = *given;
    r.tolerance = tolerance_of(isa, given);
    overrun = false;
    size_t n = run(m, &r, a);
    run(ref, &r, b);
    double e = nmse(a, b, n);
    check(e <= r.tolerance, isa, &r, "error", e);
    check(!overrun, isa, &r, "writes outside its rows", 0);
}

/* A row of the result alone has the bits that it has in the batch; and with another number of threads. */
static void invariant(struct machine *m, struct machine *other, const char *isa, const struct row *r)
{
    size_t n = run(m, r, a);
    run(other, r, b);
    check(memcmp(a, b, n * sizeof *a) == 0, isa, r, "differs with the number or order of threads", 0);
    if (r->op == ATTN && r->ctx[1] != 0) {
        size_t width = (size_t)r->N * (r->K & 0xffff);
        seed = seed_of(r);
        run_attn_of(m, r, 1, b);
        check(memcmp(a + width, b, width * sizeof *a) == 0, isa, r, "differs alone", 0);
    }
}

/* Matmul of T rows against each of its rows alone: inputs are made once and cut. */
static void rows_alone(struct machine *m, const char *isa, pl_dtype t, uint32_t T)
{
    if (is_cublas(isa, t, T))
        return;
    struct row r = {MATMUL, t, T, 37, 512, false, 0, NULL};
    void *data[2];
    seed = 99;
    struct pl_weight *w = new_weight(m, &r, data);
    float *x = fill((size_t)T * r.K);
    pl_view vx = new_view(m, T, r.K, r.K, x), vo = new_view(m, T, r.N, r.N, NULL), one = new_view(m, 1, r.N, r.N, NULL);
    must(m->dev->ops->matmul(m->dev, vo, vx, w, pl_view_none(), false));
    read_view(m, vo, a);
    bool same = true;
    for (uint32_t i = 0; i < T; i++) {
        must(m->dev->ops->matmul(m->dev, one, pl_view_rows(vx, i, 1), w, pl_view_none(), false));
        read_view(m, one, b);
        same &= memcmp(a + (size_t)i * r.N, b, r.N * sizeof *b) == 0;
    }
    check(same, isa, &r, "a row alone differs from the same row in a batch", 0);
    free_view(m, vx), free_view(m, vo), free_view(m, one);
    m->dev->ops->weight_free(m->dev, w);
    free(x), free(data[0]), free(data[1]);
}

static bool all_nan(const float *v, size_t n)
{
    bool nan = true;
    for (size_t i = 0; i < n; i++)
        nan &= v[i] != v[i];
    return nan;
}

/* A NaN in one row of a product makes that row NaN and leaves the others' bits alone. */
static void nan_in_matmul(struct machine *m, const char *isa, pl_dtype t)
{
    enum { T = 11, BAD = 4 };
    struct row r = {MATMUL, t, T, 37, 256, false, 0, NULL};
    void *data[2];
    seed = 7;
    struct pl_weight *w = new_weight(m, &r, data);
    float *x = fill((size_t)T * r.K), *result[2] = {a, b};
    pl_view vo = new_view(m, T, r.N, r.N, NULL);
    for (int bad = 0; bad < 2; bad++) {
        if (bad)
            x[BAD * r.K + 77] = NAN;
        pl_view vx = new_view(m, T, r.K, r.K, x);
        must(m->dev->ops->matmul(m->dev, vo, vx, w, pl_view_none(), false));
        read_view(m, vo, result[bad]);
        free_view(m, vx);
    }
    size_t at = (size_t)BAD * r.N, after = at + r.N, end = (size_t)T * r.N;
    check(all_nan(b + at, r.N), isa, &r, "a NaN got lost", 0);
    check(memcmp(a, b, at * sizeof *a) == 0 && memcmp(a + after, b + after, (end - after) * sizeof *a) == 0, isa, &r,
          "a NaN got into other rows", 0);
    free_view(m, vo);
    m->dev->ops->weight_free(m->dev, w);
    free(x), free(data[0]), free(data[1]);
}

/* Rows whose blocks have the greatest sums there are, of both signs, of the whole and of each half; no sum; nothing; a block a million
 * times the others; and less than counts. Each row for itself, since the largest would hide the others. */
static void extreme_sums(struct machine *m, struct machine *ref, const char *isa, pl_dtype t)
{
    enum { T = 7, K = 512 };
    struct row r = {MATMUL, t, T, 37, K, false, 1e-9, NULL};
    struct machine *machines[2] = {m, ref};
    float x[T * K], *result[2] = {a, b};
    seed = 11;
    for (uint32_t k = 0; k < K; k++) {
        const float v = normal();
        const float rows[T] = {1, -1, k % 32 < 16 ? 1 : -1, k % 2 ? 1 : -1, 0, k / 32 == 5 ? 1e6f * v : v, v * 0x1p-120f};
        for (uint32_t i = 0; i < T; i++)
            x[i * K + k] = rows[i];
    }
    for (int i = 0; i < 2; i++) {
        void *data[2];
        seed = 12;
        struct pl_weight *w = new_weight(machines[i], &r, data);
        pl_view vx = new_view(machines[i], T, K, K, x), vo = new_view(machines[i], T, r.N, r.N, NULL);
        must(machines[i]->dev->ops->matmul(machines[i]->dev, vo, vx, w, pl_view_none(), false));
        read_view(machines[i], vo, result[i]);
        free_view(machines[i], vx), free_view(machines[i], vo);
        machines[i]->dev->ops->weight_free(machines[i]->dev, w);
        free(data[0]), free(data[1]);
    }
    for (uint32_t i = 0; i < T; i++) {
        const double e = nmse(a + (size_t)i * r.N, b + (size_t)i * r.N, r.N);
        check(e <= r.tolerance, isa, &r, "extreme sums: error", e);
    }
}

/* A NaN in the key (or value) of one position makes the queries from there on NaN and leaves the earlier ones alone. */
static void nan_in_attn(struct machine *m, const char *isa, pl_dtype t)
{
    enum { T = 50, BAD = 38, H = 6, G = 2, D = 32 };
    const struct pl_device_ops *ops = m->dev->ops;
    struct row r = {ATTN, t, T, H, GD(G, D), false, 0, NULL};
    uint32_t pos[T], slot[T], q_start[] = {0, T}, page_start[] = {0, 2}, pages[] = {1, 0}, ctx[] = {T};
    for (uint32_t i = 0; i < T; i++)
        pos[i] = i, slot[i] = pages[i / PL_KV_PAGE] * PL_KV_PAGE + i % PL_KV_PAGE;
    struct pl_batch batch = {.n_tokens = T, .n_seqs = 1, .pos = pos, .slot = slot, .q_start = q_start, .ctx = ctx,
                             .page_start = page_start, .pages = pages};
    struct pl_kv_shape shape = {1, G, D, PL_KV_PAGE, 2, t};
    struct pl_kvdev *kv;
    must(ops->kv_new(m->dev, &shape, &kv));
    seed = 5;
    float *q = fill((size_t)T * H * D), *k = fill((size_t)T * G * D), *v = fill((size_t)T * G * D);
    pl_view vq = new_view(m, T, H * D, H * D, q), vo = new_view(m, T, H * D, H * D, NULL);
    for (int bad = 0; bad < 3; bad++) { /* nothing, a value, a key */
        for (size_t i = 0; bad > 0 && i < G * D; i++)
            (bad == 1 ? v : k)[(size_t)BAD * G * D + i] = NAN;
        pl_view vk = new_view(m, T, G * D, G * D, k), vv = new_view(m, T, G * D, G * D, v);
        must(ops->kv_write(m->dev, kv, 0, NULL, pl_view_none(), vk, vv, &batch));
        must(ops->attn(m->dev, vo, vq, kv, 0, 0.2f, &batch));
        read_view(m, vo, bad ? b : a);
        free_view(m, vk), free_view(m, vv);
        if (bad) {
            size_t at = (size_t)BAD * H * D;
            check(memcmp(a, b, at * sizeof *a) == 0, isa, &r, "a NaN got into earlier positions", bad);
            check(all_nan(b + at, (size_t)T * H * D - at), isa, &r, "a NaN got lost", bad);
        }
    }
    free_view(m, vq), free_view(m, vo);
    ops->kv_free(m->dev, kv);
    free(q), free(k), free(v);
}

/* A page's copy, gone on with from the middle, gives what the page itself gives; other pages and layers stay as they are. */
static void copied_page(struct machine *m, const char *isa, pl_dtype t)
{
    enum { T = 50, H = 6, G = 2, D = 32, L = 2, FROM = 40 };
    const struct pl_device_ops *ops = m->dev->ops;
    const struct row r = {ATTN, t, T, H, GD(G, D), false, 0, NULL};
    uint32_t pos[T], slot[T], q_start[] = {0, T}, page_start[] = {0, 2}, pages[] = {2, 0}, ctx[] = {T};
    struct pl_batch all = {.n_tokens = T, .n_seqs = 1, .pos = pos, .slot = slot, .q_start = q_start, .ctx = ctx, .page_start = page_start, .pages = pages};
    struct pl_batch rest = {.n_tokens = T - FROM, .slot = slot + FROM};
    struct pl_kv_shape shape = {L, G, D, PL_KV_PAGE, 4, t};
    struct pl_kvdev *kv;
    must(ops->kv_new(m->dev, &shape, &kv));
    seed = 6;
    float *q = fill((size_t)T * H * D), *k = fill((size_t)L * T * G * D), *v = fill((size_t)L * T * G * D);
    pl_view vq = new_view(m, T, H * D, H * D, q), vo = new_view(m, T, H * D, H * D, NULL);
    for (int copied = 0; copied < 2; copied++) {
        const uint32_t from = copied ? FROM : 0;
        if (copied)
            must(ops->kv_copy(m->dev, kv, 0, 3)), pages[1] = 3;
        for (uint32_t i = 0; i < T; i++)
            pos[i] = i, slot[i] = pages[i / PL_KV_PAGE] * PL_KV_PAGE + i % PL_KV_PAGE;
        for (uint32_t layer = 0; layer < L; layer++) {
            const size_t at = ((size_t)layer * T + from) * G * D;
            pl_view vk = new_view(m, T - from, G * D, G * D, k + at), vv = new_view(m, T - from, G * D, G * D, v + at);
            must(ops->kv_write(m->dev, kv, layer, NULL, pl_view_none(), vk, vv, copied ? &rest : &all));
            free_view(m, vk), free_view(m, vv);
        }
        for (uint32_t layer = 0; layer < L; layer++) {
            must(ops->attn(m->dev, vo, vq, kv, layer, 0.2f, &all));
            read_view(m, vo, (copied ? b : a) + (size_t)layer * T * H * D);
        }
    }
    check(memcmp(a, b, (size_t)L * T * H * D * sizeof *a) == 0, isa, &r, "a copied page differs", 0);
    pages[1] = 0;
    must(ops->attn(m->dev, vo, vq, kv, 1, 0.2f, &all));
    read_view(m, vo, b);
    check(memcmp(a + (size_t)T * H * D, b, (size_t)T * H * D * sizeof *a) == 0, isa, &r, "a page changed when it was copied", 0);
    free_view(m, vq), free_view(m, vo);
    ops->kv_free(m->dev, kv);
    free(q), free(k), free(v);
}

/* What turns and writes at once gives the bits of the two by themselves. */
static void turned_keys(struct machine *m, const char *isa, pl_rope_kind kind, pl_dtype t, bool part)
{
    const struct row rows[] = {{ROPE, CACHED(kind, t), 1, 4, GD(2, 64), part, 0, NULL}, {ROPE, CACHED(kind, t), 50, 3, GD(1, 40), part, 0, NULL}};
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        const size_t n = run(m, &rows[i], a);
        seed = seed_of(&rows[i]);
        run_rope(m, &rows[i], false, b);
        check(memcmp(a, b, n * sizeof *a) == 0, isa, &rows[i], "differs from turning and writing by themselves", 0);
    }
}

static void turned(struct machine *m, const char *isa)
{
    static const pl_dtype types[] = {PL_F32, PL_F16, PL_BF16, PL_Q8_0, PL_F8};
    for (size_t t = 0; t < PL_COUNT_OF(types); t++)
        for (int part = 0; part < 2 && (types[t] != PL_F8 || device_is_cuda(isa)); part++) {
            turned_keys(m, isa, PL_ROPE_INTERLEAVED, types[t], part);
            turned_keys(m, isa, PL_ROPE_HALVES, types[t], part);
        }
}

static void copies(struct machine *m, const char *isa)
{
    for (size_t d = 0; d < 3; d++) /* the float types come first */
        copied_page(m, isa, dtypes[d]);
    copied_page(m, isa, PL_Q8_0);
    if (device_is_cuda(isa))
        copied_page(m, isa, PL_F8);
}

static void nans(struct machine *m, const char *isa)
{
    for (size_t d = 0; d < PL_COUNT_OF(dtypes); d++)
        nan_in_matmul(m, isa, dtypes[d]);
    for (size_t d = 0; d < 3; d++) /* the float types come first */
        nan_in_attn(m, isa, dtypes[d]);
    nan_in_attn(m, isa, PL_Q8_0);
    if (device_is_cuda(isa))
        nan_in_attn(m, isa, PL_F8);
}

/* The reference product itself, against de-quantized weights in double: int8 activations account for what remains, about
 * (1/127)² / 12 of a block's largest value squared. */
static void reference(struct machine *ref, pl_dtype t)
{
    struct row r = {MATMUL, t, 4, 24, 512, false, pl_dtype_block(t) > 1 ? 2e-4 : 1e-12, NULL};
    void *data[2];
    size_t bytes = row_stride(t, r.K);
    run(ref, &r, a);
    seed = seed_of(&r);
    float *x = fill((size_t)r.T * r.K), *row = malloc(r.K * sizeof *row);
    free(fill(r.N)), free(fill((size_t)r.T * r.N));
    struct pl_weight *w = new_weight(ref, &r, data);
    for (uint32_t i = 0; i < r.N; i++) {
        pl_dequant_row(t, (uint8_t *)data[0] + i * bytes, row, r.K);
        for (uint32_t k = 0; k < r.T; k++) {
            double sum = 0;
            for (uint32_t j = 0; j < r.K; j++)
                sum += (double)row[j] * x[(size_t)k * r.K + j];
            b[(size_t)k * r.N + i] = (float)sum;
        }
    }
    double e = nmse(a, b, (size_t)r.T * r.N);
    check(e <= r.tolerance, "ref", &r, "error against double", e);
    ref->dev->ops->weight_free(ref->dev, w);
    free(x), free(row), free(data[0]), free(data[1]);
}

/* What the types of a cache change, against a cache of floats. */
static void cache_types(struct machine *ref)
{
    static const struct {
        pl_dtype type;
        double most;
    } types[] = {{PL_F16, 1e-7}, {PL_BF16, 2e-5}, {PL_Q8_0, 2e-4}};
    struct row r = {ATTN, PL_F32, 17, 9, GD(3, 64), false, 0, ctx_long};
    const size_t n = run(ref, &r, a);
    for (size_t i = 0; i < PL_COUNT_OF(types); i++) {
        r.kind = types[i].type;
        r.tolerance = types[i].most;
        run(ref, &r, b);
        const double e = nmse(a, b, n);
        check(e <= r.tolerance && e > r.tolerance / 100, "ref", &r, "error against a cache of floats", e);
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "perf") == 0)
        return ops_perf();
    if (argc > 2) {
        fputs("usage: ops [NAME | perf]\n", stderr);
        return 2;
    }
    const char *only = argc == 2 ? argv[1] : NULL;
    static const char *const isas[] = {"avx2", "avxvnni", "avx512", "cuda-emulated", "cuda"};
    struct machine ref = {0};
    a = calloc(MAX_FLOATS, sizeof *a);
    b = calloc(MAX_FLOATS, sizeof *b);
    if (a == NULL || b == NULL || !machine_open(&ref, "ref", 2))
        return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t d = 0; d < PL_COUNT_OF(dtypes) && only == NULL; d++)
        reference(&ref, dtypes[d]);
    if (only == NULL) {
        nans(&ref, "ref");
        copies(&ref, "ref");
        turned(&ref, "ref");
        cache_types(&ref);
    }
    ops_sample(only, &passed, &failed, &skipped);
    for (size_t i = 0; i < PL_COUNT_OF(isas); i++) {
        if (only != NULL && strcmp(only, isas[i]) != 0)
            continue;
        struct machine m = {0}, one = {0};
        if (!machine_open(&m, isas[i], 3) || !machine_open(&one, isas[i], 1)) {
            skipped++;
            machine_close(&m), machine_close(&one);
            continue;
        }
        for (size_t k = 0; k < PL_COUNT_OF(fixed); k++) {
            compare(&m, &ref, isas[i], &fixed[k]);
            invariant(&m, &one, isas[i], &fixed[k]);
        }
        for (size_t d = 0; d < PL_COUNT_OF(dtypes); d++)
            for (size_t c = 0; c < PL_COUNT_OF(counts); c++) {
                const struct row r = {MATMUL, dtypes[d], counts[c], 37 + 16 * (uint32_t)(c % 3), c % 2 ? 768 : 256, c % 3 == 1, 1e-9, NULL};
                compare(&m, &ref, isas[i], &r);
                invariant(&m, &one, isas[i], &r);
                rows_alone(&m, isas[i], dtypes[d], counts[c]);
            }
        nans(&m, isas[i]);
        for (size_t d = 0; d < PL_COUNT_OF(dtypes); d++)
            extreme_sums(&m, &ref, isas[i], dtypes[d]);
        copies(&m, isas[i]);
        turned(&m, isas[i]);
        machine_close(&m), machine_close(&one);
    }
    machine_close(&ref);
    ops_lora(only, &passed, &failed, &skipped);
    ops_narrow(only, &passed, &failed, &skipped);
    ops_ranks(only, &passed, &failed, &skipped);
    free(a), free(b);
    printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
    return failed != 0;
}
