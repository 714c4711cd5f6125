/* attn: the cache pages of the CPU device and attention over them.
 *
 * A query's context is cut into segments of a fixed number of pages, counted from position 0. Each segment gives a
 * maximum m, a sum s of exponentials and a weighted sum of values; segments are merged in order. That makes the result
 * independent of how the work is split: over queries, over heads, and (for long contexts with few queries) over segments.
 * Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, FlashAttention-2.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

/* ---- cache --------------------------------------------------------------------------------------------------------- */

static void measure(struct pl_kvdev *kv, const struct pl_kv_shape *s)
{
    kv->shape = *s;
    kv->element = pl_dtype_block_bytes(s->dtype);
    kv->head_bytes = 2 * (size_t)s->page_size * s->head_dim * kv->element;
    kv->page_bytes = kv->head_bytes * s->n_kv_heads;
    kv->layer_bytes = kv->page_bytes * s->n_pages;
    kv->bytes = kv->layer_bytes * s->n_layers;
}

size_t pl_cpu_kv_bytes(struct pl_device *dev, const struct pl_kv_shape *shape)
{
    (void)dev;
    struct pl_kvdev kv;
    measure(&kv, shape);
    return kv.bytes;
}

pl_status pl_cpu_kv_new(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out)
{
    (void)dev;
    bool known = shape->dtype == PL_F32 || shape->dtype == PL_F16 || shape->dtype == PL_BF16;
    if (!known || shape->page_size != PL_CPU_PAGE || shape->head_dim > PL_CPU_MAX_DIM)
        return PL_ENOTSUP;
    struct pl_kvdev *kv = calloc(1, sizeof *kv);
    if (kv == NULL)
        return PL_ENOMEM;
    measure(kv, shape);
    kv->data = pl_cpu_alloc(kv->bytes);
    if (kv->data == NULL) {
        free(kv);
        return PL_ENOMEM;
    }
    *out = kv;
    return PL_OK;
}

void pl_cpu_kv_free(struct pl_device *dev, struct pl_kvdev *kv)
{
    (void)dev;
    if (kv == NULL)
        return;
    pl_cpu_release(kv->data, kv->bytes);
    free(kv);
}

static uint8_t *head_page(const struct pl_kvdev *kv, uint32_t layer, uint32_t page, uint32_t head)
{
    return kv->data + layer * kv->layer_bytes + page * kv->page_bytes + head * kv->head_bytes;
}

enum { KV_TOKENS = 16 }; /* of a work item */

struct kv_job {
    const struct pl_cpu_kernels *kernels;
    struct pl_kvdev *kv;
    uint32_t layer;
    pl_view k, v;
    const struct pl_batch *b;
};

static void write_token(const struct kv_job *j, uint32_t t)
{
    const struct pl_kv_shape *s = &j->kv->shape;
    uint32_t page = j->b->slot[t] / s->page_size, at = j->b->slot[t] % s->page_size, D = s->head_dim;
    size_t element = j->kv->element;
    uint8_t narrow[PL_CPU_MAX_DIM * sizeof(float)];
    for (uint32_t h = 0; h < s->n_kv_heads; h++) {
        uint8_t *k = head_page(j->kv, j->layer, page, h), *v = k + j->kv->head_bytes / 2;
        j->kernels->narrow(s->dtype, pl_cpu_row(j->k, t) + h * D, D, narrow);
        for (uint32_t d = 0; d < D; d++)
            memcpy(k + ((size_t)d * s->page_size + at) * element, narrow + d * element, element);
        j->kernels->narrow(s->dtype, pl_cpu_row(j->v, t) + h * D, D, v + at * D * element);
    }
}

static void kv_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct kv_job *j = arg;
    uint32_t from = (uint32_t)item * KV_TOKENS;
    for (uint32_t t = from; t < from + KV_TOKENS && t < j->b->n_tokens; t++)
        write_token(j, t);
}

