/* train_vec: the kernels of training, written once over vectors of 16 float32 lanes and compiled for each instruction set
 * by the file that includes this. TILE_NV: how many such vectors a tile of a product is wide.
 * Every sum runs in a fixed order: 16 partial sums, added in pairs, then the rest one by one.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_TRAIN_VEC_H
#define PL_DEVICE_CPU_TRAIN_VEC_H

#include <math.h>
#include <string.h>

#include "core/device/cpu/train.h"

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 v) { *(v16 *)p = v; }
INLINE v16 set(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 pick(i16 mask, v16 yes, v16 no) { return (v16)((mask & (i16)yes) | (~mask & (i16)no)); }
INLINE v16 larger(v16 a, v16 b) { return pick(a < b, b, a); }

INLINE float sum(v16 v)
{
    float x[16];
    store(x, v);
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            x[i] += x[i + n];
    return x[0];
}

INLINE float largest(v16 v)
{
    float x[16];
    store(x, v);
    for (int i = 1; i < 16; i++)
        x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

/* exp(x): x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 for exp(r) (relative error below 2^-22). Arguments are
 * clamped to [-87, 88]; NaN stays NaN. */
INLINE v16 exp16(v16 x)
{
    const v16 magic = set(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = pick(x < set(-87.f), set(-87.f), x);
    x = pick(x > set(88.f), set(88.f), x);
    const v16 n = (x * set(1.44269504088896341f) + magic) - magic;
    v16 r = n * set(-0.693359375f) + x;
    r = n * set(2.12194440e-4f) + r;
    v16 p = set(1.9875691500e-4f);
    p = p * r + set(1.3981999507e-3f);
    p = p * r + set(8.3334519073e-3f);
    p = p * r + set(4.1665795894e-2f);
    p = p * r + set(1.6666665459e-1f);
    p = p * r + set(5.0000001201e-1f);
    p = p * (r * r) + (r + set(1.f));
    const i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    return p * (v16)power;
}

INLINE v16 sqrt16(v16 x)
{
    v16 out;
    for (int i = 0; i < 16; i++)
        out[i] = __builtin_sqrtf(x[i]);
    return out;
}

/* The last n < 16 values of a row, others filled. */
INLINE v16 load_some(const float *p, uint32_t n, float fill)
{
    float x[16];
    for (uint32_t i = 0; i < 16; i++)
        x[i] = i < n ? p[i] : fill;
    return load(x);
}

INLINE void store_some(float *p, uint32_t n, v16 v)
{
    float x[16];
    store(x, v);
    for (uint32_t i = 0; i < n; i++)
        p[i] = x[i];
}

/* Runs `body` for each vector of a row, with i its first index; IN(p) loads from p, OUT(p, v) stores. */
#define EACH(n, body)                                                                                                  \
    do {                                                                                                               \
        uint32_t i = 0;                                                                                                \
        for (; i + 16 <= (n); i += 16) {                                                                               \
            enum { whole = 1 };                                                                                        \
            const uint32_t left = 16;                                                                                  \
            (void)left;                                                                                                \
            body                                                                                                       \
        }                                                                                                              \
        if (i < (n)) {                                                                                                 \
            enum { whole = 0 };                                                                                        \
            const uint32_t left = (n) - i;                                                                             \
            body                                                                                                       \
        }                                                                                                              \
    } while (0)
#define IN(p) (whole ? load((p) + i) : load_some((p) + i, left, 0))
#define OUT(p, v)                                                                                                      \
    do {                                                                                                               \
        if (whole)                                                                                                     \
            store((p) + i, v);                                                                                         \
        else                                                                                                           \
            store_some((p) + i, left, v);                                                                              \
    } while (0)

static float k_dot(const float *a, const float *b, uint32_t n)
{
    v16 s = set(0);
    EACH(n, s += IN(a) * IN(b););
    return sum(s);
}

static void k_add(float *out, const float *x, float scale, uint32_t n)
{
    const v16 k = set(scale);
    EACH(n, OUT(out, IN(out) + k * IN(x)););
}

/* mean (0 for RMS) and 1 / deviation */
INLINE void moments(pl_norm_kind kind, const float *x, uint32_t n, float eps, float *mean, float *inverse)
{
    v16 s = set(0);
    *mean = 0;
    if (kind == PL_NORM_LAYER) {
        EACH(n, s += IN(x););
        *mean = sum(s) / (float)n;
        s = set(0);
    }
    const v16 m = set(*mean);
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 d = load(x + i) - m;
        s += d * d;
    }
    float square = sum(s);
    for (; i < n; i++)
        square += (x[i] - *mean) * (x[i] - *mean);
    *inverse = 1 / __builtin_sqrtf(square / (float)n + eps);
}

