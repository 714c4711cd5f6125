/* kv: the cache pages of the CPU device.
 *
 * F16 is held as integers (cpu.h). A page of Q8_0 holds keys and values rotated: each head's vector is multiplied by a Hadamard matrix
 * before it is rounded, which spreads the few large elements that keys have over all of them. Attention rotates its queries as well,
 * which leaves every product as it is, and rotates its result back.
 * Source: Ashkboos et al. 2024, "QuaRot: Outlier-free 4-bit inference in rotated LLMs".
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

/* Dot products take `step` bytes or elements of a key, or positions of a value, at once. */
static struct pl_cpu_kv_layout layout_of(pl_dtype t, uint32_t head_dim)
{
    const uint32_t step = t == PL_Q8_0 ? 4 : t == PL_F32 ? 1 : 2, element = t == PL_Q8_0 ? 1 : pl_dtype_block_bytes(t);
    const uint32_t scale = t == PL_Q8_0 ? (head_dim + 31) / 32 * (uint32_t)sizeof(uint16_t) : t == PL_F16 ? (uint32_t)sizeof(float) : 0;
    const uint32_t padded = (head_dim + step - 1) / step * step; /* scale: bytes of a position's */
    struct pl_cpu_kv_layout l = {.dtype = t, .step = step, .element = element, .head_dim = head_dim};
    l.key_scales = padded * PL_CPU_PAGE * element;
    l.piece = (l.key_scales + scale * PL_CPU_PAGE + 63) / 64 * 64;
    l.values = l.piece * PL_CPU_SEGMENT;
    l.value_scales = l.values + l.key_scales;
    while (t == PL_Q8_0 && head_dim % (2 << l.rotate_bits) == 0)
        l.rotate_bits++;
    return l;
}

static uint32_t whole_blocks(uint32_t n_pages)
{
    return (n_pages + PL_CPU_SEGMENT - 1) / PL_CPU_SEGMENT * PL_CPU_SEGMENT;
}

static void measure(struct pl_kvdev *kv, const struct pl_kv_shape *s)
{
    kv->shape = *s;
    kv->layout = layout_of(s->dtype, s->head_dim);
    kv->head_bytes = (size_t)2 * kv->layout.values;
    kv->page_bytes = (size_t)2 * kv->layout.piece * s->n_kv_heads * s->n_layers;
    kv->bytes = kv->page_bytes * whole_blocks(s->n_pages);
}

static bool has_type(pl_dtype t)
{
    return t == PL_F32 || t == PL_F16 || t == PL_BF16 || t == PL_Q8_0;
}

size_t pl_cpu_kv_bytes(struct pl_device *dev, const struct pl_kv_shape *shape)
{
    (void)dev;
    struct pl_kvdev kv;
    if (!has_type(shape->dtype))
        return 0;
    measure(&kv, shape);
    return kv.page_bytes * shape->n_pages;
}

