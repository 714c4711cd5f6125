/* quant: products with packed weights of block types (pack.h). The rows of x are rounded to int8 once, as on the CPU; integers
 * are multiplied, their sums scaled and added as float.
 *
 * Few rows of x: bytes are the cost. A warp has eight rows of the weight, each lane a super of its own, and every byte is loaded
 * once, 512 in a row. Many: tiles of 128 × 64 results, the integers unpacked into shared memory and multiplied by tensor cores.
 * Both add in the order that pack.h lays down, so that a row gives the same bits with either.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/activate.h"
#include "cuda/blocks.h"
#include "cuda/mma.h"
#include "cuda/parts.h"

namespace {

struct product {
    pl_cuda_mat out, plus;
    pl_cuda_act x;
    pl_cuda_parts w; /* of one type; gated: gate and up, of one size */
    const float *bias;
    const bool *plus_rows;
    bool gated, gelu, add;
};

/* at: the column of bias and plus */
__device__ __forceinline__ float finish(const product &p, uint32_t at, uint32_t t, float sum)
{
    if (p.bias != nullptr)
        sum = __fadd_rn(sum, p.bias[at]);
    if (p.plus.p != nullptr && p.plus_rows[t])
        sum = __fadd_rn(sum, p.plus.p[t * p.plus.stride + at]);
    return sum;
}

__device__ __forceinline__ void write(const product &p, uint32_t column, uint32_t t, float sum, float second)
{
    float *to = p.out.p + t * p.out.stride + column;
    sum = finish(p, column, t, sum);
    if (p.gated)
        *to = __fmul_rn(activate(p.gelu, sum), finish(p, p.out.cols + column, t, second));
    else
        *to = p.add ? __fadd_rn(*to, sum) : sum;
}

/* ---- rounding x ---------------------------------------------------------------------------------------------------- */

constexpr float TINY = 0x1p-100f; /* a largest value up to this counts as zero: 127 / it would overflow */

/* A warp for 32 inputs */
__global__ void quant_rows(pl_cuda_mat x, pl_cuda_act to)
{
    wait_for_earlier();
    const unsigned lane = threadIdx.x % WARP, per_row = to.padded / 32;
    const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (i >= static_cast<size_t>(x.rows) * per_row)
        return;
    const uint32_t t = i / per_row, k = i % per_row * 32 + lane;
    const float v = k < x.cols ? x.p[t * x.stride + k] : 0.f;
    const bool finite = __all_sync(ALL_LANES, fabsf(v) <= 3.402823466e38f);
    const float max = warp_max(fabsf(v)), inverse = max > TINY ? __fdiv_rn(127.f, max) : 0.f;
    const float rounded = finite ? rintf(__fmul_rn(v, inverse)) : 0.f;
    const int q = static_cast<int>(fminf(fmaxf(rounded, -127.f), 127.f));
    int sum = q;
    for (int d = 1; d < 16; d *= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, d);
    to.q[t * static_cast<size_t>(to.padded) + k] = static_cast<int8_t>(q);
    pl_cuda_act_scale *scale = to.scale + i;
    if (lane % 16 == 0)
        scale->sum[lane / 16] = static_cast<int16_t>(sum);
    if (lane == 0)
        scale->d = finite ? __fdiv_rn(max, 127.f) : nanf("");
}

/* The scale and sums of 32 inputs of row t, as they lie */
struct act_block {
    float d;
    int sum[2];
};

__device__ __forceinline__ act_block act_at(const pl_cuda_act &x, uint32_t t, uint32_t block)
{
    const uint2 v = reinterpret_cast<const uint2 *>(x.scale)[t * static_cast<size_t>(x.padded / 32) + block];
    return {__uint_as_float(v.x), {static_cast<int16_t>(v.y & 0xffff), static_cast<int16_t>(v.y >> 16)}};
}

