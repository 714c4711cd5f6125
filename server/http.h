/* http: every microhttpd call of the daemon. Collects a request (bounded), routes and authorises it, runs its handler, and
 * writes what the handler's producer makes, suspending the connection while there is nothing to write.
 * Thread: microhttpd's workers; pl_http_wake from any thread.
 * Owns: connections, request bodies, and a producer from the moment a handler hands it over.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_HTTP_H
#define PL_SERVER_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/buf.h"
#include "core/base/status.h"

struct pl_arena;
struct pl_server; /* what handlers need: server/server.h */
struct pl_http_conn;

struct pl_http_req {
    struct pl_server *server; /* borrowed */
    struct pl_http_conn *conn;
    const char *id; /* request id: the client's X-Request-Id if it is a plain token of at most 128 bytes, else "req-<32 hex>" */
    const char *method, *path;
    const char *path_arg; /* what a route's last {…} matched, URL-decoded; "" = none */
    const char *body;     /* NUL-terminated after n_body bytes */
    size_t n_body;
    uint64_t start_ns;
    struct pl_arena *arena; /* freed after the reply's last byte */
};

typedef enum { PL_PRODUCE_WAIT, PL_PRODUCE_MORE, PL_PRODUCE_END } pl_produced;

/* Makes a body piece by piece. Called by one worker at a time, never again after END or free.
 *
 *   access handler: produce() until it is not WAIT (suspend in between); then status and headers go out.
 *   stream = false: END the first time it is not WAIT; out is the whole body.
 *   stream = true:  MORE with the first bytes (or END with a whole error body and its status, stream set to false by the producer);
 *                   afterwards produce() whenever the connection can be written to and was woken.
 * A client that goes away: free() is called without END having come (the producer cancels its work there). */
struct pl_producer {
    pl_produced (*produce)(struct pl_producer *self, struct pl_buf *out);
    void (*free)(struct pl_producer *self);
    bool stream; /* text/event-stream without length, else application/json with length */
    int status;  /* valid once produce() returned something else than WAIT */
    int retry_after; /* seconds; 0 = no header */
};

struct pl_http_resp {
    int status;
    const char *content_type; /* NULL = application/json */
    struct pl_buf body;       /* moves to http */
    int retry_after;
    struct pl_producer *producer; /* not NULL: status and body come from it */
};

/* Fills *resp. Whatever goes wrong is an answer, so there is nothing to return. */
typedef void pl_http_handler(struct pl_http_req *req, struct pl_http_resp *resp);

/* There is something new for this connection's producer. Safe at any time between the handler's start and producer->free. */
void pl_http_wake(struct pl_http_conn *conn);

/* A route. scope: who may call it. Patterns: "/v1/models", "/v1/models/{id}" ({} at the end matches slashes too). */
typedef enum { PL_SCOPE_OPEN, PL_SCOPE_USER, PL_SCOPE_ADMIN } pl_scope;
struct pl_route {
    const char *method, *pattern;
    pl_scope scope;
    pl_http_handler *handler;
};
extern const struct pl_route pl_routes[]; /* route.c; ends with a NULL method */

#endif
