/* train_attn: causal attention over packed sequences, and its backward.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

/* The sequences on the device, and how many tiles they make. */
static pl_status upload(struct pl_cuda *c, const struct pl_train_seqs *s, const uint32_t **start, uint32_t *n_tiles)
{
    *n_tiles = pl_cuda_causal_tiles(s->start, s->n_seqs);
    return (*start = pl_cuda_bring(c, s->start, (s->n_seqs + 1) * sizeof *s->start)) != NULL ? PL_OK : pl_cuda_failed(c);
}

pl_status pl_cuda_train_attn(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale,
                             const struct pl_train_seqs *s)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t *start;
    uint32_t n_tiles;
    if (qkv.rows == 0)
        return PL_OK;
    const pl_status rc = upload(c, s, &start, &n_tiles);
    if (rc != PL_OK)
        return rc;
    return pl_cuda_check(c, pl_cuda_causal(c->stream, pl_cuda_mat(out), pl_cuda_mat(lse), pl_cuda_mat(qkv), head_dim, scale, start, s->n_seqs, n_tiles),
                         "attention");
}

pl_status pl_cuda_train_attn_d(struct pl_device *dev, pl_view dqkv, pl_view dout, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim,
                               float scale, const struct pl_train_seqs *s)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t *start;
    uint32_t n_tiles;
    if (qkv.rows == 0)
        return PL_OK;
    const pl_status rc = upload(c, s, &start, &n_tiles);
    float *along = rc == PL_OK ? pl_cuda_scratch(c, PL_CUDA_SCRATCH_SUMS, (size_t)lse.rows * lse.cols * sizeof *along) : NULL;
    if (along == NULL)
        return rc != PL_OK ? rc : pl_cuda_failed(c);
    return pl_cuda_check(c, pl_cuda_causal_d(c->stream, pl_cuda_mat(dqkv), pl_cuda_mat(dout), pl_cuda_mat(out), pl_cuda_mat(lse), pl_cuda_mat(qkv),
                                             head_dim, scale, start, s->n_seqs, n_tiles, along),
                         "the gradient of attention");
}
