/* cuda_runtime: stand-in for CUDA's header of this name: the kernel language, on a CPU. A thread of a block is a fiber, blocks
 * run one after the other; emu.cpp has the rest. Kernels that wait for another block to run do not work here.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_RUNTIME_H
#define PL_TESTS_CUDA_EMU_RUNTIME_H

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_runtime_api.h"
#include "tests/cuda_emu/graphs.h"

using std::isfinite;
using std::isinf;
using std::isnan;

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EMU_VECTOR2(type, name, align)                                                                                 \
    struct alignas(align) name {                                                                                       \
        type x, y;                                                                                                     \
    };                                                                                                                 \
    static inline name make_##name(type x, type y) { return {x, y}; }
#define EMU_VECTOR4(type, name, align)                                                                                 \
    struct alignas(align) name {                                                                                       \
        type x, y, z, w;                                                                                               \
    };                                                                                                                 \
    static inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR2(float, float2, 8)
EMU_VECTOR2(int, int2, 8)
EMU_VECTOR2(unsigned, uint2, 8)
EMU_VECTOR4(float, float4, 16)
EMU_VECTOR4(int, int4, 16)
EMU_VECTOR4(unsigned, uint4, 16)
EMU_VECTOR4(signed char, char4, 4)
EMU_VECTOR4(unsigned char, uchar4, 4)
EMU_VECTOR4(unsigned short, ushort4, 8)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
enum { warpSize = 32 };

/* ---- what emu.cpp does ------------------------------------------------------------------------------------------------- */

void emu_run(const char *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(const void *), const void *closure);
void *emu_shared();
struct alignas(16) emu_value {
    uint8_t bytes[48];
};
/* What lanes of a mask do together: each arrives, puts something at its place among the 32 values, and meets the others. combine, if
 * there is one, is called when the last has come. What is returned is good until the lane's next meeting. */
emu_value *emu_arrive(const char *what, unsigned mask, const char *file, int line);
const emu_value *emu_meet(void (*combine)(emu_value *values));
bool emu_backwards(void); /* threads run from the last to the first: the lanes do by themselves what else is done for all of them at once */
void emu_barrier(const char *file, int line);
void emu_waited(void); /* what is done before that needs no earlier kernel to have ended; it ends no thread, and meets no others */
[[noreturn]] void emu_wrong(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
extern unsigned emu_thread; /* that runs, in its block */
static inline unsigned emu_lane()
{
    return emu_thread % 32;
}

template <class F> struct emu_kernel {
    const char *name;
    dim3 grid, block;
    size_t shared;
    F f; /* with its arguments */
    static void run(void *p)
    {
        const emu_kernel &k = *static_cast<emu_kernel *>(p);
        emu_run(k.name, k.grid, k.block, k.shared, [](const void *f) { (*static_cast<const F *>(f))(); }, &k.f);
    }
    static void drop(void *p) { delete static_cast<emu_kernel *>(p); }
};

/* What a GPU refuses when a kernel is launched, not when it runs */
void emu_check_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared);
cudaError_t emu_allow_shared(const void *kernel, int n);

template <class F>
static inline void emu_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t s, const F &f)
{
    using job = emu_kernel<F>;
    emu_check_launch(name, kernel, grid, block, shared);
    emu_enqueue(s, job::run, job::drop, new job{name, grid, block, shared, f});
}

template <class F> static inline cudaError_t cudaFuncSetAttribute(F kernel, cudaFuncAttribute, int n)
{
    return emu_allow_shared(reinterpret_cast<const void *>(kernel), n);
}

#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(EMU_HERE)
{
    emu_barrier(file, line);
}

static inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE)
{
    emu_arrive("__syncwarp", mask, file, line);
    emu_meet(nullptr);
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}

/* ---- warps ------------------------------------------------------------------------------------------------------------- */

template <class T> static inline T emu_take(const emu_value *values, unsigned mask, unsigned from, const char *what)
{
    T v;
    if (!(mask >> from & 1))
        emu_wrong("%s reads lane %u, which is not in mask %08x", what, from, mask);
    memcpy(&v, &values[from], sizeof v);
    return v;
}

template <class T>
static inline const emu_value *emu_give(const char *what, unsigned mask, T v, const char *file, int line, void (*combine)(emu_value *) = nullptr)
{
    static_assert(sizeof(T) <= sizeof(emu_value), "lanes exchange 48 bytes at most");
    memcpy(emu_arrive(what, mask, file, line) + emu_lane(), &v, sizeof v);
    return emu_meet(combine);
}

