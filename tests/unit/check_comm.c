/* check_comm: collectives between threads, by the host's memory and (emulated) between GPUs, and a clear end when a rank is lost.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "tests/tools/emulated.h"
#include "tests/tools/run_model.h"
#include "tests/unit/on_ranks.h"

Suite *suite_comm(void);

struct machine {
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_device_ops ops; /* of a device whose memory the host cannot read in place */
    const struct pl_device_ops *own;
};

/* Calls that copy between the host and a device, on this thread. */
static _Thread_local unsigned n_copies;
static _Thread_local struct pl_device_ops counted;

static pl_status count_put(struct pl_device *dev, struct pl_dbuf *buf, size_t offset, const float *src, size_t n)
{
    n_copies++;
    return counted.put(dev, buf, offset, src, n);
}

static pl_status count_get(struct pl_device *dev, const struct pl_dbuf *buf, size_t offset, float *dst, size_t n)
{
    n_copies++;
    return counted.get(dev, buf, offset, dst, n);
}

static pl_status count_put_rows(struct pl_device *dev, pl_view to, const float *src)
{
    n_copies++;
    return counted.put_rows(dev, to, src);
}

static pl_status count_get_rows(struct pl_device *dev, pl_view from, float *dst)
{
    n_copies++;
    return counted.get_rows(dev, from, dst);
}

static const float *not_here(struct pl_device *dev, const struct pl_dbuf *buf)
{
    (void)dev, (void)buf;
    return NULL;
}

/* name: of tests/tools/emulated.h */
static void machine_open(struct machine *m, const char *name, unsigned rank, bool staged)
{
    struct pl_err err;
    ck_assert_int_eq(pl_pool_new(&m->pool, 1, &err), PL_OK);
    ck_assert_msg(device_open_for(&m->dev, m->pool, name, rank, &err) == PL_OK, "%s", err.msg);
    m->own = m->dev->ops;
    m->ops = *m->dev->ops;
    counted = m->ops;
    m->ops.host = staged ? not_here : m->ops.host;
    m->ops.put = count_put;
    m->ops.get = count_get;
    m->ops.put_rows = count_put_rows;
    m->ops.get_rows = count_get_rows;
    m->dev->ops = &m->ops;
}

static void machine_close(struct machine *m)
{
    m->dev->ops = m->own;
    m->dev->ops->close(m->dev);
    pl_pool_free(m->pool);
}

static pl_view new_view(struct machine *m, uint32_t rows, uint32_t cols, const float *values)
{
    pl_view v = {.rows = rows, .cols = cols, .stride = cols};
    ck_assert_int_eq(m->ops.buf_new(m->dev, (size_t)rows * cols, &v.buf), PL_OK);
    ck_assert_int_eq(m->ops.put(m->dev, v.buf, 0, values, (size_t)rows * cols), PL_OK);
    return v;
}

/* ---- collectives --------------------------------------------------------------------------------------------------- */

struct shapes {
    unsigned size;
    bool staged;
    uint32_t rows, cols;
    const char *device;
};

static const struct shapes shapes[] = {
    {2, false, 1, 576, NULL}, {2, true, 3, 577, NULL},    {3, false, 7, 1, NULL},      {3, true, 64, 576, NULL}, {3, false, 100, 577, NULL},
    {5, false, 1, 3, NULL},   {5, true, 33, 1111, NULL}, {2, false, 40, 40000, NULL}, {1, false, 2, 10, NULL},
};

static const struct shapes gpu_shapes[] = {
    {2, true, 1, 576, GPUS}, {2, true, 40, 577, GPUS}, {3, true, 7, 577, GPUS}, {3, true, 64, 576, GPUS}, {3, true, 100, 577, GPUS},
    {5, true, 1, 7, GPUS},   {5, true, 33, 1111, GPUS},
};

static float *values_of_rank(unsigned rank, size_t n)
{
    uint64_t seed = 77 + rank;
    return random_floats(&seed, n);
}

