/* dense: products of f32, f16 and bf16 weights: a kernel that reads each weight once for up to 16 rows of x, and what goes
 * before and after cuBLAS.
 *
 * A warp has ROWS outputs of up to 16 rows of x. A lane takes its pieces of a weight's row in order, all lanes' sums are then added; that
 * order is the same for every number of tokens.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/launch.h"

enum { WARPS = 4, ROWS = 2, FINISH_THREADS = 256 };

static __device__ __forceinline__ float value(float v)
{
    return v;
}

static __device__ __forceinline__ float value(__half v)
{
    return __half2float(v);
}

static __device__ __forceinline__ float value(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}

/* N values of a row from element k on; N = 1 or 16 bytes' worth */
template <class W, int N> static __device__ __forceinline__ void load(const uint8_t *row, uint32_t k, float *out)
{
    if constexpr (N == 1) {
        out[0] = value(__ldg(reinterpret_cast<const W *>(row) + k));
    } else {
        const uint4 piece = __ldcs(reinterpret_cast<const uint4 *>(row) + k / N);
        W v[N];
        memcpy(v, &piece, sizeof v);
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = value(v[i]);
    }
}

template <class W, int N, int T>
static __global__ void few_kernel(pl_cuda_mat out, pl_cuda_mat x, pl_cuda_part w, const float *bias, bool add)
{
    const uint32_t lane = threadIdx.x % WARP, first = (blockIdx.x * WARPS + threadIdx.x / WARP) * ROWS, token = blockIdx.y * T;
    if (first >= w.rows)
        return;
    const int n = static_cast<int>(min(x.rows - token, static_cast<uint32_t>(T)));
    x.p += token * x.stride;
    out.p += token * out.stride;
    const uint8_t *rows[ROWS];
    float sum[ROWS][T] = {};
    for (int r = 0; r < ROWS; r++)
        rows[r] = w.data + (first + r < w.rows ? first + r : first) * w.row_bytes;
    for (uint32_t k = lane * N; k < w.cols; k += WARP * N) {
        float v[ROWS][N];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            load<W, N>(rows[r], k, v[r]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float *const in = x.p + (t < n ? t : 0) * x.stride + k;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float xi = __ldg(in + i);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    sum[r][t] = fmaf(v[r][i], xi, sum[r][t]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < T; t++) {
            float total = warp_sum(sum[r][t]);
            if (lane != 0 || t >= n || first + r >= w.rows)
                continue;
            float *const to = out.p + t * out.stride + first + r;
            total = bias != nullptr ? total + bias[first + r] : total;
            *to = add ? *to + total : total;
        }
}

template <class W, int N>
static void few_rows(cudaStream_t s, pl_cuda_mat out, pl_cuda_mat x, pl_cuda_part w, const float *bias, bool add)
{
    const unsigned across = pieces(w.rows, WARPS * ROWS), threads = WARPS * WARP;
    const dim3 grid(across, x.rows <= PL_CUDA_FEW ? 1 : pieces(x.rows, PL_CUDA_FEW));
    if (x.rows == 1)
        LAUNCH((few_kernel<W, N, 1>), grid, threads, 0, s, out, x, w, bias, add);
    else if (x.rows <= 4)
        LAUNCH((few_kernel<W, N, 4>), grid, threads, 0, s, out, x, w, bias, add);
    else if (x.rows <= 8)
        LAUNCH((few_kernel<W, N, 8>), grid, threads, 0, s, out, x, w, bias, add);
    else
        LAUNCH((few_kernel<W, N, PL_CUDA_FEW>), grid, threads, 0, s, out, x, w, bias, add);
}

/* Rows that start at multiples of 16 bytes are read in such pieces. */
template <class W> static void few_of(cudaStream_t s, pl_cuda_mat out, pl_cuda_mat x, pl_cuda_part w, const float *bias, bool add)
{
    if (w.row_bytes % 16 == 0)
        few_rows<W, 16 / sizeof(W)>(s, out, x, w, bias, add);
    else
        few_rows<W, 1>(s, out, x, w, bias, add);
}

cudaError_t pl_cuda_dense(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const struct pl_cuda_part *w, const float *bias, bool add)
{
    if (w->dtype == PL_F16)
        few_of<__half>(s, out, x, *w, bias, add);
    else if (w->dtype == PL_BF16)
        few_of<__nv_bfloat16>(s, out, x, *w, bias, add);
    else
        few_of<float>(s, out, x, *w, bias, add);
    return cudaGetLastError();
}

/* ---- before cuBLAS ----------------------------------------------------------------------------------------------------------- */

/* 2^14 at most, and 1 for what is no number: that stays so in its row. */
static __device__ __forceinline__ float scale_for(float most)
{
    int exponent = 0;
    if (!(most > 0) || isinf(most))
        return 1;
    frexpf(most, &exponent);
    return ldexpf(1, max(exponent, -100) - 14);
}

template <class W> static __device__ __forceinline__ W narrow(float v);
template <> __device__ __forceinline__ __half narrow<__half>(float v)
{
    return __float2half_rn(v);
}
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}

template <class W, bool SCALED> static __global__ void split_kernel(pl_cuda_mat x, W *halves, float *scales)
{
    SHARED float largest[WARP];
    const uint32_t t = blockIdx.x, lane = threadIdx.x % WARP;
    const float *const in = x.p + t * x.stride;
    W *const high = halves + static_cast<size_t>(t) * x.cols, *const low = high + static_cast<size_t>(x.rows) * x.cols;
    float max = 0, scale = 1;
    if (SCALED) {
        for (uint32_t i = threadIdx.x; i < x.cols; i += FINISH_THREADS)
            max = fmaxf(max, fabsf(in[i]));
        max = warp_max(max);
        if (lane == 0)
            largest[threadIdx.x / WARP] = max;
        __syncthreads();
        scale = scale_for(warp_max(lane < FINISH_THREADS / WARP ? largest[lane] : 0));
    }
    if (threadIdx.x == 0)
        scales[t] = scale;
    const float inverse = 1 / scale;
    for (uint32_t i = threadIdx.x; i < x.cols; i += FINISH_THREADS) {
        const float v = in[i] * inverse;
        high[i] = narrow<W>(v);
        low[i] = narrow<W>(v - value(high[i]));
    }
}

cudaError_t pl_cuda_split(cudaStream_t s, int dtype, struct pl_cuda_mat x, void *halves, float *scale)
{
    if (dtype == PL_F16)
        LAUNCH((split_kernel<__half, true>), x.rows, FINISH_THREADS, 0, s, x, static_cast<__half *>(halves), scale);
    else
        LAUNCH((split_kernel<__nv_bfloat16, false>), x.rows, FINISH_THREADS, 0, s, x, static_cast<__nv_bfloat16 *>(halves), scale);
    return cudaGetLastError();
}

/* ---- and after ----------------------------------------------------------------------------------------------------------------- */

static __global__ void finish_kernel(pl_cuda_mat out, const float *y, const float *scale, const float *bias, bool add)
{
    const uint32_t i = blockIdx.y * FINISH_THREADS + threadIdx.x, t = blockIdx.x;
    if (i >= out.cols)
        return;
    const size_t at = static_cast<size_t>(t) * out.cols + i;
    float v = (y[at] + y[at + static_cast<size_t>(out.rows) * out.cols]) * scale[t];
    if (bias != nullptr)
        v += bias[i];
    float *const to = out.p + t * out.stride + i;
    *to = add ? *to + v : v;
}

cudaError_t pl_cuda_finish(cudaStream_t s, struct pl_cuda_mat out, const float *y, const float *scale, const float *bias, bool add)
{
    LAUNCH(finish_kernel, dim3(out.rows, pieces(out.cols, FINISH_THREADS)), FINISH_THREADS, 0, s, out, y, scale, bias, add);
    return cudaGetLastError();
}
