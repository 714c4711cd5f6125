/* timed: writes down when each operation of a device begins and ends. It stands in the device's table of operations, so that
 * nothing is slower where it is not used; the device itself does not know of it.
 * Thread: the device's.  Owns: its log.  A log that is full takes no more (`full`).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_TIMED_H
#define PL_CLI_TIMED_H

#include "core/device/device.h"

/* The operations of a forward pass. */
#define TIMED_OPS(X) X(embed) X(norm) X(matmul) X(kv_write) X(attn) X(matmul_glu) X(act) X(gather) X(lora)

enum timed_op {
#define X(op) TIMED_##op,
    TIMED_OPS(X)
#undef X
    TIMED_STEP, /* a whole pass, from step_begin to the end of step_end */
};
extern const char *const timed_names[];

struct timed_span {
    enum timed_op op;
    const struct pl_weight *w; /* of embed and products */
    uint32_t rows, cols, inner; /* of the result, before gate and up are multiplied; of a product, its inputs */
    uint64_t start, end;        /* ns */
    uint64_t scores, cells;     /* attn: pairs of a token and one before it; cache positions that are read */
};

struct timed {
    struct pl_device_ops ops; /* first: the device's table points here */
    const struct pl_device_ops *real;
    struct pl_device *dev;
    struct timed_span *log;
    size_t n, cap;
    bool full;
    uint64_t step_start;
};

/* From now on the operations of dev are written down. NULL when memory is out. */
struct timed *timed_begin(struct pl_device *dev, size_t cap);
void timed_end(struct timed *t);

#endif
