/* plugin: links between the processes that mpirun (or srun) has started; built as libparley_mpi.so.
 * Ranks on this machine are also watched as processes, since MPI does not tell that one has ended.
 * SPDX-License-Identifier: Apache-2.0 */
#include <mpi.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/comm/link.h"

enum { TAG = 7, TAG_GAVE_UP = 8, FINALIZE_S = 20, ABORT_S = 5 };

struct mpi_link {
    struct pl_link base;
    MPI_Comm comm;
    MPI_Request send[PL_LINK_RANKS], recv[PL_LINK_RANKS];
    int pidfd[PL_LINK_RANKS]; /* -1 = on another machine, or cannot be watched */
    bool broken[PL_LINK_RANKS]; /* MPI itself reports a failure */
    pthread_mutex_t lock;       /* around every call of MPI, since give_up and end_processes may come from any thread */
    bool gave_up;
};

/* Who a process is: the same machine and process namespace have the same boot and space. */
struct identity {
    char boot[40];
    uint64_t space;
    int64_t pid;
};

static struct mpi_link *link_of(struct pl_link *l)
{
    return (struct mpi_link *)l;
}

static void send_bytes(struct pl_link *l, unsigned to, const void *bytes, size_t n)
{
    struct mpi_link *m = link_of(l);
    pthread_mutex_lock(&m->lock);
    m->broken[to] |= MPI_Isend(bytes, (int)n, MPI_BYTE, (int)to, TAG, m->comm, &m->send[to]) != MPI_SUCCESS;
    pthread_mutex_unlock(&m->lock);
}

static void recv_bytes(struct pl_link *l, unsigned from, void *bytes, size_t n)
{
    struct mpi_link *m = link_of(l);
    pthread_mutex_lock(&m->lock);
    m->broken[from] |= MPI_Irecv(bytes, (int)n, MPI_BYTE, (int)from, TAG, m->comm, &m->recv[from]) != MPI_SUCCESS;
    pthread_mutex_unlock(&m->lock);
}

static bool done(struct pl_link *l, unsigned peer)
{
    struct mpi_link *m = link_of(l);
    int sent = 0, received = 0;
    if (m->broken[peer])
        return false;
    pthread_mutex_lock(&m->lock);
    m->broken[peer] |= MPI_Test(&m->recv[peer], &received, MPI_STATUS_IGNORE) != MPI_SUCCESS;
    m->broken[peer] |= MPI_Test(&m->send[peer], &sent, MPI_STATUS_IGNORE) != MPI_SUCCESS;
    pthread_mutex_unlock(&m->lock);
    return sent && received && !m->broken[peer];
}

static void rest(struct pl_link *l, unsigned us)
{
    (void)l;
    const struct timespec t = {.tv_nsec = us * 1000L};
    nanosleep(&t, NULL);
}

static bool gone(struct pl_link *l, unsigned peer)
{
    struct mpi_link *m = link_of(l);
    struct pollfd p = {.fd = m->pidfd[peer], .events = POLLIN};
    int gave_up = 0;
    if (m->broken[peer] || (p.fd >= 0 && poll(&p, 1, 0) > 0))
        return true;
    pthread_mutex_lock(&m->lock);
    m->broken[peer] |= MPI_Iprobe((int)peer, TAG_GAVE_UP, m->comm, &gave_up, MPI_STATUS_IGNORE) != MPI_SUCCESS;
    pthread_mutex_unlock(&m->lock);
    return m->broken[peer] || gave_up;
}

/* Nobody waits for what is sent here: the process is about to end. */
static void give_up(struct pl_link *l)
{
    static const char word;
    struct mpi_link *m = link_of(l);
    MPI_Request request;
    pthread_mutex_lock(&m->lock);
    for (unsigned r = 0; r < l->size && !m->gave_up; r++)
        if (r != l->rank && MPI_Isend(&word, 1, MPI_BYTE, (int)r, TAG_GAVE_UP, m->comm, &request) == MPI_SUCCESS)
            MPI_Request_free(&request);
    m->gave_up = true;
    pthread_mutex_unlock(&m->lock);
}

