/* listen: the listening socket, TCP or UNIX.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/listen.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"

static pl_status open_unix(struct pl_listen *l, const char *path, struct pl_err *err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path)
        return pl_fail_param(err, PL_EINVAL, "unix-socket", "the socket path is longer than %zu bytes: choose a shorter one",
                             sizeof a.sun_path - 1);
    strcpy(a.sun_path, path);
    struct stat st;
    if (lstat(path, &st) == 0) { /* left behind by a killed daemon, or in use */
        if (!S_ISSOCK(st.st_mode))
            return pl_fail_param(err, PL_EINVAL, "unix-socket", "%s exists and is no socket: choose another path", path);
        const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        const bool dead = probe >= 0 && connect(probe, (struct sockaddr *)&a, sizeof a) != 0 && errno == ECONNREFUSED;
        if (probe >= 0)
            close(probe);
        if (!dead)
            return pl_fail_param(err, PL_EINVAL, "unix-socket", "another server listens on %s: stop it or choose another path", path);
        unlink(path);
    }
    l->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    l->owned = l->fd >= 0;
    if (l->fd < 0 || bind(l->fd, (struct sockaddr *)&a, sizeof a) != 0)
        return pl_fail_param(err, PL_EINVAL, "unix-socket", "cannot make the socket %s: %s", path, strerror(errno));
    strcpy(l->unix_path, path);
    if (chmod(path, 0660) != 0 || listen(l->fd, SOMAXCONN) != 0)
        return pl_fail_param(err, PL_EINVAL, "unix-socket", "cannot listen on %s: %s", path, strerror(errno));
    snprintf(l->url, sizeof l->url, "unix:%s", path);
    l->loopback = true;
    return PL_OK;
}

static bool is_loopback(const struct sockaddr_storage *a)
{
    if (a->ss_family == AF_INET)
        return (ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24) == 127;
    return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)a)->sin6_addr);
}

static void describe(struct pl_listen *l, bool tls)
{
    struct sockaddr_storage a = {0};
    socklen_t n = sizeof a;
    char host[64] = "", port[8] = "";
    if (getsockname(l->fd, (struct sockaddr *)&a, &n) == 0)
        getnameinfo((struct sockaddr *)&a, n, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    const bool v6 = a.ss_family == AF_INET6;
    snprintf(l->url, sizeof l->url, "%s://%s%s%s:%s", tls ? "https" : "http", v6 ? "[" : "", host, v6 ? "]" : "", port);
    l->loopback = is_loopback(&a);
}

static pl_status open_tcp(struct pl_listen *l, const char *host, unsigned port, bool tls, struct pl_err *err)
{
    char service[8];
    snprintf(service, sizeof service, "%u", port % 65536);
    const struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    const int rc = getaddrinfo(host != NULL && *host != '\0' ? host : "127.0.0.1", service, &hints, &found);
    if (rc != 0)
        return pl_fail_param(err, PL_EINVAL, "host", "cannot use host \"%s\": %s; give an address of this machine, 0.0.0.0 or ::",
                             host, gai_strerror(rc));
    int why = 0;
    for (const struct addrinfo *a = found; a != NULL; a = a->ai_next) {
        const int on = 1;
        l->fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (l->fd < 0) {
            why = errno;
            continue;
        }
        setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(l->fd, a->ai_addr, a->ai_addrlen) == 0 && listen(l->fd, SOMAXCONN) == 0) {
            l->owned = true;
            break;
        }
        why = errno;
        close(l->fd);
        l->fd = -1;
    }
    freeaddrinfo(found);
    if (!l->owned && why == EADDRINUSE)
        return pl_fail_param(err, PL_EINVAL, "port", "port %u is taken by another program: choose another with --port, or 0 for any free one",
                             port);
    if (!l->owned && why == EACCES)
        return pl_fail_param(err, PL_EINVAL, "port", "port %u is not allowed for this user: choose one above 1023 with --port", port);
    if (!l->owned)
        return pl_fail_param(err, PL_EINVAL, "host", "cannot listen on %s port %u: %s", host, port, strerror(why));
    describe(l, tls);
    return PL_OK;
}

pl_status pl_listen_open(struct pl_listen *l, const char *host, unsigned port, const char *unix_path, bool tls, struct pl_err *err)
{
    *l = (struct pl_listen){.fd = -1};
    const pl_status rc = unix_path != NULL && *unix_path != '\0' ? open_unix(l, unix_path, err) : open_tcp(l, host, port, tls, err);
    if (rc != PL_OK)
        pl_listen_close(l);
    return rc;
}

void pl_listen_close(struct pl_listen *l)
{
    if (l->owned)
        close(l->fd);
    l->owned = false;
    if (l->unix_path[0] != '\0')
        unlink(l->unix_path);
    l->unix_path[0] = '\0';
}

pl_status pl_listen_read_file(const char *path, const char *key, bool secret, char **text, struct pl_err *err)
{
    enum { MAX = 1 << 20 };
    struct stat st;
    pl_status rc = PL_OK;
    char *s = NULL;
    ssize_t n = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) != 0) {
        rc = pl_fail_param(err, PL_EINVAL, key, "cannot read %s: %s", path, strerror(errno));
        goto out;
    }
    if (!S_ISREG(st.st_mode) || st.st_size <= 0 || st.st_size > MAX) {
        rc = pl_fail_param(err, PL_EINVAL, key, "%s is not a file of 1 byte to 1 MiB", path);
        goto out;
    }
    if (secret && (st.st_mode & S_IROTH) != 0) {
        rc = pl_fail_param(err, PL_EINVAL, key, "%s can be read by everybody: chmod o-r it, and think about a new key", path);
        goto out;
    }
    s = pl_xmalloc((size_t)st.st_size + 1);
    n = read(fd, s, (size_t)st.st_size);
    if (n != st.st_size) {
        rc = pl_fail_param(err, PL_EINVAL, key, "cannot read all of %s", path);
        goto out;
    }
    s[n] = '\0';
    *text = s;
    s = NULL;
out:
    free(s);
    if (fd >= 0)
        close(fd);
    return rc;
}
