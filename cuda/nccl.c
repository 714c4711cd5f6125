/* nccl: ranks' exchanges from GPU to GPU. NCCL is found at run time, as cuBLAS is; its types and numbers are its ABI, and where its
 * header is at hand the compiler checks them.
 *
 * DESIGN. The communicator is a non-blocking one: no call of NCCL waits for another rank, and what is under way is asked about. So there
 * are two places that wait, settle (until a call is enqueued) and pl_nccl_wait (until the stream is through), and both look at the clock,
 * at NCCL's own errors, and at whether a rank is known to have ended; then the communicator is aborted, which also ends the kernels that
 * wait on the GPU. Collectives go to the device's stream and nothing is waited for.
 * A row's bits may depend on that row alone. NCCL's sums of more than two ranks are taken in an order that depends on where in the
 * message a value stands: with more, values are exchanged and summed here, in the order of ranks.
 * Steps of several ranks are not recorded as CUDA graphs.
 * NCCL connects and takes memory of the GPU when it is first used in a way: start uses it in each, before the cache takes what is left.
 * A non-blocking call starts a thread of NCCL's where it has connections to make, and launches on the caller's where they are there, which is all
 * calls but start's (ncclGroupEnd, 2.18 to 2.2x): then settle asks once, and looks at no clock.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/clock.h"
#include "core/comm/comm.h"
#include "cuda/cuda.h"

enum { SUCCESS = 0, IN_PROGRESS = 7, FLOAT32 = 7, SUM = 0, OLDEST = 21800, CONFIG_MAGIC = (int)0xcafebeef, ID_BYTES = 128 };
enum { FEW = 16384 /* values */, MANY = 1 << 20 /* of start's exchanges */, ALONE = 2 /* ranks whose sum has one order */, UNEVEN = 256 /* columns */ };
enum { CHECK_NS = 1000000, YIELD_NS = 100000000, NAP_NS = 50000 };

struct unique {
    char bytes[ID_BYTES];
};

/* As of version 2.18; what later ones have more is as they choose. */
struct config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share, unused;
};

static struct {
    int (*version)(int *version);
    int (*unique_id)(struct unique *id);
    int (*init)(void **comm, int n_ranks, struct unique id, int rank, struct config *config);
    int (*async_error)(void *comm, int *error);
    int (*abort)(void *comm);
    const char *(*error_text)(int error);
    const char *(*last_error)(void *comm);
    int (*all_reduce)(const void *from, void *to, size_t n, int type, int op, void *comm, cudaStream_t s);
    int (*all_gather)(const void *from, void *to, size_t n, int type, void *comm, cudaStream_t s);
    int (*send)(const void *from, size_t n, int type, int peer, void *comm, cudaStream_t s);
    int (*recv)(void *to, size_t n, int type, int peer, void *comm, cudaStream_t s);
    int (*group_start)(void);
    int (*group_end)(void);
} calls; /* the same for every device */

#if __has_include(<nccl.h>)
#include <nccl.h>
_Static_assert((int)ncclSuccess == SUCCESS && (int)ncclInProgress == IN_PROGRESS && (int)ncclFloat32 == FLOAT32 && (int)ncclSum == SUM, "NCCL's numbers");
_Static_assert(sizeof(ncclUniqueId) == ID_BYTES && sizeof(ncclComm_t) == sizeof(void *) && sizeof(ncclResult_t) == sizeof(int), "NCCL's types");
_Static_assert(offsetof(ncclConfig_t, version) == offsetof(struct config, version) && offsetof(ncclConfig_t, blocking) == offsetof(struct config, blocking) &&
                   offsetof(ncclConfig_t, splitShare) == offsetof(struct config, split_share), "NCCL's configuration");
#endif

_Static_assert((int)PL_CUDA_RANKS >= (int)PL_MAX_RANKS, "kernels know of all ranks");

struct pl_nccl {
    struct pl_comm base;
    struct pl_comm *host; /* borrowed */
    struct pl_cuda *cuda;
    void *comm; /* NULL = aborted */
    atomic_bool failed;
    bool started, refused; /* refused: by NCCL itself */
    char why[460];         /* it failed */
};

static struct pl_nccl *nccl_of(struct pl_comm *c)
{
    return (struct pl_nccl *)c;
}

/* ---- the library --------------------------------------------------------------------------------------------------------- */

