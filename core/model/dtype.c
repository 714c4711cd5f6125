/* dtype: element and block types of tensors as GGUF files hold them, and their plain meaning.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/base/status.h"

static const struct {
    const char *name;
    uint16_t block, bytes;
} dtypes[] = {
#define X(name, number, elements, bytes) [number] = {#name, elements, bytes},
    PL_DTYPE_LIST(X)
#undef X
};

#define N_DTYPES (sizeof dtypes / sizeof dtypes[0])

const char *pl_dtype_name(uint32_t dtype)
{
    return dtype < N_DTYPES ? dtypes[dtype].name : NULL;
}

uint32_t pl_dtype_block(uint32_t dtype)
{
    return dtype < N_DTYPES ? dtypes[dtype].block : 0;
}

uint32_t pl_dtype_block_bytes(uint32_t dtype)
{
    return dtype < N_DTYPES ? dtypes[dtype].bytes : 0;
}

/* ---- half precision -------------------------------------------------------------------------------------------- */

static float bits_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

float pl_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
    if (e == 31)
        return bits_f32(sign | 0x7f800000 | m << 13);
    if (e != 0)
        return bits_f32(sign | (e + 112) << 23 | m << 13);
    float v = (float)m * 0x1p-24f;
    return sign ? -v : v;
}

uint16_t pl_f32_to_f16(float f)
{
    uint32_t u = f32_bits(f);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000)
        return sign | 0x7e00;
    if (u >= 0x477ff000) /* rounds to 65536 or more */
        return sign | 0x7c00;
    if (u < 0x38800000) /* subnormal: one unit is 2^-24, rounded to even by the addition */
        return sign | (uint16_t)(f32_bits(bits_f32(u) + 0.5f) - 0x3f000000);
    u += 0xfff + (u >> 13 & 1);
    return sign | (uint16_t)((u >> 13) - (112 << 10));
}

static float bf16_to_f32(uint16_t h)
{
    return bits_f32((uint32_t)h << 16);
}

