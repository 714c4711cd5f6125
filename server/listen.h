/* listen: the listening socket, TCP or UNIX, made before microhttpd so that every mistake has its own message.
 * Thread: main.  Owns: the descriptor until it is handed over (owned = false), the UNIX socket's file until close.
 * Fails: PL_EINVAL (address not usable, port taken, socket file in use, file unreadable or readable by everybody).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_LISTEN_H
#define PL_SERVER_LISTEN_H

#include <stdbool.h>
#include <sys/un.h>

#include "core/base/status.h"

struct pl_listen {
    int fd;
    bool owned;
    bool loopback; /* or a UNIX socket */
    char url[160];
    char unix_path[sizeof((struct sockaddr_un *)0)->sun_path];
};

/* unix_path: NULL or "" = host and port. tls: for the URL only. */
pl_status pl_listen_open(struct pl_listen *l, const char *host, unsigned port, const char *unix_path, bool tls,
                         struct pl_err *err) PL_MUST_CHECK;
void pl_listen_close(struct pl_listen *l);

/* A PEM file's text; free(). secret: refused when others than owner and group may read it. */
pl_status pl_listen_read_file(const char *path, const char *key, bool secret, char **text, struct pl_err *err) PL_MUST_CHECK;

#endif
