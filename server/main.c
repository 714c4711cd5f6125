/* parleyd: the daemon's story. Configuration, log, listen at once (health says "loading"), load the model beside it, serve,
 * wait for a signal, finish what runs, leave.
 * Thread: main owns start and stop.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "config/config.h"
#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mapped.h"
#include "core/base/mem.h"
#include "core/base/version.h"
#include "server/http.h"
#include "server/jobs/jobs.h"
#include "server/metrics.h"
#include "server/ranks.h"
#include "server/registry.h"
#include "server/server.h"

#define PL_LOG_MODULE "main"

enum { EXIT_CONFIG = 2, EXIT_LOST = 3, FLUSH_MS = 2000, LAST_MS = 500, FORM_BYTES = 1 << 20 /* of an upload, beside the file */ };

struct daemon {
    struct pl_config config;
    struct pl_server server;
    struct pl_http *http;
    sigset_t signals;
};

/* A configuration's fault is told apart: a setting, or the model's file, which is not there or cannot be used. */
static int exit_status(pl_status rc, const struct pl_err *err)
{
    const bool setting = rc == PL_EINVAL && err->param[0] != '\0', file = rc == PL_EIO || rc == PL_EFORMAT || rc == PL_ENOTSUP;
    return setting || file ? EXIT_CONFIG : rc == PL_ERANK ? EXIT_LOST : EXIT_FAILURE;
}

/* One line that says what to do. */
static int complain(pl_status rc, const struct pl_err *err)
{
    pl_log_error("%s", err->msg[0] != '\0' ? err->msg : pl_status_text(rc));
    return exit_status(rc, err);
}

/* The next signal, 0 after ms milliseconds without one (-1 = wait for ever). */
static int next_signal(const struct daemon *d, int ms)
{
    const struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    for (;;) {
        const int sig = ms < 0 ? sigwaitinfo(&d->signals, NULL) : sigtimedwait(&d->signals, NULL, &t);
        if (sig > 0)
            return sig;
        if (errno == EAGAIN)
            return 0;
    }
}

static void set_signals(struct daemon *d)
{
    signal(SIGPIPE, SIG_IGN);
    pl_mapped_guard();
    signal(SIGXFSZ, SIG_IGN); /* a write beyond a limit fails like one on a full disk */
    sigemptyset(&d->signals);
    sigaddset(&d->signals, SIGTERM);
    sigaddset(&d->signals, SIGINT);
    sigaddset(&d->signals, SIGHUP);
    sigaddset(&d->signals, SIGUSR1); /* what computes is lost */
    pthread_sigmask(SIG_BLOCK, &d->signals, NULL); /* inherited by every thread: only main takes them */
}

static pl_status listen_now(struct daemon *d, struct pl_err *err)
{
    const struct pl_config *c = &d->config;
    const struct pl_http_opts o = {
        .server = &d->server,
        .host = c->host,
        .port = (unsigned)c->port,
        .unix_socket = c->unix_socket,
        .tls_cert = c->tls_cert,
        .tls_key = c->tls_key,
        .api_key = c->api_key,
        .admin_key = c->admin_key,
        .max_connections = (unsigned)c->max_connections,
        .max_body = (size_t)c->max_body_mb << 20,
        .max_upload = ((uint64_t)c->max_file_mb << 20) + FORM_BYTES,
        .header_timeout_s = (unsigned)c->header_timeout,
        .idle_timeout_s = (unsigned)c->idle_timeout,
    };
    const pl_status rc = pl_http_start(&d->http, &o, err);
    if (rc != PL_OK)
        return rc;
    pl_log_info("listening on %s", pl_http_url(d->http));
    if (c->api_key[0] == '\0' && pl_http_is_public(d->http))
        pl_log_warn("anybody who reaches this address can use the model: set --api-key, or listen on 127.0.0.1");
    return PL_OK;
}

_Noreturn static void fall(struct daemon *d);

/* Until the first model is there, or not (*rc). Returns a signal that came meanwhile, else 0. Reading cannot be interrupted: when it is not over,
 * the process goes. */
