/* kernels: the launchers of the CUDA device's kernels, one family per .cu, plain C to call. Pointers are the device's unless a
 * name says otherwise. Each enqueues on the stream and returns what cudaGetLastError says; nothing is waited for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_KERNELS_H
#define PL_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/device/draw.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PL_CUDA_NO_ROW UINT32_MAX /* of an embedding: zeros; as a slot: nothing is written */

/* A float32 matrix; row r starts at p + r * stride. */
struct pl_cuda_mat {
    float *p;
    uint32_t rows, cols;
    size_t stride;
};

/* A part of a weight. f32, f16 and bf16: rows of `row_bytes`, as the file holds them; block types: as pack.h lays them out. */
struct pl_cuda_part {
    int dtype; /* pl_dtype */
    uint32_t rows, cols;
    size_t row_bytes; /* 0 for block types */
    uint8_t *data;
};

enum { PL_CUDA_MAX_PARTS = 4 };
struct pl_cuda_parts {
    struct pl_cuda_part part[PL_CUDA_MAX_PARTS];
    uint32_t n;
};

/* Pages of a cache, per layer, page and key/value head (32 positions, D elements):
 *
 *   keys          [32][D]            rows of D elements, Q8_0: int8, F8: e4m3
 *   key scales    f16 [32][D / 32]   Q8_0 only, D / 32 rounded up
 *                 uint8 [32]         F8 only: elements are worth 2^(scale - 127) times what they say; 255 = NaN
 *   values        [32][D]
 *   value scales  as for keys
 *
 * Heads of Q8_0 are rotated in pieces of 2^rotate_bits elements before they are rounded (core/device/cpu/kv.c says why). */
enum { PL_CUDA_PAGE = 32 };

struct pl_cuda_kv {
    uint8_t *data;
    int dtype;
    uint32_t n_layers, n_pages, n_kv_heads, head_dim, rotate_bits;
    uint32_t key_scales, values, value_scales, head_bytes; /* offsets within a head's share of a page, and its size */
    size_t page_bytes, layer_bytes;
};

/* The batch of a step; cuda.h's batch_on_device fills it. */
struct pl_cuda_batch {
    uint32_t n_tokens, n_seqs;
    const uint32_t *pos, *slot, *q_start, *ctx, *page_start, *pages;
};

/* ---- rows.cu: operations on one row at a time -------------------------------------------------------------------------- */

/* Where `narrow` is not NULL, a result goes there instead of to out: rounded to bf16, rows close together. */

/* layer: LayerNorm, else RMSNorm. bias: NULL = none. out may be x. */
cudaError_t pl_cuda_norm(cudaStream_t s, bool layer, struct pl_cuda_mat out, struct pl_cuda_mat x, const float *gain, const float *bias,
                         float eps, void *narrow);
cudaError_t pl_cuda_activate(cudaStream_t s, bool gelu, struct pl_cuda_mat x);
cudaError_t pl_cuda_gather(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows);
/* out[T, F] = act(gate) * up, gate and up the halves of gu[T, 2F] + bias[2F] (NULL = none) + plus[T, 2F], in the rows of
 * which plus_rows says so (plus.p NULL = none) */
cudaError_t pl_cuda_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat gu, const float *bias, struct pl_cuda_mat plus,
                        const bool *plus_rows, void *narrow);

/* ---- embed.cu ---------------------------------------------------------------------------------------------------------- */

/* out[i] (+)= row idx[i] of a weight's parts */
cudaError_t pl_cuda_embed(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_parts w, const uint32_t *idx, bool add);

/* ---- kv.cu ------------------------------------------------------------------------------------------------------------- */

/* How the first n_dims of each head are turned (0 = not at all); halves: pairs (i, i + n/2), else (2i, 2i + 1). */
struct pl_cuda_rope {
    uint32_t n_dims;
    bool halves;
    const float *freq;
    const uint32_t *pos;
};
/* k and v to their slots, turned as q is where it stands. q has a whole number of heads for each of k's; none where nothing is turned. */
cudaError_t pl_cuda_kv_write(cudaStream_t s, struct pl_cuda_kv kv, uint32_t layer, struct pl_cuda_rope rope, struct pl_cuda_mat q, struct pl_cuda_mat k,
                             struct pl_cuda_mat v, const uint32_t *slot);

/* ---- dense.cu: products of f32, f16 and bf16 weights ---------------------------------------------------------------------- */

/* out (+)= x · wᵀ (+ bias, NULL = none); a row's result does not depend on how many there are. Reads the weight once for PL_CUDA_FEW
 * rows of x. Parts are of one type. */
enum { PL_CUDA_FEW = 16 };
cudaError_t pl_cuda_dense(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, const float *bias, bool add);
/* What pl_cuda_glu makes of the products with both parts, of one type and size */
cudaError_t pl_cuda_dense_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, const float *bias,
                              struct pl_cuda_mat plus, const bool *plus_rows);
/* For products by cuBLAS: x rounded to 16-bit numbers of the weight's type (f16 or bf16), rows close together. f16 is x / scale[row], a
 * power of two that makes the row's largest 2^13 … 2^14: none is out of range, and what is 2^-28 of the largest or more keeps all 11 bits. */
