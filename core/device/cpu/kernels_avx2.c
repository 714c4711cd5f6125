/* kernels_avx2: the kernels for AVX2, FMA and F16C. A vector of 16 lanes is two registers.
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

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
/* Rounds to int8 (values within ±127), stores, returns the sum. */
static inline int vf_round_i8(vf v, int8_t *q)
{
    int32_t i[16], sum = 0;
    _mm256_storeu_si256((void *)i, _mm256_cvtps_epi32(v.a));
    _mm256_storeu_si256((void *)(i + 8), _mm256_cvtps_epi32(v.b));
    for (int k = 0; k < 16; k++) {
        q[k] = (int8_t)i[k];
        sum += q[k];
    }
    return sum;
}

#include "core/device/cpu/vec.h"

/* dot[8 rows] += 4 inputs of 8 rows. 4-bit quants: pairs of products fit 16 bits; 8-bit ones are widened first. */
static inline __attribute__((always_inline)) __m256i dot4(__m256i dot, __m256i w, __m256i x, uint32_t bits)
{
    const __m256i ones = _mm256_set1_epi16(1);
    if (bits == 4)
        return _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
    const __m256i even = _mm256_set1_epi16(0xff);
    __m256i w0 = _mm256_and_si256(w, even), w1 = _mm256_srli_epi16(w, 8);
    __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x1 = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(dot, _mm256_add_epi32(_mm256_madd_epi16(w0, x0), _mm256_madd_epi16(w1, x1)));
}

/* As in AVX-512, with the 16 rows as two halves one after the other (8 accumulators stay in registers). */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, const struct pl_cpu_act *x,
                                                       uint32_t t0, uint32_t bits, uint32_t sub, bool has_min, bool half,
                                                       uint32_t n_t, float out[][PL_CPU_GROUP])
{
    const uint32_t steps = sub / 4, K = p->cols, n_subs = K / sub;
    const float *sums = sub == 16 ? x->sum16 : x->sum32;
    const __m256i low = _mm256_set1_epi8(15);
    const size_t scale_bytes = half ? 32 : 64, quant_bytes = (size_t)PL_CPU_GROUP * sub * bits / 8;
    const size_t unit = quant_bytes + scale_bytes * (has_min ? 2 : 1);
    for (uint32_t side = 0; side < 2; side++) {
        __m256 acc[PL_CPU_TILE];
        for (uint32_t i = 0; i < n_t; i++)
            acc[i] = _mm256_setzero_ps();
        const uint8_t *at = w + 32 * side;
        for (uint32_t b = 0; b < n_subs; b++, at += unit) {
            const uint8_t *scales = at - 32 * side + quant_bytes + side * scale_bytes / 2;
            __m256 scale = half ? f16_8((const uint16_t *)scales) : _mm256_loadu_ps((const float *)scales), min;
            scales += scale_bytes;
            if (has_min)
                min = half ? f16_8((const uint16_t *)scales) : _mm256_loadu_ps((const float *)scales);
            else
                min = _mm256_mul_ps(scale, _mm256_set1_ps(-p->offset));
            for (uint32_t i = 0; i < n_t; i++) {
                size_t t = t0 + i;
                const int8_t *in = x->q + t * K + b * sub;
                __m256i dot = _mm256_setzero_si256();
                for (uint32_t k = 0; k < steps; k++) {
                    __m256i v;
                    if (bits == 8) {
                        v = _mm256_loadu_si256((const void *)(at + 64 * k));
                    } else {
                        v = _mm256_loadu_si256((const void *)(at + 64 * (k % (steps / 2))));
                        v = _mm256_and_si256(k < steps / 2 ? v : _mm256_srli_epi16(v, 4), low);
                    }
                    int32_t four;
                    memcpy(&four, in + 4 * k, 4);
                    dot = dot4(dot, v, _mm256_set1_epi32(four), bits);
                }
                __m256 d = _mm256_set1_ps(x->d[t * (K / 32) + b * sub / 32]);
                acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, d), acc[i]);
                acc[i] = _mm256_fmadd_ps(min, _mm256_set1_ps(sums[t * n_subs + b]), acc[i]);
            }
        }
        for (uint32_t i = 0; i < n_t; i++)
            _mm256_storeu_ps(out[i] + 8 * side, acc[i]);
    }
}

#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void tile_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w,               \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,      \
                                                         float out[][PL_CPU_GROUP])                                  \
    {                                                                                                                  \
        if (n_t == 8)                                                                                                  \
            tile(p, w, x, t0, bits, sub, has_min, half, 8, out);                                                       \
        else if (n_t == 1)                                                                                             \
            tile(p, w, x, t0, bits, sub, has_min, half, 1, out);                                                       \
        else                                                                                                           \
            tile(p, w, x, t0, bits, sub, has_min, half, n_t, out);                                                     \
    }
#include "core/device/cpu/layouts.h"
#undef LAYOUT

static void tile_block(const struct pl_cpu_part *p, uint32_t group, const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,
                       float out[][PL_CPU_GROUP])
{
    const uint8_t *w = p->packed + group * p->group_bytes;
#define LAYOUT(bits_, sub_, has_min_, half_)                                                                           \
    if (p->bits == bits_ && p->sub == sub_ && p->has_min == has_min_ && p->half_scales == half_)                       \
        tile_##bits_##_##sub_##_##has_min_##_##half_(p, w, x, t0, n_t, out);
#include "core/device/cpu/layouts.h"
#undef LAYOUT
}

const struct pl_cpu_kernels pl_cpu_kernels_avx2 = {
    .name = "avx2", .packed = true, .quant_row = vec_quant_row, .tile_block = tile_block, .tile_float = vec_tile_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .narrow = vec_narrow, .attn = vec_attn,
};
