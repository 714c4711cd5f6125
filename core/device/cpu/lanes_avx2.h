/* lanes_avx2: the lane type of vec.h for AVX2, FMA and F16C. A vector of 16 lanes is two registers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_LANES_AVX2_H
#define PL_DEVICE_CPU_LANES_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

typedef struct {
    __m256 a, b;
} vf;

static inline vf vf_of(__m256 a, __m256 b) { return (vf){a, b}; }
static inline vf vf_load(const float *p) { return vf_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void vf_store(float *p, vf v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
static inline vf vf_set(float x) { return vf_of(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline vf vf_add(vf x, vf y) { return vf_of(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static inline vf vf_sub(vf x, vf y) { return vf_of(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static inline vf vf_mul(vf x, vf y) { return vf_of(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static inline vf vf_div(vf x, vf y) { return vf_of(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static inline vf vf_fma(vf x, vf y, vf z)
{
    return vf_of(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
static inline vf vf_max(vf x, vf y) { return vf_of(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static inline vf vf_abs(vf x)
{
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return vf_of(_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask));
}
static inline __m256 clamp8(__m256 x, float lo, float hi)
{
    return _mm256_min_ps(_mm256_set1_ps(hi), _mm256_max_ps(_mm256_set1_ps(lo), x)); /* the second operand passes NaN on */
}
static inline vf vf_clamp(vf x, float lo, float hi) { return vf_of(clamp8(x.a, lo, hi), clamp8(x.b, lo, hi)); }
static inline __m256 pow2_8(__m256 n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline vf vf_times_pow2(vf x, vf n) { return vf_mul(x, vf_of(pow2_8(n.a), pow2_8(n.b))); }
static inline __m256 f16_8(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline vf vf_load_f16(const uint16_t *p) { return vf_of(f16_8(p), f16_8(p + 8)); }
static inline __m256 bf16_8(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline vf vf_load_bf16(const uint16_t *p) { return vf_of(bf16_8(p), bf16_8(p + 8)); }
/* The halves are added to each other until one lane is left. */
static inline float vf_sum(vf v)
{
    __m256 h = _mm256_add_ps(v.a, v.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
/* NaN when a lane is NaN */
static inline float vf_largest(vf v)
{
    __m256 h = _mm256_max_ps(v.a, v.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    int nan = _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v.a, v.a, _CMP_UNORD_Q), _mm256_cmp_ps(v.b, v.b, _CMP_UNORD_Q)));
    return nan != 0 ? NAN : _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
/* Largest magnitude of 32 values; NaN when one of them is not finite. Magnitudes order as their bits do. */
static inline float vf_magnitude(vf x, vf y)
{
    x = vf_abs(x);
    y = vf_abs(y);
    __m256i h = _mm256_max_epi32(_mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)),
                                 _mm256_max_epi32(_mm256_castps_si256(y.a), _mm256_castps_si256(y.b)));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1));
    return _mm_cvtsi128_si32(q) < 0x7f800000 ? _mm_cvtss_f32(_mm_castsi128_ps(q)) : NAN;
}
/* The largest pattern of bits in each of four vectors */
static inline __m256i larger_half(vf x) { return _mm256_max_epu32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
static inline __m128i vf_largest_bits(vf a, vf b, vf c, vf d)
{
    const __m256i x = larger_half(a), y = larger_half(b), z = larger_half(c), w = larger_half(d);
    const __m256i xy = _mm256_max_epu32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
    const __m256i zw = _mm256_max_epu32(_mm256_unpacklo_epi32(z, w), _mm256_unpackhi_epi32(z, w));
    const __m256i all = _mm256_max_epu32(_mm256_unpacklo_epi64(xy, zw), _mm256_unpackhi_epi64(xy, zw));
    return _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
/* Rounds 32 values within ±127 to int8. */
static inline __m256i vf_round_i8(vf x, vf y)
{
    __m256i i0 = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m256i i1 = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
    __m256i i = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(i0, i1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_max_epi8(i, _mm256_set1_epi8(-127)); /* NaN converts to -2^31 */
}

enum { LORA_X = 2, LORA_R = 2 }; /* rows of x and of A that are in registers together */

#include "core/device/cpu/attn_avx2.h"
#include "core/device/cpu/vec.h"
#include "core/device/cpu/vec_lora.h"

#endif
