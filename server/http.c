/* http: every microhttpd call of the daemon.
 *
 * A request's life, all on the one worker that owns its connection:
 *
 *   on_line      request line read                        the watcher's clock for the head starts
 *   on_request   head read: framing, route, key           refused here = answered before the body is read, then closed
 *   on_request   pieces of the body
 *   on_request   body complete: handler                   a whole answer, or a producer
 *     pump       producer waits: connection is parked     pl_http_wake resumes it, on_request comes again
 *     read_more  stream: the same, from the content reader
 *   on_done      answered or lost: producer->free, log line
 *
 * Lock ranks: watch < conn; microhttpd's own come last. SPDX-License-Identifier: Apache-2.0 */
#include "server/http.h"

#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "server/auth.h"
#include "server/limits.h"
#include "server/listen.h"
#include "server/metrics.h"
#include "server/route.h"
#include "server/server.h"
#include "server/watch.h"

#define PL_LOG_MODULE "http"

enum {
    CONN_MEMORY = 32 * 1024,  /* microhttpd's per connection; also bounds the head (431) */
    BLOCK = 16 * 1024,        /* of a stream, at most at once */
    OUT_LIMIT = 64 << 20,     /* what a producer may have made and not sent */
    ARENA_SLACK = 256 << 20,  /* per request; the body's own size is bounded by max_body */
    SPARE_CONNECTIONS = 64,   /* above max_connections, to be told 503 */
    SPARE_FILES = 64,
};

struct link { /* a TCP connection */
    struct pl_watch_item item; /* first: the watcher gives it back as conn's link */
    struct pl_http *http;
    bool over; /* above max_connections */
};

struct pl_http_conn { /* a request on it; recycled, so that a late wake finds memory that is still one of these */
    struct pl_http_conn *next_free, *next_all;
    struct pl_http *http;

    pthread_mutex_t lock; /* woken, suspended, mhd against suspend and resume */
    bool woken, suspended;
    struct MHD_Connection *mhd;
    atomic_bool gone, beat;

    /* the worker's alone */
    struct link *link;
    struct pl_http_req req;
    struct pl_http_usage usage;
    struct pl_producer *producer;
    const struct pl_route *route;
    const char *pattern;
    char *path;
    char id[129];
    struct pl_buf body, out;
    size_t sent;
    int status; /* 0 = nothing answered */
    bool handled, counted, ended, early, looked, linger;
};

struct pl_http {
    struct pl_http_opts opts;
    struct pl_server *server;
    struct MHD_Daemon *daemon;
    struct pl_watch *watch;
    struct pl_auth *auth;
    struct pl_listen listen;
    char *cert, *key;
    atomic_uint n_active;
    atomic_bool stopping;
    pthread_mutex_t lock; /* the lists of conns */
    struct pl_http_conn *free_conns, *all_conns;
};

static struct pl_http_conn *conn_get(struct pl_http *h)
{
    pthread_mutex_lock(&h->lock);
    struct pl_http_conn *c = h->free_conns;
    if (c != NULL) {
        h->free_conns = c->next_free;
    } else {
        c = pl_xcalloc(1, sizeof *c);
        pthread_mutex_init(&c->lock, NULL);
        c->http = h;
        c->next_all = h->all_conns;
        h->all_conns = c;
    }
    pthread_mutex_unlock(&h->lock);
    return c;
}

static void conn_put(struct pl_http_conn *c)
{
    struct pl_http *h = c->http;
    if (c->producer != NULL)
        c->producer->free(c->producer);
    c->producer = NULL;
    pl_buf_fini(&c->body);
    pl_buf_fini(&c->out);
    pl_arena_free(c->req.arena);
    free(c->path);
    pthread_mutex_lock(&c->lock);
    c->mhd = NULL;
    c->woken = c->suspended = false;
    pthread_mutex_unlock(&c->lock);
    c->link = NULL;
    c->req = (struct pl_http_req){0};
    c->usage = (struct pl_http_usage){0};
    c->route = NULL;
    c->pattern = NULL;
    c->path = NULL;
    c->sent = 0;
    c->status = 0;
    c->handled = c->counted = c->ended = c->early = c->looked = c->linger = false;
    pthread_mutex_lock(&h->lock);
    c->next_free = h->free_conns;
    h->free_conns = c;
    pthread_mutex_unlock(&h->lock);
}

