/* eval: figures of a model on data, as a table or as JSON.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "core/base/mem.h"
#include "core/model/adapter.h"
#include "core/text/model_file.h"
#include "core/train/evaluate.h"
#include "core/train/objective.h"

struct eval {
    /* flags */
    const char *model, *adapter, *data, *train_on, *max_length, *answers, *max_tokens, *words, *show, *general, *template, *precision, *threads, *device,
        *library;
    bool json;
    uint32_t n_max_length, n_answers, n_max_tokens, n_threads;
    int on; /* pl_train_on */
    int low; /* pl_train_precision */
    /* what is open */
    struct pl_model_file base;
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_net *net;
    struct pl_dataset *set;
    /* found */
    struct pl_data_report report;
    pl_train_method method;
    struct pl_scores scores;
};

static bool number_of(const char *flag, const char *text, uint32_t least, uint32_t most, uint32_t *out)
{
    char *end;
    errno = 0;
    const unsigned long v = strtoul(text, &end, 10);
    if (*text >= '0' && *text <= '9' && *end == '\0' && errno == 0 && v >= least && v <= most) {
        *out = (uint32_t)v;
        return true;
    }
    fprintf(stderr, "parley eval: --%s must be a whole number from %u to %u, not %s\n", flag, least, most, text);
    return false;
}

static bool word_of(const char *flag, const char *text, const char *const *words, size_t n, int *out)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(text, words[i]) == 0) {
            *out = (int)i;
            return true;
        }
    fprintf(stderr, "parley eval: --%s must be", flag);
    for (size_t i = 0; i < n; i++)
        fprintf(stderr, "%s %s", i == 0 ? "" : i + 1 < n ? "," : " or", words[i]);
    fprintf(stderr, ", not %s\n", text);
    return false;
}

static bool read_flags(struct eval *e, int argc, char **argv)
{
    static const char *const on[] = {"assistant", "last_assistant", "all"}, *const words[] = {"13a", "zh", "char"}, *const how[] = {"f32", "bf16", "auto"};
    const struct cli_flag flags[] = {{"model", &e->model, NULL},           {"adapter", &e->adapter, NULL},       {"data", &e->data, NULL},
                                     {"train-on", &e->train_on, NULL},     {"max-length", &e->max_length, NULL}, {"answers", &e->answers, NULL},
                                     {"max-tokens", &e->max_tokens, NULL}, {"words", &e->words, NULL},           {"show", &e->show, NULL},
                                     {"general", &e->general, NULL},       {"chat-template", &e->template, NULL}, {"precision", &e->precision, NULL},
                                     {"threads", &e->threads, NULL},       {"device", &e->device, NULL},         {"cuda-library", &e->library, NULL},
                                     {"json", NULL, &e->json}};
    int kind;
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)) || !word_of("train-on", e->train_on, on, PL_COUNT_OF(on), &e->on) ||
        !word_of("words", e->words, words, PL_COUNT_OF(words), &kind) || !word_of("precision", e->precision, how, PL_COUNT_OF(how), &e->low) ||
        !number_of("max-length", e->max_length, 0, 1 << 20, &e->n_max_length) || !number_of("answers", e->answers, 0, 100000, &e->n_answers) ||
        !number_of("max-tokens", e->max_tokens, 1, 1 << 20, &e->n_max_tokens) || !number_of("threads", e->threads, 0, 256, &e->n_threads))
        return false;
    e->scores.words = (pl_words_kind)kind;
    if (e->model == NULL)
        fputs("parley eval: name a GGUF file with --model FILE\n", stderr);
    else if (e->n_answers > 0 && e->data == NULL)
        fputs("parley eval: --answers needs examples: name them with --data FILE\n", stderr);
    else if (e->show != NULL && e->n_answers == 0)
        fputs("parley eval: --show needs --answers N\n", stderr);
    else
        return true;
    return false;
}

