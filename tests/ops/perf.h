/* perf: speed of the CPU device's products, of each type and instruction set; prints a table.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_OPS_PERF_H
#define PL_TESTS_OPS_PERF_H

int ops_perf(void); /* the process's exit status */

#endif
