/* mma: the tensor cores' product of a 16 × k tile and a k × 8 tile, for one warp. Where a processor lacks the instruction, and
 * under emulation, the lanes exchange their pieces and multiply by themselves.
 *
 * Lane 4 g + t of the warp holds, as words of 4 bytes (int8) or 2 halves (f16, bf16), n = 4 or 2 elements each:
 *   a[0]   row g,     elements n t … of the first half of k     a[2]   the same of the second half
 *   a[1]   row g + 8, elements n t … of the first half of k     a[3]   the same of the second half
 *   b[0]   column g,  elements n t … of the first half of k     b[1]   the same of the second half
 *   c[0], c[1]   row g, columns 2 t and 2 t + 1                 c[2], c[3]   row g + 8
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_MMA_H
#define PL_CUDA_MMA_H

#include "cuda/launch.h"

#ifdef __CUDA_ARCH__
#define PL_ARCH __CUDA_ARCH__
#else
#define PL_ARCH 0
#endif

/* int8, k = 32: c += a · b */
static __device__ __forceinline__ void mma_s8_k32(int *c, const uint32_t *a, const uint32_t *b);
/* int8, k = 16: a[0], a[1] and b[0] only */
static __device__ __forceinline__ void mma_s8_k16(int *c, const uint32_t *a, uint32_t b);
/* k = 16, float sums */
template <bool BF16> static __device__ __forceinline__ void mma_half(float *c, const uint32_t *a, const uint32_t *b);

/* ---- by the lanes themselves ----------------------------------------------------------------------------------------------- */

/* The words of another lane */
#ifdef __CUDACC__
#define PL_MMA_LANES(low, high, b) const uint32_t mma_words[3] = {low, high, b}
#define PL_MMA_LANE(from, i) __shfl_sync(ALL_LANES, mma_words[i], from)
#else /* all three by one exchange */
#define PL_MMA_LANES(low, high, b)                                                                                     \
    const emu_words mma_words = {{low, high, b}};                                                                      \
    const emu_value *const mma_all = emu_give("mma", ALL_LANES, mma_words, __FILE__, __LINE__)
#define PL_MMA_LANE(from, i) reinterpret_cast<const emu_words *>(mma_all + (from))->word[i]
#endif

/* One half of k: rows g and g + 8, columns 2 t and 2 t + 1; DOT multiplies two words and adds */
#define PL_MMA_BY_LANES(c, a_low, a_high, b, DOT)                                                                      \
    do {                                                                                                               \
        const unsigned mma_lane = threadIdx.x % WARP, mma_g = mma_lane / 4, mma_t = mma_lane % 4;                      \
        PL_MMA_LANES(a_low, a_high, b);                                                                                \
        for (unsigned mma_k = 0; mma_k < 4; mma_k++) {                                                                 \
            const uint32_t low = PL_MMA_LANE(mma_g * 4 + mma_k, 0), high = PL_MMA_LANE(mma_g * 4 + mma_k, 1);          \
            const uint32_t left = PL_MMA_LANE(mma_t * 8 + mma_k, 2), right = PL_MMA_LANE(mma_t * 8 + 4 + mma_k, 2);    \
            (c)[0] = DOT(low, left, (c)[0]);                                                                           \
            (c)[1] = DOT(low, right, (c)[1]);                                                                          \
            (c)[2] = DOT(high, left, (c)[2]);                                                                          \
            (c)[3] = DOT(high, right, (c)[3]);                                                                         \
        }                                                                                                              \
    } while (0)

static __device__ __forceinline__ int dot_s8(uint32_t a, uint32_t b, int c)
{
    return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}

static __device__ __forceinline__ float dot_f16(uint32_t a, uint32_t b, float c)
{
    c = fmaf(__half2float(__ushort_as_half(a & 0xffff)), __half2float(__ushort_as_half(b & 0xffff)), c);
    return fmaf(__half2float(__ushort_as_half(a >> 16)), __half2float(__ushort_as_half(b >> 16)), c);
}

static __device__ __forceinline__ float dot_bf16(uint32_t a, uint32_t b, float c)
{
    c = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), c);
    return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), c);
}

/* ---- by the processor -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void mma_s8_k16(int *c, const uint32_t *a, uint32_t b)
{
#ifndef __CUDACC__
    if (!emu_backwards())
        return emu_mma_s8_k16(c, a, b);
#endif
#if PL_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
#elif PL_ARCH >= 750
    for (int i = 0; i < 2; i++)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
            : "r"(a[i]), "r"(b));
#else
    PL_MMA_BY_LANES(c, a[0], a[1], b, dot_s8);
#endif
}

static __device__ __forceinline__ void mma_s8_k32(int *c, const uint32_t *a, const uint32_t *b)
{
#if PL_ARCH >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_s8_k16(c, a, b[0]);
    mma_s8_k16(c, a + 2, b[1]);
#endif
}

template <bool BF16> static __device__ __forceinline__ void mma_half(float *c, const uint32_t *a, const uint32_t *b)
{
#ifndef __CUDACC__
    if (!emu_backwards())
        return emu_mma_half<BF16>(c, a, b);
#endif
#if PL_ARCH >= 800
    if (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 2; i++) {
#if PL_ARCH >= 750
        if (!BF16) {
            asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
            continue;
        }
#endif
        if (BF16)
            PL_MMA_BY_LANES(c, a[2 * i], a[2 * i + 1], b[i], dot_bf16);
        else
            PL_MMA_BY_LANES(c, a[2 * i], a[2 * i + 1], b[i], dot_f16);
    }
#endif
}

#endif
