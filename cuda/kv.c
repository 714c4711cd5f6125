/* kv: the cache's pages.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "cuda/cuda.h"

static void measure(struct pl_kvdev *d, const struct pl_kv_shape *s)
{
    const bool rounded = s->dtype == PL_Q8_0, bytes = s->dtype == PL_F8;
    const uint32_t element = rounded || bytes ? 1 : pl_dtype_block_bytes(s->dtype), half = 2 * PL_CUDA_PAGE;
    const uint32_t rows = PL_CUDA_PAGE * s->head_dim * element, scales = rounded ? (s->head_dim + 31) / 32 * half : bytes ? PL_CUDA_PAGE : 0;
    struct pl_cuda_kv k = {.dtype = s->dtype, .n_layers = s->n_layers, .n_pages = s->n_pages, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    k.key_scales = rows;
    k.values = rows + scales;
    k.value_scales = k.values + rows;
    k.head_bytes = (k.value_scales + scales + 15) / 16 * 16;
    k.page_bytes = (size_t)k.head_bytes * s->n_kv_heads;
    k.layer_bytes = k.page_bytes * s->n_pages;
    while (rounded && s->head_dim % (2u << k.rotate_bits) == 0)
        k.rotate_bits++;
    *d = (struct pl_kvdev){.shape = *s, .kv = k, .bytes = k.layer_bytes * s->n_layers};
}

size_t pl_cuda_kv_bytes(struct pl_device *dev, const struct pl_kv_shape *shape)
{
    (void)dev;
    struct pl_kvdev d;
    measure(&d, shape);
    return d.bytes;
}

pl_status pl_cuda_kv_new(struct pl_device *dev, const struct pl_kv_shape *shape, struct pl_kvdev **out)
{
    const pl_dtype t = shape->dtype;
    if ((t != PL_F32 && t != PL_F16 && t != PL_BF16 && t != PL_Q8_0 && t != PL_F8) || shape->page_size != PL_CUDA_PAGE || shape->head_dim > PL_MAX_HEAD_DIM ||
        shape->head_dim % 8 != 0)
        return PL_ENOTSUP;
    struct pl_kvdev *d = calloc(1, sizeof *d);
    if (d == NULL)
        return PL_ENOMEM;
    measure(d, shape);
    const pl_status rc = pl_cuda_alloc(pl_cuda_of(dev), (void **)&d->kv.data, d->bytes);
    if (rc != PL_OK)
        free(d);
    else
        *out = d;
    return rc;
}

void pl_cuda_kv_free(struct pl_device *dev, struct pl_kvdev *kv)
{
    if (kv == NULL)
        return;
    pl_cuda_release(pl_cuda_of(dev), kv->kv.data);
    free(kv);
}

/* A page's layers lie a layer's bytes apart, which may be more than the pitch that a two-dimensional copy can have. */
pl_status pl_cuda_kv_copy(struct pl_device *dev, struct pl_kvdev *kv, uint32_t from, uint32_t to)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const struct pl_cuda_kv *k = &kv->kv;
    if (from == to)
        return PL_OK;
    pl_status rc = PL_OK;
    for (uint32_t layer = 0; layer < k->n_layers && rc == PL_OK; layer++) {
        uint8_t *const data = k->data + layer * k->layer_bytes;
        rc = pl_cuda_check(c, cudaMemcpyAsync(data + to * k->page_bytes, data + from * k->page_bytes, k->page_bytes, cudaMemcpyDeviceToDevice, c->stream),
                           "copying a cache page");
    }
    return rc;
}

pl_status pl_cuda_kv_write_op(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                              const struct pl_batch *b)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_cuda_rope turn = {.n_dims = 0};
    struct pl_cuda_mat queries = {NULL, 0, 0, 0};
    if (b->n_tokens == 0)
        return PL_OK;
    const pl_status rc = pl_cuda_begin(c);
    const uint32_t *slot = rc == PL_OK ? pl_cuda_upload(c, b->slot, b->n_tokens * sizeof *slot) : NULL;
    if (slot == NULL)
        return pl_cuda_failed(c);
    if (r != NULL && r->kind != PL_ROPE_NONE) {
        if (q.cols % k.cols != 0)
            return PL_ENOTSUP;
        turn = (struct pl_cuda_rope){r->n_dims, r->kind == PL_ROPE_HALVES, pl_cuda_vector(r->freq),
                                     pl_cuda_upload(c, b->pos, b->n_tokens * sizeof *turn.pos)};
        if (turn.pos == NULL)
            return pl_cuda_failed(c);
        queries = pl_cuda_mat(q);
    }
    return pl_cuda_check(c, pl_cuda_kv_write(c->stream, kv->kv, layer, turn, queries, pl_cuda_mat(k), pl_cuda_mat(v), slot), "kv_write");
}
