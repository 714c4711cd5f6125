/* room: how many pages a model's cache has.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/room.h"

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/machine.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"
#include "core/model/model.h"

#define PL_LOG_MODULE "engine"

enum { USUAL_TOKENS = 2048 /* of a sequence, where the cache's size is not set */, MIB = 1 << 20, SAFE_PERCENT = 95 /* of what is free, where one asks */ };

static uint64_t page_bytes_of(const struct pl_device *dev, const struct pl_model *model, pl_dtype dtype)
{
    const struct pl_kv_shape page = pl_model_kv_shape(model, PL_KV_PAGE, 1, dtype);
    return dev->ops->kv_bytes((struct pl_device *)dev, &page);
}

pl_status pl_room_page_bytes(uint64_t *n, const struct pl_device *dev, const struct pl_model *model, pl_dtype dtype, struct pl_err *err)
{
    *n = page_bytes_of(dev, model, dtype);
    return *n > 0 ? PL_OK : pl_fail_param(err, PL_EINVAL, "kv-type", "%s has no KV cache of type %s: take --kv-type q8_0 or f16", dev->ops->name,
                                          pl_kv_type_name(dtype));
}

static uint64_t pages_of(uint64_t n_tokens)
{
    return (n_tokens + PL_KV_PAGE - 1) / PL_KV_PAGE;
}

/* On the host, of what is free there; ranks of one machine share that. */
static uint64_t host_room(const struct pl_room_of *r, pl_dtype dtype)
{
    const struct pl_kv_shape part = pl_model_kv_part(r->model, PL_KV_PAGE, 1, dtype);
    return pl_machine_memory() / r->comm->local_size / r->dev->ops->kv_bytes(r->dev, &part);
}

/* A usual length for each of max_sequences, at least one whole context, at most half of free memory. */
static uint64_t useful_on_host(const struct pl_room_of *r, const struct pl_engine_opts *o)
{
    const uint64_t most = host_room(r, o->kv_dtype) / 2, longest = pages_of(o->max_context);
    const uint64_t usual = pages_of(o->max_context < USUAL_TOKENS ? o->max_context : USUAL_TOKENS);
    const uint64_t wanted = o->max_sequences * usual > longest ? o->max_sequences * usual : longest;
    return wanted < most ? wanted : most;
}

/* In `percent` of the device's memory, on the rank that has the least of it. */
static pl_status device_room(const struct pl_room_of *r, pl_dtype dtype, uint32_t percent, uint32_t *n, struct pl_err *err)
{
    const struct pl_room want = {.page_size = PL_KV_PAGE, .dtype = dtype, .percent = percent};
    const pl_status rc = r->comm->size > 1 ? pl_leader_room(r->leader, r->dev, r->model, &want, n) : pl_rank_room(r->comm, r->dev, r->model, &want, n);
    if (rc == PL_ERANK)
        return pl_fail(err, rc, "a rank was lost while its part of the model was loaded");
    return rc == PL_OK ? rc : pl_fail(err, rc, "%s does not say how much memory it has", r->dev->ops->name);
}

/* The type that takes less, which to propose; NULL = there is none. */
static const char *smaller_type(const struct pl_room_of *r, pl_dtype now, uint64_t *page_bytes)
{
    static const pl_dtype types[] = {PL_Q8_0, PL_F8};
    for (size_t i = 0; i < PL_COUNT_OF(types); i++)
        if ((*page_bytes = page_bytes_of(r->dev, r->model, types[i])) > 0 && *page_bytes < page_bytes_of(r->dev, r->model, now))
            return pl_kv_type_name(types[i]);
    return NULL;
}

static pl_status refuse_any(const struct pl_room_of *r, const struct pl_engine_opts *o, struct pl_err *err)
{
    size_t free_bytes = 0, total = 0;
    uint64_t less;
    const char *type = smaller_type(r, o->kv_dtype, &less);
    const bool all = o->n_pages > 0; /* a set size may take all that is left */
    (void)!r->dev->ops->memory(r->dev, &free_bytes, &total);
    return pl_fail_param(err, PL_EINVAL, all ? "kv-cache-mb" : "cuda-memory-percent",
                         "%s has %zu of %zu MiB left for the KV cache after the weights, too little for a cache of %d pages of %llu bytes: lower "
                         "--batch-tokens%s%s%s, take a more quantized file or a larger GPU, or --device cpu",
                         r->dev->ops->name, free_bytes / MIB, total / MIB, PL_ENGINE_MIN_PAGES,
                         (unsigned long long)page_bytes_of(r->dev, r->model, o->kv_dtype), type != NULL ? ", take --kv-type " : "", type != NULL ? type : "",
                         all ? "" : ", raise --cuda-memory-percent");
}

