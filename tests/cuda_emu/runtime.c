/* runtime: the CUDA runtime's calls on host memory. The environment can make it fail as real machines do:
 *     PARLEY_EMU_FAULT=no-driver | old-driver | no-gpu | lost:N    the last one after N times of waiting for the device
 *     PARLEY_EMU_FAULT=graphs    graphs.c
 *     PARLEY_EMU_FAULT=hang:N    allocating more than 4 KiB on GPU N never ends, but for the first time, when ranks meet
 *     PARLEY_EMU_FAULT=pools     there are no pools of memory
 *     PARLEY_EMU_FAULT=mixed | old-gpu    GPU 0 is of another kind than the others; of a kind that is too old
 *     PARLEY_EMU_FAULT=turing    compute capability 7.5, and what a block of it may have
 *     PARLEY_EMU_FAULT=others:GPU:N    as PARLEY_EMU_OTHERS_MB
 *     PARLEY_EMU_FAULT=@FILE     what the file says at that moment, nothing while there is none
 *     PARLEY_EMU_MEMORY_MB=N     a device's memory (default 1024)
 *     PARLEY_EMU_OTHERS_MB=GPU:N that others have taken of one
 *     PARLEY_EMU_GPUS=N          how many there are (default 2)
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_runtime_api.h"
#include "emu.h"
#include "graphs.h"

enum { GPUS = 2, MOST_GPUS = 16, HEADER = 256, LARGE = 16 << 20, SMALL = 4096 };

struct header { /* of an allocation */
    size_t n;
    int device;
};

static atomic_size_t used[MOST_GPUS];
static _Thread_local cudaError_t last;
static _Thread_local int current;

cudaError_t emu_failed(cudaError_t e)
{
    return last = e;
}

const char *emu_fault(void)
{
    static _Thread_local char text[64];
    const char *set = getenv("PARLEY_EMU_FAULT");
    if (set == NULL || set[0] != '@')
        return set;
    FILE *f = fopen(set + 1, "r");
    const bool there = f != NULL && fgets(text, sizeof text, f) != NULL;
    if (f != NULL)
        fclose(f);
    text[strcspn(text, "\n")] = '\0';
    return there ? text : NULL;
}

static bool fault(const char *name)
{
    const char *f = emu_fault();
    return f != NULL && strcmp(f, name) == 0;
}

static int n_gpus(void)
{
    const char *n = getenv("PARLEY_EMU_GPUS");
    return n != NULL ? atoi(n) : GPUS;
}

const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "another error";
    }
}

const char *cudaGetErrorName(cudaError_t e)
{
    return cudaGetErrorString(e);
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t e = last;
    last = cudaSuccess;
    return e;
}

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 0;
    if (fault("no-driver") || fault("old-driver"))
        return emu_failed(cudaErrorInsufficientDriver);
    if (fault("no-gpu"))
        return emu_failed(cudaErrorNoDevice);
    *n = n_gpus();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    if (index < 0 || index >= n_gpus())
        return emu_failed(cudaErrorInvalidDevice);
    current = index;
    return cudaSuccess;
}

int emu_gpu(void)
{
    return current;
}

static size_t memory(void)
{
    const char *mb = getenv("PARLEY_EMU_MEMORY_MB");
    return (mb != NULL ? strtoull(mb, NULL, 10) : 1024) << 20;
}

/* By what else uses that GPU. */
static size_t taken(int index)
{
    const char *others = getenv("PARLEY_EMU_OTHERS_MB"), *now = emu_fault();
    int gpu = 0, mb = 0;
    const bool said = (others != NULL && sscanf(others, "%d:%d", &gpu, &mb) == 2) || (now != NULL && sscanf(now, "others:%d:%d", &gpu, &mb) == 2);
    return said && gpu == index ? (size_t)mb << 20 : 0;
}

static size_t left(void)
{
    const size_t gone = taken(current) + used[current];
    return gone < memory() ? memory() - gone : 0;
}

size_t emu_shared_limit(void)
{
    return (fault("turing") ? 64 : 99) << 10;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index)
{
    if (index < 0 || index >= n_gpus())
        return emu_failed(cudaErrorInvalidDevice);
    const bool turing = fault("turing");
    *p = (struct cudaDeviceProp){.name = "emulated", .totalGlobalMem = memory(), .uuid.bytes = {'e', 'm', 'u', (char)('0' + index)},
                                 .sharedMemPerBlockOptin = emu_shared_limit(), .minor = turing ? 5 : 0, .multiProcessorCount = 4};
    p->major = turing ? 7 : index > 0 ? 9 : fault("mixed") ? 8 : fault("old-gpu") ? 7 : 9;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int index)
{
    (void)index;
    *value = what == cudaDevAttrMultiProcessorCount ? 4 : what == cudaDevAttrMemoryPoolsSupported ? !fault("pools") : (int)emu_shared_limit();
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = fault("no-driver") ? 0 : fault("old-driver") ? 11040 : 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

/* ---- memory: what is not large is filled with NaN, so that what is read before it is written shows ---------------------------------------------- */

cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    *total = memory();
    *free = left();
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    static atomic_ulong hangs;
    uint8_t *all;
    const char *f = emu_fault();
    while (f != NULL && n > SMALL && strncmp(f, "hang:", 5) == 0 && atoi(f + 5) == current && atomic_fetch_add(&hangs, 1) > 0)
        nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    if (n > left() || posix_memalign((void **)&all, 256, n + HEADER) != 0)
        return emu_failed(cudaErrorMemoryAllocation);
    memcpy(all, &(struct header){n, current}, sizeof(struct header));
    if (n <= LARGE)
        memset(all + HEADER, 0xff, n);
    used[current] += n;
    *p = all + HEADER;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    if (p == NULL)
        return cudaSuccess;
    struct header h;
    memcpy(&h, (uint8_t *)p - HEADER, sizeof h);
    emu_flush_gpu(h.device);
    used[h.device] -= h.n;
    free((uint8_t *)p - HEADER);
    return cudaSuccess;
}

