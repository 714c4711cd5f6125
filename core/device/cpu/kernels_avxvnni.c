/* kernels_avxvnni: the kernels for AVX2 with the 256-bit VPDPBUSD of AVX-VNNI: desktop processors without AVX-512 have it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cpu/lanes_avx2.h"

enum { TOKENS = 4 }; /* of a tile: with the two halves of a group, 8 integer sums in registers */

/* dot[h][i] += four weights of each of the 8 rows of half h times inputs q[i * stride] and the three after them */
static inline __attribute__((always_inline)) void step_dots(__m256i w0, __m256i w1, const int8_t *q, size_t stride, uint32_t n_t,
                                                            __m256i dot[2][TOKENS])
{
#pragma GCC unroll 4
    for (uint32_t i = 0; i < n_t; i++) {
        int32_t four;
        memcpy(&four, q + i * stride, 4);
        dot[0][i] = _mm256_dpbusd_avx_epi32(dot[0][i], w0, _mm256_set1_epi32(four));
        dot[1][i] = _mm256_dpbusd_avx_epi32(dot[1][i], w1, _mm256_set1_epi32(four));
    }
}

static inline __attribute__((always_inline)) vf load_scale(const uint8_t *p, bool half)
{
    return half ? vf_load_f16((const uint16_t *)p) : vf_load((const float *)p);
}

/* What the sums of a sub-block, the n-th of its block, start at for weights with an offset, in all lanes */
static inline __attribute__((always_inline)) __m256i start_of(const struct pl_cpu_block *block, uint32_t n, uint32_t bits, uint32_t sub)
{
    if (sub == 32)
        return bits == 8 ? _mm256_set1_epi32(block->start) : _mm256_srai_epi32(_mm256_set1_epi32(block->start), 4);
    return _mm256_slli_epi32(_mm256_srai_epi32(_mm256_set1_epi16(block->minus16[n]), 16), bits == 8 ? 5 : 2);
}

/* As in AVX-512, with the two halves of group g of 16 rows where two groups are there. */
static inline __attribute__((always_inline)) void tile(const struct pl_cpu_part *p, const uint8_t *w, uint32_t g, const struct pl_cpu_act *x,
                                                       uint32_t t0, uint32_t bits, uint32_t sub, bool has_min, bool half,
                                                       uint32_t n_t, float *out, size_t stride, bool add, const uint8_t *next, const uint8_t *end)
{
    const uint32_t loads = sub * bits / 32, n_subs = p->cols / sub;
    const size_t K = p->cols, n_blocks = K / 32;
    const uint32_t scale_bytes = half ? 32 : 64, quant_bytes = sub * PL_CPU_GROUP * bits / 8;
    const uint32_t one = quant_bytes + scale_bytes * (has_min ? 2 : 1); /* of a group's */
    const uint8_t *quants = w + g * quant_bytes, *scales = w + 2 * quant_bytes + g * scale_bytes;
    const struct pl_cpu_block *blocks = x->b + t0 * n_blocks;
    const int8_t *q = x->q + t0 * K;
    const __m256i low = _mm256_set1_epi8(15);
    const uint32_t fetch = ((uint32_t)(end - next) / 64 + n_subs - 1) / n_subs * 64;
    vf acc[TOKENS];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < n_t; i++)
        acc[i] = vf_set(0.f);
    for (uint32_t b = 0; b < n_subs; quants += 2 * one, scales += 2 * one, q += sub, blocks += sub == 32 || b % 2, b++) {
        __m256i dot[2][TOKENS];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < n_t; i++)
            dot[0][i] = dot[1][i] = has_min ? _mm256_setzero_si256() : start_of(blocks + i * n_blocks, b % 2, bits, sub);
