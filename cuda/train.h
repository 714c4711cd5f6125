/* cuda/train: the training operations of the CUDA device (core/device/train.h). Products are cuBLAS's, of float32 or of bf16 operands with
 * float32 sums; frozen weights stay packed and are expanded panel by panel.
 * Thread, fails: as cuda.h says.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_TRAIN_H
#define PL_CUDA_TRAIN_H

#include "core/device/train.h"
#include "cuda/cuda.h"
#include "cuda/train_kernels.h"

extern const struct pl_train_ops pl_cuda_train_ops;

/* A bias, a gradient that is wanted, …; p NULL where there is none */
static inline struct pl_cuda_mat pl_cuda_mat_or_none(pl_view v)
{
    return v.buf != NULL ? pl_cuda_mat(v) : (struct pl_cuda_mat){NULL, 0, 0, 0};
}

/* The weight's parts: those of a frozen one, or its values as one. */
struct pl_cuda_parts pl_cuda_train_parts(const struct pl_train_mat *w);

/* train_work.c */
size_t pl_cuda_train_work_bytes(struct pl_device *dev, const struct pl_train_shape *s);
pl_status pl_cuda_train_reserve(struct pl_device *dev, const struct pl_train_shape *s);
size_t pl_cuda_train_frozen_bytes(const struct pl_weight_src *parts, size_t n_parts);

/* train_mm.c: products, and what is made of them */
enum { PL_CUDA_PANEL_STEP = 64 }; /* rows of a panel of a weight, at least; a multiple of PL_CUDA_EXPAND_STEP */
int pl_cuda_train_precision(const struct pl_cuda *c); /* pl_dtype of operands */
size_t pl_cuda_train_element(const struct pl_cuda *c);
size_t pl_cuda_train_padded(size_t cols); /* rows of operands that are made begin at multiples of 16 bytes */
uint32_t pl_cuda_logits_rows(uint32_t n_vocab); /* at once */
void pl_cuda_train_stays(struct pl_device *dev, pl_view x, pl_view dy);
pl_status pl_cuda_train_linear(struct pl_device *dev, pl_view out, pl_view x, const struct pl_train_mat *w, pl_view bias, float alpha, bool add);
pl_status pl_cuda_train_linear_dx(struct pl_device *dev, pl_view dx, pl_view dy, const struct pl_train_mat *w, float alpha, bool add);
pl_status pl_cuda_train_linear_dw(struct pl_device *dev, pl_view dw, pl_view dbias, pl_view dy, pl_view x);
pl_status pl_cuda_train_head(struct pl_device *dev, pl_view h, const struct pl_train_mat *w, const uint32_t *targets, const float *weight,
                             double *logp, bool *best, pl_view dh, pl_view dw);

/* train.c: the rest of what works on parameters */
size_t pl_cuda_use_sums(size_t T); /* of pieces of so many uses of an embedding's rows, at most */
pl_status pl_cuda_train_add(struct pl_device *dev, pl_view out, pl_view x);
pl_status pl_cuda_train_embed(struct pl_device *dev, pl_view out, const struct pl_train_mat *w, const uint32_t *idx, bool add);
pl_status pl_cuda_train_embed_dw(struct pl_device *dev, pl_view dw, pl_view dy, const uint32_t *idx);
pl_status pl_cuda_train_sum_squares(struct pl_device *dev, pl_view g, double *sum);
pl_status pl_cuda_train_adamw(struct pl_device *dev, pl_view w, pl_view g, pl_view m, pl_view v, const struct pl_adamw *o);

/* train_rows.c: row by row */
pl_status pl_cuda_train_norm(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps);
pl_status pl_cuda_train_norm_d(struct pl_device *dev, pl_norm_kind kind, pl_view dx, pl_view dgain, pl_view dbias, pl_view dy, pl_view x,
                               pl_view gain, float eps, bool add);
pl_status pl_cuda_train_rope_table(struct pl_device *dev, pl_view table, pl_view freq, const uint32_t *pos);
pl_status pl_cuda_train_rope(struct pl_device *dev, pl_rope_kind kind, pl_view x, uint32_t head_dim, pl_view table, bool inverse);
pl_status pl_cuda_train_glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x);
pl_status pl_cuda_train_glu_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x);
pl_status pl_cuda_train_act(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x);
pl_status pl_cuda_train_act_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x);
pl_status pl_cuda_train_dropout(struct pl_device *dev, pl_view out, pl_view x, float share, uint64_t key, bool add);
pl_status pl_cuda_train_gather(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows);
pl_status pl_cuda_train_gather_d(struct pl_device *dev, pl_view dx, pl_view dout, const uint32_t *rows);

/* train_attn.c */
pl_status pl_cuda_train_attn(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale,
                             const struct pl_train_seqs *s);
pl_status pl_cuda_train_attn_d(struct pl_device *dev, pl_view dqkv, pl_view dout, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim,
                               float scale, const struct pl_train_seqs *s);

#endif
