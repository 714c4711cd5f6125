/* nccl: stand-in for libnccl.so.2 between threads of one process, whose GPUs are emulated: the calls that cuda/nccl.c makes, written
 * after NCCL's documentation. A call is only begun when it returns; it is done when all ranks have made theirs, and until then its
 * communicator is in progress. What NCCL forbids is an error here: two ranks on one GPU, calls that do not match, a call while another
 * is in progress.
 *
 * The environment can make it fail, in the last rank's Nth call, or for `stuck` in everybody's:
 *     PARLEY_EMU_NCCL=old             version 2.10
 *     PARLEY_EMU_NCCL=init            communicators cannot be made
 *     PARLEY_EMU_NCCL=absent:N        the call never returns, and so is never made
 *     PARLEY_EMU_NCCL=error:N         it ends in an error
 *     PARLEY_EMU_NCCL=stuck:N         it is enqueued, but the stream does not get through it
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda_runtime_api.h"
#include "tests/cuda_emu/emu.h"

#define API __attribute__((visibility("default")))

enum { SUCCESS, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
enum { MOST = 16, FLOAT32 = 7, SUM = 0, MESSAGES = 2 * MOST };
enum kind { NONE, INIT, REDUCE, GATHER, MESSAGE };

typedef struct {
    char bytes[128];
} id_t_;

struct message {
    bool out; /* sent, else received */
    int peer;
    void *p;
    size_t n;
};

struct call {
    enum kind kind;
    const float *from;
    float *to;
    size_t n;
    struct message messages[MESSAGES];
    int n_messages;
    cudaStream_t stream;
};

struct comm {
    struct group *group;
    int rank, device, state;
    unsigned long n_calls;
    struct call call;
    cudaStream_t held;
};

