/* matmul: quantizes the activations once, then hands out tiles of (row groups × tokens) of all its parts to the pool.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

/* Items are small, so that a worker that was delayed does not leave the others waiting at the end, but not so small
 * that handing them out counts: MIN_WORK is inputs × (tokens + UNPACK), about a microsecond. */
enum { ITEMS_PER_WORKER = 16, PANEL_TOKENS = 128, MIN_WORK = 16384, UNPACK = 8 };

struct matmul_job {
    struct pl_cpu *cpu;
    pl_view out, x, bias;
    const struct pl_cpu_act *act; /* x, quantized; NULL when no part needs it */
    bool add;
    const struct pl_weight *w;
    uint32_t groups_per_item, group_items, tokens_per_item; /* group_items: of all parts, for one panel of tokens */
};

/* ---- activations --------------------------------------------------------------------------------------------------- */

pl_status pl_cpu_act_reserve(struct pl_cpu_act *a, uint32_t rows, uint32_t cols)
{
    size_t n = (size_t)rows * cols;
    a->cols = cols;
    if (n <= a->cap)
        return PL_OK;
    pl_cpu_act_free(a);
    a->q = aligned_alloc(64, (n + 63) / 64 * 64);
    a->d = malloc(n / 32 * sizeof(float));
    a->sum16 = malloc(n / 16 * sizeof(float));
    a->sum32 = malloc(n / 32 * sizeof(float));
    a->cap = a->q != NULL && a->d != NULL && a->sum16 != NULL && a->sum32 != NULL ? n : 0;
    a->cols = cols;
    return a->cap != 0 ? PL_OK : PL_ENOMEM;
}

void pl_cpu_act_free(struct pl_cpu_act *a)
{
    free(a->q);
    free(a->d);
    free(a->sum16);
    free(a->sum32);
    *a = (struct pl_cpu_act){0};
}

bool pl_cpu_writes(pl_view out)
{
    struct pl_dbuf *b = out.buf;
    b->n_quantized = 0;
    if (!b->wanted || !pl_cpu_is_whole(out) || out.cols % 32 != 0 || pl_cpu_act_reserve(&b->act, out.rows, out.cols) != PL_OK)
        return false; /* without memory here, the product asks again and reports it */
    b->n_quantized = out.rows;
    return true;
}

static void quant_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct matmul_job *j = arg;
    const struct pl_cpu_act *a = j->act;
    size_t n = a->cols;
    for (uint32_t t = (uint32_t)item * PL_CPU_TILE; t < (item + 1) * PL_CPU_TILE && t < j->x.rows; t++)
        j->cpu->k->quant_row(pl_cpu_row(j->x, t), a->cols, a->q + t * n, a->d + t * (n / 32), a->sum16 + t * (n / 16),
                             a->sum32 + t * (n / 32));
}

/* The quantized rows that were written with x, else made here. */
static pl_status quantize(struct matmul_job *j)
{
    struct pl_dbuf *b = j->x.buf;
    struct pl_cpu_act *a = &j->cpu->act;
    if (pl_cpu_is_whole(j->x)) {
        b->wanted = true;
        if (b->n_quantized >= j->x.rows && b->act.cols == j->x.cols) {
            j->act = &b->act;
            return PL_OK;
        }
    }
    if (pl_cpu_act_reserve(a, j->x.rows, j->x.cols) != PL_OK)
        return PL_ENOMEM;
    j->act = a;
    pl_pool_run(j->cpu->pool, quant_item, j, (j->x.rows + PL_CPU_TILE - 1) / PL_CPU_TILE);
    return PL_OK;
}

/* ---- tiles --------------------------------------------------------------------------------------------------------- */

/* Results of a group that has fewer than 16 rows or a bias: n results of each token, for outputs row, row + 1, … */
static void store(const struct matmul_job *j, uint32_t row, uint32_t n, uint32_t t0, uint32_t n_t, float tile[][PL_CPU_GROUP])
{
    const float *bias = j->bias.buf != NULL ? pl_cpu_row(j->bias, 0) + row : NULL;
    for (uint32_t i = 0; i < n_t; i++) {
        float *out = pl_cpu_row(j->out, t0 + i) + row;
        for (uint32_t r = 0; bias != NULL && r < n; r++)
            tile[i][r] += bias[r];
        for (uint32_t r = 0; r < n; r++)
            out[r] = j->add ? out[r] + tile[i][r] : tile[i][r];
    }
}

