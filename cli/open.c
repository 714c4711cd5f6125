/* open: flags, and a model opened for use.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "core/base/buf.h"

bool cli_flags(int argc, char **argv, const struct cli_flag *flags, size_t n)
{
    for (int i = 0; i < argc; i++) {
        size_t k = 0;
        if (strncmp(argv[i], "--", 2) != 0) {
            if (flags[n - 1].name == NULL) { /* the one free argument */
                *flags[n - 1].text = argv[i];
                continue;
            }
            fprintf(stderr, "parley: unexpected argument %s\n", argv[i]);
            return false;
        }
        while (k < n && (flags[k].name == NULL || strcmp(argv[i] + 2, flags[k].name) != 0))
            k++;
        if (k == n || (flags[k].text != NULL && i + 1 == argc)) {
            fprintf(stderr, k == n ? "parley: no flag %s; see parley help\n" : "parley: %s needs a value\n", argv[i]);
            return false;
        }
        if (flags[k].text != NULL)
            *flags[k].text = argv[++i];
        else
            *flags[k].set = true;
    }
    return true;
}

static pl_status open_file(struct cli_model *m, const char *path, const char *format, struct pl_err *err)
{
    if (format != NULL && strcmp(format, "dummy") == 0)
        return pl_dummy_open(&m->dummy, &m->gguf, path, err);
    if (format != NULL && strcmp(format, "gguf") != 0)
        return pl_fail(err, PL_EINVAL, "--load-format \"%s\": gguf or dummy", format);
    const pl_status st = pl_gguf_open(&m->gguf, path, err);
    return st != PL_OK ? st : pl_tok_load(&m->tok, m->gguf, err);
}

bool cli_open(struct cli_model *m, const char *path, const struct cli_how *how, uint32_t max_tokens, uint32_t max_rows)
{
    struct pl_err err = {0};
    *m = (struct cli_model){0};
    if (path == NULL) {
        fputs("parley: name a GGUF file with --model FILE\n", stderr);
        return false;
    }
    pl_status st = open_file(m, path, how->format, &err);
    if (st == PL_OK)
        st = pl_pool_new(&m->pool, how->threads != NULL ? (unsigned)atoi(how->threads) : 0, &err);
    if (st == PL_OK)
        st = pl_device_open(&m->dev, how->device != NULL ? how->device : "cpu", NULL, m->pool, &err);
    if (st == PL_OK)
        st = pl_model_load(&m->model, m->gguf, m->dev, max_tokens, max_rows, &err);
    if (st != PL_OK) {
        fprintf(stderr, "parley: %s\n", err.msg[0] != '\0' ? err.msg : pl_status_text(st));
        cli_close(m);
        return false;
    }
    return true;
}

void cli_close(struct cli_model *m)
{
    pl_model_free(m->model);
    if (m->dev != NULL)
        m->dev->ops->close(m->dev);
    pl_pool_free(m->pool);
    pl_tok_free(m->tok);
    pl_gguf_close(m->gguf);
    pl_dummy_close(m->dummy);
}

void cli_print_text(const char *key, const char *value)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_add_json_lossy(&b, value, strlen(value));
    printf("\"%s\": \"%s\"", key, pl_buf_str(&b));
    pl_buf_fini(&b);
}
