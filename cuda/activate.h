/* activate: the gated and plain activations, for every kernel that applies one: each operation is rounded, so that the result is
 * the same wherever it is computed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_ACTIVATE_H
#define PL_CUDA_ACTIVATE_H

#include "cuda/launch.h"

/* SiLU, or the tanh form of GELU */
static __device__ __forceinline__ float activate(bool gelu, float x)
{
    if (!gelu)
        return __fdiv_rn(x, __fadd_rn(1.f, expf(-x)));
    const float cube = __fmul_rn(__fmul_rn(x, x), __fmul_rn(0.044715f, x));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, tanhf(__fmul_rn(0.7978845608028654f, __fadd_rn(x, cube)))));
}

#endif