struct group {
    id_t_ id;
    int size, n_joined, n_left;
    struct comm *members[MOST];
    struct group *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct group *groups;
static _Thread_local struct {
    int depth;
    struct comm *comm;
    struct call call;
} grouped;

static bool fault(const char *name, unsigned long *at)
{
    const char *f = getenv("PARLEY_EMU_NCCL");
    const size_t n = strlen(name);
    if (f == NULL || strncmp(f, name, n) != 0 || (f[n] != ':' && f[n] != '\0'))
        return false;
    if (at != NULL)
        *at = f[n] == ':' ? strtoul(f + n + 1, NULL, 10) : 0;
    return true;
}

/* ---- what is done when all have come ----------------------------------------------------------------------------------------- */

static int reduce(struct group *g)
{
    const size_t n = g->members[0]->call.n;
    float *sum = malloc(n * sizeof *sum);
    memcpy(sum, g->members[0]->call.from, n * sizeof *sum);
    for (int r = 1; r < g->size; r++)
        for (size_t i = 0; i < n; i++)
            sum[i] += g->members[r]->call.from[i];
    for (int r = 0; r < g->size; r++)
        memcpy(g->members[r]->call.to, sum, n * sizeof *sum);
    free(sum);
    return SUCCESS;
}

static int gather(struct group *g)
{
    const size_t n = g->members[0]->call.n;
    for (int r = 0; r < g->size; r++)
        for (int from = 0; from < g->size; from++)
            memmove(g->members[r]->call.to + n * (size_t)from, g->members[from]->call.from, n * sizeof(float));
    return SUCCESS;
}

/* The first message of `from` to `to` that has not been taken. */
static struct message *sent(struct group *g, int from, int to)
{
    struct call *c = &g->members[from]->call;
    for (int i = 0; i < c->n_messages; i++)
        if (c->messages[i].out && c->messages[i].peer == to && c->messages[i].p != NULL)
            return &c->messages[i];
    return NULL;
}

static int deliver(struct group *g)
{
    for (int r = 0; r < g->size; r++) {
        struct call *c = &g->members[r]->call;
        for (int i = 0; i < c->n_messages; i++) {
            struct message *in = &c->messages[i], *out = in->out ? NULL : sent(g, in->peer, r);
            if (in->out)
                continue;
            if (out == NULL || out->n != in->n)
                return INVALID_USAGE;
            memcpy(in->p, out->p, in->n * sizeof(float));
            out->p = NULL;
        }
    }
    for (int r = 0; r < g->size; r++)
        for (int to = 0; to < g->size; to++)
            if (sent(g, r, to) != NULL)
                return INVALID_USAGE;
    return SUCCESS;
}

static int join(const struct group *g)
{
    for (int a = 0; a < g->size; a++)
        for (int b = a + 1; b < g->size; b++)
            if (g->members[a]->device == g->members[b]->device)
                return INVALID_USAGE;
    return SUCCESS;
}

static int act(struct group *g)
{
    const struct call *first = &g->members[0]->call;
    for (int r = 1; r < g->size; r++)
        if (g->members[r]->call.kind != first->kind || g->members[r]->call.n != first->n)
            return INVALID_USAGE;
    switch (first->kind) {
    case INIT: return join(g);
    case REDUCE: return reduce(g);
    case GATHER: return gather(g);
    case MESSAGE: return deliver(g);
    case NONE: break;
    }
    return INTERNAL_ERROR;
}

/* With the lock: done when this was the last one who was missing. */
static void come(struct comm *c)
{
    struct group *g = c->group;
    for (int r = 0; r < g->size; r++)
        if (g->members[r] == NULL || g->members[r]->call.kind == NONE)
            return;
    const int e = act(g);
    for (int r = 0; r < g->size; r++) {
        g->members[r]->state = e;
        g->members[r]->call.kind = NONE;
    }
}

static int begin(struct comm *c, const struct call *call)
{
    unsigned long at;
    const bool last = c->rank == c->group->size - 1;
    c->n_calls++;
    if (call->kind != INIT)
        emu_stream_flush(call->stream);
    while (last && fault("absent", &at) && c->n_calls == at)
        pause();
    pthread_mutex_lock(&lock);
    if (c->state != SUCCESS) {
        const int e = c->state == IN_PROGRESS ? INVALID_USAGE : c->state;
        pthread_mutex_unlock(&lock);
        return e;
    }
    c->call = *call;
    c->state = IN_PROGRESS;
    if (last && fault("error", &at) && c->n_calls == at) {
        c->call.kind = NONE;
        c->state = REMOTE_ERROR;
    } else if (fault("stuck", &at) && c->n_calls == at) {
        c->call.kind = NONE;
        c->state = SUCCESS;
        c->held = call->stream;
        emu_stream_hold(c->held, true);
    } else {
        come(c);
    }
    pthread_mutex_unlock(&lock);
    return IN_PROGRESS;
}

/* ---- the calls ------------------------------------------------------------------------------------------------------------------ */

API int ncclGetVersion(int *version);
API int ncclGetUniqueId(id_t_ *id);
API int ncclCommInitRankConfig(struct comm **out, int size, id_t_ id, int rank, const void *config);
API int ncclCommGetAsyncError(struct comm *c, int *error);
API int ncclCommAbort(struct comm *c);
API const char *ncclGetErrorString(int error);
API const char *ncclGetLastError(struct comm *c);
API int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, struct comm *c, cudaStream_t s);
API int ncclAllGather(const void *from, void *to, size_t n, int type, struct comm *c, cudaStream_t s);
API int ncclSend(const void *from, size_t n, int type, int peer, struct comm *c, cudaStream_t s);
API int ncclRecv(void *to, size_t n, int type, int peer, struct comm *c, cudaStream_t s);
API int ncclGroupStart(void);
API int ncclGroupEnd(void);

int ncclGetVersion(int *version)
{
    *version = fault("old", NULL) ? 21003 : 23007;
    return SUCCESS;
}

