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
#include "core/train/scratch.h"
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

/* What is served of an ended job. */
struct kept {
    bool result;
    struct pl_checkpoint_row *checkpoints;
    size_t n;
};

static pl_status find_kept(struct pl_jobs *j, const struct pl_job_row *row, struct kept *k, struct pl_err *err)
{
    const struct pl_store_query q = {.column = "job", .value = row->id};
    void *rows;
    bool more;
    const pl_status st = pl_store_list(j->store, PL_TABLE_CHECKPOINTS, &q, &rows, &k->n, &more, err);
    k->checkpoints = rows;
    k->result = strcmp(row->status, "succeeded") == 0 && !row->deleted;
    return st;
}

static bool is_kept(const struct kept *k, const char *name)
{
    for (size_t i = 0; i < k->n; i++) {
        const char *slash = strrchr(k->checkpoints[i].path, '/');
        if (strcmp(slash != NULL ? slash + 1 : k->checkpoints[i].path, name) == 0)
            return true;
    }
    return false;
}

/* Checkpoints that were deleted, and the state of the others. */
static void remove_from_checkpoints(const struct kept *k, const char *folder)
{
    char *path = NULL;
    DIR *d = asprintf(&path, "%s/checkpoints", folder) >= 0 ? opendir(path) : NULL;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        if (strncmp(e->d_name, "step-", 5) == 0)
            remove_path("%s/%s%s", path, e->d_name, is_kept(k, e->d_name) ? "/state.bin" : "");
    if (d != NULL)
        closedir(d);
    remove_path("%s/.writing", path != NULL ? path : "");
    free(path);
}

/* A whole model stays where the job's adapters are served on it. */
static void remove_base(const struct pl_job_row *row, const struct kept *k, const char *folder)
{
    struct pl_train_spec spec;
    json_t *method = json_loads(row->method, 0, NULL);
    const bool adapters = pl_train_spec_read(&spec, method, NULL, NULL) != PL_OK || spec.peft != PL_PEFT_FULL;
    json_decref(method);
    if (!adapters || (!k->result && k->n == 0)) {
        remove_path("%s/base", folder);
        return;
    }
    remove_path("%s/base/adapter_config.json", folder);
    remove_path("%s/base/adapter_model.safetensors", folder);
    char *base = NULL;
    if (asprintf(&base, "%s/base", folder) >= 0)
        rmdir(base); /* unless the model is in it */
    free(base);
}

/* Unless more was deleted meanwhile, which the next call sees to. */
static pl_status mark_tidied(struct pl_jobs *j, const struct pl_job_row *seen, const struct kept *k, struct pl_err *err)
{
    struct pl_job_row row;
    pl_status st = pl_store_begin(j->store, err);
    if (st != PL_OK)
        return st;
    st = pl_store_get(j->store, PL_TABLE_JOBS, "id", seen->id, &row, err);
    if (st == PL_OK && row.deleted == seen->deleted && pl_store_count(j->store, PL_TABLE_CHECKPOINTS, "job", row.id) == k->n) {
        row.tidied = 1;
        st = pl_store_update(j->store, PL_TABLE_JOBS, &row, err);
    }
    pl_row_fini(PL_TABLE_JOBS, &row);
    return pl_store_end(j->store, st, err);
}

/* Outside any lock: an ended job does not change but by deletion, and a second time does no harm. */
static void tidy(struct pl_jobs *j, const struct pl_job_row *row)
{
    struct kept k = {0};
    struct pl_err err = {0};
    char *folder = pl_jobs_folder(j, row->id);
    pl_status st = find_kept(j, row, &k, &err);
    if (st == PL_OK) {
        remove_path("%s/training.jsonl", folder);
        remove_path("%s/validation.jsonl", folder);
        remove_path("%s/base.gguf", folder);
        remove_path("%s/" PL_SCRATCH_TOKENIZER, folder);
        remove_path("%s/.result", folder);
        if (!k.result)
            remove_path("%s/result", folder);
        remove_from_checkpoints(&k, folder);
        remove_base(row, &k, folder);
        st = mark_tidied(j, row, &k, &err);
    }
    if (st != PL_OK)
        pl_log_debug("%s: %s", row->id, err.msg);
    pl_rows_free(PL_TABLE_CHECKPOINTS, k.checkpoints, k.n);
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
            tidy(j, row);
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
}
