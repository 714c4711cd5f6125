/* lora: low-rank changes of a product, on the host's side.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "cuda/cuda.h"

struct pl_lora {
    uint32_t cols, n_parts;
    struct pl_cuda_lora_part *parts;
};

void pl_cuda_lora_free(struct pl_device *dev, struct pl_lora *l)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    for (uint32_t i = 0; l != NULL && i < l->n_parts; i++) {
        pl_cuda_release(c, l->parts[i].a);
        pl_cuda_release(c, l->parts[i].b);
    }
    if (l != NULL)
        free(l->parts);
    free(l);
}

/* cudaMemcpy waits for nothing that runs on the device's own stream, and may return before the bytes are there: on the stream of such
 * copies, which is waited for at the end. */
static pl_status copy(struct pl_cuda *c, float **to, const float *from, size_t n)
{
    const pl_status rc = pl_cuda_alloc(c, (void **)to, n * sizeof *from);
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaMemcpy(*to, from, n * sizeof *from, cudaMemcpyHostToDevice), "copying an adapter");
}

pl_status pl_cuda_lora_new(struct pl_device *dev, uint32_t cols, const struct pl_lora_src *parts, size_t n_parts, struct pl_lora **out, struct pl_err *err)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_lora *l = calloc(1, sizeof *l);
    if (l == NULL || (l->parts = calloc(n_parts, sizeof *l->parts)) == NULL) {
        free(l);
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    }
    l->cols = cols;
    pl_status rc = PL_OK;
    for (; rc == PL_OK && l->n_parts < n_parts; l->n_parts++) {
        const struct pl_lora_src *src = &parts[l->n_parts];
        struct pl_cuda_lora_part *p = &l->parts[l->n_parts];
        *p = (struct pl_cuda_lora_part){src->first, src->rows, src->rank, cols, src->scale, NULL, NULL};
        rc = copy(c, &p->a, src->a, (size_t)src->rank * cols);
        if (rc == PL_OK)
            rc = copy(c, &p->b, src->b, (size_t)src->rows * src->rank);
    }
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaStreamSynchronize(NULL), "copying an adapter");
    if (rc != PL_OK) {
        pl_cuda_lora_free(dev, l);
        return pl_fail(err, rc, rc == PL_ENOMEM ? "the GPU has no memory left for an adapter" : "copying an adapter to the GPU failed");
    }
    *out = l;
    return PL_OK;
}

pl_status pl_cuda_lora_op(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_status rc = pl_cuda_begin(c);
    for (size_t u = 0; rc == PL_OK && u < n_uses; u++) {
        const struct pl_lora *l = uses[u].lora;
        if (l->cols != x.cols)
            return PL_EINVAL;
        const uint32_t *rows = pl_cuda_upload(c, uses[u].rows, uses[u].n_rows * sizeof *rows);
        if (rows == NULL)
            return pl_cuda_failed(c);
        if (!add)
            rc = pl_cuda_check(c, pl_cuda_lora_clear(c->stream, pl_cuda_mat(out), rows, uses[u].n_rows), "clearing for adapters");
        for (uint32_t i = 0; rc == PL_OK && i < l->n_parts; i++) {
            const struct pl_cuda_lora_part *p = &l->parts[i];
            float *y = pl_cuda_scratch(c, PL_CUDA_SCRATCH_LORA, (size_t)uses[u].n_rows * p->rank * sizeof *y);
            if (p->first + p->rows > out.cols)
                return PL_EINVAL;
            if (y == NULL)
                return pl_cuda_failed(c);
            rc = pl_cuda_check(c, pl_cuda_lora(c->stream, pl_cuda_mat(out), pl_cuda_mat(x), rows, uses[u].n_rows, p, y), "an adapter");
        }
    }
    return rc;
}
