/* store: what must not be lost: files, uploads, jobs, events, checkpoints, in one SQLite database (WAL, synchronous FULL: what a commit has promised
 * survives a power cut).
 * Thread: any; one transaction at a time. pl_store_begin locks until commit or rollback; the other functions lock for themselves and may be
 * called inside.
 * Owns: the database, the lock of the data directory.  Rows own their strings until fini.
 * Fails: PL_ENOSPC and PL_EIO with SQLite's words, PL_ENOENT for a row that is not there.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_JOBS_STORE_H
#define PL_JOBS_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_store;

enum { PL_ID_MAX = 40 };

/* Columns of each table; "seq" is before them in all. TEXT may be NULL.
 *
 * files: expires_at 0 = never. */
#define PL_FILE_COLUMNS(TEXT, INT)                                                                                     \
    TEXT(id) TEXT(filename) TEXT(purpose) TEXT(sha256) TEXT(status) INT(bytes) INT(created_at) INT(expires_at)
/* base_id: of the whole model that the job was made for (pl_train_base_id). name: what the result will be called. method, metadata, integrations,
 * error, outcome: JSON. outcome: the worker's last word. validated: the method is resolved. alive: a worker may be running. crashes: since
 * crash_step was passed. at, inode: how far progress.jsonl was read. tidied: it has ended, and what only its worker needed is gone.
 * waits: code of what keeps the job from running for now (waits.h), NULL = nothing, and the words; since when, until when, how often it was tried.
 * Times and trained_tokens 0 = none yet. */
#define PL_JOB_COLUMNS(TEXT, INT)                                                                                      \
    TEXT(id) TEXT(status) TEXT(model) TEXT(base_adapter) TEXT(base_id) TEXT(name) TEXT(suffix) TEXT(training_file) TEXT(validation_file) TEXT(method)        \
    TEXT(metadata) TEXT(integrations) TEXT(error) TEXT(result_file) TEXT(outcome) INT(created_at) INT(started_at) INT(finished_at)             \
    INT(estimated_finish) INT(seed) INT(trained_tokens) INT(step) INT(total_steps) INT(validated) INT(alive) INT(deleted) INT(crashes)         \
    INT(crash_step) INT(at) INT(inode) INT(tidied) TEXT(waits) TEXT(waits_message) INT(waits_since) INT(retry_at) INT(tries)
/* at: byte of progress.jsonl, -1 = from the daemon. */
#define PL_EVENT_COLUMNS(TEXT, INT) TEXT(id) TEXT(job) TEXT(level) TEXT(message) TEXT(type) TEXT(data) INT(created_at) INT(at)
#define PL_CHECKPOINT_COLUMNS(TEXT, INT) TEXT(id) TEXT(job) TEXT(name) TEXT(path) TEXT(metrics) INT(created_at) INT(step)
/* file: what it became. expires_after: seconds, of that file, 0 = never. */
#define PL_UPLOAD_COLUMNS(TEXT, INT)                                                                                   \
    TEXT(id) TEXT(status) TEXT(filename) TEXT(purpose) TEXT(mime_type) TEXT(file) INT(bytes) INT(created_at) INT(expires_at) INT(expires_after)
#define PL_PART_COLUMNS(TEXT, INT) TEXT(id) TEXT(upload) INT(bytes) INT(created_at)
/* checkpoint: its name. */
#define PL_PERMISSION_COLUMNS(TEXT, INT) TEXT(id) TEXT(checkpoint) TEXT(project_id) INT(created_at)

/* The tables: PL_TABLE_NAME, name, columns; indexes beside the one of the ids; version of the database that had it first. A row is a struct
 * pl_<one>_row, and the columns are its members. */
#define PL_STORE_TABLES(TABLE)                                                                                         \
    TABLE(FILES, files, file, PL_FILE_COLUMNS, "", 1)                                                                  \
    TABLE(JOBS, jobs, job, PL_JOB_COLUMNS, "CREATE UNIQUE INDEX jobs_name ON jobs(name);", 1)                          \
    TABLE(EVENTS, events, event, PL_EVENT_COLUMNS, "CREATE INDEX events_job ON events(job);", 1)                       \
    TABLE(CHECKPOINTS, checkpoints, checkpoint, PL_CHECKPOINT_COLUMNS,                                                 \
          "CREATE UNIQUE INDEX checkpoints_step ON checkpoints(job, step); CREATE UNIQUE INDEX checkpoints_name ON checkpoints(name);", 1)     \
    TABLE(UPLOADS, uploads, upload, PL_UPLOAD_COLUMNS, "", 3)                                                          \
    TABLE(PARTS, parts, part, PL_PART_COLUMNS, "CREATE INDEX parts_upload ON parts(upload);", 3)                       \
    TABLE(PERMISSIONS, permissions, permission, PL_PERMISSION_COLUMNS,                                                 \
          "CREATE UNIQUE INDEX permissions_project ON permissions(checkpoint, project_id);", 3)

