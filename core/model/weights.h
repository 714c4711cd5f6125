/* weights: which tensors each architecture has, under which name and in which shape, and the struct that a loaded model
 * keeps them in. The one table below yields the loader's checks, the fused products, the list of known names and what
 * must be freed. A further architecture of the same kind is a bit in PL_ARCH_LIST and rows here.
 * Thread: load on one thread, then read-only but for the work buffers, which are the engine's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_WEIGHTS_H
#define PL_MODEL_WEIGHTS_H

#include "core/comm/comm.h"
#include "core/model/fill.h"
#include "core/model/lora.h"
#include "core/model/model.h"
#include "core/model/part.h"

/* name in general.architecture, bit, norm, rope, activation, gated */
#define PL_ARCH_LIST(X)                                                                                                \
    X("llama", LLAMA, PL_NORM_RMS, PL_ROPE_INTERLEAVED, PL_ACT_SILU, true)                                             \
    X("gpt2", GPT2, PL_NORM_LAYER, PL_ROPE_NONE, PL_ACT_GELU_TANH, false)

enum pl_arch_index {
#define X(name, id, norm, rope, act, gated) PL_ARCH_INDEX_##id,
    PL_ARCH_LIST(X)
#undef X
    PL_ARCH_COUNT
};
enum {
#define X(name, id, norm, rope, act, gated) PL_ARCH_##id = 1 << PL_ARCH_INDEX_##id,
    PL_ARCH_LIST(X)
#undef X
    PL_ARCH_ANY = (1 << PL_ARCH_COUNT) - 1
};

/* kind:  MATRIX = a product's weight on the device; VECTOR = float32 values in one shared buffer.
 * field: where it goes. Consecutive rows with the same field are stacked, first row's rows first (fused QKV, gate + up).
 * need:  MUST, or MAY be absent (a missing part of a vector of which another part is there counts as zeros).
 * Sizes: see device.h; Q = H * D, K = G * D, P = trained context, W = rope_dims / 2.
 * cut:   how ranks share it, see part.h; consecutive rows with the same field are cut each for itself. */
#define PL_TOP_WEIGHTS(X) /* kind, field, architectures, tensor, rows, cols, need, cut */                              \
    X(MATRIX, embed, PL_ARCH_ANY, "token_embd.weight", V, C, MUST, OUT_V)                                              \
    X(MATRIX, position, PL_ARCH_GPT2, "position_embd.weight", P, C, MUST, FIRST)                                       \
    X(MATRIX, head, PL_ARCH_ANY, "output.weight", V, C, MAY, OUT_V)                                                    \
    X(VECTOR, out_norm, PL_ARCH_ANY, "output_norm.weight", 1, C, MUST, WHOLE)                                          \
    X(VECTOR, out_norm_b, PL_ARCH_GPT2, "output_norm.bias", 1, C, MUST, WHOLE)                                         \
    X(VECTOR, rope_factors, PL_ARCH_LLAMA, "rope_freqs.weight", 1, W, MAY, WHOLE)

