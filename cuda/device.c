/* device: opens the CUDA device; its memory, the stage, and the beginning and end of a step.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/version.h"
#include "cuda/train.h"

/* ---- errors ------------------------------------------------------------------------------------------------------------ */

pl_status pl_cuda_check(struct pl_cuda *c, cudaError_t e, const char *what)
{
    if (e == cudaErrorMemoryAllocation && !atomic_load(&c->lost)) {
        (void)cudaGetLastError(); /* it is not sticky, but for the next who asks */
        return PL_ENOMEM;
    }
    if (e != cudaSuccess && pl_cuda_captured == c) {
        (void)cudaGetLastError();
        c->record.broken = true; /* the device is as it was */
        return PL_ENOTSUP;
    }
    if (e != cudaSuccess && !atomic_exchange(&c->lost, true) && c->report != NULL) {
        char text[300];
        snprintf(text, sizeof text, "%s failed: %s: %s", c->name, what, cudaGetErrorString(e));
        c->report(text);
    }
    return atomic_load(&c->lost) ? PL_EDEVICE : PL_OK;
}

pl_status pl_cuda_failed(const struct pl_cuda *c)
{
    return atomic_load(&c->lost) ? PL_EDEVICE : c->nccl != NULL && pl_nccl_failed(c) ? PL_ERANK : PL_ENOMEM;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

/* CUDA's current device is the thread's; whoever may be on a thread of its own says which. */
pl_status pl_cuda_alloc(struct pl_cuda *c, void **p, size_t n)
{
    *p = NULL;
    const pl_status rc = pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMalloc(p, n > 0 ? n : 1), "allocating");
}

void pl_cuda_release(struct pl_cuda *c, void *p)
{
    if (p == NULL || pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU") != PL_OK)
        return; /* a lost device's memory goes with it */
    atomic_fetch_add(&c->record.freed, 1);
    (void)!pl_cuda_check(c, cudaFree(p), "freeing memory");
}

static pl_status buf_new(struct pl_device *dev, size_t n_floats, struct pl_dbuf **out)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const size_t n = n_floats > 0 ? n_floats : 1;
    struct pl_dbuf *b = n <= SIZE_MAX / 8 ? calloc(1, sizeof *b) : NULL;
    if (b == NULL)
        return PL_ENOMEM;
    pl_status rc = pl_cuda_alloc(c, (void **)&b->data, n * sizeof(float));
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemsetAsync(b->data, 0, n * sizeof(float), c->stream), "clearing memory");
    if (rc != PL_OK) {
        pl_cuda_release(c, b->data);
        free(b);
        return rc;
    }
    b->n = n;
    *out = b;
    return PL_OK;
}

static void buf_free(struct pl_device *dev, struct pl_dbuf *buf)
{
    if (buf == NULL)
        return;
    pl_cuda_release(pl_cuda_of(dev), buf->data);
    free(buf);
}

pl_status pl_cuda_sync(struct pl_cuda *c, const char *what)
{
    return c->nccl != NULL ? pl_nccl_wait(c, what) : pl_cuda_check(c, cudaStreamSynchronize(c->stream), what);
}

pl_status pl_cuda_settle(struct pl_cuda *c, const char *what)
{
    return c->nccl != NULL ? pl_nccl_wait(c, what) : PL_OK;
}

static pl_status put(struct pl_device *dev, struct pl_dbuf *buf, size_t offset, const float *src, size_t n)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (offset > buf->n || n > buf->n - offset)
        return PL_EINVAL;
    pl_status rc = pl_cuda_settle(c, "copying to the GPU");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemcpyAsync(buf->data + offset, src, n * sizeof *src, cudaMemcpyHostToDevice, c->stream), "copying to the GPU");
    return rc != PL_OK ? rc : pl_cuda_sync(c, "copying to the GPU");
}

