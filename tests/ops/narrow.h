/* narrow: what is kept in another form for one product. passed, failed and skipped are counted up.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TESTS_OPS_NARROW_H
#define PL_TESTS_OPS_NARROW_H

/* only: of this device, NULL = of all. Adds to the counts; prints each failure. */
void ops_narrow(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped);

#endif
