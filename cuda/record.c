/* record: steps of decodes as CUDA graphs, so that their hundreds of kernels cost one launch.
 *
 * A graph has the pointers and sizes of when it was captured. What changes from step to step are the batch's arrays, which lie at
 * the same places of the stage for the same number of tokens (device.c), and how many spans attention has, which is rounded up to a
 * power of two that is part of the key. Weights, caches and scratch stay where they are, until some memory is freed: all graphs from
 * before that are made anew.
 *
 * A key that is new runs as ever, so that scratch has its size and kernels are loaded; when it comes again it is captured. What
 * cannot be captured (an upload, more scratch) ends the capture, and the step runs as ever.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "cuda/cuda.h"

enum { MOST_TRIES = 3, MOST_TOKENS = 256 };

_Thread_local const struct pl_cuda *pl_cuda_captured;

static void drop(struct pl_cuda_recorded *r)
{
    if (r->exec != NULL)
        (void)cudaGraphExecDestroy(r->exec);
    *r = (struct pl_cuda_recorded){0};
}

void pl_cuda_record_close(struct pl_cuda *c)
{
    for (uint32_t i = 0; i < PL_CUDA_RECORDED; i++)
        drop(&c->record.steps[i]);
}

void pl_cuda_record_set(struct pl_device *dev, bool on)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    pl_cuda_record_close(c);
    c->record.off = !on;
}

uint32_t pl_cuda_record_tokens(struct pl_device *dev, uint32_t n_tokens)
{
    uint32_t n = 1;
    while (n < n_tokens)
        n *= 2;
    return pl_cuda_of(dev)->record.off || n > MOST_TOKENS ? 0 : n;
}

/* The key's place: its own, an empty one, or that of what was not used for longest. */
static struct pl_cuda_recorded *place_of(struct pl_cuda *c, const struct pl_cuda_recorded *key)
{
    struct pl_cuda_recorded *place = &c->record.steps[0];
    for (uint32_t i = 0; i < PL_CUDA_RECORDED; i++) {
        struct pl_cuda_recorded *r = &c->record.steps[i];
        if (r->owner == key->owner && r->kv == key->kv && r->n_tokens == key->n_tokens && r->n_spans == key->n_spans && r->stage == key->stage)
            return r;
        if (r->used < place->used)
            place = r;
    }
    drop(place);
    *place = *key;
    return place;
}

/* Told once: it is no failure of the device. */
static pl_status failed(struct pl_cuda *c, struct pl_cuda_recorded *r, const char *why)
{
    char text[300];
    (void)cudaGetLastError();
    r->exec = NULL;
    r->n_failed++;
    snprintf(text, sizeof text, "%s: a step of %u tokens cannot be recorded as a CUDA graph (%s), and runs kernel by kernel", c->name, r->n_tokens, why);
    if (!c->record.told && c->report != NULL)
        c->report(text);
    c->record.told = true;
    return PL_ENOTSUP;
}

pl_status pl_cuda_record_op(struct pl_device *dev, const void *owner, const struct pl_kvdev *kv, const struct pl_batch *b, bool *known)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    const uint32_t n_spans = pl_cuda_round_spans(pl_cuda_spans(b));
    *known = false;
    if (c->record.off || b->n_tokens != b->n_seqs || b->n_rows != b->n_seqs || b->n_tokens > MOST_TOKENS)
        return PL_ENOTSUP;
    const struct pl_cuda_recorded key = {.owner = owner, .kv = kv, .stage = c->stage.dev, .n_tokens = b->n_tokens, .n_spans = n_spans};
    struct pl_cuda_recorded *r = place_of(c, &key);
    r->used = ++c->record.clock;
    c->record.current = r;
    c->record.n_spans = n_spans;
    if (r->exec != NULL && r->freed != atomic_load(&c->record.freed)) {
        (void)cudaGraphExecDestroy(r->exec);
        r->exec = NULL;
    }
    *known = r->exec != NULL;
    if (*known)
        return PL_OK;
    if (!r->seen || r->n_failed >= MOST_TRIES) {
        r->seen = true;
        return PL_ENOTSUP;
    }
    r->freed = atomic_load(&c->record.freed);
    c->record.broken = false;
    const cudaError_t e = cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal);
    if (e != cudaSuccess)
        return failed(c, r, cudaGetErrorString(e));
    pl_cuda_captured = c;
    return PL_OK;
}

/* Ends the capture and makes the graph that is launched from now on. */
static pl_status finish(struct pl_cuda *c, struct pl_cuda_recorded *r, bool whole)
{
    cudaGraph_t graph = NULL;
    pl_cuda_captured = NULL;
    cudaError_t e = cudaStreamEndCapture(c->stream, &graph);
    const bool good = whole && !c->record.broken;
    if (e == cudaSuccess && good)
        e = cudaGraphInstantiate(&r->exec, graph, 0);
    if (graph != NULL)
        (void)cudaGraphDestroy(graph);
    if (e == cudaSuccess && good)
        return PL_OK;
    return failed(c, r, e != cudaSuccess ? cudaGetErrorString(e) : "it needs more than kernels");
}

pl_status pl_cuda_repeat_op(struct pl_device *dev, bool whole)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_cuda_recorded *r = c->record.current;
    if (pl_cuda_captured == c) {
        const pl_status rc = finish(c, r, whole);
        if (rc != PL_OK)
            return rc;
    }
    return pl_cuda_check(c, cudaGraphLaunch(r->exec, c->stream), "a recorded step");
}
