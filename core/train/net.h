/* net: a model as it is trained: its weights (frozen as in the file, or float32 values that are trained), low-rank adapters
 * beside them, and the forward and backward pass of a micro-batch, for every architecture.
 *
 * All that is trained lies in one buffer: first what the optimizer decays (matrices), then what it does not; gradients and
 * moments have the same layout.
 * Thread: one.  Owns: weights, activations; borrows the device and the file, which must live as long.
 * Fails: PL_EFORMAT and PL_ENOTSUP for the file, PL_EINVAL for targets that the model lacks, PL_ENOMEM, PL_EDEVICE.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_NET_H
#define PL_TRAIN_NET_H

#include "core/device/train.h"
#include "core/model/adapter.h"
#include "core/model/gguf.h"
#include "core/model/spec.h"

struct pl_net_mat {
    struct pl_train_mat w;
    pl_view d; /* gradient; none while frozen */
};
struct pl_net_vec {
    pl_view w, d; /* without buffer: the model has none; d: frozen */
};

struct pl_net_lora {
    pl_target target;
    struct pl_target_place place;
    struct pl_net_mat a, b; /* [rank, cols], [rows, rank] */
    float scale;
};

struct pl_net_top {
    struct pl_net_mat embed, position, head;
    struct pl_net_vec out_norm, out_norm_b, rope_factors;
    pl_view rope_freq;
};

struct pl_net_layer {
    struct pl_net_mat qkv, attn_out, ff_in, ff_out;
    struct pl_net_vec attn_norm, attn_norm_b, qkv_b, attn_out_b, ff_norm, ff_norm_b, ff_in_b, ff_out_b;
    struct pl_net_lora *lora[PL_PRODUCT_COUNT];
    uint32_t n_lora[PL_PRODUCT_COUNT];
};

/* A tensor of the file, or half of an adapter's pair, within the buffer of what is trained. */
struct pl_net_param {
    char name[72];
    size_t offset;
    uint32_t rows, cols;
};

struct pl_net_options {
    bool full; /* train every weight; else adapters */
    uint32_t rank;
    float alpha, dropout;
    bool rslora;
    unsigned targets; /* bits 1 << PL_TARGET_x */
    bool recompute;
    bool inference; /* train nothing: losses only, */
    const struct pl_adapter *adapter; /* with this adapter, whatever its ranks; borrowed by pl_net_new; NULL = none */
    uint64_t seed;  /* of the adapters' first values */
};

/* What one layer keeps for the backward, [T, …]. */
struct pl_net_saved {
    pl_view x, qkv, att, lse, mid, ff;
};

struct pl_net {
    struct pl_spec spec;
    unsigned arch_bit;
    struct pl_device *dev;         /* borrowed */
    size_t left;                   /* bytes of its own memory, before the net took any */
    const struct pl_train_ops *t;  /* borrowed */
    struct pl_net_options o;
    float attn_scale, lora_scale;
    struct pl_net_top top;
    struct pl_net_layer *layers;

    struct pl_net_param *params;
    uint32_t n_params;
    size_t n_trained, n_decayed; /* values, gaps included; the first n_decayed are decayed */
    struct pl_dbuf *w, *g, *m, *v;
    struct pl_dbuf *frozen; /* vectors that are not trained, rotation frequencies */

    uint32_t max_tokens, max_rows;
    struct pl_dbuf *work;
    struct pl_net_saved *saved; /* [L]; with recompute all but x are shared */
    pl_view last;               /* [T, C] after the last layer */
    pl_view rope;               /* [T, rope_dims] */
    pl_view h, act, dx, dh, dqkv, datt, dff, dact, u, du, drop;
    pl_view rows, h_rows, dh_rows; /* [R, C] */
    bool adapters_off;
    uint64_t dropout_key; /* 0 = no dropout */
};

/* A micro-batch: sequences one after another, and the rows whose next token counts. All borrowed. */
struct pl_micro {
    uint32_t n_tokens, n_rows;
    const uint32_t *tokens, *pos; /* [T] */
    struct pl_train_seqs seqs;
    const uint32_t *rows, *targets; /* [R] ascending; the token that follows */
};

pl_status pl_net_new(struct pl_net **out, const struct pl_gguf *g, struct pl_device *dev, const struct pl_net_options *o, struct pl_err *err) PL_MUST_CHECK;
void pl_net_free(struct pl_net *n);
/* Starts from an adapter instead of new ones; its pairs and ranks must be those of the options. */
pl_status pl_net_set_adapter(struct pl_net *n, const struct pl_adapter *a, struct pl_err *err) PL_MUST_CHECK;
/* The adapters as they are now. The caller frees the list of pairs, and *values, in which theirs lie. */
pl_status pl_net_adapter(const struct pl_net *n, struct pl_adapter *out, float **values, struct pl_err *err) PL_MUST_CHECK;

/* Makes room for micro-batches of so many tokens and rows. */
pl_status pl_net_reserve(struct pl_net *n, uint32_t max_tokens, uint32_t max_rows, struct pl_err *err) PL_MUST_CHECK;
/* What reserve takes. */
size_t pl_net_work_bytes(const struct pl_net *n, uint32_t max_tokens, uint32_t max_rows);

pl_status pl_net_forward(struct pl_net *n, const struct pl_micro *b) PL_MUST_CHECK;
/* logp[R], best[R] of the rows of the last forward. With weight, the gradient of Σ -weight * logp is made ready. */
pl_status pl_net_loss(struct pl_net *n, const struct pl_micro *b, const float *weight, double *logp, bool *best) PL_MUST_CHECK;
/* Adds to the gradients. */
pl_status pl_net_backward(struct pl_net *n, const struct pl_micro *b) PL_MUST_CHECK;

#endif
