/* bench: prefill and decode speed of a model, by prompt length, batch and context.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"

enum { MAX_BATCH = 256, CHUNK = 512, MAX_ITEMS = 16 };

struct bench {
    struct cli_model m;
    struct pl_kvdev *kv;
    uint32_t pages_per_seq;
    uint32_t n_seqs;
    int32_t tokens[CHUNK];
    uint32_t pos[CHUNK], slot[CHUNK], rows[CHUNK];
    uint32_t q_start[MAX_BATCH + 1], ctx[MAX_BATCH], page_start[MAX_BATCH + 1];
    uint32_t *pages;
};

/* n tokens of each of n_seqs sequences from position `at`; logits for each sequence's last one. */
static bool step(struct bench *b, uint32_t n_seqs, uint32_t at, uint32_t n, bool logits)
{
    uint32_t t = 0, vocab = pl_model_spec(b->m.model)->n_vocab, n_rows = 0;
    const float *out;
    for (uint32_t s = 0; s < n_seqs; s++) {
        b->q_start[s] = t;
        b->page_start[s] = s * b->pages_per_seq;
        b->ctx[s] = at + n;
        for (uint32_t i = 0; i < n; i++, t++) {
            b->tokens[t] = (int32_t)((t * 7919u + at * 104729u + s) % vocab);
            b->pos[t] = at + i;
            b->slot[t] = (s * b->pages_per_seq) * PL_KV_PAGE + at + i;
        }
        if (logits)
            b->rows[n_rows++] = t - 1;
    }
    b->q_start[n_seqs] = t;
    b->page_start[n_seqs] = n_seqs * b->pages_per_seq;
    const struct pl_batch batch = {t, n_seqs, n_rows, b->tokens, b->pos, b->slot, b->q_start, b->ctx, b->page_start, b->pages, b->rows, NULL};
    return pl_model_forward(b->m.model, b->kv, &batch, &out) == PL_OK;
}

/* Seconds for a prompt of n tokens, in chunks as the engine cuts it. */
static double prefill(struct bench *b, uint32_t n)
{
    uint64_t start = pl_now_ns();
    for (uint32_t at = 0; at < n; at += CHUNK) {
        uint32_t take = n - at < CHUNK ? n - at : CHUNK;
        if (!step(b, 1, at, take, at + take == n))
            return -1;
    }
    return (double)(pl_now_ns() - start) * 1e-9;
}

static double decode(struct bench *b, uint32_t batch, uint32_t context, uint32_t n)
{
    uint64_t start = pl_now_ns();
    for (uint32_t i = 0; i < n; i++)
        if (!step(b, batch, context + i, 1, true))
            return -1;
    return (double)(pl_now_ns() - start) * 1e-9;
}

