/* check_train: the trainer's numerics. Every operation's result and gradients, loss and gradients of whole tiny models, and
 * the losses of 20 steps against PyTorch and PEFT (tests/oracle/make_train.py); the same bits with any number of threads.
 * Runs in the repository's root.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/train/dataset.h"
#include "core/train/net.h"
#include "core/train/objective.h"
#include "core/train/optim.h"
#include "tests/tools/emulated.h"
#include "tests/tools/tiny_model.h"

Suite *suite_train(void);

#define FIXTURES "tests/oracle/fixtures/train/"

static const char *const devices[] = {"ref", "avx2", "avx512", "cuda-emulated", "cuda-emulated"};
enum { BACKWARDS = 4 /* a block's threads from the last to the first */ };
static const char *const fast[] = {NULL, "cuda-emulated"};

struct fixture {
    json_t *doc, *cases;
    float *blob;
};

static void fixture_open(struct fixture *f, const char *stem)
{
    char path[128];
    json_error_t e;
    snprintf(path, sizeof path, FIXTURES "%s.json", stem);
    f->doc = json_load_file(path, 0, &e);
    ck_assert_msg(f->doc != NULL, "%s: %s", path, e.text);
    f->cases = json_object_get(f->doc, "cases");
    snprintf(path, sizeof path, FIXTURES "%s.bin", stem);
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "%s", path);
    fseek(file, 0, SEEK_END);
    const size_t n = (size_t)ftell(file);
    rewind(file);
    f->blob = pl_xmalloc(n);
    ck_assert_uint_eq(fread(f->blob, 1, n, file), n);
    fclose(file);
}

static void fixture_close(struct fixture *f)
{
    json_decref(f->doc);
    free(f->blob);
}

/* An array of a case: where it is and its shape as a matrix. */
struct array {
    const float *values;
    uint32_t rows, cols;
};

static struct array array_of(const struct fixture *f, const json_t *c, const char *name)
{
    const json_t *a = json_object_get(json_object_get(c, "arrays"), name);
    if (a == NULL)
        return (struct array){0};
    const size_t dims = json_array_size(a) - 1;
    const uint32_t last = (uint32_t)json_integer_value(json_array_get(a, dims));
    return (struct array){f->blob + json_integer_value(json_array_get(a, 0)), dims == 2 ? (uint32_t)json_integer_value(json_array_get(a, 1)) : 1, last};
}

static double real_of(const json_t *c, const char *name)
{
    return json_number_value(json_object_get(c, name));
}

static uint32_t *ints_of(const json_t *c, const char *name, uint32_t *n)
{
    const json_t *list = json_object_get(c, name);
    uint32_t *out = pl_xcalloc(json_array_size(list) + 1, sizeof *out);
    for (size_t i = 0; i < json_array_size(list); i++)
        out[i] = (uint32_t)json_integer_value(json_array_get(list, i));
    if (n != NULL)
        *n = (uint32_t)json_array_size(list);
    return out;
}

/* ‖a - b‖ / ‖b‖ */
static double distance(const float *a, const float *b, size_t n)
{
    double off = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        off += pow((double)a[i] - (double)b[i], 2);
        size += pow((double)b[i], 2);
    }
    return sqrt(off) / (sqrt(size) + 1e-30);
}

/* ---- a device and views ---- */

struct bed {
    struct pl_pool *pool;
    struct pl_device *dev;
    const struct pl_train_ops *t;
    struct pl_dbuf *bufs[64];
    size_t n_bufs;
};

/* False, with a line, where the processor lacks the instruction set, or the emulated device was not built. */
static bool bed_open(struct bed *b, const char *device, unsigned n_threads)
{
    struct pl_err err = {0};
    *b = (struct bed){0};
    ck_assert_int_eq(pl_pool_new(&b->pool, n_threads, &err), PL_OK);
    const pl_status rc = device_open(&b->dev, b->pool, device, &err);
    if (rc == PL_OK) {
        b->t = b->dev->ops->train;
        return true;
    }
    ck_assert_int_eq(rc, PL_ENOTSUP);
    printf("train: %s skipped: %s\n", device, err.msg);
    pl_pool_free(b->pool);
    return false;
}

static void bed_clear(struct bed *b)
{
    while (b->n_bufs > 0)
        b->dev->ops->buf_free(b->dev, b->bufs[--b->n_bufs]);
}

static void bed_close(struct bed *b)
{
    bed_clear(b);
    b->dev->ops->close(b->dev);
    pl_pool_free(b->pool);
}

