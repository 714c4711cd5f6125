/* base: the model that a job trains, as far as its data needs it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/base.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "core/model/model.h"

static pl_status read_file(const char *path, char **out, size_t *n, struct pl_err *err)
{
    FILE *f = fopen(path, "re");
    size_t cap = 0;
    *out = NULL;
    *n = 0;
    if (f == NULL)
        return pl_fail_param(err, PL_EIO, "chat_template", "cannot read %s: %s", path, strerror(errno));
    for (size_t got = 1; got > 0 && *n < 1 << 20; *n += got) {
        if (*n + 4096 > cap)
            *out = pl_xrealloc(*out, cap = 2 * cap + 8192);
        got = fread(*out + *n, 1, 4096, f);
    }
    fclose(f);
    return PL_OK;
}

static pl_status open_chat(struct pl_train_model *m, const char *path, struct pl_err *err)
{
    struct pl_gguf_str source = {0};
    char *text = NULL;
    pl_status rc = PL_OK;
    if (path != NULL) {
        size_t n;
        rc = read_file(path, &text, &n, err);
        source = (struct pl_gguf_str){text, n};
    } else if (pl_gguf_string(m->gguf, "tokenizer.chat_template", &source) != PL_OK) {
        return PL_OK;
    }
    if (rc == PL_OK)
        rc = pl_chat_new(&m->chat, source.s, source.n, m->tok, err);
    free(text);
    return rc;
}

pl_status pl_train_model_open(struct pl_train_model *m, const char *path, const char *chat_template, struct pl_err *err)
{
    unsigned arch;
    *m = (struct pl_train_model){0};
    pl_status rc = pl_gguf_open(&m->gguf, path, err);
    if (rc == PL_OK)
        rc = pl_tok_load(&m->tok, m->gguf, err);
    if (rc == PL_OK)
        rc = open_chat(m, chat_template, err);
    if (rc == PL_OK)
        rc = pl_model_check(&m->spec, &arch, &m->n_params, m->gguf, err);
    if (rc != PL_OK)
        pl_train_model_close(m);
    return rc;
}

void pl_train_model_close(struct pl_train_model *m)
{
    pl_chat_free(m->chat);
    pl_tok_free(m->tok);
    pl_gguf_close(m->gguf);
    *m = (struct pl_train_model){0};
}

struct pl_train_base pl_train_model_base(const struct pl_train_model *m, const char *path)
{
    struct stat is;
    return (struct pl_train_base){.path = path, .tok = m->tok, .chat = m->chat, .spec = &m->spec, .n_ctx = m->spec.n_ctx, .n_params = m->n_params,
                                  .n_file = stat(path, &is) == 0 ? (uint64_t)is.st_size : 0};
}
