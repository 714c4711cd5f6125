/* reply: the bounded ring of events through which the engine answers one request.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/reply.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/buf.h"
#include "core/base/clock.h"
#include "core/sched/reply_int.h"

struct slot {
    struct pl_event ev; /* text is set on the way out */
    struct pl_buf text;
};

struct pl_reply {
    atomic_uint refs;
    atomic_bool cancelled;
    pthread_mutex_t lock; /* rank: below the engine's inbox lock, above the log's */
    pthread_cond_t more;
    struct slot *ring;
    size_t cap, head, n;
    struct pl_buf current; /* text of the event that was popped last */
    void (*wake)(void *udata);
    void *udata;
    bool starved; /* the engine found too little room */
    void (*on_room)(void *engine);
    void *engine;
    struct pl_choice **prompts; /* prompt log-probabilities, freed with the reply */
    size_t n_prompts;
};

struct pl_reply *pl_reply_new(size_t capacity, void (*wake)(void *udata), void *udata)
{
    struct pl_reply *r = calloc(1, sizeof *r);
    if (r == NULL || (r->ring = calloc(capacity ? capacity : 1, sizeof *r->ring)) == NULL) {
        free(r);
        return NULL;
    }
    atomic_init(&r->refs, 1);
    pthread_mutex_init(&r->lock, NULL);
    pl_timed_cond_init(&r->more);
    r->cap = capacity ? capacity : 1;
    r->wake = wake;
    r->udata = udata;
    return r;
}

void pl_reply_ref(struct pl_reply *r)
{
    atomic_fetch_add_explicit(&r->refs, 1, memory_order_relaxed);
}

void pl_reply_unref(struct pl_reply *r)
{
    if (r == NULL || atomic_fetch_sub_explicit(&r->refs, 1, memory_order_acq_rel) != 1)
        return;
    for (size_t i = 0; i < r->cap; i++)
        pl_buf_fini(&r->ring[i].text);
    for (size_t i = 0; i < r->n_prompts; i++)
        free(r->prompts[i]);
    free(r->prompts);
    pl_buf_fini(&r->current);
    pthread_cond_destroy(&r->more);
    pthread_mutex_destroy(&r->lock);
    free(r->ring);
    free(r);
}

bool pl_reply_next(struct pl_reply *r, struct pl_event *ev)
{
    pthread_mutex_lock(&r->lock);
    bool got = r->n > 0;
    if (got) {
        struct slot *s = &r->ring[r->head];
        struct pl_buf text = r->current; /* swap, so that neither buffer is allocated anew */
        r->current = s->text;
        s->text = text;
        pl_buf_clear(&s->text);
        *ev = s->ev;
        ev->text = pl_buf_str(&r->current);
        ev->n_text = r->current.len;
        r->head = (r->head + 1) % r->cap;
        r->n--;
    }
    if (got && r->starved && r->on_room != NULL)
        r->on_room(r->engine); /* under the lock, so that the engine cannot be gone */
    if (got)
        r->starved = false;
    pthread_mutex_unlock(&r->lock);
    return got;
}

void pl_reply_cancel(struct pl_reply *r)
{
    atomic_store_explicit(&r->cancelled, true, memory_order_release);
    pthread_mutex_lock(&r->lock);
    if (r->on_room != NULL)
        r->on_room(r->engine);
    pthread_mutex_unlock(&r->lock);
}

bool pl_reply_cancelled(const struct pl_reply *r)
{
    return atomic_load_explicit(&r->cancelled, memory_order_acquire);
}

bool pl_reply_wait(struct pl_reply *r, int timeout_ms)
{
    const struct timespec until = pl_time_after_ms(timeout_ms > 0 ? timeout_ms : 0);
    pthread_mutex_lock(&r->lock);
    int rc = 0;
    while (r->n == 0 && rc == 0)
        rc = timeout_ms < 0 ? pthread_cond_wait(&r->more, &r->lock) : pthread_cond_timedwait(&r->more, &r->lock, &until);
    bool there = r->n > 0;
    pthread_mutex_unlock(&r->lock);
    return there;
}

/* ---- the engine's side --------------------------------------------------------------------------------------------- */

void pl_reply_attach(struct pl_reply *r, void (*on_room)(void *engine), void *engine)
{
    pthread_mutex_lock(&r->lock);
    r->on_room = on_room;
    r->engine = engine;
    pthread_mutex_unlock(&r->lock);
}

bool pl_reply_has_room(struct pl_reply *r, size_t n)
{
    pthread_mutex_lock(&r->lock);
    bool room = r->cap - r->n >= n;
    r->starved = !room;
    pthread_mutex_unlock(&r->lock);
    return room;
}

size_t pl_reply_room(struct pl_reply *r)
{
    pthread_mutex_lock(&r->lock);
    size_t room = r->cap - r->n;
    pthread_mutex_unlock(&r->lock);
    return room;
}

size_t pl_reply_capacity(const struct pl_reply *r)
{
    return r->cap;
}

bool pl_reply_push(struct pl_reply *r, const struct pl_event *ev, const char *text, size_t n_text)
{
    pthread_mutex_lock(&r->lock);
    PL_ASSERT(r->n < r->cap);
    struct slot *s = &r->ring[(r->head + r->n) % r->cap];
    s->ev = *ev;
    pl_buf_clear(&s->text);
    if (n_text > 0) /* an end without text can be told without memory */
        pl_buf_add(&s->text, text, n_text);
    bool ok = !s->text.failed, first = ok && r->n == 0;
    r->n += ok;
    if (first)
        pthread_cond_signal(&r->more);
    void (*wake)(void *) = first ? r->wake : NULL;
    pthread_mutex_unlock(&r->lock);
    if (wake != NULL)
        wake(r->udata);
    return ok;
}

bool pl_reply_keep(struct pl_reply *r, struct pl_choice *prompt)
{
    pthread_mutex_lock(&r->lock);
    struct pl_choice **list = realloc(r->prompts, (r->n_prompts + 1) * sizeof *list);
    if (list != NULL) {
        r->prompts = list;
        list[r->n_prompts++] = prompt;
    }
    pthread_mutex_unlock(&r->lock);
    return list != NULL;
}
