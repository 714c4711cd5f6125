/* waits: jobs that cannot run for now.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/waits.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static const struct {
    const char *code;
    bool device;
    enum { EACH, CAUSE, ONCE } told;
    const char *words;
} waits[PL_WAIT_COUNT] = {
#define X(name, code, device, told, words) [PL_WAIT_##name] = {code, device, told, words},
    PL_WAITS_LIST(X)
#undef X
};

const char *pl_wait_code(pl_wait w)
{
    return waits[w].code;
}

static pl_wait find(const char *code)
{
    pl_wait w = 0;
    while (w < PL_WAIT_COUNT && (code == NULL || strcmp(waits[w].code, code) != 0))
        w++;
    return w;
}

/* The others are the daemon's to say. */
pl_wait pl_wait_of(const char *code)
{
    const pl_wait w = find(code);
    return w == PL_WAIT_DEVICE || w == PL_WAIT_BUSY || w == PL_WAIT_LOST ? w : PL_WAIT_COUNT;
}

static bool is_for_device(const struct pl_job_row *row)
{
    const pl_wait w = find(row->waits);
    return w < PL_WAIT_COUNT && waits[w].device;
}

int64_t pl_waits_for_device(const struct pl_job_row *row, int64_t now)
{
    return is_for_device(row) && now > row->waits_since ? now - row->waits_since : 0;
}

pl_status pl_waits_begin(struct pl_jobs *j, struct pl_job_row *row, pl_wait w, const char *message, unsigned seconds, struct pl_err *err)
{
    char words[800];
    const bool known = row->waits != NULL && strcmp(row->waits, waits[w].code) == 0 && waits[w].told != EACH &&
                       (waits[w].told == ONCE || strcmp(row->waits_message, message) == 0);
    if (row->waits == NULL || is_for_device(row) != waits[w].device) {
        row->waits_since = time(NULL);
        row->tries = 0;
    }
    pl_row_set(&row->waits, waits[w].code);
    pl_row_set(&row->waits_message, message);
    row->retry_at = time(NULL) + seconds;
    row->tries++;
    if (known)
        return PL_OK;
    snprintf(words, sizeof words, waits[w].words, message, seconds);
    return pl_jobs_event(j, row->id, "warn", "message", NULL, -1, err, "%s", words);
}

void pl_waits_clear(struct pl_job_row *row)
{
    pl_row_set(&row->waits, NULL);
    pl_row_set(&row->waits_message, NULL);
    row->waits_since = row->retry_at = row->tries = 0;
}

const char *pl_waits_started_words(struct pl_jobs *j, const char *id)
{
    static const char first[] = "Fine-tuning job started";
    return pl_store_has_event(j->store, id, first, -2) ? "Fine-tuning job resumed" : first;
}

pl_status pl_waits_end(struct pl_jobs *j, struct pl_job_row *row, struct pl_err *err)
{
    pl_waits_clear(row);
    return pl_jobs_event(j, row->id, "info", "message", NULL, -1, err, "%s", pl_waits_started_words(j, row->id));
}

json_t *pl_waits_json(const struct pl_job_row *row)
{
    return row->waits == NULL ? json_null()
                              : json_pack("{s:s,s:s,s:n,s:I,s:I,s:I}", "code", row->waits, "message", row->waits_message, "param", "since",
                                          (json_int_t)row->waits_since, "retry_at", (json_int_t)row->retry_at, "attempts", (json_int_t)row->tries);
}

void pl_waits_render_metrics(struct pl_jobs *j, struct pl_buf *out)
{
    pl_buf_adds(out, "# HELP parley_jobs_waiting Jobs that cannot run for now, by what they wait for.\n# TYPE parley_jobs_waiting gauge\n");
    for (pl_wait w = 0; w < PL_WAIT_COUNT; w++)
        pl_buf_addf(out, "parley_jobs_waiting{reason=\"%s\"} %llu\n", waits[w].code,
                    (unsigned long long)pl_store_count(j->store, PL_TABLE_JOBS, "waits", waits[w].code));
}
