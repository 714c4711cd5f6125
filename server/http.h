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
struct pl_target;
struct pl_server; /* what handlers need: server/server.h */
struct pl_http_conn;

/* What the request's log line says; the handler and its producer fill it in until producer->free. */
struct pl_http_usage {
    uint32_t prompt_tokens, cached_tokens, completion_tokens;
    double queue_ms, ttft_ms, tok_s; /* tok_s: completion tokens by decode time; 0 = not known */
    bool cut;                        /* the client left before the end, which would have told these and cached_tokens */
    const char *error;               /* the error's code or type, a literal; NULL = none */
    char param[64], model[128];      /* the field at fault; the model that answers, cut where it is longer. "" = none */
};

struct pl_http_req {
    struct pl_server *server; /* borrowed */
    struct pl_http_conn *conn;
    const char *id; /* request id: the client's X-Request-Id if it is a plain token of at most 128 bytes, else "req-<32 hex>" */
    const char *method, *path;
    const char *path_arg; /* what a route's {…} matched, URL-decoded; of two, both with what stands between; "" = none */
    const char *body;     /* NUL-terminated after n_body bytes */
    size_t n_body;
    struct pl_sink *sink; /* of a route that takes its body piece by piece; body is empty then */
    uint64_t start_ns;
    struct pl_arena *arena; /* freed after the reply's last byte */
    struct pl_http_usage *usage; /* valid until producer->free, or the handler's return without a producer */
    struct pl_target *granted;   /* what a handler that is called again has waited for (models.h); NULL = nothing */
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
    bool stream; /* text/event-stream without length, else application/json with length; set at birth to what the client asked for */
    int status;  /* valid once produce() returned something else than WAIT */
    int retry_after; /* seconds; 0 = no header */
    bool final;      /* as in pl_http_resp */
};

/* Takes a body piece by piece, for routes whose bodies are too large to be kept. What goes wrong is remembered and said by the handler, which
 * runs at the end of the body. free comes after the reply's last byte, or when the client is gone. */
struct pl_sink {
    void (*take)(struct pl_sink *self, const char *bytes, size_t n);
    void (*free)(struct pl_sink *self);
};

/* A parameter of the query string, decoded, in the request's arena; NULL = absent (or no UTF-8). The first one counts. */
const char *pl_http_query(struct pl_http_req *req, const char *name);
/* Every parameter in turn, until visit returns false. */
void pl_http_query_each(struct pl_http_req *req, bool (*visit)(void *arg, const char *name, const char *value), void *arg);

struct pl_http_resp {
    int status;
    const char *content_type; /* NULL = application/json */
    struct pl_buf body;       /* moves to http */
    int fd;                   /* not -1: the body is this file from its beginning, n_file bytes; moves to http */
    uint64_t n_file;
    int retry_after;
    bool final; /* tells clients that trying again will not help, whatever the status */
    struct pl_producer *producer; /* not NULL: status and body come from it */
    const char *error;            /* for the log line, where the body was made without the request: as in pl_http_usage */
    char param[64];
};

/* A stream that waits for its first token longer than PL_HTTP_HEARTBEAT_S is answered 200 by then, so that proxies keep it;
 * an error that the producer reports later as a whole body (END, stream = false) goes out as an SSE event and [DONE]. */
enum { PL_HTTP_HEARTBEAT_S = 15 };

/* Fills *resp. Whatever goes wrong is an answer, so there is nothing to return. */
typedef void pl_http_handler(struct pl_http_req *req, struct pl_http_resp *resp);

/* There is something new for this connection's producer. Safe at any time from the handler's start on, even after
 * producer->free (connections are recycled, never freed: a late wake is a spurious one for whoever has it now). */
void pl_http_wake(struct pl_http_conn *conn);

/* A route. scope: who may call it. Patterns: "/v1/models", "/v1/files/{id}/content"; {model} matches slashes too, {id} none. A second {id} may
 * end the pattern. */
typedef enum { PL_SCOPE_OPEN, PL_SCOPE_USER, PL_SCOPE_ADMIN } pl_scope;
struct pl_route {
    const char *method, *pattern;
    pl_scope scope;
    pl_http_handler *handler;
    bool needs_model; /* answered 503 while loading and while draining */
    struct pl_sink *(*open_sink)(struct pl_http_req *req, const char *content_type); /* NULL = the body is kept; returns NULL when memory is out */
};
extern const struct pl_route pl_routes[]; /* route.c; ends with a NULL method */

/* Where and how to listen. Strings are borrowed until pl_http_stop; NULL or "" = not set. */
struct pl_http_opts {
    struct pl_server *server;
    const char *host;
    unsigned port; /* 0 = any free one; pl_http_url tells */
    const char *unix_socket; /* instead of host and port */
    const char *tls_cert, *tls_key;
    const char *api_key, *admin_key; /* auth.h */
    unsigned n_threads;              /* 0 = chosen by the number of processors */
    unsigned max_connections;        /* one more is answered 503 */
    size_t max_body;                 /* bytes; more is answered 413 */
    uint64_t max_upload;             /* the same for bodies that a sink takes */
    unsigned header_timeout_s;       /* for a whole head; a body must keep up 1 kB/s after as long */
    unsigned idle_timeout_s;         /* keep-alive, and a reader that takes nothing */
};

struct pl_http;
/* Listens and serves from its return on. Fails: PL_EINVAL with the remedy (address, socket file, certificate), PL_ENOTSUP
 * (TLS that the library lacks), PL_EIO. */
pl_status pl_http_start(struct pl_http **out, const struct pl_http_opts *opts, struct pl_err *err) PL_MUST_CHECK;
const char *pl_http_url(const struct pl_http *h); /* "http://127.0.0.1:8000", "unix:/run/parley.sock" */
bool pl_http_is_public(const struct pl_http *h); /* other machines may reach it */
unsigned pl_http_active(const struct pl_http *h); /* requests that have been read and not yet answered to the end */
unsigned pl_http_connections(const struct pl_http *h);
/* Ends every connection (parked ones are resumed first), then the workers. */
void pl_http_stop(struct pl_http *h);
/* After pl_http_stop and after whatever may still wake a connection (the engine) has ended. */
void pl_http_free(struct pl_http *h);

#endif
