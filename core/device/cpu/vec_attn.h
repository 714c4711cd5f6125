/* vec_attn: attention over one segment of a cache, the same for every vector instruction set. Included by vec.h; the numbers of
 * vectors that stay in registers, and the integer products, come from attn_avx2.h or attn_avx512.h.
 *
 * A few queries at a time: their scores over the whole segment, the soft-max, their weighted values. The order of every sum
 * follows from the query's own positions.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_VEC_ATTN_H
#define PL_DEVICE_CPU_VEC_ATTN_H

#define INLINED static inline __attribute__((always_inline))

enum { SEGMENT = PL_CPU_SEGMENT * PL_CPU_PAGE };

/* What a chunk of n queries from `first` on works with */
struct attn_chunk {
    struct pl_cpu_attn *a;
    uint32_t first, least, most;          /* positions that each of them sees, and that one of them sees */
    _Alignas(64) float w[WQ > VQ ? WQ : VQ][SEGMENT]; /* scores, then weights */
    _Alignas(64) uint8_t high[VQ][SEGMENT], low[VQ][SEGMENT]; /* weights of Q8_0 */
    _Alignas(64) int16_t whole[WQ][SEGMENT];                  /* weights of F16 */
};

/* A context is read once, for all its queries, and mostly from memory. Each line that the first chunk of queries reads asks for the one
 * that takes its place half a segment later, `lead` bytes from it: of the same page's values while keys are read, of the next segment's
 * keys while values are. One by one, since processors stop at a burst of requests. */
INLINED const uint8_t *ask(const uint8_t *line, ptrdiff_t lead)
{
    if (lead != 0)
        _mm_prefetch((const char *)line + lead, _MM_HINT_T0);
    return line;
}

/* Scales are read at other times than what they belong to: those of a page's keys or values, at `piece`, at once. */
INLINED void ask_scales(const struct pl_cpu_kv_layout *l, const uint8_t *piece, ptrdiff_t lead)
{
    for (uint32_t i = l->key_scales; i < l->piece; i += 64)
        ask(piece + i, lead);
}

INLINED ptrdiff_t keys_lead(const struct attn_chunk *c, uint32_t at)
{
    const struct pl_cpu_kv_layout *l = c->a->layout;
    const ptrdiff_t lead = c->first == 0 ? (ptrdiff_t)l->values : 0;
    if (at % PL_CPU_PAGE == 0)
        ask_scales(l, c->a->pages[at / PL_CPU_PAGE], lead);
    return lead;
}

INLINED ptrdiff_t values_lead(const struct attn_chunk *c, uint32_t at, uint32_t d)
{
    const uint8_t *values = c->a->pages[at / PL_CPU_PAGE] + c->a->layout->values, *ahead = c->a->ahead[at / PL_CPU_PAGE];
    const ptrdiff_t lead = c->first == 0 && ahead != NULL ? (ptrdiff_t)((uintptr_t)ahead - (uintptr_t)values) : 0;
    if (d == 0)
        ask_scales(c->a->layout, values, lead);
    return lead;
}

/* Multiplies scores; those from the query's last position to the end of its vector become the least. Returns the largest; a NaN that
 * this loses is in the sum of the weights. */
INLINED float scale_scores(struct attn_chunk *c, uint32_t i, float scale)
{
    const uint32_t n = c->a->n_pos[c->first + i];
    const vf factor = vf_set(scale);
    vf most = vf_set(-INFINITY);
    float *w = c->w[i];
    uint32_t p = 0;
    for (; p + VF <= n; p += VF) {
        const vf x = vf_mul(vf_load(w + p), factor);
        vf_store(w + p, x);
        most = vf_max(most, x);
    }
    if (p < n) {
        const vf x = vf_head(vf_mul(vf_load(w + p), factor), n - p, -INFINITY);
        vf_store(w + p, x);
        most = vf_max(most, x);
    }
    return vf_largest(most);
}

/* Scores become weights; those from the query's last position to the end of its vector become 0. */
static inline void soften(struct attn_chunk *c, uint32_t i, float scale)
{
    struct pl_cpu_attn *a = c->a;
    const uint32_t n = a->n_pos[c->first + i];
    const float max = scale_scores(c, i, scale);
    vf sum = vf_set(0.f);
    float *w = c->w[i];
    for (uint32_t p = 0; p < n; p += VF) {
        const vf x = vf_head(vf_exp(vf_sub(vf_load(w + p), vf_set(max))), n - p, 0);
        vf_store(w + p, x);
        sum = vf_add(sum, x);
    }
    a->max[c->first + i] = max;
    a->sum[c->first + i] = vf_sum(sum);
}

