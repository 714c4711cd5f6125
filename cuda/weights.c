/* weights: matrices in the device's memory: rows of floats as the file holds them, block types packed (pack.h).
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "cuda/pack.h"

/* The part's rows as they lie on the device: NULL = as src->data has them. false when memory is out. */
static bool arrange(const struct pl_weight_src *src, const struct pl_cuda_part *p, size_t n, void **work)
{
    const size_t stride = pl_weight_src_stride(src);
    *work = NULL;
    if (p->row_bytes == stride)
        return true;
    if ((*work = malloc(n)) == NULL)
        return false;
    if (p->row_bytes == 0)
        pl_pack(src->dtype, src->rows, src->cols, src->data, stride, *work);
    for (size_t r = 0; p->row_bytes != 0 && r < src->rows; r++)
        memcpy((uint8_t *)*work + r * p->row_bytes, (const uint8_t *)src->data + r * stride, p->row_bytes);
    return true;
}

static pl_status copy(struct pl_cuda *c, struct pl_cuda_part *p, const void *data, size_t n)
{
    pl_status rc = pl_cuda_alloc(c, (void **)&p->data, n);
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemcpyAsync(p->data, data, n, cudaMemcpyHostToDevice, c->stream), "copying a weight");
    return rc != PL_OK ? rc : pl_cuda_check(c, cudaStreamSynchronize(c->stream), "copying a weight");
}

static pl_status add_part(struct pl_cuda *c, struct pl_weight *w, const struct pl_weight_src *src, struct pl_err *err)
{
    struct pl_cuda_part *p = &w->parts[w->n_parts];
    if (src->cols != w->cols || src->rows == 0 || w->cols == 0)
        return pl_fail(err, PL_EINVAL, "parts of a weight do not fit together");
    if (pl_dtype_name(src->dtype) == NULL)
        return pl_fail(err, PL_ENOTSUP, "tensor type %d is not supported by the CUDA device", (int)src->dtype);
    const bool packed = pl_dtype_block(src->dtype) > 1;
    *p = (struct pl_cuda_part){src->dtype, src->rows, src->cols, packed ? 0 : pl_dtype_row_bytes(src->dtype, src->cols), NULL};
    *(packed ? &c->has_blocks : &c->has_halves) |= src->dtype != PL_F32;
    const size_t n = packed ? pl_pack_bytes(src->dtype, src->rows, src->cols) : p->row_bytes * p->rows;
    void *work;
    if (!arrange(src, p, n, &work))
        return pl_fail(err, PL_ENOMEM, "no memory for a weight of %u × %u", src->rows, src->cols);
    const pl_status rc = copy(c, p, work != NULL ? work : src->data, n);
    free(work);
    w->n_parts++;
    if (rc == PL_ENOMEM)
        return pl_fail(err, rc, "the GPU has no memory left for a weight of %u × %u", src->rows, src->cols);
    return rc == PL_OK ? rc : pl_fail(err, rc, "copying a weight to the GPU failed");
}

pl_status pl_cuda_weight_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out, struct pl_err *err)
{
    if (n_parts > PL_CUDA_MAX_PARTS)
        return pl_fail(err, PL_ENOTSUP, "a weight of %zu parts is not supported by the CUDA device", n_parts);
    struct pl_weight *w = calloc(1, sizeof *w);
    if (w == NULL || (w->parts = calloc(n_parts, sizeof *w->parts)) == NULL) {
        free(w);
        return pl_fail(err, PL_ENOMEM, "no memory for a weight");
    }
    w->cols = parts[0].cols;
    for (size_t i = 0; i < n_parts; i++) {
        const pl_status rc = add_part(pl_cuda_of(dev), w, &parts[i], err);
        if (rc != PL_OK) {
            pl_cuda_weight_free(dev, w);
            return rc;
        }
        w->rows += parts[i].rows;
    }
    *out = w;
    return PL_OK;
}

void pl_cuda_weight_free(struct pl_device *dev, struct pl_weight *w)
{
    if (w == NULL)
        return;
    for (uint32_t i = 0; i < w->n_parts; i++)
        pl_cuda_release(pl_cuda_of(dev), w->parts[i].data);
    free(w->parts);
    free(w);
}
