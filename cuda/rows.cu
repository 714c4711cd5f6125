/* rows: kernels that work row by row: norms, activations, gathering.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/activate.h"
#include "cuda/four.h"

enum { NORM_THREADS = 512, ACT_THREADS = 256 };

/* ---- norm: a block for a row --------------------------------------------------------------------------------------------- */

struct norm_job {
    bool layer;
    pl_cuda_mat out, x;
    const float *gain, *bias;
    float eps;
    __nv_bfloat16 *narrow;
};

template <bool QUADS> static __global__ void norm_kernel(norm_job j)
{
    wait_for_earlier();
    SHARED float sums[2][WARP];
    const uint32_t cols = j.x.cols;
    const float *in = j.x.p + blockIdx.x * j.x.stride;
    float sum = 0, squares = 0, mean = 0, v[4];
    for (uint32_t i = 4 * threadIdx.x; j.layer && i < cols; i += 4 * NORM_THREADS) {
        load_four<QUADS>(v, in + i, cols - i);
        sum += v[0] + v[1] + (v[2] + v[3]);
    }
    if (j.layer)
        mean = block_sum(sum, sums[0]) / static_cast<float>(cols);
    for (uint32_t i = 4 * threadIdx.x; i < cols; i += 4 * NORM_THREADS) {
        load_four<QUADS>(v, in + i, cols - i);
#pragma unroll
        for (uint32_t k = 0; k < 4; k++)
            squares = k < cols - i ? fmaf(v[k] - mean, v[k] - mean, squares) : squares;
    }
    const float scale = 1 / sqrtf(block_sum(squares, sums[1]) / static_cast<float>(cols) + j.eps);
    for (uint32_t i = 4 * threadIdx.x; i < cols; i += 4 * NORM_THREADS) {
        float gain[4], bias[4];
        load_four<QUADS>(v, in + i, cols - i);
        load_four<QUADS>(gain, j.gain + i, cols - i);
        if (j.bias != nullptr)
            load_four<QUADS>(bias, j.bias + i, cols - i);
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) {
            v[k] = __fmul_rn(__fmul_rn(v[k] - mean, scale), gain[k]);
            v[k] = j.bias != nullptr ? __fadd_rn(v[k], bias[k]) : v[k];
        }
        if (j.narrow != nullptr)
            store_four<__nv_bfloat16, QUADS>(j.narrow + blockIdx.x * static_cast<size_t>(cols) + i, v, cols - i);
        else
            store_four<QUADS>(j.out.p + blockIdx.x * j.out.stride + i, v, cols - i);
    }
}

cudaError_t pl_cuda_norm(cudaStream_t s, bool layer, struct pl_cuda_mat out, struct pl_cuda_mat x, const float *gain, const float *bias, float eps,
                         void *narrow)
{
    const norm_job j = {layer, out, x, gain, bias, eps, static_cast<__nv_bfloat16 *>(narrow)};
    if (in_fours(x) && in_fours(out) && in_fours(gain) && in_fours(bias))
        LAUNCH((norm_kernel<true>), x.rows, NORM_THREADS, 0, s, j);
    else
        LAUNCH((norm_kernel<false>), x.rows, NORM_THREADS, 0, s, j);
    return cudaGetLastError();
}

/* ---- activations: threads side by side over the columns --------------------------------------------------------------------- */

static __global__ void act_kernel(bool gelu, pl_cuda_mat x)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ACT_THREADS + threadIdx.x;
    float *const at = x.p + blockIdx.x * x.stride + i;
    if (i < x.cols)
        *at = activate(gelu, *at);
}

cudaError_t pl_cuda_activate(cudaStream_t s, bool gelu, struct pl_cuda_mat x)
{
    LAUNCH(act_kernel, dim3(x.rows, pieces(x.cols, ACT_THREADS)), ACT_THREADS, 0, s, gelu, x);
    return cudaGetLastError();
}

struct glu_job {
    pl_cuda_mat out, gu, plus;
    const float *bias;
    const bool *plus_rows;
    bool gelu;
    __nv_bfloat16 *narrow;
};

template <bool QUADS> static __device__ __forceinline__ void add_four(float *gate, float *up, const float *from, uint32_t F, uint32_t left)
{
    float more[2][4];
    load_four<QUADS>(more[0], from, left);
    load_four<QUADS>(more[1], from + F, left);
#pragma unroll
    for (int k = 0; k < 4; k++)
        gate[k] += more[0][k], up[k] += more[1][k];
}

template <bool QUADS> static __global__ void glu_kernel(glu_job j)
{
    wait_for_earlier();
    const uint32_t i = 4 * (blockIdx.y * ACT_THREADS + threadIdx.x), t = blockIdx.x, F = j.out.cols;
    if (i >= F)
        return;
    const float *const in = j.gu.p + t * j.gu.stride + i;
    float gate[4], up[4];
    load_four<QUADS>(gate, in, F - i);
    load_four<QUADS>(up, in + F, F - i);
    if (j.bias != nullptr)
        add_four<QUADS>(gate, up, j.bias + i, F, F - i);
    if (j.plus.p != nullptr && j.plus_rows[t])
        add_four<QUADS>(gate, up, j.plus.p + t * j.plus.stride + i, F, F - i);
#pragma unroll
    for (int k = 0; k < 4; k++)
        gate[k] = activate(j.gelu, gate[k]) * up[k];
    if (j.narrow != nullptr)
        store_four<__nv_bfloat16, QUADS>(j.narrow + t * static_cast<size_t>(F) + i, gate, F - i);
    else
        store_four<QUADS>(j.out.p + t * j.out.stride + i, gate, F - i);
}

cudaError_t pl_cuda_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat gu, const float *bias, struct pl_cuda_mat plus,
                        const bool *plus_rows, void *narrow)
{
    const glu_job j = {out, gu, plus, bias, plus_rows, gelu, static_cast<__nv_bfloat16 *>(narrow)};
    const dim3 grid(out.rows, pieces(out.cols, 4 * ACT_THREADS));
    if (in_fours(out) && in_fours(gu) && in_fours(bias) && (plus.p == nullptr || in_fours(plus)))
        LAUNCH((glu_kernel<true>), grid, ACT_THREADS, 0, s, j);
    else
        LAUNCH((glu_kernel<false>), grid, ACT_THREADS, 0, s, j);
    return cudaGetLastError();
}

/* ---- gather ------------------------------------------------------------------------------------------------------------------ */

static __global__ void gather_kernel(pl_cuda_mat out, pl_cuda_mat x, const uint32_t *rows)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ACT_THREADS + threadIdx.x;
    if (i < out.cols)
        out.p[blockIdx.x * out.stride + i] = x.p[rows[blockIdx.x] * x.stride + i];
}

cudaError_t pl_cuda_gather(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows)
{
    LAUNCH(gather_kernel, dim3(out.rows, pieces(out.cols, ACT_THREADS)), ACT_THREADS, 0, s, out, x, rows);
    return cudaGetLastError();
}
