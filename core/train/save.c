/* save: what training has made, as files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/save.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"

static uint64_t rounded(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

static const struct pl_net_param *param_named(const struct pl_net *n, struct pl_gguf_str name)
{
    for (uint32_t i = 0; i < n->n_params; i++)
        if (strlen(n->params[i].name) == name.n && memcmp(n->params[i].name, name.s, name.n) == 0)
            return &n->params[i];
    return NULL;
}

/* A trained tensor's type in the file; others keep theirs. */
static pl_dtype type_of(const struct pl_net_param *p, const struct pl_gguf_tensor *t)
{
    return p == NULL ? t->dtype : p->rows > 1 ? PL_F16 : PL_F32;
}

static uint64_t bytes_of(const struct pl_net_param *p, const struct pl_gguf_tensor *t)
{
    return p == NULL ? t->n_bytes : p->rows * pl_dtype_row_bytes(type_of(p, t), p->cols);
}

static void put_u32(struct pl_buf *b, uint32_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void put_u64(struct pl_buf *b, uint64_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

/* The keys as in the base's file, and the tensors' places. */
static void put_header(struct pl_buf *b, const struct pl_net *n, const struct pl_gguf *g, uint64_t *alignment)
{
    size_t n_bytes;
    uint64_t n_keys, at = 0;
    const void *keys = pl_gguf_keys(g, &n_bytes, &n_keys, alignment);
    pl_buf_adds(b, "GGUF");
    put_u32(b, 3);
    put_u64(b, pl_gguf_n_tensors(g));
    put_u64(b, n_keys);
    pl_buf_add(b, keys, n_bytes);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        const struct pl_net_param *p = param_named(n, t->name);
        put_u64(b, t->name.n);
        pl_buf_add(b, t->name.s, t->name.n);
        put_u32(b, t->n_dims);
        for (uint32_t d = 0; d < t->n_dims; d++)
            put_u64(b, t->ne[d]);
        put_u32(b, type_of(p, t));
        put_u64(b, at);
        at = rounded(at + bytes_of(p, t), *alignment);
    }
    while (b->len % *alignment != 0 && !b->failed)
        pl_buf_addc(b, 0);
}

static pl_status put_tensor(struct pl_newfile *f, uint64_t at, const float *values, const struct pl_net_param *p, pl_dtype type, struct pl_err *err)
{
    const size_t row = pl_dtype_row_bytes(type, p->cols), n = row * p->rows;
    uint8_t *bytes = malloc(n);
    if (bytes == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for %s", p->name);
    for (uint32_t r = 0; r < p->rows; r++)
        pl_quant_row(type, values + (size_t)r * p->cols, bytes + r * row, p->cols);
    const pl_status rc = pl_newfile_put(f, at, bytes, n, err);
    free(bytes);
    return rc;
}

static pl_status save_gguf(const char *path, const struct pl_net *n, const struct pl_gguf *g, const float *w, struct pl_err *err)
{
    struct pl_newfile f;
    struct pl_buf b;
    uint64_t alignment;
    pl_buf_init(&b, 0);
    put_header(&b, n, g, &alignment);
    if (b.failed) {
        pl_buf_fini(&b);
        return pl_fail(err, PL_ENOMEM, "no memory for the header of %s", path);
    }
    pl_status rc = pl_newfile_open(&f, path, err);
    if (rc != PL_OK) {
        pl_buf_fini(&b);
        return rc;
    }
    rc = pl_newfile_put(&f, 0, pl_buf_str(&b), b.len, err);
    uint64_t at = b.len;
    pl_buf_fini(&b);
    static const char zeros[64];
    for (size_t i = 0; rc == PL_OK && i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        const struct pl_net_param *p = param_named(n, t->name);
        rc = p != NULL ? put_tensor(&f, at, w + p->offset, p, type_of(p, t), err) : pl_newfile_put(&f, at, t->data, t->n_bytes, err);
        const uint64_t end = at + bytes_of(p, t);
        at = rounded(end, alignment);
        for (uint64_t pad = end; rc == PL_OK && pad < at; pad += sizeof zeros)
            rc = pl_newfile_put(&f, pad, zeros, at - pad < sizeof zeros ? at - pad : sizeof zeros, err);
    }
    if (rc == PL_OK)
        return pl_newfile_commit(&f, err);
    pl_newfile_abandon(&f);
    return rc;
}

pl_status pl_save_model(const char *dir, const struct pl_net *n, const struct pl_gguf *g, const char *base, struct pl_err *err)
{
    const float *w = n->dev->ops->host(n->dev, n->w);
    char *path = NULL;
    if (w == NULL)
        return pl_fail(err, PL_ENOTSUP, "the device's memory cannot be read in place");
    if (n->o.full) {
        if (asprintf(&path, "%s/model.gguf", dir) < 0)
            return pl_fail(err, PL_ENOMEM, "out of memory");
        const pl_status rc = save_gguf(path, n, g, w, err);
        free(path);
        return rc;
    }
    struct pl_adapter a;
    pl_status rc = pl_net_adapter(n, &a, err);
    if (rc != PL_OK)
        return rc;
    const struct pl_adapter_info info = {.base = base, .rank = n->o.rank, .alpha = n->o.alpha, .dropout = n->o.dropout, .targets = n->o.targets};
    rc = pl_adapter_write(dir, &a, &n->spec, &info, err);
    free(a.pairs);
    return rc;
}
