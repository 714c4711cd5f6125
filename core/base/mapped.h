/* mapped: files in memory that somebody may cut off meanwhile. To touch a page that has gone would end the process; once it is guarded,
 * such pages read as zeros, and the mapping is known not to be whole any more.
 * Thread: any.  Owns: a table of mappings, which the handler of SIGBUS looks into; the mappings are the caller's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_MAPPED_H
#define PL_BASE_MAPPED_H

#include <stdbool.h>
#include <stddef.h>

/* For the whole process, at its start. Threads must not block SIGBUS. */
void pl_mapped_guard(void);
/* Its place in the table, 0 = there is none left: it is not guarded. data: as mmap gave it. */
unsigned pl_mapped_add(const void *data, size_t n);
/* False once a page of it was gone when it was touched. */
bool pl_mapped_is_whole(unsigned place);
/* Ahead of munmap. */
void pl_mapped_remove(unsigned place);

#endif
