/* peak: what the machine can do at most, measured.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cli/peak.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/base/clock.h"
#include "core/base/order.h"
#include "core/base/pool.h"

enum { MAX_THREADS = 256, RUNS = 15, READ_BYTES = 256 << 20, HUGE_PAGE = 2 << 20 };
#define LOOP_TURNS 2000000L /* of 16 instructions, or of 12 where registers are fewer: some milliseconds */

struct team;
struct worker {
    struct team *team;
    int cpu; /* -1 = wherever the system puts it */
    unsigned index;
    pthread_t thread;
};

struct team {
    unsigned n;
    uint8_t *memory;
    size_t part; /* bytes of memory that one thread reads */
    void (*loop)(const struct worker *w);
    double seconds[RUNS];
    pthread_barrier_t barrier;
    pthread_mutex_t gate; /* held until it is known whether all threads are there */
    bool incomplete;
    struct worker workers[MAX_THREADS];
};

/* ---- the loops: nothing but one instruction, on sums that do not depend on each other ---------------------------------- */

#define EACH_16(X) X("0") X("1") X("2") X("3") X("4") X("5") X("6") X("7") X("8") X("9") X("10") X("11") X("12") X("13") X("14") X("15")
#define EACH_12(X) X("0") X("1") X("2") X("3") X("4") X("5") X("6") X("7") X("8") X("9") X("10") X("11")
#define SUMS_16 "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

#define ZERO_512(n) "vpxord %%zmm" n ", %%zmm" n ", %%zmm" n "\n\t"
#define ZERO_256(n) "vpxor %%ymm" n ", %%ymm" n ", %%ymm" n "\n\t"
#define DOT_512(n) "vpdpbusd %%zmm17, %%zmm16, %%zmm" n "\n\t"
#define DOT_AVXVNNI(n) "%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" n "\n\t"
#define FMA_512(n) "vfmadd231ps %%zmm17, %%zmm16, %%zmm" n "\n\t"
#define FMA_256(n) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" n "\n\t"
#define DOT_256(n) "vpmaddubsw %%ymm15, %%ymm14, %%ymm12\n\tvpmaddwd %%ymm13, %%ymm12, %%ymm12\n\tvpaddd %%ymm12, %%ymm" n ", %%ymm" n "\n\t"

__attribute__((target("avx512f,avx512vnni"))) static void int8_avx512(const struct worker *w)
{
    (void)w;
    __asm__ volatile(EACH_16(ZERO_512) ZERO_512("16") ZERO_512("17")::: SUMS_16, "xmm16", "xmm17");
    for (long turn = 0; turn < LOOP_TURNS; turn++)
        __asm__ volatile(EACH_16(DOT_512)::: SUMS_16, "xmm16", "xmm17");
}

__attribute__((target("avx512f"))) static void fma_avx512(const struct worker *w)
{
    (void)w;
    __asm__ volatile(EACH_16(ZERO_512) ZERO_512("16") ZERO_512("17")::: SUMS_16, "xmm16", "xmm17");
    for (long turn = 0; turn < LOOP_TURNS; turn++)
        __asm__ volatile(EACH_16(FMA_512)::: SUMS_16, "xmm16", "xmm17");
}

__attribute__((target("avxvnni"))) static void int8_avxvnni(const struct worker *w)
{
    (void)w;
    __asm__ volatile(EACH_16(ZERO_256)::: SUMS_16);
    for (long turn = 0; turn < LOOP_TURNS; turn++)
        __asm__ volatile(EACH_12(DOT_AVXVNNI)::: SUMS_16);
}

/* A dot product of four bytes is three instructions here. */
__attribute__((target("avx2"))) static void int8_avx2(const struct worker *w)
{
    (void)w;
    __asm__ volatile(EACH_16(ZERO_256)::: SUMS_16);
    for (long turn = 0; turn < LOOP_TURNS; turn++)
        __asm__ volatile(EACH_12(DOT_256)::: SUMS_16);
}

__attribute__((target("avx2,fma"))) static void fma_avx2(const struct worker *w)
{
    (void)w;
    __asm__ volatile(EACH_16(ZERO_256)::: SUMS_16);
    for (long turn = 0; turn < LOOP_TURNS; turn++)
        __asm__ volatile(EACH_12(FMA_256)::: SUMS_16);
}

__attribute__((target("avx2"))) static void read_memory(const struct worker *w)
{
    const __m256i *p = (const __m256i *)(w->team->memory + w->index * w->team->part);
    __m256i s[8];
    memset(s, 0, sizeof s);
    for (size_t i = 0; i + 8 <= w->team->part / sizeof *p; i += 8)
        _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++)
            s[k] = _mm256_or_si256(s[k], _mm256_load_si256(p + i + k));
    for (int k = 1; k < 8; k++)
        s[0] = _mm256_or_si256(s[0], s[k]);
    __asm__ volatile("" : : "x"(s[0]));
}