/* OP of all lanes' values, as a butterfly of exchanges makes it */
template <float (*OP)(float, float)> static inline void emu_fold(emu_value *values)
{
    float v[32];
    for (int i = 0; i < 32; i++)
        memcpy(&v[i], &values[i], sizeof v[i]);
    for (int n = 16; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            v[i] = OP(v[i], v[i + n]);
    memcpy(&values[0], &v[0], sizeof v[0]);
}
static inline float emu_add(float a, float b) { return a + b; }
static inline float emu_most(float a, float b) { return fmaxf(a, b); }
template <float (*OP)(float, float)> static inline float emu_warp(const char *what, float v)
{
    float all;
    memcpy(&all, emu_give(what, 0xffffffffu, v, "", 0, emu_fold<OP>), sizeof all);
    return all;
}

template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMU_HERE)
{
    const emu_value *all = emu_give("__shfl_sync", mask, v, file, line);
    const unsigned lane = emu_lane(), base = lane / width * width;
    return emu_take<T>(all, mask, base + (unsigned)from % width, "__shfl_sync");
}

template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_HERE)
{
    const emu_value *all = emu_give("__shfl_xor_sync", mask, v, file, line);
    const unsigned lane = emu_lane(), from = lane ^ bits;
    return from / width > lane / width ? v : emu_take<T>(all, mask, from, "__shfl_xor_sync");
}

template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_HERE)
{
    const emu_value *all = emu_give("__shfl_down_sync", mask, v, file, line);
    const unsigned lane = emu_lane();
    return lane % width + by >= (unsigned)width ? v : emu_take<T>(all, mask, lane + by, "__shfl_down_sync");
}

template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_HERE)
{
    const emu_value *all = emu_give("__shfl_up_sync", mask, v, file, line);
    const unsigned lane = emu_lane();
    return lane % width < by ? v : emu_take<T>(all, mask, lane - by, "__shfl_up_sync");
}

static inline unsigned __ballot_sync(unsigned mask, int set, EMU_HERE)
{
    const emu_value *all = emu_give("__ballot_sync", mask, set != 0, file, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++)
        bits |= mask >> i & 1 && all[i].bytes[0] ? 1u << i : 0;
    return bits;
}

static inline int __any_sync(unsigned mask, int set, EMU_HERE)
{
    return __ballot_sync(mask, set, file, line) != 0;
}

static inline int __all_sync(unsigned mask, int set, EMU_HERE)
{
    return __ballot_sync(mask, set, file, line) == mask;
}

/* ---- atomics: fibers change only where they wait ------------------------------------------------------------------------- */

template <class T, class U> static inline T atomicAdd(T *p, U v)
{
    const T old = *p;
    *p = static_cast<T>(old + v);
    return old;
}

template <class T, class U> static inline T atomicMax(T *p, U v)
{
    const T old = *p;
    *p = old < static_cast<T>(v) ? static_cast<T>(v) : old;
    return old;
}

template <class T, class U> static inline T atomicMin(T *p, U v)
{
    const T old = *p;
    *p = static_cast<T>(v) < old ? static_cast<T>(v) : old;
    return old;
}

template <class T, class U> static inline T atomicExch(T *p, U v)
{
    const T old = *p;
    *p = static_cast<T>(v);
    return old;
}

template <class T, class U> static inline T atomicCAS(T *p, U compare, U v)
{
    const T old = *p;
    if (old == static_cast<T>(compare))
        *p = static_cast<T>(v);
    return old;
}

static inline unsigned atomicInc(unsigned *p, unsigned limit)
{
    const unsigned old = *p;
    *p = old >= limit ? 0 : old + 1;
    return old;
}

/* ---- loads and arithmetic ---------------------------------------------------------------------------------------------- */

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float a) { return 1 / sqrtf(a); }
#define __expf expf /* glibc has functions of these names */
#define __logf logf
static inline int __float2int_rn(float a) { return (int)nearbyintf(a); }
static inline int __float2int_rz(float a) { return (int)a; }
static inline float __int2float_rn(int a) { return (float)a; }
static inline float __uint2float_rn(unsigned a) { return (float)a; }
static inline unsigned long long __float2ull_rz(float a) { return (unsigned long long)a; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }
static inline int __popc(unsigned a) { return __builtin_popcount(a); }
static inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz((unsigned)a); }
static inline int __ffs(int a) { return __builtin_ffs(a); }

template <class T, class F> static inline T emu_bits(F from)
{
    T to;
    static_assert(sizeof to == sizeof from, "of one size");
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline int __float_as_int(float a) { return emu_bits<int>(a); }
static inline unsigned __float_as_uint(float a) { return emu_bits<unsigned>(a); }
static inline float __int_as_float(int a) { return emu_bits<float>(a); }
static inline float __uint_as_float(unsigned a) { return emu_bits<float>(a); }

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select)
{
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++)
        out |= (unsigned)(bytes >> ((select >> 4 * i & 7) * 8) & 255) << 8 * i;
    return out;
}

template <class A, class B> static inline int emu_dot4(unsigned a, unsigned b, int c)
{
    for (int i = 0; i < 4; i++)
        c += (int)(A)(a >> 8 * i) * (int)(B)(b >> 8 * i);
    return c;
}
static inline int __dp4a(int a, int b, int c) { return emu_dot4<int8_t, int8_t>((unsigned)a, (unsigned)b, c); }
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return (unsigned)emu_dot4<uint8_t, uint8_t>(a, b, (int)c); }

#endif
