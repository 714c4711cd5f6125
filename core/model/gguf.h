/* gguf: reads a GGUF v2 or v3 file. The file is memory-mapped; every offset, count and string length is checked against
 * the file before it is used, so that what this module hands out can be trusted.
 * Thread: any after open (read-only).  Owns: the mapping.  Fails: PL_EFORMAT (with what and where), PL_ENOTSUP
 * (version, tensor type by name or number), PL_EIO.
 * Source: the GGUF specification, ggml-org/ggml docs/gguf.md.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_GGUF_H
#define PL_MODEL_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/model/dtype.h"

struct pl_gguf;

struct pl_gguf_str {
    const char *s; /* borrowed from the mapping; not NUL-terminated */
    uint64_t n;
};

struct pl_gguf_tensor {
    struct pl_gguf_str name;
    pl_dtype dtype;
    uint32_t n_dims;
    uint64_t ne[4]; /* ne[0] = elements of a row (fastest), rest 1 */
    const void *data; /* borrowed from the mapping */
    uint64_t n_bytes;
};

pl_status pl_gguf_open(struct pl_gguf **out, const char *path, struct pl_err *err) PL_MUST_CHECK;
/* The same over caller's memory (borrowed until close): tests and fuzzing. */
pl_status pl_gguf_open_memory(struct pl_gguf **out, const void *data, size_t n, struct pl_err *err) PL_MUST_CHECK;
void pl_gguf_close(struct pl_gguf *g);
/* False once its file was found to be cut off while it was used (core/base/mapped.h): what was read since may be zeros. */
bool pl_gguf_is_whole(const struct pl_gguf *g);

size_t pl_gguf_n_tensors(const struct pl_gguf *g);
const struct pl_gguf_tensor *pl_gguf_tensor_at(const struct pl_gguf *g, size_t i);
const struct pl_gguf_tensor *pl_gguf_tensor(const struct pl_gguf *g, const char *name); /* NULL = absent */

/* Each getter: PL_OK, PL_ENOENT when absent, PL_EFORMAT when of another type. Integer types convert when in range. */
pl_status pl_gguf_u32(const struct pl_gguf *g, const char *key, uint32_t *v);
pl_status pl_gguf_f32(const struct pl_gguf *g, const char *key, float *v);
pl_status pl_gguf_bool(const struct pl_gguf *g, const char *key, bool *v);
pl_status pl_gguf_string(const struct pl_gguf *g, const char *key, struct pl_gguf_str *v);
/* Arrays: the count first, then elements; i must be below the count. */
pl_status pl_gguf_array_len(const struct pl_gguf *g, const char *key, uint64_t *n);
/* Fills v[0..n) where n is the array's length; strings borrow the mapping. */
pl_status pl_gguf_array_str(const struct pl_gguf *g, const char *key, struct pl_gguf_str *v, uint64_t n);
pl_status pl_gguf_array_f32(const struct pl_gguf *g, const char *key, float *v, uint64_t n);
pl_status pl_gguf_array_i32(const struct pl_gguf *g, const char *key, int32_t *v, uint64_t n);

/* All keys as they stand in the file, and how many: what a file made from this one begins with. */
const void *pl_gguf_keys(const struct pl_gguf *g, uint64_t *n_keys, size_t *n_bytes);
/* One of them: its name, type and value, n_bytes long; i below n_keys. */
const void *pl_gguf_key_at(const struct pl_gguf *g, uint64_t i, size_t *n_bytes);
uint32_t pl_gguf_alignment(const struct pl_gguf *g); /* of tensor data */

#endif
