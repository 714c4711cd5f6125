/* threads: links between the ranks of one process. A message is a pointer in a box, from which its receiver copies.
 *
 *   box of (from, to):  EMPTY → POSTED (from) → TAKING → TAKEN (to) → EMPTY (from)
 *                               ↓ from gives up
 *                               EMPTY, so that nobody copies from memory that is gone
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/comm/peers.h"

enum { EMPTY, POSTED, TAKING, TAKEN };
enum { NAP_MS = 100 /* a rank that waits looks at the clock as often */ };

struct box {
    atomic_int state;
    const void *bytes;
};

struct post { /* of one rank */
    _Alignas(64) atomic_uint events; /* futex */
    atomic_bool gone;
    struct box out[PL_LINK_RANKS]; /* to each other rank */
};

struct shared {
    atomic_uint n_open;
    struct post posts[]; /* [size] */
};

struct thread_link {
    struct pl_link base;
    struct shared *shared;
    unsigned seen; /* events */
    struct {
        void *bytes; /* NULL = nothing is awaited */
        size_t n;
    } in[PL_LINK_RANKS];
};

static struct thread_link *link_of(struct pl_link *l)
{
    return (struct thread_link *)l;
}

static struct post *post_of(struct pl_link *l, unsigned rank)
{
    return &link_of(l)->shared->posts[rank];
}

static void wake(struct post *p)
{
    atomic_fetch_add(&p->events, 1);
    syscall(SYS_futex, &p->events, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void send_bytes(struct pl_link *l, unsigned to, const void *bytes, size_t n)
{
    (void)n; /* the receiver knows */
    struct box *b = &post_of(l, l->rank)->out[to];
    b->bytes = bytes;
    atomic_store(&b->state, POSTED);
    wake(post_of(l, to));
}

static void recv_bytes(struct pl_link *l, unsigned from, void *bytes, size_t n)
{
    link_of(l)->in[from].bytes = bytes;
    link_of(l)->in[from].n = n;
}

static bool done(struct pl_link *l, unsigned peer)
{
    struct thread_link *t = link_of(l);
    struct box *in = &post_of(l, peer)->out[l->rank], *out = &post_of(l, l->rank)->out[peer];
    int posted = POSTED;
    if (t->in[peer].bytes != NULL && atomic_compare_exchange_strong(&in->state, &posted, TAKING)) {
        memcpy(t->in[peer].bytes, in->bytes, t->in[peer].n);
        t->in[peer].bytes = NULL;
        atomic_store(&in->state, TAKEN);
        wake(post_of(l, peer));
    }
    int taken = TAKEN;
    (void)atomic_compare_exchange_strong(&out->state, &taken, EMPTY);
    return t->in[peer].bytes == NULL && atomic_load(&out->state) == EMPTY;
}

static void rest(struct pl_link *l, unsigned us)
{
    (void)us; /* whoever brings something wakes this one */
    const struct timespec nap = {.tv_nsec = NAP_MS * 1000000};
    atomic_uint *events = &post_of(l, l->rank)->events;
    syscall(SYS_futex, events, FUTEX_WAIT_PRIVATE, link_of(l)->seen, &nap, NULL, 0);
    link_of(l)->seen = atomic_load(events);
}

static bool gone(struct pl_link *l, unsigned peer)
{
    return atomic_load(&post_of(l, peer)->gone);
}

static void give_up(struct pl_link *l)
{
    atomic_store(&post_of(l, l->rank)->gone, true);
    for (unsigned r = 0; r < l->size; r++) {
        struct box *b = &post_of(l, l->rank)->out[r];
        int posted = POSTED;
        if (!atomic_compare_exchange_strong(&b->state, &posted, EMPTY))
            while (atomic_load(&b->state) == TAKING)
                sched_yield();
        wake(post_of(l, r));
    }
}

static void end_processes(struct pl_link *l, int status)
{
    (void)l, (void)status;
}

static void close_link(struct pl_link *l, bool failed)
{
    (void)failed;
    struct shared *s = link_of(l)->shared;
    give_up(l);
    if (atomic_fetch_sub(&s->n_open, 1) == 1)
        free(s);
    free(l);
}

static const struct pl_link_ops thread_ops = {
    .send = send_bytes,
    .recv = recv_bytes,
    .done = done,
    .rest = rest,
    .gone = gone,
    .give_up = give_up,
    .end_processes = end_processes,
    .close = close_link,
};

static struct pl_link *new_link(struct shared *s, unsigned rank, unsigned size)
{
    struct thread_link *t = calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    t->base = (struct pl_link){.ops = &thread_ops, .name = "threads", .rank = rank, .size = size, .local_rank = rank, .local_size = size};
    t->shared = s;
    atomic_fetch_add(&s->n_open, 1);
    return &t->base;
}

pl_status pl_comm_threads_new(struct pl_comm **out, unsigned size, int timeout_ms, struct pl_err *err)
{
    if (size < 1 || size > PL_LINK_RANKS)
        return pl_fail(err, PL_EINVAL, "a model can have 1 to %d ranks, not %u", PL_LINK_RANKS, size);
    const size_t bytes = (sizeof(struct shared) + size * sizeof(struct post) + 63) / 64 * 64;
    struct shared *s = aligned_alloc(64, bytes);
    if (s == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the ranks");
    memset(s, 0, bytes);
    atomic_store(&s->n_open, 1); /* this function's own */
    pl_status rc = PL_OK;
    for (unsigned r = 0; r < size; r++)
        out[r] = NULL;
    for (unsigned r = 0; r < size && rc == PL_OK; r++) {
        struct pl_link *l = new_link(s, r, size);
        rc = l != NULL ? pl_comm_peers_new(&out[r], l, timeout_ms, err) : pl_fail(err, PL_ENOMEM, "no memory for the ranks");
    }
    for (unsigned r = 0; r < size && rc != PL_OK; r++) {
        if (out[r] != NULL)
            out[r]->ops->close(out[r]);
        out[r] = NULL;
    }
    if (atomic_fetch_sub(&s->n_open, 1) == 1)
        free(s);
    return rc;
}
