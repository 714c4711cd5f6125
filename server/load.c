/* load: everything between a model file and an engine that runs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/load.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/base/readfile.h"
#include "core/base/utf8.h"
#include "core/base/version.h"
#include "core/device/device.h"
#include "core/kv/kv.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/sched/adapters.h"
#include "core/sched/engine.h"
#include "core/sched/runner.h"
#include "core/text/chat.h"
#include "core/text/tok.h"
#include "server/ranks.h"
#include "server/server.h"

#define PL_LOG_MODULE "load"

struct pl_load {
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    struct pl_chat *chat;
    struct pl_ranks *ranks;
    struct pl_pool *pool;
    struct pl_device *device;
    struct pl_model *model;
    struct pl_engine *engine;
    struct pl_adapters *adapters;
};

/* choosing the file */

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

pl_status pl_load_choose(const struct pl_server *s, char **path, char **id, struct pl_err *err)
{
    const struct pl_config *c = s->config;
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
    if (c->alias[0] != '\0') {
        *id = pl_xstrdup(c->alias);
        return PL_OK;
    }
    const char *slash = strrchr(*path, '/');
    *id = pl_xstrdup(slash != NULL ? slash + 1 : *path);
    const size_t n = strlen(*id);
    if (n > 5 && strcmp(*id + n - 5, ".gguf") == 0)
        (*id)[n - 5] = '\0';
    if (!pl_utf8_valid(*id, strlen(*id))) {
        free(*id);
        free(*path);
        *path = *id = NULL;
        return pl_fail_param(err, PL_EINVAL, "alias", "the model file's name is not UTF-8: give it a name with --alias NAME");
    }
    return PL_OK;
}

/* what the fingerprint hashes */