/* sum += 32 products: dot is of the integers as stored, its halves where the type has a scale for each 16 */
template <int TYPE>
__device__ __forceinline__ float add_block(float sum, const float *scale, const float *min, const int *dot, const act_block &x)
{
    using type = block_type<TYPE>;
#pragma unroll
    for (int h = 0; h < type::halves; h++) {
        const int total = type::halves == 1 ? x.sum[0] + x.sum[1] : x.sum[h];
        sum = fmaf(__fmul_rn(scale[h], x.d), static_cast<float>(dot[h] - type::offset * total), sum);
        if (type::has_min)
            sum = fmaf(__fmul_rn(min[h], x.d), static_cast<float>(total), sum);
    }
    return sum;
}

/* ---- few rows of x ------------------------------------------------------------------------------------------------- */

/* Warps of a block for each matrix: 4 / W groups of rows */
constexpr unsigned FEW_WARPS = 4;

/* sum[t] += a super of the weight times row t of x; rows from n on are the last one again. */
template <int TYPE, int N>
__device__ __forceinline__ void add_super(float *sum, const super_held<TYPE> &w, const pl_cuda_act &x, uint32_t super, uint32_t n)
{
    constexpr int halves = block_type<TYPE>::halves;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const sub_block<TYPE> b = read_sub<TYPE>(w, j);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t t = i < static_cast<int>(n) ? i : n - 1;
            const int4 *q = reinterpret_cast<const int4 *>(x.q + t * static_cast<size_t>(x.padded) + super * PL_PACK_SUPER) + 2 * j;
            const int4 low = q[0], high = q[1];
            const int xq[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            int dot[halves] = {};
#pragma unroll
            for (int k = 0; k < 8; k++)
                dot[k / 4 % halves] = __dp4a(b.q[k], xq[k], dot[k / 4 % halves]);
            sum[i] = add_block<TYPE>(sum[i], b.scale, b.min, dot, act_at(x, t, super * 8 + j));
        }
    }
}

/* Asks the L2 cache for a quad, 128 bytes a lane: needs no registers, so that the compiler has no reason to put it off. */
__device__ __forceinline__ void announce(const uint8_t *quad, unsigned bytes, unsigned lane)
{
#ifdef __CUDACC__
    for (unsigned at = lane * 128; at < bytes; at += WARP * 128)
        asm volatile("prefetch.L2 [%0];" ::"l"(quad + at));
#else
    (void)quad, (void)bytes, (void)lane;
#endif
}

