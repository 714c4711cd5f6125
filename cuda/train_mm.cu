/* train_mm: what training does before and after cuBLAS: rows of weights, or of activations, as operands; biases and their gradients; the loss.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/blocks.h"
#include "cuda/train_kernels.h"

enum { WIDE = 128, PER_THREAD = 4, QUADS = 4, SUM_ROWS = 32, LOSS_THREADS = 512 };

static __device__ __forceinline__ void put(float *to, float v)
{
    *to = v;
}

static __device__ __forceinline__ void put(__nv_bfloat16 *to, float v)
{
    *to = __float2bfloat16_rn(v);
}

/* ---- rows as operands --------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float value_at(const uint8_t *row, int dtype, uint32_t i)
{
    return dtype == PL_F32   ? reinterpret_cast<const float *>(row)[i]
           : dtype == PL_F16 ? __half2float(reinterpret_cast<const __half *>(row)[i])
                             : __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(row)[i]);
}

template <class OUT> static __global__ void expand_floats(pl_cuda_part w, uint32_t first, OUT *out, size_t stride)
{
    wait_for_earlier();
    const uint8_t *const row = w.data + (first + static_cast<size_t>(blockIdx.x)) * w.row_bytes;
    OUT *const to = out + blockIdx.x * stride;
#pragma unroll
    for (uint32_t k = 0; k < PER_THREAD; k++) {
        const uint32_t i = (blockIdx.y * PER_THREAD + k) * WIDE + threadIdx.x;
        if (i < w.cols)
            put(to + i, value_at(row, w.dtype, i));
    }
}

/* A warp for a quad of 8 rows × 1024 values: each lane reads its super, all write 32 values of a row at a time. */
template <int TYPE, class OUT> static __global__ void expand_blocks(pl_cuda_part w, uint32_t first, uint32_t n, OUT *out, size_t stride)
{
    wait_for_earlier();
    using type = block_type<TYPE>;
    SHARED float values[QUADS][WARP][WARP + 1];
    const uint32_t lane = threadIdx.x % WARP, quad = blockIdx.y * QUADS + threadIdx.x / WARP, group = first / PL_PACK_ROWS + blockIdx.x;
    if (quad >= pl_pack_quads(w.cols))
        return;
    float (*const mine)[WARP + 1] = values[threadIdx.x / WARP];
    super_held<TYPE> held;
    held.load(super_at<TYPE>{w.data + (static_cast<size_t>(group) * pl_pack_quads(w.cols) + quad) * type::quad_bytes, lane});
#pragma unroll
    for (int j = 0; j < PL_PACK_SUPER / 32; j++) {
        const sub_block<TYPE> b = read_sub<TYPE>(held, j);
#pragma unroll
        for (int e = 0; e < 32; e++) {
            const int h = type::halves == 2 ? e / 16 : 0, q = static_cast<int8_t>(b.q[e / 4] >> e % 4 * 8) - type::offset;
            mine[lane][e] = __fadd_rn(__fmul_rn(b.scale[h], static_cast<float>(q)), b.min[h]);
        }
        __syncwarp();
        for (uint32_t l = 0; l < WARP; l++) {
            const uint32_t row = blockIdx.x * PL_PACK_ROWS + l % PL_PACK_ROWS;
            const uint32_t column = (quad * PL_PACK_STRANDS + l / PL_PACK_ROWS) * PL_PACK_SUPER + j * 32 + lane;
            if (row < n && column < w.cols)
                put(out + row * stride + column, mine[l][lane]);
        }
        __syncwarp();
    }
}

template <class OUT> static cudaError_t expand(cudaStream_t s, const pl_cuda_part &w, uint32_t first, uint32_t n, OUT *out, size_t stride)
{
    const dim3 floats(n, pieces(w.cols, WIDE * PER_THREAD)), blocks(pieces(n, PL_PACK_ROWS), pieces(pl_pack_quads(w.cols), QUADS));
    switch (w.dtype) {
#define X(name, ...)                                                                                                   \
    case PL_##name: LAUNCH((expand_blocks<PL_##name, OUT>), blocks, QUADS * WARP, 0, s, w, first, n, out, stride); break;
        PL_PACK_LIST(X)
#undef X
    default: LAUNCH(expand_floats<OUT>, floats, WIDE, 0, s, w, first, out, stride);
    }
    return cudaGetLastError();
}

