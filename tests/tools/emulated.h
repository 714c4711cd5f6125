/* emulated: the CUDA device on a CPU (tests/cuda_emu), as a device like any other.
 * Thread: one at a time.  Fails: PL_ENOTSUP when libparley_cuda_emu.so does not lie beside the program (make cuda-emu);
 * the environment's PARLEY_TEST_CUDA_LIBRARY names another file.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_EMULATED_H
#define PL_TESTS_EMULATED_H

#include "core/device/device.h"

pl_status emulated_open(struct pl_device **out, struct pl_err *err) PL_MUST_CHECK;
/* From the next operation on: threads of a block run from the last to the first. */
void emulated_reverse(bool reverse);

/* How often a CUDA graph was launched. */
unsigned long emulated_graph_launches(void);
/* How often a kernel ran, in graphs too. */
unsigned long emulated_launches(void);

/* Any device by name: "cuda-emulated", "cuda" (the first GPU), else an instruction set of the CPU device. */
pl_status device_open(struct pl_device **out, struct pl_pool *pool, const char *name, struct pl_err *err) PL_MUST_CHECK;
/* The same for a rank: the GPU of its number, emulated or not. */
pl_status device_open_for(struct pl_device **out, struct pl_pool *pool, const char *name, unsigned rank, struct pl_err *err) PL_MUST_CHECK;
/* Whether make cuda-emu has put the device and the stand-in for NCCL beside the program; the latter is then found by its usual name. */
bool emulated_nccl(void);
/* Whether the name is one of the CUDA device's. */
bool device_is_cuda(const char *name);

#endif
