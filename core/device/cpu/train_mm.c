/* train_mm: products of matrices for training. Operands are packed piece by piece (frozen weights are expanded on the way),
 * then tiles of the result are computed side by side.
 *
 *   for each block of rows of c, slab of its columns, piece of the reduction:
 *     pack    a  [rows][units]                 a unit is one float32 or two bf16 that follow each other in the reduction
 *             b  panels of 16 * nv columns, each [units][columns]
 *     compute c  in blocks of rows × one panel, pieces of the reduction in ascending order
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/train.h"

enum {
    LANES = PL_MM_LANES,
    K_PIECE = 1024,     /* of the reduction, packed at once */
    K_STEP = 256,       /* of the reduction in a tile, so that its panel stays in the first cache; both: multiples of all blocks */
    B_ELEMENTS = 1 << 20,
    N_UNIT = 256,       /* slabs are multiples of it */
    M_BLOCK = 4092,     /* rows of a packed at once */
    M_TILES = 16,       /* tiles of rows in a work item */
    UNITS_PER_ITEM = 8, /* packing across rows */
    TEMP_FLOATS = 4 * K_PIECE + 18 * K_PIECE /* a slab's row segments, and 16 rows of units */
};

struct job {
    const struct pl_train_kernels *k;
    struct pl_mm_space *space;
    const struct pl_mm *mm;
    unsigned pack; /* elements per unit */
    void (*tile)(const struct pl_mm_tile *t);
    uint32_t m0, m, n0, n, k0, kb; /* the piece at hand */
    uint32_t units, padded;        /* units of the reduction; rounded up to 16 */
    uint32_t width;                /* columns of a full panel */
    size_t a_items, b_items;
    bool direct; /* a is read where it lies */
};

void pl_mm_space_free(struct pl_mm_space *s)
{
    pl_cpu_release(s->a, s->a_cap * sizeof(float));
    pl_cpu_release(s->b, s->b_cap * sizeof(float));
    for (unsigned i = 0; i < s->n_temp; i++)
        free(s->temp[i]);
    free(s->temp);
    *s = (struct pl_mm_space){0};
}

static pl_status reserve(struct pl_mm_space *s, unsigned n_workers)
{
    if (s->n_temp >= n_workers)
        return PL_OK;
    float **temp = realloc(s->temp, n_workers * sizeof *temp);
    if (temp == NULL)
        return PL_ENOMEM;
    s->temp = temp;
    for (; s->n_temp < n_workers; s->n_temp++)
        if ((temp[s->n_temp] = aligned_alloc(64, TEMP_FLOATS * sizeof(float))) == NULL)
            return PL_ENOMEM;
    return PL_OK;
}

/* n values of a row from column c0, where they lie or expanded into temp (room for n + two blocks). */
static const float *segment(const struct job *j, const struct pl_mm_src *s, uint32_t row, uint32_t c0, uint32_t n, float *temp)
{
    if (s->p != NULL)
        return s->p + row * s->stride + c0;
    uint32_t i = 0;
    while (row >= s->w->parts[i].rows)
        row -= s->w->parts[i++].rows;
    const struct pl_cpu_part *p = &s->w->parts[i];
    const uint32_t block = pl_dtype_block(p->dtype), from = c0 / block * block, to = (c0 + n + block - 1) / block * block;
    j->k->dequant(p->dtype, p->src + row * p->src_stride + pl_dtype_row_bytes(p->dtype, from), temp, to - from);
    return temp + (c0 - from);
}

/* A row's piece of the reduction as units, zeros up to the padded length. */
static void units_along(const struct job *j, const float *x, uint32_t *out)
{
    if (j->pack == 1) {
        memcpy(out, x, j->kb * sizeof *out);
    } else {
        j->k->narrow(x, j->kb, (uint16_t *)out);
        if (j->kb % 2 != 0)
            ((uint16_t *)out)[j->kb] = 0;
    }
    memset(out + j->units, 0, (j->padded - j->units) * sizeof *out);
}