static int wait_for_model(struct daemon *d, pl_status *rc, struct pl_err *err)
{
    int sig = 0;
    while (!pl_registry_settled(d->server.models, rc, err)) {
        if (sig == SIGUSR1)
            fall(d);
        if (sig != 0) {
            pl_log_info("signal %s while loading: leaving", sigabbrev_np(sig));
            pl_http_stop(d->http);
            if (d->server.world != NULL)
                d->server.world->ops->end_processes(d->server.world, EXIT_SUCCESS);
            _exit(EXIT_SUCCESS); /* the registry's thread is in the middle of things that exit() would take down under it */
        }
        sig = next_signal(d, 50);
    }
    return sig;
}

/* New requests are refused from here on, and those that wait for a model; running ones may finish until the drain timeout or a second signal. */
static void drain(struct daemon *d)
{
    atomic_store(&d->server.draining, true);
    const uint64_t until = pl_now_ns() + (uint64_t)d->config.drain_timeout * 1000000000u;
    pl_log_info("draining: %u requests, at most %d s", pl_http_active(d->http), (int)d->config.drain_timeout);
    pl_registry_stop_reading(d->server.models);
    bool now = false;
    while (!now && pl_http_active(d->http) > 0 && pl_now_ns() < until)
        now = next_signal(d, 20) != 0;
    if (pl_http_active(d->http) > 0)
        pl_log_warn("ending %u requests: %s", pl_http_active(d->http), now ? "second signal" : "drain timeout");
    if (!pl_registry_drain(d->server.models))
        pl_log_info("what still ran was ended");
    const uint64_t flush = pl_now_ns() + FLUSH_MS * UINT64_C(1000000); /* for the streams' last words */
    while (!now && pl_http_active(d->http) > 0 && pl_now_ns() < flush)
        now = next_signal(d, 5) != 0;
}

/* On the engine's thread: requests have ended, the rest is main's. */
static void tell_lost(void *arg)
{
    (void)arg;
    kill(getpid(), SIGUSR1);
}

/* What computes is lost, and with it maybe a thread that stands still: clients get their last words, health is red, and the process
 * ends without waiting for anybody. */
_Noreturn static void fall(struct daemon *d)
{
    const uint64_t now = pl_now_ns(), least = now + LAST_MS * UINT64_C(1000000), most = now + FLUSH_MS * UINT64_C(1000000);
    while (pl_now_ns() < least || (pl_http_active(d->http) > 0 && pl_now_ns() < most))
        (void)next_signal(d, 5);
    pl_registry_stop_reading(d->server.models);
    pl_jobs_stop(d->server.jobs, FLUSH_MS / 1000);
    pl_log_error("ending with status %d: to be started again", EXIT_LOST);
    if (d->server.world != NULL)
        d->server.world->ops->end_processes(d->server.world, EXIT_LOST);
    _exit(EXIT_LOST);
}

static void end_at_once(int sig)
{
    (void)sig;
    _exit(EXIT_SUCCESS);
}

/* While there is nothing yet that would have to be ended (other processes would), SIGTERM and SIGINT end the process. */
static void heed_signals_at_once(bool on)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGTERM, end_at_once);
    signal(SIGINT, end_at_once);
    pthread_sigmask(on ? SIG_UNBLOCK : SIG_BLOCK, &set, NULL);
}

/* What can be asked for, none of it read yet. */
static pl_status open_tables(struct daemon *d, struct pl_err *err)
{
    if (d->server.world == NULL)
        heed_signals_at_once(true);
    const pl_status rc = pl_registry_new(&d->server.models, &d->server, err);
    if (rc == PL_OK && pl_jobs_open(&d->server.jobs, &d->server, &d->server.jobs_error) != PL_OK)
        pl_log_warn("no files and no fine-tuning: %s", d->server.jobs_error.msg);
    else if (rc == PL_OK)
        pl_log_info("files and jobs in %s", pl_store_dir(d->server.jobs->store));
    heed_signals_at_once(false);
    return rc;
}

