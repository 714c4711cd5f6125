/* lora: low-rank changes of a product, on the host's side.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "core/model/adapter_int.h"
#include "cuda/cuda.h"

struct pl_lora {
    uint32_t cols, end; /* end: of the last output that is changed */
    struct pl_cuda_lora_parts parts;
};

/* A sum for each row and rank of what is computed at once: more rows go in several rounds */
enum { MAX_SUMS = 1 << 20 };
_Static_assert(MAX_SUMS >= 16 * PL_ADAPTER_MAX_RANK, "some rows fit");

size_t pl_cuda_lora_bytes(size_t T)
{
    return (T * PL_ADAPTER_MAX_RANK < MAX_SUMS ? T * PL_ADAPTER_MAX_RANK : MAX_SUMS) * sizeof(float);
}

/* Other threads than the engine's come and go with adapters while steps run, are captured or wait for other ranks. Nothing here waits for the
 * device, as cudaMalloc may and cudaFree does: memory is of a pool, in the order of a stream of its own, which only copies of adapters
 * are on. What is given back is used by no operation any more, and stays in the pool. */
static void release(struct pl_cuda *c, float *p)
{
    if (p != NULL && pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU") == PL_OK)
        (void)!pl_cuda_check(c, cudaFreeAsync(p, c->adapters.stream), "freeing an adapter");
}

pl_status pl_cuda_adapters_open(struct pl_cuda *c)
{
    const struct cudaMemPoolProps props = {.allocType = cudaMemAllocationTypePinned, .location = {.type = cudaMemLocationTypeDevice, .id = c->index}};
    uint64_t most = UINT64_MAX; /* that is kept when nobody has it */
    int possible = 0;
    pl_status rc = pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaStreamCreateWithFlags(&c->adapters.stream, cudaStreamNonBlocking), "making a stream");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaDeviceGetAttribute(&possible, cudaDevAttrMemoryPoolsSupported, c->index), "asking for pools of memory");
    if (rc != PL_OK || !possible)
        return rc;
    rc = pl_cuda_check(c, cudaMemPoolCreate(&c->adapters.pool, &props), "making a pool of memory");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMemPoolSetAttribute(c->adapters.pool, cudaMemPoolAttrReleaseThreshold, &most), "making a pool of memory");
}

void pl_cuda_adapters_close(struct pl_cuda *c)
{
    if (c->adapters.stream != NULL)
        (void)cudaStreamSynchronize(c->adapters.stream);
    if (c->adapters.pool != NULL)
        (void)cudaMemPoolDestroy(c->adapters.pool);
    if (c->adapters.stream != NULL)
        (void)cudaStreamDestroy(c->adapters.stream);
}

void pl_cuda_lora_free(struct pl_device *dev, struct pl_lora *l)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    for (uint32_t i = 0; l != NULL && i < l->parts.n; i++) {
        release(c, l->parts.part[i].a);
        release(c, l->parts.part[i].b);
    }
    free(l);
}

static pl_status copy(struct pl_cuda *c, float **to, const float *from, size_t n)
{
    pl_status rc = pl_cuda_check(c, cudaSetDevice(c->index), "choosing the GPU");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMallocFromPoolAsync((void **)to, n * sizeof *from, c->adapters.pool, c->adapters.stream), "allocating an adapter");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMemcpyAsync(*to, from, n * sizeof *from, cudaMemcpyHostToDevice, c->adapters.stream),
                                            "copying an adapter");
}

pl_status pl_cuda_lora_new(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out, struct pl_err *err)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (c->adapters.pool == NULL)
        return pl_fail(err, PL_ENOTSUP, "this GPU's driver has no pools of memory, which adapters need: serve them with --device cpu");
    bool fits = n_parts <= PL_CUDA_LORA_PARTS;
    for (size_t i = 0; i < n_parts; i++)
        fits = fits && parts[i].rank > 0 && parts[i].rank <= PL_ADAPTER_MAX_RANK;
    if (!fits)
        return pl_fail(err, PL_ENOTSUP, "an adapter of this shape is not supported by the CUDA device");
    struct pl_lora *l = calloc(1, sizeof *l);
    if (l == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    l->cols = cols;
    pl_status rc = PL_OK;
    for (; rc == PL_OK && l->parts.n < n_parts; l->parts.n++) {
        const struct pl_lora_src *src = &parts[l->parts.n];
        struct pl_cuda_lora_part *p = &l->parts.part[l->parts.n];
        *p = (struct pl_cuda_lora_part){src->first, src->rows, src->rank, cols, src->scale, NULL, NULL};
        l->end = src->first + src->rows > l->end ? src->first + src->rows : l->end;
        rc = copy(c, &p->a, src->a, (size_t)src->rank * cols);
        if (rc == PL_OK)
            rc = copy(c, &p->b, src->b, (size_t)src->rows * src->rank);
    }
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaStreamSynchronize(c->adapters.stream), "copying an adapter");
    if (rc != PL_OK) {
        pl_cuda_lora_free(dev, l);
        return pl_fail(err, rc, rc == PL_ENOMEM ? "the GPU has no memory left for an adapter" : "copying an adapter to the GPU failed");
    }
    *out = l;
    return PL_OK;
}

static pl_status apply(struct pl_cuda *c, pl_view out, pl_view x, const uint32_t *rows, uint32_t n_rows, const struct pl_cuda_lora_parts *parts, bool add)
{
    const uint32_t fit = MAX_SUMS / parts->rank, most = n_rows < fit ? n_rows : fit;
    float *y = pl_cuda_scratch(c, PL_CUDA_SCRATCH_LORA, (size_t)most * parts->rank * sizeof *y);
    if (y == NULL)
        return pl_cuda_failed(c);
    pl_status rc = PL_OK;
    for (uint32_t at = 0; rc == PL_OK && at < n_rows; at += most) {
        const uint32_t n = n_rows - at < most ? n_rows - at : most;
        rc = pl_cuda_check(c, pl_cuda_lora(c->stream, pl_cuda_mat(out), pl_cuda_mat(x), rows + at, n, *parts, y, add), "an adapter");
    }
    return rc;
}

/* From `first` on, as many as have no more sums for a row than one part may have. */
static struct pl_cuda_lora_parts parts_at_once(const struct pl_cuda_lora_parts *all, uint32_t first)
{
    struct pl_cuda_lora_parts some = {.n = 0};
    for (uint32_t i = first; i < all->n && some.rank + all->part[i].rank <= PL_ADAPTER_MAX_RANK; i++) {
        some.part[some.n++] = all->part[i];
        some.rank += all->part[i].rank;
    }
    return some;
}

pl_status pl_cuda_lora_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_status rc = pl_cuda_begin(c);
    for (size_t u = 0; rc == PL_OK && u < n_uses; u++) {
        const struct pl_lora *l = uses[u].lora;
        if (l->cols != x.cols || l->end > out.cols)
            return PL_EINVAL;
        const uint32_t *rows = pl_cuda_upload(c, uses[u].rows, uses[u].n_rows * sizeof *rows);
        if (rows == NULL)
            return pl_cuda_failed(c);
        for (uint32_t i = 0, n; rc == PL_OK && i < l->parts.n; i += n) {
            const struct pl_cuda_lora_parts some = parts_at_once(&l->parts, i);
            n = some.n;
            rc = apply(c, out, x, rows, uses[u].n_rows, &some, add || i > 0);
        }
    }
    return rc;
}
