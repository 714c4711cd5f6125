/* cuda: the CUDA device's own data. Host code of the device is C and calls the launchers of kernels.h.
 *
 * Everything is enqueued on one stream. An operation's host arrays (indices, positions) reach the device through the stage: a
 * pinned buffer and its twin on the device. step_begin sends the batch's arrays in one copy; upload() finds them there.
 * Thread: the engine's, but for lora_new and lora_free.  Owns: see each struct.
 * Fails: PL_EDEVICE, and from then on always (the first cause is reported once); PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_CUDA_H
#define PL_CUDA_CUDA_H

#include <stdatomic.h>

#include "core/device/cuda.h"
#include "core/device/device.h"
#include "cuda/blas.h"
#include "cuda/kernels.h"

_Static_assert(PL_CUDA_NO_ROW == PL_NO_ROW, "kernels know it by another name");

struct pl_dbuf {
    float *data;
    size_t n;
};

struct pl_weight {
    uint32_t rows, cols, n_parts;
    struct pl_cuda_part *parts;
    uint8_t *memory; /* that they lie in; neighbours of one float type one behind the other */
};

struct pl_kvdev {
    struct pl_kv_shape shape;
    struct pl_cuda_kv kv;
    size_t bytes;
};

/* What was uploaded since the step began, or since the operation began outside of a step. */
enum { PL_CUDA_KNOWN = 64, PL_CUDA_STAGES = 16, PL_CUDA_STAGE_BYTES = 1 << 20 /* at first */ };

struct pl_cuda_stage {
    uint8_t *host, *dev;
    size_t cap, used;
    struct pl_cuda_known {
        const void *from;
        size_t at, n;
    } known[PL_CUDA_KNOWN];
    uint32_t n_known;
    struct pl_cuda_stage_memory {
        uint8_t *host, *dev;
    } old[PL_CUDA_STAGES]; /* too small ones, in use until the stage is empty again; between ranks kept until the device is closed */
    uint32_t n_old;
};

/* Memory that an operation needs while it runs; the next one that takes the same kind may overwrite it. */
enum pl_cuda_scratch_kind { PL_CUDA_SCRATCH_PRODUCT, PL_CUDA_SCRATCH_NARROW, PL_CUDA_SCRATCH_WIDE, PL_CUDA_SCRATCH_QUANT, PL_CUDA_SCRATCH_ATTN,
                            PL_CUDA_SCRATCH_LORA, PL_CUDA_SCRATCH_SAMPLE, PL_CUDA_SCRATCH_RANKS,
                            /* of training: rounded operands, those that stay, a panel of a weight, the head, logits, and what rows or columns come to */
                            PL_CUDA_SCRATCH_LEFT, PL_CUDA_SCRATCH_X, PL_CUDA_SCRATCH_DY, PL_CUDA_SCRATCH_RIGHT, PL_CUDA_SCRATCH_HEAD,
                            PL_CUDA_SCRATCH_LOGITS, PL_CUDA_SCRATCH_SUMS, PL_CUDA_SCRATCH_KINDS };

/* Steps of decodes as CUDA graphs (record.c). */
enum { PL_CUDA_RECORDED = 64 };
struct pl_cuda_recorded {
    const void *owner, *kv, *stage; /* with the two sizes, the key; owner NULL = empty */
    uint32_t n_tokens, n_spans;
    cudaGraphExec_t exec; /* NULL = not yet */
    bool seen;
    uint32_t n_failed;
    unsigned freed; /* when it was captured */
    uint64_t used;  /* last, by the record's clock */
};

struct pl_cuda_record {
    bool off, broken;    /* not wanted; something has made it impossible to capture this step */
    bool told;
    uint32_t n_spans;    /* of attention in this step, 0 = what its batch has */
    atomic_uint freed;   /* how often memory was given back */
    uint64_t clock;
    struct pl_cuda_recorded steps[PL_CUDA_RECORDED], *current;
};

/* only_for: what the next operation makes goes to the product with `next` alone. Then a matrix that is not at `from`, but rounded to bf16
 * in PL_CUDA_SCRATCH_NARROW, until that product has read it. */
struct pl_cuda_narrowed {
    const struct pl_weight *next;
    const float *from; /* NULL = none */
    uint32_t rows, cols;
};

/* A matrix that stays as it is while products read it, and whether it is there rounded, in PL_CUDA_SCRATCH_X or _DY. */
enum { PL_CUDA_STAY = 2 };
struct pl_cuda_stay {
    struct pl_cuda_mat m; /* p NULL = none */
    bool made;
};

enum { PL_CUDA_OUTGROWN = 32 * PL_CUDA_SCRATCH_KINDS }; /* sizes grow by doubling */