static pl_status get(struct pl_device *dev, const struct pl_dbuf *buf, size_t offset, float *dst, size_t n)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (offset > buf->n || n > buf->n - offset)
        return PL_EINVAL;
    pl_status rc = pl_cuda_settle(c, "copying from the GPU");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemcpyAsync(dst, buf->data + offset, n * sizeof *dst, cudaMemcpyDeviceToHost, c->stream), "copying from the GPU");
    return rc != PL_OK ? rc : pl_cuda_sync(c, "copying from the GPU");
}

/* The view's bytes and the host's, one way or the other. */
static pl_status copy_rows(struct pl_device *dev, pl_view v, void *to, size_t to_stride, const void *from, size_t from_stride, enum cudaMemcpyKind kind,
                           const char *what)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (v.rows == 0 || v.cols == 0)
        return PL_OK;
    if (v.stride < v.cols || v.offset > v.buf->n || (v.rows - 1) * (size_t)v.stride + v.cols > v.buf->n - v.offset)
        return PL_EINVAL;
    pl_status rc = pl_cuda_settle(c, what);
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemcpy2DAsync(to, to_stride * sizeof(float), from, from_stride * sizeof(float), v.cols * sizeof(float), v.rows, kind,
                                                c->stream), what);
    return rc != PL_OK ? rc : pl_cuda_sync(c, what);
}

static pl_status put_rows(struct pl_device *dev, pl_view to, const float *src)
{
    return copy_rows(dev, to, to.buf->data + to.offset, to.stride, src, to.cols, cudaMemcpyHostToDevice, "copying to the GPU");
}

static pl_status get_rows(struct pl_device *dev, pl_view from, float *dst)
{
    return copy_rows(dev, from, dst, from.cols, from.buf->data + from.offset, from.stride, cudaMemcpyDeviceToHost, "copying from the GPU");
}

static const float *host(struct pl_device *dev, const struct pl_dbuf *buf)
{
    (void)dev, (void)buf;
    return NULL;
}

/* Freeing waits for the device, and in one process for those of other ranks, which may wait for what this one has not enqueued yet:
 * between ranks memory is kept instead. */
static pl_status drop_scratch(struct pl_cuda *c, enum pl_cuda_scratch_kind kind)
{
    if (c->nccl == NULL)
        pl_cuda_release(c, c->scratch[kind].p); /* waits for whoever uses it */
    else if (c->n_outgrown == PL_CUDA_OUTGROWN)
        return PL_ENOMEM;
    else if (c->scratch[kind].p != NULL)
        c->outgrown[c->n_outgrown++] = c->scratch[kind].p;
    c->scratch[kind].p = NULL;
    c->scratch[kind].cap = 0;
    return PL_OK;
}

pl_status pl_cuda_scratch_grow(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, size_t n)
{
    if (n <= c->scratch[kind].cap)
        return PL_OK;
    pl_status rc = pl_cuda_settle(c, "making room"); /* allocating may wait for the stream */
    if (rc == PL_OK)
        rc = drop_scratch(c, kind);
    if (rc == PL_OK)
        rc = pl_cuda_alloc(c, &c->scratch[kind].p, n);
    if (rc == PL_OK)
        c->scratch[kind].cap = n;
    return rc;
}

void *pl_cuda_scratch(struct pl_cuda *c, enum pl_cuda_scratch_kind kind, size_t n)
{
    if (n > c->scratch[kind].cap && pl_cuda_captured == c) {
        c->record.broken = true;
        return NULL;
    }
    size_t cap = 1 << 16;
    while (cap < n)
        cap *= 2;
    if (n > c->scratch[kind].cap && pl_cuda_scratch_grow(c, kind, cap) != PL_OK && pl_cuda_scratch_grow(c, kind, n) != PL_OK)
        return NULL;
    return c->scratch[kind].p;
}

/* ---- the stage --------------------------------------------------------------------------------------------------------- */

enum { ALIGN = 16 };

/* Its memory is an old one then. */
static void retire_stage(struct pl_cuda_stage *s)
{
    if (s->dev != NULL || s->host != NULL)
        s->old[s->n_old++] = (struct pl_cuda_stage_memory){s->host, s->dev};
    s->host = s->dev = NULL;
    s->cap = s->used = s->n_known = 0;
}