/* A view of its own, zeros, or the array's values; columns lie apart, as those of a fused product do. */
static pl_view new_view(struct bed *b, uint32_t rows, uint32_t cols, const float *values)
{
    const uint32_t stride = rows > 1 ? cols + 5 : cols;
    struct pl_dbuf *buf;
    ck_assert_uint_lt(b->n_bufs, PL_COUNT_OF(b->bufs));
    ck_assert_int_eq(b->dev->ops->buf_new(b->dev, (size_t)rows * stride + 3, &buf), PL_OK);
    b->bufs[b->n_bufs++] = buf;
    const pl_view v = {buf, 3, rows, cols, stride};
    if (values != NULL)
        ck_assert_int_eq(b->dev->ops->put_rows(b->dev, v, values), PL_OK);
    return v;
}

static pl_view given(struct bed *b, const struct fixture *f, const json_t *c, const char *name)
{
    const struct array a = array_of(f, c, name);
    return a.values != NULL ? new_view(b, a.rows, a.cols, a.values) : pl_view_none();
}

static pl_view like(struct bed *b, pl_view v)
{
    return v.buf != NULL ? new_view(b, v.rows, v.cols, NULL) : pl_view_none();
}

/* Checks a view against an array of the case, if there is one. */
static void expect(struct bed *b, const struct fixture *f, const json_t *c, const char *name, pl_view v, double tolerance)
{
    const struct array a = array_of(f, c, name);
    if (a.values == NULL)
        return;
    ck_assert_uint_eq(v.rows * v.cols, a.rows * a.cols);
    float *got = pl_xmalloc((size_t)a.rows * a.cols * sizeof *got);
    ck_assert_int_eq(b->dev->ops->get_rows(b->dev, v, got), PL_OK);
    const double d = distance(got, a.values, (size_t)a.rows * a.cols);
    ck_assert_msg(d <= tolerance, "%s on %s: %s is off by %.2e", json_string_value(json_object_get(c, "name")), b->dev->ops->name, name, d);
    free(got);
}

#define OK(call) ck_assert_int_eq(call, PL_OK)