/* Parks the connection until the next wake. False when a wake came since the last produce(): go round again. */
static bool conn_park(struct pl_http_conn *c)
{
    pthread_mutex_lock(&c->lock);
    const bool park = !c->woken && !atomic_load(&c->http->stopping);
    c->woken = false;
    if (park) {
        c->suspended = true;
        MHD_suspend_connection(c->mhd);
    }
    pthread_mutex_unlock(&c->lock);
    return park;
}

void pl_http_wake(struct pl_http_conn *c)
{
    pthread_mutex_lock(&c->lock);
    if (c->suspended) {
        c->suspended = false;
        MHD_resume_connection(c->mhd);
    } else {
        c->woken = true;
    }
    pthread_mutex_unlock(&c->lock);
}

/* From the watcher. The request may have ended meanwhile and c may serve another one, so that nothing is done here that
 * would hurt it: gone is looked at together with the socket (peer_left), a comment in a stream is harmless. */
static void on_watch(void *conn, pl_watch_event ev)
{
    struct pl_http_conn *c = conn;
    if (ev == PL_WATCH_GONE)
        atomic_store(&c->gone, true);
    else
        atomic_store(&c->beat, true);
    pl_http_wake(c);
}

static bool peer_left(struct pl_http_conn *c)
{
    if (c->looked && !atomic_load(&c->gone))
        return false;
    c->looked = true;
    atomic_store(&c->gone, false);
    if (!pl_watch_peer_gone(&c->link->item, c->status != 0))
        return false;
    c->usage.error = "client_closed";
    return true;
}

/* answering */

static void add_headers(struct pl_http_conn *c, struct MHD_Response *r, const char *content_type, int retry_after, bool close)
{
    char number[24];
    if (content_type != NULL)
        MHD_add_response_header(r, "Content-Type", content_type);
    MHD_add_response_header(r, "x-request-id", c->id);
    snprintf(number, sizeof number, "%llu", (unsigned long long)((pl_now_ns() - c->req.start_ns) / 1000000));
    MHD_add_response_header(r, "openai-processing-ms", number);
    MHD_add_response_header(r, "X-Content-Type-Options", "nosniff");
    if (retry_after > 0) {
        snprintf(number, sizeof number, "%d", retry_after);
        MHD_add_response_header(r, "Retry-After", number);
    }
    if (close)
        MHD_add_response_header(r, "Connection", "close");
}

static struct MHD_Response *whole(struct pl_buf *body)
{
    const size_t n = body->len;
    char *bytes = pl_buf_take(body);
    struct MHD_Response *r = MHD_create_response_from_buffer(n, bytes != NULL ? bytes : (void *)"",
                                                             bytes != NULL ? MHD_RESPMEM_MUST_FREE : MHD_RESPMEM_PERSISTENT);
    if (r == NULL)
        free(bytes);
    return r;
}

static enum MHD_Result queue(struct pl_http_conn *c, int status, struct MHD_Response *r, pl_watch_state state)
{
    if (r == NULL)
        return MHD_NO;
    c->status = status;
    enum MHD_Result rc = MHD_NO;
    if (pl_watch_enter(c->http->watch, &c->link->item, state, c))
        rc = MHD_queue_response(c->mhd, (unsigned)status, r);
    MHD_destroy_response(r);
    return rc;
}

static enum MHD_Result answer(struct pl_http_conn *c, int status, const char *content_type, struct pl_buf *body, int retry_after)
{
    struct MHD_Response *r = whole(body);
    if (r != NULL)
        add_headers(c, r, content_type != NULL ? content_type : "application/json", retry_after,
                    atomic_load(&c->http->server->draining));
    return queue(c, status, r, PL_WATCH_SEND);
}

static const char *fault_type(int status)
{
    return status == 403 ? "permission_error" : status >= 500 && status != 501 && status != 505 ? "server_error" : "invalid_request_error";
}

