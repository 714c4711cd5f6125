/* embed: rows of a weight of any type as float32.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/element.h"
#include "cuda/launch.h"

enum { EMBED_THREADS = 128 };

static __global__ void embed_kernel(pl_cuda_mat out, pl_cuda_parts w, const uint32_t *idx, bool add)
{
    const uint32_t i = blockIdx.y * EMBED_THREADS + threadIdx.x;
    uint32_t row = idx[blockIdx.x], p = 0;
    while (p + 1 < w.n && row >= w.part[p].rows)
        row -= w.part[p++].rows;
    if (i >= out.cols)
        return;
    float *const to = out.p + blockIdx.x * out.stride + i;
    const float v = element(w.part[p].dtype, w.part[p].data + row * w.part[p].row_bytes, i);
    *to = add ? *to + v : v;
}

cudaError_t pl_cuda_embed(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_parts w, const uint32_t *idx, bool add)
{
    LAUNCH(embed_kernel, dim3(out.rows, pieces(out.cols, EMBED_THREADS)), EMBED_THREADS, 0, s, out, w, idx, add);
    return cudaGetLastError();
}
