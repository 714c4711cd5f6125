/* weights: packs a weight's rows for the kernels (cpu.h draws the layout), and reads rows of it as embeddings.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

enum { GROUPS = PL_CPU_UNIT / PL_CPU_GROUP };

static size_t scale_bytes(const struct pl_cpu_part *p) /* one group's of a sub-block */
{
    return PL_CPU_GROUP * (p->half_scales ? sizeof(uint16_t) : sizeof(float));
}

/* A unit's sub-block */
static size_t sub_bytes(const struct pl_cpu_part *p)
{
    return GROUPS * (pl_cpu_quant_bytes(p) + scale_bytes(p) * (p->has_min ? 2 : 1));
}

enum { CHUNK_BYTES = 64 << 20 }; /* of address space; pages come when they are written */

static pl_status take_chunk(struct pl_cpu *cpu, struct pl_cpu_part *p)
{
    const size_t n = (pl_cpu_units(p) * p->unit_bytes + 63) / 64 * 64;
    if (cpu->chunk == NULL || cpu->chunk->size - cpu->chunk->used < n) {
        struct pl_cpu_chunk *c = calloc(1, sizeof *c);
        const size_t size = n > CHUNK_BYTES ? n : CHUNK_BYTES;
        if (c == NULL || (c->data = pl_cpu_alloc(size)) == NULL) {
            free(c);
            return PL_ENOMEM;
        }
        c->size = size;
        cpu->chunk = c;
    }
    p->chunk = cpu->chunk;
    p->packed = p->chunk->data + p->chunk->used;
    p->chunk->used += n;
    p->chunk->n_parts++;
    return PL_OK;
}

static void leave_chunk(struct pl_cpu *cpu, struct pl_cpu_chunk *c)
{
    if (c == NULL || --c->n_parts > 0)
        return;
    if (cpu->chunk == c)
        cpu->chunk = NULL;
    pl_cpu_release(c->data, c->size);
    free(c);
}

static bool describe(struct pl_cpu_part *p, const struct pl_weight_src *src)
{
    *p = (struct pl_cpu_part){.dtype = src->dtype, .rows = src->rows, .cols = src->cols, .src = src->data};
    p->src_stride = pl_weight_src_stride(src);
    p->sub = pl_dtype_sub(src->dtype);
    switch (src->dtype) {
    case PL_F32:
    case PL_F16:
    case PL_BF16:
        p->unit_bytes = (size_t)PL_CPU_UNIT * p->cols * pl_dtype_block_bytes(src->dtype);
        return true;
    case PL_Q4_0:
    case PL_Q4_1:
    case PL_Q2_K:
    case PL_Q3_K:
    case PL_Q4_K: p->bits = 4; break;
    case PL_Q5_0:
    case PL_Q5_1:
    case PL_Q8_0:
    case PL_Q5_K:
    case PL_Q6_K: p->bits = 8; break;
    default: return false;
    }
    p->offset = (float)pl_dtype_offset(src->dtype);
    p->has_min = p->offset == 0;
    p->half_scales = pl_dtype_block(src->dtype) == 32;
    p->unit_bytes = p->cols / p->sub * sub_bytes(p);
    return true;
}

static void put_scale(uint8_t *at, uint32_t row, bool half, float v)
{
    if (half) {
        uint16_t h = pl_f32_to_f16(v);
        memcpy(at + 2 * row, &h, sizeof h);
    } else {
        memcpy(at + 4 * row, &v, sizeof v);
    }
}

/* One sub-block of one row into its place. */
static void pack_sub(const struct pl_cpu_part *p, uint8_t *to, uint32_t row, const uint8_t *q, float scale, float min)
{
    const uint32_t steps = p->sub / 4, group = row / PL_CPU_GROUP, in_group = row % PL_CPU_GROUP;
    const uint32_t raise = p->has_min ? 0 : (1u << pl_cpu_offset_bits(p->bits, p->sub)) - (uint32_t)p->offset;
    uint8_t *quants = to + (size_t)group * pl_cpu_quant_bytes(p);
    for (uint32_t e = 0; e < p->sub; e++) {
        uint32_t step = e / 4, lane = 4 * in_group + e % 4, v = q[e] + raise;
        if (p->bits == 8)
            quants[64 * step + lane] = (uint8_t)v;
        else
            quants[64 * (step % (steps / 2)) + lane] |= (uint8_t)(v << (step / (steps / 2) * 4));
    }
    uint8_t *scales = to + GROUPS * (size_t)pl_cpu_quant_bytes(p) + group * scale_bytes(p);
    put_scale(scales, in_group, p->half_scales, scale);
    if (p->has_min)
        put_scale(scales + GROUPS * scale_bytes(p), in_group, p->half_scales, min);
}

static void pack_block_row(const struct pl_cpu_part *p, uint8_t *unit, uint32_t row, const uint8_t *src)
{
    uint8_t q[256];
    float scale[16], min[16];
    uint32_t block = pl_dtype_block(p->dtype), per_block = block / p->sub;
    uint8_t *to = unit;
    for (uint32_t b = 0; b < p->cols / block; b++) {
        pl_dtype_unpack(p->dtype, src + (size_t)b * pl_dtype_block_bytes(p->dtype), q, scale, min);
        for (uint32_t j = 0; j < per_block; j++, to += sub_bytes(p))
            pack_sub(p, to, row, q + j * p->sub, scale[j], min[j]);
    }
}

