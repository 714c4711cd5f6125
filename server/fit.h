/* fit: whether a model's weights fit into the memory there is, asked before any of them is copied.
 * Thread: any.  Owns: nothing.
 * Fails: PL_EINVAL, param "device", with what would fit; PL_ENOMEM for a further model, for which others may leave.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_FIT_H
#define PL_SERVER_FIT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_device;
struct pl_gguf;

struct pl_fit {
    unsigned ranks;   /* that the model is cut over */
    unsigned sharing; /* of them on this device */
    bool launched;    /* ranks are processes */
    bool further;     /* beside the first model */
    uint64_t n_bytes; /* of its file, which a further model on the host takes */
};

pl_status pl_fit_check(const struct pl_fit *f, const struct pl_gguf *g, struct pl_device *dev, struct pl_err *err) PL_MUST_CHECK;

#endif
