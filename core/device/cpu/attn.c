/* attn: attention of the CPU device over its cache.
 *
 * A query's context is cut into segments of a fixed number of pages, counted from position 0. Each segment gives a
 * maximum m, a sum s of exponentials and a weighted sum of values; segments are merged in order. That makes the result
 * independent of how the work is split: over queries, over heads, and (for long contexts with few queries) over segments.
 * Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, FlashAttention-2.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

enum { SEGMENT_TOKENS = PL_CPU_SEGMENT * PL_CPU_PAGE, MAX_QUERIES = PL_CPU_MAX_QUERIES };
enum {
    SPLIT_BELOW = 4, /* (tile, head) pairs per thread below which contexts are split */
    RUN = 4,         /* segments of an item then */
    ASK_FROM = 8,    /* sequences from which products have time to ask for the next layer's pages */
    ASK_LINES = 144  /* with a unit of 32 outputs */
};

/* Tokens of one sequence whose queries are computed together */
struct tile {
    uint32_t seq, token, n_tokens, n_segments;
};

/* Grows with the largest batch and context seen. */
struct pl_cpu_attn_plan {
    struct tile *tiles;
    atomic_uint *left; /* segments of a (tile, head) that are not done */
    size_t tiles_cap, left_cap;
};

struct attn_job {
    struct pl_cpu *cpu;
    struct pl_cpu_attn_plan *plan;
    const struct pl_kvdev *kv;
    const struct pl_batch *b;
    pl_view out, q;
    uint32_t layer, per_kv; /* query heads of a key/value head */
    uint32_t n_tiles, n_segments; /* of the longest context */
    uint32_t n_rows;              /* tokens of the largest tile */
    size_t width;                 /* floats of a query's part of a segment's result in attn_work: acc[D], on whole lines, max, sum */
    size_t stride;                /* of a segment's result: [queries of a tile][width] */
    float scale;
    bool quant; /* rows of out too: the columns of one key/value head at a time */
    bool only;  /* nobody reads out itself */
    bool note;  /* what the next layer will read */
};

void pl_cpu_attn_free(struct pl_cpu *cpu)
{
    struct pl_cpu_attn_plan *w = cpu->attn_plan;
    if (w == NULL)
        return;
    free(w->tiles);
    free(w->left);
    free(w);
}

static bool grow(void **p, size_t *cap, size_t n, size_t size)
{
    if (n <= *cap)
        return true;
    void *q = realloc(*p, n * size);
    if (q == NULL)
        return false;
    *p = q;
    *cap = n;
    return true;
}

/* Cuts the batch into tiles of at most `rows` tokens that never cross sequences. */
static bool make_tiles(struct attn_job *j, uint32_t rows)
{
    const struct pl_batch *b = j->b;
    struct pl_cpu_attn_plan *w = j->plan;
    if (!grow((void **)&w->tiles, &w->tiles_cap, b->n_tokens, sizeof *w->tiles))
        return false;
    for (uint32_t s = 0; s < b->n_seqs; s++)
        for (uint32_t t = b->q_start[s], end = b->q_start[s + 1]; t < end; t += rows) {
            const uint32_t n = end - t < rows ? end - t : rows, segments = b->pos[t + n - 1] / SEGMENT_TOKENS + 1;
            w->tiles[j->n_tiles++] = (struct tile){s, t, n, segments};
            j->n_segments = segments > j->n_segments ? segments : j->n_segments;
            j->n_rows = n > j->n_rows ? n : j->n_rows;
        }
    return true;
}

/* ---- one tile and one key/value head ------------------------------------------------------------------------------- */

struct item {
    const struct tile *tile;
    size_t pair; /* tile and head */
    uint32_t head, n_q;
    struct pl_cpu_query q[MAX_QUERIES]; /* token-major, then head */
    uint32_t end[MAX_QUERIES];          /* positions that it sees: ascending */
    _Alignas(64) float own[MAX_QUERIES * PL_CPU_MAX_DIM]; /* results that nobody reads but to quantize them, as in a row of out */
};

static void open_item(const struct attn_job *j, struct item *it, size_t pair)
{
    const uint32_t D = j->kv->shape.head_dim, bits = j->kv->layout.rotate_bits;
    const uint32_t head = (uint32_t)(pair % j->kv->shape.n_kv_heads);
    _Alignas(64) float rotated[PL_CPU_MAX_DIM];
    it->tile = &j->plan->tiles[pair / j->kv->shape.n_kv_heads];
    it->pair = pair;
    it->head = head;
    it->n_q = it->tile->n_tokens * j->per_kv;
    for (uint32_t i = 0; i < it->n_q; i++) {
        const uint32_t t = it->tile->token + i / j->per_kv;
        const float *x = pl_cpu_row(j->q, t) + (size_t)(head * j->per_kv + i % j->per_kv) * D;
        if (bits > 0) {
            memcpy(rotated, x, D * sizeof *x);
            j->cpu->k->rotate(rotated, D, bits);
            x = rotated;
        }
        j->cpu->k->query(&j->kv->layout, x, &it->q[i]);
        it->end[i] = j->b->pos[t] + 1;
    }
}

