/* checkpoint: a job's state on disk, so that it goes on to the same bytes after any end. A folder checkpoints/step-N holds the
 * model (as save.h writes it), state.bin (trained values, moments, counters) and manifest.json (the hash of each file). It is
 * written under another name, flushed, and renamed; one whose hashes are wrong is passed over.
 * Thread: the net's.  Owns: nothing but the arrays of a state, until fini.
 * Fails: PL_EIO (no space, permissions), PL_EFORMAT (damaged, or of another job), PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_CHECKPOINT_H
#define PL_TRAIN_CHECKPOINT_H

#include "core/base/sha256.h"
#include "core/train/net.h"

struct pl_ckpt_state {
    uint32_t step;      /* done */
    uint32_t best_step; /* 0 = none */
    double best_loss;
    uint32_t n_bad;     /* evaluations since */
    uint32_t stopped;   /* early stopping has ended the job */
    uint64_t trained_tokens;
    char fingerprint[PL_SHA256_HEX]; /* of what must not change between runs */
    uint32_t n_reference;            /* dpo: log-probabilities under the first model, training then validation */
    double *reference;
};

pl_status pl_ckpt_write(const char *folder, const struct pl_net *n, const struct pl_gguf *g, const char *base, const struct pl_ckpt_state *s,
                        struct pl_err *err) PL_MUST_CHECK;
/* The newest whole checkpoint into net and state; *step 0 when there is none. *n_bad: how many newer ones were damaged
 * (and taken away). */
pl_status pl_ckpt_resume(const char *folder, struct pl_net *n, struct pl_ckpt_state *s, uint32_t *n_bad, struct pl_err *err) PL_MUST_CHECK;
/* The trained values of one step alone. */
pl_status pl_ckpt_values(const char *folder, uint32_t step, struct pl_net *n, struct pl_err *err) PL_MUST_CHECK;
/* Removes all but the last `keep` and the best. */
void pl_ckpt_prune(const char *folder, uint32_t keep, uint32_t best_step);
void pl_ckpt_state_fini(struct pl_ckpt_state *s);

/* Removes a folder of plain files. */
void pl_ckpt_remove(const char *path);
/* Flushes a folder and renames it; from must not be there as `to`. */
pl_status pl_ckpt_publish(const char *from, const char *to, const char *parent, struct pl_err *err) PL_MUST_CHECK;

#endif
