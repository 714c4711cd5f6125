/* scan: the loops over a whole row of logits, for any x86-64, and the choice between the sets.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sample/scan_loops.h"

const struct pl_scan pl_scan_base = PL_SCAN_SET;

const struct pl_scan *pl_scan_best(void)
{
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return &pl_scan_avx512;
    return avx2 ? &pl_scan_avx2 : &pl_scan_base;
}
