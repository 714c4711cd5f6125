/* tiny_model: small random models of each architecture, whole with tokenizer and chat template. The same options give
 * the same bytes on every machine: weights come straight from an integer generator, quantized ones as random blocks, so
 * that neither libm nor the quantizer has a say.
 * Thread: any.  Owns: nothing; the caller frees what it gets with gguf_out_free.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_TINY_MODEL_H
#define PL_TESTS_TINY_MODEL_H

#include <stdbool.h>

#include "core/base/status.h"
#include "tests/tools/gguf_write.h"

struct tiny_options {
    const char *arch;      /* "llama" or "gpt2" */
    const char *tokenizer; /* "bpe" or "spm" */
    const char *pre;       /* pre-tokenizer of "bpe" */
    uint64_t seed;
    pl_dtype dtype;          /* of the matrices */
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_ctx; /* head_dim 0 = n_embd / n_heads */
    bool untied;             /* an output.weight of its own */
    bool biases;             /* llama: on q, k, v and all projections; gpt2 has them anyway */
    float rope_base;         /* 0 = key absent */
    float rope_linear;       /* 0 = none, else the factor */
    bool rope_factors;       /* llama3 frequency factors as rope_freqs.weight */
};

/* What make_model takes when no flag says otherwise. */
struct tiny_options tiny_defaults(void);

/* Takes the flags of make_model (all but --out). */
pl_status tiny_options_flags(struct tiny_options *o, const char *const *flags, size_t n, struct pl_err *err) PL_MUST_CHECK;

/* NULL, with *err, for options that make no model. */
struct gguf_out *tiny_model(const struct tiny_options *o, struct pl_err *err);

#endif
