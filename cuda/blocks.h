/* blocks: reads packed weights of block types (pack.h) on the device: 32 inputs of one row at a time, as small integers with
 * their scales. What they mean is in core/model/dtype.c; the value of element e is scale * (q[e] - offset) + minimum.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_BLOCKS_H
#define PL_CUDA_BLOCKS_H

#include "cuda/launch.h"
#include "cuda/pack.h"

template <int TYPE> struct block_type;
#define X(name, n_pieces, tail_bytes, ...)                                                                             \
    template <> struct block_type<PL_##name> {                                                                         \
        static constexpr unsigned pieces = n_pieces, tail = tail_bytes, quad_bytes = PL_PACK_LANES * (16 * n_pieces + tail_bytes); \
        static constexpr int offset = PL_##name == PL_Q4_0 ? 8 : PL_##name == PL_Q5_0 ? 16 : PL_##name == PL_Q3_K ? 4              \
                                      : PL_##name == PL_Q6_K ? 32 : 0; /* Q8_0's integers have a sign instead */       \
        static constexpr bool has_min = PL_##name == PL_Q4_1 || PL_##name == PL_Q5_1 || PL_##name == PL_Q2_K ||        \
                                        PL_##name == PL_Q4_K || PL_##name == PL_Q5_K;                                  \
        static constexpr int halves = PL_##name == PL_Q2_K || PL_##name == PL_Q3_K || PL_##name == PL_Q6_K ? 2 : 1; /* scales per 32 */ \
    };
PL_PACK_LIST(X)
#undef X

/* 32 inputs: q holds 4 to a word, in order; scale and min for all of them, or one for each 16. */
template <int TYPE> struct sub_block {
    int q[8];
    float scale[block_type<TYPE>::halves], min[block_type<TYPE>::halves];
};

/* One lane's super where it lies. All indices are known to the compiler, so that a piece is loaded once however often it is named. */
template <int TYPE> struct super_at {
    const uint8_t *quad;
    unsigned lane;

    __device__ __forceinline__ uint4 piece(int p) const
    {
        return weight_at(reinterpret_cast<const uint4 *>(quad) + p * PL_PACK_LANES + lane);
    }
    __device__ __forceinline__ uint32_t tail() const
    {
        return weight_at(reinterpret_cast<const uint32_t *>(quad + block_type<TYPE>::pieces * PL_PACK_LANES * PL_PACK_PIECE) + lane);
    }
};

/* The same, in registers. */
template <int TYPE> struct super_held {
    uint4 pieces[block_type<TYPE>::pieces];
    uint32_t rest;

    __device__ __forceinline__ void load(const super_at<TYPE> &from)
    {
#pragma unroll
        for (unsigned p = 0; p < block_type<TYPE>::pieces; p++)
            pieces[p] = from.piece(p);
        rest = block_type<TYPE>::tail > 0 ? from.tail() : 0;
    }
    __device__ __forceinline__ uint4 piece(int p) const
    {
        return pieces[p];
    }
    __device__ __forceinline__ uint32_t tail() const
    {
        return rest;
    }
};

static __device__ __forceinline__ uint32_t word_of(uint4 v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

static __device__ __forceinline__ uint32_t byte_of(uint4 v, int i)
{
    return word_of(v, i / 4) >> i % 4 * 8 & 0xff;
}

static __device__ __forceinline__ float half_value(uint32_t bits)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

static __device__ __forceinline__ float half_of(uint4 v, int i)
{
    return half_value(word_of(v, i / 2) >> i % 2 * 16 & 0xffff);
}

/* Four bits, one to a byte */
static __device__ __forceinline__ uint32_t spread(uint32_t bits)
{
    return (bits & 15) * 0x00204081u & 0x01010101u;
}

/* Word i of 32 bytes that lie in pieces `from` and from + 1 */
template <class S> static __device__ __forceinline__ uint32_t word_in(const S &s, int from, int i)
{
    return word_of(s.piece(from + i / 4), i % 4);
}

/* Nibbles of Q4_0, Q4_1, Q5_0 and Q5_1: byte i has elements i and i + 16. */
template <class S> static __device__ __forceinline__ void nibbles(const S &s, int j, int *q)
{
    const uint4 v = s.piece(j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        q[i] = word_of(v, i) & 0x0f0f0f0f;
        q[i + 4] = word_of(v, i) >> 4 & 0x0f0f0f0f;
    }
}

/* Fifth bits: bit e belongs to element e. */
static __device__ __forceinline__ void fifth_bits(uint32_t bits, int *q)
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        q[i] |= static_cast<int>(spread(bits >> 4 * i) << 4);
}

