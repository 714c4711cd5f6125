/* vec: the kernels that are the same for every vector instruction set, over 16 float32 lanes. A file that includes this has
 * defined the lane type `vf` and vf_load, vf_store, vf_set, vf_fma (a*b+c), vf_max, vf_sum, vf_largest, vf_magnitude,
 * vf_round_i8, vf_load_f16, vf_load_bf16, vf_store_f16 and vf_pow2 (2^n for integral n) for its instruction set; everything here is static.
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
    return vf_mul(p, vf_pow2(n));
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

static void vec_quant_row(const float *x, uint32_t n, int8_t *q, float *d, float *sum16, float *sum32)
{
    for (uint32_t b = 0; b < n / 32; b++, x += 32, q += 32) {
        vf x0 = vf_load(x), x1 = vf_load(x + 16);
        float max = vf_magnitude(x0, x1), inverse = max > PL_CPU_TINY ? 127 / max : 0;
        d[b] = max / 127;
        int s0, s1;
        vf_round_i8(vf_mul(x0, vf_set(inverse)), vf_mul(x1, vf_set(inverse)), q, &s0, &s1);
        sum16[2 * b] = d[b] * (float)s0;
        sum16[2 * b + 1] = d[b] * (float)s1;
        sum32[b] = d[b] * (float)(s0 + s1);
    }
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

static void vec_narrow(pl_dtype t, const float *in, uint32_t n, void *out)
{
    uint32_t i = 0;
    for (; t == PL_F16 && i + VF <= n; i += VF)
        vf_store_f16((uint16_t *)out + i, vf_load(in + i));
    pl_quant_row(t, in + i, (uint8_t *)out + i * pl_dtype_block_bytes(t), n - i);
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

static void vec_rows_float(const struct pl_cpu_part *p, uint32_t group, uint32_t n_groups, const float *x, size_t stride, uint32_t n_t,
                           float *out, size_t out_stride, bool add)
{
    for (; n_groups > 0; n_groups--, group++, out += PL_CPU_GROUP) {
        const uint8_t *w = p->packed + group * p->group_bytes;
        if (p->dtype == PL_F32)
            float_group(PL_F32, w, p->cols, x, stride, n_t, out, out_stride, add);
        else if (p->dtype == PL_F16)
            float_group(PL_F16, w, p->cols, x, stride, n_t, out, out_stride, add);
        else
            float_group(PL_BF16, w, p->cols, x, stride, n_t, out, out_stride, add);
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

enum { ATTN_CHUNK = 4 }; /* queries whose scores and values are in registers together */

/* scores[i] (two vectors) of queries i < n over the 32 positions of a page */
static inline __attribute__((always_inline)) void page_scores(pl_dtype t, const uint8_t *k, const struct pl_cpu_attn *a,
                                                              uint32_t first, uint32_t n, vf s[][2])
{
    for (uint32_t i = 0; i < n; i++)
        s[i][0] = s[i][1] = vf_set(0.f);
    for (uint32_t d = 0; d < a->head_dim; d++) {
        vf k0 = load_as(t, k, (size_t)d * PL_CPU_PAGE), k1 = load_as(t, k, (size_t)d * PL_CPU_PAGE + VF);
        for (uint32_t i = 0; i < n; i++) {
            vf q = vf_set(a->q[first + i][d]);
            s[i][0] = vf_fma(q, k0, s[i][0]);
            s[i][1] = vf_fma(q, k1, s[i][1]);
        }
    }
}

/* acc[i] += weights[i] · V over the first n_pos positions, 32 dimensions at a time */
static inline __attribute__((always_inline)) void page_values(pl_dtype t, const uint8_t *v, struct pl_cpu_attn *a, uint32_t first,
                                                              uint32_t n, uint32_t n_pos, float w[][PL_CPU_PAGE])
{
    for (uint32_t d = 0; d < a->head_dim; d += 2 * VF) {
        bool wide = d + VF < a->head_dim;
        vf s[ATTN_CHUNK][2];
        for (uint32_t i = 0; i < n; i++) {
            s[i][0] = vf_load(a->acc[first + i] + d);
            s[i][1] = wide ? vf_load(a->acc[first + i] + d + VF) : vf_set(0.f);
        }
        for (uint32_t p = 0; p < n_pos; p++) {
            vf v0 = load_as(t, v, (size_t)p * a->head_dim + d);
            vf v1 = wide ? load_as(t, v, (size_t)p * a->head_dim + d + VF) : v0;
            for (uint32_t i = 0; i < n; i++) {
                s[i][0] = vf_fma(vf_set(w[i][p]), v0, s[i][0]);
                s[i][1] = vf_fma(vf_set(w[i][p]), v1, s[i][1]);
            }
        }
        for (uint32_t i = 0; i < n; i++) {
            vf_store(a->acc[first + i] + d, s[i][0]);
            if (wide)
                vf_store(a->acc[first + i] + d + VF, s[i][1]);
        }
    }
}

