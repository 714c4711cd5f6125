/* attn: attention over the cache's pages; a block for a token and a query head.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/launch.h"

enum { ATTN_THREADS = 256, MAX_DIM = 256 };

static __device__ float cached(pl_cuda_kv kv, const uint8_t *page, bool is_value, uint32_t i, uint32_t d)
{
    const size_t at = static_cast<size_t>(i) * kv.head_dim + d;
    const uint8_t *const rows = page + (is_value ? kv.values : 0);
    switch (kv.dtype) {
    case PL_F32: return reinterpret_cast<const float *>(rows)[at];
    case PL_F16: return __half2float(reinterpret_cast<const __half *>(rows)[at]);
    case PL_BF16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(rows)[at]);
    default: {
        const __half *const scales = reinterpret_cast<const __half *>(page + (is_value ? kv.value_scales : kv.key_scales));
        return __half2float(scales[i * ((kv.head_dim + 31) / 32) + d / 32]) * static_cast<float>(reinterpret_cast<const int8_t *>(rows)[at]);
    }
    }
}

static __device__ void rotate(float *x, uint32_t n, uint32_t bits)
{
    for (uint32_t distance = 1; distance < 1u << bits; distance *= 2) {
        for (uint32_t k = threadIdx.x; k < n / 2; k += ATTN_THREADS) {
            const uint32_t i = k / distance * 2 * distance + k % distance;
            const float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
        __syncthreads();
    }
    const float scale = 1 / sqrtf(static_cast<float>(1u << bits));
    for (uint32_t i = threadIdx.x; i < n; i += ATTN_THREADS)
        x[i] *= scale;
    __syncthreads();
}

/* Pieces of as many positions as there are threads, joined in order. A score that is no number wins every maximum. */
static __global__ void attn_kernel(pl_cuda_mat out, pl_cuda_mat q, pl_cuda_kv kv, uint32_t layer, float scale, pl_cuda_batch b)
{
    SHARED float query[MAX_DIM], weights[ATTN_THREADS], scratch[2][WARP];
    const uint32_t t = blockIdx.x, head = blockIdx.y, D = kv.head_dim, per_kv = q.cols / D / kv.n_kv_heads, n = b.pos[t] + 1, me = threadIdx.x;
    uint32_t seq = 0;
    while (b.q_start[seq + 1] <= t)
        seq++;
    const uint32_t *const pages = b.pages + b.page_start[seq];
    const uint8_t *const base = kv.data + layer * kv.layer_bytes + static_cast<size_t>(head / per_kv) * kv.head_bytes;
    for (uint32_t i = me; i < D; i += ATTN_THREADS)
        query[i] = q.p[t * q.stride + head * D + i];
    __syncthreads();
    rotate(query, D, kv.rotate_bits);
    float most = -INFINITY, sum = 0, total = 0;
    for (uint32_t from = 0; from < n; from += ATTN_THREADS) {
        float score = -INFINITY;
        if (from + me < n) {
            const uint8_t *const page = base + pages[(from + me) / PL_CUDA_PAGE] * kv.page_bytes;
            score = 0;
            for (uint32_t d = 0; d < D; d++)
                score = fmaf(cached(kv, page, false, (from + me) % PL_CUDA_PAGE, d), query[d], score);
            score *= scale;
        }
        weights[me] = score;
        __syncthreads();
        float here = most;
        for (uint32_t i = 0; i < ATTN_THREADS; i++)
            here = weights[i] > here || isnan(weights[i]) ? weights[i] : here;
        __syncthreads();
        const float keep = expf(most - here), weight = from + me < n ? expf(score - here) : 0;
        weights[me] = weight;
        sum = sum * keep + block_sum(weight, scratch[from / ATTN_THREADS % 2]);
        total *= keep;
        for (uint32_t i = 0; me < D && i < ATTN_THREADS && from + i < n; i++)
            total = fmaf(weights[i], cached(kv, base + pages[(from + i) / PL_CUDA_PAGE] * kv.page_bytes, true, (from + i) % PL_CUDA_PAGE, me), total);
        most = here;
        __syncthreads();
    }
    if (me < D)
        query[me] = total / sum;
    __syncthreads();
    rotate(query, D, kv.rotate_bits);
    if (me < D)
        out.p[t * out.stride + head * D + me] = query[me];
}

cudaError_t pl_cuda_attn(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_mat q, struct pl_cuda_kv kv, uint32_t layer, float scale,
                         struct pl_cuda_batch b)
{
    LAUNCH(attn_kernel, dim3(b.n_tokens, q.cols / kv.head_dim), ATTN_THREADS, 0, s, out, q, kv, layer, scale, b);
    return cudaGetLastError();
}