/* A segment of a (tile, head); those of all pairs in order are what a worker reads one after the other, over the ends of its items. */
struct place {
    size_t pair;
    uint32_t segment;
};

static struct place place_after(const struct attn_job *j, struct place at)
{
    const bool last = at.segment + 1 == j->plan->tiles[at.pair / j->kv->shape.n_kv_heads].n_segments;
    return last ? (struct place){at.pair + 1, 0} : (struct place){at.pair, at.segment + 1};
}

/* This place's pages, NULL beyond the end */
static void pages_at(const struct attn_job *j, struct place at, const uint8_t *pages[PL_CPU_SEGMENT])
{
    const size_t tile = at.pair / j->kv->shape.n_kv_heads;
    const uint32_t head = (uint32_t)(at.pair % j->kv->shape.n_kv_heads);
    uint32_t n = 0, from = 0;
    if (tile < j->n_tiles) {
        const uint32_t seq = j->plan->tiles[tile].seq;
        from = j->b->page_start[seq] + at.segment * PL_CPU_SEGMENT;
        n = j->b->page_start[seq + 1] - from;
    }
    for (uint32_t p = 0; p < PL_CPU_SEGMENT; p++)
        pages[p] = p < n ? pl_cpu_head_page(j->kv, j->layer, j->b->pages[from + p], head) : NULL;
}

/* The first query that sees segment g */
static uint32_t first_query(const struct item *it, uint32_t g)
{
    uint32_t first = 0;
    while (it->end[first] <= g * SEGMENT_TOKENS)
        first++;
    return first;
}

/* Segment g for the queries from `first` on: results go to a->max, sum, acc. */
static void run_segment(const struct attn_job *j, const struct item *it, struct pl_cpu_attn *a, uint32_t first, uint32_t g)
{
    const uint32_t start = g * SEGMENT_TOKENS;
    const struct place here = {it->pair, g};
    a->layout = &j->kv->layout;
    a->scale = j->scale;
    a->q = it->q + first;
    a->n_q = it->n_q - first;
    for (uint32_t i = 0; i < a->n_q; i++) {
        const uint32_t n = it->end[first + i] - start;
        a->n_pos[i] = n < SEGMENT_TOKENS ? n : SEGMENT_TOKENS;
    }
    a->n_pages = (a->n_pos[a->n_q - 1] + PL_CPU_PAGE - 1) / PL_CPU_PAGE;
    pages_at(j, here, a->pages);
    pages_at(j, place_after(j, here), a->ahead);
    j->cpu->k->attn(a);
}

/* Running total over segments; the first one is taken as it is. */
struct merged {
    float max, sum;
};

static void merge(const struct attn_job *j, struct merged *m, float *total, float max, float sum, const float *acc)
{
    const bool larger = max > m->max;
    const float c_old = larger ? expf(m->max - max) : 1, c_new = larger ? 1 : expf(max - m->max);
    m->sum = m->sum * c_old + sum * c_new;
    m->max = larger ? max : m->max;
    j->cpu->k->blend(total, c_old, acc, c_new, j->kv->shape.head_dim);
}

static float *result_of(const struct attn_job *j, struct item *it, uint32_t i)
{
    if (j->only)
        return it->own + (size_t)i * j->kv->shape.head_dim;
    return pl_cpu_row(j->out, it->tile->token + i / j->per_kv) + (size_t)(it->head * j->per_kv + i % j->per_kv) * j->kv->shape.head_dim;
}

/* Makes results of weighted sums. */
static void finish(const struct attn_job *j, struct item *it, const struct merged *m)
{
    const uint32_t D = j->kv->shape.head_dim, width = j->per_kv * D, bits = j->kv->layout.rotate_bits;
    for (uint32_t i = 0; i < it->n_q; i++) {
        float *out = result_of(j, it, i);
        const float inverse = 1 / m[i].sum;
        for (uint32_t d = 0; d < D; d++)
            out[d] *= inverse;
        if (bits > 0)
            j->cpu->k->rotate(out, D, bits);
    }
    for (uint32_t t = 0; j->quant && t < it->tile->n_tokens; t++)
        pl_cpu_quant(j->cpu, j->out, it->tile->token + t, it->head * width, width, result_of(j, it, t * j->per_kv));
}

