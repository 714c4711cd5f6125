/* attn_avx2: what attention needs of AVX2 beyond the float lanes of vec.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_ATTN_AVX2_H
#define PL_DEVICE_CPU_ATTN_AVX2_H

/* See attn_avx512.h. */
enum { VQ = 2, WQ = 2, VP = 2, VD = 2, VI = 1 };

static inline vf vf_head(vf x, uint32_t n, float rest)
{
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32(n < 16 ? (int)n : 16);
    const __m256 r = _mm256_set1_ps(rest);
    const __m256i a = _mm256_cmpgt_epi32(count, lanes), b = _mm256_cmpgt_epi32(count, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)));
    return vf_of(_mm256_blendv_ps(r, x.a, _mm256_castsi256_ps(a)), _mm256_blendv_ps(r, x.b, _mm256_castsi256_ps(b)));
}
static inline __m256 larger_bits8(__m256 a, __m256 b)
{
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
static inline vf vf_larger_bits(vf x, vf y) { return vf_of(larger_bits8(x.a, y.a), larger_bits8(x.b, y.b)); }
static inline __m256 pairs8(const uint16_t *p, bool second)
{
    const __m256i x = _mm256_loadu_si256((const void *)p);
    return _mm256_castsi256_ps(second ? _mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(x, 16));
}
static inline vf vf_load_pairs(const uint16_t *p, bool second) { return vf_of(pairs8(p, second), pairs8(p + 16, second)); }
static inline __attribute__((always_inline)) __m256 butterfly8(__m256 x, uint32_t distance)
{
    const __m256 y = distance == 1 ? _mm256_permute_ps(x, 0xb1) : distance == 2 ? _mm256_permute_ps(x, 0x4e) : _mm256_permute2f128_ps(x, x, 1);
    const __m256 sum = _mm256_add_ps(x, y), difference = _mm256_sub_ps(y, x);
    return distance == 1   ? _mm256_blend_ps(sum, difference, 0xaa)
           : distance == 2 ? _mm256_blend_ps(sum, difference, 0xcc)
                           : _mm256_blend_ps(sum, difference, 0xf0);
}
static inline __attribute__((always_inline)) vf vf_butterfly(vf x, uint32_t distance)
{
    if (distance == 8)
        return vf_of(_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b));
    return vf_of(butterfly8(x.a, distance), butterfly8(x.b, distance));
}

typedef struct {
    __m256i a, b;
} vi;

static inline vi vi_set(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline vi vi_values(const uint8_t *p)
{
    return (vi){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}
static inline __m256i four8(const void *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}
#ifdef __AVXVNNI__
enum { KEY_OFFSET = PL_CPU_KEY_OFFSET };

static inline vi vi_keys(const uint8_t *p) { return vi_values(p); }
static inline __m256i dot8(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
static inline vi vi_dot_keys(vi sum, vi keys, const int8_t *query)
{
    const __m256i q = four8(query);
    return (vi){dot8(sum.a, keys.a, q), dot8(sum.b, keys.b, q)};
}
#else
enum { KEY_OFFSET = 0 };

static inline vi vi_keys(const uint8_t *p)
{
    const __m256i offset = _mm256_set1_epi8((char)PL_CPU_KEY_OFFSET);
    const vi x = vi_values(p);
    return (vi){_mm256_xor_si256(x.a, offset), _mm256_xor_si256(x.b, offset)};
}
/* Keys, values and both parts of queries and weights reach 127 at most: a pair's sum fits into int16. */
static inline __m256i dot8(__m256i sum, __m256i a, __m256i b)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline vi vi_dot_keys(vi sum, vi keys, const int8_t *query)
{
    const __m256i q = four8(query);
    return (vi){dot8(sum.a, _mm256_abs_epi8(keys.a), _mm256_sign_epi8(q, keys.a)),
                dot8(sum.b, _mm256_abs_epi8(keys.b), _mm256_sign_epi8(q, keys.b))};
}
#endif
static inline vi vi_dot_values(vi sum, vi values, const uint8_t *weights)
{
    const __m256i w = four8(weights);
    return (vi){dot8(sum.a, w, values.a), dot8(sum.b, w, values.b)};
}
static inline vi vi_dot_pairs(vi sum, vi pairs, const int16_t *two)
{
    const __m256i t = four8(two);
    return (vi){_mm256_add_epi32(sum.a, _mm256_madd_epi16(pairs.a, t)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(pairs.b, t))};
}
static inline vf vi_float(vi x) { return vf_of(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
static inline void vf_store_i16(int16_t *p, vf x)
{
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256((void *)p, _mm256_permute4x64_epi64(both, 0xd8));
}
static inline vf vi_join(vi high, vi low)
{
    return vf_of(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high.a, 7), low.a)),
                 _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high.b, 7), low.b)));
}
static inline __m128i bytes16(__m256i a, __m256i b)
{
    const __m256i x = _mm256_packs_epi32(a, b), y = _mm256_packs_epi16(x, x);
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(y, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5)));
}
static inline void vf_split(vf x, int32_t half, void *high, void *low)
{
    const __m256i r = _mm256_set1_epi32(half), a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i ha = _mm256_srai_epi32(_mm256_add_epi32(a, r), 7), hb = _mm256_srai_epi32(_mm256_add_epi32(b, r), 7);
    _mm_storeu_si128(high, bytes16(ha, hb));
    _mm_storeu_si128(low, bytes16(_mm256_sub_epi32(a, _mm256_slli_epi32(ha, 7)), _mm256_sub_epi32(b, _mm256_slli_epi32(hb, 7))));
}

#endif
