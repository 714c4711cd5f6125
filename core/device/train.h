/* device/train: the operations that training needs beside those of inference: each differentiable operation and, next to
 * it, its backward. A device without them has no `train` table.
 *
 * Conventions: a gradient is called d and the name of what it belongs to (dx is the loss's derivative by x). Gradients of
 * activations are written, or accumulated where `add` says so; gradients of parameters (dw, dgain, …) are always accumulated.
 * A view without buffer means "none" (no bias) or, for a gradient, "not wanted".
 * Every sum runs in a fixed order that does not depend on the number of threads, so that a training run gives the same bits
 * each time. Products take their operands in the precision that was set and accumulate in float32.
 *
 * Sequences: T tokens in a row, sequence s is [start[s], start[s + 1]), start[0] = 0, start[n_seqs] = T. No padding.
 * Thread, fails: as device.h says.  Sizes: as device.h names them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_TRAIN_H
#define PL_DEVICE_TRAIN_H

#include "core/device/device.h"

/* A product's matrix [rows, cols]: float32 values, or frozen in the types of the file (expanded panel by panel inside the
 * product, in both directions, never as a whole). */
struct pl_train_mat {
    uint32_t rows, cols;
    pl_view values;                 /* or, without buffer: */
    const struct pl_weight *frozen; /* borrowed */
};

typedef enum { PL_MM_F32, PL_MM_BF16 } pl_mm_precision;

/* What a CUDA device makes at once, for those who estimate a job without one: logits of its head, elements of a weight that it expands. */
enum { PL_CUDA_LOGITS_AT_ONCE = 1 << 25, PL_CUDA_PANEL = 1 << 24 };

struct pl_train_seqs {
    uint32_t n_seqs;
    const uint32_t *start; /* [n_seqs + 1] borrowed */
};

/* One step of AdamW for n values: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g²; w -= rate (m̂ / (√v̂ + eps) + decay w),
 * where g = scale * gradient. The gradient is zeroed. */
struct pl_adamw {
    float rate, beta1, beta2, eps, decay;
    float scale;                    /* clipping */
    float correct1, correct2;       /* 1 - beta^t */
};

/* The most that a training step asks of a device at once. */
struct pl_train_shape {
    uint32_t n_tokens, n_rows, n_seqs; /* of a micro-batch; rows that carry loss */
    uint32_t widest, n_embd, n_heads;  /* widest: rows or columns of any matrix but the head's */
    uint32_t passing;                  /* columns of what products read without having been told that it stays (below) */
    uint64_t n_trained;                /* values */
    const struct pl_train_mat *head;   /* borrowed */
    bool whole_head;                   /* may be there expanded as a whole while it is used, not in panels that are expanded for each chunk of rows */
};

struct pl_train_ops {
    /* Bytes that operations work in beside what they are handed, and have not got yet, on a device with memory of its own; NULL: it is the host's. */
    size_t (*work_bytes)(struct pl_device *dev, const struct pl_train_shape *s);
    /* Takes them: steps of that shape take none. */
    pl_status (*reserve)(struct pl_device *dev, const struct pl_train_shape *s);
    /* What frozen_new takes of such a device's memory. */
    size_t (*frozen_bytes)(const struct pl_weight_src *parts, size_t n_parts);
    /* x and dy, or none, stay as they are until the next call: products make the form that they read of them, or of some of their columns, once.
     * NULL: they read them as they are. */
    void (*stays)(struct pl_device *dev, pl_view x, pl_view dy);
    /* PL_ENOTSUP when the processor has no bf16 products. */
    pl_status (*set_precision)(struct pl_device *dev, pl_mm_precision p, struct pl_err *err);
    bool (*has_bf16)(struct pl_device *dev);
    /* A weight that stays in the file's types; freed with weight_free. Like weight_new, but not repacked for inference. */
    pl_status (*frozen_new)(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out,
                            struct pl_err *err);