static size_t numbers(const char *s, uint32_t *v)
{
    size_t n = 0;
    for (char *end; *s != '\0' && n < MAX_ITEMS; s = *end == ',' ? end + 1 : end) {
        v[n++] = (uint32_t)strtoul(s, &end, 10);
        if (end == s || v[n - 1] > 1 << 20)
            return 0;
    }
    return n;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median tokens per second of `repeat` runs, after one that is not counted. */
static double measure(struct bench *b, bool is_prefill, uint32_t n, uint32_t batch, uint32_t context, uint32_t repeat)
{
    double speed[64];
    for (uint32_t i = 0; i <= repeat; i++) {
        double s = is_prefill ? prefill(b, n) : decode(b, batch, context, n);
        if (s <= 0)
            return -1;
        if (i > 0)
            speed[i - 1] = (double)n * (is_prefill ? 1 : batch) / s;
    }
    qsort(speed, repeat, sizeof speed[0], by_value);
    return speed[repeat / 2];
}

static void report(struct bench *b, const uint32_t *prompts, size_t n_prompts, const uint32_t *batches, size_t n_batches, uint32_t context,
                   uint32_t gen, uint32_t repeat, bool json)
{
    const struct pl_spec *spec = pl_model_spec(b->m.model);
    if (json)
        printf("{\"model\": \"%s\", \"params\": %llu, \"device\": \"%s\", \"threads\": %u, \"prefill\": [", spec->name,
               (unsigned long long)pl_model_n_params(b->m.model), b->m.dev->ops->name, pl_pool_size(b->m.pool));
    else
        printf("%s, %.1f M parameters, %s, %u threads\n\n| work | tok/s |\n|---|---|\n", spec->name, (double)pl_model_n_params(b->m.model) * 1e-6,
               b->m.dev->ops->name, pl_pool_size(b->m.pool));
    for (size_t i = 0; i < n_prompts; i++) {
        double v = measure(b, true, prompts[i], 1, 0, repeat);
        printf(json ? "%s{\"tokens\": %u, \"tok_s\": %.2f}" : "%s| prefill %u | %.0f |\n", json && i > 0 ? ", " : "", prompts[i], v);
        fflush(stdout);
    }
    if (json)
        printf("], \"decode\": [");
    for (size_t i = 0; i < n_batches; i++) {
        double v = measure(b, false, gen, batches[i], context, repeat);
        printf(json ? "%s{\"batch\": %u, \"context\": %u, \"tok_s\": %.2f}" : "%s| decode, %u streams, context %u | %.0f |\n",
               json && i > 0 ? ", " : "", batches[i], context, v);
        fflush(stdout);
    }
    if (json)
        printf("]}\n");
}

int cli_bench(int argc, char **argv)
{
    const char *model = NULL, *prompt = "128,512", *batch = "1,16", *context = "0", *gen = "64", *repeat = "3", *threads = NULL, *isa = NULL;
    bool json = false;
    const struct cli_flag flags[] = {{"model", &model, NULL},   {"prompt", &prompt, NULL},   {"batch", &batch, NULL},
                                     {"context", &context, NULL}, {"gen", &gen, NULL},       {"repeat", &repeat, NULL},
                                     {"threads", &threads, NULL}, {"isa", &isa, NULL},       {"json", NULL, &json}};
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    uint32_t prompts[MAX_ITEMS], batches[MAX_ITEMS], most = 1, longest = 0;
    size_t n_prompts = numbers(prompt, prompts), n_batches = numbers(batch, batches);
    uint32_t at = (uint32_t)atoi(context), n = (uint32_t)atoi(gen), times = (uint32_t)atoi(repeat);
    for (size_t i = 0; i < n_batches; i++)
        most = batches[i] > most ? batches[i] : most;
    for (size_t i = 0; i < n_prompts; i++)
        longest = prompts[i] > longest ? prompts[i] : longest;
    longest = longest > at + n ? longest : at + n;
    if ((n_prompts == 0 && n_batches == 0) || most > MAX_BATCH || n < 1 || times < 1 || times > 64) {
        fputs("parley bench: --prompt and --batch take numbers with commas between (batches up to 256), --gen and --repeat one number\n", stderr);
        return 2;
    }
    struct bench *b = pl_xcalloc(1, sizeof *b);
    if (!cli_open(&b->m, model, threads, isa, CHUNK, MAX_BATCH))
        return 1;
    b->m.dev->ops->attach(b->m.dev);
    b->pages_per_seq = (longest + PL_KV_PAGE - 1) / PL_KV_PAGE;
    const struct pl_kv_shape shape = pl_model_kv_shape(b->m.model, PL_KV_PAGE, most * b->pages_per_seq, PL_F16);
    int status = 1;
    if (longest > pl_model_spec(b->m.model)->n_ctx || b->m.dev->ops->kv_new(b->m.dev, &shape, &b->kv) != PL_OK) {
        fputs("parley bench: the context is longer than the model's, or there is no memory for it\n", stderr);
        goto out;
    }
    b->pages = pl_xmalloc(shape.n_pages * sizeof *b->pages);
    for (uint32_t i = 0; i < shape.n_pages; i++)
        b->pages[i] = i;
    report(b, prompts, n_prompts, batches, n_batches, at, n, times, json);
    status = 0;
out:
    b->m.dev->ops->kv_free(b->m.dev, b->kv);
    cli_close(&b->m);
    free(b->pages);
    free(b);
    return status;
}
