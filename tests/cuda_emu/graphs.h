/* graphs: what the stand-ins that enqueue work ask of a capture (graphs.c).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_GRAPHS_H
#define PL_TESTS_CUDA_EMU_GRAPHS_H

#include <stdbool.h>

#include "cuda_runtime_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* This thread captures the stream: work goes to emu_capture. */
bool emu_capturing(cudaStream_t s);
/* A call that no capture bears: true, and the capture is lost, when this thread captures. */
bool emu_capture_forbids(void);
/* run(data) at each launch; drop(data) at the end. */
void emu_capture(void (*run)(void *), void (*drop)(void *), void *data);
/* The same with a copy of n bytes. */
void emu_capture_bytes(void (*run)(void *), const void *data, size_t n);

#ifdef __cplusplus
}
#endif

#endif
