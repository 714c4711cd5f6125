/* tfevents: TensorBoard event files: records framed by masked CRC-32C, each an Event message with scalars.
 * Thread: one.  Owns: the open file.  Fails: PL_EIO.
 * Source: tensorflow/tensorboard, record_writer and event.proto.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_TFEVENTS_H
#define PL_TRAIN_TFEVENTS_H

#include <stdint.h>
#include <stdio.h>

#include "core/base/status.h"

struct pl_tf_scalar {
    const char *tag;
    double value; /* NAN: left out */
};

/* Appends the version record that a file begins with. */
pl_status pl_tf_begin(FILE *f, double wall_time) PL_MUST_CHECK;
pl_status pl_tf_scalars(FILE *f, double wall_time, int64_t step, const struct pl_tf_scalar *scalars, size_t n) PL_MUST_CHECK;

uint32_t pl_crc32c(const void *bytes, size_t n);

#endif