/* ---- the next layer's pages ------------------------------------------------------------------------------------------ */

static void note(struct pl_cpu_soon *s, const uint8_t *from, size_t bytes)
{
    const uint32_t lines = (uint32_t)((bytes + 63) / 64);
    if (s->n == PL_CPU_SOON || s->left + lines > PL_CPU_SOON_LINES)
        return;
    s->piece[s->n].from = from;
    s->piece[s->n++].lines = lines;
    s->left += lines;
}

/* When a good part of what will be read can be near by then. */
static bool worth_asking(const struct attn_job *j)
{
    size_t pages = 0;
    for (uint32_t s = 0; s < j->b->n_seqs; s++)
        pages += (j->b->ctx[s] + PL_CPU_PAGE - 1) / PL_CPU_PAGE;
    return pages * j->kv->shape.n_kv_heads * 2 * j->kv->layout.piece / 64 <= (size_t)4 * PL_CPU_SOON_LINES * pl_pool_size(j->cpu->pool);
}

/* The pages of a pair whose turn it is: the worker will most likely have the same pairs, in this order. */
static void note_pair(const struct attn_job *j, const struct tile *tile, uint32_t head, unsigned worker)
{
    struct pl_cpu_soon *s = &j->cpu->soon[worker];
    const struct pl_cpu_kv_layout *l = &j->kv->layout;
    const uint32_t *pages = j->b->pages + j->b->page_start[tile->seq];
    if (s->op != j->cpu->n_attn) {
        s->op = j->cpu->n_attn;
        s->units_before = s->units;
        s->n = s->at = s->left = s->units = 0;
    }
    for (uint32_t from = 0, end = j->b->pos[tile->token] + 1; j->note && from < end; from += PL_CPU_PAGE) {
        const uint8_t *keys = pl_cpu_head_page(j->kv, j->layer + 1, pages[from / PL_CPU_PAGE], head);
        const uint32_t n = (end - from + l->step - 1) / l->step * l->step;
        note(s, keys, l->piece);
        note(s, keys + l->values, n < PL_CPU_PAGE ? n * l->head_dim * l->element : l->piece);
    }
}

void pl_cpu_ask(struct pl_cpu *cpu, unsigned worker)
{
    struct pl_cpu_soon *s = &cpu->soon[worker];
    const uint32_t units_left = s->units_before > s->units ? s->units_before - s->units : 0;
    s->units++;
    if (s->left == 0 || s->left < units_left * ASK_LINES)
        return;
    for (uint32_t budget = ASK_LINES; budget > 0 && s->at < s->n;) {
        const uint32_t lines = s->piece[s->at].lines < budget ? s->piece[s->at].lines : budget;
        for (uint32_t i = 0; i < lines; i++)
            __builtin_prefetch(s->piece[s->at].from + (size_t)i * 64, 0, 2);
        s->piece[s->at].from += (size_t)lines * 64;
        s->piece[s->at].lines -= lines;
        s->at += s->piece[s->at].lines == 0;
        s->left -= lines;
        budget -= lines;
    }
}

static void tile_item(void *arg, size_t item, unsigned worker)
{
    const struct attn_job *j = arg;
    _Alignas(64) float acc[MAX_QUERIES][PL_CPU_MAX_DIM];
    struct item it;
    struct pl_cpu_attn a;
    struct merged m[MAX_QUERIES];
    open_item(j, &it, item);
    note_pair(j, it.tile, it.head, worker);
    for (uint32_t g = 0; g < it.tile->n_segments; g++) {
        const uint32_t first = first_query(&it, g);
        for (uint32_t i = 0; i < it.n_q; i++)
            a.acc[i] = g == 0 ? result_of(j, &it, i) : acc[i];
        run_segment(j, &it, &a, first, g);
        for (uint32_t i = 0; i < a.n_q; i++) {
            if (g == 0)
                m[i] = (struct merged){a.max[i], a.sum[i]};
            else
                merge(j, &m[first + i], result_of(j, &it, first + i), a.max[i], a.sum[i], a.acc[i]);
        }
    }
    finish(j, &it, m);
}

/* ---- few queries with long contexts: an item is a run of segments ----------------------------------------------------- */

