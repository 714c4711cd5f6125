/* kernels_ref: the scalar kernels, plain C and double accumulation. They are the oracle for the vector ones, so they read
 * the file's own blocks, not the packed ones.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "core/device/cpu/cpu.h"

static void quant(const float *x, size_t x_stride, uint32_t n, const struct pl_cpu_blocks *all)
{
    for (uint32_t b = 0; b < n; b++, x += x_stride) {
        const struct pl_cpu_blocks to = pl_cpu_blocks_from(all, b);
        struct pl_cpu_block *block = to.b;
        float max = 0;
        for (int i = 0; i < 32; i++)
            max = fmaxf(max, fabsf(x[i]));
        block->d = max / 127;
        bool finite = max < INFINITY;
        for (int i = 0; i < 32; i++)
            finite &= x[i] == x[i];
        if (!finite)
            block->d = NAN; /* what is not a number stays so, in its own row */
        float inverse = max > PL_CPU_TINY ? 127 / max : 0;
        block->minus16[0] = block->minus16[1] = 0;
        for (int i = 0; i < 32; i++) {
            float r = finite ? nearbyintf(x[i] * inverse) : 0;
            to.q[i] = (int8_t)(r > 127 ? 127 : r < -127 ? -127 : r);
            block->minus16[i / 16] = (int16_t)(block->minus16[i / 16] - to.q[i]);
        }
        block->start = 128 * (block->minus16[0] + block->minus16[1]);
        block->sum = (float)(-block->start / 128);
    }
}

static float dot_blocks(const struct pl_cpu_part *w, const uint8_t *row, const int8_t *xq, const struct pl_cpu_block *x)
{
    uint8_t q[256];
    float scale[16], min[16];
    uint32_t block = pl_dtype_block(w->dtype);
    double total = 0;
    for (uint32_t b = 0; b < w->cols / block; b++, row += pl_dtype_block_bytes(w->dtype)) {
        pl_dtype_unpack(w->dtype, row, q, scale, min);
        for (uint32_t j = 0; j < block / w->sub; j++) {
            uint32_t at = b * block + j * w->sub;
            int dot = 0, sum = 0;
            for (uint32_t e = 0; e < w->sub; e++) {
                dot += xq[at + e] * (q[j * w->sub + e] - (int)w->offset);
                sum += xq[at + e];
            }
            total += (double)x[at / 32].d * ((double)scale[j] * dot + (double)min[j] * sum);
        }
    }
    return (float)total;
}

static void rows_block(const struct pl_cpu_part *w, uint32_t unit, uint32_t n_groups, const struct pl_cpu_act *x, uint32_t t0,
                       uint32_t n_t, float *out, size_t stride, bool add)
{
    for (uint32_t i = 0; i < n_t; i++)
        for (uint32_t r = 0; r < n_groups * PL_CPU_GROUP; r++) {
            uint32_t row = unit * PL_CPU_UNIT + r;
            size_t t = t0 + i;
            float sum = row >= w->rows ? 0 : dot_blocks(w, w->src + row * w->src_stride, x->q + t * w->cols, x->b + t * (w->cols / 32));
            out[i * stride + r] = add ? out[i * stride + r] + sum : sum;
        }
}

static void rows_float(const struct pl_cpu_part *w, uint32_t unit, uint32_t n_groups, const float *x, size_t stride, uint32_t n_t,
                       float *out, size_t out_stride, bool add)
{
    size_t element = pl_dtype_block_bytes(w->dtype);
    for (uint32_t i = 0; i < n_t; i++)
        for (uint32_t r = 0; r < n_groups * PL_CPU_GROUP; r++) {
            uint32_t row = unit * PL_CPU_UNIT + r;
            double sum = 0;
            for (uint32_t k = 0; row < w->rows && k < w->cols; k++) {
                float v;
                pl_dequant_row(w->dtype, w->src + row * w->src_stride + k * element, &v, 1);
                sum += (double)v * x[i * stride + k];
            }
            float *to = out + i * out_stride + r;
            *to = add ? *to + (float)sum : (float)sum;
        }
}

static void norm(pl_norm_kind kind, float *out, const float *x, const float *gain, const float *bias, uint32_t n, float eps)
{
    double mean = 0, square = 0;
    for (uint32_t i = 0; kind == PL_NORM_LAYER && i < n; i++)
        mean += x[i];
    mean /= n;
    for (uint32_t i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(square / n + eps);
    for (uint32_t i = 0; i < n; i++)
        out[i] = (float)((x[i] - mean) * scale * gain[i] + (bias != NULL ? bias[i] : 0));
}

static void rope(pl_rope_kind kind, float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_dims, const float *cos,
                 const float *sin)
{
    for (uint32_t h = 0; h < n_heads; h++, x += head_dim)
        for (uint32_t i = 0; i < n_dims / 2; i++) {
            float *a = kind == PL_ROPE_INTERLEAVED ? x + 2 * i : x + i, *b = kind == PL_ROPE_INTERLEAVED ? a + 1 : a + n_dims / 2;
            float va = *a, vb = *b;
            *a = va * cos[i] - vb * sin[i];
            *b = va * sin[i] + vb * cos[i];
        }
}

static float activate(pl_act_kind kind, float x)
{
    if (kind == PL_ACT_SILU)
        return (float)(x / (1 + exp(-(double)x)));
    return (float)(0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * (double)x * x * x))));
}

