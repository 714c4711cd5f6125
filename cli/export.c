/* export: a model with an adapter merged into its weights.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "cli/cli.h"
#include "core/base/mem.h"
#include "core/model/export.h"
#include "core/model/weights.h"

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

static pl_status check_out(const char *model, const char *out, struct pl_err *err)
{
    struct stat a, b;
    if (stat(out, &b) != 0)
        return PL_OK;
    if (S_ISDIR(b.st_mode))
        return pl_fail(err, PL_ENOTSUP, "%.300s is a folder: --out names the GGUF file to write", out);
    if (stat(model, &a) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return pl_fail(err, PL_EINVAL, "%.300s is the model itself: give --out another name", out);
    return PL_OK;
}

int cli_export(int argc, char **argv)
{
    const char *model = NULL, *path = NULL, *out = NULL, *word = "auto";
    const struct cli_flag flags[] = {{"model", &model, NULL}, {"adapter", &path, NULL}, {"out", &out, NULL}, {"type", &word, NULL}};
    int type = 0;
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    if (model == NULL || path == NULL || out == NULL || !type_named(word, &type)) {
        fputs("parley: export needs --model FILE, --adapter PATH and --out FILE; --type is auto, base, f32, f16, bf16 or q8_0\n", stderr);
        return 2;
    }
    struct pl_gguf *g = NULL;
    struct pl_adapter *a = NULL;
    struct pl_spec spec;
    struct pl_err err = {0};
    unsigned arch;
    pl_status rc = check_out(model, out, &err);
    if (rc == PL_OK)
        rc = pl_gguf_open(&g, model, &err);
    if (rc == PL_OK)
        rc = pl_spec_read(&spec, &arch, g, &err);
    if (rc == PL_OK)
        rc = pl_adapter_read(&a, path, &spec, &err);
    if (rc == PL_OK)
        rc = pl_export_gguf(out, g, &spec, a, type, &err);
    if (rc == PL_OK)
        printf("%s: %zu tensors of %zu merged in float32, stored as %s; the rest as it was\n", out, a->n_pairs, pl_gguf_n_tensors(g),
               type == PL_EXPORT_AUTO ? "f32 where the model has f32, else f16" : type == PL_EXPORT_BASE ? "the model has them" : word);
    else
        fprintf(stderr, "parley: %s\n", err.msg);
    pl_adapter_free(a);
    pl_gguf_close(g);
    return rc == PL_OK ? 0 : 1;
}
