/* check_trainspec: method objects: what "auto" becomes, what is echoed, and every bad value refused by its whole path; job.json.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/model/adapter.h"
#include "core/train/job.h"
#include "core/train/spec.h"

Suite *suite_trainspec(void);

static const struct pl_spec llama = {.arch = "llama", .n_layers = 2, .n_embd = 64, .n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .n_ff = 128,
                                     .n_vocab = 400, .n_ctx = 2048, .gated = true};
static const struct pl_spec gpt2 = {.arch = "gpt2", .n_layers = 2, .n_embd = 64, .n_heads = 4, .n_kv_heads = 4, .head_dim = 16, .n_ff = 128,
                                    .n_vocab = 400, .n_ctx = 1024};

static struct pl_train_facts facts(uint32_t n_examples)
{
    return (struct pl_train_facts){.model = &llama, .n_examples = n_examples, .longest = 200, .n_ctx = 2048, .n_threads = 2};
}

static pl_status read_spec(struct pl_train_spec *s, const char *method, struct pl_err *err)
{
    json_error_t why;
    json_t *v = json_loads(method, JSON_DECODE_ANY, &why);
    ck_assert_msg(v != NULL, "%s: %s", method, why.text);
    *err = (struct pl_err){0};
    const pl_status st = pl_train_spec_read(s, v, NULL, err);
    json_decref(v);
    return st;
}

static char *text_of(json_t *v)
{
    char *text = json_dumps(v, JSON_SORT_KEYS | JSON_ENCODE_ANY);
    json_decref(v);
    return text;
}

START_TEST(automatic)
{
    struct pl_train_spec s;
    struct pl_err err = {0};
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, NULL, &err), PL_OK);
    ck_assert_int_eq(s.method, PL_METHOD_SUPERVISED);
    char *echo = text_of(pl_train_spec_hyperparameters(&s));
    ck_assert_str_eq(echo, "{\"batch_size\": \"auto\", \"learning_rate_multiplier\": \"auto\", \"n_epochs\": \"auto\"}");
    free(echo);
    struct pl_train_facts f = facts(300);
    ck_assert_msg(pl_train_spec_resolve(&s, &f, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(s.automatic, 0);
    ck_assert_int_eq(s.peft, PL_PEFT_LORA);
    ck_assert_int_eq(s.n_epochs, 4);
    ck_assert_int_eq(s.batch_size, 6);
    ck_assert_int_eq(pl_train_total_steps(&s, 300), 200);
    ck_assert_int_eq(s.rank, 16);
    ck_assert_double_eq(s.alpha, 32);
    ck_assert_double_eq(s.learning_rate, 2e-4);
    ck_assert_double_eq(s.learning_rate_multiplier, 1);
    ck_assert_int_eq(s.max_length, 200);
    ck_assert_int_eq(s.warmup_steps, 6);
    ck_assert_int_eq(s.checkpoint_interval, 50);
    ck_assert_int_eq(s.eval_interval, 12);
    ck_assert_int_eq(s.micro_batch, 6);
    ck_assert_int_eq(s.threads, 2);
    ck_assert_int_eq(s.final, PL_FINAL_LAST);
    ck_assert_int_eq(s.targets, 1u << PL_TARGET_Q | 1u << PL_TARGET_K | 1u << PL_TARGET_V | 1u << PL_TARGET_O | 1u << PL_TARGET_GATE |
                                    1u << PL_TARGET_UP | 1u << PL_TARGET_DOWN);
    echo = text_of(pl_train_spec_json(&s));
    ck_assert_ptr_null(strstr(echo, "auto"));
    struct pl_train_spec again; /* the echo is a request for the same */
    ck_assert_msg(read_spec(&again, echo, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(again.automatic, 0);
    ck_assert_int_eq(memcmp(&again, &s, sizeof s), 0);
    free(echo);
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, NULL, &err), PL_OK);
    f = facts(10); /* few examples: more epochs, steps of one */
    ck_assert_int_eq(pl_train_spec_resolve(&s, &f, &err), PL_OK);
    ck_assert_int_eq(s.n_epochs, 10);
    ck_assert_int_eq(s.batch_size, 1);
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, NULL, &err), PL_OK);
    f = facts(100000);
    ck_assert_int_eq(pl_train_spec_resolve(&s, &f, &err), PL_OK);
    ck_assert_int_eq(s.n_epochs, 3);
    ck_assert_int_eq(s.batch_size, 8);
}
END_TEST

