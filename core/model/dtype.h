/* dtype: element and block types of tensors as GGUF files hold them, and their plain meaning. The block layouts are
 * those of the GGUF specification (ggml); pl_dequant_row is the definition that every kernel is tested against.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_DTYPE_H
#define PL_MODEL_DTYPE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name, GGUF type number, elements per block, bytes per block */
#define PL_DTYPE_LIST(X)                                                                                               \
    X(F32, 0, 1, 4)                                                                                                    \
    X(F16, 1, 1, 2)                                                                                                    \
    X(Q4_0, 2, 32, 18)                                                                                                 \
    X(Q4_1, 3, 32, 20)                                                                                                 \
    X(Q5_0, 6, 32, 22)                                                                                                 \
    X(Q5_1, 7, 32, 24)                                                                                                 \
    X(Q8_0, 8, 32, 34)                                                                                                 \
    X(Q2_K, 10, 256, 84)                                                                                               \
    X(Q3_K, 11, 256, 110)                                                                                              \
    X(Q4_K, 12, 256, 144)                                                                                              \
    X(Q5_K, 13, 256, 176)                                                                                              \
    X(Q6_K, 14, 256, 210)                                                                                              \
    X(BF16, 30, 1, 2)

typedef enum {
#define X(name, number, elements, bytes) PL_##name = number,
    PL_DTYPE_LIST(X)
#undef X
    PL_F8 = 200, /* of caches only (device.h) */
} pl_dtype;

/* NULL / 0 for a number that is not in the list. */
const char *pl_dtype_name(uint32_t dtype);
uint32_t pl_dtype_block(uint32_t dtype);       /* elements per block */
uint32_t pl_dtype_block_bytes(uint32_t dtype); /* bytes per block */
/* Bytes of a row of n elements; n is a multiple of the block. */
static inline size_t pl_dtype_row_bytes(pl_dtype t, size_t n)
{
    return n / pl_dtype_block(t) * pl_dtype_block_bytes(t);
}

/* Block types only (F32, F16 and BF16 have sub 0): a block is made of sub-blocks of pl_dtype_sub elements, and element e
 * of sub-block j is worth scale[j] * (q[e] - pl_dtype_offset) + min[j]. Types with an offset have no minima (min[j] = 0). */
uint32_t pl_dtype_sub(uint32_t dtype);
uint32_t pl_dtype_offset(uint32_t dtype);
void pl_dtype_unpack(pl_dtype t, const void *block, uint8_t *q, float *scale, float *min);

/* out[n] = the values of one row; n is a multiple of the block. */
void pl_dequant_row(pl_dtype t, const void *row, float *out, size_t n);
/* Nearest representation (round to nearest even for F16/BF16; the usual per-block min/max fit for Q4_0, Q4_1, Q5_0,
 * Q5_1, Q8_0 and the K-quants; used by test models, the quantize verb and the f16/bf16 caches). */
void pl_quant_row(pl_dtype t, const float *in, void *row, size_t n);

float pl_f16_to_f32(uint16_t h);
uint16_t pl_f32_to_f16(float f);

#ifdef __cplusplus
}
#endif

#endif
