/* safetensors: reads and writes files of the safetensors format.
 *
 *   | u64le n | JSON, n bytes, may end in blanks | tensor | tensor | … |
 *               {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets": [begin, end)}, …}   offsets from the JSON's end
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/safetensors.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/base/readfile.h"

enum { HEAD = 8, MAX_HEADER = 100000000, MAX_TENSORS = 1 << 20, ALIGNMENT = 8, SHOWN = 120 };

/* dtype in the file, its type here; in the order in which the tensors of a file are sorted */
static const struct {
    const char *name;
    pl_dtype dtype;
} types[] = {{"F32", PL_F32}, {"BF16", PL_BF16}, {"F16", PL_F16}};

struct pl_safetensors {
    json_t *header; /* names and metadata live here */
    const uint8_t *data;
    size_t size;
    struct pl_st_tensor *tensors; /* [n], by name */
    size_t n;
    void *owned; /* data, unless it is the caller's */
};

struct extent {
    uint64_t begin, end;
    const char *name;
};

/* ---- reading ------------------------------------------------------------------------------------------------------- */

static int type_index(pl_dtype t)
{
    for (size_t i = 0; i < PL_COUNT_OF(types); i++)
        if (types[i].dtype == t)
            return (int)i;
    return -1;
}

static pl_status read_type(struct pl_st_tensor *t, const json_t *info, struct pl_err *err)
{
    const char *word = json_string_value(json_object_get(info, "dtype"));
    if (word == NULL)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s has no dtype", SHOWN, t->name);
    for (size_t i = 0; i < PL_COUNT_OF(types); i++)
        if (strcmp(word, types[i].name) == 0) {
            t->dtype = types[i].dtype;
            return PL_OK;
        }
    return pl_fail(err, PL_ENOTSUP, "tensor %.*s has the element type %.20s; F32, BF16 and F16 are supported", SHOWN, t->name, word);
}

static pl_status read_shape(struct pl_st_tensor *t, const json_t *info, uint64_t *n_bytes, struct pl_err *err)
{
    const json_t *shape = json_object_get(info, "shape");
    if (!json_is_array(shape) || json_array_size(shape) > PL_ST_MAX_DIMS)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s has no shape of at most %d dimensions", SHOWN, t->name, PL_ST_MAX_DIMS);
    t->n_dims = (uint32_t)json_array_size(shape);
    uint64_t n = pl_dtype_block_bytes(t->dtype);
    for (uint32_t i = 0; i < t->n_dims; i++) {
        const json_t *v = json_array_get(shape, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s has a dimension that is no whole number", SHOWN, t->name);
        t->dims[i] = (uint64_t)json_integer_value(v);
        if (__builtin_mul_overflow(n, t->dims[i], &n) || n > INT64_MAX)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s has an impossible shape", SHOWN, t->name);
    }
    *n_bytes = n;
    return PL_OK;
}

static pl_status read_extent(struct extent *e, const struct pl_st_tensor *t, const json_t *info, uint64_t n_bytes, uint64_t room,
                             struct pl_err *err)
{
    const json_t *offsets = json_object_get(info, "data_offsets"), *v[2] = {json_array_get(offsets, 0), json_array_get(offsets, 1)};
    if (json_array_size(offsets) != 2 || !json_is_integer(v[0]) || !json_is_integer(v[1]) || json_integer_value(v[0]) < 0 ||
        json_integer_value(v[1]) < json_integer_value(v[0]))
        return pl_fail(err, PL_EFORMAT, "tensor %.*s has no data_offsets [begin, end]", SHOWN, t->name);
    *e = (struct extent){(uint64_t)json_integer_value(v[0]), (uint64_t)json_integer_value(v[1]), t->name};
    if (e->end > room)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s ends at byte %llu of %llu: the file is cut short or damaged", SHOWN, t->name,
                       (unsigned long long)e->end, (unsigned long long)room);
    if (e->end - e->begin != n_bytes)
        return pl_fail(err, PL_EFORMAT, "tensor %.*s has %llu bytes, its type and shape need %llu", SHOWN, t->name,
                       (unsigned long long)(e->end - e->begin), (unsigned long long)n_bytes);
    return PL_OK;
}

static int by_begin(const void *a, const void *b)
{
    const struct extent *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

/* Side by side from the first byte to the last. */
static pl_status check_extents(struct extent *e, size_t n, uint64_t room, struct pl_err *err)
{
    uint64_t at = 0;
    qsort(e, n, sizeof *e, by_begin);
    for (size_t i = 0; i < n; at = e[i++].end)
        if (e[i].begin != at)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s %s", SHOWN, e[i].name,
                           e[i].begin < at ? "overlaps another one" : "leaves a gap before it");
    if (at != room)
        return pl_fail(err, PL_EFORMAT, "%llu bytes at the file's end belong to no tensor", (unsigned long long)(room - at));
    return PL_OK;
}