/* The 6-bit scale and minimum of Q4_K and Q5_K; v: d, dmin and 12 bytes */
static __device__ __forceinline__ void k_scale(uint4 v, int j, float *scale, float *min)
{
    const uint32_t sc = j < 4 ? byte_of(v, 4 + j) & 63 : (byte_of(v, 8 + j) & 15) | byte_of(v, j) >> 6 << 4;
    const uint32_t mn = j < 4 ? byte_of(v, 8 + j) & 63 : byte_of(v, 8 + j) >> 4 | byte_of(v, 4 + j) >> 6 << 4;
    *scale = half_of(v, 0) * static_cast<float>(sc);
    *min = -(half_of(v, 1) * static_cast<float>(mn));
}

/* The 6-bit scale of Q3_K; v: 12 bytes and d */
static __device__ __forceinline__ float q3_scale(uint4 v, int j)
{
    const uint32_t low = j < 8 ? byte_of(v, j) & 15 : byte_of(v, j - 8) >> 4, high = byte_of(v, 8 + j % 4) >> j / 4 * 2 & 3;
    return half_of(v, 6) * static_cast<float>(static_cast<int>(low | high << 4) - 32);
}

/* Inputs 32 j … 32 j + 31 of a super */
template <int TYPE, class S> static __device__ __forceinline__ sub_block<TYPE> read_sub(const S &s, int j)
{
    sub_block<TYPE> b = {};
    const int half = j / 4, shift = 2 * (j % 4); /* of two-bit fields: 128 inputs have 32 bytes */
    if constexpr (TYPE == PL_Q4_0 || TYPE == PL_Q4_1) {
        nibbles(s, j, b.q);
        b.scale[0] = half_of(s.piece(8), j);
        if (TYPE == PL_Q4_1)
            b.min[0] = half_of(s.piece(9), j);
    } else if constexpr (TYPE == PL_Q5_0 || TYPE == PL_Q5_1) {
        nibbles(s, j, b.q);
        fifth_bits(word_in(s, 8, j), b.q);
        b.scale[0] = half_of(s.piece(10), j);
        if (TYPE == PL_Q5_1)
            b.min[0] = half_of(s.piece(11), j);
    } else if constexpr (TYPE == PL_Q8_0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            b.q[i] = static_cast<int>(word_in(s, 2 * j, i));
        b.scale[0] = half_of(s.piece(16), j);
    } else if constexpr (TYPE == PL_Q2_K) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            b.q[i] = word_in(s, 2 * half, i) >> shift & 0x03030303;
        const float d = half_value(s.tail()), dmin = half_value(s.tail() >> 16);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t both = byte_of(s.piece(4), 2 * j + i);
            b.scale[i] = d * static_cast<float>(both & 15);
            b.min[i] = -(dmin * static_cast<float>(both >> 4));
        }
    } else if constexpr (TYPE == PL_Q3_K) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            b.q[i] = (word_in(s, 2 + 2 * half, i) >> shift & 0x03030303) | (word_in(s, 0, i) >> j & 0x01010101) << 2;
        b.scale[0] = q3_scale(s.piece(6), 2 * j);
        b.scale[1] = q3_scale(s.piece(6), 2 * j + 1);
    } else if constexpr (TYPE == PL_Q4_K || TYPE == PL_Q5_K) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            b.q[i] = word_in(s, j / 2 * 2, i) >> j % 2 * 4 & 0x0f0f0f0f;
            if (TYPE == PL_Q5_K)
                b.q[i] |= (word_in(s, 8, i) >> j & 0x01010101) << 4;
        }
        k_scale(s.piece(TYPE == PL_Q4_K ? 8 : 10), j, &b.scale[0], &b.min[0]);
    } else {
        static_assert(TYPE == PL_Q6_K, "a block type");
#pragma unroll
        for (int i = 0; i < 8; i++)
            b.q[i] = (word_in(s, half * 4 + j % 2 * 2, i) >> j % 4 / 2 * 4 & 0x0f0f0f0f) | (word_in(s, 8 + half * 2, i) >> shift & 0x03030303) << 4;
#pragma unroll
        for (int i = 0; i < 2; i++)
            b.scale[i] = half_value(s.tail()) * static_cast<float>(static_cast<int8_t>(byte_of(s.piece(12), 2 * j + i)));
    }
    return b;
}

#endif
