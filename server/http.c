/* http: starts and stops microhttpd and its connections; request.c is what happens on them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/http.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "server/auth.h"
#include "server/request.h"
#include "server/server.h"

#define PL_LOG_MODULE "http"

enum {
    CONN_MEMORY = 16 * 1024, /* microhttpd's per connection, which it clears for each request; also bounds the head (431) */
    SPARE_CONNECTIONS = 64,  /* above max_connections, to be told 503 */
    SPARE_FILES = 64,
};

static void on_connection(void *cls, struct MHD_Connection *mhd, void **socket_context, enum MHD_ConnectionNotificationCode code)
{
    struct pl_http *h = cls;
    if (code == MHD_CONNECTION_NOTIFY_CLOSED) {
        struct pl_http_link *l = *socket_context;
        *socket_context = NULL;
        if (l != NULL) {
            pl_watch_remove(h->watch, &l->item);
            pl_request_drop_spare(l);
        }
        free(l);
        return;
    }
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (info == NULL)
        return; /* its requests find no link and are closed */
    struct pl_http_link *l = calloc(1, sizeof *l);
    if (l == NULL)
        return; /* the same */
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
        flags, 0, NULL, NULL, pl_request_step, h, MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL, MHD_OPTION_LISTEN_SOCKET, h->listen.fd,
        MHD_OPTION_THREAD_POOL_SIZE, threads, MHD_OPTION_CONNECTION_LIMIT, h->opts.max_connections + SPARE_CONNECTIONS,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONN_MEMORY, MHD_OPTION_CONNECTION_TIMEOUT, h->opts.idle_timeout_s,
        MHD_OPTION_NOTIFY_COMPLETED, pl_request_done, h, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h,
        MHD_OPTION_URI_LOG_CALLBACK, pl_request_line, h, MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, h, MHD_OPTION_ARRAY, tls, MHD_OPTION_END);
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
    const struct pl_watch_opts watch = {opts->header_timeout_s, opts->idle_timeout_s, PL_HTTP_HEARTBEAT_S, pl_request_watched};
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
    while (atomic_load(&h->n_resuming) > 0)
        sched_yield();
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