static pl_status check_meta(const json_t *meta, struct pl_err *err)
{
    const char *key;
    const json_t *value;
    if (!json_is_object(meta))
        return pl_fail(err, PL_EFORMAT, "__metadata__ is not an object");
    json_object_foreach((json_t *)(uintptr_t)meta, key, value)
        if (!json_is_string(value))
            return pl_fail(err, PL_EFORMAT, "__metadata__ holds %.*s, which is not a text", SHOWN, key);
    return PL_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct pl_st_tensor *)a)->name, ((const struct pl_st_tensor *)b)->name);
}

static pl_status read_tensors(struct pl_safetensors *st, struct extent *extents, const uint8_t *begin, uint64_t room, struct pl_err *err)
{
    const char *name;
    json_t *info;
    json_object_foreach(st->header, name, info)
    {
        pl_status rc;
        if (strcmp(name, "__metadata__") == 0) {
            if ((rc = check_meta(info, err)) != PL_OK)
                return rc;
            continue;
        }
        struct pl_st_tensor *t = &st->tensors[st->n];
        uint64_t n_bytes = 0;
        *t = (struct pl_st_tensor){.name = name};
        if (!json_is_object(info))
            return pl_fail(err, PL_EFORMAT, "tensor %.*s is described by something other than an object", SHOWN, name);
        if ((rc = read_type(t, info, err)) != PL_OK || (rc = read_shape(t, info, &n_bytes, err)) != PL_OK ||
            (rc = read_extent(&extents[st->n], t, info, n_bytes, room, err)) != PL_OK)
            return rc;
        t->data = begin + extents[st->n++].begin;
    }
    qsort(st->tensors, st->n, sizeof *st->tensors, by_name);
    return check_extents(extents, st->n, room, err);
}

static pl_status parse(struct pl_safetensors *st, struct pl_err *err)
{
    uint64_t n = 0;
    for (int i = 0; st->size >= HEAD && i < HEAD; i++)
        n |= (uint64_t)st->data[i] << 8 * i;
    if (st->size < HEAD)
        return pl_fail(err, PL_EFORMAT, "not a safetensors file (it has %zu bytes)", st->size);
    if (n > MAX_HEADER || n > st->size - HEAD)
        return pl_fail(err, PL_EFORMAT, "the header claims %llu bytes; the file has %zu and a header at most %d: cut short, or not a safetensors file",
                       (unsigned long long)n, st->size, MAX_HEADER);
    if (n == 0 || st->data[HEAD] != '{')
        return pl_fail(err, PL_EFORMAT, "the header does not begin with \"{\": not a safetensors file");
    json_error_t why;
    st->header = json_loadb((const char *)st->data + HEAD, n, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(st->header))
        return pl_fail(err, PL_EFORMAT, "the header is no JSON object: %.160s (byte %d)", why.text, why.position);
    const size_t most = json_object_size(st->header);
    if (most > MAX_TENSORS)
        return pl_fail(err, PL_EFORMAT, "the header names %zu tensors; at most %d are possible", most, MAX_TENSORS);
    struct extent *extents = calloc(most + 1, sizeof *extents);
    st->tensors = calloc(most + 1, sizeof *st->tensors);
    pl_status rc = extents != NULL && st->tensors != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory for %zu tensors", most);
    if (rc == PL_OK)
        rc = read_tensors(st, extents, st->data + HEAD + n, st->size - HEAD - n, err);
    free(extents);
    return rc;
}

