/* parley: the engine for a terminal. A thin main: each verb is a file.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "core/base/log.h"
#include "core/base/version.h"

static const char help[] =
    "parley - the engine of parleyd for a terminal; parley VERB --help has one verb alone\n\n"
    "    parley chat --model FILE [--system TEXT] [--temperature X] [--max-tokens N] [--seed N] [--threads N]\n"
    "        talk to a model; /reset forgets, /quit or Ctrl-D leaves\n"
    "    parley bench --model FILE [--prompt 128,512] [--batch 1,16] [--context 0] [--gen 64] [--repeat 3] [--batch-tokens 512]\n"
    "                 [--threads N] [--device NAME] [--kv-type f16|bf16|f32|q8_0|fp8] [--load-format gguf|dummy] [--json]\n"
    "        prefill and decode speed, as a table or as JSON; lists have commas between, contexts are filled first;\n"
    "        --load-format dummy --model SHAPE[:TYPE]: random weights of a well-known shape (" PL_DUMMY_NAMES "), no file needed\n"
    "    parley bench --ops --model FILE [--threads N] [--device NAME] [--json]\n"
    "        each operation of a forward pass beside what the machine can do at most, and the engine's own time\n"
    "    parley export --model FILE --adapter PATH --out FILE [--type auto|f32|f16|bf16|q8_0|base]\n"
    "        a GGUF file of the model with the adapter merged into its weights; other tensors are copied as they are; auto: f32\n"
    "        where the model has f32, else f16\n"
    "    parley export --format safetensors --model FILE [--adapter PATH] --out FOLDER [--type auto|f32|f16|bf16]\n"
    "        a folder that Hugging Face's libraries read, tokenizer and chat template included; auto: the type of the model's matrices\n"
    "        if it is f32 or bf16, else f16\n"
    "    parley eval --model FILE [--adapter PATH] [--data FILE.jsonl] [--train-on assistant|last_assistant|all] [--max-length N]\n"
    "                [--answers N] [--max-tokens 128] [--words 13a|zh|char] [--show FILE] [--general FILE] [--chat-template FILE]\n"
    "                [--precision auto|f32|bf16] [--threads N] [--device cpu|cuda|cuda:N|auto] [--cuda-library FILE] [--json]\n"
    "        loss, perplexity and token accuracy on training or validation data; the loss on a general text; with --answers, the\n"
    "        first N examples answered greedily and compared with their references by BLEU and ROUGE (--show: what was said)\n"
    "    parley tokenize --model FILE [--special] [TEXT]\n"
    "        token ids of TEXT, or of standard input\n"
    "    parley train --job FOLDER [--device cpu|cuda|cuda:N|auto] [--cuda-library FILE]\n"
    "        run the job that FOLDER/job.json describes: fine-tuning, or training a model from nothing (docs/finetuning.md); goes on\n"
    "        where it was stopped, on any device\n"
    "    parley train --bench 4x256x3 --model FILE [--kind lora|full] [--precision auto|f32] [--threads N] [--device NAME]\n"
    "        speed of training steps: sequences x tokens x steps\n"
    "    parley version\n";

static int print_help(int argc, char **argv)
{
    (void)argc, (void)argv;
    fputs(help, stdout);
    return EXIT_SUCCESS;
}

/* The lines about one verb: from each "    parley VERB" to the next verb. */
static int print_verb(const char *verb)
{
    static const char start[] = "    parley ";
    bool wanted = false;
    for (const char *line = help, *end; *line != '\0'; line = end) {
        end = strchr(line, '\n') + 1;
        if (strncmp(line, start, sizeof start - 1) == 0) {
            const char *name = line + sizeof start - 1;
            wanted = strcspn(name, " \n") == strlen(verb) && strncmp(name, verb, strlen(verb)) == 0;
        }
        if (wanted)
            fwrite(line, 1, (size_t)(end - line), stdout);
    }
    return EXIT_SUCCESS;
}

static int print_version(int argc, char **argv)
{
    (void)argc, (void)argv;
    puts("parley " PL_VERSION);
    return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } verbs[] = {{"chat", cli_chat},     {"bench", cli_bench},        {"tokenize", cli_tokenize}, {"export", cli_export}, {"eval", cli_eval},
                 {"train", cli_train}, {"version", print_version},
                 {"help", print_help}, {"--version", print_version}, {"--help", print_help}};
    pl_log_setup(PL_LOG_WARN, false, 2);
    for (size_t i = 0; argc > 1 && i < sizeof verbs / sizeof verbs[0]; i++)
        if (strcmp(argv[1], verbs[i].name) == 0)
            return argc == 3 && strcmp(argv[2], "--help") == 0 ? print_verb(argv[1]) : verbs[i].run(argc - 2, argv + 2);
    if (argc > 1)
        fprintf(stderr, "parley: there is no verb %s; parley help has them all\n", argv[1]);
    else
        fputs(help, stderr);
    return 2;
}
