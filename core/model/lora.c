/* lora: the adapters that a model holds on its device, by slot, and which rows of a batch each changes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/lora.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/weights.h"

void pl_loras_init(struct pl_loras *ls, uint32_t max_tokens)
{
    *ls = (struct pl_loras){.row_list = pl_xcalloc(max_tokens, sizeof *ls->row_list),
                            .plus_rows = pl_xcalloc(max_tokens, sizeof *ls->plus_rows),
                            .max_tokens = max_tokens};
}

static void free_set(struct pl_lora_set *s, struct pl_device *dev)
{
    for (uint32_t i = 0; s != NULL && i < s->n; i++)
        dev->ops->lora_free(dev, s->products[i]);
    if (s != NULL)
        pl_adapter_wire_fini(&s->wire);
    free(s);
}

void pl_loras_fini(struct pl_loras *ls, struct pl_device *dev)
{
    for (uint32_t i = 0; i < ls->n_slots; i++)
        free_set(ls->slots[i], dev);
    if (ls->plus.values.buf != NULL)
        dev->ops->buf_free(dev, ls->plus.values.buf);
    free(ls->plus_rows);
    free(ls->slots);
    free(ls->groups);
    free(ls->uses);
    free(ls->row_list);
    *ls = (struct pl_loras){0};
}

/* ---- slots --------------------------------------------------------------------------------------------------------- */

static void grow(struct pl_loras *ls, uint32_t n)
{
    if (n <= ls->n_slots)
        return;
    ls->slots = pl_xrealloc(ls->slots, n * sizeof *ls->slots);
    memset(ls->slots + ls->n_slots, 0, (n - ls->n_slots) * sizeof *ls->slots);
    ls->groups = pl_xrealloc(ls->groups, n * sizeof *ls->groups);
    ls->uses = pl_xrealloc(ls->uses, n * sizeof *ls->uses);
    ls->n_slots = n;
}

static pl_status make_plus(struct pl_model *m, struct pl_err *err)
{
    struct pl_loras *ls = &m->loras;
    const uint32_t cols = 2 * m->own.n_ff;
    struct pl_dbuf *buf;
    if (!m->spec.gated || ls->plus.values.buf != NULL)
        return PL_OK;
    const pl_status rc = m->dev->ops->buf_new(m->dev, (size_t)ls->max_tokens * cols, &buf);
    if (rc == PL_ENOMEM)
        return pl_fail_param(err, rc, "batch-tokens", "no memory for what adapters add to batches of %u tokens, %zu MiB: lower --batch-tokens, or set "
                             "--max-adapters 0", ls->max_tokens, (size_t)ls->max_tokens * cols * sizeof(float) >> 20);
    if (rc != PL_OK)
        return pl_fail(err, rc, "making room for what adapters add: %s", pl_status_text(rc));
    ls->plus = (struct pl_plus){{buf, 0, ls->max_tokens, cols, cols}, ls->plus_rows};
    return PL_OK;
}

pl_status pl_model_reserve_adapters(struct pl_model *m, struct pl_err *err)
{
    return m->dev->ops->memory != NULL ? make_plus(m, err) : PL_OK;
}

/* What one product's device object is made of. */
struct sources {
    struct pl_lora_src parts[PL_TARGET_COUNT * PL_PART_RANGES];
    float *columns[PL_TARGET_COUNT]; /* copies, of those that are cut by inputs */
    size_t n, n_columns;
    uint32_t cols;
};

/* Columns [in.first, + in.n) of a[rank, n_cols]. NULL without memory. */
static float *take_columns(const struct pl_lora_pair *p, uint32_t n_cols, struct pl_range in)
{
    float *columns = malloc((size_t)p->rank * in.n * sizeof *columns);
    for (uint32_t r = 0; columns != NULL && r < p->rank; r++)
        memcpy(columns + (size_t)r * in.n, p->a + (size_t)r * n_cols + in.first, in.n * sizeof *columns);
    return columns;
}

