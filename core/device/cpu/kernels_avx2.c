/* kernels_avx2: the kernels for AVX2, FMA and F16C. A vector of 16 lanes is two registers.
 * SPDX-License-Identifier: Apache-2.0 */
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
static inline vf vf_pow2(vf n) { return vf_of(pow2_8(n.a), pow2_8(n.b)); }
static inline __m256 f16_8(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline vf vf_load_f16(const uint16_t *p) { return vf_of(f16_8(p), f16_8(p + 8)); }
static inline __m256 bf16_8(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline vf vf_load_bf16(const uint16_t *p) { return vf_of(bf16_8(p), bf16_8(p + 8)); }
static inline void vf_store_f16(uint16_t *p, vf v)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
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
/* Rounds 32 values within ±127 to int8, stores them, and gives the sums of the first and of the last 16. */
static inline void vf_round_i8(vf x, vf y, int8_t *q, int *sum_x, int *sum_y)
{
    __m256i i0 = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m256i i1 = _mm256_packs_epi32(_mm256_cvtps_epi32(y.a), _mm256_cvtps_epi32(y.b));
    __m256i i = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(i0, i1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    i = _mm256_max_epi8(i, _mm256_set1_epi8(-127)); /* NaN converts to -2^31 */
    _mm256_storeu_si256((void *)q, i);
    __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), i), _mm256_set1_epi16(1));
    s = _mm256_hadd_epi32(s, s);
    s = _mm256_hadd_epi32(s, s);
    *sum_x = _mm256_extract_epi32(s, 0);
    *sum_y = _mm256_extract_epi32(s, 4);
}

enum { LORA_X = 2, LORA_R = 2 }; /* rows of x and of A that are in registers together */

#include "core/device/cpu/attn_avx2.h"
#include "core/device/cpu/vec.h"
#include "core/device/cpu/vec_lora.h"

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

/* As in AVX-512, with the 16 rows as two halves one after the other. */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, const struct pl_cpu_act *x,
                                                       uint32_t t0, uint32_t bits, uint32_t sub, bool has_min, bool half,
                                                       uint32_t n_t, float *out, size_t stride, bool add)
{
    const uint32_t loads = sub * bits / 32, K = p->cols, n_subs = K / sub;
    const bool is_signed = bits == 8 && !has_min && half;
    const float *sums = (sub == 16 ? x->sum16 : x->sum32) + (size_t)t0 * n_subs, *d = x->d + (size_t)t0 * (K / 32);
    const int8_t *q = x->q + (size_t)t0 * K;
    const __m256i low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x80);
    const __m256 minus_offset = _mm256_set1_ps(is_signed ? 128 - p->offset : -p->offset);
    const size_t scale_bytes = half ? 32 : 64, quant_bytes = (size_t)PL_CPU_GROUP * sub * bits / 8;
    const size_t one = quant_bytes + scale_bytes * (has_min ? 2 : 1);
    for (uint32_t side = 0; side < 2; side++) {
        __m256 acc[TOKENS];
        for (uint32_t i = 0; i < n_t; i++)
            acc[i] = _mm256_setzero_ps();
        const uint8_t *at = w + 32 * side;
        for (uint32_t b = 0; b < n_subs; b++, at += 2 * one) {
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
            if (side == 0) { /* the same group of the next unit */
#pragma GCC unroll 10
                for (uint32_t ahead = 0; ahead < one; ahead += 64)
                    _mm_prefetch((const char *)at + p->unit_bytes + ahead, _MM_HINT_T0);
            }
            const uint8_t *scales = at - 32 * side + quant_bytes + side * scale_bytes / 2;
            __m256 scale = half ? f16_8((const uint16_t *)scales) : _mm256_loadu_ps((const float *)scales), min;
            scales += scale_bytes;
            if (has_min)
                min = half ? f16_8((const uint16_t *)scales) : _mm256_loadu_ps((const float *)scales);
            else
                min = _mm256_mul_ps(scale, minus_offset);
#pragma GCC unroll 4
            for (uint32_t i = 0; i < n_t; i++) {
                __m256i sum = bits == 4 ? _mm256_madd_epi16(dot[i], _mm256_set1_epi16(1)) : dot[i];
                __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(d[i * (K / 32) + b * sub / 32]));
                acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, acc[i]);
                acc[i] = _mm256_fmadd_ps(min, _mm256_set1_ps(sums[i * n_subs + b]), acc[i]);
            }
        }
        float *to = out + 8 * side;
#pragma GCC unroll 4
        for (uint32_t i = 0; i < n_t; i++, to += stride)
            _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), acc[i]) : acc[i]);
    }
}

#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void rows_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w,                \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,        \
                                                         float *out, size_t stride, bool add)                          \
    {                                                                                                                  \
        for (; n_t >= TOKENS; n_t -= TOKENS, t0 += TOKENS, out += TOKENS * stride)                                     \
            tile(p, w, x, t0, bits, sub, has_min, half, TOKENS, out, stride, add);                                     \
        if (n_t & 2)                                                                                                   \
            tile(p, w, x, t0, bits, sub, has_min, half, 2, out, stride, add), t0 += 2, out += 2 * stride;              \
        if (n_t & 1)                                                                                                   \
            tile(p, w, x, t0, bits, sub, has_min, half, 1, out, stride, add);                                          \
    }
#include "core/device/cpu/layouts.h"
#undef LAYOUT

static void rows_block(const struct pl_cpu_part *p, uint32_t unit, uint32_t n_groups, const struct pl_cpu_act *x, uint32_t t0,
                       uint32_t n_t, float *out, size_t stride, bool add)
{
    const uint8_t *w = p->packed + unit * p->unit_bytes;
    for (uint32_t g = 0; g < n_groups; g++, w += p->unit_bytes / (2 * (p->cols / p->sub)), out += PL_CPU_GROUP) {
#define LAYOUT(bits_, sub_, has_min_, half_)                                                                           \
        if (p->bits == bits_ && p->sub == sub_ && p->has_min == has_min_ && p->half_scales == half_)                   \
            rows_##bits_##_##sub_##_##has_min_##_##half_(p, w, x, t0, n_t, out, stride, add);
#include "core/device/cpu/layouts.h"
#undef LAYOUT
    }
}

const struct pl_cpu_kernels pl_cpu_kernels_avx2 = {
    .name = "avx2", .packed = true, .quant_row = vec_quant_row, .rows_block = rows_block, .rows_float = vec_rows_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .narrow = vec_narrow, .attn = vec_attn,
    .lora_down = vec_lora_down, .lora_up = vec_lora_up,
    .rotate = vec_rotate,
};
