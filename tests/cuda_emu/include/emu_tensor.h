/* emu_tensor: the products of cuda/mma.h for a whole warp at once; bit for bit what its lanes make of them by themselves.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_TENSOR_H
#define PL_TESTS_CUDA_EMU_TENSOR_H

#include <cstddef>
#ifdef __FMA__
#include <immintrin.h>
#endif

struct emu_words {
    uint32_t word[3];
};

/* What a lane brings of a[16][16], b[16][8] and c[16][8]; WORDS of b: 2 of halves, 1 of bytes */
template <class C, int WORDS> struct emu_tile {
    uint32_t a[2 * WORDS], b[WORDS];
    C c[4];
};
typedef emu_tile<float, 2> emu_tile_halves;
typedef emu_tile<int, 1> emu_tile_bytes;

typedef float emu_row __attribute__((vector_size(32))); /* c's 8 columns */

#define EMU_INLINE __attribute__((always_inline, no_sanitize("undefined"))) static inline

/* n: a multiple of 8 */
template <bool BF16> EMU_INLINE void emu_widen(float *to, const uint16_t *from, int n)
{
#if defined __AVX2__ && defined __F16C__
    for (int i = 0; i < n; i += 8) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i));
        _mm256_storeu_ps(to + i, BF16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)) : _mm256_cvtph_ps(v));
    }
#else
    for (int i = 0; i < n; i++)
        to[i] = BF16 ? __uint_as_float(static_cast<uint32_t>(from[i]) << 16) : __half2float(__ushort_as_half(from[i]));
#endif
}

/* Each element by one rounding. */
EMU_INLINE emu_row emu_fma(float a, emu_row b, emu_row c)
{
#ifdef __FMA__
    return (emu_row)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
    for (int i = 0; i < 8; i++)
        c[i] = __builtin_fmaf(a, b[i], c[i]);
    return c;
#endif
}

/* Sums are taken in the order of k, as the lanes take them. */
template <bool BF16> __attribute__((no_sanitize("undefined"))) static void emu_multiply_halves(emu_value *values)
{
    uint32_t a_words[16][8], b_words[8][8]; /* [row][k / 2], [column][k / 2] */
    float a[16 * 16], bt[8 * 16];
    emu_row b[16], c[16];
    for (int lane = 0; lane < 32; lane++) {
        emu_tile<float, 2> tile;
        const int g = lane / 4, t = lane % 4;
        memcpy(&tile, &values[lane], sizeof tile);
        for (int i = 0; i < 4; i++)
            a_words[g + i % 2 * 8][i / 2 * 4 + t] = tile.a[i];
        for (int i = 0; i < 2; i++) {
            b_words[g][i * 4 + t] = tile.b[i];
            memcpy(reinterpret_cast<float *>(&c[g + i * 8]) + 2 * t, &tile.c[2 * i], 2 * sizeof(float));
        }
    }
    emu_widen<BF16>(a, reinterpret_cast<const uint16_t *>(a_words), 16 * 16);
    emu_widen<BF16>(bt, reinterpret_cast<const uint16_t *>(b_words), 8 * 16);
    for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++)
            b[k][column] = bt[column * 16 + k];
    for (int row = 0; row < 16; row += 4) /* four sums at once, since each waits for itself */
        for (int k = 0; k < 16; k++)
            for (int i = row; i < row + 4; i++)
                c[i] = emu_fma(a[i * 16 + k], b[k], c[i]);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++)
            memcpy(values[lane].bytes + offsetof(emu_tile_halves, c) + i * 2 * sizeof(float),
                   reinterpret_cast<const float *>(&c[lane / 4 + i * 8]) + lane % 4 * 2, 2 * sizeof(float));
}

template <bool BF16> static inline void emu_mma_half(float *c, const uint32_t *a, const uint32_t *b)
{
    emu_tile<float, 2> tile;
    memcpy(tile.a, a, sizeof tile.a);
    memcpy(tile.b, b, sizeof tile.b);
    memcpy(tile.c, c, sizeof tile.c);
    memcpy(&tile, &emu_give("mma", 0xffffffffu, tile, "", 0, emu_multiply_halves<BF16>)[emu_lane()], sizeof tile);
    memcpy(c, tile.c, sizeof tile.c);
}

typedef int emu_int_row __attribute__((vector_size(32)));

__attribute__((no_sanitize("undefined"))) static inline void emu_multiply_bytes(emu_value *values)
{
    int8_t a[16][16];
    emu_int_row b[16], c[16];
    for (int lane = 0; lane < 32; lane++) {
        emu_tile<int, 1> tile;
        const int g = lane / 4, t = lane % 4;
        memcpy(&tile, &values[lane], sizeof tile);
        for (int i = 0; i < 2; i++) {
            memcpy(&a[g + i * 8][4 * t], &tile.a[i], sizeof tile.a[i]);
            memcpy(reinterpret_cast<int *>(&c[g + i * 8]) + 2 * t, &tile.c[2 * i], 2 * sizeof(int));
        }
        for (int i = 0; i < 4; i++)
            b[4 * t + i][g] = static_cast<int8_t>(tile.b[0] >> 8 * i);
    }
    for (int row = 0; row < 16; row += 4)
        for (int k = 0; k < 16; k++)
            for (int i = row; i < row + 4; i++)
                c[i] += a[i][k] * b[k];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++)
            memcpy(values[lane].bytes + offsetof(emu_tile_bytes, c) + i * 2 * sizeof(int), reinterpret_cast<const int *>(&c[lane / 4 + i * 8]) + lane % 4 * 2,
                   2 * sizeof(int));
}

static inline void emu_mma_s8_k16(int *c, const uint32_t *a, uint32_t b)
{
    emu_tile<int, 1> tile = {{a[0], a[1]}, {b}, {c[0], c[1], c[2], c[3]}};
    memcpy(&tile, &emu_give("mma", 0xffffffffu, tile, "", 0, emu_multiply_bytes)[emu_lane()], sizeof tile);
    memcpy(c, tile.c, sizeof tile.c);
}

#endif
