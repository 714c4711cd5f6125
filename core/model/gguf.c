/* gguf: reads a GGUF v2 or v3 file.
 *
 *   magic version n_tensors n_kv | key-values … | tensor infos … | padding | tensor data …
 *
 * The header is walked once by a bounded reader; keys and tensor names go into hash tables. Strings and numbers stay in
 * the mapping. An array of strings is walked at open (so that its length can be trusted) and again by its getter.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mapped.h"
#include "core/base/utf8.h"

enum { MAX_KV = 1 << 16, MAX_TENSORS = 1 << 18, MAX_NAME = 64, MAX_KEY = 65535, DEFAULT_ALIGNMENT = 32 };

/* Value types of the specification. */
enum { T_U8, T_I8, T_U16, T_I16, T_U32, T_I32, T_F32, T_BOOL, T_STRING, T_ARRAY, T_U64, T_I64, T_F64, T_COUNT };
static const uint8_t type_bytes[T_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

struct kv {
    struct pl_gguf_str key;
    uint32_t type;      /* of the value, or of an array's elements */
    bool is_array;
    uint64_t n;         /* elements: 1, or the array's length */
    const uint8_t *value;
};

struct table {
    uint32_t *slots; /* index + 1, 0 = empty */
    size_t mask;
};

struct pl_gguf {
    const uint8_t *data;
    size_t size;
    bool mapped;
    unsigned guard; /* of the mapping */
    struct kv *kv;
    size_t n_kv;
    const uint8_t *keys; /* where the first key begins */
    size_t keys_bytes;
    uint32_t alignment;
    struct pl_gguf_tensor *tensors;
    size_t n_tensors;
    struct table kv_table, tensor_table;
};

/* ---- bounded reader ------------------------------------------------------------------------------------------------ */

struct reader {
    const uint8_t *at, *end;
    const uint8_t *start;
    struct pl_err *err;
};

static pl_status cut_short(struct reader *r, const char *what)
{
    return pl_fail(r->err, PL_EFORMAT, "the file ends inside %s (at byte %zu)", what, (size_t)(r->at - r->start));
}

static pl_status read_bytes(struct reader *r, void *out, size_t n, const char *what)
{
    if ((size_t)(r->end - r->at) < n)
        return cut_short(r, what);
    memcpy(out, r->at, n);
    r->at += n;
    return PL_OK;
}

static pl_status read_u32(struct reader *r, uint32_t *v, const char *what)
{
    return read_bytes(r, v, sizeof *v, what);
}

static pl_status read_u64(struct reader *r, uint64_t *v, const char *what)
{
    return read_bytes(r, v, sizeof *v, what);
}

static pl_status skip(struct reader *r, uint64_t n, const char *what)
{
    if ((uint64_t)(r->end - r->at) < n)
        return cut_short(r, what);
    r->at += n;
    return PL_OK;
}

static pl_status read_str(struct reader *r, struct pl_gguf_str *s, const char *what)
{
    pl_status st = read_u64(r, &s->n, what);
    if (st != PL_OK)
        return st;
    s->s = (const char *)r->at;
    return skip(r, s->n, what);
}

/* ---- names --------------------------------------------------------------------------------------------------------- */

static uint64_t hash_name(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static pl_status table_init(struct table *t, size_t n)
{
    size_t cap = 16;
    while (cap < 2 * n)
        cap *= 2;
    t->slots = calloc(cap, sizeof *t->slots);
    t->mask = cap - 1;
    return t->slots != NULL ? PL_OK : PL_ENOMEM;
}

static struct pl_gguf_str name_of(const struct pl_gguf *g, const struct table *t, uint32_t i)
{
    return t == &g->kv_table ? g->kv[i].key : g->tensors[i].name;
}

/* The slot where name is, or where it would go. */
static uint32_t *table_slot(const struct pl_gguf *g, const struct table *t, const char *s, size_t n)
{
    for (size_t i = hash_name(s, n) & t->mask;; i = (i + 1) & t->mask) {
        if (t->slots[i] == 0)
            return &t->slots[i];
        struct pl_gguf_str have = name_of(g, t, t->slots[i] - 1);
        if (have.n == n && memcmp(have.s, s, n) == 0)
            return &t->slots[i];
    }
}

/* ---- open ---------------------------------------------------------------------------------------------------------- */

static pl_status check_name(struct reader *r, struct pl_gguf_str s, size_t max, const char *what)
{
    if (s.n == 0 || s.n > max)
        return pl_fail(r->err, PL_EFORMAT, "a %s of %llu bytes (1 to %zu are allowed)", what, (unsigned long long)s.n, max);
    if (!pl_utf8_valid(s.s, s.n))
        return pl_fail(r->err, PL_EFORMAT, "a %s is not valid UTF-8", what);
    for (uint64_t i = 0; i < s.n; i++) /* so that messages may show it */
        if ((unsigned char)s.s[i] < 0x20 || s.s[i] == 0x7f)
            return pl_fail(r->err, PL_EFORMAT, "a %s has a control character in it", what);
    return PL_OK;
}

static pl_status read_value(struct reader *r, struct kv *kv)
{
    int len = (int)(kv->key.n < 80 ? kv->key.n : 80);
    pl_status st = read_u32(r, &kv->type, "a value's type");
    if (st != PL_OK)
        return st;
    kv->n = 1;
    kv->is_array = kv->type == T_ARRAY;
    if (kv->is_array) {
        if ((st = read_u32(r, &kv->type, "an array's type")) != PL_OK || (st = read_u64(r, &kv->n, "an array's length")) != PL_OK)
            return st;
        if (kv->type == T_ARRAY)
            return pl_fail(r->err, PL_ENOTSUP, "key %.*s is an array of arrays", len, kv->key.s);
    }
    if (kv->type >= T_COUNT)
        return pl_fail(r->err, PL_EFORMAT, "key %.*s has the unknown value type %u", len, kv->key.s, kv->type);
    kv->value = r->at;
    if (kv->type == T_STRING) {
        char what[128];
        snprintf(what, sizeof what, "the value of key %.*s", len, kv->key.s);
        if (kv->n > (uint64_t)(r->end - r->at) / 8)
            return pl_fail(r->err, PL_EFORMAT, "key %.*s claims %llu strings, more than the file can hold", len, kv->key.s,
                           (unsigned long long)kv->n);
        for (uint64_t i = 0; i < kv->n && st == PL_OK; i++) {
            struct pl_gguf_str s;
            st = read_str(r, &s, what);
        }
        return st;
    }
    uint64_t bytes;
    if (__builtin_mul_overflow(kv->n, type_bytes[kv->type], &bytes) || bytes > (uint64_t)(r->end - r->at))
        return pl_fail(r->err, PL_EFORMAT, "key %.*s claims %llu elements, more than the file can hold", len, kv->key.s,
                       (unsigned long long)kv->n);
    for (uint64_t i = 0; kv->type == T_BOOL && i < kv->n; i++)
        if (r->at[i] > 1)
            return pl_fail(r->err, PL_EFORMAT, "key %.*s holds a boolean that is neither 0 nor 1", len, kv->key.s);
    return skip(r, bytes, "a value");
}

static pl_status read_kvs(struct pl_gguf *g, struct reader *r, uint64_t n)
{
    if (n > MAX_KV || n > (uint64_t)(r->end - r->at) / 13)
        return pl_fail(r->err, PL_EFORMAT, "the header claims %llu keys, more than the file can hold", (unsigned long long)n);
    g->kv = calloc(n ? n : 1, sizeof *g->kv);
    if (g->kv == NULL || table_init(&g->kv_table, n) != PL_OK)
        return pl_fail(r->err, PL_ENOMEM, "no memory for %llu keys", (unsigned long long)n);
    for (uint64_t i = 0; i < n; i++) {
        struct kv *kv = &g->kv[i];
        pl_status st = read_str(r, &kv->key, "a key");
        if (st != PL_OK || (st = check_name(r, kv->key, MAX_KEY, "key")) != PL_OK || (st = read_value(r, kv)) != PL_OK)
            return st;
        uint32_t *slot = table_slot(g, &g->kv_table, kv->key.s, kv->key.n);
        if (*slot != 0)
            return pl_fail(r->err, PL_EFORMAT, "key %.*s appears twice", (int)(kv->key.n < 80 ? kv->key.n : 80), kv->key.s);
        g->n_kv = i + 1;
        *slot = (uint32_t)(i + 1);
    }
    return PL_OK;
}

static pl_status read_shape(struct reader *r, struct pl_gguf_tensor *t)
{
    int len = (int)t->name.n;
    pl_status st = read_u32(r, &t->n_dims, "a tensor's shape");
    if (st != PL_OK)
        return st;
    if (t->n_dims < 1 || t->n_dims > 4)
        return pl_fail(r->err, PL_EFORMAT, "tensor %.*s has %u dimensions (1 to 4 are allowed)", len, t->name.s, t->n_dims);
    uint64_t elements = 1;
    for (uint32_t d = 0; d < 4; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims && (st = read_u64(r, &t->ne[d], "a tensor's shape")) != PL_OK)
            return st;
        if (t->ne[d] == 0 || t->ne[d] > INT64_MAX || __builtin_mul_overflow(elements, t->ne[d], &elements) || elements > INT64_MAX)
            return pl_fail(r->err, PL_EFORMAT, "tensor %.*s has an impossible shape", len, t->name.s);
    }
    uint32_t type;
    if ((st = read_u32(r, &type, "a tensor's type")) != PL_OK)
        return st;
    if (pl_dtype_block(type) == 0)
        return pl_fail(r->err, PL_ENOTSUP, "tensor %.*s has the tensor type number %u, which is not supported", len, t->name.s, type);
    t->dtype = (pl_dtype)type;
    if (t->ne[0] % pl_dtype_block(type) != 0)
        return pl_fail(r->err, PL_EFORMAT, "tensor %.*s has rows of %llu elements, not a multiple of the %s block of %u", len,
                       t->name.s, (unsigned long long)t->ne[0], pl_dtype_name(type), pl_dtype_block(type));
    if (__builtin_mul_overflow(elements / pl_dtype_block(type), pl_dtype_block_bytes(type), &t->n_bytes))
        return pl_fail(r->err, PL_EFORMAT, "tensor %.*s has an impossible shape", len, t->name.s);
    return PL_OK;
}

/* offsets[i] is relative to the data section, whose start is known only after the last tensor info. */
static pl_status read_tensors(struct pl_gguf *g, struct reader *r, uint64_t n, uint64_t *offsets)
{
    for (uint64_t i = 0; i < n; i++) {
        struct pl_gguf_tensor *t = &g->tensors[i];
        pl_status st = read_str(r, &t->name, "a tensor's name");
        if (st != PL_OK || (st = check_name(r, t->name, MAX_NAME, "tensor name")) != PL_OK || (st = read_shape(r, t)) != PL_OK ||
            (st = read_u64(r, &offsets[i], "a tensor's offset")) != PL_OK)
            return st;
        uint32_t *slot = table_slot(g, &g->tensor_table, t->name.s, t->name.n);
        if (*slot != 0)
            return pl_fail(r->err, PL_EFORMAT, "tensor %.*s appears twice", (int)t->name.n, t->name.s);
        g->n_tensors = i + 1;
        *slot = (uint32_t)(i + 1);
    }
    return PL_OK;
}

struct extent {
    uint64_t from, n;
    size_t tensor;
};

static int by_offset(const void *a, const void *b)
{
    const struct extent *x = a, *y = b;
    return x->from < y->from ? -1 : x->from > y->from;
}

static pl_status place_tensors(struct pl_gguf *g, struct reader *r, const uint64_t *offsets, uint64_t alignment)
{
    uint64_t header = (uint64_t)(r->at - r->start), begin = (header + alignment - 1) / alignment * alignment;
    uint64_t room = begin < g->size ? g->size - begin : 0;
    struct extent *extents = calloc(g->n_tensors ? g->n_tensors : 1, sizeof *extents);
    if (extents == NULL)
        return pl_fail(r->err, PL_ENOMEM, "no memory for %zu tensors", g->n_tensors);
    pl_status st = PL_OK;
    for (size_t i = 0; i < g->n_tensors && st == PL_OK; i++) {
        struct pl_gguf_tensor *t = &g->tensors[i];
        extents[i] = (struct extent){offsets[i], t->n_bytes, i};
        if (offsets[i] % alignment != 0)
            st = pl_fail(r->err, PL_EFORMAT, "tensor %.*s lies at offset %llu, which is not aligned to %llu", (int)t->name.n,
                         t->name.s, (unsigned long long)offsets[i], (unsigned long long)alignment);
        else if (offsets[i] > room || t->n_bytes > room - offsets[i])
            st = pl_fail(r->err, PL_EFORMAT, "tensor %.*s needs %llu bytes at offset %llu, past the file's end: the file is cut short or damaged",
                         (int)t->name.n, t->name.s, (unsigned long long)t->n_bytes, (unsigned long long)offsets[i]);
        else
            t->data = g->data + begin + offsets[i];
    }
    if (st == PL_OK) {
        qsort(extents, g->n_tensors, sizeof *extents, by_offset);
        for (size_t i = 1; i < g->n_tensors && st == PL_OK; i++) {
            const struct pl_gguf_tensor *t = &g->tensors[extents[i].tensor];
            if (extents[i].from - extents[i - 1].from < extents[i - 1].n)
                st = pl_fail(r->err, PL_EFORMAT, "tensor %.*s overlaps another one", (int)t->name.n, t->name.s);
        }
    }
    free(extents);
    return st;
}

static pl_status read_alignment(struct pl_gguf *g, struct reader *r, uint64_t *alignment)
{
    uint32_t v = DEFAULT_ALIGNMENT;
    pl_status st = pl_gguf_u32(g, "general.alignment", &v);
    if (st == PL_EFORMAT || v < 8 || v > 1 << 20 || (v & (v - 1)) != 0)
        return pl_fail(r->err, PL_EFORMAT, "general.alignment must be a power of two from 8 to 1048576");
    *alignment = v;
    return PL_OK;
}

static pl_status parse(struct pl_gguf *g, struct pl_err *err)
{
    struct reader r = {g->data, g->data + g->size, g->data, err};
    uint8_t magic[4];
    uint32_t version;
    uint64_t n_tensors, n_kv, alignment;
    pl_status st;
    if ((st = read_bytes(&r, magic, 4, "the magic number")) != PL_OK)
        return st;
    if (memcmp(magic, "GGUF", 4) != 0)
        return pl_fail(err, PL_EFORMAT, "not a GGUF file (it does not begin with \"GGUF\")");
    if ((st = read_u32(&r, &version, "the version")) != PL_OK)
        return st;
    if (version != 2 && version != 3)
        return pl_fail(err, PL_ENOTSUP, "GGUF version %u%s is not supported (2 and 3 are)", version,
                       (version & 0xffff) == 0 && version != 0 ? " (a big-endian file?)" : "");
    if ((st = read_u64(&r, &n_tensors, "the tensor count")) != PL_OK || (st = read_u64(&r, &n_kv, "the key count")) != PL_OK ||
        (g->keys = r.at, st = read_kvs(g, &r, n_kv)) != PL_OK || (st = read_alignment(g, &r, &alignment)) != PL_OK)
        return st;
    g->keys_bytes = (size_t)(r.at - g->keys);
    g->alignment = (uint32_t)alignment;
    if (n_tensors > MAX_TENSORS || n_tensors > (uint64_t)(r.end - r.at) / 33)
        return pl_fail(err, PL_EFORMAT, "the header claims %llu tensors, more than the file can hold", (unsigned long long)n_tensors);
    uint64_t *offsets = calloc(n_tensors ? n_tensors : 1, sizeof *offsets);
    g->tensors = calloc(n_tensors ? n_tensors : 1, sizeof *g->tensors);
    if (offsets == NULL || g->tensors == NULL || table_init(&g->tensor_table, n_tensors) != PL_OK)
        st = pl_fail(err, PL_ENOMEM, "no memory for %llu tensors", (unsigned long long)n_tensors);
    if (st == PL_OK && (st = read_tensors(g, &r, n_tensors, offsets)) == PL_OK)
        st = place_tensors(g, &r, offsets, alignment);
    free(offsets);
    return st;
}

pl_status pl_gguf_open_memory(struct pl_gguf **out, const void *data, size_t n, struct pl_err *err)
{
    struct pl_gguf *g = calloc(1, sizeof *g);
    if (g == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory");
    g->data = data;
    g->size = n;
    pl_status st = parse(g, err);
    if (st != PL_OK)
        pl_gguf_close(g);
    else
        *out = g;
    return st;
}

pl_status pl_gguf_open(struct pl_gguf **out, const char *path, struct pl_err *err)
{
    struct stat info;
    void *data = MAP_FAILED;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return pl_fail(err, PL_EIO, "cannot open %s: %s", path, strerror(errno));
    pl_status st = PL_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        st = pl_fail(err, PL_EIO, "%s is not a regular file", path);
    else if (info.st_size == 0)
        st = pl_fail(err, PL_EFORMAT, "%s is empty", path);
    else if ((data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot map %s: %s", path, strerror(errno));
    close(fd);
    if (st != PL_OK)
        return st;
    struct pl_err inner = {0};
    const unsigned guard = pl_mapped_add(data, (size_t)info.st_size);
    st = pl_gguf_open_memory(out, data, (size_t)info.st_size, &inner);
    if (st != PL_OK) {
        pl_mapped_remove(guard);
        munmap(data, (size_t)info.st_size);
        return pl_fail(err, st, "%.200s: %.300s", path, inner.msg);
    }
    (*out)->mapped = true;
    (*out)->guard = guard;
    return PL_OK;
}

bool pl_gguf_is_whole(const struct pl_gguf *g)
{
    return pl_mapped_is_whole(g->guard);
}

void pl_gguf_close(struct pl_gguf *g)
{
    if (g == NULL)
        return;
    pl_mapped_remove(g->guard);
    if (g->mapped)
        munmap((void *)(uintptr_t)g->data, g->size);
    free(g->kv);
    free(g->tensors);
    free(g->kv_table.slots);
    free(g->tensor_table.slots);
    free(g);
}

/* ---- getters ------------------------------------------------------------------------------------------------------- */

size_t pl_gguf_n_tensors(const struct pl_gguf *g)
{
    return g->n_tensors;
}

const struct pl_gguf_tensor *pl_gguf_tensor_at(const struct pl_gguf *g, size_t i)
{
    return &g->tensors[i];
}

const struct pl_gguf_tensor *pl_gguf_tensor(const struct pl_gguf *g, const char *name)
{
    uint32_t i = *table_slot(g, &g->tensor_table, name, strlen(name));
    return i != 0 ? &g->tensors[i - 1] : NULL;
}

static const struct kv *find(const struct pl_gguf *g, const char *key)
{
    uint32_t i = *table_slot(g, &g->kv_table, key, strlen(key));
    return i != 0 ? &g->kv[i - 1] : NULL;
}

/* Element i of kv as an integer; false when it is none or out of int64. */
static bool as_int(const struct kv *kv, uint64_t i, int64_t *v)
{
    uint8_t raw[8] = {0};
    if (kv->type == T_STRING || kv->type == T_F32 || kv->type == T_F64 || kv->type == T_BOOL)
        return false;
    size_t n = type_bytes[kv->type];
    memcpy(raw, kv->value + i * n, n);
    uint64_t u;
    memcpy(&u, raw, sizeof u);
    if (kv->type == T_I8 || kv->type == T_I16 || kv->type == T_I32 || kv->type == T_I64) {
        unsigned shift = (unsigned)(64 - 8 * n);
        *v = (int64_t)(u << shift) >> shift;
        return true;
    }
    *v = (int64_t)u;
    return u <= INT64_MAX;
}

static bool as_real(const struct kv *kv, uint64_t i, float *v)
{
    if (kv->type == T_F32) {
        memcpy(v, kv->value + 4 * i, 4);
        return true;
    }
    if (kv->type == T_F64) {
        double d;
        memcpy(&d, kv->value + 8 * i, 8);
        *v = (float)d;
        return true;
    }
    return false;
}

pl_status pl_gguf_u32(const struct pl_gguf *g, const char *key, uint32_t *v)
{
    const struct kv *kv = find(g, key);
    int64_t i;
    if (kv == NULL)
        return PL_ENOENT;
    if (kv->is_array || !as_int(kv, 0, &i) || i < 0 || i > UINT32_MAX)
        return PL_EFORMAT;
    *v = (uint32_t)i;
    return PL_OK;
}

pl_status pl_gguf_f32(const struct pl_gguf *g, const char *key, float *v)
{
    const struct kv *kv = find(g, key);
    if (kv == NULL)
        return PL_ENOENT;
    return !kv->is_array && as_real(kv, 0, v) ? PL_OK : PL_EFORMAT;
}

pl_status pl_gguf_bool(const struct pl_gguf *g, const char *key, bool *v)
{
    const struct kv *kv = find(g, key);
    if (kv == NULL)
        return PL_ENOENT;
    if (kv->is_array || kv->type != T_BOOL)
        return PL_EFORMAT;
    *v = kv->value[0] != 0;
    return PL_OK;
}

/* The string at *at, which moves behind it. Checked at open. */
static struct pl_gguf_str next_str(const uint8_t **at)
{
    struct pl_gguf_str s;
    memcpy(&s.n, *at, 8);
    s.s = (const char *)*at + 8;
    *at += 8 + s.n;
    return s;
}

pl_status pl_gguf_string(const struct pl_gguf *g, const char *key, struct pl_gguf_str *v)
{
    const struct kv *kv = find(g, key);
    if (kv == NULL)
        return PL_ENOENT;
    if (kv->is_array || kv->type != T_STRING)
        return PL_EFORMAT;
    const uint8_t *at = kv->value;
    *v = next_str(&at);
    return PL_OK;
}

static pl_status find_array(const struct pl_gguf *g, const char *key, const struct kv **kv)
{
    *kv = find(g, key);
    return *kv == NULL ? PL_ENOENT : (*kv)->is_array ? PL_OK : PL_EFORMAT;
}

pl_status pl_gguf_array_len(const struct pl_gguf *g, const char *key, uint64_t *n)
{
    const struct kv *kv;
    pl_status st = find_array(g, key, &kv);
    if (st == PL_OK)
        *n = kv->n;
    return st;
}

pl_status pl_gguf_array_str(const struct pl_gguf *g, const char *key, struct pl_gguf_str *v, uint64_t n)
{
    const struct kv *kv;
    pl_status st = find_array(g, key, &kv);
    if (st != PL_OK)
        return st;
    if (kv->type != T_STRING || kv->n != n)
        return PL_EFORMAT;
    const uint8_t *at = kv->value;
    for (uint64_t i = 0; i < n; i++)
        v[i] = next_str(&at);
    return PL_OK;
}

pl_status pl_gguf_array_f32(const struct pl_gguf *g, const char *key, float *v, uint64_t n)
{
    const struct kv *kv;
    pl_status st = find_array(g, key, &kv);
    if (st != PL_OK)
        return st;
    if (kv->n != n)
        return PL_EFORMAT;
    for (uint64_t i = 0; i < n; i++)
        if (!as_real(kv, i, &v[i]))
            return PL_EFORMAT;
    return PL_OK;
}

pl_status pl_gguf_array_i32(const struct pl_gguf *g, const char *key, int32_t *v, uint64_t n)
{
    const struct kv *kv;
    pl_status st = find_array(g, key, &kv);
    if (st != PL_OK)
        return st;
    if (kv->n != n)
        return PL_EFORMAT;
    for (uint64_t i = 0; i < n; i++) {
        int64_t e;
        if (!as_int(kv, i, &e) || e < INT32_MIN || e > INT32_MAX)
            return PL_EFORMAT;
        v[i] = (int32_t)e;
    }
    return PL_OK;
}

const void *pl_gguf_keys(const struct pl_gguf *g, uint64_t *n_keys, size_t *n_bytes)
{
    *n_keys = g->n_kv;
    *n_bytes = g->keys_bytes;
    return g->keys;
}

const void *pl_gguf_key_at(const struct pl_gguf *g, uint64_t i, size_t *n_bytes)
{
    enum { LENGTH = 8 }; /* of the name, before it */
    const uint8_t *from = (const uint8_t *)g->kv[i].key.s - LENGTH;
    const uint8_t *to = i + 1 < g->n_kv ? (const uint8_t *)g->kv[i + 1].key.s - LENGTH : g->keys + g->keys_bytes;
    *n_bytes = (size_t)(to - from);
    return from;
}

uint32_t pl_gguf_alignment(const struct pl_gguf *g)
{
    return g->alignment;
}
