/* check_adapter: adapters that PEFT has saved give PEFT's logits (tests/oracle/make_adapter.py); the same from GGUF files;
 * what is written is what PEFT would write; sequences with different adapters and with none, side by side, have the bits
 * that they have alone; and what is no adapter of this model is refused by name.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/model/adapter.h"
#include "core/model/export.h"
#include "core/model/safetensors.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"
#include "tests/unit/scratch.h"

Suite *suite_adapter(void);

#define FIXTURES "tests/oracle/fixtures/adapter/"

static const char *const isas[] = {"ref", "avx2", "avxvnni", "avx512", "cuda-emulated"};

/* ---- models ---- */

struct loaded {
    void *bytes;
    struct pl_gguf *g;
    struct runner r;
};

static bool load(struct loaded *m, const char *const *flags, size_t n, const char *isa)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    size_t size;
    ck_assert_msg(tiny_options_flags(&o, flags, n, &err) == PL_OK, "%s", err.msg);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_msg(out != NULL, "%s", err.msg);
    m->bytes = gguf_out_bytes(out, &size);
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&m->g, m->bytes, size, &err), PL_OK);
    const pl_status rc = runner_open(&m->r, m->g, isa, 2, 128, &err);
    ck_assert_msg(rc == PL_OK || rc == PL_ENOTSUP, "%s", err.msg);
    if (rc != PL_OK) { /* not on this processor */
        pl_gguf_close(m->g);
        free(m->bytes);
    }
    return rc == PL_OK;
}

static void unload(struct loaded *m)
{
    runner_close(&m->r);
    pl_gguf_close(m->g);
    free(m->bytes);
}

/* ---- fixtures ---- */

struct fixture {
    const char *name, *flags[16];
    size_t n_flags, n_vocab, offset, n_pos;
    int32_t tokens[64], positions[8];
    uint32_t n;
    bool quantized, gguf, f32;
};

static json_t *cases_root;
static float *blob;

static size_t open_fixtures(void)
{
    json_error_t e;
    cases_root = json_load_file(FIXTURES "cases.json", 0, &e);
    ck_assert_msg(cases_root != NULL, "%s (run in the repository's root)", e.text);
    FILE *f = fopen(FIXTURES "logits.bin", "rb");
    ck_assert_ptr_nonnull(f);
    blob = pl_xcalloc(1 << 16, sizeof *blob);
    ck_assert_uint_gt(fread(blob, sizeof *blob, 1 << 16, f), 0);
    fclose(f);
    return json_array_size(json_object_get(cases_root, "cases"));
}

static void close_fixtures(void)
{
    json_decref(cases_root);
    free(blob);
}

static struct fixture fixture(size_t i)
{
    const json_t *c = json_array_get(json_object_get(cases_root, "cases"), i), *flags = json_object_get(c, "flags");
    const json_t *tokens = json_object_get(c, "tokens"), *positions = json_object_get(c, "positions");
    struct fixture x = {.name = json_string_value(json_object_get(c, "name")),
                        .n_flags = json_array_size(flags),
                        .n_vocab = (size_t)json_integer_value(json_object_get(c, "n_vocab")),
                        .offset = (size_t)json_integer_value(json_object_get(c, "offset")),
                        .n_pos = json_array_size(positions),
                        .n = (uint32_t)json_array_size(tokens),
                        .quantized = json_is_true(json_object_get(c, "quantized")),
                        .gguf = json_is_true(json_object_get(c, "gguf")),
                        .f32 = json_is_true(json_object_get(c, "f32"))};
    ck_assert(x.n_flags <= PL_COUNT_OF(x.flags) && x.n <= PL_COUNT_OF(x.tokens) && x.n_pos <= PL_COUNT_OF(x.positions));
    for (size_t k = 0; k < x.n_flags; k++)
        x.flags[k] = json_string_value(json_array_get(flags, k));
    for (size_t k = 0; k < x.n; k++)
        x.tokens[k] = (int32_t)json_integer_value(json_array_get(tokens, k));
    for (size_t k = 0; k < x.n_pos; k++)
        x.positions[k] = (int32_t)json_integer_value(json_array_get(positions, k));
    return x;
}

static struct pl_adapter *read_adapter(const char *path, const struct pl_spec *spec)
{
    struct pl_adapter *a = NULL;
    struct pl_err err = {0};
    ck_assert_msg(pl_adapter_read(&a, path, spec, &err) == PL_OK, "%s", err.msg);
    return a;
}

