/* lora: rows of the conformance table for low-rank changes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_OPS_LORA_H
#define PL_TESTS_OPS_LORA_H

/* only: of this device, NULL = of all. Adds to the counts; prints each failure. */
void ops_lora(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped);

#endif
