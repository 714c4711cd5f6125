/* tuned: the models that jobs made, and their checkpoints, by their exact names: found, made known to the registry, deleted.
 * Thread: any.  Owns: nothing.
 * Fails: PL_ENOENT when there is none of that name; as the store does.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_TUNED_H
#define PL_JOBS_TUNED_H

#include "server/jobs/jobs.h"
#include "server/registry.h"

/* Its PEFT folder, or the folder of its file; free(). */
pl_status pl_tuned_path(struct pl_jobs *j, const char *name, char **path, struct pl_err *err) PL_MUST_CHECK;
/* The job that made it. */
pl_status pl_tuned_job(struct pl_jobs *j, const char *name, struct pl_job_row *row, struct pl_err *err) PL_MUST_CHECK;
/* Makes what the job left in path (an adapter, or a whole model) known under name; PL_OK when it is already. It is read when it is asked for; an
 * adapter of the first model is read at once: *w, whose done and arg are the caller's like the name, is finished when it was (pl_registry_finished), and
 * pl_tuned_loaded says how that went. The caller forgets it (pl_registry_forget). PL_ENOTSUP: it is an adapter of none of this daemon's models. */
pl_status pl_tuned_load(struct pl_jobs *j, const struct pl_job_row *row, const char *name, const char *path, struct pl_want *w,
                        struct pl_err *err) PL_MUST_CHECK;
/* How reading it went; what could not be read is known no more. */
pl_status pl_tuned_loaded(struct pl_jobs *j, struct pl_want *w, struct pl_err *err) PL_MUST_CHECK;
/* The same without reading anything, by the name alone. */
pl_status pl_tuned_serve(struct pl_jobs *j, const char *name, struct pl_err *err) PL_MUST_CHECK;
/* After a start: models of former days are known again, and read when somebody asks for them, like checkpoints, which are not listed before. Ends early
 * when stop is set. */
void pl_tuned_serve_all(struct pl_jobs *j, const atomic_bool *stop);
/* DELETE /v1/models/{name}: the model and its checkpoints are gone at once, and their files when the job is tidied (after its end). */
pl_status pl_tuned_delete(struct pl_jobs *j, const char *name, struct pl_err *err) PL_MUST_CHECK;
/* A checkpoint's row, and those of its permissions; in a transaction of the caller, who calls pl_tuned_forget after it. */
pl_status pl_tuned_delete_checkpoint(struct pl_jobs *j, const struct pl_checkpoint_row *c, struct pl_err *err) PL_MUST_CHECK;
/* The registry does not know the name any more: outside transactions. */
void pl_tuned_forget(struct pl_jobs *j, const char *name);

#endif
