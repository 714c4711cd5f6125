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

/* Values come from the device by the window. */
enum { WINDOW = 1 << 20 };
struct trained {
    const struct pl_net *net;
    const struct pl_net_param **params; /* [tensors] NULL = the tensor is copied */
    float *window;                      /* [cap] values of the net from `at` on, n of them */
    size_t at, n, cap;
};

static pl_status trained_row(void *arg, size_t tensor, uint64_t row, float *out)
{
    struct trained *t = arg;
    const struct pl_net_param *p = t->params[tensor];
    const size_t from = p->offset + row * p->cols;
    if (from < t->at || from + p->cols > t->at + t->n) {
        const size_t left = t->net->n_trained - from;
        t->at = from;
        t->n = 0;
        const pl_status rc = t->net->dev->ops->get(t->net->dev, t->net->w, from, t->window, left < t->cap ? left : t->cap);
        if (rc != PL_OK)
            return rc;
        t->n = left < t->cap ? left : t->cap;
    }
    memcpy(out, t->window + (from - t->at), p->cols * sizeof *out);
    return PL_OK;
}

/* The keys as in the base's file. */
static pl_status save_gguf(const char *path, const struct pl_net *n, const struct pl_gguf *g, struct pl_err *err)
{
    struct trained trained = {.net = n, .params = pl_xcalloc(pl_gguf_n_tensors(g) + 1, sizeof *trained.params), .cap = WINDOW};
    struct pl_gguf_out o;
    pl_gguf_out_init(&o);
    pl_gguf_out_all_keys(&o, g);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++) {
        struct pl_gguf_tensor t = *pl_gguf_tensor_at(g, i);
        const struct pl_net_param *p = param_named(n, t.name);
        trained.params[i] = p;
        if (p != NULL) {
            trained.cap = p->cols > trained.cap ? p->cols : trained.cap;
            t.dtype = p->rows > 1 ? PL_F16 : PL_F32;
            t.data = NULL;
        }
        pl_gguf_out_tensor(&o, &t);
    }
    trained.window = malloc(trained.cap * sizeof *trained.window);
    const pl_status rc = trained.window == NULL ? pl_fail(err, PL_ENOMEM, "no memory to save the model")
                                                : pl_gguf_out_write(&o, path, trained_row, &trained, err);
    pl_gguf_out_fini(&o);
    free(trained.window);
    free(trained.params);
    return rc;
}

pl_status pl_save_model(const char *dir, const struct pl_net *n, const struct pl_gguf *g, const char *base, struct pl_err *err)
{
    char *path = NULL;
    if (n->o.full) {
        if (asprintf(&path, "%s/model.gguf", dir) < 0)
            return pl_fail(err, PL_ENOMEM, "out of memory");
        const pl_status rc = save_gguf(path, n, g, err);
        free(path);
        return rc;
    }
    struct pl_adapter a;
    float *values;
    pl_status rc = pl_net_adapter(n, &a, &values, err);
    if (rc != PL_OK)
        return rc;
    const struct pl_adapter_info info = {.base = base, .rank = n->o.rank, .alpha = n->o.alpha, .dropout = n->o.dropout, .targets = n->o.targets};
    rc = pl_adapter_write(dir, &a, &n->spec, &info, err);
    free(a.pairs);
    free(values);
    return rc;
}
