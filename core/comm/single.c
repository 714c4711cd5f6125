/* single: the communicator of a model that is whole: one rank, which has nothing to say to others.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/comm/comm.h"

static pl_status broadcast(struct pl_comm *c, void *bytes, size_t n)
{
    (void)c, (void)bytes, (void)n;
    return PL_OK;
}

static pl_status agree(struct pl_comm *c, int *value)
{
    (void)c, (void)value;
    return PL_OK;
}

static pl_status share(struct pl_comm *c, void *all, size_t n)
{
    (void)c, (void)all, (void)n;
    return PL_OK;
}

static pl_status check(struct pl_comm *c)
{
    (void)c;
    return PL_OK;
}

static pl_status all_reduce(struct pl_comm *c, struct pl_device *dev, pl_view v)
{
    (void)c, (void)dev, (void)v;
    return PL_OK;
}

static pl_status all_gather(struct pl_comm *c, struct pl_device *dev, pl_view v, const uint32_t *first)
{
    (void)c, (void)dev, (void)v, (void)first;
    return PL_OK;
}

static pl_status gather(struct pl_comm *c, struct pl_device *dev, pl_view out, pl_view part, const uint32_t *first)
{
    (void)c, (void)dev, (void)out, (void)part, (void)first;
    return PL_OK;
}

static void nothing(struct pl_comm *c)
{
    (void)c;
}

static void end_processes(struct pl_comm *c, int status)
{
    (void)c, (void)status;
}

static const struct pl_comm_ops single_ops = {
    .name = "single",
    .broadcast = broadcast,
    .share = share,
    .agree = agree,
    .check = check,
    .all_reduce = all_reduce,
    .all_gather = all_gather,
    .gather = gather,
    .give_up = nothing,
    .end_processes = end_processes,
    .close = nothing,
};

struct pl_comm pl_comm_single = {.ops = &single_ops, .size = 1, .local_size = 1, .sharing = 1};