#define REMEDY "install NVIDIA's libnccl2 (or the Python package nvidia-nccl-cu13, with its folder in LD_LIBRARY_PATH), or take --rank-exchange host"

static bool find_calls(void *library)
{
    const struct {
        void *place;
        const char *name;
    } wanted[] = {
        {&calls.version, "ncclGetVersion"}, {&calls.unique_id, "ncclGetUniqueId"}, {&calls.init, "ncclCommInitRankConfig"},
        {&calls.async_error, "ncclCommGetAsyncError"}, {&calls.abort, "ncclCommAbort"}, {&calls.error_text, "ncclGetErrorString"},
        {&calls.last_error, "ncclGetLastError"}, {&calls.all_reduce, "ncclAllReduce"}, {&calls.all_gather, "ncclAllGather"},
        {&calls.send, "ncclSend"}, {&calls.recv, "ncclRecv"}, {&calls.group_start, "ncclGroupStart"}, {&calls.group_end, "ncclGroupEnd"},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        void *call = dlsym(library, wanted[i].name);
        if (call == NULL)
            return false;
        memcpy(wanted[i].place, &call, sizeof call);
    }
    return true;
}

/* The library stays until the process ends: it has threads of its own. */
static pl_status load(uint32_t *version, struct pl_err *err)
{
    int v = 0;
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "NCCL, by which GPUs exchange, cannot be loaded: %.120s: " REMEDY, dlerror());
    if (!find_calls(library) || calls.version(&v) != SUCCESS)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "libnccl.so.2 lacks a call that parley makes: " REMEDY);
    if (v < OLDEST) /* those before 2.9 count otherwise, as 2804 */
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "libnccl.so.2 is version %d.%d, parley needs %d.%d: " REMEDY, v >= 10000 ? v / 10000 : v / 1000,
                             v >= 10000 ? v / 100 % 100 : v / 100 % 10, OLDEST / 10000, OLDEST / 100 % 100);
    *version = (uint32_t)v;
    return PL_OK;
}

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER; /* ranks in threads come at once */

static pl_status find(struct pl_device *dev, uint32_t *version, struct pl_err *err)
{
    (void)dev;
    pthread_mutex_lock(&loading);
    const pl_status rc = load(version, err);
    pthread_mutex_unlock(&loading);
    return rc;
}

/* ---- waiting ------------------------------------------------------------------------------------------------------------- */

static pl_status fail(struct pl_nccl *n)
{
    atomic_store(&n->failed, true);
    if (n->comm != NULL)
        (void)calls.abort(n->comm);
    n->comm = NULL;
    n->host->ops->give_up(n->host);
    return PL_ERANK;
}

__attribute__((format(printf, 2, 3))) static pl_status fail_with(struct pl_nccl *n, const char *fmt, ...)
{
    char why[300];
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, sizeof why, fmt, args);
    va_end(args);
    snprintf(n->why, sizeof n->why, "rank %u of %u, %s: %s", n->base.rank, n->base.size, n->cuda->name, why);
    if (n->started && n->cuda->report != NULL)
        n->cuda->report(n->why);
    return fail(n);
}

static pl_status broken(struct pl_nccl *n, int e, const char *what)
{
    n->refused = true;
    const char *more = n->comm != NULL ? calls.last_error(n->comm) : NULL;
    return fail_with(n, "NCCL failed, %s: %s%s%.180s", what, calls.error_text(e), more != NULL && more[0] != '\0' ? ": " : "", more != NULL ? more : "");
}

struct patience {
    uint64_t since, checked; /* 0 = the waiting has not begun */
};

/* One turn of waiting; fails when a rank is gone or the time is up. */
static pl_status wait_turn(struct pl_nccl *n, struct patience *p, const char *what)
{
    const uint64_t now = pl_now_ns();
    if (atomic_load(&n->failed))
        return fail(n);
    if (p->since == 0)
        *p = (struct patience){now, now};
    if (now - p->checked < CHECK_NS) {
        sched_yield();
        return PL_OK;
    }
    p->checked = now;
    if (n->host->ops->check(n->host) != PL_OK)
        return fail(n);
    if (now - p->since > (uint64_t)n->base.timeout_ms * 1000000)
        return fail_with(n, "the other ranks have not come for %.1f s, %s", n->base.timeout_ms / 1e3, what);
    if (now - p->since > YIELD_NS)
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    return PL_OK;
}

