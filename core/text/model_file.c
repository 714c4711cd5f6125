/* model_file: what can be known of a model without its weights.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/model_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/base/readfile.h"
#include "core/model/model.h"

static pl_status open_chat(struct pl_model_file *f, const char *template, const char *setting, struct pl_err *err)
{
    struct pl_gguf_str own;
    struct pl_err why = {0};
    if (template != NULL && template[0] != '\0') {
        void *text = NULL;
        size_t n = 0;
        pl_status rc = pl_readfile(&text, &n, template, PL_CHAT_MAX_TEMPLATE, &why);
        rc = rc == PL_OK ? pl_chat_new(&f->chat, text, n, f->tok, err) : pl_fail_param(err, PL_EINVAL, setting, "%s", why.msg);
        free(text);
        return rc;
    }
    if (pl_gguf_string(f->gguf, "tokenizer.chat_template", &own) != PL_OK)
        return PL_OK;
    const pl_status rc = pl_chat_new(&f->chat, own.s, own.n, f->tok, &why);
    return rc == PL_OK ? rc : pl_fail(err, rc, "the model's chat template cannot be used: %s (give another one as %s)", why.msg, setting);
}

pl_status pl_model_file_open(struct pl_model_file *f, const char *path, const char *template, const char *setting, struct pl_err *err)
{
    struct stat st;
    unsigned arch;
    *f = (struct pl_model_file){0};
    pl_status rc = pl_gguf_open(&f->gguf, path, err);
    if (rc == PL_OK && stat(path, &st) != 0)
        rc = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    if (rc == PL_OK)
        rc = pl_model_check(&f->spec, &arch, &f->n_params, f->gguf, err);
    if (rc == PL_OK)
        rc = pl_tok_load(&f->tok, f->gguf, err);
    if (rc == PL_OK)
        rc = open_chat(f, template, setting, err);
    if (rc == PL_OK && pl_tok_count(f->tok) > (int64_t)f->spec.n_vocab)
        rc = pl_fail(err, PL_EFORMAT, "the tokenizer has %d tokens but the model only %u rows for them: the file is inconsistent",
                     pl_tok_count(f->tok), f->spec.n_vocab);
    if (rc == PL_OK && !pl_gguf_is_whole(f->gguf))
        rc = pl_fail(err, PL_EIO, "%.300s was cut off while it was read: try again when it is complete", path);
    if (rc != PL_OK) {
        pl_model_file_close(f);
        return rc;
    }
    f->n_bytes = (uint64_t)st.st_size;
    f->created = st.st_mtim.tv_sec;
    return PL_OK;
}

void pl_model_file_close(struct pl_model_file *f)
{
    pl_chat_free(f->chat);
    pl_tok_free(f->tok);
    pl_gguf_close(f->gguf);
    *f = (struct pl_model_file){0};
}
