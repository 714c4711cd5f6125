/* sample: rows of the operation table for sampling on a device.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_OPS_SAMPLE_H
#define PL_TESTS_OPS_SAMPLE_H

/* only: NULL = every device that samples. */
void ops_sample(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped);

#endif
