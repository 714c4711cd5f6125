/* tasks: long work of requests on a thread of its own.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/jobs/tasks.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "server/apierr.h"

enum { NICE = 10 };

/* A task, and the producer of the request that waits for it. Two hold it: the queue (until it ran) and the request. */
struct entry {
    struct pl_producer producer; /* first: http gives it back */
    struct entry *next;
    struct pl_task task;
    const char *name; /* NULL = none */
    struct pl_http_conn *conn; /* NULL = nobody waits */
    struct pl_http_usage *usage; /* of who waits; borrowed */
    struct pl_http_resp resp;
    atomic_int refs;
    atomic_bool done;
};

struct pl_tasks {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct entry *first, **last;
    unsigned n;
    const struct entry *running; /* under lock */
    atomic_bool stopping;        /* all of them */
    atomic_bool interrupted;     /* the running one, by that or by name; set under lock */
};

static void unref(struct entry *e)
{
    if (atomic_fetch_sub(&e->refs, 1) != 1)
        return;
    pl_buf_fini(&e->resp.body);
    free(e);
}

static pl_produced produce(struct pl_producer *self, struct pl_buf *out)
{
    struct entry *e = (struct entry *)self;
    if (!atomic_load_explicit(&e->done, memory_order_acquire))
        return PL_PRODUCE_WAIT;
    self->status = e->resp.status;
    self->retry_after = e->resp.retry_after;
    self->final = e->resp.final;
    pl_apierr_note(e->usage, &e->resp);
    pl_buf_add(out, e->resp.body.data, e->resp.body.len);
    out->failed |= e->resp.body.failed;
    return PL_PRODUCE_END;
}

static void free_producer(struct pl_producer *self)
{
    unref((struct entry *)self);
}

static void finish(struct entry *e)
{
    if (e->task.drop != NULL)
        e->task.drop(e->task.arg);
    atomic_store_explicit(&e->done, true, memory_order_release);
    if (e->conn != NULL)
        pl_http_wake(e->conn);
    unref(e);
}

static void refuse(struct entry *e, pl_status code, const char *why)
{
    struct pl_err err = {0};
    (void)pl_fail(&err, code, "%s", why);
    const struct pl_apierr a = pl_apierr_of(code);
    e->resp.status = a.http;
    e->resp.retry_after = a.retry_after;
    pl_apierr_fill(&e->resp, &err, a.code, NULL);
    finish(e);
}

static void *work(void *arg)
{
    struct pl_tasks *t = arg;
    setpriority(PRIO_PROCESS, (id_t)gettid(), NICE); /* of this thread */
    for (;;) {
        pthread_mutex_lock(&t->lock);
        while (t->first == NULL && !atomic_load(&t->stopping))
            pthread_cond_wait(&t->wake, &t->lock);
        struct entry *e = t->first;
        if (e != NULL && (t->first = e->next) == NULL)
            t->last = &t->first;
        t->n -= e != NULL;
        const bool stopping = atomic_load(&t->stopping);
        t->running = stopping ? NULL : e;
        atomic_store(&t->interrupted, stopping);
        pthread_mutex_unlock(&t->lock);
        if (e == NULL)
            return NULL;
        if (stopping) {
            refuse(e, PL_ESTOPPED, "The server is shutting down.");
            continue;
        }
        e->task.run(e->task.arg, e->conn != NULL ? &e->resp : NULL);
        pthread_mutex_lock(&t->lock);
        t->running = NULL;
        pthread_mutex_unlock(&t->lock);
        finish(e);
    }
}

pl_status pl_tasks_start(struct pl_tasks **out, struct pl_err *err)
{
    struct pl_tasks *t = pl_xcalloc(1, sizeof *t);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->last = &t->first;
    sigset_t all, before; /* whatever the caller does with signals, this thread takes none */
    sigfillset(&all);
    sigdelset(&all, SIGBUS); /* core/base/mapped.h */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int why = pthread_create(&t->thread, NULL, work, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (why != 0) {
        free(t);
        return pl_fail(err, PL_EIO, "cannot start a thread: %s", strerror(why));
    }
    *out = t;
    return PL_OK;
}

const atomic_bool *pl_tasks_stopping(const struct pl_tasks *t)
{
    return &t->interrupted;
}

void pl_tasks_interrupt(struct pl_tasks *t, const char *name)
{
    pthread_mutex_lock(&t->lock);
    if (t->running != NULL && t->running->name != NULL && strcmp(t->running->name, name) == 0)
        atomic_store(&t->interrupted, true);
    pthread_mutex_unlock(&t->lock);
}

void pl_tasks_stop(struct pl_tasks *t)
{
    if (t == NULL)
        return;
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->stopping, true);
    atomic_store(&t->interrupted, true);
    pthread_cond_signal(&t->wake);
    pthread_mutex_unlock(&t->lock);
    pthread_join(t->thread, NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

/* NULL when memory is out: the task is dropped then. */
static struct entry *new_entry(const struct pl_task *task, struct pl_http_conn *conn)
{
    struct entry *e = calloc(1, sizeof *e);
    if (e == NULL) {
        if (task->drop != NULL)
            task->drop(task->arg);
        return NULL;
    }
    e->producer = (struct pl_producer){.produce = produce, .free = free_producer};
    e->task = *task;
    e->conn = conn;
    e->resp = (struct pl_http_resp){.status = 200, .fd = -1};
    pl_buf_init(&e->resp.body, 0);
    atomic_init(&e->refs, conn != NULL ? 2 : 1);
    return e;
}

static pl_status push(struct pl_tasks *t, struct entry *e)
{
    pthread_mutex_lock(&t->lock);
    const pl_status st = atomic_load(&t->stopping) ? PL_ESTOPPED : t->n >= PL_TASKS_WAITING ? PL_EFULL : PL_OK;
    if (st == PL_OK) {
        *t->last = e;
        t->last = &e->next;
        t->n++;
        pthread_cond_signal(&t->wake);
    }
    pthread_mutex_unlock(&t->lock);
    return st;
}

void pl_tasks_answer(struct pl_tasks *t, const struct pl_task *task, struct pl_http_req *req, struct pl_http_resp *resp)
{
    struct entry *e = new_entry(task, req->conn);
    struct pl_err err = {0};
    if (e == NULL) {
        err.code = pl_fail(&err, PL_ENOMEM, "out of memory");
        pl_apierr_answer(req, resp, &err);
        return;
    }
    e->usage = req->usage;
    resp->producer = &e->producer;
    const pl_status st = push(t, e);
    if (st != PL_OK)
        refuse(e, st, st == PL_EFULL ? "Too many files are being checked; try again." : "The server is shutting down.");
}

pl_status pl_tasks_add(struct pl_tasks *t, const struct pl_task *task, const char *name, struct pl_err *err)
{
    struct entry *e = new_entry(task, NULL);
    if (e == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    e->name = name;
    const pl_status st = push(t, e);
    if (st == PL_OK)
        return PL_OK;
    if (task->drop != NULL)
        task->drop(task->arg);
    unref(e);
    return pl_fail(err, st, "%s", st == PL_EFULL ? "too many files are being checked" : "shutting down");
}