/* What this rank has of a pair: the model's weight is cut in the same way. */
static pl_status add_pair(struct sources *s, const struct pl_model *m, const struct pl_lora_pair *p, const struct pl_target_place *whole)
{
    struct pl_target_place place;
    struct pl_range out[PL_PART_RANGES];
    const pl_cut cut = pl_cut_of(m->arch_bit, whole->gguf);
    const size_t n = pl_cut_outputs(cut, &m->spec, &m->part, whole->rows, out);
    const struct pl_range in = pl_cut_inputs(cut, &m->part, whole->cols);
    PL_ASSERT(pl_target_find(&m->own, p->target, &place));
    const float *a = p->a;
    if (in.n != whole->cols) {
        a = s->columns[s->n_columns] = take_columns(p, whole->cols, in);
        if (a == NULL)
            return PL_ENOMEM;
        s->n_columns++;
    }
    uint32_t first = place.first;
    for (size_t i = 0; i < n; first += out[i++].n)
        s->parts[s->n++] = (struct pl_lora_src){a, p->b + (size_t)out[i].first * p->rank, p->rank, first, out[i].n, p->scale};
    s->cols = in.n;
    return PL_OK;
}

/* The pairs of one layer that change one product, as one device object. */
static pl_status add_product(const struct pl_model *m, struct pl_lora_set *s, const struct pl_adapter *a, uint32_t layer, pl_product product,
                             struct pl_err *err)
{
    struct sources src = {.n = 0};
    pl_status rc = PL_OK;
    for (size_t i = 0; i < a->n_pairs && rc == PL_OK; i++) {
        const struct pl_lora_pair *p = &a->pairs[i];
        struct pl_target_place place;
        if (p->layer == layer && pl_target_find(&m->spec, p->target, &place) && place.product == product)
            rc = add_pair(&src, m, p, &place);
    }
    if (rc != PL_OK)
        pl_err_set(err, rc, "", "no memory for an adapter");
    else if (src.n > 0)
        rc = m->dev->ops->lora_new(m->dev, src.cols, src.parts, src.n, &s->products[layer * PL_PRODUCT_COUNT + product], err);
    for (size_t i = 0; i < src.n_columns; i++)
        free(src.columns[i]);
    return rc;
}

