/* train_attn: causal attention over packed sequences and its backward, tile by tile, with the logarithm of each row's sum of
 * exponentials in place of the weights.
 *
 * A block computes for a tile of 64 queries of a head (out, dq) or a tile of 64 keys of a key/value head (dk, dv). It holds what it
 * computes in registers: 16 × 16 threads, each with rows r, r + 16, … and columns c, c + 16, … of every 64 × 64 piece. The other side comes
 * by tiles, in order, so that every sum has one order. The head's dimensions are gone through 64 at a time.
 *
 *            keys →  0 … 63   64 … 127            s = q · kᵀ, dp = dout · vᵀ      64 queries × 64 keys
 *     queries  0 … 63 [ ◣ ]                       p = exp(scale s - lse)
 *       ↓    64 … 127 [ ■ ]    [ ◣ ]              ds = scale p (dp - dout · out)
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"
#include "cuda/train_kernels.h"

enum { TILE = 64, SIDE = 16, EACH = TILE / SIDE, LINE = TILE + 1, THREADS = SIDE * SIDE, SHARED_BYTES = 3 * TILE * LINE * sizeof(float) };

struct job {
    pl_cuda_mat out, lse, qkv, dqkv, dout, along; /* along[T, H]: dout · out */
    uint32_t D, H, G, n_seqs;
    float scale;
    const uint32_t *start;
};

/* Rows from, … of one sequence. */
struct tile {
    uint32_t start, len, from, n;
};

static __device__ tile tile_of(const job &j, uint32_t number)
{
    for (uint32_t s = 0; s < j.n_seqs; s++) {
        const uint32_t len = j.start[s + 1] - j.start[s], n = (len + TILE - 1) / TILE, from = number * TILE;
        if (number < n)
            return tile{j.start[s], len, from, min(len - from, static_cast<uint32_t>(TILE))};
        number -= n;
    }
    return tile{0, 0, 0, 0};
}

struct piece {
    float v[EACH][EACH]; /* [i][k]: row row() + SIDE i, column col() + SIDE k */
};

static __device__ __forceinline__ uint32_t row()
{
    return threadIdx.x / SIDE;
}

static __device__ __forceinline__ uint32_t col()
{
    return threadIdx.x % SIDE;
}

static __device__ __forceinline__ piece zeros()
{
    piece p;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int k = 0; k < EACH; k++)
            p.v[i][k] = 0;
    return p;
}

/* 64 rows of a head from column `from` on; what is not there is zero. Before and after it threads have to meet. */
static __device__ void load(float *to, const pl_cuda_mat &m, uint32_t first, uint32_t n, uint32_t head, uint32_t D, uint32_t from)
{
    const uint32_t cols = min(D - from, static_cast<uint32_t>(TILE));
    for (uint32_t i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const uint32_t r = i / TILE, c = i % TILE;
        to[r * LINE + c] = r < n && c < cols ? m.p[(first + r) * m.stride + static_cast<size_t>(head) * D + from + c] : 0;
    }
}

/* p += a · b over n terms; a and b lie in shared memory, turned: as their transposes */
template <bool TURNED_A, bool TURNED_B> static __device__ __forceinline__ void multiply(piece &p, const float *a, const float *b, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        float x[EACH], y[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t r = row() + SIDE * i, c = col() + SIDE * i;
            x[i] = TURNED_A ? a[k * LINE + r] : a[r * LINE + k];
            y[i] = TURNED_B ? b[c * LINE + k] : b[k * LINE + c];
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int m = 0; m < EACH; m++)
                p.v[i][m] = fmaf(x[i], y[m], p.v[i][m]);
    }
}

/* The products of all of a tile's rows of x with all of another's rows of y: each a head of a matrix. */
struct rows {
    const pl_cuda_mat &m;
    uint32_t first, n, head;
};

