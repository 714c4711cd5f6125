/* kv: turns queries and keys by their positions, and writes keys and values into the cache's pages; a block for a token's key and value of one
 * head and the queries that will read them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/launch.h"

enum { KV_THREADS = 128, MAX_DIM = 256 };
#define TINY 0x1p-100f /* as the CPU's: 127 / max would overflow */

static __device__ __forceinline__ void put(float *to, float v)
{
    *to = v;
}

static __device__ __forceinline__ void put(__half *to, float v)
{
    *to = __float2half_rn(v);
}

static __device__ __forceinline__ void put(__nv_bfloat16 *to, float v)
{
    *to = __float2bfloat16_rn(v);
}

struct kv_job {
    pl_cuda_kv kv;
    uint32_t layer, per_kv; /* query heads of a key/value head */
    pl_cuda_rope rope;
    pl_cuda_mat q, k, v;
    const uint32_t *slot;
};

typedef float heads[2][MAX_DIM]; /* a key and a value */

/* ---- turning --------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void find_angles(const pl_cuda_rope &rope, float *cosines, float *sines)
{
    const float at = static_cast<float>(rope.pos[blockIdx.x]);
    for (uint32_t i = threadIdx.x; i < rope.n_dims / 2; i += KV_THREADS)
        sincosf(at * rope.freq[i], &sines[i], &cosines[i]);
}

/* The block's queries where they stand, and its key in shared memory */
static __device__ __forceinline__ void turn(const kv_job &j, float *key, const float *cosines, const float *sines)
{
    const uint32_t n = j.rope.n_dims / 2, D = j.kv.head_dim;
    float *const queries = j.q.p + blockIdx.x * j.q.stride + static_cast<size_t>(blockIdx.y) * j.per_kv * D;
    for (uint32_t k = threadIdx.x; k < (j.per_kv + 1) * n; k += KV_THREADS) {
        const uint32_t i = k % n;
        float *const head = k / n < j.per_kv ? queries + k / n * D : key;
        float *const a = j.rope.halves ? head + i : head + 2 * i, *const b = j.rope.halves ? a + n : a + 1;
        const float va = *a, vb = *b;
        *a = fmaf(va, cosines[i], -__fmul_rn(vb, sines[i]));
        *b = fmaf(va, sines[i], __fmul_rn(vb, cosines[i]));
    }
}

/* ---- rounding -------------------------------------------------------------------------------------------------------------- */

/* A head's share of the page that has the token's slot, and the place in it */
struct place {
    uint8_t *page;
    uint32_t at;
};

template <class T> static __device__ __forceinline__ void write_floats(const pl_cuda_kv &kv, const place &to, const heads &x)
{
    for (uint32_t i = threadIdx.x; i < kv.head_dim; i += KV_THREADS) {
        put(reinterpret_cast<T *>(to.page) + to.at * kv.head_dim + i, x[0][i]);
        put(reinterpret_cast<T *>(to.page + kv.values) + to.at * kv.head_dim + i, x[1][i]);
    }
}

/* Multiplies pieces of 2^bits of the n elements of both by the Hadamard matrix of that size, over the root of the size. */
static __device__ void rotate(heads &x, uint32_t n, uint32_t bits)
{
    for (uint32_t distance = 1; distance < 1u << bits; distance *= 2) {
        for (uint32_t k = threadIdx.x; k < n; k += KV_THREADS) {
            const uint32_t pair = k / 2, i = pair / distance * 2 * distance + pair % distance;
            float *const of = x[k % 2];
            const float a = of[i], b = of[i + distance];
            of[i] = a + b;
            of[i + distance] = a - b;
        }
        __syncthreads();
    }
    const float scale = 1 / sqrtf(static_cast<float>(1u << bits));
    for (uint32_t i = threadIdx.x; i < 2 * n; i += KV_THREADS)
        x[i % 2][i / 2] *= scale;
    __syncthreads();
}

/* A warp rounds 32 elements to int8 with one scale. What is not a number makes the scale so. */
static __device__ void round_block(float x, bool inside, int8_t *to, __half *scale)
{
    const float max = warp_max(fabsf(x)), inverse = max > TINY ? 127 / max : 0;
    const bool finite = __all_sync(ALL_LANES, isfinite(x)) != 0;
    const float r = finite ? fminf(fmaxf(rintf(x * inverse), -127.f), 127.f) : 0;
    if (inside)
        *to = static_cast<int8_t>(r);
    if (threadIdx.x % WARP == 0)
        *scale = __float2half_rn(finite ? max / 127 : NAN);
}

static __device__ __forceinline__ void write_rounded(const pl_cuda_kv &kv, const place &to, heads &x)
{
    const uint32_t D = kv.head_dim, n_blocks = (D + 31) / 32, lane = threadIdx.x % WARP;
    rotate(x, D, kv.rotate_bits);
    for (uint32_t k = threadIdx.x / WARP; k < 2 * n_blocks; k += KV_THREADS / WARP) {
        const uint32_t value = k / n_blocks, b = k % n_blocks, i = b * 32 + lane;
        int8_t *const row = reinterpret_cast<int8_t *>(to.page + (value ? kv.values : 0)) + to.at * D;
        __half *const scales = reinterpret_cast<__half *>(to.page + (value ? kv.value_scales : kv.key_scales)) + to.at * n_blocks;
        round_block(x[value][i], i < D, row + i, scales + b);
    }
}