static void free_old_stages(struct pl_cuda *c)
{
    struct pl_cuda_stage *s = &c->stage;
    for (; s->n_old > 0; s->n_old--) {
        pl_cuda_release(c, s->old[s->n_old - 1].dev);
        (void)cudaFreeHost(s->old[s->n_old - 1].host);
    }
}

/* Nothing that was uploaded may be in use any more. */
static void empty_stage(struct pl_cuda *c)
{
    if (c->nccl == NULL) /* as with scratch */
        free_old_stages(c);
    c->stage.used = c->stage.n_known = 0;
}

size_t pl_cuda_stage_bytes(const struct pl_cuda *c, size_t n)
{
    size_t cap = c->stage.cap > 0 ? 2 * c->stage.cap : PL_CUDA_STAGE_BYTES;
    while (cap < n)
        cap *= 2;
    return c->stage.cap > 0 && n <= c->stage.cap ? 0 : cap;
}

/* What was uploaded stays where it is, in the old memory, until the stage is emptied. */
static bool grow_stage(struct pl_cuda *c, size_t n)
{
    struct pl_cuda_stage *s = &c->stage;
    const size_t cap = pl_cuda_stage_bytes(c, n > s->cap ? n : s->cap + 1);
    if (s->n_old + 1 >= PL_CUDA_STAGES) /* what is there now, and what may come half */
        return false;
    if (pl_cuda_settle(c, "making room") != PL_OK)
        return false;
    retire_stage(s);
    if (pl_cuda_alloc(c, (void **)&s->dev, cap) != PL_OK ||
        pl_cuda_check(c, cudaHostAlloc((void **)&s->host, cap, cudaHostAllocDefault), "allocating pinned memory") != PL_OK) {
        retire_stage(s);
        return false;
    }
    s->cap = cap;
    return true;
}

pl_status pl_cuda_reserve_stage(struct pl_cuda *c, size_t n)
{
    if (c->stage.cap > 0 && n <= c->stage.cap)
        return PL_OK;
    const pl_status rc = pl_cuda_begin(c); /* that the old one goes */
    if (rc != PL_OK)
        return rc;
    if (!grow_stage(c, n))
        return pl_cuda_failed(c);
    if (!c->in_step)
        empty_stage(c);
    return PL_OK;
}

pl_status pl_cuda_begin(struct pl_cuda *c)
{
    if (c->in_step)
        return atomic_load(&c->lost) ? PL_EDEVICE : PL_OK;
    const pl_status rc = pl_cuda_sync(c, "an operation");
    if (rc == PL_OK)
        empty_stage(c);
    return rc;
}

static const void *find(const struct pl_cuda_stage *s, const void *from, size_t n)
{
    for (uint32_t i = 0; i < s->n_known; i++) {
        const struct pl_cuda_known *k = &s->known[i];
        if (k->from == from && n <= k->n && (n == 0 || memcmp(s->host + k->at, from, n) == 0))
            return s->dev + k->at;
    }
    return NULL;
}

/* Several arrays by one copy; `to` gets their places. */
static bool upload(struct pl_cuda *c, const void *const *from, const size_t *n, size_t count, const void **to)
{
    struct pl_cuda_stage *s = &c->stage;
    size_t all = 0;
    for (size_t i = 0; i < count; i++)
        all += (n[i] + ALIGN - 1) / ALIGN * ALIGN;
    if (s->cap - s->used < all && !grow_stage(c, all))
        return false;
    const size_t start = s->used;
    for (size_t i = 0; i < count; i++) {
        if (n[i] > 0)
            memcpy(s->host + s->used, from[i], n[i]);
        if (s->n_known < PL_CUDA_KNOWN)
            s->known[s->n_known++] = (struct pl_cuda_known){from[i], s->used, n[i]};
        to[i] = s->dev + s->used;
        s->used += (n[i] + ALIGN - 1) / ALIGN * ALIGN;
    }
    return pl_cuda_check(c, cudaMemcpyAsync(s->dev + start, s->host + start, all, cudaMemcpyHostToDevice, c->stream), "uploading") == PL_OK;
}