START_TEST(given)
{
    struct pl_train_spec s;
    struct pl_err err = {0};
    struct pl_train_facts f = facts(100);
    f.validation = true;
    ck_assert_msg(read_spec(&s, "{\"type\":\"dpo\",\"dpo\":{\"hyperparameters\":{\"beta\":0.3,\"n_epochs\":\"auto\",\"batch_size\":4,"
                            "\"learning_rate_multiplier\":2},\"peft\":{\"kind\":\"full\"},\"early_stopping\":{\"patience\":3},"
                            "\"schedule\":{\"kind\":\"wsd\",\"decay_ratio\":0.1},\"optimizer\":null}}",
                            &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_train_spec_resolve(&s, &f, &err) == PL_OK, "%s", err.msg);
    ck_assert_double_eq(s.beta, 0.3);
    ck_assert_double_eq_tol(s.learning_rate, 2e-6, 1e-12);
    ck_assert_int_eq(s.schedule, PL_SCHEDULE_WSD);
    ck_assert_int_eq(s.final, PL_FINAL_BEST);
    char *echo = text_of(pl_train_spec_json(&s));
    ck_assert_ptr_null(strstr(echo, "rank")); /* full tuning has none */
    ck_assert_ptr_null(strstr(echo, "train_on"));
    ck_assert_msg(read_spec(&s, echo, &err) == PL_OK, "%s", err.msg);
    free(echo);
    ck_assert_int_eq(read_spec(&s, "{\"type\":\"pretrain\"}", &err), PL_OK);
    f.longest = 5000;
    ck_assert_int_eq(pl_train_spec_resolve(&s, &f, &err), PL_OK);
    ck_assert_int_eq(s.max_length, 1024);
    ck_assert_double_eq(s.min_ratio, 0.1);
    ck_assert_int_eq(s.n_epochs, 1);
    json_t *old = json_pack("{s:i,s:f}", "n_epochs", 2, "learning_rate_multiplier", 0.5);
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, old, &err), PL_OK);
    ck_assert_int_eq(pl_train_spec_resolve(&s, &f, &err), PL_OK);
    ck_assert_int_eq(s.n_epochs, 2);
    ck_assert_double_eq(s.learning_rate, 1e-4);
    json_decref(old);
}
END_TEST

