/* dummy: a model of a well-known shape with random weights, for measuring without a file. It is a GGUF file in memory, whose matrices
 * are one piece of random bytes that is mapped again and again, so that it takes little memory whatever its size. It has no tokenizer.
 * Thread: any.  Owns: the memory that the pl_gguf reads, until pl_dummy_close.
 * Fails: PL_EINVAL (a shape or type that is not in the list), PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_DUMMY_H
#define PL_MODEL_DUMMY_H

#include "core/model/gguf.h"

struct pl_dummy;

/* layers, width, query heads, key/value heads, head width, feed-forward width, vocabulary, context, head is the embedding */
#define PL_DUMMY_SHAPES(X)                                                                                             \
    X("tiny", 2, 256, 4, 2, 64, 512, 512, 2048, true)                                                                  \
    X("thin", 32, 256, 4, 2, 64, 512, 512, 2048, true) /* the layers of 8B with next to nothing in them */           \
    X("1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072, true)                                                           \
    X("8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072, false)                                                        \
    X("32B", 64, 5120, 40, 8, 128, 27648, 152064, 131072, false)
#define PL_DUMMY_NAMES "tiny, thin, 1B, 8B or 32B"

/* name: a shape, or shape:type with the type of the matrices (bf16 when there is none). *file is closed before *out. */
pl_status pl_dummy_open(struct pl_dummy **out, struct pl_gguf **file, const char *name, struct pl_err *err) PL_MUST_CHECK;
void pl_dummy_close(struct pl_dummy *d);

#endif
