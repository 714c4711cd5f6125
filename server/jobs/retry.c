/* retry: when jobs that could not run are tried again.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/retry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

enum { MOST_S = 300 };

const struct pl_retry *pl_retry_find(const struct pl_retry *list, const char *id)
{
    while (list != NULL && strcmp(list->id, id) != 0)
        list = list->next;
    return list;
}

bool pl_retry_due(const struct pl_retry *list, const char *id, uint64_t now_ns)
{
    const struct pl_retry *r = pl_retry_find(list, id);
    return r == NULL || now_ns >= r->at_ns;
}

struct pl_retry *pl_retry_note(struct pl_retry **list, const char *id, int64_t step, uint64_t now_ns, unsigned most, unsigned *seconds)
{
    struct pl_retry *r = *list;
    while (r != NULL && strcmp(r->id, id) != 0)
        r = r->next;
    if (r == NULL) {
        r = pl_xcalloc(1, sizeof *r);
        snprintf(r->id, sizeof r->id, "%s", id);
        r->next = *list;
        *list = r;
    }
    if (step > r->step)
        r->n = 0;
    r->step = step;
    *seconds = r->n < 9 ? 1u << r->n : MOST_S;
    *seconds = *seconds < MOST_S ? *seconds : MOST_S;
    *seconds = *seconds < most ? *seconds : most;
    r->n++;
    r->at_ns = now_ns + *seconds * UINT64_C(1000000000);
    return r;
}

void pl_retry_hasten(struct pl_retry *list)
{
    for (; list != NULL; list = list->next)
        if (list->for_room)
            list->at_ns = 0;
}

void pl_retry_forget(struct pl_retry **list, const char *id)
{
    for (struct pl_retry **at = list; *at != NULL; at = &(*at)->next)
        if (strcmp((*at)->id, id) == 0) {
            struct pl_retry *gone = *at;
            *at = gone->next;
            free(gone);
            return;
        }
}

void pl_retry_free(struct pl_retry **list)
{
    while (*list != NULL)
        pl_retry_forget(list, (*list)->id);
}