#define SUP(x) "{\"type\":\"supervised\",\"supervised\":" x "}"
#define PRE(x) "{\"type\":\"pretrain\",\"pretrain\":" x "}"
#define HYP(x) SUP("{\"hyperparameters\":" x "}")
static const struct {
    const char *method, *param, *message;
} bad[] = {
    {"[]", "method", "must be an object"},
    {"{}", "method.type", "must be a string"},
    {"{\"type\":7}", "method.type", "not an integer"},
    {"{\"type\":\"magic\"}", "method.type", "\"magic\""},
    {"{\"type\":\"reinforcement\"}", "method.type", "not supported by this server"},
    {"{\"type\":\"dpo\",\"supervised\":{}}", "method.supervised", "does not belong"},
    {"{\"type\":\"supervised\",\"extra\":1}", "method.extra", "does not belong"},
    {SUP("[]"), "method.supervised", "must be an object"},
    {SUP("{\"hyperparameters\":[]}"), "method.supervised.hyperparameters", "must be an object"},
    {SUP("{\"hyper\":{}}"), "method.supervised.hyper", "not a setting"},
    {HYP("{\"n_epochs\":0}"), "method.supervised.hyperparameters.n_epochs", "from 1 to 50, not 0"},
    {HYP("{\"n_epochs\":51}"), "method.supervised.hyperparameters.n_epochs", "from 1 to 50"},
    {HYP("{\"n_epochs\":\"3\"}"), "method.supervised.hyperparameters.n_epochs", "an integer or \"auto\", not a string"},
    {HYP("{\"n_epochs\":1.5}"), "method.supervised.hyperparameters.n_epochs", "a number with a fraction"},
    {HYP("{\"n_epochs\":true}"), "method.supervised.hyperparameters.n_epochs", "a boolean"},
    {HYP("{\"batch_size\":257}"), "method.supervised.hyperparameters.batch_size", "from 1 to 256"},
    {HYP("{\"batch_size\":-9223372036854775807}"), "method.supervised.hyperparameters.batch_size", "from 1 to 256"},
    {HYP("{\"learning_rate_multiplier\":0}"), "method.supervised.hyperparameters.learning_rate_multiplier", "from 1e-06"},
    {HYP("{\"learning_rate_multiplier\":-1}"), "method.supervised.hyperparameters.learning_rate_multiplier", "-1"},
    {HYP("{\"learning_rate\":11}"), "method.supervised.hyperparameters.learning_rate", "to 10"},
    {HYP("{\"learning_rate\":0.1,\"learning_rate_multiplier\":2}"), "method.supervised.hyperparameters.learning_rate", "give one of them"},
    {HYP("{\"beta\":0.1}"), "method.supervised.hyperparameters.beta", "not a setting of method supervised"},
    {HYP("{\"max_length\":4096}"), "method.supervised.hyperparameters.max_length", "the model takes 2048"},
    {"{\"type\":\"dpo\",\"dpo\":{\"hyperparameters\":{\"beta\":2.5}}}", "method.dpo.hyperparameters.beta", "to 2, not 2.5"},
    {"{\"type\":\"dpo\",\"dpo\":{\"hyperparameters\":{\"beta\":0}}}", "method.dpo.hyperparameters.beta", "not 0"},
    {SUP("{\"peft\":{\"kind\":\"adalora\"}}"), "method.supervised.peft.kind", "one of full|lora"},
    {SUP("{\"peft\":{\"rank\":0}}"), "method.supervised.peft.rank", "from 1 to 512"},
    {SUP("{\"peft\":{\"kind\":\"full\",\"rank\":4}}"), "method.supervised.peft.rank", "no effect with peft.kind full"},
    {SUP("{\"peft\":{\"targets\":[]}}"), "method.supervised.peft.targets", "not empty"},
    {SUP("{\"peft\":{\"targets\":[\"all\"]}}"), "method.supervised.peft.targets", "there are q_proj"},
    {SUP("{\"peft\":{\"targets\":[3]}}"), "method.supervised.peft.targets", "an integer"},
    {SUP("{\"peft\":{\"targets\":[\"c_attn\"]}}"), "method.supervised.peft.targets", "architecture llama does not have"},
    {SUP("{\"peft\":{\"dropout\":1}}"), "method.supervised.peft.dropout", "to 0.95"},
    {SUP("{\"peft\":{\"rslora\":1}}"), "method.supervised.peft.rslora", "true or false"},
    {SUP("{\"schedule\":{\"kind\":\"step\"}}"), "method.supervised.schedule.kind", "constant|linear|cosine|wsd"},
    {SUP("{\"optimizer\":{\"beta2\":1}}"), "method.supervised.optimizer.beta2", "0.99999"},
    {SUP("{\"train_on\":\"users\"}"), "method.supervised.train_on", "assistant|last_assistant|all"},
    {SUP("{\"train_on\":1}"), "method.supervised.train_on", "a string"},
    {SUP("{\"final\":\"best\"}"), "method.supervised.final", "needs a validation_file"},
    {SUP("{\"early_stopping\":{\"patience\":2}}"), "method.supervised.early_stopping.patience", "needs a validation_file"},
    {SUP("{\"shape\":{}}"), "method.supervised.shape", "not a setting of method supervised"},
    {PRE("{\"shape\":[]}"), "method.pretrain.shape", "an object, not an array"},
    {PRE("{\"shape\":{\"depth\":2}}"), "method.pretrain.shape.depth", "not a setting"},
    {PRE("{\"shape\":{},\"peft\":{\"kind\":\"lora\"}}"), "method.pretrain.peft.kind", "must be full"},
    {PRE("{\"shape\":{},\"peft\":{\"rank\":4}}"), "method.pretrain.peft.rank", "no effect"},
    {PRE("{\"shape\":{\"architecture\":\"bert\"}}"), "method.pretrain.shape.architecture", "llama|gpt2"},
    {PRE("{\"shape\":{\"layers\":0}}"), "method.pretrain.shape.layers", "from 1 to 1024"},
    {PRE("{\"shape\":{\"width\":\"wide\"}}"), "method.pretrain.shape.width", "an integer or \"auto\""},
    {PRE("{\"shape\":{\"heads\":5}}"), "method.pretrain.shape.heads", "width 384 is no multiple of it: take 4"},
    {PRE("{\"shape\":{\"width\":96,\"heads\":32}}"), "method.pretrain.shape.heads", "has 3 values"},
    {PRE("{\"shape\":{\"width\":1024,\"heads\":2}}"), "method.pretrain.shape.heads", "at most 256"},
    {PRE("{\"shape\":{\"heads\":6,\"kv_heads\":4}}"), "method.pretrain.shape.kv_heads", "heads 6 is no multiple"},
    {PRE("{\"shape\":{\"width\":2048,\"heads\":64,\"kv_heads\":2}}"), "method.pretrain.shape.kv_heads", "at least 4"},
    {PRE("{\"shape\":{\"architecture\":\"gpt2\",\"kv_heads\":2}}"), "method.pretrain.shape.kv_heads", "as many as heads, 6"},
    {PRE("{\"shape\":{\"vocab_size\":256}}"), "method.pretrain.shape.vocab_size", "from 257"},
    {PRE("{\"shape\":{\"vocab_size\":258,\"chat_template\":\"chatml\"}}"), "method.pretrain.shape.vocab_size", "alone are 259"},
    {PRE("{\"shape\":{\"chat_template\":\"base\"}}"), "method.pretrain.shape.chat_template", "needs tokenizer \"base\""},
    {SUP("{\"compute\":{\"micro_batch_size\":5},\"hyperparameters\":{\"batch_size\":4}}"), "method.supervised.compute.micro_batch_size", "has 4"},
};