static void add(struct loaded *m, uint32_t slot, const char *path)
{
    struct pl_err err = {0};
    struct pl_adapter *a = read_adapter(path, pl_model_spec(m->r.model));
    struct pl_lora_set *set;
    ck_assert_msg(pl_model_adapter_make(&set, m->r.model, a, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_model_adapter_add(m->r.model, slot, set, &err) == PL_OK, "%s", err.msg);
    pl_adapter_free(a);
}

/* ---- logits ---- */

/* Float weights agree to rounding; where they are quantized, so are activations, and the distribution is what must agree. */
static void compare(const struct fixture *x, const char *isa, const float *logits)
{
    double worst = 0, divergence = 0;
    for (size_t i = 0; i < x->n_pos; i++) {
        const float *ref = blob + x->offset + i * x->n_vocab, *ours = logits + (size_t)x->positions[i] * x->n_vocab;
        double sum[2] = {0, 0};
        for (size_t t = 0; t < x->n_vocab; t++) {
            worst = fmax(worst, fabs((double)ref[t] - (double)ours[t]));
            sum[0] += exp((double)ref[t]);
            sum[1] += exp((double)ours[t]);
        }
        for (size_t t = 0; t < x->n_vocab; t++)
            divergence += exp((double)ref[t]) / sum[0] * ((double)ref[t] - log(sum[0]) - (double)ours[t] + log(sum[1])) / (double)x->n_pos;
    }
    if (x->quantized)
        ck_assert_msg(divergence <= 1e-2, "%s on %s: mean KL %g", x->name, isa, divergence);
    else
        ck_assert_msg(worst <= 2e-4, "%s on %s: largest difference %g", x->name, isa, worst);
}

START_TEST(logits_agree_with_peft)
{
    const size_t n = open_fixtures();
    ck_assert_uint_ge(n, 6);
    for (size_t i = 0; i < n; i++) {
        const struct fixture x = fixture(i);
        struct loaded m;
        char path[256];
        if (!load(&m, x.flags, x.n_flags, isas[_i]))
            break;
        ck_assert_uint_eq(pl_model_spec(m.r.model)->n_vocab, x.n_vocab);
        snprintf(path, sizeof path, FIXTURES "%s", x.name);
        add(&m, 1, path);
        struct run_seq s = {.tokens = x.tokens, .n = x.n, .chunk = 64, .adapter = 1, .logits = pl_xcalloc(x.n * x.n_vocab, sizeof(float))};
        ck_assert_int_eq(run_seqs(&m.r, &s, 1, PL_F32), PL_OK);
        compare(&x, isas[_i], s.logits);
        free(s.logits);
        unload(&m);
    }
    close_fixtures();
}
END_TEST

/* A cache may have taken the rest of a GPU's memory when the first adapter comes. */
START_TEST(nothing_is_left_to_take)
{
    size_t before, after, total;
    struct pl_err err;
    struct loaded m;
    char path[256];
    open_fixtures();
    const struct fixture x = fixture(0);
    if (!load(&m, x.flags, x.n_flags, "cuda-emulated")) {
        close_fixtures();
        return;
    }
    snprintf(path, sizeof path, FIXTURES "%s", x.name);
    struct pl_adapter *a = read_adapter(path, pl_model_spec(m.r.model));
    struct pl_lora_set *set;
    ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &before, &total), PL_OK);
    ck_assert_int_eq(pl_model_reserve_adapters(m.r.model, &err), PL_OK);
    ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &after, &total), PL_OK);
    ck_assert_uint_eq(before - after, (size_t)m.r.max_tokens * 2 * pl_model_spec(m.r.model)->n_ff * sizeof(float));
    ck_assert_int_eq(pl_model_adapter_make(&set, m.r.model, a, &err), PL_OK);
    ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &before, &total), PL_OK);
    ck_assert_int_eq(pl_model_adapter_add(m.r.model, 1, set, &err), PL_OK);
    ck_assert_int_eq(m.r.dev->ops->memory(m.r.dev, &after, &total), PL_OK);
    ck_assert_uint_eq(after, before);
    pl_adapter_free(a);
    unload(&m);
    close_fixtures();
}
END_TEST

static void same_adapter(const struct pl_adapter *a, const struct pl_adapter *b, const struct pl_spec *spec)
{
    ck_assert_uint_eq(a->n_pairs, b->n_pairs);
    for (size_t i = 0; i < a->n_pairs; i++) {
        const struct pl_lora_pair *p = &a->pairs[i], *q = &b->pairs[i];
        struct pl_target_place place = {0};
        ck_assert(pl_target_find(spec, p->target, &place));
        ck_assert(p->layer == q->layer && p->target == q->target && p->rank == q->rank && p->scale == q->scale);
        ck_assert_mem_eq(p->a, q->a, (size_t)p->rank * place.cols * sizeof(float));
        ck_assert_mem_eq(p->b, q->b, (size_t)p->rank * place.rows * sizeof(float));
    }
    ck_assert_uint_eq(a->hash, b->hash);
}

