/* check_scratch: models from nothing: the file that is written is a whole model with the first weights that it should have,
 * and what cannot be made is refused by the field that is at fault.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/model/model.h"
#include "core/train/scratch.h"
#include "tests/tools/tiny_model.h"

Suite *suite_scratch(void);

static char folder[] = "/tmp/parley-scratch-XXXXXX";
static char text_path[64], base_path[64], model_path[64];

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "we");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

static void make_folder(void)
{
    strcpy(folder + strlen(folder) - 6, "XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(text_path, sizeof text_path, "%s/t.jsonl", folder);
    snprintf(base_path, sizeof base_path, "%s/base.gguf", folder);
    snprintf(model_path, sizeof model_path, "%s/m.gguf", folder);
    char line[] = "{\"text\":\"the ferry leaves the harbour when the tide leaves the stones, and the stones hum\"}\n", all[20 * sizeof line] = "";
    for (int i = 0; i < 20; i++)
        strcat(all, line);
    write_text(text_path, all);
}

static void remove_folder(void)
{
    unlink(text_path);
    unlink(base_path);
    unlink(model_path);
    rmdir(folder);
}

static struct pl_train_spec spec_of(const char *shape)
{
    struct pl_train_spec s;
    struct pl_err err = {0};
    char text[300];
    snprintf(text, sizeof text, "{\"type\":\"pretrain\",\"pretrain\":{\"shape\":%s}}", shape);
    json_t *v = json_loads(text, 0, NULL);
    ck_assert_msg(pl_train_spec_read(&s, v, NULL, &err) == PL_OK, "%s", err.msg);
    json_decref(v);
    return s;
}

static atomic_bool stop;
static uint32_t n_read; /* lines that the last opening read */

static pl_status open_shape(struct pl_scratch *x, struct pl_train_spec *s, const char *base, uint64_t memory, struct pl_err *err)
{
    struct pl_data_report r = {0};
    *err = (struct pl_err){0};
    const struct pl_scratch_source from = {.training = text_path, .base = base, .kept = folder, .memory = memory, .room = memory, .stop = &stop};
    const pl_status st = pl_scratch_open(x, s, &from, &r, err);
    n_read = r.n_lines;
    pl_data_report_fini(&r);
    return st;
}