/* ---- float caches -------------------------------------------------------------------------------------------------- */

/* 16 positions of dimension d */
INLINED vf load_key(pl_dtype t, const uint8_t *keys, uint32_t d, uint32_t position, ptrdiff_t lead)
{
    keys = ask(keys + ((size_t)(t == PL_BF16 ? d / 2 : d) * PL_CPU_PAGE + position) * sizeof(float), lead);
    return t == PL_BF16 ? vf_load_pairs((const uint16_t *)keys, d % 2) : load_as(t, keys, 0);
}

/* 16 dimensions of a position */
INLINED vf load_value(pl_dtype t, const uint8_t *values, uint32_t head_dim, uint32_t position, uint32_t d, ptrdiff_t lead)
{
    values = ask(values + ((size_t)(t == PL_BF16 ? position / 2 : position) * head_dim + d) * sizeof(float), lead);
    return t == PL_BF16 ? vf_load_pairs((const uint16_t *)values, position % 2) : load_as(t, values, 0);
}

INLINED void float_scores(pl_dtype t, struct attn_chunk *c, uint32_t n)
{
    const struct pl_cpu_attn *a = c->a;
    const struct pl_cpu_query *q = a->q + c->first;
    for (uint32_t at = 0; at < c->most; at += VP * VF) {
        const uint8_t *keys = a->pages[at / PL_CPU_PAGE];
        const ptrdiff_t lead = keys_lead(c, at);
        vf s[VQ][VP];
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VP; j++)
                s[i][j] = vf_set(0.f);
#pragma GCC unroll 2
        for (uint32_t d = 0; d < a->layout->head_dim; d++) {
            vf key[VP];
            for (uint32_t j = 0; j < VP; j++)
                key[j] = load_key(t, keys, d, at % PL_CPU_PAGE + j * VF, lead);
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < VP; j++)
                    s[i][j] = vf_fma(vf_set(q[i].x[d]), key[j], s[i][j]);
        }
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VP; j++)
                vf_store(c->w[i] + at + j * VF, s[i][j]);
    }
}

/* The weighted values of dimensions d to d + 16 n_d. A weight 0 is not enough where a query sees less than the others: a later
 * position's value may be no number. */
INLINED void float_values(pl_dtype t, struct attn_chunk *c, uint32_t n, uint32_t d, uint32_t n_d)
{
    const struct pl_cpu_attn *a = c->a;
    const uint32_t D = a->layout->head_dim, values = a->layout->values;
    vf s[VQ][VD];
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_d; j++)
            s[i][j] = vf_set(0.f);
    for (uint32_t at = 0; at < c->least; at += PL_CPU_PAGE) {
        const uint8_t *v = a->pages[at / PL_CPU_PAGE] + values;
        const ptrdiff_t lead = values_lead(c, at, d);
        const uint32_t end = c->least - at < PL_CPU_PAGE ? c->least - at : PL_CPU_PAGE;
        for (uint32_t p = 0; p < end; p++) {
            vf value[VD];
            for (uint32_t j = 0; j < n_d; j++)
                value[j] = load_value(t, v, D, p, d + j * VF, lead);
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < n_d; j++)
                    s[i][j] = vf_fma(vf_set(c->w[i][at + p]), value[j], s[i][j]);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t p = c->least; p < a->n_pos[c->first + i]; p++) {
            const uint8_t *v = a->pages[p / PL_CPU_PAGE] + values;
            for (uint32_t j = 0; j < n_d; j++)
                s[i][j] = vf_fma(vf_set(c->w[i][p]), load_value(t, v, D, p % PL_CPU_PAGE, d + j * VF, 0), s[i][j]);
        }
        for (uint32_t j = 0; j < n_d; j++)
            vf_store(a->acc[c->first + i] + d + j * VF, s[i][j]);
    }
}

INLINED void float_chunk(pl_dtype t, struct attn_chunk *c, uint32_t n)
{
    const uint32_t D = c->a->layout->head_dim;
    uint32_t d = 0;
    float_scores(t, c, n);
    for (uint32_t i = 0; i < n; i++)
        soften(c, i, c->a->scale);
    for (; d + VD * VF <= D; d += VD * VF)
        float_values(t, c, n, d, VD);
    for (; d + 2 * VF <= D; d += 2 * VF)
        float_values(t, c, n, d, 2);
    if (d < D)
        float_values(t, c, n, d, 1);
}