static int serve(struct daemon *d)
{
    struct pl_err err = {0};
    pl_status rc = open_tables(d, &err);
    if (rc != PL_OK)
        return complain(rc, &err);
    rc = listen_now(d, &err);
    if (rc == PL_OK)
        rc = pl_registry_start(d->server.models, &err);
    if (rc != PL_OK)
        return complain(rc, &err);
    int sig = wait_for_model(d, &rc, &err);
    if (rc != PL_OK)
        return complain(rc, &err);
    if (sig == 0 && d->server.jobs != NULL && pl_jobs_start(d->server.jobs, &err) != PL_OK)
        pl_log_error("no jobs are run: %s", err.msg);
    if (sig == 0)
        sig = next_signal(d, -1);
    if (sig == SIGUSR1)
        fall(d);
    pl_log_info("signal %s", sigabbrev_np(sig));
    drain(d);
    if (!pl_registry_healthy(d->server.models, INT_MAX))
        fall(d);
    pl_jobs_stop(d->server.jobs, (unsigned)d->config.drain_timeout);
    return EXIT_SUCCESS;
}

/* status: to end with. */
static void leave(struct daemon *d, int status)
{
    pl_http_stop(d->http);
    pl_jobs_close(d->server.jobs); /* its tasks wake connections */
    if (!pl_registry_stop(d->server.models)) {
        pl_log_info("stopped in the middle of reading a model");
        if (d->server.world != NULL)
            d->server.world->ops->end_processes(d->server.world, status);
        _exit(status);
    }
    pl_http_free(d->http); /* after the engines, which may have woken connections until now */
    pl_registry_free(d->server.models);
    pl_metrics_free(d->server.metrics);
}

/* The life of a rank other than 0. */
static int follow(struct daemon *d)
{
    struct pl_err err = {0};
    char *path, *id;
    pl_status rc = pl_registry_choose(&d->config, &path, &id, &err);
    rc = pl_ranks_follow(d->server.world, &d->config, path, rc, &err);
    if (rc == PL_ERANK) {
        d->server.world->ops->end_processes(d->server.world, EXIT_LOST);
        _exit(EXIT_LOST);
    }
    free(path);
    free(id);
    return rc == PL_OK ? EXIT_SUCCESS : rc == PL_EINVAL ? EXIT_CONFIG : exit_status(rc, &err);
}

/* Alone, or as one rank of several. */
static int take_part(struct daemon *d)
{
    struct pl_err err = {0};
    const pl_status rc = pl_ranks_join(&d->server.world, &d->config, &err);
    if (rc != PL_OK)
        return complain(rc, &err);
    int status;
    if (d->server.world != NULL && d->server.world->rank > 0) {
        status = follow(d);
    } else {
        pl_config_log(&d->config);
        d->server.metrics = pl_metrics_new();
        d->server.lost = tell_lost;
        status = serve(d);
        leave(d, status);
        pl_log_info("stopped");
    }
    pl_ranks_leave(d->server.world);
    return status;
}

static pl_log_level log_level(const char *word)
{
    static const char *const words[] = {"error", "warn", "info", "debug"};
    for (size_t i = 0; i < PL_COUNT_OF(words); i++)
        if (strcmp(words[i], word) == 0)
            return (pl_log_level)i;
    return PL_LOG_INFO;
}

/* -1 = go on, else the exit status. */
static int configure(struct daemon *d, int argc, char **argv)
{
    struct pl_err err = {0};
    char *text = NULL;
    const pl_status rc = pl_config_load(&d->config, argc, argv, &text, &err);
    int status = -1;
    if (rc != PL_OK) {
        fputs(text != NULL ? text : err.msg, stderr);
        status = EXIT_CONFIG;
    } else if (text != NULL) {
        status = fputs(text, stdout) >= 0 && fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    free(text);
    if (status >= 0) {
        pl_config_fini(&d->config);
        return status;
    }
    pl_log_setup(log_level(d->config.log_level), strcmp(d->config.log_format, "json") == 0, STDERR_FILENO);
    d->server.config = &d->config;
    return -1;
}

int main(int argc, char **argv)
{
    static struct daemon d;
    d.server.start_ns = pl_now_ns();
    const struct rlimit no_core = {0, 0}; /* it would hold prompts and keys */
    setrlimit(RLIMIT_CORE, &no_core);
    int status = configure(&d, argc, argv);
    if (status >= 0)
        return status;
    set_signals(&d);
    status = take_part(&d);
    pl_config_fini(&d.config);
    return status;
}