/* Mean and deviation of a tensor. */
static void moments(const struct pl_gguf *g, const char *name, double *mean, double *deviation)
{
    const struct pl_gguf_tensor *t = pl_gguf_tensor(g, name);
    ck_assert_msg(t != NULL && t->dtype == PL_F32, "%s", name);
    const float *w = t->data;
    const size_t n = t->ne[0] * t->ne[1];
    *mean = *deviation = 0;
    for (size_t i = 0; i < n; i++)
        *mean += (double)w[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        *deviation += pow((double)w[i] - *mean, 2) / (double)n;
    *deviation = sqrt(*deviation);
}

START_TEST(whole_models)
{
    static const struct {
        const char *shape;
        unsigned n_layers;
        bool tied;
    } rows[] = {{"{\"layers\":3,\"width\":64,\"heads\":4,\"kv_heads\":2}", 3, true},
                {"{\"architecture\":\"gpt2\",\"layers\":8,\"width\":50,\"heads\":5,\"tied\":false,\"context\":40}", 8, false}};
    struct pl_train_spec s = spec_of(rows[_i].shape);
    struct pl_scratch x;
    struct pl_err err;
    struct pl_gguf *g;
    struct pl_spec model;
    unsigned arch;
    uint64_t n_params;
    char origin[PL_SHA256_HEX], other[PL_SHA256_HEX];
    ck_assert_msg(open_shape(&x, &s, NULL, UINT64_C(1) << 30, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(s.shape_vocab, (uint32_t)pl_tok_count(x.tok)); /* "auto": what the text yields */
    ck_assert_uint_lt(s.shape_vocab, 512);
    ck_assert_int_eq(pl_scratch_origin(&s, text_path, NULL, origin, &err), PL_OK);
    ck_assert(!pl_scratch_is(model_path, origin));
    ck_assert_msg(pl_scratch_write(&x, model_path, 9, origin, &err) == PL_OK, "%s", err.msg);
    ck_assert(pl_scratch_is(model_path, origin));
    s.seed = 10;
    ck_assert_int_eq(pl_scratch_origin(&s, text_path, NULL, other, &err), PL_OK);
    ck_assert(!pl_scratch_is(model_path, other));
    ck_assert_msg(pl_gguf_open(&g, model_path, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_model_check(&model, &arch, &n_params, g, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(n_params, x.n_params);
    ck_assert_uint_eq(n_params, pl_scratch_params(&s));
    ck_assert(model.n_layers == rows[_i].n_layers && model.tied == rows[_i].tied && model.n_vocab == s.shape_vocab);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        const struct pl_gguf_tensor *t = pl_gguf_tensor_at(g, i);
        char name[72];
        double mean, deviation;
        snprintf(name, sizeof name, "%.*s", (int)t->name.n, t->name.s);
        moments(g, name, &mean, &deviation);
        const bool residual = strstr(name, "attn_output.weight") != NULL || strstr(name, "ffn_down.weight") != NULL;
        const double wanted = t->n_dims == 1 ? 0 : residual ? 0.02 / sqrt(2.0 * rows[_i].n_layers) : 0.02, n = (double)(t->ne[0] * t->ne[1]);
        const double centre = t->n_dims == 1 && strstr(name, ".weight") != NULL ? 1 : 0;
        ck_assert_msg(fabs(deviation - wanted) <= 4 * wanted / sqrt(2 * n) + 1e-9, "%s: deviation %g", name, deviation);
        ck_assert_msg(fabs(mean - centre) <= 4 * wanted / sqrt(n) + 1e-9, "%s: mean %g", name, mean);
    }
    pl_gguf_close(g);
    pl_scratch_fini(&x);
}
END_TEST

START_TEST(tokenizer_of_the_base)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_ptr_nonnull(out);
    ck_assert_int_eq(gguf_out_save(out, base_path), 0);
    gguf_out_free(out);
    struct pl_train_spec s = spec_of("{\"tokenizer\":\"base\",\"width\":32,\"layers\":1}");
    struct pl_scratch x;
    struct pl_gguf *g;
    struct pl_tok *tok;
    ck_assert_msg(open_shape(&x, &s, base_path, 0, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(pl_gguf_open(&g, base_path, &err), PL_OK);
    ck_assert_int_eq(pl_tok_load(&tok, g, &err), PL_OK);
    ck_assert_int_eq(pl_tok_count(x.tok), pl_tok_count(tok));
    ck_assert_uint_eq(s.shape_vocab, (uint32_t)pl_tok_count(tok));
    ck_assert_int_eq(s.shape_chat, PL_SHAPE_CHAT_BASE);
    ck_assert_ptr_nonnull(x.chat);
    ck_assert_uint_eq(x.tokenizer_bytes, 0);
    pl_tok_free(tok);
    pl_gguf_close(g);
    pl_scratch_fini(&x);
}
END_TEST

/* What was learned is taken by the next who opens the same, and by nobody else. */
START_TEST(learned_once)
{
    struct pl_train_spec s = spec_of("{\"width\":32,\"layers\":1,\"heads\":2}"), other;
    struct pl_scratch x, again;
    struct pl_err err;
    char kept[80];
    ck_assert_msg(open_shape(&x, &s, NULL, 0, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(n_read, 20);
    ck_assert_msg(pl_scratch_keep(&x, &s, text_path, folder, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(open_shape(&again, &s, NULL, 0, &err) == PL_OK, "%s", err.msg);
    ck_assert_uint_eq(n_read, 0);
    ck_assert(again.head.len == x.head.len && memcmp(again.head.data, x.head.data, x.head.len) == 0 && again.n_params == x.n_params);
    pl_scratch_fini(&again);
    other = s;
    other.shape_vocab--;
    ck_assert_msg(open_shape(&again, &other, NULL, 0, &err) == PL_OK, "%s", err.msg);
    ck_assert(n_read == 20 && pl_tok_count(again.tok) == pl_tok_count(x.tok) - 1);
    pl_scratch_fini(&again);
    pl_scratch_fini(&x);
    char line[] = "{\"text\":\"sand and sea and sand and sea and stones hum and the harbour and the tide and the ferry\"}\n", all[20 * sizeof line] = "";
    for (int i = 0; i < 20; i++)
        strcat(all, line);
    write_text(text_path, all);
    ck_assert_int_ne(open_shape(&again, &s, NULL, 0, &err), PL_OK); /* it yields fewer tokens, and is asked */
    ck_assert_uint_eq(n_read, 20);
    snprintf(kept, sizeof kept, "%s/tokenizer.gguf", folder);
    ck_assert_int_eq(unlink(kept), 0);
}
END_TEST

/* Learning ends when it is told to, and does not begin where there is too little memory for it. */
START_TEST(bounded)
{
    enum { N = 2000 };
    static char all[20 * (N + 20)];
    struct pl_train_spec s = spec_of("{\"width\":8,\"layers\":1,\"heads\":1,\"ff\":8,\"vocab_size\":300}");
    struct pl_scratch x;
    struct pl_err err;
    uint32_t state = 1;
    size_t n = 0;
    for (int i = 0; i < 20; i++) {
        n += (size_t)sprintf(all + n, "{\"text\":\"");
        for (int k = 0; k < N; k++, state = state * 1664525 + 1013904223)
            all[n++] = (char)('a' + (state >> 24) % 26);
        n += (size_t)sprintf(all + n, "\"}\n");
    }
    write_text(text_path, all);
    ck_assert_int_eq(open_shape(&x, &s, NULL, 1 << 20, &err), PL_ENOMEM);
    ck_assert_msg(strstr(err.msg, "learn a tokenizer") != NULL && strstr(err.msg, "1 MiB are there") != NULL, "%s", err.msg);
    ck_assert_msg(open_shape(&x, &s, NULL, 16 << 20, &err) == PL_OK, "%s", err.msg);
    pl_scratch_fini(&x);
    stop = true;
    ck_assert_int_eq(open_shape(&x, &s, NULL, 0, &err), PL_ESTOPPED);
}
END_TEST

START_TEST(refused)
{
    static const struct {
        const char *shape;
        uint64_t memory;
        const char *param, *message;
    } rows[] = {
        {"{\"vocab_size\":400}", 0, "method.pretrain.shape.vocab_size", "tokens at most"},
        {"{\"layers\":1024,\"width\":32768}", UINT64_C(64) << 30, "method.pretrain.shape", "64.0 GiB are there"},
        {"{}", UINT64_C(150) << 20, "method.pretrain.shape", "0.1 GiB are there"},
        {"{\"heads\":9}", 0, "method.pretrain.shape.heads", "take 8"},
        {"{\"tokenizer\":\"base\"}", 0, "base", "name its GGUF file"},
    };
    struct pl_train_spec s = spec_of(rows[_i].shape);
    struct pl_scratch x;
    struct pl_err err;
    ck_assert_int_eq(open_shape(&x, &s, NULL, rows[_i].memory, &err), PL_EINVAL);
    ck_assert_str_eq(err.param, rows[_i].param);
    ck_assert_msg(strstr(err.msg, rows[_i].message) != NULL, "%s", err.msg);
}
END_TEST

/* Bad lines are the training file's fault; a file of another form is refused as for any job. */
START_TEST(bad_files)
{
    static const struct {
        const char *text, *message;
    } rows[] = {{"{\"text\":\"a b\"}\n{\"text\":7}\n", "Example 2"}, {"", "must have at least"},
                {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\n", "'supervised'"}};
    struct pl_train_spec s = spec_of("{}");
    struct pl_scratch x;
    struct pl_err err;
    write_text(text_path, rows[_i].text);
    ck_assert_int_ne(open_shape(&x, &s, NULL, 0, &err), PL_OK);
    ck_assert_str_eq(err.param, "training_file");
    ck_assert_msg(strstr(err.msg, rows[_i].message) != NULL, "%s", err.msg);
}
END_TEST

Suite *suite_scratch(void)
{
    Suite *s = suite_create("scratch");
    TCase *c = tcase_create("all");
    tcase_add_checked_fixture(c, make_folder, remove_folder);
    tcase_add_loop_test(c, whole_models, 0, 2);
    tcase_add_test(c, tokenizer_of_the_base);
    tcase_add_test(c, learned_once);
    tcase_add_test(c, bounded);
    tcase_add_loop_test(c, refused, 0, 5);
    tcase_add_loop_test(c, bad_files, 0, 3);
    suite_add_tcase(s, c);
    return s;
}