START_TEST(gguf_is_the_same)
{
    const size_t n = open_fixtures();
    size_t seen = 0;
    for (size_t i = 0; i < n; i++) {
        const struct fixture x = fixture(i);
        struct loaded m;
        char path[256];
        if (!x.gguf)
            continue;
        seen++;
        ck_assert(load(&m, x.flags, x.n_flags, "ref"));
        snprintf(path, sizeof path, FIXTURES "%s", x.name);
        struct pl_adapter *a = read_adapter(path, pl_model_spec(m.r.model));
        strcat(path, ".gguf");
        struct pl_adapter *b = read_adapter(path, pl_model_spec(m.r.model));
        same_adapter(a, b, pl_model_spec(m.r.model));
        pl_adapter_free(a), pl_adapter_free(b);
        unload(&m);
    }
    ck_assert_uint_eq(seen, 2);
    close_fixtures();
}
END_TEST

/* ---- files to play with ---- */

/* What is written reads back as the same adapter, has the bytes that PEFT gave its values, and the same bytes each time. */
START_TEST(written_as_peft_writes)
{
    const size_t n = open_fixtures();
    for (size_t i = 0; i < n; i++) {
        const struct fixture x = fixture(i);
        struct loaded m;
        struct pl_err err = {0};
        char path[256];
        ck_assert(load(&m, x.flags, x.n_flags, "ref"));
        const struct pl_spec *spec = pl_model_spec(m.r.model);
        snprintf(path, sizeof path, FIXTURES "%s", x.name);
        struct pl_adapter *a = read_adapter(path, spec);
        const struct pl_adapter_info info = {.base = "base \"1\"", .rank = 3, .alpha = 0.3f, .dropout = 0.05f};
        scratch_make();
        ck_assert_msg(pl_adapter_write(scratch_folder, a, spec, &info, &err) == PL_OK, "%s", err.msg);
        struct pl_adapter *b = read_adapter(scratch_folder, spec);
        same_adapter(a, b, spec);
        ck_assert_int_eq(a->rslora, b->rslora);
        strcat(path, "/adapter_model.safetensors");
        if (x.f32)
            scratch_same(path, scratch_path("adapter_model.safetensors"));
        json_error_t e;
        json_t *config = json_load_file(scratch_path("adapter_config.json"), JSON_REJECT_DUPLICATES, &e);
        ck_assert_msg(config != NULL, "%s", e.text);
        ck_assert_str_eq(json_string_value(json_object_get(config, "base_model_name_or_path")), "base \"1\"");
        ck_assert_int_eq(json_integer_value(json_object_get(config, "r")), 3);
        json_decref(config);
        pl_adapter_free(a), pl_adapter_free(b);
        scratch_remove();
        unload(&m);
    }
    close_fixtures();
}
END_TEST

/* ---- merging ---- */

static float *run_plain(struct runner *r, const struct fixture *x, uint32_t slot)
{
    struct run_seq s = {.tokens = x->tokens, .n = x->n, .chunk = 64, .adapter = slot, .logits = pl_xcalloc(x->n * x->n_vocab, sizeof(float))};
    ck_assert_int_eq(run_seqs(r, &s, 1, PL_F32), PL_OK);
    return s.logits;
}

static double relative_error(const float *v, const float *ref, size_t n)
{
    double d = 0, sum = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)v[i] - ref[i]) * ((double)v[i] - ref[i]);
        sum += (double)ref[i] * ref[i];
    }
    return sqrt(d / sum);
}

/* A merged model gives what the adapter gives when it is served, as exactly as the type of its weights allows; against
 * PEFT, too. */
