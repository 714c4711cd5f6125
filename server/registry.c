/* registry: what requests can ask for: whole models and their adapters, and which of them are in memory.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/base/buf.h"
#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/base/utf8.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/sched/engine.h"
#include "core/train/job.h"
#include "server/ranks.h"
#include "server/registry_int.h"

#define PL_LOG_MODULE "models"

enum { PATIENCE_MS = 1000 /* with what the thread reads, at the end */ };

/* ---- tables -------------------------------------------------------------------------------------------------------- */

static struct pl_registry_model *model_of(const struct pl_registry *r, const char *name)
{
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next)
        if (m->listed && strcmp(m->name, name) == 0)
            return m;
    return NULL;
}

/* Listed or not. */
static struct pl_registry_adapter *any_adapter_of(const struct pl_registry *r, const char *name)
{
    for (struct pl_registry_adapter *a = r->adapters; a != NULL; a = a->next)
        if (strcmp(a->name, name) == 0)
            return a;
    return NULL;
}

struct pl_registry_adapter *pl_registry_adapter_of(const struct pl_registry *r, const char *name)
{
    struct pl_registry_adapter *a = any_adapter_of(r, name);
    return a != NULL && a->listed ? a : NULL;
}

static char *copy_or_null(const char *s)
{
    return s != NULL && s[0] != '\0' ? pl_xstrdup(s) : NULL;
}

static struct pl_registry_model *new_model(const char *name, const char *path, const char *template, const char *parent)
{
    struct pl_registry_model *m = pl_xcalloc(1, sizeof *m);
    m->name = pl_xstrdup(name);
    m->path = pl_xstrdup(path);
    m->template = copy_or_null(template);
    m->parent = copy_or_null(parent);
    return m;
}

static void free_model(struct pl_registry_model *m)
{
    free(m->name);
    free(m->path);
    free(m->template);
    free(m->parent);
    free(m);
}

static void append_model(struct pl_registry *r, struct pl_registry_model *m)
{
    struct pl_registry_model **end = &r->models;
    while (*end != NULL)
        end = &(*end)->next;
    *end = m;
}

static struct pl_registry_adapter *append_adapter(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path, bool listed)
{
    struct pl_registry_adapter *a = pl_xcalloc(1, sizeof *a), **end = &r->adapters;
    *a = (struct pl_registry_adapter){.name = pl_xstrdup(name), .path = pl_xstrdup(path), .model = m, .created = time(NULL), .listed = listed};
    while (*end != NULL)
        end = &(*end)->next;
    *end = a;
    return a;
}

void pl_registry_forget_adapter(struct pl_registry *r, struct pl_registry_adapter *a)
{
    struct pl_registry_adapter **at = &r->adapters;
    while (*at != a)
        at = &(*at)->next;
    *at = a->next;
    free(a->name);
    free(a->path);
    free(a->own_base);
    free(a);
}

static bool has_adapters(const struct pl_registry *r, const struct pl_registry_model *m)
{
    const struct pl_registry_adapter *a = r->adapters;
    while (a != NULL && a->model != m)
        a = a->next;
    return a != NULL;
}

/* Nobody can ask for it: it goes, and maybe its file has gone. */
static bool is_abandoned(const struct pl_registry *r, const struct pl_registry_model *m)
{
    return !m->listed && !has_adapters(r, m);
}

void pl_registry_tidy(struct pl_registry *r)
{
    for (struct pl_registry_model **at = &r->models; *at != NULL;) {
        struct pl_registry_model *m = *at;
        const bool asked_for = !is_abandoned(r, m);
        if (!asked_for && m->state == PL_MODEL_IN)
            m->state = PL_MODEL_LEAVING;
        if (asked_for || m->state != PL_MODEL_OUT) {
            at = &m->next;
            continue;
        }
        *at = m->next;
        free_model(m);
    }
    pthread_cond_signal(&r->work);
}

pl_status pl_registry_probe(struct pl_registry_model *m, struct pl_err *err)
{
    struct pl_gguf *g = NULL;
    struct pl_spec spec;
    struct stat is;
    unsigned arch;
    pl_status st = pl_gguf_open(&g, m->path, err);
    if (st == PL_OK)
        st = pl_model_check(&spec, &arch, NULL, g, err);
    pl_gguf_close(g);
    if (st == PL_OK)
        st = pl_train_base_id(m->path, m->base_id, err);
    if (st != PL_OK) {
        m->base_id[0] = '\0';
        return st;
    }
    m->created = stat(m->path, &is) == 0 ? is.st_mtim.tv_sec : time(NULL);
    m->context = spec.n_ctx;
    return PL_OK;
}

