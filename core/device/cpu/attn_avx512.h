/* attn_avx512: what attention needs of AVX-512 beyond the float lanes of vec.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_ATTN_AVX512_H
#define PL_DEVICE_CPU_ATTN_AVX512_H

/* Queries whose results are in registers together (WQ: of F16); vectors of positions (scores) and of dimensions (values) of each, in
 * products of floats and of 16 bits, and of bytes */
enum { VQ = 4, WQ = 6, VP = 2, VD = 4, VI = 2 };

/* Lanes from n on become `rest`. */
static inline vf vf_head(vf x, uint32_t n, float rest)
{
    return _mm512_mask_mov_ps(_mm512_set1_ps(rest), (__mmask16)(n < 16 ? (1u << n) - 1 : 0xffff), x);
}
/* The larger of two patterns of bits; of numbers above 0 the larger number, and NaN above all. */
static inline vf vf_larger_bits(vf a, vf b)
{
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
/* The first or second of each of 16 pairs of BF16 */
static inline vf vf_load_pairs(const uint16_t *p, bool second)
{
    const __m512i x = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(second ? _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(x, 16));
}
/* (a, b) becomes (a + b, a - b) for lanes that lie `distance` apart: 1, 2, 4 or 8 */
static inline __attribute__((always_inline)) vf vf_butterfly(vf x, uint32_t distance)
{
    const __mmask16 minus = distance == 1 ? 0xaaaa : distance == 2 ? 0xcccc : distance == 4 ? 0xf0f0 : 0xff00;
    const vf y = distance == 1   ? _mm512_permute_ps(x, 0xb1)
                 : distance == 2 ? _mm512_permute_ps(x, 0x4e)
                 : distance == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                                 : _mm512_shuffle_f32x4(x, x, 0x4e);
    return _mm512_mask_sub_ps(_mm512_add_ps(x, y), minus, y, x);
}

/* 16 sums of integer products. A product takes two integers of 16 bits a lane, or four bytes: keys are unsigned and queries signed,
 * weights unsigned and values signed. */
typedef __m512i vi;

enum { KEY_OFFSET = PL_CPU_KEY_OFFSET }; /* of what vi_keys gives */

static inline vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_keys(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline vi vi_values(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline vi vi_four(const void *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}
static inline vi vi_dot_keys(vi sum, vi keys, const int8_t *query) { return _mm512_dpbusd_epi32(sum, keys, vi_four(query)); }
static inline vi vi_dot_values(vi sum, vi values, const uint8_t *weights) { return _mm512_dpbusd_epi32(sum, vi_four(weights), values); }
static inline vi vi_dot_pairs(vi sum, vi pairs, const int16_t *two) { return _mm512_dpwssd_epi32(sum, pairs, vi_four(two)); }
static inline vf vi_float(vi x) { return _mm512_cvtepi32_ps(x); }
/* Rounds 16 numbers that fit. */
static inline void vf_store_i16(int16_t *p, vf x) { _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x))); }
/* 128 high + low */
static inline vf vi_join(vi high, vi low) { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low)); }
/* The opposite: rounds 16 numbers and stores them in two parts; `half` added before the shift makes low parts signed. */
static inline void vf_split(vf x, int32_t half, void *high, void *low)
{
    const __m512i i = _mm512_cvtps_epi32(x), h = _mm512_srai_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(half)), 7);
    _mm_storeu_si128(high, _mm512_cvtepi32_epi8(h));
    _mm_storeu_si128(low, _mm512_cvtepi32_epi8(_mm512_sub_epi32(i, _mm512_slli_epi32(h, 7))));
}

#endif