START_TEST(refused)
{
    struct pl_train_spec s;
    struct pl_err err;
    const struct pl_train_facts f = facts(100);
    pl_status st = read_spec(&s, bad[_i].method, &err);
    if (st == PL_OK && s.scratch)
        st = pl_train_shape_resolve(&s, &f, &err);
    if (st == PL_OK)
        st = pl_train_spec_resolve(&s, &f, &err);
    ck_assert_msg(st != PL_OK, "%s", bad[_i].method);
    ck_assert_str_eq(err.param, bad[_i].param);
    ck_assert_msg(strstr(err.msg, bad[_i].message) != NULL, "%s", err.msg);
}
END_TEST

/* Every number of the table is refused just outside its range and taken at its ends; every row is named in the documentation. */
START_TEST(the_table)
{
    size_t n;
    const struct pl_hyper_row *rows = pl_hyper_rows(&n);
    FILE *f = fopen("docs/finetuning.md", "re");
    ck_assert_msg(f != NULL, "docs/finetuning.md");
    char *docs = pl_xcalloc(1, 1 << 20);
    ck_assert(fread(docs, 1, (1 << 20) - 1, f) > 0);
    fclose(f);
    for (size_t i = 0; i < n; i++) {
        char text[300], path[64], in_docs[64];
        const char *method = strchr(rows[i].methods, 's') != NULL ? "supervised" : strchr(rows[i].methods, 'd') != NULL ? "dpo" : "pretrain";
        snprintf(in_docs, sizeof in_docs, "`%s%s%s`", rows[i].group, rows[i].group[0] != '\0' ? "." : "", rows[i].name);
        ck_assert_msg(strstr(docs, in_docs) != NULL, "docs/finetuning.md does not name %s", in_docs);
        ck_assert_msg(strstr(docs, rows[i].help) != NULL, "docs/finetuning.md does not say of %s: %s", in_docs, rows[i].help);
        if (rows[i].kind != 'I' && rows[i].kind != 'R')
            continue;
        const double step = rows[i].kind == 'I' ? 1 : 1e-3 * (fabs(rows[i].min) + 1e-9);
        const double values[] = {rows[i].min, rows[i].max, rows[i].min - step, rows[i].max * 1.1 + 1};
        for (size_t k = 0; k < PL_COUNT_OF(values); k++) {
            struct pl_train_spec s;
            struct pl_err err;
            snprintf(text, sizeof text, "{\"type\":\"%s\",\"%s\":{\"%s\":{\"%s\":%.*g}}}", method, method, rows[i].group, rows[i].name,
                     rows[i].kind == 'I' ? 10 : 17, values[k]);
            const pl_status st = read_spec(&s, text, &err);
            ck_assert_msg((st == PL_OK) == (k < 2), "%s: %s", text, err.msg);
            snprintf(path, sizeof path, "method.%s.%s.%s", method, rows[i].group, rows[i].name);
            if (k >= 2)
                ck_assert_str_eq(err.param, path);
        }
    }
    free(docs);
}
END_TEST

