/* element: one value of a weight's row as the file holds it, for kernels; core/model/dtype.c says what the bytes mean.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_ELEMENT_H
#define PL_CUDA_ELEMENT_H

#include "core/model/dtype.h"
#include "cuda/launch.h"

static __device__ __forceinline__ float half_at(const uint8_t *p)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(p[0] | p[1] << 8)));
}

/* As core/model/dtype.c has it: scale * (q - offset) + min, each operation rounded. */
static __device__ __forceinline__ float value_of(float scale, int q, float min)
{
    return __fadd_rn(__fmul_rn(scale, static_cast<float>(q)), min);
}

static __device__ __forceinline__ int nibble(const uint8_t *q, int e)
{
    return q[e % 16] >> e / 16 * 4 & 15;
}

static __device__ __forceinline__ int fifth(const uint8_t *bits, int e)
{
    return (bits[e / 8] >> e % 8 & 1) << 4;
}

/* 6-bit scale and minimum j of Q4_K and Q5_K */
static __device__ __forceinline__ int k_scale(const uint8_t *s, int j)
{
    return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
}

static __device__ __forceinline__ int k_min(const uint8_t *s, int j)
{
    return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

static __device__ float k_value(int dtype, const uint8_t *b, int e)
{
    const int j = e / 32, i = e % 32;
    if (dtype == PL_Q2_K) {
        const int s = b[e / 16], q = b[16 + e / 128 * 32 + i] >> e % 128 / 32 * 2 & 3;
        return value_of(__fmul_rn(half_at(b + 80), static_cast<float>(s & 15)), q, -__fmul_rn(half_at(b + 82), static_cast<float>(s >> 4)));
    }
    if (dtype == PL_Q3_K) {
        const int k = e / 16, low = k < 8 ? b[96 + k] & 15 : b[88 + k] >> 4, high = b[104 + k % 4] >> k / 4 * 2 & 3;
        const int q = (b[32 + e / 128 * 32 + i] >> e % 128 / 32 * 2 & 3) | (b[i] >> j & 1) << 2;
        return value_of(__fmul_rn(half_at(b + 108), static_cast<float>((low | high << 4) - 32)), q - 4, 0);
    }
    if (dtype == PL_Q6_K) {
        const int half = e / 128, r = e % 128;
        const int q = (b[half * 64 + r % 64] >> r / 64 * 4 & 15) | (b[128 + half * 32 + r % 32] >> r / 32 * 2 & 3) << 4;
        return value_of(__fmul_rn(half_at(b + 208), static_cast<float>(static_cast<int8_t>(b[192 + e / 16]))), q - 32, 0);
    }
    int q = b[(dtype == PL_Q4_K ? 16 : 48) + j / 2 * 32 + i] >> j % 2 * 4 & 15;
    if (dtype == PL_Q5_K)
        q |= (b[16 + i] >> j & 1) << 4;
    return value_of(__fmul_rn(half_at(b), static_cast<float>(k_scale(b + 4, j))), q, -__fmul_rn(half_at(b + 2), static_cast<float>(k_min(b + 4, j))));
}

/* Element e of a row */
static __device__ float element(int dtype, const uint8_t *row, uint32_t at)
{
    const int e = static_cast<int>(at % 32);
    const size_t block = at / 32, k_block = at / 256;
    const int k = static_cast<int>(at % 256);
    switch (dtype) {
    case PL_F32: return reinterpret_cast<const float *>(row)[at];
    case PL_F16: return __half2float(reinterpret_cast<const __half *>(row)[at]);
    case PL_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(row)[at]);
    case PL_Q4_0: row += block * 18; return value_of(half_at(row), nibble(row + 2, e) - 8, 0);
    case PL_Q4_1: row += block * 20; return value_of(half_at(row), nibble(row + 4, e), half_at(row + 2));
    case PL_Q5_0: row += block * 22; return value_of(half_at(row), (nibble(row + 6, e) | fifth(row + 2, e)) - 16, 0);
    case PL_Q5_1: row += block * 24; return value_of(half_at(row), nibble(row + 8, e) | fifth(row + 4, e), half_at(row + 2));
    case PL_Q8_0: row += block * 34; return value_of(half_at(row), static_cast<int8_t>(row[2 + e]), 0);
    case PL_Q2_K: return k_value(dtype, row + k_block * 84, k);
    case PL_Q3_K: return k_value(dtype, row + k_block * 110, k);
    case PL_Q4_K: return k_value(dtype, row + k_block * 144, k);
    case PL_Q5_K: return k_value(dtype, row + k_block * 176, k);
    default: return k_value(PL_Q6_K, row + k_block * 210, k);
    }
}

#endif