static void run_op(struct bed *b, const struct fixture *f, const json_t *c, double tol)
{
    const char *name = json_string_value(json_object_get(c, "name"));
    struct pl_device *dev = b->dev;
    const struct pl_train_ops *t = b->t;
    const pl_view x = given(b, f, c, "x"), gain = given(b, f, c, "gain"), bias = given(b, f, c, "bias"), dout = given(b, f, c, "dout");
    const struct array out_a = array_of(f, c, "out");
    pl_view out = new_view(b, out_a.rows, out_a.cols, NULL), dx = like(b, x);
    if (strcmp(name, "linear") == 0) {
        const pl_view w = given(b, f, c, "w"), bb = given(b, f, c, "b"), dw = like(b, w), db = like(b, bb);
        const struct pl_train_mat m = {.rows = w.rows, .cols = w.cols, .values = w};
        OK(t->linear(dev, out, x, &m, bb, 1, false));
        OK(t->linear_dx(dev, dx, dout, &m, 1, false));
        OK(t->linear_dw(dev, dw, db, dout, x));
        expect(b, f, c, "dw", dw, tol);
        expect(b, f, c, "db", db, tol);
    } else if (strncmp(name, "norm", 4) == 0) {
        const pl_norm_kind kind = strcmp(name, "norm_rms") == 0 ? PL_NORM_RMS : PL_NORM_LAYER;
        const pl_view dgain = like(b, gain), dbias = like(b, bias);
        OK(t->norm(dev, kind, out, x, gain, bias, (float)real_of(c, "eps")));
        OK(t->norm_d(dev, kind, dx, dgain, dbias, dout, x, gain, (float)real_of(c, "eps"), false));
        expect(b, f, c, "dgain", dgain, tol);
        expect(b, f, c, "dbias", dbias, tol);
    } else if (strncmp(name, "glu", 3) == 0 || strncmp(name, "act", 3) == 0) {
        const pl_act_kind kind = strstr(name, "silu") != NULL ? PL_ACT_SILU : PL_ACT_GELU_TANH;
        OK((name[0] == 'g' ? t->glu : t->act)(dev, kind, out, x));
        OK((name[0] == 'g' ? t->glu_d : t->act_d)(dev, kind, dx, dout, x));
    } else if (strncmp(name, "rope", 4) == 0) {
        const pl_rope_kind kind = strcmp(name, "rope_halves") == 0 ? PL_ROPE_HALVES : PL_ROPE_INTERLEAVED;
        const json_t *list = json_object_get(c, "freq");
        float values[8];
        for (size_t i = 0; i < json_array_size(list); i++)
            values[i] = (float)json_number_value(json_array_get(list, i));
        const uint32_t half = (uint32_t)json_array_size(list), D = (uint32_t)real_of(c, "head_dim");
        uint32_t *pos = ints_of(c, "pos", NULL);
        const pl_view table = new_view(b, x.rows, 2 * half, NULL), freq = new_view(b, 1, half, values);
        OK(t->rope_table(dev, table, freq, pos));
        out = x;
        dx = dout;
        OK(t->rope(dev, kind, out, D, table, false));
        OK(t->rope(dev, kind, dx, D, table, true));
        free(pos);
    } else if (strcmp(name, "attn") == 0) {
        struct pl_train_seqs s;
        uint32_t n;
        uint32_t *start = ints_of(c, "starts", &n);
        s = (struct pl_train_seqs){n - 1, start};
        const pl_view qkv = given(b, f, c, "qkv"), lse = new_view(b, qkv.rows, (uint32_t)real_of(c, "heads"), NULL), dqkv = like(b, qkv);
        const uint32_t D = (uint32_t)real_of(c, "head_dim");
        OK(t->attn(dev, out, lse, qkv, D, 1 / sqrtf((float)D), &s));
        OK(t->attn_d(dev, dqkv, dout, out, lse, qkv, D, 1 / sqrtf((float)D), &s));
        expect(b, f, c, "dqkv", dqkv, tol);
        free(start);
    } else if (strcmp(name, "embed") == 0) {
        uint32_t *idx = ints_of(c, "idx", NULL);
        const pl_view w = given(b, f, c, "w"), dw = like(b, w);
        OK(t->embed(dev, out, &(struct pl_train_mat){.rows = w.rows, .cols = w.cols, .values = w}, idx, false));
        OK(t->embed_dw(dev, dw, dout, idx));
        expect(b, f, c, "dw", dw, tol);
        free(idx);
    } else if (strcmp(name, "gather") == 0) {
        uint32_t *rows = ints_of(c, "rows", NULL);
        OK(t->gather(dev, out, x, rows));
        OK(t->gather_d(dev, dx, dout, rows));
        free(rows);
    } else if (strcmp(name, "head") == 0) {
        uint32_t *targets = ints_of(c, "targets", NULL);
        const pl_view h = given(b, f, c, "h"), w = given(b, f, c, "w"), dh = like(b, h), dw = like(b, w);
        const struct pl_train_mat m = {.rows = w.rows, .cols = w.cols, .values = w};
        float weight[8], back[8], loss = 0;
        double logp[8];
        bool best[8];
        const float sent = array_of(f, c, "dout").values[0];
        for (uint32_t i = 0; i < h.rows; i++) {
            weight[i] = (float)json_number_value(json_array_get(json_object_get(c, "weight"), i));
            back[i] = weight[i] * sent;
        }
        OK(t->head(dev, h, &m, targets, back, logp, best, dh, dw));
        for (uint32_t i = 0; i < h.rows; i++)
            loss -= weight[i] * (float)logp[i];
        OK(dev->ops->put(dev, out.buf, out.offset, &loss, 1));
        expect(b, f, c, "dh", dh, tol);
        expect(b, f, c, "dw", dw, tol);
        free(targets);
    } else {
        ck_assert_str_eq(name, "adamw");
        out = given(b, f, c, "w");
        const pl_view m = like(b, out), v = like(b, out);
        for (int i = 0; i < 3; i++) {
            const char *const g[] = {"g0", "g1", "g2"};
            const struct pl_adamw o = {.rate = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .scale = 1,
                                       .correct1 = 1 - powf(0.9f, (float)i + 1), .correct2 = 1 - powf(0.95f, (float)i + 1)};
            OK(t->adamw(dev, out, given(b, f, c, g[i]), m, v, &o));
        }
    }
    expect(b, f, c, "out", out, tol);
    expect(b, f, c, "dx", dx, tol);
}

START_TEST(operations_agree_with_pytorch)
{
    struct fixture f;
    struct bed b;
    if (!bed_open(&b, devices[_i], 2))
        return;
    emulated_reverse(_i == BACKWARDS);
    fixture_open(&f, "ops");
    for (size_t i = 0; i < json_array_size(f.cases); i++) {
        const json_t *c = json_array_get(f.cases, i);
        run_op(&b, &f, c, 1e-4);
        bed_clear(&b);
        if (!b.t->has_bf16(b.dev))
            continue;
        OK(b.t->set_precision(b.dev, PL_MM_BF16, NULL));
        run_op(&b, &f, c, 1e-2);
        OK(b.t->set_precision(b.dev, PL_MM_F32, NULL));
        bed_clear(&b);
    }
    fixture_close(&f);
    bed_close(&b);
}
END_TEST

