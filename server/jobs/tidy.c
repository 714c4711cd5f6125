/* tidy: what ended jobs need no longer.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/tidy.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/train/spec.h"
#include "server/jobs/files.h"

#define PL_LOG_MODULE "jobs"

static bool has_ended(const struct pl_job_row *row)
{
    static const char *const ends[] = {"succeeded", "failed", "cancelled"};
    bool ended = false;
    for (size_t i = 0; i < PL_COUNT_OF(ends); i++)
        ended = ended || strcmp(row->status, ends[i]) == 0;
    return ended && !row->alive;
}

__attribute__((format(printf, 1, 2))) static void remove_path(const char *fmt, ...)
{
    char *path = NULL;
    va_list ap;
    va_start(ap, fmt);
    const int n = vasprintf(&path, fmt, ap);
    va_end(ap);
    if (n < 0)
        return;
    if (access(path, F_OK) == 0)
        pl_files_remove_tree(path);
    free(path);
}

static void remove_states(const char *folder)
{
    char *path = NULL;
    DIR *d = asprintf(&path, "%s/checkpoints", folder) >= 0 ? opendir(path) : NULL;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        if (strncmp(e->d_name, "step-", 5) == 0)
            remove_path("%s/%s/state.bin", path, e->d_name);
    if (d != NULL)
        closedir(d);
    remove_path("%s/.writing", path != NULL ? path : "");
    free(path);
}

/* A whole model stays where the job's adapters are served on it. */
static void remove_base(const struct pl_job_row *row, const char *folder)
{
    struct pl_train_spec spec;
    char *whole = NULL;
    json_t *method = json_loads(row->method, 0, NULL);
    const bool adapters = pl_train_spec_read(&spec, method, NULL, NULL) != PL_OK || spec.peft != PL_PEFT_FULL;
    if (asprintf(&whole, "%s/base/model.gguf", folder) < 0)
        whole = NULL;
    if (!adapters || (whole != NULL && access(whole, F_OK) != 0)) {
        remove_path("%s/base", folder);
    } else {
        remove_path("%s/base/adapter_config.json", folder);
        remove_path("%s/base/adapter_model.safetensors", folder);
    }
    json_decref(method);
    free(whole);
}

static void tidy(struct pl_jobs *j, const char *id)
{
    struct pl_job_row row;
    struct pl_err err = {0};
    char *folder = pl_jobs_folder(j, id);
    pl_status st = pl_store_begin(j->store, &err);
    if (st == PL_OK) {
        st = pl_store_get(j->store, PL_TABLE_JOBS, "id", id, &row, &err);
        if (st == PL_OK && has_ended(&row) && !row.tidied) {
            remove_path("%s/training.jsonl", folder);
            remove_path("%s/validation.jsonl", folder);
            remove_path("%s/.result", folder);
            remove_states(folder);
            remove_base(&row, folder);
            row.tidied = 1;
            st = pl_store_update(j->store, PL_TABLE_JOBS, &row, &err);
        }
        pl_row_fini(PL_TABLE_JOBS, &row);
        st = pl_store_end(j->store, st, &err);
    }
    if (st != PL_OK)
        pl_log_debug("%s: %s", id, err.msg);
    free(folder);
}

void pl_tidy_ended(struct pl_jobs *j)
{
    const struct pl_store_query q = {.column = "tidied", .value = "0", .ascending = true};
    void *rows;
    size_t n;
    bool more;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, NULL) != PL_OK)
        return;
    for (size_t i = 0; i < n; i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        if (has_ended(row))
            tidy(j, row->id);
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
}
