/* request: one request's life on the worker that owns its connection.
 *
 *   line      request line read                        the watcher's clock for the head starts
 *   step      head read: framing, route, key           refused here = answered before the body is read, then closed
 *   step      pieces of the body
 *   step      body complete: handler                   a whole answer, or a producer
 *     pump      producer waits: connection is parked   pl_http_wake resumes it, step comes again
 *     read_more stream: the same, from the content reader
 *   done      answered or lost: producer->free, log line
 *
 * Lock ranks: watch < conn; microhttpd's own come last.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "server/apierr.h"
#include "server/auth.h"
#include "server/limits.h"
#include "server/metrics.h"
#include "server/route.h"
#include "server/server.h"

#define PL_LOG_MODULE "http"

enum {
    BLOCK = 16 * 1024,      /* of a stream, at most at once */
    OUT_LIMIT = 64 << 20,   /* what a producer may have made and not sent */
    ARENA_LIMIT = 256 << 20, /* per request, besides the body */
    SMALL_BODY = 256 << 10,  /* that a request may always have */
    LARGE_BODIES = 16,       /* as large as may be, are kept at a time: what is beyond small ones */
};

/* NULL when memory is out. */
static struct pl_http_conn *conn_get(struct pl_http *h, struct pl_http_link *l)
{
    struct pl_http_conn *c = l->spare;
    l->spare = NULL;
    if (c != NULL)
        return c;
    pthread_mutex_lock(&h->lock);
    c = h->free_conns;
    if (c != NULL) {
        h->free_conns = c->next_free;
    } else {
        c = calloc(1, sizeof *c);
        if (c != NULL) {
            pthread_mutex_init(&c->lock, NULL);
            c->http = h;
            c->next_all = h->all_conns;
            h->all_conns = c;
        }
    }
    pthread_mutex_unlock(&h->lock);
    return c;
}

static void conn_free(struct pl_http_conn *c)
{
    struct pl_http *h = c->http;
    pthread_mutex_lock(&h->lock);
    c->next_free = h->free_conns;
    h->free_conns = c;
    pthread_mutex_unlock(&h->lock);
}

void pl_request_drop_spare(struct pl_http_link *l)
{
    if (l->spare != NULL)
        conn_free(l->spare);
    l->spare = NULL;
}