/* ---- F16: integers of 16 bits --------------------------------------------------------------------------------------- */

static float vec_round16(const float *x, uint32_t n, bool value, int16_t *out)
{
    vf sum = vf_set(0.f), most = vf_set(0.f);
    if (n % VF != 0)
        return pl_cpu_kernels_ref.round16(x, n, value, out);
    for (uint32_t i = 0; i < n; i += VF) {
        const vf v = vf_load(x + i);
        sum = vf_fma(v, v, sum);
        most = vf_larger_bits(most, vf_abs(v));
    }
    const float largest = vf_magnitude(most, most), square = vf_sum(sum);
    const float by_length = value ? 0 : sqrtf(square) / PL_CPU_LENGTH_TOP, by_largest = largest / (value ? PL_CPU_VALUE_TOP : PL_CPU_INT_TOP);
    const float unit = by_length > by_largest ? by_length : by_largest, inverse = square > PL_CPU_TINY ? 1 / unit : 0;
    for (uint32_t i = 0; i < n; i += VF)
        vf_store_i16(out + i, vf_mul(vf_load(x + i), vf_set(inverse)));
    return square < INFINITY ? unit : NAN;
}

INLINED void whole_scores(struct attn_chunk *c, uint32_t n)
{
    const struct pl_cpu_attn *a = c->a;
    const struct pl_cpu_query *q = a->q + c->first;
    for (uint32_t at = 0; at < c->most; at += VP * VF) {
        const uint8_t *page = a->pages[at / PL_CPU_PAGE], *keys = page + at % PL_CPU_PAGE * 4;
        const float *scales = (const float *)(page + a->layout->key_scales) + at % PL_CPU_PAGE;
        const ptrdiff_t lead = keys_lead(c, at);
        vi s[WQ][VP];
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VP; j++)
                s[i][j] = vi_set(0);
#pragma GCC unroll 2
        for (uint32_t d = 0; d < a->layout->head_dim; d += 2) {
            vi key[VP];
            for (uint32_t j = 0; j < VP; j++)
                key[j] = vi_values(ask(keys + (size_t)d * PL_CPU_PAGE * 2 + j * VF * 4, lead));
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < VP; j++)
                    s[i][j] = vi_dot_pairs(s[i][j], key[j], q[i].whole + d);
        }
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VP; j++)
                vf_store(c->w[i] + at + j * VF, vf_mul(vi_float(s[i][j]), vf_load(scales + j * VF)));
    }
}

struct whole_sums {
    vf sum, total, most; /* of the weights; of these times the values' scales */
};

/* The weights of a vector's first n positions. */
INLINED void whole_vector(const struct attn_chunk *c, float *w, uint32_t p, uint32_t n, float max, struct whole_sums *s)
{
    const float *scales = (const float *)(c->a->pages[p / PL_CPU_PAGE] + c->a->layout->value_scales) + p % PL_CPU_PAGE;
    const vf x = vf_head(vf_exp(vf_sub(vf_load(w + p), vf_set(max))), n, 0), v = vf_head(vf_mul(x, vf_load(scales)), n, 0);
    vf_store(w + p, v);
    s->sum = vf_add(s->sum, x);
    s->total = vf_add(s->total, v);
    s->most = vf_larger_bits(s->most, v);
}

/* Scores, of which max is the largest, become weights times the values' scales. Returns what makes integers of them. */
static inline float whole_weights(struct attn_chunk *c, uint32_t i, float max, float *unit)
{
    struct pl_cpu_attn *a = c->a;
    const uint32_t n = a->n_pos[c->first + i];
    struct whole_sums s = {vf_set(0.f), vf_set(0.f), vf_set(0.f)};
    uint32_t p = 0;
    for (; p + VF <= n; p += VF)
        whole_vector(c, c->w[i], p, VF, max, &s);
    if (p < n)
        whole_vector(c, c->w[i], p, n - p, max, &s);
    a->max[c->first + i] = max;
    a->sum[c->first + i] = vf_sum(s.sum);
    const float largest = vf_magnitude(s.most, s.most), by_largest = PL_CPU_INT_TOP / largest, by_sum = PL_CPU_WEIGHT_SUM / vf_sum(s.total);
    const float inverse = largest > PL_CPU_TINY ? by_largest < by_sum ? by_largest : by_sum : 0;
    *unit = inverse > 0 ? 1 / inverse : largest;
    return inverse;
}