static uint64_t fnv1a(uint64_t h, const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* fp_ + hash of the file (size, time, first 64 KiB: header and tensor table), build and kernels. */
static pl_status identify(struct pl_server *s, const char *path, const char *kernels, struct pl_err *err)
{
    enum { HEAD = 64 * 1024 };
    struct stat st;
    pl_status rc = PL_OK;
    char *head = pl_xmalloc(HEAD);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd >= 0 ? read(fd, head, HEAD) : -1;
    if (n < 0 || fstat(fd, &st) != 0) {
        rc = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
        goto out;
    }
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    h = fnv1a(h, &st.st_size, sizeof st.st_size);
    h = fnv1a(h, &st.st_mtim.tv_sec, sizeof st.st_mtim.tv_sec);
    h = fnv1a(h, head, (size_t)n);
    h = fnv1a(h, PL_VERSION, strlen(PL_VERSION));
    h = fnv1a(h, kernels, strlen(kernels));
    snprintf(s->fingerprint, sizeof s->fingerprint, "fp_%016llx", (unsigned long long)h);
    s->created = st.st_mtim.tv_sec;
out:
    if (fd >= 0)
        close(fd);
    free(head);
    return rc;
}

/* the parts */

static pl_status open_chat(struct pl_load *l, const struct pl_config *c, struct pl_err *err)
{
    struct pl_gguf_str own;
    if (c->chat_template[0] != '\0') {
        void *text = NULL;
        size_t n = 0;
        struct pl_err why = {0};
        pl_status rc = pl_readfile(&text, &n, c->chat_template, PL_CHAT_MAX_TEMPLATE, &why);
        rc = rc == PL_OK ? pl_chat_new(&l->chat, text, n, l->tok, err) : pl_fail_param(err, PL_EINVAL, "chat-template", "%s", why.msg);
        free(text);
        pl_log_info("chat template: %s", c->chat_template);
        return rc;
    }
    if (pl_gguf_string(l->gguf, "tokenizer.chat_template", &own) != PL_OK) {
        pl_log_warn("the model has no chat template: /v1/chat/completions will answer 400 (give one with --chat-template FILE)");
        return PL_OK;
    }
    struct pl_err why = {0};
    const pl_status rc = pl_chat_new(&l->chat, own.s, own.n, l->tok, &why);
    if (rc != PL_OK)
        return pl_fail(err, rc, "the model's chat template cannot be used: %s (give another one with --chat-template FILE)", why.msg);
    pl_log_info("chat template: the model's own, %llu bytes", (unsigned long long)own.n);
    return PL_OK;
}

pl_status pl_load_device(struct pl_device **out, const struct pl_config *c, struct pl_pool *pool, unsigned local_rank, struct pl_err *err)
{
    char own[32]; /* each rank of a machine takes a GPU of its own */
    snprintf(own, sizeof own, "cuda:%u", local_rank);
    return pl_device_open(out, local_rank > 0 && strcmp(c->device, "cuda") == 0 ? own : c->device, c->cuda_library, pool, err);
}

static pl_status open_device(struct pl_load *l, const struct pl_server *s, struct pl_err *err)
{
    pl_status rc = pl_pool_new(&l->pool, pl_ranks_threads(s->world, s->config), err);
    return rc == PL_OK ? pl_load_device(&l->device, s->config, l->pool, s->world != NULL ? s->world->local_rank : 0, err) : rc;
}

/* Weights that a device's own memory cannot take are refused before they are copied, with what would fit. */
static pl_status check_fit(const struct pl_load *l, struct pl_err *err)
{
    static const struct {
        const char *name;
        double bits; /* of a weight, with scales */
    } types[] = {{"Q8_0", 8.5}, {"Q6_K", 6.6}, {"Q5_K", 5.5}, {"Q4_K", 4.5}, {"Q3_K", 3.5}, {"Q2_K", 2.7}};
    size_t room, total, i = 0;
    double bytes = 0, weights = 0;
    if (l->device->ops->memory == NULL || l->device->ops->memory(l->device, &room, &total) != PL_OK)
        return PL_OK;
    for (size_t t = 0; t < pl_gguf_n_tensors(l->gguf); t++) {
        const struct pl_gguf_tensor *tensor = pl_gguf_tensor_at(l->gguf, t);
        bytes += (double)tensor->n_bytes;
        weights += (double)tensor->ne[0] * (double)tensor->ne[1] * (double)tensor->ne[2] * (double)tensor->ne[3];
    }
    const unsigned ranks = pl_ranks_comm(l->ranks)->size; /* each takes about its share */
    bytes /= ranks;
    weights /= ranks;
    if (bytes <= (double)room)
        return PL_OK;
    while (i < PL_COUNT_OF(types) && weights * types[i].bits / 8 > 0.9 * (double)room)
        i++;
    return pl_fail_param(err, PL_EINVAL, "device",
                         "%s has %zu of %zu MiB free, the model's weights take %.0f: %s%s, take a larger GPU, more ranks, or --device cpu",
                         l->device->ops->name, room >> 20, total >> 20, bytes / 1048576,
                         i < PL_COUNT_OF(types) ? "a file of the same model would fit as " : "it does not fit in any type",
                         i < PL_COUNT_OF(types) ? types[i].name : "");
}

static pl_status choose_context(const struct pl_config *c, const struct pl_spec *spec, uint32_t *n, struct pl_err *err)
{
    *n = c->context > 0 ? (uint32_t)c->context : spec->n_ctx;
    if (*n > spec->n_ctx)
        return pl_fail_param(err, PL_EINVAL, "context", "context %u is more than the %u the model was trained for: lower --context or leave it out",
                             *n, spec->n_ctx);
    return PL_OK;
}

static pl_status open_engine(struct pl_load *l, const struct pl_server *s, struct pl_err *err)
{
    const struct pl_config *c = s->config;
    const struct pl_spec *spec = pl_model_spec(l->model);
    struct pl_engine_opts o = {
        .max_sequences = (uint32_t)c->max_sequences,
        .batch_tokens = (uint32_t)c->batch_tokens,
        .queue_limit = (uint32_t)c->queue_limit,
        .pool = l->pool,
        .lost = s->lost,
        .device_percent = (uint32_t)c->cuda_memory_percent,
    };
    if (!pl_kv_type(c->kv_type, &o.kv_dtype))
        return pl_fail_param(err, PL_EINVAL, "kv-type", "no cache type \"%s\": " PL_KV_TYPES, c->kv_type);
    pl_status rc = choose_context(c, spec, &o.max_context, err);
    if (rc != PL_OK)
        return rc;
    const struct pl_kv_shape page = pl_model_kv_shape(l->model, PL_KV_PAGE, 1, o.kv_dtype);
    const size_t page_bytes = l->device->ops->kv_bytes(l->device, &page);
    if (c->kv_cache_mb > 0) {
        const uint64_t n = (uint64_t)c->kv_cache_mb * 1024 * 1024 / page_bytes;
        if (n == 0)
            return pl_fail_param(err, PL_EINVAL, "kv-cache-mb", "one cache page takes %zu bytes: raise --kv-cache-mb", page_bytes);
        o.n_pages = n > UINT32_MAX ? UINT32_MAX : (uint32_t)n;
    }
    if (strcmp(c->speculation, "ngram") == 0) {
        o.max_draft = (uint32_t)c->max_draft;
        o.draft_sequences = (uint32_t)c->speculation_max_seqs;
    }
    rc = pl_engine_new_ranks(&l->engine, &o, l->device, l->model, pl_ranks_comm(l->ranks), l->tok, err);
    if (rc == PL_OK)
        rc = pl_engine_start(l->engine, err);
    if (rc != PL_OK)
        return rc;
    struct pl_engine_stats st;
    pl_engine_stats(l->engine, &st);
    pl_log_info("engine: %u sequences, %u tokens per iteration, context %u, cache %u pages of %u tokens in %s (%.0f MiB), queue %u",
                o.max_sequences, o.batch_tokens, pl_engine_max_context(l->engine), st.pages_total, PL_KV_PAGE, c->kv_type,
                (double)st.pages_total * (double)page_bytes / 1048576, o.queue_limit);
    return PL_OK;
}

/* Those that the configuration names. */
static pl_status open_adapters(struct pl_load *l, const struct pl_server *s, struct pl_err *err)
{
    const struct pl_config *c = s->config;
    pl_status rc = pl_adapters_new(&l->adapters, l->engine, l->model, s->model_id, (uint32_t)c->max_adapters, err);
    for (size_t i = 0; rc == PL_OK && i < c->adapter.n; i++) {
        struct pl_err cause = {0};
        const char *equals = strchr(c->adapter.values[i], '=');
        char *name = strndup(c->adapter.values[i], (size_t)(equals - c->adapter.values[i]));
        rc = name != NULL ? pl_adapters_load(l->adapters, name, equals + 1, false, &cause) : pl_fail(&cause, PL_ENOMEM, "out of memory");
        free(name);
        if (rc != PL_OK)
            rc = pl_fail_param(err, PL_EINVAL, "adapter", "adapter %.100s: %.400s", c->adapter.values[i], cause.msg);
    }
    return rc;
}

pl_status pl_load_open(struct pl_load **out, struct pl_server *s, const char *path, struct pl_err *err)
{
    const struct pl_config *c = s->config;
    struct pl_load *l = pl_xcalloc(1, sizeof *l);
    pl_status rc = pl_gguf_open(&l->gguf, path, err);
    if (rc == PL_OK)
        rc = pl_tok_load(&l->tok, l->gguf, err);
    if (rc == PL_OK)
        rc = open_chat(l, c, err);
    if (rc == PL_OK)
        rc = open_device(l, s, err);
    if (rc == PL_OK)
        rc = pl_ranks_open(&l->ranks, s->world, c, l->gguf, l->device, err);
    if (rc == PL_OK)
        rc = check_fit(l, err);
    if (rc == PL_OK)
        rc = identify(s, path, l->device->ops->name, err);
    if (rc == PL_OK)
        rc = pl_model_load_part(&l->model, l->gguf, l->device, pl_ranks_comm(l->ranks), (uint32_t)c->batch_tokens, (uint32_t)c->batch_tokens, err);
    if (rc != PL_OK)
        goto out;
    const struct pl_spec *spec = pl_model_spec(l->model);
    pl_log_info("model: %s (%s, %s), %.1f M parameters, %u layers, vocabulary %u, trained context %u, %s", path, spec->arch,
                spec->name[0] != '\0' ? spec->name : "no name", (double)pl_model_n_params(l->model) / 1e6, spec->n_layers,
                spec->n_vocab, spec->n_ctx, s->fingerprint);
    pl_log_info("device: %s, %u threads", l->device->ops->name, pl_pool_size(l->pool));
    if (pl_tok_count(l->tok) > (int64_t)spec->n_vocab) {
        rc = pl_fail(err, PL_EFORMAT, "the tokenizer has %d tokens but the model only %u rows for them: the file is inconsistent",
                     pl_tok_count(l->tok), spec->n_vocab);
        goto out;
    }
    rc = open_engine(l, s, err);
    if (rc == PL_OK)
        rc = open_adapters(l, s, err);
out:
    if (rc != PL_OK) {
        pl_load_close(l);
        return rc;
    }
    s->tok = l->tok;
    s->chat = l->chat;
    s->model = l->model;
    s->engine = l->engine;
    s->adapters = l->adapters;
    *out = l;
    return PL_OK;
}

void pl_load_stop_engine(struct pl_load *l, struct pl_server *s)
{
    if (l == NULL)
        return;
    pl_adapters_stop(l->adapters);
    pl_engine_free(l->engine);
    s->engine = NULL;
    l->engine = NULL;
}

void pl_load_close(struct pl_load *l)
{
    if (l == NULL)
        return;
    pl_adapters_stop(l->adapters);
    pl_engine_free(l->engine);
    pl_adapters_free(l->adapters);
    pl_model_free(l->model);
    if (l->device != NULL)
        l->device->ops->close(l->device);
    pl_pool_free(l->pool);
    pl_ranks_close(l->ranks);
    pl_chat_free(l->chat);
    pl_tok_free(l->tok);
    pl_gguf_close(l->gguf);
    free(l);
}
