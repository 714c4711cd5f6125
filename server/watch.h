/* watch: sees what microhttpd does not. While a connection is parked (suspended) microhttpd notices neither a hang-up nor
 * its own timeout, and its timeout otherwise counts from the last byte, so that a head dribbled byte by byte lives forever.
 * It may also miss a hang-up in the middle of a body.
 * One thread watches all connections: it reports peers that hung up, ends heads and bodies that take too long (408), asks
 * waiting streams for a sign of life, and reads on for a moment on sockets that were closed before the request was read.
 * Thread: every function from any thread; the callback comes from the watcher's, with no lock held.
 * Owns: its thread and copies of lingering sockets; items are the caller's and leave by pl_watch_remove.
 * Fails: start PL_EIO.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_WATCH_H
#define PL_SERVER_WATCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct pl_watch;

typedef enum {
    PL_WATCH_NEW,    /* connected, no request line yet: within header_timeout */
    PL_WATCH_HEAD,   /* a request line has come: the head within header_timeout */
    PL_WATCH_BODY,   /* the head has come: the body at 1 kB/s or more after header_timeout */
    PL_WATCH_WORK,   /* the handler has it; nothing has been answered */
    PL_WATCH_STREAM, /* a stream is being answered */
    PL_WATCH_SEND,   /* a whole answer is being sent */
    PL_WATCH_IDLE,   /* between requests: microhttpd's own timeout */
} pl_watch_state;

typedef enum {
    PL_WATCH_GONE,  /* the peer hung up: give the request up */
    PL_WATCH_PROBE, /* a stream's peer shut its side down, or nothing was sent for a while: send a comment */
} pl_watch_event;

struct pl_watch_item {
    struct pl_watch_item *prev, *next;
    int fd;
    bool plain;  /* no TLS: an answer can be written from outside */
    bool listed;
    pthread_mutex_t lock; /* all below; the watcher's own comes before it */
    bool cut;    /* ended by the watcher; nothing more may be answered */
    bool probed; /* one probe per shut-down peer */
    pl_watch_state state;
    uint64_t since_ns; /* when the state began, or a stream last sent something */
    size_t received, before; /* of the body; at the last tick */
    void *conn;        /* for the callback; NULL = no request */
};

struct pl_watch_opts {
    unsigned header_timeout_s, idle_timeout_s, heartbeat_s;
    void (*event)(void *conn, pl_watch_event ev);
};

pl_status pl_watch_start(struct pl_watch **out, const struct pl_watch_opts *opts, struct pl_err *err) PL_MUST_CHECK;
void pl_watch_stop(struct pl_watch *w);

/* item->fd and ->plain are set by the caller, the rest starts as zero. Returns how many items there are now. */
unsigned pl_watch_add(struct pl_watch *w, struct pl_watch_item *item);
void pl_watch_remove(struct pl_watch *w, struct pl_watch_item *item);
unsigned pl_watch_count(struct pl_watch *w);

/* False when the watcher has ended the connection: answer nothing. */
bool pl_watch_enter(struct pl_watch_item *item, pl_watch_state state, void *conn) PL_MUST_CHECK;
/* n more bytes of the body came, or (STREAM) were sent. False as above. */
bool pl_watch_progress(struct pl_watch_item *item, size_t n) PL_MUST_CHECK;
/* What the socket says now. Before anything is answered a peer that shut its side down counts as gone; a stream goes on
 * for it until the connection itself is broken. Asked once before a request's first wait, because an event may have
 * come before anybody cared, and after each PL_WATCH_GONE. */
bool pl_watch_peer_gone(const struct pl_watch_item *item, bool streaming);

/* Writes a whole answer past microhttpd and shuts the connection down (for the moments when microhttpd cannot answer). */
void pl_watch_answer_raw(struct pl_watch_item *item, int status, const char *reason, const char *json);
/* The caller is about to close item's socket with unread input in it: closing at once would make the kernel reset the
 * connection and the peer lose the answer. Reads on for up to two seconds. */
void pl_watch_linger(struct pl_watch *w, const struct pl_watch_item *item);

#endif