#define PL_STORE_TEXT(name) char *name;
#define PL_STORE_INT(name) int64_t name;
#define PL_STORE_ROW(NAME, name, one, columns, indexes, since)                                                         \
    struct pl_##one##_row {                                                                                            \
        int64_t seq;                                                                                                   \
        columns(PL_STORE_TEXT, PL_STORE_INT)                                                                           \
    };
PL_STORE_TABLES(PL_STORE_ROW)

#define PL_STORE_ENUM(NAME, name, one, columns, indexes, since) PL_TABLE_##NAME,
typedef enum { PL_STORE_TABLES(PL_STORE_ENUM) } pl_table;
size_t pl_store_row_size(pl_table t);

/* dir: made with mode 0700 if it is not there. PL_EINVAL (param "data-dir") when it cannot be used, another daemon uses it, or it has files
 * or jobs but no database that knows them. */
pl_status pl_store_open(struct pl_store **out, const char *dir, struct pl_err *err) PL_MUST_CHECK;
void pl_store_close(struct pl_store *s);
const char *pl_store_dir(const struct pl_store *s);

pl_status pl_store_begin(struct pl_store *s, struct pl_err *err) PL_MUST_CHECK;
/* Rolls back when it fails. */
pl_status pl_store_commit(struct pl_store *s, struct pl_err *err) PL_MUST_CHECK;
void pl_store_rollback(struct pl_store *s);
/* Commits when st is PL_OK, else rolls back; st or the commit's status. */
pl_status pl_store_end(struct pl_store *s, pl_status st, struct pl_err *err) PL_MUST_CHECK;

/* row: struct of the table. Insert sets seq; update is by seq. */
pl_status pl_store_insert(struct pl_store *s, pl_table t, void *row, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_store_update(struct pl_store *s, pl_table t, const void *row, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_store_delete(struct pl_store *s, pl_table t, int64_t seq, struct pl_err *err) PL_MUST_CHECK;
/* Rows whose column is value. */
pl_status pl_store_delete_all(struct pl_store *s, pl_table t, const char *column, const char *value, struct pl_err *err) PL_MUST_CHECK;
/* By id; or by another column that names one row. */
pl_status pl_store_get(struct pl_store *s, pl_table t, const char *column, const char *value, void *row, struct pl_err *err) PL_MUST_CHECK;
void pl_row_fini(pl_table t, void *row);

/* Which rows, in which order. Texts are borrowed; NULL = any. */
struct pl_store_query {
    const char *column, *value; /* rows whose column is value */
    const char *also_column, *also_value; /* and this one that; after column */
    const char *past_column;              /* rows whose number column is from 1 to past: a time that is over; NULL = any */
    int64_t past;
    const char *like_column, *like; /* rows whose JSON text column holds the members of this JSON object; "null" = has none */
    const char *after;          /* id of the row after which to begin, in this order; PL_ENOENT if it is not there */
    bool ascending;
    uint32_t limit; /* 0 = all */
};
/* *rows: an array of row structs, *n of them; pl_rows_free. *more: there are further ones. */
pl_status pl_store_list(struct pl_store *s, pl_table t, const struct pl_store_query *q, void **rows, size_t *n, bool *more,
                        struct pl_err *err) PL_MUST_CHECK;
void pl_rows_free(pl_table t, void *rows, size_t n);

/* Sum of bytes, and number, of the rows of a table that has bytes; rows of a column's value. 0, and false, when it cannot be read. */
bool pl_store_usage(struct pl_store *s, pl_table t, uint64_t *bytes, uint64_t *n);
uint64_t pl_store_count(struct pl_store *s, pl_table t, const char *column, const char *value);
/* Grows with each change of a table's rows, from before the change can be seen. */
uint64_t pl_store_changes(const struct pl_store *s, pl_table t);

/* Whether a job has an event of this message (at that place; -2 = anywhere). */
bool pl_store_has_event(struct pl_store *s, const char *job, const char *message, int64_t at);

/* prefix followed by 24 random hexadecimal digits. */
void pl_store_new_id(char out[PL_ID_MAX], const char *prefix);
/* Whether name is of that form. */
bool pl_store_is_id(const char *name, const char *prefix);
/* Replaces a row's text. */
void pl_row_set(char **field, const char *value);

#endif
