/* spec: a model's hyper-parameters as plain data, the same for all architectures.
 * Thread: any (read-only).  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_SPEC_H
#define PL_MODEL_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "core/device/device.h"

struct pl_spec {
    const char *arch;    /* "llama", "gpt2" */
    char name[96];       /* general.name, "" = none */
    uint32_t n_layers;   /* L */
    uint32_t n_embd;     /* C */
    uint32_t n_heads;    /* H */
    uint32_t n_kv_heads; /* G */
    uint32_t head_dim;   /* D */
    uint32_t n_ff;       /* F */
    uint32_t n_vocab;    /* V: rows of the embedding, so the width of the logits */
    uint32_t n_ctx;      /* trained context */
    pl_norm_kind norm;
    float norm_eps;
    pl_rope_kind rope; /* PL_ROPE_NONE = learned positions */
    uint32_t rope_dims;
    float rope_base;
    float rope_factor; /* linear scaling: positions are divided by it; 1 = none */
    pl_act_kind act;
    bool gated; /* gate * up instead of one up projection */
    bool tied;  /* the head is the embedding */
};

#endif