static void end_processes(struct pl_link *l, int status)
{
    struct mpi_link *m = link_of(l);
    alarm(ABORT_S); /* should the launcher not answer */
    pthread_mutex_lock(&m->lock);
    MPI_Abort(m->comm, status);
    pthread_mutex_unlock(&m->lock);
}

static void close_link(struct pl_link *l, bool failed)
{
    struct mpi_link *m = link_of(l);
    if (!failed) {
        alarm(FINALIZE_S); /* the others are to come here too */
        MPI_Finalize();
        alarm(0);
    }
    for (unsigned r = 0; r < l->size; r++)
        if (m->pidfd[r] >= 0)
            close(m->pidfd[r]);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

static const struct pl_link_ops mpi_ops = {
    .send = send_bytes,
    .recv = recv_bytes,
    .done = done,
    .rest = rest,
    .gone = gone,
    .give_up = give_up,
    .end_processes = end_processes,
    .close = close_link,
};

static struct identity identify(void)
{
    struct identity me = {.pid = getpid()};
    struct stat st;
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f != NULL && fgets(me.boot, sizeof me.boot, f) == NULL)
        me.boot[0] = '\0';
    if (f != NULL)
        fclose(f);
    me.space = stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
    return me;
}

static void find_neighbours(struct mpi_link *m)
{
    static struct identity all[PL_LINK_RANKS];
    struct identity me = identify();
    MPI_Allgather(&me, sizeof me, MPI_BYTE, all, sizeof me, MPI_BYTE, m->comm);
    for (unsigned r = 0; r < m->base.size; r++) {
        const bool near = me.boot[0] != '\0' && memcmp(me.boot, all[r].boot, sizeof me.boot) == 0;
        m->base.local_rank += near && r < m->base.rank;
        m->base.local_size += near;
        m->pidfd[r] = near && me.space != 0 && me.space == all[r].space && r != m->base.rank ? (int)syscall(SYS_pidfd_open, (pid_t)all[r].pid, 0) : -1;
    }
    if (m->base.local_size == 0)
        m->base.local_size = 1;
}

__attribute__((visibility("default"))) int pl_link_mpi_open(struct pl_link **out, int version, char *why, size_t n_why);
int pl_link_mpi_open(struct pl_link **out, int version, char *why, size_t n_why)
{
    int level = 0, rank = 0, size = 0;
    if (version != PL_LINK_VERSION) {
        snprintf(why, n_why, "it was built for another version: build and install both together");
        return -1;
    }
    struct mpi_link *m = calloc(1, sizeof *m);
    if (m == NULL || MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level) != MPI_SUCCESS || level < MPI_THREAD_SERIALIZED) {
        snprintf(why, n_why, "MPI does not start, or not for programs with threads");
        free(m);
        return -1;
    }
    MPI_Comm_dup(MPI_COMM_WORLD, &m->comm);
    MPI_Comm_set_errhandler(m->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(m->comm, &rank);
    MPI_Comm_size(m->comm, &size);
    if (size > PL_LINK_RANKS) {
        snprintf(why, n_why, "%d processes were started; at most %d can be ranks", size, PL_LINK_RANKS);
        MPI_Finalize();
        free(m);
        return -1;
    }
    pthread_mutex_init(&m->lock, NULL);
    m->base = (struct pl_link){.ops = &mpi_ops, .name = "mpi", .rank = (unsigned)rank, .size = (unsigned)size};
    for (unsigned r = 0; r < PL_LINK_RANKS; r++) {
        m->send[r] = m->recv[r] = MPI_REQUEST_NULL;
        m->pidfd[r] = -1;
    }
    find_neighbours(m);
    signal(SIGALRM, SIG_DFL);
    *out = &m->base;
    return 0;
}
