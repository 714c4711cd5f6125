/* base: the model that a job trains, as far as its data needs it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/base.h"

#include <stdlib.h>
#include <sys/stat.h>

#include "core/base/readfile.h"
#include "core/model/model.h"

static pl_status open_chat(struct pl_train_model *m, const char *path, struct pl_err *err)
{
    struct pl_gguf_str source = {0};
    void *text = NULL;
    pl_status rc = PL_OK;
    if (path != NULL) {
        size_t n = 0;
        rc = pl_readfile(&text, &n, path, PL_CHAT_MAX_TEMPLATE, err);
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
