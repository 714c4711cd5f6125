/* safetensors: reads and writes files of the safetensors format: u64le n, n bytes of JSON header, tensors without gaps.
 * Reading: the whole file is read into memory, so that nothing that happens to it later matters; header size, JSON, names,
 * types, shapes and offsets are checked (tensors neither overlap nor leave gaps, and end where the file ends), so that what
 * this module hands out can be trusted.
 * Writing: beside the file under another name, then fsync and rename, so that the file is never there in part. The bytes
 * follow from the arguments alone, and are those that Hugging Face's library writes.
 * Thread: any; an open file is read-only, a writer belongs to one thread.  Owns: the bytes read; a writer its temporary file.
 * Fails: PL_EFORMAT (with what and where), PL_ENOTSUP (an element type, by name), PL_EIO, PL_ENOMEM.
 * Source: huggingface/safetensors, README.md "Format".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_SAFETENSORS_H
#define PL_MODEL_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/model/dtype.h"

struct pl_safetensors;

enum { PL_ST_MAX_DIMS = 8 };
#define PL_ST_MAX_FILE ((size_t)4 << 30) /* bytes of a file that is read: those of an adapter, not of a whole model */

/* A tensor of a file, or of a file to be. */
struct pl_st_tensor {
    const char *name; /* borrowed */
    pl_dtype dtype;   /* PL_F32, PL_F16 or PL_BF16 */
    uint32_t n_dims;
    uint64_t dims[PL_ST_MAX_DIMS]; /* dims[0] slowest, as PyTorch shows them */
    const void *data;              /* reading: borrowed from the file, maybe unaligned; writing: see each function */
};

struct pl_st_meta {
    const char *key, *value;
};

pl_status pl_safetensors_open(struct pl_safetensors **out, const char *path, struct pl_err *err) PL_MUST_CHECK;
/* The same over caller's memory (borrowed until close): tests and fuzzing. */
pl_status pl_safetensors_open_memory(struct pl_safetensors **out, const void *data, size_t n, struct pl_err *err) PL_MUST_CHECK;
void pl_safetensors_close(struct pl_safetensors *st);

size_t pl_safetensors_n(const struct pl_safetensors *st);
const struct pl_st_tensor *pl_safetensors_at(const struct pl_safetensors *st, size_t i); /* in the order of the names' bytes */
const struct pl_st_tensor *pl_safetensors_find(const struct pl_safetensors *st, const char *name); /* NULL = absent */
const char *pl_safetensors_meta(const struct pl_safetensors *st, const char *key);                 /* NULL = absent */

uint64_t pl_st_elements(const struct pl_st_tensor *t);
/* out[elements] = the tensor's values. */
void pl_st_read_f32(const struct pl_st_tensor *t, float *out);

/* All at once; data = the elements in the tensor's dtype. PL_EINVAL for a name twice or an element type that cannot be. */
pl_status pl_safetensors_write(const char *path, const struct pl_st_tensor *tensors, size_t n, const struct pl_st_meta *meta,
                               size_t n_meta, struct pl_err *err) PL_MUST_CHECK;

/* Tensor by tensor, for more than fits into memory: data is not looked at by create; put takes each tensor once, in any
 * order, by its index in tensors, as float32 values that are narrowed to its dtype. Commit makes the file appear (all
 * tensors must be there); free without commit leaves nothing behind. */
struct pl_st_writer;
pl_status pl_st_writer_new(struct pl_st_writer **out, const char *path, const struct pl_st_tensor *tensors, size_t n,
                           const struct pl_st_meta *meta, size_t n_meta, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_st_writer_put(struct pl_st_writer *w, size_t i, const float *values, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_st_writer_commit(struct pl_st_writer *w, struct pl_err *err) PL_MUST_CHECK;
void pl_st_writer_free(struct pl_st_writer *w);

#endif
