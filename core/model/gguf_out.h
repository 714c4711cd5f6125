/* gguf_out: writes GGUF files (version 3): keys copied from another file or made, tensors copied as they are or row by row
 * from float32 values. The one writer; what it is given is trusted.
 * Thread: one at a time.  Owns: keys and the list of tensors; borrows the data of copied tensors until it has written.
 * Fails: PL_EINVAL (a row that the type cannot hold, by the tensor's name), PL_EIO (nothing is left behind), PL_ENOMEM.
 * Source: the GGUF specification, ggml-org/ggml docs/gguf.md.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_GGUF_OUT_H
#define PL_MODEL_GGUF_OUT_H

#include "core/base/buf.h"
#include "core/model/gguf.h"

struct pl_gguf_out {
    struct pl_buf keys;
    uint64_t n_keys;
    uint32_t alignment;
    struct pl_gguf_out_tensor {
        struct pl_gguf_tensor t; /* name: owned; data: NULL = row by row */
        uint64_t offset;         /* from the first tensor's place */
    } *tensors;
    size_t n_tensors;
};

void pl_gguf_out_init(struct pl_gguf_out *o);
void pl_gguf_out_fini(struct pl_gguf_out *o);

/* All keys of g, in its order, and its alignment. */
void pl_gguf_out_all_keys(struct pl_gguf_out *o, const struct pl_gguf *g);
/* The keys that begin with prefix, but for the one named. */
void pl_gguf_out_keys_of(struct pl_gguf_out *o, const struct pl_gguf *g, const char *prefix, const char *but);
void pl_gguf_out_u32(struct pl_gguf_out *o, const char *key, uint32_t v);
void pl_gguf_out_f32(struct pl_gguf_out *o, const char *key, float v);
void pl_gguf_out_bool(struct pl_gguf_out *o, const char *key, bool v);
void pl_gguf_out_str(struct pl_gguf_out *o, const char *key, const char *s, size_t n);
/* An array; exactly n items follow. */
void pl_gguf_out_strs(struct pl_gguf_out *o, const char *key, uint64_t n);
void pl_gguf_out_strs_item(struct pl_gguf_out *o, const char *s, size_t n);
void pl_gguf_out_i32s(struct pl_gguf_out *o, const char *key, uint64_t n);
void pl_gguf_out_i32s_item(struct pl_gguf_out *o, int32_t v);

/* t: name, dimensions, type (n_bytes is computed), data. */
void pl_gguf_out_tensor(struct pl_gguf_out *o, const struct pl_gguf_tensor *t);

/* Row `row` of the tensor that was added as number `tensor`. Asked for each in turn, ascending; the first failure ends the writing. */
typedef pl_status pl_gguf_rows(void *arg, size_t tensor, uint64_t row, float *out);
/* rows may be NULL when all data is given. */
pl_status pl_gguf_out_write(struct pl_gguf_out *o, const char *path, pl_gguf_rows *rows, void *arg, struct pl_err *err) PL_MUST_CHECK;
/* A file of the keys alone, in memory: for pl_gguf_open_memory. Appends. */
void pl_gguf_out_head(struct pl_gguf_out *o, struct pl_buf *out);

static inline uint64_t pl_gguf_n_rows(const struct pl_gguf_tensor *t)
{
    return t->ne[1] * t->ne[2] * t->ne[3];
}

#endif
