/* log: one line per event, as text (logfmt) or JSON, on standard error.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/log.h"

#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/buf.h"

static struct {
    pl_log_level level;
    bool json;
    int fd;
    atomic_uint_fast64_t dropped;
} sink = {.level = PL_LOG_INFO, .fd = 2};

static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static const char *const level_names[] = {"error", "warn", "info", "debug"};

void pl_log_setup(pl_log_level level, bool json, int fd)
{
    sink.level = level;
    sink.json = json;
    sink.fd = fd;
}

bool pl_log_enabled(pl_log_level level)
{
    return level <= sink.level;
}

uint64_t pl_log_dropped(void)
{
    return atomic_load_explicit(&sink.dropped, memory_order_relaxed);
}

/* What comes from outside (a model's name for itself, a path) begins no line of its own and moves no terminal's cursor. */
static void add_in_line(struct pl_buf *b, const char *s)
{
    for (; *s != '\0'; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f)
            pl_buf_addf(b, "\\x%02x", (unsigned char)*s);
        else
            pl_buf_addc(b, *s);
}

static void begin(struct pl_buf *b, pl_log_level level, const char *module, const char *msg)
{
    struct timespec now;
    struct tm tm;
    char stamp[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &tm);
    if (sink.json) {
        pl_buf_addf(b, "{\"ts\":\"%s.%03ldZ\",\"level\":\"%s\",\"module\":\"%s\",\"msg\":\"", stamp,
                    now.tv_nsec / 1000000, level_names[level], module);
        pl_buf_add_json_lossy(b, msg, strlen(msg)); /* it may be cut in the middle of a character */
        pl_buf_addc(b, '"');
    } else {
        pl_buf_addf(b, "%s.%03ldZ %-5s %s: ", stamp, now.tv_nsec / 1000000, level_names[level], module);
        add_in_line(b, msg);
    }
}

/* A pipe whose reader stands still would hold up whoever logs. One thread at a time: the room that is seen would be another's else. */
static bool takes_a_line(void)
{
    struct pollfd p = {.fd = sink.fd, .events = POLLOUT};
    return poll(&p, 1, 0) == 1 && (p.revents & POLLOUT) != 0;
}

static void end(struct pl_buf *b)
{
    pl_buf_adds(b, sink.json ? "}\n" : "\n");
    pthread_mutex_lock(&writing);
    const bool written = !b->failed && takes_a_line() && write(sink.fd, b->data, b->len) == (ssize_t)b->len;
    pthread_mutex_unlock(&writing);
    if (!written)
        atomic_fetch_add_explicit(&sink.dropped, 1, memory_order_relaxed);
    pl_buf_fini(b);
}

void pl_log_line(pl_log_level level, const char *module, const char *fmt, ...)
{
    if (!pl_log_enabled(level))
        return;
    char msg[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    struct pl_buf b;
    pl_buf_init(&b, 0);
    begin(&b, level, module, msg);
    end(&b);
}

static void add_text(struct pl_buf *b, const char *s)
{
    bool plain = *s != '\0';
    for (const char *p = s; *p != '\0' && plain; p++)
        plain = *p > ' ' && *p < 0x7f && *p != '"' && *p != '=' && *p != '\\';
    if (plain) {
        pl_buf_adds(b, s);
        return;
    }
    pl_buf_addc(b, '"');
    pl_buf_add_json_lossy(b, s, strlen(s));
    pl_buf_addc(b, '"');
}

void pl_log_event(pl_log_level level, const char *module, const char *msg, const struct pl_log_field *fields, size_t n)
{
    if (!pl_log_enabled(level))
        return;
    struct pl_buf b;
    pl_buf_init(&b, 0);
    begin(&b, level, module, msg);
    for (size_t i = 0; i < n; i++) {
        const struct pl_log_field *f = &fields[i];
        pl_buf_addf(&b, sink.json ? ",\"%s\":" : " %s=", f->key);
        if (f->kind == PL_LOG_INT) {
            pl_buf_addf(&b, "%lld", (long long)f->i);
        } else if (f->kind == PL_LOG_REAL) {
            pl_buf_addf(&b, "%.1f", f->r);
        } else if (sink.json) {
            pl_buf_addc(&b, '"');
            pl_buf_add_json_lossy(&b, f->s, strlen(f->s));
            pl_buf_addc(&b, '"');
        } else {
            add_text(&b, f->s);
        }
    }
    end(&b);
}