static void check_sum(struct machine *m, struct pl_comm *c, const struct shapes *s)
{
    const size_t n = (size_t)s->rows * s->cols;
    float *own = values_of_rank(c->rank, n), *sum = values_of_rank(0, n), *got = pl_xmalloc(n * sizeof *got);
    for (unsigned r = 1; r < s->size; r++) {
        float *v = values_of_rank(r, n);
        for (size_t i = 0; i < n; i++)
            sum[i] += v[i];
        free(v);
    }
    pl_view v = new_view(m, s->rows, s->cols, own);
    ck_assert_int_eq(c->ops->all_reduce(c, m->dev, v), PL_OK);
    ck_assert_int_eq(m->ops.get(m->dev, v.buf, 0, got, n), PL_OK);
    ck_assert(memcmp(got, sum, n * sizeof *got) == 0);
    m->ops.buf_free(m->dev, v.buf);
    free(own), free(sum), free(got);
}

static float mark(unsigned rank, uint32_t row, uint32_t col)
{
    return 1000.0f * (float)rank + (float)row + (float)col / 1e5f;
}

static void check_all_gather(struct machine *m, struct pl_comm *c, const struct shapes *s)
{
    uint32_t first[MOST_RANKS + 1];
    for (unsigned r = 0; r <= s->size; r++)
        first[r] = s->cols * r / s->size;
    float *values = pl_xcalloc((size_t)s->rows * s->cols, sizeof *values);
    for (uint32_t i = 0; i < s->rows; i++)
        for (uint32_t j = first[c->rank]; j < first[c->rank + 1]; j++)
            values[(size_t)i * s->cols + j] = mark(c->rank, i, j);
    pl_view v = new_view(m, s->rows, s->cols, values);
    n_copies = 0;
    ck_assert_int_eq(c->ops->all_gather(c, m->dev, v, first), PL_OK);
    if (s->rows <= 100 && s->cols <= 2000)
        ck_assert_uint_le(n_copies, s->size); /* one for each rank's columns, however many rows */
    ck_assert_int_eq(m->ops.get(m->dev, v.buf, 0, values, (size_t)s->rows * s->cols), PL_OK);
    for (unsigned r = 0; r < s->size; r++)
        for (uint32_t i = 0; i < s->rows; i++)
            for (uint32_t j = first[r]; j < first[r + 1]; j++)
                ck_assert_float_eq(values[(size_t)i * s->cols + j], mark(r, i, j));
    m->ops.buf_free(m->dev, v.buf);
    free(values);
}

static void check_gather(struct machine *m, struct pl_comm *c, const struct shapes *s)
{
    uint32_t first[MOST_RANKS + 1];
    for (unsigned r = 0; r <= s->size; r++)
        first[r] = r == s->size ? s->cols : s->cols * r / s->size;
    const uint32_t n = first[c->rank + 1] - first[c->rank], wide = c->rank == 0 ? s->cols : n;
    float *values = pl_xcalloc((size_t)s->rows * wide + 1, sizeof *values);
    for (uint32_t i = 0; i < s->rows; i++)
        for (uint32_t j = 0; j < n; j++)
            values[(size_t)i * wide + j] = mark(c->rank, i, first[c->rank] + j);
    pl_view out = new_view(m, s->rows, wide, values);
    n_copies = 0;
    ck_assert_int_eq(c->ops->gather(c, m->dev, out, pl_view_cols(out, 0, n), first), PL_OK);
    if (s->rows <= 100 && s->cols <= 2000)
        ck_assert_uint_le(n_copies, s->size);
    ck_assert_int_eq(m->ops.get(m->dev, out.buf, 0, values, (size_t)s->rows * wide), PL_OK);
    for (uint32_t i = 0; c->rank == 0 && i < s->rows; i++)
        for (uint32_t j = 0; j < s->cols; j++) {
            unsigned r = 0;
            while (j >= first[r + 1])
                r++;
            ck_assert_float_eq(values[(size_t)i * wide + j], mark(r, i, j));
        }
    m->ops.buf_free(m->dev, out.buf);
    free(values);
}

