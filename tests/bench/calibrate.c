/* calibrate: what the machine can do right now, so that a benchmark round in which it was disturbed can be told from
 * the others. Prints one JSON object: int8 dot products (VPDPBUSD, GOP/s) and memory reads (GB/s), all threads.
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { THREADS_MAX = 64, DOT_ROUNDS = 20000000, READ_BYTES = 256 << 20, READ_ROUNDS = 3 };

static unsigned char *memory;
static int n_threads;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

__attribute__((target("avx512f,avx512vnni"))) static void *dots(void *arg)
{
    __m512i acc[8], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8((char)(long)arg);
    for (int i = 0; i < 8; i++)
        acc[i] = _mm512_setzero_si512();
    for (long r = 0; r < DOT_ROUNDS / 8; r++)
        for (int i = 0; i < 8; i++)
            __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(a), "v"(b));
    for (int i = 1; i < 8; i++)
        acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    return (void *)(long)_mm512_reduce_add_epi32(acc[0]);
}

static void *reads(void *arg)
{
    size_t part = READ_BYTES / (size_t)n_threads;
    const unsigned long *p = (const unsigned long *)(memory + (size_t)(long)arg * part);
    unsigned long s[4] = {0};
    for (int r = 0; r < READ_ROUNDS; r++)
        for (size_t i = 0; i + 32 <= part / sizeof *p; i += 32)
            for (size_t k = 0; k < 32; k++)
                s[k & 3] += p[i + k];
    return (void *)(long)(s[0] + s[1] + s[2] + s[3]);
}

static double seconds(void *(*fn)(void *))
{
    pthread_t threads[THREADS_MAX];
    double start = now();
    for (long i = 0; i < n_threads; i++)
        if (pthread_create(&threads[i], NULL, fn, (void *)i) != 0)
            exit(1);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    return now() - start;
}

int main(int argc, char **argv)
{
    n_threads = argc > 1 ? atoi(argv[1]) : 2;
    if (n_threads < 1 || n_threads > THREADS_MAX)
        return 2;
    double gops = 0;
    if (__builtin_cpu_supports("avx512vnni"))
        gops = 128.0 * DOT_ROUNDS * n_threads / seconds(dots) * 1e-9;
    memory = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    madvise(memory, READ_BYTES, MADV_HUGEPAGE);
    memset(memory, 1, READ_BYTES);
    double gbs = (double)READ_BYTES * READ_ROUNDS / seconds(reads) * 1e-9;
    printf("{\"int8_gops\": %.1f, \"read_gbs\": %.2f}\n", gops, gbs);
    return 0;
}