pl_status pl_safetensors_open_memory(struct pl_safetensors **out, const void *data, size_t n, struct pl_err *err)
{
    struct pl_safetensors *st = calloc(1, sizeof *st);
    if (st == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    st->data = data;
    st->size = n;
    const pl_status rc = parse(st, err);
    if (rc == PL_OK)
        *out = st;
    else
        pl_safetensors_close(st);
    return rc;
}

pl_status pl_safetensors_open(struct pl_safetensors **out, const char *path, struct pl_err *err)
{
    void *data;
    size_t n;
    pl_status rc = pl_readfile(&data, &n, path, PL_ST_MAX_FILE, err);
    if (rc != PL_OK)
        return rc;
    struct pl_err inner = {0};
    rc = pl_safetensors_open_memory(out, data, n, &inner);
    if (rc != PL_OK) {
        free(data);
        return pl_fail(err, rc, "%.200s: %.290s", path, inner.msg);
    }
    (*out)->owned = data;
    return PL_OK;
}

void pl_safetensors_close(struct pl_safetensors *st)
{
    if (st == NULL)
        return;
    free(st->owned);
    json_decref(st->header);
    free(st->tensors);
    free(st);
}

size_t pl_safetensors_n(const struct pl_safetensors *st)
{
    return st->n;
}

const struct pl_st_tensor *pl_safetensors_at(const struct pl_safetensors *st, size_t i)
{
    return &st->tensors[i];
}

const struct pl_st_tensor *pl_safetensors_find(const struct pl_safetensors *st, const char *name)
{
    const struct pl_st_tensor key = {.name = name};
    return bsearch(&key, st->tensors, st->n, sizeof key, by_name);
}

const char *pl_safetensors_meta(const struct pl_safetensors *st, const char *key)
{
    return json_string_value(json_object_get(json_object_get(st->header, "__metadata__"), key));
}

uint64_t pl_st_elements(const struct pl_st_tensor *t)
{
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dims; i++)
        n *= t->dims[i];
    return n;
}

void pl_st_read_f32(const struct pl_st_tensor *t, float *out)
{
    const uint64_t n = pl_st_elements(t);
    if (t->dtype == PL_F32)
        memcpy(out, t->data, n * sizeof *out); /* may be unaligned */
    else
        pl_dequant_row(t->dtype, t->data, out, n);
}

/* ---- writing ------------------------------------------------------------------------------------------------------- */

struct pl_st_writer {
    struct pl_newfile file;
    struct place {
        struct pl_st_tensor t; /* name not to be used after new */
        size_t index;          /* in the caller's order */
        uint64_t at, n_bytes;
        bool done;
    } *places;         /* [n], in the file's order */
    size_t *of_caller; /* [n] index in places */
    size_t n;
};

/* The wider types first, then by name: what Hugging Face's writer does, so that each tensor is aligned. */
static int by_type_and_name(const void *a, const void *b)
{
    const struct place *x = a, *y = b;
    if (x->t.dtype != y->t.dtype)
        return type_index(x->t.dtype) - type_index(y->t.dtype);
    return strcmp(x->t.name, y->t.name);
}

static void add_text(struct pl_buf *b, const char *s)
{
    pl_buf_addc(b, '"');
    pl_buf_add_json(b, s, strlen(s));
    pl_buf_addc(b, '"');
}

static void add_header(struct pl_buf *b, struct pl_st_writer *w, const struct pl_st_meta *meta, size_t n_meta)
{
    uint64_t at = 0;
    pl_buf_addc(b, '{');
    for (size_t i = 0; i < n_meta; i++) {
        pl_buf_adds(b, i == 0 ? "\"__metadata__\":{" : ",");
        add_text(b, meta[i].key);
        pl_buf_addc(b, ':');
        add_text(b, meta[i].value);
    }
    pl_buf_adds(b, n_meta > 0 ? "}" : "");
    for (size_t i = 0; i < w->n; i++) {
        struct place *p = &w->places[i];
        pl_buf_adds(b, i > 0 || n_meta > 0 ? "," : "");
        add_text(b, p->t.name);
        pl_buf_addf(b, ":{\"dtype\":\"%s\",\"shape\":[", types[type_index(p->t.dtype)].name);
        for (uint32_t d = 0; d < p->t.n_dims; d++)
            pl_buf_addf(b, "%s%llu", d > 0 ? "," : "", (unsigned long long)p->t.dims[d]);
        p->at = at;
        at += p->n_bytes;
        pl_buf_addf(b, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)p->at, (unsigned long long)at);
    }
    pl_buf_addc(b, '}');
    while (b->len % ALIGNMENT != 0 && !b->failed)
        pl_buf_addc(b, ' ');
}

