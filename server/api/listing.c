/* listing: what the routes over the store share.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/api/listing.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "server/apierr.h"
#include "server/jobs/jobs.h"
#include "server/server.h"

bool pl_listing_have_jobs(struct pl_http_req *req, struct pl_http_resp *resp)
{
    if (req->server->jobs != NULL)
        return true;
    pl_apierr_answer_as(req, resp, 503, "no_data_dir", &req->server->jobs_error);
    return false;
}

static int add_bytes(const char *bytes, size_t n, void *out)
{
    pl_buf_add(out, bytes, n);
    return 0;
}

void pl_listing_write(struct pl_buf *out, json_t *v)
{
    enum { DIGITS = 12 }; /* 0.1 stays 0.1 */
    if (v == NULL || json_dump_callback(v, add_bytes, out, JSON_COMPACT | JSON_REAL_PRECISION(DIGITS)) != 0)
        out->failed = true;
    json_decref(v);
}

bool pl_listing_query(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_listing *l, struct pl_store_query *q)
{
    struct pl_err err = {0};
    if (!pl_listing_have_jobs(req, resp))
        return false;
    const char *limit = pl_http_query(req, "limit"), *order = pl_http_query(req, "order");
    q->limit = l->limit;
    q->after = pl_http_query(req, "after");
    if (limit != NULL) {
        char *end;
        const unsigned long n = strtoul(limit, &end, 10);
        if (limit[0] < '0' || limit[0] > '9' || *end != '\0' || n < 1 || n > l->max) {
            (void)pl_fail_param(&err, PL_EINVAL, "limit", "'limit' must be a whole number from 1 to %u, not \"%.40s\"", l->max, limit);
            pl_apierr_answer(req, resp, &err);
            return false;
        }
        q->limit = (uint32_t)n;
    }
    const char *up = l->whole_words ? "ascending" : "asc", *down = l->whole_words ? "descending" : "desc";
    if (order != NULL && strcmp(order, up) != 0 && strcmp(order, down) != 0) {
        (void)pl_fail_param(&err, PL_EINVAL, "order", "'order' must be %s or %s, not \"%.40s\"", up, down, order);
        pl_apierr_answer(req, resp, &err);
        return false;
    }
    q->ascending = order != NULL && strcmp(order, up) == 0;
    return true;
}

static json_t *id_of(const json_t *list, size_t i)
{
    const json_t *id = json_object_get(json_array_get(list, i), "id");
    return id != NULL ? json_incref((json_t *)(uintptr_t)id) : json_null();
}

void pl_listing_write_page(struct pl_buf *out, const struct pl_listing *l, json_t *list, bool more)
{
    const size_t n = json_array_size(list);
    json_t *all = json_pack("{s:s,s:O,s:b}", "object", "list", "data", list, "has_more", more);
    if (l->ids) {
        json_object_set_new(all, "first_id", id_of(list, 0));
        json_object_set_new(all, "last_id", n > 0 ? id_of(list, n - 1) : json_null());
    }
    pl_listing_write(out, all);
}

void pl_listing_answer(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_listing *l, const struct pl_store_query *q,
                       json_t *(*json)(const void *row))
{
    struct pl_err err = {0};
    void *rows;
    size_t n;
    bool more;
    const pl_status st = pl_store_list(req->server->jobs->store, l->table, q, &rows, &n, &more, &err);
    if (st != PL_OK) {
        pl_apierr_answer_as(req, resp, st == PL_ENOENT ? 400 : 500, NULL, &err);
        return;
    }
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json((const char *)rows + i * pl_store_row_size(l->table)));
    pl_rows_free(l->table, rows, n);
    pl_listing_write_page(&resp->body, l, list, more);
    json_decref(list);
}