const void *pl_cuda_upload(struct pl_cuda *c, const void *from, size_t n)
{
    const void *to = find(&c->stage, from, n);
    if (to == NULL && pl_cuda_captured == c)
        c->record.broken = true;
    return to != NULL || (pl_cuda_captured != c && upload(c, &from, &n, 1, &to)) ? to : NULL;
}

/* Each array lies where it does for any batch of as many tokens, sequences and rows: pages, of which there may be any number, come last.
 * Steps that may be recorded have attention's tiles there too. */
static bool upload_batch(struct pl_cuda *c, const struct pl_batch *b)
{
    const size_t T = b->n_tokens * sizeof(uint32_t), S = b->n_seqs * sizeof(uint32_t), one = sizeof(uint32_t);
    const uint32_t n_tiles = b->n_tokens == b->n_seqs && pl_cuda_reserve_tiles(c, b->n_seqs) ? b->n_seqs : 0;
    for (uint32_t i = 0; i < n_tiles; i++)
        c->tiles[i] = (struct pl_cuda_attn_tile){i, i, 1};
    const void *const from[] = {b->tokens, b->pos, b->slot, b->q_start, b->ctx, b->page_start, b->rows, c->tiles, b->pages};
    const size_t n[] = {T, T, T, S + one, S, S + one, b->n_rows * one, n_tiles * sizeof *c->tiles, b->page_start[b->n_seqs] * one};
    const void *to[sizeof n / sizeof n[0]];
    return upload(c, from, n, sizeof n / sizeof n[0], to);
}

const void *pl_cuda_bring(struct pl_cuda *c, const void *from, size_t n)
{
    return pl_cuda_begin(c) == PL_OK ? pl_cuda_upload(c, from, n) : NULL;
}

bool pl_cuda_batch_on_device(struct pl_cuda *c, const struct pl_batch *b, struct pl_cuda_batch *out)
{
    const size_t one = sizeof(uint32_t);
    *out = (struct pl_cuda_batch){.n_tokens = b->n_tokens, .n_seqs = b->n_seqs};
    return (out->pos = pl_cuda_upload(c, b->pos, b->n_tokens * one)) != NULL && (out->slot = pl_cuda_upload(c, b->slot, b->n_tokens * one)) != NULL &&
           (out->q_start = pl_cuda_upload(c, b->q_start, (b->n_seqs + 1) * one)) != NULL &&
           (out->ctx = pl_cuda_upload(c, b->ctx, b->n_seqs * one)) != NULL &&
           (out->page_start = pl_cuda_upload(c, b->page_start, (b->n_seqs + 1) * one)) != NULL &&
           (out->pages = pl_cuda_upload(c, b->pages, b->page_start[b->n_seqs] * one)) != NULL;
}

static pl_status step_begin(struct pl_device *dev, const struct pl_batch *b)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_status rc = pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
    if (rc == PL_OK)
        rc = pl_cuda_begin(c);
    if (rc != PL_OK)
        return rc;
    c->narrowed = (struct pl_cuda_narrowed){0};
    if (b != NULL && !upload_batch(c, b))
        return pl_cuda_failed(c);
    c->in_step = true;
    return PL_OK;
}

static pl_status step_end(struct pl_device *dev)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    c->in_step = false;
    c->record.n_spans = 0;
    return pl_cuda_sync(c, "a step");
}

/* ---- open -------------------------------------------------------------------------------------------------------------- */

static void attach(struct pl_device *dev)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    (void)!pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
}

static void close_device(struct pl_device *dev)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (c == NULL)
        return;
    (void)cudaSetDevice(c->index);
    pl_nccl_close(c);
    if (c->stream != NULL)
        (void)cudaStreamSynchronize(c->stream);
    pl_cuda_record_close(c);
    retire_stage(&c->stage);
    free_old_stages(c);
    while (c->n_outgrown > 0)
        pl_cuda_release(c, c->outgrown[--c->n_outgrown]);
    for (int i = 0; i < PL_CUDA_SCRATCH_KINDS; i++)
        pl_cuda_release(c, c->scratch[i].p);
    free(c->tiles);
    if (c->blas.close != NULL)
        c->blas.close(&c->blas);
    pl_cuda_release(c, c->blas_work);
    pl_cuda_adapters_close(c);
    if (c->stream != NULL)
        (void)cudaStreamDestroy(c->stream);
    free(c);
}

