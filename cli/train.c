/* train: runs the fine-tuning job of a folder. SIGTERM and SIGINT: write a checkpoint and stop; run again to go on.
 * SPDX-License-Identifier: Apache-2.0 */
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "cli/cli.h"
#include "core/base/mem.h"
#include "core/train/train.h"

static volatile sig_atomic_t stop;

static void on_signal(int number)
{
    stop = number;
}

int cli_train(int argc, char **argv)
{
    const char *folder = NULL, *bench = NULL, *model = NULL, *kind = "lora", *precision = "auto", *threads = "0", *device = "cpu", *library = NULL;
    const struct cli_flag flags[] = {{"job", &folder, NULL}, {"bench", &bench, NULL},         {"model", &model, NULL},     {"kind", &kind, NULL},
                                     {"precision", &precision, NULL}, {"threads", &threads, NULL}, {"device", &device, NULL}, {"cuda-library", &library, NULL}};
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    if (bench != NULL)
        return cli_bench_train(&(struct cli_bench_train){bench, model, kind, precision, threads, device, library});
    if (folder == NULL) {
        fputs("parley train: name a job's folder with --job FOLDER (job.json is described in docs/finetuning.md)\n", stderr);
        return 2;
    }
    const struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    struct pl_err err = {0};
    const struct pl_train_options options = {.device = device, .cuda_library = library, .progress_bar = isatty(2), .stop = &stop};
    const pl_train_exit result = pl_train_run(folder, &options, &err);
    if (options.progress_bar)
        fputc('\n', stderr);
    if (result != PL_TRAIN_DONE && result != PL_TRAIN_PAUSED)
        fprintf(stderr, "parley train: %s%s%s\n", err.param, err.param[0] != '\0' ? ": " : "", err.msg);
    return result;
}
