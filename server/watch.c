/* watch: sees what microhttpd does not.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/watch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"

#define PL_LOG_MODULE "watch"

enum { TICK_MS = 500, N_EVENTS = 64, N_LINGER = 64, LINGER_MS = 2000, BODY_BYTES_PER_S = 1000 };

struct lingering {
    int fd;
    uint64_t until_ns;
};

struct notice {
    void *conn;
    pl_watch_event event;
};

struct pl_watch {
    struct pl_watch_opts opts;
    int epoll;
    int poke; /* an eventfd that ends the watcher's sleep */
    pthread_t thread;
    atomic_bool stop;

    pthread_mutex_t lock; /* all below; of other locks only an item's is taken while it is held */
    struct pl_watch_item *first;
    struct pl_watch_item **by_fd;
    size_t cap_fd;
    unsigned n_items;
    struct lingering lingers[N_LINGER];
    unsigned n_lingers;
    struct notice *notices; /* the watcher's, filled under the lock, delivered without it */
    size_t n_notices, cap_notices;
    bool missed; /* there was no memory for one: every peer is looked at again */
};

static void note(struct pl_watch *w, void *conn, pl_watch_event event)
{
    if (w->n_notices == w->cap_notices) {
        const size_t cap = w->cap_notices ? 2 * w->cap_notices : 64;
        struct notice *more = realloc(w->notices, cap * sizeof *more);
        w->missed |= more == NULL;
        if (more == NULL)
            return;
        w->notices = more;
        w->cap_notices = cap;
    }
    w->notices[w->n_notices++] = (struct notice){conn, event};
}

/* What the socket itself says now; an event may be older than the connection that has the descriptor. */
static short hangups(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 ? p.revents : 0;
}

/* The peer has sent its last, and all of that has been read. */
static bool is_drained(int fd)
{
    int unread = 0;
    return hangups(fd) != 0 && ioctl(fd, FIONREAD, &unread) == 0 && unread == 0;
}

bool pl_watch_peer_gone(const struct pl_watch_item *item, bool streaming)
{
    return (hangups(item->fd) & (POLLHUP | POLLERR | (streaming ? 0 : POLLRDHUP))) != 0;
}

static void send_raw(struct pl_watch_item *item, int status, const char *reason, const char *json)
{
    if (!item->plain)
        return;
    char text[1024];
    const int n = snprintf(text, sizeof text,
                           "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                           "%sConnection: close\r\n\r\n%s",
                           status, reason, strlen(json), status == 503 ? "Retry-After: 1\r\n" : "", json);
    if (n > 0 && (size_t)n < sizeof text && send(item->fd, text, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) != n)
        pl_log_debug("answer %d did not fit the socket", status);
}

static void cut(struct pl_watch_item *item, int how)
{
    item->cut = true;
    shutdown(item->fd, how);
}

/* Called with both locks held. */
static void look_at_peer(struct pl_watch *w, struct pl_watch_item *item)
{
    if (item->conn == NULL || item->cut)
        return;
    const short ev = hangups(item->fd);
    if (item->state == PL_WATCH_WORK && (ev & (POLLRDHUP | POLLHUP | POLLERR)) != 0) {
        note(w, item->conn, PL_WATCH_GONE);
    } else if (item->state == PL_WATCH_STREAM && (ev & (POLLHUP | POLLERR)) != 0) {
        note(w, item->conn, PL_WATCH_GONE);
    } else if (item->state == PL_WATCH_STREAM && (ev & POLLRDHUP) != 0 && !item->probed) {
        item->probed = true; /* closed or only half closed? The kernel of a closed one answers a write with a reset. */
        note(w, item->conn, PL_WATCH_PROBE);
    }
}

