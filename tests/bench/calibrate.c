/* calibrate: what the machine can do right now, as one JSON object on standard output; compare runs it beside each round.
 *   calibrate [THREADS]
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>

#include "cli/peak.h"

int main(int argc, char **argv)
{
    struct peak p;
    if (!peak_measure(&p, argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 0)) {
        fputs("calibrate: no AVX2, or no memory or threads\n", stderr);
        return 1;
    }
    printf("{\"int8_avx512\": %.1f, \"int8_avxvnni\": %.1f, \"int8_avx2\": %.1f, \"fma_avx512\": %.1f, \"fma_avx2\": %.1f, \"read_gbs\": %.2f}\n",
           p.int8_avx512, p.int8_avxvnni, p.int8_avx2, p.fma_avx512, p.fma_avx2, p.read_gbs);
    return 0;
}