    /* out[T, N] (+)= alpha * x[T, K] · wᵀ (+ bias[1, N]: without add only) */
    pl_status (*linear)(struct pl_device *dev, pl_view out, pl_view x, const struct pl_train_mat *w, pl_view bias, float alpha, bool add);
    /* dx[T, K] (+)= alpha * dy[T, N] · w */
    pl_status (*linear_dx)(struct pl_device *dev, pl_view dx, pl_view dy, const struct pl_train_mat *w, float alpha, bool add);
    /* dw[N, K] += dyᵀ · x;  dbias[1, N] += column sums of dy */
    pl_status (*linear_dw)(struct pl_device *dev, pl_view dw, pl_view dbias, pl_view dy, pl_view x);

    /* out += x */
    pl_status (*add)(struct pl_device *dev, pl_view out, pl_view x);
    /* out[T, C] (+)= w[idx[t]] */
    pl_status (*embed)(struct pl_device *dev, pl_view out, const struct pl_train_mat *w, const uint32_t *idx, bool add);
    /* dw[idx[t]] += dy[t] */
    pl_status (*embed_dw)(struct pl_device *dev, pl_view dw, pl_view dy, const uint32_t *idx);

    /* out = norm(x) * gain (+ bias) */
    pl_status (*norm)(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps);
    /* dx (+)= …; dgain, dbias += … */
    pl_status (*norm_d)(struct pl_device *dev, pl_norm_kind kind, pl_view dx, pl_view dgain, pl_view dbias, pl_view dy, pl_view x,
                        pl_view gain, float eps, bool add);

    /* table[T, n_dims] = cos and sin of pos[t] * freq[i], first n_dims / 2 cosines */
    pl_status (*rope_table)(struct pl_device *dev, pl_view table, pl_view freq, const uint32_t *pos);
    /* Rotates in place; inverse: the backward. */
    pl_status (*rope)(struct pl_device *dev, pl_rope_kind kind, pl_view x, uint32_t head_dim, pl_view table, bool inverse);

    /* out[T, H * D] = causal softmax(q · kᵀ * scale) · v within each sequence; qkv[T, (H + 2 G) * D] holds queries, keys,
     * values. lse[T, H]: logarithm of each row's sum of exponentials, for the backward. No T × T matrix is kept. */
    pl_status (*attn)(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale, const struct pl_train_seqs *s);
    /* dqkv = … (all of it is written) */
    pl_status (*attn_d)(struct pl_device *dev, pl_view dqkv, pl_view dout, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim,
                        float scale, const struct pl_train_seqs *s);

    /* out[T, F] = act(x[T, 0..F)) * x[T, F..2F); dx[T, 2F] = … */
    pl_status (*glu)(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x);
    pl_status (*glu_d)(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x);
    /* out = act(x); dx = … */
    pl_status (*act)(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x);
    pl_status (*act_d)(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x);

    /* out (+)= x with a share of values zeroed and the others divided by 1 - share; which ones follows from key and the
     * element's place alone, so that the backward is the same call on the gradient. */
    pl_status (*dropout)(struct pl_device *dev, pl_view out, pl_view x, float share, uint64_t key, bool add);
    /* out[i] = x[rows[i]];  dx[rows[i]] = dout[i], other rows zero */
    pl_status (*gather)(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows);
    pl_status (*gather_d)(struct pl_device *dev, pl_view dx, pl_view dout, const uint32_t *rows);

    /* Soft-max cross-entropy fused with the head w[V, C], in chunks of rows, so that the logits of all rows never exist:
     * logp[i] = log-probability of targets[i] after h[i]; best[i] = whether it is the likeliest token.
     * With weight: dh[R, C] = gradient of Σ -weight[i] * logp[i], and dw[V, C] += its part (where wanted). */
    pl_status (*head)(struct pl_device *dev, pl_view h, const struct pl_train_mat *w, const uint32_t *targets, const float *weight,
                      double *logp, bool *best, pl_view dh, pl_view dw);

    pl_status (*sum_squares)(struct pl_device *dev, pl_view g, double *sum);
    pl_status (*adamw)(struct pl_device *dev, pl_view w, pl_view g, pl_view m, pl_view v, const struct pl_adamw *o);
};

#endif
