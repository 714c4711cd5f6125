/* route: finds the route of a request by its decoded path, exactly.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/route.h"

#include <string.h>

#include "core/base/utf8.h"
#include "server/api/api.h"

const struct pl_route pl_routes[] = {
    {"POST", "/v1/chat/completions", PL_SCOPE_USER, pl_api_chat, true, NULL},
    {"POST", "/v1/completions", PL_SCOPE_USER, pl_api_completions, true, NULL},
    {"GET", "/v1/models", PL_SCOPE_USER, pl_api_models, true, NULL},
    {"GET", "/v1/models/{model}", PL_SCOPE_USER, pl_api_model, true, NULL},
    {"DELETE", "/v1/models/{model}", PL_SCOPE_ADMIN, pl_api_model_delete, true, NULL},
    {"POST", "/v1/load_lora_adapter", PL_SCOPE_ADMIN, pl_api_load_adapter, true, NULL},
    {"POST", "/v1/unload_lora_adapter", PL_SCOPE_ADMIN, pl_api_unload_adapter, true, NULL},
    {"GET", "/v1/lora_adapters", PL_SCOPE_ADMIN, pl_api_adapters, true, NULL},
    {"POST", "/v1/files", PL_SCOPE_ADMIN, pl_api_files_create, false, pl_api_files_sink},
    {"GET", "/v1/files", PL_SCOPE_ADMIN, pl_api_files_list, false, NULL},
    {"GET", "/v1/files/{id}", PL_SCOPE_ADMIN, pl_api_files_get, false, NULL},
    {"DELETE", "/v1/files/{id}", PL_SCOPE_ADMIN, pl_api_files_delete, false, NULL},
    {"GET", "/v1/files/{id}/content", PL_SCOPE_ADMIN, pl_api_files_content, false, NULL},
    {"POST", "/v1/uploads", PL_SCOPE_ADMIN, pl_api_uploads_create, false, NULL},
    {"POST", "/v1/uploads/{id}/parts", PL_SCOPE_ADMIN, pl_api_uploads_part, false, pl_api_uploads_sink},
    {"POST", "/v1/uploads/{id}/complete", PL_SCOPE_ADMIN, pl_api_uploads_complete, false, NULL},
    {"POST", "/v1/uploads/{id}/cancel", PL_SCOPE_ADMIN, pl_api_uploads_cancel, false, NULL},
    {"POST", "/v1/fine_tuning/jobs", PL_SCOPE_ADMIN, pl_api_jobs_create, true, NULL},
    {"GET", "/v1/fine_tuning/jobs", PL_SCOPE_ADMIN, pl_api_jobs_list, false, NULL},
    {"POST", "/v1/fine_tuning/jobs/validate", PL_SCOPE_ADMIN, pl_api_jobs_validate, true, NULL},
    {"GET", "/v1/fine_tuning/jobs/{id}", PL_SCOPE_ADMIN, pl_api_jobs_get, false, NULL},
    {"POST", "/v1/fine_tuning/jobs/{id}/cancel", PL_SCOPE_ADMIN, pl_api_jobs_cancel, false, NULL},
    {"POST", "/v1/fine_tuning/jobs/{id}/pause", PL_SCOPE_ADMIN, pl_api_jobs_pause, false, NULL},
    {"POST", "/v1/fine_tuning/jobs/{id}/resume", PL_SCOPE_ADMIN, pl_api_jobs_resume, true, NULL},
    {"GET", "/v1/fine_tuning/jobs/{id}/events", PL_SCOPE_ADMIN, pl_api_jobs_events, false, NULL},
    {"GET", "/v1/fine_tuning/jobs/{id}/checkpoints", PL_SCOPE_ADMIN, pl_api_jobs_checkpoints, false, NULL},
    {"POST", "/v1/fine_tuning/checkpoints/{model}/permissions", PL_SCOPE_ADMIN, pl_api_permissions_create, false, NULL},
    {"GET", "/v1/fine_tuning/checkpoints/{model}/permissions", PL_SCOPE_ADMIN, pl_api_permissions_list, false, NULL},
    {"DELETE", "/v1/fine_tuning/checkpoints/{model}/permissions/{id}", PL_SCOPE_ADMIN, pl_api_permissions_delete, false, NULL},
    {"POST", "/tokenize", PL_SCOPE_USER, pl_api_tokenize, true, NULL},
    {"POST", "/detokenize", PL_SCOPE_USER, pl_api_detokenize, true, NULL},
    {"POST", "/apply-template", PL_SCOPE_USER, pl_api_apply_template, true, NULL},
    {"GET", "/health", PL_SCOPE_OPEN, pl_api_health, false, NULL},
    {"GET", "/version", PL_SCOPE_USER, pl_api_version, false, NULL},
    {"GET", "/metrics", PL_SCOPE_ADMIN, pl_api_metrics, false, NULL},
    {0},
};

static bool is_first(const struct pl_route *r)
{
    const struct pl_route *first = pl_routes;
    while (strcmp(first->pattern, r->pattern) != 0)
        first++;
    return first == r;
}

size_t pl_route_patterns(void)
{
    size_t n = 0;
    for (const struct pl_route *r = pl_routes; r->method != NULL; r++)
        n += is_first(r);
    return n;
}

const char *pl_route_pattern(size_t i)
{
    const struct pl_route *r = pl_routes;
    while (!is_first(r) || i-- > 0)
        r++;
    return r->pattern;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool pl_route_decode(char *path)
{
    char *to = path;
    for (const char *p = path; *p != '\0'; p++) {
        unsigned char c = (unsigned char)*p;
        if (c == '%') {
            const int high = hex(p[1]), low = high < 0 ? -1 : hex(p[2]);
            if (low < 0)
                return false;
            c = (unsigned char)(high * 16 + low);
            p += 2;
        }
        if (c < 0x20 || c == 0x7f)
            return false;
        *to++ = (char)c;
    }
    *to = '\0';
    return pl_utf8_valid(path, (size_t)(to - path));
}

bool pl_route_decode_query(char *s)
{
    for (char *p = s; *p != '\0'; p++)
        if (*p == '+')
            *p = ' ';
    return pl_route_decode(s);
}

/* True when path matches pattern. */
static bool match(const char *pattern, const char *path, size_t *arg, size_t *n_arg)
{
    const char *brace = strchr(pattern, '{'), *after = brace != NULL ? strchr(brace, '}') + 1 : NULL;
    const size_t n = brace != NULL ? (size_t)(brace - pattern) : strlen(pattern), n_path = strlen(path);
    *arg = n;
    *n_arg = 0;
    if (strncmp(pattern, path, n) != 0)
        return false;
    if (brace == NULL)
        return path[n] == '\0';
    const char *second = strchr(after, '{');
    if (second != NULL) { /* "/between/{id}" ends the pattern: the path's last part is what it matches */
        const char *slash = strrchr(path, '/');
        const size_t n_between = (size_t)(second - after), n_last = slash != NULL ? strlen(slash + 1) : 0;
        const size_t n_first = n_path >= n + n_between + n_last ? n_path - n - n_between - n_last : 0;
        *n_arg = n_path - n;
        return n_last > 0 && n_first > 0 && strncmp(path + n + n_first, after, n_between) == 0;
    }
    const size_t n_after = strlen(after);
    if (n_path < n + n_after + 1 || strcmp(path + n_path - n_after, after) != 0)
        return false;
    *n_arg = n_path - n - n_after;
    return strncmp(brace, "{model}", 7) == 0 || memchr(path + n, '/', *n_arg) == NULL;
}

