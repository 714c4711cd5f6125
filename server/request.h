/* request: what http.c and request.c share; no other file includes it (nor microhttpd.h).
 * Thread: as http.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_REQUEST_H
#define PL_SERVER_REQUEST_H

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>

#include "server/http.h"
#include "server/listen.h"
#include "server/watch.h"

struct pl_http_link { /* a TCP connection */
    struct pl_watch_item item; /* first: the watcher gives it back as conn's link */
    struct pl_http *http;
    bool over; /* above max_connections */
    struct pl_http_conn *spare; /* of its last request, for the next one; NULL = none */
};

struct pl_http_conn { /* a request on it; recycled, so that a late wake finds memory that is still one of these */
    struct pl_http_conn *next_free, *next_all;
    struct pl_http *http;

    pthread_mutex_t lock; /* woken, suspended, mhd against suspend and resume */
    bool woken, suspended;
    struct MHD_Connection *mhd;
    atomic_bool gone, beat;

    /* the worker's alone */
    struct pl_http_link *link;
    struct pl_http_req req;
    struct pl_http_usage usage;
    struct pl_producer *producer;
    const struct pl_route *route;
    const char *pattern;
    char *path;
    char id[129];
    struct pl_buf body, out;
    struct pl_sink *sink;
    uint64_t n_body; /* bytes that came */
    uint64_t n_large; /* of them, counted in the server's */
    size_t sent;
    int status; /* 0 = nothing answered */
    bool handled, counted, ended, early, looked, linger;
};

struct pl_auth;

struct pl_http {
    struct pl_http_opts opts;
    struct pl_server *server;
    struct MHD_Daemon *daemon;
    struct pl_watch *watch;
    struct pl_auth *auth;
    struct pl_listen listen;
    char *cert, *key;
    atomic_uint n_active;
    atomic_uint_fast64_t n_large; /* bytes of bodies that are kept, beyond what each may have */
    atomic_uint n_resuming; /* wakes that have claimed a parked connection and not yet resumed it */
    atomic_bool stopping;
    pthread_mutex_t lock; /* the lists of conns */
    struct pl_http_conn *free_conns, *all_conns;
};

/* microhttpd's callbacks for a request, in the order of its life, and the watcher's. */
void *pl_request_line(void *cls, const char *uri, struct MHD_Connection *mhd);
enum MHD_Result pl_request_step(void *cls, struct MHD_Connection *mhd, const char *url, const char *method, const char *version,
                                const char *upload, size_t *n_upload, void **request);
void pl_request_done(void *cls, struct MHD_Connection *mhd, void **request, enum MHD_RequestTerminationCode code);
void pl_request_watched(void *conn, pl_watch_event ev);
/* The connection is closed. */
void pl_request_drop_spare(struct pl_http_link *l);

#endif