START_TEST(merged_is_served)
{
    static const struct {
        int type;
        double most; /* of the relative error of logits */
    } types[] = {{PL_F32, 1e-5}, {PL_EXPORT_AUTO, 1e-5}, {PL_F16, 3e-3}, {PL_BF16, 3e-2}, {PL_Q8_0, 8e-2}, {PL_EXPORT_BASE, 1e-5}};
    const size_t n = open_fixtures();
    scratch_make();
    for (size_t i = 0; i < n; i++) {
        const struct fixture x = fixture(i);
        struct loaded m;
        struct pl_err err = {0};
        char path[256];
        ck_assert(load(&m, x.flags, x.n_flags, "ref"));
        snprintf(path, sizeof path, FIXTURES "%s", x.name);
        add(&m, 1, path);
        float *served = run_plain(&m.r, &x, 1);
        struct pl_adapter *a = read_adapter(path, pl_model_spec(m.r.model));
        for (size_t k = 0; k < PL_COUNT_OF(types); k++) {
            struct pl_gguf *g;
            struct runner r;
            ck_assert_msg(pl_export_gguf(scratch_path("x.gguf"), m.g, pl_model_spec(m.r.model), a, types[k].type, &err) == PL_OK, "%s", err.msg);
            ck_assert_msg(pl_gguf_open(&g, scratch_path("x.gguf"), &err) == PL_OK, "%s", err.msg);
            ck_assert_msg(runner_open(&r, g, "ref", 1, 128, &err) == PL_OK, "%s", err.msg);
            float *merged = run_plain(&r, &x, 0);
            const double e = relative_error(merged, served, x.n * x.n_vocab), most = x.quantized ? 0.15 : types[k].most;
            ck_assert_msg(e <= most, "%s as type %d: relative error %g", x.name, types[k].type, e);
            if (types[k].type == PL_F32)
                compare(&x, "merged", merged);
            free(merged);
            runner_close(&r);
            pl_gguf_close(g);
        }
        ck_assert_int_eq(pl_export_gguf(scratch_path("x.gguf"), m.g, pl_model_spec(m.r.model), a, PL_Q4_K, &err), PL_EINVAL);
        ck_assert_int_eq(pl_export_gguf("/no/such/folder/x.gguf", m.g, pl_model_spec(m.r.model), a, PL_F16, &err), PL_EIO);
        pl_adapter_free(a);
        free(served);
        unload(&m);
    }
    scratch_remove();
    close_fixtures();
}
END_TEST

/* ---- a sequence's bits do not depend on the adapters of others ---- */

START_TEST(mixed_batches_give_the_same_bits)
{
    enum { N = 6, LEN = 40 };
    static const char *const flags[] = {"--embd", "32", "--ff", "64", "--ctx", "64"};
    static const uint32_t adapters[N] = {0, 1, 2, 1, 0, 5}, chunks[][N] = {{1, 1, 1, 1, 1, 1}, {40, 20, 7, 1, 3, 40}, {5, 40, 40, 40, 2, 1}};
    struct loaded m;
    int32_t tokens[LEN];
    float *alone[N], *base;
    if (!load(&m, flags, PL_COUNT_OF(flags), isas[_i]))
        return;
    const size_t V = pl_model_spec(m.r.model)->n_vocab;
    for (uint32_t i = 0; i < LEN; i++)
        tokens[i] = (int32_t)((i * 37 + i * i) % V);
    struct run_seq plain = {.tokens = tokens, .n = LEN, .chunk = 64, .logits = base = pl_xcalloc(LEN * V, sizeof(float))};
    ck_assert_int_eq(run_seqs(&m.r, &plain, 1, PL_F16), PL_OK);
    add(&m, 1, FIXTURES "llama-all");
    add(&m, 5, FIXTURES "llama-patterns");
    add(&m, 2, FIXTURES "llama-all.gguf");
    for (uint32_t s = 0; s < N; s++) {
        struct run_seq one = {.tokens = tokens, .n = LEN - s, .chunk = 64, .adapter = adapters[s], .logits = pl_xcalloc(LEN * V, sizeof(float))};
        ck_assert_int_eq(run_seqs(&m.r, &one, 1, PL_F16), PL_OK);
        alone[s] = one.logits;
    }
    ck_assert_mem_eq(base, alone[0], LEN * V * sizeof(float));                 /* loaded adapters change nothing for the base */
    ck_assert_mem_eq(alone[1], alone[2], (LEN - 2) * V * sizeof(float));       /* the same adapter in two slots */
    ck_assert(memcmp(alone[1], alone[5], V * sizeof(float)) != 0 && memcmp(alone[0], alone[1], V * sizeof(float)) != 0);
    for (size_t c = 0; c < PL_COUNT_OF(chunks); c++) {
        struct run_seq seqs[N];
        for (uint32_t s = 0; s < N; s++)
            seqs[s] = (struct run_seq){.tokens = tokens, .n = LEN - s, .chunk = chunks[c][s], .from = s % 2 * 7, .adapter = adapters[s],
                                       .logits = pl_xcalloc(LEN * V, sizeof(float))};
        ck_assert_int_eq(run_seqs(&m.r, seqs, N, PL_F16), PL_OK);
        for (uint32_t s = 0; s < N; s++) {
            const size_t n = (size_t)(seqs[s].n - seqs[s].from) * V;
            ck_assert_msg(memcmp(seqs[s].logits, alone[s] + seqs[s].from * V, n * sizeof(float)) == 0, "on %s: sequence %u, chunks %zu", isas[_i], s, c);
            free(seqs[s].logits);
        }
    }
    struct run_seq none = {.tokens = tokens, .n = 4, .chunk = 4, .adapter = 3, .logits = base};
    ck_assert_int_eq(run_seqs(&m.r, &none, 1, PL_F16), PL_EINVAL); /* an empty slot */
    none.adapter = 77;
    ck_assert_int_eq(run_seqs(&m.r, &none, 1, PL_F16), PL_EINVAL);
    pl_model_adapter_remove(m.r.model, 5);
    none.adapter = 5;
    ck_assert_int_eq(run_seqs(&m.r, &none, 1, PL_F16), PL_EINVAL);
    add(&m, 5, FIXTURES "llama-all");
    ck_assert_int_eq(run_seqs(&m.r, &none, 1, PL_F16), PL_OK);
    ck_assert_mem_eq(base, alone[1], 4 * V * sizeof(float));
    for (uint32_t s = 0; s < N; s++)
        free(alone[s]);
    free(base);
    unload(&m);
}
END_TEST

