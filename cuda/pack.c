/* pack: how weights of block types lie in the device's memory.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/pack.h"

#include <string.h>

#include "core/base/status.h"

enum { MAX_FIELDS = 4, MAX_SUPER = 17 * PL_PACK_PIECE };

static const struct layout {
    pl_dtype type;
    uint32_t pieces, tail;
    struct {
        uint32_t offset, bytes;
    } fields[MAX_FIELDS];
} layouts[] = {
#define X(name, n_pieces, tail_bytes, ...) {PL_##name, n_pieces, tail_bytes, {__VA_ARGS__}},
    PL_PACK_LIST(X)
#undef X
};

static const struct layout *layout_of(pl_dtype t)
{
    for (size_t i = 0; i < sizeof layouts / sizeof layouts[0]; i++)
        if (layouts[i].type == t)
            return &layouts[i];
    PL_ASSERT(!"a block type");
    return NULL;
}

static size_t quad_bytes(const struct layout *l)
{
    return (size_t)PL_PACK_LANES * (l->pieces * PL_PACK_PIECE + l->tail);
}

size_t pl_pack_bytes(pl_dtype t, uint32_t rows, uint32_t cols)
{
    return pl_pack_groups(rows) * (size_t)pl_pack_quads(cols) * quad_bytes(layout_of(t));
}

/* One super of a row: its fields one after the other. */
static void gather(const struct layout *l, const uint8_t *src, uint32_t n_blocks, uint8_t *super)
{
    const uint32_t per_super = PL_PACK_SUPER / pl_dtype_block(l->type), size = pl_dtype_block_bytes(l->type);
    memset(super, 0, MAX_SUPER);
    for (uint32_t f = 0; f < MAX_FIELDS; f++) {
        for (uint32_t b = 0; b < n_blocks; b++)
            memcpy(super + b * l->fields[f].bytes, src + b * size + l->fields[f].offset, l->fields[f].bytes);
        super += per_super * l->fields[f].bytes;
    }
}

static void pack_row(const struct layout *l, uint32_t cols, const uint8_t *src, uint32_t row, uint8_t *group)
{
    const uint32_t block = pl_dtype_block(l->type), per_super = PL_PACK_SUPER / block, n_blocks = cols / block;
    uint8_t super[MAX_SUPER];
    for (uint32_t i = 0; i < pl_pack_supers(cols); i++, src += (size_t)per_super * pl_dtype_block_bytes(l->type)) {
        const uint32_t left = n_blocks - i * per_super, lane = i % PL_PACK_STRANDS * PL_PACK_ROWS + row;
        uint8_t *quad = group + i / PL_PACK_STRANDS * quad_bytes(l);
        gather(l, src, left < per_super ? left : per_super, super);
        for (uint32_t p = 0; p < l->pieces; p++)
            memcpy(quad + (p * PL_PACK_LANES + lane) * PL_PACK_PIECE, super + p * PL_PACK_PIECE, PL_PACK_PIECE);
        memcpy(quad + l->pieces * PL_PACK_LANES * PL_PACK_PIECE + lane * l->tail, super + l->pieces * PL_PACK_PIECE, l->tail);
    }
}

void pl_pack(pl_dtype t, uint32_t rows, uint32_t cols, const void *src, size_t stride, void *dst)
{
    const struct layout *l = layout_of(t);
    const size_t group_bytes = pl_pack_quads(cols) * quad_bytes(l);
    memset(dst, 0, pl_pack_bytes(t, rows, cols));
    for (uint32_t r = 0; r < rows; r++)
        pack_row(l, cols, (const uint8_t *)src + r * stride, r % PL_PACK_ROWS, (uint8_t *)dst + r / PL_PACK_ROWS * group_bytes);
}
