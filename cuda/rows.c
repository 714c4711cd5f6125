/* rows: the operations that work row by row, and the embedding.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda.h"

pl_status pl_cuda_norm_op(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const struct pl_weight *next = pl_cuda_take_next(c);
    void *narrow;
    if (x.rows == 0)
        return PL_OK;
    const pl_status rc = pl_cuda_narrow_to(c, next, out, &narrow);
    return rc != PL_OK ? rc : pl_cuda_check(c, pl_cuda_norm(c->stream, kind == PL_NORM_LAYER, pl_cuda_mat(out), pl_cuda_mat(x), pl_cuda_vector(gain),
                                                            pl_cuda_vector(bias), eps, narrow), "norm");
}

pl_status pl_cuda_act_op(struct pl_device *dev, pl_act_kind kind, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    return x.rows == 0 ? PL_OK : pl_cuda_check(c, pl_cuda_activate(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(x)), "act");
}

pl_status pl_cuda_gather_op(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (out.rows == 0)
        return PL_OK;
    const uint32_t *r = pl_cuda_bring(c, rows, out.rows * sizeof *rows);
    return r == NULL ? pl_cuda_failed(c) : pl_cuda_check(c, pl_cuda_gather(c->stream, pl_cuda_mat(out), pl_cuda_mat(x), r), "gather");
}

pl_status pl_cuda_embed_op(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (out.rows == 0)
        return PL_OK;
    const uint32_t *rows = pl_cuda_bring(c, idx, out.rows * sizeof *idx);
    if (rows == NULL)
        return pl_cuda_failed(c);
    struct pl_cuda_parts parts = {.n = w->n_parts};
    for (uint32_t i = 0; i < w->n_parts; i++)
        parts.part[i] = w->parts[i];
    return pl_cuda_check(c, pl_cuda_embed(c->stream, pl_cuda_mat(out), parts, rows, add), "embed");
}
