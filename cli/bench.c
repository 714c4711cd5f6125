/* bench: prefill and decode speed of a model, by prompt length, batch and context; with --ops, operation by operation.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/drive.h"
#include "cli/ops.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/order.h"

enum { MAX_ITEMS = 16, MAX_REPEAT = 64 };

struct list {
    uint32_t v[MAX_ITEMS];
    size_t n;
};

struct bench {
    struct cli_model m;
    struct drive d;
    struct list prompts, batches, contexts; /* contexts ascend */
    uint32_t gen, repeat, n_tokens; /* of a pass */
    pl_dtype kv_type;
};

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Numbers with commas between; "0" alone is one item, an empty text none. */
static bool read_list(struct list *l, const char *s, uint32_t most)
{
    l->n = 0;
    for (char *end; *s != '\0'; s = *end == ',' ? end + 1 : end) {
        unsigned long v = strtoul(s, &end, 10);
        if (end == s || v > most || l->n == MAX_ITEMS)
            return false;
        l->v[l->n++] = (uint32_t)v;
    }
    qsort(l->v, l->n, sizeof l->v[0], ascending);
    return true;
}

/* Seconds for a prompt of n tokens; negative when a pass failed. */
static double prefill(struct bench *b, uint32_t n)
{
    uint64_t start = pl_now_ns();
    uint32_t last = (n - 1) % b->n_tokens + 1; /* tokens of the last pass */
    if (!drive_fill(&b->d, 1, 0, n - last) || !drive_step(&b->d, 1, n - last, last, true))
        return -1;
    return (double)(pl_now_ns() - start) * 1e-9;
}

static double decode(struct bench *b, uint32_t batch, uint32_t context)
{
    uint64_t start = pl_now_ns();
    for (uint32_t i = 0; i < b->gen; i++)
        if (!drive_step(&b->d, batch, context + i, 1, true))
            return -1;
    return (double)(pl_now_ns() - start) * 1e-9;
}

/* Median tokens per second of all repetitions, after one that is not counted. batch 0: a prompt of n tokens. */
static double measure(struct bench *b, uint32_t batch, uint32_t n)
{
    double speed[MAX_REPEAT];
    for (uint32_t i = 0; i <= b->repeat; i++) {
        double s = batch == 0 ? prefill(b, n) : decode(b, batch, n);
        if (s <= 0)
            return -1;
        if (i > 0)
            speed[i - 1] = (batch == 0 ? (double)n : (double)b->gen * batch) / s;
    }
    qsort(speed, b->repeat, sizeof speed[0], pl_by_value);
    return speed[b->repeat / 2];
}

static void report_decode(struct bench *b, bool json)
{
    const char *comma = "";
    for (size_t i = 0; i < b->batches.n; i++)
        for (size_t c = 0, filled = 0; c < b->contexts.n; c++) {
            uint32_t batch = b->batches.v[i], context = b->contexts.v[c];
            double v = drive_fill(&b->d, batch, (uint32_t)filled, context) ? measure(b, batch, context) : -1;
            filled = context;
            if (json)
                printf("%s{\"batch\": %u, \"context\": %u, \"tok_s\": %.2f}", comma, batch, context, v);
            else
                printf("| decode, %u streams, context %u | %.0f |\n", batch, context, v);
            comma = ", ";
            fflush(stdout);
        }
}

static void report(struct bench *b, bool json)
{
    const struct pl_spec *spec = pl_model_spec(b->m.model);
    unsigned long long params = pl_model_n_params(b->m.model), bytes = 0;
    for (size_t i = 0; i < pl_gguf_n_tensors(b->m.gguf); i++)
        bytes += pl_gguf_tensor_at(b->m.gguf, i)->n_bytes;
    double copy = 0; /* bytes a second */
    if (b->m.dev->ops->copy_speed != NULL && b->m.dev->ops->copy_speed(b->m.dev, &copy) != PL_OK)
        copy = 0;
    if (json) {
        printf("{");
        cli_print_text("model", spec->name);
        if (copy > 0)
            printf(", \"copy_gb_s\": %.1f", copy * 1e-9);
        printf(", \"params\": %llu, \"head_params\": %llu, \"weight_bytes\": %llu, \"device\": \"%s\", \"threads\": %u, "
               "\"prefill\": [", params, (unsigned long long)spec->n_vocab * spec->n_embd, bytes, b->m.dev->ops->name, pl_pool_size(b->m.pool));
    } else {
        printf("%s, %.1f M parameters, %s, %u threads\n\n| work | tok/s |\n|---|---|\n", spec->name, (double)params * 1e-6,
               b->m.dev->ops->name, pl_pool_size(b->m.pool));
    }
    for (size_t i = 0; i < b->prompts.n; i++) {
        double v = measure(b, 0, b->prompts.v[i]);
        printf(json ? "%s{\"tokens\": %u, \"tok_s\": %.2f}" : "%s| prefill %u | %.0f |\n", json && i > 0 ? ", " : "", b->prompts.v[i], v);
        fflush(stdout);
    }
    if (json)
        printf("], \"decode\": [");
    report_decode(b, json);
    if (json)
        printf("]}\n");
}