/* ---- the configuration --------------------------------------------------------------------------------------------- */

static int is_gguf(const struct dirent *d)
{
    const size_t n = strlen(d->d_name);
    return n > 5 && d->d_name[0] != '.' && strcmp(d->d_name + n - 5, ".gguf") == 0;
}

static pl_status choose_in_dir(const char *dir, char **path, struct pl_err *err)
{
    struct dirent **found = NULL;
    const int n = scandir(dir, &found, is_gguf, alphasort);
    pl_status rc = PL_OK;
    if (n < 0) {
        rc = pl_fail_param(err, PL_EINVAL, "model-dir", "cannot read the model directory %s: %s", dir, strerror(errno));
    } else if (n == 0) {
        rc = pl_fail_param(err, PL_EINVAL, "model-dir", "%s holds no .gguf file: put one there, or name one with --model FILE", dir);
    } else if (n > 1) {
        struct pl_buf names;
        pl_buf_init(&names, 300);
        for (int i = 0; i < n; i++)
            pl_buf_addf(&names, "%s%s", i > 0 ? ", " : "", found[i]->d_name);
        rc = pl_fail_param(err, PL_EINVAL, "model-dir", "%s holds %d models, choose one with --model: %s%s", dir, n,
                           pl_buf_str(&names), names.failed ? " …" : "");
        pl_buf_fini(&names);
    } else if (asprintf(path, "%s/%s", dir, found[0]->d_name) < 0) {
        rc = pl_fail(err, PL_ENOMEM, "out of memory");
    }
    for (int i = 0; i < n; i++)
        free(found[i]);
    free(found);
    return rc;
}

/* param: the key that has it. */
static pl_status check_name(const char *name, const char *value, const char *param, struct pl_err *err)
{
    struct pl_err why = {0};
    if (pl_adapters_check_name(name, &why) == PL_OK)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, param, "%s %.100s: a name has 1 to %d bytes of UTF-8 without control characters", param, value, PL_ADAPTER_NAME_MAX);
}

pl_status pl_registry_choose(const struct pl_config *c, char **path, char **id, struct pl_err *err)
{
    *path = *id = NULL;
    if (c->model[0] != '\0') {
        *path = pl_xstrdup(c->model);
    } else if (c->model_dir[0] != '\0') {
        const pl_status rc = choose_in_dir(c->model_dir, path, err);
        if (rc != PL_OK)
            return rc;
    } else {
        return pl_fail_param(err, PL_EINVAL, "model", "no model: name a GGUF file with --model FILE");
    }
    const char *slash = strrchr(*path, '/');
    *id = pl_xstrdup(c->alias[0] != '\0' ? c->alias : slash != NULL ? slash + 1 : *path);
    const size_t n = strlen(*id);
    if (c->alias[0] == '\0' && n > 5 && strcmp(*id + n - 5, ".gguf") == 0)
        (*id)[n - 5] = '\0';
    pl_status rc = check_name(*id, *id, "alias", err);
    if (rc != PL_OK && c->alias[0] == '\0')
        rc = pl_fail_param(err, PL_EINVAL, "alias", "the model file's name is not UTF-8, or has control characters: give it a name with --alias NAME");
    if (rc != PL_OK) {
        free(*id);
        free(*path);
        *path = *id = NULL;
        return rc;
    }
    return PL_OK;
}

/* A file that cannot be read now is that model's fault alone: its requests say so. */
static void probe(struct pl_registry_model *m)
{
    struct pl_err err = {0};
    if (pl_registry_probe(m, &err) != PL_OK)
        pl_log_error("model %s cannot be served: %s", m->name, err.msg);
}