/* ---- refusals ---- */

static const char *const small[] = {"--embd", "32", "--ff", "64", "--ctx", "64"};

static void refused(const struct pl_spec *spec, const char *path, pl_status want, const char *word)
{
    struct pl_adapter *a = NULL;
    struct pl_err err = {0};
    const pl_status rc = pl_adapter_read(&a, path, spec, &err);
    ck_assert_msg(rc == want, "%s: %d %s", word, rc, err.msg);
    ck_assert_msg(strstr(err.msg, word) != NULL, "\"%s\" is not in \"%s\"", word, err.msg);
}

/* The good folder with one key of its configuration set to a JSON value (NULL = taken out). */
static void with_key(const char *key, const char *value)
{
    json_error_t e;
    json_t *config = json_load_file(FIXTURES "llama-all/adapter_config.json", 0, &e);
    if (value == NULL)
        json_object_del(config, key);
    else
        ck_assert_int_eq(json_object_set_new(config, key, json_loads(value, JSON_DECODE_ANY, &e)), 0);
    ck_assert_int_eq(json_dump_file(config, scratch_path("adapter_config.json"), 0), 0);
    json_decref(config);
}

START_TEST(bad_configurations)
{
    static const struct {
        const char *key, *value;
        pl_status rc;
        const char *word;
    } rows[] = {
        {"peft_type", "\"ADALORA\"", PL_ENOTSUP, "ADALORA"},
        {"peft_type", "\"PREFIX_TUNING\"", PL_ENOTSUP, "PREFIX_TUNING"},
        {"peft_type", NULL, PL_EFORMAT, "peft_type"},
        {"peft_type", "3", PL_EFORMAT, "peft_type"},
        {"use_dora", "true", PL_ENOTSUP, "use_dora"},
        {"modules_to_save", "[\"lm_head\"]", PL_ENOTSUP, "modules_to_save"},
        {"lora_bias", "true", PL_ENOTSUP, "lora_bias"},
        {"layer_replication", "[[0,1]]", PL_ENOTSUP, "layer_replication"},
        {"trainable_token_indices", "[1]", PL_ENOTSUP, "trainable_token_indices"},
        {"target_parameters", "[\"x\"]", PL_ENOTSUP, "target_parameters"},
        {"alora_invocation_tokens", "[5]", PL_ENOTSUP, "aLoRA"},
        {"use_qalora", "true", PL_ENOTSUP, "use_qalora"},
        {"bias", "\"all\"", PL_ENOTSUP, "bias"},
        {"bias", "\"lora_only\"", PL_ENOTSUP, "bias"},
        {"init_lora_weights", "\"pissa_niter_4\"", PL_ENOTSUP, "pissa_niter_4"},
        {"r", "0", PL_EFORMAT, "r must be"},
        {"r", "4.5", PL_EFORMAT, "r must be"},
        {"r", "1000000", PL_EFORMAT, "r must be"},
        {"r", NULL, PL_EFORMAT, "r must be"},
        {"r", "8", PL_EFORMAT, "has rank 4"},
        {"lora_alpha", "0", PL_EFORMAT, "lora_alpha"},
        {"lora_alpha", "-1", PL_EFORMAT, "lora_alpha"},
        {"lora_alpha", "\"8\"", PL_EFORMAT, "lora_alpha"},
        {"lora_alpha", NULL, PL_EFORMAT, "lora_alpha"},
        {"use_rslora", "1", PL_EFORMAT, "use_rslora"},
        {"rank_pattern", "[4]", PL_EFORMAT, "rank_pattern"},
        {"rank_pattern", "{\"q_proj\": 0}", PL_EFORMAT, "rank_pattern"},
        {"rank_pattern", "{\"q_proj\": 5}", PL_EFORMAT, "model.layers.0.self_attn.q_proj has rank 4"},
        {"rank_pattern", "{\"(\": 5}", PL_EFORMAT, "no regular expression"},
        {"rank_pattern", "{\"(([a-z]|.)+)+[0-9]\": 4}", PL_EFORMAT, "cannot be matched"},
        {"alpha_pattern", "{\"q_proj\": \"x\"}", PL_EFORMAT, "alpha_pattern"},
        {"alpha_pattern", "{\"q_proj\": 1e300}", PL_EFORMAT, "alpha_pattern"},
        {"lora_alpha", "1e9", PL_EFORMAT, "lora_alpha"},
    };
    struct loaded m;
    scratch_make();
    ck_assert(load(&m, small, PL_COUNT_OF(small), "ref"));
    const struct pl_spec *spec = pl_model_spec(m.r.model);
    struct pl_err err = {0};
    refused(spec, scratch_folder, PL_EIO, "adapter_config.json");
    with_key("inference_mode", "true");
    refused(spec, scratch_folder, PL_ENOENT, "adapter_model.safetensors");
    char *good = realpath(FIXTURES "llama-all/adapter_model.safetensors", NULL);
    ck_assert_int_eq(symlink(good, scratch_path("adapter_model.safetensors")), 0);
    free(good);
    pl_adapter_free(read_adapter(scratch_folder, spec));
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        with_key(rows[i].key, rows[i].value);
        refused(spec, scratch_folder, rows[i].rc, rows[i].word);
    }
    static const char *const harmless[][2] = {{"use_dora", "null"}, {"modules_to_save", "[]"}, {"bias", "null"}, {"lora_dropout", "0.5"},
                                              {"rank_pattern", "{\"nothing\": 9, \"q_proj\": 4}"}, {"some_new_key", "[1]"}};
    for (size_t i = 0; i < PL_COUNT_OF(harmless); i++) {
        with_key(harmless[i][0], harmless[i][1]);
        pl_adapter_free(read_adapter(scratch_folder, spec));
    }
    ck_assert_int_eq(pl_newfile_write(scratch_path("adapter_config.json"), "{\"r\": 4,}", 9, &err), PL_OK);
    refused(spec, scratch_folder, PL_EFORMAT, "no JSON");
    ck_assert_int_eq(pl_newfile_write(scratch_path("adapter_config.json"), "[]", 2, &err), PL_OK);
    refused(spec, scratch_folder, PL_EFORMAT, "no JSON object");
    char *large = pl_xcalloc(2 << 20, 1);
    memset(large, ' ', 2 << 20);
    ck_assert_int_eq(pl_newfile_write(scratch_path("adapter_config.json"), large, 2 << 20, &err), PL_OK);
    refused(spec, scratch_folder, PL_EFORMAT, "larger than");
    free(large);
    unlink(scratch_path("adapter_model.safetensors"));
    refused(spec, "/no/such/adapter", PL_ENOENT, "/no/such/adapter");
    refused(spec, "/dev/null", PL_EIO, "/dev/null");
    unload(&m);
    scratch_remove();
}
END_TEST

