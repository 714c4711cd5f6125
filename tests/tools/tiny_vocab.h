/* tiny_vocab: the tokenizers of tiny models. Each writes its keys and returns the number of tokens.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_TINY_VOCAB_H
#define PL_TESTS_TINY_VOCAB_H

#include "core/base/status.h"
#include "tests/tools/gguf_write.h"

uint32_t tiny_vocab_bpe(struct gguf_out *o, const char *pre);
uint32_t tiny_vocab_spm(struct gguf_out *o);

#endif
