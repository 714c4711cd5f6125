/* adapter_int: what the readers of adapter files share: halves of pairs are collected by layer and target, checked against
 * the base, and made into an adapter.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_ADAPTER_INT_H
#define PL_MODEL_ADAPTER_INT_H

#include "core/model/adapter.h"

enum { PL_ADAPTER_MAX_RANK = 4096, PL_ADAPTER_NAME = 160 /* bytes of a tensor's name that messages show */ };

typedef enum { PL_LORA_A, PL_LORA_B } pl_lora_half;

/* Matrices of a file that is open: A [rank][cols], B [rows][rank]. */
struct pl_adapter_slot {
    struct {
        const void *tensor; /* NULL = not there */
        uint64_t rank;
        const char *name; /* borrowed from the file, n_name bytes */
        size_t n_name;
    } half[2];
};

struct pl_adapter_parts {
    const struct pl_spec *spec;
    struct pl_adapter_slot *slots; /* [n_layers][PL_TARGET_COUNT] */
};

pl_status pl_adapter_parts_init(struct pl_adapter_parts *p, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;
void pl_adapter_parts_fini(struct pl_adapter_parts *p);
/* One matrix [rows, cols] of the file. */
pl_status pl_adapter_parts_add(struct pl_adapter_parts *p, const char *name, size_t n_name, uint64_t layer, pl_target target,
                               pl_lora_half half, uint64_t rows, uint64_t cols, const void *tensor, struct pl_err *err) PL_MUST_CHECK;

/* How a kind of file is read on. */
struct pl_adapter_reader {
    void (*read)(const void *tensor, float *out); /* all values */
    /* The pair's alpha; checks the rank, too, where the file states it. */
    pl_status (*alpha)(void *self, const struct pl_target_place *place, uint32_t layer, uint32_t rank, float *alpha, struct pl_err *err);
    void *self;
    bool rslora;
    bool halves; /* rows of q and k are in Hugging Face's order */
};
pl_status pl_adapter_assemble(struct pl_adapter **out, const struct pl_adapter_parts *p, const struct pl_adapter_reader *r,
                              struct pl_err *err) PL_MUST_CHECK;

/* What stands in front of a layer's number in Hugging Face's names. */
const char *pl_adapter_layers(const char *arch);

/* Rows of q and k between Hugging Face's order (pairs half a head apart) and GGUF's (side by side); n values each. */
void pl_adapter_rows_to_pairs(const float *in, float *out, uint32_t n_heads, uint32_t head_dim, size_t n);
void pl_adapter_rows_to_halves(const float *in, float *out, uint32_t n_heads, uint32_t head_dim, size_t n);
/* Heads whose rows are ordered that way; 0 = the target's rows are in the same order everywhere. */
uint32_t pl_target_heads(const struct pl_spec *spec, pl_target target);

pl_status pl_adapter_read_peft(struct pl_adapter **out, const char *folder, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_adapter_read_gguf(struct pl_adapter **out, const char *path, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;

#endif