/* Answers with an error body made here. allow: for 405 and OPTIONS. */
static enum MHD_Result refuse(struct pl_http_conn *c, const struct pl_http_fault *f, int retry_after, const char *allow)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "{\"error\":{\"message\":\"");
    pl_buf_add_json(&b, f->message, strlen(f->message));
    pl_buf_addf(&b, "\",\"type\":\"%s\",\"param\":null,\"code\":", fault_type(f->status));
    if (f->code != NULL)
        pl_buf_addf(&b, "\"%s\"}}", f->code);
    else
        pl_buf_adds(&b, "null}}");
    c->usage.error = f->code != NULL ? f->code : fault_type(f->status);
    struct MHD_Response *r = whole(&b);
    pl_buf_fini(&b);
    if (r == NULL)
        return MHD_NO;
    add_headers(c, r, "application/json", retry_after, f->close);
    if (allow != NULL)
        MHD_add_response_header(r, "Allow", allow);
    if (f->status == 401)
        MHD_add_response_header(r, "WWW-Authenticate", "Bearer");
    c->linger = f->close;
    return queue(c, f->status, r, PL_WATCH_SEND);
}

/* A stream that was opened early failed before its first event: its error body becomes an event. */
static void wrap_error(struct pl_buf *out, size_t from)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "data: ");
    for (size_t i = from; i < out->len; i++)
        pl_buf_addc(&b, out->data[i] == '\n' || out->data[i] == '\r' ? ' ' : out->data[i]);
    pl_buf_adds(&b, "\n\ndata: [DONE]\n\n");
    out->len = from;
    pl_buf_add(out, b.data, b.len);
    out->failed = out->failed || b.failed;
    pl_buf_fini(&b);
}

/* microhttpd's content reader of a stream. */
static ssize_t read_more(void *cls, uint64_t pos, char *buf, size_t max)
{
    struct pl_http_conn *c = cls;
    (void)pos;
    for (;;) {
        if (c->out.len > c->sent) {
            const size_t left = c->out.len - c->sent, n = left < max ? left : max;
            memcpy(buf, c->out.data + c->sent, n);
            c->sent += n;
            if (c->sent == c->out.len) {
                pl_buf_clear(&c->out);
                c->sent = 0;
            }
            return pl_watch_progress(c->http->watch, &c->link->item, n) ? (ssize_t)n : MHD_CONTENT_READER_END_WITH_ERROR;
        }
        if (c->ended)
            return MHD_CONTENT_READER_END_OF_STREAM;
        if (atomic_load(&c->http->stopping) || peer_left(c))
            return MHD_CONTENT_READER_END_WITH_ERROR;
        const pl_produced r = c->producer->produce(c->producer, &c->out);
        c->ended = r == PL_PRODUCE_END;
        if (c->ended && c->early && !c->producer->stream)
            wrap_error(&c->out, 0);
        if (c->out.failed)
            return MHD_CONTENT_READER_END_WITH_ERROR;
        if (r != PL_PRODUCE_WAIT)
            continue;
        if (atomic_exchange(&c->beat, false))
            pl_buf_adds(&c->out, ": keep-alive\n\n");
        else if (conn_park(c))
            return 0;
    }
}

static enum MHD_Result start_stream(struct pl_http_conn *c, int status)
{
    struct MHD_Response *r = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, BLOCK, read_more, c, NULL);
    if (r == NULL)
        return MHD_NO;
    add_headers(c, r, "text/event-stream; charset=utf-8", 0, false);
    MHD_add_response_header(r, "Cache-Control", "no-cache");
    MHD_add_response_header(r, "X-Accel-Buffering", "no");
    return queue(c, status, r, PL_WATCH_STREAM);
}

/* Runs the producer until it has a status, parking in between. */
static enum MHD_Result pump(struct pl_http_conn *c)
{
    struct pl_producer *p = c->producer;
    for (;;) {
        if (atomic_load(&c->http->stopping))
            return MHD_NO;
        const pl_produced r = p->produce(p, &c->out);
        c->ended = r == PL_PRODUCE_END;
        if (c->out.failed) {
            static const struct pl_http_fault memory = {500, "out_of_memory", "The server has no memory for this answer.", true};
            return refuse(c, &memory, 0, NULL);
        }
        if (p->stream && r != PL_PRODUCE_WAIT)
            return start_stream(c, p->status);
        if (r == PL_PRODUCE_END)
            return answer(c, p->status, NULL, &c->out, p->retry_after);
        if (r == PL_PRODUCE_MORE)
            continue;
        if (peer_left(c))
            return MHD_NO;
        if (atomic_exchange(&c->beat, false) && p->stream) {
            c->early = true;
            pl_buf_adds(&c->out, ": keep-alive\n\n");
            return start_stream(c, 200);
        }
        if (conn_park(c))
            return MHD_YES;
    }
}

