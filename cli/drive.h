/* drive: forward passes without the engine, over sequences of made-up tokens with cache pages of their own: what a
 * benchmark measures.
 * Thread: one.  Owns: the cache and the batch; borrows the model.  Fails: drive_open says why on standard error.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_DRIVE_H
#define PL_CLI_DRIVE_H

#include "cli/cli.h"

enum { DRIVE_SEQS = 256, DRIVE_TOKENS = 512 /* of one pass, where nobody says otherwise */, DRIVE_MOST_TOKENS = 8192 };

struct drive {
    const struct cli_model *m;
    struct pl_kvdev *kv;
    uint32_t pages_per_seq;
    uint32_t *pages;
    uint32_t n_tokens; /* of one pass */
    int32_t tokens[DRIVE_MOST_TOKENS];
    uint32_t pos[DRIVE_MOST_TOKENS], slot[DRIVE_MOST_TOKENS], rows[DRIVE_SEQS];
    struct pl_draw *draws; /* the largest, as serving takes it where the device samples */
    struct pl_drawn *drawn;
    uint32_t q_start[DRIVE_SEQS + 1], ctx[DRIVE_SEQS], page_start[DRIVE_SEQS + 1];
};

/* Room for n_seqs sequences of `longest` tokens, in a cache of that type. The model was opened for passes of n_tokens, and DRIVE_SEQS rows. */
bool drive_open(struct drive *d, const struct cli_model *m, uint32_t n_tokens, uint32_t n_seqs, uint32_t longest, pl_dtype kv_type);
void drive_close(struct drive *d);

/* Tokens [at, at + n) of each of n_seqs sequences, at most n_tokens in all; logits: for each sequence's last one. */
bool drive_step(struct drive *d, uint32_t n_seqs, uint32_t at, uint32_t n, bool logits);
/* Brings each of n_seqs sequences from `from` to `to` tokens, in passes as the engine would cut them. */
bool drive_fill(struct drive *d, uint32_t n_seqs, uint32_t from, uint32_t to);

#endif