#define Q0 "base_model.model.model.layers.0.self_attn.q_proj."

START_TEST(bad_tensors)
{
    static const struct {
        const char *name, *to; /* a tensor gets another name (NULL = taken out), or with to = name another shape or value */
        uint64_t rows, cols;   /* 0 = as they are */
        float value;           /* of its first element, 0 = as it is */
        pl_status rc;
        const char *word;
    } rows[] = {
        {Q0 "lora_A.weight", NULL, 0, 0, 0, PL_EFORMAT, "no lora_A beside"},
        {Q0 "lora_B.weight", NULL, 0, 0, 0, PL_EFORMAT, "no lora_B beside"},
        {Q0 "lora_A.weight", Q0 "lora_A.weight", 4, 16, 0, PL_EFORMAT, "another base model"},
        {Q0 "lora_A.weight", Q0 "lora_A.weight", 2, 32, 0, PL_EFORMAT, "has rank 2"},
        {Q0 "lora_A.weight", Q0 "lora_A.weight", 0, 0, NAN, PL_EFORMAT, "finite"},
        {Q0 "lora_B.weight", Q0 "lora_B.weight", 0, 0, INFINITY, PL_EFORMAT, "finite"},
        {Q0 "lora_B.weight", Q0 "lora_B.weight", 16, 4, 0, PL_EFORMAT, "[16, 4]"},
        {Q0 "lora_A.weight", "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", 0, 0, 0, PL_EFORMAT, "layer 2"},
        {Q0 "lora_A.weight", "base_model.model.model.layers.99999999999.self_attn.q_proj.lora_A.weight", 0, 0, 0, PL_EFORMAT, "no lora_A or lora_B"},
        {Q0 "lora_A.weight", "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight", 0, 0, 0, PL_EFORMAT, "no lora_A or lora_B"},
        {Q0 "lora_A.weight", "base_model.model.model.layers.0.self_attn.w_proj.lora_A.weight", 0, 0, 0, PL_EFORMAT, "w_proj"},
        {Q0 "lora_A.weight", Q0 "lora_C.weight", 0, 0, 0, PL_EFORMAT, "lora_C"},
        {Q0 "lora_A.weight", Q0 "lora_A", 0, 0, 0, PL_EFORMAT, "no lora_A or lora_B"},
        {Q0 "lora_A.weight", "model.layers.0.self_attn.q_proj.lora_A.weight", 0, 0, 0, PL_EFORMAT, "no lora_A or lora_B"},
        {Q0 "lora_A.weight", Q0 "lora_E", 0, 0, 0, PL_ENOTSUP, "AdaLoRA"},
        {Q0 "lora_A.weight", Q0 "lora_magnitude_vector", 0, 0, 0, PL_ENOTSUP, "DoRA"},
        {Q0 "lora_B.weight", Q0 "lora_B.bias", 0, 0, 0, PL_ENOTSUP, "biases"},
        {Q0 "lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A", 0, 0, 0, PL_ENOTSUP, "embeddings"},
        {Q0 "lora_A.weight", "base_model.model.lm_head.lora_A.weight", 0, 0, 0, PL_ENOTSUP, "output head"},
        {Q0 "lora_A.weight", "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", 0, 0, 0, PL_EFORMAT, "gpt2"},
    };
    struct loaded m;
    struct pl_err err = {0};
    struct pl_safetensors *st;
    scratch_make();
    ck_assert(load(&m, small, PL_COUNT_OF(small), "ref"));
    with_key("inference_mode", "true");
    ck_assert_int_eq(pl_safetensors_open(&st, FIXTURES "llama-all/adapter_model.safetensors", &err), PL_OK);
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        struct pl_st_tensor tensors[64];
        size_t n = 0;
        float values[512];
        for (size_t k = 0; k < pl_safetensors_n(st); k++) {
            struct pl_st_tensor *t = &tensors[n++];
            *t = *pl_safetensors_at(st, k);
            if (strcmp(t->name, rows[i].name) != 0)
                continue;
            if (rows[i].to == NULL) {
                n--;
                continue;
            }
            pl_st_read_f32(t, values);
            t->name = rows[i].to;
            t->data = values;
            if (rows[i].rows != 0)
                t->dims[0] = rows[i].rows, t->dims[1] = rows[i].cols;
            if (rows[i].value != 0)
                values[0] = rows[i].value;
        }
        ck_assert_int_eq(pl_safetensors_write(scratch_path("adapter_model.safetensors"), tensors, n, NULL, 0, &err), PL_OK);
        refused(pl_model_spec(m.r.model), scratch_folder, rows[i].rc, rows[i].word);
    }
    ck_assert_int_eq(pl_safetensors_write(scratch_path("adapter_model.safetensors"), NULL, 0, NULL, 0, &err), PL_OK);
    refused(pl_model_spec(m.r.model), scratch_folder, PL_EFORMAT, "no adapter");
    pl_safetensors_close(st);
    unload(&m);
    scratch_remove();
}
END_TEST

