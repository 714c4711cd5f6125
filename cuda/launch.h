/* launch: what a kernel's source needs of either compiler: nvcc, or the host's own with the stand-in headers of tests/cuda_emu,
 * which run the same text on a CPU.
 *
 *     LAUNCH(kernel, grid, block, shared_bytes, stream, arguments…)    a template's name in parentheses: (name<float, 4>)
 *     wait_for_earlier();                                              the first statement of every kernel
 *     SHARED_DYNAMIC(type, name);                                      the shared_bytes, as an array of type
 *     SHARED type name[n];                                             shared memory of a size known here
 *
 * Kernels overlap where the GPU lets them (9.0 and newer; also in graphs): one is started when all blocks of the one before it are, and waits at
 * its head until that one is through and all that it wrote can be seen. That one had waited too, so that the same holds for everything before it. So
 * nothing is read or written before the wait but weights, which no kernel writes, and nothing else is read as what stays the same while a kernel is
 * there (weight_at). A copy, or a kernel of a library, that stands between two waits for the first, and the second for it, as ever.
 *
 * Emulation spends its time with exchanges between lanes: those of sums, maxima and tensor cores (mma.h) are made at once there, unless it runs
 * threads backwards; then, as on a GPU, the lanes make them.
 *
 * A block has a multiple of 32 threads. Sums whose order matters use fmaf, or __fmul_rn and __fadd_rn, so that no compiler
 * contracts one kernel's and leaves another's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_LAUNCH_H
#define PL_CUDA_LAUNCH_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"

#ifdef __CUDACC__
#include <atomic>

/* Whether the current GPU runs code of this library that knows how to wait. All of it is compiled alike: any kernel can be asked. */
inline bool kernels_overlap(const void *kernel)
{
    static std::atomic<signed char> known[64]; /* of each GPU; 0 = not asked yet */
    cudaFuncAttributes a;
    int gpu;
    if (cudaGetDevice(&gpu) != cudaSuccess || gpu >= 64)
        return false;
    if (known[gpu] == 0 && cudaFuncGetAttributes(&a, kernel) == cudaSuccess)
        known[gpu] = a.ptxVersion >= 90 ? 1 : -1;
    return known[gpu] > 0;
}

template <class... P, class... A>
static inline void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments)
{
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = grid, how.blockDim = block, how.dynamicSmemBytes = shared_bytes, how.stream = stream;
    how.attrs = &overlap, how.numAttrs = kernels_overlap(reinterpret_cast<const void *>(kernel)) ? 1 : 0;
    (void)cudaLaunchKernelEx(&how, kernel, arguments...); /* cudaGetLastError says what came of it */
}
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) launch_kernel(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define SHARED_DYNAMIC(type, name)                                                                                     \
    extern __shared__ __align__(16) unsigned char pl_shared_bytes[];                                                   \
    type *const name = reinterpret_cast<type *>(pl_shared_bytes)
#define SHARED __shared__
#else
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                         \
    emu_launch(#kernel, reinterpret_cast<const void *>(kernel), grid, block, shared_bytes, stream, [=] { (kernel)(__VA_ARGS__); })
#define SHARED_DYNAMIC(type, name) type *const name = static_cast<type *>(emu_shared())
#define SHARED static
#endif

static __device__ __forceinline__ void wait_for_earlier()
{
#if !defined(__CUDACC__)
    emu_waited();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* Of a weight; once: it is not read again soon. */
template <class T> static __device__ __forceinline__ T weight_at(const T *p)
{
    return __ldg(p);
}

template <class T> static __device__ __forceinline__ T weight_once(const T *p)
{
    return __ldcs(p);
}

enum { WARP = 32 };
#define ALL_LANES 0xffffffffu

/* Sums over a warp's lanes; every lane gets the sum, in the same order everywhere. */
static __device__ __forceinline__ float warp_sum(float v)
{
#ifndef __CUDACC__
    if (!emu_backwards())
        return emu_warp<emu_add>("warp_sum", v);
#endif
    for (int i = WARP / 2; i > 0; i /= 2)
        v += __shfl_xor_sync(ALL_LANES, v, i);
    return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
#ifndef __CUDACC__
    if (!emu_backwards())
        return emu_warp<emu_most>("warp_max", v);
#endif
    for (int i = WARP / 2; i > 0; i /= 2)
        v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, i));
    return v;
}

/* Sums over a block of up to 1024 threads; every thread gets the sum. scratch: 32 floats of shared memory, free again
 * after the next __syncthreads. */
static __device__ __forceinline__ float block_sum(float v, float *scratch)
{
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = blockDim.x / WARP;
    v = warp_sum(v);
    if (lane == 0)
        scratch[warp] = v;
    __syncthreads();
    return warp_sum(lane < n ? scratch[lane] : 0.f);
}

static inline unsigned pieces(size_t n, size_t of)
{
    return static_cast<unsigned>((n + of - 1) / of);
}

#endif
