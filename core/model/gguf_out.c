/* gguf_out: writes GGUF files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/gguf_out.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/newfile.h"

enum { VERSION = 3, ALIGNMENT = 32, BLOCK_BYTES = 1 << 20 };
enum { TYPE_U32 = 4, TYPE_I32, TYPE_F32, TYPE_BOOL, TYPE_STRING, TYPE_ARRAY };

void pl_gguf_out_init(struct pl_gguf_out *o)
{
    *o = (struct pl_gguf_out){.alignment = ALIGNMENT};
    pl_buf_init(&o->keys, 0);
}

void pl_gguf_out_fini(struct pl_gguf_out *o)
{
    for (size_t i = 0; i < o->n_tensors; i++)
        free((char *)(uintptr_t)o->tensors[i].t.name.s);
    free(o->tensors);
    pl_buf_fini(&o->keys);
}

/* ---- keys ----------------------------------------------------------------------------------------------------------- */

static void add_u32(struct pl_buf *b, uint32_t v)
{
    pl_buf_add(b, &v, sizeof v); /* GGUF is little-endian, as is every machine this runs on */
}

static void add_u64(struct pl_buf *b, uint64_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void add_str(struct pl_buf *b, const char *s, size_t n)
{
    add_u64(b, n);
    pl_buf_add(b, s, n);
}

void pl_gguf_out_all_keys(struct pl_gguf_out *o, const struct pl_gguf *g)
{
    uint64_t n_keys;
    size_t n_bytes;
    const void *keys = pl_gguf_keys(g, &n_keys, &n_bytes);
    pl_buf_add(&o->keys, keys, n_bytes);
    o->n_keys += n_keys;
    o->alignment = pl_gguf_alignment(g);
}

void pl_gguf_out_keys_of(struct pl_gguf_out *o, const struct pl_gguf *g, const char *prefix, const char *but)
{
    uint64_t n_keys;
    size_t n_bytes;
    (void)pl_gguf_keys(g, &n_keys, &n_bytes);
    for (uint64_t i = 0; i < n_keys; i++) {
        const void *key = pl_gguf_key_at(g, i, &n_bytes);
        uint64_t n;
        memcpy(&n, key, sizeof n);
        const char *name = (const char *)key + sizeof n;
        if (n < strlen(prefix) || memcmp(name, prefix, strlen(prefix)) != 0 || (n == strlen(but) && memcmp(name, but, n) == 0))
            continue;
        pl_buf_add(&o->keys, key, n_bytes);
        o->n_keys++;
    }
}

static void begin_key(struct pl_gguf_out *o, const char *key, uint32_t type)
{
    add_str(&o->keys, key, strlen(key));
    add_u32(&o->keys, type);
    o->n_keys++;
}

void pl_gguf_out_u32(struct pl_gguf_out *o, const char *key, uint32_t v)
{
    begin_key(o, key, TYPE_U32);
    add_u32(&o->keys, v);
}

void pl_gguf_out_f32(struct pl_gguf_out *o, const char *key, float v)
{
    begin_key(o, key, TYPE_F32);
    pl_buf_add(&o->keys, &v, sizeof v);
}

void pl_gguf_out_bool(struct pl_gguf_out *o, const char *key, bool v)
{
    begin_key(o, key, TYPE_BOOL);
    pl_buf_addc(&o->keys, v);
}

void pl_gguf_out_str(struct pl_gguf_out *o, const char *key, const char *s, size_t n)
{
    begin_key(o, key, TYPE_STRING);
    add_str(&o->keys, s, n);
}

static void begin_array(struct pl_gguf_out *o, const char *key, uint32_t type, uint64_t n)
{
    begin_key(o, key, TYPE_ARRAY);
    add_u32(&o->keys, type);
    add_u64(&o->keys, n);
}

void pl_gguf_out_strs(struct pl_gguf_out *o, const char *key, uint64_t n)
{
    begin_array(o, key, TYPE_STRING, n);
}

void pl_gguf_out_strs_item(struct pl_gguf_out *o, const char *s, size_t n)
{
    add_str(&o->keys, s, n);
}

void pl_gguf_out_i32s(struct pl_gguf_out *o, const char *key, uint64_t n)
{
    begin_array(o, key, TYPE_I32, n);
}

void pl_gguf_out_i32s_item(struct pl_gguf_out *o, int32_t v)
{
    pl_buf_add(&o->keys, &v, sizeof v);
}

/* ---- tensors -------------------------------------------------------------------------------------------------------- */

void pl_gguf_out_tensor(struct pl_gguf_out *o, const struct pl_gguf_tensor *t)
{
    if ((o->n_tensors & (o->n_tensors - 1)) == 0) /* 0, 1, 2, 4, … */
        o->tensors = pl_xrealloc(o->tensors, (o->n_tensors == 0 ? 1 : 2 * o->n_tensors) * sizeof *o->tensors);
    struct pl_gguf_out_tensor *new = &o->tensors[o->n_tensors++];
    char *name = pl_xmalloc(t->name.n + 1);
    memcpy(name, t->name.s, t->name.n);
    *new = (struct pl_gguf_out_tensor){.t = *t};
    new->t.name.s = name;
}

static uint64_t rounded(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

static pl_status place(struct pl_gguf_out *o, struct pl_err *err)
{
    uint64_t at = 0;
    for (size_t i = 0; i < o->n_tensors; i++) {
        struct pl_gguf_tensor *t = &o->tensors[i].t;
        if (t->ne[0] % pl_dtype_block(t->dtype) != 0)
            return pl_fail(err, PL_EINVAL, "tensor %.*s has rows of %llu values, which %s cannot hold: choose another type", (int)t->name.n, t->name.s,
                           (unsigned long long)t->ne[0], pl_dtype_name(t->dtype));
        t->n_bytes = pl_dtype_row_bytes(t->dtype, t->ne[0]) * pl_gguf_n_rows(t);
        o->tensors[i].offset = at;
        at = rounded(at + t->n_bytes, o->alignment);
    }
    return PL_OK;
}

static void add_head(const struct pl_gguf_out *o, struct pl_buf *b)
{
    pl_buf_adds(b, "GGUF");
    add_u32(b, VERSION);
    add_u64(b, o->n_tensors);
    add_u64(b, o->n_keys);
    pl_buf_add(b, o->keys.data, o->keys.len);
    for (size_t i = 0; i < o->n_tensors; i++) {
        const struct pl_gguf_tensor *t = &o->tensors[i].t;
        add_str(b, t->name.s, t->name.n);
        add_u32(b, t->n_dims);
        for (uint32_t d = 0; d < t->n_dims; d++)
            add_u64(b, t->ne[d]);
        add_u32(b, t->dtype);
        add_u64(b, o->tensors[i].offset);
    }
    while (b->len % o->alignment != 0 && !b->failed)
        pl_buf_addc(b, '\0');
    b->failed |= o->keys.failed;
}

void pl_gguf_out_head(struct pl_gguf_out *o, struct pl_buf *out)
{
    const size_t n = o->n_tensors;
    o->n_tensors = 0;
    add_head(o, out);
    o->n_tensors = n;
}

/* A tensor's rows as its type has them, some at a time. */
static pl_status put_rows(struct pl_newfile *f, uint64_t at, const struct pl_gguf_tensor *t, size_t i, pl_gguf_rows *rows, void *arg, struct pl_err *err)
{
    const size_t row_bytes = pl_dtype_row_bytes(t->dtype, t->ne[0]), n = BLOCK_BYTES / row_bytes > 0 ? BLOCK_BYTES / row_bytes : 1;
    float *row = malloc(t->ne[0] * sizeof *row);
    uint8_t *block = malloc(n * row_bytes);
    pl_status rc = row != NULL && block != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory for the rows of %.*s", (int)t->name.n, t->name.s);
    for (uint64_t r = 0, in_block = 0; rc == PL_OK && r < pl_gguf_n_rows(t); r++) {
        if ((rc = rows(arg, i, r, row)) != PL_OK) {
            rc = pl_fail(err, rc, "the values of %.*s: %s", (int)t->name.n, t->name.s, pl_status_text(rc));
            break;
        }
        pl_quant_row(t->dtype, row, block + in_block * row_bytes, t->ne[0]);
        if (++in_block < n && r + 1 < pl_gguf_n_rows(t))
            continue;
        rc = pl_newfile_put(f, at, block, in_block * row_bytes, err);
        at += in_block * row_bytes;
        in_block = 0;
    }
    free(row);
    free(block);
    return rc;
}

static pl_status put_zeros(struct pl_newfile *f, uint64_t from, uint64_t to, struct pl_err *err)
{
    static const char zeros[64];
    pl_status rc = PL_OK;
    for (; rc == PL_OK && from < to; from += sizeof zeros)
        rc = pl_newfile_put(f, from, zeros, to - from < sizeof zeros ? to - from : sizeof zeros, err);
    return rc;
}

pl_status pl_gguf_out_write(struct pl_gguf_out *o, const char *path, pl_gguf_rows *rows, void *arg, struct pl_err *err)
{
    struct pl_buf head;
    struct pl_newfile f;
    pl_buf_init(&head, 0);
    pl_status rc = place(o, err);
    if (rc == PL_OK) {
        add_head(o, &head);
        rc = head.failed ? pl_fail(err, PL_ENOMEM, "no memory for the header of %s", path) : pl_newfile_open(&f, path, err);
    }
    if (rc == PL_OK) {
        rc = pl_newfile_put(&f, 0, head.data, head.len, err);
        for (size_t i = 0; rc == PL_OK && i < o->n_tensors; i++) {
            const struct pl_gguf_tensor *t = &o->tensors[i].t;
            const uint64_t at = head.len + o->tensors[i].offset, end = at + t->n_bytes;
            rc = t->data != NULL ? pl_newfile_put(&f, at, t->data, t->n_bytes, err) : put_rows(&f, at, t, i, rows, arg, err);
            if (rc == PL_OK)
                rc = put_zeros(&f, end, rounded(end, o->alignment), err);
        }
        if (rc == PL_OK)
            rc = pl_newfile_commit(&f, err);
        else
            pl_newfile_abandon(&f);
    }
    pl_buf_fini(&head);
    return rc;
}
