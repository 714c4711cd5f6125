/* store: files, jobs, events, checkpoints in one SQLite database. Statements are made from the column lists in store.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/mem.h"

#define PL_LOG_MODULE "store"

enum { VERSION = 4, BUSY_MS = 5000, N_DIGITS = 24 };

struct column {
    const char *name;
    bool text;
};

#define TEXT(name) {#name, true},
#define INT(name) {#name, false},
#define COLUMNS(NAME, name, one, columns, indexes, since) static const struct column one##_columns[] = {columns(TEXT, INT)};
PL_STORE_TABLES(COLUMNS)

#define TABLE(NAME, name, one, columns, indexes, since)                                                                \
    [PL_TABLE_##NAME] = {#name, one##_columns, PL_COUNT_OF(one##_columns), sizeof(struct pl_##one##_row), indexes, since},
static const struct table {
    const char *name;
    const struct column *columns;
    size_t n, size;
    const char *more;
    int since;
} tables[] = {PL_STORE_TABLES(TABLE)};

/* A row is its seq and then its columns, each in 8 bytes. */
_Static_assert(sizeof(char *) == sizeof(int64_t), "a row's texts and numbers are of one size");

static void *field_of(const void *row, size_t column)
{
    return (char *)(uintptr_t)row + (column + 1) * sizeof(int64_t);
}

struct pl_store {
    sqlite3 *db;
    pthread_mutex_t lock; /* recursive */
    atomic_ullong changes[PL_COUNT_OF(tables)];
    char *dir;
    int dir_lock;
};

static pl_status sql_fail(const struct pl_store *s, struct pl_err *err)
{
    const int why = sqlite3_errcode(s->db);
    return pl_fail(err, why == SQLITE_FULL ? PL_ENOSPC : PL_EIO, "the database in %s: %s%s", s->dir, sqlite3_errmsg(s->db),
                   why == SQLITE_FULL ? " (free some space)" : "");
}

static pl_status run(struct pl_store *s, const char *sql, struct pl_err *err)
{
    return sqlite3_exec(s->db, sql, NULL, NULL, NULL) == SQLITE_OK ? PL_OK : sql_fail(s, err);
}

/* ---- opening ------------------------------------------------------------------------------------------------------- */

static pl_status make_dirs(const char *path, struct pl_err *err)
{
    char *copy = pl_xstrdup(path);
    pl_status st = PL_OK;
    for (char *p = copy + 1; st == PL_OK; p++) {
        const char c = *p;
        if (c != '/' && c != '\0')
            continue;
        *p = '\0';
        if (mkdir(copy, 0700) != 0 && errno != EEXIST)
            st = pl_fail_param(err, PL_EINVAL, "data-dir", "cannot make the data directory %s: %s (choose another one with --data-dir)", copy,
                               strerror(errno));
        *p = c;
        if (c == '\0')
            break;
    }
    free(copy);
    return st;
}

