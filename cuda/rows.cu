/* rows: kernels that work row by row: norms, rotations, activations, gathering.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/activate.h"

enum { NORM_THREADS = 256, ROPE_THREADS = 128, ACT_THREADS = 256 };

/* ---- norm: a block for a row --------------------------------------------------------------------------------------------- */

static __global__ void norm_kernel(bool layer, pl_cuda_mat out, pl_cuda_mat x, const float *gain, const float *bias, float eps)
{
    SHARED float sums[2][WARP];
    const float *in = x.p + blockIdx.x * x.stride;
    float *to = out.p + blockIdx.x * out.stride;
    float sum = 0, squares = 0, mean = 0;
    if (layer) {
        for (uint32_t i = threadIdx.x; i < x.cols; i += NORM_THREADS)
            sum += in[i];
        mean = block_sum(sum, sums[0]) / static_cast<float>(x.cols);
    }
    for (uint32_t i = threadIdx.x; i < x.cols; i += NORM_THREADS) {
        const float d = in[i] - mean;
        squares = fmaf(d, d, squares);
    }
    const float scale = 1 / sqrtf(block_sum(squares, sums[1]) / static_cast<float>(x.cols) + eps);
    for (uint32_t i = threadIdx.x; i < x.cols; i += NORM_THREADS) {
        const float v = (in[i] - mean) * scale * gain[i];
        to[i] = bias != nullptr ? v + bias[i] : v;
    }
}

cudaError_t pl_cuda_norm(cudaStream_t s, bool layer, struct pl_cuda_mat out, struct pl_cuda_mat x, const float *gain, const float *bias, float eps)
{
    LAUNCH(norm_kernel, x.rows, NORM_THREADS, 0, s, layer, out, x, gain, bias, eps);
    return cudaGetLastError();
}

/* ---- rope: a block for a row --------------------------------------------------------------------------------------------- */

static __global__ void rope_kernel(bool halves, pl_cuda_mat x, uint32_t head_dim, uint32_t n_dims, const float *freq, const uint32_t *pos)
{
    SHARED_DYNAMIC(float, cosines); /* n_dims / 2, then as many sines */
    const uint32_t n = n_dims / 2, pairs = x.cols / head_dim * n;
    float *const sines = cosines + n, *const row = x.p + blockIdx.x * x.stride;
    const float at = static_cast<float>(pos[blockIdx.x]);
    for (uint32_t i = threadIdx.x; i < n; i += ROPE_THREADS)
        sincosf(at * freq[i], &sines[i], &cosines[i]);
    __syncthreads();
    for (uint32_t k = threadIdx.x; k < pairs; k += ROPE_THREADS) {
        const uint32_t i = k % n;
        float *const head = row + k / n * head_dim, *const a = halves ? head + i : head + 2 * i, *const b = halves ? a + n : a + 1;
        const float va = *a, vb = *b;
        *a = fmaf(va, cosines[i], -__fmul_rn(vb, sines[i]));
        *b = fmaf(va, sines[i], __fmul_rn(vb, cosines[i]));
    }
}

cudaError_t pl_cuda_rope(cudaStream_t s, bool halves, struct pl_cuda_mat x, uint32_t head_dim, uint32_t n_dims, const float *freq, const uint32_t *pos)
{
    LAUNCH(rope_kernel, x.rows, ROPE_THREADS, n_dims * sizeof(float), s, halves, x, head_dim, n_dims, freq, pos);
    return cudaGetLastError();
}

/* ---- activations: threads side by side over the columns --------------------------------------------------------------------- */

static __global__ void act_kernel(bool gelu, pl_cuda_mat x)
{
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

static __global__ void glu_kernel(bool gelu, pl_cuda_mat out, pl_cuda_mat gu, const float *bias, pl_cuda_mat plus, const bool *plus_rows)
{
    const uint32_t i = blockIdx.y * ACT_THREADS + threadIdx.x, t = blockIdx.x, F = out.cols;
    if (i >= F)
        return;
    float gate = gu.p[t * gu.stride + i], up = gu.p[t * gu.stride + F + i];
    if (bias != nullptr) {
        gate += bias[i];
        up += bias[F + i];
    }
    if (plus.p != nullptr && plus_rows[t]) {
        gate += plus.p[t * plus.stride + i];
        up += plus.p[t * plus.stride + F + i];
    }
    out.p[t * out.stride + i] = activate(gelu, gate) * up;
}

cudaError_t pl_cuda_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat gu, const float *bias, struct pl_cuda_mat plus,
                        const bool *plus_rows)
{
    LAUNCH(glu_kernel, dim3(out.rows, pieces(out.cols, ACT_THREADS)), ACT_THREADS, 0, s, gelu, out, gu, bias, plus, plus_rows);
    return cudaGetLastError();
}

/* ---- gather ------------------------------------------------------------------------------------------------------------------ */

static __global__ void gather_kernel(pl_cuda_mat out, pl_cuda_mat x, const uint32_t *rows)
{
    const uint32_t i = blockIdx.y * ACT_THREADS + threadIdx.x;
    if (i < out.cols)
        out.p[blockIdx.x * out.stride + i] = x.p[rows[blockIdx.x] * x.stride + i];
}

cudaError_t pl_cuda_gather(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows)
{
    LAUNCH(gather_kernel, dim3(out.rows, pieces(out.cols, ACT_THREADS)), ACT_THREADS, 0, s, out, x, rows);
    return cudaGetLastError();
}
