/* graphs: streams and their capture. What is enqueued is done as late as a GPU may do it: when something waits for the stream. Where a
 * thread captures the stream, it is kept instead, with copies of its arguments, and done when the graph is launched. Calls that wait, or
 * allocate, end a capture as they do on a GPU (cudaStreamCaptureModeThreadLocal). PARLEY_EMU_FAULT=graphs makes every graph fail to be instantiated.
 * SPDX-License-Identifier: Apache-2.0 */
#include "graphs.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emu.h"

struct node {
    struct node *next;
    void (*run)(void *);
    void (*drop)(void *);
    void *data;
};

struct list {
    struct node *first, **end;
};

struct CUgraph_st {
    struct list nodes;
    atomic_int users; /* the graph itself, what was instantiated of it, and launches that are to come */
};

struct CUstream_st {
    struct CUstream_st *next; /* of all */
    int gpu;
    atomic_bool held; /* something on it does not get through */
    pthread_mutex_t lock;
    struct list nodes;
};

static struct CUstream_st *streams;
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

static void *must(void *p)
{
    if (p == NULL)
        abort();
    return p;
}

static void append(struct list *l, struct node node)
{
    struct node *n = must(malloc(sizeof *n));
    *n = node;
    n->next = NULL;
    if (l->first == NULL)
        l->end = &l->first;
    *l->end = n;
    l->end = &n->next;
}

static void drop_all(struct list *l, bool run)
{
    for (struct node *n; (n = l->first) != NULL;) {
        l->first = n->next;
        if (run)
            n->run(n->data);
        n->drop(n->data);
        free(n);
    }
}

/* ---- streams ------------------------------------------------------------------------------------------------------------- */

void emu_flush(cudaStream_t s)
{
    if (s == NULL || atomic_load(&s->held))
        return;
    pthread_mutex_lock(&s->lock);
    drop_all(&s->nodes, true);
    pthread_mutex_unlock(&s->lock);
}

void emu_flush_gpu(int gpu)
{
    pthread_mutex_lock(&streams_lock);
    for (struct CUstream_st *s = streams; s != NULL; s = s->next)
        if (s->gpu == gpu)
            emu_flush(s);
    pthread_mutex_unlock(&streams_lock);
}

void emu_stream_hold(cudaStream_t s, bool held)
{
    atomic_store(&s->held, held);
}

void emu_stream_flush(cudaStream_t s)
{
    emu_flush(s);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags)
{
    (void)flags;
    *s = must(calloc(1, sizeof **s));
    (*s)->gpu = emu_gpu();
    pthread_mutex_init(&(*s)->lock, NULL);
    pthread_mutex_lock(&streams_lock);
    (*s)->next = streams;
    streams = *s;
    pthread_mutex_unlock(&streams_lock);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    struct CUstream_st **at = &streams;
    emu_flush(s);
    pthread_mutex_lock(&streams_lock);
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    pthread_mutex_unlock(&streams_lock);
    drop_all(&s->nodes, false);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s)
{
    static atomic_ulong waits;
    const char *f = emu_fault();
    if (s != NULL && atomic_load(&s->held))
        return emu_failed(cudaErrorNotReady);
    if (f != NULL && strncmp(f, "lost:", 5) == 0 && ++waits > strtoul(f + 5, NULL, 10))
        return emu_failed(cudaErrorIllegalAddress);
    emu_flush(s);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    cudaError_t e;
    while ((e = cudaStreamQuery(s)) == cudaErrorNotReady)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return e;
}

cudaError_t cudaDeviceSynchronize(void)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    emu_flush_gpu(emu_gpu());
    return cudaSuccess;
}

/* ---- captures ------------------------------------------------------------------------------------------------------------ */

static _Thread_local struct {
    cudaStream_t stream;
    struct CUgraph_st *graph; /* NULL = this thread captures nothing */
    bool invalid;
} capture;

static atomic_ulong graph_launches;

static bool capturing(cudaStream_t s)
{
    return capture.graph != NULL && capture.stream == s;
}

bool emu_capture_forbids(void)
{
    capture.invalid |= capture.graph != NULL;
    return capture.graph != NULL;
}

void emu_enqueue(cudaStream_t s, void (*run)(void *), void (*drop)(void *), void *data)
{
    const struct node node = {.run = run, .drop = drop, .data = data};
    if (capturing(s)) {
        append(&capture.graph->nodes, node);
    } else if (s != NULL) {
        pthread_mutex_lock(&s->lock);
        append(&s->nodes, node);
        pthread_mutex_unlock(&s->lock);
    } else { /* the default stream */
        run(data);
        drop(data);
    }
}

void emu_enqueue_bytes(cudaStream_t s, void (*run)(void *), const void *data, size_t n)
{
    emu_enqueue(s, run, free, memcpy(must(malloc(n)), data, n));
}

unsigned long emu_graph_launches(void)
{
    return atomic_load(&graph_launches);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    if (s == NULL || capture.graph != NULL || mode != cudaStreamCaptureModeThreadLocal)
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    capture.stream = s;
    capture.invalid = false;
    capture.graph = must(calloc(1, sizeof *capture.graph));
    capture.graph->users = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    if (!capturing(s))
        return emu_failed(cudaErrorInvalidValue);
    *graph = capture.graph;
    capture.graph = NULL;
    if (!capture.invalid)
        return cudaSuccess;
    (void)cudaGraphDestroy(*graph);
    *graph = NULL;
    return emu_failed(cudaErrorStreamCaptureInvalidated);
}

static void unref(void *p)
{
    struct CUgraph_st *g = p;
    if (atomic_fetch_sub(&g->users, 1) > 1)
        return;
    drop_all(&g->nodes, false);
    free(g);
}

cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    unref(g);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long flags)
{
    const char *fault = emu_fault();
    (void)flags;
    if (fault != NULL && strcmp(fault, "graphs") == 0)
        return emu_failed(cudaErrorNotSupported);
    g->users++;
    *out = (cudaGraphExec_t)g;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e)
{
    return cudaGraphDestroy((cudaGraph_t)e);
}

static void run_graph(void *p)
{
    for (struct node *n = ((struct CUgraph_st *)p)->nodes.first; n != NULL; n = n->next)
        n->run(n->data);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s)
{
    struct CUgraph_st *g = (struct CUgraph_st *)e;
    graph_launches++;
    g->users++;
    emu_enqueue(s, run_graph, unref, g);
    return cudaSuccess;
}
