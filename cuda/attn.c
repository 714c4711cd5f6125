/* attn: attention's host side.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda.h"

pl_status pl_cuda_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale, const struct pl_batch *b)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_cuda_batch batch;
    const uint32_t per_kv = q.cols / kv->shape.head_dim / kv->shape.n_kv_heads;
    if (per_kv == 0 || per_kv > PL_MAX_QUERIES_PER_KV)
        return PL_ENOTSUP;
    if (b->n_tokens == 0)
        return PL_OK;
    const pl_status rc = pl_cuda_begin(c);
    if (rc != PL_OK || !pl_cuda_batch_on_device(c, b, &batch))
        return pl_cuda_failed(c);
    return pl_cuda_check(c, pl_cuda_attn(c->stream, pl_cuda_mat(out), pl_cuda_mat(q), kv->kv, layer, scale, batch), "attention");
}