/* NAME=PATH */
static pl_status add_further(struct pl_registry *r, const char *value, struct pl_err *err)
{
    const char *equals = strchr(value, '=');
    char *name = pl_xstrdup(value);
    name[equals - value] = '\0';
    pl_status st = check_name(name, value, "add-model", err);
    if (st == PL_OK && strncmp(name, "ft:", 3) == 0)
        st = pl_fail_param(err, PL_EINVAL, "add-model", "add-model %.100s: a name does not begin with ft: as those do that jobs make", value);
    else if (st == PL_OK && model_of(r, name) != NULL)
        st = pl_fail_param(err, PL_EINVAL, "add-model", "add-model %.100s: there is a model of that name already", value);
    if (st == PL_OK) {
        struct pl_registry_model *m = new_model(name, equals + 1, NULL, NULL);
        m->listed = true;
        probe(m);
        append_model(r, m);
    }
    free(name);
    return st;
}

static int count_adapters(const struct pl_registry *r, const struct pl_registry_model *m)
{
    int n = 0;
    for (const struct pl_registry_adapter *a = r->adapters; a != NULL; a = a->next)
        n += a->model == m;
    return n;
}

/* NAME=PATH for the first model, NAME@MODEL=PATH for another one. */
static pl_status add_adapter(struct pl_registry *r, const char *value, struct pl_err *err)
{
    const char *equals = strchr(value, '=');
    char *name = pl_xstrdup(value), *at;
    struct pl_registry_model *m = r->models;
    pl_status st = PL_OK;
    name[equals - value] = '\0';
    if ((at = strrchr(name, '@')) != NULL) {
        *at = '\0';
        if ((m = model_of(r, at + 1)) == NULL)
            st = pl_fail_param(err, PL_EINVAL, "adapter", "adapter %.100s: there is no model '%.100s': name it with --add-model", value, at + 1);
    }
    if (st == PL_OK)
        st = check_name(name, value, "adapter", err);
    if (st == PL_OK && model_of(r, name) != NULL)
        st = pl_fail_param(err, PL_EINVAL, "adapter", "adapter %.100s: '%.100s' is the base model's name, or another one's: give it another one", value,
                           name);
    else if (st == PL_OK && any_adapter_of(r, name) != NULL)
        st = pl_fail_param(err, PL_EINVAL, "adapter", "adapter %.100s: an adapter named '%.100s' is there already", value, name);
    else if (st == PL_OK && count_adapters(r, m) >= r->server->config->max_adapters)
        st = pl_fail_param(err, PL_EINVAL, "adapter", "adapter %.100s: the model '%.100s' would have more adapters than max-adapters (%d) allows: raise that",
                           value, m->name, r->server->config->max_adapters);
    if (st == PL_OK)
        append_adapter(r, m, name, equals + 1, true);
    free(name);
    return st;
}

/* The other ranks have parts of the first model only. */
static pl_status check_ranks(const struct pl_registry *r, const char *name, struct pl_err *err)
{
    const unsigned n = pl_ranks_count(r->server->world, r->server->config);
    if (n == 1)
        return PL_OK;
    return pl_fail_param(err, PL_ENOTSUP, "model", "'%.200s' is a further model, and these need one rank, but the first model is cut over %u: start parleyd as "
                         "one process without --tensor-parallel, or a second one with that model as --model", name, n);
}