pl_status pl_cpu_kv_new(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out)
{
    (void)dev;
    if (!has_type(shape->dtype) || shape->page_size != PL_CPU_PAGE || shape->head_dim > PL_CPU_MAX_DIM)
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

pl_status pl_cpu_kv_copy(struct pl_device *dev, struct pl_kvdev *kv, uint32_t from, uint32_t to)
{
    (void)dev;
    for (uint32_t layer = 0; from != to && layer < kv->shape.n_layers; layer++)
        for (uint32_t h = 0; h < kv->shape.n_kv_heads; h++) {
            const uint8_t *head = pl_cpu_head_page(kv, layer, from, h);
            uint8_t *copy = pl_cpu_head_page(kv, layer, to, h);
            memcpy(copy, head, kv->layout.piece);
            memcpy(copy + kv->layout.values, head + kv->layout.values, kv->layout.piece);
        }
    return PL_OK;
}

bool pl_cpu_kv_prepare(struct pl_device *dev, struct pl_kvdev *kv, uint32_t n_pages)
{
    (void)dev;
    if (kv->prepared >= whole_blocks(n_pages < kv->shape.n_pages ? n_pages : kv->shape.n_pages) * kv->page_bytes)
        return false;
    volatile uint8_t *byte = kv->data + kv->prepared;
    *byte = *byte;
    kv->prepared += PL_CPU_HUGE_PAGE;
    return true;
}

/* ---- writing ------------------------------------------------------------------------------------------------------- */

/* A batch of decodes is one token an item, or a few; of a prompt's, neighbours stay with one worker: they share cache lines. */
enum { ITEMS_PER_WORKER = 4, MOST_TOKENS = 16 };

struct kv_job {
    const struct pl_cpu *cpu;
    struct pl_kvdev *kv;
    uint32_t layer;
    const struct pl_rotation *rotation; /* NULL = none */
    pl_view q, k, v;
    const struct pl_batch *b;
    uint32_t per_item; /* tokens */
};

/* Spreads a row over a page: groups of `group` neighbours stay together and lie `stride` elements apart, from element `first` on. */
static void scatter(void *out, const void *row, uint32_t n, uint32_t element, size_t first, uint32_t group, size_t stride)
{
#define SCATTER(type, size)                                                                                            \
    for (uint32_t i = 0; i < n; i += size)                                                                             \
        memcpy((type *)out + first + i / size * stride, (const type *)row + i, size * sizeof(type))
    if (element == 4)
        SCATTER(uint32_t, 1);
    else if (element == 2 && group == 1)
        SCATTER(uint16_t, 1);
    else if (element == 2)
        SCATTER(uint16_t, 2);
    else if (group == 1)
        SCATTER(uint8_t, 1);
    else
        SCATTER(uint8_t, 4);
#undef SCATTER
}

/* One head's vector as int8 with a scale per 32; `offset` is added to each byte. */
static void round_head(const struct pl_cpu_kernels *kernels, const struct pl_cpu_kv_layout *l, const float *in, uint8_t offset,
                       uint8_t *row, uint16_t *scales, uint32_t at)
{
    _Alignas(64) float x[PL_CPU_MAX_DIM] = {0};
    struct pl_cpu_block blocks[PL_CPU_MAX_DIM / 32];
    const uint32_t n = (l->head_dim + 31) / 32 * 32;
    memcpy(x, in, l->head_dim * sizeof *x);
    kernels->rotate(x, l->head_dim, l->rotate_bits);
    kernels->quant(x, 32, n / 32, &(struct pl_cpu_blocks){(int8_t *)row, blocks, 32, 1});
    for (uint32_t i = 0; i < n; i++)
        row[i] = (uint8_t)(row[i] + offset);
    for (uint32_t b = 0; b < n / 32; b++)
        scales[b * PL_CPU_PAGE + at] = pl_f32_to_f16(blocks[b].d);
}

/* Queries and keys, where they are. */
static void rotate_token(const struct kv_job *j, uint32_t t)
{
    const struct pl_rotation *r = j->rotation;
    const uint32_t D = j->kv->shape.head_dim;
    if (r == NULL)
        return;
    const float *cos = j->cpu->rope_cos + (size_t)t * (r->n_dims / 2), *sin = j->cpu->rope_sin + (size_t)t * (r->n_dims / 2);
    j->cpu->k->rope(r->kind, pl_cpu_row(j->q, t), j->q.cols / D, D, r->n_dims, cos, sin);
    j->cpu->k->rope(r->kind, pl_cpu_row(j->k, t), j->k.cols / D, D, r->n_dims, cos, sin);
}

static void write_token(const struct kv_job *j, uint32_t t)
{
    const struct pl_cpu_kv_layout *l = &j->kv->layout;
    const uint32_t page = j->b->slot[t] / PL_CPU_PAGE, at = j->b->slot[t] % PL_CPU_PAGE, D = l->head_dim, step = l->step;
    _Alignas(64) uint8_t row[PL_CPU_MAX_DIM * sizeof(float)];
    for (uint32_t h = 0; h < j->kv->shape.n_kv_heads; h++) {
        uint8_t *to = pl_cpu_head_page(j->kv, j->layer, page, h);
        for (int value = 0; value < 2; value++) {
            const float *in = pl_cpu_row(value ? j->v : j->k, t) + h * D;
            if (l->dtype == PL_Q8_0)
                round_head(j->cpu->k, l, in, value ? 0 : PL_CPU_KEY_OFFSET, row,
                           (uint16_t *)(to + (value ? l->value_scales : l->key_scales)), at);
            else if (l->dtype == PL_F16)
                ((float *)(to + (value ? l->value_scales : l->key_scales)))[at] = j->cpu->k->round16(in, D, value, (int16_t *)row);
            else
                pl_quant_row(l->dtype, in, row, D);
            if (value)
                scatter(to + l->values, row, D, l->element, (size_t)at / step * D * step + at % step, 1, step);
            else
                scatter(to, row, D, l->element, (size_t)at * step, step, (size_t)PL_CPU_PAGE * step);
        }
    }
}

/* A key is one element in each of many lines, which come from memory when the sequence decodes: asked for all at once. */
static void fetch_keys(const struct kv_job *j, uint32_t t)
{
    const uint32_t page = j->b->slot[t] / PL_CPU_PAGE, at = j->b->slot[t] % PL_CPU_PAGE;
    const struct pl_cpu_kv_layout *l = &j->kv->layout;
    const uint32_t group = l->step * l->element;
    for (uint32_t h = 0; h < j->kv->shape.n_kv_heads; h++) {
        const uint8_t *keys = pl_cpu_head_page(j->kv, j->layer, page, h) + (size_t)at * group;
        for (uint32_t d = 0; d < l->head_dim; d += l->step)
            __builtin_prefetch(keys + (size_t)d / l->step * PL_CPU_PAGE * group, 1);
    }
}

static void kv_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct kv_job *j = arg;
    const uint32_t from = (uint32_t)item * j->per_item, left = j->b->n_tokens - from, n = left < j->per_item ? left : j->per_item;
    for (uint32_t t = from; t < from + n; t++)
        if (t == from || j->b->slot[t] != j->b->slot[t - 1] + 1)
            fetch_keys(j, t);
    for (uint32_t t = from; t < from + n; t++) {
        rotate_token(j, t);
        write_token(j, t);
    }
}

pl_status pl_cpu_kv_write(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                          const struct pl_batch *b)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    const uint32_t share = b->n_tokens / (ITEMS_PER_WORKER * pl_pool_size(cpu->pool));
    struct kv_job j = {cpu, kv, layer, r != NULL && r->kind != PL_ROPE_NONE ? r : NULL, q, k, v, b, share < 1 ? 1 : share < MOST_TOKENS ? share : MOST_TOKENS};
    if (j.rotation != NULL) {
        if (pl_cpu_angles(cpu, r, b->pos, b->n_tokens) != PL_OK)
            return PL_ENOMEM;
        q.buf->n_quantized = k.buf->n_quantized = 0;
    }
    pl_pool_run(cpu->pool, kv_item, &j, (b->n_tokens + j.per_item - 1) / j.per_item);
    return PL_OK;
}