static enum MHD_Result handle(struct pl_http_conn *c)
{
    struct pl_server *s = c->http->server;
    if (!pl_watch_enter(c->http->watch, &c->link->item, PL_WATCH_WORK, c))
        return MHD_NO;
    c->handled = c->counted = true;
    atomic_fetch_add(&c->http->n_active, 1);
    if (c->body.failed) {
        static const struct pl_http_fault memory = {503, "out_of_memory", "The server has no memory for this request.", true};
        return refuse(c, &memory, 1, NULL);
    }
    if (c->route->needs_model && atomic_load(&s->draining)) {
        static const struct pl_http_fault draining = {503, "shutting_down", "The server is shutting down.", true};
        return refuse(c, &draining, 5, NULL);
    }
    if (c->route->needs_model && !atomic_load_explicit(&s->ready, memory_order_acquire)) {
        static const struct pl_http_fault loading = {503, "model_loading", "The model is still being loaded.", false};
        return refuse(c, &loading, 1, NULL);
    }
    c->req.body = pl_buf_str(&c->body);
    c->req.n_body = c->body.len;
    struct pl_http_resp resp = {.status = 200};
    pl_buf_init(&resp.body, 0);
    c->route->handler(&c->req, &resp);
    if (resp.producer != NULL) {
        c->producer = resp.producer;
        pl_buf_fini(&resp.body);
        return pump(c);
    }
    if (resp.body.failed) {
        pl_buf_fini(&resp.body);
        static const struct pl_http_fault memory = {500, "out_of_memory", "The server has no memory for this answer.", true};
        return refuse(c, &memory, 0, NULL);
    }
    const enum MHD_Result rc = answer(c, resp.status, resp.content_type, &resp.body, resp.retry_after);
    pl_buf_fini(&resp.body);
    return rc;
}

/* reading */

static enum MHD_Result add_header(void *cls, enum MHD_ValueKind kind, const char *name, size_t n_name, const char *value,
                                  size_t n_value)
{
    (void)kind;
    pl_head_add(cls, name, n_name, value != NULL ? value : "", value != NULL ? n_value : 0);
    return MHD_YES;
}

static void name_request(struct pl_http_conn *c)
{
    const char *given = MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "X-Request-Id");
    const size_t n = given != NULL ? strspn(given, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:") : 0;
    if (n > 0 && n < sizeof c->id && given[n] == '\0') {
        memcpy(c->id, given, n + 1);
        return;
    }
    unsigned char random[16];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
        memset(random, 0, sizeof random);
    strcpy(c->id, "req-");
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(c->id + 4 + 2 * i, 3, "%02x", random[i]);
}

static enum MHD_Result refuse_path(struct pl_http_conn *c, const char *method, const char *allow)
{
    char text[256];
    struct pl_http_fault f = {404, "unknown_url", text, false};
    if (allow == NULL) {
        size_t n = strlen(c->path) < 100 ? strlen(c->path) : 100;
        while (n > 0 && ((unsigned char)c->path[n] & 0xc0) == 0x80)
            n--; /* not in the middle of a character */
        snprintf(text, sizeof text, "Invalid URL (%.16s %.*s)", method, (int)n, c->path);
    } else {
        f.status = 405;
        f.code = "method_not_allowed";
        snprintf(text, sizeof text, "Method %.16s is not allowed here; this path takes %s.", method, allow);
    }
    f.close = true; /* there may be a body that nobody reads */
    return refuse(c, &f, 0, allow);
}

static enum MHD_Result options(struct pl_http_conn *c, const char *allow)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(0, (void *)"", MHD_RESPMEM_PERSISTENT);
    if (r == NULL)
        return MHD_NO;
    add_headers(c, r, NULL, 0, false);
    MHD_add_response_header(r, "Allow", allow);
    return queue(c, 204, r, PL_WATCH_SEND);
}

