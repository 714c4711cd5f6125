/* vec: the kernels that are the same for every vector instruction set, over 16 float32 lanes. A file that includes this has
 * defined the lane type `vf` and vf_load, vf_store, vf_set, vf_fma (a*b+c), vf_max, vf_sum, vf_largest, vf_magnitude,
 * vf_largest_bits, vf_round_i8, vf_load_f16, vf_load_bf16 and vf_times_pow2 (x * 2^n for
 * integral n) for its instruction set; everything here is static.
 *
 * Every sum runs in a fixed order over its own row, so that results do not depend on what else is computed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_VEC_H
#define PL_DEVICE_CPU_VEC_H

#include <math.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

enum { VF = 16 };

/* exp(x): x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 for exp(r) (relative error below 2^-22). Arguments are
 * clamped to [-87, 88]; NaN stays NaN. */
static inline vf vf_exp(vf x)
{
    const vf magic = vf_set(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf y = vf_clamp(x, -87.f, 88.f);
    vf n = vf_sub(vf_fma(y, vf_set(1.44269504088896341f), magic), magic);
    vf r = vf_fma(n, vf_set(-0.693359375f), y);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.f)));
    return vf_times_pow2(p, n);
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

/* n = 4, 2 or 1 blocks at once: one alone is a long chain of instructions that wait for each other. */
static inline __attribute__((always_inline)) void quant_four(const float *x, size_t x_stride, uint32_t n, struct pl_cpu_blocks to)
{
    enum { FOUR = 4 };
    vf v[FOUR][2], most[FOUR];
    __m256i sums[FOUR];
    float inverse[FOUR];
    for (uint32_t i = 0; i < FOUR; i++) {
        const float *block = x + (i < n ? i : 0) * x_stride;
        v[i][0] = vf_load(block), v[i][1] = vf_load(block + VF);
        most[i] = vf_larger_bits(vf_abs(v[i][0]), vf_abs(v[i][1]));
    }
    const __m128i bits = vf_largest_bits(most[0], most[1], most[2], most[3]);
    const __m128i finite = _mm_cmplt_epi32(bits, _mm_set1_epi32(0x7f800000));
    const __m128 max = _mm_blendv_ps(_mm_set1_ps(NAN), _mm_castsi128_ps(bits), _mm_castsi128_ps(finite)), top = _mm_set1_ps(127);
    __m128 d = _mm_div_ps(max, top);
    _mm_storeu_ps(inverse, _mm_and_ps(_mm_div_ps(top, max), _mm_cmpgt_ps(max, _mm_set1_ps(PL_CPU_TINY))));
    for (uint32_t i = 0; i < FOUR; i++) {
        const __m256i q = vf_round_i8(vf_mul(v[i][0], vf_set(inverse[i])), vf_mul(v[i][1], vf_set(inverse[i])));
        if (i < n)
            _mm256_storeu_si256((void *)(to.q + i * to.q_stride), q);
        sums[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
    }
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    const __m128i zero = _mm_setzero_si128(), first = _mm256_castsi256_si128(all), last = _mm256_extracti128_si256(all, 1);
    const __m128i whole = _mm_add_epi32(first, last);
    __m128 sum = _mm_cvtepi32_ps(whole), start = _mm_castsi128_ps(_mm_sub_epi32(zero, _mm_slli_epi32(whole, 7)));
    __m128 minus16 = _mm_castsi128_ps(_mm_sub_epi16(zero, _mm_blend_epi16(first, _mm_slli_epi32(last, 16), 0xaa)));
    _MM_TRANSPOSE4_PS(d, sum, start, minus16); /* now what belongs to one block each */
    const __m128 blocks[FOUR] = {d, sum, start, minus16};
    for (uint32_t i = 0; i < FOUR && i < n; i++)
        _mm_storeu_ps(&to.b[i * to.stride].d, blocks[i]);
}

static void vec_quant(const float *x, size_t x_stride, uint32_t n, const struct pl_cpu_blocks *to)
{
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4)
        quant_four(x + i * x_stride, x_stride, 4, pl_cpu_blocks_from(to, i));
    if (n - i >= 2) {
        quant_four(x + i * x_stride, x_stride, 2, pl_cpu_blocks_from(to, i));
        i += 2;
    }
    if (i < n)
        quant_four(x + i * x_stride, x_stride, 1, pl_cpu_blocks_from(to, i));
}

static void vec_norm(pl_norm_kind kind, float *out, const float *x, const float *gain, const float *bias, uint32_t n, float eps)
{
    float mean = 0, square;
    uint32_t i;
    if (kind == PL_NORM_LAYER) {
        vf sum = vf_set(0.f);
        for (i = 0; i + VF <= n; i += VF)
            sum = vf_add(sum, vf_load(x + i));
        mean = vf_sum(sum);
        for (; i < n; i++)
            mean += x[i];
        mean /= (float)n;
    }
    vf sum = vf_set(0.f), m = vf_set(mean);
    for (i = 0; i + VF <= n; i += VF) {
        vf v = vf_sub(vf_load(x + i), m);
        sum = vf_fma(v, v, sum);
    }
    square = vf_sum(sum);
    for (; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(square / (float)n + eps);
    vf s = vf_set(scale);
    for (i = 0; i + VF <= n; i += VF) {
        vf v = vf_mul(vf_mul(vf_sub(vf_load(x + i), m), s), vf_load(gain + i));
        vf_store(out + i, bias != NULL ? vf_add(v, vf_load(bias + i)) : v);
    }
    for (; i < n; i++)
        out[i] = (x[i] - mean) * scale * gain[i] + (bias != NULL ? bias[i] : 0);
}

static void vec_rope(pl_rope_kind kind, float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_dims, const float *cos,
                     const float *sin)
{
    uint32_t half = n_dims / 2;
    for (uint32_t h = 0; h < n_heads; h++, x += head_dim) {
        if (kind == PL_ROPE_INTERLEAVED) {
            for (uint32_t i = 0; i < half; i++) {
                float a = x[2 * i], b = x[2 * i + 1];
                x[2 * i] = a * cos[i] - b * sin[i];
                x[2 * i + 1] = a * sin[i] + b * cos[i];
            }
        } else {
            for (uint32_t i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i];
                x[i + half] = a * sin[i] + b * cos[i];
            }
        }
    }
}

