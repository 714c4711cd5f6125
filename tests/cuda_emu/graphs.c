/* graphs: stream capture: what a thread enqueues on the stream that it captures is kept instead of done, with copies of its
 * arguments, and done when the graph is launched. Calls that wait, or allocate, end a capture as they do on a GPU
 * (cudaStreamCaptureModeThreadLocal). PARLEY_EMU_FAULT=graphs makes every graph fail to be instantiated.
 * SPDX-License-Identifier: Apache-2.0 */
#include "graphs.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "emu.h"

struct node {
    struct node *next;
    void (*run)(void *);
    void (*drop)(void *);
    void *data;
};

struct CUgraph_st {
    struct node *first, **end;
    int users; /* the graph itself, and what was instantiated of it */
};

static _Thread_local struct {
    cudaStream_t stream;
    struct CUgraph_st *graph; /* NULL = this thread captures nothing */
    bool invalid;
} capture;

static atomic_ulong graph_launches;

bool emu_capturing(cudaStream_t s)
{
    return capture.graph != NULL && capture.stream == s;
}

bool emu_capture_forbids(void)
{
    capture.invalid |= capture.graph != NULL;
    return capture.graph != NULL;
}

void emu_capture(void (*run)(void *), void (*drop)(void *), void *data)
{
    struct node *n = malloc(sizeof *n);
    if (n == NULL)
        abort();
    *n = (struct node){NULL, run, drop, data};
    *capture.graph->end = n;
    capture.graph->end = &n->next;
}

void emu_capture_bytes(void (*run)(void *), const void *data, size_t n)
{
    void *copy = malloc(n);
    if (copy == NULL)
        abort();
    emu_capture(run, free, memcpy(copy, data, n));
}

unsigned long emu_graph_launches(void)
{
    return atomic_load(&graph_launches);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    if (s == NULL || capture.graph != NULL || mode != cudaStreamCaptureModeThreadLocal)
        return cudaErrorStreamCaptureUnsupported;
    capture.stream = s;
    capture.invalid = false;
    capture.graph = calloc(1, sizeof *capture.graph);
    if (capture.graph == NULL)
        return cudaErrorMemoryAllocation;
    capture.graph->end = &capture.graph->first;
    capture.graph->users = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    if (!emu_capturing(s))
        return cudaErrorInvalidValue;
    *graph = capture.graph;
    capture.graph = NULL;
    if (!capture.invalid)
        return cudaSuccess;
    (void)cudaGraphDestroy(*graph);
    *graph = NULL;
    return cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    if (--g->users > 0)
        return cudaSuccess;
    for (struct node *n = g->first, *next; n != NULL; n = next) {
        next = n->next;
        n->drop(n->data);
        free(n);
    }
    free(g);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long flags)
{
    const char *fault = emu_fault();
    (void)flags;
    if (fault != NULL && strcmp(fault, "graphs") == 0)
        return cudaErrorNotSupported;
    g->users++;
    *out = (cudaGraphExec_t)g;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e)
{
    return cudaGraphDestroy((cudaGraph_t)e);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s)
{
    (void)s;
    graph_launches++;
    for (struct node *n = ((cudaGraph_t)e)->first; n != NULL; n = n->next)
        n->run(n->data);
    return cudaSuccess;
}
