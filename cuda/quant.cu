/* quant: products of block types with activations rounded to int8; a warp for an output.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/element.h"
#include "cuda/launch.h"

enum { QUANT_WARPS = 4 };
#define TINY 0x1p-100f /* as the CPU's: 127 / max would overflow */

static __global__ void quant_kernel(pl_cuda_mat x, pl_cuda_act to)
{
    const uint32_t b = blockIdx.y * QUANT_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (b >= x.cols / 32)
        return;
    const float v = x.p[blockIdx.x * x.stride + b * 32 + lane], max = warp_max(fabsf(v)), inverse = max > TINY ? 127 / max : 0;
    const bool finite = __all_sync(ALL_LANES, isfinite(v)) != 0;
    to.q[static_cast<size_t>(blockIdx.x) * x.cols + b * 32 + lane] =
        static_cast<int8_t>(finite ? fminf(fmaxf(rintf(v * inverse), -127.f), 127.f) : 0);
    if (lane == 0)
        to.d[static_cast<size_t>(blockIdx.x) * (x.cols / 32) + b] = finite ? max / 127 : NAN;
}

cudaError_t pl_cuda_quant(cudaStream_t s, struct pl_cuda_mat x, struct pl_cuda_act to)
{
    LAUNCH(quant_kernel, dim3(x.rows, pieces(x.cols / 32, QUANT_WARPS)), QUANT_WARPS * WARP, 0, s, x, to);
    return cudaGetLastError();
}

static __global__ void product_kernel(pl_cuda_mat out, pl_cuda_act x, pl_cuda_part w, const float *bias, bool add)
{
    const uint32_t n = blockIdx.x * QUANT_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, t = blockIdx.y;
    if (n >= w.rows)
        return;
    const int8_t *const q = x.q + static_cast<size_t>(t) * w.cols;
    const float *const d = x.d + static_cast<size_t>(t) * (w.cols / 32);
    float sum = 0;
    for (uint32_t k = lane; k < w.cols; k += WARP)
        sum = fmaf(element(w.dtype, w.data + n * w.row_bytes, k), d[k / 32] * static_cast<float>(q[k]), sum);
    sum = warp_sum(sum);
    if (lane != 0)
        return;
    float *const to = out.p + t * out.stride + n;
    sum = bias != nullptr ? sum + bias[n] : sum;
    *to = add ? *to + sum : sum;
}

cudaError_t pl_cuda_product(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_act x, const struct pl_cuda_part *w, const float *bias, bool add)
{
    LAUNCH(product_kernel, dim3(pieces(w->rows, QUANT_WARPS), out.rows), QUANT_WARPS * WARP, 0, s, out, x, *w, bias, add);
    return cudaGetLastError();
}