/* Fills in c from the head and decides whether to read on. */
static enum MHD_Result take_head(struct pl_http_conn *c, const char *url, const char *method, const char *version)
{
    struct pl_http *h = c->http;
    struct pl_head head = {0};
    struct pl_http_fault fault;
    name_request(c);
    c->path = pl_xstrdup(url);
    c->req = (struct pl_http_req){
        .server = h->server, .conn = c, .id = c->id, .method = method, .path = c->path, .path_arg = "", .body = "",
        .start_ns = pl_now_ns(), .usage = &c->usage,
    };
    pl_buf_init(&c->body, 0);
    pl_buf_init(&c->out, OUT_LIMIT);
    MHD_get_connection_values_n(c->mhd, MHD_HEADER_KIND, add_header, &head);
    if (!pl_head_check(&head, version, method, h->opts.max_body, &fault))
        return refuse(c, &fault, 0, NULL);
    if (strpbrk(url, " \t") != NULL || !pl_route_decode(c->path)) {
        fault = (struct pl_http_fault){400, NULL, "The path is not a valid URL path.", true};
        return refuse(c, &fault, 0, NULL);
    }
    struct pl_route_match m;
    pl_route_find(method, c->path, &m);
    c->pattern = m.pattern;
    if (c->link->over && (m.route == NULL || m.route->scope != PL_SCOPE_OPEN)) {
        fault = (struct pl_http_fault){503, "too_many_connections", "The server has too many connections.", true};
        return refuse(c, &fault, 1, NULL);
    }
    if (m.route == NULL && m.pattern != NULL && strcmp(method, "OPTIONS") == 0)
        return options(c, m.allow);
    if (m.route == NULL)
        return refuse_path(c, method, m.pattern != NULL ? m.allow : NULL);
    c->route = m.route;
    c->req.path_arg = c->path + m.arg;
    const pl_verdict v = pl_auth_check(h->auth, m.route->scope, MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "Authorization"),
                                       MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "X-Api-Key"));
    if (v == PL_AUTH_NO_KEY) {
        fault = (struct pl_http_fault){401, "invalid_api_key",
                                       "Incorrect or missing API key. Send it as Authorization: Bearer KEY or X-Api-Key: KEY.", true};
        return refuse(c, &fault, 0, NULL);
    }
    if (v == PL_AUTH_FORBIDDEN) {
        fault = (struct pl_http_fault){403, "insufficient_permissions", "This path needs the administrator's key.", true};
        return refuse(c, &fault, 0, NULL);
    }
    c->req.arena = pl_arena_new(ARENA_SLACK);
    if (c->req.arena == NULL) {
        fault = (struct pl_http_fault){503, "out_of_memory", "The server has no memory for this request.", true};
        return refuse(c, &fault, 1, NULL);
    }
    return MHD_YES;
}

static enum MHD_Result take_body(struct pl_http_conn *c, const char *bytes, size_t *n)
{
    static const char large[] = "{\"error\":{\"message\":\"The request body is larger than this server accepts.\",\"type\":"
                                "\"invalid_request_error\",\"param\":null,\"code\":\"request_too_large\"}}";
    if (!pl_watch_progress(c->http->watch, &c->link->item, *n))
        return MHD_NO;
    if (*n > c->http->opts.max_body - c->body.len) { /* chunked: microhttpd cannot answer before the end of the body */
        c->status = 413;
        c->usage.error = "request_too_large";
        pl_watch_answer_raw(c->http->watch, &c->link->item, 413, "Content Too Large", large);
        c->linger = true;
        return MHD_NO;
    }
    pl_buf_add(&c->body, bytes, *n);
    *n = 0;
    return MHD_YES;
}

static struct link *link_of(struct MHD_Connection *mhd)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info != NULL ? info->socket_context : NULL;
}

static void *on_line(void *cls, const char *uri, struct MHD_Connection *mhd)
{
    (void)cls, (void)uri;
    struct link *l = link_of(mhd);
    if (l != NULL && !pl_watch_enter(l->http->watch, &l->item, PL_WATCH_HEAD, NULL))
        pl_log_debug("a request line came too late");
    return NULL;
}

