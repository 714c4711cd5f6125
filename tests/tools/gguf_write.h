/* gguf_write: builds a GGUF file in memory, for test models. Keys and tensors can be replaced and taken out again before
 * it is written, so that a test makes a faulty file from a good one. Test code: ends the process when memory is out.
 * Thread: one at a time.  Owns: copies of all it is given.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_GGUF_WRITE_H
#define PL_TESTS_GGUF_WRITE_H

#include <stddef.h>
#include <stdint.h>

#include "core/model/dtype.h"

struct gguf_out;

struct gguf_out *gguf_out_new(void);
void gguf_out_free(struct gguf_out *o);

/* Each replaces a key of the same name, in place. */
void gguf_out_u32(struct gguf_out *o, const char *key, uint32_t v);
void gguf_out_f32(struct gguf_out *o, const char *key, float v);
void gguf_out_bool(struct gguf_out *o, const char *key, int v);
void gguf_out_str(struct gguf_out *o, const char *key, const char *v);
void gguf_out_strs(struct gguf_out *o, const char *key, const char *const *v, size_t n);
void gguf_out_f32s(struct gguf_out *o, const char *key, const float *v, size_t n);
void gguf_out_i32s(struct gguf_out *o, const char *key, const int32_t *v, size_t n);
/* 0 when there was no such key. */
int gguf_out_remove_key(struct gguf_out *o, const char *key);

/* data: the tensor's bytes as they go into the file. ne[0] is the row's length, ne[1] the rows (1 for a vector). */
void gguf_out_tensor(struct gguf_out *o, const char *name, pl_dtype dtype, uint64_t ne0, uint64_t ne1, const void *data);
int gguf_out_remove_tensor(struct gguf_out *o, const char *name);
int gguf_out_rename_tensor(struct gguf_out *o, const char *name, const char *to);
/* Values in a tensor. */
uint64_t gguf_out_tensor_size(const struct gguf_out *o, const char *name);
/* Another shape for the same bytes; the caller keeps the product. */
int gguf_out_reshape_tensor(struct gguf_out *o, const char *name, uint64_t ne0, uint64_t ne1);

/* The whole file; the caller frees it. */
void *gguf_out_bytes(const struct gguf_out *o, size_t *n);
/* 0, or -1 with errno. */
int gguf_out_save(const struct gguf_out *o, const char *path);

#endif
