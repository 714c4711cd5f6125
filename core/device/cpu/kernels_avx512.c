/* kernels_avx512: the kernels for AVX-512 with VNNI.
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

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
static inline vf vf_times_pow2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline vf vf_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
/* The halves are added to each other until one lane is left. */
static inline float vf_sum(vf v)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
/* NaN when a lane is NaN */
static inline float vf_largest(vf v)
{
    return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0 ? NAN : _mm512_reduce_max_ps(v);
}
/* Largest magnitude of 32 values; NaN when one of them is not finite. Magnitudes order as their bits do. */
static inline float vf_magnitude(vf a, vf b)
{
    const __m512i x = _mm512_castps_si512(_mm512_abs_ps(a)), y = _mm512_castps_si512(_mm512_abs_ps(b));
    uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(x, y));
    float max;
    memcpy(&max, &bits, sizeof max);
    return bits < 0x7f800000 ? max : NAN;
}
/* The largest pattern of bits in each of four vectors */
static inline __m128i vf_largest_bits(vf a, vf b, vf c, vf d)
{
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b), z = _mm512_castps_si512(c), w = _mm512_castps_si512(d);
    const __m512i xy = _mm512_max_epu32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    const __m512i zw = _mm512_max_epu32(_mm512_unpacklo_epi32(z, w), _mm512_unpackhi_epi32(z, w));
    const __m512i all = _mm512_max_epu32(_mm512_unpacklo_epi64(xy, zw), _mm512_unpackhi_epi64(xy, zw));
    const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
/* Rounds 32 values within ±127 to int8. */
static inline __m256i vf_round_i8(vf a, vf b)
{
    const __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)); /* four of a, four of b, … */
    const __m256i bytes = _mm256_packs_epi16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    return _mm256_max_epi8(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7)), /* NaN converts to -2^31 */
                           _mm256_set1_epi8(-127));
}

enum { LORA_X = 4, LORA_R = 4 }; /* rows of x and of A that are in registers together */

#include "core/device/cpu/attn_avx512.h"
#include "core/device/cpu/vec.h"
#include "core/device/cpu/vec_lora.h"

enum { TOKENS = 6 }; /* of a tile: with 2 groups, 12 integer and 12 float sums in registers */

/* dot[g][i] += four weights of each of 16 rows of group g times inputs q[i * stride] and the three after them, for n_t tokens */
static inline __attribute__((always_inline)) void step_dots(__m512i w0, __m512i w1, const int8_t *q, size_t stride, uint32_t n_t,
                                                            __m512i dot[2][TOKENS])
{
#pragma GCC unroll 6
    for (uint32_t i = 0; i < n_t; i++) {
        int32_t four;
        memcpy(&four, q + i * stride, 4);
        dot[0][i] = _mm512_dpbusd_epi32(dot[0][i], w0, _mm512_set1_epi32(four));
        dot[1][i] = _mm512_dpbusd_epi32(dot[1][i], w1, _mm512_set1_epi32(four));
    }
}

static inline __attribute__((always_inline)) vf load_scale(const uint8_t *p, bool half)
{
    return half ? vf_load_f16((const uint16_t *)p) : vf_load((const float *)p);
}

/* What the sums of a sub-block, the n-th of its block, start at for weights with an offset, in all lanes */
static inline __attribute__((always_inline)) __m512i start_of(const struct pl_cpu_block *block, uint32_t n, uint32_t bits, uint32_t sub)
{
    if (sub == 32)
        return bits == 8 ? _mm512_set1_epi32(block->start) : _mm512_srai_epi32(_mm512_set1_epi32(block->start), 4);
    return _mm512_slli_epi32(_mm512_srai_epi32(_mm512_set1_epi16(block->minus16[n]), 16), bits == 8 ? 5 : 2);
}

