/* meet: ranks tell each other what they compute on, and agree on how they exchange activations. Everybody has the same cards to look
 * at, and so comes to the same end.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/comm/comm.h"

#define PL_LOG_MODULE "comm"

struct card { /* of a rank */
    int32_t status, exchange;
    bool can_link, linked; /* its device knows of links; what these take is installed, in `version` */
    uint32_t version;
    struct pl_device_id id;
    char param[64], why[512]; /* of status, or why it is not linked */
};

static void keep(struct card *c, const struct pl_err *err)
{
    snprintf(c->param, sizeof c->param, "%s", err->param);
    snprintf(c->why, sizeof c->why, "%s", err->msg);
}

static void fill(struct card *c, struct pl_device *dev, pl_exchange exchange, pl_status own, const struct pl_err *err)
{
    struct pl_err why = {0};
    c->status = own;
    c->exchange = exchange;
    if (own != PL_OK) {
        keep(c, err);
        return;
    }
    c->can_link = dev->ops->links != NULL;
    snprintf(c->id.name, sizeof c->id.name, "%s", dev->ops->name);
    if (!c->can_link)
        return;
    dev->ops->links->identify(dev, &c->id);
    if (exchange == PL_EXCHANGE_HOST)
        return;
    c->linked = dev->ops->links->find(dev, &c->version, &why) == PL_OK;
    if (!c->linked)
        keep(c, &why);
}

static pl_status refuse(const struct pl_comm *host, const struct card *cards, unsigned r, const char *param, pl_status code, struct pl_err *err)
{
    char why[sizeof cards[r].why];
    snprintf(why, sizeof why, "%s", cards[r].why); /* which may be err's own */
    if (r == host->rank)
        return pl_fail_param(err, code, param, "%s", why);
    return pl_fail_param(err, code, param, "rank %u of %u: %.450s", r, host->size, why);
}

/* The first two ranks on one device; false when there are none. */
static bool find_shared(const struct card *cards, unsigned size, unsigned *a, unsigned *b)
{
    for (*a = 0; *a < size; (*a)++)
        for (*b = *a + 1; *b < size; (*b)++)
            if (cards[*a].can_link && memcmp(cards[*a].id.unique, cards[*b].id.unique, sizeof cards[*a].id.unique) == 0)
                return true;
    return false;
}

/* Whether all can compute together. On GPUs of different kinds a row's bits would depend on who computes it. */
static pl_status compare(const struct pl_comm *host, const struct card *cards, struct pl_err *err)
{
    for (unsigned r = 0; r < host->size; r++)
        if (cards[r].status != PL_OK)
            return refuse(host, cards, r, cards[r].param, cards[r].status, err);
    for (unsigned r = 1; r < host->size; r++)
        if (cards[r].can_link != cards[0].can_link)
            return pl_fail_param(err, PL_EINVAL, "device", "rank 0 computes on %s, rank %u on %s: all ranks need a device of the same kind: take "
                                 "--device cpu, or cuda where every machine has GPUs", cards[0].id.name, r, cards[r].id.name);
    for (unsigned r = 1; r < host->size; r++)
        if (cards[r].id.arch != cards[0].id.arch) {
            const struct pl_device_id *a = &cards[0].id, *b = &cards[r].id;
            return pl_fail_param(err, PL_EINVAL, "device", "rank 0 computes on %s of compute capability %u.%u, rank %u on %s of %u.%u: ranks need GPUs of one "
                                 "kind: choose equal ones with CUDA_VISIBLE_DEVICES, or start fewer ranks",
                                 a->name, a->arch / 10, a->arch % 10, r, b->name, b->arch / 10, b->arch % 10);
        }
    return PL_OK;
}

/* *use: the devices' own links. */
static pl_status choose(const struct pl_comm *host, const struct card *cards, bool *use, struct pl_err *err)
{
    const pl_exchange exchange = (pl_exchange)cards[0].exchange;
    unsigned a = 0, b = 0;
    const bool shared = find_shared(cards, host->size, &a, &b);
    *use = exchange != PL_EXCHANGE_HOST && cards[0].can_link && !shared;
    if (exchange == PL_EXCHANGE_DEVICES && !cards[0].can_link)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "rank-exchange is nccl, but ranks compute on %s: take --device cuda, or --rank-exchange auto",
                             cards[0].id.name);
    if (exchange == PL_EXCHANGE_DEVICES && shared)
        return pl_fail_param(err, PL_EINVAL, "rank-exchange", "rank-exchange is nccl, but ranks %u and %u share %s, and NCCL wants a GPU for each rank: start "
                             "fewer ranks, or take --rank-exchange host", a, b, cards[a].id.name);
    for (unsigned r = 0; r < host->size && *use; r++) {
        if (!cards[r].linked)
            return refuse(host, cards, r, cards[r].param, PL_EINVAL, err);
        if (cards[r].version != cards[0].version)
            return pl_fail_param(err, PL_EINVAL, "rank-exchange", "rank 0 has NCCL %u, rank %u has %u: install the same on all machines, or take "
                                 "--rank-exchange host", cards[0].version, r, cards[r].version);
    }
    return PL_OK;
}

static unsigned count_sharing(const struct card *cards, unsigned size, unsigned rank)
{
    unsigned n = 0;
    for (unsigned r = 0; r < size; r++)
        n += r == rank || (cards[r].can_link && memcmp(cards[r].id.unique, cards[rank].id.unique, sizeof cards[r].id.unique) == 0);
    return n;
}

static pl_status open_links(struct pl_comm **out, struct pl_comm *host, struct pl_device *dev, struct pl_err *err)
{
    const pl_status own = dev->ops->links->open(dev, host, out, err);
    int all = own;
    if (own != PL_OK && host->rank > 0)
        pl_log_error("%s", err->msg); /* rank 0 cannot say more than that one was lost */
    if (own == PL_ERANK)
        return own;
    const pl_status rc = host->ops->agree(host, &all);
    if (own == PL_OK && rc != PL_OK)
        return pl_fail(err, rc, "a rank was lost while ranks met");
    if (all == PL_OK)
        return PL_OK;
    *out = host;
    return own != PL_OK ? own : pl_fail_param(err, PL_EINVAL, "rank-exchange", "not every rank could start NCCL; its log has the reason");
}

pl_status pl_comm_meet(struct pl_comm **out, struct pl_comm *host, struct pl_device *dev, pl_exchange exchange, pl_status own, struct pl_err *err)
{
    bool use = false;
    *out = host;
    struct card *cards = calloc(host->size, sizeof *cards);
    if (cards == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for what ranks tell each other"); /* and the others notice that this one does not come */
    fill(&cards[host->rank], dev, exchange, own, err);
    pl_status rc = host->ops->share(host, cards, sizeof *cards);
    if (rc != PL_OK)
        rc = pl_fail(err, rc, "ranks could not meet: %s", pl_status_text(rc));
    if (rc == PL_OK)
        rc = compare(host, cards, err);
    if (rc == PL_OK)
        rc = choose(host, cards, &use, err);
    if (rc == PL_OK) {
        host->sharing = count_sharing(cards, host->size, host->rank);
        rc = use ? open_links(out, host, dev, err) : PL_OK;
    }
    free(cards);
    return rc;
}
