/* export: writes a model with an adapter merged into its weights as one GGUF file. Keys and the tensors that the adapter
 * leaves alone are copied byte for byte; the others become W + scale * B · A, computed in float32 and stored once.
 * Thread: any.  Owns: nothing.
 * Fails: PL_EINVAL (a type that a tensor's rows cannot have), PL_EIO (nothing is left behind), PL_ENOMEM.
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

#endif