static void pack_float_row(const struct pl_cpu_part *p, uint8_t *unit, uint32_t row, const uint8_t *src)
{
    size_t element = pl_dtype_block_bytes(p->dtype), group = p->unit_bytes / 2;
    for (uint32_t k = 0; k < p->cols; k++)
        memcpy(unit + row / PL_CPU_GROUP * group + ((size_t)k * PL_CPU_GROUP + row % PL_CPU_GROUP) * element, src + k * element, element);
}

struct packing {
    struct pl_cpu_part *p;
    size_t first; /* unit */
};

static void pack_unit(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct packing *j = arg;
    const struct pl_cpu_part *p = j->p;
    const size_t unit = j->first + item;
    uint8_t *to = p->packed + unit * p->unit_bytes;
    for (uint32_t r = 0; r < PL_CPU_UNIT && unit * PL_CPU_UNIT + r < p->rows; r++)
        (p->bits != 0 ? pack_block_row : pack_float_row)(p, to, r, p->src + (unit * PL_CPU_UNIT + r) * p->src_stride);
}

/* A model may be loaded while others compute: they get their turns in between, a millisecond or so apart. */
static void pack(struct pl_cpu *cpu, struct pl_cpu_part *p)
{
    enum { SLICE = 1 << 20 };
    const size_t n = pl_cpu_units(p), slice = p->unit_bytes < SLICE ? SLICE / p->unit_bytes : 1;
    for (struct packing j = {p, 0}; j.first < n; j.first += slice) {
        pl_pool_turn(cpu->pool);
        pl_pool_run(cpu->pool, pack_unit, &j, n - j.first < slice ? n - j.first : slice);
        pl_pool_turn_end(cpu->pool);
    }
}

pl_status pl_cpu_weight_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out,
                            struct pl_err *err)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    struct pl_weight *w = calloc(1, sizeof *w);
    if (w == NULL || (w->parts = calloc(n_parts, sizeof *w->parts)) == NULL) {
        free(w);
        return pl_fail(err, PL_ENOMEM, "no memory for a weight");
    }
    pl_status st = PL_OK;
    w->cols = parts[0].cols;
    for (size_t i = 0; i < n_parts && st == PL_OK; i++) {
        struct pl_cpu_part *p = &w->parts[i];
        if (parts[i].cols != w->cols || parts[i].rows == 0 || w->cols == 0)
            st = pl_fail(err, PL_EINVAL, "parts of a weight do not fit together");
        else if (!describe(p, &parts[i]))
            st = pl_fail(err, PL_ENOTSUP, "tensor type %s is not supported by the CPU device", pl_dtype_name(parts[i].dtype));
        else if (cpu->k->packed && take_chunk(cpu, p) != PL_OK)
            st = pl_fail(err, PL_ENOMEM, "no memory for a weight of %u × %u", parts[i].rows, parts[i].cols);
        if (st != PL_OK)
            break;
        w->n_parts++;
        w->rows += p->rows;
        if (cpu->k->packed)
            pack(cpu, p);
    }
    if (st == PL_OK)
        *out = w;
    else
        pl_cpu_weight_free(dev, w);
    return st;
}

void pl_cpu_weight_free(struct pl_device *dev, struct pl_weight *w)
{
    if (w == NULL)
        return;
    for (uint32_t i = 0; i < w->n_parts; i++)
        leave_chunk(pl_cpu_of(dev), w->parts[i].chunk);
    if (pl_cpu_of(dev)->last == w)
        pl_cpu_of(dev)->last = NULL;
    free(w->parts);
    free(w);
}

/* ---- embeddings ---------------------------------------------------------------------------------------------------- */

enum { EMBED_ROWS = 2 }; /* of a work item */

struct embed_job {
    const struct pl_weight *w;
    pl_view out;
    const uint32_t *idx;
    float *work; /* [workers][cols] where rows are added, else NULL */
};

static void embed_row(const struct embed_job *j, uint32_t t, float *work)
{
    uint32_t row = j->idx[t], i = 0;
    if (row == PL_NO_ROW) {
        if (work == NULL)
            memset(pl_cpu_row(j->out, t), 0, j->w->cols * sizeof(float));
        return;
    }
    while (i + 1 < j->w->n_parts && row >= j->w->parts[i].rows)
        row -= j->w->parts[i++].rows;
    const struct pl_cpu_part *p = &j->w->parts[i];
    float *to = pl_cpu_row(j->out, t), *values = work != NULL ? work : to;
    pl_dequant_row(p->dtype, p->src + row * p->src_stride, values, p->cols);
    for (uint32_t c = 0; work != NULL && c < p->cols; c++)
        to[c] += values[c];
}

static void embed_item(void *arg, size_t item, unsigned worker)
{
    const struct embed_job *j = arg;
    const uint32_t from = (uint32_t)item * EMBED_ROWS;
    for (uint32_t t = from; t < from + EMBED_ROWS && t < j->out.rows; t++)
        embed_row(j, t, j->work != NULL ? j->work + (size_t)worker * j->w->cols : NULL);
}

pl_status pl_cpu_embed(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    if (add && pl_cpu_grow(&cpu->attn_work, &cpu->attn_cap, (size_t)w->cols * pl_pool_size(cpu->pool)) != PL_OK)
        return PL_ENOMEM;
    struct embed_job j = {w, out, idx, add ? cpu->attn_work : NULL};
    out.buf->n_quantized = 0;
    pl_pool_run(cpu->pool, embed_item, &j, (out.rows + EMBED_ROWS - 1) / EMBED_ROWS);
    return PL_OK;
}