/* A frozen weight of every type gives what its values give, in both directions. */
START_TEST(frozen_weights_count_as_their_values)
{
    static const pl_dtype types[] = {
#define X(name, number, elements, bytes) PL_##name,
        PL_DTYPE_LIST(X)
#undef X
    };
    enum { T = 9, N = 21, K = 512 };
    struct bed b;
    if (!bed_open(&b, devices[_i], 2))
        return;
    emulated_reverse(_i == BACKWARDS);
    static float raw[N * K], values[N * K], x[T * K], dy[T * N];
    static uint8_t bytes[N * K * 4];
    for (size_t i = 0; i < N * K; i++)
        raw[i] = (float)sin((double)i * 0.7);
    for (size_t i = 0; i < T * K; i++)
        x[i] = (float)cos((double)i * 0.3);
    for (size_t i = 0; i < T * N; i++)
        dy[i] = (float)cos((double)i * 1.1);
    for (size_t t = 0; t < PL_COUNT_OF(types); t++) {
        const size_t row = pl_dtype_row_bytes(types[t], K);
        for (size_t r = 0; r < N; r++) {
            pl_quant_row(types[t], raw + r * K, bytes + r * row, K);
            pl_dequant_row(types[t], bytes + r * row, values + r * K, K);
        }
        /* two parts, as of a fused product */
        const struct pl_weight_src src[] = {{.dtype = types[t], .rows = 8, .cols = K, .data = bytes},
                                            {.dtype = types[t], .rows = N - 8, .cols = K, .data = bytes + 8 * row}};
        struct pl_weight *w;
        OK(b.t->frozen_new(b.dev, src, 2, &w, NULL));
        const struct pl_train_mat frozen = {.rows = N, .cols = K, .frozen = w};
        const struct pl_train_mat plain = {.rows = N, .cols = K, .values = new_view(&b, N, K, values)};
        const pl_view vx = new_view(&b, T, K, x), vdy = new_view(&b, T, N, dy), none = pl_view_none();
        pl_view out[2] = {new_view(&b, T, N, NULL), new_view(&b, T, N, NULL)}, dx[2] = {new_view(&b, T, K, NULL), new_view(&b, T, K, NULL)};
        for (int i = 0; i < 2; i++) {
            OK(b.t->linear(b.dev, out[i], vx, i == 0 ? &frozen : &plain, none, 1, false));
            OK(b.t->linear_dx(b.dev, dx[i], vdy, i == 0 ? &frozen : &plain, 1, false));
        }
        static float o[2][T * N], d[2][T * K];
        for (int i = 0; i < 2; i++) {
            OK(b.dev->ops->get_rows(b.dev, out[i], o[i]));
            OK(b.dev->ops->get_rows(b.dev, dx[i], d[i]));
        }
        ck_assert_msg(distance(o[0], o[1], T * N) < 1e-6 && distance(d[0], d[1], T * K) < 1e-6, "%s on %s", pl_dtype_name(types[t]), b.dev->ops->name);
        b.dev->ops->weight_free(b.dev, w);
        bed_clear(&b);
    }
    bed_close(&b);
}
END_TEST

/* ---- whole models ---- */

struct subject {
    struct bed bed;
    void *bytes;
    struct pl_gguf *g;
    struct pl_net *net;
};

static void build_model(struct subject *s, const json_t *c)
{
    const json_t *flags = json_object_get(c, "flags");
    const char *list[32];
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    size_t n;
    for (size_t i = 0; i < json_array_size(flags); i++)
        list[i] = json_string_value(json_array_get(flags, i));
    ck_assert_msg(tiny_options_flags(&o, list, json_array_size(flags), &err) == PL_OK, "%s", err.msg);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_msg(out != NULL, "%s", err.msg);
    s->bytes = gguf_out_bytes(out, &n);
    gguf_out_free(out);
    ck_assert_msg(pl_gguf_open_memory(&s->g, s->bytes, n, &err) == PL_OK, "%s", err.msg);
}

static unsigned targets_of(const json_t *adapter, const char *arch)
{
    const json_t *names = json_object_get(adapter, "targets");
    const struct pl_spec spec = {.arch = arch};
    struct pl_target_place p;
    unsigned bits = 0;
    for (int t = 0; t < PL_TARGET_COUNT; t++) {
        if (!pl_target_find(&spec, (pl_target)t, &p))
            continue;
        bool in = names == NULL;
        for (size_t i = 0; i < json_array_size(names); i++)
            in |= strcmp(json_string_value(json_array_get(names, i)), p.name) == 0;
        bits |= in ? 1u << t : 0;
    }
    return bits;
}

static void subject_open(struct subject *s, const json_t *c, bool recompute)
{
    const json_t *adapter = json_object_get(c, "adapter");
    struct pl_err err = {0};
    build_model(s, c);
    struct pl_net_options o = {.full = json_is_null(adapter), .recompute = recompute, .seed = 1};
    if (!o.full) {
        struct pl_gguf_str arch;
        OK(pl_gguf_string(s->g, "general.architecture", &arch));
        o.rank = (uint32_t)json_integer_value(json_object_get(adapter, "r"));
        o.alpha = (float)real_of(adapter, "alpha");
        o.rslora = json_is_true(json_object_get(adapter, "rslora"));
        o.dropout = (float)real_of(adapter, "dropout");
        o.targets = targets_of(adapter, arch.s[0] == 'l' ? "llama" : "gpt2");
    }
    ck_assert_msg(pl_net_new(&s->net, s->g, s->bed.dev, &o, &err) == PL_OK, "%s", err.msg);
}