static bool bad(int e)
{
    return e != SUCCESS && e != IN_PROGRESS;
}

/* Until the call that returned e has done its work, which is to enqueue; success alone does not say so. */
static pl_status settle(struct pl_nccl *n, int e, const char *what)
{
    struct patience p = {0};
    while (!bad(e)) {
        const int asked = calls.async_error(n->comm, &e);
        e = asked != SUCCESS ? asked : e;
        if (e == SUCCESS)
            return PL_OK;
        const pl_status rc = bad(e) ? PL_OK : wait_turn(n, &p, what);
        if (rc != PL_OK)
            return rc;
    }
    return broken(n, e, what);
}

pl_status pl_nccl_wait(struct pl_cuda *c, const char *what)
{
    struct pl_nccl *n = c->nccl;
    struct patience p = {0};
    cudaError_t e;
    while ((e = cudaStreamQuery(c->stream)) == cudaErrorNotReady) {
        int state = SUCCESS;
        (void)cudaGetLastError(); /* not an error for others to find */
        const pl_status rc = wait_turn(n, &p, what);
        if (rc != PL_OK)
            return rc;
        if (calls.async_error(n->comm, &state) != SUCCESS || bad(state))
            return broken(n, state, what);
    }
    return pl_cuda_check(c, e, what);
}

/* ---- on the device --------------------------------------------------------------------------------------------------------- */

static pl_status ready(struct pl_nccl *n, struct pl_device *dev)
{
    PL_ASSERT(dev == &n->cuda->base);
    return atomic_load(&n->failed) ? fail(n) : PL_OK;
}

/* A sum takes twice its values, a gathering once and room for uneven shares; rank 0 gathers the vocabulary of as many rows in the end. */
size_t pl_nccl_bytes(const struct pl_cuda *c, const struct pl_step_shape *s)
{
    if (c->nccl == NULL)
        return 0;
    const size_t within = 2 * (size_t)s->n_in + UNEVEN * c->nccl->base.size, last = c->nccl->base.rank == 0 ? s->n_out : 0;
    return (within > last ? within : last) * s->n_tokens * sizeof(float);
}

static float *scratch(struct pl_nccl *n, size_t n_floats)
{
    return pl_cuda_scratch(n->cuda, PL_CUDA_SCRATCH_RANKS, n_floats * sizeof(float));
}

static pl_status gather_equal(struct pl_nccl *n, const float *from, float *to, size_t n_floats, const char *what)
{
    return settle(n, calls.all_gather(from, to, n_floats, FLOAT32, n->comm, n->cuda->stream), what);
}

/* Sums size vectors that lie `stride` apart. */
static pl_status sum_up(struct pl_nccl *n, float *out, const float *parts, size_t stride, size_t n_floats)
{
    return pl_cuda_check(n->cuda, pl_cuda_sum_ranks(n->cuda->stream, out, parts, stride, n->base.size, n_floats), "summing over ranks");
}

/* Everybody's values to everybody. */
static pl_status sum_few(struct pl_nccl *n, float *v, size_t n_floats)
{
    float *all = scratch(n, n_floats * n->base.size);
    if (all == NULL)
        return pl_cuda_failed(n->cuda);
    const pl_status rc = gather_equal(n, v, all, n_floats, "gathering values to sum");
    return rc == PL_OK ? sum_up(n, v, all, n_floats, n_floats) : rc;
}

static size_t slice_size(size_t slice, unsigned r, size_t n_floats)
{
    const size_t first = slice * r;
    return first >= n_floats ? 0 : n_floats - first < slice ? n_floats - first : slice;
}