static uint32_t n_groups(const struct pl_cpu_part *p)
{
    return (p->rows + PL_CPU_GROUP - 1) / PL_CPU_GROUP;
}

static uint32_t group_items(const struct matmul_job *j, const struct pl_cpu_part *p)
{
    return (n_groups(p) + j->groups_per_item - 1) / j->groups_per_item;
}

static void tile_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct matmul_job *j = arg;
    const struct pl_cpu_kernels *k = j->cpu->k;
    const struct pl_cpu_part *p = j->w->parts;
    uint32_t at = (uint32_t)(item % j->group_items), first_row = 0;
    for (; at >= group_items(j, p); p++) {
        at -= group_items(j, p);
        first_row += p->rows;
    }
    uint32_t from = at * j->groups_per_item, to = from + j->groups_per_item < n_groups(p) ? from + j->groups_per_item : n_groups(p);
    uint32_t first = (uint32_t)(item / j->group_items) * j->tokens_per_item;
    uint32_t last = first + j->tokens_per_item < j->x.rows ? first + j->tokens_per_item : j->x.rows;
    _Alignas(64) float tile[PL_CPU_TILE][PL_CPU_GROUP];
    for (uint32_t g = from; g < to; g++)
        for (uint32_t t = first; t < last; t += PL_CPU_TILE) {
            uint32_t n_t = last - t < PL_CPU_TILE ? last - t : PL_CPU_TILE, row = g * PL_CPU_GROUP;
            uint32_t n = p->rows - row < PL_CPU_GROUP ? p->rows - row : PL_CPU_GROUP;
            bool direct = n == PL_CPU_GROUP && j->bias.buf == NULL;
            float *out = direct ? pl_cpu_row(j->out, t) + first_row + row : tile[0];
            size_t stride = direct ? j->out.stride : PL_CPU_GROUP;
            if (p->bits != 0)
                k->tile_block(p, g, j->act, t, n_t, out, stride, direct && j->add);
            else
                k->tile_float(p, g, pl_cpu_row(j->x, t), j->x.stride, n_t, out, stride, direct && j->add);
            if (!direct)
                store(j, first_row + row, n, t, n_t, tile);
        }
}

/* All parts in one region: a barrier less for each. */
static void run_tiles(struct matmul_job *j)
{
    uint64_t groups = 0, wanted = pl_pool_size(j->cpu->pool) * ITEMS_PER_WORKER;
    for (uint32_t i = 0; i < j->w->n_parts; i++)
        groups += n_groups(&j->w->parts[i]);
    uint64_t work = (uint64_t)j->w->cols * (j->x.rows + UNPACK), least = (MIN_WORK + work - 1) / work;
    j->groups_per_item = (uint32_t)(groups / wanted > least ? groups / wanted : least);
    for (uint32_t i = 0; i < j->w->n_parts; i++)
        j->group_items += group_items(j, &j->w->parts[i]);
    j->tokens_per_item = j->x.rows < PANEL_TOKENS ? j->x.rows : PANEL_TOKENS;
    size_t token_items = (j->x.rows + j->tokens_per_item - 1) / j->tokens_per_item;
    pl_pool_run(j->cpu->pool, tile_item, j, j->group_items * token_items);
}

pl_status pl_cpu_matmul(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add)
{
    struct matmul_job j = {.cpu = pl_cpu_of(dev), .out = out, .x = x, .bias = bias, .add = add, .w = w};
    if (x.cols != w->cols || out.cols != w->rows || out.rows != x.rows)
        return PL_EINVAL;
    if (x.rows == 0)
        return PL_OK;
    bool quantized = false;
    for (uint32_t i = 0; i < w->n_parts; i++)
        quantized |= w->parts[i].bits != 0;
    if (quantized && quantize(&j) != PL_OK)
        return PL_ENOMEM;
    out.buf->n_quantized = 0; /* its rows are made in pieces */
    run_tiles(&j);
    return PL_OK;
}