struct pl_cuda {
    struct pl_device base;
    struct pl_device_ops ops; /* base.ops; its name is below */
    char name[128];
    int index, n_sms;
    uint32_t shared; /* bytes of shared memory that a block may have */
    bool has_halves, has_blocks; /* weights of f16 or bf16, and of block types */
    cudaStream_t stream;
    struct {
        cudaStream_t stream;
        cudaMemPool_t pool; /* NULL = the driver has none */
    } adapters; /* lora.c */
    struct pl_cublas blas;
    bool bf16; /* products of training take their operands so */
    struct pl_cuda_stay stays[PL_CUDA_STAY];
    struct pl_device_id id;
    struct pl_nccl *nccl; /* between ranks; NULL = there is none */
    atomic_bool lost;
    void (*report)(const char *message); /* of failures; may be NULL */
    bool in_step;
    struct pl_cuda_stage stage;
    struct {
        void *p;
        size_t cap;
    } scratch[PL_CUDA_SCRATCH_KINDS];
    void *outgrown[PL_CUDA_OUTGROWN]; /* between ranks: scratch that was too small; freed when the device is closed */
    uint32_t n_outgrown;
    void *blas_work; /* cuBLAS's; NULL = its own */
    struct pl_cuda_narrowed narrowed;
    struct pl_cuda_record record;
    struct pl_cuda_attn_tile *tiles; /* of the last attention, on the host */
    size_t tiles_cap;
};

static inline struct pl_cuda *pl_cuda_of(struct pl_device *dev)
{
    return (struct pl_cuda *)dev;
}

static inline struct pl_cuda_mat pl_cuda_mat(pl_view v)
{
    return (struct pl_cuda_mat){v.buf->data + v.offset, v.rows, v.cols, v.stride};
}

/* A bias or gain; NULL for none. */
static inline float *pl_cuda_vector(pl_view v)
{
    return v.buf != NULL ? v.buf->data + v.offset : NULL;
}

/* What a CUDA call says as a status: PL_ENOMEM where memory is out, PL_EDEVICE for all else and ever after. */
pl_status pl_cuda_check(struct pl_cuda *c, cudaError_t e, const char *what) PL_MUST_CHECK;
/* The same for what cuBLAS says. */
pl_status pl_cuda_check_blas(struct pl_cuda *c, int status) PL_MUST_CHECK;
/* Before bytes are copied between the stream and the host's pageable memory, which waits for the stream without an eye on the other
 * ranks: between ranks, waits with one. */
pl_status pl_cuda_settle(struct pl_cuda *c, const char *what) PL_MUST_CHECK;
/* Waits for all that is enqueued. */
pl_status pl_cuda_sync(struct pl_cuda *c, const char *what) PL_MUST_CHECK;
/* Every operation that uploads begins with this: empties the stage when no step runs. */
pl_status pl_cuda_begin(struct pl_cuda *c) PL_MUST_CHECK;
/* Room for so much of it; what that takes of the device's memory in addition. */
pl_status pl_cuda_reserve_stage(struct pl_cuda *c, size_t n) PL_MUST_CHECK;
size_t pl_cuda_stage_bytes(const struct pl_cuda *c, size_t n);
/* The memory that cuBLAS works in. */
pl_status pl_cuda_reserve_blas(struct pl_cuda *c) PL_MUST_CHECK;
size_t pl_cuda_blas_bytes(const struct pl_cuda *c);
/* Host bytes on the device until the step, or the operation outside of a step, ends. NULL: out of memory, or the device is lost. */
const void *pl_cuda_upload(struct pl_cuda *c, const void *from, size_t n);
/* Both, for an operation that uploads one thing. */
const void *pl_cuda_bring(struct pl_cuda *c, const void *from, size_t n);
/* At least n bytes of device memory; NULL as above. */
void *pl_cuda_scratch(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, size_t n);
/* At least n bytes for those to come. */
pl_status pl_cuda_scratch_grow(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, size_t n) PL_MUST_CHECK;
/* What upload or scratch failed with. */
pl_status pl_cuda_failed(const struct pl_cuda *c);
/* False when an upload failed. */
bool pl_cuda_batch_on_device(struct pl_cuda *c, const struct pl_batch *b, struct pl_cuda_batch *out);
/* Memory of the device, not zeroed. */
pl_status pl_cuda_alloc(struct pl_cuda *c, void **p, size_t n) PL_MUST_CHECK;
void pl_cuda_release(struct pl_cuda *c, void *p);

