/* adapters: the adapters that are served beside the base model, by name.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/adapters.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "core/model/adapter.h"

#define PL_LOG_MODULE "adapters"

enum { PATIENCE_MS = 500 /* a client hears of its request's end a moment before the adapter is free */ };

struct pl_adapters {
    struct pl_engine *engine;     /* borrowed; NULL once it is going. Under lock */
    const struct pl_model *model; /* borrowed */
    char *base_name;
    uint32_t max;
    pthread_mutex_t lock; /* before the engine's; never held when a task is run or a file is read */
    pthread_cond_t added; /* or removed, or not in use any more */
    struct pl_served *list; /* oldest first, all states */
    uint64_t last_id;
};

pl_status pl_adapters_new(struct pl_adapters **out, struct pl_engine *e, const struct pl_model *model, const char *base_name, uint32_t max,
                          struct pl_err *err)
{
    struct pl_adapters *as = calloc(1, sizeof *as);
    if (as == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    as->engine = e;
    as->model = model;
    as->base_name = pl_xstrdup(base_name);
    as->max = max;
    pthread_mutex_init(&as->lock, NULL);
    pl_timed_cond_init(&as->added);
    *out = as;
    return PL_OK;
}

void pl_adapters_stop(struct pl_adapters *as)
{
    if (as == NULL)
        return;
    pthread_mutex_lock(&as->lock);
    as->engine = NULL;
    pthread_cond_broadcast(&as->added);
    pthread_mutex_unlock(&as->lock);
}

/* It is in no list. */
static void free_served(struct pl_served *a)
{
    pl_model_adapter_free(a->owner->model, a->set);
    pthread_mutex_destroy(&a->lock);
    free(a->name);
    free(a->path);
    free(a);
}

void pl_adapters_free(struct pl_adapters *as)
{
    if (as == NULL)
        return;
    for (struct pl_served *a = as->list, *next; a != NULL; a = next) {
        next = a->next;
        free_served(a);
    }
    pthread_mutex_destroy(&as->lock);
    pthread_cond_destroy(&as->added);
    free(as->base_name);
    free(as);
}

/* ---- under the lock ------------------------------------------------------------------------------------------------ */

static struct pl_served *find(const struct pl_adapters *as, const char *name, int state)
{
    for (struct pl_served *a = as->list; a != NULL; a = a->next)
        if ((int)a->state == state && strcmp(a->name, name) == 0)
            return a;
    return NULL;
}

static void take_out(struct pl_adapters *as, const struct pl_served *a)
{
    struct pl_served **at = &as->list;
    while (*at != a)
        at = &(*at)->next;
    *at = a->next;
}

/* 0 = none is free */
static uint32_t free_slot(const struct pl_adapters *as)
{
    for (uint32_t slot = 1; slot <= as->max; slot++) {
        bool taken = false;
        for (const struct pl_served *a = as->list; a != NULL; a = a->next)
            taken |= a->slot == slot;
        if (!taken)
            return slot;
    }
    return 0;
}

/* ---- on the engine's thread ---------------------------------------------------------------------------------------- */

static struct pl_served *of_task(struct pl_engine_task *task)
{
    return (struct pl_served *)((char *)task - offsetof(struct pl_served, task));
}

static void run_add(struct pl_engine_task *task, struct pl_engine *e)
{
    struct pl_served *a = of_task(task);
    struct pl_err err = {0};
    const pl_status rc = pl_engine_adapter_add(e, a->slot, a->set, &err);
    if (rc == PL_OK)
        a->set = NULL;
    pthread_mutex_lock(&a->owner->lock);
    a->add_status = rc;
    a->add_err = err;
    a->added = true;
    pthread_cond_broadcast(&a->owner->added);
    pthread_mutex_unlock(&a->owner->lock);
}

static void run_remove(struct pl_engine_task *task, struct pl_engine *e)
{
    struct pl_served *a = of_task(task);
    pl_engine_adapter_remove(e, a->slot);
    pthread_mutex_lock(&a->owner->lock);
    take_out(a->owner, a);
    pthread_cond_broadcast(&a->owner->added);
    pthread_mutex_unlock(&a->owner->lock);
    pl_log_info("adapter %s has left", a->name);
    free_served(a);
}

/* Under the lock: has it removed when nobody holds it. False: it stays in the list for now; to the end when the engine is going, which frees its
 * memory itself. */
static bool leave_if_unused(struct pl_served *a)
{
    if (a->state != PL_SERVED_LEAVING || a->refs > 0 || a->owner->engine == NULL)
        return false;
    a->task.run = run_remove;
    return pl_engine_post(a->owner->engine, &a->task) == PL_OK;
}

/* ---- loading ------------------------------------------------------------------------------------------------------- */

pl_status pl_adapters_check_name(const char *name, struct pl_err *err)
{
    const size_t n = strlen(name);
    bool plain = true;
    for (size_t i = 0; i < n; i++)
        plain &= (unsigned char)name[i] >= 0x20 && name[i] != 0x7f;
    if (n == 0 || n > PL_ADAPTER_NAME_MAX || !plain || !pl_utf8_valid(name, n))
        return pl_fail_param(err, PL_EINVAL, "lora_name", "an adapter's name has 1 to %d bytes of UTF-8 without control characters",
                             PL_ADAPTER_NAME_MAX);
    return PL_OK;
}

/* A hidden entry that holds the name and a slot. */
static pl_status reserve(struct pl_adapters *as, const char *name, const char *path, bool replace, struct pl_served **out, struct pl_err *err)
{
    struct pl_served *a = calloc(1, sizeof *a), **end = &as->list;
    if (a == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    a->owner = as;
    a->name = pl_xstrdup(name);
    a->path = pl_xstrdup(path);
    a->created = time(NULL);
    pthread_mutex_init(&a->lock, NULL);
    pl_model_stats_init(&a->stats);
    pl_status rc = PL_OK;
    pthread_mutex_lock(&as->lock);
    if (as->engine == NULL)
        rc = pl_fail(err, PL_ESTOPPED, "the server is shutting down");
    else if (find(as, name, PL_SERVED_LOADING) != NULL)
        rc = pl_fail_param(err, PL_EINVAL, "lora_name", "an adapter named '%.200s' is being loaded at this moment", name);
    else if (!replace && find(as, name, PL_SERVED_LISTED) != NULL)
        rc = pl_fail_param(err, PL_EINVAL, "lora_name", "an adapter named '%.200s' is there already: unload it first, or ask for it to be replaced",
                           name);
    else if ((a->slot = free_slot(as)) == 0)
        rc = pl_fail(err, PL_EINVAL, "%u adapters are loaded, as many as max-adapters allows: unload one, or raise max-adapters", as->max);
    if (rc == PL_OK) {
        a->id = ++as->last_id;
        while (*end != NULL)
            end = &(*end)->next;
        *end = a;
    }
    pthread_mutex_unlock(&as->lock);
    if (rc != PL_OK)
        free_served(a);
    else
        *out = a;
    return rc;
}

static void describe(struct pl_served *a, const struct pl_adapter *adapter)
{
    for (size_t i = 0; i < adapter->n_pairs; i++) {
        const struct pl_lora_pair *p = &adapter->pairs[i];
        struct pl_target_place place = {0};
        PL_ASSERT(pl_target_find(pl_model_spec(a->owner->model), p->target, &place));
        a->n_params += (uint64_t)p->rank * (place.rows + place.cols);
        a->max_rank = p->rank > a->max_rank ? p->rank : a->max_rank;
    }
    a->n_pairs = (uint32_t)adapter->n_pairs;
    a->hash = adapter->hash;
}

/* Reads the file and copies it to the device: what takes long, so on the caller's thread. */
static pl_status prepare(struct pl_served *a, struct pl_err *err)
{
    const struct pl_model *m = a->owner->model;
    struct pl_adapter *adapter = NULL;
    pl_status rc = pl_adapter_read(&adapter, a->path, pl_model_spec(m), err);
    if (rc == PL_OK) {
        describe(a, adapter);
        rc = pl_model_adapter_make(&a->set, m, adapter, err);
    }
    pl_adapter_free(adapter);
    return rc;
}

/* Gives it to the engine's thread, and waits. */
static pl_status add_to_engine(struct pl_adapters *as, struct pl_served *a, struct pl_err *err)
{
    a->task.run = run_add;
    pthread_mutex_lock(&as->lock);
    pl_status rc = as->engine != NULL ? pl_engine_post(as->engine, &a->task) : PL_ESTOPPED;
    while (rc == PL_OK && !a->added)
        pthread_cond_wait(&as->added, &as->lock);
    pthread_mutex_unlock(&as->lock);
    if (rc != PL_OK)
        return pl_fail(err, rc, "the server is shutting down");
    if (a->add_status != PL_OK && err != NULL)
        *err = a->add_err;
    return a->add_status;
}

pl_status pl_adapters_load(struct pl_adapters *as, const char *name, const char *path, bool replace, struct pl_err *err)
{
    struct pl_served *a = NULL;
    pl_status rc = pl_adapters_check_name(name, err);
    if (rc == PL_OK && strcmp(name, as->base_name) == 0)
        rc = pl_fail_param(err, PL_EINVAL, "lora_name", "'%.200s' is the base model's name: give the adapter another one", name);
    if (rc == PL_OK)
        rc = reserve(as, name, path, replace, &a, err);
    if (rc != PL_OK)
        return rc;
    if ((rc = prepare(a, err)) == PL_OK)
        rc = add_to_engine(as, a, err);
    pthread_mutex_lock(&as->lock);
    if (rc == PL_OK) {
        struct pl_served *old = find(as, name, PL_SERVED_LISTED);
        a->state = PL_SERVED_LISTED;
        a->found_ns = pl_now_ns();
        if (old != NULL) {
            old->state = PL_SERVED_LEAVING;
            leave_if_unused(old);
        }
        pl_log_info("adapter %s: %s, %u pairs, rank up to %u, %.2f M parameters", name, path, a->n_pairs, a->max_rank, (double)a->n_params / 1e6);
    } else {
        take_out(as, a);
    }
    pthread_mutex_unlock(&as->lock);
    if (rc != PL_OK)
        free_served(a);
    return rc;
}

pl_status pl_adapters_unload(struct pl_adapters *as, const char *name, struct pl_err *err)
{
    pthread_mutex_lock(&as->lock);
    struct pl_served *a = find(as, name, PL_SERVED_LISTED);
    if (a != NULL) {
        pl_log_info("adapter %s is unloaded, %u requests use it", name, a->refs);
        a->state = PL_SERVED_LEAVING;
        leave_if_unused(a);
    }
    pthread_mutex_unlock(&as->lock);
    return a != NULL ? PL_OK : pl_fail_param(err, PL_ENOENT, "lora_name", "there is no adapter named '%.200s'", name);
}

/* ---- use ----------------------------------------------------------------------------------------------------------- */

struct pl_served *pl_adapters_find(struct pl_adapters *as, const char *name)
{
    pthread_mutex_lock(&as->lock);
    struct pl_served *a = find(as, name, PL_SERVED_LISTED);
    if (a != NULL) {
        a->refs++;
        a->found_ns = pl_now_ns();
    }
    pthread_mutex_unlock(&as->lock);
    return a;
}

void pl_served_unref(struct pl_served *a)
{
    if (a == NULL)
        return;
    struct pl_adapters *as = a->owner;
    pthread_mutex_lock(&as->lock);
    if (--a->refs == 0)
        pthread_cond_broadcast(&as->added);
    leave_if_unused(a);
    pthread_mutex_unlock(&as->lock);
}

void pl_adapters_spare(struct pl_adapters *as, const char *name)
{
    pthread_mutex_lock(&as->lock);
    struct pl_served *a = find(as, name, PL_SERVED_LISTED);
    if (a != NULL)
        a->spare = true;
    pthread_mutex_unlock(&as->lock);
}

static bool is_in(const struct pl_adapters *as, uint64_t id)
{
    const struct pl_served *a = as->list;
    while (a != NULL && a->id != id)
        a = a->next;
    return a != NULL;
}

/* Of the spare ones; NULL when all are in use. */
static struct pl_served *longest_unused(const struct pl_adapters *as, bool *any)
{
    struct pl_served *oldest = NULL;
    *any = false;
    for (struct pl_served *a = as->list; a != NULL; a = a->next) {
        const bool spare = a->state == PL_SERVED_LEAVING || (a->state == PL_SERVED_LISTED && a->spare);
        *any |= spare;
        if (spare && a->state == PL_SERVED_LISTED && a->refs == 0 && (oldest == NULL || a->found_ns < oldest->found_ns))
            oldest = a;
    }
    return oldest;
}

static void evict(struct pl_adapters *as, struct pl_served *a)
{
    const uint64_t id = a->id;
    pl_log_info("adapter %s makes room: nobody has asked for it for %.0f s", a->name, (double)(pl_now_ns() - a->found_ns) * 1e-9);
    a->state = PL_SERVED_LEAVING;
    const bool leaves = leave_if_unused(a);
    while (leaves && is_in(as, id) && as->engine != NULL)
        pthread_cond_wait(&as->added, &as->lock);
}

bool pl_adapters_make_room(struct pl_adapters *as)
{
    const struct timespec until = pl_time_after_ms(PATIENCE_MS);
    struct pl_served *a;
    bool any, late = false;
    pthread_mutex_lock(&as->lock);
    while (free_slot(as) == 0 && as->engine != NULL && !late) {
        if ((a = longest_unused(as, &any)) != NULL)
            evict(as, a);
        else
            late = !any || pthread_cond_timedwait(&as->added, &as->lock, &until) != 0;
    }
    const bool room = free_slot(as) != 0;
    pthread_mutex_unlock(&as->lock);
    return room;
}

void pl_adapters_each(struct pl_adapters *as, bool all, void (*fn)(void *arg, struct pl_served *a), void *arg)
{
    pthread_mutex_lock(&as->lock);
    for (struct pl_served *a = as->list; a != NULL; a = a->next)
        if (a->state == PL_SERVED_LISTED || (all && a->state == PL_SERVED_LEAVING))
            fn(arg, a);
    pthread_mutex_unlock(&as->lock);
}
