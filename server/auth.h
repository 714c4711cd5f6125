/* auth: which keys open which routes. A key comes as Authorization: Bearer KEY or X-Api-Key: KEY.
 * Without keys configured every route is open. --api-key gates all routes but liveness; --admin-key gates the admin
 * routes, and opens the others too. With only --api-key it also opens the admin routes.
 * Thread: any after new (read-only).  Owns: padded copies of the keys, wiped at free.
 * Fails: new PL_EINVAL for a key that is empty, too long or has characters that cannot stand in a header.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_AUTH_H
#define PL_SERVER_AUTH_H

#include "core/base/status.h"
#include "server/http.h"

enum { PL_AUTH_KEY_MAX = 255 };

struct pl_auth;

/* NULL or "" = no such key. */
pl_status pl_auth_new(struct pl_auth **out, const char *api_key, const char *admin_key, struct pl_err *err) PL_MUST_CHECK;
void pl_auth_free(struct pl_auth *a);

typedef enum { PL_AUTH_PASS, PL_AUTH_NO_KEY /* 401 */, PL_AUTH_FORBIDDEN /* 403: a user's key on an admin route */ } pl_verdict;
/* Whether a key is asked for there. */
bool pl_auth_gates(const struct pl_auth *a, pl_scope scope);
/* authorization and x_api_key: the header values, NULL = absent. Time does not depend on how much of a key is right. */
pl_verdict pl_auth_check(const struct pl_auth *a, pl_scope scope, const char *authorization, const char *x_api_key);

#endif
