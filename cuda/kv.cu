/* kv: writes keys and values into the cache's pages; a block for a token's key and value of one head.
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

template <class T> static __global__ void kv_write_kernel(pl_cuda_kv kv, uint32_t layer, pl_cuda_mat k, pl_cuda_mat v, const uint32_t *slot)
{
    const uint32_t t = blockIdx.x, h = blockIdx.y, D = kv.head_dim, at = slot[t] % PL_CUDA_PAGE;
    if (slot[t] == PL_CUDA_NO_ROW)
        return;
    uint8_t *const page = kv.data + layer * kv.layer_bytes + slot[t] / PL_CUDA_PAGE * kv.page_bytes + static_cast<size_t>(h) * kv.head_bytes;
    for (uint32_t i = threadIdx.x; i < D; i += KV_THREADS) {
        put(reinterpret_cast<T *>(page) + at * D + i, k.p[t * k.stride + h * D + i]);
        put(reinterpret_cast<T *>(page + kv.values) + at * D + i, v.p[t * v.stride + h * D + i]);
    }
}

/* Multiplies pieces of 2^bits elements of x[n] by the Hadamard matrix of that size, over the root of the size. */
static __device__ void rotate(float *x, uint32_t n, uint32_t bits)
{
    for (uint32_t distance = 1; distance < 1u << bits; distance *= 2) {
        for (uint32_t k = threadIdx.x; k < n / 2; k += KV_THREADS) {
            const uint32_t i = k / distance * 2 * distance + k % distance;
            const float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
        __syncthreads();
    }
    const float scale = 1 / sqrtf(static_cast<float>(1u << bits));
    for (uint32_t i = threadIdx.x; i < n; i += KV_THREADS)
        x[i] *= scale;
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

static __global__ void kv_round_kernel(pl_cuda_kv kv, uint32_t layer, pl_cuda_mat k, pl_cuda_mat v, const uint32_t *slot)
{
    SHARED float x[MAX_DIM];
    const uint32_t t = blockIdx.x, h = blockIdx.y, D = kv.head_dim, at = slot[t] % PL_CUDA_PAGE, n_blocks = (D + 31) / 32, lane = threadIdx.x % WARP;
    if (slot[t] == PL_CUDA_NO_ROW)
        return;
    const pl_cuda_mat in = blockIdx.z == 0 ? k : v;
    uint8_t *const page = kv.data + layer * kv.layer_bytes + slot[t] / PL_CUDA_PAGE * kv.page_bytes + static_cast<size_t>(h) * kv.head_bytes;
    int8_t *const rows = reinterpret_cast<int8_t *>(page + (blockIdx.z == 0 ? 0 : kv.values));
    __half *const scales = reinterpret_cast<__half *>(page + (blockIdx.z == 0 ? kv.key_scales : kv.value_scales));
    for (uint32_t i = threadIdx.x; i < n_blocks * 32; i += KV_THREADS)
        x[i] = i < D ? in.p[t * in.stride + h * D + i] : 0;
    __syncthreads();
    rotate(x, D, kv.rotate_bits);
    for (uint32_t b = threadIdx.x / WARP; b < n_blocks; b += KV_THREADS / WARP) {
        const uint32_t i = b * 32 + lane;
        round_block(x[i], i < D, rows + at * D + i, scales + at * n_blocks + b);
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

/* A warp for a token's key or value of one head */
static __global__ void kv_f8_kernel(pl_cuda_kv kv, uint32_t layer, pl_cuda_mat k, pl_cuda_mat v, const uint32_t *slot)
{
    const uint32_t t = blockIdx.x, h = blockIdx.y, D = kv.head_dim, at = slot[t] % PL_CUDA_PAGE, lane = threadIdx.x;
    if (slot[t] == PL_CUDA_NO_ROW)
        return;
    const pl_cuda_mat in = blockIdx.z == 0 ? k : v;
    const float *const x = in.p + t * in.stride + h * D;
    uint8_t *const page = kv.data + layer * kv.layer_bytes + slot[t] / PL_CUDA_PAGE * kv.page_bytes + static_cast<size_t>(h) * kv.head_bytes;
    uint8_t *const row = page + (blockIdx.z == 0 ? 0 : kv.values) + at * D;
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
        page[(blockIdx.z == 0 ? kv.key_scales : kv.value_scales) + at] = static_cast<uint8_t>(finite ? scale : 255u);
}

cudaError_t pl_cuda_kv_write(cudaStream_t s, struct pl_cuda_kv kv, uint32_t layer, struct pl_cuda_mat k, struct pl_cuda_mat v, const uint32_t *slot)
{
    const dim3 grid(k.rows, kv.n_kv_heads);
    switch (kv.dtype) {
    case PL_F32: LAUNCH((kv_write_kernel<float>), grid, KV_THREADS, 0, s, kv, layer, k, v, slot); break;
    case PL_F16: LAUNCH((kv_write_kernel<__half>), grid, KV_THREADS, 0, s, kv, layer, k, v, slot); break;
    case PL_BF16: LAUNCH((kv_write_kernel<__nv_bfloat16>), grid, KV_THREADS, 0, s, kv, layer, k, v, slot); break;
    case PL_F8: LAUNCH(kv_f8_kernel, dim3(k.rows, kv.n_kv_heads, 2), WARP, 0, s, kv, layer, k, v, slot); break;
    default: LAUNCH(kv_round_kernel, dim3(k.rows, kv.n_kv_heads, 2), KV_THREADS, 0, s, kv, layer, k, v, slot);
    }
    return cudaGetLastError();
}
