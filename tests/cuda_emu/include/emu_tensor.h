/* emu_tensor: the products of cuda/mma.h for a whole warp at once; bit for bit what its lanes make of them by themselves.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_TENSOR_H
#define PL_TESTS_CUDA_EMU_TENSOR_H

struct emu_words {
    uint32_t word[3];
};

/* What a lane brings of a[16][16], b[16][8] and c[16][8]; WORDS of b: 2 of halves, 1 of bytes */
template <class C, int WORDS> struct emu_tile {
    uint32_t a[2 * WORDS], b[WORDS];
    C c[4];
};

template <bool BF16> static inline float emu_half(uint32_t word, int i)
{
    const uint32_t bits = i ? word >> 16 : word & 0xffff;
    return BF16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <bool BF16> __attribute__((optimize("O3"))) static void emu_multiply_halves(emu_value *values)
{
    float a[16][16], b[16][8], c[16][8];
    emu_tile<float, 2> tile[32];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        memcpy(&tile[lane], &values[lane], sizeof tile[lane]);
        for (int i = 0; i < 4; i++) {
            for (int e = 0; e < 2; e++)
                a[g + i % 2 * 8][i / 2 * 8 + 2 * t + e] = emu_half<BF16>(tile[lane].a[i], e);
            c[g + i / 2 * 8][2 * t + i % 2] = tile[lane].c[i];
        }
        for (int i = 0; i < 4; i++)
            b[i / 2 * 8 + 2 * t + i % 2][g] = emu_half<BF16>(tile[lane].b[i / 2], i % 2);
    }
    for (int k = 0; k < 16; k++)
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++)
                c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++)
            tile[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        memcpy(&values[lane], &tile[lane], sizeof tile[lane]);
    }
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

__attribute__((optimize("O3"))) static inline void emu_multiply_bytes(emu_value *values)
{
    int a[16][16], b[16][8], c[16][8];
    emu_tile<int, 1> tile[32];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        memcpy(&tile[lane], &values[lane], sizeof tile[lane]);
        for (int i = 0; i < 4; i++) {
            for (int row = 0; row < 2; row++)
                a[g + row * 8][4 * t + i] = static_cast<int8_t>(tile[lane].a[row] >> 8 * i);
            b[4 * t + i][g] = static_cast<int8_t>(tile[lane].b[0] >> 8 * i);
            c[g + i / 2 * 8][2 * t + i % 2] = tile[lane].c[i];
        }
    }
    for (int k = 0; k < 16; k++)
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++)
                c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++)
            tile[lane].c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        memcpy(&values[lane], &tile[lane], sizeof tile[lane]);
    }
}

static inline void emu_mma_s8_k16(int *c, const uint32_t *a, uint32_t b)
{
    emu_tile<int, 1> tile = {{a[0], a[1]}, {b}, {c[0], c[1], c[2], c[3]}};
    memcpy(&tile, &emu_give("mma", 0xffffffffu, tile, "", 0, emu_multiply_bytes)[emu_lane()], sizeof tile);
    memcpy(c, tile.c, sizeof tile.c);
}

#endif