/* What nobody asks for by name: kernels are loaded when they are first used, and the driver wants room for their stacks. */
enum { OWN_BYTES = 128 << 20, OWN_SHARE = 64 };

static pl_status memory(struct pl_device *dev, size_t *free_bytes, size_t *total)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_status rc = pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
    if (rc != PL_OK || (rc = pl_cuda_check(c, cudaMemGetInfo(free_bytes, total), "asking for free memory")) != PL_OK)
        return rc;
    const size_t own = *total / OWN_SHARE < OWN_BYTES ? *total / OWN_SHARE : OWN_BYTES;
    *free_bytes -= own < *free_bytes ? own : *free_bytes;
    return PL_OK;
}

enum { COPY_ROUNDS = 8 };

/* Of the largest power of two bytes that fits twice into half of what is free, at most 2 GiB */
static pl_status copy_speed(struct pl_device *dev, double *bytes_per_second)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    size_t free_bytes = 0, total, n = (size_t)2 << 30;
    void *a = NULL, *b = NULL;
    pl_status rc = memory(dev, &free_bytes, &total);
    while (n > free_bytes / 4)
        n /= 2;
    if (rc == PL_OK && (rc = pl_cuda_alloc(c, &a, n)) == PL_OK)
        rc = pl_cuda_alloc(c, &b, n);
    uint64_t start = 0;
    for (int i = 0; rc == PL_OK && i <= COPY_ROUNDS; i++) { /* the first one is not counted */
        rc = pl_cuda_check(c, cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice, c->stream), "copying within the GPU");
        if (rc == PL_OK && i == 0) {
            rc = pl_cuda_sync(c, "copying within the GPU");
            start = pl_now_ns();
        }
    }
    if (rc == PL_OK && (rc = pl_cuda_sync(c, "copying within the GPU")) == PL_OK)
        *bytes_per_second = 2e9 * (double)n * COPY_ROUNDS / (double)(pl_now_ns() - start);
    pl_cuda_release(c, a);
    pl_cuda_release(c, b);
    return rc;
}

static const struct pl_device_ops cuda_ops = {
    .rounds_inputs = true, .close = close_device, .attach = attach, .memory = memory, .copy_speed = copy_speed,
    .buf_new = buf_new, .buf_free = buf_free, .put = put, .get = get, .put_rows = put_rows, .get_rows = get_rows, .host = host,
    .weight_new = pl_cuda_weight_new, .weight_free = pl_cuda_weight_free, .lora_new = pl_cuda_lora_new, .lora_free = pl_cuda_lora_free,
    .work_bytes = pl_cuda_work_bytes, .reserve = pl_cuda_reserve,
    .kv_bytes = pl_cuda_kv_bytes, .kv_new = pl_cuda_kv_new, .kv_free = pl_cuda_kv_free, .kv_copy = pl_cuda_kv_copy,
    .step_begin = step_begin, .step_end = step_end,
    .record_set = pl_cuda_record_set, .record_tokens = pl_cuda_record_tokens, .record = pl_cuda_record_op, .repeat = pl_cuda_repeat_op,
    .only_for = pl_cuda_only_for, .embed = pl_cuda_embed_op, .norm = pl_cuda_norm_op, .matmul = pl_cuda_matmul_op, .matmul_glu = pl_cuda_matmul_glu_op,
    .lora = pl_cuda_lora_op, .kv_write = pl_cuda_kv_write_op, .attn = pl_cuda_attn_op, .act = pl_cuda_act_op,
    .gather = pl_cuda_gather_op, .sample = pl_cuda_sample_op, .links = &pl_nccl_links,
    .train = &pl_cuda_train_ops,
};

