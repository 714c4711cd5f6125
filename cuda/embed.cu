/* embed: rows of a weight of any type as float32.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blocks.h"

enum { EMBED_THREADS = 128 };

/* Row `first + row` of the whole is row `row` of a part; the others are other parts'. */
static __device__ __forceinline__ bool row_in(const pl_cuda_part &w, uint32_t first, uint32_t &row)
{
    row -= first;
    return row < w.rows;
}

/* A row of zeros: the first part's to make. */
static __device__ __forceinline__ bool is_zero(uint32_t first, uint32_t row, bool add)
{
    return row == PL_CUDA_NO_ROW && first == 0 && !add;
}

static __device__ __forceinline__ void put(float *to, float v, bool add)
{
    *to = add ? __fadd_rn(*to, v) : v;
}

static __global__ void embed_floats(pl_cuda_mat out, pl_cuda_part w, uint32_t first, const uint32_t *idx, bool add)
{
    wait_for_earlier();
    const uint32_t i = blockIdx.y * EMBED_THREADS + threadIdx.x;
    uint32_t row = idx[blockIdx.x];
    if (i < out.cols && is_zero(first, row, add))
        out.p[blockIdx.x * out.stride + i] = 0;
    if (i >= out.cols || row == PL_CUDA_NO_ROW || !row_in(w, first, row))
        return;
    const uint8_t *const values = w.data + row * w.row_bytes;
    put(out.p + blockIdx.x * out.stride + i,
        w.dtype == PL_F32   ? reinterpret_cast<const float *>(values)[i]
        : w.dtype == PL_F16 ? __half2float(reinterpret_cast<const __half *>(values)[i])
                            : __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(values)[i]),
        add);
}

/* A thread for 32 values */
template <int TYPE> static __global__ void embed_blocks(pl_cuda_mat out, pl_cuda_part w, uint32_t first, const uint32_t *idx, bool add)
{
    wait_for_earlier();
    using type = block_type<TYPE>;
    const uint32_t block = blockIdx.y * EMBED_THREADS + threadIdx.x, super = block / 8;
    uint32_t row = idx[blockIdx.x];
    for (int e = 0; block < out.cols / 32 && is_zero(first, row, add) && e < 32; e++)
        out.p[blockIdx.x * out.stride + block * 32 + e] = 0;
    if (block >= out.cols / 32 || row == PL_CUDA_NO_ROW || !row_in(w, first, row))
        return;
    const size_t quad = static_cast<size_t>(row / PL_PACK_ROWS) * pl_pack_quads(w.cols) + super / PL_PACK_STRANDS;
    const super_at<TYPE> at = {w.data + quad * type::quad_bytes, super % PL_PACK_STRANDS * PL_PACK_ROWS + row % PL_PACK_ROWS};
    const sub_block<TYPE> b = read_sub<TYPE>(at, static_cast<int>(block % 8));
    for (int e = 0; e < 32; e++) {
        const int h = type::halves == 2 ? e / 16 : 0, q = static_cast<int8_t>(b.q[e / 4] >> e % 4 * 8) - type::offset;
        put(out.p + blockIdx.x * out.stride + block * 32 + e, __fadd_rn(__fmul_rn(b.scale[h], static_cast<float>(q)), b.min[h]), add);
    }
}

static cudaError_t embed_part(cudaStream_t s, pl_cuda_mat out, const pl_cuda_part &w, uint32_t first, const uint32_t *idx, bool add)
{
    const dim3 floats(out.rows, pieces(out.cols, EMBED_THREADS)), blocks(out.rows, pieces(out.cols / 32, EMBED_THREADS));
    switch (w.dtype) {
#define X(name, ...)                                                                                                   \
    case PL_##name: LAUNCH((embed_blocks<PL_##name>), blocks, EMBED_THREADS, 0, s, out, w, first, idx, add); break;
        PL_PACK_LIST(X)
#undef X
    default: LAUNCH(embed_floats, floats, EMBED_THREADS, 0, s, out, w, first, idx, add);
    }
    return cudaGetLastError();
}

cudaError_t pl_cuda_embed(cudaStream_t s, struct pl_cuda_mat out, struct pl_cuda_parts w, const uint32_t *idx, bool add)
{
    cudaError_t e = cudaSuccess;
    uint32_t first = 0;
    for (uint32_t i = 0; i < w.n && e == cudaSuccess; first += w.part[i++].rows)
        e = embed_part(s, out, w.part[i], first, idx, add);
    return e;
}
