/* matmul: quantizes the activations once, then hands out blocks (rows of the weight × tokens) of all its parts to the pool.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

/* Items are small, so that a worker that was delayed does not leave the others waiting at the end, but not so small
 * that handing them out counts: MIN_WORK is inputs × (tokens + UNPACK) of a unit, about a microsecond. */
enum { ITEMS_PER_WORKER = 16, PANEL_TOKENS = 128, SCRATCH_TOKENS = 48, QUANT_TOKENS = 8, MIN_WORK = 16384, UNPACK = 8, AHEAD_TOKENS = 16,
       FETCH_MOST = 32 << 10 };

struct product {
    struct pl_cpu *cpu;
    pl_view out, x, bias;
    const struct pl_cpu_act *act; /* x, quantized; NULL when no part needs it */
    bool add;
    bool gated, quant; /* out = kind(first part's results) × second part's; out's quantized rows too */
    bool only;         /* nothing but these */
    pl_act_kind kind;
    const struct pl_plus *plus; /* gated only */
    const struct pl_weight *w;
    uint32_t units_per_item, unit_items, tokens_per_item; /* unit_items: of all parts, for one panel of tokens */
    size_t n_items;
};

/* 32 consecutive rows (fewer at a part's end) for some tokens, on their way to out */
typedef float scratch[SCRATCH_TOKENS][PL_CPU_UNIT];

/* ---- activations --------------------------------------------------------------------------------------------------- */

pl_status pl_cpu_act_reserve(struct pl_cpu_act *a, uint32_t rows, uint32_t cols)
{
    size_t n = (size_t)rows * cols;
    a->cols = cols;
    if (n <= a->cap)
        return PL_OK;
    pl_cpu_act_free(a);
    a->q = aligned_alloc(64, (n + 63) / 64 * 64);
    a->b = aligned_alloc(64, (n / 32 * sizeof *a->b + 63) / 64 * 64);
    a->cap = a->q != NULL && a->b != NULL ? n : 0;
    a->cols = cols;
    return a->cap != 0 ? PL_OK : PL_ENOMEM;
}

void pl_cpu_act_free(struct pl_cpu_act *a)
{
    free(a->q);
    free(a->b);
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
    const struct product *j = arg;
    const struct pl_cpu_act *a = j->act;
    for (uint32_t t = (uint32_t)item * QUANT_TOKENS; t < (item + 1) * QUANT_TOKENS && t < j->x.rows; t++) {
        const struct pl_cpu_blocks to = pl_cpu_act_row(a, t, 0);
        j->cpu->k->quant(pl_cpu_row(j->x, t), 32, a->cols / 32, &to);
    }
}

/* The quantized rows that were written with x, else made here. */
static pl_status quantize(struct product *j)
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
    pl_pool_run(j->cpu->pool, quant_item, j, (j->x.rows + QUANT_TOKENS - 1) / QUANT_TOKENS);
    return PL_OK;
}

/* ---- blocks -------------------------------------------------------------------------------------------------------- */

static uint32_t unit_rows(const struct pl_cpu_part *p, uint32_t unit)
{
    return p->rows - unit * PL_CPU_UNIT < PL_CPU_UNIT ? p->rows - unit * PL_CPU_UNIT : PL_CPU_UNIT;
}

static void compute(const struct product *j, const struct pl_cpu_part *p, uint32_t unit, uint32_t t0, uint32_t n_t, float *out,
                    size_t stride, bool add)
{
    uint32_t n_groups = (unit_rows(p, unit) + PL_CPU_GROUP - 1) / PL_CPU_GROUP;
    if (p->bits != 0)
        j->cpu->k->rows_block(p, unit, n_groups, j->act, t0, n_t, out, stride, add);
    else
        j->cpu->k->rows_float(p, unit, n_groups, pl_cpu_row(j->x, t0), j->x.stride, n_t, out, stride, add);
}

static void add_bias(const struct product *j, uint32_t row, uint32_t n, uint32_t n_t, scratch s)
{
    const float *bias = j->bias.buf != NULL ? pl_cpu_row(j->bias, 0) + row : NULL;
    for (uint32_t i = 0; bias != NULL && i < n_t; i++)
        for (uint32_t r = 0; r < n; r++)
            s[i][r] += bias[r];
}

