/* cpu: the CPU device's own data: buffers, packed weights, cache pages, quantized activations, and the table of kernels
 * that one instruction set provides.
 * Thread: the engine's, and the pool's workers inside an operation.  Owns: see each struct.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_CPU_H
#define PL_DEVICE_CPU_CPU_H

#include "core/base/pool.h"
#include "core/device/device.h"

enum {
    PL_CPU_GROUP = 16,   /* output rows that are interleaved */
    PL_CPU_UNIT = 32,    /* output rows that a kernel takes at once: 2 groups */
    PL_CPU_PAGE = 32,    /* positions of a cache page that attention takes at once */
    PL_CPU_SEGMENT = 8,  /* pages whose soft-max is one piece; pieces are merged in order */
    PL_CPU_MAX_DIM = PL_MAX_HEAD_DIM,
    PL_CPU_MAX_QUERIES = PL_MAX_QUERIES_PER_KV
};

/* A block of activations no larger than this counts as zero: 127 / max would overflow. */
#define PL_CPU_TINY 0x1p-100f

/* One part of a weight, packed in units of two groups of 16 rows; rows that fill up the last unit are zero.
 *
 * Block types, per unit and sub-block of `sub` inputs (16 or 32), so that one 64-byte load feeds 16 rows, from one cache line, and a
 * processor reads a single stream; of each piece the first group's and then the second's:
 *   quants   step k: row 0 inputs 4k..4k+3, row 1 inputs 4k..4k+3, … row 15        64 bytes a step, 8-bit quants
 *            4-bit quants: a vector's low nibbles are step k, its high nibbles step k + sub/8
 *   scales   16 × f16 (types whose scales are f16) or f32 (K-quants)
 *   minima   the same, only for types that have them; else the minimum is -offset * scale
 * Float types, per group: [cols][16] in the file's own type. */
struct pl_cpu_part {
    pl_dtype dtype;
    uint32_t rows, cols;
    const uint8_t *src; /* borrowed: the file's rows, for the embedding and the reference kernels */
    size_t src_stride;  /* bytes from one of them to the next */
    uint8_t *packed;    /* NULL in the reference device */
    struct pl_cpu_chunk *chunk; /* where packed lies */
    size_t unit_bytes;
    uint32_t bits; /* 4 or 8; 0 = float type */
    uint32_t sub;
    bool has_min, half_scales;
    float offset; /* of the file's quants; packed ones have pl_cpu_offset_bits */
};

/* Packed quants of types without minima are raised so that a layout has one offset, 2 to the power of this. */
static inline uint32_t pl_cpu_offset_bits(uint32_t bits, uint32_t sub)
{
    return bits == 8 ? (sub == 32 ? 7 : 5) : (sub == 32 ? 3 : 2);
}

static inline uint32_t pl_cpu_quant_bytes(const struct pl_cpu_part *p) /* one group's of a sub-block */
{
    return PL_CPU_GROUP * p->sub * p->bits / 8;
}

static inline uint32_t pl_cpu_units(const struct pl_cpu_part *p)
{
    return (p->rows + PL_CPU_UNIT - 1) / PL_CPU_UNIT;
}

/* Packed parts lie one behind the other in huge pages, since most are smaller than one; given back with the last part. */
struct pl_cpu_chunk {
    uint8_t *data;
    size_t size, used;
    uint32_t n_parts;
};

/* Where a product reads, its items in this order: one stretch for each part that an item takes a unit of. */
struct pl_cpu_stretch {
    const uint8_t *from;
    size_t bytes;
};

struct pl_weight {
    uint32_t rows, cols, n_parts;
    struct pl_cpu_part *parts;
    struct pl_cpu_stretch next[2]; /* of the product that came after this weight's last time */
};

/* What one key/value head has in a page: a piece with its keys and a piece with its values, each with scales behind; `step` is what a
 * dot product takes at once: 1 (F32), 2 (F16, BF16), 4 (Q8_0), and D is rounded up to it for keys.
 *
 *   keys      [D / step][32 positions][step]     bytes of Q8_0 hold the key + 128
 *   values    [32 / step][D][step positions]
 *   scales    f16 [D / 32][32 positions] of Q8_0, float [32 positions] of F16
 *
 * F16 says how large a cache is, and how exact: its elements are held as integers of 16 bits (round16), since a processor multiplies
 * twice as many of these in the same time as floats, and their sums are exact. */
struct pl_cpu_kv_layout {
    pl_dtype dtype;
    uint32_t step, element, head_dim;
    uint32_t piece;                            /* bytes */
    uint32_t key_scales, values, value_scales; /* from a head's keys on */
    uint32_t rotate_bits;                      /* heads are rotated in pieces of 2^rotate_bits; 0 = not */
};

enum { PL_CPU_KEY_OFFSET = 128 };