void pl_route_find(const char *method, const char *path, struct pl_route_match *m)
{
    const char *wanted = strcmp(method, "HEAD") == 0 ? "GET" : method;
    *m = (struct pl_route_match){0};
    for (const struct pl_route *r = pl_routes; r->method != NULL; r++)
        if (strcmp(r->pattern, path) == 0 && strcmp(r->method, wanted) == 0) { /* before the {…} that would match it */
            m->route = r;
            m->pattern = r->pattern;
            return;
        }
    for (const struct pl_route *r = pl_routes; r->method != NULL; r++) {
        size_t arg, n_arg;
        if (!match(r->pattern, path, &arg, &n_arg))
            continue;
        if (m->pattern == NULL)
            m->pattern = r->pattern;
        if (strcmp(r->method, wanted) == 0 && m->route == NULL) { /* a literal stands before the {…} that would match it */
            m->route = r;
            m->pattern = r->pattern;
            m->arg = arg;
            m->n_arg = n_arg;
        }
        strcat(m->allow, r->method); /* a path has at most GET, POST and DELETE: 33 bytes with what is added */
        strcat(m->allow, strcmp(r->method, "GET") == 0 ? ", HEAD, " : ", ");
    }
    if (m->pattern != NULL)
        strcat(m->allow, "OPTIONS");
}
