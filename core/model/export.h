/* export: writes a model, with an adapter merged into its weights, as one GGUF file or as the folder that Hugging Face's libraries read.
 * GGUF: keys and the tensors that the adapter leaves alone are copied byte for byte; the others become W + scale * B · A, computed in float32
 * and stored once. Folder: all tensors are stored anew, in Hugging Face's names, shapes and order of rows; for the tokenizer see pl_tok_export.
 * Thread: any.  Owns: nothing.
 * Fails: PL_EINVAL (a type that a tensor's rows or values cannot have), PL_ENOTSUP (a model that transformers cannot express, by the key),
 * PL_EIO (no file is left in part), PL_ENOMEM.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_EXPORT_H
#define PL_MODEL_EXPORT_H

#include "core/model/adapter.h"
#include "core/model/gguf.h"

/* Types of merged tensors beside those of the file format: F32 where the base has F32, else F16; what the base has. */
enum { PL_EXPORT_AUTO = -1, PL_EXPORT_BASE = -2 };

/* a: fits the model in g, whose spec is given. type: a pl_dtype or one of the above. */
pl_status pl_export_gguf(const char *path, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int type,
                         struct pl_err *err) PL_MUST_CHECK;

/* Writes config.json and model.safetensors into folder, which is there. a: NULL = none. type: PL_F32, PL_F16, PL_BF16, or PL_EXPORT_AUTO: that
 * of the model's matrices if it is one of these, else F16; *type is what it came to be. */
pl_status pl_export_folder(const char *folder, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int *type,
                           struct pl_err *err) PL_MUST_CHECK;

/* Row i of a tensor as float32, with an adapter's pair (NULL = none) merged into it. */
void pl_export_row(const struct pl_gguf_tensor *t, const struct pl_lora_pair *p, uint64_t i, float *row);

#endif
