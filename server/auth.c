/* auth: which keys open which routes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/auth.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/mem.h"

/* Zero-padded to a fixed length with the length in front, so that every comparison reads all of both. */
struct key {
    unsigned char bytes[1 + PL_AUTH_KEY_MAX];
};

struct pl_auth {
    bool has_user, has_admin;
    struct key user, admin;
};

static bool key_set(struct key *k, const char *s)
{
    const size_t n = strnlen(s, PL_AUTH_KEY_MAX + 1);
    memset(k, 0, sizeof *k);
    if (n > PL_AUTH_KEY_MAX)
        return false;
    k->bytes[0] = (unsigned char)n;
    memcpy(k->bytes + 1, s, n);
    return true;
}

static bool key_equal(const struct key *a, const struct key *b)
{
    volatile unsigned char diff = 0;
    for (size_t i = 0; i < sizeof a->bytes; i++)
        diff = (unsigned char)(diff | (a->bytes[i] ^ b->bytes[i]));
    return diff == 0;
}

static pl_status take(struct key *k, bool *has, const char *s, const char *param, struct pl_err *err)
{
    *has = s != NULL && *s != '\0';
    if (!*has)
        return PL_OK;
    for (const char *p = s; *p != '\0'; p++)
        if (*p <= ' ' || *p > '~')
            return pl_fail_param(err, PL_EINVAL, param, "%s has a character that cannot stand in a header: use visible ASCII "
                                 "without blanks, for example from `openssl rand -hex 24`", param);
    if (!key_set(k, s))
        return pl_fail_param(err, PL_EINVAL, param, "%s is longer than %d characters", param, PL_AUTH_KEY_MAX);
    return PL_OK;
}

pl_status pl_auth_new(struct pl_auth **out, const char *api_key, const char *admin_key, struct pl_err *err)
{
    struct pl_auth *a = pl_xcalloc(1, sizeof *a);
    pl_status rc = take(&a->user, &a->has_user, api_key, "api-key", err);
    if (rc == PL_OK)
        rc = take(&a->admin, &a->has_admin, admin_key, "admin-key", err);
    if (rc == PL_OK && a->has_user && a->has_admin && key_equal(&a->user, &a->admin))
        rc = pl_fail_param(err, PL_EINVAL, "admin-key", "admin-key is the same as api-key: every user would be an administrator");
    if (rc != PL_OK) {
        pl_auth_free(a);
        return rc;
    }
    *out = a;
    return PL_OK;
}

void pl_auth_free(struct pl_auth *a)
{
    if (a == NULL)
        return;
    explicit_bzero(a, sizeof *a);
    free(a);
}

bool pl_auth_gates(const struct pl_auth *a, pl_scope scope)
{
    return scope == PL_SCOPE_ADMIN ? a->has_admin || a->has_user : scope == PL_SCOPE_USER && a->has_user;
}

pl_verdict pl_auth_check(const struct pl_auth *a, pl_scope scope, const char *authorization, const char *x_api_key)
{
    if (!pl_auth_gates(a, scope))
        return PL_AUTH_PASS;
    const char *sent = x_api_key;
    if (authorization != NULL)
        sent = strncasecmp(authorization, "Bearer ", 7) == 0 ? authorization + 7 : NULL;
    struct key k;
    const bool fits = key_set(&k, sent != NULL ? sent : "");
    const bool user = key_equal(&k, &a->user), admin = key_equal(&k, &a->admin);
    const bool is_user = fits && a->has_user && user, is_admin = fits && a->has_admin && admin;
    explicit_bzero(&k, sizeof k);
    if (is_admin)
        return PL_AUTH_PASS;
    if (!is_user)
        return PL_AUTH_NO_KEY;
    return scope == PL_SCOPE_ADMIN && a->has_admin ? PL_AUTH_FORBIDDEN : PL_AUTH_PASS;
}
