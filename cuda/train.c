/* train: the table of the training operations, and those that work on parameters.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

static bool has_bf16(struct pl_device *dev)
{
    return pl_cuda_of(dev)->id.arch >= 80; /* 7.5 multiplies f16 only */
}

static pl_status set_precision(struct pl_device *dev, pl_mm_precision p, struct pl_err *err)
{
    if (p == PL_MM_BF16 && !has_bf16(dev))
        return pl_fail_param(err, PL_ENOTSUP, "precision", "this GPU has no bf16 products (compute capability 8.0); use \"f32\" or \"auto\"");
    pl_cuda_of(dev)->bf16 = p == PL_MM_BF16;
    return PL_OK;
}

const struct pl_train_ops pl_cuda_train_ops = {
    .set_precision = set_precision,
    .has_bf16 = has_bf16,
    .frozen_new = pl_cuda_weight_new,

    .norm = pl_cuda_train_norm,
    .norm_d = pl_cuda_train_norm_d,
    .rope_table = pl_cuda_train_rope_table,
    .rope = pl_cuda_train_rope,
    .attn = pl_cuda_train_attn,
    .attn_d = pl_cuda_train_attn_d,
    .glu = pl_cuda_train_glu,
    .glu_d = pl_cuda_train_glu_d,
    .act = pl_cuda_train_act,
    .act_d = pl_cuda_train_act_d,
    .dropout = pl_cuda_train_dropout,
    .gather = pl_cuda_train_gather,
    .gather_d = pl_cuda_train_gather_d,
};
