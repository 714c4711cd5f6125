/* serving: jobs that are done, but for their results to be read.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "server/server.h"

static struct pl_serving **find(struct pl_serving **list, const char *id)
{
    while (*list != NULL && strcmp((*list)->id, id) != 0)
        list = &(*list)->next;
    return list;
}

static pl_status begin(struct pl_serving *v, struct pl_jobs *j, const struct pl_job_row *row, struct pl_err *why)
{
    char *folder = pl_jobs_folder(j, row->id), *path = NULL;
    const pl_status st = asprintf(&path, "%s/result", folder) >= 0 ? pl_tuned_load(j, row, v->name, path, &v->want, why)
                                                                   : pl_fail(why, PL_ENOMEM, "out of memory");
    free(path);
    free(folder);
    return st;
}

pl_status pl_serving_look(struct pl_serving **list, struct pl_jobs *j, const struct pl_job_row *row, void (*done)(void *arg), void *arg, bool *now,
                          struct pl_err *why)
{
    struct pl_serving *v = *find(list, row->id);
    pl_status st = PL_OK;
    if (v == NULL) {
        v = pl_xcalloc(1, sizeof *v);
        *v = (struct pl_serving){.next = *list, .name = pl_xstrdup(row->name), .want = {.done = done, .arg = arg, .finished = true}};
        snprintf(v->id, sizeof v->id, "%s", row->id);
        *list = v;
        st = begin(v, j, row, why);
    }
    *now = st != PL_OK || pl_registry_finished(j->server->models, &v->want);
    if (!*now)
        return PL_OK;
    if (st == PL_OK)
        st = pl_tuned_loaded(j, &v->want, why);
    (void)pl_serving_forget(list, j, row->id);
    return st;
}

bool pl_serving_waits(struct pl_serving *list, struct pl_jobs *j, const char *id)
{
    struct pl_serving *v = *find(&list, id);
    return v != NULL && !pl_registry_finished(j->server->models, &v->want);
}

bool pl_serving_forget(struct pl_serving **list, struct pl_jobs *j, const char *id)
{
    struct pl_serving **at = find(list, id), *gone = *at;
    if (gone == NULL)
        return false;
    *at = gone->next;
    pl_registry_forget(j->server->models, &gone->want);
    free(gone->name);
    free(gone);
    return true;
}

void pl_serving_free(struct pl_serving **list, struct pl_jobs *j)
{
    while (*list != NULL)
        (void)pl_serving_forget(list, j, (*list)->id);
}