static uint32_t last_of(const struct list *l)
{
    return l->n > 0 ? l->v[l->n - 1] : 0;
}

static int run(struct bench *b, const char *model, const struct cli_how *how, bool json)
{
    uint32_t longest = last_of(&b->contexts) + b->gen;
    longest = longest > last_of(&b->prompts) ? longest : last_of(&b->prompts);
    if (!cli_open(&b->m, model, how, b->n_tokens, DRIVE_SEQS))
        return 1;
    bool ok = drive_open(&b->d, &b->m, b->n_tokens, b->batches.n > 0 ? last_of(&b->batches) : 1, longest, b->kv_type);
    if (ok)
        report(b, json);
    drive_close(&b->d);
    cli_close(&b->m);
    return ok ? 0 : 1;
}

int cli_bench(int argc, char **argv)
{
    const char *model = NULL, *prompt = "128,512", *batch = "1,16", *context = "0", *gen = "64", *repeat = "3", *tokens = NULL;
    struct cli_how how = {0};
    const char *kv_type = "f16";
    bool json = false, ops = false;
    const struct cli_flag flags[] = {{"model", &model, NULL},   {"prompt", &prompt, NULL},   {"batch", &batch, NULL},
                                     {"context", &context, NULL}, {"gen", &gen, NULL},       {"repeat", &repeat, NULL},
                                     {"threads", &how.threads, NULL}, {"device", &how.device, NULL}, {"json", NULL, &json}, {"ops", NULL, &ops},
                                     {"load-format", &how.format, NULL},
                                     {"batch-tokens", &tokens, NULL}, {"kv-type", &kv_type, NULL}};
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    if (ops)
        return cli_ops(model, &how, json);
    struct bench *b = pl_xcalloc(1, sizeof *b);
    struct list n, times;
    int status = 2;
    if (read_list(&b->prompts, prompt, 1 << 20) && read_list(&b->batches, batch, DRIVE_SEQS) && read_list(&b->contexts, context, 1 << 20) &&
        read_list(&n, gen, 1 << 20) && n.n == 1 && n.v[0] > 0 && read_list(&times, repeat, MAX_REPEAT) && times.n == 1 && times.v[0] > 0 &&
        b->contexts.n > 0 && b->prompts.n + b->batches.n > 0 && (b->batches.n == 0 || b->batches.v[0] > 0) &&
        (b->prompts.n == 0 || b->prompts.v[0] > 0)) {
        if (!pl_kv_type(kv_type, &b->kv_type)) {
            fprintf(stderr, "parley bench: --kv-type \"%s\": " PL_KV_TYPES "\n", kv_type);
            free(b);
            return 2;
        }
        struct list pass = {.v = {DRIVE_TOKENS}, .n = 1};
        if (tokens != NULL && (!read_list(&pass, tokens, DRIVE_MOST_TOKENS) || pass.n != 1 || pass.v[0] < DRIVE_SEQS)) {
            fprintf(stderr, "parley bench: --batch-tokens takes a number from %d to %d\n", DRIVE_SEQS, DRIVE_MOST_TOKENS);
            free(b);
            return 2;
        }
        b->n_tokens = pass.v[0];
        b->gen = n.v[0];
        b->repeat = times.v[0];
        status = run(b, model, &how, json);
    } else {
        fprintf(stderr, "parley bench: --prompt, --batch (up to %d) and --context take at most %d numbers with commas between, "
                "--gen and --repeat (up to %d) one\n", DRIVE_SEQS, MAX_ITEMS, MAX_REPEAT);
    }
    free(b);
    return status;
}
