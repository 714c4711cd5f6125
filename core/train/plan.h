/* plan: a job before it runs: both files checked, every "auto" given its value, and what the job will take.
 * Thread: any.  Owns: the reports' lists and a model from nothing, until fini.
 * Fails: as pl_data_scan (param "training_file" or "validation_file"), pl_scratch_open and pl_train_spec_resolve.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_PLAN_H
#define PL_TRAIN_PLAN_H

#include "core/text/model_file.h"
#include "core/train/dataset.h"
#include "core/train/scratch.h"
#include "core/train/spec.h"

/* The model that is to be trained. All borrowed. */
struct pl_train_base {
    const char *path; /* its file; all that is needed of it for a model from nothing, and that with tokenizer "base" only */
    const struct pl_tok *tok;
    const struct pl_chat *chat; /* NULL = none */
    const struct pl_spec *spec;
    uint32_t n_ctx;
    uint64_t n_params, n_file; /* parameters; bytes of the model's file */
    const atomic_bool *stop; /* as in pl_data_opts */
    const char *kept;        /* as in pl_scratch_source */
};

/* Where the job will run. */
struct pl_train_place {
    uint32_t n_threads;
    bool bf16;          /* has such products */
    bool gpu;           /* with memory of its own */
    uint64_t available; /* bytes of the host's memory that the job may take, 0 = not known */
    uint64_t room;      /* bytes that it may take where it computes, 0 = not known; a model from nothing that needs more is refused */
};

struct pl_train_plan {
    struct pl_train_spec spec; /* resolved */
    struct pl_train_base base; /* what is trained: the given one, or the one made from nothing */
    struct pl_train_place place;
    struct pl_scratch scratch; /* that one, if spec.scratch */
    struct pl_data_report training, validation;
    uint32_t epoch_steps, total_steps;
    uint64_t trained_tokens;  /* that the job will see: epochs × tokens of the file */
    uint64_t n_trained_params;
    uint64_t memory;          /* bytes of the worker, or of its GPU, at the peak, about */
    double flops;             /* of all products, about */
};

/* Of a model that is there. Borrows both. */
struct pl_train_base pl_train_base_of(const struct pl_model_file *f, const char *path);
/* asked: as read from the request. validation: path or NULL. The reports are filled in on failure too: fini in either case. */
pl_status pl_train_plan(struct pl_train_plan *p, const struct pl_train_spec *asked, const char *training, const char *validation,
                        const struct pl_train_base *base, const struct pl_train_place *place, struct pl_err *err) PL_MUST_CHECK;
void pl_train_plan_fini(struct pl_train_plan *p);

#endif
