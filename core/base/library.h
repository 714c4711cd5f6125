/* library: finds a library that goes with the program, and loads it: beside the program's own file (links followed), then in ../lib
 * and ../lib/parley as seen from there, then where the system's loader looks. The first file that is there counts.
 * Thread: any.  Owns: what is loaded stays until the process ends.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_LIBRARY_H
#define PL_BASE_LIBRARY_H

/* file: NULL = search for name. NULL: *why says what the loader says. */
void *pl_library_open(const char *name, const char *file, const char **why);

#endif
