/* permissions: /v1/fine_tuning/checkpoints/{name}/permissions. This server has one organisation without projects, whose keys may all use every
 * checkpoint: permissions are kept for clients that manage them, and neither give nor take access.
 * Thread: microhttpd's workers.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/json.h"
#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "server/api/api.h"
#include "server/api/listing.h"
#include "server/apierr.h"
#include "server/jobs/tuned.h"
#include "server/server.h"

enum { MAX_PROJECTS = 100, MAX_NAME = 64 };

static const struct pl_listing permissions = {.table = PL_TABLE_PERMISSIONS, .limit = 10, .max = 1000, .ids = true, .whole_words = true};

static json_t *permission_json(const void *data)
{
    const struct pl_permission_row *p = data;
    return json_pack("{s:s,s:s,s:I,s:s}", "object", "checkpoint.permission", "id", p->id, "created_at", (json_int_t)p->created_at, "project_id", p->project_id);
}

/* The checkpoint's (or tuned model's) name must be one. False = answered. */
static bool have_checkpoint(struct pl_http_req *req, struct pl_http_resp *resp, const char *name)
{
    struct pl_err err = {0};
    char *path = NULL;
    if (!pl_listing_have_jobs(req, resp))
        return false;
    const pl_status st = pl_tuned_path(req->server->jobs, name, &path, &err);
    free(path);
    if (st == PL_OK)
        return true;
    if (st == PL_ENOENT)
        (void)pl_fail_param(&err, PL_ENOENT, "fine_tuned_model_checkpoint", "Could not find the checkpoint %.200s", name);
    pl_apierr_answer_as(req, resp, st == PL_ENOENT ? 404 : 500, NULL, &err);
    return false;
}

static pl_status check_projects(const json_t *root, struct pl_err *err)
{
    static const char *const names[] = {"project_ids", NULL};
    const json_t *ids = json_object_get(root, "project_ids");
    const pl_status st = pl_json_known(root, names, err);
    if (st != PL_OK)
        return st;
    if (!json_is_array(ids) || json_array_size(ids) < 1 || json_array_size(ids) > MAX_PROJECTS)
        return pl_fail_param(err, PL_EINVAL, "project_ids", "'project_ids' must be an array of 1 to %d strings", MAX_PROJECTS);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const char *id = json_string_value(json_array_get(ids, i));
        if (id == NULL || id[0] == '\0' || pl_utf8_count(id) > MAX_NAME)
            return pl_fail_param(err, PL_EINVAL, "project_ids", "'project_ids[%zu]' must be a string of 1 to %d characters", i, MAX_NAME);
    }
    return PL_OK;
}

/* row: zeroed. */
static pl_status insert(struct pl_store *s, const char *checkpoint, const char *project, struct pl_permission_row *row, struct pl_err *err)
{
    char id[PL_ID_MAX];
    pl_store_new_id(id, "cp_");
    row->created_at = time(NULL);
    pl_row_set(&row->id, id);
    pl_row_set(&row->checkpoint, checkpoint);
    pl_row_set(&row->project_id, project);
    return pl_store_insert(s, PL_TABLE_PERMISSIONS, row, err);
}

/* The checkpoint's permission of a project: *row, or *found is false. */
static pl_status find(struct pl_store *s, const char *checkpoint, const char *project, struct pl_permission_row *row, bool *found, struct pl_err *err)
{
    const struct pl_store_query q = {.column = "checkpoint", .value = checkpoint, .also_column = "project_id", .also_value = project, .limit = 1};
    void *rows;
    size_t n;
    bool more;
    const pl_status st = pl_store_list(s, PL_TABLE_PERMISSIONS, &q, &rows, &n, &more, err);
    *found = n > 0;
    *row = n > 0 ? *(struct pl_permission_row *)rows : (struct pl_permission_row){0};
    free(rows); /* its texts are row's */
    return st;
}

/* Each project of the list has one; *out are the objects. */
static pl_status permit(struct pl_store *s, const char *checkpoint, const json_t *ids, json_t *out, struct pl_err *err)
{
    struct pl_permission_row row;
    bool found;
    pl_status st = pl_store_begin(s, err);
    if (st != PL_OK)
        return st;
    for (size_t i = 0; i < json_array_size(ids) && st == PL_OK; i++) {
        const char *project = json_string_value(json_array_get(ids, i));
        st = find(s, checkpoint, project, &row, &found, err);
        if (st == PL_OK && !found)
            st = insert(s, checkpoint, project, &row, err);
        if (st == PL_OK)
            json_array_append_new(out, permission_json(&row));
        pl_row_fini(PL_TABLE_PERMISSIONS, &row);
    }
    return pl_store_end(s, st, err);
}

void pl_api_permissions_create(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_err err = {0};
    json_t *root = NULL, *list = json_array();
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    if (st == PL_OK)
        st = check_projects(root, &err);
    if (st != PL_OK) {
        pl_apierr_answer(req, resp, &err);
    } else if (have_checkpoint(req, resp, req->path_arg)) {
        st = permit(req->server->jobs->store, req->path_arg, json_object_get(root, "project_ids"), list, &err);
        if (st == PL_OK)
            pl_listing_write_page(&resp->body, &permissions, list, false);
        else
            pl_apierr_answer(req, resp, &err);
    }
    json_decref(root);
    json_decref(list);
}

void pl_api_permissions_list(struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct pl_store_query q = {.column = "checkpoint", .value = req->path_arg};
    if (!have_checkpoint(req, resp, req->path_arg) || !pl_listing_query(req, resp, &permissions, &q))
        return;
    q.also_value = pl_http_query(req, "project_id");
    q.also_column = q.also_value != NULL ? "project_id" : NULL;
    pl_listing_answer(req, resp, &permissions, &q, permission_json);
}

void pl_api_permissions_delete(struct pl_http_req *req, struct pl_http_resp *resp)
{
    static const char between[] = "/permissions/";
    struct pl_permission_row row = {0};
    struct pl_err err = {0};
    const char *id = strrchr(req->path_arg, '/') + 1;
    char *name = strndup(req->path_arg, (size_t)(id - req->path_arg) - (sizeof between - 1));
    if (name != NULL && have_checkpoint(req, resp, name)) {
        struct pl_store *s = req->server->jobs->store;
        pl_status st = pl_store_get(s, PL_TABLE_PERMISSIONS, "id", id, &row, &err);
        if (st == PL_OK && strcmp(row.checkpoint, name) != 0)
            st = PL_ENOENT;
        if (st == PL_OK)
            st = pl_store_delete(s, PL_TABLE_PERMISSIONS, row.seq, &err);
        if (st == PL_OK) {
            pl_listing_write(&resp->body, json_pack("{s:s,s:s,s:b}", "id", row.id, "object", "checkpoint.permission", "deleted", 1));
        } else {
            if (st == PL_ENOENT)
                (void)pl_fail_param(&err, PL_ENOENT, "permission_id", "Could not find the permission %.100s of this checkpoint", id);
            pl_apierr_answer_as(req, resp, st == PL_ENOENT ? 404 : 500, NULL, &err);
        }
        pl_row_fini(PL_TABLE_PERMISSIONS, &row);
    }
    free(name);
}