static void touch_memory(const struct worker *w)
{
    memset(w->team->memory + w->index * w->team->part, 1, w->team->part);
}

/* ---- the team -------------------------------------------------------------------------------------------------------- */

static void *work(void *arg)
{
    struct worker *w = arg;
    struct team *t = w->team;
    pthread_mutex_lock(&t->gate);
    const bool incomplete = t->incomplete;
    pthread_mutex_unlock(&t->gate);
    if (incomplete)
        return NULL;
    if (w->cpu >= 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(w->cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    }
    for (int run = -1; run < RUNS; run++) { /* the first is not counted */
        pthread_barrier_wait(&t->barrier);
        uint64_t start = pl_now_ns();
        t->loop(w);
        pthread_barrier_wait(&t->barrier);
        if (w->index == 0 && run >= 0)
            t->seconds[run] = (double)(pl_now_ns() - start) * 1e-9;
    }
    return NULL;
}

/* Median seconds of one run of the loop on all threads; 0 when they cannot be started. */
static double run(struct team *t, void (*loop)(const struct worker *w))
{
    t->loop = loop;
    if (pthread_barrier_init(&t->barrier, NULL, t->n) != 0)
        return 0;
    unsigned n = 0;
    pthread_mutex_lock(&t->gate);
    while (n < t->n && pthread_create(&t->workers[n].thread, NULL, work, &t->workers[n]) == 0)
        n++;
    t->incomplete = n < t->n;
    pthread_mutex_unlock(&t->gate);
    while (n > 0)
        pthread_join(t->workers[--n].thread, NULL);
    pthread_barrier_destroy(&t->barrier);
    if (t->incomplete)
        return 0;
    qsort(t->seconds, RUNS, sizeof t->seconds[0], pl_by_value);
    return t->seconds[RUNS / 2];
}

static void make_team(struct team *t, unsigned n)
{
    cpu_set_t set;
    bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    unsigned may_use = pl_pool_cpus();
    t->n = n == 0 ? may_use : n < MAX_THREADS ? n : MAX_THREADS;
    for (unsigned i = 0, cpu = 0; i < t->n; i++, cpu++) {
        t->workers[i] = (struct worker){.team = t, .index = i, .cpu = -1};
        if (!known || t->n > (unsigned)CPU_COUNT(&set))
            continue;
        while (!CPU_ISSET(cpu, &set))
            cpu++;
        t->workers[i].cpu = (int)cpu;
    }
}

static double giga(double operations, double seconds)
{
    return seconds > 0 ? operations / seconds * 1e-9 : 0;
}

bool peak_measure(struct peak *p, unsigned n_threads)
{
    struct team *t = calloc(1, sizeof *t);
    *p = (struct peak){0};
    if (t == NULL)
        return false;
    make_team(t, n_threads);
    pthread_mutex_init(&t->gate, NULL);
    t->part = READ_BYTES / t->n / HUGE_PAGE * HUGE_PAGE;
    t->part = t->part > 0 ? t->part : HUGE_PAGE;
    size_t bytes = t->part * t->n;
    t->memory = aligned_alloc(HUGE_PAGE, bytes);
    if (t->memory == NULL) {
        free(t);
        return false;
    }
    madvise(t->memory, bytes, MADV_HUGEPAGE);
    double turns = (double)LOOP_TURNS * t->n;
    bool avx512 = __builtin_cpu_supports("avx512f"), vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    bool avx2 = __builtin_cpu_supports("avx2"), fma = avx2 && __builtin_cpu_supports("fma");
    p->int8_avx512 = vnni ? giga(16 * 128 * turns, run(t, int8_avx512)) : 0;
    p->int8_avxvnni = __builtin_cpu_supports("avxvnni") ? giga(12 * 64 * turns, run(t, int8_avxvnni)) : 0;
    p->int8_avx2 = avx2 ? giga(12 * 64 * turns, run(t, int8_avx2)) : 0;
    p->fma_avx512 = avx512 ? giga(16 * 32 * turns, run(t, fma_avx512)) : 0;
    p->fma_avx2 = fma ? giga(12 * 16 * turns, run(t, fma_avx2)) : 0;
    bool ok = avx2 && run(t, touch_memory) > 0;
    p->read_gbs = ok ? giga((double)bytes, run(t, read_memory)) : 0;
    free(t->memory);
    free(t);
    return ok;
}
