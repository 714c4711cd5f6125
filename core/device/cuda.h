/* cuda: finds and loads the CUDA device, a library of its own, so that one program runs on machines with and without a GPU.
 * Thread: any.  Owns: the library stays loaded until the process ends.
 * Fails: PL_ENOTSUP with one line that names the remedy: no library, no driver or one too old, no such GPU, a missing part of CUDA.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CUDA_H
#define PL_DEVICE_CUDA_H

#include "core/device/device.h"

struct pl_cuda_opts {
    unsigned index; /* of the GPU */
    void (*report)(const char *message); /* of failures, as they are noticed; may be NULL */
};

#define PL_CUDA_LIBRARY "libparley_cuda.so"

/* library: a file; NULL = where core/base/library.h searches. */
pl_status pl_cuda_load(struct pl_device **out, const char *library, const struct pl_cuda_opts *opts, struct pl_err *err) PL_MUST_CHECK;

/* What the library exports. build: PL_CUDA_BUILD of the caller, which has to be the library's own. */
typedef pl_status pl_cuda_open_fn(struct pl_device **out, const char *build, const struct pl_cuda_opts *opts, struct pl_err *err);
#define PL_CUDA_OPEN "pl_cuda_open"
#define PL_CUDA_BUILD PL_VERSION " " PL_CUDA_TEXT(PL_CUDA_INTERFACE)
#define PL_CUDA_TEXT(x) PL_CUDA_TEXT_(x)
#define PL_CUDA_TEXT_(x) #x
#define PL_CUDA_INTERFACE 6 /* counts changes of device.h's structs */

#endif
