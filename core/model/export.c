/* export: writes a model with an adapter merged into its weights as one GGUF file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/export.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/base/mem.h"
#include "core/model/gguf_out.h"

struct merged {
    const struct pl_gguf *g;
    const struct pl_lora_pair **pairs; /* [tensors] NULL = the tensor is copied */
};

/* Finds each pair's tensor, and gives every tensor its type. */
static pl_status plan(struct merged *m, struct pl_gguf_out *o, const struct pl_spec *spec, const struct pl_adapter *a, int type, struct pl_err *err)
{
    for (size_t i = 0; i < a->n_pairs; i++) {
        struct pl_target_place place = {0};
        char name[96];
        PL_ASSERT(pl_target_find(spec, a->pairs[i].target, &place));
        snprintf(name, sizeof name, "blk.%u.%s.weight", a->pairs[i].layer, place.gguf);
        const struct pl_gguf_tensor *t = pl_gguf_tensor(m->g, name);
        if (t == NULL || t->ne[0] != place.cols || pl_gguf_n_rows(t) != place.rows)
            return pl_fail(err, PL_EFORMAT, "tensor %s is missing or of another shape than the hyper-parameters say", name);
        m->pairs[t - pl_gguf_tensor_at(m->g, 0)] = &a->pairs[i];
    }
    for (size_t i = 0; i < pl_gguf_n_tensors(m->g); i++) {
        struct pl_gguf_tensor t = *pl_gguf_tensor_at(m->g, i);
        if (m->pairs[i] != NULL) {
            if (type != PL_EXPORT_BASE)
                t.dtype = type != PL_EXPORT_AUTO ? (pl_dtype)type : t.dtype == PL_F32 ? PL_F32 : PL_F16;
            t.data = NULL;
        }
        pl_gguf_out_tensor(o, &t);
    }
    return PL_OK;
}

void pl_export_row(const struct pl_gguf_tensor *t, const struct pl_lora_pair *p, uint64_t i, float *row)
{
    const size_t cols = t->ne[0];
    pl_dequant_row(t->dtype, (const uint8_t *)t->data + i * pl_dtype_row_bytes(t->dtype, cols), row, cols);
    for (uint32_t r = 0; p != NULL && r < p->rank; r++) {
        const float w = p->scale * p->b[i * p->rank + r], *a = p->a + (size_t)r * cols;
        for (size_t c = 0; c < cols; c++)
            row[c] += w * a[c];
    }
}

static pl_status merged_row(void *arg, size_t tensor, uint64_t i, float *row)
{
    const struct merged *m = arg;
    pl_export_row(pl_gguf_tensor_at(m->g, tensor), m->pairs[tensor], i, row);
    return PL_OK;
}

pl_status pl_export_gguf(const char *path, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int type,
                         struct pl_err *err)
{
    struct merged m = {g, pl_xcalloc(pl_gguf_n_tensors(g) + 1, sizeof *m.pairs)};
    struct pl_gguf_out o;
    pl_gguf_out_init(&o);
    pl_gguf_out_all_keys(&o, g);
    pl_status rc = plan(&m, &o, spec, a, type, err);
    if (rc == PL_OK)
        rc = pl_gguf_out_write(&o, path, merged_row, &m, err);
    pl_gguf_out_fini(&o);
    free(m.pairs);
    return rc;
}
