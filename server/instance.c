/* instance: one model in memory, with everything that answers for it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/instance.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/base/version.h"
#include "config/config.h"
#include "core/device/device.h"
#include "core/kv/kv.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/sched/adapters.h"
#include "core/sched/engine.h"
#include "core/sched/room.h"
#include "core/sched/runner.h"
#include "server/fit.h"
#include "server/ranks.h"
#include "server/server.h"

#define PL_LOG_MODULE "model"

/* what the fingerprint hashes */

static uint64_t fnv1a(uint64_t h, const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* fp_ + hash of the file (size, time, first 64 KiB: header and tensor table), build and kernels. */
static pl_status identify(struct pl_instance *m, const char *path, struct pl_err *err)
{
    enum { HEAD = 64 * 1024 };
    const char *kernels = m->device->ops->name;
    const int64_t size = (int64_t)m->file.n_bytes;
    char *head = pl_xmalloc(HEAD);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd >= 0 ? read(fd, head, HEAD) : -1;
    pl_status rc = PL_OK;
    if (n >= 0) {
        uint64_t h = UINT64_C(0xcbf29ce484222325);
        h = fnv1a(h, &size, sizeof size);
        h = fnv1a(h, &m->file.created, sizeof m->file.created);
        h = fnv1a(h, head, (size_t)n);
        h = fnv1a(h, PL_VERSION, strlen(PL_VERSION));
        h = fnv1a(h, kernels, strlen(kernels));
        snprintf(m->fingerprint, sizeof m->fingerprint, "fp_%016llx", (unsigned long long)h);
    } else {
        rc = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    }
    if (fd >= 0)
        close(fd);
    free(head);
    return rc;
}

/* the device */

pl_status pl_instance_device(struct pl_device **out, const struct pl_config *c, struct pl_pool *pool, bool ranks, unsigned local_rank,
                             struct pl_err *err)
{
    char own[32]; /* each rank of a machine takes a GPU of its own */
    snprintf(own, sizeof own, "cuda:%u", local_rank);
    const char *name = local_rank > 0 && strcmp(c->device, "cuda") == 0 ? own : c->device;
    if (ranks && strcmp(name, "auto") == 0)
        name = "cpu"; /* ranks that find for themselves what there is could find different kinds */
    const pl_status rc = pl_device_open(out, name, c->cuda_library, pool, err);
    if (rc == PL_OK && (*out)->ops->record_set != NULL)
        (*out)->ops->record_set(*out, strcmp(c->cuda_graphs, "on") == 0);
    return rc;
}

/* the engine */

static pl_status choose_context(const struct pl_instance_opts *o, const struct pl_spec *spec, uint32_t *n, struct pl_err *err)
{
    const uint32_t wanted = (uint32_t)o->server->config->context;
    *n = wanted > 0 && (wanted < spec->n_ctx || !o->further) ? wanted : spec->n_ctx;
    if (*n > spec->n_ctx)
        return pl_fail_param(err, PL_EINVAL, "context", "context %u is more than the %u the model was trained for: lower --context or leave it out",
                             *n, spec->n_ctx);
    return PL_OK;
}

/* The first model's cache is as large as is said, or as it is useful; a further one's is as large as it is useful within its bound. */
static pl_status choose_pages(const struct pl_instance_opts *o, uint64_t page_bytes, struct pl_engine_opts *e, struct pl_err *err)
{
    const struct pl_config *c = o->server->config;
    const int mb = o->further ? c->model_kv_cache_mb : c->kv_cache_mb;
    const char *key = o->further ? "model-kv-cache-mb" : "kv-cache-mb";
    const uint64_t n = (uint64_t)mb * 1024 * 1024 / page_bytes;
    if (mb > 0 && n < PL_ENGINE_MIN_PAGES)
        return pl_fail_param(err, o->further ? PL_ENOPAGE : PL_EINVAL, key, "%s is %d, but the model's cache takes at least %d pages of %llu bytes: raise it "
                             "to %llu", key, mb, PL_ENGINE_MIN_PAGES, (unsigned long long)page_bytes,
                             (unsigned long long)((page_bytes * PL_ENGINE_MIN_PAGES + (1 << 20) - 1) >> 20));
    *(o->further ? &e->max_pages : &e->n_pages) = n > UINT32_MAX ? UINT32_MAX : (uint32_t)n;
    return PL_OK;
}

/* The engine found less than a cache's least pages to be had, which is told as a fault of these settings. */
static bool is_short_of_memory(const struct pl_err *err)
{
    return strcmp(err->param, "kv-cache-mb") == 0 || strcmp(err->param, "cuda-memory-percent") == 0;
}

static pl_status open_engine(struct pl_instance *m, const struct pl_instance_opts *o, struct pl_err *err)
{
    const struct pl_config *c = o->server->config;
    struct pl_engine_opts e = {
        .max_sequences = (uint32_t)c->max_sequences,
        .batch_tokens = (uint32_t)c->batch_tokens,
        .gap_ms = (uint32_t)c->stream_gap_ms,
        .queue_limit = (uint32_t)c->queue_limit,
        .pool = o->pool,
        .lost = o->server->lost,
        .device_percent = (uint32_t)(o->further ? (c->cuda_memory_percent + 1) / 2 : c->cuda_memory_percent), /* what models take as they work has a place */
    };
    if (!pl_kv_type(c->kv_type, &e.kv_dtype))
        return pl_fail_param(err, PL_EINVAL, "kv-type", "no cache type \"%s\": " PL_KV_TYPES, c->kv_type);
    pl_status rc = choose_context(o, &m->file.spec, &e.max_context, err);
    if (rc != PL_OK)
        return rc;
    uint64_t page_bytes;
    if ((rc = pl_room_page_bytes(&page_bytes, m->device, m->model, e.kv_dtype, err)) != PL_OK || (rc = choose_pages(o, page_bytes, &e, err)) != PL_OK)
        return rc;
    if (strcmp(c->speculation, "ngram") == 0) {
        e.max_draft = (uint32_t)c->max_draft;
        e.draft_sequences = (uint32_t)c->speculation_max_seqs;
    }
    rc = pl_engine_new_ranks(&m->engine, &e, m->device, m->model, pl_ranks_comm(m->ranks), m->tok, err);
    if (rc == PL_EINVAL && o->further && is_short_of_memory(err)) /* others may leave for it */
        rc = err->code = PL_ENOMEM;
    if (rc == PL_OK)
        rc = pl_engine_start(m->engine, err);
    if (rc != PL_OK)
        return rc;
    struct pl_engine_stats st;
    pl_engine_stats(m->engine, &st);
    pl_log_info("engine: %u sequences, %u tokens per iteration, context %u, cache %u pages of %u tokens in %s (%.0f MiB), queue %u",
                e.max_sequences, e.batch_tokens, pl_engine_max_context(m->engine), st.pages_total, PL_KV_PAGE, c->kv_type,
                (double)st.pages_total * (double)page_bytes / 1048576, e.queue_limit);
    return PL_OK;
}

/* the whole */

static void describe(const struct pl_instance *m, const struct pl_instance_opts *o)
{
    const struct pl_spec *spec = &m->file.spec;
    pl_log_info("model %s: %s (%s, %s), %.1f M parameters, %u layers, vocabulary %u, trained context %u, %s", o->id, o->path, spec->arch,
                spec->name[0] != '\0' ? spec->name : "no name", (double)m->file.n_params / 1e6, spec->n_layers, spec->n_vocab, spec->n_ctx,
                m->fingerprint);
    if (o->template != NULL && o->template[0] != '\0')
        pl_log_info("chat template: %s", o->template);
    else if (m->chat != NULL)
        pl_log_info("chat template: the model's own");
    else
        pl_log_warn("the model has no chat template: /v1/chat/completions will answer 400 (give one with --chat-template FILE)");
    pl_log_info("device: %s, %u threads", m->device->ops->name, pl_pool_size(o->pool));
}

pl_status pl_instance_open(struct pl_instance **out, const struct pl_instance_opts *o, struct pl_err *err)
{
    const struct pl_config *c = o->server->config;
    struct pl_comm *world = o->server->world;
    struct pl_instance *m = pl_xcalloc(1, sizeof *m);
    pl_status rc = pl_model_file_open(&m->file, o->path, o->template, "chat-template", err);
    m->tok = m->file.tok;
    m->chat = m->file.chat;
    if (rc == PL_OK)
        rc = pl_instance_device(&m->device, c, o->pool, world != NULL || c->tensor_parallel > 1, world != NULL ? world->local_rank : 0, err);
    struct pl_fit fit = {.ranks = pl_ranks_count(world, c), .sharing = 1, .launched = world != NULL, .further = o->further, .n_bytes = m->file.n_bytes};
    if (rc == PL_OK)
        rc = pl_fit_check(&fit, m->file.gguf, m->device, err); /* ahead of the other ranks, whose exchange takes memory too */
    if (rc == PL_OK)
        rc = pl_ranks_open(&m->ranks, world, c, m->file.gguf, m->device, err);
    if (rc == PL_OK && (fit.sharing = pl_ranks_comm(m->ranks)->sharing) > 1)
        rc = pl_fit_check(&fit, m->file.gguf, m->device, err);
    if (rc == PL_OK)
        rc = identify(m, o->path, err);
    if (rc == PL_OK)
        rc = pl_model_load_part(&m->model, m->file.gguf, m->device, pl_ranks_comm(m->ranks), (uint32_t)c->batch_tokens, (uint32_t)c->batch_tokens, err);
    if (rc == PL_OK && c->max_adapters > 0)
        rc = pl_model_reserve_adapters(m->model, err);
    if (rc == PL_ENOMEM && !o->further && err->param[0] != '\0')
        rc = err->code = PL_EINVAL; /* the first model's settings are wrong for this machine: starting again does not help */
    if (rc == PL_OK) {
        describe(m, o);
        rc = open_engine(m, o, err);
    }
    if (rc == PL_OK)
        rc = pl_adapters_new(&m->adapters, m->engine, m->model, o->id, (uint32_t)c->max_adapters, err);
    if (rc != PL_OK) {
        pl_instance_close(m);
        return rc;
    }
    *out = m;
    return PL_OK;
}

void pl_instance_stop(struct pl_instance *m)
{
    pl_adapters_stop(m->adapters);
    pl_engine_free(m->engine);
    m->engine = NULL;
}

void pl_instance_close(struct pl_instance *m)
{
    if (m == NULL)
        return;
    pl_instance_stop(m);
    pl_adapters_free(m->adapters);
    pl_model_free(m->model);
    if (m->device != NULL)
        m->device->ops->close(m->device);
    if (pl_ranks_close(m->ranks))
        pl_model_file_close(&m->file);
    free(m);
}