/* l: the connection, which keeps it for its next request; NULL = it is gone. */
static void conn_put(struct pl_http_conn *c, struct pl_http_link *l)
{
    if (c->producer != NULL)
        c->producer->free(c->producer);
    c->producer = NULL;
    if (c->sink != NULL)
        c->sink->free(c->sink);
    c->sink = NULL;
    atomic_fetch_sub(&c->http->n_large, c->n_large);
    c->n_body = c->n_large = 0;
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
    if (l != NULL && l->spare == NULL)
        l->spare = c;
    else
        conn_free(c);
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

/* Resumes without the lock: the worker may run at once, on this processor, and would only wait for it. */
void pl_http_wake(struct pl_http_conn *c)
{
    struct pl_http *h = c->http;
    pthread_mutex_lock(&c->lock);
    struct MHD_Connection *parked = c->suspended ? c->mhd : NULL; /* stays until somebody resumes it: that is us alone */
    c->suspended = false;
    c->woken |= parked == NULL;
    if (parked != NULL)
        atomic_fetch_add(&h->n_resuming, 1);
    pthread_mutex_unlock(&c->lock);
    if (parked == NULL)
        return;
    MHD_resume_connection(parked);
    atomic_fetch_sub(&h->n_resuming, 1);
}

/* From the watcher. The request may have ended meanwhile and c may serve another one, so that nothing is done here that
 * would hurt it: gone is looked at together with the socket (peer_left), a comment in a stream is harmless. */
void pl_request_watched(void *conn, pl_watch_event ev)
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

/* A body that could not be made becomes one that takes no memory. */
static struct MHD_Response *whole(struct pl_buf *body)
{
    static const char bare[] = "{\"error\":{\"message\":\"out of memory\",\"type\":\"server_error\",\"param\":null,\"code\":\"out_of_memory\"}}";
    if (body->failed)
        return MHD_create_response_from_buffer(sizeof bare - 1, (void *)(uintptr_t)bare, MHD_RESPMEM_PERSISTENT);
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
    if (pl_watch_enter(&c->link->item, state, c))
        rc = MHD_queue_response(c->mhd, (unsigned)status, r);
    MHD_destroy_response(r);
    return rc;
}

static enum MHD_Result answer(struct pl_http_conn *c, struct pl_http_resp *resp)
{
    struct MHD_Response *r = resp->fd >= 0 ? MHD_create_response_from_fd64(resp->n_file, resp->fd) : whole(&resp->body);
    if (r == NULL && resp->fd >= 0)
        close(resp->fd);
    resp->fd = -1;
    if (r != NULL)
        add_headers(c, r, resp->content_type != NULL ? resp->content_type : "application/json", resp->retry_after,
                    atomic_load(&c->http->server->draining));
    if (r != NULL && resp->final)
        MHD_add_response_header(r, "x-should-retry", "false");
    return queue(c, resp->status, r, PL_WATCH_SEND);
}

static const struct pl_http_fault no_memory_to_answer = {500, "out_of_memory", "The server has no memory for this answer.", true};
static const struct pl_http_fault no_memory = {503, "out_of_memory", "The server has no memory for this request.", true};

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
            return pl_watch_progress(&c->link->item, n) ? (ssize_t)n : MHD_CONTENT_READER_END_WITH_ERROR;
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
        if (c->out.failed)
            return refuse(c, &no_memory_to_answer, 0, NULL);
        if (p->stream && r != PL_PRODUCE_WAIT)
            return start_stream(c, p->status);
        if (r == PL_PRODUCE_END) {
            struct pl_http_resp resp = {.status = p->status, .body = c->out, .fd = -1, .retry_after = p->retry_after, .final = p->final};
            pl_buf_init(&c->out, OUT_LIMIT);
            const enum MHD_Result rc = answer(c, &resp);
            pl_buf_fini(&resp.body);
            return rc;
        }
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
    if (!pl_watch_enter(&c->link->item, PL_WATCH_WORK, c))
        return MHD_NO;
    c->handled = c->counted = true;
    atomic_fetch_add(&c->http->n_active, 1);
    if (c->body.failed)
        return refuse(c, &no_memory, 1, NULL);
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
    c->req.sink = c->sink;
    struct pl_http_resp resp = {.status = 200, .fd = -1};
    pl_buf_init(&resp.body, 0);
    c->route->handler(&c->req, &resp);
    pl_apierr_note(&c->usage, &resp);
    if (resp.producer != NULL) {
        c->producer = resp.producer;
        pl_buf_fini(&resp.body);
        return pump(c);
    }
    if (resp.body.failed) {
        pl_buf_fini(&resp.body);
        return refuse(c, &no_memory_to_answer, 0, NULL);
    }
    const enum MHD_Result rc = answer(c, &resp);
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
    enum { N = 16 };
    static _Thread_local unsigned char random[64 * N];
    static _Thread_local size_t left; /* of random, from its front */
    if (left == 0) {
        if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
            memset(random, 0, sizeof random);
        left = sizeof random;
    }
    left -= N;
    memcpy(c->id, "req-", 4);
    for (size_t i = 0; i < N; i++) {
        c->id[4 + 2 * i] = "0123456789abcdef"[random[left + i] >> 4];
        c->id[5 + 2 * i] = "0123456789abcdef"[random[left + i] & 15];
    }
    c->id[4 + 2 * N] = '\0';
}

/* The path that a client means whose base URL lacks /v1 or has it twice, "" = none. */
static const char *meant_path(const char *method, const char *path, char *out, size_t n)
{
    struct pl_route_match m;
    const bool twice = strncmp(path, "/v1/v1/", 7) == 0;
    snprintf(out, n, "%s%s", twice ? "" : "/v1", path + (twice ? 3 : 0));
    pl_route_find(method, out, &m);
    return m.route != NULL ? out : "";
}

