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

enum { ALIGN = 256 };

/* Where a part begins that comes after `at` bytes: floats of one type lie close together, so that they can be multiplied as one. */
static size_t place_after(size_t at, const struct pl_weight_src *src, const struct pl_weight_src *before)
{
    const bool close = before != NULL && before->dtype == src->dtype && pl_dtype_block(src->dtype) == 1;
    return close ? at : (at + ALIGN - 1) / ALIGN * ALIGN;
}

static size_t part_bytes(const struct pl_weight_src *src)
{
    return pl_dtype_block(src->dtype) > 1 ? pl_pack_bytes(src->dtype, src->rows, src->cols) : pl_dtype_row_bytes(src->dtype, src->cols) * src->rows;
}

size_t pl_cuda_weight_bytes(const struct pl_weight_src *parts, size_t n_parts)
{
    size_t n = 0;
    for (size_t i = 0; i < n_parts; i++)
        n = place_after(n, &parts[i], i > 0 ? &parts[i - 1] : NULL) + part_bytes(&parts[i]);
    return n;
}

/* Checks the parts and takes memory for all of them. */
static pl_status allocate(struct pl_cuda *c, struct pl_weight *w, const struct pl_weight_src *parts, size_t n_parts, struct pl_err *err)
{
    for (size_t i = 0; i < n_parts; i++) {
        const struct pl_weight_src *src = &parts[i];
        if (src->cols != w->cols || src->rows == 0 || w->cols == 0)
            return pl_fail(err, PL_EINVAL, "parts of a weight do not fit together");
        if (pl_dtype_name(src->dtype) == NULL)
            return pl_fail(err, PL_ENOTSUP, "tensor type %d is not supported by the CUDA device", (int)src->dtype);
        w->rows += src->rows;
    }
    const pl_status rc = pl_cuda_alloc(c, (void **)&w->memory, pl_cuda_weight_bytes(parts, n_parts));
    return rc == PL_OK ? rc : rc == PL_ENOMEM ? pl_fail(err, rc, "the GPU has no memory left for a weight of %u × %u", w->rows, w->cols)
                                              : pl_fail(err, rc, "taking memory of the GPU failed");
}

static pl_status add_part(struct pl_cuda *c, struct pl_weight *w, const struct pl_weight_src *src, uint8_t *to, struct pl_err *err)
{
    struct pl_cuda_part *p = &w->parts[w->n_parts];
    const bool packed = pl_dtype_block(src->dtype) > 1;
    const size_t n = part_bytes(src);
    void *work;
    *p = (struct pl_cuda_part){src->dtype, src->rows, src->cols, packed ? 0 : pl_dtype_row_bytes(src->dtype, src->cols), to};
    *(packed ? &c->has_blocks : &c->has_halves) |= src->dtype != PL_F32;
    if (!arrange(src, p, n, &work))
        return pl_fail(err, PL_ENOMEM, "no memory for a weight of %u × %u", src->rows, src->cols);
    pl_status rc = pl_cuda_check(c, cudaMemcpyAsync(to, work != NULL ? work : src->data, n, cudaMemcpyHostToDevice, c->stream), "copying a weight");
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaStreamSynchronize(c->stream), "copying a weight");
    free(work);
    w->n_parts++;
    return rc == PL_OK ? rc : pl_fail(err, rc, "copying a weight to the GPU failed");
}

pl_status pl_cuda_weight_new(struct pl_device *dev, const struct pl_weight_src *parts, size_t n_parts, struct pl_weight **out, struct pl_err *err)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    if (n_parts > PL_CUDA_MAX_PARTS)
        return pl_fail(err, PL_ENOTSUP, "a weight of %zu parts is not supported by the CUDA device", n_parts);
    struct pl_weight *w = calloc(1, sizeof *w);
    if (w == NULL || (w->parts = calloc(n_parts, sizeof *w->parts)) == NULL) {
        free(w);
        return pl_fail(err, PL_ENOMEM, "no memory for a weight");
    }
    w->cols = parts[0].cols;
    pl_status rc = allocate(c, w, parts, n_parts, err);
    size_t at = 0;
    for (size_t i = 0; rc == PL_OK && i < n_parts; i++) {
        at = place_after(at, &parts[i], i > 0 ? &parts[i - 1] : NULL);
        rc = add_part(c, w, &parts[i], w->memory + at, err);
        at += part_bytes(&parts[i]);
    }
    if (rc == PL_OK)
        *out = w;
    else
        pl_cuda_weight_free(dev, w);
    return rc;
}

void pl_cuda_weight_free(struct pl_device *dev, struct pl_weight *w)
{
    if (w == NULL)
        return;
    pl_cuda_release(pl_cuda_of(dev), w->memory);
    free(w->parts);
    free(w);
}