/* Called with both locks held. */
static void check_deadlines(struct pl_watch *w, struct pl_watch_item *item, uint64_t now)
{
    static const char late[] = "{\"error\":{\"message\":\"The request did not arrive in time.\",\"type\":"
                               "\"invalid_request_error\",\"param\":null,\"code\":\"request_timeout\"}}";
    if (item->cut || now < item->since_ns)
        return;
    const uint64_t spent = now - item->since_ns;
    const uint64_t head_ns = w->opts.header_timeout_s * UINT64_C(1000000000);
    switch (item->state) {
    case PL_WATCH_NEW: /* nothing was asked, so nothing is answered */
        if (spent > head_ns)
            cut(item, SHUT_RDWR);
        break;
    case PL_WATCH_HEAD:
        if (spent > head_ns) {
            send_raw(item, 408, "Request Timeout", late);
            cut(item, SHUT_RDWR);
        }
        break;
    case PL_WATCH_BODY:
        if (item->received == item->before && is_drained(item->fd))
            cut(item, SHUT_RDWR); /* the rest of the body will never come */
        item->before = item->received;
        if (!item->cut && spent > head_ns && item->received < (spent - head_ns) / 1000000000 * BODY_BYTES_PER_S + 1) {
            send_raw(item, 408, "Request Timeout", late);
            cut(item, SHUT_RDWR);
        }
        break;
    case PL_WATCH_IDLE: /* microhttpd's timeout sees idle peers; this one sees those that dribble a request line */
        if (spent > w->opts.idle_timeout_s * UINT64_C(1000000000))
            cut(item, SHUT_RDWR);
        break;
    case PL_WATCH_WORK:
    case PL_WATCH_STREAM:
        if (item->conn != NULL && spent > w->opts.heartbeat_s * UINT64_C(1000000000)) {
            item->since_ns = now;
            note(w, item->conn, PL_WATCH_PROBE);
        }
        break;
    case PL_WATCH_SEND:
        break;
    }
}

/* Empties lingering sockets; called with the lock held. */
static void linger_on(struct pl_watch *w, uint64_t now)
{
    char waste[16384];
    for (unsigned i = 0; i < w->n_lingers;) {
        ssize_t n = 1;
        for (int turns = 0; turns < 64 && n > 0; turns++)
            n = recv(w->lingers[i].fd, waste, sizeof waste, MSG_DONTWAIT);
        const bool more = n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
        if (more && now < w->lingers[i].until_ns) {
            i++;
            continue;
        }
        close(w->lingers[i].fd);
        w->lingers[i] = w->lingers[--w->n_lingers];
    }
}

static void poke(struct pl_watch *w)
{
    const uint64_t one = 1;
    if (write(w->poke, &one, sizeof one) != sizeof one)
        pl_log_debug("the watcher sleeps on until its next tick");
}

static void *watch_main(void *arg)
{
    struct pl_watch *w = arg;
    struct epoll_event events[N_EVENTS];
    uint64_t next_tick = 0;
    while (!atomic_load(&w->stop)) {
        pthread_mutex_lock(&w->lock);
        const int timeout = w->n_lingers > 0 ? 10 : TICK_MS;
        pthread_mutex_unlock(&w->lock);
        const int n = epoll_wait(w->epoll, events, N_EVENTS, timeout);
        pthread_mutex_lock(&w->lock);
        /* Whoever left meanwhile took its descriptor out of the set, but its event may be in our hands already: what
         * counts is who has the descriptor now, and what its socket says now. */
        for (int i = 0; i < n; i++) {
            struct pl_watch_item *it = (size_t)events[i].data.fd < w->cap_fd ? w->by_fd[events[i].data.fd] : NULL;
            if (it == NULL)
                continue;
            pthread_mutex_lock(&it->lock);
            look_at_peer(w, it);
            pthread_mutex_unlock(&it->lock);
        }
        uint64_t pokes;
        if (read(w->poke, &pokes, sizeof pokes) < 0)
            pokes = 0; /* none: it does not block */
        const uint64_t now = pl_now_ns();
        linger_on(w, now);
        if (now >= next_tick) {
            next_tick = now + TICK_MS * UINT64_C(1000000);
            const bool missed = w->missed;
            w->missed = false;
            for (struct pl_watch_item *it = w->first; it != NULL; it = it->next) {
                pthread_mutex_lock(&it->lock);
                if (missed)
                    look_at_peer(w, it);
                check_deadlines(w, it, now);
                pthread_mutex_unlock(&it->lock);
            }
        }
        pthread_mutex_unlock(&w->lock);
        for (size_t i = 0; i < w->n_notices; i++)
            w->opts.event(w->notices[i].conn, w->notices[i].event);
        w->n_notices = 0;
    }
    return NULL;
}

pl_status pl_watch_start(struct pl_watch **out, const struct pl_watch_opts *opts, struct pl_err *err)
{
    struct pl_watch *w = pl_xcalloc(1, sizeof *w);
    w->opts = *opts;
    pthread_mutex_init(&w->lock, NULL);
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    w->poke = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = w->poke};
    int rc = w->epoll < 0 || w->poke < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->poke, &ev) != 0 ? errno : 0;
    if (rc == 0)
        rc = pthread_create(&w->thread, NULL, watch_main, w);
    if (rc != 0) {
        if (w->epoll >= 0)
            close(w->epoll);
        if (w->poke >= 0)
            close(w->poke);
        pthread_mutex_destroy(&w->lock);
        free(w);
        return pl_fail(err, PL_EIO, "cannot watch connections: %s", strerror(rc));
    }
    pthread_setname_np(w->thread, "pl-watch");
    *out = w;
    return PL_OK;
}