/* An SM has at least two such blocks, of both matrices: where it could have more, the compiler saves registers by loading late. */
template <int TYPE, int N> __global__ void __launch_bounds__(2 * FEW_WARPS *WARP, 2) few(product p)
{
    wait_for_earlier();
    /* What is loaded in one round is multiplied in the next: the compiler would else load each piece where it is wanted. With more rows of x
     * arithmetic costs more than bytes, and warps help more than loads under way; and registers have an end. */
    constexpr bool AHEAD = N < PL_CUDA_QUANT_FEW && block_type<TYPE>::pieces <= (N == 1 ? 13 : 12);
    constexpr size_t BYTES = block_type<TYPE>::quad_bytes;
    SHARED float strands[2 * FEW_WARPS][PL_PACK_STRANDS][PL_PACK_ROWS][N];
    const uint32_t cols = p.w.part[0].cols, warps = pl_pack_warps(cols), quads = pl_pack_quads(cols), supers = pl_pack_supers(cols);
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, strand = lane / PL_PACK_ROWS;
    uint32_t block, column;
    const pl_cuda_part part = part_of(p.w, p.gated ? 1 : p.w.n, FEW_WARPS / warps * PL_PACK_ROWS, block, column);
    const uint32_t first_group = block * (FEW_WARPS / warps), group = first_group + warp % FEW_WARPS / warps;
    float sum[N] = {};
    if (group < pl_pack_groups(part.rows)) {
        const uint32_t w = warp % warps, end = min(pl_pack_first(cols, w + 1), (supers + PL_PACK_STRANDS - 1 - strand) / PL_PACK_STRANDS);
        const uint8_t *const from = (warp < FEW_WARPS ? part.data : p.w.part[1].data) + static_cast<size_t>(group) * quads * BYTES;
        uint32_t quad = pl_pack_first(cols, w);
        super_held<TYPE> next = {};
        if (quad < end && !AHEAD)
            announce(from + quad * BYTES, BYTES, lane);
        else if (quad < end)
            next.load({from + quad * BYTES, lane});
#pragma unroll 1
        for (; quad < end; quad++) {
            super_held<TYPE> now = next;
            if (quad + 1 < end)
                announce(from + (quad + 1) * BYTES, BYTES, lane);
            if (!AHEAD)
                now.load({from + quad * BYTES, lane});
            else if (quad + 1 < end)
                next.load({from + (quad + 1) * BYTES, lane});
            add_super<TYPE, N>(sum, now, p.x, quad * PL_PACK_STRANDS + strand, p.out.rows);
        }
    }
    for (int i = 0; i < N; i++)
        strands[warp][strand][lane % PL_PACK_ROWS][i] = sum[i];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < FEW_WARPS / warps * PL_PACK_ROWS * N; i += blockDim.x) {
        const uint32_t at = i % PL_PACK_ROWS, t = i / PL_PACK_ROWS % N, g = i / (PL_PACK_ROWS * N), row = (first_group + g) * PL_PACK_ROWS + at;
        if (row >= part.rows || t >= p.out.rows)
            continue;
        float total = 0, second = 0;
        for (uint32_t s = 0; s < warps * PL_PACK_STRANDS; s++) {
            const uint32_t w = g * warps + s / PL_PACK_STRANDS;
            total = __fadd_rn(total, strands[w][s % PL_PACK_STRANDS][at][t]);
            if (p.gated)
                second = __fadd_rn(second, strands[FEW_WARPS + w][s % PL_PACK_STRANDS][at][t]);
        }
        write(p, column + row, t, total, second);
    }
}

/* ---- many rows of x ------------------------------------------------------------------------------------------------ */

/* A tile of results: ROWS of the weight × TOKENS rows of x, from DEPTH inputs at a time; a warp has 16 rows and all tokens. Rows
 * of shared memory lie 16 bytes further apart than they are long, so that eight of them are in different banks. */
constexpr unsigned ROWS = 128, TOKENS = 64, DEPTH = 128, PITCH = DEPTH + 16, MANY_THREADS = ROWS / 16 * WARP, BLOCKS = DEPTH / 32;

template <int TYPE> struct tile {
    static constexpr int halves = block_type<TYPE>::halves;
    uint32_t w[ROWS][PITCH / 4], x[TOKENS][PITCH / 4];
    float scale[ROWS][BLOCKS * halves], min[ROWS][block_type<TYPE>::has_min ? BLOCKS * halves : 1];
    act_block act[TOKENS][BLOCKS];
};

