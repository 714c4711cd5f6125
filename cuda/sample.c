/* sample: sampling's host side: sends what the rows are drawn by, and fetches what came of it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda.h"

enum { MAX_WORK = 8 << 20 }; /* floats of rows that are sampled at a time; more rows go in several rounds */

static size_t at_once(size_t T, size_t V)
{
    const size_t fit = V < MAX_WORK ? MAX_WORK / V : 1;
    return T < fit ? T : fit;
}

static size_t results_bytes(size_t T)
{
    return (T * sizeof(struct pl_drawn) + 255) / 256 * 256;
}

/* Shorter rows may fill it better. */
size_t pl_cuda_sample_bytes(size_t T, size_t V)
{
    const size_t most = V > MAX_WORK ? V : MAX_WORK;
    return results_bytes(T) + (T * V < most ? T * V : most) * sizeof(float);
}

pl_status pl_cuda_sample_op(struct pl_device *dev, pl_view logits, const struct pl_draws *draws, struct pl_drawn *out)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (draws->n_rows != logits.rows)
        return PL_EINVAL;
    if (logits.rows == 0)
        return PL_OK;
    pl_status rc = pl_cuda_begin(c);
    struct pl_cuda_draws d = {.logits = pl_cuda_mat(logits)};
    const uint32_t n = (uint32_t)at_once(logits.rows, logits.cols);
    d.draws = rc == PL_OK ? pl_cuda_upload(c, draws->rows, draws->n_rows * sizeof *d.draws) : NULL;
    d.edits = d.draws != NULL ? pl_cuda_upload(c, draws->edits, draws->n_edits * sizeof *d.edits) : NULL;
    uint8_t *const work = d.edits != NULL ? pl_cuda_scratch(c, PL_CUDA_SCRATCH_SAMPLE, pl_cuda_sample_bytes(logits.rows, logits.cols)) : NULL;
    if (work == NULL)
        return pl_cuda_failed(c);
    d.out = (struct pl_drawn *)work;
    d.work = (float *)(work + results_bytes(logits.rows));
    for (uint32_t at = 0; rc == PL_OK && at < logits.rows; at += n)
        rc = pl_cuda_check(c, pl_cuda_sample(c->stream, d, at, logits.rows - at < n ? logits.rows - at : n), "sampling");
    if (rc == PL_OK)
        rc = pl_cuda_settle(c, "sampling");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMemcpyAsync(out, d.out, logits.rows * sizeof *out, cudaMemcpyDeviceToHost, c->stream), "fetching tokens");
}