static void k_norm(pl_norm_kind kind, float *out, const float *x, const float *gain, const float *bias, uint32_t n, float eps)
{
    float mean, inverse;
    moments(kind, x, n, eps, &mean, &inverse);
    const v16 m = set(mean), r = set(inverse);
    if (bias != NULL)
        EACH(n, OUT(out, (IN(x) - m) * r * IN(gain) + IN(bias)););
    else
        EACH(n, OUT(out, (IN(x) - m) * r * IN(gain)););
}

/* With x̂ = (x - mean) * r and d = gain * dy:  dx = r * (d - mean(d) - x̂ * mean(d * x̂)); RMS has no mean(d). */
static void k_norm_d(pl_norm_kind kind, float *dx, const float *dy, const float *x, const float *gain, uint32_t n, float eps, bool add,
                     float *stats)
{
    float mean, inverse;
    moments(kind, x, n, eps, &mean, &inverse);
    stats[0] = mean;
    stats[1] = inverse;
    const v16 m = set(mean), r = set(inverse);
    v16 s0 = set(0), s1 = set(0);
    EACH(n, { const v16 d = IN(gain) * IN(dy); s0 += d; s1 += d * ((IN(x) - m) * r); });
    const v16 m0 = set(kind == PL_NORM_LAYER ? sum(s0) / (float)n : 0), m1 = set(sum(s1) / (float)n);
    EACH(n, {
        v16 d = r * (IN(gain) * IN(dy) - m0 - (IN(x) - m) * r * m1);
        if (add)
            d += IN(dx);
        OUT(dx, d);
    });
}

/* x * σ(u): SiLU with u = x; GELU's tanh form with u = 2 sqrt(2/pi) (x + 0.044715 x^3) */
INLINE v16 gate_of(pl_act_kind kind, v16 x)
{
    v16 u = x;
    if (kind == PL_ACT_GELU_TANH)
        u = set(1.5957691216057308f) * (x + set(0.044715f) * x * x * x);
    return set(1) / (set(1) + exp16(-u));
}

INLINE v16 slope_of(pl_act_kind kind, v16 x, v16 s)
{
    v16 du = set(1);
    if (kind == PL_ACT_GELU_TANH)
        du = set(1.5957691216057308f) * (set(1) + set(0.134145f) * x * x);
    return s + x * s * (set(1) - s) * du;
}

#define BY_KIND(kind, call)                                                                                            \
    do {                                                                                                               \
        if ((kind) == PL_ACT_SILU) {                                                                                   \
            const pl_act_kind k = PL_ACT_SILU;                                                                         \
            call                                                                                                       \
        } else {                                                                                                       \
            const pl_act_kind k = PL_ACT_GELU_TANH;                                                                    \
            call                                                                                                       \
        }                                                                                                              \
    } while (0)

static void k_act(pl_act_kind kind, float *out, const float *x, uint32_t n)
{
    BY_KIND(kind, EACH(n, { const v16 a = IN(x); OUT(out, a * gate_of(k, a)); }););
}

static void k_act_d(pl_act_kind kind, float *dx, const float *dout, const float *x, uint32_t n)
{
    BY_KIND(kind, EACH(n, { const v16 a = IN(x); OUT(dx, IN(dout) * slope_of(k, a, gate_of(k, a))); }););
}

static void k_glu(pl_act_kind kind, float *out, const float *gate, const float *up, uint32_t n)
{
    BY_KIND(kind, EACH(n, { const v16 a = IN(gate); OUT(out, a * gate_of(k, a) * IN(up)); }););
}

static void k_glu_d(pl_act_kind kind, float *dgate, float *dup, const float *dout, const float *gate, const float *up, uint32_t n)
{
    BY_KIND(kind, EACH(n, {
                const v16 a = IN(gate);
                const v16 s = gate_of(k, a);
                const v16 d = IN(dout);
                OUT(dgate, d * IN(up) * slope_of(k, a, s));
                OUT(dup, d * a * s);
            }););
}

static float k_max_lse(const float *x, uint32_t n, float *max)
{
    v16 m = set(-INFINITY), s = set(0);
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16)
        m = larger(m, load(x + i));
    if (i < n)
        m = larger(m, load_some(x + i, n - i, -INFINITY));
    *max = largest(m);
    const v16 top = set(*max);
    for (i = 0; i + 16 <= n; i += 16)
        s += exp16(load(x + i) - top);
    float total = sum(s);
    for (; i < n; i++)
        total += expf(x[i] - *max);
    return *max + logf(total);
}

static void k_prob(float *x, float lse, float weight, uint32_t n)
{
    const v16 l = set(lse), w = set(weight);
    EACH(n, OUT(x, w * exp16(IN(x) - l)););
}

static float k_softmax(float *x, float scale, uint32_t n)
{
    float max;
    const v16 k = set(scale);
    EACH(n, OUT(x, k * IN(x)););
    const float lse = k_max_lse(x, n, &max);
    k_prob(x, lse, 1, n);
    return lse;
}

