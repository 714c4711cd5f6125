/* check_model: the loader and the forward pass. Logits against what transformers computed (tests/oracle/make_logits.py),
 * the same bits in whatever batches a sequence arrives, and faulty files refused by name. Runs in the repository's root.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/model/dummy.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"

Suite *suite_model(void);

#define FIXTURES "tests/oracle/fixtures/logits/"

static const char *const isas[] = {"ref", "avx2", "avxvnni", "avx512"};

/* ---- models in memory ---- */

struct loaded {
    void *bytes;
    struct pl_gguf *g;
    struct runner r;
};

static struct gguf_out *build(const char *const *flags, size_t n)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    ck_assert_msg(tiny_options_flags(&o, flags, n, &err) == PL_OK, "%s", err.msg);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_msg(out != NULL, "%s", err.msg);
    return out;
}

/* Opens what has been built and frees it. */
static pl_status load(struct loaded *m, struct gguf_out *out, const char *isa, unsigned n_threads, struct pl_err *err)
{
    size_t n;
    *m = (struct loaded){.bytes = gguf_out_bytes(out, &n)};
    gguf_out_free(out);
    const pl_status rc = pl_gguf_open_memory(&m->g, m->bytes, n, err);
    return rc != PL_OK ? rc : runner_open(&m->r, m->g, isa, n_threads, 64, err);
}

static void unload(struct loaded *m)
{
    runner_close(&m->r);
    pl_gguf_close(m->g);
    free(m->bytes);
}

/* false when this processor cannot run the instruction set. */
static bool isa_here(const char *isa)
{
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_err err;
    ck_assert_int_eq(pl_pool_new(&pool, 1, &err), PL_OK);
    const pl_status rc = pl_cpu_open(&dev, pool, isa, &err);
    if (rc == PL_OK)
        dev->ops->close(dev);
    pl_pool_free(pool);
    ck_assert(rc == PL_OK || rc == PL_ENOTSUP);
    if (rc != PL_OK)
        printf("model: %s skipped: %s\n", isa, err.msg);
    return rc == PL_OK;
}

static void log_softmax(const float *logits, double *out, size_t n)
{
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        max = fmax(max, (double)logits[i]);
    for (size_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - max);
    for (size_t i = 0; i < n; i++)
        out[i] = (double)logits[i] - max - log(sum);
}

/* ---- fixtures ---- */

static json_t *read_json(const char *path)
{
    json_error_t e;
    json_t *root = json_load_file(path, 0, &e);
    ck_assert_msg(root != NULL, "%s: %s (run in the repository's root)", path, e.text);
    return root;
}