/* One line for each way in which a machine may not be able to. */
static pl_status find_gpu(unsigned index, struct cudaDeviceProp *p, struct pl_err *err)
{
    int n = 0, driver = 0, wanted = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    (void)cudaGetLastError();
    if (e == cudaErrorInsufficientDriver) {
        (void)cudaDriverGetVersion(&driver);
        (void)cudaRuntimeGetVersion(&wanted);
        if (driver == 0)
            return pl_fail(err, PL_ENOTSUP, "this machine has no NVIDIA driver: install one for CUDA %d.%d or newer, or take --device cpu", wanted / 1000,
                           wanted % 1000 / 10);
        return pl_fail(err, PL_ENOTSUP, "the NVIDIA driver is for CUDA %d.%d, parley needs %d.%d: update the driver, or take --device cpu", driver / 1000,
                       driver % 1000 / 10, wanted / 1000, wanted % 1000 / 10);
    }
    if (e != cudaSuccess || n == 0)
        return pl_fail(err, PL_ENOTSUP, "no GPU can be used (%s): look at nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu",
                       e != cudaSuccess ? cudaGetErrorString(e) : "the driver lists none");
    if (index >= (unsigned)n)
        return pl_fail(err, PL_ENOTSUP, "there is no GPU %u: this machine has %d, numbered from 0; CUDA_VISIBLE_DEVICES may hide others", index, n);
    const cudaError_t asked = cudaGetDeviceProperties(p, (int)index);
    if (asked != cudaSuccess)
        return pl_fail(err, PL_ENOTSUP, "GPU %u does not answer: %s: look at nvidia-smi, take another GPU, or --device cpu", index, cudaGetErrorString(asked));
    if (p->major * 10 + p->minor < 75)
        return pl_fail(err, PL_ENOTSUP, "GPU %u, %s, has compute capability %d.%d: parley needs 7.5 or newer; take another GPU or --device cpu", index,
                       p->name, p->major, p->minor);
    return PL_OK;
}

pl_status pl_cuda_open(struct pl_device **out, const char *build, const struct pl_cuda_opts *opts, struct pl_err *err)
{
    struct cudaDeviceProp p;
    if (strcmp(build, PL_CUDA_BUILD) != 0)
        return pl_fail(err, PL_ENOTSUP, PL_CUDA_LIBRARY " is of another build (%s, the program is %s): build and install both together", PL_CUDA_BUILD, build);
    pl_status rc = find_gpu(opts->index, &p, err);
    if (rc != PL_OK)
        return rc;
    struct pl_cuda *c = calloc(1, sizeof *c);
    if (c == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the CUDA device");
    c->ops = cuda_ops;
    c->base.ops = &c->ops;
    c->index = (int)opts->index;
    c->n_sms = p.multiProcessorCount;
    c->shared = (uint32_t)p.sharedMemPerBlockOptin;
    c->report = opts->report;
    c->ops.name = c->name;
    snprintf(c->name, sizeof c->name, "cuda:%u (%.80s)", opts->index, p.name);
    snprintf(c->id.name, sizeof c->id.name, "%.95s", c->name);
    _Static_assert(sizeof p.uuid.bytes == sizeof c->id.unique, "a GPU's own number");
    memcpy(c->id.unique, p.uuid.bytes, sizeof c->id.unique);
    c->id.arch = (uint32_t)(p.major * 10 + p.minor);
    cudaError_t e = cudaSetDevice(c->index);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (e != cudaSuccess)
        rc = pl_fail(err, PL_EDEVICE, "%s cannot be used: %s", c->name, cudaGetErrorString(e));
    else
        rc = pl_cublas_open(&c->blas, c->stream, err);
    if (rc == PL_OK && (rc = pl_cuda_adapters_open(c)) != PL_OK)
        rc = pl_fail(err, rc, "%s cannot be used: no place for adapters can be made in its memory: %s", c->name, pl_status_text(rc));
    if (rc != PL_OK)
        close_device(&c->base);
    else
        *out = &c->base;
    return rc;
}
