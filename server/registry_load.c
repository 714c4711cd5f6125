/* registry_load: the registry's thread: reads models and adapters that are wanted, makes room, lets models leave.
 * The lock is held everywhere but while a file is read or an instance ends; afterwards everything is looked at anew.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/sched/engine.h"
#include "server/http.h"
#include "server/ranks.h"
#include "server/registry_int.h"

#define PL_LOG_MODULE "models"

enum { MEMORY_MS = 1000 /* that a model waits for memory which others are about to give back */, NO_MORE_PATIENCE = 1 };

/* ---- wants --------------------------------------------------------------------------------------------------------- */

static void finish(struct pl_registry *r, struct pl_want *w, pl_status st, const struct pl_err *err)
{
    struct pl_want **at = &r->wants;
    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    if (w->next == NULL)
        r->wants_end = at;
    r->n_wants--;
    w->finished = true;
    w->status = st;
    if (st != PL_OK)
        w->err = *err;
    if (w->done != NULL)
        w->done(w->arg);
}

pl_status pl_registry_want(struct pl_registry *r, struct pl_want *w, struct pl_err *err)
{
    pl_status st = PL_OK;
    w->next = NULL;
    if (w->load == NULL)
        w->target = (struct pl_target){0};
    pthread_mutex_lock(&r->lock);
    w->id = ++r->last_want;
    if (r->stopping)
        st = pl_fail(err, PL_ESTOPPED, "the server is shutting down");
    else if (r->n_wants >= (unsigned)r->server->config->queue_limit)
        st = pl_fail(err, PL_EFULL, "%u requests wait for models already; try again later", r->n_wants);
    w->finished = st != PL_OK;
    w->status = st;
    if (st == PL_OK) {
        *r->wants_end = w;
        r->wants_end = &w->next;
        r->n_wants++;
        pthread_cond_signal(&r->work);
    }
    pthread_mutex_unlock(&r->lock);
    return st;
}

bool pl_registry_finished(struct pl_registry *r, struct pl_want *w)
{
    pthread_mutex_lock(&r->lock);
    const bool finished = w->finished;
    pthread_mutex_unlock(&r->lock);
    return finished;
}

void pl_registry_forget(struct pl_registry *r, struct pl_want *w)
{
    pthread_mutex_lock(&r->lock);
    if (!w->finished) {
        const struct pl_err none = {0};
        w->done = NULL;
        finish(r, w, PL_ESTOPPED, &none);
    }
    pthread_mutex_unlock(&r->lock);
    pl_registry_release(r, &w->target);
}

void pl_registry_refuse_all(struct pl_registry *r)
{
    struct pl_err err = {0};
    err.code = pl_fail(&err, PL_ESTOPPED, "the server is shutting down");
    while (r->wants != NULL)
        finish(r, r->wants, PL_ESTOPPED, &err);
}

/* All that wait for this model, or, with a name, for that. */
static void fail_wants(struct pl_registry *r, const struct pl_registry_model *m, const char *name, pl_status st, const struct pl_err *err)
{
    for (struct pl_want *w = r->wants, *next; w != NULL; w = next) {
        struct pl_registry_model *its;
        struct pl_registry_adapter *a;
        next = w->next;
        if (w->load != NULL)
            continue;
        if (name != NULL ? strcmp(name, w->name) == 0 : pl_registry_look(r, w->name, NULL, &its, &a) == PL_FOUND_OUT && its == m)
            finish(r, w, st, err);
    }
}

/* ---- leaving ------------------------------------------------------------------------------------------------------- */

static bool is_idle(const struct pl_registry *r, const struct pl_registry_model *m, uint64_t now)
{
    const uint64_t most = (uint64_t)r->server->config->model_idle_timeout * 1000000000u;
    return most > 0 && m->state == PL_MODEL_IN && !m->first && m->refs == 0 && now - m->used_ns >= most;
}

/* Lets one model leave whose time has come. False when there is none. */
static bool sweep(struct pl_registry *r)
{
    const uint64_t now = pl_now_ns();
    struct pl_registry_model *m = r->models;
    while (m != NULL && !(m->refs == 0 && (m->state == PL_MODEL_LEAVING || is_idle(r, m, now))))
        m = m->next;
    if (m == NULL)
        return false;
    struct pl_instance *gone = m->instance;
    m->state = PL_MODEL_LEAVING;
    m->instance = NULL;
    pthread_mutex_unlock(&r->lock);
    pl_instance_close(gone);
    pthread_mutex_lock(&r->lock);
    m->state = PL_MODEL_OUT;
    pl_log_info("model %s has left memory", m->name);
    pl_registry_tidy(r);
    return true;
}

