/* listing: what the routes over the store share: paging, lists, and the answer when there is no store.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_API_LISTING_H
#define PL_SERVER_API_LISTING_H

#include <jansson.h>

#include "server/http.h"
#include "server/jobs/store.h"

struct pl_listing {
    pl_table table;
    uint32_t limit, max; /* when nothing is said, and at most */
    bool ids;            /* the list has first_id and last_id */
    bool whole_words;    /* order is ascending or descending, not asc or desc */
};

/* False when the data directory cannot be used: answered. */
bool pl_listing_have_jobs(struct pl_http_req *req, struct pl_http_resp *resp);
/* Reads limit, after and order. False = answered. */
bool pl_listing_query(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_listing *l, struct pl_store_query *q);
/* Answers with the rows, each made an object by json. */
void pl_listing_answer(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_listing *l, const struct pl_store_query *q,
                       json_t *(*json)(const void *row));
/* Appends a page whose objects are in list. */
void pl_listing_write_page(struct pl_buf *out, const struct pl_listing *l, json_t *list, bool more);
/* Appends v as text, and drops it. */
void pl_listing_write(struct pl_buf *out, json_t *v);

#endif
