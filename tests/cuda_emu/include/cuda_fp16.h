/* cuda_fp16: stand-in for CUDA's header of this name.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_FP16_H
#define PL_TESTS_CUDA_EMU_FP16_H

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "core/model/dtype.h"
#include "cuda_runtime.h"


struct alignas(2) __half {
    uint16_t bits;
};
typedef __half half;
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half2 half2;

#ifdef __F16C__
static inline float __half2float(__half h) { return _cvtsh_ss(h.bits); }
#else
static inline float __half2float(__half h) { return pl_f16_to_f32(h.bits); }
#endif
static inline __half __float2half_rn(float f) { return {pl_f32_to_f16(f)}; }
static inline __half __float2half(float f) { return {pl_f32_to_f16(f)}; }
static inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
static inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
static inline __half __ushort_as_half(unsigned short u) { return {u}; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }

#include "emu_tensor.h"

#endif