#define PL_CPU_HUGE_PAGE ((size_t)2 << 20) /* what memory of this size and above is made of, where the system has such pages */

/* Limits of integers of 16 bits. A sum of products of keys and queries is at most the product of their lengths; one of weights and
 * values, over a segment, at most the sum of the weights times the largest value. Both stay below 2^31 with all that rounding adds.
 * A value's rounding counts most where one weight is nearly all, the weights' where many are equal: the two last limits share the bits
 * so that neither is the greater error. */
enum { PL_CPU_INT_TOP = 32767, PL_CPU_LENGTH_TOP = 46300, PL_CPU_VALUE_TOP = 16383, PL_CPU_WEIGHT_SUM = 130900 };

/* Pages lie in blocks of a segment's number, [layer][head][keys, values][page]: a sequence mostly has neighbours, whose keys, and values,
 * a processor then reads as one stream. What a block has of all layers lies together, so that memory comes in as pages are used. */
struct pl_kvdev {
    struct pl_kv_shape shape;
    struct pl_cpu_kv_layout layout;
    uint8_t *data;
    size_t bytes, head_bytes, page_bytes; /* of all, of one head in a block, of a page */
    size_t prepared;                       /* bytes that were written to: the first time takes the system milliseconds */
};

static inline uint8_t *pl_cpu_head_page(const struct pl_kvdev *kv, uint32_t layer, uint32_t page, uint32_t head)
{
    const uint32_t at = page % PL_CPU_SEGMENT;
    return kv->data + (page - at) * kv->page_bytes + (layer * kv->shape.n_kv_heads + head) * kv->head_bytes + (size_t)at * kv->layout.piece;
}

/* What belongs to 32 quants: their scale, max|x| / 127; their sum, as the float that minima are multiplied by; and what products of
 * weights with an offset start at: -128 times the sum, and the sum of each half with its sign changed. */
struct pl_cpu_block {
    float d, sum;
    int32_t start;
    int16_t minus16[2];
};

/* Activations quantized for block types */
struct pl_cpu_act {
    int8_t *q;              /* [T][K] */
    struct pl_cpu_block *b; /* [T][K / 32] */
    uint32_t cols;
    size_t cap; /* elements of q */
};

/* Where quantized blocks of 32 go: those of a row or, one under the other, of some rows. */
struct pl_cpu_blocks {
    int8_t *q;
    struct pl_cpu_block *b;
    size_t q_stride, stride; /* from one block to the next: of q, and of b */
};

static inline struct pl_cpu_blocks pl_cpu_blocks_from(const struct pl_cpu_blocks *b, size_t i)
{
    return (struct pl_cpu_blocks){b->q + i * b->q_stride, b->b + i * b->stride, b->q_stride, b->stride};
}

/* A buffer whose rows a product has once read as quantized activations (`wanted`) gets them from whatever writes rows to
 * it next, while they are still in the cache: `act` holds the first n_quantized rows then. Every other write makes that 0. */
struct pl_dbuf {
    float *data;
    size_t n;
    struct pl_cpu_act act;
    uint32_t n_quantized;
    bool wanted;
};

/* Low-rank changes of one product. The parts' A lie one after the other, so that x is read once for all. */
struct pl_lora {
    uint32_t cols, rank, n_parts; /* rank: of all parts together */
    float *a;                     /* [rank][cols] */
    struct pl_cpu_lora_part {
        uint32_t first, rows; /* outputs */
        uint32_t rank, from;  /* its rows of a */
        float *bt;            /* [rank][rows], scaled */
    } *parts;
};

/* A query vector as `attn` takes it: floats, or integers as a type's products need them. */
struct pl_cpu_query {
    union {
        _Alignas(64) float x[PL_CPU_MAX_DIM];
        int16_t whole[PL_CPU_MAX_DIM]; /* F16 */
        struct {
            int8_t high[PL_CPU_MAX_DIM], low[PL_CPU_MAX_DIM]; /* Q8_0: 128 high + low */
        };
    };
    int32_t offset[PL_CPU_MAX_DIM / 32]; /* what PL_CPU_KEY_OFFSET adds to a block's sum */
    float unit;                          /* of the integers */
};

/* One segment of attention for n_q query vectors that read the same key/value head. */
struct pl_cpu_attn {
    const struct pl_cpu_kv_layout *layout;
    uint32_t n_pages;
    const uint8_t *pages[PL_CPU_SEGMENT]; /* this head's */
    const uint8_t *ahead[PL_CPU_SEGMENT]; /* pages of the segment that will be read next, or NULL */
    uint32_t n_q;
    const struct pl_cpu_query *q;
    uint32_t n_pos[PL_CPU_MAX_QUERIES]; /* positions of the segment that query i sees, at least 1 */
    float scale;
    /* results: maximum, sum of exponentials, and the weighted values [n_q][head_dim], not yet divided by the sum */
    float max[PL_CPU_MAX_QUERIES], sum[PL_CPU_MAX_QUERIES];
    float *acc[PL_CPU_MAX_QUERIES];
};

