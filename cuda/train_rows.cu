/* train_rows: the operations of training that work row by row, with their backward. Sums over rows are made in pieces of a fixed
 * number of rows, then over the pieces in order.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/activate.h"
#include "cuda/train_kernels.h"

enum { ROW_THREADS = 256, PIECE = PL_CUDA_NORM_PIECE };

static __device__ __forceinline__ float *row_of(const pl_cuda_mat &m, uint32_t row)
{
    return m.p + row * m.stride;
}

/* ---- norms ----------------------------------------------------------------------------------------------------------------- */

/* With x̂ = (x - mean) r and d = gain dy:  dx = r (d - mean(d) - x̂ mean(d x̂)); RMS has no mean(d). stats: mean and r of each row. */
static __global__ void norm_d_kernel(bool layer, pl_cuda_mat dx, pl_cuda_mat dy, pl_cuda_mat x, const float *gain, float eps, bool add, float2 *stats)
{
    wait_for_earlier();
    SHARED float sums[4][WARP];
    const float *in = row_of(x, blockIdx.x), *d_out = row_of(dy, blockIdx.x), n = static_cast<float>(x.cols);
    float *to = row_of(dx, blockIdx.x), sum = 0, squares = 0, mean = 0, d_sum = 0, d_along = 0;
    if (layer) {
        for (uint32_t i = threadIdx.x; i < x.cols; i += ROW_THREADS)
            sum += in[i];
        mean = block_sum(sum, sums[0]) / n;
    }
    for (uint32_t i = threadIdx.x; i < x.cols; i += ROW_THREADS) {
        const float d = in[i] - mean;
        squares = fmaf(d, d, squares);
    }
    const float r = 1 / sqrtf(block_sum(squares, sums[1]) / n + eps);
    for (uint32_t i = threadIdx.x; i < x.cols; i += ROW_THREADS) {
        const float d = gain[i] * d_out[i];
        d_sum += d;
        d_along = fmaf(d, (in[i] - mean) * r, d_along);
    }
    const float along = block_sum(d_along, sums[2]) / n, level = layer ? block_sum(d_sum, sums[3]) / n : 0;
    for (uint32_t i = threadIdx.x; i < x.cols; i += ROW_THREADS) {
        const float d = r * (gain[i] * d_out[i] - level - (in[i] - mean) * r * along);
        to[i] = add ? to[i] + d : d;
    }
    if (threadIdx.x == 0)
        stats[blockIdx.x] = make_float2(mean, r);
}

/* A thread's column of one piece of rows: parts[piece][0][C] of the gain, parts[piece][1][C] of the bias */
static __global__ void norm_parts_kernel(pl_cuda_mat dy, pl_cuda_mat x, const float2 *stats, float *parts)
{
    wait_for_earlier();
    const uint32_t c = blockIdx.y * ROW_THREADS + threadIdx.x, from = blockIdx.x * PIECE, end = min(from + PIECE, x.rows);
    float gain = 0, bias = 0;
    if (c >= x.cols)
        return;
    for (uint32_t t = from; t < end; t++) {
        const float d = row_of(dy, t)[c];
        gain = fmaf(d, (row_of(x, t)[c] - stats[t].x) * stats[t].y, gain);
        bias += d;
    }
    float *const to = parts + static_cast<size_t>(blockIdx.x) * 2 * x.cols + c;
    to[0] = gain;
    to[x.cols] = bias;
}

static __global__ void norm_total_kernel(uint32_t n_pieces, uint32_t n_cols, const float *parts, float *dgain, float *dbias)
{
    wait_for_earlier();
    const uint32_t c = blockIdx.x * ROW_THREADS + threadIdx.x;
    float gain = 0, bias = 0;
    if (c >= n_cols)
        return;
    for (uint32_t i = 0; i < n_pieces; i++) {
        gain += parts[static_cast<size_t>(i) * 2 * n_cols + c];
        bias += parts[(static_cast<size_t>(i) * 2 + 1) * n_cols + c];
    }
    if (dgain != nullptr)
        dgain[c] += gain;
    if (dbias != nullptr)
        dbias[c] += bias;
}

