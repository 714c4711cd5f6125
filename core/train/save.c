/* save: what training has made, as files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/save.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/gguf_out.h"

static const struct pl_net_param *param_named(const struct pl_net *n, struct pl_gguf_str name)
{
    for (uint32_t i = 0; i < n->n_params; i++)
        if (strlen(n->params[i].name) == name.n && memcmp(n->params[i].name, name.s, name.n) == 0)
            return &n->params[i];
    return NULL;
}

struct trained {
    const struct pl_net_param **params; /* [tensors] NULL = the tensor is copied */
    const float *values;
};

static void trained_row(void *arg, size_t tensor, uint64_t row, float *out)
{
    const struct trained *t = arg;
    const struct pl_net_param *p = t->params[tensor];
    memcpy(out, t->values + p->offset + row * p->cols, p->cols * sizeof *out);
}

/* The keys as in the base's file. */
static pl_status save_gguf(const char *path, const struct pl_net *n, const struct pl_gguf *g, const float *values, struct pl_err *err)
{
    struct trained trained = {pl_xcalloc(pl_gguf_n_tensors(g) + 1, sizeof *trained.params), values};
    struct pl_gguf_out o;
    pl_gguf_out_init(&o);
    pl_gguf_out_all_keys(&o, g);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        struct pl_gguf_tensor t = *pl_gguf_tensor_at(g, i);
        const struct pl_net_param *p = param_named(n, t.name);
        trained.params[i] = p;
        if (p != NULL) {
            t.dtype = p->rows > 1 ? PL_F16 : PL_F32;
            t.data = NULL;
        }
        pl_gguf_out_tensor(&o, &t);
    }
    const pl_status rc = pl_gguf_out_write(&o, path, trained_row, &trained, err);
    pl_gguf_out_fini(&o);
    free(trained.params);
    return rc;
}

pl_status pl_save_model(const char *dir, const struct pl_net *n, const struct pl_gguf *g, const char *base, struct pl_err *err)
{
    const float *w = n->dev->ops->host(n->dev, n->w);
    char *path = NULL;
    if (w == NULL)
        return pl_fail(err, PL_ENOTSUP, "the device's memory cannot be read in place");
    if (n->o.full) {
        if (asprintf(&path, "%s/model.gguf", dir) < 0)
            return pl_fail(err, PL_ENOMEM, "out of memory");
        const pl_status rc = save_gguf(path, n, g, w, err);
        free(path);
        return rc;
    }
    struct pl_adapter a;
    pl_status rc = pl_net_adapter(n, &a, err);
    if (rc != PL_OK)
        return rc;
    const struct pl_adapter_info info = {.base = base, .rank = n->o.rank, .alpha = n->o.alpha, .dropout = n->o.dropout, .targets = n->o.targets};
    rc = pl_adapter_write(dir, &a, &n->spec, &info, err);
    free(a.pairs);
    return rc;
}
