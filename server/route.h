/* route: finds the route of a request by its decoded path, exactly: no normalising, no prefix guesses.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_ROUTE_H
#define PL_SERVER_ROUTE_H

#include "server/http.h"

struct pl_route_match {
    const struct pl_route *route; /* NULL = none for this method */
    const char *pattern;          /* NULL = no route has this path */
    size_t arg, n_arg;            /* where in path the {…} begins, and its length */
    char allow[64];               /* "GET, HEAD, OPTIONS": the methods that the path has */
};

/* Percent-decodes path in place. False when an escape is malformed, stands for NUL or a control character, or the result is not UTF-8. */
bool pl_route_decode(char *path);
/* The same for a name or value of the query string, where + is a space. */
bool pl_route_decode_query(char *s);
/* HEAD finds the GET route. path is decoded. */
void pl_route_find(const char *method, const char *path, struct pl_route_match *m);
/* Patterns get small numbers, for metrics: 0 .. pl_route_patterns() - 1, by their first row in pl_routes. */
size_t pl_route_patterns(void);
const char *pl_route_pattern(size_t i);

#endif