/* The weights as integers; positions that the query does not see count 0. */
static inline void whole_round(struct attn_chunk *c, uint32_t i, float inverse)
{
    const uint32_t n = c->a->n_pos[c->first + i];
    uint32_t p = 0;
    for (; p < n; p += VF)
        vf_store_i16(c->whole[i] + p, vf_mul(vf_load(c->w[i] + p), vf_set(inverse)));
    for (; p < c->most; p += VF)
        memset(c->whole[i] + p, 0, VF * sizeof c->whole[i][0]);
}

INLINED void whole_values(struct attn_chunk *c, const float *unit, uint32_t n, uint32_t d, uint32_t n_d)
{
    const struct pl_cpu_attn *a = c->a;
    const size_t stride = (size_t)4 * a->layout->head_dim;
    vi s[WQ][VD];
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_d; j++)
            s[i][j] = vi_set(0);
    for (uint32_t at = 0; at < c->most; at += PL_CPU_PAGE) {
        const uint8_t *v = a->pages[at / PL_CPU_PAGE] + a->layout->values + (size_t)4 * d;
        const ptrdiff_t lead = values_lead(c, at, d);
        for (uint32_t p = at; p < at + PL_CPU_PAGE && p < c->most; p += 2, v += stride) {
            vi value[VD];
            for (uint32_t j = 0; j < n_d; j++)
                value[j] = vi_values(ask(v + j * VF * 4, lead));
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < n_d; j++)
                    s[i][j] = vi_dot_pairs(s[i][j], value[j], c->whole[i] + p);
        }
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_d; j++)
            vf_store(a->acc[c->first + i] + d + j * VF, vf_mul(vi_float(s[i][j]), vf_set(unit[i])));
}

INLINED void whole_chunk(struct attn_chunk *c, uint32_t n)
{
    const uint32_t D = c->a->layout->head_dim;
    float most[WQ], inverse[WQ], unit[WQ];
    uint32_t d = 0;
    whole_scores(c, n);
    /* one query after the other in each step: a sum's last additions go on beside the next query's first ones */
    for (uint32_t i = 0; i < n; i++)
        most[i] = scale_scores(c, i, c->a->q[c->first + i].unit * c->a->scale);
    for (uint32_t i = 0; i < n; i++)
        inverse[i] = whole_weights(c, i, most[i], &unit[i]);
    for (uint32_t i = 0; i < n; i++)
        whole_round(c, i, inverse[i]);
    for (; d + VD * VF <= D; d += VD * VF)
        whole_values(c, unit, n, d, VD);
    for (; d + 2 * VF <= D; d += 2 * VF)
        whole_values(c, unit, n, d, 2);
    if (d < D)
        whole_values(c, unit, n, d, 1);
}

/* ---- Q8_0 ---------------------------------------------------------------------------------------------------------- */

/* Queries and weights are rounded to integers in two parts of 7 bits, 128 high + low, so that a product with the cache's bytes
 * is two exact integer sums: queries to 15 bits with sign, weights to 14. */
enum { QUERY_TOP = 127 * 128 + 63, WEIGHT_TOP = 127 * 128 + 127 };

static void split_query(uint32_t D, const float *x, struct pl_cpu_query *q)
{
    vf most = vf_set(0.f);
    for (uint32_t d = 0; d < D; d += VF)
        most = vf_larger_bits(most, vf_abs(vf_load(x + d)));
    const float max = vf_magnitude(most, most), inverse = max > PL_CPU_TINY ? QUERY_TOP / max : 0;
    for (uint32_t d = 0; d < D; d += VF)
        vf_split(vf_mul(vf_load(x + d), vf_set(inverse)), 64, q->high + d, q->low + d);
    for (uint32_t b = 0; b < D; b += 32) {
        int32_t sum = 0;
        for (uint32_t d = b; d < b + 32 && d < D; d++)
            sum += 128 * q->high[d] + q->low[d];
        q->offset[b / 32] = KEY_OFFSET * sum;
    }
    q->unit = max / QUERY_TOP;
}

