/* peak: what the machine can do at most, measured: the ceilings that speeds are set beside, and by which a benchmark round
 * in which the machine was disturbed can be told from the others.
 * Thread: one at a time; it starts its own, one on each processor.  Owns: nothing after it returns.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_PEAK_H
#define PL_CLI_PEAK_H

#include <stdbool.h>

/* Medians of some short runs, all threads together; 0 where the processor has no such instruction. */
struct peak {
    double int8_avx512; /* GOP/s of VPDPBUSD on 512 bits (AVX-512 VNNI) */
    double int8_avxvnni; /* GOP/s of VPDPBUSD on 256 bits (AVX-VNNI) */
    double int8_avx2;   /* GOP/s of VPMADDUBSW + VPMADDWD + VPADDD on 256 bits */
    double fma_avx512, fma_avx2; /* GFLOP/s in float32 */
    double read_gbs;    /* GB/s of memory in 2 MiB pages, far more than the caches hold */
};

/* n_threads 0 = as many as processors may be used. False when threads or memory are not to be had. */
bool peak_measure(struct peak *p, unsigned n_threads);

#endif