/* The least recently used of the further models, rather one that nobody uses; NULL when there is none. */
static struct pl_registry_model *victim(const struct pl_registry *r, bool unused_only)
{
    struct pl_registry_model *best = NULL;
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next) {
        if (m->state != PL_MODEL_IN || m->first || (unused_only && m->refs > 0))
            continue;
        const bool freer = best != NULL && m->refs == 0 && best->refs > 0, busier = best != NULL && m->refs > 0 && best->refs == 0;
        if (best == NULL || freer || (!busier && m->used_ns < best->used_ns))
            best = m;
    }
    return best;
}

/* Whether a further model that still has references has answered all that it was asked, so that these are about to go. */
static bool is_any_finishing(const struct pl_registry *r)
{
    for (const struct pl_registry_model *m = r->models; m != NULL; m = m->next) {
        struct pl_engine_stats st;
        if (m->state != PL_MODEL_IN || m->first || m->refs == 0)
            continue;
        pl_engine_stats(m->instance->engine, &st);
        if (st.running == 0 && st.waiting == 0)
            return true;
    }
    return false;
}

/* False: one is leaving for it. */
static bool make_room(const struct pl_registry *r)
{
    int n = 0;
    bool leaving = false;
    for (const struct pl_registry_model *m = r->models; m != NULL; m = m->next) {
        n += !m->first && m->state != PL_MODEL_OUT;
        leaving |= m->state == PL_MODEL_LEAVING;
    }
    if (n < r->server->config->max_models)
        return true;
    struct pl_registry_model *m = leaving ? NULL : victim(r, false);
    if (m != NULL)
        m->state = PL_MODEL_LEAVING;
    return false;
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

/* Without the lock: a model's name and template never change. */
static pl_status open_instance(struct pl_registry *r, const struct pl_registry_model *m, const char *path, struct pl_instance **out, struct pl_err *err)
{
    pl_status st = r->pool != NULL ? PL_OK : pl_pool_new(&r->pool, pl_ranks_threads(r->server->world, r->server->config), err);
    const struct pl_instance_opts o = {
        .server = r->server, .pool = r->pool, .id = m->name, .path = path, .template = m->template, .further = !m->first,
    };
    return st == PL_OK ? pl_instance_open(out, &o, err) : st;
}

void pl_registry_rest(struct pl_registry *r, unsigned thousandths)
{
    pthread_mutex_lock(&r->lock);
    const bool settled = r->settled; /* else the pool may just be made */
    pthread_mutex_unlock(&r->lock);
    if (settled && r->pool != NULL)
        pl_pool_rest(r->pool, thousandths);
}

/* For want of memory: whether it is worth to try once more, now that one that nobody uses leaves, or when one is let go of. */
static bool try_again(struct pl_registry *r, struct pl_registry_model *m)
{
    struct pl_registry_model *unused = victim(r, true);
    if (unused != NULL)
        unused->state = PL_MODEL_LEAVING;
    else if (m->patient_until_ns == 0 && is_any_finishing(r))
        m->patient_until_ns = pl_now_ns() + MEMORY_MS * UINT64_C(1000000);
    else
        return false;
    return true;
}

static bool waits_for_memory(const struct pl_registry *r, const struct pl_registry_model *m)
{
    return m->patient_until_ns > pl_now_ns() && victim(r, true) == NULL;
}

/* m is OUT. */
static void load(struct pl_registry *r, struct pl_registry_model *m)
{
    struct pl_instance *made = NULL;
    struct pl_err err = {0};
    const uint64_t began = pl_now_ns();
    const bool unknown = m->context == 0; /* or the file was mended */
    struct pl_registry_model now = {.path = pl_xstrdup(m->path)};
    m->state = PL_MODEL_LOADING;
    pthread_mutex_unlock(&r->lock);
    pl_status st = open_instance(r, m, now.path, &made, &err);
    if (st == PL_OK && unknown)
        st = pl_registry_probe(&now, &err);
    pthread_mutex_lock(&r->lock);
    free(now.path);
    if (st == PL_OK && unknown) {
        memcpy(m->base_id, now.base_id, sizeof m->base_id);
        m->created = now.created;
    }
    if (st == PL_OK) {
        m->instance = made;
        m->state = PL_MODEL_IN;
        m->patient_until_ns = 0;
        m->used_ns = pl_now_ns();
        m->context = pl_engine_max_context(made->engine);
        m->n_loads++;
        pl_log_info("model %s is in memory after %.0f ms", m->name, (double)(m->used_ns - began) / 1e6);
        pl_registry_tidy(r); /* it may have been deleted meanwhile */
        return;
    }
    m->instance = made; /* of a file that is being changed */
    m->state = made != NULL ? PL_MODEL_LEAVING : PL_MODEL_OUT;
    if (st == PL_ENOMEM && try_again(r, m))
        return;
    m->patient_until_ns = 0;
    pl_log_error("model %s cannot be served: %s", m->name, err.msg);
    fail_wants(r, m, NULL, st, &err);
    pl_registry_tidy(r);
}

/* A place for one more; without one it says what to do. */
static pl_status make_place(const struct pl_registry *r, struct pl_instance *m, struct pl_err *err)
{
    if (pl_adapters_make_room(m->adapters))
        return PL_OK;
    return pl_fail(err, PL_EFULL, "%d adapters are in memory, as many as max-adapters allows, and none of them can leave now: try again later, unload one, or "
                   "raise max-adapters", r->server->config->max_adapters);
}

static void load_adapter(struct pl_registry *r, struct pl_registry_model *m, const struct pl_registry_adapter *a)
{
    char *name = pl_xstrdup(a->name), *path = pl_xstrdup(a->path);
    const bool made = a->made;
    struct pl_adapters *adapters = m->instance->adapters;
    struct pl_err err = {0}, none;
    m->refs++;
    pthread_mutex_unlock(&r->lock);
    pl_status st = make_place(r, m->instance, &err);
    if (st == PL_OK)
        st = pl_adapters_load(adapters, name, path, false, &err);
    if (st == PL_OK && made)
        pl_adapters_spare(adapters, name);
    pthread_mutex_lock(&r->lock);
    m->refs--;
    const struct pl_registry_adapter *now = pl_registry_adapter_of(r, name);
    if (st == PL_OK && (now == NULL || now->model != m || strcmp(now->path, path) != 0)) /* removed meanwhile */
        (void)!pl_adapters_unload(adapters, name, &none);
    if (st != PL_OK) {
        pl_log_warn("adapter %s cannot be served: %s", name, err.msg);
        if (st == PL_EFULL) /* the same for all others of this model; each would wait for the same room */
            fail_wants(r, m, NULL, st, &err);
        else
            fail_wants(r, NULL, name, st, &err);
    }
    free(name);
    free(path);
}

static struct pl_want *want_of(const struct pl_registry *r, uint64_t id)
{
    struct pl_want *w = r->wants;
    while (w != NULL && w->id != id)
        w = w->next;
    return w;
}

/* An operator's adapter. Who asked for it may be gone before it is there. */
static void load_wanted(struct pl_registry *r, struct pl_want *w)
{
    const uint64_t id = w->id;
    const bool replace = w->load->replace;
    char *name = pl_xstrdup(w->name), *path = pl_xstrdup(w->load->path);
    struct pl_registry_model *m = w->target.model;
    struct pl_registry_adapter *made;
    struct pl_err err = {0};
    pl_status st = pl_registry_reserve(r, m, name, path, replace, &made, &err);
    if (st == PL_OK) {
        m->refs++;
        pthread_mutex_unlock(&r->lock);
        (void)!pl_adapters_make_room(m->instance->adapters); /* without it loading says so */
        st = pl_adapters_load(m->instance->adapters, name, path, replace, &err);
        pthread_mutex_lock(&r->lock);
        const struct pl_registry_adapter *a = pl_registry_settle(r, m, name, path, made, &st, &err);
        m->refs--;
        if (a != NULL && (w = want_of(r, id)) != NULL)
            pl_registry_show_adapter(r, a, w->load->show, w->load->arg);
        pl_registry_tidy(r);
    }
    if ((w = want_of(r, id)) != NULL)
        finish(r, w, st, &err);
    free(name);
    free(path);
}

/* Does one thing that somebody waits for. False when there is nothing that can be done now. */
static bool serve_one(struct pl_registry *r)
{
    for (struct pl_want *w = r->wants; w != NULL; w = w->next) {
        struct pl_registry_model *m;
        struct pl_registry_adapter *a;
        struct pl_err err = {0};
        if (w->load != NULL) {
            load_wanted(r, w);
            return true;
        }
        switch (pl_registry_look(r, w->name, &w->target, &m, &a)) {
        case PL_FOUND: finish(r, w, PL_OK, NULL); return true;
        case PL_FOUND_NOT:
            err.code = pl_registry_no_model(w->name, &err);
            finish(r, w, PL_ENOENT, &err);
            return true;
        case PL_FOUND_OUT: break;
        }
        if (m->state == PL_MODEL_IN) {
            load_adapter(r, m, a);
            return true;
        }
        if (m->state == PL_MODEL_OUT && !waits_for_memory(r, m) && make_room(r)) {
            load(r, m);
            return true;
        }
    }
    return false;
}

/* ---- the first model ----------------------------------------------------------------------------------------------- */

/* Those of the configuration, which come before all others; a fault of one of them is the configuration's, want of memory and a lost rank are not. */
static pl_status load_first_adapters(struct pl_registry *r, struct pl_instance *first, struct pl_err *err)
{
    pl_status st = PL_OK;
    pthread_mutex_lock(&r->lock);
    const struct pl_registry_adapter *a = r->adapters;
    pthread_mutex_unlock(&r->lock); /* until the model is there, none of them goes */
    for (size_t i = 0; i < r->server->config->adapter.n && st == PL_OK; i++) {
        struct pl_err cause = {0};
        const pl_status rc = a->model->first ? pl_adapters_load(first->adapters, a->name, a->path, false, &cause) : PL_OK;
        const bool machine = rc == PL_ERANK || rc == PL_EDEVICE || rc == PL_ENOMEM;
        if (rc != PL_OK)
            st = pl_fail_param(err, machine ? rc : PL_EINVAL, machine ? "" : "adapter", "adapter %.100s=%.100s: %.250s", a->name, a->path, cause.msg);
        pthread_mutex_lock(&r->lock);
        a = a->next;
        pthread_mutex_unlock(&r->lock);
    }
    return st;
}

static void load_first(struct pl_registry *r)
{
    struct pl_registry_model *m = r->models;
    struct pl_instance *made = NULL;
    struct pl_err err = {0};
    pl_status st = open_instance(r, m, m->path, &made, &err);
    if (st == PL_OK)
        st = load_first_adapters(r, made, &err);
    pthread_mutex_lock(&r->lock);
    m->instance = made;
    if (st == PL_OK) {
        m->state = PL_MODEL_IN;
        m->context = pl_engine_max_context(m->instance->engine);
        m->n_loads = 1;
        atomic_store_explicit(&r->server->ready, true, memory_order_release);
        pl_log_info("ready: model %s at %s after %.0f ms", m->name, pl_http_url(r->server->http), (double)(pl_now_ns() - r->server->start_ns) / 1e6);
    }
    r->first_status = st;
    r->first_err = err;
    r->settled = true;
    pthread_mutex_unlock(&r->lock);
}

/* ---- the thread ---------------------------------------------------------------------------------------------------- */

/* Until something changes, or a model has been idle for long enough. */
static void wait_for_work(struct pl_registry *r)
{
    const uint64_t now = pl_now_ns(), most = (uint64_t)r->server->config->model_idle_timeout * 1000000000u;
    uint64_t least = UINT64_MAX;
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next) {
        uint64_t until = m->patient_until_ns;
        if (until > NO_MORE_PATIENCE && until <= now)
            m->patient_until_ns = NO_MORE_PATIENCE; /* looked at once more; perhaps nobody waits for it now */
        else if (until <= NO_MORE_PATIENCE && most > 0 && m->state == PL_MODEL_IN && !m->first && m->refs == 0)
            until = m->used_ns + most;
        if (until > NO_MORE_PATIENCE) {
            const uint64_t left = until > now ? until - now : 0;
            least = left < least ? left : least;
        }
    }
    if (least == UINT64_MAX) {
        pthread_cond_wait(&r->work, &r->lock);
        return;
    }
    const struct timespec until = pl_time_after_ms((int)(least / 1000000) + 1);
    (void)pthread_cond_timedwait(&r->work, &r->lock, &until);
}

void *pl_registry_main(void *registry)
{
    struct pl_registry *r = registry;
    load_first(r);
    pthread_mutex_lock(&r->lock);
    while (!r->stopping)
        if (!sweep(r) && !serve_one(r) && !sweep(r)) /* serving may tell a model to leave */
            wait_for_work(r);
    r->ended = true;
    pthread_cond_signal(&r->over);
    pthread_mutex_unlock(&r->lock);
    return NULL;
}