INLINED void int_scores(struct attn_chunk *c, uint32_t n)
{
    const struct pl_cpu_attn *a = c->a;
    const struct pl_cpu_query *q = a->q + c->first;
    const uint32_t D = a->layout->head_dim;
    for (uint32_t at = 0; at < c->most; at += VI * VF) {
        const uint8_t *page = a->pages[at / PL_CPU_PAGE], *keys = page + at % PL_CPU_PAGE * 4;
        const uint16_t *scales = (const uint16_t *)(page + a->layout->key_scales) + at % PL_CPU_PAGE;
        const ptrdiff_t lead = keys_lead(c, at);
        vf s[VQ][VI];
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VI; j++)
                s[i][j] = vf_set(0.f);
        for (uint32_t b = 0; b < D; b += 32, scales += PL_CPU_PAGE) {
            vi high[VQ][VI], low[VQ][VI];
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < VI; j++)
                    high[i][j] = vi_set(0), low[i][j] = vi_set(-q[i].offset[b / 32]);
            for (uint32_t d = b; d < b + 32 && d < D; d += 4) {
                vi key[VI];
                for (uint32_t j = 0; j < VI; j++)
                    key[j] = vi_keys(ask(keys + (size_t)d * PL_CPU_PAGE + j * VF * 4, lead));
                for (uint32_t i = 0; i < n; i++)
                    for (uint32_t j = 0; j < VI; j++) {
                        high[i][j] = vi_dot_keys(high[i][j], key[j], q[i].high + d);
                        low[i][j] = vi_dot_keys(low[i][j], key[j], q[i].low + d);
                    }
            }
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < VI; j++)
                    s[i][j] = vf_fma(vi_join(high[i][j], low[i][j]), vf_load_f16(scales + j * VF), s[i][j]);
        }
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < VI; j++)
                vf_store(c->w[i] + at + j * VF, s[i][j]);
    }
}

/* Weights times the values' scales of block b, in two parts; positions that the query does not see count 0. Returns the unit. */
static inline float split_weights(struct attn_chunk *c, uint32_t i, uint32_t b)
{
    const struct pl_cpu_attn *a = c->a;
    const uint32_t n = a->n_pos[c->first + i];
    _Alignas(64) float x[SEGMENT];
    vf most = vf_set(0.f);
    for (uint32_t p = 0; p < n; p += VF) {
        const uint16_t *scales = (const uint16_t *)(a->pages[p / PL_CPU_PAGE] + a->layout->value_scales) + b * PL_CPU_PAGE + p % PL_CPU_PAGE;
        const vf v = vf_head(vf_mul(vf_load(c->w[i] + p), vf_load_f16(scales)), n - p, 0);
        vf_store(x + p, v);
        most = vf_larger_bits(most, v);
    }
    const float max = vf_magnitude(most, most), inverse = max > PL_CPU_TINY ? WEIGHT_TOP / max : 0;
    uint32_t p = 0;
    for (; p < n; p += VF)
        vf_split(vf_mul(vf_load(x + p), vf_set(inverse)), 0, c->high[i] + p, c->low[i] + p);
    for (; p < c->most; p += VF) {
        memset(c->high[i] + p, 0, VF);
        memset(c->low[i] + p, 0, VF);
    }
    return max / WEIGHT_TOP;
}

INLINED void int_values(struct attn_chunk *c, const float *unit, uint32_t n, uint32_t d, uint32_t n_d)
{
    const struct pl_cpu_attn *a = c->a;
    const size_t stride = (size_t)4 * a->layout->head_dim;
    vi high[VQ][VI], low[VQ][VI];
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_d; j++)
            high[i][j] = low[i][j] = vi_set(0);
    for (uint32_t at = 0; at < c->most; at += PL_CPU_PAGE) {
        const uint8_t *v = a->pages[at / PL_CPU_PAGE] + a->layout->values + (size_t)4 * d;
        const ptrdiff_t lead = values_lead(c, at, d);
        for (uint32_t p = at; p < at + PL_CPU_PAGE && p < c->most; p += 4, v += stride) {
            vi value[VI];
            for (uint32_t j = 0; j < n_d; j++)
                value[j] = vi_values(ask(v + j * VF * 4, lead));
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < n_d; j++) {
                    high[i][j] = vi_dot_values(high[i][j], value[j], c->high[i] + p);
                    low[i][j] = vi_dot_values(low[i][j], value[j], c->low[i] + p);
                }
        }
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_d; j++)
            vf_store(a->acc[c->first + i] + d + j * VF, vf_mul(vi_join(high[i][j], low[i][j]), vf_set(unit[i])));
}

