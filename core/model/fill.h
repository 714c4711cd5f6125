/* fill: steps of decodes in a few sizes only, for devices that record them (pl_device_ops.record).
 * Thread: the engine's.  Owns: the filled batch's arrays, until the next one.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_MODEL_FILL_H
#define PL_MODEL_FILL_H

#include "core/device/device.h"

struct pl_fill {
    uint32_t *words;
    size_t cap;
};

/* Whether each sequence of b has one token, and a row for it, and nobody an adapter. */
bool pl_fill_decodes(const struct pl_batch *b);
/* b, which decodes, with sequences at its end until there are n: token 0 at position 0, which sees the cache's first slot and writes none.
 * b->draws are not copied. False when there is no memory. */
bool pl_fill(struct pl_fill *f, const struct pl_batch *b, uint32_t n, struct pl_batch *out) PL_MUST_CHECK;
void pl_fill_fini(struct pl_fill *f);

#endif
