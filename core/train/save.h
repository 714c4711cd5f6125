/* save: what training has made, as files: a PEFT folder, or a GGUF file with the base's keys and all weights.
 * Thread: the net's.  Owns: nothing.  Fails: PL_EIO, PL_ENOMEM; files appear whole or not at all.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_SAVE_H
#define PL_TRAIN_SAVE_H

#include "core/train/net.h"

/* Into dir, which is there: adapter_config.json and adapter_model.safetensors, or model.gguf (matrices in F16, vectors in
 * F32). base: how the adapter calls its base model. */
pl_status pl_save_model(const char *dir, const struct pl_net *n, const struct pl_gguf *g, const char *base, struct pl_err *err) PL_MUST_CHECK;

#endif