size_t pl_cuda_norm_d_floats(uint32_t rows, uint32_t cols)
{
    return 2 * static_cast<size_t>(rows) + 2 * static_cast<size_t>(pieces(rows, PIECE)) * cols;
}

cudaError_t pl_cuda_norm_d(cudaStream_t s, bool layer, struct pl_cuda_mat dx, float *dgain, float *dbias, struct pl_cuda_mat dy, struct pl_cuda_mat x,
                           const float *gain, float eps, bool add, float *work)
{
    float2 *const stats = reinterpret_cast<float2 *>(work);
    float *const parts = work + 2 * static_cast<size_t>(x.rows);
    const unsigned n_pieces = pieces(x.rows, PIECE), wide = pieces(x.cols, ROW_THREADS);
    LAUNCH(norm_d_kernel, x.rows, ROW_THREADS, 0, s, layer, dx, dy, x, gain, eps, add, stats);
    if (dgain == nullptr && dbias == nullptr)
        return cudaGetLastError();
    LAUNCH(norm_parts_kernel, dim3(n_pieces, wide), ROW_THREADS, 0, s, dy, x, stats, parts);
    LAUNCH(norm_total_kernel, wide, ROW_THREADS, 0, s, n_pieces, x.cols, parts, dgain, dbias);
    return cudaGetLastError();
}

/* ---- rotations --------------------------------------------------------------------------------------------------------------- */

static __global__ void rope_table_kernel(pl_cuda_mat table, const float *freq, const uint32_t *pos)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x, n = table.cols / 2;
    float *const to = row_of(table, blockIdx.x);
    if (i < n)
        sincosf(static_cast<float>(pos[blockIdx.x]) * freq[i], &to[n + i], &to[i]);
}

cudaError_t pl_cuda_rope_table(cudaStream_t s, struct pl_cuda_mat table, const float *freq, const uint32_t *pos)
{
    LAUNCH(rope_table_kernel, dim3(table.rows, pieces(table.cols / 2, ROW_THREADS)), ROW_THREADS, 0, s, table, freq, pos);
    return cudaGetLastError();
}

static __global__ void rotate_kernel(bool halves, pl_cuda_mat x, uint32_t head_dim, pl_cuda_mat table, float sign)
{
    wait_for_earlier();
    const uint32_t k = blockIdx.y * ROW_THREADS + threadIdx.x, n = table.cols / 2, i = k % n;
    if (k / n >= x.cols / head_dim)
        return;
    const float *const cosines = row_of(table, blockIdx.x), sine = sign * cosines[n + i];
    float *const head = row_of(x, blockIdx.x) + k / n * head_dim, *const a = halves ? head + i : head + 2 * i, *const b = halves ? a + n : a + 1;
    const float va = *a, vb = *b;
    *a = fmaf(va, cosines[i], -__fmul_rn(vb, sine));
    *b = fmaf(va, sine, __fmul_rn(vb, cosines[i]));
}

cudaError_t pl_cuda_rotate(cudaStream_t s, bool halves, struct pl_cuda_mat x, uint32_t head_dim, struct pl_cuda_mat table, bool inverse)
{
    const size_t pairs = static_cast<size_t>(x.cols / head_dim) * (table.cols / 2);
    LAUNCH(rotate_kernel, dim3(x.rows, pieces(pairs, ROW_THREADS)), ROW_THREADS, 0, s, halves, x, head_dim, table, inverse ? -1.f : 1.f);
    return cudaGetLastError();
}

/* ---- activations --------------------------------------------------------------------------------------------------------------- */

/* Both are x σ(u): SiLU with u = x; GELU's tanh form with u = 2 √(2/π) (x + 0.044715 x³). What σ(u) and the derivative by x are: */
static __device__ __forceinline__ float2 slope_of(bool gelu, float x)
{
    const float u = gelu ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x, du = gelu ? 1.5957691216057308f * (1 + 0.134145f * x * x) : 1;
    const float share = 1 / (1 + expf(-u));
    return make_float2(share, share + x * share * (1 - share) * du);
}

static __global__ void act_kernel(bool gelu, pl_cuda_mat out, pl_cuda_mat x)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i < x.cols)
        row_of(out, blockIdx.x)[i] = activate(gelu, row_of(x, blockIdx.x)[i]);
}

