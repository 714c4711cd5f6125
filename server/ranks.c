/* ranks: the other ranks of a model that is cut over several.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/ranks.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config/config.h"
#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/comm/link.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/model/part.h"
#include "core/sched/ranks.h"
#include "server/fit.h"
#include "server/instance.h"

#define PL_LOG_MODULE "ranks"

/* A rank other than 0. */
struct member {
    const struct pl_config *config; /* borrowed, like what follows */
    const struct pl_gguf *gguf;
    struct pl_comm *host;
    struct pl_comm *comm; /* host, or the devices' own */
    unsigned n_threads;
    pthread_t thread;
    struct pl_pool *pool;
    struct pl_device *device;
    struct pl_model *model;
};

struct pl_ranks {
    struct pl_comm *host, *comm;          /* rank 0's; comm: host, or the devices' own */
    struct pl_comm *comms[PL_LINK_RANKS]; /* [size], of threads; comms[0] NULL = processes */
    struct member members[PL_LINK_RANKS]; /* [1 .. size) of threads */
    unsigned n_started;
};

/* ---- any rank but 0 ------------------------------------------------------------------------------------------------ */

static pl_exchange exchange_of(const struct pl_config *c)
{
    return strcmp(c->rank_exchange, "nccl") == 0 ? PL_EXCHANGE_DEVICES : strcmp(c->rank_exchange, "host") == 0 ? PL_EXCHANGE_HOST : PL_EXCHANGE_AUTO;
}

static pl_status open_device(struct member *m, struct pl_err *err)
{
    struct pl_err why = {0};
    pl_status rc = pl_pool_new(&m->pool, m->n_threads, &why);
    if (rc == PL_OK)
        rc = pl_instance_device(&m->device, m->config, m->pool, true, m->host->local_rank, &why);
    if (rc == PL_OK)
        return rc;
    const char *more = strcmp(m->config->device, "cuda") != 0 ? "" : " (each rank takes a GPU of its own: start as many ranks as there are GPUs, "
                                                                     "or let them share one with --device cuda:0)";
    return pl_fail_param(err, rc, why.param, "%.320s%s", why.msg, more);
}

static void free_part(struct member *m)
{
    pl_model_free(m->model);
    if (m->device != NULL)
        m->device->ops->close(m->device);
    pl_pool_free(m->pool);
}

/* loaded: how it went until here. What fails later loses a rank, whatever it is. */
static pl_status live(struct member *m, pl_status loaded, struct pl_err *err)
{
    const uint32_t batch = (uint32_t)m->config->batch_tokens;
    const struct pl_fit fit = {.ranks = m->host->size, .sharing = 1, .launched = pl_config_launched(m->config)};
    if (loaded == PL_OK)
        loaded = open_device(m, err);
    if (loaded == PL_OK)
        loaded = pl_fit_check(&fit, m->gguf, m->device, err);
    loaded = pl_ranks_meet(&m->comm, m->host, m->device, exchange_of(m->config), loaded, err);
    if (loaded == PL_ESTOPPED) {
        free_part(m);
        return PL_OK;
    }
    const bool met = loaded == PL_OK; /* else rank 0 says why not */
    if (met)
        loaded = pl_model_load_part(&m->model, m->gguf, m->device, m->comm, batch, batch, err);
    if (loaded == PL_OK && m->config->max_adapters > 0)
        loaded = pl_model_reserve_adapters(m->model, err);
    if (met && loaded == PL_ENOMEM)
        loaded = err->code = PL_EINVAL; /* as for rank 0: starting again does not help */
    if (loaded == PL_OK)
        pl_log_info("rank %u of %u: %s, %u threads", m->comm->rank, m->comm->size, m->device->ops->name, pl_pool_size(m->pool));
    else if (met || loaded == PL_ERANK)
        pl_log_error("rank %u of %u: %s", m->comm->rank, m->comm->size, err->msg);
    const pl_status rc = pl_rank_follow(m->comm, m->device, loaded == PL_OK ? m->model : NULL, loaded);
    free_part(m);
    return loaded != PL_OK ? loaded : rc != PL_OK ? PL_ERANK : PL_OK;
}

static void *member_main(void *arg)
{
    struct member *m = arg;
    struct pl_err err = {0};
    const pl_status rc = live(m, PL_OK, &err);
    (void)rc; /* rank 0 has learned of it */
    return NULL;
}

/* ---- processes ----------------------------------------------------------------------------------------------------- */

pl_status pl_ranks_join(struct pl_comm **world, const struct pl_config *c, struct pl_err *err)
{
    *world = NULL;
    if (!pl_config_launched(c))
        return PL_OK;
    pl_status rc = pl_comm_mpi_open(world, NULL, c->rank_timeout * 1000, err);
    if (rc != PL_OK)
        return rc;
    const unsigned size = (*world)->size;
    if (c->tensor_parallel > 1 && (unsigned)c->tensor_parallel != size)
        rc = pl_fail_param(err, PL_EINVAL, "tensor-parallel", "tensor-parallel is %d, but %u processes were started: leave it out, or start as many",
                           c->tensor_parallel, size);
    if (rc != PL_OK) {
        (*world)->ops->close(*world);
        *world = NULL;
    }
    return rc;
}