/* What a worker will read of the cache in the next layer's attention. This one's notes it, and products ask for it: with some tokens
 * they compute, and leave the memory idle. As late as it can be, so that it is still near when it is read. */
enum { PL_CPU_SOON = 160, PL_CPU_SOON_LINES = 8192 /* about half of a second-level cache */ };
struct pl_cpu_soon {
    _Alignas(64) uint32_t n, at;   /* pieces; the first that was not all asked for */
    uint32_t left;                 /* lines */
    uint32_t units, units_before;  /* of products since the last attention, and between that and the one before */
    uint32_t op;                   /* the attention that noted it */
    struct {
        const uint8_t *from;
        uint32_t lines;
    } piece[PL_CPU_SOON];
};

/* What one instruction set provides. Rows are independent of each other: no kernel's result for one token depends on
 * how many tokens it was given. */
struct pl_cpu_kernels {
    const char *name;
    bool packed; /* reads pl_cpu_part.packed, else .src */
    /* n blocks of 32, the first at x and each x_stride after the one before */
    void (*quant)(const float *x, size_t x_stride, uint32_t n, const struct pl_cpu_blocks *to);
    /* out[i * stride + r] (+)= sum over the inputs of row unit * 32 + r, r < 16 * n_groups (1 or 2), for n_t tokens t0 + i */
    void (*rows_block)(const struct pl_cpu_part *w, uint32_t unit, uint32_t n_groups, const struct pl_cpu_act *x, uint32_t t0,
                       uint32_t n_t, float *out, size_t stride, bool add);
    void (*rows_float)(const struct pl_cpu_part *w, uint32_t unit, uint32_t n_groups, const float *x, size_t x_stride, uint32_t n_t,
                       float *out, size_t stride, bool add);
    void (*norm)(pl_norm_kind kind, float *out, const float *x, const float *gain, const float *bias, uint32_t n, float eps);
    /* cos and sin are [n_dims / 2] */
    void (*rope)(pl_rope_kind kind, float *x, uint32_t n_heads, uint32_t head_dim, uint32_t n_dims, const float *cos,
                 const float *sin);
    void (*glu)(pl_act_kind kind, float *out, const float *gate, const float *up, uint32_t n);
    void (*act)(pl_act_kind kind, float *x, uint32_t n);
    /* x[n] as integers, in the smallest unit within the limits: of a value, or of a key's or query's elements and length; all 0 of a
     * vector shorter than 2^-50. Returns the unit: NaN when one of x is not a number. */
    float (*round16)(const float *x, uint32_t n, bool value, int16_t *out);
    void (*query)(const struct pl_cpu_kv_layout *l, const float *x, struct pl_cpu_query *q);
    void (*attn)(struct pl_cpu_attn *a);
    /* total[i] = total[i] * a + x[i] * b */
    void (*blend)(float *total, float a, const float *x, float b, uint32_t n);
    /* y[i * stride + r] = x[i] · a[r], for n_x rows of x and n_a rows of a [n_a][cols] */
    void (*lora_down)(const float *const *x, uint32_t n_x, const float *a, uint32_t n_a, uint32_t cols, float *y, size_t stride);
    /* out[i][c] += sum over r < rank of y[i * stride + r] * bt[r * bt_stride + c], for c < n */
    void (*lora_up)(float *const *out, uint32_t n_x, const float *y, size_t stride, const float *bt, size_t bt_stride, uint32_t rank,
                    uint32_t n);
    /* Multiplies each piece of 2^bits elements by the Hadamard matrix of that size, over the root of the size. */
    void (*rotate)(float *x, uint32_t n, uint32_t bits);
};

extern const struct pl_cpu_kernels pl_cpu_kernels_ref, pl_cpu_kernels_avx2, pl_cpu_kernels_avxvnni, pl_cpu_kernels_avx512;

struct pl_cpu {
    struct pl_device base;
    struct pl_pool *pool; /* borrowed */
    const struct pl_cpu_kernels *k;
    struct pl_weight *last;       /* of the last product, NULL = none or freed */
    bool only;                    /* nobody reads the next operation's result but a product, in its quantized form */
    const struct pl_batch *batch; /* of the step that runs, else NULL */
    struct pl_cpu_act act;
    struct pl_cpu_chunk *chunk; /* where the next packed part goes; NULL = a new one */
    float *rope_cos, *rope_sin; /* [T][n_dims / 2] each, in one allocation, of rope_freq and rope_pos, made once a step */
    size_t rope_cap;
    const float *rope_freq;
    const uint32_t *rope_pos;
    float *attn_work; /* partial results of attention's segments */
    size_t attn_cap;
    struct pl_cpu_train *train; /* of the training operations, NULL until the first */
    float *lora_work; /* x · Aᵀ of the rows that adapters change */
    size_t lora_cap;
    struct pl_cpu_attn_plan *attn_plan; /* attn.c's, made when it is first needed */
    struct pl_cpu_soon *soon;           /* [workers] */
    uint32_t n_attn;                    /* calls so far */
};