static void collect_all(struct rank *r)
{
    const struct shapes *s = r->shared;
    struct machine m;
    struct pl_comm *comm = r->comm;
    struct pl_err err = {0};
    char text[100000];
    machine_open(&m, s->device, comm->rank, s->staged);
    if (s->device != NULL)
        ck_assert_msg(pl_comm_meet(&comm, comm, m.dev, PL_EXCHANGE_DEVICES, PL_OK, &err) == PL_OK, "%s", err.msg);
    ck_assert_str_eq(comm->ops->name, s->device != NULL ? "nccl" : "peers");
    for (int i = 0; i < 3; i++) {
        check_sum(&m, comm, s);
        if (s->cols >= s->size)
            check_all_gather(&m, comm, s);
        if (s->cols >= s->size)
            check_gather(&m, comm, s);
        memset(text, r->comm->rank == 0 ? 'a' + i : 0, sizeof text);
        ck_assert_int_eq(r->comm->ops->broadcast(r->comm, text, sizeof text), PL_OK);
        ck_assert(text[0] == 'a' + i && text[sizeof text - 1] == 'a' + i);
        int value = 10 - (int)(r->comm->rank + (unsigned)i) % 3;
        ck_assert_int_eq(r->comm->ops->agree(r->comm, &value), PL_OK);
        ck_assert_int_eq(value, s->size >= 3 ? 8 : i == 0 && s->size == 2 ? 9 : s->size == 1 ? 10 - i % 3 : 8);
    }
    machine_close(&m);
}

START_TEST(collectives)
{
    struct shapes s = shapes[_i];
    on_ranks(s.size, TIMEOUT_MS, collect_all, &s);
}
END_TEST

START_TEST(collectives_of_gpus)
{
    struct shapes s = gpu_shapes[_i];
    setenv("PARLEY_EMU_GPUS", "5", 1);
    on_ranks(s.size, TIMEOUT_MS, collect_all, &s);
}
END_TEST

/* ---- ranks that are lost ------------------------------------------------------------------------------------------- */

enum { LATE, GIVES_UP };
struct loss {
    int how;
    atomic_uint n_failed;
};

static void lose_one(struct rank *r)
{
    struct loss *l = r->shared;
    const uint64_t began = pl_now_ns();
    int value = 0;
    ck_assert_int_eq(r->comm->ops->agree(r->comm, &value), PL_OK);
    if (r->comm->rank == 1) {
        if (l->how == GIVES_UP)
            r->comm->ops->give_up(r->comm);
        while (atomic_load(&l->n_failed) < 2)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        return;
    }
    ck_assert_int_eq(r->comm->ops->agree(r->comm, &value), PL_ERANK);
    const double s = (double)(pl_now_ns() - began) / 1e9;
    ck_assert_msg(l->how == GIVES_UP ? s < 5 : s >= 0.29, "after %g s", s);
    ck_assert_int_eq(r->comm->ops->agree(r->comm, &value), PL_ERANK); /* for good */
    ck_assert_int_eq(r->comm->ops->broadcast(r->comm, &value, sizeof value), PL_ERANK);
    atomic_fetch_add(&l->n_failed, 1);
}

START_TEST(a_lost_rank_is_noticed)
{
    struct loss l = {.how = _i};
    pl_log_setup(PL_LOG_ERROR, false, -1);
    on_ranks(3, _i == GIVES_UP ? TIMEOUT_MS : 300, lose_one, &l);
}
END_TEST

Suite *suite_comm(void)
{
    Suite *s = suite_create("comm");
    TCase *t = tcase_create("collectives");
    tcase_set_timeout(t, 180);
    tcase_add_loop_test(t, collectives, 0, (int)PL_COUNT_OF(shapes));
    tcase_add_loop_test(t, a_lost_rank_is_noticed, LATE, GIVES_UP + 1);
    if (emulated_nccl())
        tcase_add_loop_test(t, collectives_of_gpus, 0, (int)PL_COUNT_OF(gpu_shapes));
    else
        fputs("comm: not on emulated GPUs, which make cuda-emu builds\n", stderr);
    suite_add_tcase(s, t);
    return s;
}
