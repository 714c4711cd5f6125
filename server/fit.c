/* fit: whether a model's weights fit into the memory there is.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/fit.h"

#include "core/base/buf.h"
#include "core/base/machine.h"
#include "core/base/mem.h"
#include "core/device/device.h"
#include "core/model/gguf.h"
#include "core/model/model.h"
#include "core/model/part.h"

enum { MIB = 1 << 20 };

struct need {
    double bytes, weights; /* of the whole model */
};

static struct need need_of(const struct pl_gguf *g)
{
    struct need n = {0, 0};
    for (size_t t = 0; t < pl_gguf_n_tensors(g); t++) {
        const struct pl_gguf_tensor *tensor = pl_gguf_tensor_at(g, t);
        n.bytes += (double)tensor->n_bytes;
        n.weights += (double)tensor->ne[0] * (double)tensor->ne[1] * (double)tensor->ne[2] * (double)tensor->ne[3];
    }
    return n;
}

/* The system would rather end the daemon than refuse memory, so that it is asked first. */
static pl_status check_host(const struct pl_fit *f, struct pl_err *err)
{
    const uint64_t free_bytes = pl_machine_memory();
    if (!f->further || f->n_bytes <= free_bytes)
        return PL_OK;
    return pl_fail(err, PL_ENOMEM, "no memory for this model: its weights take %llu MiB, %llu MiB are free", (unsigned long long)f->n_bytes / MIB,
                   (unsigned long long)free_bytes / MIB);
}

/* The first type of which a file would take at most `room`; NULL = there is none. */
static const char *smaller_type(double weights, double room)
{
    static const struct {
        const char *name;
        double bits; /* of a weight, with scales */
    } types[] = {{"Q8_0", 8.5}, {"Q6_K", 6.6}, {"Q5_K", 5.5}, {"Q4_K", 4.5}, {"Q3_K", 3.5}, {"Q2_K", 2.7}};
    for (size_t i = 0; i < PL_COUNT_OF(types); i++)
        if (weights * types[i].bits / 8 <= room)
            return types[i].name;
    return NULL;
}

/* The least number of ranks, with as many heads each, whose parts would take at most `room`; 0 = there is none. */
static unsigned more_ranks(const struct pl_fit *f, const struct pl_gguf *g, const struct pl_device *dev, double bytes, double room)
{
    struct pl_spec spec;
    struct pl_part part;
    struct pl_err none;
    unsigned arch;
    if (pl_model_check(&spec, &arch, NULL, g, &none) != PL_OK)
        return 0;
    for (unsigned n = f->ranks + 1; n <= spec.n_kv_heads; n++)
        if (spec.n_kv_heads % n == 0 && bytes / n <= room && pl_part_make(&part, &spec, arch, g, dev, 0, n, &none) == PL_OK)
            return n;
    return 0;
}

/* room, total: of the device, for one rank. */
static pl_status refuse(const struct pl_fit *f, const struct pl_gguf *g, struct pl_device *dev, const struct need *need, double room, double total,
                        struct pl_err *err)
{
    const double own = need->bytes / f->ranks, usable = 0.9 * room; /* what is worked in takes some too */
    const char *type = smaller_type(need->weights / f->ranks, usable);
    const unsigned n = more_ranks(f, g, dev, need->bytes, usable);
    struct pl_buf remedy;
    pl_buf_init(&remedy, 300);
    if (own <= 0.9 * total)
        pl_buf_adds(&remedy, "end what else uses the GPU (nvidia-smi lists it), ");
    if (type != NULL)
        pl_buf_addf(&remedy, "take a file of the same model as %s, ", type);
    if (n > 0)
        pl_buf_addf(&remedy, "%s%u on as many such GPUs, ", f->launched ? "start it with mpirun -n " : "cut it by --tensor-parallel ", n);
    pl_buf_adds(&remedy, "use a larger GPU, or --device cpu");
    const pl_status rc = pl_fail_param(err, PL_EINVAL, "device", "%s has %.0f of %.0f MiB free%s, the weights of the model take %.0f%s: %s", dev->ops->name,
                                       room / MIB, total / MIB, f->sharing > 1 ? " for each rank" : "", own / MIB, f->ranks > 1 ? " on each rank" : "",
                                       pl_buf_str(&remedy));
    pl_buf_fini(&remedy);
    return rc;
}

pl_status pl_fit_check(const struct pl_fit *f, const struct pl_gguf *g, struct pl_device *dev, struct pl_err *err)
{
    const struct need need = need_of(g);
    size_t free_bytes, total;
    if (dev->ops->memory == NULL)
        return check_host(f, err);
    if (dev->ops->memory(dev, &free_bytes, &total) != PL_OK)
        return PL_OK;
    const double room = (double)(free_bytes / f->sharing), bytes = need.bytes / f->ranks; /* each takes about its share */
    if (bytes <= room)
        return PL_OK;
    if (f->further)
        return pl_fail(err, PL_ENOMEM, "no memory for this model: its weights take %.0f MiB, %s has %.0f MiB free: lower --cuda-memory-percent or "
                       "--kv-cache-mb", bytes / MIB, dev->ops->name, room / MIB);
    return refuse(f, g, dev, &need, room, (double)(total / f->sharing), err);
}