static uint16_t f32_to_bf16(float f)
{
    uint32_t u = f32_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float load_f16(const uint8_t *p)
{
    return pl_f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

static void store_f16(uint8_t *p, float f)
{
    uint16_t h = pl_f32_to_f16(f);
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

/* ---- reading blocks: b is one block, q its unsigned quants, d and m scale and minimum of each sub-block ------------ */

/* The fifth bits of 32 elements are a little-endian word: bit i belongs to element i. NULL = none. */
static void unpack_nibbles(const uint8_t *qs, const uint8_t *high, uint8_t *q)
{
    for (int i = 0; i < 16; i++) {
        q[i] = qs[i] & 15;
        q[i + 16] = qs[i] >> 4;
    }
    for (int i = 0; high != NULL && i < 32; i++)
        q[i] |= (uint8_t)((high[i / 8] >> (i % 8) & 1) << 4);
}

static void unpack_q8_0(const uint8_t *b, uint8_t *q)
{
    for (int i = 0; i < 32; i++)
        q[i] = (uint8_t)(b[2 + i] ^ 0x80);
}

/* Q2_K: 16 scales (low nibble scale, high nibble minimum), 64 bytes of 2-bit quants, d, dmin */
static void unpack_q2_k(const uint8_t *b, uint8_t *q, float *d, float *m)
{
    float scale = load_f16(b + 80), min = load_f16(b + 82);
    for (int j = 0; j < 16; j++) {
        d[j] = scale * (float)(b[j] & 15);
        m[j] = -(min * (float)(b[j] >> 4));
    }
    for (int e = 0; e < 256; e++)
        q[e] = b[16 + e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3;
}

/* Q3_K: 32 bytes of high bits, 64 bytes of low 2 bits, 12 bytes of sixteen 6-bit scales (minus 32), d */
static void unpack_q3_k(const uint8_t *b, uint8_t *q, float *d)
{
    const uint8_t *hmask = b, *qs = b + 32, *s = b + 96;
    float scale = load_f16(b + 108);
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4, high = s[8 + j % 4] >> (j / 4 * 2) & 3;
        d[j] = scale * (float)((low | high << 4) - 32);
    }
    for (int e = 0; e < 256; e++)
        q[e] = (uint8_t)((qs[e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3) | (hmask[e % 32] >> (e / 32) & 1) << 2);
}

/* The eight 6-bit scales and minima of Q4_K and Q5_K, packed in 12 bytes. */
static void unpack_k_scales(const uint8_t *b, float *d, float *m)
{
    const uint8_t *s = b + 4;
    float scale = load_f16(b), min = load_f16(b + 2);
    for (int j = 0; j < 8; j++) {
        int sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
        int mn = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
        d[j] = scale * (float)sc;
        m[j] = -(min * (float)mn);
    }
}

static void unpack_q45_k(const uint8_t *qs, const uint8_t *high, uint8_t *q)
{
    for (int e = 0; e < 256; e++) {
        int j = e / 32, i = e % 32;
        q[e] = qs[j / 2 * 32 + i] >> (j % 2 * 4) & 15;
        if (high != NULL)
            q[e] |= (uint8_t)((high[i] >> j & 1) << 4);
    }
}

/* Q6_K: 128 bytes of low nibbles, 64 bytes of high 2 bits, 16 signed scales, d */
static void unpack_q6_k(const uint8_t *b, uint8_t *q, float *d)
{
    float scale = load_f16(b + 208);
    for (int j = 0; j < 16; j++)
        d[j] = scale * (float)(int8_t)b[192 + j];
    for (int e = 0; e < 256; e++) {
        int half = e / 128, r = e % 128;
        q[e] = (uint8_t)((b[half * 64 + r % 64] >> (r / 64 * 4) & 15) | (b[128 + half * 32 + r % 32] >> (r / 32 * 2) & 3) << 4);
    }
}

uint32_t pl_dtype_sub(uint32_t dtype)
{
    switch (dtype) {
    case PL_Q2_K:
    case PL_Q3_K:
    case PL_Q6_K: return 16;
    default: return pl_dtype_block(dtype) > 1 ? 32 : 0;
    }
}

uint32_t pl_dtype_offset(uint32_t dtype)
{
    switch (dtype) {
    case PL_Q4_0: return 8;
    case PL_Q5_0: return 16;
    case PL_Q8_0: return 128;
    case PL_Q3_K: return 4;
    case PL_Q6_K: return 32;
    default: return 0;
    }
}

void pl_dtype_unpack(pl_dtype t, const void *block, uint8_t *q, float *scale, float *min)
{
    const uint8_t *b = block;
    bool k_quant = pl_dtype_block(t) == 256, has_min = pl_dtype_offset(t) == 0;
    if (!k_quant) {
        scale[0] = load_f16(b);
        min[0] = has_min ? load_f16(b + 2) : 0;
    }
    for (uint32_t j = 0; k_quant && !has_min && j < 256 / pl_dtype_sub(t); j++)
        min[j] = 0;
    switch (t) {
    case PL_Q4_0: unpack_nibbles(b + 2, NULL, q); break;
    case PL_Q4_1: unpack_nibbles(b + 4, NULL, q); break;
    case PL_Q5_0: unpack_nibbles(b + 6, b + 2, q); break;
    case PL_Q5_1: unpack_nibbles(b + 8, b + 4, q); break;
    case PL_Q8_0: unpack_q8_0(b, q); break;
    case PL_Q2_K: unpack_q2_k(b, q, scale, min); break;
    case PL_Q3_K: unpack_q3_k(b, q, scale); break;
    case PL_Q4_K:
        unpack_k_scales(b, scale, min);
        unpack_q45_k(b + 16, NULL, q);
        break;
    case PL_Q5_K:
        unpack_k_scales(b, scale, min);
        unpack_q45_k(b + 48, b + 16, q);
        break;
    case PL_Q6_K: unpack_q6_k(b, q, scale); break;
    case PL_F32:
    case PL_F16:
    case PL_BF16:
    case PL_F8: PL_ASSERT(!"only block types are unpacked");
    }
}

static void dequant_block(pl_dtype t, const uint8_t *b, float *out)
{
    uint8_t q[256];
    float scale[16], min[16];
    pl_dtype_unpack(t, b, q, scale, min);
    uint32_t n = pl_dtype_block(t), sub = pl_dtype_sub(t);
    int offset = (int)pl_dtype_offset(t);
    for (uint32_t e = 0; e < n; e++)
        out[e] = scale[e / sub] * (float)(q[e] - offset) + min[e / sub];
}

void pl_dequant_row(pl_dtype t, const void *row, float *out, size_t n)
{
    const uint8_t *b = row;
    size_t block = pl_dtype_block(t), bytes = pl_dtype_block_bytes(t);
    if (t == PL_F32) {
        memcpy(out, row, 4 * n);
        return;
    }
    for (size_t i = 0; i < n; i += block, b += bytes, out += block) {
        if (t == PL_F16)
            *out = load_f16(b);
        else if (t == PL_BF16)
            *out = bf16_to_f32((uint16_t)(b[0] | b[1] << 8));
        else
            dequant_block(t, b, out);
    }
}

/* ---- writing blocks ------------------------------------------------------------------------------------------------ */

static int clamp_round(float v, int lo, int hi)
{
    float r = nearbyintf(v);
    return r > (float)hi ? hi : r > (float)lo ? (int)r : lo; /* not a number: lo */
}

static void min_max(const float *x, int n, float *min, float *max)
{
    *min = *max = x[0];
    for (int i = 1; i < n; i++) {
        *min = fminf(*min, x[i]);
        *max = fmaxf(*max, x[i]);
    }
}

/* The value of largest magnitude, with its sign. */
static float extreme(const float *x, int n)
{
    float best = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > fabsf(best))
            best = x[i];
    return best;
}

/* levels: 16 or 32; with_min: scale and minimum, else a scale and a fixed offset of half the levels. */
static void write_q45(const float *x, uint8_t *b, int levels, bool with_min)
{
    float d, m;
    if (with_min) {
        float max;
        min_max(x, 32, &m, &max);
        d = (max - m) / (float)(levels - 1);
    } else {
        d = extreme(x, 32) / (float)(-levels / 2);
    }
    store_f16(b, d);
    d = load_f16(b);
    b += 2;
    if (with_min) {
        store_f16(b, m);
        m = load_f16(b);
        b += 2;
    } else {
        m = d * (float)(-levels / 2);
    }
    uint8_t *high = levels == 32 ? b : NULL;
    if (high != NULL) {
        memset(high, 0, 4);
        b += 4;
    }
    memset(b, 0, 16);
    for (int i = 0; i < 32; i++) {
        int q = d != 0 ? clamp_round((x[i] - m) / d, 0, levels - 1) : 0;
        b[i % 16] |= (uint8_t)((q & 15) << (i / 16 * 4));
        if (high != NULL)
            high[i / 8] |= (uint8_t)((q >> 4) << (i % 8));
    }
}

static void write_q8_0(const float *x, uint8_t *b)
{
    store_f16(b, fabsf(extreme(x, 32)) / 127);
    float d = load_f16(b);
    for (int i = 0; i < 32; i++)
        b[2 + i] = (uint8_t)(int8_t)(d != 0 ? clamp_round(x[i] / d, -127, 127) : 0);
}

static void write_q2_k(const float *x, uint8_t *b)
{
    float scale[16], min[16];
    for (int j = 0; j < 16; j++) {
        float lo, hi;
        min_max(x + 16 * j, 16, &lo, &hi);
        min[j] = lo < 0 ? -lo : 0;
        scale[j] = (hi + min[j]) / 3;
    }
    store_f16(b + 80, fmaxf(extreme(scale, 16), 0) / 15);
    store_f16(b + 82, extreme(min, 16) / 15);
    float d = load_f16(b + 80), dmin = load_f16(b + 82);
    memset(b + 16, 0, 64);
    for (int j = 0; j < 16; j++) {
        int s = d != 0 ? clamp_round(scale[j] / d, 0, 15) : 0, m = dmin != 0 ? clamp_round(min[j] / dmin, 0, 15) : 0;
        b[j] = (uint8_t)(s | m << 4);
        for (int e = 16 * j; e < 16 * j + 16; e++) {
            int q = d * (float)s != 0 ? clamp_round((x[e] + dmin * (float)m) / (d * (float)s), 0, 3) : 0;
            b[16 + e / 128 * 32 + e % 32] |= (uint8_t)(q << (e % 128 / 32 * 2));
        }
    }
}

static void write_q3_k(const float *x, uint8_t *b)
{
    float scale[16];
    for (int j = 0; j < 16; j++)
        scale[j] = extreme(x + 16 * j, 16) / -4;
    store_f16(b + 108, extreme(scale, 16) / -32);
    float d = load_f16(b + 108);
    memset(b, 0, 108);
    for (int j = 0; j < 16; j++) {
        int s = d != 0 ? clamp_round(scale[j] / d, -32, 31) : 0, u = s + 32;
        b[96 + j % 8] |= (uint8_t)((u & 15) << (j / 8 * 4));
        b[104 + j % 4] |= (uint8_t)((u >> 4) << (j / 4 * 2));
        for (int e = 16 * j; e < 16 * j + 16; e++) {
            int q = d * (float)s != 0 ? clamp_round(x[e] / (d * (float)s), -4, 3) + 4 : 4;
            b[32 + e / 128 * 32 + e % 32] |= (uint8_t)((q & 3) << (e % 128 / 32 * 2));
            b[e % 32] |= (uint8_t)((q >> 2) << (e / 32));
        }
    }
}

/* Q4_K (levels 16) and Q5_K (levels 32). */
static void write_q45_k(const float *x, uint8_t *b, int levels)
{
    float scale[8], min[8];
    for (int j = 0; j < 8; j++) {
        float lo, hi;
        min_max(x + 32 * j, 32, &lo, &hi);
        min[j] = lo < 0 ? -lo : 0;
        scale[j] = fmaxf(hi + min[j], 0) / (float)(levels - 1);
    }
    store_f16(b, extreme(scale, 8) / 63);
    store_f16(b + 2, extreme(min, 8) / 63);
    float d = load_f16(b), dmin = load_f16(b + 2);
    uint8_t *s = b + 4, *high = levels == 32 ? b + 16 : NULL, *qs = b + (levels == 32 ? 48 : 16);
    memset(b + 4, 0, (size_t)(qs - (b + 4)) + 128);
    for (int j = 0; j < 8; j++) {
        int sc = d != 0 ? clamp_round(scale[j] / d, 0, 63) : 0, m = dmin != 0 ? clamp_round(min[j] / dmin, 0, 63) : 0;
        if (j < 4) {
            s[j] |= (uint8_t)sc;
            s[j + 4] |= (uint8_t)m;
        } else {
            s[j + 4] |= (uint8_t)((sc & 15) | (m & 15) << 4);
            s[j - 4] |= (uint8_t)(sc >> 4 << 6);
            s[j] |= (uint8_t)(m >> 4 << 6);
        }
        for (int i = 0; i < 32; i++) {
            float ds = d * (float)sc;
            int q = ds != 0 ? clamp_round((x[32 * j + i] + dmin * (float)m) / ds, 0, levels - 1) : 0;
            qs[j / 2 * 32 + i] |= (uint8_t)((q & 15) << (j % 2 * 4));
            if (high != NULL)
                high[i] |= (uint8_t)((q >> 4) << j);
        }
    }
}

static void write_q6_k(const float *x, uint8_t *b)
{
    float scale[16];
    for (int j = 0; j < 16; j++)
        scale[j] = extreme(x + 16 * j, 16) / -32;
    store_f16(b + 208, extreme(scale, 16) / -128);
    float d = load_f16(b + 208);
    memset(b, 0, 192);
    for (int j = 0; j < 16; j++) {
        int s = d != 0 ? clamp_round(scale[j] / d, -128, 127) : 0;
        b[192 + j] = (uint8_t)(int8_t)s;
        for (int e = 16 * j; e < 16 * j + 16; e++) {
            int q = d * (float)s != 0 ? clamp_round(x[e] / (d * (float)s), -32, 31) + 32 : 32;
            int half = e / 128, r = e % 128;
            b[half * 64 + r % 64] |= (uint8_t)((q & 15) << (r / 64 * 4));
            b[128 + half * 32 + r % 32] |= (uint8_t)((q >> 4) << (r / 32 * 2));
        }
    }
}

void pl_quant_row(pl_dtype t, const float *in, void *row, size_t n)
{
    uint8_t *b = row;
    size_t block = pl_dtype_block(t), bytes = pl_dtype_block_bytes(t);
    for (size_t i = 0; i < n; i += block, b += bytes, in += block) {
        uint16_t h;
        switch (t) {
        case PL_F32: memcpy(b, in, 4); break;
        case PL_F16: store_f16(b, *in); break;
        case PL_BF16:
            h = f32_to_bf16(*in);
            b[0] = (uint8_t)h;
            b[1] = (uint8_t)(h >> 8);
            break;
        case PL_Q4_0: write_q45(in, b, 16, false); break;
        case PL_Q4_1: write_q45(in, b, 16, true); break;
        case PL_Q5_0: write_q45(in, b, 32, false); break;
        case PL_Q5_1: write_q45(in, b, 32, true); break;
        case PL_Q8_0: write_q8_0(in, b); break;
        case PL_Q2_K: write_q2_k(in, b); break;
        case PL_Q3_K: write_q3_k(in, b); break;
        case PL_Q4_K: write_q45_k(in, b, 16); break;
        case PL_Q5_K: write_q45_k(in, b, 32); break;
        case PL_Q6_K: write_q6_k(in, b); break;
        case PL_F8: PL_ASSERT(!"a type of caches only");
        }
    }
}
