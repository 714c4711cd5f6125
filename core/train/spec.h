/* spec: what a fine-tuning job is to do, as plain data, and the way from a request's method object to it and back.
 * hyper.def is the table of all knobs.
 * Thread: any.  Owns: nothing.
 * Fails: PL_EINVAL (wrong type, out of range, unknown member), PL_ENOTSUP (a method this server lacks), both with the whole
 * path in err->param: "method.supervised.hyperparameters.n_epochs".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_SPEC_H
#define PL_TRAIN_SPEC_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/model/spec.h"
#include "core/train/metric.h"

/* In the order of the words in hyper.def and of spec.c's methods. */
typedef enum { PL_METHOD_SUPERVISED, PL_METHOD_DPO, PL_METHOD_PRETRAIN, PL_METHOD_COUNT } pl_train_method;
typedef enum { PL_PEFT_FULL, PL_PEFT_LORA } pl_peft_kind;
typedef enum { PL_TRAIN_ON_ASSISTANT, PL_TRAIN_ON_LAST, PL_TRAIN_ON_ALL } pl_train_on;
typedef enum { PL_FINAL_LAST, PL_FINAL_BEST } pl_train_final;
typedef enum { PL_SCHEDULE_CONSTANT, PL_SCHEDULE_LINEAR, PL_SCHEDULE_COSINE, PL_SCHEDULE_WSD } pl_train_schedule;
typedef enum { PL_PACKING_NONE, PL_PACKING_BFD } pl_train_packing;
typedef enum { PL_PRECISION_F32, PL_PRECISION_BF16 } pl_train_precision;
typedef enum { PL_SHAPE_LLAMA, PL_SHAPE_GPT2 } pl_shape_arch;
typedef enum { PL_SHAPE_BPE, PL_SHAPE_BASE } pl_shape_tokenizer;
typedef enum { PL_SHAPE_CHAT_NONE, PL_SHAPE_CHAT_ML, PL_SHAPE_CHAT_BASE } pl_shape_chat;

struct pl_train_spec {
    pl_train_method method;
    bool scratch;       /* pretrain: the base is made from a shape (rows of that group) */
    uint64_t automatic; /* bit i: row i of hyper.def is still "auto"; 0 once resolved */
    uint32_t seed;      /* of data order, dropout, initial values */
    /* One member for each row of hyper.def. */
#define INT(methods, group, field, name, min, max, automatic, help) uint32_t field;
#define REAL(methods, group, field, name, min, max, automatic, help) double field;
#define BOOL(methods, group, field, name, automatic, help) bool field;
#define WORD(methods, group, field, name, words, automatic, help) int field;
#define SET(methods, group, field, name, automatic, help) unsigned field; /* bits 1 << PL_TARGET_x of core/model/adapter.h */
#include "core/train/hyper.def"
#undef INT
#undef REAL
#undef BOOL
#undef WORD
#undef SET
};

/* What "auto" depends on. */
struct pl_train_facts {
    const struct pl_spec *model; /* borrowed; not needed for a shape */
    uint64_t text_bytes;         /* of the training file's texts, for a shape */
    uint32_t n_examples;         /* of the training file; pairs for dpo */
    uint32_t longest;            /* tokens of the longest example */
    uint32_t n_ctx;              /* tokens that the model takes */
    uint32_t n_threads;
    bool validation; /* there is a validation file */
    bool bf16;       /* the device has such products */
};

/* method: a request's "method" object, or NULL; hyperparameters: the older top-level object of supervised jobs, or NULL.
 * Both borrowed. JSON null counts as absent. */
pl_status pl_train_spec_read(struct pl_train_spec *s, const json_t *method, const json_t *hyperparameters, struct pl_err *err) PL_MUST_CHECK;
/* Gives every automatic row its value, and checks what only the facts can tell (targets that the model lacks, max_length
 * above its context). */
pl_status pl_train_spec_resolve(struct pl_train_spec *s, const struct pl_train_facts *f, struct pl_err *err) PL_MUST_CHECK;
/* The shape's rows alone, which the others depend on: needs f->text_bytes only. What does not fit together is refused. */
pl_status pl_train_shape_resolve(struct pl_train_spec *s, const struct pl_train_facts *f, struct pl_err *err) PL_MUST_CHECK;
/* Control tokens of a vocabulary that is learned. */
uint32_t pl_train_shape_specials(const struct pl_train_spec *s);
/* {"type": …, "<type>": {…}} with every row of the method, automatic ones as "auto". A new reference; NULL = no memory.
 * Reading it gives the same spec. */
json_t *pl_train_spec_json(const struct pl_train_spec *s);
/* OpenAI's top-level "hyperparameters": n_epochs, batch_size, learning_rate_multiplier (dpo: beta too). */
json_t *pl_train_spec_hyperparameters(const struct pl_train_spec *s);

/* The processor multiplies bf16. */
bool pl_train_has_bf16(void);
const char *pl_train_method_name(pl_train_method m);
double pl_train_base_rate(const struct pl_train_spec *s);
/* Optimizer steps of an epoch and of the whole job. */
uint32_t pl_train_epoch_steps(const struct pl_train_spec *s, uint32_t n_examples);
uint32_t pl_train_total_steps(const struct pl_train_spec *s, uint32_t n_examples);

/* The table's rows, for tests and documentation. kind: one of I R B W S. */
struct pl_hyper_row {
    char kind;
    const char *methods, *group, *name, *words, *help;
    size_t offset;
    double min, max;
};
const struct pl_hyper_row *pl_hyper_rows(size_t *n);

#endif
