/* lora: low-rank changes of a product, all parts at once; a warp for a sum over the inputs, a thread for an output.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"

enum { LORA_WARPS = 4 };

static __global__ void down_kernel(pl_cuda_mat x, const uint32_t *rows, pl_cuda_lora_parts parts, float *y)
{
    wait_for_earlier();
    const uint32_t at = blockIdx.y * LORA_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t i = 0, r = at;
    if (at >= parts.rank)
        return;
    while (r >= parts.part[i].rank)
        r -= parts.part[i++].rank;
    const pl_cuda_lora_part &p = parts.part[i];
    float sum = 0;
    for (uint32_t k = lane; k < p.cols; k += WARP)
        sum = fmaf(x.p[rows[blockIdx.x] * x.stride + k], p.a[static_cast<size_t>(r) * p.cols + k], sum);
    sum = warp_sum(sum);
    if (lane == 0)
        y[static_cast<size_t>(blockIdx.x) * parts.rank + at] = sum;
}

static __global__ void up_kernel(pl_cuda_mat out, const uint32_t *rows, pl_cuda_lora_parts parts, const float *y, bool add)
{
    wait_for_earlier();
    const uint32_t column = blockIdx.y * LORA_WARPS * WARP + threadIdx.x;
    if (column >= out.cols)
        return;
    float *const to = out.p + rows[blockIdx.x] * out.stride + column;
    y += static_cast<size_t>(blockIdx.x) * parts.rank;
    for (uint32_t i = 0; i < parts.n; y += parts.part[i++].rank) {
        const pl_cuda_lora_part &p = parts.part[i];
        const uint32_t c = column - p.first;
        if (c >= p.rows)
            continue;
        float sum = 0;
        for (uint32_t r = 0; r < p.rank; r++)
            sum = fmaf(y[r], p.b[static_cast<size_t>(c) * p.rank + r], sum);
        *to = fmaf(p.scale, sum, add ? *to : 0);
        return;
    }
    if (!add)
        *to = 0;
}

cudaError_t pl_cuda_lora(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows, uint32_t n_rows,
                         struct pl_cuda_lora_parts parts, float *y, bool add)
{
    LAUNCH(down_kernel, dim3(n_rows, pieces(parts.rank, LORA_WARPS)), LORA_WARPS * WARP, 0, s, x, rows, parts, y);
    LAUNCH(up_kernel, dim3(n_rows, pieces(out.cols, LORA_WARPS * WARP)), LORA_WARPS * WARP, 0, s, out, rows, parts, y, add);
    return cudaGetLastError();
}