START_TEST(other_bases)
{
    static const char *const wider[] = {"--embd", "64"}, *const longer[] = {"--embd", "32", "--ff", "64", "--layers", "1"};
    static const char *const gpt2[] = {"--arch", "gpt2", "--embd", "32", "--ff", "64", "--ctx", "64"};
    struct loaded m;
    ck_assert(load(&m, wider, PL_COUNT_OF(wider), "ref"));
    refused(pl_model_spec(m.r.model), FIXTURES "llama-all", PL_EFORMAT, "another base model");
    refused(pl_model_spec(m.r.model), FIXTURES "llama-all.gguf", PL_EFORMAT, "another base model");
    unload(&m);
    ck_assert(load(&m, longer, PL_COUNT_OF(longer), "ref"));
    refused(pl_model_spec(m.r.model), FIXTURES "llama-all", PL_EFORMAT, "layer 1");
    unload(&m);
    ck_assert(load(&m, gpt2, PL_COUNT_OF(gpt2), "ref"));
    refused(pl_model_spec(m.r.model), FIXTURES "llama-all", PL_EFORMAT, "belongs to a llama model");
    refused(pl_model_spec(m.r.model), FIXTURES "llama-all.gguf", PL_EFORMAT, "\"llama\"");
    unload(&m);
    ck_assert(load(&m, small, PL_COUNT_OF(small), "ref"));
    refused(pl_model_spec(m.r.model), FIXTURES "gpt2-all", PL_EFORMAT, "belongs to a gpt2 model");
    unload(&m);
}
END_TEST