static void glu(pl_act_kind kind, float *out, const float *gate, const float *up, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = activate(kind, gate[i]) * up[i];
}

static void act(pl_act_kind kind, float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] = activate(kind, x[i]);
}

static float round16(const float *x, uint32_t n, bool value, int16_t *out)
{
    double square = 0, most = 0;
    for (uint32_t i = 0; i < n; i++) {
        square += (double)x[i] * x[i];
        if (!(fabsf(x[i]) <= most))
            most = fabsf(x[i]);
    }
    const double unit = value ? most / PL_CPU_VALUE_TOP : fmax(most / PL_CPU_INT_TOP, sqrt(square) / PL_CPU_LENGTH_TOP);
    const bool finite = square < INFINITY;
    for (uint32_t i = 0; i < n; i++)
        out[i] = finite && square > PL_CPU_TINY ? (int16_t)nearbyint(x[i] / unit) : 0;
    return finite ? (float)unit : NAN;
}

/* Element d of a cached key or value at a position of its page */
static float cached(const struct pl_cpu_kv_layout *l, const uint8_t *page, bool value, uint32_t position, uint32_t d)
{
    const uint32_t s = l->step;
    const size_t at = value ? ((size_t)(position / s) * l->head_dim + d) * s + position % s
                            : ((size_t)(d / s) * PL_CPU_PAGE + position) * s + d % s;
    const uint8_t *from = page + (value ? l->values : 0) + at * l->element;
    float x;
    if (l->dtype == PL_Q8_0) {
        const uint16_t *scales = (const uint16_t *)(page + (value ? l->value_scales : l->key_scales));
        return pl_f16_to_f32(scales[d / 32 * PL_CPU_PAGE + position]) * (float)(value ? (int8_t)*from : *from - PL_CPU_KEY_OFFSET);
    }
    if (l->dtype == PL_F16)
        return ((const float *)(page + (value ? l->value_scales : l->key_scales)))[position] * (float)*(const int16_t *)from;
    pl_dequant_row(l->dtype, from, &x, 1);
    return x;
}

static void query(const struct pl_cpu_kv_layout *l, const float *x, struct pl_cpu_query *q)
{
    memcpy(q->x, x, l->head_dim * sizeof *x);
}

/* The soft-max of one query over a segment, in two passes. */
static void attn(struct pl_cpu_attn *a)
{
    const struct pl_cpu_kv_layout *l = a->layout;
    for (uint32_t i = 0; i < a->n_q; i++) {
        float scores[PL_CPU_SEGMENT * PL_CPU_PAGE];
        a->max[i] = -INFINITY;
        for (uint32_t p = 0; p < a->n_pos[i]; p++) {
            double dot = 0;
            for (uint32_t d = 0; d < l->head_dim; d++)
                dot += (double)cached(l, a->pages[p / PL_CPU_PAGE], false, p % PL_CPU_PAGE, d) * a->q[i].x[d];
            scores[p] = (float)dot * a->scale;
            if (!(scores[p] <= a->max[i]))
                a->max[i] = scores[p];
        }
        a->sum[i] = 0;
        memset(a->acc[i], 0, l->head_dim * sizeof(float));
        for (uint32_t p = 0; p < a->n_pos[i]; p++) {
            const float weight = expf(scores[p] - a->max[i]);
            a->sum[i] += weight;
            for (uint32_t d = 0; d < l->head_dim; d++)
                a->acc[i][d] += weight * cached(l, a->pages[p / PL_CPU_PAGE], true, p % PL_CPU_PAGE, d);
        }
    }
}

static void blend(float *total, float a, const float *x, float b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        total[i] = total[i] * a + x[i] * b;
}

static void lora_down(const float *const *x, uint32_t n_x, const float *a, uint32_t n_a, uint32_t cols, float *y, size_t stride)
{
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t r = 0; r < n_a; r++) {
            double sum = 0;
            for (uint32_t k = 0; k < cols; k++)
                sum += (double)x[i][k] * a[(size_t)r * cols + k];
            y[i * stride + r] = (float)sum;
        }
}

static void lora_up(float *const *out, uint32_t n_x, const float *y, size_t stride, const float *bt, size_t bt_stride, uint32_t rank,
                    uint32_t n)
{
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t c = 0; c < n; c++) {
            double sum = 0;
            for (uint32_t r = 0; r < rank; r++)
                sum += (double)y[i * stride + r] * bt[r * bt_stride + c];
            out[i][c] += (float)sum;
        }
}

static void rotate(float *x, uint32_t n, uint32_t bits)
{
    const float scale = 1 / sqrtf((float)(1u << bits));
    for (uint32_t distance = 1; distance < 1u << bits; distance *= 2)
        for (uint32_t i = 0; i < n; i++) {
            if (i & distance)
                continue;
            const float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
    for (uint32_t i = 0; i < n; i++)
        x[i] *= scale;
}

const struct pl_cpu_kernels pl_cpu_kernels_ref = {
    .name = "ref", .packed = false, .quant = quant, .rows_block = rows_block, .rows_float = rows_float, .norm = norm,
    .rope = rope, .glu = glu, .act = act, .round16 = round16, .query = query, .attn = attn, .blend = blend,
    .lora_down = lora_down, .lora_up = lora_up,
    .rotate = rotate,
};