static __device__ __forceinline__ piece products(const rows &x, const rows &y, uint32_t D, float *a, float *b)
{
    piece p = zeros();
    for (uint32_t from = 0; from < D; from += TILE) {
        __syncthreads();
        load(a, x.m, x.first, x.n, x.head, D, from);
        load(b, y.m, y.first, y.n, y.head, D, from);
        __syncthreads();
        multiply<false, true>(p, a, b, min(D - from, static_cast<uint32_t>(TILE)));
    }
    return p;
}

/* sums[c] += p · (columns 64 c, … of y), p in shared memory; turned: pᵀ */
template <int CHUNKS, bool TURNED> static __device__ __forceinline__ void accumulate(piece *sums, const float *p, const rows &y, uint32_t D, float *b)
{
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        __syncthreads();
        load(b, y.m, y.first, y.n, y.head, D, c * TILE);
        __syncthreads();
        multiply<TURNED, false>(sums[c], p, b, y.n);
    }
}

static __device__ __forceinline__ void keep(float *to, const piece &p)
{
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int k = 0; k < EACH; k++)
            to[(row() + SIDE * i) * LINE + col() + SIDE * k] = p.v[i][k];
}

template <int CHUNKS> static __device__ void store(const piece *sums, const pl_cuda_mat &m, uint32_t first, uint32_t n, uint32_t head, uint32_t D)
{
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const uint32_t r = row() + SIDE * i, d = c * TILE + col() + SIDE * k;
                if (r < n && d < D)
                    m.p[(first + r) * m.stride + static_cast<size_t>(head) * D + d] = sums[c].v[i][k];
            }
}

/* Over the 16 threads that hold a row; every one gets it. */
template <class OP> static __device__ __forceinline__ float across(float v, OP op)
{
#pragma unroll
    for (int by = SIDE / 2; by > 0; by /= 2)
        v = op(v, __shfl_xor_sync(ALL_LANES, v, by, SIDE));
    return v;
}

/* ---- forward: a block for 64 queries of a head ---------------------------------------------------------------------------- */

/* The running maximum and sum of each of a thread's rows. */
struct running {
    float max[EACH], sum[EACH];
};

/* Weights of a tile of keys from its scores; what was summed so far is scaled to the new maximum. */
template <int CHUNKS> static __device__ __forceinline__ void weigh(piece &s, running &at, piece *sums, const job &j, const tile &q, uint32_t keys)
{
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t query = q.from + row() + SIDE * i;
        float most = -INFINITY, sum = 0;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            s.v[i][k] = keys + col() + SIDE * k <= query ? s.v[i][k] * j.scale : -INFINITY;
            most = fmaxf(most, s.v[i][k]);
        }
        most = fmaxf(at.max[i], across(most, [](float a, float b) { return fmaxf(a, b); }));
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            s.v[i][k] = expf(s.v[i][k] - most);
            sum += s.v[i][k];
        }
        const float before = expf(at.max[i] - most);
        at.sum[i] = at.sum[i] * before + across(sum, [](float a, float b) { return a + b; });
        at.max[i] = most;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int k = 0; k < EACH; k++)
                sums[c].v[i][k] *= before;
    }
}