/* Each rank gets its slice of everybody's values, and hands out the sum. */
static pl_status sum_many(struct pl_nccl *n, float *v, size_t n_floats)
{
    const unsigned me = n->base.rank, size = n->base.size;
    const size_t slice = (n_floats + size - 1) / size, mine = slice_size(slice, me, n_floats);
    float *parts = scratch(n, 2 * slice * size), *sums = parts != NULL ? parts + slice * size : NULL;
    if (parts == NULL)
        return pl_cuda_failed(n->cuda);
    int e = calls.group_start();
    for (unsigned r = 0; r < size && !bad(e); r++) {
        const size_t theirs = slice_size(slice, r, n_floats);
        if (theirs > 0)
            e = calls.send(v + slice * r, theirs, FLOAT32, (int)r, n->comm, n->cuda->stream);
        if (mine > 0 && !bad(e))
            e = calls.recv(parts + slice * r, mine, FLOAT32, (int)r, n->comm, n->cuda->stream);
    }
    const int ended = calls.group_end();
    pl_status rc = settle(n, bad(e) ? e : ended, "exchanging values to sum");
    if (rc == PL_OK && mine > 0)
        rc = sum_up(n, sums + slice * me, parts, slice, mine);
    if (rc == PL_OK)
        rc = gather_equal(n, sums + slice * me, sums, slice, "gathering sums");
    return rc != PL_OK ? rc
                       : pl_cuda_check(n->cuda, cudaMemcpyAsync(v, sums, n_floats * sizeof *v, cudaMemcpyDeviceToDevice, n->cuda->stream), "copying sums");
}

static pl_status all_reduce(struct pl_comm *c, struct pl_device *dev, pl_view v)
{
    struct pl_nccl *n = nccl_of(c);
    const size_t n_floats = (size_t)v.rows * v.cols;
    float *p = v.buf->data + v.offset;
    const pl_status rc = ready(n, dev);
    PL_ASSERT(v.stride == v.cols || v.rows == 1);
    if (rc != PL_OK)
        return rc;
    if (c->size > ALONE)
        return n_floats <= FEW ? sum_few(n, p, n_floats) : sum_many(n, p, n_floats);
    return settle(n, calls.all_reduce(p, p, n_floats, FLOAT32, SUM, n->comm, n->cuda->stream), "summing over ranks");
}

static pl_status copy_columns(struct pl_nccl *n, float *to, size_t to_stride, const float *from, size_t from_stride, uint32_t cols, uint32_t rows)
{
    const cudaError_t e = cudaMemcpy2DAsync(to, to_stride * sizeof *to, from, from_stride * sizeof *to, cols * sizeof *to, rows, cudaMemcpyDeviceToDevice,
                                            n->cuda->stream);
    return pl_cuda_check(n->cuda, e, "copying columns");
}

/* What has come from the other ranks, to its columns of the first n_rows of v. */
static pl_status spread(struct pl_nccl *n, pl_view v, uint32_t n_rows, const float *from, const uint32_t *first, uint32_t widest)
{
    struct pl_cuda_shares shares = {.size = n->base.size, .own = n->base.rank, .widest = widest};
    memcpy(shares.first, first, (shares.size + 1) * sizeof *first);
    return pl_cuda_check(n->cuda, pl_cuda_spread(n->cuda->stream, pl_cuda_mat(pl_view_rows(v, 0, n_rows)), from, shares), "placing columns");
}

/* One row of equal shares lies as NCCL leaves it. */
static bool is_in_place(const struct pl_comm *c, pl_view v, const uint32_t *first)
{
    bool equal = v.rows == 1;
    for (unsigned r = 0; r < c->size && equal; r++)
        equal = first[r] == r * first[1];
    return equal && first[c->size] == c->size * first[1];
}

/* Every rank's columns take as much room as the widest has, so that all send the same. */
static pl_status all_gather(struct pl_comm *c, struct pl_device *dev, pl_view v, const uint32_t *first)
{
    struct pl_nccl *n = nccl_of(c);
    uint32_t widest = 0;
    for (unsigned r = 0; r < c->size; r++)
        widest = first[r + 1] - first[r] > widest ? first[r + 1] - first[r] : widest;
    const size_t room = (size_t)widest * v.rows;
    float *p = v.buf->data + v.offset;
    pl_status rc = ready(n, dev);
    if (rc == PL_OK && is_in_place(c, v, first))
        return gather_equal(n, p + first[c->rank], p, first[1], "gathering columns");
    float *all = rc == PL_OK ? scratch(n, room * c->size) : NULL;
    if (all == NULL)
        return rc != PL_OK ? rc : pl_cuda_failed(n->cuda);
    rc = copy_columns(n, all + room * c->rank, widest, p + first[c->rank], v.stride, first[c->rank + 1] - first[c->rank], v.rows);
    if (rc == PL_OK)
        rc = gather_equal(n, all + room * c->rank, all, room, "gathering columns");
    return rc == PL_OK ? spread(n, v, v.rows, all, first, widest) : rc;
}

