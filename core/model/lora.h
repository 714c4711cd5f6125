/* lora: the adapters that a model holds on its device, by slot, and which rows of a batch each changes.
 * Thread: the engine's; sets are made and freed on any.  Owns: the device's copies.
 * Fails: PL_EINVAL (a batch that names an empty slot), PL_ENOMEM, PL_EDEVICE.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_LORA_H
#define PL_MODEL_LORA_H

#include "core/device/device.h"
#include "core/model/adapter.h"
#include "core/model/adapter_wire.h"

/* One adapter's. */
struct pl_lora_set {
    struct pl_adapter_wire wire; /* for the other ranks, until they have it */
    uint32_t n;                 /* n_layers * PL_PRODUCT_COUNT */
    struct pl_lora *products[]; /* [n_layers][PL_PRODUCT_COUNT], NULL where the adapter changes nothing */
};

/* The rows of the batch whose sequence has the slot's adapter. */
struct pl_lora_group {
    uint32_t slot;
    uint32_t first, n; /* of row_list */
};

struct pl_loras {
    struct pl_lora_set **slots; /* [n_slots], NULL = empty; slot 0 stays empty */
    uint32_t n_slots;
    /* of the pass that runs */
    struct pl_lora_group *groups; /* [n_slots] */
    struct pl_lora_use *uses;     /* [n_slots] */
    uint32_t n_groups;            /* 0 = nobody has an adapter: nothing is to be done */
    uint32_t *row_list;           /* [max_tokens] */
    /* gated feed-forward: what is added to gate and up before they are multiplied; made with the first adapter, or reserved */
    struct pl_plus plus;
    bool *plus_rows; /* [max_tokens] */
    uint32_t max_tokens;
};

void pl_loras_init(struct pl_loras *ls, uint32_t max_tokens);
void pl_loras_fini(struct pl_loras *ls, struct pl_device *dev);

/* Finds the groups of a batch: at first over its tokens, after narrow over the rows that want logits. */
pl_status pl_loras_plan(struct pl_loras *ls, const struct pl_batch *b) PL_MUST_CHECK;
void pl_loras_narrow(struct pl_loras *ls, const struct pl_batch *b);
pl_status pl_loras_apply(struct pl_loras *ls, struct pl_device *dev, uint32_t layer, pl_product product, pl_view out, pl_view x) PL_MUST_CHECK;
/* The same for a gated PL_PRODUCT_FF_IN, ahead of it: *plus is what matmul_glu is to add, NULL when nothing. */
pl_status pl_loras_plus(struct pl_loras *ls, struct pl_device *dev, uint32_t layer, pl_view x, const struct pl_plus **plus) PL_MUST_CHECK;

#endif
