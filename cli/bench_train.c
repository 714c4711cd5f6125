/* bench_train: the speed of training steps on random tokens, as JSON. Half of each sequence carries loss.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "cli/cli.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/train/objective.h"
#include "core/train/optim.h"
#include "core/train/random.h"

struct bench {
    struct pl_gguf *gguf;
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_net *net;
    struct pl_dataset data;
    struct pl_batch_plan batches;
    struct pl_objective objective;
};

static void make_data(struct pl_dataset *d, uint32_t n, uint32_t length, uint32_t vocab)
{
    uint64_t state = 1;
    *d = (struct pl_dataset){.examples = pl_xcalloc(n, sizeof *d->examples), .n = n};
    for (uint32_t i = 0; i < n; i++) {
        d->examples[i] = (struct pl_example){.ids = pl_xcalloc(length, sizeof(int32_t)), .loss = pl_xcalloc(length, 1), .n = length, .line = i + 1};
        for (uint32_t k = 0; k < length; k++)
            d->examples[i].ids[k] = (int32_t)pl_random_below(&state, vocab);
        memset(d->examples[i].loss + length / 2, 1, length - length / 2);
    }
}

static pl_status prepare(struct bench *b, const struct cli_bench_train *how, uint32_t n, uint32_t length, struct pl_err *err)
{
    const struct pl_net_options o = {.full = strcmp(how->kind, "full") == 0, .rank = 16, .alpha = 32, .seed = 1};
    struct pl_net_options with = o;
    pl_status rc = pl_gguf_open(&b->gguf, how->model, err);
    if (rc == PL_OK)
        rc = pl_pool_new(&b->pool, (unsigned)atoi(how->threads), err);
    if (rc == PL_OK)
        rc = pl_device_open(&b->dev, how->device, how->cuda_library, b->pool, err);
    if (rc != PL_OK)
        return rc;
    pl_pool_pin(b->pool);
    struct pl_spec spec;
    unsigned arch;
    struct pl_target_place place;
    if ((rc = pl_model_check(&spec, &arch, NULL, b->gguf, err)) != PL_OK)
        return rc;
    for (int t = 0; t < PL_TARGET_COUNT; t++)
        with.targets |= pl_target_find(&spec, (pl_target)t, &place) ? 1u << t : 0;
    const struct pl_train_ops *ops = b->dev->ops->train;
    rc = ops->set_precision(b->dev, strcmp(how->precision, "f32") != 0 && ops->has_bf16(b->dev) ? PL_MM_BF16 : PL_MM_F32, err);
    if (rc == PL_OK)
        rc = pl_net_new(&b->net, b->gguf, b->dev, &with, err);
    if (rc != PL_OK)
        return rc;
    make_data(&b->data, n, length, spec.n_vocab);
    rc = pl_batch_init(&b->batches, &b->data, n, length, true, 1, err);
    return rc != PL_OK ? rc : pl_objective_init(&b->objective, b->net, 0, b->batches.capacity, err);
}

static pl_status step(struct bench *b, uint32_t i)
{
    const struct pl_train_spec s = {.learning_rate = 1e-4, .beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-8, .max_grad_norm = 1};
    struct pl_objective_result r;
    double norm;
    pl_status rc = pl_batch_take(&b->batches, i, 0, b->data.n);
    if (rc == PL_OK)
        rc = pl_objective_run(&b->objective, &b->batches, NULL, true, 0, &r);
    return rc != PL_OK ? rc : pl_optim_step(b->net, &s, i, s.learning_rate, &norm);
}

static void release(struct bench *b)
{
    pl_objective_fini(&b->objective);
    pl_batch_fini(&b->batches);
    for (uint32_t i = 0; i < b->data.n; i++) {
        free(b->data.examples[i].ids);
        free(b->data.examples[i].loss);
    }
    free(b->data.examples);
    pl_net_free(b->net);
    if (b->dev != NULL)
        b->dev->ops->close(b->dev);
    pl_pool_free(b->pool);
    pl_gguf_close(b->gguf);
}

int cli_bench_train(const struct cli_bench_train *how)
{
    unsigned n, length, steps;
    struct bench b = {0};
    struct pl_err err = {0};
    struct rusage used;
    if (sscanf(how->size, "%ux%ux%u", &n, &length, &steps) != 3 || n == 0 || length < 2 || length > 1 << 16 || n > 256 || steps == 0 || how->model == NULL) {
        fputs("parley train: --bench takes sequences x tokens x steps (4x256x3), with --model FILE\n", stderr);
        return 2;
    }
    pl_status rc = prepare(&b, how, n, length, &err);
    if (rc == PL_OK)
        rc = step(&b, 0);
    const uint64_t start = pl_now_ns();
    for (unsigned i = 1; rc == PL_OK && i <= steps; i++)
        rc = step(&b, i);
    const double seconds = (double)(pl_now_ns() - start) * 1e-9;
    getrusage(RUSAGE_SELF, &used);
    if (rc == PL_OK)
        printf("{\"tok_s\": %.1f, \"peak_mb\": %.0f}\n", (double)n * length * steps / seconds, (double)used.ru_maxrss / 1024);
    else
        fprintf(stderr, "parley train: %s\n", err.msg[0] != '\0' ? err.msg : pl_status_text(rc));
    release(&b);
    return rc == PL_OK ? 0 : strcmp(err.param, "device") == 0 && rc == PL_EINVAL ? 2 : 1;
}
