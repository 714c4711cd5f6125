/* check_export: folders for Hugging Face's libraries: the bytes of model.safetensors are those that transformers writes of the same model, and
 * config.json and the tokenizer's files those of which it was proved there that they mean the same (tests/oracle/check_export.py).
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/sha256.h"
#include "core/model/export.h"
#include "core/model/model.h"
#include "core/model/safetensors.h"
#include "core/text/tok.h"
#include "tests/tools/tiny_model.h"
#include "tests/unit/scratch.h"

Suite *suite_export(void);

#define FIXTURES "tests/oracle/fixtures/"

struct loaded {
    void *bytes;
    struct pl_gguf *g;
    struct pl_spec spec;
    struct pl_tok *tok;
};

static void load(struct loaded *m, const json_t *flags)
{
    const char *words[32];
    const size_t n = json_array_size(flags);
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    unsigned arch;
    size_t size;
    ck_assert(n <= PL_COUNT_OF(words));
    for (size_t i = 0; i < n; i++)
        words[i] = json_string_value(json_array_get(flags, i));
    ck_assert_msg(tiny_options_flags(&o, words, n, &err) == PL_OK, "%s", err.msg);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_msg(out != NULL, "%s", err.msg);
    m->bytes = gguf_out_bytes(out, &size);
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&m->g, m->bytes, size, &err), PL_OK);
    ck_assert_int_eq(pl_model_check(&m->spec, &arch, NULL, m->g, &err), PL_OK);
    ck_assert_int_eq(pl_tok_load(&m->tok, m->g, &err), PL_OK);
}

static void unload(struct loaded *m)
{
    pl_tok_free(m->tok);
    pl_gguf_close(m->g);
    free(m->bytes);
}

static void check_hash(const char *name, const char *file, const char *want)
{
    struct pl_sha256 h;
    char hex[PL_SHA256_HEX];
    size_t n;
    uint8_t *bytes = scratch_read(scratch_path(file), &n);
    pl_sha256_init(&h);
    pl_sha256_add(&h, bytes, n);
    pl_sha256_hex(&h, hex);
    free(bytes);
    ck_assert_msg(strcmp(hex, want) == 0, "%s: %s differs", name, file);
}

static void check_case(const json_t *c)
{
    const char *name = json_string_value(json_object_get(c, "name")), *word = json_string_value(json_object_get(c, "type"));
    const char *adapter = json_string_value(json_object_get(c, "adapter")), *file;
    int type = word[0] == 'b' ? PL_BF16 : word[1] == '3' ? PL_F32 : PL_F16;
    struct loaded m;
    struct pl_adapter *a = NULL;
    struct pl_err err = {0};
    json_error_t why;
    json_t *hash;
    load(&m, json_object_get(c, "flags"));
    if (adapter != NULL) {
        char path[128];
        snprintf(path, sizeof path, FIXTURES "adapter/%s", adapter);
        ck_assert_msg(pl_adapter_read(&a, path, &m.spec, &err) == PL_OK, "%s", err.msg);
    }
    ck_assert_msg(pl_export_folder(scratch_folder, m.g, &m.spec, a, &type, &err) == PL_OK, "%s: %s", name, err.msg);
    ck_assert_msg(pl_tok_export(m.tok, m.g, scratch_folder, m.spec.n_ctx, &err) == PL_OK, "%s: %s", name, err.msg);
    json_t *config = json_load_file(scratch_path("config.json"), 0, &why);
    ck_assert_msg(json_equal(config, json_object_get(c, "config")), "%s: config.json differs", name);
    json_decref(config);
    json_object_foreach(json_object_get(c, "sha256"), file, hash)
        check_hash(name, file, json_string_value(hash));
    pl_adapter_free(a);
    unload(&m);
}

START_TEST(folders_are_those_that_transformers_reads)
{
    json_error_t e;
    json_t *root = json_load_file(FIXTURES "export/cases.json", 0, &e), *cases = json_object_get(root, "cases");
    ck_assert_msg(root != NULL, "%s (run in the repository's root)", e.text);
    ck_assert_uint_ge(json_array_size(cases), 9);
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_case(json_array_get(cases, i));
    json_decref(root);
    ck_assert_int_eq(scratch_files(), 5);
}
END_TEST

static json_t *flags_of(const char *a, const char *b)
{
    return json_pack("[s, s]", a, b);
}

START_TEST(types_and_refusals)
{
    static const struct {
        const char *type;
        int chosen;
    } kinds[] = {{"f32", PL_F32}, {"f16", PL_F16}, {"bf16", PL_BF16}, {"q4_1", PL_F16}};
    struct loaded m;
    struct pl_err err = {0};
    int type;
    for (size_t i = 0; i < PL_COUNT_OF(kinds); i++) {
        json_t *flags = flags_of("--type", kinds[i].type);
        load(&m, flags);
        type = PL_EXPORT_AUTO;
        ck_assert_int_eq(pl_export_folder(scratch_folder, m.g, &m.spec, NULL, &type, &err), PL_OK);
        ck_assert_int_eq(type, kinds[i].chosen);
        type = PL_Q8_0;
        ck_assert_int_eq(pl_export_folder(scratch_folder, m.g, &m.spec, NULL, &type, &err), PL_EINVAL);
        type = PL_F32;
        m.spec.rope_dims /= 2;
        ck_assert_int_eq(pl_export_folder(scratch_folder, m.g, &m.spec, NULL, &type, &err), PL_ENOTSUP);
        ck_assert_ptr_nonnull(strstr(err.msg, "rope.dimension_count"));
        m.spec.rope_dims *= 2;
        ck_assert_int_eq(pl_export_folder("/no/such/folder", m.g, &m.spec, NULL, &type, &err), PL_EIO);
        ck_assert_int_eq(pl_tok_export(m.tok, m.g, "/no/such/folder", 64, &err), PL_EIO);
        unload(&m);
        json_decref(flags);
    }
}
END_TEST

/* What f16 cannot hold is not made infinite. */
START_TEST(values_beyond_f16)
{
    struct loaded m;
    struct pl_err err = {0};
    int type = PL_F16;
    json_t *flags = flags_of("--type", "f32");
    load(&m, flags);
    const struct pl_gguf_tensor *t = pl_gguf_tensor(m.g, "blk.1.ffn_down.weight");
    const float large = 70000;
    memcpy((char *)(uintptr_t)t->data + 40, &large, sizeof large);
    ck_assert_int_eq(pl_export_folder(scratch_folder, m.g, &m.spec, NULL, &type, &err), PL_EINVAL);
    ck_assert_str_eq(err.msg, "model.layers.1.mlp.down_proj.weight holds 70000, which f16 cannot: take --type bf16 or f32");
    ck_assert_int_eq(scratch_files(), 0);
    type = PL_BF16;
    ck_assert_int_eq(pl_export_folder(scratch_folder, m.g, &m.spec, NULL, &type, &err), PL_OK);
    unload(&m);
    json_decref(flags);
}
END_TEST

Suite *suite_export(void)
{
    Suite *s = suite_create("export");
    TCase *tc = tcase_create("export");
    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, scratch_make, scratch_remove);
    tcase_add_test(tc, folders_are_those_that_transformers_reads);
    tcase_add_test(tc, types_and_refusals);
    tcase_add_test(tc, values_beyond_f16);
    suite_add_tcase(s, tc);
    return s;
}
