/* job: job.json, the file in which the daemon tells a worker what to do (and which anybody can write by hand).
 * Thread: any.  Owns: the strings of a struct pl_train_job, until fini.
 * Fails: read PL_EFORMAT or PL_EINVAL naming the member, PL_EIO; write PL_EIO, PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_JOB_H
#define PL_TRAIN_JOB_H

#include "core/base/sha256.h"
#include "core/train/spec.h"

struct pl_train_job {
    char *id, *name;       /* name: under which the result will be served, "ft:…" */
    char *base;            /* GGUF file; NULL for a model from nothing with a tokenizer of its own */
    char *base_id;         /* pl_train_base_id of it, NULL = not checked */
    char *base_adapter;    /* PEFT folder on top of it, NULL = none */
    char *chat_template;   /* file used instead of the model's own template, NULL = none */
    char *general_text;    /* file used instead of the program's own (general.h), NULL = none */
    char *training_file, *validation_file; /* paths; validation NULL = none */
    int64_t created_at;
    struct pl_train_spec spec; /* resolved when the daemon wrote it; by hand "auto" is allowed: see pl_train_spec_resolve */
};

/* folder/job.json */
pl_status pl_train_job_read(struct pl_train_job *job, const char *folder, struct pl_err *err) PL_MUST_CHECK;
/* Whole or not at all. */
pl_status pl_train_job_write(const struct pl_train_job *job, const char *folder, struct pl_err *err) PL_MUST_CHECK;
/* What tells one base from another: its size, its head, and samples of its weights. Reads about a MiB. PL_EIO. */
pl_status pl_train_base_id(const char *path, char hex[PL_SHA256_HEX], struct pl_err *err) PL_MUST_CHECK;
void pl_train_job_fini(struct pl_train_job *job);

#endif
