/* check_pool: every item runs exactly once, whatever the number of threads and whoever else wants the processors; an idle
 * team sleeps.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/pool.h"

#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"

Suite *suite_pool(void);

static struct pl_pool *pool_of(unsigned n)
{
    struct pl_pool *p = NULL;
    ck_assert_int_eq(pl_pool_new(&p, n, NULL), PL_OK);
    ck_assert_uint_eq(pl_pool_size(p), n);
    return p;
}

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { MAX_ITEMS = 1000 };

struct tally {
    atomic_uint runs[MAX_ITEMS];
    unsigned n_workers;
    atomic_uint strangers; /* worker numbers out of range */
    unsigned plain[MAX_ITEMS]; /* written without atomics: visible to the caller after the region */
};

static void count_item(void *arg, size_t item, unsigned worker)
{
    struct tally *t = arg;
    atomic_fetch_add_explicit(&t->runs[item], 1, memory_order_relaxed);
    t->plain[item]++;
    if (worker >= t->n_workers)
        atomic_fetch_add(&t->strangers, 1);
}

START_TEST(every_item_once)
{
    static const unsigned threads[] = {1, 2, 3, 8, 70};
    static const size_t items[] = {0, 1, 2, 7, MAX_ITEMS};
    struct tally *t = malloc(sizeof *t);
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        struct pl_pool *p = pool_of(threads[i]);
        for (size_t k = 0; k < sizeof items / sizeof items[0]; k++) {
            *t = (struct tally){.n_workers = threads[i]};
            for (unsigned round = 1; round <= 50; round++) {
                pl_pool_run(p, count_item, t, items[k]);
                for (size_t item = 0; item < MAX_ITEMS; item++) {
                    unsigned want = item < items[k] ? round : 0;
                    ck_assert_uint_eq(atomic_load(&t->runs[item]), want);
                    ck_assert_uint_eq(t->plain[item], want);
                }
            }
            ck_assert_uint_eq(atomic_load(&t->strangers), 0);
        }
        pl_pool_free(p);
    }
    free(t);
}
END_TEST

