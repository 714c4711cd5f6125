/* kernels_avx2: the kernels for AVX2, FMA and F16C.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cpu/lanes_avx2.h"

enum { TOKENS = 4 }; /* whose sums stay in registers together */

/* How products of unsigned weights and signed inputs are summed, by what the pairs of VPMADDUBSW can reach (int16):
 * 4-bit quants 15 · 127 · 2, eight of which fit: they are added as int16 and widened once per sub-block; 8-bit ones up to 63
 * (Q5, Q6) fit singly; Q8_0's are made signed, and the sign goes over to the input: 128 · 127 · 2. */
static inline __attribute__((always_inline)) __m256i dot4(__m256i dot, __m256i w, __m256i x, uint32_t bits, bool is_signed)
{
    if (bits == 4)
        return _mm256_add_epi16(dot, _mm256_maddubs_epi16(w, x));
    if (is_signed)
        x = _mm256_sign_epi8(x, w), w = _mm256_abs_epi8(w);
    return _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}

static inline __attribute__((always_inline)) void step_dots(__m256i w, const int8_t *q, size_t stride, uint32_t n_t, uint32_t bits,
                                                            bool is_signed, __m256i dot[])
{
#pragma GCC unroll 4
    for (uint32_t i = 0; i < n_t; i++) {
        int32_t four;
        memcpy(&four, q + i * stride, 4);
        dot[i] = dot4(dot[i], w, _mm256_set1_epi32(four), bits, is_signed);
    }
}

/* As in AVX-512, with the 16 rows of group g as two halves one after the other. */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, uint32_t g, const struct pl_cpu_act *x,
                                                       uint32_t t0, uint32_t bits, uint32_t sub, bool has_min, bool half,
                                                       uint32_t n_t, float *out, size_t stride, bool add)
{
    const uint32_t loads = sub * bits / 32, K = p->cols, n_subs = K / sub;
    const bool is_signed = bits == 8 && !has_min && half;
    const struct pl_cpu_block *blocks = x->b + (size_t)t0 * (K / 32);
    const int8_t *q = x->q + (size_t)t0 * K;
    const __m256i low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
    const int32_t offset = 1 << pl_cpu_offset_bits(bits, sub);
    const size_t scale_bytes = half ? 32 : 64, quant_bytes = (size_t)PL_CPU_GROUP * sub * bits / 8;
    const size_t one = quant_bytes + scale_bytes * (has_min ? 2 : 1);
    for (uint32_t side = 0; side < 2; side++) {
        __m256 acc[TOKENS];
        for (uint32_t i = 0; i < n_t; i++)
            acc[i] = _mm256_setzero_ps();
        const uint8_t *at = w + g * quant_bytes + 32 * side, *scales = w + 2 * quant_bytes + g * scale_bytes + side * scale_bytes / 2;
        const uint8_t *next = w + p->unit_bytes + g * one;
        for (uint32_t b = 0; b < n_subs; b++, at += 2 * one, scales += 2 * one, next += 2 * one) {
            __m256i dot[TOKENS];
#pragma GCC unroll 4
            for (uint32_t i = 0; i < n_t; i++)
                dot[i] = _mm256_setzero_si256();
            for (uint32_t k = 0; k < loads; k++) {
                __m256i v = _mm256_loadu_si256((const void *)(at + 64 * k));
                const int8_t *in = q + b * sub + 4 * k;
                if (bits == 4) {
                    step_dots(_mm256_and_si256(v, low), in, K, n_t, bits, false, dot);
                    step_dots(_mm256_and_si256(_mm256_srli_epi16(v, 4), low), in + sub / 2, K, n_t, bits, false, dot);
                } else {
                    step_dots(is_signed ? _mm256_xor_si256(v, flip) : v, in, K, n_t, bits, is_signed, dot);
                }
            }
            if (side == 0) {
#pragma GCC unroll 10
                for (uint32_t ahead = 0; ahead < one; ahead += 64)
                    _mm_prefetch((const char *)next + ahead, _MM_HINT_T0);
            }
            const __m256 scale = half ? f16_8((const uint16_t *)scales) : _mm256_loadu_ps((const float *)scales);
            const uint8_t *minima = scales + 2 * scale_bytes;
            const __m256 min = !has_min ? scale : half ? f16_8((const uint16_t *)minima) : _mm256_loadu_ps((const float *)minima);
#pragma GCC unroll 4
            for (uint32_t i = 0; i < n_t; i++) {
                __m256i sum = bits == 4 ? _mm256_madd_epi16(dot[i], _mm256_set1_epi16(1)) : dot[i];
                const struct pl_cpu_block *block = blocks + i * (K / 32) + b * sub / 32;
                if (!has_min && !is_signed)
                    sum = _mm256_add_epi32(sum, _mm256_set1_epi32(sub == 32 ? block->start / (128 / offset) : block->minus16[b % 2] * offset));
                __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
                if (has_min)
                    y = _mm256_fmadd_ps(min, _mm256_set1_ps(sub == 32 ? block->sum : (float)-block->minus16[b % 2]), y);
                acc[i] = _mm256_fmadd_ps(y, _mm256_set1_ps(block->d), acc[i]);
            }
        }
        float *to = out + 8 * side;
#pragma GCC unroll 4
        for (uint32_t i = 0; i < n_t; i++, to += stride)
            _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), acc[i]) : acc[i]);
    }
}

#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void rows_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w, uint32_t g,    \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,        \
                                                         float *out, size_t stride, bool add)                          \
    {                                                                                                                  \
        for (; n_t >= TOKENS; n_t -= TOKENS, t0 += TOKENS, out += TOKENS * stride)                                     \
            tile(p, w, g, x, t0, bits, sub, has_min, half, TOKENS, out, stride, add);                                  \
        if (n_t & 2)                                                                                                   \
            tile(p, w, g, x, t0, bits, sub, has_min, half, 2, out, stride, add), t0 += 2, out += 2 * stride;           \
        if (n_t & 1)                                                                                                   \
            tile(p, w, g, x, t0, bits, sub, has_min, half, 1, out, stride, add);                                       \
    }
#include "core/device/cpu/layouts.h"
#undef LAYOUT

#define ROWS_BY_GROUP
#include "core/device/cpu/layouts.h"

const struct pl_cpu_kernels pl_cpu_kernels_avx2 = {
    .name = "avx2", .packed = true, .quant = vec_quant, .rows_block = rows_block, .rows_float = vec_rows_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .round16 = vec_round16,
    .query = vec_query, .attn = vec_attn, .blend = vec_blend,
    .lora_down = vec_lora_down, .lora_up = vec_lora_up,
    .rotate = vec_rotate,
};
