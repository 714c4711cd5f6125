/* faults: a library for LD_PRELOAD that makes system calls fail when a test says so, and writes down what was flushed to the disk.
 *
 * FAULTS=FILE: a line "CALL ERRNO TEXT" makes each CALL (write, fsync, fork) fail with that number; write and fsync only for files whose path
 * has TEXT in it. "read N TEXT" makes reads take N milliseconds longer (or until the line is gone), "unlink N TEXT" removals. "write" stands for all calls
 * that write; the file may change at any time, and may be absent.
 * FAULTS_LOG=FILE: a line "fsync PATH" for each file or folder that was flushed.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static size_t slurp(const char *path, char *out, size_t max)
{
    const int fd = path != NULL ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t n = 0;
    if (fd >= 0) {
        n = syscall(SYS_read, fd, out, max - 1);
        syscall(SYS_close, fd);
    }
    out[n > 0 ? n : 0] = '\0';
    return n > 0 ? (size_t)n : 0;
}

static void path_of(int fd, char *out)
{
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = '\0';
}

/* The number of the first rule, 0 = none. path NULL = of fd, if that is one. */
static int fault(const char *call, int fd, const char *path)
{
    char rules[2048], own[PATH_MAX] = "", name[16], text[200];
    int number;
    if (slurp(getenv("FAULTS"), rules, sizeof rules) == 0)
        return 0;
    if (fd >= 0)
        path_of(fd, own);
    path = path != NULL ? path : own;
    for (char *line = rules; line != NULL && *line != '\0'; line = strchr(line, '\n') != NULL ? strchr(line, '\n') + 1 : NULL) {
        text[0] = '\0';
        if (sscanf(line, "%15s %d %199s", name, &number, text) >= 2 && strcmp(name, call) == 0 && strstr(path, text) != NULL)
            return number;
    }
    return 0;
}

static bool fails(const char *call, int fd)
{
    const int before = errno, number = fault(call, fd, NULL);
    errno = number != 0 ? number : before;
    return number != 0;
}

enum { DELAY_MS = 10 };

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* So long, or until the rule is no longer there. */
static void delay(const char *call, int fd, const char *path)
{
    const int before = errno;
    for (int ms = 0; ms < fault(call, fd, path); ms += DELAY_MS)
        usleep(DELAY_MS * 1000);
    errno = before;
}

ssize_t read(int fd, void *bytes, size_t n)
{
    delay("read", fd, NULL);
    return REAL(read)(fd, bytes, n);
}

/* What read becomes with _FORTIFY_SOURCE. */
ssize_t __read_chk(int fd, void *bytes, size_t n, size_t size);
ssize_t __read_chk(int fd, void *bytes, size_t n, size_t size)
{
    delay("read", fd, NULL);
    return REAL(__read_chk)(fd, bytes, n, size);
}

ssize_t write(int fd, const void *bytes, size_t n)
{
    return fails("write", fd) ? -1 : REAL(write)(fd, bytes, n);
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at)
{
    return fails("write", fd) ? -1 : REAL(pwrite)(fd, bytes, n, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at)
{
    return fails("write", fd) ? -1 : REAL(pwrite64)(fd, bytes, n, at);
}

static void note(int fd)
{
    char path[PATH_MAX], line[PATH_MAX + 8];
    const char *log = getenv("FAULTS_LOG");
    const int out = log != NULL ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (out < 0)
        return;
    path_of(fd, path);
    const int n = snprintf(line, sizeof line, "fsync %s\n", path);
    if (syscall(SYS_write, out, line, n) != n)
        abort();
    syscall(SYS_close, out);
}

int fsync(int fd)
{
    if (fails("fsync", fd))
        return -1;
    note(fd);
    return REAL(fsync)(fd);
}

int fdatasync(int fd)
{
    if (fails("fsync", fd))
        return -1;
    note(fd);
    return REAL(fdatasync)(fd);
}

int unlink(const char *path)
{
    delay("unlink", -1, path);
    return REAL(unlink)(path);
}

pid_t fork(void)
{
    return fails("fork", -1) ? -1 : REAL(fork)();
}
