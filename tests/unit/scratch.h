/* scratch: a folder for one test, and files to compare.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_UNIT_SCRATCH_H
#define TESTS_UNIT_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

/* Of the test that runs; removed with what is in it. */
extern char scratch_folder[64];
void scratch_make(void);
void scratch_remove(void);
const char *scratch_path(const char *name); /* valid until the next but three */
int scratch_files(void);

/* The whole file; free(). */
uint8_t *scratch_read(const char *path, size_t *n);
void scratch_same(const char *a, const char *b);

#endif