static void join(const struct attn_job *j, struct item *it, const float *partial)
{
    const uint32_t D = j->kv->shape.head_dim;
    struct merged m[MAX_QUERIES];
    for (uint32_t i = 0; i < it->n_q; i++) {
        float *out = result_of(j, it, i);
        for (uint32_t g = 0; g * SEGMENT_TOKENS < it->end[i]; g++) {
            const float *acc = partial + g * j->stride + i * j->width, *of = acc + j->width - 2;
            if (g == 0) {
                m[i] = (struct merged){of[0], of[1]};
                memcpy(out, acc, D * sizeof *out);
            } else {
                merge(j, &m[i], out, of[0], of[1], acc);
            }
        }
    }
    finish(j, it, m);
}

static void segment(const struct attn_job *j, const struct item *it, uint32_t g, float *result)
{
    const uint32_t first = first_query(it, g);
    struct pl_cpu_attn a;
    for (uint32_t i = first; i < it->n_q; i++)
        a.acc[i - first] = result + i * j->width;
    run_segment(j, it, &a, first, g);
    for (uint32_t i = first; i < it->n_q; i++) {
        float *of = result + (i + 1) * j->width - 2;
        of[0] = a.max[i - first];
        of[1] = a.sum[i - first];
    }
}

/* Some segments of a tile and head. Whoever computes the last ones puts all together. */
static void run_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct attn_job *j = arg;
    const uint32_t G = j->kv->shape.n_kv_heads, runs = (j->n_segments + RUN - 1) / RUN;
    const size_t pair = item / runs;
    const uint32_t from = (uint32_t)(item % runs) * RUN, all = j->plan->tiles[pair / G].n_segments, to = from + RUN < all ? from + RUN : all;
    if (from >= to)
        return;
    struct item it;
    float *results = j->cpu->attn_work + pair * j->n_segments * j->stride;
    open_item(j, &it, pair);
    for (uint32_t g = from; g < to; g++)
        segment(j, &it, g, results + g * j->stride);
    if (atomic_fetch_sub_explicit(&j->plan->left[pair], to - from, memory_order_acq_rel) == to - from)
        join(j, &it, results);
}

/* Grows by doubling, since the longest context does with every token. */
static bool reserve_results(struct attn_job *j, size_t pairs)
{
    struct pl_cpu *cpu = j->cpu;
    j->width = (j->kv->shape.head_dim + 2 + 15) / 16 * 16;
    j->stride = j->n_rows * j->per_kv * j->width;
    size_t wanted = pairs * j->n_segments * j->stride, n = 1 << 16;
    while (n < wanted)
        n *= 2;
    return grow((void **)&j->plan->left, &j->plan->left_cap, pairs, sizeof *j->plan->left) &&
           pl_cpu_grow(&cpu->attn_work, &cpu->attn_cap, n) == PL_OK;
}

static void run_segments(struct attn_job *j, size_t pairs)
{
    struct pl_cpu_attn_plan *w = j->plan;
    const size_t runs = (j->n_segments + RUN - 1) / RUN;
    for (size_t i = 0; i < pairs; i++)
        atomic_store_explicit(&w->left[i], w->tiles[i / j->kv->shape.n_kv_heads].n_segments, memory_order_relaxed);
    pl_pool_run(j->cpu->pool, run_item, j, pairs * runs);
}

pl_status pl_cpu_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                         const struct pl_batch *b)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    const uint32_t D = kv->shape.head_dim, G = kv->shape.n_kv_heads;
    struct attn_job j = {.cpu = cpu, .kv = kv, .b = b, .out = out, .q = q, .layer = layer, .per_kv = q.cols / D / G, .scale = scale};
    const bool only = pl_cpu_take_only(cpu);
    if (j.per_kv == 0 || j.per_kv > MAX_QUERIES)
        return PL_ENOTSUP;
    if (cpu->attn_plan == NULL && (cpu->attn_plan = calloc(1, sizeof *cpu->attn_plan)) == NULL)
        return PL_ENOMEM;
    j.plan = cpu->attn_plan;
    j.quant = pl_cpu_writes(out);
    if (j.per_kv * D % 32 != 0) {
        j.quant = false;
        out.buf->n_quantized = 0;
    }
    j.only = only && j.quant;
    j.note = b->n_tokens == b->n_seqs && b->n_seqs >= ASK_FROM && layer + 1 < kv->shape.n_layers && worth_asking(&j);
    cpu->n_attn++;
    if (!make_tiles(&j, MAX_QUERIES / j.per_kv))
        return PL_ENOMEM;
    const size_t items = (size_t)j.n_tiles * G;
    const bool few = j.n_segments > 1 && items < SPLIT_BELOW * (size_t)pl_pool_size(cpu->pool);
    if (few && reserve_results(&j, items)) /* without that memory whole tiles give the same, by fewer threads */
        run_segments(&j, items);
    else
        pl_pool_run(cpu->pool, tile_item, &j, items);
    return PL_OK;
}