static void subject_close(struct subject *s)
{
    pl_net_free(s->net);
    pl_gguf_close(s->g);
    free(s->bytes);
}

/* Gives the adapter the fixture's values. */
static void set_values(struct subject *s, const struct fixture *f, const json_t *c)
{
    for (uint32_t i = 0; i < s->net->n_params; i++) {
        const struct pl_net_param *p = &s->net->params[i];
        const struct array a = array_of(f, c, p->name);
        if (a.values != NULL)
            OK(s->bed.dev->ops->put(s->bed.dev, s->net->w, p->offset, a.values, (size_t)p->rows * p->cols));
    }
}

enum { MOST = 512 };

struct batch {
    struct pl_micro m;
    uint32_t tokens[MOST], pos[MOST], start[16], rows[MOST], targets[MOST];
    float weight[MOST];
    double logp[MOST];
    bool best[MOST];
};

/* Examples [from, from + n) packed. */
static void pack(struct batch *b, const json_t *examples, size_t from, size_t n)
{
    uint32_t at = 0, rows = 0;
    for (size_t e = from; e < from + n; e++) {
        const json_t *x = json_array_get(examples, e), *ids = json_object_get(x, "ids"), *loss = json_object_get(x, "loss");
        b->start[e - from] = at;
        for (size_t i = 0; i < json_array_size(ids); i++, at++) {
            b->tokens[at] = (uint32_t)json_integer_value(json_array_get(ids, i));
            b->pos[at] = (uint32_t)i;
            if (i > 0 && json_integer_value(json_array_get(loss, i)) != 0) {
                b->rows[rows] = at - 1;
                b->targets[rows++] = b->tokens[at];
            }
        }
    }
    b->start[n] = at;
    b->m = (struct pl_micro){at, rows, b->tokens, b->pos, {(uint32_t)n, b->start}, b->rows, b->targets};
}

/* Adds the gradients of Σ loss / count, returns it. */
static double forward_backward(struct subject *s, struct batch *b, uint32_t count)
{
    struct pl_err err = {0};
    double loss = 0;
    ck_assert_msg(pl_net_reserve(s->net, b->m.n_tokens, b->m.n_rows, &err) == PL_OK, "%s", err.msg);
    for (uint32_t i = 0; i < b->m.n_rows; i++)
        b->weight[i] = 1.0f / (float)count;
    OK(pl_net_forward(s->net, &b->m));
    OK(pl_net_loss(s->net, &b->m, b->weight, b->logp, b->best));
    OK(pl_net_backward(s->net, &b->m));
    for (uint32_t i = 0; i < b->m.n_rows; i++)
        loss -= b->logp[i] / count;
    return loss;
}

static const char *case_name(const json_t *c)
{
    return json_string_value(json_object_get(c, "name"));
}

static float *gradients(const struct subject *s)
{
    float *g = pl_xmalloc(s->net->n_trained * sizeof *g);
    OK(s->bed.dev->ops->get(s->bed.dev, s->net->g, 0, g, s->net->n_trained));
    return g;
}

/* All gradients of the case as one vector: what products of low precision are measured by. */
static double gradient_distance(struct subject *s, const struct fixture *f, const json_t *c)
{
    float *g = gradients(s);
    double off = 0, size = 0;
    for (uint32_t i = 0; i < s->net->n_params; i++) {
        const struct pl_net_param *p = &s->net->params[i];
        char name[96];
        snprintf(name, sizeof name, "d %s", p->name);
        const float *expected = array_of(f, c, name).values;
        for (size_t k = 0; k < (size_t)p->rows * p->cols; k++) {
            off += pow((double)g[p->offset + k] - (double)expected[k], 2);
            size += pow((double)expected[k], 2);
        }
    }
    free(g);
    return sqrt(off / size);
}

/* Every gradient of the case. */
static void expect_gradients(struct subject *s, const struct fixture *f, const json_t *c, double tolerance)
{
    float *g = gradients(s);
    size_t n_checked = 0;
    for (uint32_t i = 0; i < s->net->n_params; i++) {
        const struct pl_net_param *p = &s->net->params[i];
        char name[96];
        snprintf(name, sizeof name, "d %s", p->name);
        const struct array a = array_of(f, c, name);
        ck_assert_msg(a.values != NULL, "%s: no gradient of %s in the fixture", case_name(c), p->name);
        const double d = distance(g + p->offset, a.values, (size_t)p->rows * p->cols);
        ck_assert_msg(d <= tolerance, "%s on %s: gradient of %s is off by %.2e", case_name(c), s->bed.dev->ops->name, p->name, d);
        n_checked++;
    }
    free(g);
    size_t n_there = 0;
    const char *key;
    json_t *value;
    json_object_foreach(json_object_get(c, "arrays"), key, value)
        n_there += key[0] == 'd' && key[1] == ' ';
    ck_assert_uint_eq(n_checked, n_there);
}

