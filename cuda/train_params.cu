/* train_params: gradients of embeddings, and the optimizer.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"
#include "cuda/train_kernels.h"

enum { THREADS = 256, EMBED_THREADS = 128 };

/* A thread for a column of a piece. */
static __global__ void embed_pieces_kernel(pl_cuda_mat dw, pl_cuda_mat dy, float *sums, const pl_cuda_use_piece *pieces, const uint32_t *order)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * EMBED_THREADS + threadIdx.x;
    const pl_cuda_use_piece p = pieces[blockIdx.x];
    if (i >= dy.cols)
        return;
    const bool whole = p.sum == PL_CUDA_NO_ROW;
    float *const to = (whole ? dw.p + p.row * dw.stride : sums + p.sum * static_cast<size_t>(dy.cols)) + i;
    float sum = whole ? *to : 0;
#pragma unroll 4
    for (uint32_t k = p.from; k < p.end; k++)
        sum += dy.p[order[k] * dy.stride + i];
    *to = sum;
}

static __global__ void embed_total_kernel(pl_cuda_mat dw, const float *sums, const pl_cuda_use_piece *totals)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * EMBED_THREADS + threadIdx.x;
    const pl_cuda_use_piece t = totals[blockIdx.x];
    if (i >= dw.cols)
        return;
    float *const to = dw.p + t.row * dw.stride + i;
    float sum = *to;
    for (uint32_t k = t.from; k < t.end; k++)
        sum += sums[k * static_cast<size_t>(dw.cols) + i];
    *to = sum;
}

cudaError_t pl_cuda_embed_dw(cudaStream_t s, struct pl_cuda_mat dw, struct pl_cuda_mat dy, const struct pl_cuda_use_piece *pieces_of, uint32_t n_pieces,
                             uint32_t n_totals, const uint32_t *order, float *sums)
{
    const unsigned wide = pieces(dy.cols, EMBED_THREADS);
    LAUNCH(embed_pieces_kernel, dim3(n_pieces, wide), EMBED_THREADS, 0, s, dw, dy, sums, pieces_of, order);
    if (n_totals > 0)
        LAUNCH(embed_total_kernel, dim3(n_totals, wide), EMBED_THREADS, 0, s, dw, sums, pieces_of + n_pieces);
    return cudaGetLastError();
}

/* A block for a piece: each thread every THREADS-th value, then pairs of threads. */
static __global__ void squares_kernel(double *sums, const float *x, size_t n)
{
    wait_for_earlier();
    SHARED double part[THREADS];
    const size_t from = blockIdx.x * static_cast<size_t>(PL_CUDA_SQUARES), end = min(from + PL_CUDA_SQUARES, n);
    double sum = 0;
    for (size_t i = from + threadIdx.x; i < end; i += THREADS)
        sum += static_cast<double>(x[i]) * static_cast<double>(x[i]); /* exact, so that contracting it changes nothing */
    part[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned d = THREADS / 2; d > 0; d /= 2) {
        if (threadIdx.x < d)
            part[threadIdx.x] += part[threadIdx.x + d];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        sums[blockIdx.x] = part[0];
}

cudaError_t pl_cuda_squares(cudaStream_t s, double *sums, const float *x, size_t n)
{
    LAUNCH(squares_kernel, pieces(n, PL_CUDA_SQUARES), THREADS, 0, s, sums, x, n);
    return cudaGetLastError();
}

static __global__ void adamw_kernel(float *w, float *g, float *m, float *v, size_t n, pl_cuda_adamw_step o)
{
    wait_for_earlier();
    const size_t i = blockIdx.x * static_cast<size_t>(THREADS) + threadIdx.x;
    if (i >= n)
        return;
    const float grad = o.scale * g[i], first = o.beta1 * m[i] + (1 - o.beta1) * grad, second = o.beta2 * v[i] + (1 - o.beta2) * grad * grad;
    m[i] = first;
    v[i] = second;
    w[i] = o.keep * w[i] - o.step * first / (sqrtf(second) * o.root + o.eps);
    g[i] = 0;
}

cudaError_t pl_cuda_adamw(cudaStream_t s, float *w, float *g, float *m, float *v, size_t n, struct pl_cuda_adamw_step o)
{
    LAUNCH(adamw_kernel, pieces(n, THREADS), THREADS, 0, s, w, g, m, v, n, o);
    return cudaGetLastError();
}