template <int CHUNKS> static __global__ void __launch_bounds__(THREADS) forward(job j)
{
    wait_for_earlier();
    SHARED_DYNAMIC(float, shared);
    float *const a = shared, *const b = a + TILE * LINE, *const p = b + TILE * LINE;
    const tile q = tile_of(j, blockIdx.x);
    const uint32_t h = blockIdx.y, g = h / (j.H / j.G), first = q.start + q.from;
    running at;
    piece sums[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        sums[c] = zeros();
#pragma unroll
    for (int i = 0; i < EACH; i++)
        at.max[i] = -INFINITY, at.sum[i] = 0;
    for (uint32_t keys = 0; keys < q.from + q.n; keys += TILE) {
        const uint32_t n = min(q.from + q.n - keys, static_cast<uint32_t>(TILE));
        piece s = products({j.qkv, first, q.n, h}, {j.qkv, q.start + keys, n, j.H + g}, j.D, a, b);
        weigh<CHUNKS>(s, at, sums, j, q, keys);
        keep(p, s); /* its last readers have met since */
        accumulate<CHUNKS, false>(sums, p, {j.qkv, q.start + keys, n, j.H + j.G + g}, j.D, b);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t r = row() + SIDE * i;
        if (col() == 0 && r < q.n)
            j.lse.p[(first + r) * j.lse.stride + h] = at.max[i] + logf(at.sum[i]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int k = 0; k < EACH; k++)
                sums[c].v[i][k] /= at.sum[i];
    }
    store<CHUNKS>(sums, j.out, first, q.n, h, j.D);
}

/* ---- backward -------------------------------------------------------------------------------------------------------------- */

enum { ALONG_WARPS = 8 };

/* along: a warp for each row of a head */
static __global__ void along_kernel(job j)
{
    wait_for_earlier();
    const uint32_t t = blockIdx.x, h = blockIdx.y * ALONG_WARPS + threadIdx.x / WARP;
    float sum = 0;
    for (uint32_t d = threadIdx.x % WARP; h < j.H && d < j.D; d += WARP)
        sum = fmaf(j.dout.p[t * j.dout.stride + h * j.D + d], j.out.p[t * j.out.stride + h * j.D + d], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0 && h < j.H)
        j.along.p[t * j.along.stride + h] = sum;
}

/* Weights and gradients of scores of a tile of queries by a tile of keys. */
static __device__ __forceinline__ void score_gradients(piece &p, piece &ds, const job &j, const tile &q, uint32_t keys, uint32_t h)
{
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t r = row() + SIDE * i, t = q.start + q.from + r;
        const bool there = r < q.n;
        const float lse = there ? j.lse.p[t * j.lse.stride + h] : 0, along = there ? j.along.p[t * j.along.stride + h] : 0;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            p.v[i][k] = there && keys + col() + SIDE * k <= q.from + r ? expf(p.v[i][k] * j.scale - lse) : 0;
            ds.v[i][k] = j.scale * p.v[i][k] * (ds.v[i][k] - along);
        }
    }
}