static bool backwards;

/* The cases of a kind; NULL = all. */
static void each_case(const char *isa, unsigned threads, const char *stem, const char *kind,
                      void (*check)(struct subject *, const struct fixture *, const json_t *))
{
    struct fixture f;
    struct subject s;
    size_t n = 0;
    if (!bed_open(&s.bed, isa, threads))
        return;
    emulated_reverse(backwards);
    fixture_open(&f, stem);
    for (size_t i = 0; i < json_array_size(f.cases); i++) {
        const json_t *c = json_array_get(f.cases, i), *is = json_object_get(c, "kind");
        if (kind == NULL || strcmp(json_string_value(is), kind) == 0) {
            check(&s, &f, c);
            n++;
        }
    }
    ck_assert_uint_gt(n, 0);
    fixture_close(&f);
    bed_close(&s.bed);
}

static void each_model(const char *isa, unsigned threads, void (*check)(struct subject *, const struct fixture *, const json_t *))
{
    each_case(isa, threads, "models", NULL, check);
}

static void check_model(struct subject *s, const struct fixture *f, const json_t *c)
{
    struct batch *b = pl_xcalloc(1, sizeof *b);
    const json_t *examples = json_object_get(c, "examples");
    pack(b, examples, 0, json_array_size(examples));
    for (int way = 0; way < 3; way++) { /* f32; with recomputation; bf16 */
        if (way == 2 && !s->bed.t->has_bf16(s->bed.dev))
            continue;
        subject_open(s, c, way == 1);
        set_values(s, f, c);
        OK(s->bed.t->set_precision(s->bed.dev, way == 2 ? PL_MM_BF16 : PL_MM_F32, NULL));
        const double loss = forward_backward(s, b, b->m.n_rows), expected = real_of(c, "loss");
        ck_assert_msg(fabs(loss - expected) <= (way == 2 ? 1e-2 : 1e-5) * expected, "%s: loss %.8f, PyTorch's is %.8f", case_name(c), loss, expected);
        if (way < 2)
            expect_gradients(s, f, c, 1e-4);
        else
            ck_assert_double_le(gradient_distance(s, f, c), 2e-2);
        OK(s->bed.t->set_precision(s->bed.dev, PL_MM_F32, NULL));
        subject_close(s);
    }
    free(b);
}

START_TEST(whole_models_agree_with_pytorch)
{
    backwards = _i == BACKWARDS;
    each_model(devices[_i], 2, check_model);
}
END_TEST

/* Several micro-batches give the gradients of one. */
static void check_accumulation(struct subject *s, const struct fixture *f, const json_t *c)
{
    struct batch *b = pl_xcalloc(1, sizeof *b);
    const json_t *examples = json_object_get(c, "examples");
    const size_t n = json_array_size(examples);
    pack(b, examples, 0, n);
    const uint32_t count = b->m.n_rows;
    double loss = 0;
    subject_open(s, c, false);
    set_values(s, f, c);
    for (size_t i = 0; i < n; i++) {
        pack(b, examples, i, 1);
        loss += forward_backward(s, b, count);
    }
    ck_assert_double_eq_tol(loss, real_of(c, "loss"), 1e-5 * real_of(c, "loss"));
    expect_gradients(s, f, c, 1e-4);
    subject_close(s);
    free(b);
}

START_TEST(micro_batches_add_up_to_the_batch)
{
    each_model(NULL, 2, check_accumulation);
}
END_TEST

static struct pl_train_spec plan_of(const json_t *plan)
{
    return (struct pl_train_spec){.schedule = PL_SCHEDULE_COSINE, .learning_rate = real_of(plan, "learning_rate"),
                                  .warmup_steps = (uint32_t)real_of(plan, "warmup_steps"), .min_ratio = real_of(plan, "min_ratio"),
                                  .weight_decay = real_of(plan, "weight_decay"), .beta1 = real_of(plan, "beta1"),
                                  .beta2 = real_of(plan, "beta2"), .epsilon = real_of(plan, "epsilon"),
                                  .max_grad_norm = real_of(plan, "max_grad_norm")};
}