static pl_status fill_device(const struct pl_room_of *r, struct pl_engine_opts *o, uint64_t *wanted, struct pl_err *err)
{
    uint32_t n = 0;
    const pl_status rc = device_room(r, o->kv_dtype, o->device_percent, &n, err);
    if (rc != PL_OK)
        return rc;
    if (n < pages_of(o->max_context))
        pl_log_warn("%s has room for %llu tokens of KV cache, less than one context of %u: lower --context, take --kv-type q8_0 or raise --cuda-memory-percent",
                    r->dev->ops->name, (unsigned long long)n * PL_KV_PAGE, o->max_context);
    *wanted = n;
    return n >= PL_ENGINE_MIN_PAGES ? PL_OK : refuse_any(r, o, err);
}

/* n: pages that there is memory for. */
static pl_status refuse_size(const struct pl_room_of *r, const struct pl_engine_opts *o, uint64_t n, struct pl_err *err)
{
    const bool own = r->dev->ops->memory != NULL;
    const uint64_t page_bytes = page_bytes_of(r->dev, r->model, o->kv_dtype), wanted = o->n_pages, mb = n * page_bytes * SAFE_PERCENT / 100 / MIB;
    const uint64_t safe = mb * MIB / page_bytes * PL_KV_PAGE;
    uint64_t less;
    const char *type = smaller_type(r, o->kv_dtype, &less);
    struct pl_buf remedy;
    pl_buf_init(&remedy, 300);
    if (mb > 0)
        pl_buf_addf(&remedy, "lower --kv-cache-mb to %llu", (unsigned long long)mb);
    if (mb > 0 && safe < o->max_context)
        pl_buf_addf(&remedy, " and --context to %llu", (unsigned long long)safe);
    pl_buf_addf(&remedy, "%sleave --kv-cache-mb out%s", mb > 0 ? ", or " : "", own ? ", so that --cuda-memory-percent decides" : "");
    if (type != NULL)
        pl_buf_addf(&remedy, "; with --kv-type %s as many tokens take %llu MiB", type, (unsigned long long)((wanted * less + MIB - 1) / MIB));
    if (own)
        pl_buf_addf(&remedy, "; a lower --batch-tokens (now %u) leaves more", o->batch_tokens);
    const pl_status rc = pl_fail_param(err, PL_EINVAL, "kv-cache-mb", "no memory for a KV cache of %llu MiB, which is %llu tokens: %s%s has %llu MiB left for "
                                       "it, %llu tokens: %s", (unsigned long long)((wanted * page_bytes + MIB - 1) / MIB),
                                       (unsigned long long)(wanted * PL_KV_PAGE),
                                       own ? r->dev->ops->name : "this machine", own && r->comm->size > 1 ? ", with the other ranks' GPUs," : "",
                                       (unsigned long long)(n * page_bytes / MIB), (unsigned long long)(n * PL_KV_PAGE), pl_buf_str(&remedy));
    pl_buf_fini(&remedy);
    return rc;
}

/* What the operator has said. */
static pl_status check_size(const struct pl_room_of *r, const struct pl_engine_opts *o, struct pl_err *err)
{
    uint32_t on_device = 0;
    const bool own = r->dev->ops->memory != NULL;
    const pl_status rc = own ? device_room(r, o->kv_dtype, 100, &on_device, err) : PL_OK;
    const uint64_t n = own ? on_device : host_room(r, o->kv_dtype);
    if (rc != PL_OK || o->n_pages <= n)
        return rc;
    return own && n < PL_ENGINE_MIN_PAGES ? refuse_any(r, o, err) : refuse_size(r, o, n, err);
}

pl_status pl_room_pages(const struct pl_room_of *r, struct pl_engine_opts *o, struct pl_err *err)
{
    uint64_t wanted = o->n_pages, page_bytes;
    pl_status rc = pl_room_page_bytes(&page_bytes, r->dev, r->model, o->kv_dtype, err);
    if (rc == PL_OK && wanted > 0)
        rc = check_size(r, o, err);
    else if (rc == PL_OK && r->dev->ops->memory != NULL)
        rc = fill_device(r, o, &wanted, err);
    else if (rc == PL_OK)
        wanted = useful_on_host(r, o);
    if (rc != PL_OK)
        return rc;
    if (o->n_pages == 0 && o->max_pages > 0 && wanted > o->max_pages)
        wanted = o->max_pages;
    const uint64_t most = INT32_MAX / PL_KV_PAGE;
    if (wanted < PL_ENGINE_MIN_PAGES || wanted > most)
        return pl_fail_param(err, PL_EINVAL, "kv-cache-mb", "the KV cache would have %llu pages of %llu bytes, and %d to %llu are possible: %llu to %llu MiB",
                             (unsigned long long)wanted, (unsigned long long)page_bytes, PL_ENGINE_MIN_PAGES, (unsigned long long)most,
                             (unsigned long long)((page_bytes * PL_ENGINE_MIN_PAGES + MIB - 1) / MIB), (unsigned long long)(page_bytes * most / MIB));
    o->n_pages = (uint32_t)wanted;
    return PL_OK;
}