static void k_softmax_d(float *p, float *dp, float scale, float lse, float sub, uint32_t n)
{
    const v16 k = set(scale), l = set(lse), d = set(sub);
    EACH(n, {
        const v16 e = exp16(k * IN(p) - l);
        OUT(p, e);
        OUT(dp, k * e * (IN(dp) - d));
    });
}

static void k_adamw(float *w, float *g, float *m, float *v, const struct pl_adamw *o, uint32_t n)
{
    const v16 b1 = set(o->beta1), b2 = set(o->beta2), scale = set(o->scale), eps = set(o->eps), decay = set(1 - o->rate * o->decay);
    const v16 rate = set(o->rate / o->correct1), root = set(1 / __builtin_sqrtf(o->correct2)), one = set(1);
    EACH(n, {
        const v16 grad = scale * IN(g);
        const v16 first = b1 * IN(m) + (one - b1) * grad;
        const v16 second = b2 * IN(v) + (one - b2) * grad * grad;
        OUT(m, first);
        OUT(v, second);
        OUT(w, decay * IN(w) - rate * first / (sqrt16(second) * root + eps));
        OUT(g, set(0));
    });
}

/* ---- products ------------------------------------------------------------------------------------------------------ */

INLINE void tile_store(const struct pl_mm_tile *t, unsigned nv, v16 acc[PL_MM_ROWS][4])
{
    const v16 alpha = set(t->alpha);
    for (unsigned r = 0; r < t->m; r++) {
        float *c = t->c + r * t->ldc;
        const float *with = t->add ? c : t->bias;
        for (unsigned v = 0; v < nv; v++) {
            const unsigned left = t->n - 16 * v, at = 16 * v;
            if (left >= 16) {
                store(c + at, alpha * acc[r][v] + (with != NULL ? load(with + at) : set(0)));
            } else {
                store_some(c + at, left, alpha * acc[r][v] + (with != NULL ? load_some(with + at, left, 0) : set(0)));
            }
        }
    }
}

INLINE void tile_f32(const struct pl_mm_tile *t, const unsigned nv)
{
    v16 acc[PL_MM_ROWS][4];
    const float *a[PL_MM_ROWS], *b = (const float *)t->b;
    for (unsigned r = 0; r < PL_MM_ROWS; r++) {
        a[r] = (const float *)t->a[r];
#pragma GCC unroll 4
        for (unsigned v = 0; v < nv; v++)
            acc[r][v] = set(0);
    }
    for (size_t k = 0; k < t->k; k++, b += 16 * nv) {
        v16 w[4];
#pragma GCC unroll 4
        for (unsigned v = 0; v < nv; v++)
            w[v] = load(b + 16 * v);
#pragma GCC unroll 6
        for (unsigned r = 0; r < PL_MM_ROWS; r++) {
            const v16 x = set(a[r][k]);
#pragma GCC unroll 4
            for (unsigned v = 0; v < nv; v++)
                acc[r][v] += x * w[v];
        }
    }
    tile_store(t, nv, acc);
}

#define TILE_BY_WIDTH(name, inner, attributes)                                                                         \
    attributes static void name##_1(const struct pl_mm_tile *t) { inner(t, 1); }                                       \
    attributes static void name##_2(const struct pl_mm_tile *t) { inner(t, 2); }                                       \
    attributes static void name##_3(const struct pl_mm_tile *t) { inner(t, 3); }                                       \
    attributes static void name##_4(const struct pl_mm_tile *t) { inner(t, 4); }                                       \
    static void name(const struct pl_mm_tile *t)                                                                       \
    {                                                                                                                  \
        static void (*const by_width[])(const struct pl_mm_tile *) = {name##_1, name##_2, name##_3, name##_4};         \
        by_width[t->nv - 1](t);                                                                                        \
    }

#if TILE_NV == 1
static void k_tile_f32(const struct pl_mm_tile *t)
{
    tile_f32(t, 1);
}
#else
TILE_BY_WIDTH(k_tile_f32, tile_f32, )
#endif

INLINE uint16_t bf16_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

__attribute__((unused)) static void plain_transpose(const uint32_t *in, size_t in_stride, uint32_t *out, size_t stride)
{
    for (size_t r = 0; r < 16; r++)
        for (size_t c = 0; c < 16; c++)
            out[c * stride + r] = in[r * in_stride + c];
}

__attribute__((unused)) static void plain_narrow(const float *in, size_t n, uint16_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = bf16_of(in[i]);
}

__attribute__((unused)) static void plain_interleave(const float *a, const float *b, size_t n, uint32_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = bf16_of(a[i]) | (uint32_t)bf16_of(b[i]) << 16;
}

#define ROW_KERNELS                                                                                                    \
    .norm = k_norm, .norm_d = k_norm_d, .act = k_act, .act_d = k_act_d, .glu = k_glu, .glu_d = k_glu_d, .softmax = k_softmax, \
    .softmax_d = k_softmax_d, .max_lse = k_max_lse, .prob = k_prob, .add = k_add, .dot = k_dot, .adamw = k_adamw

#endif
