/* ranks: sums over ranks, in their order.
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