static void check_steps(struct subject *s, const struct fixture *f, const json_t *c)
{
    struct batch *b = pl_xcalloc(1, sizeof *b);
    const json_t *examples = json_object_get(c, "examples"), *losses = json_object_get(c, "step_losses");
    const struct pl_train_spec plan = plan_of(json_object_get(c, "plan"));
    const uint32_t n = (uint32_t)json_array_size(losses);
    double worst = 0;
    subject_open(s, c, false);
    set_values(s, f, c);
    for (uint32_t step = 0; step < n; step++) {
        double norm;
        pack(b, examples, step * 2 % json_array_size(examples), 2);
        const double loss = forward_backward(s, b, b->m.n_rows), expected = json_number_value(json_array_get(losses, step));
        const double off = fabs(loss - expected) / expected;
        worst = off > worst ? off : worst;
        ck_assert_msg(off <= 1e-3, "%s, step %u: loss %.6f, PyTorch's is %.6f", case_name(c), step, loss, expected);
        OK(pl_optim_step(s->net, &plan, step, pl_optim_rate(&plan, step, n), &norm));
    }
    printf("train: %s: losses of %u steps agree within %.1e\n", case_name(c), n, worst);
    subject_close(s);
    free(b);
}

START_TEST(twenty_steps_agree_with_pytorch)
{
    each_model(fast[_i], 2, check_steps);
}
END_TEST

static struct pl_dataset *pairs_of(const json_t *examples)
{
    struct pl_dataset *d = pl_xcalloc(1, sizeof *d);
    d->n = (uint32_t)json_array_size(examples);
    d->pairs = true;
    d->examples = pl_xcalloc(d->n, sizeof *d->examples);
    for (uint32_t i = 0; i < d->n; i++) {
        const json_t *x = json_array_get(examples, i), *ids = json_object_get(x, "ids"), *loss = json_object_get(x, "loss");
        struct pl_example *e = &d->examples[i];
        e->n = (uint32_t)json_array_size(ids);
        e->ids = malloc(e->n * sizeof *e->ids + e->n);
        e->loss = (uint8_t *)(e->ids + e->n);
        for (uint32_t k = 0; k < e->n; k++) {
            e->ids[k] = (int32_t)json_integer_value(json_array_get(ids, k));
            e->loss[k] = (uint8_t)json_integer_value(json_array_get(loss, k));
        }
    }
    return d;
}

static void check_dpo(struct subject *s, const struct fixture *f, const json_t *c)
{
    const json_t *losses = json_object_get(c, "losses"), *wanted = json_object_get(c, "reference");
    const struct pl_train_spec plan = plan_of(json_object_get(c, "plan"));
    const uint32_t n = (uint32_t)json_array_size(losses);
    struct pl_dataset *d = pairs_of(json_object_get(c, "examples"));
    struct pl_batch_plan b;
    struct pl_objective step;
    struct pl_objective_result r;
    double reference[16], norm, worst = 0;
    subject_open(s, c, false);
    set_values(s, f, c);
    OK(pl_batch_init(&b, d, 1, 24, true, 0, NULL)); /* several micro-batches */
    OK(pl_objective_init(&step, s->net, real_of(c, "beta"), b.capacity, NULL));
    OK(pl_objective_reference(&step, &b, reference));
    for (uint32_t i = 0; i < d->n; i++)
        ck_assert_double_eq_tol(reference[i], json_number_value(json_array_get(wanted, i)), 1e-4 * fabs(reference[i]));
    for (uint32_t i = 0; i < n; i++) {
        OK(pl_batch_take(&b, UINT32_MAX, 0, b.n_units));
        ck_assert_uint_gt(b.n_micro, 1);
        OK(pl_objective_run(&step, &b, reference, true, 0, &r));
        const double expected = json_number_value(json_array_get(losses, i)), off = fabs(r.loss - expected) / expected;
        worst = off > worst ? off : worst;
        ck_assert_msg(off <= 1e-3, "%s, step %u: loss %.6f, PyTorch's is %.6f", case_name(c), i, r.loss, expected);
        OK(pl_optim_step(s->net, &plan, i, pl_optim_rate(&plan, i, n), &norm));
    }
    printf("train: %s: losses of %u steps agree within %.1e\n", case_name(c), n, worst);
    pl_objective_fini(&step);
    pl_batch_fini(&b);
    pl_dataset_free(d);
    subject_close(s);
}

START_TEST(dpo_agrees_with_pytorch)
{
    each_case(fast[_i], 2, "more", "dpo", check_dpo);
}
END_TEST