void pl_ranks_leave(struct pl_comm *world)
{
    if (world == NULL)
        return;
    if (world->rank == 0)
        pl_ranks_stop(world);
    world->ops->close(world);
}

pl_status pl_ranks_follow(struct pl_comm *world, const struct pl_config *c, const char *path, pl_status chosen, struct pl_err *err)
{
    struct member m = {.config = c, .host = world, .n_threads = pl_ranks_threads(world, c)};
    struct pl_gguf *gguf = NULL;
    const pl_status opened = chosen == PL_OK ? pl_gguf_open(&gguf, path, err) : chosen;
    m.gguf = gguf;
    const pl_status rc = live(&m, opened, err);
    pl_gguf_close(gguf);
    if (rc == PL_ERANK && world->silent != 0)
        sleep(PL_RANKS_GRACE_MS / 1000);
    return rc;
}

/* ---- rank 0 -------------------------------------------------------------------------------------------------------- */

static unsigned share_of(unsigned n, unsigned size)
{
    return n / size > 0 ? n / size : 1;
}

unsigned pl_ranks_count(const struct pl_comm *world, const struct pl_config *c)
{
    return world != NULL ? world->size : (unsigned)c->tensor_parallel;
}

unsigned pl_ranks_threads(const struct pl_comm *world, const struct pl_config *c)
{
    const unsigned cpus = pl_pool_cpus(), size = (unsigned)c->tensor_parallel;
    if (world == NULL)
        return size > 1 ? share_of(c->threads > 0 ? (unsigned)c->threads : cpus, size) : (unsigned)c->threads;
    if (c->threads > 0)
        return (unsigned)c->threads;
    /* A process that the launcher has bound to some processors has these for itself. */
    const long all = sysconf(_SC_NPROCESSORS_ONLN);
    return all > 0 && cpus < (unsigned)all ? cpus : share_of(cpus, world->local_size);
}

static pl_status start_threads(struct pl_ranks *r, const struct pl_config *c, const struct pl_gguf *g, struct pl_err *err)
{
    const unsigned size = (unsigned)c->tensor_parallel, n_threads = pl_ranks_threads(NULL, c);
    pl_status rc = pl_comm_threads_new(r->comms, size, c->rank_timeout * 1000, err);
    if (rc != PL_OK)
        return rc;
    r->host = r->comm = r->comms[0];
    for (unsigned i = 1; i < size && rc == PL_OK; i++) {
        struct member *m = &r->members[i];
        *m = (struct member){.config = c, .gguf = g, .host = r->comms[i], .n_threads = n_threads};
        if (pthread_create(&m->thread, NULL, member_main, m) != 0)
            rc = pl_fail(err, PL_ENOMEM, "cannot start the thread of rank %u", i);
        r->n_started += rc == PL_OK;
    }
    if (rc != PL_OK) /* no engine will tell those that have started */
        r->host->ops->give_up(r->host);
    return rc;
}

pl_status pl_ranks_open(struct pl_ranks **out, struct pl_comm *world, const struct pl_config *c, const struct pl_gguf *g,
                        struct pl_device *dev, struct pl_err *err)
{
    const unsigned size = pl_ranks_count(world, c);
    struct pl_spec spec;
    struct pl_part part;
    unsigned arch;
    pl_status rc = pl_model_check(&spec, &arch, NULL, g, err);
    if (rc == PL_OK)
        rc = pl_part_make(&part, &spec, arch, g, dev, 0, size, err);
    if (rc != PL_OK)
        return rc;
    struct pl_ranks *r = *out = pl_xcalloc(1, sizeof *r);
    r->host = r->comm = world != NULL ? world : &pl_comm_single;
    if (world == NULL && size > 1)
        rc = start_threads(r, c, g, err);
    if (rc == PL_OK && size > 1)
        rc = pl_ranks_meet(&r->comm, r->host, dev, exchange_of(c), PL_OK, err);
    if (rc == PL_OK && size > 1)
        pl_log_info("tensor parallel: %u ranks, %s; %s; exchange %s", size, world != NULL ? "processes" : "threads",
                    part.sums ? "products are summed" : "parts are gathered, so that results are those of one rank",
                    r->comm != r->host ? "by NCCL" : dev->ops->links == NULL ? "in memory" : "through the host's memory");
    return rc;
}

struct pl_comm *pl_ranks_comm(struct pl_ranks *r)
{
    return r->comm;
}

/* False: some stand still, and have not ended within the time that a rank has to answer. */
static bool join_threads(struct pl_ranks *r)
{
    const struct timespec until = pl_time_after_ms(r->host->timeout_ms);
    bool all = true;
    for (unsigned i = 1; i <= r->n_started; i++)
        if (pthread_clockjoin_np(r->members[i].thread, NULL, CLOCK_MONOTONIC, &until) != 0) {
            pl_log_error("rank %u does not end: it is left where it stands", i);
            all = false;
        }
    return all;
}

bool pl_ranks_close(struct pl_ranks *r)
{
    if (r == NULL)
        return true;
    if (r->comms[0] != NULL) {
        pl_ranks_stop(r->host); /* comm may have gone with its device */
        if (!join_threads(r))
            return false;
        for (unsigned i = 0; i < PL_LINK_RANKS && r->comms[i] != NULL; i++)
            r->comms[i]->ops->close(r->comms[i]);
    }
    free(r);
    return true;
}