int ncclGetUniqueId(id_t_ *id)
{
    static unsigned n;
    pthread_mutex_lock(&lock);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "stand-in %d %u", (int)getpid(), ++n);
    struct group *g = calloc(1, sizeof *g);
    g->id = *id;
    g->next = groups;
    groups = g;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommInitRankConfig(struct comm **out, int size, id_t_ id, int rank, const void *config)
{
    struct {
        size_t size;
        unsigned magic, version;
        int blocking;
    } head;
    memcpy(&head, config, sizeof head);
    if (head.magic != 0xcafebeef || head.size < sizeof head || head.version < 21400 || head.blocking != 0 || size < 1 || size > MOST || rank < 0 ||
        rank >= size)
        return INVALID_ARGUMENT;
    if (fault("init", NULL))
        return SYSTEM_ERROR;
    pthread_mutex_lock(&lock);
    struct group *g = groups;
    while (g != NULL && memcmp(&g->id, &id, sizeof id) != 0)
        g = g->next;
    struct comm *c = g != NULL && g->members[rank] == NULL ? calloc(1, sizeof *c) : NULL;
    if (c == NULL) {
        pthread_mutex_unlock(&lock);
        fprintf(stderr, "nccl stand-in: ranks are threads of one process here\n");
        return SYSTEM_ERROR;
    }
    *c = (struct comm){.group = g, .rank = rank, .state = IN_PROGRESS, .call.kind = INIT, .device = emu_gpu()};
    g->size = size;
    g->members[rank] = c;
    come(c);
    pthread_mutex_unlock(&lock);
    *out = c;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(struct comm *c, int *error)
{
    pthread_mutex_lock(&lock);
    *error = c->state;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

/* The others never come to an end with what this rank has not done. */
int ncclCommAbort(struct comm *c)
{
    pthread_mutex_lock(&lock);
    struct group *g = c->group;
    if (c->held != NULL)
        emu_stream_hold(c->held, false);
    g->members[c->rank] = NULL;
    if (++g->n_left == g->size) {
        struct group **at = &groups;
        while (*at != g)
            at = &(*at)->next;
        *at = g->next;
        free(g);
    }
    pthread_mutex_unlock(&lock);
    free(c);
    return SUCCESS;
}

const char *ncclGetErrorString(int error)
{
    return error == REMOTE_ERROR ? "remote process exited or there was a network error" : error == SYSTEM_ERROR ? "unhandled system error" : "invalid usage";
}

const char *ncclGetLastError(struct comm *c)
{
    (void)c;
    return "";
}

int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, struct comm *c, cudaStream_t s)
{
    return type != FLOAT32 || op != SUM ? INVALID_ARGUMENT : begin(c, &(struct call){.kind = REDUCE, .from = from, .to = to, .n = n, .stream = s});
}

int ncclAllGather(const void *from, void *to, size_t n, int type, struct comm *c, cudaStream_t s)
{
    return type != FLOAT32 ? INVALID_ARGUMENT : begin(c, &(struct call){.kind = GATHER, .from = from, .to = to, .n = n, .stream = s});
}

static int message(struct comm *c, struct message m, int type, cudaStream_t s)
{
    struct call *call = &grouped.call;
    if (type != FLOAT32 || m.peer < 0 || m.peer >= c->group->size || call->n_messages == MESSAGES)
        return INVALID_ARGUMENT;
    if (grouped.depth == 0)
        *call = (struct call){.kind = MESSAGE};
    call->messages[call->n_messages++] = m;
    call->stream = s;
    grouped.comm = c;
    if (grouped.depth > 0)
        return SUCCESS;
    const int e = begin(c, call);
    return e == IN_PROGRESS ? SUCCESS : e; /* as NCCL may, though it is not enqueued yet */
}

int ncclSend(const void *from, size_t n, int type, int peer, struct comm *c, cudaStream_t s)
{
    return message(c, (struct message){true, peer, (void *)(uintptr_t)from, n}, type, s);
}

int ncclRecv(void *to, size_t n, int type, int peer, struct comm *c, cudaStream_t s)
{
    return message(c, (struct message){false, peer, to, n}, type, s);
}

int ncclGroupStart(void)
{
    if (grouped.depth++ == 0) {
        grouped.call = (struct call){.kind = MESSAGE};
        grouped.comm = NULL;
    }
    return SUCCESS;
}

int ncclGroupEnd(void)
{
    if (--grouped.depth > 0 || grouped.comm == NULL)
        return SUCCESS;
    return begin(grouped.comm, &grouped.call);
}