static void add_plus(const struct product *j, uint32_t row, uint32_t n, uint32_t t0, uint32_t n_t, scratch s)
{
    for (uint32_t i = 0; j->plus != NULL && i < n_t; i++) {
        const float *plus = pl_cpu_row(j->plus->values, t0 + i) + row;
        for (uint32_t r = 0; j->plus->rows[t0 + i] && r < n; r++)
            s[i][r] += plus[r];
    }
}

/* Rows of a part whose first row is output first_row. Whole groups without a bias go straight to out. */
static void plain_unit(const struct product *j, const struct pl_cpu_part *p, uint32_t first_row, uint32_t unit, uint32_t t0,
                       uint32_t n_t)
{
    uint32_t n = unit_rows(p, unit), row = first_row + unit * PL_CPU_UNIT;
    if (n % PL_CPU_GROUP == 0 && j->bias.buf == NULL) {
        compute(j, p, unit, t0, n_t, pl_cpu_row(j->out, t0) + row, j->out.stride, j->add);
        return;
    }
    _Alignas(64) scratch s;
    for (uint32_t end = t0 + n_t; t0 < end; t0 += n_t) {
        n_t = end - t0 < SCRATCH_TOKENS ? end - t0 : SCRATCH_TOKENS;
        compute(j, p, unit, t0, n_t, s[0], PL_CPU_UNIT, false);
        add_bias(j, row, n, n_t, s);
        for (uint32_t i = 0; i < n_t; i++) {
            float *out = pl_cpu_row(j->out, t0 + i) + row;
            for (uint32_t r = 0; r < n; r++)
                out[r] = j->add ? out[r] + s[i][r] : s[i][r];
        }
    }
}

static void gated_unit(const struct product *j, uint32_t unit, uint32_t t0, uint32_t n_t)
{
    const struct pl_cpu_part *gate = &j->w->parts[0], *up = &j->w->parts[1];
    uint32_t n = unit_rows(gate, unit), row = unit * PL_CPU_UNIT;
    _Alignas(64) scratch g, u;
    for (uint32_t end = t0 + n_t; t0 < end; t0 += n_t) {
        n_t = end - t0 < SCRATCH_TOKENS ? end - t0 : SCRATCH_TOKENS;
        compute(j, gate, unit, t0, n_t, g[0], PL_CPU_UNIT, false);
        compute(j, up, unit, t0, n_t, u[0], PL_CPU_UNIT, false);
        add_bias(j, row, n, n_t, g);
        add_bias(j, gate->rows + row, n, n_t, u);
        add_plus(j, row, n, t0, n_t, g);
        add_plus(j, gate->rows + row, n, t0, n_t, u);
        for (uint32_t i = 0; i < n_t; i++)
            j->cpu->k->glu(j->kind, j->only ? g[i] : pl_cpu_row(j->out, t0 + i) + row, g[i], u[i], n);
        if (j->quant)
            pl_cpu_quant_rows(j->cpu, j->out, t0, n_t, row, j->only ? g[0] : pl_cpu_row(j->out, t0) + row, j->only ? PL_CPU_UNIT : j->out.stride);
    }
}

static void fetch(const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const uint8_t *)from + at);
}

/* The activations of some tokens, which other workers have just written: all lines at once instead of one after the other. */
static void fetch_act(const struct pl_cpu_act *a, uint32_t t0, uint32_t n_t)
{
    const size_t from = (size_t)t0 * a->cols, n = (size_t)n_t * a->cols;
    if (n > FETCH_MOST)
        return;
    fetch(a->b + from / 32, n / 32 * sizeof *a->b);
    fetch(a->q + from, n);
}

static uint32_t unit_items(const struct product *j, const struct pl_cpu_part *p)
{
    return (pl_cpu_units(p) + j->units_per_item - 1) / j->units_per_item;
}

static void block_item(void *arg, size_t item, unsigned worker)
{
    const struct product *j = arg;
    const struct pl_cpu_part *p = j->w->parts;
    uint32_t at = (uint32_t)(item % j->unit_items), first_row = 0;
    for (; at >= unit_items(j, p); p++) {
        at -= unit_items(j, p);
        first_row += p->rows;
    }
    uint32_t from = at * j->units_per_item, to = from + j->units_per_item < pl_cpu_units(p) ? from + j->units_per_item : pl_cpu_units(p);
    uint32_t t0 = (uint32_t)(item / j->unit_items) * j->tokens_per_item, left = j->x.rows - t0;
    uint32_t n_t = left < j->tokens_per_item ? left : j->tokens_per_item;
    if (j->act != NULL && item == pl_pool_first(j->cpu->pool, j->n_items, worker))
        fetch_act(j->act, t0, n_t);
    for (uint32_t unit = from; unit < to; unit++) {
        pl_cpu_ask(j->cpu, worker);
        if (j->gated)
            gated_unit(j, unit, t0, n_t);
        else
            plain_unit(j, p, first_row, unit, t0, n_t);
    }
}