static pl_status add_configured(struct pl_registry *r, struct pl_err *err)
{
    const struct pl_config *c = r->server->config;
    char *path, *id;
    struct pl_err why = {0};
    if (c->add_model.n > 0 && check_ranks(r, c->add_model.values[0], &why) != PL_OK)
        return pl_fail_param(err, PL_EINVAL, "add-model", "add-model: %.480s", why.msg);
    pl_status st = pl_registry_choose(c, &path, &id, err);
    if (st != PL_OK)
        return st;
    struct pl_registry_model *first = new_model(id, path, c->chat_template, NULL);
    first->first = first->listed = true;
    append_model(r, first);
    free(path);
    free(id);
    st = pl_registry_probe(first, err);
    for (size_t i = 0; i < c->add_model.n && st == PL_OK; i++)
        st = add_further(r, c->add_model.values[i], err);
    for (size_t i = 0; i < c->adapter.n && st == PL_OK; i++)
        st = add_adapter(r, c->adapter.values[i], err);
    return st;
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

pl_status pl_registry_new(struct pl_registry **out, struct pl_server *s, struct pl_err *err)
{
    struct pl_registry *r = pl_xcalloc(1, sizeof *r);
    r->server = s;
    r->wants_end = &r->wants;
    pthread_mutex_init(&r->lock, NULL);
    pl_timed_cond_init(&r->work);
    pl_timed_cond_init(&r->over);
    const pl_status st = add_configured(r, err);
    if (st != PL_OK)
        pl_registry_free(r);
    else
        *out = r;
    return st;
}

pl_status pl_registry_start(struct pl_registry *r, struct pl_err *err)
{
    const int why = pthread_create(&r->thread, NULL, pl_registry_main, r);
    r->thread_made = why == 0;
    return why == 0 ? PL_OK : pl_fail(err, PL_EIO, "cannot start a thread: %s", strerror(why));
}

bool pl_registry_settled(struct pl_registry *r, pl_status *rc, struct pl_err *err)
{
    pthread_mutex_lock(&r->lock);
    const bool settled = r->settled;
    if (settled && (*rc = r->first_status) != PL_OK)
        *err = r->first_err;
    pthread_mutex_unlock(&r->lock);
    return settled;
}

/* The next model in memory after m, with a reference, and m without; NULL = the end. */
static struct pl_registry_model *step(struct pl_registry *r, struct pl_registry_model *m)
{
    pthread_mutex_lock(&r->lock);
    struct pl_registry_model *next = m != NULL ? m->next : r->models;
    if (m != NULL && --m->refs == 0)
        pthread_cond_signal(&r->work);
    while (next != NULL && next->instance == NULL)
        next = next->next;
    if (next != NULL)
        next->refs++;
    pthread_mutex_unlock(&r->lock);
    return next;
}

bool pl_registry_drain(struct pl_registry *r)
{
    bool all = true;
    for (struct pl_registry_model *m = NULL; (m = step(r, m)) != NULL;)
        all &= pl_engine_drain(m->instance->engine, 0);
    return all;
}

void pl_registry_stop_reading(struct pl_registry *r)
{
    pthread_mutex_lock(&r->lock);
    r->stopping = true;
    pl_registry_refuse_all(r);
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->lock);
}

bool pl_registry_stop(struct pl_registry *r)
{
    if (r == NULL)
        return true;
    pl_registry_stop_reading(r);
    const struct timespec until = pl_time_after_ms(PATIENCE_MS);
    int rc = 0;
    pthread_mutex_lock(&r->lock);
    while (r->thread_made && !r->ended && rc == 0)
        rc = pthread_cond_timedwait(&r->over, &r->lock, &until);
    const bool stands = r->thread_made && !r->ended;
    pthread_mutex_unlock(&r->lock);
    if (stands)
        return false;
    if (r->thread_made)
        pthread_join(r->thread, NULL);
    r->thread_made = false;
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next)
        if (m->instance != NULL)
            pl_instance_stop(m->instance);
    return true;
}

void pl_registry_free(struct pl_registry *r)
{
    if (r == NULL)
        return;
    while (r->adapters != NULL)
        pl_registry_forget_adapter(r, r->adapters);
    for (struct pl_registry_model *m = r->models, *next; m != NULL; m = next) {
        next = m->next;
        pl_instance_close(m->instance);
        free_model(m);
    }
    pl_pool_free(r->pool);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->over);
    free(r);
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

pl_found pl_registry_look(struct pl_registry *r, const char *name, struct pl_target *t, struct pl_registry_model **m, struct pl_registry_adapter **a)
{
    struct pl_served *served = NULL;
    *a = name != NULL ? pl_registry_adapter_of(r, name) : NULL;
    *m = *a != NULL ? (*a)->model : name != NULL ? model_of(r, name) : r->models;
    if (*m == NULL)
        return PL_FOUND_NOT;
    if ((*m)->state != PL_MODEL_IN || (*a != NULL && (served = pl_adapters_find((*m)->instance->adapters, name)) == NULL))
        return PL_FOUND_OUT;
    if (t == NULL) {
        pl_served_unref(served);
        return PL_FOUND;
    }
    (*m)->refs++;
    (*m)->used_ns = pl_now_ns();
    *t = (struct pl_target){.instance = (*m)->instance, .adapter = served, .model = *m};
    return PL_FOUND;
}

pl_found pl_registry_find(struct pl_registry *r, const char *name, struct pl_target *t)
{
    struct pl_registry_model *m;
    struct pl_registry_adapter *a;
    pthread_mutex_lock(&r->lock);
    const pl_found found = pl_registry_look(r, name, t, &m, &a);
    pthread_mutex_unlock(&r->lock);
    return found;
}

