/* room: what the quota of files counts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/room.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/jobs/files.h"
#include "server/server.h"

/* Bytes of a job's copy of a file that was deleted; several jobs may share it. */
static uint64_t held(struct pl_jobs *j, const char *folder, const char *name, const char *file)
{
    struct stat is;
    uint64_t n = 0;
    char *path = NULL, *original = file != NULL ? pl_jobs_path(j->store, "files", file) : NULL;
    if (original != NULL && access(original, F_OK) != 0 && asprintf(&path, "%s/%s", folder, name) >= 0 && stat(path, &is) == 0 && is.st_nlink > 0)
        n = (uint64_t)is.st_size / is.st_nlink;
    free(path);
    free(original);
    return n;
}

static uint64_t held_by_jobs(struct pl_jobs *j)
{
    const struct pl_store_query q = {.column = "tidied", .value = "0"};
    uint64_t sum = 0;
    void *rows;
    size_t n;
    bool more;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, NULL) != PL_OK)
        return 0;
    for (size_t i = 0; i < n; i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        char *folder = pl_jobs_folder(j, row->id);
        sum += held(j, folder, "training.jsonl", row->training_file) + held(j, folder, "validation.jsonl", row->validation_file);
        free(folder);
    }
    pl_rows_free(PL_TABLE_JOBS, rows, n);
    return sum;
}

pl_status pl_room_take(struct pl_jobs *j, uint64_t n, struct pl_err *err)
{
    const uint64_t quota = (uint64_t)j->server->config->files_quota_mb << 20;
    uint64_t files, parts, count;
    pl_store_usage(j->store, PL_TABLE_FILES, &files, &count);
    pl_store_usage(j->store, PL_TABLE_PARTS, &parts, &count);
    const uint64_t incoming = atomic_fetch_add(&j->incoming, n), used = files + parts + incoming + held_by_jobs(j);
    if (used <= quota && n <= quota - used)
        return PL_OK;
    atomic_fetch_sub(&j->incoming, n);
    return pl_fail_param(err, PL_ENOSPC, "file", "the file does not fit: %llu of the %llu bytes for files are used, uploads under way and data of unfinished "
                         "jobs included (delete some, or raise files-quota-mb)", (unsigned long long)used, (unsigned long long)quota);
}

void pl_room_give(struct pl_jobs *j, uint64_t n)
{
    atomic_fetch_sub(&j->incoming, n);
}
