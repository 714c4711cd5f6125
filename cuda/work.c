/* work: the memory that operations work in, taken at once.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "cuda/cuda.h"

enum { BLAS_BYTES = 32 << 20 /* what cuBLAS's fastest kernels of chips since the H100 want */ };

static void measure(const struct pl_cuda *c, const struct pl_step_shape *s, size_t n[PL_CUDA_SCRATCH_KINDS])
{
    const size_t T = s->n_tokens, Q = (size_t)s->n_heads * s->head_dim, padded = pl_cuda_act_padded(s->n_in);
    memset(n, 0, PL_CUDA_SCRATCH_KINDS * sizeof *n); /* what training needs stays so */
    n[PL_CUDA_SCRATCH_RANKS] = pl_nccl_bytes(c, s);
    n[PL_CUDA_SCRATCH_PRODUCT] = T * (s->n_gated > Q ? s->n_gated : Q) * sizeof(float);
    n[PL_CUDA_SCRATCH_NARROW] = c->has_halves && T > PL_CUDA_FEW ? pl_cuda_narrow_bytes(T, s->n_in) : 0;
    n[PL_CUDA_SCRATCH_WIDE] = c->has_halves && T > PL_CUDA_FEW ? pl_cuda_sums_bytes(T, s->n_out) : 0;
    n[PL_CUDA_SCRATCH_QUANT] = c->has_blocks ? T * (padded + padded / 32 * sizeof(struct pl_cuda_act_scale)) : 0;
    n[PL_CUDA_SCRATCH_ATTN] = pl_cuda_attn_bytes(s);
    n[PL_CUDA_SCRATCH_SAMPLE] = pl_cuda_sample_bytes(T, s->n_out);
    n[PL_CUDA_SCRATCH_LORA] = pl_cuda_lora_bytes(T);
}

size_t pl_cuda_blas_bytes(const struct pl_cuda *c)
{
    return c->blas_work == NULL ? BLAS_BYTES : 0;
}

pl_status pl_cuda_reserve_blas(struct pl_cuda *c)
{
    if (c->blas_work != NULL)
        return PL_OK;
    const pl_status rc = pl_cuda_alloc(c, &c->blas_work, BLAS_BYTES);
    if (rc != PL_OK)
        return rc;
    return c->blas.work_in(&c->blas, c->blas_work, BLAS_BYTES) == 0 ? PL_OK : pl_cuda_check(c, cudaErrorUnknown, "giving cuBLAS its memory");
}

size_t pl_cuda_work_bytes(struct pl_device *dev, const struct pl_step_shape *s)
{
    const struct pl_cuda *c = pl_cuda_of(dev);
    size_t n[PL_CUDA_SCRATCH_KINDS], all = PL_CUDA_STAGE_BYTES + (c->has_halves ? BLAS_BYTES : 0);
    measure(c, s, n);
    for (int i = 0; i < PL_CUDA_SCRATCH_KINDS; i++)
        all += n[i];
    return all;
}

pl_status pl_cuda_reserve(struct pl_device *dev, const struct pl_step_shape *s)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    size_t n[PL_CUDA_SCRATCH_KINDS];
    pl_status rc = pl_cuda_reserve_stage(c, PL_CUDA_STAGE_BYTES);
    measure(c, s, n);
    for (int i = 0; rc == PL_OK && i < PL_CUDA_SCRATCH_KINDS; i++)
        rc = pl_cuda_scratch_grow(c, (enum pl_cuda_scratch_kind)i, n[i]);
    return rc != PL_OK || !c->has_halves ? rc : pl_cuda_reserve_blas(c);
}