void pl_registry_release(struct pl_registry *r, struct pl_target *t)
{
    if (t->instance == NULL)
        return;
    pl_served_unref(t->adapter);
    pthread_mutex_lock(&r->lock);
    t->model->used_ns = pl_now_ns();
    if (--t->model->refs == 0 && !t->model->first)
        pthread_cond_signal(&r->work); /* it may leave, now or after a while */
    pthread_mutex_unlock(&r->lock);
    *t = (struct pl_target){0};
}

/* ---- what there is ------------------------------------------------------------------------------------------------- */

/* ft:ROOT:parley:… is made from ROOT, at first. */
static char *root_of(const char *name)
{
    const char *end = strncmp(name, "ft:", 3) == 0 ? strstr(name, ":parley:") : NULL;
    return end != NULL ? strndup(name + 3, (size_t)(end - name - 3)) : strdup(name);
}

static uint32_t context_of(const struct pl_registry *r, const struct pl_registry_model *m)
{
    const uint32_t set = (uint32_t)r->server->config->context;
    return set > 0 && set < m->context ? set : m->context;
}

typedef void show(void *arg, const struct pl_model_info *m);

static void show_model(const struct pl_registry *r, const struct pl_registry_model *m, show *fn, void *arg)
{
    char *root = root_of(m->name);
    const struct pl_model_info info = {
        .name = m->name, .root = root != NULL ? root : m->name, .parent = m->parent, .created = m->created, .context = context_of(r, m),
    };
    fn(arg, &info);
    free(root);
}

void pl_registry_show_adapter(const struct pl_registry *r, const struct pl_registry_adapter *a, show *fn, void *arg)
{
    char *root = root_of(a->model->name);
    const struct pl_model_info info = {
        .name = a->name, .root = root != NULL ? root : a->model->name, .parent = a->model->name, .created = a->created,
        .context = context_of(r, a->model),
    };
    fn(arg, &info);
    free(root);
}

void pl_registry_each(struct pl_registry *r, show *fn, void *arg)
{
    pthread_mutex_lock(&r->lock);
    for (const struct pl_registry_model *m = r->models; m != NULL; m = m->next) {
        if (m->listed && m->context > 0)
            show_model(r, m, fn, arg);
        for (const struct pl_registry_adapter *a = r->adapters; a != NULL; a = a->next)
            if (a->model == m && a->listed)
                pl_registry_show_adapter(r, a, fn, arg);
    }
    pthread_mutex_unlock(&r->lock);
}

pl_status pl_registry_no_model(const char *name, struct pl_err *err)
{
    return pl_fail_param(err, PL_ENOENT, "model", "The model '%.200s' does not exist", name);
}

pl_status pl_registry_info(struct pl_registry *r, const char *name, show *fn, void *arg, struct pl_err *err)
{
    pthread_mutex_lock(&r->lock);
    const struct pl_registry_adapter *a = pl_registry_adapter_of(r, name);
    const struct pl_registry_model *m = a == NULL ? model_of(r, name) : NULL;
    const bool there = a != NULL || (m != NULL && m->context > 0);
    if (a != NULL)
        pl_registry_show_adapter(r, a, fn, arg);
    else if (there)
        show_model(r, m, fn, arg);
    pthread_mutex_unlock(&r->lock);
    return there ? PL_OK : pl_registry_no_model(name, err);
}

void pl_registry_each_loaded(struct pl_registry *r, void (*fn)(void *arg, const char *name, struct pl_instance *m, uint64_t n_loads), void *arg)
{
    pthread_mutex_lock(&r->lock);
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next)
        if (m->instance != NULL && m->instance->engine != NULL)
            fn(arg, m->name, m->instance, m->n_loads);
    pthread_mutex_unlock(&r->lock);
}

const char *pl_registry_first(const struct pl_registry *r)
{
    return r->models->name;
}

bool pl_registry_healthy(struct pl_registry *r, int max_ms)
{
    bool healthy = true;
    pthread_mutex_lock(&r->lock);
    for (const struct pl_registry_model *m = r->models; m != NULL; m = m->next)
        healthy &= m->state != PL_MODEL_IN || pl_engine_healthy(m->instance->engine, max_ms);
    pthread_mutex_unlock(&r->lock);
    return healthy;
}