static enum MHD_Result on_request(void *cls, struct MHD_Connection *mhd, const char *url, const char *method,
                                  const char *version, const char *upload, size_t *n_upload, void **request)
{
    struct pl_http *h = cls;
    struct pl_http_conn *c = *request;
    if (c == NULL) {
        struct link *l = link_of(mhd);
        if (l == NULL || atomic_load(&h->stopping) || !pl_watch_enter(h->watch, &l->item, PL_WATCH_BODY, NULL))
            return MHD_NO;
        *request = c = conn_get(h);
        c->mhd = mhd;
        c->link = l;
        atomic_store(&c->gone, false);
        atomic_store(&c->beat, false);
        return take_head(c, url, method, version);
    }
    if (*n_upload > 0)
        return take_body(c, upload, n_upload);
    return c->handled ? pump(c) : handle(c);
}

/* ending */

static void log_request(const struct pl_http_conn *c, int status, double total_ms)
{
    const struct pl_http_usage *u = &c->usage;
    struct pl_log_field f[12];
    size_t n = 0;
    f[n++] = (struct pl_log_field){.key = "id", .kind = PL_LOG_STR, .s = c->id};
    f[n++] = (struct pl_log_field){.key = "method", .kind = PL_LOG_STR, .s = pl_metrics_method(c->req.method)};
    f[n++] = (struct pl_log_field){.key = "path", .kind = PL_LOG_STR, .s = c->pattern != NULL ? c->pattern : "unknown"};
    f[n++] = (struct pl_log_field){.key = "status", .kind = PL_LOG_INT, .i = status};
    if (u->prompt_tokens > 0 || u->completion_tokens > 0) {
        f[n++] = (struct pl_log_field){.key = "prompt", .kind = PL_LOG_INT, .i = u->prompt_tokens};
        f[n++] = (struct pl_log_field){.key = "cached", .kind = PL_LOG_INT, .i = u->cached_tokens};
        f[n++] = (struct pl_log_field){.key = "completion", .kind = PL_LOG_INT, .i = u->completion_tokens};
        f[n++] = (struct pl_log_field){.key = "queue_ms", .kind = PL_LOG_REAL, .r = u->queue_ms};
        f[n++] = (struct pl_log_field){.key = "ttft_ms", .kind = PL_LOG_REAL, .r = u->ttft_ms};
        f[n++] = (struct pl_log_field){.key = "tok_s", .kind = PL_LOG_REAL, .r = u->tok_s};
    }
    f[n++] = (struct pl_log_field){.key = "total_ms", .kind = PL_LOG_REAL, .r = total_ms};
    if (u->error != NULL)
        f[n++] = (struct pl_log_field){.key = "error", .kind = PL_LOG_STR, .s = u->error};
    /* probes and scrapes come every few seconds for ever: below info unless refused */
    const bool quiet = c->route != NULL && !c->route->needs_model && (status < 400 || status == 503);
    pl_log_event(quiet ? PL_LOG_DEBUG : PL_LOG_INFO, PL_LOG_MODULE, "request", f, n);
}

static void on_done(void *cls, struct MHD_Connection *mhd, void **request, enum MHD_RequestTerminationCode code)
{
    struct pl_http *h = cls;
    struct pl_http_conn *c = *request;
    struct link *l = link_of(mhd);
    *request = NULL;
    if (l != NULL && c != NULL && c->linger)
        pl_watch_linger(h->watch, &l->item);
    if (l != NULL && !pl_watch_enter(h->watch, &l->item, PL_WATCH_IDLE, NULL))
        pl_log_debug("connection ended by its deadline");
    if (c == NULL)
        return;
    const bool counted = c->counted;
    const bool lost = code != MHD_REQUEST_TERMINATED_COMPLETED_OK && c->status < 400;
    const int status = c->status != 0 ? c->status : 499;
    if (c->producer != NULL) { /* first: it fills in the usage of what was cancelled */
        c->producer->free(c->producer);
        c->producer = NULL;
    }
    if (lost && c->usage.error == NULL)
        c->usage.error = "client_closed";
    const double seconds = (double)(pl_now_ns() - c->req.start_ns) / 1e9;
    pl_metrics_request(h->server->metrics, c->pattern, c->req.method, status, seconds);
    log_request(c, status, seconds * 1e3);
    conn_put(c);
    if (counted)
        atomic_fetch_sub(&h->n_active, 1);
}