static pl_status send_part(struct pl_nccl *n, pl_view part)
{
    float *from = part.buf->data + part.offset, *packed = from;
    if (part.stride != part.cols && part.rows > 1) {
        if ((packed = scratch(n, (size_t)part.rows * part.cols)) == NULL)
            return pl_cuda_failed(n->cuda);
        const pl_status rc = copy_columns(n, packed, part.cols, from, part.stride, part.cols, part.rows);
        if (rc != PL_OK)
            return rc;
    }
    int e = calls.group_start();
    if (!bad(e))
        e = calls.send(packed, (size_t)part.rows * part.cols, FLOAT32, 0, n->comm, n->cuda->stream);
    const int ended = calls.group_end();
    return settle(n, bad(e) ? e : ended, "sending columns");
}

static pl_status gather(struct pl_comm *c, struct pl_device *dev, pl_view out, pl_view part, const uint32_t *first)
{
    struct pl_nccl *n = nccl_of(c);
    const size_t rows = part.rows;
    pl_status rc = ready(n, dev);
    if (rc != PL_OK || c->rank != 0)
        return rc != PL_OK ? rc : send_part(n, part);
    float *all = rows == 1 ? out.buf->data + out.offset + first[1] : scratch(n, rows * (first[c->size] - first[1]) + 1); /* one row: to its place */
    if (all == NULL)
        return pl_cuda_failed(n->cuda);
    int e = calls.group_start();
    for (unsigned r = 1; r < c->size && !bad(e); r++)
        e = calls.recv(all + rows * (first[r] - first[1]), rows * (first[r + 1] - first[r]), FLOAT32, (int)r, n->comm, n->cuda->stream);
    const int ended = calls.group_end();
    rc = settle(n, bad(e) ? e : ended, "receiving columns");
    return rc == PL_OK && rows > 1 ? spread(n, out, part.rows, all, first, 0) : rc;
}

/* ---- what is not the device's ------------------------------------------------------------------------------------------------ */

/* With this one's patience. */
#define BY_HOST(c, op, ...)                                                                                            \
    do {                                                                                                               \
        struct pl_comm *host = nccl_of(c)->host;                                                                       \
        const int timeout_ms = host->timeout_ms;                                                                       \
        host->timeout_ms = (c)->timeout_ms;                                                                            \
        const pl_status rc = host->ops->op(host, __VA_ARGS__);                                                         \
        host->timeout_ms = timeout_ms;                                                                                 \
        return rc;                                                                                                     \
    } while (0)

static pl_status broadcast(struct pl_comm *c, void *bytes, size_t n)
{
    BY_HOST(c, broadcast, bytes, n);
}

static pl_status share(struct pl_comm *c, void *all, size_t n)
{
    BY_HOST(c, share, all, n);
}

static pl_status agree(struct pl_comm *c, int *value)
{
    BY_HOST(c, agree, value);
}

static pl_status check(struct pl_comm *c)
{
    struct pl_nccl *n = nccl_of(c);
    return atomic_load(&n->failed) ? PL_ERANK : n->host->ops->check(n->host);
}

/* From any thread: the one that waits aborts. */
static void give_up(struct pl_comm *c)
{
    struct pl_nccl *n = nccl_of(c);
    atomic_store(&n->failed, true);
    n->host->ops->give_up(n->host);
}

static void end_processes(struct pl_comm *c, int status)
{
    struct pl_nccl *n = nccl_of(c);
    n->host->ops->end_processes(n->host, status);
}

static void nothing(struct pl_comm *c) /* the device closes it */
{
    (void)c;
}

static const struct pl_comm_ops nccl_ops = {
    .name = "nccl",
    .broadcast = broadcast,
    .share = share,
    .agree = agree,
    .check = check,
    .all_reduce = all_reduce,
    .all_gather = all_gather,
    .gather = gather,
    .give_up = give_up,
    .end_processes = end_processes,
    .close = nothing,
};

/* ---- life -------------------------------------------------------------------------------------------------------------------- */

static void identify(struct pl_device *dev, struct pl_device_id *id)
{
    *id = pl_cuda_of(dev)->id;
}

