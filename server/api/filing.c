/* filing: the last step of a new file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/api/filing.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "core/train/dataset.h"
#include "server/apierr.h"
#include "server/jobs/checks.h"
#include "server/jobs/files.h"

enum { EXPIRES_MIN = 3600, EXPIRES_MAX = 2592000 };

static const char *const purposes[] = {"fine-tune", "assistants", "batch", "vision", "user_data", "evals"};

json_t *pl_filing_json(const void *row)
{
    const struct pl_file_row *f = row;
    return json_pack("{s:s,s:s,s:I,s:I,s:o,s:s,s:s,s:s,s:n,s:s}", "id", f->id, "object", "file", "bytes", (json_int_t)f->bytes, "created_at",
                     (json_int_t)f->created_at, "expires_at", f->expires_at > 0 ? json_integer(f->expires_at) : json_null(), "filename", f->filename,
                     "purpose", f->purpose, "status", f->status, "status_details", "sha256", f->sha256);
}

pl_status pl_filing_purpose(const char *purpose, struct pl_err *err)
{
    for (size_t i = 0; i < PL_COUNT_OF(purposes); i++)
        if (strcmp(purposes[i], purpose) == 0)
            return PL_OK;
    return pl_fail_param(err, PL_EINVAL, "purpose", "'purpose' must be one of fine-tune, assistants, batch, vision, user_data, evals, not \"%.60s\"",
                         pl_utf8_valid(purpose, strlen(purpose)) ? purpose : "?");
}

pl_status pl_filing_expiry(const char *name, int64_t seconds, struct pl_err *err)
{
    return seconds >= EXPIRES_MIN && seconds <= EXPIRES_MAX
               ? PL_OK
               : pl_fail_param(err, PL_EINVAL, name, "'%s' must be a whole number from %d to %d", name, EXPIRES_MIN, EXPIRES_MAX);
}

void pl_filing_refuse(struct pl_http_resp *resp, pl_status st, int http, const char *code, const struct pl_err *err, const char *more)
{
    const struct pl_apierr usual = st == PL_EIO ? (struct pl_apierr){.http = 507, .code = "storage_failed"} : pl_apierr_of(st);
    resp->status = http != 0 ? http : usual.http;
    resp->retry_after = http != 0 ? 0 : usual.retry_after;
    resp->final = st != PL_ESTOPPED; /* a full disk is still full a second later */
    pl_apierr_fill(resp, err, http != 0 ? code : usual.code, more);
}

/* The form of every line. OpenAI's words for the commonest mistake. */
static pl_status check_lines(const struct pl_filing *f, struct pl_data_report *r, struct pl_err *err)
{
    const struct pl_data_opts o = {.min_examples = 1, .stop = pl_tasks_stopping(f->jobs->tasks)};
    pl_status st = pl_data_scan(f->path, &o, NULL, NULL, r, err);
    if (st == PL_ERANGE)
        st = pl_fail(err, PL_EINVAL, "The file has no examples: it takes one JSON dictionary in each line.");
    if (st == PL_EFORMAT && r->n_faults > 0 && strncmp(r->faults[0].reason, "the line is not a dictionary", 28) == 0)
        st = pl_fail(err, PL_EFORMAT, "Expected file to have JSONL format, where every line is a JSON dictionary. Line %u is not a dictionary%s.",
                     r->faults[0].line, r->faults[0].reason + 28);
    if (st == PL_EFORMAT || st == PL_EINVAL)
        snprintf(err->param, sizeof err->param, "%s", f->field);
    return st;
}

static pl_status store(const struct pl_filing *f, struct pl_file_row *row, struct pl_err *err)
{
    struct pl_store *s = f->jobs->store;
    char id[PL_ID_MAX];
    pl_store_new_id(id, "file-");
    row->bytes = (int64_t)f->n;
    row->created_at = time(NULL);
    row->expires_at = f->expires_after > 0 ? row->created_at + f->expires_after : 0;
    pl_row_set(&row->id, id);
    pl_row_set(&row->filename, f->filename);
    pl_row_set(&row->purpose, f->purpose);
    pl_row_set(&row->sha256, f->sha256);
    pl_row_set(&row->status, "processed");
    pl_status st = pl_files_adopt(s, f->path, id, err);
    if (st == PL_OK)
        st = pl_store_begin(s, err);
    if (st == PL_OK) {
        st = pl_store_insert(s, PL_TABLE_FILES, row, err);
        if (st == PL_OK && f->also != NULL)
            st = f->also(f->arg, id, err);
        st = pl_store_end(s, st, err);
    }
    if (st != PL_OK)
        pl_files_discard(s, id);
    return st;
}

pl_status pl_filing_store(const struct pl_filing *f, struct pl_file_row *row, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    struct pl_data_report r = {0};
    pl_status st = strcmp(f->purpose, "fine-tune") == 0 ? check_lines(f, &r, &err) : PL_OK;
    if (st == PL_EFORMAT || st == PL_EINVAL) {
        json_t *list = r.n_faults > 0 ? pl_checks_lines(&r) : NULL;
        char *lines = list != NULL ? json_dumps(list, 0) : NULL, *more = NULL;
        if (lines != NULL && asprintf(&more, ",\"n_bad_lines\":%u,\"lines\":%s", r.n_bad, lines) < 0)
            more = NULL;
        pl_filing_refuse(resp, st, 400, "invalid_file", &err, more);
        json_decref(list);
        free(lines);
        free(more);
    } else if (st != PL_OK) {
        pl_filing_refuse(resp, st, 0, NULL, &err, NULL);
    } else if ((st = store(f, row, &err)) != PL_OK) {
        pl_filing_refuse(resp, st, st == PL_ENOENT ? 404 /* of also */ : 0, NULL, &err, NULL);
    }
    pl_data_report_fini(&r);
    return st;
}
