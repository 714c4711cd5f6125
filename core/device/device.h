/* device: where tensors live and what can be done to them. The model's forward pass (core/model/forward.c) is written
 * once against this interface; the scalar CPU implementation is the oracle for every other one.
 *
 * Ops are ordered; their results may be read after step_end. All activations are float32. A row of an op's result
 * depends only on that row's inputs, never on what else is in the batch or on the number of threads: reductions run
 * in a fixed order, so that a sequence gives the same bits alone, batched, chunked, preempted or from cached pages.
 * One exception: CUDA gives products of more than 16 rows with f16 or bf16 weights to cuBLAS, which chooses a kernel by their number, and rounds
 * their inputs to the weight's type. Up to 16 rows, and for all other types, it keeps the promise.
 *
 * Thread: the engine's only, but for lora_new and lora_free.  Owns: buffers, weights and caches until freed; freed before close.
 * Fails: PL_ENOMEM, PL_ENOTSUP when a weight type is not supported, PL_EDEVICE (sticky: the device is lost).
 * Shapes: T tokens of the flat batch, K inputs and N outputs of a product, C model width, F feed-forward width,
 * H query heads, G key/value heads, D head width, R rows that want logits, V vocabulary.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_DEVICE_H
#define PL_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/base/status.h"
#include "core/model/dtype.h"

struct pl_device;
struct pl_dbuf;   /* memory of the device */
struct pl_weight; /* a matrix [N, K] as the device keeps it (repacked, still quantized) */
struct pl_kvdev;  /* the pages of a KV cache */
struct pl_train_ops;
struct pl_lora;   /* low-rank changes of one product, as the device keeps them */
struct pl_draws;  /* core/device/draw.h */
struct pl_drawn;

/* A float32 matrix inside a buffer; row r starts at element offset + r * stride. By value. */
typedef struct {
    struct pl_dbuf *buf; /* borrowed */
    size_t offset;       /* elements */
    uint32_t rows, cols, stride;
} pl_view;

/* One iteration's flat batch: n_seqs sequences, the tokens of sequence s are [q_start[s], q_start[s + 1]).
 *
 *   tokens   | s0 s0 s0 s0 | s1 | s2 | s3 s3 |      prefill chunk, two decodes, another chunk
 *   pos      |  0  1  2  3 | 17 | 40 |  8  9 |      position in its own sequence
 *   ctx[s]   |           4 | 18 | 41 |    10 |      tokens in the cache once this step has written its own
 *
 * The pages of sequence s are pages[page_start[s] .. page_start[s + 1]); token i of a sequence lies in its page
 * i / page_size at i % page_size. slot[t] = page * page_size + offset, where token t's K and V are written.
 * All arrays are borrowed until step_end. */
struct pl_batch {
    uint32_t n_tokens, n_seqs, n_rows;
    const int32_t *tokens;      /* [T] */
    const uint32_t *pos;        /* [T] */
    const uint32_t *slot;       /* [T] */
    const uint32_t *q_start;    /* [n_seqs + 1] */
    const uint32_t *ctx;        /* [n_seqs] */
    const uint32_t *page_start; /* [n_seqs + 1] */
    const uint32_t *pages;
    const uint32_t *rows; /* [R] ascending token indices whose logits are wanted, each once */
    const uint32_t *adapter; /* [n_seqs] slot of each sequence's adapter (pl_model_adapter), 0 = none; NULL = no one has any */
    const struct pl_draws *draws; /* what the rows are sampled by, where the device does that; NULL = the host does */
    struct pl_drawn *drawn;       /* [R] what came of it */
};

/* Part of a weight as the file holds it: N rows of K elements. Consecutive parts are stacked, first part's rows first;
 * their types may differ (fused QKV of a mixed-type file). */
struct pl_weight_src {
    pl_dtype dtype;
    uint32_t rows, cols;
    const void *data; /* borrowed while the device loads, and for as long as the weight lives if it is not repacked */
    size_t stride;    /* bytes from one row to the next; 0 = they lie one behind the other */
};

static inline size_t pl_weight_src_stride(const struct pl_weight_src *s)
{
    return s->stride != 0 ? s->stride : pl_dtype_row_bytes(s->dtype, s->cols);
}