static void *read_bytes(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s (run in the repository's root)", path);
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    void *bytes = pl_xmalloc(*n);
    ck_assert_uint_eq(fread(bytes, 1, *n, f), *n);
    fclose(f);
    return bytes;
}

static size_t ints(const json_t *list, int32_t *out, size_t max)
{
    const size_t n = json_array_size(list);
    ck_assert_uint_gt(n, 0);
    ck_assert_uint_le(n, max);
    for (size_t i = 0; i < n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(list, i));
    return n;
}

enum { MAX_TOKENS = 512, MAX_FLAGS = 16 };

/* Compares one tiny model on one instruction set with its reference logits. Float weights agree to rounding; where
 * weights are quantized the device also quantizes activations to 8 bits, and the distribution is what must agree. */
static void compare_tiny(const json_t *c, const float *blob, size_t blob_floats, const char *isa)
{
    const char *flags[MAX_FLAGS];
    const size_t n_flags = json_array_size(json_object_get(c, "flags"));
    ck_assert_uint_le(n_flags, MAX_FLAGS);
    for (size_t i = 0; i < n_flags; i++)
        flags[i] = json_string_value(json_array_get(json_object_get(c, "flags"), i));
    const char *name = json_string_value(json_object_get(c, "name"));
    const size_t V = (size_t)json_integer_value(json_object_get(c, "n_vocab"));
    const size_t offset = (size_t)json_integer_value(json_object_get(c, "offset"));
    int32_t tokens[MAX_TOKENS], positions[MAX_TOKENS];
    const size_t n = ints(json_object_get(c, "tokens"), tokens, MAX_TOKENS);
    const size_t n_pos = ints(json_object_get(c, "positions"), positions, MAX_TOKENS);
    ck_assert_uint_le(offset + n_pos * V, blob_floats);

    struct loaded m;
    struct pl_err err = {0};
    ck_assert_msg(load(&m, build(flags, n_flags), isa, 2, &err) == PL_OK, "%s: %s", name, err.msg);
    ck_assert_uint_eq(pl_model_spec(m.r.model)->n_vocab, V);
    struct run_seq s = {.tokens = tokens, .n = (uint32_t)n, .chunk = 64, .logits = pl_xcalloc(n * V, sizeof(float))};
    ck_assert_int_eq(run_seqs(&m.r, &s, 1, PL_F32), PL_OK);
    double worst = 0, divergence = 0;
    double *p = pl_xcalloc(V, sizeof *p), *q = pl_xcalloc(V, sizeof *q);
    for (size_t i = 0; i < n_pos; i++) {
        const float *ref = blob + offset + i * V, *ours = s.logits + (size_t)positions[i] * V;
        log_softmax(ref, p, V);
        log_softmax(ours, q, V);
        for (size_t t = 0; t < V; t++) {
            worst = fmax(worst, fabs((double)ref[t] - (double)ours[t]));
            divergence += exp(p[t]) * (p[t] - q[t]) / (double)n_pos;
        }
    }
    if (json_is_true(json_object_get(c, "quantized")))
        ck_assert_msg(divergence <= 2e-3, "%s on %s: mean KL %g", name, isa, divergence);
    else
        ck_assert_msg(worst <= 1e-4, "%s on %s: largest difference %g", name, isa, worst);
    free(p);
    free(q);
    free(s.logits);
    unload(&m);
}

START_TEST(tiny_logits_agree_with_transformers)
{
    const char *isa = isas[_i];
    if (!isa_here(isa))
        return;
    size_t n;
    float *blob = read_bytes(FIXTURES "tiny.bin", &n);
    json_t *doc = read_json(FIXTURES "tiny.json"), *cases = json_object_get(doc, "cases");
    ck_assert_uint_ge(json_array_size(cases), 15);
    for (size_t i = 0; i < json_array_size(cases); i++)
        compare_tiny(json_array_get(cases, i), blob, n / sizeof *blob, isa);
    json_decref(doc);
    free(blob);
}
END_TEST

/* ---- a sequence's bits do not depend on company, chunks or threads ---- */

static const char *const shapes[][8] = {
    {"--seed", "11"},
    {"--arch", "gpt2", "--seed", "12"},
    {"--type", "q4_1", "--biases"},
    {"--type", "q8_0", "--untied"},
    {"--type", "q4_k", "--layers", "1"},
    {"--type", "f16", "--head-dim", "32", "--rope-factors"},
};

static size_t flag_count(const char *const *flags)
{
    size_t n = 0;
    while (n < PL_COUNT_OF(shapes[0]) && flags[n] != NULL)
        n++;
    return n;
}

static void same_bits(const char *const *flags, const char *isa)
{
    enum { N = 3, LEN = 45 };
    struct loaded m;
    struct pl_err err = {0};
    ck_assert_msg(load(&m, build(flags, flag_count(flags)), isa, 2, &err) == PL_OK, "%s", err.msg);
    const size_t V = pl_model_spec(m.r.model)->n_vocab;
    int32_t tokens[N][LEN];
    float *alone[N];
    for (uint32_t s = 0; s < N; s++) {
        alone[s] = pl_xcalloc(LEN * V, sizeof(float));
        for (uint32_t i = 0; i < LEN; i++)
            tokens[s][i] = (int32_t)((s * 131 + i * 37 + i * i) % V);
        struct run_seq seq = {.tokens = tokens[s], .n = LEN - s, .chunk = 64, .logits = alone[s]};
        ck_assert_int_eq(run_seqs(&m.r, &seq, 1, PL_F16), PL_OK);
    }
    static const uint32_t chunks[][N] = {{1, 0, 0}, {3, 0, 0}, {7, 0, 0}, {1, 1, 1}, {20, 20, 20}, {1, 17, 7}, {33, 1, 2}};
    for (size_t c = 0; c < PL_COUNT_OF(chunks); c++) {
        struct run_seq seqs[N];
        uint32_t n = 0;
        for (; n < N && chunks[c][n] != 0; n++) {
            seqs[n] = (struct run_seq){.tokens = tokens[n], .n = LEN - n, .chunk = chunks[c][n],
                                       .logits = pl_xcalloc(LEN * V, sizeof(float))};
        }
        ck_assert_int_eq(run_seqs(&m.r, seqs, n, PL_F16), PL_OK);
        for (uint32_t s = 0; s < n; s++) {
            ck_assert_msg(memcmp(seqs[s].logits, alone[s], (LEN - s) * V * sizeof(float)) == 0,
                          "%s %s on %s: sequence %u of %u in chunks of %u differs from alone", flags[0], flags[1], isa, s, n,
                          seqs[s].chunk);
            free(seqs[s].logits);
        }
    }
    for (uint32_t s = 0; s < N; s++)
        free(alone[s]);
    unload(&m);
}

START_TEST(chunked_and_batched_give_the_same_bits)
{
    const char *isa = isas[_i];
    if (!isa_here(isa))
        return;
    for (size_t i = 0; i < PL_COUNT_OF(shapes); i++)
        same_bits(shapes[i], isa);
}
END_TEST

START_TEST(threads_give_the_same_bits)
{
    struct loaded m;
    struct pl_err err = {0};
    int32_t tokens[40];
    float *first = NULL;
    size_t n = 0;
    for (int i = 0; i < 40; i++)
        tokens[i] = i * 7;
    for (unsigned threads = 1; threads <= 5; threads += 2) {
        ck_assert_msg(load(&m, build(shapes[2], 3), NULL, threads, &err) == PL_OK, "%s", err.msg);
        n = 40 * (size_t)pl_model_spec(m.r.model)->n_vocab;
        struct run_seq s = {.tokens = tokens, .n = 40, .chunk = 64, .logits = pl_xcalloc(n, sizeof(float))};
        ck_assert_int_eq(run_seqs(&m.r, &s, 1, PL_F16), PL_OK);
        if (first == NULL) {
            first = s.logits;
        } else {
            ck_assert_mem_eq(first, s.logits, n * sizeof(float));
            free(s.logits);
        }
        unload(&m);
    }
    free(first);
}
END_TEST

START_TEST(only_wanted_rows_come_back)
{
    struct loaded m;
    struct pl_err err = {0};
    const int32_t tokens[20] = {1, 5, 9, 100, 40, 3, 2, 8};
    ck_assert_msg(load(&m, build(NULL, 0), NULL, 1, &err) == PL_OK, "%s", err.msg);
    const size_t V = pl_model_spec(m.r.model)->n_vocab;
    float *all = pl_xcalloc(20 * V, sizeof *all), *tail = pl_xcalloc(2 * V, sizeof *tail);
    struct run_seq a = {.tokens = tokens, .n = 20, .chunk = 64, .logits = all};
    struct run_seq b = {.tokens = tokens, .n = 20, .chunk = 4, .from = 18, .logits = tail}; /* most steps want no row */
    ck_assert_int_eq(run_seqs(&m.r, &a, 1, PL_F16), PL_OK);
    ck_assert_int_eq(run_seqs(&m.r, &b, 1, PL_F16), PL_OK);
    ck_assert_mem_eq(all + 18 * V, tail, 2 * V * sizeof *tail);
    struct pl_batch too_many = {.n_tokens = 65};
    const float *logits;
    ck_assert_int_eq(pl_model_forward(m.r.model, NULL, &too_many, &logits), PL_EINVAL);
    ck_assert_ptr_null(logits);
    free(all);
    free(tail);
    unload(&m);
}
END_TEST

/* What a step works in was reserved for the largest, and one of fewer tokens may want more of it: products are cut so that pieces fill what there is. */
START_TEST(steps_take_no_memory)
{
    static const char *const flags[] = {"--type", "f16", "--layers", "2", "--embd", "32", "--heads", "2", "--kv-heads", "1", "--ff", "14400", "--ctx", "600"};
    enum { MOST = 600, SOME = 585 };
    static int32_t tokens[SOME];
    size_t before, after, total, n;
    struct pl_err err = {0};
    struct loaded m = {0};
    struct gguf_out *out = build(flags, PL_COUNT_OF(flags));
    m.bytes = gguf_out_bytes(out, &n);
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&m.g, m.bytes, n, &err), PL_OK);
    const pl_status rc = runner_open(&m.r, m.g, "cuda-emulated", 1, MOST, &err);
    ck_assert_msg(rc == PL_OK || rc == PL_ENOTSUP, "%s", err.msg);
    if (rc == PL_OK) {
        struct run_seq s = {.tokens = tokens, .n = SOME, .chunk = SOME, .from = SOME};
        ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &before, &total), PL_OK);
        ck_assert_int_eq(run_seqs(&m.r, &s, 1, PL_F16), PL_OK);
        ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &after, &total), PL_OK);
        ck_assert_uint_eq(before, after);
    }
    unload(&m);
}
END_TEST