static enum MHD_Result refuse_path(struct pl_http_conn *c, const char *method, const char *allow)
{
    char text[400], meant[128];
    struct pl_http_fault f = {404, "unknown_url", text, false};
    if (allow == NULL) {
        size_t n = strlen(c->path) < 100 ? strlen(c->path) : 100;
        while (n > 0 && ((unsigned char)c->path[n] & 0xc0) == 0x80)
            n--; /* not in the middle of a character */
        c->path[n] = '\0'; /* the log has it, too */
        if (meant_path(method, c->path, meant, sizeof meant)[0] != '\0')
            snprintf(text, sizeof text, "Invalid URL (%.16s %s): did you mean %s? A client's base URL ends with /v1.", method, c->path, meant);
        else
            snprintf(text, sizeof text, "Invalid URL (%.16s %s): this server has no such endpoint.", method, c->path);
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
    c->path = strdup(url);
    c->req = (struct pl_http_req){
        .server = h->server, .conn = c, .id = c->id, .method = method, .path = c->path, .path_arg = "", .body = "",
        .start_ns = pl_now_ns(), .usage = &c->usage,
    };
    pl_buf_init(&c->body, 0);
    pl_buf_init(&c->out, OUT_LIMIT);
    MHD_get_connection_values_n(c->mhd, MHD_HEADER_KIND, add_header, &head);
    if (!pl_head_check(&head, version, &fault))
        return refuse(c, &fault, 0, NULL);
    if (c->path == NULL)
        return refuse(c, &no_memory, 1, NULL);
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
    const bool sink = m.route->open_sink != NULL;
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
    if (m.route->scope != PL_SCOPE_OPEN && h->listen.loopback && h->listen.unix_path[0] == '\0' && !pl_auth_gates(h->auth, m.route->scope) &&
        !pl_head_check_browser(method, MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "Host"),
                               MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "Sec-Fetch-Site"), h->opts.host != NULL ? h->opts.host : "", &fault))
        return refuse(c, &fault, 0, NULL);
    if (!pl_head_check_body(&head, method, sink ? h->opts.max_upload : h->opts.max_body, sink, &fault))
        return refuse(c, &fault, 0, NULL);
    c->req.arena = pl_arena_new(ARENA_LIMIT);
    if (c->req.arena != NULL && m.n_arg > 0)
        c->req.path_arg = pl_arena_strndup(c->req.arena, c->path + m.arg, m.n_arg);
    if (c->req.arena != NULL && sink)
        c->sink = m.route->open_sink(&c->req, MHD_lookup_connection_value(c->mhd, MHD_HEADER_KIND, "Content-Type"));
    if (c->req.arena == NULL || c->req.path_arg == NULL || (sink && c->sink == NULL))
        return refuse(c, &no_memory, 1, NULL);
    return MHD_YES;
}

/* n more bytes of a body: whether there is room for them beside those of others. */
static bool take_room(struct pl_http_conn *c, size_t n)
{
    const uint64_t whole = c->n_body + n, large = whole > SMALL_BODY ? whole - SMALL_BODY : 0, more = large - c->n_large;
    if (atomic_fetch_add(&c->http->n_large, more) + more > LARGE_BODIES * (uint64_t)c->http->opts.max_body) {
        atomic_fetch_sub(&c->http->n_large, more);
        return false;
    }
    c->n_large = large;
    return true;
}

/* microhttpd cannot answer before the end of the body. */
static enum MHD_Result refuse_body(struct pl_http_conn *c, int status, const char *reason, const char *code, const char *json)
{
    c->status = status;
    c->usage.error = code;
    pl_watch_answer_raw(&c->link->item, status, reason, json);
    c->linger = true;
    return MHD_NO;
}

static enum MHD_Result take_body(struct pl_http_conn *c, const char *bytes, size_t *n)
{
    static const char large[] = "{\"error\":{\"message\":\"The request body is larger than this server accepts (max-body-mb, max-file-mb).\",\"type\":"
                                "\"invalid_request_error\",\"param\":null,\"code\":\"request_too_large\"}}";
    static const char many[] = "{\"error\":{\"message\":\"The server has no room for one more large request now; try again.\",\"type\":\"server_error\","
                               "\"param\":null,\"code\":\"too_many_large_requests\"}}";
    if (!pl_watch_progress(&c->link->item, *n))
        return MHD_NO;
    const uint64_t max = c->sink != NULL ? c->http->opts.max_upload : c->http->opts.max_body;
    if (*n > max - c->n_body) /* chunked */
        return refuse_body(c, 413, "Content Too Large", "request_too_large", large);
    if (c->sink == NULL && !take_room(c, *n))
        return refuse_body(c, 503, "Service Unavailable", "too_many_large_requests", many);
    c->n_body += *n;
    if (c->sink != NULL)
        c->sink->take(c->sink, bytes, *n);
    else
        pl_buf_add(&c->body, bytes, *n);
    *n = 0;
    return MHD_YES;
}

/* query */

struct each {
    struct pl_http_req *req;
    bool (*visit)(void *arg, const char *name, const char *value);
    void *arg;
};

static enum MHD_Result each_argument(void *cls, enum MHD_ValueKind kind, const char *name, size_t n_name, const char *value, size_t n_value)
{
    struct each *e = cls;
    (void)kind;
    char *key = pl_arena_strndup(e->req->arena, name, n_name);
    char *text = pl_arena_strndup(e->req->arena, value != NULL ? value : "", n_value);
    if (key == NULL || text == NULL || !pl_route_decode_query(key) || !pl_route_decode_query(text))
        return MHD_YES;
    return e->visit(e->arg, key, text) ? MHD_YES : MHD_NO;
}

void pl_http_query_each(struct pl_http_req *req, bool (*visit)(void *arg, const char *name, const char *value), void *arg)
{
    struct each e = {req, visit, arg};
    MHD_get_connection_values_n(req->conn->mhd, MHD_GET_ARGUMENT_KIND, each_argument, &e);
}

struct wanted {
    const char *name, *value;
};

