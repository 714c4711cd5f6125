/* supervisor: runs queued jobs as worker processes, reads what they write, starts crashed ones again, and looks after files that expire.
 * Thread: its own; every function from any.  Owns: the workers' processes; a daemon that is killed leaves them running, and its successor
 * takes them over.
 * Fails: start PL_EIO. What fails later is logged and tried again.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_SUPERVISOR_H
#define PL_JOBS_SUPERVISOR_H

#include <sched.h>

#include "server/jobs/jobs.h"

/* cpus: where workers may run. */
pl_status pl_supervisor_start(struct pl_supervisor **out, struct pl_jobs *j, const cpu_set_t *cpus, struct pl_err *err) PL_MUST_CHECK;
/* Look again now. */
void pl_supervisor_poke(struct pl_supervisor *s);
/* Workers get SIGTERM, and SIGKILL after seconds. What others still call (poke, restarts) stays valid until free. On main. */
void pl_supervisor_stop(struct pl_supervisor *s, unsigned seconds);
void pl_supervisor_free(struct pl_supervisor *s);
uint64_t pl_supervisor_restarts(const struct pl_supervisor *s);
/* How long engines rest for jobs after a pass, in thousandths of it. */
unsigned pl_supervisor_rest(const struct pl_supervisor *s);

#endif
