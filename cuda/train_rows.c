/* train_rows: the operations of training that work row by row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/train.h"

pl_status pl_cuda_train_norm(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    return pl_cuda_norm_op(dev, kind, out, x, gain, bias, eps);
}

pl_status pl_cuda_train_norm_d(struct pl_device *dev, pl_norm_kind kind, pl_view dx, pl_view dgain, pl_view dbias, pl_view dy, pl_view x,
                               pl_view gain, float eps, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    float *work = pl_cuda_scratch(c, PL_CUDA_SCRATCH_SUMS, pl_cuda_norm_d_floats(x.rows, x.cols) * sizeof *work);
    if (work == NULL)
        return pl_cuda_failed(c);
    return pl_cuda_check(c, pl_cuda_norm_d(c->stream, kind == PL_NORM_LAYER, pl_cuda_mat(dx), pl_cuda_vector(dgain), pl_cuda_vector(dbias), pl_cuda_mat(dy),
                                           pl_cuda_mat(x), pl_cuda_vector(gain), eps, add, work),
                         "the gradient of a norm");
}

pl_status pl_cuda_train_rope_table(struct pl_device *dev, pl_view table, pl_view freq, const uint32_t *pos)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (table.rows == 0)
        return PL_OK;
    const uint32_t *p = pl_cuda_bring(c, pos, table.rows * sizeof *pos);
    return p == NULL ? pl_cuda_failed(c) : pl_cuda_check(c, pl_cuda_rope_table(c->stream, pl_cuda_mat(table), pl_cuda_vector(freq), p), "a table of rotations");
}

pl_status pl_cuda_train_rope(struct pl_device *dev, pl_rope_kind kind, pl_view x, uint32_t head_dim, pl_view table, bool inverse)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_rotate(c->stream, kind == PL_ROPE_HALVES, pl_cuda_mat(x), head_dim, pl_cuda_mat(table), inverse), "rotating");
}

pl_status pl_cuda_train_glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const struct pl_cuda_mat none = {0};
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_glu(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(out), pl_cuda_mat(x), NULL, none, NULL, NULL), "a gated activation");
}

pl_status pl_cuda_train_glu_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_glu_d(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(dx), pl_cuda_mat(dout), pl_cuda_mat(x)),
                         "the gradient of a gated activation");
}

pl_status pl_cuda_train_act(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_act(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(out), pl_cuda_mat(x)), "an activation");
}

pl_status pl_cuda_train_act_d(struct pl_device *dev, pl_act_kind kind, pl_view dx, pl_view dout, pl_view x)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_act_d(c->stream, kind == PL_ACT_GELU_TANH, pl_cuda_mat(dx), pl_cuda_mat(dout), pl_cuda_mat(x)),
                         "the gradient of an activation");
}

pl_status pl_cuda_train_dropout(struct pl_device *dev, pl_view out, pl_view x, float share, uint64_t key, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (x.rows == 0)
        return PL_OK;
    return pl_cuda_check(c, pl_cuda_dropout(c->stream, pl_cuda_mat(out), pl_cuda_mat(x), share, key, add), "dropout");
}

pl_status pl_cuda_train_gather(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows)
{
    return pl_cuda_gather_op(dev, out, x, rows);
}

pl_status pl_cuda_train_gather_d(struct pl_device *dev, pl_view dx, pl_view dout, const uint32_t *rows)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (dx.rows == 0)
        return PL_OK;
    const uint32_t *r = pl_cuda_bring(c, rows, dout.rows * sizeof *rows);
    return r == NULL ? pl_cuda_failed(c) : pl_cuda_check(c, pl_cuda_scatter(c->stream, pl_cuda_mat(dx), pl_cuda_mat(dout), r), "scattering");
}
