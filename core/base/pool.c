/* pool: a team of threads that run one function together.
 *
 * A region is published by opening `gate` and advancing `region`; workers wait for it by spinning briefly and then on a
 * futex. Each worker has a range of the items and takes half of what is left of it each time, so that neighbours, whose
 * results share cache lines, mostly run on one processor; then it helps with the ranges of the others, so a worker that was
 * delayed takes fewer. What goes from processor to processor is kept down to a cache line each way, since that takes 0.2 us where
 * they share no cache. A worker takes part only after it has passed the gate; the caller closes the gate when no item is left and
 * waits for those inside, never for one that the kernel did not run: with a busy neighbour the caller goes on at its own pace.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/machine.h"

enum { SPIN_TURNS = 2000, PATIENCE_TURNS = 64, POOL_MAX = 256, INDEX_BITS = 24 };
/* A team's first region: what is left of its number beside an index comes round a little later, so that this happens in every run. */
#define FIRST_NUMBER ((UINT64_C(1) << (64 - INDEX_BITS)) - 1000)
enum { N_STRETCHES = 2, FETCH_MOST = 192 << 10 /* of each, by one worker: half of a second-level cache or less */, FETCH_LINES = 4 };

struct stretch {
    atomic_uintptr_t from; /* a number: it may lead nowhere */
    atomic_size_t bytes;
};

struct worker {
    _Alignas(64) atomic_uint_fast64_t next; /* of its range, below the region's number: INDEX_BITS of it */
    _Alignas(64) atomic_uint_fast64_t done; /* the last region whose range was all taken, as this worker found */
    _Alignas(64) struct pl_pool *pool;
    unsigned index;
    pthread_t thread;
    uintptr_t fetched_of[N_STRETCHES]; /* the stretches that `fetched` bytes of this worker's share are of */
    size_t fetched[N_STRETCHES];
};

struct pl_pool {
    unsigned n_workers;
    struct worker *workers; /* [n_workers]; 0 is the caller */

    /* One cache line, so that a region begins when that has gone from the caller to a worker. */
    _Alignas(64) atomic_uint region; /* futex: the newest region; bit 31 = stop */
    atomic_uint gate;                /* futex: CLOSED, AWAITED, and how many workers are inside */
    atomic_uint sleeping;
    void (*fn)(void *arg, size_t item, unsigned worker);
    void *arg;
    size_t n;
    uint64_t number; /* of the region, without end */

    _Alignas(64) struct stretch ahead[N_STRETCHES];

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t turn;
    uint64_t n_asked, n_over; /* turns: those asked for, those that are over */
    atomic_uint rest;         /* thousandths of a turn */
    uint64_t turn_ns, over_ns; /* when the last turn began and ended; whose turn it is */
};

