/* train_kernels: the launchers of training's kernels; what kernels.h says holds for them. Every sum runs in a fixed order: no atomics.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_TRAIN_KERNELS_H
#define PL_CUDA_TRAIN_KERNELS_H

#include "cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- train_mm.cu: around cuBLAS ---------------------------------------------------------------------------------------------- */

/* Rows [first, first + n) of a part of any type as float32 or bf16; rows of out begin `stride` elements apart. Of block types, first is a
 * multiple of PL_CUDA_EXPAND_STEP. */
enum { PL_CUDA_EXPAND_STEP = 8 };
cudaError_t pl_cuda_expand(cudaStream_t s, const struct pl_cuda_part *w, uint32_t first, uint32_t n, bool bf16, void *out, size_t stride);
/* out = bias, in each row */
cudaError_t pl_cuda_bias(cudaStream_t s, struct pl_cuda_mat out, const float *bias);
/* out += x */
cudaError_t pl_cuda_add(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x);
/* sums[cols] += the sums of x's columns */
cudaError_t pl_cuda_sum_columns(cudaStream_t s, float *sums, struct pl_cuda_mat x);

/* Cross-entropy of rows of logits: logp = log-probability of the row's target, best = whether none is likelier. With weights, the logits
 * become the gradient of Σ -weight * logp. */
struct pl_cuda_loss_job {
    struct pl_cuda_mat logits;
    const uint32_t *targets; /* [rows], as what follows */
    const float *weight;     /* NULL = none */
    double *logp;
    bool *best;
};
cudaError_t pl_cuda_loss(cudaStream_t s, struct pl_cuda_loss_job l);

/* ---- train_params.cu: parameters ---------------------------------------------------------------------------------------------- */

/* Rows order[from] … order[end - 1] of dy belong to that row of an embedding. They are added to it one after the other; where a row has more of
 * them than PL_CUDA_USES, each piece of so many makes a sum, and a total (rows from … of the sums) adds these, first to last. */
enum { PL_CUDA_USES = 32 };
struct pl_cuda_use_piece {
    uint32_t row, from, end, sum; /* PL_CUDA_NO_ROW = there is no other piece of its row */
};
/* pieces: the totals lie behind them */
cudaError_t pl_cuda_embed_dw(cudaStream_t s, struct pl_cuda_mat dw, struct pl_cuda_mat dy, const struct pl_cuda_use_piece *pieces, uint32_t n_pieces,
                             uint32_t n_totals, const uint32_t *order, float *sums);
/* sums[i] = Σ x² of the i-th PL_CUDA_SQUARES values */
enum { PL_CUDA_SQUARES = 1 << 16 };
cudaError_t pl_cuda_squares(cudaStream_t s, double *sums, const float *x, size_t n);
/* As pl_adamw says; keep = 1 - rate * decay, step = rate / correct1, root = 1 / sqrt(correct2) */
struct pl_cuda_adamw_step {
    float beta1, beta2, eps, scale, keep, step, root;
};
cudaError_t pl_cuda_adamw(cudaStream_t s, float *w, float *g, float *m, float *v, size_t n, struct pl_cuda_adamw_step o);

/* ---- train_rows.cu: row by row ------------------------------------------------------------------------------------------------ */

/* Norms, activations and gathers that inference has too are those of kernels.h. */
enum { PL_CUDA_NORM_PIECE = 64 /* rows whose gradients of gain and bias are summed first */ };
/* Of work, for so many rows and columns. */
size_t pl_cuda_norm_d_floats(uint32_t rows, uint32_t cols);
/* dx (+)= …; dgain and dbias += …, NULL = not wanted */
cudaError_t pl_cuda_norm_d(cudaStream_t s, bool layer, struct pl_cuda_mat dx, float *dgain, float *dbias, struct pl_cuda_mat dy, struct pl_cuda_mat x,
                           const float *gain, float eps, bool add, float *work);
/* table[T, n]: n / 2 cosines, then as many sines */
cudaError_t pl_cuda_rope_table(cudaStream_t s, struct pl_cuda_mat table, const float *freq, const uint32_t *pos);
/* halves: pairs (i, i + n/2), else (2i, 2i + 1) */
cudaError_t pl_cuda_rotate(cudaStream_t s, bool halves, struct pl_cuda_mat x, uint32_t head_dim, struct pl_cuda_mat table, bool inverse);
cudaError_t pl_cuda_act(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat x);
cudaError_t pl_cuda_act_d(cudaStream_t s, bool gelu, struct pl_cuda_mat dx, struct pl_cuda_mat dout, struct pl_cuda_mat x);
cudaError_t pl_cuda_glu_d(cudaStream_t s, bool gelu, struct pl_cuda_mat dx, struct pl_cuda_mat dout, struct pl_cuda_mat x);
cudaError_t pl_cuda_dropout(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, float share, uint64_t key, bool add);
/* out[rows[i]] = x[i], all else 0 */
cudaError_t pl_cuda_scatter(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows);

/* ---- train_attn.cu ------------------------------------------------------------------------------------------------------------ */

/* Of queries, or keys, of sequences [start[s], start[s + 1]), which are the host's. */
uint32_t pl_cuda_causal_tiles(const uint32_t *start, uint32_t n_seqs);
cudaError_t pl_cuda_causal(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat lse, struct pl_cuda_mat qkv, uint32_t head_dim, float scale,
                           const uint32_t *start, uint32_t n_seqs, uint32_t n_tiles);
/* along: [T][H] to work in */
cudaError_t pl_cuda_causal_d(cudaStream_t s, struct pl_cuda_mat dqkv, struct pl_cuda_mat dout, struct pl_cuda_mat out, struct pl_cuda_mat lse,
                             struct pl_cuda_mat qkv, uint32_t head_dim, float scale, const uint32_t *start, uint32_t n_seqs, uint32_t n_tiles, float *along);

#ifdef __cplusplus
}
#endif

#endif