/* dq: a block for 64 queries of a head */
template <int CHUNKS> static __global__ void __launch_bounds__(THREADS) backward_queries(job j)
{
    wait_for_earlier();
    SHARED_DYNAMIC(float, shared);
    float *const a = shared, *const b = a + TILE * LINE, *const p = b + TILE * LINE;
    const tile q = tile_of(j, blockIdx.x);
    const uint32_t h = blockIdx.y, g = h / (j.H / j.G), first = q.start + q.from;
    piece dq[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        dq[c] = zeros();
    for (uint32_t keys = 0; keys < q.from + q.n; keys += TILE) {
        const uint32_t n = min(q.from + q.n - keys, static_cast<uint32_t>(TILE));
        piece weights = products({j.qkv, first, q.n, h}, {j.qkv, q.start + keys, n, j.H + g}, j.D, a, b);
        piece ds = products({j.dout, first, q.n, h}, {j.qkv, q.start + keys, n, j.H + j.G + g}, j.D, a, b);
        score_gradients(weights, ds, j, q, keys, h);
        keep(p, ds);
        accumulate<CHUNKS, false>(dq, p, {j.qkv, q.start + keys, n, j.H + g}, j.D, b);
    }
    store<CHUNKS>(dq, j.dqkv, first, q.n, h, j.D);
}

/* dk and dv: a block for 64 keys of a key/value head; the heads that read it one after the other */
template <int CHUNKS> static __global__ void __launch_bounds__(THREADS) backward_keys(job j)
{
    wait_for_earlier();
    SHARED_DYNAMIC(float, shared);
    float *const a = shared, *const b = a + TILE * LINE, *const p = b + TILE * LINE;
    const tile k = tile_of(j, blockIdx.x);
    const uint32_t g = blockIdx.y, per = j.H / j.G, first = k.start + k.from;
    piece dk[CHUNKS], dv[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        dk[c] = dv[c] = zeros();
    for (uint32_t h = g * per; h < (g + 1) * per; h++)
        for (uint32_t from = k.from; from < k.len; from += TILE) {
            const tile q = {k.start, k.len, from, min(k.len - from, static_cast<uint32_t>(TILE))};
            piece weights = products({j.qkv, q.start + from, q.n, h}, {j.qkv, first, k.n, j.H + g}, j.D, a, b);
            piece ds = products({j.dout, q.start + from, q.n, h}, {j.qkv, first, k.n, j.H + j.G + g}, j.D, a, b);
            score_gradients(weights, ds, j, q, k.from, h);
            keep(p, weights);
            accumulate<CHUNKS, true>(dv, p, {j.dout, q.start + from, q.n, h}, j.D, b);
            __syncthreads();
            keep(p, ds);
            accumulate<CHUNKS, true>(dk, p, {j.qkv, q.start + from, q.n, h}, j.D, b);
        }
    store<CHUNKS>(dk, j.dqkv, first, k.n, j.H + g, j.D);
    store<CHUNKS>(dv, j.dqkv, first, k.n, j.H + j.G + g, j.D);
}

/* ---- launching -------------------------------------------------------------------------------------------------------------- */

template <int CHUNKS> static cudaError_t run(cudaStream_t s, const job &j, uint32_t n_tiles, bool back)
{
    void (*const kernels[])(job) = {forward<CHUNKS>, backward_queries<CHUNKS>, backward_keys<CHUNKS>};
    for (int i = back ? 1 : 0; i < (back ? 3 : 1); i++) {
        void (*const kernel)(job) = kernels[i];
        const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
        if (e != cudaSuccess)
            return e;
        LAUNCH(kernel, dim3(n_tiles, i == 2 ? j.G : j.H), THREADS, SHARED_BYTES, s, j);
    }
    return cudaGetLastError();
}

static cudaError_t run_any(cudaStream_t s, const job &j, uint32_t n_tiles, bool back)
{
    switch (pieces(j.D, TILE)) {
    case 1:
        return run<1>(s, j, n_tiles, back);
    case 2:
        return run<2>(s, j, n_tiles, back);
    case 3:
        return run<3>(s, j, n_tiles, back);
    case 4:
        return run<4>(s, j, n_tiles, back);
    default:
        return cudaErrorInvalidValue;
    }
}

uint32_t pl_cuda_causal_tiles(const uint32_t *start, uint32_t n_seqs)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < n_seqs; s++)
        n += pieces(start[s + 1] - start[s], TILE);
    return n;
}

cudaError_t pl_cuda_causal(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat lse, struct pl_cuda_mat qkv, uint32_t head_dim, float scale,
                           const uint32_t *start, uint32_t n_seqs, uint32_t n_tiles)
{
    job j = {};
    j.out = out, j.lse = lse, j.qkv = qkv, j.D = head_dim, j.H = lse.cols, j.G = (qkv.cols / head_dim - lse.cols) / 2;
    j.scale = scale, j.start = start, j.n_seqs = n_seqs;
    return run_any(s, j, n_tiles, false);
}

cudaError_t pl_cuda_causal_d(cudaStream_t s, struct pl_cuda_mat dqkv, struct pl_cuda_mat dout, struct pl_cuda_mat out, struct pl_cuda_mat lse,
                             struct pl_cuda_mat qkv, uint32_t head_dim, float scale, const uint32_t *start, uint32_t n_seqs, uint32_t n_tiles, float *along)
{
    job j = {};
    j.out = out, j.lse = lse, j.qkv = qkv, j.dqkv = dqkv, j.dout = dout, j.D = head_dim, j.H = lse.cols, j.G = (qkv.cols / head_dim - lse.cols) / 2;
    j.scale = scale, j.start = start, j.n_seqs = n_seqs;
    j.along = pl_cuda_mat{along, lse.rows, lse.cols, lse.cols};
    LAUNCH(along_kernel, dim3(lse.rows, pieces(j.H, ALONG_WARPS)), ALONG_WARPS * WARP, 0, s, j);
    return run_any(s, j, n_tiles, true);
}
