/* adapter: low-rank adapters (LoRA) as plain data, and the files they come in: PEFT folders (adapter_config.json and
 * adapter_model.safetensors, read and written) and GGUF files (read).
 *
 * In memory an adapter is a list of pairs, each for one projection of one layer: y += scale * (x · Aᵀ) · Bᵀ. The rows of B
 * are in the order of the base model's GGUF tensor: for "llama" the rows of q and k are permuted against Hugging Face's
 * order (rotation pairs lie side by side), which the readers and the writer of PEFT folders take care of.
 * Thread: any.  Owns: an adapter its values.
 * Fails: PL_EFORMAT (a tensor or key is missing, unknown or of another shape than the base's, by name), PL_ENOTSUP (kinds of
 * adapters that are not LoRA, by the name of the key), PL_EIO, PL_ENOMEM.
 * Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank Stabilization
 * Scaling Factor for Fine-Tuning with LoRA"; huggingface/peft; ggml-org/llama.cpp convert_lora_to_gguf.py.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_ADAPTER_H
#define PL_MODEL_ADAPTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/model/spec.h"

/* What can be adapted. id, architecture, fused product, tensor in GGUF behind "blk.<layer>.", module in Hugging Face's
 * layer, its name in target_modules, first row of the product, rows, columns; sizes as in weights.h. The order within an
 * architecture is that of pairs in a layer. */
#define PL_ADAPTER_TARGETS(X)                                                                                          \
    X(Q, "llama", QKV, "attn_q", "self_attn.q_proj", "q_proj", 0, Q, C)                                                \
    X(K, "llama", QKV, "attn_k", "self_attn.k_proj", "k_proj", Q, K, C)                                                \
    X(V, "llama", QKV, "attn_v", "self_attn.v_proj", "v_proj", Q + K, K, C)                                            \
    X(O, "llama", ATTN_OUT, "attn_output", "self_attn.o_proj", "o_proj", 0, C, Q)                                      \
    X(GATE, "llama", FF_IN, "ffn_gate", "mlp.gate_proj", "gate_proj", 0, F, C)                                         \
    X(UP, "llama", FF_IN, "ffn_up", "mlp.up_proj", "up_proj", F, F, C)                                                 \
    X(DOWN, "llama", FF_OUT, "ffn_down", "mlp.down_proj", "down_proj", 0, C, F)                                        \
    X(QKV, "gpt2", QKV, "attn_qkv", "attn.c_attn", "c_attn", 0, Q + 2 * K, C)                                          \
    X(O, "gpt2", ATTN_OUT, "attn_output", "attn.c_proj", "attn.c_proj", 0, C, Q)                                       \
    X(UP, "gpt2", FF_IN, "ffn_up", "mlp.c_fc", "c_fc", 0, F, C)                                                        \
    X(DOWN, "gpt2", FF_OUT, "ffn_down", "mlp.c_proj", "mlp.c_proj", 0, C, F)

/* Kinds of projections; bits of a set: 1u << PL_TARGET_x. */
typedef enum {
    PL_TARGET_Q,
    PL_TARGET_K,
    PL_TARGET_V,
    PL_TARGET_QKV,
    PL_TARGET_O,
    PL_TARGET_GATE,
    PL_TARGET_UP,
    PL_TARGET_DOWN,
    PL_TARGET_COUNT
} pl_target;

/* The products of a layer that adapters change, in the order of the forward pass. */
typedef enum { PL_PRODUCT_QKV, PL_PRODUCT_ATTN_OUT, PL_PRODUCT_FF_IN, PL_PRODUCT_FF_OUT, PL_PRODUCT_COUNT } pl_product;

/* Where a target lies in a model of a given shape. */
struct pl_target_place {
    const char *gguf;   /* "attn_q": the tensor is "blk.<layer>.attn_q.weight" */
    const char *module; /* "self_attn.q_proj" */
    const char *name;   /* "q_proj": what target_modules of a PEFT folder calls it */
    pl_product product;
    uint32_t first;      /* output of the product where this target's rows begin */
    uint32_t rows, cols; /* outputs and inputs of the projection */
};
/* False when the architecture has no such target. */
bool pl_target_find(const struct pl_spec *spec, pl_target target, struct pl_target_place *place);

struct pl_lora_pair {
    uint32_t layer;
    pl_target target;
    uint32_t rank;
    float alpha;
    float scale; /* alpha / rank, or alpha / sqrt(rank) with rslora */
    float *a;    /* [rank][cols] */
    float *b;    /* [rows][rank], rows in the GGUF tensor's order */
};

struct pl_adapter {
    const char *arch; /* static: "llama", "gpt2" */
    bool rslora;
    size_t n_pairs;
    struct pl_lora_pair *pairs; /* by layer, then target; each at most once */
    uint64_t hash;              /* of all values: two files with the same adapter have the same */
};

/* path: a PEFT folder, or a GGUF file. spec: the base that it must fit. */
pl_status pl_adapter_read(struct pl_adapter **out, const char *path, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;
void pl_adapter_free(struct pl_adapter *a);

/* What a PEFT folder says beside the values. */
struct pl_adapter_info {
    const char *base;    /* base_model_name_or_path */
    uint32_t rank;       /* r and lora_alpha; pairs that differ are listed in rank_pattern and alpha_pattern */
    float alpha, dropout;
    unsigned targets;    /* bits; 0 = those that the pairs have */
};

/* Writes the two files of a PEFT folder into dir, which is made if it is not there. Each file appears whole or not at all,
 * with the same bytes for the same adapter. */
pl_status pl_adapter_write(const char *dir, const struct pl_adapter *a, const struct pl_spec *spec, const struct pl_adapter_info *info,
                           struct pl_err *err) PL_MUST_CHECK;

#endif