/* Regions follow each other without a pause, as the operations of a step do, and after pauses long enough for all to sleep. */
START_TEST(many_regions)
{
    struct tally *t = calloc(1, sizeof *t);
    struct pl_pool *p = pool_of(t->n_workers = 3);
    enum { REGIONS = 20000 };
    for (unsigned i = 0; i < REGIONS; i++) {
        pl_pool_run(p, count_item, t, 5);
        if (i % 2000 == 0)
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    for (size_t item = 0; item < 5; item++)
        ck_assert_uint_eq(t->plain[item], REGIONS);
    pl_pool_free(p);
    free(t);
}
END_TEST

struct meeting {
    atomic_uint arrived;
    atomic_bool late;
};

/* Each of two items waits for the other, which only two threads at once can satisfy. */
static void meet(void *arg, size_t item, unsigned worker)
{
    (void)item;
    (void)worker;
    struct meeting *m = arg;
    atomic_fetch_add(&m->arrived, 1);
    for (double end = seconds(CLOCK_MONOTONIC) + 5; atomic_load(&m->arrived) < 2;) {
        if (seconds(CLOCK_MONOTONIC) > end) {
            atomic_store(&m->late, true);
            return;
        }
        sched_yield();
    }
}

START_TEST(items_run_side_by_side)
{
    struct pl_pool *p = pool_of(2);
    for (int i = 0; i < 20; i++) {
        struct meeting m = {0};
        pl_pool_run(p, meet, &m, 2);
        ck_assert(!atomic_load(&m.late));
        if (i % 2)
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    pl_pool_free(p);
}
END_TEST

struct late {
    size_t n, stuck; /* items, and the one that waits for all but those of its hand-out */
    atomic_size_t done;
    atomic_bool late;
};

static void wait_for_others(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    struct late *l = arg;
    for (double end = seconds(CLOCK_MONOTONIC) + 5; item == l->stuck && atomic_load(&l->done) < l->n - l->n / 4;) {
        if (seconds(CLOCK_MONOTONIC) > end) {
            atomic_store(&l->late, true);
            return;
        }
        sched_yield();
    }
    atomic_fetch_add(&l->done, 1);
}

/* Whoever is through with a range takes what is left of that of a worker who hangs on an item; a hand-out is half of a range. */
START_TEST(what_is_late_is_taken)
{
    enum { N = 64 };
    struct pl_pool *p = pool_of(2);
    for (size_t stuck = 0; stuck < N; stuck += N / 2)
        for (int i = 0; i < 20; i++) {
            struct late l = {.n = N, .stuck = stuck};
            pl_pool_run(p, wait_for_others, &l, N);
            ck_assert(!atomic_load(&l.late));
            ck_assert_uint_eq(atomic_load(&l.done), N);
        }
    pl_pool_free(p);
}
END_TEST

enum { MOST_ITEMS = (1 << 24) - 1, MANY_WORKERS = 3 };

struct sums {
    _Alignas(64) struct {
        _Alignas(64) uint64_t n, sum, squares; /* modulo 2^64 */
    } of[MANY_WORKERS];
};

static void add_item(void *arg, size_t item, unsigned worker)
{
    struct sums *s = arg;
    s->of[worker].n++;
    s->of[worker].sum += item;
    s->of[worker].squares += (uint64_t)item * item;
}

/* As many items as a region may have, each once. */
START_TEST(most_items)
{
    struct pl_pool *p = pool_of(MANY_WORKERS);
    struct sums s = {0};
    uint64_t n = 0, sum = 0, squares = 0, wanted = 0;
    ck_assert_uint_eq(pl_pool_first(p, MOST_ITEMS, 0), 0);
    ck_assert_uint_eq(pl_pool_first(p, MOST_ITEMS, MANY_WORKERS), MOST_ITEMS);
    pl_pool_run(p, add_item, &s, MOST_ITEMS);
    for (unsigned w = 0; w < MANY_WORKERS; w++) {
        n += s.of[w].n;
        sum += s.of[w].sum;
        squares += s.of[w].squares;
    }
    for (uint64_t i = 0; i < MOST_ITEMS; i++)
        wanted += i * i;
    ck_assert_uint_eq(n, MOST_ITEMS);
    ck_assert_uint_eq(sum, (uint64_t)MOST_ITEMS * (MOST_ITEMS - 1) / 2);
    ck_assert_uint_eq(squares, wanted);
    pl_pool_free(p);
}
END_TEST

START_TEST(idle_pool_sleeps)
{
    struct tally *t = calloc(1, sizeof *t);
    struct pl_pool *p = pool_of(t->n_workers = 4);
    pl_pool_run(p, count_item, t, 100);
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    double before = seconds(CLOCK_PROCESS_CPUTIME_ID);
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    ck_assert_double_lt(seconds(CLOCK_PROCESS_CPUTIME_ID) - before, 0.005);
    pl_pool_free(p);
    free(t);
}
END_TEST

/* All threads on one processor: the caller must not wait a time slice for each worker that has nothing left to do. */
START_TEST(one_processor_for_all)
{
    cpu_set_t all, one;
    ck_assert_int_eq(sched_getaffinity(0, sizeof all, &all), 0);
    CPU_ZERO(&one);
    for (int cpu = 0; CPU_COUNT(&one) == 0; cpu++)
        if (CPU_ISSET(cpu, &all))
            CPU_SET(cpu, &one);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    ck_assert_uint_eq(pl_pool_cpus(), 1);
    struct tally *t = calloc(1, sizeof *t);
    struct pl_pool *p = pool_of(t->n_workers = 3);
    double start = seconds(CLOCK_MONOTONIC);
    for (int i = 0; i < 2000; i++)
        pl_pool_run(p, count_item, t, 4);
    ck_assert_double_lt(seconds(CLOCK_MONOTONIC) - start, 4); /* with a slice of some ms in each region it is 8 and more */
    ck_assert_uint_eq(t->plain[3], 2000);
    pl_pool_free(p);
    free(t);
    ck_assert_int_eq(sched_setaffinity(0, sizeof all, &all), 0);
}
END_TEST

/* What is fetched while waiting changes no result, and memory that is gone or never was does no harm. */
START_TEST(memory_ahead)
{
    struct tally *t = calloc(1, sizeof *t);
    struct pl_pool *p = pool_of(t->n_workers = 3);
    char *gone = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert(gone != MAP_FAILED && munmap(gone, 1 << 20) == 0);
    const struct {
        const void *from;
        size_t bytes;
    } ahead[] = {{gone, 1 << 20}, {NULL, 1 << 20}, {t, sizeof *t}, {t, 1}, {(const void *)UINTPTR_MAX, SIZE_MAX}};
    for (int i = 0; i < 2000; i++) {
        pl_pool_ahead(p, ahead[i % 5].from, ahead[i % 5].bytes, ahead[i % 3].from, ahead[i % 3].bytes);
        pl_pool_run(p, count_item, t, 4);
    }
    for (int i = 0; i < 4; i++)
        ck_assert_uint_eq(t->plain[i], 2000);
    pl_pool_free(p);
    free(t);
}
END_TEST

struct turns {
    struct pl_pool *pool;
    atomic_uint *left; /* of both threads */
    atomic_int *inside;
    unsigned n;
    bool alone;
};

static void *take_turns(void *arg)
{
    struct turns *t = arg;
    struct tally *tally = calloc(1, sizeof *tally);
    tally->n_workers = pl_pool_size(t->pool);
    t->alone = true;
    for (bool more = true; more;) {
        pl_pool_turn(t->pool);
        t->alone &= atomic_fetch_add(t->inside, 1) == 0;
        pl_pool_run(t->pool, count_item, tally, 4);
        usleep(500);
        more = atomic_load(t->left) > 0;
        if (more)
            atomic_fetch_sub(t->left, 1);
        t->n += more;
        atomic_fetch_sub(t->inside, 1);
        pl_pool_turn_end(t->pool);
    }
    free(tally);
    return NULL;
}

/* Threads that share a pool have it one after another, and neither waits for more than the other's turn. */
START_TEST(turns_alternate)
{
    atomic_uint left = 400;
    atomic_int inside = 0;
    struct pl_pool *p = pool_of(2);
    struct turns t[2] = {{.pool = p, .left = &left, .inside = &inside}, {.pool = p, .left = &left, .inside = &inside}};
    pthread_t other;
    ck_assert_int_eq(pthread_create(&other, NULL, take_turns, &t[1]), 0);
    take_turns(&t[0]);
    pthread_join(other, NULL);
    ck_assert(t[0].alone && t[1].alone);
    ck_assert_uint_eq(t[0].n + t[1].n, 400);
    ck_assert_uint_ge(t[0].n, 120); /* 200, on a machine that runs both when it is their turn */
    ck_assert_uint_ge(t[1].n, 120);
    pl_pool_turn(NULL);
    pl_pool_turn_end(NULL);
    pl_pool_free(p);
}
END_TEST

static uint64_t between_turns(struct pl_pool *p, unsigned turn_ms, unsigned thousandths)
{
    pl_pool_rest(p, thousandths);
    pl_pool_turn(p);
    usleep(turn_ms * 1000);
    pl_pool_turn_end(p);
    const uint64_t over = pl_now_ns();
    pl_pool_turn(p);
    const uint64_t next = pl_now_ns();
    pl_pool_rest(p, 0);
    pl_pool_turn_end(p);
    return (next - over) / 1000000;
}

/* The next turn begins after a part of the last one's time; what has passed by itself counts. */
START_TEST(rests_between_turns)
{
    struct pl_pool *p = pool_of(1);
    ck_assert_uint_ge(between_turns(p, 60, 500), 29);
    ck_assert_uint_ge(between_turns(p, 20, 2000), 39);
    uint64_t least = UINT64_MAX; /* of many, for the machine may be busy */
    for (int i = 0; i < 20; i++) {
        const uint64_t ms = between_turns(p, 50, 0);
        least = ms < least ? ms : least;
    }
    ck_assert_uint_lt(least, 20);
    pl_pool_rest(p, 1000);
    pl_pool_turn(p);
    usleep(30000);
    pl_pool_turn_end(p);
    usleep(60000);
    const uint64_t before = pl_now_ns();
    pl_pool_turn(p);
    ck_assert_uint_lt(pl_now_ns() - before, UINT64_C(30000000)); /* no rest is left */
    pl_pool_turn_end(p);
    pl_pool_free(p);
}
END_TEST

START_TEST(sizes)
{
    cpu_set_t set;
    ck_assert_int_eq(sched_getaffinity(0, sizeof set, &set), 0);
    ck_assert_uint_ge(pl_pool_cpus(), 1);
    ck_assert_uint_le(pl_pool_cpus(), (unsigned)CPU_COUNT(&set));
    struct pl_pool *p = NULL;
    ck_assert_int_eq(pl_pool_new(&p, 0, NULL), PL_OK);
    ck_assert_uint_eq(pl_pool_size(p), pl_pool_cpus());
    pl_pool_free(p);
    struct pl_err err;
    p = NULL;
    ck_assert_int_eq(pl_pool_new(&p, 100000, &err), PL_EINVAL);
    ck_assert_ptr_null(p);
    pl_pool_free(NULL);
}
END_TEST

Suite *suite_pool(void)
{
    Suite *s = suite_create("pool");
    TCase *tc = tcase_create("pool");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, every_item_once);
    tcase_add_test(tc, many_regions);
    tcase_add_test(tc, items_run_side_by_side);
    tcase_add_test(tc, what_is_late_is_taken);
    tcase_add_test(tc, most_items);
    tcase_add_test(tc, idle_pool_sleeps);
    tcase_add_test(tc, one_processor_for_all);
    tcase_add_test(tc, memory_ahead);
    tcase_add_test(tc, turns_alternate);
    tcase_add_test(tc, rests_between_turns);
    tcase_add_test(tc, sizes);
    suite_add_tcase(s, tc);
    return s;
}