cudaError_t pl_cuda_narrow(cudaStream_t s, int dtype, struct pl_cuda_mat x, void *to, float *scale);
/* out[T] (+)= y[t] * scale[t] (scale NULL = 1) (+ bias, NULL = none). Rows of y lie close together. */
cudaError_t pl_cuda_finish(cudaStream_t s, struct pl_cuda_mat out, const float *y, const float *scale, const float *bias, bool add);

/* ---- quant.cu: products of the other types ---------------------------------------------------------------------------------- */

/* Rows rounded to int8 per 32 as on the CPU, filled up with zeros to a multiple of 256 inputs */
struct pl_cuda_act_scale {
    float d;         /* largest / 127; NaN when one of the 32 is not finite */
    int16_t sum[2];  /* of q, for each 16 */
};
struct pl_cuda_act {
    int8_t *q;                       /* [T][padded] */
    struct pl_cuda_act_scale *scale; /* [T][padded / 32] */
    uint32_t padded;
};
static inline uint32_t pl_cuda_act_padded(uint32_t cols)
{
    return (cols + 255) / 256 * 256;
}
cudaError_t pl_cuda_quant(cudaStream_t s, struct pl_cuda_mat x, struct pl_cuda_act to);
/* out (+)= x · wᵀ (+ bias, NULL = none); a row's result does not depend on how many there are. Parts are of one type. */
cudaError_t pl_cuda_product(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_act x, struct pl_cuda_parts w, const float *bias, bool add);
/* What pl_cuda_glu makes of the products with both parts, of one type and size, for at most PL_CUDA_QUANT_FEW rows */
enum { PL_CUDA_QUANT_FEW = 8 };
cudaError_t pl_cuda_product_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_act x, struct pl_cuda_parts w, const float *bias,
                                struct pl_cuda_mat plus, const bool *plus_rows);

/* ---- attn.cu ------------------------------------------------------------------------------------------------------------ */

enum { PL_CUDA_SPAN = 128, PL_CUDA_QUERIES = 16 }; /* positions that are folded as one; queries of a tile */

/* Tokens of one sequence, at most PL_CUDA_QUERIES divided by the query heads of a key/value head */
struct pl_cuda_attn_tile {
    uint32_t seq, token, n_tokens;
};

/* partial: NULL = each tile goes through its context by itself, else spans are shared out and n_spans is at least the longest context's;
 * pl_cuda_attn_partial floats. rotated: room for q where kv.rotate_bits is not 0. narrow: as in rows.cu; not with rotated. */
struct pl_cuda_attn_plan {
    const struct pl_cuda_attn_tile *tiles;
    uint32_t n_tiles, n_spans;
    uint32_t shared; /* memory that a block may have, bytes */
    float *partial, *rotated;
    void *narrow;
};
static inline size_t pl_cuda_attn_partial(const struct pl_cuda_kv *kv, uint32_t n_tiles, uint32_t n_spans)
{
    return (size_t)n_tiles * kv->n_kv_heads * n_spans * PL_CUDA_QUERIES * (kv->head_dim + 2);
}
cudaError_t pl_cuda_attn(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat q, struct pl_cuda_kv kv, uint32_t layer, float scale,
                         struct pl_cuda_batch b, struct pl_cuda_attn_plan plan);

/* ---- lora.cu ------------------------------------------------------------------------------------------------------------ */

struct pl_cuda_lora_part {
    uint32_t first, rows, rank, cols;
    float scale;
    float *a, *b; /* [rank][cols], [rows][rank] */
};
/* Parts of one product, no output in two of them; rank: of all together */
enum { PL_CUDA_LORA_PARTS = 9 };
struct pl_cuda_lora_parts {
    struct pl_cuda_lora_part part[PL_CUDA_LORA_PARTS];
    uint32_t n, rank;
};
/* Of n_rows rows of out and x. Without add, outputs that no part is for become 0. y: [n_rows][rank] to work in */
cudaError_t pl_cuda_lora(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows, uint32_t n_rows,
                         struct pl_cuda_lora_parts parts, float *y, bool add);

/* ---- sample.cu ---------------------------------------------------------------------------------------------------------- */

struct pl_cuda_draws {
    struct pl_cuda_mat logits;
    const struct pl_draw *draws; /* of each row */
    const struct pl_edit *edits;
    float *work;          /* [n][V] */
    struct pl_drawn *out; /* of each row */
};
/* n rows from the first on. */
cudaError_t pl_cuda_sample(cudaStream_t s, struct pl_cuda_draws d, uint32_t first, uint32_t n);

/* ---- ranks.cu ----------------------------------------------------------------------------------------------------------- */

/* out[n] = the sum of `size` vectors that begin `stride` apart, first to last. out may be the first. */
cudaError_t pl_cuda_sum_ranks(cudaStream_t s, float *out, const float *parts, size_t stride, unsigned size, size_t n);
/* Columns that ranks have sent, to where they belong: rank r's, out.rows of them, become [first[r], first[r + 1]) of out; the own ones are there.
 * They lie one rank's behind the other's: each with room for `widest` columns, or, where that is 0, as wide as they are and from rank 1 on. */
enum { PL_CUDA_RANKS = 64 };
struct pl_cuda_shares {
    uint32_t size, own, widest, first[PL_CUDA_RANKS + 1];
};
cudaError_t pl_cuda_spread(cudaStream_t s, struct pl_cuda_mat out, const float *from, struct pl_cuda_shares shares);

#ifdef __cplusplus
}
#endif

#endif
