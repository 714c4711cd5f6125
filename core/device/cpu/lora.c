/* lora: low-rank changes of a product. Two regions of the pool: first x · Aᵀ for the rows that adapters change, then what
 * Bᵀ makes of it is added to the outputs; in both, tiles of a few rows of one adapter × a piece of the rank or the outputs.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

enum { ROWS = 8, RANKS = 16, OUTPUTS = 512 }; /* of an item */

static size_t a_bytes(const struct pl_lora *l)
{
    return (size_t)l->rank * l->cols * sizeof(float);
}

static size_t b_bytes(const struct pl_cpu_lora_part *p)
{
    return (size_t)p->rank * p->rows * sizeof(float);
}

static void fill_part(struct pl_lora *l, struct pl_cpu_lora_part *p, const struct pl_lora_src *src)
{
    memcpy(l->a + (size_t)p->from * l->cols, src->a, (size_t)src->rank * l->cols * sizeof(float));
    for (uint32_t row = 0; row < src->rows; row++)
        for (uint32_t r = 0; r < src->rank; r++)
            p->bt[(size_t)r * src->rows + row] = src->scale * src->b[(size_t)row * src->rank + r];
}

pl_status pl_cpu_lora_new(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out,
                          struct pl_err *err)
{
    struct pl_lora *l = calloc(1, sizeof *l);
    if (l == NULL || (l->parts = calloc(n_parts, sizeof *l->parts)) == NULL) {
        free(l);
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    }
    l->cols = cols;
    for (size_t i = 0; i < n_parts; i++) {
        l->parts[i] = (struct pl_cpu_lora_part){parts[i].first, parts[i].rows, parts[i].rank, l->rank, NULL};
        l->rank += parts[i].rank;
    }
    l->a = pl_cpu_alloc(a_bytes(l));
    for (; l->a != NULL && l->n_parts < n_parts; l->n_parts++) {
        struct pl_cpu_lora_part *p = &l->parts[l->n_parts];
        if ((p->bt = pl_cpu_alloc(b_bytes(p))) == NULL)
            break;
        fill_part(l, p, &parts[l->n_parts]);
    }
    if (l->n_parts < n_parts) {
        pl_cpu_lora_free(dev, l);
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    }
    *out = l;
    return PL_OK;
}

void pl_cpu_lora_free(struct pl_device *dev, struct pl_lora *l)
{
    (void)dev;
    if (l == NULL)
        return;
    for (uint32_t i = 0; i < l->n_parts; i++)
        pl_cpu_release(l->parts[i].bt, b_bytes(&l->parts[i]));
    pl_cpu_release(l->a, a_bytes(l));
    free(l->parts);
    free(l);
}

struct lora_job {
    const struct pl_cpu *cpu;
    pl_view out, x;
    const struct pl_lora_use *uses;
    bool add;
    size_t n_uses, stride; /* stride: the largest rank, between rows of lora_work */
    size_t (*pieces)(const struct pl_lora *l);
};

static size_t n_tiles(const struct pl_lora_use *u)
{
    return (u->n_rows + ROWS - 1) / ROWS;
}

static size_t down_pieces(const struct pl_lora *l)
{
    return (l->rank + RANKS - 1) / RANKS;
}

static size_t part_pieces(const struct pl_cpu_lora_part *p)
{
    return (p->rows + OUTPUTS - 1) / OUTPUTS;
}

static size_t up_pieces(const struct pl_lora *l)
{
    size_t n = 0;
    for (uint32_t i = 0; i < l->n_parts; i++)
        n += part_pieces(&l->parts[i]);
    return n;
}

static size_t n_items(const struct lora_job *j)
{
    size_t n = 0;
    for (size_t i = 0; i < j->n_uses; i++)
        n += n_tiles(&j->uses[i]) * j->pieces(j->uses[i].lora);
    return n;
}

struct tile {
    const struct pl_lora *l;
    const uint32_t *rows;
    uint32_t n_rows;
    size_t piece;
    float *y; /* its rows of lora_work */
};

static struct tile find_tile(const struct lora_job *j, size_t item)
{
    const struct pl_lora_use *u = j->uses;
    size_t before = 0;
    for (;; u++) {
        const size_t n = n_tiles(u) * j->pieces(u->lora);
        if (item < n)
            break;
        item -= n;
        before += u->n_rows;
    }
    const size_t first = item / j->pieces(u->lora) * ROWS;
    return (struct tile){
        .l = u->lora,
        .rows = u->rows + first,
        .n_rows = u->n_rows - first < ROWS ? (uint32_t)(u->n_rows - first) : ROWS,
        .piece = item % j->pieces(u->lora),
        .y = j->cpu->lora_work + (before + first) * j->stride,
    };
}

static void down_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct lora_job *j = arg;
    const struct tile t = find_tile(j, item);
    const float *x[ROWS];
    for (uint32_t i = 0; !j->add && t.piece == 0 && i < t.n_rows; i++)
        memset(pl_cpu_row(j->out, t.rows[i]), 0, j->out.cols * sizeof(float));
    for (uint32_t i = 0; i < t.n_rows; i++)
        x[i] = pl_cpu_row(j->x, t.rows[i]);
    const uint32_t from = (uint32_t)t.piece * RANKS, n = t.l->rank - from < RANKS ? t.l->rank - from : RANKS;
    j->cpu->k->lora_down(x, t.n_rows, t.l->a + (size_t)from * t.l->cols, n, t.l->cols, t.y + from, j->stride);
}

static void up_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct lora_job *j = arg;
    struct tile t = find_tile(j, item);
    const struct pl_cpu_lora_part *p = t.l->parts;
    for (; t.piece >= part_pieces(p); p++)
        t.piece -= part_pieces(p);
    const uint32_t from = (uint32_t)t.piece * OUTPUTS, n = p->rows - from < OUTPUTS ? p->rows - from : OUTPUTS;
    float *out[ROWS];
    for (uint32_t i = 0; i < t.n_rows; i++)
        out[i] = pl_cpu_row(j->out, t.rows[i]) + p->first + from;
    j->cpu->k->lora_up(out, t.n_rows, t.y + p->from, j->stride, p->bt + from, p->rows, p->rank, n);
}

pl_status pl_cpu_lora(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    struct lora_job j = {.cpu = cpu, .out = out, .x = x, .uses = uses, .add = add, .n_uses = n_uses};
    size_t n_rows = 0;
    for (size_t i = 0; i < n_uses; i++) {
        const struct pl_lora *l = uses[i].lora;
        if (l->cols != x.cols)
            return PL_EINVAL;
        for (uint32_t p = 0; p < l->n_parts; p++)
            if (l->parts[p].first + l->parts[p].rows > out.cols)
                return PL_EINVAL;
        n_rows += uses[i].n_rows;
        j.stride = l->rank > j.stride ? l->rank : j.stride;
    }
    if (n_rows == 0)
        return PL_OK;
    if (pl_cpu_grow(&cpu->lora_work, &cpu->lora_cap, n_rows * j.stride) != PL_OK)
        return PL_ENOMEM;
    out.buf->n_quantized = 0;
    j.pieces = down_pieces;
    pl_pool_run(cpu->pool, down_item, &j, n_items(&j));
    j.pieces = up_pieces;
    pl_pool_run(cpu->pool, up_item, &j, n_items(&j));
    return PL_OK;
}
