/* dummy: a model of a well-known shape with random weights, for measuring without a file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dummy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/model/weights.h"

enum { PAGE = 4096, ALIGN = 32, PIECE = 4 << 20 /* bytes of random weights, about */ };
enum { GGUF_U32 = 4, GGUF_F32 = 6, GGUF_STRING = 8, GGUF_ARRAY = 9 };

struct pl_dummy {
    uint8_t *memory;
    size_t size;
};

struct shape {
    const char *name;
    uint32_t L, C, H, G, D, F, V, n_ctx;
    bool tied;
};

static const struct shape shapes[] = {
#define X(...) {__VA_ARGS__},
    PL_DUMMY_SHAPES(X)
#undef X
};

struct tensor {
    char name[64];
    bool matrix;
    uint32_t rows, cols;
};

/* The file's parts: keys and tensors, vectors, matrices */
struct writer {
    struct shape s;
    pl_dtype dtype;
    struct tensor *tensors;
    size_t n_tensors;
    size_t head, vectors, first_matrix, end; /* where the parts end, or begin */
};

static pl_status find_shape(struct writer *w, const char *name, struct pl_err *err)
{
    const char *colon = strchr(name, ':');
    const size_t n = colon != NULL ? (size_t)(colon - name) : strlen(name);
    size_t i = 0;
    uint32_t t = PL_BF16;
    while (i < PL_COUNT_OF(shapes) && (strlen(shapes[i].name) != n || strncasecmp(shapes[i].name, name, n) != 0))
        i++;
    if (i == PL_COUNT_OF(shapes))
        return pl_fail(err, PL_EINVAL, "no shape \"%.*s\": take " PL_DUMMY_NAMES ", and a type behind a colon if it is not to be bf16", (int)n, name);
    if (colon != NULL)
        for (t = 0; t < 64 && (pl_dtype_name(t) == NULL || strcasecmp(pl_dtype_name(t), colon + 1) != 0);)
            t++;
    if (pl_dtype_name(t) == NULL)
        return pl_fail(err, PL_EINVAL, "no type \"%s\": take that of a tensor in a GGUF file, such as bf16, q4_0 or q4_k", colon + 1);
    w->s = shapes[i];
    w->dtype = (pl_dtype)t;
    return PL_OK;
}

/* ---- which tensors ------------------------------------------------------------------------------------------------- */

static void add_tensor(struct writer *w, int layer, const char *name, bool matrix, uint32_t rows, uint32_t cols)
{
    struct tensor *t = &w->tensors[w->n_tensors++];
    if (layer < 0)
        snprintf(t->name, sizeof t->name, "%s", name);
    else
        snprintf(t->name, sizeof t->name, "blk.%d.%s", layer, name);
    t->matrix = matrix;
    t->rows = rows;
    t->cols = cols;
}

static void list_tensors(struct writer *w)
{
    enum { MATRIX, VECTOR, MUST = 0, MAY = 1, PER_LAYER = 32 };
    const uint32_t V = w->s.V, C = w->s.C, F = w->s.F, Q = w->s.H * w->s.D, K = w->s.G * w->s.D, P = w->s.n_ctx, W = w->s.D / 2;
    w->tensors = pl_xcalloc((w->s.L + 1) * (size_t)PER_LAYER, sizeof *w->tensors);
    int layer = -1;
#define X(kind, field, archs, name, rows, cols, need, cut)                                                                  \
    if (((archs) & PL_ARCH_LLAMA) != 0 && (need == MUST || (strcmp(name, "output.weight") == 0 && !w->s.tied)))        \
        add_tensor(w, layer, name, kind == MATRIX, rows, cols);
    PL_TOP_WEIGHTS(X)
    for (layer = 0; layer < (int)w->s.L; layer++) {
        PL_LAYER_WEIGHTS(X)
    }
#undef X
    (void)P, (void)W;
}

static size_t tensor_bytes(const struct writer *w, const struct tensor *t)
{
    return t->matrix ? pl_dtype_row_bytes(w->dtype, t->cols) * t->rows : (size_t)t->cols * sizeof(float);
}

/* ---- the head ------------------------------------------------------------------------------------------------------ */

static void put_u32(struct pl_buf *b, uint32_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void put_u64(struct pl_buf *b, uint64_t v)
{
    pl_buf_add(b, &v, sizeof v);
}

static void put_text(struct pl_buf *b, const char *s)
{
    put_u64(b, strlen(s));
    pl_buf_adds(b, s);
}

static void put_keys(struct pl_buf *b, const struct shape *s)
{
    const struct {
        const char *key;
        uint32_t v;
    } numbers[] = {{"llama.block_count", s->L},           {"llama.context_length", s->n_ctx},       {"llama.embedding_length", s->C},
                   {"llama.feed_forward_length", s->F},   {"llama.attention.head_count", s->H},     {"llama.attention.head_count_kv", s->G},
                   {"llama.attention.key_length", s->D},  {"llama.attention.value_length", s->D},   {"llama.rope.dimension_count", s->D}};
    const float eps = 1e-5f, base = 500000;
    put_u64(b, PL_COUNT_OF(numbers) + 5);
    put_text(b, "general.architecture"), put_u32(b, GGUF_STRING), put_text(b, "llama");
    put_text(b, "general.name"), put_u32(b, GGUF_STRING), put_text(b, s->name);
    put_text(b, "llama.attention.layer_norm_rms_epsilon"), put_u32(b, GGUF_F32), pl_buf_add(b, &eps, sizeof eps);
    put_text(b, "llama.rope.freq_base"), put_u32(b, GGUF_F32), pl_buf_add(b, &base, sizeof base);
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++)
        put_text(b, numbers[i].key), put_u32(b, GGUF_U32), put_u32(b, numbers[i].v);
    put_text(b, "tokenizer.ggml.tokens"), put_u32(b, GGUF_ARRAY), put_u32(b, GGUF_STRING), put_u64(b, s->V);
    for (uint32_t i = 0; i < s->V; i++)
        put_text(b, "x");
}

