/* ranks: what ranks need of a device, as far as one device shows it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_OPS_RANKS_H
#define PL_TESTS_OPS_RANKS_H

/* only: NULL = all devices. Adds to the counts, prints what fails. */
void ops_ranks(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped);

#endif
