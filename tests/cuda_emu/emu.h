/* emu: what tests may set in the emulated CUDA library; found by dlsym.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_EMU_H
#define PL_TESTS_CUDA_EMU_EMU_H

#include <stdbool.h>

#include "cuda_runtime_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Threads of a block run from the last to the first: a result that changes lacks a barrier. */
__attribute__((visibility("default"))) void emu_set_reverse(bool reverse);
__attribute__((visibility("default"))) unsigned long emu_launches(void);
__attribute__((visibility("default"))) unsigned long emu_graph_launches(void);
/* What PARLEY_EMU_FAULT says now; NULL = nothing. */
const char *emu_fault(void);
/* For the stand-in of NCCL: the calling thread's GPU; something on the stream does not get through, or does again. */
__attribute__((visibility("default"))) int emu_gpu(void);
__attribute__((visibility("default"))) void emu_stream_hold(cudaStream_t s, bool held);
/* What is on the stream is done. */
__attribute__((visibility("default"))) void emu_stream_flush(cudaStream_t s);
/* Bytes of shared memory that a block of the calling thread's GPU may have */
size_t emu_shared_limit(void);

#ifdef __cplusplus
}
#endif

#endif
