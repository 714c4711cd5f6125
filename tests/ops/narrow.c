/* narrow: what is made for one product alone, and may be kept in another form until then (only_for), gives the same bits as what is not.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/narrow.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/device/device.h"
#include "core/kv/kv.h"
#include "tests/tools/emulated.h"

/* A product with K inputs, and what makes them: a norm of [T, K], a gate of [T, IN], or attention of H heads over a context. */
enum { MAX_T = 40, N = 52, FIRST = 20, IN = 48, H = 4, G = 2, CONTEXT = 200 };

static uint64_t state;

static float *fill(size_t n)
{
    float *v = pl_xmalloc(n * sizeof *v);
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        v[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
    return v;
}

static void must(pl_status st)
{
    if (st != PL_OK) {
        printf("an operation failed: %s\n", pl_status_text(st));
        exit(1);
    }
}

static struct pl_weight *new_weight(struct pl_device *dev, pl_dtype first, pl_dtype second, uint32_t n_first, uint32_t n, uint32_t K)
{
    struct pl_weight_src parts[2] = {{.dtype = first, .rows = n_first, .cols = K}, {.dtype = second, .rows = n - n_first, .cols = K}};
    struct pl_weight *w;
    void *data[2];
    for (int p = 0; p < 2; p++) {
        const size_t bytes = pl_dtype_row_bytes(parts[p].dtype, K);
        float *v = fill((size_t)parts[p].rows * K);
        data[p] = pl_xmalloc(bytes * parts[p].rows);
        for (uint32_t r = 0; r < parts[p].rows; r++)
            pl_quant_row(parts[p].dtype, v + (size_t)r * K, (uint8_t *)data[p] + r * bytes, K);
        parts[p].data = data[p];
        free(v);
    }
    must(dev->ops->weight_new(dev, parts, 2, &w, NULL));
    free(data[0]), free(data[1]);
    return w;
}

static pl_view new_view(struct pl_device *dev, uint32_t rows, uint32_t cols)
{
    struct pl_dbuf *buf;
    float *v = fill((size_t)rows * cols);
    must(dev->ops->buf_new(dev, (size_t)rows * cols, &buf));
    must(dev->ops->put(dev, buf, 0, v, (size_t)rows * cols));
    free(v);
    return (pl_view){buf, 0, rows, cols, cols};
}

struct world {
    struct pl_device *dev;
    uint32_t T, K;
    pl_view x, gain, h, in, q, out, bias;
    struct pl_weight *w, *gate;
    struct pl_kvdev *kv;
    struct pl_batch batch;
    uint32_t pos[MAX_T], slot[CONTEXT], q_start[2], ctx[1], page_start[2], pages[CONTEXT / PL_KV_PAGE + 1];
};

static void fill_cache(struct world *w)
{
    const uint32_t D = w->K / H;
    const struct pl_kv_shape shape = {1, G, D, PL_KV_PAGE, PL_COUNT_OF(w->pages), PL_F16};
    must(w->dev->ops->kv_new(w->dev, &shape, &w->kv));
    for (uint32_t i = 0; i < PL_COUNT_OF(w->pages); i++)
        w->pages[i] = i;
    for (uint32_t i = 0; i < CONTEXT; i++)
        w->slot[i] = i;
    const pl_view k = new_view(w->dev, CONTEXT, G * D), v = new_view(w->dev, CONTEXT, G * D);
    must(w->dev->ops->kv_write(w->dev, w->kv, 0, NULL, pl_view_none(), k, v, &(struct pl_batch){.n_tokens = CONTEXT, .slot = w->slot}));
    w->dev->ops->buf_free(w->dev, k.buf), w->dev->ops->buf_free(w->dev, v.buf);
}

static void attention(struct world *w, uint32_t context)
{
    for (uint32_t t = 0; t < w->T; t++)
        w->pos[t] = context - w->T + t;
    w->q_start[1] = w->T, w->ctx[0] = context, w->page_start[1] = (context + PL_KV_PAGE - 1) / PL_KV_PAGE;
    w->batch = (struct pl_batch){.n_tokens = w->T, .n_seqs = 1, .pos = w->pos, .slot = w->slot, .q_start = w->q_start, .ctx = w->ctx,
                                 .page_start = w->page_start, .pages = w->pages};
    must(w->dev->ops->attn(w->dev, w->h, w->q, w->kv, 0, 0.3f, &w->batch));
}

/* h by one of the operations, then the product with it. */
static void run(struct world *w, int which, bool told, float *out)
{
    const struct pl_device_ops *ops = w->dev->ops;
    const size_t n = (size_t)w->T * (w->K > N ? w->K : N);
    float *before = pl_xmalloc(n * sizeof *before);
    for (size_t k = 0; k < n; k++)
        before[k] = NAN;
    must(ops->put(w->dev, w->h.buf, 0, before, (size_t)w->T * w->K)); /* what an earlier run left there is not to be found */
    for (size_t k = 0; k < (size_t)w->T * N; k++)
        before[k] = (float)k / N;
    must(ops->put(w->dev, w->out.buf, 0, before, (size_t)w->T * N));
    if (told)
        ops->only_for(w->dev, w->w);
    switch (which) {
    case 0: must(ops->norm(w->dev, PL_NORM_LAYER, w->h, w->x, w->gain, w->gain, 1e-5f)); break;
    case 1: must(ops->matmul_glu(w->dev, PL_ACT_SILU, w->h, w->in, w->gate, pl_view_none(), NULL)); break;
    case 2: attention(w, MAX_T); break;
    default: attention(w, CONTEXT);
    }
    must(ops->matmul(w->dev, w->out, w->h, w->w, which % 2 ? w->bias : pl_view_none(), which > 1));
    must(ops->get(w->dev, w->out.buf, 0, out, (size_t)w->T * N));
    free(before);
}

static void check_shape(struct pl_device *dev, const char *isa, uint32_t T, uint32_t K, pl_dtype first, pl_dtype second, unsigned *passed, unsigned *failed)
{
    struct world w = {.dev = dev, .T = T, .K = K};
    float got[2][MAX_T * N];
    state = T + K;
    w.x = new_view(dev, T, K), w.gain = new_view(dev, 1, K), w.h = new_view(dev, T, K), w.in = new_view(dev, T, IN), w.q = new_view(dev, T, K);
    w.out = new_view(dev, T, N), w.bias = new_view(dev, 1, N);
    w.w = new_weight(dev, first, second, FIRST, N, K), w.gate = new_weight(dev, PL_BF16, PL_BF16, K, 2 * K, IN);
    const bool heads = K % (8 * H) == 0;
    if (heads)
        fill_cache(&w);
    for (int which = 0; which < (heads ? 4 : 2); which++) {
        run(&w, which, false, got[0]);
        run(&w, which, true, got[1]);
        const bool same = memcmp(got[0], got[1], (size_t)T * N * sizeof *got[0]) == 0;
        *(same ? passed : failed) += 1;
        if (!same)
            printf("FAILED %s narrow T %u K %u, types %d and %d, operation %d: other bits\n", isa, T, K, (int)first, (int)second, which);
    }
    const pl_view views[] = {w.x, w.gain, w.h, w.in, w.q, w.out, w.bias};
    for (size_t i = 0; i < PL_COUNT_OF(views); i++)
        dev->ops->buf_free(dev, views[i].buf);
    dev->ops->weight_free(dev, w.w), dev->ops->weight_free(dev, w.gate);
    if (heads)
        dev->ops->kv_free(dev, w.kv);
}

void ops_narrow(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped)
{
    static const char *const isas[] = {"cuda-emulated", "cuda", "avx2", "avxvnni", "avx512"};
    static const uint32_t counts[] = {5, 17, MAX_T}, widths[] = {67, 128, 520}, blocks[] = {128, 576};
    struct pl_pool *pool = NULL;
    struct pl_err err;
    if (pl_pool_new(&pool, 1, &err) != PL_OK)
        ++*failed;
    for (size_t i = 0; pool != NULL && i < PL_COUNT_OF(isas); i++) {
        struct pl_device *dev = NULL;
        if (only != NULL && strcmp(only, isas[i]) != 0)
            continue;
        if (device_open(&dev, pool, isas[i], &err) != PL_OK) {
            ++*skipped;
            continue;
        }
        for (size_t t = 0; t < PL_COUNT_OF(counts) && !device_is_cuda(isas[i]); t++)
            for (size_t k = 0; k < PL_COUNT_OF(blocks); k++) {
                check_shape(dev, isas[i], counts[t], blocks[k], PL_Q4_1, PL_Q8_0, passed, failed);
                check_shape(dev, isas[i], counts[t], blocks[k], PL_Q4_1, PL_F16, passed, failed);
            }
        for (size_t t = 0; t < PL_COUNT_OF(counts) && device_is_cuda(isas[i]); t++)
            for (size_t k = 0; k < PL_COUNT_OF(widths); k++) {
                check_shape(dev, isas[i], counts[t], widths[k], PL_BF16, PL_BF16, passed, failed);
                if (t == 1)
                    check_shape(dev, isas[i], counts[t], widths[k], PL_BF16, k == 0 ? PL_F32 : PL_F16, passed, failed);
            }
        dev->ops->close(dev);
    }
    pl_pool_free(pool);
}