static pl_status open_net(struct eval *e, struct pl_err *err)
{
    const struct pl_spec *spec = &e->base.spec;
    struct pl_adapter *adapter = NULL;
    struct pl_net_options o = {.inference = true};
    pl_status rc = PL_OK;
    if (e->n_max_length > spec->n_ctx)
        rc = pl_fail(err, PL_EINVAL, "--max-length is %u but the model takes %u tokens", e->n_max_length, spec->n_ctx);
    if (rc == PL_OK && e->adapter != NULL)
        rc = pl_adapter_read(&adapter, e->adapter, spec, err);
    o.adapter = adapter;
    if (rc == PL_OK)
        rc = pl_pool_new(&e->pool, e->n_threads, err);
    if (rc == PL_OK)
        rc = pl_device_open(&e->dev, e->device, e->library, e->pool, err);
    if (rc == PL_OK) {
        const struct pl_train_ops *t = e->dev->ops->train;
        const bool low = e->low == PL_PRECISION_BF16 || (e->low > PL_PRECISION_BF16 && t->has_bf16(e->dev));
        rc = t->set_precision(e->dev, low ? PL_MM_BF16 : PL_MM_F32, err);
    }
    if (rc == PL_OK)
        rc = pl_net_new(&e->net, e->base.gguf, e->dev, &o, err);
    if (adapter != NULL)
        pl_adapter_free(adapter);
    return rc;
}

/* The form of the lines says which method's rules they are read by. */
static pl_status find_method(struct eval *e, struct pl_err *err)
{
    const struct pl_data_opts o = {.min_examples = 1};
    pl_status rc = pl_data_scan(e->data, &o, NULL, NULL, &e->report, err);
    if (rc == PL_OK && e->report.form == PL_DATA_PREFERENCE)
        rc = pl_fail(err, PL_EINVAL, "%s has preference pairs, which have no one answer: give dialogues, completions or texts", e->data);
    if (rc == PL_OK && e->report.form == PL_DATA_TEXT && e->n_answers > 0)
        rc = pl_fail(err, PL_EINVAL, "%s has texts, which ask nothing: --answers needs dialogues or completions", e->data);
    e->method = e->report.form == PL_DATA_TEXT ? PL_METHOD_PRETRAIN : PL_METHOD_SUPERVISED;
    pl_data_report_fini(&e->report);
    return rc;
}

static pl_status read_data(struct eval *e, pl_train_on on, struct pl_dataset **out, struct pl_err *err)
{
    const struct pl_data_opts o = {.tok = e->base.tok, .chat = e->base.chat, .method = e->method, .train_on = on, .min_examples = 1,
                                   .max_length = e->n_max_length > 0 ? e->n_max_length : e->net->spec.n_ctx};
    pl_data_report_fini(&e->report);
    return pl_dataset_read(out, e->data, &o, &e->report, err);
}

static pl_status measure_loss(struct eval *e, struct pl_err *err)
{
    enum { TOGETHER = 2048 };
    struct pl_batch_plan b;
    struct pl_objective step;
    struct pl_objective_result r;
    uint32_t longest = 1;
    pl_status rc = read_data(e, (pl_train_on)e->on, &e->set, err);
    if (rc != PL_OK)
        return rc;
    for (uint32_t i = 0; i < e->set->n; i++)
        longest = e->set->examples[i].n > longest ? e->set->examples[i].n : longest;
    if ((rc = pl_batch_init(&b, e->set, longest < TOGETHER ? TOGETHER / longest : 1, longest, true, 0, err)) != PL_OK)
        return rc;
    rc = pl_objective_init(&step, e->net, 0, b.capacity, err);
    if (rc == PL_OK) {
        rc = pl_batch_take(&b, UINT32_MAX, 0, b.n_units);
        if (rc == PL_OK)
            rc = pl_objective_run(&step, &b, NULL, false, 0, &r);
        pl_objective_fini(&step);
        if (rc == PL_OK) {
            e->scores.valid_loss = r.loss;
            e->scores.perplexity = exp(r.loss);
            e->scores.valid_accuracy = r.accuracy;
        }
    }
    pl_batch_fini(&b);
    return rc;
}

static pl_status measure_answers(struct eval *e, struct pl_err *err)
{
    const struct pl_answers_opts o = {.gguf = e->base.gguf, .tok = e->base.tok, .adapter = e->adapter, .device = e->device, .cuda_library = e->library,
                                      .n_threads = e->n_threads, .max_tokens = e->n_max_tokens};
    const struct pl_data_opts data = {.tok = e->base.tok, .chat = e->base.chat, .method = e->method, .min_examples = 1};
    FILE *show = e->show != NULL ? fopen(e->show, "we") : NULL;
    pl_status rc = e->show != NULL && show == NULL ? pl_fail(err, PL_EIO, "cannot write %s: %s", e->show, strerror(errno)) : PL_OK;
    if (rc == PL_OK)
        rc = pl_evaluate_answers(&e->scores, &o, e->data, &data, e->base.spec.n_ctx, e->n_answers, show, err);
    if (show != NULL && (ferror(show) + fclose(show)) != 0 && rc == PL_OK)
        rc = pl_fail(err, PL_EIO, "cannot write %s", e->show);
    return rc;
}