/* Half a super of each row */
template <int TYPE> __device__ __forceinline__ void load_tile(tile<TYPE> &s, const product &p, uint32_t super, uint32_t half)
{
    constexpr int halves = block_type<TYPE>::halves;
    const pl_cuda_part &w = p.w.part[0];
    const uint32_t quads = pl_pack_quads(w.cols), r = threadIdx.x % ROWS, row = blockIdx.x * ROWS + r, group = row / PL_PACK_ROWS;
    const uint32_t lane = super % PL_PACK_STRANDS * PL_PACK_ROWS + row % PL_PACK_ROWS;
    const super_at<TYPE> at = {w.data + (static_cast<size_t>(group) * quads + super / PL_PACK_STRANDS) * block_type<TYPE>::quad_bytes, lane};
    for (unsigned i = threadIdx.x / ROWS; i < BLOCKS; i += MANY_THREADS / ROWS) {
        sub_block<TYPE> b = {};
        if (group < pl_pack_groups(w.rows))
            b = read_sub<TYPE>(at, half * BLOCKS + i);
        for (int k = 0; k < 8; k++)
            s.w[r][i * 8 + k] = b.q[k];
        for (int h = 0; h < halves; h++) {
            s.scale[r][i * halves + h] = b.scale[h];
            if (block_type<TYPE>::has_min)
                s.min[r][i * halves + h] = b.min[h];
        }
    }
    for (unsigned i = threadIdx.x; i < TOKENS * BLOCKS * 2; i += MANY_THREADS) {
        const unsigned token = i / (BLOCKS * 2), piece = i % (BLOCKS * 2);
        const uint32_t t = min(blockIdx.y * TOKENS + token, p.out.rows - 1), block = super * 8 + half * BLOCKS;
        const uint4 v = reinterpret_cast<const uint4 *>(p.x.q + t * static_cast<size_t>(p.x.padded) + block * 32)[piece];
        *reinterpret_cast<uint4 *>(&s.x[token][piece * 4]) = v;
        if (piece < BLOCKS)
            s.act[token][piece] = act_at(p.x, t, block + piece);
    }
}

template <int TYPE> __device__ __forceinline__ void multiply_tile(float (*sum)[4], const tile<TYPE> &s)
{
    constexpr int halves = block_type<TYPE>::halves;
    const unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, low = threadIdx.x / WARP * 16 + g;
    for (unsigned b = 0; b < BLOCKS; b++) {
        const unsigned at = b * 8 + t;
        const uint32_t a[4] = {s.w[low][at], s.w[low + 8][at], s.w[low][at + 4], s.w[low + 8][at + 4]};
#pragma unroll
        for (unsigned n = 0; n < TOKENS / 8; n++) {
            const uint32_t x[2] = {s.x[n * 8 + g][at], s.x[n * 8 + g][at + 4]};
            int c[2][4] = {};
            if (halves == 1) {
                mma_s8_k32(c[0], a, x);
            } else {
                mma_s8_k16(c[0], a, x[0]);
                mma_s8_k16(c[1], a + 2, x[1]);
            }
#pragma unroll
            for (unsigned e = 0; e < 4; e++) {
                const unsigned r = low + e / 2 * 8;
                const int dot[2] = {c[0][e], c[1][e]};
                sum[n][e] = add_block<TYPE>(sum[n][e], &s.scale[r][b * halves], &s.min[r][block_type<TYPE>::has_min ? b * halves : 0], dot,
                                            s.act[n * 8 + 2 * t + e % 2][b]);
            }
        }
    }
}

template <int TYPE> __global__ void __launch_bounds__(MANY_THREADS) many(product p)
{
    wait_for_earlier();
    SHARED_DYNAMIC(tile<TYPE>, s);
    const uint32_t cols = p.w.part[0].cols, warps = pl_pack_warps(cols), supers = pl_pack_supers(cols);
    float total[TOKENS / 8][4] = {};
    for (uint32_t strand = 0; strand < warps * PL_PACK_STRANDS; strand++) {
        const uint32_t w = strand / PL_PACK_STRANDS, end = pl_pack_first(cols, w + 1);
        float sum[TOKENS / 8][4] = {};
        for (uint32_t quad = pl_pack_first(cols, w); quad < end; quad++) {
            const uint32_t super = quad * PL_PACK_STRANDS + strand % PL_PACK_STRANDS;
            for (uint32_t half = 0; half < PL_PACK_SUPER / DEPTH && super < supers; half++) {
                load_tile<TYPE>(*s, p, super, half);
                __syncthreads();
                multiply_tile<TYPE>(sum, *s);
                __syncthreads();
            }
        }
#pragma unroll
        for (unsigned i = 0; i < TOKENS / 8 * 4; i++)
            total[i / 4][i % 4] = __fadd_rn(total[i / 4][i % 4], sum[i / 4][i % 4]);
    }
    const unsigned lane = threadIdx.x % WARP;
#pragma unroll
    for (unsigned i = 0; i < TOKENS / 8 * 4; i++) {
        const unsigned n = i / 4, e = i % 4;
        const uint32_t row = blockIdx.x * ROWS + threadIdx.x / WARP * 16 + lane / 4 + e / 2 * 8, t = blockIdx.y * TOKENS + n * 8 + lane % 4 * 2 + e % 2;
        if (row < p.w.part[0].rows && t < p.out.rows)
            write(p, row, t, total[n][e], 0);
    }
}