START_TEST(spec_tells_what_the_file_says)
{
    struct loaded m;
    struct pl_err err = {0};
    const char *const flags[] = {"--layers", "3", "--head-dim", "32", "--rope-linear", "4", "--rope-base", "20000"};
    ck_assert_msg(load(&m, build(flags, PL_COUNT_OF(flags)), NULL, 1, &err) == PL_OK, "%s", err.msg);
    const struct pl_spec *s = pl_model_spec(m.r.model);
    ck_assert_str_eq(s->arch, "llama");
    ck_assert_str_eq(s->name, "tiny random model");
    ck_assert_uint_eq(s->n_layers, 3);
    ck_assert_uint_eq(s->n_embd, 64);
    ck_assert_uint_eq(s->n_heads, 4);
    ck_assert_uint_eq(s->n_kv_heads, 2);
    ck_assert_uint_eq(s->head_dim, 32);
    ck_assert_uint_eq(s->rope_dims, 32);
    ck_assert_float_eq(s->rope_factor, 4.0f);
    ck_assert_float_eq(s->rope_base, 20000.0f);
    ck_assert(s->tied && s->gated);
    const uint64_t per_layer = 64 * 2 + 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 160;
    ck_assert_uint_eq(pl_model_n_params(m.r.model), 3 * per_layer + (uint64_t)s->n_vocab * 64 + 64);
    const struct pl_kv_shape shape = pl_model_kv_shape(m.r.model, 32, 9, PL_BF16);
    ck_assert(shape.n_layers == 3 && shape.n_kv_heads == 2 && shape.head_dim == 32);
    ck_assert(shape.page_size == 32 && shape.n_pages == 9 && shape.dtype == PL_BF16);
    unload(&m);
}
END_TEST