/* x / (1 + exp(-u)): SiLU with u = x; GELU's tanh form with u = 2 sqrt(2/pi) (x + 0.044715 x^3) */
static inline vf activate(pl_act_kind kind, vf x)
{
    vf u = x;
    if (kind == PL_ACT_GELU_TANH) {
        vf cube = vf_mul(vf_mul(x, x), x);
        u = vf_mul(vf_set(1.5957691216057308f), vf_fma(cube, vf_set(0.044715f), x));
    }
    return vf_div(x, vf_add(vf_set(1.f), vf_exp(vf_sub(vf_set(0.f), u))));
}

static inline float activate_one(pl_act_kind kind, float x)
{
    float out[VF];
    vf_store(out, activate(kind, vf_set(x)));
    return out[0];
}

static void vec_glu(pl_act_kind kind, float *out, const float *gate, const float *up, uint32_t n)
{
    uint32_t i;
    for (i = 0; i + VF <= n; i += VF)
        vf_store(out + i, vf_mul(activate(kind, vf_load(gate + i)), vf_load(up + i)));
    for (; i < n; i++)
        out[i] = activate_one(kind, gate[i]) * up[i];
}

static void vec_act(pl_act_kind kind, float *x, uint32_t n)
{
    uint32_t i;
    for (i = 0; i + VF <= n; i += VF)
        vf_store(x + i, activate(kind, vf_load(x + i)));
    for (; i < n; i++)
        x[i] = activate_one(kind, x[i]);
}

static inline __attribute__((always_inline)) vf load_as(pl_dtype t, const uint8_t *p, size_t i)
{
    return t == PL_F16 ? vf_load_f16((const uint16_t *)p + i) : t == PL_BF16 ? vf_load_bf16((const uint16_t *)p + i)
                                                                             : vf_load((const float *)p + i);
}

/* ---- products with float weights ----------------------------------------------------------------------------------- */

enum { FLOAT_TOKENS = 8 }; /* of a tile, whose sums stay in registers */

static inline __attribute__((always_inline)) void float_tile(pl_dtype t, const uint8_t *w, uint32_t cols, const float *x,
                                                             size_t stride, uint32_t n_t, float *out, size_t out_stride,
                                                             bool add)
{
    vf acc[FLOAT_TOKENS];
    for (uint32_t i = 0; i < n_t; i++)
        acc[i] = vf_set(0.f);
    for (uint32_t k = 0; k < cols; k++) {
        vf v = load_as(t, w, (size_t)k * PL_CPU_GROUP);
        for (uint32_t i = 0; i < n_t; i++)
            acc[i] = vf_fma(v, vf_set(x[i * stride + k]), acc[i]);
    }
    for (uint32_t i = 0; i < n_t; i++, out += out_stride)
        vf_store(out, add ? vf_add(vf_load(out), acc[i]) : acc[i]);
}

static inline __attribute__((always_inline)) void float_group(pl_dtype t, const uint8_t *w, uint32_t cols, const float *x,
                                                              size_t stride, uint32_t n_t, float *out, size_t out_stride, bool add)
{
    for (; n_t >= FLOAT_TOKENS; n_t -= FLOAT_TOKENS, x += FLOAT_TOKENS * stride, out += FLOAT_TOKENS * out_stride)
        float_tile(t, w, cols, x, stride, FLOAT_TOKENS, out, out_stride, add);
    if (n_t & 4)
        float_tile(t, w, cols, x, stride, 4, out, out_stride, add), x += 4 * stride, out += 4 * out_stride;
    if (n_t & 2)
        float_tile(t, w, cols, x, stride, 2, out, out_stride, add), x += 2 * stride, out += 2 * out_stride;
    if (n_t & 1)
        float_tile(t, w, cols, x, stride, 1, out, out_stride, add);
}

static void vec_rows_float(const struct pl_cpu_part *p, uint32_t unit, uint32_t n_groups, const float *x, size_t stride, uint32_t n_t,
                           float *out, size_t out_stride, bool add)
{
    const uint8_t *w = p->packed + unit * p->unit_bytes;
    for (; n_groups > 0; n_groups--, w += p->unit_bytes / 2, out += PL_CPU_GROUP) {
        if (p->dtype == PL_F32)
            float_group(PL_F32, w, p->cols, x, stride, n_t, out, out_stride, add);
        else if (p->dtype == PL_F16)
            float_group(PL_F16, w, p->cols, x, stride, n_t, out, out_stride, add);
        else
            float_group(PL_BF16, w, p->cols, x, stride, n_t, out, out_stride, add);
    }
}

#include "core/device/cpu/vec_attn.h"

#endif