static struct pl_registry_model *base_of(const struct pl_registry *r, const char *id, const char *name)
{
    struct pl_registry_model *found = NULL;
    if (id == NULL)
        return name != NULL ? model_of(r, name) : r->models;
    for (struct pl_registry_model *m = r->models; m != NULL; m = m->next)
        if (strcmp(m->base_id, id) == 0 && !is_abandoned(r, m) && (found == NULL || (name != NULL && strcmp(m->name, name) == 0)))
            found = m;
    return found;
}

pl_status pl_registry_base(struct pl_registry *r, const char *id, const char *name, struct pl_base *b, struct pl_err *err)
{
    *b = (struct pl_base){0};
    pthread_mutex_lock(&r->lock);
    const struct pl_registry_model *m = base_of(r, id, name);
    if (m != NULL) {
        *b = (struct pl_base){
            .name = pl_xstrdup(m->name), .root = root_of(m->name), .path = pl_xstrdup(m->path), .template = copy_or_null(m->template), .made = m->made,
        };
        memcpy(b->id, m->base_id, sizeof b->id);
    }
    pthread_mutex_unlock(&r->lock);
    return m != NULL ? PL_OK : pl_registry_no_model(name != NULL ? name : "", err);
}

void pl_base_fini(struct pl_base *b)
{
    free(b->name);
    free(b->root);
    free(b->path);
    free(b->template);
    *b = (struct pl_base){0};
}

/* ---- changes ------------------------------------------------------------------------------------------------------- */

pl_status pl_registry_add_model(struct pl_registry *r, const char *name, const char *path, const char *template, const char *parent, struct pl_err *err)
{
    struct pl_registry_model *m = new_model(name, path, template, parent);
    pl_status st = check_ranks(r, name, err);
    if (st == PL_OK)
        st = pl_registry_probe(m, err);
    pthread_mutex_lock(&r->lock);
    if (st == PL_OK && model_of(r, name) == NULL) {
        m->listed = m->made = true;
        append_model(r, m);
        m = NULL;
    }
    pthread_mutex_unlock(&r->lock);
    if (m != NULL)
        free_model(m);
    return st;
}

/* The same model, on its way out of memory after it was deleted. */
static struct pl_registry_model *leaving_like(const struct pl_registry *r, const struct pl_registry_model *own)
{
    struct pl_registry_model *m = r->models;
    while (m != NULL && !(is_abandoned(r, m) && strcmp(m->base_id, own->base_id) == 0 && strcmp(m->name, own->name) == 0))
        m = m->next;
    return m;
}

static void append_made(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path, const char *own_base)
{
    struct pl_registry_adapter *a = append_adapter(r, m, name, path, true);
    a->made = true;
    a->own_base = copy_or_null(own_base);
}

pl_status pl_registry_add_adapter(struct pl_registry *r, const char *name, const char *path, const char *base_id, const char *base_name, const char *own_base,
                                  const char *template, struct pl_err *err)
{
    struct pl_registry_model *own = own_base != NULL ? new_model(base_name, own_base, template, NULL) : NULL;
    pl_status st = own != NULL ? pl_registry_probe(own, err) : PL_OK;
    pthread_mutex_lock(&r->lock);
    struct pl_registry_model *m = st == PL_OK ? base_of(r, own != NULL ? own->base_id : base_id, own != NULL || base_id != NULL ? base_name : NULL) : NULL;
    if (st == PL_OK && m == NULL && own != NULL && (m = leaving_like(r, own)) != NULL) {
        free(m->path);
        m->path = pl_xstrdup(own_base);
    }
    if (st == PL_OK && m == NULL && own != NULL)
        st = check_ranks(r, base_name, err);
    if (st == PL_OK && m == NULL && own != NULL) {
        m = own;
        m->made = true;
        append_model(r, m);
        own = NULL;
    }
    if (m == NULL && st == PL_OK)
        st = pl_fail_param(err, PL_ENOENT, "model", "none of this server's models is the one that '%.100s' belongs to", name);
    if (st == PL_OK && any_adapter_of(r, name) == NULL)
        append_made(r, m, name, path, own_base);
    pthread_mutex_unlock(&r->lock);
    if (own != NULL)
        free_model(own);
    return st;
}

bool pl_registry_is_of_first(struct pl_registry *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    const struct pl_registry_adapter *a = pl_registry_adapter_of(r, name);
    const bool yes = a != NULL && a->model->first;
    pthread_mutex_unlock(&r->lock);
    return yes;
}

