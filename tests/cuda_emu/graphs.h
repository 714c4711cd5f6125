/* graphs: what the stand-ins that enqueue work ask of streams and captures (graphs.c).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_CUDA_EMU_GRAPHS_H
#define PL_TESTS_CUDA_EMU_GRAPHS_H

#include <stdbool.h>

#include "cuda_runtime_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* run(data) when something waits for the stream, or, where this thread captures it, at each launch of the graph; drop(data) at the end. */
void emu_enqueue(cudaStream_t s, void (*run)(void *), void (*drop)(void *), void *data);
/* The same with a copy of n bytes. */
void emu_enqueue_bytes(cudaStream_t s, void (*run)(void *), const void *data, size_t n);
/* A call that no capture bears: true, and the capture is lost, when this thread captures. */
bool emu_capture_forbids(void);
/* e, which cudaGetLastError says then. */
cudaError_t emu_failed(cudaError_t e);
/* Does what was enqueued: on one stream, which is not held, or on all of a GPU's. */
void emu_flush(cudaStream_t s);
void emu_flush_gpu(int gpu);
/* Whether host memory is the runtime's own, which copies read and write when their turn comes. */
bool emu_pinned(const void *p);

#ifdef __cplusplus
}
#endif

#endif
