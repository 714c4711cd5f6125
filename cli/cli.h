/* cli: what the verbs of `parley` share: flags, and a model opened for use.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_CLI_H
#define PL_CLI_CLI_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/pool.h"
#include "core/base/status.h"
#include "core/model/dummy.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/text/tok.h"

struct cli_flag {
    const char *name;  /* without the dashes */
    const char **text; /* takes a value; or */
    bool *set;         /* takes none */
};

/* Reads the flags of a verb; complains on standard error and returns false. */
bool cli_flags(int argc, char **argv, const struct cli_flag *flags, size_t n);

struct cli_model {
    struct pl_dummy *dummy; /* NULL = from a file; without tokenizer */
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_model *model;
};

/* What every verb that runs a model may be told; NULL = the default */
struct cli_how {
    const char *format;  /* "gguf", or "dummy": the path is the name of a shape */
    const char *threads;
    const char *device;  /* as parleyd takes it */
};
/* max_tokens: of a batch. Complains on standard error. */
bool cli_open(struct cli_model *m, const char *path, const struct cli_how *how, uint32_t max_tokens, uint32_t max_rows);
void cli_close(struct cli_model *m);

/* "key": "value" to standard output, whatever bytes value has. */
void cli_print_text(const char *key, const char *value);

int cli_bench(int argc, char **argv);
int cli_chat(int argc, char **argv);
int cli_eval(int argc, char **argv);
int cli_export(int argc, char **argv);
int cli_tokenize(int argc, char **argv);
int cli_train(int argc, char **argv);
struct cli_bench_train {
    const char *size, *model, *kind, *precision, *threads, *device, *cuda_library; /* as the flags say */
};
int cli_bench_train(const struct cli_bench_train *how);

#endif