static void futex_wait(atomic_uint *word, unsigned value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(atomic_uint *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static inline void relax(void)
{
    __builtin_ia32_pause();
}

/* A turn of waiting. */
static inline void meanwhile(struct pl_pool *p, struct worker *w)
{
    for (int k = 0; k < N_STRETCHES; k++) {
        const size_t bytes = atomic_load_explicit(&p->ahead[k].bytes, memory_order_acquire);
        if (bytes == 0)
            continue;
        const uintptr_t from = atomic_load_explicit(&p->ahead[k].from, memory_order_relaxed);
        const size_t share = bytes / p->n_workers;
        if (from != w->fetched_of[k]) {
            w->fetched_of[k] = from;
            w->fetched[k] = 0;
        }
        if (w->fetched[k] >= (share < FETCH_MOST ? share : FETCH_MOST))
            continue;
        for (int i = 0; i < FETCH_LINES; i++)
            __builtin_prefetch((const void *)(from + w->index * share + w->fetched[k] + (size_t)i * 64), 0, 2);
        w->fetched[k] += FETCH_LINES * 64;
        return;
    }
    relax();
}

#define STOP 0x80000000u
#define CLOSED 0x80000000u
#define AWAITED 0x40000000u /* the caller sleeps until they have left */

/* Takes items [*from, *to) of a worker's range [0, n): half of what is left, since with each hand-out a processor waits until what it
 * has written is in its cache. */
static bool take(struct worker *of, uint64_t number, size_t n, size_t *from, size_t *to)
{
    const uint64_t base = number << INDEX_BITS;
    uint64_t next = atomic_load_explicit(&of->next, memory_order_relaxed);
    do {
        *from = (next - base) >> INDEX_BITS == 0 ? next - base : 0; /* the first to come begins the range; numbers may come round */
        if (*from >= n)
            return false;
        *to = *from + (n - *from + 1) / 2;
    } while (!atomic_compare_exchange_weak_explicit(&of->next, &next, base + *to, memory_order_relaxed, memory_order_relaxed));
    return true;
}

size_t pl_pool_first(const struct pl_pool *p, size_t n, unsigned worker)
{
    return n * worker / p->n_workers;
}

static void take_range(const struct pl_pool *p, unsigned of, unsigned worker)
{
    const size_t first = pl_pool_first(p, p->n, of), n = pl_pool_first(p, p->n, of + 1) - first;
    for (size_t from, to; take(&p->workers[of], p->number, n, &from, &to);)
        for (; from < to; from++)
            p->fn(p->arg, first + from, worker);
}

/* A range of one's own, then what others are late with: whoever has just to finish is left alone, since what he works with lies in
 * his cache. */
static void take_items(struct pl_pool *p, unsigned worker)
{
    take_range(p, worker, worker);
    atomic_store_explicit(&p->workers[worker].done, p->number, memory_order_relaxed);
    int patience = PATIENCE_TURNS;
    for (unsigned k = 1; k < p->n_workers; k++) {
        const unsigned of = (worker + k) % p->n_workers;
        while (atomic_load_explicit(&p->workers[of].done, memory_order_relaxed) != p->number && patience-- > 0)
            meanwhile(p, &p->workers[worker]);
        if (patience <= 0)
            take_range(p, of, worker);
    }
}

/* True when the region is still open; the caller is inside then. */
static bool enter(struct pl_pool *p)
{
    unsigned gate = atomic_load_explicit(&p->gate, memory_order_relaxed);
    while (!(gate & CLOSED))
        if (atomic_compare_exchange_weak_explicit(&p->gate, &gate, gate + 1, memory_order_acquire, memory_order_relaxed))
            return true;
    return false;
}

static void leave(struct pl_pool *p)
{
    if (atomic_fetch_sub_explicit(&p->gate, 1, memory_order_release) == (CLOSED | AWAITED | 1))
        futex_wake_all(&p->gate);
}

/* Returns the number of the region after `seen`. */
static unsigned await_region(struct pl_pool *p, struct worker *w, unsigned seen)
{
    unsigned now;
    for (int i = 0; i < SPIN_TURNS; i++) {
        if ((now = atomic_load_explicit(&p->region, memory_order_acquire)) != seen)
            return now;
        meanwhile(p, w);
    }
    atomic_fetch_add(&p->sleeping, 1);
    while ((now = atomic_load(&p->region)) == seen)
        futex_wait(&p->region, seen);
    atomic_fetch_sub(&p->sleeping, 1);
    return now;
}

static void *work(void *arg)
{
    struct worker *w = arg;
    struct pl_pool *p = w->pool;
    for (unsigned seen = 0;;) {
        seen = await_region(p, w, seen);
        if (seen & STOP)
            return NULL;
        if (enter(p)) {
            take_items(p, w->index);
            leave(p);
        }
    }
}

unsigned pl_pool_cpus(void)
{
    cpu_set_t set;
    unsigned n = sched_getaffinity(0, sizeof set, &set) == 0 ? (unsigned)CPU_COUNT(&set) : 1;
    unsigned quota = pl_machine_quota();
    n = quota < n ? quota : n;
    return n < 1 ? 1 : n > POOL_MAX ? POOL_MAX : n;
}

pl_status pl_pool_new(struct pl_pool **out, unsigned n_threads, struct pl_err *err)
{
    if (n_threads == 0)
        n_threads = pl_pool_cpus();
    if (n_threads > POOL_MAX)
        return pl_fail(err, PL_EINVAL, "%u threads are more than the %d that are possible", n_threads, POOL_MAX);
    struct pl_pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    if (p == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the thread pool");
    *p = (struct pl_pool){.n_workers = 1, .gate = CLOSED, .number = FIRST_NUMBER, .workers = aligned_alloc(64, n_threads * sizeof *p->workers)};
    if (p->workers == NULL) {
        free(p);
        return pl_fail(err, PL_ENOMEM, "no memory for the thread pool");
    }
    memset(p->workers, 0, n_threads * sizeof *p->workers);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->turn, NULL);
    for (unsigned i = 1; i < n_threads; i++) {
        p->workers[i].pool = p;
        p->workers[i].index = i;
        if (pthread_create(&p->workers[i].thread, NULL, work, &p->workers[i]) != 0) {
            pl_pool_free(p);
            return pl_fail(err, PL_ENOMEM, "cannot start thread %u of %u", i, n_threads);
        }
        p->n_workers = i + 1;
    }
    *out = p;
    return PL_OK;
}

void pl_pool_pin(struct pl_pool *p)
{
    cpu_set_t all, one;
    if (p->n_workers < 2 || sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) != (int)p->n_workers ||
        pl_pool_cpus() != p->n_workers)
        return;
    for (unsigned cpu = 0, i = 0; i < p->n_workers; cpu++) {
        if (!CPU_ISSET(cpu, &all))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(i == 0 ? pthread_self() : p->workers[i].thread, sizeof one, &one);
        i++;
    }
}

void pl_pool_free(struct pl_pool *p)
{
    if (p == NULL)
        return;
    atomic_fetch_or(&p->region, STOP);
    futex_wake_all(&p->region);
    for (unsigned i = 1; i < p->n_workers; i++)
        pthread_join(p->workers[i].thread, NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->turn);
    free(p->workers);
    free(p);
}

unsigned pl_pool_size(const struct pl_pool *p)
{
    return p->n_workers;
}

void pl_pool_ahead(struct pl_pool *p, const void *first, size_t first_bytes, const void *second, size_t second_bytes)
{
    const struct {
        const void *from;
        size_t bytes;
    } all[N_STRETCHES] = {{first, first_bytes}, {second, second_bytes}};
    for (int k = 0; k < N_STRETCHES; k++) {
        atomic_store_explicit(&p->ahead[k].from, (uintptr_t)all[k].from, memory_order_relaxed);
        atomic_store_explicit(&p->ahead[k].bytes, all[k].from != NULL ? all[k].bytes : 0, memory_order_release);
    }
}

static void sleep_until(uint64_t ns)
{
    const struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

void pl_pool_rest(struct pl_pool *p, unsigned thousandths)
{
    atomic_store(&p->rest, thousandths);
}

void pl_pool_turn(struct pl_pool *p)
{
    if (p == NULL)
        return;
    pthread_mutex_lock(&p->lock);
    const uint64_t mine = p->n_asked++;
    while (p->n_over != mine)
        pthread_cond_wait(&p->turn, &p->lock);
    pthread_mutex_unlock(&p->lock);
    const uint64_t until = p->over_ns + (p->over_ns - p->turn_ns) * atomic_load(&p->rest) / 1000;
    if (pl_now_ns() < until)
        sleep_until(until);
    p->turn_ns = pl_now_ns();
}

void pl_pool_turn_end(struct pl_pool *p)
{
    if (p == NULL)
        return;
    p->over_ns = pl_now_ns();
    pthread_mutex_lock(&p->lock);
    if (++p->n_over != p->n_asked)
        pthread_cond_broadcast(&p->turn);
    pthread_mutex_unlock(&p->lock);
}

void pl_pool_run(struct pl_pool *p, void (*fn)(void *arg, size_t item, unsigned worker), void *arg, size_t n)
{
    if (p->n_workers == 1 || n < 2) {
        for (size_t i = 0; i < n; i++)
            fn(arg, i, 0);
        return;
    }
    PL_ASSERT(n >> INDEX_BITS == 0);
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    p->number++;
    atomic_store_explicit(&p->gate, 0, memory_order_release);
    atomic_store(&p->region, (atomic_load_explicit(&p->region, memory_order_relaxed) + 1) & ~STOP);
    if (atomic_load(&p->sleeping) != 0)
        futex_wake_all(&p->region);
    take_items(p, 0);
    unsigned inside = atomic_fetch_or(&p->gate, CLOSED) | CLOSED;
    for (int i = 0; (inside & ~AWAITED) != CLOSED; inside = atomic_load_explicit(&p->gate, memory_order_acquire)) {
        if (i++ < SPIN_TURNS)
            meanwhile(p, &p->workers[0]);
        else if (inside & AWAITED)
            futex_wait(&p->gate, inside);
        else
            atomic_fetch_or(&p->gate, AWAITED);
    }
}