INLINED void int_chunk(struct attn_chunk *c, uint32_t n)
{
    const uint32_t D = c->a->layout->head_dim;
    int_scores(c, n);
    for (uint32_t i = 0; i < n; i++)
        soften(c, i, c->a->q[c->first + i].unit * c->a->scale);
    for (uint32_t b = 0; b < D; b += 32) {
        float unit[VQ];
        uint32_t d = b;
        for (uint32_t i = 0; i < n; i++)
            unit[i] = split_weights(c, i, b / 32);
        for (; d + VI * VF <= D && d < b + 32; d += VI * VF)
            int_values(c, unit, n, d, VI);
        if (d < D && d < b + 32)
            int_values(c, unit, n, d, 1);
    }
}

/* ---- all ----------------------------------------------------------------------------------------------------------- */

INLINED void attn_chunk(pl_dtype t, struct attn_chunk *c, uint32_t n)
{
    const uint32_t *n_pos = c->a->n_pos + c->first;
    c->least = c->most = n_pos[0];
    for (uint32_t i = 1; i < n; i++) {
        c->least = n_pos[i] < c->least ? n_pos[i] : c->least;
        c->most = n_pos[i] > c->most ? n_pos[i] : c->most;
    }
    if (t == PL_Q8_0)
        int_chunk(c, n);
    else if (t == PL_F16)
        whole_chunk(c, n);
    else
        float_chunk(t, c, n);
    c->first += n;
}

/* Chunks of about equal numbers of queries. */
INLINED void attn_typed(pl_dtype t, struct pl_cpu_attn *a)
{
    const uint32_t most = t == PL_F16 ? WQ : VQ;
    struct attn_chunk c;
    c.a = a;
    c.first = 0;
    for (uint32_t left = (a->n_q + most - 1) / most; left > 0; left--)
        switch ((a->n_q - c.first + left - 1) / left) {
        case 1: attn_chunk(t, &c, 1); break;
        case 2: attn_chunk(t, &c, 2); break;
        case 3: attn_chunk(t, &c, most > 3 ? 3 : most); break;
        case 4: attn_chunk(t, &c, most > 4 ? 4 : most); break;
        case 5: attn_chunk(t, &c, most > 5 ? 5 : most); break;
        default: attn_chunk(t, &c, most);
        }
}

static void vec_attn(struct pl_cpu_attn *a)
{
    if (a->layout->head_dim % VF != 0)
        pl_cpu_kernels_ref.attn(a);
    else if (a->layout->dtype == PL_Q8_0)
        attn_typed(PL_Q8_0, a);
    else if (a->layout->dtype == PL_F16)
        attn_typed(PL_F16, a);
    else if (a->layout->dtype == PL_BF16)
        attn_typed(PL_BF16, a);
    else
        attn_typed(PL_F32, a);
}

static void vec_query(const struct pl_cpu_kv_layout *l, const float *x, struct pl_cpu_query *q)
{
    if (l->head_dim % VF != 0 || l->dtype == PL_F32 || l->dtype == PL_BF16)
        pl_cpu_kernels_ref.query(l, x, q);
    else if (l->dtype == PL_Q8_0)
        split_query(l->head_dim, x, q);
    else
        q->unit = vec_round16(x, l->head_dim, false, q->whole);
}

static void vec_blend(float *total, float a, const float *x, float b, uint32_t n)
{
    uint32_t i = 0;
    for (; i + VF <= n; i += VF)
        vf_store(total + i, vf_fma(vf_load(total + i), vf_set(a), vf_mul(vf_load(x + i), vf_set(b))));
    for (; i < n; i++)
        total[i] = total[i] * a + x[i] * b;
}

static void vec_rotate(float *x, uint32_t n, uint32_t bits)
{
    const uint32_t size = 1u << bits;
    if (bits < 4) {
        pl_cpu_kernels_ref.rotate(x, n, bits);
        return;
    }
    const vf scale = vf_set(1 / sqrtf((float)size));
    for (uint32_t i = 0; i < n; i += VF) {
        vf v = vf_mul(vf_load(x + i), scale);
        v = vf_butterfly(vf_butterfly(v, 1), 2);
        vf_store(x + i, vf_butterfly(vf_butterfly(v, 4), 8));
    }
    for (uint32_t distance = VF; distance < size; distance *= 2)
        for (uint32_t i = 0; i < n; i += VF) {
            if (i & distance)
                continue;
            const vf u = vf_load(x + i), v = vf_load(x + i + distance);
            vf_store(x + i, vf_add(u, v));
            vf_store(x + i + distance, vf_sub(u, v));
        }
}

#endif
