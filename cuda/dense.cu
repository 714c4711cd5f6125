/* dense: products of f32, f16 and bf16 weights: a kernel that reads each weight once for up to 16 rows of x, and what goes
 * before and after cuBLAS.
 *
 * A lane takes its pieces of a weight's row in order, 16 bytes each, all lanes' sums are then added; that order is the same for
 * every number of tokens.
 *
 * With one row of x the bytes of the weight are all that costs: what an SM has under way has to cover the memory's latency (some
 * 32 KiB on an H100). A warp asks for `steps` pieces of each of its rows, 4 KiB in all, while it multiplies those before, and all parts of a
 * weight are one launch, so that small ones do not leave SMs idle.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/activate.h"
#include "cuda/four.h"
#include "cuda/parts.h"

enum { WARPS = 4, FINISH_THREADS = 256 };

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

/* ---- few rows of x ----------------------------------------------------------------------------------------------------------- */

struct few_job {
    pl_cuda_mat out, x, plus;
    pl_cuda_parts w; /* of one type */
    const float *bias;
    const bool *plus_rows;
    bool add, gelu;
};

/* Rows of the weight that a warp has, and how many pieces of each it asks for at once; T: rows of x */
template <int T> struct few_shape {
    static constexpr int rows = T == 1 ? 2 : 4, steps = T == 1 ? 4 : 1;
};

static __device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <class W> static __device__ __forceinline__ float half_value(uint32_t bits);
template <> __device__ __forceinline__ float half_value<__half>(uint32_t bits)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
template <> __device__ __forceinline__ float half_value<__nv_bfloat16>(uint32_t bits)
{
    return __uint_as_float(bits << 16);
}

/* N values of a row as they lie; N = 1, or 16 bytes' worth: they stay in four registers until they are wanted */
template <class W, int N> struct piece {
    uint4 raw;

    __device__ __forceinline__ void load(const uint8_t *row, uint32_t k)
    {
        if constexpr (N == 1)
            raw.x = __float_as_uint(value(weight_at(reinterpret_cast<const W *>(row) + k)));
        else
            raw = weight_once(reinterpret_cast<const uint4 *>(row) + k / N);
    }
    __device__ __forceinline__ float at(int i) const
    {
        if constexpr (N == 1 || sizeof(W) == 4)
            return __uint_as_float(word_of(raw, i));
        else
            return half_value<W>(i % 2 ? word_of(raw, i / 2) >> 16 : word_of(raw, i / 2) & 0xffff);
    }
};

/* N values of a row of x; ALIGNED: they start at a multiple of 16 bytes */
template <int N, bool ALIGNED> static __device__ __forceinline__ void load_x(const float *from, float *to)
{
    if constexpr (ALIGNED) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const float4 v = reinterpret_cast<const float4 *>(from)[i];
            to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            to[i] = from[i];
    }
}

/* A warp's pieces from element k on, as far as there are any: `steps` of each row */
template <class W, int N, int T> struct few_pieces {
    piece<W, N> w[few_shape<T>::steps][few_shape<T>::rows];

    __device__ __forceinline__ void load(const uint8_t *const *rows, uint32_t k, uint32_t cols)
    {
#pragma unroll
        for (int s = 0; s < few_shape<T>::steps; s++)
#pragma unroll
            for (int r = 0; r < few_shape<T>::rows; r++)
                if (k + s * WARP * N < cols)
                    w[s][r].load(rows[r], k + s * WARP * N);
    }
    /* Tokens from n on are the first again. */
    template <bool ALIGNED> __device__ __forceinline__ void multiply(float (*sum)[T], const pl_cuda_mat &x, uint32_t k, uint32_t cols, int n) const
    {
#pragma unroll
        for (int s = 0; s < few_shape<T>::steps; s++) {
            if (k + s * WARP * N >= cols)
                break;
#pragma unroll
            for (int t = 0; t < T; t++) {
                float in[N];
                load_x<N, ALIGNED>(x.p + (t < n ? t : 0) * x.stride + k + s * WARP * N, in);
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int r = 0; r < few_shape<T>::rows; r++)
                        sum[r][t] = fmaf(w[s][r].at(i), in[i], sum[r][t]);
            }
        }
    }
};

