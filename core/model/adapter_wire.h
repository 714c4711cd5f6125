/* adapter_wire: an adapter as one block of bytes, for ranks that cannot read its file. Machine's byte order, no checks: both
 * ends are the same program.
 * Thread: any.  Owns: a wire its bytes.  Fails: PL_ENOMEM; unpack PL_EFORMAT when the block is not of this base's shape.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_ADAPTER_WIRE_H
#define PL_MODEL_ADAPTER_WIRE_H

#include "core/model/adapter.h"

struct pl_adapter_wire {
    void *bytes; /* NULL = nothing */
    size_t n;
};

pl_status pl_adapter_pack(struct pl_adapter_wire *w, const struct pl_adapter *a, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;
void pl_adapter_wire_fini(struct pl_adapter_wire *w);
/* a's values stay in the block; free(a->pairs) when done. */
pl_status pl_adapter_unpack(struct pl_adapter *a, const void *bytes, size_t n, const struct pl_spec *spec, struct pl_err *err) PL_MUST_CHECK;

#endif
