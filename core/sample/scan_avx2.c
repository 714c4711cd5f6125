/* scan_avx2: the loops of scan.h for AVX2.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sample/scan_loops.h"

const struct pl_scan pl_scan_avx2 = PL_SCAN_SET;