/* e4m3 of x, whose size is 448 at most: 3 bits of mantissa, to nearest even; below 2^-6 multiples of 2^-9 */
static __device__ __forceinline__ uint8_t to_f8(float x)
{
    const uint32_t bits = __float_as_uint(fabsf(x)), normal = (bits + 0x7ffffu + (bits >> 20 & 1)) >> 20;
    const uint32_t code = fabsf(x) < 0x1p-6f ? static_cast<uint32_t>(rintf(fabsf(x) * 0x1p9f)) : normal - (120u << 3);
    return static_cast<uint8_t>(code | (x < 0 ? 0x80u : 0u));
}

/* The power of two that brings the largest of a head's elements to 224 … 448, as the byte that the cache holds */
static __device__ __forceinline__ uint32_t f8_scale(float max)
{
    const int exponent = static_cast<int>(__float_as_uint(max) >> 23) - 127 - 8;
    const int up = (__float_as_uint(max) & 0x7fffffu) > 0x600000u; /* more than 1.75 */
    return static_cast<uint32_t>(::min(::max(exponent + up, -110), 119) + 127);
}

/* A warp for the key, one for the value */
static __device__ __forceinline__ void write_f8(const pl_cuda_kv &kv, const place &to, const heads &both)
{
    const uint32_t value = threadIdx.x / WARP, D = kv.head_dim, lane = threadIdx.x % WARP;
    if (value > 1)
        return;
    const float *const x = both[value];
    uint8_t *const row = to.page + (value ? kv.values : 0) + to.at * D;
    float max = 0;
    bool finite = true;
    for (uint32_t i = lane; i < D; i += WARP) {
        max = fmaxf(max, fabsf(x[i]));
        finite = finite && isfinite(x[i]);
    }
    finite = __all_sync(ALL_LANES, finite) != 0;
    const uint32_t scale = f8_scale(warp_max(max));
    const float down = __uint_as_float((254u - scale) << 23);
    for (uint32_t i = lane; i < D; i += WARP)
        row[i] = finite ? to_f8(__fmul_rn(x[i], down)) : 0;
    if (lane == 0)
        to.page[(value ? kv.value_scales : kv.key_scales) + to.at] = static_cast<uint8_t>(finite ? scale : 255u);
}

/* ---- the kernel -------------------------------------------------------------------------------------------------------------- */

template <int TYPE> static __global__ void kv_kernel(kv_job j)
{
    wait_for_earlier();
    SHARED heads x;
    SHARED float cosines[MAX_DIM / 2], sines[MAX_DIM / 2];
    const uint32_t t = blockIdx.x, h = blockIdx.y, D = j.kv.head_dim, slot = j.slot[t];
    for (uint32_t i = threadIdx.x; i < (D + 31) / 32 * 32; i += KV_THREADS) {
        x[0][i] = i < D ? j.k.p[t * j.k.stride + h * D + i] : 0;
        x[1][i] = i < D ? j.v.p[t * j.v.stride + h * D + i] : 0;
    }
    if (j.rope.n_dims > 0) {
        find_angles(j.rope, cosines, sines);
        __syncthreads();
        turn(j, x[0], cosines, sines);
    }
    __syncthreads();
    if (slot == PL_CUDA_NO_ROW)
        return;
    const place to = {j.kv.data + j.layer * j.kv.layer_bytes + slot / PL_CUDA_PAGE * j.kv.page_bytes + static_cast<size_t>(h) * j.kv.head_bytes,
                      slot % PL_CUDA_PAGE};
    if constexpr (TYPE == PL_F32)
        write_floats<float>(j.kv, to, x);
    else if constexpr (TYPE == PL_F16)
        write_floats<__half>(j.kv, to, x);
    else if constexpr (TYPE == PL_BF16)
        write_floats<__nv_bfloat16>(j.kv, to, x);
    else if constexpr (TYPE == PL_F8)
        write_f8(j.kv, to, x);
    else
        write_rounded(j.kv, to, x);
}

cudaError_t pl_cuda_kv_write(cudaStream_t s, struct pl_cuda_kv kv, uint32_t layer, struct pl_cuda_rope rope, struct pl_cuda_mat q, struct pl_cuda_mat k,
                             struct pl_cuda_mat v, const uint32_t *slot)
{
    const kv_job j = {kv, layer, q.cols / k.cols, rope, q, k, v, slot};
    const dim3 grid(k.rows, kv.n_kv_heads);
    switch (kv.dtype) {
    case PL_F32: LAUNCH((kv_kernel<PL_F32>), grid, KV_THREADS, 0, s, j); break;
    case PL_F16: LAUNCH((kv_kernel<PL_F16>), grid, KV_THREADS, 0, s, j); break;
    case PL_BF16: LAUNCH((kv_kernel<PL_BF16>), grid, KV_THREADS, 0, s, j); break;
    case PL_F8: LAUNCH((kv_kernel<PL_F8>), grid, KV_THREADS, 0, s, j); break;
    default: LAUNCH((kv_kernel<PL_Q8_0>), grid, KV_THREADS, 0, s, j);
    }
    return cudaGetLastError();
}