/* Out of the list, and out of its instance if it is there. */
static void take_out(struct pl_registry *r, struct pl_registry_adapter *a)
{
    struct pl_err none;
    if (a->model->state == PL_MODEL_IN && pl_adapters_unload(a->model->instance->adapters, a->name, &none) == PL_OK)
        pl_log_debug("adapter %s leaves", a->name);
    pl_registry_forget_adapter(r, a);
}

/* A model that was deleted is read from a file of one of its adapters; without one they go with it. */
static void choose_own_base(struct pl_registry *r, struct pl_registry_model *m)
{
    for (const struct pl_registry_adapter *a = r->adapters; a != NULL; a = a->next)
        if (a->model == m && a->own_base != NULL) {
            free(m->path);
            m->path = pl_xstrdup(a->own_base);
            return;
        }
    for (struct pl_registry_adapter *a = r->adapters, *next; a != NULL; a = next) {
        next = a->next;
        if (a->model == m && a->listed)
            take_out(r, a);
    }
}

static void remove_adapter(struct pl_registry *r, struct pl_registry_adapter *a)
{
    struct pl_registry_model *m = a->model;
    take_out(r, a);
    if (!m->listed)
        choose_own_base(r, m);
}

/* Its adapters stay, and with them their own file of it. */
static void hide(struct pl_registry *r, struct pl_registry_model *m)
{
    m->listed = false;
    choose_own_base(r, m);
}

void pl_registry_remove(struct pl_registry *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    struct pl_registry_adapter *a = pl_registry_adapter_of(r, name);
    struct pl_registry_model *m = a == NULL ? model_of(r, name) : NULL;
    if (a != NULL)
        remove_adapter(r, a);
    if (m != NULL && m->made)
        hide(r, m);
    pl_registry_tidy(r);
    pthread_mutex_unlock(&r->lock);
}

pl_status pl_registry_reserve(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path, bool replace,
                              struct pl_registry_adapter **made, struct pl_err *err)
{
    const struct pl_registry_adapter *there = any_adapter_of(r, name);
    *made = NULL;
    if (model_of(r, name) != NULL)
        return pl_fail_param(err, PL_EINVAL, "lora_name", "'%.200s' is the base model's name, or another one's: give the adapter another one", name);
    if (there != NULL && (!replace || there->model != m))
        return pl_fail_param(err, PL_EINVAL, "lora_name", "an adapter named '%.200s' is there already: unload it first%s", name,
                             there->model == m ? ", or ask for it to be replaced" : "; it belongs to another model");
    if (there == NULL)
        *made = append_adapter(r, m, name, path, false);
    return PL_OK;
}

struct pl_registry_adapter *pl_registry_settle(struct pl_registry *r, struct pl_registry_model *m, const char *name, const char *path,
                                               struct pl_registry_adapter *made, pl_status *st, struct pl_err *err)
{
    struct pl_registry_adapter *a = made != NULL ? made : any_adapter_of(r, name);
    struct pl_err none;
    if (*st == PL_OK && (a == NULL || a->model != m || !m->listed)) { /* meanwhile */
        (void)!pl_adapters_unload(m->instance->adapters, name, &none);
        *st = pl_fail_param(err, PL_EINVAL, "lora_name", m->listed ? "adapter '%.200s' was deleted as it was replaced"
                                                                   : "the model of adapter '%.200s' was deleted as it was read", name);
    }
    if (*st == PL_OK && made == NULL) {
        free(a->path);
        a->path = pl_xstrdup(path);
        a->made = false;
    }
    if (*st == PL_OK)
        a->listed = true;
    else if (made != NULL)
        pl_registry_forget_adapter(r, made);
    return *st == PL_OK ? a : NULL;
}

pl_status pl_registry_unload_adapter(struct pl_registry *r, const char *name, struct pl_err *err)
{
    pthread_mutex_lock(&r->lock);
    struct pl_registry_adapter *a = pl_registry_adapter_of(r, name);
    if (a != NULL) {
        remove_adapter(r, a);
        pl_registry_tidy(r);
    }
    pthread_mutex_unlock(&r->lock);
    return a != NULL ? PL_OK : pl_fail_param(err, PL_ENOENT, "lora_name", "there is no adapter named '%.200s'", name);
}