pl_status pl_cpu_kv_write(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, pl_view k, pl_view v,
                          const struct pl_batch *b)
{
    struct kv_job j = {pl_cpu_of(dev)->k, kv, layer, k, v, b};
    pl_pool_run(pl_cpu_of(dev)->pool, kv_item, &j, (b->n_tokens + KV_TOKENS - 1) / KV_TOKENS);
    return PL_OK;
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

enum { SEGMENT_TOKENS = PL_CPU_SEGMENT * PL_CPU_PAGE, MAX_QUERIES = PL_CPU_MAX_QUERIES };

struct attn_job {
    struct pl_cpu *cpu;
    const struct pl_kvdev *kv;
    const struct pl_batch *b;
    pl_view out, q;
    uint32_t layer, per_kv, rows_per_tile; /* query heads of a key/value head; tokens of a work item */
    float scale;
    bool quant; /* rows of out too: the columns of one key/value head at a time */
};

/* Where tile number i is: its sequence and first token. Tiles never cross sequences. */
static void find_tile(const struct attn_job *j, size_t tile, uint32_t *seq, uint32_t *token)
{
    uint32_t s = 0;
    for (;; s++) {
        uint32_t n = (j->b->q_start[s + 1] - j->b->q_start[s] + j->rows_per_tile - 1) / j->rows_per_tile;
        if (tile < n)
            break;
        tile -= n;
    }
    *seq = s;
    *token = j->b->q_start[s] + (uint32_t)tile * j->rows_per_tile;
}

static size_t count_tiles(const struct attn_job *j)
{
    size_t n = 0;
    for (uint32_t s = 0; s < j->b->n_seqs; s++)
        n += (j->b->q_start[s + 1] - j->b->q_start[s] + j->rows_per_tile - 1) / j->rows_per_tile;
    return n;
}

/* Queries [from, to) of the tile (token-major, then head) over segment g; results go to a->max, sum, acc. */
static void run_segment(const struct attn_job *j, struct pl_cpu_attn *a, uint32_t seq, uint32_t head, uint32_t token,
                        uint32_t n_tokens, uint32_t segment)
{
    const struct pl_kv_shape *s = &j->kv->shape;
    uint32_t start = segment * SEGMENT_TOKENS, n_table = j->b->page_start[seq + 1] - j->b->page_start[seq];
    const uint32_t *table = j->b->pages + j->b->page_start[seq];
    a->dtype = s->dtype;
    a->head_dim = s->head_dim;
    a->scale = j->scale;
    a->n_q = 0;
    uint32_t most = 0;
    for (uint32_t t = token; t < token + n_tokens; t++) {
        uint32_t end = j->b->pos[t] + 1;
        uint32_t n = end <= start ? 0 : end - start < SEGMENT_TOKENS ? end - start : SEGMENT_TOKENS;
        for (uint32_t h = 0; n > 0 && h < j->per_kv; h++) {
            a->q[a->n_q] = pl_cpu_row(j->q, t) + (size_t)(head * j->per_kv + h) * s->head_dim;
            a->n_pos[a->n_q++] = n;
        }
        most = n > most ? n : most;
    }
    a->n_pages = (most + PL_CPU_PAGE - 1) / PL_CPU_PAGE;
    for (uint32_t p = 0; p < a->n_pages; p++) {
        uint32_t at = segment * PL_CPU_SEGMENT + p;
        a->pages[p] = head_page(j->kv, j->layer, table[at < n_table ? at : n_table - 1], head);
    }
    if (a->n_q > 0)
        j->cpu->k->attn(a);
}

/* Running total over segments; the first one is taken as it is. */
struct merged {
    float max, sum;
};

static void merge(struct merged *m, float *total, float max, float sum, const float *acc, uint32_t n)
{
    float new_max = fmaxf(m->max, max), c_old = expf(m->max - new_max), c_new = expf(max - new_max);
    m->sum = m->sum * c_old + sum * c_new;
    m->max = new_max;
    for (uint32_t d = 0; d < n; d++)
        total[d] = total[d] * c_old + acc[d] * c_new;
}

/* A tile of tokens × one key/value head, all segments in order. */
static void tile_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct attn_job *j = arg;
    uint32_t G = j->kv->shape.n_kv_heads, D = j->kv->shape.head_dim, seq, token;
    uint32_t head = (uint32_t)(item % G);
    find_tile(j, item / G, &seq, &token);
    uint32_t end = j->b->q_start[seq + 1], n_tokens = end - token < j->rows_per_tile ? end - token : j->rows_per_tile;
    _Alignas(64) float acc[MAX_QUERIES][PL_CPU_MAX_DIM];
    struct pl_cpu_attn a;
    struct merged m[MAX_QUERIES];
    float *total[MAX_QUERIES];
    uint32_t n_q = n_tokens * j->per_kv, last = j->b->pos[token + n_tokens - 1] / SEGMENT_TOKENS;
    for (uint32_t i = 0; i < n_q; i++)
        total[i] = pl_cpu_row(j->out, token + i / j->per_kv) + (size_t)(head * j->per_kv + i % j->per_kv) * D;
    for (uint32_t g = 0; g <= last; g++) {
        for (uint32_t i = 0; i < n_q; i++)
            a.acc[i] = g == 0 ? total[i] : acc[i];
        run_segment(j, &a, seq, head, token, n_tokens, g);
        for (uint32_t i = 0, done = n_q - a.n_q; i < a.n_q; i++) {
            /* queries that see this segment are the tile's last ones: positions ascend */
            if (g == 0)
                m[i + done] = (struct merged){a.max[i], a.sum[i]};
            else
                merge(&m[i + done], total[i + done], a.max[i], a.sum[i], a.acc[i], D);
        }
    }
    for (uint32_t i = 0; i < n_q; i++)
        for (uint32_t d = 0; d < D; d++)
            total[i][d] /= m[i].sum;
    for (uint32_t t = 0; j->quant && t < n_tokens; t++)
        pl_cpu_quant(j->cpu, j->out, token + t, head * j->per_kv * D, j->per_kv * D);
}