/* A low-rank change of a product's outputs [first, first + rows): out += scale * (x · Aᵀ) · Bᵀ. Copied by the device. */
struct pl_lora_src {
    const float *a, *b; /* [rank][K], [rows][rank] */
    uint32_t rank, first, rows;
    float scale;
};

/* The rows of a batch that one adapter changes. */
struct pl_lora_use {
    const struct pl_lora *lora;
    const uint32_t *rows; /* [n_rows], each in one use only */
    uint32_t n_rows;
};

/* What is added to some rows of a product's result. */
struct pl_plus {
    pl_view values;   /* of the result's shape */
    const bool *rows; /* [T] which of them count */
};

#define PL_NO_ROW UINT32_MAX

/* What every device can do; models beyond it are refused when they are loaded. */
enum { PL_MAX_HEAD_DIM = 256, PL_MAX_QUERIES_PER_KV = 16 };

/* Element types of a cache. F16: 16 bits, in the form that the device multiplies best, as near to F32 as half floats are or nearer.
 * Q8_0: int8 with a scale per 32 elements of a head, a little more than half of F16. F8: e4m3, with a power of two for each token's key
 * (or value) of a head, half of F16; not on every device. */
#define PL_KV_TYPE_LIST(X) X("f32", PL_F32) X("f16", PL_F16) X("bf16", PL_BF16) X("q8_0", PL_Q8_0) X("fp8", PL_F8)
#define PL_KV_TYPES "f32, f16, bf16, q8_0 or fp8"

/* false when there is no such type. */
static inline bool pl_kv_type(const char *name, pl_dtype *type)
{
#define X(text, value)                                                                                                 \
    if (strcmp(name, text) == 0)                                                                                       \
        return *type = value, true;
    PL_KV_TYPE_LIST(X)
#undef X
    return false;
}

static inline const char *pl_kv_type_name(pl_dtype type)
{
#define X(text, value)                                                                                                 \
    if (type == value)                                                                                                 \
        return text;
    PL_KV_TYPE_LIST(X)
#undef X
    return "unknown";
}

struct pl_kv_shape {
    uint32_t n_layers, n_kv_heads, head_dim;
    uint32_t page_size; /* tokens */
    uint32_t n_pages;
    pl_dtype dtype; /* of PL_KV_TYPE_LIST */
};

/* The largest of what a model asks of a device in one step. */
struct pl_step_shape {
    uint32_t n_tokens;    /* rows of any operation */
    uint32_t n_in, n_out; /* of any product */
    uint32_t n_gated;     /* outputs of a gated product, both parts; 0 = none */
    uint32_t n_heads, n_kv_heads, head_dim, n_ctx;
};

typedef enum { PL_NORM_RMS, PL_NORM_LAYER } pl_norm_kind;
typedef enum { PL_ROPE_NONE, PL_ROPE_INTERLEAVED /* pairs (2i, 2i+1) */, PL_ROPE_HALVES /* pairs (i, i + n/2) */ } pl_rope_kind;
typedef enum { PL_ACT_SILU, PL_ACT_GELU_TANH } pl_act_kind;

/* How the heads of a layer are rotated by their token's position: their first n_dims elements, in pairs, pair i by the angle pos[t] * freq[i]. */
struct pl_rotation {
    pl_rope_kind kind; /* NONE: not at all */
    uint32_t n_dims;
    pl_view freq; /* [1, n_dims / 2]; base, linear scaling and frequency factors are in it */
};

/* What ranks tell each other of their devices, before they compute side by side. */
struct pl_device_id {
    char name[96];
    uint8_t unique[16]; /* of one device of all machines */
    uint32_t arch;      /* what its programs are built for: 90 = compute capability 9.0 */
};

/* Exchanges between the devices of ranks that do not pass through the host's memory. */
struct pl_comm;
struct pl_device_links {
    void (*identify)(struct pl_device *dev, struct pl_device_id *id);
    /* Whether what it takes is installed, and in which version. PL_EINVAL with param "rank-exchange". */
    pl_status (*find)(struct pl_device *dev, uint32_t *version, struct pl_err *err);
    /* By all ranks of host's at once, each with a device of its own. *out has host's way for what is not the devices', and is closed with
     * the device. host: borrowed. */
    pl_status (*open)(struct pl_device *dev, struct pl_comm *host, struct pl_comm **out, struct pl_err *err);
};