/* ---- faulty files ---- */

static const struct fault {
    const char *arch;
    enum { NO_KEY, U32, F32, BOOL, STR, NO_TENSOR, RENAME, ADD_VECTOR, ADD_MATRIX, SHAPE } edit;
    const char *name;
    double v;       /* value, or ne0 of a shape */
    const char *to; /* string value or new name */
    pl_status status;
    const char *said; /* beside the name, in the message */
} faults[] = {
    {"llama", NO_KEY, "general.architecture", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", STR, "general.architecture", 0, "mamba", PL_ENOTSUP, "\"mamba\" is not supported"},
    {"llama", STR, "general.architecture", 0, "llama4", PL_ENOTSUP, "\"llama4\" is not supported"},
    {"llama", STR, "general.architecture", 0, "", PL_ENOTSUP, "\"\" is not supported"},
    {"llama", U32, "general.architecture", 7, NULL, PL_EFORMAT, "not a string"},
    {"llama", NO_KEY, "llama.block_count", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", U32, "llama.block_count", 0, NULL, PL_EFORMAT, "between 1 and 1024"},
    {"llama", U32, "llama.block_count", 1025, NULL, PL_EFORMAT, "between 1 and 1024"},
    {"llama", U32, "llama.block_count", 4294967295.0, NULL, PL_EFORMAT, "between 1 and 1024"},
    {"llama", U32, "llama.block_count", 3, NULL, PL_EFORMAT, "tensor blk.2.attn_norm.weight is missing"},
    {"llama", U32, "llama.block_count", 1, NULL, PL_OK, ""},
    {"llama", STR, "llama.block_count", 0, "2", PL_EFORMAT, "whole number"},
    {"llama", NO_KEY, "llama.context_length", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", U32, "llama.context_length", 0, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.context_length", 2147483648.0, NULL, PL_EFORMAT, "between"},
    {"llama", NO_KEY, "llama.embedding_length", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", U32, "llama.embedding_length", 63, NULL, PL_EFORMAT, "no multiple of"},
    {"llama", U32, "llama.embedding_length", 128, NULL, PL_EFORMAT, "tensor token_embd.weight has the shape"},
    {"llama", NO_KEY, "llama.feed_forward_length", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", U32, "llama.feed_forward_length", 96, NULL, PL_EFORMAT, "ffn_gate.weight has the shape"},
    {"llama", NO_KEY, "llama.attention.head_count", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", U32, "llama.attention.head_count", 0, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.attention.head_count", 3, NULL, PL_EFORMAT, "no multiple of head_count_kv"},
    {"llama", U32, "llama.attention.head_count_kv", 0, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.attention.head_count_kv", 3, NULL, PL_EFORMAT, "no multiple of head_count_kv"},
    {"llama", U32, "llama.attention.key_length", 0, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.attention.key_length", 8192, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.attention.value_length", 8, NULL, PL_ENOTSUP, "differs from the key length"},
    {"llama", NO_KEY, "llama.attention.layer_norm_rms_epsilon", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", F32, "llama.attention.layer_norm_rms_epsilon", NAN, NULL, PL_EFORMAT, "between"},
    {"llama", F32, "llama.attention.layer_norm_rms_epsilon", -1e-5, NULL, PL_EFORMAT, "between"},
    {"llama", F32, "llama.attention.layer_norm_rms_epsilon", 0, NULL, PL_EFORMAT, "between"},
    {"llama", F32, "llama.attention.layer_norm_rms_epsilon", INFINITY, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.rope.dimension_count", 0, NULL, PL_EFORMAT, "between"},
    {"llama", U32, "llama.rope.dimension_count", 7, NULL, PL_EFORMAT, "must be even"},
    {"llama", U32, "llama.rope.dimension_count", 32, NULL, PL_EFORMAT, "at most the head's 16"},
    {"llama", F32, "llama.rope.freq_base", 0, NULL, PL_EFORMAT, "between"},
    {"llama", F32, "llama.rope.freq_base", NAN, NULL, PL_EFORMAT, "between"},
    {"llama", F32, "llama.rope.scaling.factor", 0, NULL, PL_EFORMAT, "between"},
    {"llama", STR, "llama.rope.scaling.type", 0, "yarn", PL_ENOTSUP, "\"yarn\" is not supported"},
    {"llama", STR, "llama.rope.scaling.type", 0, "longrope", PL_ENOTSUP, "\"longrope\" is not supported"},
    {"llama", STR, "llama.rope.scaling.type", 0, "none", PL_OK, ""},
    {"llama", F32, "llama.rope.scaling.attn_factor", 0.5, NULL, PL_ENOTSUP, "not supported"},
    {"llama", U32, "llama.expert_count", 8, NULL, PL_ENOTSUP, "not supported"},
    {"llama", U32, "llama.expert_count", 0, NULL, PL_OK, ""},
    {"llama", U32, "llama.attention.sliding_window", 256, NULL, PL_ENOTSUP, "sliding-window"},
    {"llama", U32, "llama.attention.sliding_window", 512, NULL, PL_OK, ""},
    {"llama", F32, "llama.logit_scale", 0.25, NULL, PL_ENOTSUP, "not supported"},
    {"llama", BOOL, "llama.attention.causal", 0, NULL, PL_ENOTSUP, "not supported"},
    {"llama", STR, "llama.attention.causal", 0, "no", PL_EFORMAT, "not a number"},
    {"llama", U32, "split.count", 3, NULL, PL_ENOTSUP, "one of 3 parts"},
    {"llama", U32, "llama.vocab_size", 300, NULL, PL_EFORMAT, "does not agree"},
    {"llama", NO_KEY, "llama.vocab_size", 0, NULL, PL_OK, ""},
    {"llama", NO_KEY, "tokenizer.ggml.tokens", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", NO_TENSOR, "token_embd.weight", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", NO_TENSOR, "output_norm.weight", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", NO_TENSOR, "blk.1.attn_k.weight", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", NO_TENSOR, "blk.0.ffn_gate.weight", 0, NULL, PL_EFORMAT, "missing"},
    {"llama", RENAME, "blk.0.ffn_down.weight", 0, "blk.00.ffn_down.weight", PL_EFORMAT, "missing"},
    {"llama", SHAPE, "token_embd.weight", 32, NULL, PL_EFORMAT, "tokens"},
    {"llama", SHAPE, "blk.0.attn_q.weight", 32, NULL, PL_EFORMAT, "has the shape [32, 128, 1, 1]"},
    {"llama", SHAPE, "blk.1.ffn_down.weight", 64, NULL, PL_EFORMAT, "has the shape [64, 160, 1, 1]"},
    {"llama", SHAPE, "blk.0.attn_norm.weight", 32, NULL, PL_EFORMAT, "has the shape [32, 2, 1, 1]"},
    {"llama", ADD_VECTOR, "blk.0.attn_q_norm.weight", 16, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_MATRIX, "blk.1.ffn_gate_inp.weight", 64, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_VECTOR, "blk.0.attn_norm.bias", 64, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_VECTOR, "output.bias", 324, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_MATRIX, "position_embd.weight", 64, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_VECTOR, "rope_factors_long.weight", 8, NULL, PL_ENOTSUP, "not part of the llama architecture"},
    {"llama", ADD_VECTOR, "rope_freqs.weight", 16, NULL, PL_EFORMAT, "has the shape"},
    {"llama", ADD_VECTOR, "rope_freqs.weight", 8, NULL, PL_EFORMAT, "must be above 0"}, /* zeros */
    {"llama", ADD_VECTOR, "blk.0.attn_rot_embd.weight", 8, NULL, PL_OK, ""},
    {"llama", ADD_VECTOR, "blk.7.nextn.weight", 8, NULL, PL_OK, ""},
    {"llama", ADD_VECTOR, "cls.output.bias", 8, NULL, PL_OK, ""},
    {"llama", ADD_VECTOR, "blk.0.attn_k.bias", 32, NULL, PL_OK, ""}, /* one of three: the others count as zeros */
    {"llama", ADD_VECTOR, "blk.0.attn_k.bias", 64, NULL, PL_EFORMAT, "has the shape"},
    {"llama", ADD_MATRIX, "output.weight", 64, NULL, PL_EFORMAT, "has the shape"},
    {"gpt2", NO_KEY, "gpt2.attention.layer_norm_epsilon", 0, NULL, PL_EFORMAT, "missing"},
    {"gpt2", U32, "gpt2.context_length", 1024, NULL, PL_EFORMAT, "position_embd.weight has the shape"},
    {"gpt2", NO_TENSOR, "position_embd.weight", 0, NULL, PL_EFORMAT, "missing"},
    {"gpt2", NO_TENSOR, "blk.1.attn_qkv.bias", 0, NULL, PL_EFORMAT, "missing"},
    {"gpt2", NO_TENSOR, "output_norm.bias", 0, NULL, PL_EFORMAT, "missing"},
    {"gpt2", ADD_MATRIX, "blk.0.ffn_gate.weight", 64, NULL, PL_ENOTSUP, "not part of the gpt2 architecture"},
    {"gpt2", ADD_VECTOR, "rope_freqs.weight", 8, NULL, PL_ENOTSUP, "not part of the gpt2 architecture"},
};

/* Applies the fault; it must have something to bite on. */
static void spoil(struct gguf_out *out, const struct fault *f)
{
    static const float zeros[2 * 512];
    switch (f->edit) {
    case NO_KEY:
        ck_assert(gguf_out_remove_key(out, f->name));
        return;
    case U32:
        gguf_out_u32(out, f->name, (uint32_t)f->v);
        return;
    case F32:
        gguf_out_f32(out, f->name, (float)f->v);
        return;
    case BOOL:
        gguf_out_bool(out, f->name, f->v != 0);
        return;
    case STR:
        gguf_out_str(out, f->name, f->to);
        return;
    case NO_TENSOR:
        ck_assert(gguf_out_remove_tensor(out, f->name));
        return;
    case RENAME:
        ck_assert(gguf_out_rename_tensor(out, f->name, f->to));
        return;
    case ADD_VECTOR:
        gguf_out_tensor(out, f->name, PL_F32, (uint64_t)f->v, 1, zeros);
        return;
    case ADD_MATRIX:
        gguf_out_tensor(out, f->name, PL_F32, (uint64_t)f->v, 2, zeros);
        return;
    case SHAPE: {
        const uint64_t ne0 = (uint64_t)f->v;
        ck_assert(gguf_out_reshape_tensor(out, f->name, ne0, gguf_out_tensor_size(out, f->name) / ne0));
        return;
    }
    }
}

START_TEST(faulty_file_is_refused_by_name)
{
    const struct fault *f = &faults[_i];
    const char *const flags[] = {"--arch", f->arch};
    struct gguf_out *out = build(flags, 2);
    spoil(out, f);
    struct loaded m;
    struct pl_err err = {0};
    pl_log_setup(PL_LOG_ERROR, false, 2);
    const pl_status rc = load(&m, out, "ref", 1, &err);
    ck_assert_msg(rc == f->status, "%s: status %s, message %s", f->name, pl_status_text(rc), err.msg);
    if (rc != PL_OK) {
        ck_assert_ptr_null(m.r.model);
        ck_assert_msg(strstr(err.msg, f->said) != NULL, "%s: \"%s\" lacks \"%s\"", f->name, err.msg, f->said);
        const bool unnamed = f->edit == STR && strcmp(f->name, "general.architecture") == 0;
        const bool about_tensor = strstr(f->said, "tensor ") != NULL || strstr(f->said, ".weight has") != NULL;
        const char *leaf = strrchr(f->name, '.') + 1;
        ck_assert_msg(unnamed || about_tensor || strstr(err.msg, f->name) != NULL || strstr(err.msg, leaf) != NULL,
                      "\"%s\" does not name %s", err.msg, f->name);
    }
    unload(&m);
}
END_TEST

/* A weight of a type that the file's reader knows but the device would not take is the device's error, with the
 * tensor's name in front. */
static pl_status no_weights(struct pl_device *dev, const struct pl_weight_src *parts, size_t n, struct pl_weight **out,
                            struct pl_err *err)
{
    (void)dev, (void)parts, (void)n, (void)out;
    return pl_fail(err, PL_ENOTSUP, "cannot hold it");
}

START_TEST(device_refusal_names_the_tensor)
{
    struct loaded m;
    struct pl_err err = {0};
    ck_assert_msg(load(&m, build(NULL, 0), "ref", 1, &err) == PL_OK, "%s", err.msg);
    struct pl_device_ops ops = *m.r.dev->ops;
    const struct pl_device_ops *real = m.r.dev->ops;
    struct pl_model *model = NULL;
    ops.weight_new = no_weights;
    m.r.dev->ops = &ops;
    ck_assert_int_eq(pl_model_load(&model, m.g, m.r.dev, 8, 8, &err), PL_ENOTSUP);
    m.r.dev->ops = real;
    ck_assert_ptr_null(model);
    ck_assert_str_eq(err.msg, "tensor token_embd.weight (F32): cannot hold it");
    unload(&m);
}
END_TEST

/* ---- the real model ---- */

static const char *real_model(char path[512])
{
    const char *given = getenv("PARLEY_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (given != NULL)
        snprintf(path, 512, "%s", given);
    else if (cache != NULL && cache[0] != '\0')
        snprintf(path, 512, "%s/parley/SmolLM2-135M-Instruct.Q4_1.gguf", cache);
    else
        snprintf(path, 512, "%s/.cache/parley/SmolLM2-135M-Instruct.Q4_1.gguf", home != NULL ? home : "");
    if (access(path, R_OK) == 0)
        return path;
    printf("model: real model skipped: %s is not there\n", path);
    return NULL;
}

struct tally {
    double kl;
    size_t n_positions, n_sure, n_tokens, n_other;
};

/* One position's record: the best ids, their log-probabilities, and what is left for the others. */
static double divergence(const uint8_t *record, size_t top, const float *logits, size_t V, double *work)
{
    double sum = 0, rest_q = 1;
    float p, rest_p;
    log_softmax(logits, work, V);
    for (size_t i = 0; i < top; i++) {
        uint16_t id;
        memcpy(&id, record + 2 * i, sizeof id);
        memcpy(&p, record + 2 * top + 4 * i, sizeof p);
        ck_assert_uint_lt(id, V);
        sum += exp((double)p) * ((double)p - work[id]);
        rest_q -= exp(work[id]);
    }
    memcpy(&rest_p, record + 6 * top, sizeof rest_p);
    if (rest_p > 0 && rest_q > 0)
        sum += (double)rest_p * log((double)rest_p / rest_q);
    return sum;
}

static int32_t best_of(const float *logits, size_t V)
{
    size_t best = 0;
    for (size_t i = 1; i < V; i++)
        best = logits[i] > logits[best] ? i : best;
    return (int32_t)best;
}

/* Feeds prompt and reference continuation, and compares the choice after each token and the distribution at some. */
static void compare_real(struct runner *r, const json_t *c, pl_dtype kv_type, const uint8_t **record, size_t top, struct tally *t)
{
    const size_t V = pl_model_spec(r->model)->n_vocab;
    int32_t tokens[MAX_TOKENS], positions[MAX_TOKENS];
    const size_t n_prompt = ints(json_object_get(c, "prompt"), tokens, MAX_TOKENS / 2);
    const size_t n_more = ints(json_object_get(c, "continuation"), tokens + n_prompt, MAX_TOKENS / 2);
    const size_t n_pos = ints(json_object_get(c, "positions"), positions, MAX_TOKENS);
    struct run_seq s = {.tokens = tokens, .n = (uint32_t)(n_prompt + n_more - 1), .chunk = 64};
    s.logits = pl_xcalloc(s.n * V, sizeof(float));
    double *work = pl_xcalloc(V, sizeof *work);
    ck_assert_int_eq(run_seqs(r, &s, 1, kv_type), PL_OK);
    for (size_t i = 0; i < n_more; i++) {
        const int32_t ours = best_of(s.logits + (n_prompt - 1 + i) * V, V), ref = tokens[n_prompt + i];
        const double margin = json_number_value(json_array_get(json_object_get(c, "margins"), i));
        ck_assert_msg(ours == ref || margin <= 0.5, "\"%s\": token %zu is %d, the reference's %d is ahead by %.2f nats",
                      json_string_value(json_object_get(c, "text")), i, ours, ref, margin);
        t->n_sure += margin > 0.5;
        t->n_other += ours != ref;
        t->n_tokens++;
    }
    for (size_t i = 0; i < n_pos; i++, *record += 6 * top + 4) {
        t->kl += divergence(*record, top, s.logits + (size_t)positions[i] * V, V, work);
        t->n_positions++;
    }
    free(work);
    free(s.logits);
}

/* How far a cache's KL may lie from llama.cpp's, which has an F16 cache. Activations are rounded to int8, so that over 200 positions
 * the mean moves by a tenth with nothing but the order of a sum (with an F32 cache from 0.0035 to 0.0044 when scores are multiplied by
 * 1 plus or minus a few millionths). By itself, with exact products, BF16 adds 0.00005, Q8_0 0.0004, F16 0.00000006. */
static const struct {
    const char *name;
    pl_dtype type;
    double share;
} caches[] = {{"f16", PL_F16, 1.0}, {"f32", PL_F32, 1.1}, {"bf16", PL_BF16, 1.15}, {"q8_0", PL_Q8_0, 1.25}};

START_TEST(real_model_agrees_with_transformers)
{
    char path[512];
    struct pl_gguf *g;
    struct runner r;
    struct pl_err err = {0};
    struct tally t = {0};
    if (real_model(path) == NULL)
        return;
    size_t n;
    uint8_t *blob = read_bytes(FIXTURES "smollm2.bin", &n);
    json_t *doc = read_json(FIXTURES "smollm2.json"), *cases = json_object_get(doc, "cases");
    const size_t top = (size_t)json_integer_value(json_object_get(doc, "top"));
    const double peer = json_number_value(json_object_get(json_object_get(doc, "peer"), "mean_kl_top"));
    ck_assert(peer > 0);
    ck_assert_uint_eq(json_array_size(cases), 20);
    ck_assert_msg(pl_gguf_open(&g, path, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(runner_open(&r, g, NULL, 0, 64, &err) == PL_OK, "%s", err.msg);
    const uint8_t *record = blob;
    for (size_t i = 0; i < json_array_size(cases); i++)
        compare_real(&r, json_array_get(cases, i), caches[_i].type, &record, top, &t);
    ck_assert_uint_eq((size_t)(record - blob), n);
    const double kl = t.kl / (double)t.n_positions;
    printf("model: SmolLM2 on %s, %s cache: %zu tokens, %zu with a margin above 0.5 nats all agree, %zu of the others differ; "
           "mean KL %.6f (llama.cpp %.6f) over %zu positions\n", r.dev->ops->name, caches[_i].name, t.n_tokens, t.n_sure, t.n_other, kl, peer,
           t.n_positions);
    ck_assert_msg(kl <= caches[_i].share * peer, "%s cache: mean KL %.6f; llama.cpp's is %.6f", caches[_i].name, kl, peer);
    ck_assert_uint_gt(t.n_sure, t.n_tokens / 2);
    runner_close(&r);
    pl_gguf_close(g);
    json_decref(doc);
    free(blob);
}
END_TEST

/* Shapes of the list as a loader sees them: parameters, and the bytes that the type says. */
static const struct {
    const char *name;
    uint64_t params;
    double bytes_each;
} dummies[] = {{"tiny", 1312000, 2},           {"1B", 1235814400, 2},          {"8b:q4_k", 8030261248, 144 / 256.0},
               {"32B:Q6_K", 32763417600, 210 / 256.0}, {"tiny:q5_0", 1312000, 22 / 32.0}, {"tiny:f32", 1312000, 4}};

START_TEST(made_up_models_have_their_shape)
{
    struct pl_err err = {0};
    struct pl_dummy *d;
    struct pl_gguf *g;
    struct pl_spec spec;
    unsigned bit;
    uint64_t params, matrices = 0, bytes = 0;
    ck_assert_msg(pl_dummy_open(&d, &g, dummies[_i].name, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_model_check(&spec, &bit, &params, g, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(params, dummies[_i].params);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        matrices += t->n_dims > 1 ? t->ne[0] * t->ne[1] : 0;
        bytes += t->n_dims > 1 ? t->n_bytes : 0;
        const size_t last = t->n_bytes - pl_dtype_block_bytes(t->dtype) * 32;
        float v[256 * 32], square = 0;
        const uint32_t n = 32 * pl_dtype_block(t->dtype);
        pl_dequant_row(t->dtype, (const uint8_t *)t->data + last, v, n);
        for (uint32_t k = 0; k < n; k++)
            square += v[k] * v[k] / (float)n;
        ck_assert_msg(t->n_dims == 1 ? square == 1 : square > 1e-4f && square < 1e-3f, "%.*s ends with %g", (int)t->name.n, t->name.s, (double)square);
    }
    ck_assert_double_eq((double)bytes, (double)matrices * dummies[_i].bytes_each);
    pl_gguf_close(g);
    pl_dummy_close(d);
}
END_TEST

START_TEST(made_up_models_are_refused_by_name)
{
    struct pl_err err = {0};
    struct pl_dummy *d;
    struct pl_gguf *g;
    ck_assert_int_eq(pl_dummy_open(&d, &g, "9B", &err), PL_EINVAL);
    ck_assert_msg(strstr(err.msg, "9B") != NULL && strstr(err.msg, "tiny") != NULL, "%s", err.msg);
    ck_assert_int_eq(pl_dummy_open(&d, &g, "1B:q9", &err), PL_EINVAL);
    ck_assert_msg(strstr(err.msg, "q9") != NULL, "%s", err.msg);
}
END_TEST

Suite *suite_model(void)
{
    Suite *s = suite_create("model");
    TCase *tc = tcase_create("forward");
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, tiny_logits_agree_with_transformers, 0, PL_COUNT_OF(isas));
    tcase_add_loop_test(tc, chunked_and_batched_give_the_same_bits, 0, PL_COUNT_OF(isas));
    tcase_add_test(tc, threads_give_the_same_bits);
    tcase_add_test(tc, only_wanted_rows_come_back);
    tcase_add_test(tc, steps_take_no_memory);
    tcase_add_test(tc, spec_tells_what_the_file_says);
    tcase_add_loop_test(tc, real_model_agrees_with_transformers, 0, PL_COUNT_OF(caches));
    suite_add_tcase(s, tc);
    tc = tcase_create("load");
    tcase_add_loop_test(tc, faulty_file_is_refused_by_name, 0, PL_COUNT_OF(faults));
    tcase_add_test(tc, device_refusal_names_the_tensor);
    tcase_add_loop_test(tc, made_up_models_have_their_shape, 0, PL_COUNT_OF(dummies));
    tcase_add_test(tc, made_up_models_are_refused_by_name);
    suite_add_tcase(s, tc);
    return s;
}
