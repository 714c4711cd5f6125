/* gguf_write: builds a GGUF file in memory, for test models.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/tools/gguf_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/status.h"

enum { ALIGNMENT = 32, VERSION = 3 };
enum { TYPE_U32 = 4, TYPE_I32 = 5, TYPE_F32 = 6, TYPE_BOOL = 7, TYPE_STRING = 8, TYPE_ARRAY = 9 };

struct entry {
    char *key;
    struct pl_buf value; /* type and payload as in the file */
};

struct tensor {
    char *name;
    pl_dtype dtype;
    uint64_t ne[2];
    size_t n_bytes;
    void *data;
};

struct gguf_out {
    struct entry *entries;
    struct tensor *tensors;
    size_t n_entries, n_tensors;
};

static void add_u32(struct pl_buf *b, uint32_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void add_u64(struct pl_buf *b, uint64_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void add_str(struct pl_buf *b, const char *s)
{
    add_u64(b, strlen(s));
    pl_buf_adds(b, s);
}

static void pad(struct pl_buf *b)
{
    while (b->len % ALIGNMENT != 0)
        pl_buf_addc(b, '\0');
}

struct gguf_out *gguf_out_new(void)
{
    return pl_xcalloc(1, sizeof(struct gguf_out));
}

void gguf_out_free(struct gguf_out *o)
{
    if (o == NULL)
        return;
    for (size_t i = 0; i < o->n_entries; i++) {
        free(o->entries[i].key);
        pl_buf_fini(&o->entries[i].value);
    }
    for (size_t i = 0; i < o->n_tensors; i++) {
        free(o->tensors[i].name);
        free(o->tensors[i].data);
    }
    free(o->entries);
    free(o->tensors);
    free(o);
}

/* The emptied value of a new or existing key. */
static struct pl_buf *value_of(struct gguf_out *o, const char *key)
{
    for (size_t i = 0; i < o->n_entries; i++) {
        if (strcmp(o->entries[i].key, key) == 0) {
            pl_buf_clear(&o->entries[i].value);
            return &o->entries[i].value;
        }
    }
    o->entries = pl_xrealloc(o->entries, (o->n_entries + 1) * sizeof *o->entries);
    struct entry *e = &o->entries[o->n_entries++];
    e->key = pl_xstrdup(key);
    pl_buf_init(&e->value, 0);
    return &e->value;
}

void gguf_out_u32(struct gguf_out *o, const char *key, uint32_t v)
{
    struct pl_buf *b = value_of(o, key);
    add_u32(b, TYPE_U32);
    add_u32(b, v);
}

void gguf_out_f32(struct gguf_out *o, const char *key, float v)
{
    struct pl_buf *b = value_of(o, key);
    add_u32(b, TYPE_F32);
    pl_buf_add(b, &v, sizeof v);
}

void gguf_out_bool(struct gguf_out *o, const char *key, int v)
{
    struct pl_buf *b = value_of(o, key);
    add_u32(b, TYPE_BOOL);
    pl_buf_addc(b, v != 0);
}

void gguf_out_str(struct gguf_out *o, const char *key, const char *v)
{
    struct pl_buf *b = value_of(o, key);
    add_u32(b, TYPE_STRING);
    add_str(b, v);
}

static struct pl_buf *array_of(struct gguf_out *o, const char *key, uint32_t type, size_t n)
{
    struct pl_buf *b = value_of(o, key);
    add_u32(b, TYPE_ARRAY);
    add_u32(b, type);
    add_u64(b, n);
    return b;
}

void gguf_out_strs(struct gguf_out *o, const char *key, const char *const *v, size_t n)
{
    struct pl_buf *b = array_of(o, key, TYPE_STRING, n);
    for (size_t i = 0; i < n; i++)
        add_str(b, v[i]);
}

void gguf_out_f32s(struct gguf_out *o, const char *key, const float *v, size_t n)
{
    pl_buf_add(array_of(o, key, TYPE_F32, n), v, n * sizeof *v);
}

void gguf_out_i32s(struct gguf_out *o, const char *key, const int32_t *v, size_t n)
{
    pl_buf_add(array_of(o, key, TYPE_I32, n), v, n * sizeof *v);
}

int gguf_out_remove_key(struct gguf_out *o, const char *key)
{
    for (size_t i = 0; i < o->n_entries; i++) {
        if (strcmp(o->entries[i].key, key) != 0)
            continue;
        free(o->entries[i].key);
        pl_buf_fini(&o->entries[i].value);
        memmove(&o->entries[i], &o->entries[i + 1], (--o->n_entries - i) * sizeof *o->entries);
        return 1;
    }
    return 0;
}

static struct tensor *tensor_of(const struct gguf_out *o, const char *name)
{
    for (size_t i = 0; i < o->n_tensors; i++) {
        if (strcmp(o->tensors[i].name, name) == 0)
            return &o->tensors[i];
    }
    return NULL;
}

void gguf_out_tensor(struct gguf_out *o, const char *name, pl_dtype dtype, uint64_t ne0, uint64_t ne1, const void *data)
{
    gguf_out_remove_tensor(o, name);
    o->tensors = pl_xrealloc(o->tensors, (o->n_tensors + 1) * sizeof *o->tensors);
    const size_t n = ne1 * pl_dtype_row_bytes(dtype, ne0);
    struct tensor *t = &o->tensors[o->n_tensors++];
    *t = (struct tensor){pl_xstrdup(name), dtype, {ne0, ne1}, n, pl_xmalloc(n)};
    memcpy(t->data, data, n);
}

int gguf_out_remove_tensor(struct gguf_out *o, const char *name)
{
    struct tensor *t = tensor_of(o, name);
    if (t == NULL)
        return 0;
    free(t->name);
    free(t->data);
    o->n_tensors--;
    memmove(t, t + 1, (size_t)(o->tensors + o->n_tensors - t) * sizeof *t);
    return 1;
}

int gguf_out_rename_tensor(struct gguf_out *o, const char *name, const char *to)
{
    struct tensor *t = tensor_of(o, name);
    if (t == NULL)
        return 0;
    free(t->name);
    t->name = pl_xstrdup(to);
    return 1;
}

uint64_t gguf_out_tensor_size(const struct gguf_out *o, const char *name)
{
    const struct tensor *t = tensor_of(o, name);
    return t == NULL ? 0 : t->ne[0] * t->ne[1];
}

int gguf_out_reshape_tensor(struct gguf_out *o, const char *name, uint64_t ne0, uint64_t ne1)
{
    struct tensor *t = tensor_of(o, name);
    if (t == NULL)
        return 0;
    t->ne[0] = ne0;
    t->ne[1] = ne1;
    return 1;
}

void *gguf_out_bytes(const struct gguf_out *o, size_t *n)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "GGUF");
    add_u32(&b, VERSION);
    add_u64(&b, o->n_tensors);
    add_u64(&b, o->n_entries);
    for (size_t i = 0; i < o->n_entries; i++) {
        add_str(&b, o->entries[i].key);
        pl_buf_add(&b, o->entries[i].value.data, o->entries[i].value.len);
    }
    uint64_t offset = 0;
    for (size_t i = 0; i < o->n_tensors; i++) {
        const struct tensor *t = &o->tensors[i];
        const uint32_t n_dims = t->ne[1] == 1 ? 1 : 2;
        add_str(&b, t->name);
        add_u32(&b, n_dims);
        for (uint32_t d = 0; d < n_dims; d++)
            add_u64(&b, t->ne[d]);
        add_u32(&b, (uint32_t)t->dtype);
        add_u64(&b, offset);
        offset += (t->n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    pad(&b);
    for (size_t i = 0; i < o->n_tensors; i++) {
        pl_buf_add(&b, o->tensors[i].data, o->tensors[i].n_bytes);
        pad(&b);
    }
    PL_ASSERT(!b.failed);
    *n = b.len;
    return pl_buf_take(&b);
}

int gguf_out_save(const struct gguf_out *o, const char *path)
{
    size_t n;
    void *bytes = gguf_out_bytes(o, &n);
    FILE *f = fopen(path, "wb");
    int rc = -1;
    if (f != NULL) {
        rc = fwrite(bytes, 1, n, f) == n ? 0 : -1;
        if (fclose(f) != 0)
            rc = -1;
    }
    free(bytes);
    return rc;
}