struct pl_device_ops {
    const char *name;
    bool rounds_inputs; /* products of block types round their inputs to 8 bits: a sum taken in another order may become a visible difference */
    void (*close)(struct pl_device *dev);
    /* The calling thread will issue the operations from now on; one that serves and does nothing else, since the CPU device
     * ties it and its team to one processor each. Not needed for results. */
    void (*attach)(struct pl_device *dev);

    /* What the device's own memory has left, and all of it; NULL where that is the host's. */
    pl_status (*memory)(struct pl_device *dev, size_t *free_bytes, size_t *total);
    /* Measures a copy within that memory: bytes read and written in a second. NULL where that is the host's. */
    pl_status (*copy_speed)(struct pl_device *dev, double *bytes_per_second);

    pl_status (*buf_new)(struct pl_device *dev, size_t n_floats, struct pl_dbuf **out);
    void (*buf_free)(struct pl_device *dev, struct pl_dbuf *buf);
    pl_status (*put)(struct pl_device *dev, struct pl_dbuf *buf, size_t offset, const float *src, size_t n);
    pl_status (*get)(struct pl_device *dev, const struct pl_dbuf *buf, size_t offset, float *dst, size_t n);
    /* The same with rows that may lie apart on the device; the host's lie one behind the other. */
    pl_status (*put_rows)(struct pl_device *dev, pl_view to, const float *src);
    pl_status (*get_rows)(struct pl_device *dev, pl_view from, float *dst);
    /* The buffer's memory where the host can read it in place, else NULL (use get). */
    const float *(*host)(struct pl_device *dev, const struct pl_dbuf *buf);

    pl_status (*weight_new)(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts,
                            struct pl_weight **out, struct pl_err *err);
    void (*weight_free)(struct pl_device *dev, struct pl_weight *w);

    /* Parts of one product with K inputs; no output is in two of them. Both are also called on other threads, while
     * operations run; what is freed is used by none that runs. */
    pl_status (*lora_new)(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out,
                          struct pl_err *err);
    void (*lora_free)(struct pl_device *dev, struct pl_lora *l);

    /* Takes at once the memory that operations work in, beside what they are handed, so that steps up to this shape take none. After
     * the weights, on whose types it depends. work_bytes: how much that is. NULL where it is little. */
    size_t (*work_bytes)(struct pl_device *dev, const struct pl_step_shape *s);
    pl_status (*reserve)(struct pl_device *dev, const struct pl_step_shape *s);

    size_t (*kv_bytes)(struct pl_device *dev, const struct pl_kv_shape *shape); /* what kv_new would take; 0 = the device lacks the type */
    pl_status (*kv_new)(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out);
    void (*kv_free)(struct pl_device *dev, struct pl_kvdev *kv);
    /* Copies what page `from` holds of each layer to page `to`, between steps. NULL = the device cannot. */
    pl_status (*kv_copy)(struct pl_device *dev, struct pl_kvdev *kv, uint32_t from, uint32_t to);
    /* Makes memory of the first n_pages present, so that no step waits for it: a piece that takes some milliseconds, between
     * steps. False = all of it is. NULL = kv_new did. */
    bool (*kv_prepare)(struct pl_device *dev, struct pl_kvdev *kv, uint32_t n_pages);

    pl_status (*step_begin)(struct pl_device *dev, const struct pl_batch *b);
    pl_status (*step_end)(struct pl_device *dev);

    /* Steps of one token for each sequence, each with a row, may be recorded and repeated by devices to which starting operations is dear;
     * all four NULL: by others not. A step that is to be has record_tokens(n) tokens (0: it is not recorded); those that fill it up
     * write nothing: their slot is PL_NO_ROW. Between step_begin and its operations record is called. When it sets *known, the operations
     * are left out; else they follow, with nothing that waits for them. Then repeat does them. Either may say PL_ENOTSUP: the operations are then
     * done as ever. whole: none of them failed.
     * A step's operations follow from owner, kv, and the number of tokens; buffers are the same for the same owner. */
    void (*record_set)(struct pl_device *dev, bool on);
    uint32_t (*record_tokens)(struct pl_device *dev, uint32_t n_tokens);
    pl_status (*record)(struct pl_device *dev, const void *owner, const struct pl_kvdev *kv, const struct pl_batch *b, bool *known);
    pl_status (*repeat)(struct pl_device *dev, bool whole);

