/* machine: what this process may use of the machine, by the system and by the cgroups (version 2) around it.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_MACHINE_H
#define PL_BASE_MACHINE_H

#include <stdint.h>

/* Whole processors that the quotas of the cgroups allow, at least 1; UINT_MAX = as many as there are. */
unsigned pl_machine_quota(void);
/* Bytes of memory that could be had without swapping, at most what the process is limited to (RLIMIT_AS); 1 GiB where nobody says. */
uint64_t pl_machine_memory(void);

#endif