/* Turns scores into weights and rescales what query i has so far. Positions from n_pos on get weight 0. */
static inline void soften(struct pl_cpu_attn *a, uint32_t i, vf s0, vf s1, uint32_t n_pos, float w[PL_CPU_PAGE])
{
    vf_store(w, vf_mul(s0, vf_set(a->scale)));
    vf_store(w + VF, vf_mul(s1, vf_set(a->scale)));
    for (uint32_t p = n_pos; p < PL_CPU_PAGE; p++)
        w[p] = -INFINITY;
    float max = vf_largest(vf_max(vf_load(w), vf_load(w + VF)));
    max = max > a->max[i] ? max : a->max[i];
    vf m = vf_set(max), e0 = vf_exp(vf_sub(vf_load(w), m)), e1 = vf_exp(vf_sub(vf_load(w + VF), m));
    vf_store(w, e0);
    vf_store(w + VF, e1);
    for (uint32_t p = n_pos; p < PL_CPU_PAGE; p++)
        w[p] = 0;
    float sum = vf_sum(vf_add(vf_load(w), vf_load(w + VF)));
    if (a->max[i] == -INFINITY) {
        a->sum[i] = sum;
    } else {
        float c[VF];
        vf_store(c, vf_exp(vf_set(a->max[i] - max)));
        a->sum[i] = a->sum[i] * c[0] + sum;
        for (uint32_t d = 0; d < a->head_dim; d += VF)
            vf_store(a->acc[i] + d, vf_mul(vf_load(a->acc[i] + d), vf_set(c[0])));
    }
    a->max[i] = max;
}

static inline __attribute__((always_inline)) void attn_chunk(pl_dtype t, struct pl_cpu_attn *a, uint32_t first, uint32_t n)
{
    size_t element = pl_dtype_block_bytes(t);
    for (uint32_t page = 0; page < a->n_pages; page++) {
        const uint8_t *k = a->pages[page], *v = k + (size_t)a->head_dim * PL_CPU_PAGE * element;
        vf s[ATTN_CHUNK][2];
        _Alignas(64) float w[ATTN_CHUNK][PL_CPU_PAGE];
        uint32_t n_pos[ATTN_CHUNK];
        bool same = true;
        page_scores(t, k, a, first, n, s);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t start = page * PL_CPU_PAGE, end = a->n_pos[first + i];
            n_pos[i] = end <= start ? 0 : end - start < PL_CPU_PAGE ? end - start : PL_CPU_PAGE;
            if (n_pos[i] > 0)
                soften(a, first + i, s[i][0], s[i][1], n_pos[i], w[i]);
            same &= n_pos[i] == n_pos[0];
        }
        if (same)
            page_values(t, v, a, first, n, n_pos[0], w);
        else /* weight 0 is not enough: a later position's value may be no number */
            for (uint32_t i = 0; i < n; i++)
                page_values(t, v, a, first + i, 1, n_pos[i], w + i);
    }
}

static inline __attribute__((always_inline)) void attn_typed(pl_dtype t, struct pl_cpu_attn *a)
{
    for (uint32_t i = 0; i < a->n_q; i++) {
        a->max[i] = -INFINITY;
        a->sum[i] = 0;
        memset(a->acc[i], 0, a->head_dim * sizeof(float));
    }
    uint32_t i = 0;
    for (; i + ATTN_CHUNK <= a->n_q; i += ATTN_CHUNK)
        attn_chunk(t, a, i, ATTN_CHUNK);
    switch (a->n_q - i) {
    case 3: attn_chunk(t, a, i, 3); break;
    case 2: attn_chunk(t, a, i, 2); break;
    case 1: attn_chunk(t, a, i, 1); break;
    }
}

static void vec_attn(struct pl_cpu_attn *a)
{
    if (a->head_dim % VF != 0)
        pl_cpu_kernels_ref.attn(a);
    else if (a->dtype == PL_F16)
        attn_typed(PL_F16, a);
    else if (a->dtype == PL_BF16)
        attn_typed(PL_BF16, a);
    else
        attn_typed(PL_F32, a);
}

#endif
