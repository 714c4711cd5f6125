/* parts: how the blocks of one launch are shared out to a weight's parts.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_PARTS_H
#define PL_CUDA_PARTS_H

#include "cuda/launch.h"

/* The block's part of the first n, the block's number among the part's, and the part's first output; a block has per_block rows. */
static __device__ __forceinline__ pl_cuda_part part_of(const pl_cuda_parts &w, uint32_t n, uint32_t per_block, uint32_t &block, uint32_t &column)
{
    pl_cuda_part p = w.part[0];
    block = blockIdx.x, column = 0;
#pragma unroll
    for (uint32_t i = 1; i < PL_CUDA_MAX_PARTS; i++) {
        const uint32_t blocks = (p.rows + per_block - 1) / per_block;
        if (i < n && block >= blocks) {
            block -= blocks, column += p.rows;
            p = w.part[i];
        }
    }
    return p;
}

#endif