/* Decoding few sequences with long contexts: an item is one (token, head, segment). Work of item i:
 * attn_work[i] = per_kv × (max, sum, acc[D]). */
struct split_job {
    struct attn_job *j;
    uint32_t n_segments; /* of the longest context */
    size_t stride;
};

static void split_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct split_job *s = arg;
    const struct attn_job *j = s->j;
    uint32_t G = j->kv->shape.n_kv_heads, D = j->kv->shape.head_dim, seq, token;
    uint32_t segment = (uint32_t)(item % s->n_segments), head = (uint32_t)(item / s->n_segments % G);
    find_tile(j, item / s->n_segments / G, &seq, &token);
    if (segment > j->b->pos[token] / SEGMENT_TOKENS)
        return;
    float *work = j->cpu->attn_work + item * s->stride;
    struct pl_cpu_attn a;
    for (uint32_t h = 0; h < j->per_kv; h++)
        a.acc[h] = work + h * (size_t)(D + 2) + 2;
    run_segment(j, &a, seq, head, token, 1, segment);
    for (uint32_t h = 0; h < j->per_kv; h++) {
        work[h * (size_t)(D + 2)] = a.max[h];
        work[h * (size_t)(D + 2) + 1] = a.sum[h];
    }
}

static void join_splits(const struct split_job *s, size_t tile)
{
    const struct attn_job *j = s->j;
    uint32_t G = j->kv->shape.n_kv_heads, D = j->kv->shape.head_dim, seq, token;
    find_tile(j, tile, &seq, &token);
    for (uint32_t head = 0; head < G; head++)
        for (uint32_t h = 0; h < j->per_kv; h++) {
            float *out = pl_cpu_row(j->out, token) + (size_t)(head * j->per_kv + h) * D;
            struct merged m = {0};
            for (uint32_t g = 0; g <= j->b->pos[token] / SEGMENT_TOKENS; g++) {
                const float *w = j->cpu->attn_work + ((tile * G + head) * s->n_segments + g) * s->stride + h * (size_t)(D + 2);
                if (g == 0) {
                    m = (struct merged){w[0], w[1]};
                    memcpy(out, w + 2, D * sizeof *out);
                } else {
                    merge(&m, out, w[0], w[1], w + 2, D);
                }
            }
            for (uint32_t d = 0; d < D; d++)
                out[d] /= m.sum;
        }
    if (j->quant)
        pl_cpu_quant(j->cpu, j->out, token, 0, j->out.cols);
}

pl_status pl_cpu_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                         const struct pl_batch *b)
{
    const struct pl_kv_shape *shape = &kv->shape;
    struct attn_job j = {.cpu = pl_cpu_of(dev), .kv = kv, .b = b, .out = out, .q = q, .layer = layer, .rows_per_tile = 1,
                         .per_kv = q.cols / shape->head_dim / shape->n_kv_heads, .scale = scale};
    if (j.per_kv == 0 || j.per_kv > MAX_QUERIES)
        return PL_ENOTSUP;
    j.quant = pl_cpu_writes(out);
    if (j.per_kv * shape->head_dim % 32 != 0) {
        j.quant = false;
        out.buf->n_quantized = 0;
    }
    uint32_t longest = 0;
    for (uint32_t s = 0; s < b->n_seqs; s++)
        longest = b->ctx[s] > longest ? b->ctx[s] : longest;
    struct split_job split = {&j, (longest + SEGMENT_TOKENS - 1) / SEGMENT_TOKENS, j.per_kv * ((size_t)shape->head_dim + 2)};
    size_t items = (size_t)b->n_tokens * shape->n_kv_heads;
    if (split.n_segments > 1 && items < 4 * (size_t)pl_pool_size(j.cpu->pool)) {
        if (pl_cpu_grow(&j.cpu->attn_work, &j.cpu->attn_cap, items * split.n_segments * split.stride) != PL_OK)
            return PL_ENOMEM;
        pl_pool_run(j.cpu->pool, split_item, &split, items * split.n_segments);
        for (size_t t = 0; t < b->n_tokens; t++)
            join_splits(&split, t);
        return PL_OK;
    }
    j.rows_per_tile = MAX_QUERIES / j.per_kv;
    pl_pool_run(j.cpu->pool, tile_item, &j, count_tiles(&j) * shape->n_kv_heads);
    return PL_OK;
}