/* For an operation that can round its result: who alone reads it, as only_for said; forgotten then. */
static inline const struct pl_weight *pl_cuda_take_next(struct pl_cuda *c)
{
    const struct pl_weight *next = c->narrowed.next;
    c->narrowed.next = NULL;
    return next;
}
/* Where the result goes, rounded and close together, instead of to out; *to is NULL when it goes to out. */
pl_status pl_cuda_narrow_to(struct pl_cuda *c, const struct pl_weight *next, pl_view out, void **to) PL_MUST_CHECK;

/* The most that products by cuBLAS (x rounded, and sums), sampling, all of T rows, and attention take as scratch. */
size_t pl_cuda_sample_bytes(size_t T, size_t V);
size_t pl_cuda_narrow_bytes(size_t T, size_t K);
size_t pl_cuda_sums_bytes(size_t T, size_t N);
size_t pl_cuda_lora_bytes(size_t T);
size_t pl_cuda_attn_bytes(const struct pl_step_shape *s);
/* Spans of the batch's longest context, and what that is rounded up to in steps that are recorded. */
uint32_t pl_cuda_spans(const struct pl_batch *b);
static inline uint32_t pl_cuda_round_spans(uint32_t n)
{
    uint32_t rounded = 1;
    while (rounded < n)
        rounded *= 2;
    return rounded;
}
/* c->tiles has room for n. */
bool pl_cuda_reserve_tiles(struct pl_cuda *c, uint32_t n);
void pl_cuda_record_close(struct pl_cuda *c);
pl_status pl_cuda_adapters_open(struct pl_cuda *c) PL_MUST_CHECK;
void pl_cuda_adapters_close(struct pl_cuda *c);
/* The device whose step this thread captures; NULL = none. Others (adapters are made on theirs) go on as ever meanwhile. */
extern _Thread_local const struct pl_cuda *pl_cuda_captured;

/* What the library exports. */
__attribute__((visibility("default"))) pl_cuda_open_fn pl_cuda_open;

/* nccl.c. wait: for the stream, as long as the other ranks are there. */
extern const struct pl_device_links pl_nccl_links;
pl_status pl_nccl_wait(struct pl_cuda *c, const char *what) PL_MUST_CHECK;
bool pl_nccl_failed(const struct pl_cuda *c); /* a rank was lost */
void pl_nccl_close(struct pl_cuda *c);
size_t pl_nccl_bytes(const struct pl_cuda *c, const struct pl_step_shape *s); /* that exchanges within a step work in */

/* The operations of device.h, one family per file. */
void pl_cuda_record_set(struct pl_device *dev, bool on);
uint32_t pl_cuda_record_tokens(struct pl_device *dev, uint32_t n_tokens);
pl_status pl_cuda_record_op(struct pl_device *dev, const void *owner, const struct pl_kvdev *kv, const struct pl_batch *b, bool *known);
pl_status pl_cuda_repeat_op(struct pl_device *dev, bool whole);
void pl_cuda_only_for(struct pl_device *dev, const struct pl_weight *w);
pl_status pl_cuda_embed_op(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add);
pl_status pl_cuda_norm_op(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps);
pl_status pl_cuda_act_op(struct pl_device *dev, pl_act_kind kind, pl_view x);
pl_status pl_cuda_gather_op(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows);
pl_status pl_cuda_sample_op(struct pl_device *dev, pl_view logits, const struct pl_draws *draws, struct pl_drawn *out);
pl_status pl_cuda_weight_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out,
                             struct pl_err *err);
size_t pl_cuda_weight_bytes(const struct pl_weight_src *parts, size_t n_parts); /* that it takes */
void pl_cuda_weight_free(struct pl_device *dev, struct pl_weight *w);
pl_status pl_cuda_matmul_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add);
pl_status pl_cuda_matmul_glu_op(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                                const struct pl_plus *plus);
size_t pl_cuda_work_bytes(struct pl_device *dev, const struct pl_step_shape *s);
pl_status pl_cuda_reserve(struct pl_device *dev, const struct pl_step_shape *s);
size_t pl_cuda_kv_bytes(struct pl_device *dev, const struct pl_kv_shape *shape);
pl_status pl_cuda_kv_new(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out);
void pl_cuda_kv_free(struct pl_device *dev, struct pl_kvdev *kv);
pl_status pl_cuda_kv_copy(struct pl_device *dev, struct pl_kvdev *kv, uint32_t from, uint32_t to);
pl_status pl_cuda_kv_write_op(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                              const struct pl_batch *b);
pl_status pl_cuda_attn_op(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                          const struct pl_batch *b);
pl_status pl_cuda_lora_new(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out,
                           struct pl_err *err);
void pl_cuda_lora_free(struct pl_device *dev, struct pl_lora *l);
pl_status pl_cuda_lora_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add);

#endif