static void on_connection(void *cls, struct MHD_Connection *mhd, void **socket_context, enum MHD_ConnectionNotificationCode code)
{
    struct pl_http *h = cls;
    if (code == MHD_CONNECTION_NOTIFY_CLOSED) {
        struct link *l = *socket_context;
        *socket_context = NULL;
        if (l != NULL)
            pl_watch_remove(h->watch, &l->item);
        free(l);
        return;
    }
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (info == NULL)
        return; /* its requests find no link and are closed */
    struct link *l = pl_xcalloc(1, sizeof *l);
    l->http = h;
    l->item.fd = info->connect_fd;
    l->item.plain = h->cert == NULL;
    const int on = 1;
    setsockopt(l->item.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* a UNIX socket has none and needs none */
    *socket_context = l;
    l->over = pl_watch_add(h->watch, &l->item) > h->opts.max_connections;
}

static size_t keep_escapes(void *cls, struct MHD_Connection *mhd, char *s)
{
    (void)cls, (void)mhd;
    return strlen(s); /* route.c decodes, and refuses what microhttpd would let pass */
}

static void on_mhd_log(void *cls, const char *fmt, va_list ap)
{
    (void)cls;
    char text[256];
    vsnprintf(text, sizeof text, fmt, ap);
    text[strcspn(text, "\n")] = '\0';
    pl_log_debug("microhttpd: %s", text);
}

/* starting and stopping */

/* Raises the file limit as far as it goes and fits max_connections under it. */
static void fit_file_limit(struct pl_http *h)
{
    struct rlimit lim;
    if (getrlimit(RLIMIT_NOFILE, &lim) != 0)
        return;
    const rlim_t wanted = (rlim_t)h->opts.max_connections + SPARE_CONNECTIONS + SPARE_FILES;
    if (lim.rlim_cur < wanted) {
        lim.rlim_cur = lim.rlim_max < wanted ? lim.rlim_max : wanted;
        if (setrlimit(RLIMIT_NOFILE, &lim) != 0 && getrlimit(RLIMIT_NOFILE, &lim) != 0)
            return;
    }
    if (lim.rlim_cur < wanted) {
        const rlim_t least = SPARE_CONNECTIONS + SPARE_FILES + 1;
        h->opts.max_connections = (unsigned)(lim.rlim_cur > least ? lim.rlim_cur - least + 1 : 1);
        pl_log_warn("max-connections lowered to %u: the limit of open files is %llu (raise it with ulimit -n or LimitNOFILE)",
                    h->opts.max_connections, (unsigned long long)lim.rlim_cur);
    }
}

static pl_status start_daemon(struct pl_http *h, struct pl_err *err)
{
    unsigned threads = h->opts.n_threads;
    if (threads == 0)
        threads = pl_pool_cpus() > 8 ? 4 : 2;
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG;
    struct MHD_OptionItem tls[] = {
        {MHD_OPTION_HTTPS_MEM_CERT, 0, h->cert},
        {MHD_OPTION_HTTPS_MEM_KEY, 0, h->key},
        {MHD_OPTION_HTTPS_PRIORITIES, 0, (void *)"SECURE128:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"},
        {MHD_OPTION_END, 0, NULL},
    };
    if (h->cert != NULL)
        flags |= MHD_USE_TLS;
    else
        tls[0].option = MHD_OPTION_END;
    h->daemon = MHD_start_daemon(
        flags, 0, NULL, NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL, MHD_OPTION_LISTEN_SOCKET, h->listen.fd,
        MHD_OPTION_THREAD_POOL_SIZE, threads, MHD_OPTION_CONNECTION_LIMIT, h->opts.max_connections + SPARE_CONNECTIONS,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONN_MEMORY, MHD_OPTION_CONNECTION_TIMEOUT, h->opts.idle_timeout_s,
        MHD_OPTION_NOTIFY_COMPLETED, on_done, h, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h,
        MHD_OPTION_URI_LOG_CALLBACK, on_line, h, MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, h, MHD_OPTION_ARRAY, tls, MHD_OPTION_END);
    if (h->daemon == NULL)
        return pl_fail(err, PL_EIO, "%s", h->cert != NULL ? "the HTTPS server did not start: is tls-key the key of tls-cert?"
                                                          : "the HTTP server did not start");
    h->listen.owned = false; /* microhttpd closes it */
    return PL_OK;
}

static pl_status load_tls(struct pl_http *h, struct pl_err *err)
{
    const bool cert = h->opts.tls_cert != NULL && *h->opts.tls_cert != '\0';
    const bool key = h->opts.tls_key != NULL && *h->opts.tls_key != '\0';
    if (!cert && !key)
        return PL_OK;
    if (!cert || !key)
        return pl_fail_param(err, PL_EINVAL, cert ? "tls-key" : "tls-cert", "tls-cert and tls-key belong together: set %s too",
                             cert ? "tls-key" : "tls-cert");
    if (MHD_is_feature_supported(MHD_FEATURE_TLS) != MHD_YES)
        return pl_fail_param(err, PL_ENOTSUP, "tls-cert", "this libmicrohttpd was built without TLS: put a TLS proxy in front, or "
                             "install a libmicrohttpd with GnuTLS");
    const pl_status rc = pl_listen_read_file(h->opts.tls_cert, "tls-cert", false, &h->cert, err);
    return rc != PL_OK ? rc : pl_listen_read_file(h->opts.tls_key, "tls-key", true, &h->key, err);
}

pl_status pl_http_start(struct pl_http **out, const struct pl_http_opts *opts, struct pl_err *err)
{
    struct pl_http *h = pl_xcalloc(1, sizeof *h);
    h->opts = *opts;
    h->server = opts->server;
    pthread_mutex_init(&h->lock, NULL);
    fit_file_limit(h);
    const struct pl_watch_opts watch = {opts->header_timeout_s, opts->idle_timeout_s, PL_HTTP_HEARTBEAT_S, on_watch};
    pl_status rc = pl_auth_new(&h->auth, opts->api_key, opts->admin_key, err);
    if (rc == PL_OK)
        rc = load_tls(h, err);
    if (rc == PL_OK)
        rc = pl_listen_open(&h->listen, opts->host, opts->port, opts->unix_socket, h->cert != NULL, err);
    if (rc == PL_OK)
        rc = pl_watch_start(&h->watch, &watch, err);
    if (rc == PL_OK) {
        h->server->http = h;
        rc = start_daemon(h, err);
    }
    if (rc != PL_OK) {
        h->server->http = NULL;
        pl_http_stop(h);
        pl_http_free(h);
        return rc;
    }
    *out = h;
    return PL_OK;
}

const char *pl_http_url(const struct pl_http *h)
{
    return h->listen.url;
}

bool pl_http_is_public(const struct pl_http *h)
{
    return !h->listen.loopback;
}

unsigned pl_http_active(const struct pl_http *h)
{
    return atomic_load(&h->n_active);
}

unsigned pl_http_connections(const struct pl_http *h)
{
    return h->watch != NULL ? pl_watch_count(h->watch) : 0;
}

void pl_http_stop(struct pl_http *h)
{
    if (h == NULL)
        return;
    atomic_store(&h->stopping, true); /* from here on nobody parks any more */
    pthread_mutex_lock(&h->lock);
    struct pl_http_conn *all = h->all_conns;
    pthread_mutex_unlock(&h->lock);
    for (struct pl_http_conn *c = all; c != NULL; c = c->next_all)
        pl_http_wake(c);
    if (h->daemon != NULL)
        MHD_stop_daemon(h->daemon);
    h->daemon = NULL;
    pl_watch_stop(h->watch);
    h->watch = NULL;
    pl_listen_close(&h->listen);
}

void pl_http_free(struct pl_http *h)
{
    if (h == NULL)
        return;
    while (h->all_conns != NULL) {
        struct pl_http_conn *c = h->all_conns;
        h->all_conns = c->next_all;
        pthread_mutex_destroy(&c->lock);
        free(c);
    }
    pl_auth_free(h->auth);
    if (h->key != NULL)
        explicit_bzero(h->key, strlen(h->key));
    free(h->key);
    free(h->cert);
    pthread_mutex_destroy(&h->lock);
    free(h);
}