START_TEST(older_form)
{
    struct pl_train_spec s;
    struct pl_err err = {0};
    json_t *old = json_pack("{s:i}", "n_epochs", 99), *method = json_pack("{s:s}", "type", "supervised"), *text = json_string("x");
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, old, &err), PL_EINVAL);
    ck_assert_str_eq(err.param, "hyperparameters.n_epochs");
    ck_assert_int_eq(pl_train_spec_read(&s, method, old, &err), PL_EINVAL);
    ck_assert_str_eq(err.param, "hyperparameters");
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, text, &err), PL_EINVAL);
    ck_assert_str_eq(err.param, "hyperparameters");
    json_decref(old);
    json_decref(method);
    json_decref(text);
}
END_TEST

START_TEST(gpt2_targets)
{
    struct pl_train_spec s;
    struct pl_err err = {0};
    struct pl_train_facts f = facts(100);
    f.model = &gpt2;
    f.n_ctx = 1024;
    ck_assert_int_eq(pl_train_spec_read(&s, NULL, NULL, &err), PL_OK);
    ck_assert_msg(pl_train_spec_resolve(&s, &f, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(s.targets, 1u << PL_TARGET_QKV | 1u << PL_TARGET_O | 1u << PL_TARGET_UP | 1u << PL_TARGET_DOWN);
}
END_TEST

/* What an empty shape becomes, with the other settings that it changes; a job file of it has no base. */
START_TEST(shapes)
{
    static const struct {
        const char *shape;
        uint32_t width, heads, kv_heads, ff;
    } rows[] = {
        {"{}", 384, 6, 6, 1024}, {"{\"architecture\":\"gpt2\",\"width\":768}", 768, 12, 12, 3072}, {"{\"width\":40}", 40, 1, 1, 128},
        {"{\"width\":200,\"heads\":\"auto\"}", 200, 2, 2, 544}, {"{\"width\":576,\"heads\":9,\"kv_heads\":3,\"ff\":1500}", 576, 9, 3, 1500},
    };
    struct pl_train_spec s, again;
    struct pl_err err = {0};
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        char text[200];
        struct pl_train_facts f = facts(100);
        f.text_bytes = 1 << 20;
        f.n_ctx = 512;
        snprintf(text, sizeof text, PRE("{\"shape\":%s}"), rows[i].shape);
        ck_assert_msg(read_spec(&s, text, &err) == PL_OK, "%s", err.msg);
        ck_assert(s.scratch && s.peft == PL_PEFT_FULL);
        ck_assert_msg(pl_train_shape_resolve(&s, &f, &err) == PL_OK, "%s", err.msg);
        ck_assert_int_ne(s.automatic, 0);
        ck_assert_msg(pl_train_spec_resolve(&s, &f, &err) == PL_OK, "%s", err.msg);
        ck_assert_uint_eq(s.shape_width, rows[i].width);
        ck_assert_uint_eq(s.shape_heads, rows[i].heads);
        ck_assert_uint_eq(s.shape_kv_heads, rows[i].kv_heads);
        ck_assert_uint_eq(s.shape_ff, rows[i].ff);
        ck_assert_uint_eq(s.shape_vocab, 4096);
        ck_assert_double_eq(s.learning_rate, 6e-4);
        char *echo = text_of(pl_train_spec_json(&s));
        ck_assert_ptr_null(strstr(echo, "auto"));
        ck_assert_msg(read_spec(&again, echo, &err) == PL_OK, "%s", err.msg);
        char *twice = text_of(pl_train_spec_json(&again));
        ck_assert_str_eq(twice, echo);
        free(twice);
        free(echo);
    }
    char folder[] = "/tmp/parley-job-XXXXXX", path[64];
    ck_assert_ptr_nonnull(mkdtemp(folder));
    struct pl_train_job a = {.id = "ftjob-1", .name = "ft:scratch", .training_file = "/t.jsonl", .spec = again}, b;
    ck_assert_msg(pl_train_job_write(&a, folder, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_train_job_read(&b, folder, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(memcmp(&a.spec, &b.spec, sizeof a.spec), 0);
    ck_assert_ptr_null(b.base);
    pl_train_job_fini(&b);
    snprintf(path, sizeof path, "%s/job.json", folder);
    unlink(path);
    rmdir(folder);
}
END_TEST

START_TEST(job_file)
{
    char folder[] = "/tmp/parley-job-XXXXXX", path[64];
    struct pl_err err = {0};
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/job.json", folder);
    struct pl_train_job a = {.id = "ftjob-1", .name = "ft:m:parley:x:1", .base = "/m.gguf", .training_file = "/t \"1\".jsonl", .created_at = 1700000000}, b;
    const struct pl_train_facts f = facts(123);
    ck_assert_int_eq(pl_train_spec_read(&a.spec, NULL, NULL, &err), PL_OK);
    ck_assert_int_eq(pl_train_spec_resolve(&a.spec, &f, &err), PL_OK);
    a.spec.seed = 42;
    ck_assert_msg(pl_train_job_write(&a, folder, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_train_job_read(&b, folder, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(memcmp(&a.spec, &b.spec, sizeof a.spec), 0);
    ck_assert_str_eq(b.training_file, a.training_file);
    ck_assert_ptr_null(b.validation_file);
    ck_assert_int_eq(b.created_at, a.created_at);
    pl_train_job_fini(&b);
    FILE *out = fopen(path, "we");
    fputs("{\"id\":\"x\",\"name\":\"y\"}", out);
    fclose(out);
    ck_assert_int_eq(pl_train_job_read(&b, folder, &err), PL_EFORMAT);
    ck_assert_str_eq(err.param, "base");
    unlink(path);
    ck_assert_int_eq(pl_train_job_read(&b, folder, &err), PL_ENOENT);
    rmdir(folder);
}
END_TEST

Suite *suite_trainspec(void)
{
    Suite *s = suite_create("trainspec");
    TCase *c = tcase_create("all");
    tcase_add_test(c, automatic);
    tcase_add_test(c, given);
    tcase_add_loop_test(c, refused, 0, PL_COUNT_OF(bad));
    tcase_add_test(c, the_table);
    tcase_add_test(c, older_form);
    tcase_add_test(c, gpt2_targets);
    tcase_add_test(c, shapes);
    tcase_add_test(c, job_file);
    suite_add_tcase(s, c);
    return s;
}
