/* train_attn: causal attention over packed sequences and its backward. Scores exist for one block of queries at a time; the
 * backward makes them again from the kept logarithm of each row's sum.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/device/cpu/train.h"

enum { Q_BLOCK = 64 };

struct block {
    uint32_t seq, from; /* first query, counted from the sequence's start */
};

struct attn {
    struct pl_cpu_train *t;
    pl_view out, lse, qkv, dqkv, dout;
    uint32_t D, H, G;
    float scale;
    const struct pl_train_seqs *s;
    struct block *blocks;
    atomic_int failed; /* a status */
};

/* Two matrices of scores for n keys. */
static float *scores(struct attn *a, unsigned worker, uint32_t n)
{
    struct pl_cpu_train *t = a->t;
    if (pl_cpu_grow(&t->scratch[worker], &t->scratch_cap[worker], 2 * (size_t)Q_BLOCK * n) == PL_OK)
        return t->scratch[worker];
    atomic_store(&a->failed, PL_ENOMEM);
    return NULL;
}

static void product(struct attn *a, unsigned worker, uint32_t m, uint32_t n, uint32_t k, struct pl_mm_src x, struct pl_mm_src y, float *c,
                    size_t ldc, bool add)
{
    const struct pl_mm mm = {.m = m, .n = n, .k = k, .a = x, .b = y, .c = c, .ldc = ldc, .alpha = 1, .add = add};
    const pl_status rc = pl_mm_run(a->t->k, a->t->precision, NULL, &a->t->own[worker], &mm);
    if (rc != PL_OK)
        atomic_store(&a->failed, rc);
}

static struct pl_mm_src along(const float *p, size_t stride)
{
    return (struct pl_mm_src){.p = p, .stride = stride, .along = true};
}

static struct pl_mm_src across(const float *p, size_t stride)
{
    return (struct pl_mm_src){.p = p, .stride = stride};
}

/* Row `at` of head h's part of a matrix of heads; first: where the heads begin. */
static float *head_row(pl_view v, uint32_t row, uint32_t first, uint32_t h, uint32_t D)
{
    return pl_cpu_row(v, row) + (size_t)(first + h) * D;
}

static void forward_item(void *arg, size_t item, unsigned worker)
{
    struct attn *a = arg;
    const struct block *b = &a->blocks[item / a->H];
    const uint32_t h = (uint32_t)(item % a->H), g = h / (a->H / a->G), D = a->D;
    const uint32_t start = a->s->start[b->seq], len = a->s->start[b->seq + 1] - start;
    const uint32_t n_q = len - b->from < Q_BLOCK ? len - b->from : Q_BLOCK, n_k = b->from + n_q, row = start + b->from;
    float *p = scores(a, worker, n_k);
    if (p == NULL)
        return;
    product(a, worker, n_q, n_k, D, along(head_row(a->qkv, row, 0, h, D), a->qkv.stride),
            along(head_row(a->qkv, start, a->H, g, D), a->qkv.stride), p, n_k, false);
    for (uint32_t i = 0; i < n_q; i++) {
        const uint32_t n = b->from + i + 1;
        pl_cpu_row(a->lse, row + i)[h] = a->t->k->softmax(p + (size_t)i * n_k, a->scale, n);
        memset(p + (size_t)i * n_k + n, 0, (n_k - n) * sizeof *p);
    }
    product(a, worker, n_q, D, n_k, along(p, n_k), across(head_row(a->qkv, start, a->H + a->G, g, D), a->qkv.stride),
            head_row(a->out, row, 0, h, D), a->out.stride, false);
}