static __device__ __forceinline__ float gated(const few_job &j, uint32_t row, uint32_t t, float gate, float up)
{
    const uint32_t F = j.out.cols;
    if (j.bias != nullptr) {
        gate += j.bias[row];
        up += j.bias[F + row];
    }
    if (j.plus.p != nullptr && j.plus_rows[t]) {
        gate += j.plus.p[t * j.plus.stride + row];
        up += j.plus.p[t * j.plus.stride + F + row];
    }
    return activate(j.gelu, gate) * up;
}

/* GATED: a warp has as many rows of the first part, the gate, as of the second. */
template <class W, int N, int T, bool ALIGNED, bool GATED> static __global__ void __launch_bounds__(WARPS *WARP) few_kernel(few_job j)
{
    constexpr int ROWS = few_shape<T>::rows, STEPS = few_shape<T>::steps, OUTS = GATED ? ROWS / 2 : ROWS;
    uint32_t block, column;
    const pl_cuda_part w = part_of(j.w, GATED ? 1 : j.w.n, WARPS * OUTS, block, column);
    const uint32_t lane = threadIdx.x % WARP, first = (block * WARPS + threadIdx.x / WARP) * OUTS, token = blockIdx.y * T;
    const int n = static_cast<int>(min(j.x.rows - token, static_cast<uint32_t>(T)));
    const pl_cuda_mat x = {j.x.p + token * j.x.stride, j.x.rows, j.x.cols, j.x.stride};
    const uint8_t *rows[ROWS];
    float sum[ROWS][T] = {}; /* what is loaded in one round is multiplied in the next: the compiler would else load no earlier than it must */
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        rows[r] = (r >= OUTS ? j.w.part[1].data : w.data) + min(first + r % OUTS, w.rows - 1) * w.row_bytes;
    few_pieces<W, N, T> next;
    next.load(rows, lane * N, w.cols);
    wait_for_earlier(); /* weights are there */
    if (first >= w.rows)
        return;
#pragma unroll 1
    for (uint32_t k = lane * N; k < w.cols; k += STEPS * WARP * N) {
        const few_pieces<W, N, T> now = next;
        next.load(rows, k + STEPS * WARP * N, w.cols);
        now.template multiply<ALIGNED>(sum, x, k, w.cols, n);
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        if (t >= n)
            break;
        float total[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            total[r] = warp_sum(sum[r][t]);
#pragma unroll
        for (int r = 0; r < OUTS; r++) {
            float *const to = j.out.p + (token + t) * j.out.stride + column + first + r;
            if (lane != 0 || first + r >= w.rows)
                continue;
            if constexpr (GATED) {
                *to = gated(j, first + r, token + t, total[r], total[r + OUTS]);
            } else {
                const float v = j.bias != nullptr ? total[r] + j.bias[column + first + r] : total[r];
                *to = j.add ? *to + v : v;
            }
        }
    }
}

template <class W, int N, int T, bool ALIGNED, bool GATED> static void run_few(cudaStream_t s, const few_job &j)
{
    constexpr int per_block = WARPS * few_shape<T>::rows / (GATED ? 2 : 1);
    unsigned across = 0;
    for (uint32_t i = 0; i < (GATED ? 1u : j.w.n); i++)
        across += pieces(j.w.part[i].rows, per_block);
    LAUNCH((few_kernel<W, N, T, ALIGNED, GATED>), dim3(across, pieces(j.x.rows, T)), WARPS * WARP, 0, s, j);
}

/* Rows that start at multiples of 16 bytes are read in such pieces. The order of sums follows from the weight alone; where x does
 * not lie so well, which is rare, speed does not count. */
template <class W, bool GATED> static void few_of(cudaStream_t s, const few_job &j)
{
    constexpr int N = 16 / sizeof(W);
    const bool aligned = reinterpret_cast<uintptr_t>(j.x.p) % 16 == 0 && (j.x.stride % 4 == 0 || j.x.rows == 1);
    if (j.w.part[0].row_bytes % 16 != 0)
        run_few<W, 1, PL_CUDA_FEW, false, GATED>(s, j);
    else if (!aligned)
        run_few<W, N, PL_CUDA_FEW, false, GATED>(s, j);
    else if (j.x.rows == 1)
        run_few<W, N, 1, true, GATED>(s, j);
    else if (j.x.rows <= 4)
        run_few<W, N, 4, true, GATED>(s, j);
    else if (j.x.rows <= 8)
        run_few<W, N, 8, true, GATED>(s, j);
    else
        run_few<W, N, PL_CUDA_FEW, true, GATED>(s, j);
}

template <bool GATED> static cudaError_t few_type(cudaStream_t s, const few_job &j)
{
    if (j.w.part[0].dtype == PL_F16)
        few_of<__half, GATED>(s, j);
    else if (j.w.part[0].dtype == PL_BF16)
        few_of<__nv_bfloat16, GATED>(s, j);
    else
        few_of<float, GATED>(s, j);
    return cudaGetLastError();
}

cudaError_t pl_cuda_dense(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, const float *bias, bool add)
{
    few_job j = {};
    j.out = out, j.x = x, j.w = w, j.bias = bias, j.add = add;
    return few_type<false>(s, j);
}

cudaError_t pl_cuda_dense_glu(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat x, struct pl_cuda_parts w, const float *bias,
                              struct pl_cuda_mat plus, const bool *plus_rows)
{
    few_job j = {};
    j.out = out, j.x = x, j.w = w, j.bias = bias, j.plus = plus, j.plus_rows = plus_rows, j.gelu = gelu;
    return few_type<true>(s, j);
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

/* A block for a row */
template <class W, bool SCALED, bool QUADS> static __global__ void narrow_kernel(pl_cuda_mat x, W *to, float *scales)
{
    wait_for_earlier();
    SHARED float largest[WARP];
    const uint32_t t = blockIdx.x, lane = threadIdx.x % WARP;
    const float *const in = x.p + t * x.stride;
    float inverse = 1;
    if (SCALED) {
        float max = 0;
        for (uint32_t i = 4 * threadIdx.x; i < x.cols; i += 4 * FINISH_THREADS) {
            float v[4];
            load_four<QUADS>(v, in + i, x.cols - i);
            max = fmaxf(fmaxf(max, fmaxf(fabsf(v[0]), fabsf(v[1]))), fmaxf(fabsf(v[2]), fabsf(v[3])));
        }
        max = warp_max(max);
        if (lane == 0)
            largest[threadIdx.x / WARP] = max;
        __syncthreads();
        const float scale = scale_for(warp_max(lane < FINISH_THREADS / WARP ? largest[lane] : 0));
        if (threadIdx.x == 0)
            scales[t] = scale;
        inverse = 1 / scale;
    }
    for (uint32_t i = 4 * threadIdx.x; i < x.cols; i += 4 * FINISH_THREADS) {
        float v[4];
        load_four<QUADS>(v, in + i, x.cols - i);
#pragma unroll
        for (int k = 0; SCALED && k < 4; k++)
            v[k] *= inverse;
        store_four<W, QUADS>(to + static_cast<size_t>(t) * x.cols + i, v, x.cols - i);
    }
}

template <class W, bool SCALED> static void narrow(cudaStream_t s, pl_cuda_mat x, void *to, float *scale)
{
    if (in_fours(x))
        LAUNCH((narrow_kernel<W, SCALED, true>), x.rows, FINISH_THREADS, 0, s, x, static_cast<W *>(to), scale);
    else
        LAUNCH((narrow_kernel<W, SCALED, false>), x.rows, FINISH_THREADS, 0, s, x, static_cast<W *>(to), scale);
}

cudaError_t pl_cuda_narrow(cudaStream_t s, int dtype, struct pl_cuda_mat x, void *to, float *scale)
{
    if (dtype == PL_F16)
        narrow<__half, true>(s, x, to, scale);
    else
        narrow<__nv_bfloat16, false>(s, x, to, scale);
    return cudaGetLastError();
}

/* ---- and after ----------------------------------------------------------------------------------------------------------------- */

static __global__ void finish_kernel(pl_cuda_mat out, const float *y, const float *scale, const float *bias, bool add)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * FINISH_THREADS + threadIdx.x, t = blockIdx.x;
    if (i >= out.cols)
        return;
    const size_t at = static_cast<size_t>(t) * out.cols + i;
    float v = scale != nullptr ? y[at] * scale[t] : y[at];
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