/* ---- launching ----------------------------------------------------------------------------------------------------- */

/* All parts at once, so that small ones do not leave SMs idle */
template <int TYPE> cudaError_t run_few(cudaStream_t s, const product &p)
{
    const uint32_t rows = FEW_WARPS / pl_pack_warps(p.w.part[0].cols) * PL_PACK_ROWS;
    uint32_t across = 0;
    for (uint32_t i = 0; i < (p.gated ? 1 : p.w.n); i++)
        across += pieces(p.w.part[i].rows, rows);
    const dim3 grid(across), block(FEW_WARPS * WARP * (p.gated ? 2 : 1));
    if (p.out.rows == 1)
        LAUNCH((few<TYPE, 1>), grid, block, 0, s, p);
    else if (p.out.rows <= 4)
        LAUNCH((few<TYPE, 4>), grid, block, 0, s, p);
    else
        LAUNCH((few<TYPE, PL_CUDA_QUANT_FEW>), grid, block, 0, s, p);
    return cudaGetLastError();
}

template <int TYPE> cudaError_t run_type(cudaStream_t s, const product &p)
{
    static_assert(sizeof(tile<TYPE>) <= 48 << 10, "what a block gets without asking");
    if (p.out.rows <= PL_CUDA_QUANT_FEW)
        return run_few<TYPE>(s, p);
    product one = p;
    cudaError_t e = cudaSuccess;
    for (uint32_t i = 0; i < p.w.n && e == cudaSuccess; i++) {
        one.w.part[0] = p.w.part[i];
        LAUNCH((many<TYPE>), dim3(pieces(p.w.part[i].rows, ROWS), pieces(p.out.rows, TOKENS)), dim3(MANY_THREADS), sizeof(tile<TYPE>), s, one);
        e = cudaGetLastError();
        one.out.p += p.w.part[i].rows;
        one.bias = one.bias != nullptr ? one.bias + p.w.part[i].rows : nullptr;
    }
    return e;
}

cudaError_t run(cudaStream_t s, const product &p)
{
    switch (p.w.part[0].dtype) {
#define X(name, ...)                                                                                                   \
    case PL_##name: return run_type<PL_##name>(s, p);
        PL_PACK_LIST(X)
#undef X
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

cudaError_t pl_cuda_quant(cudaStream_t s, pl_cuda_mat x, pl_cuda_act to)
{
    const unsigned threads = 256;
    LAUNCH(quant_rows, dim3(pieces(static_cast<size_t>(x.rows) * (to.padded / 32), threads / WARP)), dim3(threads), 0, s, x, to);
    return cudaGetLastError();
}

cudaError_t pl_cuda_product(cudaStream_t s, pl_cuda_mat out, pl_cuda_act x, pl_cuda_parts w, const float *bias, bool add)
{
    product p = {};
    p.out = out, p.x = x, p.w = w, p.bias = bias, p.add = add;
    return run(s, p);
}

cudaError_t pl_cuda_product_glu(cudaStream_t s, bool gelu, pl_cuda_mat out, pl_cuda_act x, pl_cuda_parts w, const float *bias, pl_cuda_mat plus,
                                const bool *plus_rows)
{
    product p = {};
    p.out = out, p.x = x, p.w = w, p.bias = bias;
    p.plus = plus, p.plus_rows = plus_rows, p.gated = true, p.gelu = gelu;
    return run(s, p);
}