static void close_net(struct eval *e)
{
    pl_net_free(e->net);
    if (e->dev != NULL)
        e->dev->ops->close(e->dev);
    pl_pool_free(e->pool);
    e->net = NULL;
    e->dev = NULL;
    e->pool = NULL;
}

static pl_status run(struct eval *e, struct pl_err *err)
{
    pl_status rc = e->data != NULL ? find_method(e, err) : PL_OK;
    if (rc == PL_OK)
        rc = pl_model_file_open(&e->base, e->model, e->template, "chat-template", err);
    if (rc == PL_OK)
        rc = open_net(e, err);
    if (rc == PL_OK && e->data != NULL)
        rc = measure_loss(e, err);
    if (rc == PL_OK)
        rc = pl_evaluate_general(&e->scores.general_loss, e->net, e->base.tok, e->general, err);
    if (rc == PL_OK && e->n_answers > 0) {
        close_net(e); /* there is room for the engine then */
        rc = measure_answers(e, err);
    }
    return rc;
}

static void print_figure(const struct eval *e, const char *key, const char *name, double value)
{
    if (!isfinite(value))
        return;
    if (e->json)
        printf(", \"%s\": %.9g", key, value);
    else
        printf("%-16s %.6g\n", name, value);
}

static void print(const struct eval *e)
{
    static const char *const rouge[PL_ROUGE_COUNT] = {"ROUGE-1", "ROUGE-2", "ROUGE-L"};
    const struct pl_scores *s = &e->scores;
    if (e->json) {
        printf("{");
        cli_print_text("model", e->model);
        if (e->adapter != NULL) {
            printf(", ");
            cli_print_text("adapter", e->adapter);
        }
        if (e->data != NULL)
            printf(", \"examples\": %u, \"cut\": %u, \"tokens\": %llu, \"loss_tokens\": %llu", e->report.n_examples, e->report.n_cut,
                   (unsigned long long)e->report.n_tokens, (unsigned long long)e->report.n_loss_tokens);
    } else if (e->data != NULL) {
        printf("%-16s %u\n%-16s %llu, %llu of them count\n", "examples", e->report.n_examples, "tokens", (unsigned long long)e->report.n_tokens,
               (unsigned long long)e->report.n_loss_tokens);
        if (e->report.n_cut > 0)
            printf("%-16s %u\n", "cut", e->report.n_cut);
    }
    print_figure(e, "loss", "loss", s->valid_loss);
    print_figure(e, "perplexity", "perplexity", s->perplexity);
    print_figure(e, "mean_token_accuracy", "token accuracy", s->valid_accuracy);
    print_figure(e, "general_loss", "general loss", s->general_loss);
    if (e->n_answers > 0) {
        const char *words = pl_words_name(s->words);
        if (e->json)
            printf(", \"answers\": %u, \"answers_cut\": %u, \"bleu_signature\": \"nrefs:1|case:mixed|eff:no|tok:%s|smooth:exp\"", s->n_answers,
                   s->n_cut, words);
        else if (s->n_cut > 0)
            printf("%-16s %u, words: %s; %u to prompts of which the begin was left out\n", "answers", s->n_answers, words, s->n_cut);
        else
            printf("%-16s %u, words: %s\n", "answers", s->n_answers, words);
        print_figure(e, pl_metric_bleu_name(s->words).s, "BLEU", s->bleu);
        for (int k = 0; k < PL_ROUGE_COUNT; k++)
            print_figure(e, pl_metric_rouge_name(s->words, (pl_rouge_kind)k).s, rouge[k], s->rouge[k]);
    }
    if (e->json)
        puts("}");
}

int cli_eval(int argc, char **argv)
{
    struct eval e = {.train_on = "assistant", .max_length = "0", .answers = "0", .max_tokens = "128", .words = "13a", .precision = "auto", .threads = "0",
                     .device = "cpu"};
    struct pl_err err = {0};
    e.scores = pl_scores_none();
    if (!read_flags(&e, argc, argv))
        return 2;
    const pl_status rc = run(&e, &err);
    if (rc == PL_OK)
        print(&e);
    else
        fprintf(stderr, "parley eval: %s\n", err.msg[0] != '\0' ? err.msg : pl_status_text(rc));
    pl_dataset_free(e.set);
    pl_data_report_fini(&e.report);
    close_net(&e);
    pl_model_file_close(&e.base);
    return rc == PL_OK ? 0 : rc == PL_EINVAL && strcmp(err.param, "device") == 0 ? 2 : 1;
}