static pl_status place_tensors(struct pl_st_writer *w, const struct pl_st_tensor *tensors, struct pl_err *err)
{
    for (size_t i = 0; i < w->n; i++) {
        const struct pl_st_tensor *t = &tensors[i];
        if (type_index(t->dtype) < 0 || t->n_dims > PL_ST_MAX_DIMS || strcmp(t->name, "__metadata__") == 0)
            return pl_fail(err, PL_EINVAL, "tensor %.*s cannot stand in a safetensors file", SHOWN, t->name);
        w->places[i] = (struct place){.t = *t, .index = i, .n_bytes = pl_st_elements(t) * pl_dtype_block_bytes(t->dtype)};
    }
    qsort(w->places, w->n, sizeof *w->places, by_type_and_name);
    for (size_t i = 0; i < w->n; i++) {
        w->of_caller[w->places[i].index] = i;
        for (size_t j = 0; i > 0 && j < PL_COUNT_OF(types); j++) { /* one run of sorted names for each type */
            const struct place key = {.t = {.name = w->places[i].t.name, .dtype = types[j].dtype}};
            const struct place *same = bsearch(&key, w->places, i, sizeof key, by_type_and_name);
            if (same != NULL)
                return pl_fail(err, PL_EINVAL, "two tensors have the name %.*s", SHOWN, key.t.name);
        }
    }
    return PL_OK;
}

pl_status pl_st_writer_new(struct pl_st_writer **out, const char *path, const struct pl_st_tensor *tensors, size_t n,
                           const struct pl_st_meta *meta, size_t n_meta, struct pl_err *err)
{
    struct pl_st_writer *w = calloc(1, sizeof *w);
    struct pl_buf header;
    pl_buf_init(&header, MAX_HEADER);
    if (w == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    w->file.fd = -1;
    w->n = n;
    w->places = calloc(n + 1, sizeof *w->places);
    w->of_caller = calloc(n + 1, sizeof *w->of_caller);
    pl_status rc = PL_OK;
    if (w->places == NULL || w->of_caller == NULL)
        rc = pl_fail(err, PL_ENOMEM, "out of memory");
    if (rc != PL_OK || (rc = place_tensors(w, tensors, err)) != PL_OK)
        goto out;
    add_header(&header, w, meta, n_meta);
    if (header.failed) {
        rc = pl_fail(err, PL_EINVAL, "the header of %.200s would be larger than %d bytes", path, MAX_HEADER);
        goto out;
    }
    uint8_t head[HEAD];
    for (int i = 0; i < HEAD; i++)
        head[i] = (uint8_t)((uint64_t)header.len >> 8 * i);
    for (size_t i = 0; i < n; i++)
        w->places[i].at += HEAD + header.len;
    if ((rc = pl_newfile_open(&w->file, path, err)) != PL_OK || (rc = pl_newfile_put(&w->file, 0, head, HEAD, err)) != PL_OK ||
        (rc = pl_newfile_put(&w->file, HEAD, header.data, header.len, err)) != PL_OK)
        goto out;
    *out = w;
    w = NULL;
out:
    pl_buf_fini(&header);
    pl_st_writer_free(w);
    return rc;
}

static pl_status put_raw(struct pl_st_writer *w, struct place *p, const void *data, struct pl_err *err)
{
    PL_ASSERT(!p->done);
    p->done = true;
    return pl_newfile_put(&w->file, p->at, data, p->n_bytes, err);
}

pl_status pl_st_writer_put(struct pl_st_writer *w, size_t i, const float *values, struct pl_err *err)
{
    PL_ASSERT(i < w->n);
    struct place *p = &w->places[w->of_caller[i]];
    if (p->t.dtype == PL_F32 || p->n_bytes == 0)
        return put_raw(w, p, values, err);
    void *narrow = malloc(p->n_bytes);
    if (narrow == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for a tensor of %llu bytes", (unsigned long long)p->n_bytes);
    pl_quant_row(p->t.dtype, values, narrow, pl_st_elements(&p->t));
    const pl_status rc = put_raw(w, p, narrow, err);
    free(narrow);
    return rc;
}

pl_status pl_st_writer_commit(struct pl_st_writer *w, struct pl_err *err)
{
    for (size_t i = 0; i < w->n; i++)
        PL_ASSERT(w->places[i].done);
    return pl_newfile_commit(&w->file, err);
}

void pl_st_writer_free(struct pl_st_writer *w)
{
    if (w == NULL)
        return;
    pl_newfile_abandon(&w->file);
    free(w->places);
    free(w->of_caller);
    free(w);
}

pl_status pl_safetensors_write(const char *path, const struct pl_st_tensor *tensors, size_t n, const struct pl_st_meta *meta,
                               size_t n_meta, struct pl_err *err)
{
    struct pl_st_writer *w = NULL;
    pl_status rc = pl_st_writer_new(&w, path, tensors, n, meta, n_meta, err);
    for (size_t i = 0; rc == PL_OK && i < n; i++)
        rc = put_raw(w, &w->places[w->of_caller[i]], tensors[i].data, err);
    if (rc == PL_OK)
        rc = pl_st_writer_commit(w, err);
    pl_st_writer_free(w);
    return rc;
}
