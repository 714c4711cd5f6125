/* export: a model with an adapter merged into its weights, as a GGUF file or a Hugging Face folder.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "cli/cli.h"
#include "core/base/mem.h"
#include "core/model/export.h"
#include "core/model/model.h"
#include "core/text/tok.h"

static bool type_named(const char *word, int *type)
{
    static const struct {
        const char *name;
        int type;
    } types[] = {{"auto", PL_EXPORT_AUTO}, {"base", PL_EXPORT_BASE}, {"f32", PL_F32}, {"f16", PL_F16}, {"bf16", PL_BF16}, {"q8_0", PL_Q8_0}};
    for (size_t i = 0; i < PL_COUNT_OF(types); i++)
        if (strcasecmp(word, types[i].name) == 0) {
            *type = types[i].type;
            return true;
        }
    return false;
}

static pl_status check_file(const char *model, const char *out, struct pl_err *err)
{
    struct stat a, b;
    if (stat(out, &b) != 0)
        return PL_OK;
    if (S_ISDIR(b.st_mode))
        return pl_fail(err, PL_ENOTSUP, "%.300s is a folder: --out names the GGUF file to write (for a folder: --format safetensors)", out);
    if (stat(model, &a) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return pl_fail(err, PL_EINVAL, "%.300s is the model itself: give --out another name", out);
    return PL_OK;
}

static pl_status make_folder(const char *out, struct pl_err *err)
{
    struct stat st;
    if (mkdir(out, 0777) == 0 || (errno == EEXIST && stat(out, &st) == 0 && S_ISDIR(st.st_mode)))
        return PL_OK;
    return pl_fail(err, PL_EIO, "cannot make the folder %.300s: %s", out, errno == EEXIST ? "a file has that name" : strerror(errno));
}

static pl_status export_folder(const char *out, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int *type,
                               struct pl_err *err)
{
    struct pl_tok *tok = NULL;
    pl_status rc = pl_tok_load(&tok, g, err);
    if (rc == PL_OK)
        rc = make_folder(out, err);
    if (rc == PL_OK)
        rc = pl_tok_export(tok, g, out, spec->n_ctx, err);
    if (rc == PL_OK)
        rc = pl_export_folder(out, g, spec, a, type, err);
    pl_tok_free(tok);
    return rc;
}

static const char *type_words(int type)
{
    return type == PL_EXPORT_AUTO   ? "f32 where the model has f32, else f16"
           : type == PL_EXPORT_BASE ? "the model has them"
           : type == PL_F32         ? "f32"
           : type == PL_F16         ? "f16"
           : type == PL_BF16        ? "bf16"
                                    : "q8_0";
}

int cli_export(int argc, char **argv)
{
    const char *model = NULL, *path = NULL, *out = NULL, *word = "auto", *format = "gguf";
    const struct cli_flag flags[] = {{"model", &model, NULL}, {"adapter", &path, NULL}, {"out", &out, NULL}, {"type", &word, NULL}, {"format", &format, NULL}};
    int type = 0;
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    const bool folder = strcmp(format, "safetensors") == 0;
    if (model == NULL || (path == NULL && !folder) || out == NULL || !type_named(word, &type) || (!folder && strcmp(format, "gguf") != 0) ||
        (folder && (type == PL_EXPORT_BASE || type == PL_Q8_0))) {
        fputs("parley: export needs --model FILE, --adapter PATH and --out FILE; --type is auto, base, f32, f16, bf16 or q8_0.\n"
              "With --format safetensors --out is a folder, --adapter may be left out, and --type is auto, f32, f16 or bf16.\n", stderr);
        return 2;
    }
    struct pl_gguf *g = NULL;
    struct pl_adapter *a = NULL;
    struct pl_spec spec;
    struct pl_err err = {0};
    unsigned arch;
    pl_status rc = folder ? PL_OK : check_file(model, out, &err);
    if (rc == PL_OK)
        rc = pl_gguf_open(&g, model, &err);
    if (rc == PL_OK)
        rc = pl_model_check(&spec, &arch, NULL, g, &err);
    if (rc == PL_OK && path != NULL)
        rc = pl_adapter_read(&a, path, &spec, &err);
    if (rc == PL_OK)
        rc = folder ? export_folder(out, g, &spec, a, &type, &err) : pl_export_gguf(out, g, &spec, a, type, &err);
    if (rc != PL_OK)
        fprintf(stderr, "parley: %s\n", err.msg);
    else if (folder)
        printf("%s: a model folder with all tensors as %s, %zu of them merged in float32\n", out, type_words(type), a != NULL ? a->n_pairs : 0);
    else
        printf("%s: %zu tensors of %zu merged in float32, stored as %s; the rest as it was\n", out, a->n_pairs, pl_gguf_n_tensors(g), type_words(type));
    pl_adapter_free(a);
    pl_gguf_close(g);
    return rc == PL_OK ? 0 : 1;
}