#pragma GCC unroll 8
        for (uint32_t k = 0; k < loads; k++) {
            const __m256i v0 = _mm256_loadu_si256((const void *)(quants + 64 * k)), v1 = _mm256_loadu_si256((const void *)(quants + 64 * k + 32));
            const int8_t *in = q + 4 * k;
            if (bits == 4) {
                step_dots(_mm256_and_si256(v0, low), _mm256_and_si256(v1, low), in, K, n_t, dot);
                step_dots(_mm256_and_si256(_mm256_srli_epi16(v0, 4), low), _mm256_and_si256(_mm256_srli_epi16(v1, 4), low), in + sub / 2, K,
                          n_t, dot);
            } else {
                step_dots(v0, v1, in, K, n_t, dot);
            }
        }
        for (const uint8_t *stop = next + fetch < end ? next + fetch : end; next < stop; next += 64)
            _mm_prefetch((const char *)next, _MM_HINT_T0);
        const vf scale = load_scale(scales, half), min = has_min ? load_scale(scales + 2 * scale_bytes, half) : scale;
#pragma GCC unroll 4
        for (uint32_t i = 0; i < n_t; i++) {
            const struct pl_cpu_block *block = blocks + i * n_blocks;
            const vf y = vf_of(_mm256_cvtepi32_ps(dot[0][i]), _mm256_cvtepi32_ps(dot[1][i])), dx = vf_set(block->d);
            if (has_min)
                acc[i] = vf_fma(vf_fma(y, scale, vf_mul(min, vf_set(sub == 32 ? block->sum : (float)-block->minus16[b % 2]))), dx, acc[i]);
            else
                acc[i] = vf_fma(vf_mul(y, scale), dx, acc[i]);
        }
    }
#pragma GCC unroll 4
    for (uint32_t i = 0; i < n_t; i++, out += stride)
        vf_store(out, add ? vf_add(vf_load(out), acc[i]) : acc[i]);
}

/* The tiles of one layout, of about equal numbers of tokens. Each group's fetch their shares of a half of the next unit. */
#define LAYOUT(bits, sub, has_min, half)                                                                               \
    static void rows_##bits##_##sub##_##has_min##_##half(const struct pl_cpu_part *p, const uint8_t *w, uint32_t g,    \
                                                         const struct pl_cpu_act *x, uint32_t t0, uint32_t n_t,        \
                                                         float *out, size_t stride, bool add)                          \
    {                                                                                                                  \
        const uint32_t n_tiles = (n_t + TOKENS - 1) / TOKENS;                                                          \
        const size_t share = (p->unit_bytes / 128 + n_tiles - 1) / n_tiles * 64;                                       \
        const uint8_t *next = w + p->unit_bytes + g * (p->unit_bytes / 2);                                             \
        for (uint32_t left = n_tiles, n; left > 0; left--, n_t -= n, t0 += n, out += n * stride, next += share) {      \
            switch (n = (n_t + left - 1) / left) {                                                                     \
            case 1: tile(p, w, g, x, t0, bits, sub, has_min, half, 1, out, stride, add, next, next + share); break;    \
            case 2: tile(p, w, g, x, t0, bits, sub, has_min, half, 2, out, stride, add, next, next + share); break;    \
            case 3: tile(p, w, g, x, t0, bits, sub, has_min, half, 3, out, stride, add, next, next + share); break;    \
            default: tile(p, w, g, x, t0, bits, sub, has_min, half, TOKENS, out, stride, add, next, next + share);     \
            }                                                                                                          \
        }                                                                                                              \
    }
#include "core/device/cpu/layouts.h"
#undef LAYOUT

#define ROWS_BY_GROUP
#include "core/device/cpu/layouts.h"

const struct pl_cpu_kernels pl_cpu_kernels_avxvnni = {
    .name = "avxvnni", .packed = true, .quant = vec_quant, .rows_block = rows_block, .rows_float = vec_rows_float,
    .norm = vec_norm, .rope = vec_rope, .glu = vec_glu, .act = vec_act, .round16 = vec_round16,
    .query = vec_query, .attn = vec_attn, .blend = vec_blend,
    .lora_down = vec_lora_down, .lora_up = vec_lora_up,
    .rotate = vec_rotate,
};
