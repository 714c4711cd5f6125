/* pack: how weights of block types lie in the device's memory. The bytes are the file's own, in another order.
 *
 * A row is cut into supers of 256 inputs: one block of a K-quant, eight of the other types (the last one is filled up with
 * zeros). A super's fields follow one another, each field for all of its blocks (PL_PACK_LIST), and are cut into pieces of 16
 * bytes; what is left over, 4 bytes at most, is its tail.
 *
 *   weight   groups of 8 rows, one after another
 *   group    quads of 4 supers: inputs 1024 i … 1024 i + 1023
 *   quad     piece 0 of lanes 0 … 31, piece 1 of lanes 0 … 31, … then the tails; lane 8 s + r has super s of row r
 *
 * So a warp loads 512 bytes in a row at once, and each lane works on a super of its own.
 *
 * A result is a sum over strands. A strand is what one lane adds up: with W warps for a group (pl_pack_warps), warp w takes the
 * quads from pl_pack_first(w) on, and its lanes supers s of them; sums are then added over w and s, in that order. Every
 * kernel adds in this order, so that a row's result does not depend on which one is used.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_PACK_H
#define PL_CUDA_PACK_H

#include <stddef.h>
#include <stdint.h>

#include "core/model/dtype.h"

#ifdef __CUDACC__
#define PL_PACK_FN static __host__ __device__ __forceinline__
#else
#define PL_PACK_FN static inline
#endif

enum { PL_PACK_ROWS = 8, PL_PACK_STRANDS = 4, PL_PACK_SUPER = 256, PL_PACK_PIECE = 16, PL_PACK_LANES = 32 };

/* type, pieces, tail bytes, fields of a block: {offset, bytes} … */
#define PL_PACK_LIST(X)                                                                                                \
    X(Q4_0, 9, 0, {2, 16}, {0, 2})                                                                                     \
    X(Q4_1, 10, 0, {4, 16}, {0, 2}, {2, 2})                                                                            \
    X(Q5_0, 11, 0, {6, 16}, {2, 4}, {0, 2})                                                                            \
    X(Q5_1, 12, 0, {8, 16}, {4, 4}, {0, 2}, {2, 2})                                                                    \
    X(Q8_0, 17, 0, {2, 32}, {0, 2})                                                                                    \
    X(Q2_K, 5, 4, {16, 64}, {0, 16}, {80, 4})                                                                          \
    X(Q3_K, 7, 0, {0, 32}, {32, 64}, {96, 14})                                                                         \
    X(Q4_K, 9, 0, {16, 128}, {0, 16})                                                                                  \
    X(Q5_K, 11, 0, {48, 128}, {16, 32}, {0, 16})                                                                       \
    X(Q6_K, 13, 4, {0, 128}, {128, 64}, {192, 16}, {208, 2})

PL_PACK_FN uint32_t pl_pack_supers(uint32_t cols)
{
    return (cols + PL_PACK_SUPER - 1) / PL_PACK_SUPER;
}

PL_PACK_FN uint32_t pl_pack_quads(uint32_t cols)
{
    return (pl_pack_supers(cols) + PL_PACK_STRANDS - 1) / PL_PACK_STRANDS;
}

PL_PACK_FN uint32_t pl_pack_groups(uint32_t rows)
{
    return (rows + PL_PACK_ROWS - 1) / PL_PACK_ROWS;
}

/* Warps that share a group: 1, 2 or 4 */
PL_PACK_FN uint32_t pl_pack_warps(uint32_t cols)
{
    const uint32_t quads = pl_pack_quads(cols);
    return quads >= 4 ? 4 : quads >= 2 ? 2 : 1;
}

/* The first quad of warp w; w = pl_pack_warps(cols): where the last one's end */
PL_PACK_FN uint32_t pl_pack_first(uint32_t cols, uint32_t w)
{
    return w * pl_pack_quads(cols) / pl_pack_warps(cols);
}

#ifdef __cplusplus
extern "C" {
#endif

size_t pl_pack_bytes(pl_dtype t, uint32_t rows, uint32_t cols);
/* Host memory on both sides; src as the file holds it, stride bytes from one row to the next. */
void pl_pack(pl_dtype t, uint32_t rows, uint32_t cols, const void *src, size_t stride, void *dst);

#ifdef __cplusplus
}
#endif

#endif
