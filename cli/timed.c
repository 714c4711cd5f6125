/* timed: writes down when each operation of a device begins and ends.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cli/timed.h"

#include <stdlib.h>

#include "core/base/clock.h"

const char *const timed_names[] = {
#define X(op) #op,
    TIMED_OPS(X)
#undef X
    "step",
};

static struct timed *of(const struct pl_device *dev)
{
    return (struct timed *)(uintptr_t)dev->ops;
}

static pl_status note(struct timed *t, uint64_t start, pl_status st, struct timed_span s)
{
    s.end = pl_now_ns();
    s.start = start;
    if (t->n == t->cap)
        t->full = true;
    else
        t->log[t->n++] = s;
    return st;
}

/* Forwards an operation; what follows are the span's fields. */
#define FORWARD(name, args, ...)                                                                                       \
    struct timed *t = of(dev);                                                                                         \
    uint64_t start = pl_now_ns();                                                                                      \
    pl_status st = t->real->name args;                                                                                 \
    return note(t, start, st, (struct timed_span){.op = TIMED_##name, __VA_ARGS__})

static pl_status embed(struct pl_device *dev, pl_view out, const struct pl_weight *w, const uint32_t *idx, bool add)
{
    FORWARD(embed, (dev, out, w, idx, add), .w = w, .rows = out.rows, .cols = out.cols);
}

static pl_status norm(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    FORWARD(norm, (dev, kind, out, x, gain, bias, eps), .rows = out.rows, .cols = out.cols);
}

static pl_status matmul(struct pl_device *dev, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias, bool add)
{
    FORWARD(matmul, (dev, out, x, w, bias, add), .w = w, .rows = out.rows, .cols = out.cols, .inner = x.cols);
}

static pl_status kv_write(struct pl_device *dev, struct pl_kvdev *kv, uint32_t layer, const struct pl_rotation *r, pl_view q, pl_view k, pl_view v,
                          const struct pl_batch *b)
{
    const uint32_t rotated = r == NULL || r->kind == PL_ROPE_NONE ? 0 : q.cols;
    FORWARD(kv_write, (dev, kv, layer, r, q, k, v, b), .rows = k.rows, .cols = rotated + k.cols + v.cols);
}

static pl_status attn(struct pl_device *dev, pl_view out, pl_view q, const struct pl_kvdev *kv, uint32_t layer, float scale,
                      const struct pl_batch *b)
{
    uint64_t scores = 0, cells = 0;
    for (uint32_t s = 0; s < b->n_seqs; s++) {
        uint64_t n = b->q_start[s + 1] - b->q_start[s], before = b->ctx[s] - n;
        scores += n * before + n * (n + 1) / 2;
        cells += b->ctx[s];
    }
    FORWARD(attn, (dev, out, q, kv, layer, scale, b), .rows = out.rows, .cols = out.cols, .scores = scores, .cells = cells);
}

static pl_status matmul_glu(struct pl_device *dev, pl_act_kind kind, pl_view out, pl_view x, const struct pl_weight *w, pl_view bias,
                            const struct pl_plus *plus)
{
    FORWARD(matmul_glu, (dev, kind, out, x, w, bias, plus), .w = w, .rows = out.rows, .cols = 2 * out.cols, .inner = x.cols);
}

static pl_status act(struct pl_device *dev, pl_act_kind kind, pl_view x)
{
    FORWARD(act, (dev, kind, x), .rows = x.rows, .cols = x.cols);
}

static pl_status gather(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows)
{
    FORWARD(gather, (dev, out, x, rows), .rows = out.rows, .cols = out.cols);
}

static pl_status lora(struct pl_device *dev, pl_view out, pl_view x, const struct pl_lora_use *uses, size_t n_uses, bool add)
{
    FORWARD(lora, (dev, out, x, uses, n_uses, add), .rows = out.rows, .cols = out.cols, .inner = x.cols);
}

static pl_status step_begin(struct pl_device *dev, const struct pl_batch *b)
{
    struct timed *t = of(dev);
    t->step_start = pl_now_ns();
    return t->real->step_begin(dev, b);
}

static pl_status step_end(struct pl_device *dev)
{
    struct timed *t = of(dev);
    pl_status st = t->real->step_end(dev);
    return note(t, t->step_start, st, (struct timed_span){.op = TIMED_STEP});
}

struct timed *timed_begin(struct pl_device *dev, size_t cap)
{
    struct timed *t = calloc(1, sizeof *t);
    if (t == NULL || (t->log = calloc(cap, sizeof *t->log)) == NULL) {
        free(t);
        return NULL;
    }
    t->dev = dev;
    t->real = dev->ops;
    t->ops = *dev->ops;
    t->cap = cap;
    t->ops.step_begin = step_begin;
    t->ops.step_end = step_end;
#define X(op) t->ops.op = op;
    TIMED_OPS(X)
#undef X
    dev->ops = &t->ops;
    return t;
}

void timed_end(struct timed *t)
{
    if (t == NULL)
        return;
    t->dev->ops = t->real;
    free(t->log);
    free(t);
}