/* All parts in one region: a barrier less for each. */
static void run_blocks(struct product *j)
{
    uint32_t n_parts = j->gated ? 1 : j->w->n_parts; /* the second one goes along with the first */
    uint64_t units = 0, wanted = pl_pool_size(j->cpu->pool) * ITEMS_PER_WORKER;
    for (uint32_t i = 0; i < n_parts; i++)
        units += pl_cpu_units(&j->w->parts[i]);
    uint64_t work = (uint64_t)j->w->cols * (j->x.rows + UNPACK) * (j->gated ? 4 : 2), least = (MIN_WORK + work - 1) / work;
    j->units_per_item = (uint32_t)(units / wanted > least ? units / wanted : least);
    for (uint32_t i = 0; i < n_parts; i++)
        j->unit_items += unit_items(j, &j->w->parts[i]);
    uint32_t panels = (j->x.rows + PANEL_TOKENS - 1) / PANEL_TOKENS;
    j->tokens_per_item = (j->x.rows + panels - 1) / panels;
    j->n_items = j->unit_items * (size_t)panels;
    pl_pool_run(j->cpu->pool, block_item, j, j->n_items);
}

static struct pl_cpu_stretch stretch(const struct pl_cpu_part *first, const struct pl_cpu_part *last)
{
    const uint8_t *end = last->packed + pl_cpu_units(last) * last->unit_bytes;
    return first->packed != NULL && first->chunk == last->chunk ? (struct pl_cpu_stretch){first->packed, (size_t)(end - first->packed)}
                                                                : (struct pl_cpu_stretch){0};
}

/* Passes go over the weights in the same order, so the team can fetch the beginning of the next product's while it waits for
 * what lies between. With many tokens reading weights is no matter. */
static void look_ahead(const struct product *j)
{
    struct pl_cpu *cpu = j->cpu;
    const struct pl_cpu_part *first = j->w->parts, *last = first + j->w->n_parts - 1;
    if (cpu->last != NULL) {
        cpu->last->next[0] = j->gated ? stretch(first, first) : stretch(first, last);
        cpu->last->next[1] = j->gated ? stretch(last, last) : (struct pl_cpu_stretch){0};
    }
    cpu->last = (struct pl_weight *)j->w;
    if (j->x.rows <= AHEAD_TOKENS)
        pl_pool_ahead(cpu->pool, j->w->next[0].from, j->w->next[0].bytes, j->w->next[1].from, j->w->next[1].bytes);
}

static pl_status run(struct product *j)
{
    look_ahead(j);
    bool quantized = false;
    for (uint32_t i = 0; i < j->w->n_parts; i++)
        quantized |= j->w->parts[i].bits != 0;
    if (quantized && quantize(j) != PL_OK)
        return PL_ENOMEM;
    run_blocks(j);
    return PL_OK;
}

pl_status pl_cpu_matmul(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add)
{
    struct product j = {.cpu = pl_cpu_of(dev), .out = out, .x = x, .bias = bias, .add = add, .w = w};
    if (x.cols != w->cols || out.cols != w->rows || out.rows != x.rows)
        return PL_EINVAL;
    if (x.rows == 0)
        return PL_OK;
    out.buf->n_quantized = 0; /* its rows are made in pieces */
    return run(&j);
}

pl_status pl_cpu_matmul_glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                            const struct pl_plus *plus)
{
    struct product j = {.cpu = pl_cpu_of(dev), .out = out, .x = x, .bias = bias, .plus = plus, .gated = true, .kind = kind, .w = w};
    const bool only = pl_cpu_take_only(j.cpu);
    if (x.cols != w->cols || w->n_parts != 2 || w->parts[0].rows != w->parts[1].rows || out.cols != w->parts[0].rows || out.rows != x.rows)
        return PL_EINVAL;
    if (x.rows == 0)
        return PL_OK;
    j.quant = pl_cpu_writes(out);
    j.only = only && j.quant;
    return run(&j);
}
