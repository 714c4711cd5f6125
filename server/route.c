/* route: finds the route of a request by its decoded path, exactly.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/route.h"

#include <string.h>

#include "core/base/utf8.h"
#include "server/api/api.h"

const struct pl_route pl_routes[] = {
    {"POST", "/v1/chat/completions", PL_SCOPE_USER, pl_api_chat, true},
    {"POST", "/v1/completions", PL_SCOPE_USER, pl_api_completions, true},
    {"GET", "/v1/models", PL_SCOPE_USER, pl_api_models, true},
    {"GET", "/v1/models/{id}", PL_SCOPE_USER, pl_api_model, true},
    {"POST", "/v1/load_lora_adapter", PL_SCOPE_ADMIN, pl_api_load_adapter, true},
    {"POST", "/v1/unload_lora_adapter", PL_SCOPE_ADMIN, pl_api_unload_adapter, true},
    {"GET", "/v1/lora_adapters", PL_SCOPE_ADMIN, pl_api_adapters, true},
    {"POST", "/tokenize", PL_SCOPE_USER, pl_api_tokenize, true},
    {"POST", "/detokenize", PL_SCOPE_USER, pl_api_detokenize, true},
    {"POST", "/apply-template", PL_SCOPE_USER, pl_api_apply_template, true},
    {"GET", "/health", PL_SCOPE_OPEN, pl_api_health, false},
    {"GET", "/version", PL_SCOPE_USER, pl_api_version, false},
    {"GET", "/metrics", PL_SCOPE_ADMIN, pl_api_metrics, false},
    {0},
};

size_t pl_route_patterns(void)
{
    size_t n = 0;
    while (pl_routes[n].method != NULL)
        n++;
    return n;
}

const char *pl_route_pattern(size_t i)
{
    return pl_routes[i].pattern;
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

/* Where the argument begins when path matches pattern, its length when there is none in the pattern, else SIZE_MAX. */
static size_t match(const char *pattern, const char *path)
{
    const char *brace = strchr(pattern, '{');
    const size_t n = brace != NULL ? (size_t)(brace - pattern) : strlen(pattern);
    if (strncmp(pattern, path, n) != 0)
        return SIZE_MAX;
    return brace != NULL ? (path[n] != '\0' ? n : SIZE_MAX) : (path[n] == '\0' ? n : SIZE_MAX);
}

void pl_route_find(const char *method, const char *path, struct pl_route_match *m)
{
    const char *wanted = strcmp(method, "HEAD") == 0 ? "GET" : method;
    *m = (struct pl_route_match){0};
    for (const struct pl_route *r = pl_routes; r->method != NULL; r++) {
        const size_t arg = match(r->pattern, path);
        if (arg == SIZE_MAX)
            continue;
        if (m->pattern == NULL)
            m->pattern = r->pattern;
        if (strcmp(r->method, wanted) == 0) {
            m->route = r;
            m->arg = arg;
        }
        strcat(m->allow, r->method); /* a path has at most GET, POST and DELETE: 33 bytes with what is added */
        strcat(m->allow, strcmp(r->method, "GET") == 0 ? ", HEAD, " : ", ");
    }
    if (m->pattern != NULL)
        strcat(m->allow, "OPTIONS");
}
