/* room: what the quota of files counts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/room.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "core/base/mem.h"
#include "server/jobs/files.h"
#include "server/jobs/jobs.h"
#include "server/server.h"

/* Bytes of jobs' data: the file of each inode once, as jobs share them by links. */
struct held {
    struct data {
        ino_t inode;
        uint64_t bytes;
    } *all;
    size_t n;
};

/* A job's copy of a file, unless it is the bytes of a file that is there and counts by itself. */
static void hold(struct pl_jobs *j, struct held *h, const char *folder, const char *name, const char *file)
{
    struct stat copy, original;
    struct pl_file_row row;
    char *path = NULL, *counted = file != NULL ? pl_jobs_path(j->store, "files", file) : NULL;
    if (counted != NULL && asprintf(&path, "%s/%s", folder, name) >= 0 && stat(path, &copy) == 0) {
        const bool known = pl_store_get(j->store, PL_TABLE_FILES, "id", file, &row, NULL) == PL_OK;
        pl_row_fini(PL_TABLE_FILES, &row);
        if (!known || stat(counted, &original) != 0 || original.st_ino != copy.st_ino)
            h->all[h->n++] = (struct data){copy.st_ino, (uint64_t)copy.st_size};
    }
    free(path);
    free(counted);
}

static int by_inode(const void *a, const void *b)
{
    const ino_t x = ((const struct data *)a)->inode, y = ((const struct data *)b)->inode;
    return (x > y) - (x < y);
}

static bool held_by_jobs(struct pl_jobs *j, uint64_t *bytes)
{
    const struct pl_store_query q = {.column = "tidied", .value = "0"};
    void *rows;
    size_t n;
    bool more;
    *bytes = 0;
    if (pl_store_list(j->store, PL_TABLE_JOBS, &q, &rows, &n, &more, NULL) != PL_OK)
        return false;
    struct held h = {.all = pl_xcalloc(2 * n + 1, sizeof *h.all)};
    for (size_t i = 0; i < n; i++) {
        const struct pl_job_row *row = (const struct pl_job_row *)rows + i;
        char *folder = pl_jobs_folder(j, row->id);
        hold(j, &h, folder, "training.jsonl", row->training_file);
        hold(j, &h, folder, "validation.jsonl", row->validation_file);
        free(folder);
    }
    qsort(h.all, h.n, sizeof *h.all, by_inode);
    for (size_t i = 0; i < h.n; i++)
        *bytes += i > 0 && h.all[i].inode == h.all[i - 1].inode ? 0 : h.all[i].bytes;
    free(h.all);
    pl_rows_free(PL_TABLE_JOBS, rows, n);
    return true;
}

static uint64_t stored(struct pl_jobs *j)
{
    static const pl_table tables[] = {PL_TABLE_FILES, PL_TABLE_PARTS, PL_TABLE_JOBS};
    struct pl_room *r = &j->room;
    uint64_t changes = 0, files, parts, jobs, count;
    for (size_t i = 0; i < PL_COUNT_OF(tables); i++)
        changes += pl_store_changes(j->store, tables[i]);
    if (r->counted && changes == r->changes)
        return r->stored;
    r->counted = pl_store_usage(j->store, PL_TABLE_FILES, &files, &count);
    r->counted &= pl_store_usage(j->store, PL_TABLE_PARTS, &parts, &count);
    r->counted &= held_by_jobs(j, &jobs);
    r->stored = files + parts + jobs;
    r->changes = changes;
    return r->stored;
}

void pl_room_init(struct pl_room *r)
{
    *r = (struct pl_room){0};
    pthread_mutex_init(&r->lock, NULL);
}

void pl_room_fini(struct pl_room *r)
{
    pthread_mutex_destroy(&r->lock);
}

pl_status pl_room_take(struct pl_jobs *j, uint64_t n, const char *param, struct pl_err *err)
{
    const uint64_t quota = (uint64_t)j->server->config->files_quota_mb << 20;
    pthread_mutex_lock(&j->room.lock);
    const uint64_t used = stored(j) + j->room.incoming;
    const bool fits = used <= quota && n <= quota - used;
    j->room.incoming += fits ? n : 0;
    pthread_mutex_unlock(&j->room.lock);
    return fits ? PL_OK
                : pl_fail_param(err, PL_ENOSPC, param, "'%s' does not fit: %llu of the %llu bytes for files are used, uploads under way and data of unfinished "
                                "jobs included (delete some, or raise files-quota-mb)", param, (unsigned long long)used, (unsigned long long)quota);
}

void pl_room_give(struct pl_jobs *j, uint64_t n)
{
    pthread_mutex_lock(&j->room.lock);
    j->room.incoming -= n;
    pthread_mutex_unlock(&j->room.lock);
}