static inline struct pl_cpu *pl_cpu_of(struct pl_device *dev)
{
    return (struct pl_cpu *)dev;
}

static inline float *pl_cpu_row(pl_view v, uint32_t row)
{
    return v.buf->data + v.offset + (size_t)row * v.stride;
}

/* Whole rows of a buffer from its start, which is what n_quantized counts */
static inline bool pl_cpu_is_whole(pl_view v)
{
    return v.offset == 0 && v.stride == v.cols;
}

/* Says that rows of `out` are about to be written. True when they are to be quantized too (pl_cpu_quant). */
bool pl_cpu_writes(pl_view out);
/* The blocks of a row from column `from` (a multiple of 32) on */
static inline struct pl_cpu_blocks pl_cpu_act_row(const struct pl_cpu_act *a, uint32_t row, uint32_t from)
{
    const size_t at = (size_t)row * a->cols + from;
    return (struct pl_cpu_blocks){a->q + at, a->b + at / 32, 32, 1};
}
/* Whether only a product reads what the operation that asks is about to make: it need not write but the quantized rows. */
static inline bool pl_cpu_take_only(struct pl_cpu *cpu)
{
    const bool only = cpu->only;
    cpu->only = false;
    return only;
}
/* Quantizes x, n columns of a row from column `from` (a multiple of 32) on, into the buffer's act. */
static inline void pl_cpu_quant(const struct pl_cpu *cpu, pl_view v, uint32_t row, uint32_t from, uint32_t n, const float *x)
{
    const struct pl_cpu_blocks to = pl_cpu_act_row(&v.buf->act, row, from);
    cpu->k->quant(x, 32, n / 32, &to);
}
/* The same of 32 columns of n rows, which lie stride apart at x. */
static inline void pl_cpu_quant_rows(const struct pl_cpu *cpu, pl_view v, uint32_t row, uint32_t n, uint32_t from, const float *x, size_t stride)
{
    struct pl_cpu_blocks to = pl_cpu_act_row(&v.buf->act, row, from);
    to.q_stride = v.buf->act.cols;
    to.stride = v.buf->act.cols / 32;
    cpu->k->quant(x, stride, n, &to);
}
pl_status pl_cpu_act_reserve(struct pl_cpu_act *a, uint32_t rows, uint32_t cols);
void pl_cpu_act_free(struct pl_cpu_act *a);

/* 64-byte aligned, zeroed; in 2 MiB pages where it is large. NULL when memory is out. */
void *pl_cpu_alloc(size_t n);
void pl_cpu_release(void *p, size_t n);
/* Grows *p (contents lost) to n floats; PL_ENOMEM leaves it as it was. */
pl_status pl_cpu_grow(float **p, size_t *cap, size_t n);

/* The operations of device.h, one family per file. */
pl_status pl_cpu_weight_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out,
                            struct pl_err *err);
void pl_cpu_weight_free(struct pl_device *dev, struct pl_weight *w);
pl_status pl_cpu_lora_new(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out,
                          struct pl_err *err);
void pl_cpu_lora_free(struct pl_device *dev, struct pl_lora *l);
pl_status pl_cpu_lora(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add);
pl_status pl_cpu_embed(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add);
pl_status pl_cpu_matmul(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add);
pl_status pl_cpu_matmul_glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                            const struct pl_plus *plus);
size_t pl_cpu_kv_bytes(struct pl_device *dev, const struct pl_kv_shape *shape);
pl_status pl_cpu_kv_new(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out);
void pl_cpu_kv_free(struct pl_device *dev, struct pl_kvdev *kv);
pl_status pl_cpu_kv_copy(struct pl_device *dev, struct pl_kvdev *kv, uint32_t from, uint32_t to);
bool pl_cpu_kv_prepare(struct pl_device *dev, struct pl_kvdev *kv, uint32_t n_pages);
/* Makes rope_cos and rope_sin of these positions, unless the step has done so. */
pl_status pl_cpu_angles(struct pl_cpu *cpu, const struct pl_rotation *r, const uint32_t *pos, uint32_t n_rows);
pl_status pl_cpu_kv_write(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                          const struct pl_batch *b);
void pl_cpu_attn_free(struct pl_cpu *cpu);
/* A worker is about to compute a unit of a product: asks for some of what attention will read. */
void pl_cpu_ask(struct pl_cpu *cpu, unsigned worker);
pl_status pl_cpu_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                         const struct pl_batch *b);

#endif