    /* The next operation, a norm, a gated product or attention, makes what the product with w alone reads, once: it may be kept in another form, and
     * out is then not written. NULL = the device has no other. */
    void (*only_for)(struct pl_device *dev, const struct pl_weight *w);

    /* out[n, C] (+)= rows idx[i] of w[*, C]; PL_NO_ROW is a row of zeros. add: accumulate (learned positions). */
    pl_status (*embed)(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add);
    /* out[T, C] = norm(x) * gain (+ bias); bias.buf NULL = none. gain and bias are [1, C]. out may be x. */
    pl_status (*norm)(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps);
    /* out[T, N] (+)= x[T, K] · wᵀ (+ bias[1, N]; bias.buf NULL = none). add: accumulate (residual). out is not x. */
    pl_status (*matmul)(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add);
    /* out[T, F] = act(g) * u, where [g, u] = x[T, K] · wᵀ (+ bias[1, 2F]) (+ plus; NULL = none): w has two parts, gate and up,
     * of F rows each. */
    pl_status (*matmul_glu)(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                            const struct pl_plus *plus);
    /* out[r] (+)= what use u makes of x[r], for each row r of each use; other rows are not touched. Without add, outputs that
     * no part is for become 0. */
    pl_status (*lora)(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add);
    /* Rotates q[T, H * D] in place, and writes k, rotated too, and v [T, G * D] of a layer to the batch's slots. What k holds afterwards is not
     * said. r NULL or of kind NONE: nothing is rotated, and q is not looked at. */
    pl_status (*kv_write)(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                          const struct pl_batch *b);
    /* out[T, H * D] = causal softmax(q · Kᵀ * scale) · V for each token over its own sequence's pages (positions
     * 0 .. pos[t]); query head h reads key/value head h / (H / G). Online soft-max, no T × T matrix. */
    pl_status (*attn)(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                      const struct pl_batch *b);
    /* x = act(x) in place */
    pl_status (*act)(struct pl_device *dev, pl_act_kind kind, pl_view x);
    /* out[R, C] = x[rows[i]] */
    pl_status (*gather)(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows);
    /* out[R] = what draws make of logits[R, V], as core/device/draw.h defines it; logits stay as they are. out is there after
     * step_end. NULL = the host samples. */
    pl_status (*sample)(struct pl_device *dev, pl_view logits, const struct pl_draws *draws, struct pl_drawn *out);

    const struct pl_device_links *links; /* NULL = ranks exchange through the host's memory */
    const struct pl_train_ops *train; /* core/device/train.h; NULL when the device cannot train */
};

struct pl_device {
    const struct pl_device_ops *ops;
    /* implementations put this first in their own struct */
};

static inline pl_view pl_view_none(void)
{
    return (pl_view){0};
}

/* Columns [from, from + n) of v. */
static inline pl_view pl_view_cols(pl_view v, uint32_t from, uint32_t n)
{
    v.offset += from;
    v.cols = n;
    return v;
}

static inline pl_view pl_view_rows(pl_view v, uint32_t from, uint32_t n)
{
    v.offset += (size_t)from * v.stride;
    v.rows = n;
    return v;
}

/* The CPU device (core/device/cpu). isa: NULL = the best this processor has; "ref", "avx2", "avxvnni" and "avx512" force one
 * (PL_ENOTSUP when the processor lacks it). pool: borrowed, outlives the device. */
struct pl_pool;
pl_status pl_cpu_open(struct pl_device **out, struct pl_pool *pool, const char *isa, struct pl_err *err) PL_MUST_CHECK;

/* Any device by its name: "cpu", "cpu-ISA", "cuda", "cuda:INDEX", or "auto": a GPU where one can be used, else the CPU (a log
 * line says why). cuda_library: see core/device/cuda.h. PL_EINVAL, with param "device", names the remedy. */
pl_status pl_device_open(struct pl_device **out, const char *name, const char *cuda_library, struct pl_pool *pool, struct pl_err *err) PL_MUST_CHECK;

#endif