/* One block of queries of one head; adds to the gradients of the keys and values it saw. */
static void backward_block(struct attn *a, unsigned worker, uint32_t start, uint32_t len, uint32_t from, uint32_t h)
{
    const uint32_t g = h / (a->H / a->G), D = a->D, n_q = len - from < Q_BLOCK ? len - from : Q_BLOCK, n_k = from + n_q, row = start + from;
    const size_t stride = a->qkv.stride, d_stride = a->dqkv.stride;
    float *p = scores(a, worker, n_k), *dp = p + (size_t)Q_BLOCK * n_k;
    if (p == NULL)
        return;
    const float *q = head_row(a->qkv, row, 0, h, D), *k = head_row(a->qkv, start, a->H, g, D), *v = head_row(a->qkv, start, a->H + a->G, g, D);
    const float *dout = head_row(a->dout, row, 0, h, D);
    product(a, worker, n_q, n_k, D, along(q, stride), along(k, stride), p, n_k, false);
    product(a, worker, n_q, n_k, D, along(dout, a->dout.stride), along(v, stride), dp, n_k, false);
    for (uint32_t i = 0; i < n_q; i++) {
        const uint32_t n = from + i + 1;
        float *pi = p + (size_t)i * n_k, *di = dp + (size_t)i * n_k;
        const float sub = a->t->k->dot(head_row(a->dout, row + i, 0, h, D), head_row(a->out, row + i, 0, h, D), D);
        a->t->k->softmax_d(pi, di, a->scale, pl_cpu_row(a->lse, row + i)[h], sub, n);
        memset(pi + n, 0, (n_k - n) * sizeof *pi);
        memset(di + n, 0, (n_k - n) * sizeof *di);
    }
    product(a, worker, n_q, D, n_k, along(dp, n_k), across(k, stride), head_row(a->dqkv, row, 0, h, D), d_stride, false);
    product(a, worker, n_k, D, n_q, across(dp, n_k), across(q, stride), head_row(a->dqkv, start, a->H, g, D), d_stride, true);
    product(a, worker, n_k, D, n_q, across(p, n_k), across(dout, a->dout.stride), head_row(a->dqkv, start, a->H + a->G, g, D), d_stride, true);
}

/* All queries that read one key/value head of one sequence, so that nobody else adds to its gradients. */
static void backward_item(void *arg, size_t item, unsigned worker)
{
    struct attn *a = arg;
    const uint32_t seq = (uint32_t)(item / a->G), g = (uint32_t)(item % a->G), per = a->H / a->G;
    const uint32_t start = a->s->start[seq], len = a->s->start[seq + 1] - start;
    for (uint32_t i = 0; i < len; i++) {
        memset(head_row(a->dqkv, start + i, a->H, g, a->D), 0, a->D * sizeof(float));
        memset(head_row(a->dqkv, start + i, a->H + a->G, g, a->D), 0, a->D * sizeof(float));
    }
    for (uint32_t from = 0; from < len; from += Q_BLOCK)
        for (uint32_t h = g * per; h < (g + 1) * per; h++)
            backward_block(a, worker, start, len, from, h);
}

static struct attn attn_of(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale,
                           const struct pl_train_seqs *s)
{
    const uint32_t H = lse.cols;
    return (struct attn){.t = pl_cpu_train_of(pl_cpu_of(dev)), .out = out, .lse = lse, .qkv = qkv, .D = head_dim, .H = H,
                         .G = (qkv.cols / head_dim - H) / 2, .scale = scale, .s = s};
}

pl_status pl_cpu_train_attn(struct pl_device *dev, pl_view out, pl_view lse, pl_view qkv, uint32_t head_dim, float scale,
                            const struct pl_train_seqs *s)
{
    struct attn a = attn_of(dev, out, lse, qkv, head_dim, scale, s);
    size_t n = 0;
    for (uint32_t i = 0; i < s->n_seqs; i++)
        n += (s->start[i + 1] - s->start[i] + Q_BLOCK - 1) / Q_BLOCK;
    if (a.t == NULL || (a.blocks = malloc((n > 0 ? n : 1) * sizeof *a.blocks)) == NULL)
        return PL_ENOMEM;
    n = 0;
    for (uint32_t i = 0; i < s->n_seqs; i++)
        for (uint32_t from = 0; from < s->start[i + 1] - s->start[i]; from += Q_BLOCK)
            a.blocks[n++] = (struct block){i, from};
    pl_pool_run(pl_cpu_of(dev)->pool, forward_item, &a, n * a.H);
    free(a.blocks);
    return atomic_load(&a.failed);
}

pl_status pl_cpu_train_attn_d(struct pl_device *dev, pl_view dqkv, pl_view dout, pl_view out, pl_view lse, pl_view qkv,
                              uint32_t head_dim, float scale, const struct pl_train_seqs *s)
{
    struct attn a = attn_of(dev, out, lse, qkv, head_dim, scale, s);
    if (a.t == NULL)
        return PL_ENOMEM;
    a.dqkv = dqkv;
    a.dout = dout;
    pl_pool_run(pl_cpu_of(dev)->pool, backward_item, &a, (size_t)s->n_seqs * a.G);
    return atomic_load(&a.failed);
}