static pl_status make_inner(struct pl_store *s, const char *name, struct pl_err *err)
{
    char *path = NULL;
    pl_status st = PL_OK;
    if (asprintf(&path, "%s/%s", s->dir, name) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        st = pl_fail_param(err, PL_EINVAL, "data-dir", "cannot make %s: %s", path, strerror(errno));
    free(path);
    return st;
}

static pl_status take_dir(struct pl_store *s, struct pl_err *err)
{
    char *path = NULL;
    if (asprintf(&path, "%s/lock", s->dir) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    s->dir_lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    pl_status st = PL_OK;
    if (s->dir_lock < 0)
        st = pl_fail_param(err, PL_EINVAL, "data-dir", "cannot write in the data directory %s: %s (choose another one with --data-dir)", s->dir,
                           strerror(errno));
    else if (flock(s->dir_lock, LOCK_EX | LOCK_NB) != 0)
        st = pl_fail_param(err, PL_EINVAL, "data-dir", "another parleyd uses the data directory %s: choose another one with --data-dir", s->dir);
    free(path);
    return st;
}

/* Version 1 did not know which model a job belongs to, version 2 no uploads in parts and no job that is tidied, version 3 none that waits. */
static pl_status make_tables(struct pl_store *s, int version, struct pl_err *err)
{
    struct pl_buf sql;
    pl_buf_init(&sql, 0);
    pl_buf_adds(&sql, "BEGIN;");
    if (version == 1)
        pl_buf_adds(&sql, "ALTER TABLE jobs ADD COLUMN base_id TEXT;");
    if (version == 1 || version == 2)
        pl_buf_adds(&sql, "ALTER TABLE jobs ADD COLUMN tidied INTEGER NOT NULL DEFAULT 0;");
    if (version >= 1 && version <= 3)
        pl_buf_adds(&sql, "ALTER TABLE jobs ADD COLUMN waits TEXT;ALTER TABLE jobs ADD COLUMN waits_message TEXT;"
                          "ALTER TABLE jobs ADD COLUMN waits_since INTEGER NOT NULL DEFAULT 0;ALTER TABLE jobs ADD COLUMN retry_at INTEGER NOT NULL DEFAULT 0;"
                          "ALTER TABLE jobs ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;");
    for (size_t t = 0; t < PL_COUNT_OF(tables); t++) {
        if (tables[t].since <= version)
            continue;
        pl_buf_addf(&sql, "CREATE TABLE %s(seq INTEGER PRIMARY KEY AUTOINCREMENT", tables[t].name);
        for (size_t i = 0; i < tables[t].n; i++)
            pl_buf_addf(&sql, ",%s %s", tables[t].columns[i].name, tables[t].columns[i].text ? "TEXT" : "INTEGER NOT NULL");
        pl_buf_addf(&sql, ");CREATE UNIQUE INDEX %s_id ON %s(id);%s", tables[t].name, tables[t].name, tables[t].more);
    }
    pl_buf_addf(&sql, "PRAGMA user_version=%d;COMMIT", VERSION);
    const pl_status st = run(s, pl_buf_str(&sql), err);
    pl_buf_fini(&sql);
    return st;
}

static int user_version(struct pl_store *s)
{
    sqlite3_stmt *q = NULL;
    int version = -1;
    if (sqlite3_prepare_v2(s->db, "PRAGMA user_version", -1, &q, NULL) == SQLITE_OK && sqlite3_step(q) == SQLITE_ROW)
        version = sqlite3_column_int(q, 0);
    sqlite3_finalize(q);
    return version;
}

/* Files and jobs of a database that is gone: what has no row is swept, so none may be begun beside them. */
static pl_status refuse_orphans(const struct pl_store *s, const char *folder, const char *prefix, struct pl_err *err)
{
    char *path = NULL;
    pl_status st = PL_OK;
    if (asprintf(&path, "%s/%s", s->dir, folder) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    DIR *d = opendir(path);
    for (struct dirent *e; st == PL_OK && d != NULL && (e = readdir(d)) != NULL;)
        if (pl_store_is_id(e->d_name, prefix))
            st = pl_fail_param(err, PL_EINVAL, "data-dir", "%s has %s, but no database (parley.db) that knows it: put the database back, or move the "
                               "folder %s away", path, e->d_name, folder);
    if (d != NULL)
        closedir(d);
    free(path);
    return st;
}

static pl_status begin_database(struct pl_store *s, struct pl_err *err)
{
    pl_status st = refuse_orphans(s, "files", "file-", err);
    if (st == PL_OK)
        st = refuse_orphans(s, "jobs", "ftjob-", err);
    return st == PL_OK ? make_tables(s, 0, err) : st;
}

/* Only the owner reads what clients uploaded; SQLite gives the files beside it (-wal, -shm) the database's own mode. */
static pl_status make_private(const char *path, struct pl_err *err)
{
    static const char *const beside[] = {"-wal", "-shm"};
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    const bool ok = fd >= 0 && fchmod(fd, 0600) == 0;
    const int why = errno;
    if (fd >= 0)
        close(fd);
    if (!ok)
        return pl_fail_param(err, PL_EINVAL, "data-dir", "cannot make %s readable by its owner alone: %s", path, strerror(why));
    for (size_t i = 0; i < PL_COUNT_OF(beside); i++) {
        char *other = NULL;
        if (asprintf(&other, "%s%s", path, beside[i]) >= 0 && chmod(other, 0600) != 0 && errno != ENOENT)
            pl_log_warn("cannot make %s readable by its owner alone: %s", other, strerror(errno));
        free(other);
    }
    return PL_OK;
}

static pl_status open_database(struct pl_store *s, struct pl_err *err)
{
    char *path = NULL;
    if (asprintf(&path, "%s/parley.db", s->dir) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    const pl_status private = make_private(path, err);
    if (private != PL_OK) {
        free(path);
        return private;
    }
    const int rc = sqlite3_open_v2(path, &s->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, NULL);
    free(path);
    if (rc != SQLITE_OK)
        return sql_fail(s, err);
    sqlite3_busy_timeout(s->db, BUSY_MS);
    pl_status st = run(s, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL", err);
    if (st != PL_OK)
        return st;
    const int version = user_version(s);
    if (version > VERSION)
        return pl_fail_param(err, PL_EINVAL, "data-dir", "the database in %s was written by a newer parleyd (version %d)", s->dir, version);
    return version == 0 ? begin_database(s, err) : version < 0 ? sql_fail(s, err) : version < VERSION ? make_tables(s, version, err) : PL_OK;
}

pl_status pl_store_open(struct pl_store **out, const char *dir, struct pl_err *err)
{
    static const char *const inner[] = {"files", "uploads", "jobs"};
    struct pl_store *s = pl_xcalloc(1, sizeof *s);
    pthread_mutexattr_t recursive;
    s->dir_lock = -1;
    s->dir = pl_xstrdup(dir);
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&s->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    pl_status st = make_dirs(dir, err);
    if (st == PL_OK)
        st = take_dir(s, err);
    for (size_t i = 0; i < PL_COUNT_OF(inner) && st == PL_OK; i++)
        st = make_inner(s, inner[i], err);
    if (st == PL_OK)
        st = open_database(s, err);
    if (st != PL_OK) {
        pl_store_close(s);
        return st;
    }
    *out = s;
    return PL_OK;
}

void pl_store_close(struct pl_store *s)
{
    if (s == NULL)
        return;
    sqlite3_close(s->db);
    if (s->dir_lock >= 0)
        close(s->dir_lock);
    pthread_mutex_destroy(&s->lock);
    free(s->dir);
    free(s);
}

const char *pl_store_dir(const struct pl_store *s)
{
    return s->dir;
}

/* ---- transactions -------------------------------------------------------------------------------------------------- */

pl_status pl_store_begin(struct pl_store *s, struct pl_err *err)
{
    pthread_mutex_lock(&s->lock);
    const pl_status st = run(s, "BEGIN IMMEDIATE", err);
    if (st != PL_OK)
        pthread_mutex_unlock(&s->lock);
    return st;
}

void pl_store_rollback(struct pl_store *s)
{
    if (!sqlite3_get_autocommit(s->db) && run(s, "ROLLBACK", NULL) != PL_OK)
        pl_log_error("rollback: %s", sqlite3_errmsg(s->db));
    for (size_t t = 0; t < PL_COUNT_OF(tables); t++) /* what this thread saw of its own changes was not so */
        atomic_fetch_add(&s->changes[t], 1);
    pthread_mutex_unlock(&s->lock);
}

pl_status pl_store_commit(struct pl_store *s, struct pl_err *err)
{
    const pl_status st = run(s, "COMMIT", err);
    if (st == PL_OK)
        pthread_mutex_unlock(&s->lock);
    else
        pl_store_rollback(s);
    return st;
}

pl_status pl_store_end(struct pl_store *s, pl_status st, struct pl_err *err)
{
    if (st == PL_OK)
        return pl_store_commit(s, err);
    pl_store_rollback(s);
    return st;
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

static pl_status prepare(struct pl_store *s, const struct pl_buf *sql, sqlite3_stmt **q, struct pl_err *err)
{
    if (sql->failed)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    return sqlite3_prepare_v2(s->db, pl_buf_str(sql), (int)sql->len, q, NULL) == SQLITE_OK ? PL_OK : sql_fail(s, err);
}

static void bind_row(sqlite3_stmt *q, const struct table *t, const void *row)
{
    for (size_t i = 0; i < t->n; i++) {
        const void *field = field_of(row, i);
        if (t->columns[i].text)
            sqlite3_bind_text(q, (int)i + 1, *(char *const *)field, -1, SQLITE_STATIC);
        else
            sqlite3_bind_int64(q, (int)i + 1, *(const int64_t *)field);
    }
}

static void read_row(sqlite3_stmt *q, const struct table *t, void *row)
{
    *(int64_t *)row = sqlite3_column_int64(q, 0);
    for (size_t i = 0; i < t->n; i++) {
        void *field = field_of(row, i);
        const char *text = (const char *)sqlite3_column_text(q, (int)i + 1);
        if (!t->columns[i].text)
            *(int64_t *)field = sqlite3_column_int64(q, (int)i + 1);
        else
            *(char **)field = text != NULL ? pl_xstrdup(text) : NULL;
    }
}

/* Runs a statement that changes a table, and finishes it. */
static pl_status finish(struct pl_store *s, pl_table which, pl_status st, sqlite3_stmt *q, struct pl_err *err)
{
    atomic_fetch_add(&s->changes[which], 1);
    if (st == PL_OK && sqlite3_step(q) != SQLITE_DONE)
        st = sql_fail(s, err);
    sqlite3_finalize(q);
    return st;
}

pl_status pl_store_insert(struct pl_store *s, pl_table which, void *row, struct pl_err *err)
{
    const struct table *t = &tables[which];
    struct pl_buf sql;
    sqlite3_stmt *q = NULL;
    pl_buf_init(&sql, 0);
    pl_buf_addf(&sql, "INSERT INTO %s(", t->name);
    for (size_t i = 0; i < t->n; i++)
        pl_buf_addf(&sql, "%s%s", i > 0 ? "," : "", t->columns[i].name);
    pl_buf_adds(&sql, ") VALUES(");
    for (size_t i = 0; i < t->n; i++)
        pl_buf_adds(&sql, i > 0 ? ",?" : "?");
    pl_buf_adds(&sql, ")");
    pthread_mutex_lock(&s->lock);
    pl_status st = prepare(s, &sql, &q, err);
    if (st == PL_OK)
        bind_row(q, t, row);
    st = finish(s, which, st, q, err);
    if (st == PL_OK)
        *(int64_t *)row = sqlite3_last_insert_rowid(s->db);
    pthread_mutex_unlock(&s->lock);
    pl_buf_fini(&sql);
    return st;
}

pl_status pl_store_update(struct pl_store *s, pl_table which, const void *row, struct pl_err *err)
{
    const struct table *t = &tables[which];
    struct pl_buf sql;
    sqlite3_stmt *q = NULL;
    pl_buf_init(&sql, 0);
    pl_buf_addf(&sql, "UPDATE %s SET ", t->name);
    for (size_t i = 0; i < t->n; i++)
        pl_buf_addf(&sql, "%s%s=?", i > 0 ? "," : "", t->columns[i].name);
    pl_buf_addf(&sql, " WHERE seq=%lld", (long long)*(const int64_t *)row);
    pthread_mutex_lock(&s->lock);
    pl_status st = prepare(s, &sql, &q, err);
    if (st == PL_OK)
        bind_row(q, t, row);
    st = finish(s, which, st, q, err);
    pthread_mutex_unlock(&s->lock);
    pl_buf_fini(&sql);
    return st;
}

pl_status pl_store_delete(struct pl_store *s, pl_table which, int64_t seq, struct pl_err *err)
{
    char value[24];
    snprintf(value, sizeof value, "%lld", (long long)seq);
    return pl_store_delete_all(s, which, "seq", value, err);
}

pl_status pl_store_delete_all(struct pl_store *s, pl_table which, const char *column, const char *value, struct pl_err *err)
{
    struct pl_buf sql;
    sqlite3_stmt *q = NULL;
    pl_buf_init(&sql, 0);
    pl_buf_addf(&sql, "DELETE FROM %s WHERE %s=?", tables[which].name, column);
    pthread_mutex_lock(&s->lock);
    pl_status st = prepare(s, &sql, &q, err);
    if (st == PL_OK)
        sqlite3_bind_text(q, 1, value, -1, SQLITE_STATIC);
    st = finish(s, which, st, q, err);
    pthread_mutex_unlock(&s->lock);
    pl_buf_fini(&sql);
    return st;
}

static void select_sql(struct pl_buf *sql, const struct table *t)
{
    pl_buf_init(sql, 0);
    pl_buf_adds(sql, "SELECT seq");
    for (size_t i = 0; i < t->n; i++)
        pl_buf_addf(sql, ",%s", t->columns[i].name);
    pl_buf_addf(sql, " FROM %s", t->name);
}

pl_status pl_store_get(struct pl_store *s, pl_table which, const char *column, const char *value, void *row, struct pl_err *err)
{
    const struct table *t = &tables[which];
    struct pl_buf sql;
    sqlite3_stmt *q = NULL;
    memset(row, 0, t->size);
    select_sql(&sql, t);
    pl_buf_addf(&sql, " WHERE %s=? LIMIT 1", column);
    pthread_mutex_lock(&s->lock);
    pl_status st = prepare(s, &sql, &q, err);
    if (st == PL_OK) {
        sqlite3_bind_text(q, 1, value, -1, SQLITE_STATIC);
        const int rc = sqlite3_step(q);
        if (rc == SQLITE_ROW)
            read_row(q, t, row);
        else
            st = rc == SQLITE_DONE ? pl_fail(err, PL_ENOENT, "no such %s: '%.100s'", t->name, value) : sql_fail(s, err);
    }
    sqlite3_finalize(q);
    pthread_mutex_unlock(&s->lock);
    pl_buf_fini(&sql);
    return st;
}

size_t pl_store_row_size(pl_table t)
{
    return tables[t].size;
}

void pl_row_fini(pl_table which, void *row)
{
    const struct table *t = &tables[which];
    for (size_t i = 0; i < t->n; i++)
        if (t->columns[i].text)
            free(*(char **)field_of(row, i));
    memset(row, 0, t->size);
}

void pl_row_set(char **field, const char *value)
{
    char *copy = value != NULL ? pl_xstrdup(value) : NULL;
    free(*field);
    *field = copy;
}

/* ---- lists --------------------------------------------------------------------------------------------------------- */

static pl_status seq_of(struct pl_store *s, const struct table *t, const char *id, int64_t *seq, struct pl_err *err)
{
    char sql[80];
    sqlite3_stmt *q = NULL;
    snprintf(sql, sizeof sql, "SELECT seq FROM %s WHERE id=?", t->name);
    pl_status st = sqlite3_prepare_v2(s->db, sql, -1, &q, NULL) == SQLITE_OK ? PL_OK : sql_fail(s, err);
    if (st == PL_OK) {
        sqlite3_bind_text(q, 1, id, -1, SQLITE_STATIC);
        if (sqlite3_step(q) == SQLITE_ROW)
            *seq = sqlite3_column_int64(q, 0);
        else
            st = pl_fail_param(err, PL_ENOENT, "after", "'after': there is no '%.100s'", id);
    }
    sqlite3_finalize(q);
    return st;
}

/* Whether a column's JSON object has the members of want, a JSON object of strings; want NULL: whether there is no column. */
static bool holds(const char *have, const json_t *want)
{
    json_t *object = have != NULL ? json_loads(have, 0, NULL) : NULL;
    bool yes = want == NULL ? json_object_size(object) == 0 : object != NULL;
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)want, key, v)
        yes = yes && json_equal(v, json_object_get(object, key));
    json_decref(object);
    return yes;
}

static const char *text_column(const struct table *t, const void *row, const char *name)
{
    for (size_t i = 0; i < t->n; i++)
        if (strcmp(t->columns[i].name, name) == 0)
            return *(char *const *)field_of(row, i);
    return NULL;
}

pl_status pl_store_list(struct pl_store *s, pl_table which, const struct pl_store_query *query, void **rows, size_t *n, bool *more,
                        struct pl_err *err)
{
    const struct table *t = &tables[which];
    struct pl_buf sql;
    sqlite3_stmt *q = NULL;
    int64_t after = query->ascending ? 0 : INT64_MAX;
    json_t *like = query->like != NULL ? json_loads(query->like, 0, NULL) : NULL;
    char *all = NULL;
    size_t cap = 0;
    *n = 0;
    *more = false;
    select_sql(&sql, t);
    pl_buf_addf(&sql, " WHERE seq%s?1", query->ascending ? ">" : "<");
    if (query->column != NULL)
        pl_buf_addf(&sql, " AND %s=?2", query->column);
    if (query->also_column != NULL)
        pl_buf_addf(&sql, " AND %s=?3", query->also_column);
    if (query->past_column != NULL)
        pl_buf_addf(&sql, " AND %s BETWEEN 1 AND %lld", query->past_column, (long long)query->past);
    pl_buf_addf(&sql, " ORDER BY seq %s", query->ascending ? "ASC" : "DESC");
    pthread_mutex_lock(&s->lock);
    pl_status st = query->after != NULL ? seq_of(s, t, query->after, &after, err) : PL_OK;
    if (st == PL_OK)
        st = prepare(s, &sql, &q, err);
    int rc = SQLITE_DONE;
    if (st == PL_OK) {
        sqlite3_bind_int64(q, 1, after);
        if (query->column != NULL)
            sqlite3_bind_text(q, 2, query->value, -1, SQLITE_STATIC);
        if (query->also_column != NULL)
            sqlite3_bind_text(q, 3, query->also_value, -1, SQLITE_STATIC);
        while (!*more && (rc = sqlite3_step(q)) == SQLITE_ROW) {
            if (*n == cap)
                all = pl_xrealloc(all, (cap = cap == 0 ? 32 : 2 * cap) * t->size);
            read_row(q, t, all + *n * t->size);
            if (query->like != NULL && !holds(text_column(t, all + *n * t->size, query->like_column), like))
                pl_row_fini(which, all + *n * t->size);
            else if (query->limit > 0 && *n == query->limit)
                pl_row_fini(which, all + *n * t->size), *more = true;
            else
                ++*n;
        }
        if (!*more && rc != SQLITE_DONE)
            st = sql_fail(s, err);
    }
    sqlite3_finalize(q);
    pthread_mutex_unlock(&s->lock);
    pl_buf_fini(&sql);
    json_decref(like);
    if (st != PL_OK) {
        pl_rows_free(which, all, *n);
        all = NULL;
        *n = 0;
    }
    *rows = all;
    return st;
}

void pl_rows_free(pl_table which, void *rows, size_t n)
{
    for (size_t i = 0; i < n; i++)
        pl_row_fini(which, (char *)rows + i * tables[which].size);
    free(rows);
}

static bool two_numbers(struct pl_store *s, const char *sql, const char *value, uint64_t *a, uint64_t *b)
{
    sqlite3_stmt *q = NULL;
    bool known = false;
    *a = *b = 0;
    pthread_mutex_lock(&s->lock);
    if (sqlite3_prepare_v2(s->db, sql, -1, &q, NULL) == SQLITE_OK) {
        if (value != NULL)
            sqlite3_bind_text(q, 1, value, -1, SQLITE_STATIC);
        known = sqlite3_step(q) == SQLITE_ROW;
        if (known) {
            *a = (uint64_t)sqlite3_column_int64(q, 0);
            *b = (uint64_t)sqlite3_column_int64(q, 1);
        }
    }
    sqlite3_finalize(q);
    pthread_mutex_unlock(&s->lock);
    return known;
}

bool pl_store_usage(struct pl_store *s, pl_table t, uint64_t *bytes, uint64_t *n)
{
    char sql[80];
    snprintf(sql, sizeof sql, "SELECT COALESCE(SUM(bytes),0), COUNT(*) FROM %s", tables[t].name);
    return two_numbers(s, sql, NULL, bytes, n);
}

uint64_t pl_store_changes(const struct pl_store *s, pl_table t)
{
    return atomic_load(&s->changes[t]);
}

uint64_t pl_store_count(struct pl_store *s, pl_table t, const char *column, const char *value)
{
    char sql[120];
    uint64_t n, none;
    snprintf(sql, sizeof sql, "SELECT COUNT(*), 0 FROM %s WHERE %s=?", tables[t].name, column);
    two_numbers(s, sql, value, &n, &none);
    return n;
}

bool pl_store_has_event(struct pl_store *s, const char *job, const char *message, int64_t at)
{
    sqlite3_stmt *q = NULL;
    bool yes = false;
    pthread_mutex_lock(&s->lock);
    if (sqlite3_prepare_v2(s->db, "SELECT 1 FROM events WHERE job=?1 AND message=?2 AND (?3=-2 OR at=?3) LIMIT 1", -1, &q, NULL) == SQLITE_OK) {
        sqlite3_bind_text(q, 1, job, -1, SQLITE_STATIC);
        sqlite3_bind_text(q, 2, message, -1, SQLITE_STATIC);
        sqlite3_bind_int64(q, 3, at);
        yes = sqlite3_step(q) == SQLITE_ROW;
    }
    sqlite3_finalize(q);
    pthread_mutex_unlock(&s->lock);
    return yes;
}

void pl_store_new_id(char out[PL_ID_MAX], const char *prefix)
{
    unsigned char random[N_DIGITS / 2];
    while (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
        ;
    int at = snprintf(out, PL_ID_MAX, "%s", prefix);
    for (size_t i = 0; i < sizeof random; i++)
        at += snprintf(out + at, (size_t)(PL_ID_MAX - at), "%02x", random[i]);
}

bool pl_store_is_id(const char *name, const char *prefix)
{
    const size_t n = strlen(prefix);
    return strncmp(name, prefix, n) == 0 && strlen(name + n) == N_DIGITS && strspn(name + n, "0123456789abcdef") == N_DIGITS;
}