/* A pool is its device's number + 1; there is none with PARLEY_EMU_FAULT=pools. */
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *props)
{
    *pool = (cudaMemPool_t)(uintptr_t)(props->location.id + 1);
    return fault("pools") ? emu_failed(cudaErrorNotSupported) : cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr what, void *value)
{
    (void)pool, (void)what, (void)value;
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool)
{
    (void)pool;
    return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t pool, cudaStream_t s)
{
    (void)s;
    return pool == (cudaMemPool_t)(uintptr_t)(current + 1) ? cudaMalloc(p, n) : emu_failed(cudaErrorInvalidValue);
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t s)
{
    (void)s;
    return cudaFree(p);
}

static struct pinned {
    struct pinned *next;
    char *p;
    size_t n;
} *pinned;
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

/* The place in the list of what has the byte, or the list's end */
static struct pinned **find_pinned(const void *p)
{
    struct pinned **at = &pinned;
    while (*at != NULL && ((const char *)p < (*at)->p || (const char *)p >= (*at)->p + (*at)->n))
        at = &(*at)->next;
    return at;
}

bool emu_pinned(const void *p)
{
    pthread_mutex_lock(&pinned_lock);
    const bool is = *find_pinned(p) != NULL;
    pthread_mutex_unlock(&pinned_lock);
    return is;
}

cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    (void)flags;
    struct pinned *new = malloc(sizeof *new);
    if (new == NULL || (*p = malloc(n + 1)) == NULL) {
        free(new);
        return emu_failed(cudaErrorMemoryAllocation);
    }
    pthread_mutex_lock(&pinned_lock);
    *new = (struct pinned){pinned, *p, n};
    pinned = new;
    pthread_mutex_unlock(&pinned_lock);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    if (p == NULL)
        return cudaSuccess;
    emu_flush_gpu(current);
    pthread_mutex_lock(&pinned_lock);
    struct pinned **at = find_pinned(p), *old = *at;
    if (old != NULL) {
        *at = old->next;
        free(old->p);
        free(old);
    }
    pthread_mutex_unlock(&pinned_lock);
    return old != NULL ? cudaSuccess : emu_failed(cudaErrorInvalidValue);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind)
{
    if (emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    (void)kind;
    memcpy(to, from, n);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t n)
{
    memset(p, value, n);
    return cudaSuccess;
}

struct filling {
    void *p;
    int value;
    size_t n;
};

static void run_filling(void *p)
{
    const struct filling *f = p;
    memset(f->p, f->value, f->n);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s)
{
    const struct filling f = {p, value, n};
    emu_enqueue_bytes(s, run_filling, &f, sizeof f);
    return cudaSuccess;
}

/* ---- copies: from the host's pageable memory the bytes are taken at once, to it a copy returns when they are there; what is the runtime's own is
 * read and written when the copy's turn comes ------------------------------------------------------------------------------------- */

struct copy {
    char *to;
    const char *from;
    size_t to_pitch, from_pitch, width, height;
    char own[]; /* bytes that were taken at once */
};

static void run_copy(void *p)
{
    const struct copy *c = p;
    for (size_t i = 0; i < c->height; i++)
        memcpy(c->to + i * c->to_pitch, (c->from != NULL ? c->from : c->own) + i * c->from_pitch, c->width);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t s)
{
    const bool in = kind == cudaMemcpyHostToDevice && !emu_pinned(from), out = kind == cudaMemcpyDeviceToHost && !emu_pinned(to);
    if (width > to_pitch || width > from_pitch)
        return emu_failed(cudaErrorInvalidValue);
    if ((in || out) && emu_capture_forbids())
        return emu_failed(cudaErrorStreamCaptureUnsupported);
    struct copy *c = malloc(sizeof *c + (in ? width * height : 0));
    if (c == NULL)
        return emu_failed(cudaErrorMemoryAllocation);
    *c = (struct copy){to, from, to_pitch, from_pitch, width, height};
    for (size_t i = 0; in && i < height; i++)
        memcpy(c->own + i * width, c->from + i * from_pitch, width);
    if (in)
        c->from = NULL, c->from_pitch = width;
    emu_enqueue(s, run_copy, free, c);
    return out ? cudaStreamSynchronize(s) : cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s)
{
    return cudaMemcpy2DAsync(to, n, from, n, n, 1, kind, s);
}

/* ---- events: what comes before one is done when it is recorded ------------------------------------------------------------------ */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags)
{
    (void)flags;
    *e = (cudaEvent_t)&last;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    (void)e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    (void)e;
    emu_flush(s);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    (void)e;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags)
{
    (void)s, (void)e, (void)flags;
    return cudaSuccess;
}