void pl_watch_stop(struct pl_watch *w)
{
    if (w == NULL)
        return;
    atomic_store(&w->stop, true);
    poke(w);
    pthread_join(w->thread, NULL);
    for (unsigned i = 0; i < w->n_lingers; i++)
        close(w->lingers[i].fd);
    close(w->epoll);
    close(w->poke);
    pthread_mutex_destroy(&w->lock);
    free(w->notices);
    free(w->by_fd);
    free(w);
}

/* Called with the lock held. */
static bool reserve_fd(struct pl_watch *w, size_t fd)
{
    if (fd < w->cap_fd)
        return true;
    const size_t cap = (fd + 1) * 2;
    struct pl_watch_item **more = realloc(w->by_fd, cap * sizeof *more);
    if (more == NULL)
        return false;
    memset(more + w->cap_fd, 0, (cap - w->cap_fd) * sizeof *more);
    w->by_fd = more;
    w->cap_fd = cap;
    return true;
}

unsigned pl_watch_add(struct pl_watch *w, struct pl_watch_item *item)
{
    struct epoll_event ev = {.events = EPOLLRDHUP | EPOLLET, .data.fd = item->fd};
    item->since_ns = pl_now_ns();
    pthread_mutex_init(&item->lock, NULL);
    pthread_mutex_lock(&w->lock);
    item->next = w->first;
    if (w->first != NULL)
        w->first->prev = item;
    w->first = item;
    item->listed = true;
    const bool seen = reserve_fd(w, (size_t)item->fd);
    if (seen)
        w->by_fd[item->fd] = item;
    const unsigned n = ++w->n_items;
    pthread_mutex_unlock(&w->lock);
    if (!seen || epoll_ctl(w->epoll, EPOLL_CTL_ADD, item->fd, &ev) != 0)
        pl_log_warn("hang-ups of a connection will go unseen: %s", strerror(seen ? errno : ENOMEM));
    return n;
}

void pl_watch_remove(struct pl_watch *w, struct pl_watch_item *item)
{
    epoll_ctl(w->epoll, EPOLL_CTL_DEL, item->fd, NULL);
    pthread_mutex_lock(&w->lock);
    if (item->listed) {
        *(item->prev != NULL ? &item->prev->next : &w->first) = item->next;
        if (item->next != NULL)
            item->next->prev = item->prev;
        item->listed = false;
        if ((size_t)item->fd < w->cap_fd)
            w->by_fd[item->fd] = NULL;
        w->n_items--;
    }
    pthread_mutex_unlock(&w->lock);
    pthread_mutex_destroy(&item->lock);
}

unsigned pl_watch_count(struct pl_watch *w)
{
    pthread_mutex_lock(&w->lock);
    const unsigned n = w->n_items;
    pthread_mutex_unlock(&w->lock);
    return n;
}

bool pl_watch_enter(struct pl_watch_item *item, pl_watch_state state, void *conn)
{
    pthread_mutex_lock(&item->lock);
    item->state = state;
    item->since_ns = pl_now_ns();
    item->received = item->before = 0;
    item->conn = conn;
    item->probed = item->probed && conn != NULL;
    const bool alive = !item->cut;
    pthread_mutex_unlock(&item->lock);
    return alive;
}

bool pl_watch_progress(struct pl_watch_item *item, size_t n)
{
    pthread_mutex_lock(&item->lock);
    item->received += n;
    if (item->state == PL_WATCH_STREAM)
        item->since_ns = pl_now_ns();
    const bool alive = !item->cut;
    pthread_mutex_unlock(&item->lock);
    return alive;
}

void pl_watch_answer_raw(struct pl_watch_item *item, int status, const char *reason, const char *json)
{
    pthread_mutex_lock(&item->lock);
    if (!item->cut) {
        send_raw(item, status, reason, json);
        cut(item, SHUT_WR);
    }
    pthread_mutex_unlock(&item->lock);
}

void pl_watch_linger(struct pl_watch *w, const struct pl_watch_item *item)
{
    const int fd = fcntl(item->fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return; /* no descriptor to spare: the peer may see a reset */
    pthread_mutex_lock(&w->lock);
    const bool room = w->n_lingers < N_LINGER;
    if (room)
        w->lingers[w->n_lingers++] = (struct lingering){fd, pl_now_ns() + LINGER_MS * UINT64_C(1000000)};
    pthread_mutex_unlock(&w->lock);
    if (room)
        poke(w);
    else
        close(fd);
}
