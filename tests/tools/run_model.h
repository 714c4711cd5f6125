/* run_model: runs token sequences through a model without the engine: batches and page tables built by hand.
 * Thread: one at a time.  Owns: pool, device and model; borrows the file.  Fails: as the model does.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_RUN_MODEL_H
#define PL_TESTS_RUN_MODEL_H

#include "core/base/pool.h"
#include "core/comm/comm.h"
#include "core/model/gguf.h"
#include "core/model/model.h"

struct runner {
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_model *model;
    uint32_t max_tokens;
};

/* isa NULL = the best there is. */
pl_status runner_open(struct runner *r, const struct pl_gguf *g, const char *isa, unsigned n_threads, uint32_t max_tokens,
                      struct pl_err *err) PL_MUST_CHECK;
/* The same as one rank of comm's (borrowed); all of them open, and call run_seqs with the same sequences. On GPUs each rank takes its own. */
pl_status runner_open_part(struct runner *r, const struct pl_gguf *g, struct pl_comm *comm, const char *isa, unsigned n_threads,
                           uint32_t max_tokens, struct pl_err *err) PL_MUST_CHECK;
void runner_close(struct runner *r);

struct run_seq {
    const int32_t *tokens; /* borrowed */
    uint32_t n;
    uint32_t chunk;  /* tokens per step, above 0 */
    uint32_t from;   /* first position whose logits are wanted */
    uint32_t adapter; /* slot, 0 = none */
    float *logits;   /* [n - from, V], the caller's; left as it is on ranks other than 0 */
    uint32_t n_done; /* set by run_seqs */
};

/* Feeds all sequences side by side, chunk by chunk, until each is through. The chunks of one step fit into max_tokens. */
pl_status run_seqs(struct runner *r, struct run_seq *seqs, uint32_t n_seqs, pl_dtype kv_type) PL_MUST_CHECK;

#endif
