/* export: writes a model with an adapter merged into its weights as one GGUF file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/export.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"

enum { GGUF_VERSION = 3 };

struct merged {
    const struct pl_lora_pair *pair; /* NULL = the tensor is copied */
    pl_dtype dtype;
    uint64_t offset, n_bytes;
};

static uint64_t rows_of(const struct pl_gguf_tensor *t)
{
    return t->ne[1] * t->ne[2] * t->ne[3];
}

/* Finds each pair's tensor, and lays all tensors out anew. */
static pl_status plan(struct merged *m, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int type, struct pl_err *err)
{
    for (size_t i = 0; i < a->n_pairs; i++) {
        struct pl_target_place place = {0};
        char name[96];
        PL_ASSERT(pl_target_find(spec, a->pairs[i].target, &place));
        snprintf(name, sizeof name, "blk.%u.%s.weight", a->pairs[i].layer, place.gguf);
        const struct pl_gguf_tensor *t = pl_gguf_tensor(g, name);
        if (t == NULL || t->ne[0] != place.cols || rows_of(t) != place.rows)
            return pl_fail(err, PL_EFORMAT, "tensor %s is missing or of another shape than the hyper-parameters say", name);
        m[t - pl_gguf_tensor_at(g, 0)].pair = &a->pairs[i];
    }
    const uint64_t alignment = pl_gguf_alignment(g);
    uint64_t at = 0;
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        m[i].dtype = t->dtype;
        if (m[i].pair != NULL && type != PL_EXPORT_BASE)
            m[i].dtype = type != PL_EXPORT_AUTO ? (pl_dtype)type : t->dtype == PL_F32 ? PL_F32 : PL_F16;
        if (t->ne[0] % pl_dtype_block(m[i].dtype) != 0)
            return pl_fail(err, PL_EINVAL, "tensor %.*s has rows of %llu values, which %s cannot hold: choose another --type", (int)t->name.n,
                           t->name.s, (unsigned long long)t->ne[0], pl_dtype_name(m[i].dtype));
        m[i].n_bytes = pl_dtype_row_bytes(m[i].dtype, t->ne[0]) * rows_of(t);
        m[i].offset = at;
        at = (at + m[i].n_bytes + alignment - 1) / alignment * alignment;
    }
    return PL_OK;
}

static void add_u32(struct pl_buf *b, uint32_t v)
{
    pl_buf_add(b, &v, sizeof v); /* GGUF is little-endian, as is every machine this runs on */
}

static void add_u64(struct pl_buf *b, uint64_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void add_header(struct pl_buf *b, const struct pl_gguf *g, const struct merged *m)
{
    uint64_t n_keys;
    size_t n_bytes;
    const void *keys = pl_gguf_keys(g, &n_keys, &n_bytes);
    pl_buf_adds(b, "GGUF");
    add_u32(b, GGUF_VERSION);
    add_u64(b, pl_gguf_n_tensors(g));
    add_u64(b, n_keys);
    pl_buf_add(b, keys, n_bytes);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        add_u64(b, t->name.n);
        pl_buf_add(b, t->name.s, t->name.n);
        add_u32(b, t->n_dims);
        for (uint32_t d = 0; d < t->n_dims; d++)
            add_u64(b, t->ne[d]);
        add_u32(b, m[i].dtype);
        add_u64(b, m[i].offset);
    }
    while (b->len % pl_gguf_alignment(g) != 0 && !b->failed)
        pl_buf_addc(b, '\0');
}

/* out = the merged rows in their new type */
static void merge(const struct pl_gguf_tensor *t, const struct merged *m, float *row, uint8_t *out)
{
    const struct pl_lora_pair *p = m->pair;
    const size_t cols = t->ne[0], from = pl_dtype_row_bytes(t->dtype, cols), to = pl_dtype_row_bytes(m->dtype, cols);
    for (uint64_t i = 0; i < rows_of(t); i++) {
        pl_dequant_row(t->dtype, (const uint8_t *)t->data + i * from, row, cols);
        for (uint32_t r = 0; r < p->rank; r++) {
            const float w = p->scale * p->b[i * p->rank + r], *a = p->a + (size_t)r * cols;
            for (size_t c = 0; c < cols; c++)
                row[c] += w * a[c];
        }
        pl_quant_row(m->dtype, row, out + i * to, cols);
    }
}

static pl_status put_tensor(struct pl_newfile *f, uint64_t begin, const struct pl_gguf_tensor *t, const struct merged *m, struct pl_err *err)
{
    if (m->pair == NULL)
        return pl_newfile_put(f, begin + m->offset, t->data, t->n_bytes, err);
    float *row = malloc(t->ne[0] * sizeof *row);
    uint8_t *out = malloc(m->n_bytes);
    pl_status rc = PL_OK;
    if (row == NULL || out == NULL) {
        rc = pl_fail(err, PL_ENOMEM, "no memory for a tensor of %llu bytes", (unsigned long long)m->n_bytes);
    } else {
        merge(t, m, row, out);
        rc = pl_newfile_put(f, begin + m->offset, out, m->n_bytes, err);
    }
    free(row);
    free(out);
    return rc;
}

pl_status pl_export_gguf(const char *path, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int type,
                         struct pl_err *err)
{
    const size_t n = pl_gguf_n_tensors(g);
    struct merged *m = pl_xcalloc(n + 1, sizeof *m);
    struct pl_buf header;
    struct pl_newfile f;
    pl_buf_init(&header, 0);
    pl_status rc = plan(m, g, spec, a, type, err);
    if (rc == PL_OK) {
        add_header(&header, g, m);
        rc = header.failed ? pl_fail(err, PL_ENOMEM, "out of memory") : pl_newfile_open(&f, path, err);
    }
    if (rc == PL_OK) {
        rc = pl_newfile_put(&f, 0, header.data, header.len, err);
        for (size_t i = 0; rc == PL_OK && i < n; i++)
            rc = put_tensor(&f, header.len, pl_gguf_tensor_at(g, i), &m[i], err);
        if (rc == PL_OK)
            rc = pl_newfile_commit(&f, err);
        else
            pl_newfile_abandon(&f);
    }
    pl_buf_fini(&header);
    free(m);
    return rc;
}