#define PL_LAYER_WEIGHTS(X) /* the same, each name behind "blk.<layer>." */                                            \
    X(VECTOR, attn_norm, PL_ARCH_ANY, "attn_norm.weight", 1, C, MUST, WHOLE)                                           \
    X(VECTOR, attn_norm_b, PL_ARCH_GPT2, "attn_norm.bias", 1, C, MUST, WHOLE)                                          \
    X(MATRIX, qkv, PL_ARCH_LLAMA, "attn_q.weight", Q, C, MUST, OUT_Q)                                                  \
    X(MATRIX, qkv, PL_ARCH_LLAMA, "attn_k.weight", K, C, MUST, OUT_K)                                                  \
    X(MATRIX, qkv, PL_ARCH_LLAMA, "attn_v.weight", K, C, MUST, OUT_K)                                                  \
    X(MATRIX, qkv, PL_ARCH_GPT2, "attn_qkv.weight", Q + 2 * K, C, MUST, OUT_QKV)                                       \
    X(VECTOR, qkv_b, PL_ARCH_LLAMA, "attn_q.bias", 1, Q, MAY, OUT_Q)                                                   \
    X(VECTOR, qkv_b, PL_ARCH_LLAMA, "attn_k.bias", 1, K, MAY, OUT_K)                                                   \
    X(VECTOR, qkv_b, PL_ARCH_LLAMA, "attn_v.bias", 1, K, MAY, OUT_K)                                                   \
    X(VECTOR, qkv_b, PL_ARCH_GPT2, "attn_qkv.bias", 1, Q + 2 * K, MUST, OUT_QKV)                                       \
    X(MATRIX, attn_out, PL_ARCH_ANY, "attn_output.weight", C, Q, MUST, SUM_Q)                                          \
    X(VECTOR, attn_out_b, PL_ARCH_LLAMA, "attn_output.bias", 1, C, MAY, SUM)                                           \
    X(VECTOR, attn_out_b, PL_ARCH_GPT2, "attn_output.bias", 1, C, MUST, SUM)                                           \
    X(VECTOR, ff_norm, PL_ARCH_ANY, "ffn_norm.weight", 1, C, MUST, WHOLE)                                              \
    X(VECTOR, ff_norm_b, PL_ARCH_GPT2, "ffn_norm.bias", 1, C, MUST, WHOLE)                                             \
    X(MATRIX, ff_in, PL_ARCH_LLAMA, "ffn_gate.weight", F, C, MUST, OUT_F)                                              \
    X(MATRIX, ff_in, PL_ARCH_ANY, "ffn_up.weight", F, C, MUST, OUT_F)                                                  \
    X(VECTOR, ff_in_b, PL_ARCH_LLAMA, "ffn_gate.bias", 1, F, MAY, OUT_F)                                               \
    X(VECTOR, ff_in_b, PL_ARCH_LLAMA, "ffn_up.bias", 1, F, MAY, OUT_F)                                                 \
    X(VECTOR, ff_in_b, PL_ARCH_GPT2, "ffn_up.bias", 1, F, MUST, OUT_F)                                                 \
    X(MATRIX, ff_out, PL_ARCH_ANY, "ffn_down.weight", C, F, MUST, SUM_F)                                               \
    X(VECTOR, ff_out_b, PL_ARCH_LLAMA, "ffn_down.bias", 1, C, MAY, SUM)                                                \
    X(VECTOR, ff_out_b, PL_ARCH_GPT2, "ffn_down.bias", 1, C, MUST, SUM)

/* Absent, or not this rank's: NULL, and a view without buffer. */
struct pl_top {
    struct pl_weight *embed, *position, *head;
    pl_view out_norm, out_norm_b, rope_factors;
    pl_view rope_freq; /* [1, W], base, linear scaling and factors in it */
};

struct pl_layer {
    struct pl_weight *qkv, *attn_out, *ff_in, *ff_out;
    pl_view attn_norm, attn_norm_b, qkv_b, attn_out_b, ff_norm, ff_norm_b, ff_in_b, ff_out_b;
};

struct pl_model {
    struct pl_spec spec;  /* of the whole model */
    struct pl_part part;  /* what this rank has of it */
    struct pl_spec own;   /* the sizes of the part */
    unsigned arch_bit;
    struct pl_device *dev; /* borrowed */
    struct pl_comm *comm;  /* borrowed */
    const struct pl_gguf *file; /* borrowed: weights that are not repacked lie in it */
    uint64_t n_params;
    float attn_scale; /* of q · k */

    struct pl_top top;
    struct pl_layer *layers;   /* [L] */
    struct pl_dbuf *vectors;   /* what all vector views look into */

    uint32_t max_tokens, max_rows;
    struct pl_dbuf *work[8];   /* the activations' buffers, one for each view below */
    pl_view x;                 /* [T, C] residual stream */
    pl_view h;                 /* [T, C] normed */
    pl_view qkv;               /* [T, Q + 2K] of the part */
    pl_view att;               /* [T, Q] of the part, or of all where parts are gathered */
    pl_view ff;                /* [T, F] likewise */
    pl_view x_rows, att_rows;  /* [R, C], [R, Q] */
    pl_view logits;            /* [R, V]; rank 0: of the whole model */
    uint32_t *own_tokens;      /* [T] rows of the part of the embedding; PL_NO_ROW = another rank's */
    struct pl_loras loras;     /* adapters, see lora.h */
    struct pl_fill fill;       /* of steps that are recorded */
    float *host_logits;        /* where the device's memory cannot be read in place, else NULL */
};

/* Reads and checks the hyper-parameters (all but n_vocab and tied, which the tensors tell). */
pl_status pl_spec_read(struct pl_spec *s, unsigned *arch_bit, const struct pl_gguf *g, struct pl_err *err) PL_MUST_CHECK;

#endif