pl_status pl_model_adapter_make(struct pl_lora_set **out, const struct pl_model *m, const struct pl_adapter *a, struct pl_err *err)
{
    const uint32_t n = m->spec.n_layers * PL_PRODUCT_COUNT;
    struct pl_lora_set *s = calloc(1, sizeof *s + n * sizeof s->products[0]);
    if (s == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for an adapter");
    s->n = n;
    pl_status rc = PL_OK;
    for (uint32_t i = 0; i < n && rc == PL_OK; i++)
        rc = add_product(m, s, a, i / PL_PRODUCT_COUNT, (pl_product)(i % PL_PRODUCT_COUNT), err);
    if (rc == PL_OK && m->part.size > 1 && m->part.rank == 0)
        rc = pl_adapter_pack(&s->wire, a, &m->spec, err);
    if (rc == PL_OK)
        *out = s;
    else
        free_set(s, m->dev);
    return rc;
}

const struct pl_adapter_wire *pl_model_adapter_wire(const struct pl_lora_set *s)
{
    return &s->wire;
}

void pl_model_adapter_free(const struct pl_model *m, struct pl_lora_set *s)
{
    free_set(s, m->dev);
}

pl_status pl_model_adapter_add(struct pl_model *m, uint32_t slot, struct pl_lora_set *s, struct pl_err *err)
{
    PL_ASSERT(slot > 0);
    grow(&m->loras, slot + 1);
    PL_ASSERT(m->loras.slots[slot] == NULL);
    const pl_status rc = make_plus(m, err);
    if (rc != PL_OK)
        return rc;
    m->loras.slots[slot] = s;
    pl_adapter_wire_fini(&s->wire);
    return PL_OK;
}

void pl_model_adapter_remove(struct pl_model *m, uint32_t slot)
{
    PL_ASSERT(slot > 0 && slot < m->loras.n_slots);
    free_set(m->loras.slots[slot], m->dev);
    m->loras.slots[slot] = NULL;
}

/* ---- a pass -------------------------------------------------------------------------------------------------------- */

static struct pl_lora_group *group_of(struct pl_loras *ls, uint32_t slot)
{
    for (uint32_t i = 0; i < ls->n_groups; i++)
        if (ls->groups[i].slot == slot)
            return &ls->groups[i];
    ls->groups[ls->n_groups] = (struct pl_lora_group){.slot = slot};
    return &ls->groups[ls->n_groups++];
}

/* Rows of sequence s: its tokens, or which of the batch's rows are its. */
static void rows_of(const struct pl_batch *b, uint32_t s, bool narrow, uint32_t *next, uint32_t *first, uint32_t *n)
{
    *first = narrow ? *next : b->q_start[s];
    *n = b->q_start[s + 1] - b->q_start[s];
    if (!narrow)
        return;
    while (*next < b->n_rows && b->rows[*next] < b->q_start[s + 1])
        ++*next;
    *n = *next - *first;
}

/* Two rounds over the sequences: how many rows each group has, then which. */
static void find_groups(struct pl_loras *ls, const struct pl_batch *b, bool narrow)
{
    uint32_t first, n, next = 0, total = 0;
    ls->n_groups = 0;
    for (uint32_t s = 0; s < b->n_seqs; s++) {
        rows_of(b, s, narrow, &next, &first, &n);
        if (b->adapter[s] != 0 && n > 0)
            group_of(ls, b->adapter[s])->n += n;
    }
    for (uint32_t i = 0; i < ls->n_groups; i++) {
        ls->groups[i].first = total;
        total += ls->groups[i].n;
        ls->groups[i].n = 0;
    }
    next = 0;
    for (uint32_t s = 0; s < b->n_seqs; s++) {
        rows_of(b, s, narrow, &next, &first, &n);
        if (b->adapter[s] == 0 || n == 0)
            continue;
        struct pl_lora_group *g = group_of(ls, b->adapter[s]);
        for (uint32_t i = 0; i < n; i++)
            ls->row_list[g->first + g->n++] = first + i;
    }
}

pl_status pl_loras_plan(struct pl_loras *ls, const struct pl_batch *b)
{
    ls->n_groups = 0;
    if (b->adapter == NULL)
        return PL_OK;
    for (uint32_t s = 0; s < b->n_seqs; s++)
        if (b->adapter[s] != 0 && (b->adapter[s] >= ls->n_slots || ls->slots[b->adapter[s]] == NULL))
            return PL_EINVAL;
    find_groups(ls, b, false);
    return PL_OK;
}

void pl_loras_narrow(struct pl_loras *ls, const struct pl_batch *b)
{
    if (ls->n_groups > 0)
        find_groups(ls, b, true);
}

static size_t find_uses(struct pl_loras *ls, uint32_t layer, pl_product product)
{
    size_t n = 0;
    for (uint32_t i = 0; i < ls->n_groups; i++) {
        const struct pl_lora_group *g = &ls->groups[i];
        const struct pl_lora *l = ls->slots[g->slot]->products[layer * PL_PRODUCT_COUNT + product];
        if (l != NULL)
            ls->uses[n++] = (struct pl_lora_use){l, ls->row_list + g->first, g->n};
    }
    return n;
}

pl_status pl_loras_apply(struct pl_loras *ls, struct pl_device *dev, uint32_t layer, pl_product product, pl_view out, pl_view x)
{
    const size_t n = find_uses(ls, layer, product);
    return n > 0 ? dev->ops->lora(dev, out, x, ls->uses, n, true) : PL_OK;
}

pl_status pl_loras_plus(struct pl_loras *ls, struct pl_device *dev, uint32_t layer, pl_view x, const struct pl_plus **plus)
{
    const size_t n = find_uses(ls, layer, PL_PRODUCT_FF_IN);
    *plus = n > 0 ? &ls->plus : NULL;
    if (n == 0)
        return PL_OK;
    memset(ls->plus_rows, 0, x.rows * sizeof *ls->plus_rows);
    for (size_t u = 0; u < n; u++)
        for (uint32_t i = 0; i < ls->uses[u].n_rows; i++)
            ls->plus_rows[ls->uses[u].rows[i]] = true;
    return dev->ops->lora(dev, pl_view_rows(ls->plus.values, 0, x.rows), x, ls->uses, n, false);
}