static size_t round_up(size_t n, size_t of)
{
    return (n + of - 1) / of * of;
}

/* Matrices begin at multiples of this from the first, so that each one's blocks are the random piece's. */
static size_t matrix_step(pl_dtype t)
{
    size_t step = pl_dtype_block_bytes(t);
    while (step % ALIGN != 0)
        step *= 2;
    return step;
}

/* Once to learn how long it is, with places that are not right yet, and once more. */
static void put_head(struct pl_buf *b, struct writer *w)
{
    size_t vector = 0, matrix = w->first_matrix - w->head;
    pl_buf_clear(b);
    pl_buf_adds(b, "GGUF");
    put_u32(b, 3);
    put_u64(b, w->n_tensors);
    put_keys(b, &w->s);
    for (size_t i = 0; i < w->n_tensors; i++) {
        const struct tensor *t = &w->tensors[i];
        size_t *at = t->matrix ? &matrix : &vector;
        put_text(b, t->name);
        put_u32(b, t->matrix ? 2 : 1);
        put_u64(b, t->cols);
        if (t->matrix)
            put_u64(b, t->rows);
        put_u32(b, t->matrix ? w->dtype : PL_F32);
        put_u64(b, *at);
        *at += round_up(tensor_bytes(w, t), t->matrix ? matrix_step(w->dtype) : ALIGN);
    }
    w->head = round_up(b->len, ALIGN);
    w->vectors = vector;
    w->end = w->head + matrix;
}

/* ---- the matrices -------------------------------------------------------------------------------------------------- */

static void fill_piece(uint8_t *piece, size_t n, pl_dtype t)
{
    float row[256];
    const uint32_t elements = 256 / pl_dtype_block(t) * pl_dtype_block(t);
    const size_t step = pl_dtype_row_bytes(t, elements);
    uint64_t state = 1;
    for (size_t at = 0; at < n; at += step) {
        for (uint32_t i = 0; i < elements; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            row[i] = (float)(int32_t)(state >> 32) * 0x1p-31f * 0.03f;
        }
        pl_quant_row(t, row, piece + at, elements);
    }
}

/* Maps a piece of random rows over the place of all matrices. */
static pl_status map_matrices(struct pl_dummy *d, const struct writer *w, struct pl_err *err)
{
    size_t unit = pl_dtype_row_bytes(w->dtype, 256);
    while (unit % PAGE != 0)
        unit *= 2;
    const size_t n = PIECE / unit > 0 ? PIECE / unit * unit : unit;
    const int fd = memfd_create("parley-dummy", MFD_CLOEXEC);
    void *piece = fd >= 0 && ftruncate(fd, (off_t)n) == 0 ? mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    bool ok = piece != MAP_FAILED;
    if (ok)
        fill_piece(piece, n, w->dtype);
    for (size_t at = w->first_matrix; ok && at < d->size; at += n)
        ok = mmap(d->memory + at, d->size - at < n ? d->size - at : n, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
    if (piece != MAP_FAILED)
        munmap(piece, n);
    if (fd >= 0)
        close(fd);
    return ok ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory for a made-up model");
}

static pl_status build(struct pl_dummy *d, struct writer *w, struct pl_err *err)
{
    struct pl_buf head;
    pl_buf_init(&head, 0);
    put_head(&head, w);
    w->first_matrix = round_up(w->head + w->vectors, PAGE);
    put_head(&head, w);
    d->size = round_up(w->end, PAGE);
    d->memory = mmap(NULL, d->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pl_status rc = head.failed || d->memory == MAP_FAILED ? pl_fail(err, PL_ENOMEM, "no memory for a made-up model") : PL_OK;
    if (d->memory == MAP_FAILED)
        d->memory = NULL;
    if (rc == PL_OK) {
        memcpy(d->memory, head.data, head.len);
        for (size_t i = 0; i < w->vectors / sizeof(float); i++)
            ((float *)(d->memory + w->head))[i] = 1;
        rc = map_matrices(d, w, err);
    }
    pl_buf_fini(&head);
    return rc;
}

pl_status pl_dummy_open(struct pl_dummy **out, struct pl_gguf **file, const char *name, struct pl_err *err)
{
    struct writer w = {0};
    pl_status rc = find_shape(&w, name, err);
    if (rc != PL_OK)
        return rc;
    if (w.s.C % pl_dtype_block(w.dtype) != 0 || w.s.F % pl_dtype_block(w.dtype) != 0)
        return pl_fail(err, PL_EINVAL, "rows of the shape %s are no multiple of %s blocks", w.s.name, pl_dtype_name(w.dtype));
    struct pl_dummy *d = pl_xcalloc(1, sizeof *d);
    list_tensors(&w);
    rc = build(d, &w, err);
    if (rc == PL_OK)
        rc = pl_gguf_open_memory(file, d->memory, d->size, err);
    free(w.tensors);
    if (rc == PL_OK)
        *out = d;
    else
        pl_dummy_close(d);
    return rc;
}

void pl_dummy_close(struct pl_dummy *d)
{
    if (d != NULL && d->memory != NULL)
        munmap(d->memory, d->size);
    free(d);
}
