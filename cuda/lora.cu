/* lora: low-rank changes of a product; a warp for a result.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"

enum { LORA_WARPS = 4 };

static __global__ void clear_kernel(pl_cuda_mat out, const uint32_t *rows)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * LORA_WARPS * WARP + threadIdx.x;
    if (i < out.cols)
        out.p[rows[blockIdx.x] * out.stride + i] = 0;
}

static __global__ void down_kernel(pl_cuda_mat x, const uint32_t *rows, pl_cuda_lora_part p, float *y)
{
    wait_for_earlier();
    const uint32_t r = blockIdx.y * LORA_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= p.rank)
        return;
    float sum = 0;
    for (uint32_t k = lane; k < p.cols; k += WARP)
        sum = fmaf(x.p[rows[blockIdx.x] * x.stride + k], p.a[static_cast<size_t>(r) * p.cols + k], sum);
    sum = warp_sum(sum);
    if (lane == 0)
        y[static_cast<size_t>(blockIdx.x) * p.rank + r] = sum;
}

static __global__ void up_kernel(pl_cuda_mat out, const uint32_t *rows, pl_cuda_lora_part p, const float *y)
{
    wait_for_earlier();
    const uint32_t c = blockIdx.y * LORA_WARPS * WARP + threadIdx.x;
    if (c >= p.rows)
        return;
    float sum = 0;
    for (uint32_t r = 0; r < p.rank; r++)
        sum = fmaf(y[static_cast<size_t>(blockIdx.x) * p.rank + r], p.b[static_cast<size_t>(c) * p.rank + r], sum);
    out.p[rows[blockIdx.x] * out.stride + p.first + c] += p.scale * sum;
}

cudaError_t pl_cuda_lora_clear(cudaStream_t s, struct pl_cuda_mat out, const uint32_t *rows, uint32_t n_rows)
{
    LAUNCH(clear_kernel, dim3(n_rows, pieces(out.cols, LORA_WARPS * WARP)), LORA_WARPS * WARP, 0, s, out, rows);
    return cudaGetLastError();
}

cudaError_t pl_cuda_lora(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows, uint32_t n_rows,
                         const struct pl_cuda_lora_part *p, float *y)
{
    LAUNCH(down_kernel, dim3(n_rows, pieces(p->rank, LORA_WARPS)), LORA_WARPS * WARP, 0, s, x, rows, *p, y);
    LAUNCH(up_kernel, dim3(n_rows, pieces(p->rows, LORA_WARPS * WARP)), LORA_WARPS * WARP, 0, s, out, rows, *p, y);
    return cudaGetLastError();
}