/* Every way in which NCCL is called, with n_floats of each rank; `to` has room for all of them. */
static pl_status use(struct pl_nccl *n, const float *from, float *to, size_t n_floats)
{
    const unsigned size = n->base.size;
    pl_status rc = gather_equal(n, from, to, n_floats, "starting to gather");
    if (rc == PL_OK && size <= ALONE)
        rc = settle(n, calls.all_reduce(from, to, n_floats, FLOAT32, SUM, n->comm, n->cuda->stream), "starting to sum");
    if (rc != PL_OK)
        return rc;
    int e = calls.group_start();
    for (unsigned r = 0; r < size && !bad(e); r++) {
        e = calls.send(from, n_floats, FLOAT32, (int)r, n->comm, n->cuda->stream);
        if (!bad(e))
            e = calls.recv(to + n_floats * r, n_floats, FLOAT32, (int)r, n->comm, n->cuda->stream);
    }
    const int ended = calls.group_end();
    return settle(n, bad(e) ? e : ended, "starting to send and receive");
}

static pl_status use_once(struct pl_nccl *n)
{
    struct pl_cuda *c = n->cuda;
    const size_t many = MANY / n->base.size;
    float *all = NULL;
    pl_status rc = pl_cuda_alloc(c, (void **)&all, 2 * MANY * sizeof *all);
    if (rc == PL_OK)
        rc = pl_cuda_check(c, cudaMemsetAsync(all, 0, 2 * MANY * sizeof *all, c->stream), "clearing memory");
    if (rc == PL_OK)
        rc = use(n, all + MANY, all, 1);
    if (rc == PL_OK)
        rc = use(n, all + MANY, all, many);
    if (rc == PL_OK)
        rc = pl_nccl_wait(c, "starting");
    if (rc != PL_OK && n->comm != NULL) /* the others wait for this one */
        rc = fail_with(n, "%s, starting", pl_status_text(rc));
    pl_cuda_release(c, all);
    return rc;
}

/* Rank 0's identifier is everybody's; an empty one says that it has none. */
static pl_status start(struct pl_nccl *n, struct pl_err *err)
{
    struct unique id = {{0}};
    struct config config = {.size = sizeof config, .magic = (unsigned)CONFIG_MAGIC, .version = OLDEST, .blocking = 0, .cga_cluster_size = INT_MIN,
                            .min_ctas = INT_MIN, .max_ctas = INT_MIN, .split_share = INT_MIN, .unused = INT_MIN};
    static const struct unique none;
    if (n->base.rank == 0 && calls.unique_id(&id) != SUCCESS)
        id = none;
    pl_status rc = n->host->ops->broadcast(n->host, &id, sizeof id);
    if (rc != PL_OK)
        return pl_fail(err, rc, "a rank was lost while NCCL started");
    if (memcmp(&id, &none, sizeof id) == 0)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "NCCL does not start on rank 0: NCCL_DEBUG=INFO says why; or take --rank-exchange host");
    if (cudaSetDevice(n->cuda->index) != cudaSuccess)
        return pl_fail(err, PL_EDEVICE, "%s cannot be used", n->cuda->name);
    rc = settle(n, calls.init(&n->comm, (int)n->base.size, id, (int)n->base.rank, &config), "starting");
    if (rc == PL_OK)
        rc = use_once(n);
    n->started = rc == PL_OK;
    if (rc != PL_OK && n->refused)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "%.300s: start with NCCL_DEBUG=INFO to see why, or take --rank-exchange host", n->why);
    return rc == PL_OK ? rc : pl_fail(err, rc, "a rank was lost while NCCL started%s%.300s", n->why[0] != '\0' ? ": " : "", n->why);
}

static pl_status open_nccl(struct pl_device *dev, struct pl_comm *host, struct pl_comm **out, struct pl_err *err)
{
    struct pl_cuda *c = pl_cuda_of(dev);
    struct pl_nccl *n = calloc(1, sizeof *n);
    if (n == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for a communicator");
    n->base = *host;
    n->base.ops = &nccl_ops;
    n->host = host;
    n->cuda = c;
    c->nccl = n;
    const pl_status rc = start(n, err);
    if (rc == PL_OK)
        *out = &n->base;
    return rc;
}

bool pl_nccl_failed(const struct pl_cuda *c)
{
    return atomic_load(&c->nccl->failed);
}

void pl_nccl_close(struct pl_cuda *c)
{
    if (c->nccl != NULL && c->nccl->comm != NULL)
        (void)calls.abort(c->nccl->comm); /* nothing is under way; destroying would wait for the others */
    free(c->nccl);
    c->nccl = NULL;
}

const struct pl_device_links pl_nccl_links = {.identify = identify, .find = find, .open = open_nccl};