static bool is_wanted(void *arg, const char *name, const char *value)
{
    struct wanted *w = arg;
    if (strcmp(name, w->name) == 0)
        w->value = value;
    return w->value == NULL;
}

const char *pl_http_query(struct pl_http_req *req, const char *name)
{
    struct wanted w = {name, NULL};
    pl_http_query_each(req, is_wanted, &w);
    return w.value;
}

static struct pl_http_link *link_of(struct MHD_Connection *mhd)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info != NULL ? info->socket_context : NULL;
}

void *pl_request_line(void *cls, const char *uri, struct MHD_Connection *mhd)
{
    (void)cls, (void)uri;
    struct pl_http_link *l = link_of(mhd);
    if (l != NULL && !pl_watch_enter(&l->item, PL_WATCH_HEAD, NULL))
        pl_log_debug("a request line came too late");
    return NULL;
}

enum MHD_Result pl_request_step(void *cls, struct MHD_Connection *mhd, const char *url, const char *method, const char *version,
                                const char *upload, size_t *n_upload, void **request)
{
    struct pl_http *h = cls;
    struct pl_http_conn *c = *request;
    if (c == NULL) {
        struct pl_http_link *l = link_of(mhd);
        if (l == NULL || atomic_load(&h->stopping) || !pl_watch_enter(&l->item, PL_WATCH_BODY, NULL))
            return MHD_NO;
        *request = c = conn_get(h, l);
        if (c == NULL)
            return MHD_NO;
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
    /* probes, lists and scrapes come every few seconds for ever: below info unless refused */
    const bool quiet = c->route != NULL && strcmp(c->route->method, "GET") == 0 && (status < 400 || status == 503);
    const pl_log_level level = quiet ? PL_LOG_DEBUG : PL_LOG_INFO;
    if (!pl_log_enabled(level))
        return;
    const struct pl_http_usage *u = &c->usage;
    struct pl_log_field f[14];
    size_t n = 0;
    f[n++] = (struct pl_log_field){.key = "id", .kind = PL_LOG_STR, .s = c->id};
    f[n++] = (struct pl_log_field){.key = "method", .kind = PL_LOG_STR, .s = pl_metrics_method(c->req.method)};
    const char *path = c->pattern != NULL ? c->pattern : c->status == 404 ? c->path : "unknown"; /* one that could not be decoded is no text */
    f[n++] = (struct pl_log_field){.key = "path", .kind = PL_LOG_STR, .s = path};
    f[n++] = (struct pl_log_field){.key = "status", .kind = PL_LOG_INT, .i = status};
    if (u->model[0] != '\0')
        f[n++] = (struct pl_log_field){.key = "model", .kind = PL_LOG_STR, .s = u->model};
    if (u->prompt_tokens > 0 || u->completion_tokens > 0) {
        f[n++] = (struct pl_log_field){.key = "prompt", .kind = PL_LOG_INT, .i = u->prompt_tokens};
        f[n++] = (struct pl_log_field){.key = "completion", .kind = PL_LOG_INT, .i = u->completion_tokens};
    }
    if ((u->prompt_tokens > 0 || u->completion_tokens > 0) && !u->cut) {
        f[n++] = (struct pl_log_field){.key = "cached", .kind = PL_LOG_INT, .i = u->cached_tokens};
        f[n++] = (struct pl_log_field){.key = "queue_ms", .kind = PL_LOG_REAL, .r = u->queue_ms};
        f[n++] = (struct pl_log_field){.key = "ttft_ms", .kind = PL_LOG_REAL, .r = u->ttft_ms};
        f[n++] = (struct pl_log_field){.key = "tok_s", .kind = PL_LOG_REAL, .r = u->tok_s};
    }
    f[n++] = (struct pl_log_field){.key = "total_ms", .kind = PL_LOG_REAL, .r = total_ms};
    if (u->error != NULL)
        f[n++] = (struct pl_log_field){.key = "error", .kind = PL_LOG_STR, .s = u->error};
    if (u->error != NULL && u->param[0] != '\0')
        f[n++] = (struct pl_log_field){.key = "param", .kind = PL_LOG_STR, .s = u->param};
    pl_log_event(level, PL_LOG_MODULE, "request", f, n);
}

void pl_request_done(void *cls, struct MHD_Connection *mhd, void **request, enum MHD_RequestTerminationCode code)
{
    struct pl_http *h = cls;
    struct pl_http_conn *c = *request;
    struct pl_http_link *l = link_of(mhd);
    *request = NULL;
    if (l != NULL && c != NULL && c->linger)
        pl_watch_linger(h->watch, &l->item);
    if (l != NULL && !pl_watch_enter(&l->item, PL_WATCH_IDLE, NULL))
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
    conn_put(c, l);
    if (counted)
        atomic_fetch_sub(&h->n_active, 1);
}
