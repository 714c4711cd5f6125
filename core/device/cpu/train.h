/* cpu/train: what the training operations of the CPU device share: kernels of one instruction set, and products of float32
 * matrices and frozen weights.
 * Thread: the one that issues operations, and the pool's workers inside one.  Owns: scratch memory, kept between calls.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_TRAIN_H
#define PL_DEVICE_CPU_TRAIN_H

#include "core/device/cpu/cpu.h"
#include "core/device/train.h"

enum { PL_MM_ROWS = 6 /* of a tile */, PL_MM_LANES = 16 };

/* A tile of a product. Operands are read in units of 32 bits along the reduction: one float32, or two neighbouring bf16.
 * c[i][j] = alpha * Σ a[i][k] b[k][j] + (add ? c[i][j] : bias != NULL ? bias[j] : 0), i < m <= PL_MM_ROWS, j < n <= 16 * nv. */
struct pl_mm_tile {
    const uint32_t *a[PL_MM_ROWS]; /* [k]; all of them can be read */
    const uint32_t *b;             /* [k][16 * nv] */
    size_t k;                      /* units */
    unsigned nv, m, n;
    float *c;
    size_t ldc;
    float alpha;
    const float *bias;
    bool add;
};

struct pl_train_kernels {
    unsigned nv; /* vectors of 16 columns in a full panel of the right operand */
    void (*tile[2])(const struct pl_mm_tile *t);                                          /* by pl_mm_precision; bf16 may be NULL */
    void (*narrow)(const float *in, size_t n, uint16_t *out);                             /* to bf16, nearest even */
    void (*interleave)(const float *a, const float *b, size_t n, uint32_t *out);          /* bf16 of a low, of b high; n % 16 = 0 */
    void (*transpose)(const uint32_t *in, size_t in_stride, uint32_t *out, size_t stride); /* 16 × 16 */
    void (*dequant)(pl_dtype t, const void *row, float *out, size_t n);                   /* as pl_dequant_row */

    void (*norm)(pl_norm_kind kind, float *out, const float *x, const float *gain, const float *bias, uint32_t n, float eps);
    /* stats[2]: mean and 1 / deviation of the row */
    void (*norm_d)(pl_norm_kind kind, float *dx, const float *dy, const float *x, const float *gain, uint32_t n, float eps, bool add,
                   float *stats);
    void (*act)(pl_act_kind kind, float *out, const float *x, uint32_t n);
    void (*act_d)(pl_act_kind kind, float *dx, const float *dout, const float *x, uint32_t n);
    void (*glu)(pl_act_kind kind, float *out, const float *gate, const float *up, uint32_t n);
    void (*glu_d)(pl_act_kind kind, float *dgate, float *dup, const float *dout, const float *gate, const float *up, uint32_t n);
    /* x = softmax(scale * x); returns the logarithm of the sum of exponentials */
    float (*softmax)(float *x, float scale, uint32_t n);
    /* p = exp(scale * p - lse);  dp = scale * p * (dp - sub) */
    void (*softmax_d)(float *p, float *dp, float scale, float lse, float sub, uint32_t n);
    float (*max_lse)(const float *x, uint32_t n, float *max);
    void (*prob)(float *x, float lse, float weight, uint32_t n); /* x = weight * exp(x - lse) */
    void (*add)(float *out, const float *x, float scale, uint32_t n); /* out += scale * x */
    float (*dot)(const float *a, const float *b, uint32_t n);
    void (*adamw)(float *w, float *g, float *m, float *v, const struct pl_adamw *o, uint32_t n);
};

extern const struct pl_train_kernels pl_train_kernels_ref, pl_train_kernels_avx2, pl_train_kernels_avx512;
/* The same with bf16 products, for processors that have them. */
extern const struct pl_train_kernels pl_train_kernels_avx512bf16;

/* An operand of a product. along: the reduction runs along its rows, else across them. */
struct pl_mm_src {
    const float *p; /* or, NULL: */
    const struct pl_weight *w;
    size_t stride;
    bool along;
};

/* c[m, n] = alpha * a[m, k] · b[k, n] (+ c | + bias) */
struct pl_mm {
    uint32_t m, n, k;
    struct pl_mm_src a, b; /* a has values */
    float *c;
    size_t ldc;
    float alpha;
    const float *bias;
    bool add;
};

/* Packed operands of one product at a time. */
struct pl_mm_space {
    float *a, *b;
    size_t a_cap, b_cap;
    float **temp; /* [n_temp] of the workers */
    unsigned n_temp;
};
void pl_mm_space_free(struct pl_mm_space *s);

/* pool NULL: on the calling thread alone. The order of every sum depends on the shapes only. */
pl_status pl_mm_run(const struct pl_train_kernels *k, pl_mm_precision precision, struct pl_pool *pool, struct pl_mm_space *s,
                    const struct pl_mm *mm) PL_MUST_CHECK;

struct pl_cpu_train {
    const struct pl_train_kernels *k;
    pl_mm_precision precision;
    struct pl_mm_space space;
    struct pl_mm_space *own; /* [workers] for products inside a worker */
    float **scratch;         /* [workers] */
    size_t *scratch_cap;
    unsigned n_workers;
    float *rows; /* of the whole operation */
    size_t rows_cap;
};

/* Made at the first use; NULL when memory is out. */
struct pl_cpu_train *pl_cpu_train_of(struct pl_cpu *cpu);
void pl_cpu_train_free(struct pl_cpu_train *t);

pl_status pl_cpu_train_attn(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale,
                            const struct pl_train_seqs *s);
pl_status pl_cpu_train_attn_d(struct pl_device *dev, pl_view dqkv, pl_view dout, pl_view out, pl_view lse, pl_view qkv,
                              uint32_t head_dim, float scale, const struct pl_train_seqs *s);
pl_status pl_cpu_train_head(struct pl_device *dev, pl_view h, const struct pl_train_mat *w, const uint32_t *targets,
                            const float *weight, double *logp, bool *best, pl_view dh, pl_view dw);
struct pl_mm_src pl_cpu_train_src(const struct pl_train_mat *w, bool along);

extern const struct pl_train_ops pl_cpu_train_ops;

#endif
