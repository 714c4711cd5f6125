/* four: four neighbouring floats at a time, for kernels whose cost is bytes: 16 bytes at once where rows lie so that they can be (QUADS),
 * one by one where they do not. Who has which element does not depend on that.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_FOUR_H
#define PL_CUDA_FOUR_H

#include "cuda/launch.h"

/* left: how many there are, 4 or more where there is no end; what lies behind it is 0 */
template <bool QUADS> static __device__ __forceinline__ void load_four(float *v, const float *from, uint32_t left)
{
    if constexpr (QUADS) {
        const float4 all = *reinterpret_cast<const float4 *>(from);
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            v[i] = i < left ? from[i] : 0;
    }
}

template <bool QUADS> static __device__ __forceinline__ void store_four(float *to, const float *v, uint32_t left)
{
    if constexpr (QUADS) {
        *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            if (i < left)
                to[i] = v[i];
    }
}

static __device__ __forceinline__ uint32_t half_bits(__half, float v)
{
    return __half_as_ushort(__float2half_rn(v));
}

static __device__ __forceinline__ uint32_t half_bits(__nv_bfloat16, float v)
{
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

/* The same, rounded to 16 bits */
template <class W, bool QUADS> static __device__ __forceinline__ void store_four(W *to, const float *v, uint32_t left)
{
    if constexpr (QUADS) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(half_bits(W{}, v[0]) | half_bits(W{}, v[1]) << 16, half_bits(W{}, v[2]) | half_bits(W{}, v[3]) << 16);
    } else {
        unsigned short *const bits = reinterpret_cast<unsigned short *>(to);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            if (i < left)
                bits[i] = static_cast<unsigned short>(half_bits(W{}, v[i]));
    }
}

/* Whether rows can be read and written in fours */
static inline bool in_fours(const pl_cuda_mat &m)
{
    return reinterpret_cast<uintptr_t>(m.p) % 16 == 0 && m.cols % 4 == 0 && (m.stride % 4 == 0 || m.rows == 1);
}

static inline bool in_fours(const float *vector)
{
    return reinterpret_cast<uintptr_t>(vector) % 16 == 0;
}

#endif
