/* kernels_avx512: the kernels for AVX-512 with VNNI.
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

#include "core/device/cpu/cpu.h"

typedef __m512 vf;

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_clamp(vf x, float lo, float hi)
{
    return _mm512_min_ps(_mm512_set1_ps(hi), _mm512_max_ps(_mm512_set1_ps(lo), x)); /* the second operand passes NaN on */
}
static inline vf vf_pow2(vf n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline vf vf_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline void vf_store_f16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* Rounds to int8 (values within ±127), stores, returns the sum. */
static inline int vf_round_i8(vf v, int8_t *q)
{
    __m512i i = _mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(-127)); /* NaN converts to -2^31 */
    _mm_storeu_si128((void *)q, _mm512_cvtsepi32_epi8(i));
    return _mm512_reduce_add_epi32(i);
}

#include "core/device/cpu/vec.h"

/* One group of 16 rows × n_t tokens. A step feeds 4 inputs of 16 rows to VPDPBUSD; sums within a sub-block are exact
 * integers, then one multiply-add per sub-block for the scale and one for the minimum, in order. */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, const struct pl_cpu_act *x,
                                                       uint32_t t0, uint32_t bits, uint32_t sub, bool has_min, bool half,
                                                       uint32_t n_t, float out[][PL_CPU_GROUP])
{
    const uint32_t steps = sub / 4, K = p->cols, n_subs = K / sub;
    const float *sums = sub == 16 ? x->sum16 : x->sum32;
    const __m512i low = _mm512_set1_epi8(15);
    const vf minus_offset = vf_set(-p->offset);
    const int8_t *q[PL_CPU_TILE];
    const float *d[PL_CPU_TILE], *s[PL_CPU_TILE];
    vf acc[PL_CPU_TILE];
    for (uint32_t i = 0; i < n_t; i++) {
        size_t t = t0 + i;
        q[i] = x->q + t * K;
        d[i] = x->d + t * (K / 32);
        s[i] = sums + t * n_subs;
        acc[i] = vf_set(0.f);
    }
    for (uint32_t b = 0; b < n_subs; b++) {
        __m512i v[8];
        if (bits == 4) {
            for (uint32_t k = 0; k < steps / 2; k++) {
                __m512i both = _mm512_loadu_si512(w + 64 * k);
                v[k] = _mm512_and_si512(both, low);
                v[k + steps / 2] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
            w += 32 * steps;
        } else {
            for (uint32_t k = 0; k < steps; k++)
                v[k] = _mm512_loadu_si512(w + 64 * k);
            w += 64 * steps;
        }
        vf scale = half ? vf_load_f16((const uint16_t *)w) : vf_load((const float *)w), min;
        w += half ? 32 : 64;
        if (has_min) {
            min = half ? vf_load_f16((const uint16_t *)w) : vf_load((const float *)w);
            w += half ? 32 : 64;
        } else {
            min = vf_mul(scale, minus_offset);
        }
        _mm_prefetch((const char *)w + 1024, _MM_HINT_T0);
        _mm_prefetch((const char *)w + 1088, _MM_HINT_T0);
        _mm_prefetch((const char *)w + 1152, _MM_HINT_T0);
        _mm_prefetch((const char *)w + 1216, _MM_HINT_T0);
        for (uint32_t i = 0; i < n_t; i++) {
            const int8_t *in = q[i] + b * sub;
            __m512i dot = _mm512_setzero_si512();
            for (uint32_t k = 0; k < steps; k++) {
                int32_t four;
                memcpy(&four, in + 4 * k, 4);
                dot = _mm512_dpbusd_epi32(dot, v[k], _mm512_set1_epi32(four));
            }
            acc[i] = vf_fma(_mm512_cvtepi32_ps(dot), vf_mul(scale, vf_set(d[i][b * sub / 32])), acc[i]);
            acc[i] = vf_fma(min, vf_set(s[i][b]), acc[i]);
        }
    }
    for (uint32_t i = 0; i < n_t; i++)
        vf_store(out[i], acc[i]);
}

/* The tiles of one layout; the token counts that are not listed are put together from those that are. */
#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void tile_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w,               \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,      \
                                                         float out[][PL_CPU_GROUP])                                  \
    {                                                                                                                  \
        if (n_t == 8) {                                                                                                \
            tile(p, w, x, t0, bits, sub, has_min, half, 8, out);                                                       \
            return;                                                                                                    \
        }                                                                                                              \
        if (n_t & 4)                                                                                                   \
            tile(p, w, x, t0, bits, sub, has_min, half, 4, out), t0 += 4, out += 4;                                    \
        if (n_t & 2)                                                                                                   \
            tile(p, w, x, t0, bits, sub, has_min, half, 2, out), t0 += 2, out += 2;                                    \
        if (n_t & 1)                                                                                                   \
            tile(p, w, x, t0, bits, sub, has_min, half, 1, out);                                                       \
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

const struct pl_cpu_kernels pl_cpu_kernels_avx512 = {
    .name = "avx512", .packed = true, .quant_row = vec_quant_row, .tile_block = tile_block, .tile_float = vec_tile_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .narrow = vec_narrow, .attn = vec_attn,
};