static __global__ void act_d_kernel(bool gelu, pl_cuda_mat dx, pl_cuda_mat dout, pl_cuda_mat x)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i < x.cols)
        row_of(dx, blockIdx.x)[i] = row_of(dout, blockIdx.x)[i] * slope_of(gelu, row_of(x, blockIdx.x)[i]).y;
}

static __global__ void glu_d_kernel(bool gelu, pl_cuda_mat dx, pl_cuda_mat dout, pl_cuda_mat x)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x, F = dout.cols;
    if (i >= F)
        return;
    const float d = row_of(dout, blockIdx.x)[i], gate = row_of(x, blockIdx.x)[i], up = row_of(x, blockIdx.x)[F + i];
    const float2 slope = slope_of(gelu, gate);
    row_of(dx, blockIdx.x)[i] = d * up * slope.y;
    row_of(dx, blockIdx.x)[F + i] = d * gate * slope.x;
}

static dim3 by_value(const pl_cuda_mat &m)
{
    return dim3(m.rows, pieces(m.cols, ROW_THREADS));
}

cudaError_t pl_cuda_act(cudaStream_t s, bool gelu, struct pl_cuda_mat out, struct pl_cuda_mat x)
{
    LAUNCH(act_kernel, by_value(x), ROW_THREADS, 0, s, gelu, out, x);
    return cudaGetLastError();
}

cudaError_t pl_cuda_act_d(cudaStream_t s, bool gelu, struct pl_cuda_mat dx, struct pl_cuda_mat dout, struct pl_cuda_mat x)
{
    LAUNCH(act_d_kernel, by_value(x), ROW_THREADS, 0, s, gelu, dx, dout, x);
    return cudaGetLastError();
}

cudaError_t pl_cuda_glu_d(cudaStream_t s, bool gelu, struct pl_cuda_mat dx, struct pl_cuda_mat dout, struct pl_cuda_mat x)
{
    LAUNCH(glu_d_kernel, by_value(dout), ROW_THREADS, 0, s, gelu, dx, dout, x);
    return cudaGetLastError();
}

/* ---- dropout ------------------------------------------------------------------------------------------------------------------- */

/* A value's own random number, as the CPU device makes it (the finalizer of SplitMix64). */
static __device__ __forceinline__ uint32_t random_of(uint64_t key, uint64_t at)
{
    uint64_t z = key + at * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
}

static __global__ void dropout_kernel(pl_cuda_mat out, pl_cuda_mat x, uint32_t bound, float keep, uint64_t key, bool add)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i >= x.cols)
        return;
    float *const to = row_of(out, blockIdx.x) + i;
    const bool drops = random_of(key, static_cast<uint64_t>(blockIdx.x) * x.cols + i) < bound;
    const float v = drops ? 0 : __fmul_rn(row_of(x, blockIdx.x)[i], keep);
    *to = add ? __fadd_rn(*to, v) : v;
}

cudaError_t pl_cuda_dropout(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, float share, uint64_t key, bool add)
{
    const uint32_t bound = static_cast<uint32_t>(static_cast<double>(share) * 4294967296.0);
    LAUNCH(dropout_kernel, by_value(x), ROW_THREADS, 0, s, out, x, bound, 1 / (1 - share), key, add);
    return cudaGetLastError();
}

/* ---- gathering ------------------------------------------------------------------------------------------------------------------ */

static __global__ void clear_kernel(pl_cuda_mat out)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i < out.cols)
        row_of(out, blockIdx.x)[i] = 0;
}

static __global__ void scatter_kernel(pl_cuda_mat out, pl_cuda_mat x, const uint32_t *rows)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i < x.cols)
        row_of(out, rows[blockIdx.x])[i] = row_of(x, blockIdx.x)[i];
}

cudaError_t pl_cuda_scatter(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat x, const uint32_t *rows)
{
    LAUNCH(clear_kernel, by_value(out), ROW_THREADS, 0, s, out);
    if (x.rows > 0)
        LAUNCH(scatter_kernel, by_value(x), ROW_THREADS, 0, s, out, x, rows);
    return cudaGetLastError();
}