/* Unit u of `n` neighbouring columns of a source whose reduction runs across rows; zeros up to a multiple of 16. */
static void units_across(const struct job *j, const struct pl_mm_src *s, uint32_t u, uint32_t c0, uint32_t n, float *temp, uint32_t *out)
{
    const uint32_t whole = n / LANES * LANES, k = j->k0 + u * j->pack;
    const float *a = segment(j, s, k, c0, n, temp), *b = NULL;
    float tail[2][LANES] = {{0}};
    if (j->pack == 2 && u * 2 + 1 < j->kb)
        b = segment(j, s, k + 1, c0, n, temp + 2 * K_PIECE);
    if (j->pack == 1)
        memcpy(out, a, n * sizeof *out);
    else if (b != NULL)
        j->k->interleave(a, b, whole, out);
    else
        for (uint32_t i = 0; i < whole; i += LANES)
            j->k->interleave(a + i, tail[1], LANES, out + i);
    if (whole == n)
        return;
    memcpy(tail[0], a + whole, (n - whole) * sizeof(float));
    if (b != NULL)
        memcpy(tail[1], b + whole, (n - whole) * sizeof(float));
    if (j->pack == 1)
        memcpy(out + whole, tail[0], sizeof tail[0]);
    else
        j->k->interleave(tail[0], tail[1], LANES, out + whole);
}

static uint32_t *a_rows(const struct job *j)
{
    return (uint32_t *)j->space->a;
}

/* Panel p of the slab and how wide it is. */
static uint32_t *panel(const struct job *j, uint32_t p, uint32_t *width)
{
    const uint32_t left = j->n - p * j->width;
    *width = left >= j->width ? j->width : (left + LANES - 1) / LANES * LANES;
    return (uint32_t *)j->space->b + (size_t)p * j->width * j->padded;
}

/* 16 rows of a */
static void pack_a(const struct job *j, size_t item, float *temp)
{
    const uint32_t from = (uint32_t)item * LANES, left = j->m - from < LANES ? j->m - from : LANES;
    uint32_t *out = a_rows(j) + (size_t)from * j->padded, *rows = (uint32_t *)temp + 4 * K_PIECE;
    const struct pl_mm_src *s = &j->mm->a;
    if (s->along) {
        for (uint32_t r = 0; r < left; r++)
            units_along(j, segment(j, s, j->m0 + from + r, j->k0, j->kb, temp), out + (size_t)r * j->padded);
        return;
    }
    for (uint32_t u = 0; u < j->units; u++)
        units_across(j, s, u, j->m0 + from, left, temp, rows + u * LANES);
    memset(rows + j->units * LANES, 0, (j->padded - j->units) * LANES * sizeof *rows);
    for (uint32_t u = 0; u < j->padded; u += LANES)
        j->k->transpose(rows + u * LANES, LANES, out + u, j->padded);
}

/* along: 16 columns; across: some units of the whole slab */
static void pack_b(const struct job *j, size_t item, float *temp)
{
    const struct pl_mm_src *s = &j->mm->b;
    uint32_t *rows = (uint32_t *)temp + 4 * K_PIECE, width;
    if (s->along) {
        const uint32_t from = (uint32_t)item * LANES, left = j->n - from < LANES ? j->n - from : LANES;
        uint32_t *out = panel(j, from / j->width, &width) + from % j->width;
        for (uint32_t r = 0; r < left; r++)
            units_along(j, segment(j, s, j->n0 + from + r, j->k0, j->kb, temp), rows + r * j->padded);
        memset(rows + left * j->padded, 0, (LANES - left) * j->padded * sizeof *rows);
        for (uint32_t u = 0; u < j->padded; u += LANES)
            j->k->transpose(rows + u, j->padded, out + (size_t)u * width, width);
        return;
    }
    const uint32_t end = (uint32_t)(item + 1) * UNITS_PER_ITEM;
    for (uint32_t u = (uint32_t)item * UNITS_PER_ITEM; u < end && u < j->units; u++) {
        for (uint32_t c = 0; c < j->n; c += K_PIECE) {
            const uint32_t n = j->n - c < K_PIECE ? j->n - c : K_PIECE;
            units_across(j, s, u, j->n0 + c, n, temp, rows);
            for (uint32_t at = 0; at < n; at += j->width) {
                uint32_t *out = panel(j, (c + at) / j->width, &width);
                memcpy(out + (size_t)u * width, rows + at, width * sizeof *out);
            }
        }
    }
}

static void pack_item(void *arg, size_t item, unsigned worker)
{
    const struct job *j = arg;
    if (item < j->a_items)
        pack_a(j, item, j->space->temp[worker]);
    else
        pack_b(j, item - j->a_items, j->space->temp[worker]);
}

