/* ranks: sums over ranks, in their order; columns that ranks have sent.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"

enum { SUM_THREADS = 256 };

/* A thread for a value. */
static __global__ void sum_ranks_kernel(float *out, const float *parts, size_t stride, unsigned size, size_t n)
{
    wait_for_earlier();
    const size_t i = blockIdx.x * static_cast<size_t>(SUM_THREADS) + threadIdx.x;
    if (i >= n)
        return;
    float sum = parts[i];
    for (unsigned r = 1; r < size; r++)
        sum = __fadd_rn(sum, parts[r * stride + i]);
    out[i] = sum;
}

cudaError_t pl_cuda_sum_ranks(cudaStream_t s, float *out, const float *parts, size_t stride, unsigned size, size_t n)
{
    LAUNCH(sum_ranks_kernel, pieces(n, SUM_THREADS), SUM_THREADS, 0, s, out, parts, stride, size, n);
    return cudaGetLastError();
}

/* A thread for a column of a row. */
static __global__ void spread_kernel(pl_cuda_mat out, const float *from, pl_cuda_shares s)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * SUM_THREADS + threadIdx.x;
    uint32_t r = 0;
    if (i >= s.first[s.size])
        return;
    while (i >= s.first[r + 1])
        r++;
    if (r == s.own)
        return;
    const uint32_t width = s.widest > 0 ? s.widest : s.first[r + 1] - s.first[r], before = s.widest > 0 ? s.widest * r : s.first[r] - s.first[1];
    out.p[blockIdx.x * out.stride + i] = from[out.rows * static_cast<size_t>(before) + blockIdx.x * static_cast<size_t>(width) + i - s.first[r]];
}

cudaError_t pl_cuda_spread(cudaStream_t s, struct pl_cuda_mat out, const float *from, struct pl_cuda_shares shares)
{
    LAUNCH(spread_kernel, dim3(out.rows, pieces(shares.first[shares.size], SUM_THREADS)), SUM_THREADS, 0, s, out, from, shares);
    return cudaGetLastError();
}