/* A GGUF adapter for the small model, with one pair. */
static struct gguf_out *good_gguf(const char *a, const char *b)
{
    static const float values[4 * 64];
    struct gguf_out *o = gguf_out_new();
    gguf_out_str(o, "general.type", "adapter");
    gguf_out_str(o, "general.architecture", "llama");
    gguf_out_str(o, "adapter.type", "lora");
    gguf_out_f32(o, "adapter.lora.alpha", 8);
    gguf_out_tensor(o, a, PL_F32, 32, 4, values);
    gguf_out_tensor(o, b, PL_F32, 4, 32, values);
    return o;
}

static void gguf_refused(const struct pl_spec *spec, struct gguf_out *o, pl_status want, const char *word)
{
    ck_assert_int_eq(gguf_out_save(o, scratch_path("x.gguf")), 0);
    gguf_out_free(o);
    if (word != NULL)
        refused(spec, scratch_path("x.gguf"), want, word);
    else
        pl_adapter_free(read_adapter(scratch_path("x.gguf"), spec));
}

START_TEST(bad_gguf)
{
    struct loaded m;
    scratch_make();
    ck_assert(load(&m, small, PL_COUNT_OF(small), "ref"));
    const struct pl_spec *spec = pl_model_spec(m.r.model);
#define GOOD good_gguf("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")
    gguf_refused(spec, GOOD, PL_OK, NULL);
    static const struct {
        const char *key, *value, *word;
    } texts[] = {{"general.type", "model", "\"model\""}, {"adapter.type", "dora", "\"dora\""}, {"general.architecture", "gpt2", "\"gpt2\""}};
    for (size_t i = 0; i < PL_COUNT_OF(texts); i++) {
        struct gguf_out *o = GOOD;
        gguf_out_str(o, texts[i].key, texts[i].value);
        gguf_refused(spec, o, i == 2 ? PL_EFORMAT : PL_ENOTSUP, texts[i].word);
        o = GOOD;
        gguf_out_remove_key(o, texts[i].key);
        gguf_refused(spec, o, PL_EFORMAT, texts[i].key);
    }
    struct gguf_out *o = GOOD;
    gguf_out_remove_key(o, "adapter.lora.alpha");
    gguf_refused(spec, o, PL_EFORMAT, "adapter.lora.alpha");
    o = GOOD;
    gguf_out_f32(o, "adapter.lora.alpha", NAN);
    gguf_refused(spec, o, PL_EFORMAT, "adapter.lora.alpha");
    o = GOOD;
    const int32_t tokens[] = {5};
    gguf_out_i32s(o, "adapter.alora.invocation_tokens", tokens, 1);
    gguf_refused(spec, o, PL_ENOTSUP, "invocation_tokens");
    o = GOOD;
    gguf_out_remove_tensor(o, "blk.0.attn_q.weight.lora_b");
    gguf_refused(spec, o, PL_EFORMAT, "no lora_B beside");
    o = GOOD;
    gguf_out_reshape_tensor(o, "blk.0.attn_q.weight.lora_a", 16, 8);
    gguf_refused(spec, o, PL_EFORMAT, "another base model");
    static const char *const names[] = {"token_embd.weight.lora_a", "output.weight.lora_a", "blk.0.attn_qkv.weight.lora_a", "blk.0.attn_q.weight.lora_c",
                                        "blk.0.attn_q.weight.lora_ab", "blk.-1.attn_q.weight.lora_a", "blk.0.attn_q.weight", "blk.0.attn_norm.weight.lora_a"};
    for (size_t i = 0; i < PL_COUNT_OF(names); i++)
        gguf_refused(spec, good_gguf(names[i], "blk.0.attn_q.weight.lora_b"), PL_ENOTSUP, names[i]);
    gguf_refused(spec, good_gguf("blk.7.attn_q.weight.lora_a", "blk.7.attn_q.weight.lora_b"), PL_EFORMAT, "layer 7");
    unload(&m);
    scratch_remove();
}
END_TEST

Suite *suite_adapter(void)
{
    Suite *s = suite_create("adapter");
    TCase *t = tcase_create("adapter");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, logits_agree_with_peft, 0, PL_COUNT_OF(isas));
    tcase_add_loop_test(t, mixed_batches_give_the_same_bits, 0, PL_COUNT_OF(isas));
    tcase_add_test(t, nothing_is_left_to_take);
    tcase_add_test(t, gguf_is_the_same);
    tcase_add_test(t, written_as_peft_writes);
    tcase_add_test(t, merged_is_served);
    tcase_add_test(t, bad_configurations);
    tcase_add_test(t, bad_tensors);
    tcase_add_test(t, other_bases);
    tcase_add_test(t, bad_gguf);
    suite_add_tcase(s, t);
    return s;
}