cudaError_t pl_cuda_expand(cudaStream_t s, const struct pl_cuda_part *w, uint32_t first, uint32_t n, bool bf16, void *out, size_t stride)
{
    return bf16 ? expand(s, *w, first, n, static_cast<__nv_bfloat16 *>(out), stride) : expand(s, *w, first, n, static_cast<float *>(out), stride);
}

/* ---- biases ------------------------------------------------------------------------------------------------------------------- */

static __global__ void bias_kernel(pl_cuda_mat out, const float *bias)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * WIDE + threadIdx.x;
    if (i < out.cols)
        out.p[blockIdx.x * out.stride + i] = bias[i];
}

cudaError_t pl_cuda_bias(cudaStream_t s, struct pl_cuda_mat out, const float *bias)
{
    LAUNCH(bias_kernel, dim3(out.rows, pieces(out.cols, WIDE)), WIDE, 0, s, out, bias);
    return cudaGetLastError();
}

static __global__ void add_kernel(pl_cuda_mat out, pl_cuda_mat x)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * WIDE + threadIdx.x;
    if (i < x.cols)
        out.p[blockIdx.x * out.stride + i] += x.p[blockIdx.x * x.stride + i];
}

cudaError_t pl_cuda_add(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x)
{
    LAUNCH(add_kernel, dim3(x.rows, pieces(x.cols, WIDE)), WIDE, 0, s, out, x);
    return cudaGetLastError();
}

/* A block for 32 columns: warp w adds up rows w, w + 32, …; then what the warps have is added, first to last. */
static __global__ void __launch_bounds__(SUM_ROWS *WARP) sum_columns_kernel(float *sums, pl_cuda_mat x)
{
    wait_for_earlier();
    SHARED float part[SUM_ROWS][WARP];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0;
    for (uint32_t t = warp; column < x.cols && t < x.rows; t += SUM_ROWS)
        sum += x.p[t * x.stride + column];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= x.cols)
        return;
    for (uint32_t w = 1; w < SUM_ROWS; w++)
        sum += part[w][lane];
    sums[column] += sum;
}

cudaError_t pl_cuda_sum_columns(cudaStream_t s, float *sums, struct pl_cuda_mat x)
{
    LAUNCH(sum_columns_kernel, pieces(x.cols, WARP), SUM_ROWS * WARP, 0, s, sums, x);
    return cudaGetLastError();
}

/* ---- loss: a block for a row --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float block_max(float v, float *scratch)
{
    const unsigned lane = threadIdx.x % WARP;
    v = warp_max(v);
    if (lane == 0)
        scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    return warp_max(scratch[lane % (LOSS_THREADS / WARP)]);
}

static __global__ void __launch_bounds__(LOSS_THREADS) loss_kernel(pl_cuda_loss_job l)
{
    wait_for_earlier();
    SHARED float largest[WARP], sums[WARP];
    const uint32_t r = blockIdx.x, V = l.logits.cols, target = l.targets[r];
    float *const x = l.logits.p + r * l.logits.stride;
    const float at = x[target];
    float max = -INFINITY, sum = 0;
    for (uint32_t i = threadIdx.x; i < V; i += LOSS_THREADS)
        max = fmaxf(max, x[i]);
    max = block_max(max, largest);
    for (uint32_t i = threadIdx.x; i < V; i += LOSS_THREADS)
        sum += expf(x[i] - max);
    const double lse = static_cast<double>(max) + log(static_cast<double>(block_sum(sum, sums)));
    if (threadIdx.x == 0) {
        l.logp[r] = static_cast<double>(at) - lse;
        l.best[r] = at >= max;
    }
    if (l.weight == nullptr)
        return;
    const float weight = l.weight[r], shift = static_cast<float>(lse);
    for (uint32_t i = threadIdx.x; i < V; i += LOSS_THREADS) {
        const float p = weight * expf(x[i] - shift);
        x[i] = i == target ? p - weight : p;
    }
}

cudaError_t pl_cuda_loss(cudaStream_t s, struct pl_cuda_loss_job l)
{
    LAUNCH(loss_kernel, l.logits.rows, LOSS_THREADS, 0, s, l);
    return cudaGetLastError();
}