/* Some rows of c under one panel. */
static void compute_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct job *j = arg;
    const struct pl_mm *mm = j->mm;
    const uint32_t n_panels = (j->n + j->width - 1) / j->width, p = (uint32_t)(item % n_panels);
    const uint32_t from = (uint32_t)(item / n_panels) * M_TILES * PL_MM_ROWS, end = from + M_TILES * PL_MM_ROWS;
    uint32_t width;
    const uint32_t *b = panel(j, p, &width);
    struct pl_mm_tile t = {.nv = width / LANES, .ldc = mm->ldc, .alpha = mm->alpha};
    t.n = j->n - p * j->width < width ? j->n - p * j->width : width;
    for (uint32_t k = 0, step = K_STEP / j->pack; k < j->units; k += step) {
        t.k = j->units - k < step ? j->units - k : step;
        t.b = b + (size_t)k * width;
        t.add = mm->add || j->k0 + k > 0;
        t.bias = mm->bias != NULL ? mm->bias + j->n0 + p * j->width : NULL;
        for (uint32_t row = from; row < end && row < j->m; row += PL_MM_ROWS) {
            t.m = j->m - row < PL_MM_ROWS ? j->m - row : PL_MM_ROWS;
            for (uint32_t r = 0; r < PL_MM_ROWS; r++) {
                const uint32_t at = row + (r < t.m ? r : t.m - 1);
                t.a[r] = j->direct ? (const uint32_t *)(mm->a.p + (j->m0 + at) * mm->a.stride + j->k0) + k : a_rows(j) + (size_t)at * j->padded + k;
            }
            t.c = mm->c + (size_t)(j->m0 + row) * mm->ldc + j->n0 + p * j->width;
            j->tile(&t);
        }
    }
}

static void run(struct pl_pool *pool, void (*fn)(void *, size_t, unsigned), struct job *j, size_t n)
{
    if (pool != NULL) {
        pl_pool_run(pool, fn, j, n);
        return;
    }
    for (size_t i = 0; i < n; i++)
        fn(j, i, 0);
}

static pl_status piece(struct pl_pool *pool, struct job *j)
{
    j->units = (j->kb + j->pack - 1) / j->pack;
    j->padded = (j->units + LANES - 1) / LANES * LANES;
    const uint32_t n_panels = (j->n + j->width - 1) / j->width;
    j->direct = j->pack == 1 && j->mm->a.along;
    j->a_items = j->direct ? 0 : (j->m + LANES - 1) / LANES;
    j->b_items = j->mm->b.along ? (j->n + LANES - 1) / LANES : (j->units + UNITS_PER_ITEM - 1) / UNITS_PER_ITEM;
    struct pl_mm_space *s = j->space;
    if (pl_cpu_grow(&s->a, &s->a_cap, j->a_items * LANES * j->padded) != PL_OK ||
        pl_cpu_grow(&s->b, &s->b_cap, (size_t)n_panels * j->width * j->padded) != PL_OK)
        return PL_ENOMEM;
    run(pool, pack_item, j, j->a_items + j->b_items);
    run(pool, compute_item, j, (size_t)n_panels * ((j->m + M_TILES * PL_MM_ROWS - 1) / (M_TILES * PL_MM_ROWS)));
    return PL_OK;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

pl_status pl_mm_run(const struct pl_train_kernels *k, pl_mm_precision precision, struct pl_pool *pool, struct pl_mm_space *s,
                    const struct pl_mm *mm)
{
    struct job j = {.k = k, .space = s, .mm = mm, .pack = precision == PL_MM_BF16 ? 2 : 1, .tile = k->tile[precision]};
    if (reserve(s, pool != NULL ? pl_pool_size(pool) : 1) != PL_OK)
        return PL_ENOMEM;
    j.width = k->nv * LANES;
    const uint32_t slab = B_ELEMENTS / least(mm->k > 0 ? mm->k : 1, K_PIECE) / N_UNIT * N_UNIT;
    for (j.m0 = 0; j.m0 < mm->m; j.m0 += j.m) {
        j.m = least(mm->m - j.m0, M_BLOCK);
        for (j.n0 = 0; j.n0 < mm->n; j.n0 += j.n) {
            j.n = least(mm->n - j.n0, slab);
            for (j.k0 = 0; j.k0 < mm->k; j.k0 += j.kb) {
                j.kb = least(mm->k - j.k0, K_PIECE);
                if (piece(pool, &j) != PL_OK)
                    return PL_ENOMEM;
            }
        }
    }
    return PL_OK;
}