static void check_dropout(struct subject *s, const struct fixture *f, const json_t *c)
{
    struct batch *b = pl_xcalloc(1, sizeof *b);
    const json_t *examples = json_object_get(c, "examples");
    pack(b, examples, 0, json_array_size(examples));
    for (int recompute = 0; recompute < 2; recompute++) {
        subject_open(s, c, recompute != 0);
        set_values(s, f, c);
        const double without = forward_backward(s, b, b->m.n_rows);
        subject_close(s);
        subject_open(s, c, recompute != 0);
        set_values(s, f, c);
        s->net->dropout_key = (uint64_t)json_integer_value(json_object_get(c, "key"));
        const double loss = forward_backward(s, b, b->m.n_rows), expected = real_of(c, "loss");
        ck_assert_msg(fabs(loss - expected) <= 1e-5 * expected, "%s: loss %.8f, PyTorch's is %.8f", case_name(c), loss, expected);
        ck_assert(fabs(without - loss) > 1e-3);
        expect_gradients(s, f, c, 1e-4);
        subject_close(s);
    }
    free(b);
}

START_TEST(dropout_agrees_with_pytorch)
{
    backwards = _i == BACKWARDS;
    each_case(devices[_i], 2, "more", "dropout", check_dropout);
}
END_TEST

/* While it rises, the rate is (step + 1) / (warmup + 1) of the highest (transformers begins with 0); then it is theirs. */
START_TEST(rates_are_those_of_transformers)
{
    struct fixture f;
    static const char *const kinds[] = {"constant", "linear", "cosine", "wsd"};
    size_t n = 0;
    fixture_open(&f, "more");
    for (size_t i = 0; i < json_array_size(f.cases); i++) {
        const json_t *c = json_array_get(f.cases, i);
        const struct array rates = array_of(&f, c, "rates");
        if (rates.values == NULL)
            continue;
        struct pl_train_spec s = {.learning_rate = real_of(c, "learning_rate"), .warmup_steps = (uint32_t)real_of(c, "warmup_steps"),
                                  .min_ratio = real_of(c, "min_ratio"), .decay_ratio = real_of(c, "decay_ratio"), .schedule = -1};
        for (int k = 0; k < (int)PL_COUNT_OF(kinds); k++)
            s.schedule = strcmp(case_name(c), kinds[k]) == 0 ? k : s.schedule;
        ck_assert_int_ge(s.schedule, 0);
        for (uint32_t step = 0; step < rates.cols; step++) {
            const double got = pl_optim_rate(&s, step, rates.cols);
            const double wanted = step < s.warmup_steps ? s.learning_rate * (step + 1) / (s.warmup_steps + 1) : (double)rates.values[step];
            ck_assert_msg(fabs(got - wanted) <= 1e-6 * wanted, "%s, step %u: %.9g, not %.9g", case_name(c), step, got, wanted);
        }
        n++;
    }
    ck_assert_uint_eq(n, PL_COUNT_OF(kinds));
    fixture_close(&f);
}
END_TEST

/* The gradients' bits with another number of threads. */
static void check_threads(struct subject *s, const struct fixture *f, const json_t *c)
{
    struct batch *b = pl_xcalloc(1, sizeof *b);
    const json_t *examples = json_object_get(c, "examples");
    struct subject other;
    ck_assert(bed_open(&other.bed, NULL, 3));
    pack(b, examples, 0, json_array_size(examples));
    subject_open(s, c, false);
    subject_open(&other, c, false);
    set_values(s, f, c);
    set_values(&other, f, c);
    const double loss = forward_backward(s, b, b->m.n_rows);
    ck_assert(loss == forward_backward(&other, b, b->m.n_rows));
    ck_assert_mem_eq(s->bed.dev->ops->host(s->bed.dev, s->net->g), other.bed.dev->ops->host(other.bed.dev, other.net->g),
                     s->net->n_trained * sizeof(float));
    subject_close(s);
    subject_close(&other);
    bed_close(&other.bed);
    free(b);
}

START_TEST(threads_give_the_same_bits)
{
    each_model(NULL, 1, check_threads);
}
END_TEST

Suite *suite_train(void)
{
    Suite *s = suite_create("train");
    TCase *tc = tcase_create("numerics");
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, operations_agree_with_pytorch, 0, PL_COUNT_OF(devices));
    tcase_add_loop_test(tc, frozen_weights_count_as_their_values, 0, PL_COUNT_OF(devices));
    tcase_add_loop_test(tc, whole_models_agree_with_pytorch, 0, PL_COUNT_OF(devices));
    tcase_add_test(tc, micro_batches_add_up_to_the_batch);
    tcase_add_loop_test(tc, twenty_steps_agree_with_pytorch, 0, PL_COUNT_OF(fast));
    tcase_add_loop_test(tc, dpo_agrees_with_pytorch, 0, PL_COUNT_OF(fast));
    tcase_add_loop_test(tc, dropout_agrees_with_pytorch, 0, PL_COUNT_OF(devices));
    tcase_add_test(tc, rates_are_those_of_transformers);
    tcase_add_test(tc, threads_give_the_same_bits);
    suite_add_tcase(s, tc);
    return s;
}
