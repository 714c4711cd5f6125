/* worker: the process of a job.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/worker.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/train/train.h"

extern char **environ;

enum { LOCK_FD = 3, NOT_STARTED = 127 };

static int open_in(const char *folder, const char *name, int flags)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return open(path, flags | O_CLOEXEC, 0600);
}

/* The environment without the daemon's settings, among them its keys. */
static char **clean_environment(void)
{
    size_t n = 0;
    while (environ[n] != NULL)
        n++;
    char **clean = pl_xcalloc(n + 1, sizeof *clean);
    for (size_t i = 0, k = 0; i < n; i++)
        if (strncmp(environ[i], "PARLEY_", 7) != 0)
            clean[k++] = environ[i];
    return clean;
}

static void write_pid(int fd)
{
    char text[24];
    size_t at = sizeof text;
    for (long pid = getpid(); pid > 0; pid /= 10)
        text[--at] = (char)('0' + pid % 10);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, text + at, sizeof text - at, 0) < 0)
        _exit(PL_TRAIN_NO_SPACE); /* no worker without the number by which it is found */
}

static void last_to_go(void)
{
    const int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "500", 3) < 0)
        close(fd); /* the daemon's own adjustment stays: harmless */
}

/* In the child of a process with threads: only calls that are safe there. */
_Noreturn static void become_worker(const struct pl_worker_opts *o, char *const *argv, char *const *env, int lock, int log, int null)
{
    sigset_t none;
    const struct rlimit memory = {o->memory, o->memory}, core = {0, 0};
    setpgid(0, 0); /* a Ctrl-C at the daemon's terminal is the daemon's */
    write_pid(lock);
    if (dup2(null, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0 || (lock == LOCK_FD ? fcntl(lock, F_SETFD, 0) : dup2(lock, LOCK_FD)) < 0)
        _exit(NOT_STARTED);
    close_range(LOCK_FD + 1, ~0u, 0);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_IGN);
    setpriority(PRIO_PROCESS, 0, o->nice);
    setrlimit(RLIMIT_CORE, &core);
    if (o->memory > 0)
        setrlimit(RLIMIT_AS, &memory);
    if (o->cpus != NULL)
        sched_setaffinity(0, sizeof *o->cpus, o->cpus);
    last_to_go();
    execve(o->program, argv, env);
    const char *why = strerrordesc_np(errno);
    if (write(2, why, strlen(why)) < 0)
        _exit(NOT_STARTED);
    _exit(NOT_STARTED);
}

pl_status pl_worker_start(struct pl_worker *w, const struct pl_worker_opts *o, struct pl_err *err)
{
    char program[] = "parley", verb[] = "train", flag[] = "--job", on[] = "--device", library[] = "--cuda-library";
    char *folder = pl_xstrdup(o->folder), *device = pl_xstrdup(o->device), *file = pl_xstrdup(o->cuda_library);
    char *argv[9] = {program, verb, flag, folder};
    if (strcmp(device, "cpu") != 0) {
        argv[4] = on;
        argv[5] = device;
        argv[6] = file[0] != '\0' ? library : NULL;
        argv[7] = file[0] != '\0' ? file : NULL;
    }
    char **env = clean_environment();
    const int lock = open_in(o->folder, "worker.lock", O_RDWR | O_CREAT), log = open_in(o->folder, "worker.log", O_WRONLY | O_CREAT | O_APPEND);
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    pl_status st = PL_OK;
    *w = (struct pl_worker){.status = -1};
    if (lock < 0 || log < 0 || null < 0)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot open the worker's files in %s: %s", o->folder, strerror(errno));
    else if (access(o->program, X_OK) != 0)
        st = pl_fail(err, PL_EINVAL, "cannot run %s: %s (name the program with train-worker)", o->program, strerror(errno));
    else if (flock(lock, LOCK_EX | LOCK_NB) != 0)
        st = pl_fail(err, PL_EFULL, "a worker already runs in %s", o->folder);
    if (st == PL_OK && ftruncate(lock, 0) != 0)
        st = pl_fail(err, pl_status_of_errno(errno), "cannot write in %s: %s", o->folder, strerror(errno));
    if (st == PL_OK) {
        w->pid = fork();
        if (w->pid == 0)
            become_worker(o, argv, env, lock, log, null);
        w->child = true;
        if (w->pid < 0)
            st = pl_fail(err, pl_status_of_errno(errno), "cannot start a process: %s", strerror(errno));
    }
    if (lock >= 0)
        close(lock); /* the worker's copy keeps it locked */
    if (log >= 0)
        close(log);
    if (null >= 0)
        close(null);
    free(env);
    free(folder);
    free(device);
    free(file);
    return st;
}

pl_status pl_worker_find(struct pl_worker *w, const char *folder)
{
    char text[24] = "";
    const int fd = open_in(folder, "worker.lock", O_RDWR);
    *w = (struct pl_worker){.status = -1};
    if (fd < 0)
        return PL_ENOENT;
    const bool runs = flock(fd, LOCK_EX | LOCK_NB) != 0;
    if (runs && pread(fd, text, sizeof text - 1, 0) > 0)
        w->pid = (pid_t)atol(text);
    close(fd);
    return runs ? PL_OK : PL_ENOENT;
}

bool pl_worker_ended(struct pl_worker *w, const char *folder)
{
    struct pl_worker now;
    if (w->child) {
        const pid_t pid = waitpid(w->pid, &w->status, WNOHANG);
        if (pid == 0 || (pid < 0 && errno == EINTR))
            return false;
        if (pid != w->pid)
            w->status = -1;
        return true;
    }
    if (pl_worker_find(&now, folder) != PL_OK)
        return true;
    if (w->pid == 0)
        w->pid = now.pid; /* it had not yet written it */
    return false;
}

void pl_worker_time(struct pl_worker *w, uint64_t *ran_ns, uint64_t *waited_ns)
{
    char path[64];
    uint64_t ran = 0, waited = 0;
    snprintf(path, sizeof path, "/proc/%ld/task", (long)w->pid);
    DIR *tasks = w->pid > 0 ? opendir(path) : NULL;
    for (const struct dirent *e; tasks != NULL && (e = readdir(tasks)) != NULL;) {
        unsigned long long r, d;
        snprintf(path, sizeof path, "/proc/%ld/task/%.16s/schedstat", (long)w->pid, e->d_name);
        FILE *f = e->d_name[0] != '.' ? fopen(path, "re") : NULL;
        if (f != NULL && fscanf(f, "%llu %llu", &r, &d) == 2) {
            ran += r;
            waited += d;
        }
        if (f != NULL)
            fclose(f);
    }
    if (tasks != NULL)
        closedir(tasks);
    *ran_ns = ran > w->ran_ns ? ran - w->ran_ns : 0;
    *waited_ns = waited > w->waited_ns ? waited - w->waited_ns : 0;
    w->ran_ns = ran;
    w->waited_ns = waited;
}

void pl_worker_signal(struct pl_worker *w, int sig)
{
    if (w->pid <= 0)
        return;
    kill(w->pid, sig);
    if (sig == SIGKILL)
        w->killed = true;
    else if (w->term_ns == 0)
        w->term_ns = pl_now_ns();
}