/* Two groups of 16 rows × n_t tokens; the second one's results are kept if n_groups is 2. A step feeds 4 inputs of 32 rows to
 * VPDPBUSD for every token before the next step: chains of one token after the other would fill the scheduler with instructions
 * that wait, and four inputs are loaded once for both groups. In each token, the sum of a sub-block is an exact integer; scale, minimum
 * and the token's scale are applied once per sub-block, in order, the scale to a sum that is complete: a product of both scales is
 * ready early and takes a multiplier from the dots. Lines from next to end are fetched along the way. Every instruction counts here,
 * the integer ones too: tokens are reached from one pointer that moves on. */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, uint32_t n_groups,
                                                       const struct pl_cpu_act *x, uint32_t t0, uint32_t bits, uint32_t sub,
                                                       bool has_min, bool half, uint32_t n_t, float *out, size_t stride, bool add,
                                                       const uint8_t *next, const uint8_t *end)
{
    const uint32_t loads = sub * bits / 32, n_subs = p->cols / sub;
    const size_t K = p->cols, n_blocks = K / 32;
    const uint32_t scale_bytes = half ? 32 : 64, quant_bytes = sub * PL_CPU_GROUP * bits / 8;
    const uint32_t sub_bytes = 2 * (quant_bytes + scale_bytes * (has_min ? 2 : 1));
    const struct pl_cpu_block *blocks = x->b + t0 * n_blocks;
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t *q = x->q + t0 * K;
    const uint32_t fetch = ((uint32_t)(end - next) / 64 + n_subs - 1) / n_subs * 64;
    vf acc[2][TOKENS];
#pragma GCC unroll 6
    for (uint32_t i = 0; i < n_t; i++) {
        acc[0][i] = acc[1][i] = vf_set(0.f);
        __builtin_prefetch(out + i * stride, 1);
        __builtin_prefetch(out + i * stride + PL_CPU_GROUP, 1);
    }
    for (uint32_t b = 0; b < n_subs; w += sub_bytes, q += sub, blocks += sub == 32 || b % 2, b++) {
        __m512i dot[2][TOKENS];
#pragma GCC unroll 6
        for (uint32_t i = 0; i < n_t; i++)
            dot[0][i] = dot[1][i] = has_min ? _mm512_setzero_si512() : start_of(blocks + i * n_blocks, b % 2, bits, sub);
#pragma GCC unroll 8
        for (uint32_t k = 0; k < loads; k++) {
            __m512i v0 = _mm512_loadu_si512(w + 64 * k), v1 = _mm512_loadu_si512(w + quant_bytes + 64 * k);
            const int8_t *in = q + 4 * k;
            if (bits == 4) {
                step_dots(_mm512_and_si512(v0, low), _mm512_and_si512(v1, low), in, K, n_t, dot);
                v0 = _mm512_and_si512(_mm512_srli_epi16(v0, 4), low);
                v1 = _mm512_and_si512(_mm512_srli_epi16(v1, 4), low);
                step_dots(v0, v1, in + sub / 2, K, n_t, dot);
            } else {
                step_dots(v0, v1, in, K, n_t, dot);
            }
        }
        for (const uint8_t *stop = next + fetch < end ? next + fetch : end; next < stop; next += 64)
            _mm_prefetch((const char *)next, _MM_HINT_T0);
        const uint8_t *scales = w + 2 * quant_bytes, *minima = has_min ? scales + 2 * scale_bytes : scales;
        const vf scale0 = load_scale(scales, half), scale1 = load_scale(scales + scale_bytes, half);
        const vf min0 = load_scale(minima, half), min1 = load_scale(minima + scale_bytes, half);
#pragma GCC unroll 6
        for (uint32_t i = 0; i < n_t; i++) {
            const vf dx = vf_set(blocks[i * n_blocks].d);
            const vf y0 = _mm512_cvtepi32_ps(dot[0][i]), y1 = _mm512_cvtepi32_ps(dot[1][i]);
            if (has_min) {
                const vf sum = vf_set(sub == 32 ? blocks[i * n_blocks].sum : (float)-blocks[i * n_blocks].minus16[b % 2]);
                acc[0][i] = vf_fma(vf_fma(y0, scale0, vf_mul(min0, sum)), dx, acc[0][i]);
                acc[1][i] = vf_fma(vf_fma(y1, scale1, vf_mul(min1, sum)), dx, acc[1][i]);
            } else {
                acc[0][i] = vf_fma(vf_mul(y0, scale0), dx, acc[0][i]);
                acc[1][i] = vf_fma(vf_mul(y1, scale1), dx, acc[1][i]);
            }
        }
    }
#pragma GCC unroll 6
    for (uint32_t i = 0; i < n_t; i++, out += stride) {
        vf_store(out, add ? vf_add(vf_load(out), acc[0][i]) : acc[0][i]);
        if (n_groups == 2)
            vf_store(out + PL_CPU_GROUP, add ? vf_add(vf_load(out + PL_CPU_GROUP), acc[1][i]) : acc[1][i]);
    }
}

/* The tiles of one layout, of about equal numbers of tokens. Each fetches its share of the next unit, one stretch: what every tile asks
 * for comes in a burst that a core cannot have outstanding, and lines here and there are no stream to the processor's own prefetcher. */
#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void rows_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w, uint32_t n_groups, \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,        \
                                                         float *out, size_t stride, bool add)                          \
    {                                                                                                                  \
        const uint32_t n_tiles = (n_t + TOKENS - 1) / TOKENS;                                                          \
        const size_t share = (p->unit_bytes / 64 + n_tiles - 1) / n_tiles * 64;                                        \
        const uint8_t *next = w + p->unit_bytes;                                                                       \
        for (uint32_t left = n_tiles, n; left > 0; left--, n_t -= n, t0 += n, out += n * stride, next += share) {      \
            switch (n = (n_t + left - 1) / left) {                                                                     \
            case 1: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, 1, out, stride, add, next, next + share); break; \
            case 2: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, 2, out, stride, add, next, next + share); break; \
            case 3: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, 3, out, stride, add, next, next + share); break; \
            case 4: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, 4, out, stride, add, next, next + share); break; \
            case 5: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, 5, out, stride, add, next, next + share); break; \
            default: tile(p, w, n_groups, x, t0, bits, sub, has_min, half, TOKENS, out, stride, add, next, next + share); \
            }                                                                                                          \
        }                                                                                                              \
    }
#include "core/device/cpu/layouts.h"
#undef LAYOUT

static void rows_block(const struct pl_cpu_part *p, uint32_t unit, uint32_t n_groups, const struct pl_cpu_act *x, uint32_t t0,
                       uint32_t n_t, float *out, size_t stride, bool add)
{
    const uint8_t *w = p->packed + unit * p->unit_bytes;
#define LAYOUT(bits_, sub_, has_min_, half_)                                                                           \
    if (p->bits == bits_ && p->sub == sub_ && p->has_min == has_min_ && p->half_scales == half_)                       \
        rows_##bits_##_##sub_##_##has_min_##_##half_(p, w, n_groups, x, t0, n_t, out, stride, add);
#include "core/device/cpu/layouts.h"
#undef LAYOUT
}

const struct pl_cpu_kernels pl_cpu_kernels_avx512 = {
    .name = "avx512", .packed = true, .quant = vec_quant, .rows_block = rows_block, .rows_float = vec_rows_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .round16 = vec_round16,
    .query = vec_query, .attn = vec_attn, .blend = vec_blend,
    .lora_down = vec_lora_down, .lora_up = vec_lora_up,
    .rotate = vec_rotate,
};
