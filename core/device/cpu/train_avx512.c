/* train_avx512: the kernels of training for AVX-512, with and without bf16 products (VDPBF16PS).
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

#define TILE_NV 4
#include "core/device/cpu/train_vec.h"

#define BF16 __attribute__((target("avx512bf16")))

BF16 INLINE void tile_bf16(const struct pl_mm_tile *t, const unsigned nv)
{
    v16 out[PL_MM_ROWS][4];
    __m512 acc[PL_MM_ROWS][4];
    const uint32_t *b = t->b;
    for (unsigned r = 0; r < PL_MM_ROWS; r++)
#pragma GCC unroll 4
        for (unsigned v = 0; v < nv; v++)
            acc[r][v] = _mm512_setzero_ps();
    for (size_t k = 0; k < t->k; k++, b += 16 * nv) {
        __m512i w[4];
#pragma GCC unroll 4
        for (unsigned v = 0; v < nv; v++)
            w[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 6
        for (unsigned r = 0; r < PL_MM_ROWS; r++) {
            const __m512i x = _mm512_set1_epi32((int)t->a[r][k]);
#pragma GCC unroll 4
            for (unsigned v = 0; v < nv; v++)
                acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)x, (__m512bh)w[v]);
        }
    }
    for (unsigned r = 0; r < PL_MM_ROWS; r++)
#pragma GCC unroll 4
        for (unsigned v = 0; v < nv; v++)
            out[r][v] = (v16)acc[r][v];
    tile_store(t, nv, out);
}
TILE_BY_WIDTH(k_tile_bf16, tile_bf16, BF16)

BF16 static void bf16_narrow(const float *in, size_t n, uint16_t *out)
{
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + i + 16), _mm512_loadu_ps(in + i)));
    for (; i < n; i++)
        out[i] = bf16_of(in[i]);
}

BF16 static void bf16_interleave(const float *a, const float *b, size_t n, uint32_t *out)
{
    for (size_t i = 0; i < n; i += 16) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + i)));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + i)));
        _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* Four rounds: pairs of rows exchange ever larger squares. */
static void fast_transpose(const uint32_t *in, size_t in_stride, uint32_t *out, size_t stride)
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(in + (size_t)i * in_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int g = 0; g < 16; g += 8)
        for (int i = 0; i < 4; i++) {
            b[g + i] = _mm512_shuffle_i32x4(a[g + i], a[g + i + 4], 0x88);
            b[g + i + 4] = _mm512_shuffle_i32x4(a[g + i], a[g + i + 4], 0xdd);
        }
    /* b[i], b[i + 8]: columns i and i + 8 (first group), i + 4 and i + 12 (second) of eight rows each */
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + (size_t)i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(out + (size_t)(i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}

const struct pl_train_kernels pl_train_kernels_avx512 = {
    .nv = TILE_NV,
    .tile = {k_tile_f32, NULL},
    .narrow = plain_narrow,
    .interleave = plain_interleave,
    .transpose = fast_transpose,
    .dequant = pl_dequant_row,
    ROW_KERNELS,
};

const struct pl_train_kernels pl_train_kernels_avx512bf16 = {
    .nv = TILE_NV,
    .tile = {k_tile_f32, k_tile_bf16},
    .narrow = bf16_narrow,
    .interleave = bf16_interleave,
    .transpose = fast_transpose,
    .dequant = pl_dequant_row,
    ROW_KERNELS,
};
