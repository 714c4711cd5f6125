/* peers: collectives over links between each two ranks.
 *
 * DESIGN. Messages are begun with all peers at once, then one loop waits for all of them: it polls, then yields, then sleeps
 * longer and longer, and looks at the clock. Nothing else waits, so there is one place that knows of timeouts and of ranks that
 * are gone, and it can say which rank is missing. A sum of few values is made by everybody from everybody's values (one
 * exchange); of many, each rank sums a slice and hands it out (two exchanges, two thirds of the bytes or less). Both add the
 * same numbers in the same order.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/comm/peers.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/log.h"

#define PL_LOG_MODULE "comm"

enum { FEW = 16384 /* values */, PIECE = 1 << 20 /* values gathered at a time */ };
enum { POLL_NS = 20000, YIELD_NS = 400000, LONG_NS = 50000000, REST_US = 50, LONG_REST_US = 1000 };

struct floats {
    float *v;
    size_t cap;
};

struct peers {
    struct pl_comm base;
    struct pl_link *link;
    atomic_bool failed;
    struct floats mine, theirs, sum;
};

static struct peers *peers_of(struct pl_comm *c)
{
    return (struct peers *)c;
}

static pl_status reserve(struct floats *f, size_t n)
{
    if (n <= f->cap)
        return PL_OK;
    float *v = malloc(n * sizeof *v);
    if (v == NULL)
        return PL_ENOMEM;
    free(f->v);
    *f = (struct floats){v, n};
    return PL_OK;
}

/* ---- waiting ------------------------------------------------------------------------------------------------------- */

static pl_status fail(struct peers *p)
{
    atomic_store(&p->failed, true);
    p->link->ops->give_up(p->link);
    return PL_ERANK;
}

/* A rank that has ended, whoever is waited for: that one may be alive and have given up over the same loss. The own rank when there is none. */
static unsigned find_gone(const struct peers *p)
{
    for (unsigned r = 0; r < p->base.size; r++)
        if (r != p->base.rank && p->link->ops->gone(p->link, r))
            return r;
    return p->base.rank;
}

/* One turn of waiting; fails when a rank is gone or the time is up. */
static pl_status wait_turn(struct peers *p, unsigned peer, uint64_t since)
{
    const uint64_t ns = pl_now_ns() - since;
    if (ns < POLL_NS)
        return PL_OK;
    if (ns < YIELD_NS) {
        sched_yield();
        return PL_OK;
    }
    if (atomic_load(&p->failed))
        return fail(p); /* from another thread, which may be in the middle of it: nobody may read what is sent after this returns */
    const unsigned gone = find_gone(p);
    if (gone != p->base.rank) {
        pl_log_error("rank %u of %u has ended", gone, p->base.size);
        return fail(p);
    }
    if (ns > (uint64_t)p->base.timeout_ms * 1000000) {
        pl_log_error("rank %u of %u has not answered for %.1f s", peer, p->base.size, p->base.timeout_ms / 1e3);
        p->base.silent = peer;
        return fail(p);
    }
    p->link->ops->rest(p->link, ns < LONG_NS ? REST_US : LONG_REST_US);
    return PL_OK;
}

/* Until all that was begun is done. */
static pl_status finish(struct peers *p)
{
    const uint64_t since = pl_now_ns();
    for (unsigned r = 0; r < p->base.size; r++)
        while (r != p->base.rank && !p->link->ops->done(p->link, r)) {
            const pl_status rc = wait_turn(p, r, since);
            if (rc != PL_OK)
                return rc;
        }
    return PL_OK;
}

/* ---- host memory --------------------------------------------------------------------------------------------------- */

static pl_status broadcast(struct pl_comm *c, void *bytes, size_t n)
{
    struct peers *p = peers_of(c);
    pl_status rc = atomic_load(&p->failed) ? PL_ERANK : PL_OK;
    for (size_t at = 0, piece; at < n && rc == PL_OK; at += piece) {
        piece = n - at < PL_LINK_MOST ? n - at : PL_LINK_MOST;
        for (unsigned r = 1; c->rank == 0 && r < c->size; r++)
            p->link->ops->send(p->link, r, (char *)bytes + at, piece);
        if (c->rank != 0)
            p->link->ops->recv(p->link, 0, (char *)bytes + at, piece);
        rc = finish(p);
    }
    return rc;
}

static pl_status share(struct pl_comm *c, void *all, size_t n)
{
    struct peers *p = peers_of(c);
    char *places = all;
    if (atomic_load(&p->failed))
        return PL_ERANK;
    for (unsigned r = 0; r < c->size; r++) {
        if (r != c->rank) {
            p->link->ops->send(p->link, r, places + c->rank * n, n);
            p->link->ops->recv(p->link, r, places + r * n, n);
        }
    }
    return finish(p);
}

static pl_status agree(struct pl_comm *c, int *value)
{
    int values[PL_LINK_RANKS];
    values[c->rank] = *value;
    const pl_status rc = share(c, values, sizeof *value);
    for (unsigned r = 0; r < c->size && rc == PL_OK; r++)
        *value = values[r] < *value ? values[r] : *value;
    return rc;
}

static pl_status check(struct pl_comm *c)
{
    struct peers *p = peers_of(c);
    const unsigned gone = atomic_load(&p->failed) ? c->rank : find_gone(p);
    if (gone != c->rank)
        pl_log_error("rank %u of %u has ended", gone, c->size);
    return gone != c->rank ? fail(p) : atomic_load(&p->failed) ? PL_ERANK : PL_OK;
}

/* ---- device memory ------------------------------------------------------------------------------------------------- */

/* v's values in the host's memory: in place, or copied to p->mine. */
static pl_status values_of(struct peers *p, struct pl_device *dev, pl_view v, const float **out)
{
    const float *host = dev->ops->host(dev, v.buf);
    const bool dense = v.stride == v.cols || v.rows == 1;
    if (host != NULL && dense) {
        *out = host + v.offset;
        return PL_OK;
    }
    const pl_status rc = reserve(&p->mine, (size_t)v.rows * v.cols);
    *out = p->mine.v;
    return rc == PL_OK ? dev->ops->get_rows(dev, v, p->mine.v) : rc;
}

/* sum[0..n) of size vectors, rank by rank; `own` is this rank's, theirs has a place of n for each. */
static void add_up(const struct peers *p, float *sum, const float *own, const float *theirs, size_t n)
{
    for (unsigned r = 0; r < p->base.size; r++) {
        const float *v = r == p->base.rank ? own : theirs + r * n;
        for (size_t i = 0; i < n; i++)
            sum[i] = r == 0 ? v[i] : sum[i] + v[i];
    }
}

/* Everybody's values to everybody. */
static pl_status sum_few(struct peers *p, const float *own, size_t n)
{
    const pl_status rc = reserve(&p->theirs, p->base.size * n);
    if (rc != PL_OK)
        return rc;
    for (unsigned r = 0; r < p->base.size; r++) {
        if (r != p->base.rank) {
            p->link->ops->send(p->link, r, own, n * sizeof *own);
            p->link->ops->recv(p->link, r, p->theirs.v + r * n, n * sizeof *own);
        }
    }
    const pl_status done = finish(p);
    if (done == PL_OK)
        add_up(p, p->sum.v, own, p->theirs.v, n);
    return done;
}

/* Where rank r's slice of n values begins. */
static size_t slice(const struct peers *p, unsigned r, size_t n)
{
    return n / p->base.size * r + n % p->base.size * r / p->base.size;
}

/* Each rank gets its slice of everybody's values, and hands out the sum. */
static pl_status sum_many(struct peers *p, const float *own, size_t n)
{
    const struct pl_link_ops *ops = p->link->ops;
    const unsigned me = p->base.rank, size = p->base.size;
    const size_t first = slice(p, me, n), n_mine = slice(p, me + 1, n) - first;
    pl_status rc = reserve(&p->theirs, size * n_mine);
    if (rc != PL_OK)
        return rc;
    for (unsigned r = 0; r < size; r++) {
        if (r != me) {
            ops->send(p->link, r, own + slice(p, r, n), (slice(p, r + 1, n) - slice(p, r, n)) * sizeof *own);
            ops->recv(p->link, r, p->theirs.v + r * n_mine, n_mine * sizeof *own);
        }
    }
    if ((rc = finish(p)) != PL_OK)
        return rc;
    add_up(p, p->sum.v + first, own + first, p->theirs.v, n_mine);
    for (unsigned r = 0; r < size; r++) {
        if (r != me) {
            ops->send(p->link, r, p->sum.v + first, n_mine * sizeof *own);
            ops->recv(p->link, r, p->sum.v + slice(p, r, n), (slice(p, r + 1, n) - slice(p, r, n)) * sizeof *own);
        }
    }
    return finish(p);
}

static pl_status all_reduce(struct pl_comm *c, struct pl_device *dev, pl_view v)
{
    struct peers *p = peers_of(c);
    const size_t n = (size_t)v.rows * v.cols;
    const float *own;
    if (atomic_load(&p->failed))
        return PL_ERANK;
    PL_ASSERT((v.stride == v.cols || v.rows == 1) && n <= PL_LINK_MOST / sizeof *own);
    pl_status rc = values_of(p, dev, v, &own);
    if (rc == PL_OK)
        rc = reserve(&p->sum, n);
    if (rc == PL_OK)
        rc = n <= FEW ? sum_few(p, own, n) : sum_many(p, own, n);
    return rc == PL_OK ? dev->ops->put(dev, v.buf, v.offset, p->sum.v, n) : rc;
}

/* Where rank r's values begin among those of the others, one behind the other, with `own` left out. */
static size_t place_of(const uint32_t *first, unsigned r, unsigned own)
{
    return first[r] - (r > own ? first[own + 1] - first[own] : 0);
}

/* To the columns of v: rank r's rows as they came. */
static pl_status put_columns(struct peers *p, struct pl_device *dev, pl_view v, const uint32_t *first)
{
    pl_status rc = PL_OK;
    for (unsigned r = 0; r < p->base.size && rc == PL_OK; r++)
        if (r != p->base.rank)
            rc = dev->ops->put_rows(dev, pl_view_cols(v, first[r], first[r + 1] - first[r]), p->theirs.v + v.rows * place_of(first, r, p->base.rank));
    return rc;
}

/* Begins to take n_rows of rank r's columns. */
static void take_columns(struct peers *p, unsigned r, uint32_t n_rows, const uint32_t *first)
{
    p->link->ops->recv(p->link, r, p->theirs.v + n_rows * place_of(first, r, p->base.rank), n_rows * (size_t)(first[r + 1] - first[r]) * sizeof(float));
}

static pl_status all_gather_rows(struct peers *p, struct pl_device *dev, pl_view v, const uint32_t *first)
{
    const unsigned me = p->base.rank;
    const pl_view part = pl_view_cols(v, first[me], first[me + 1] - first[me]);
    const float *mine = NULL;
    pl_status rc = reserve(&p->theirs, v.rows * (size_t)first[p->base.size]);
    if (rc == PL_OK)
        rc = values_of(p, dev, part, &mine);
    if (rc != PL_OK)
        return rc;
    for (unsigned r = 0; r < p->base.size; r++) {
        if (r != me) {
            p->link->ops->send(p->link, r, mine, (size_t)part.rows * part.cols * sizeof *mine);
            take_columns(p, r, v.rows, first);
        }
    }
    rc = finish(p);
    return rc == PL_OK ? put_columns(p, dev, v, first) : rc;
}

static pl_status gather_rows(struct peers *p, struct pl_device *dev, pl_view out, pl_view part, const uint32_t *first)
{
    const unsigned size = p->base.size;
    const float *mine = NULL;
    pl_status rc = p->base.rank == 0 ? reserve(&p->theirs, part.rows * (size_t)first[size]) : values_of(p, dev, part, &mine);
    if (rc != PL_OK)
        return rc;
    if (p->base.rank != 0) {
        p->link->ops->send(p->link, 0, mine, (size_t)part.rows * part.cols * sizeof *mine);
        return finish(p);
    }
    for (unsigned r = 1; r < size; r++)
        take_columns(p, r, part.rows, first);
    rc = finish(p);
    return rc == PL_OK ? put_columns(p, dev, out, first) : rc;
}

/* Rows that are exchanged at a time. */
static uint32_t rows_at_a_time(const struct pl_comm *c, const uint32_t *first)
{
    return PIECE / first[c->size] > 0 ? PIECE / first[c->size] : 1;
}

static pl_status all_gather(struct pl_comm *c, struct pl_device *dev, pl_view v, const uint32_t *first)
{
    struct peers *p = peers_of(c);
    const uint32_t most = rows_at_a_time(c, first);
    pl_status rc = atomic_load(&p->failed) ? PL_ERANK : PL_OK;
    for (uint32_t at = 0, n; at < v.rows && rc == PL_OK; at += n) {
        n = v.rows - at < most ? v.rows - at : most;
        rc = all_gather_rows(p, dev, pl_view_rows(v, at, n), first);
    }
    return rc;
}

static pl_status gather(struct pl_comm *c, struct pl_device *dev, pl_view out, pl_view part, const uint32_t *first)
{
    struct peers *p = peers_of(c);
    const uint32_t most = rows_at_a_time(c, first);
    pl_status rc = atomic_load(&p->failed) ? PL_ERANK : PL_OK;
    for (uint32_t at = 0, n; at < part.rows && rc == PL_OK; at += n) {
        n = part.rows - at < most ? part.rows - at : most;
        rc = gather_rows(p, dev, pl_view_rows(out, at, n), pl_view_rows(part, at, n), first);
    }
    return rc;
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static void give_up(struct pl_comm *c)
{
    (void)fail(peers_of(c));
}

static void end_processes(struct pl_comm *c, int status)
{
    struct pl_link *l = peers_of(c)->link;
    l->ops->end_processes(l, status);
}

static void close_peers(struct pl_comm *c)
{
    struct peers *p = peers_of(c);
    p->link->ops->close(p->link, atomic_load(&p->failed));
    free(p->mine.v);
    free(p->theirs.v);
    free(p->sum.v);
    free(p);
}

static const struct pl_comm_ops peers_ops = {
    .name = "peers",
    .broadcast = broadcast,
    .share = share,
    .agree = agree,
    .check = check,
    .all_reduce = all_reduce,
    .all_gather = all_gather,
    .gather = gather,
    .give_up = give_up,
    .end_processes = end_processes,
    .close = close_peers,
};

pl_status pl_comm_peers_new(struct pl_comm **out, struct pl_link *link, int timeout_ms, struct pl_err *err)
{
    struct peers *p = link->size <= PL_LINK_RANKS ? calloc(1, sizeof *p) : NULL;
    if (p == NULL) {
        const unsigned size = link->size;
        link->ops->close(link, false);
        return size > PL_LINK_RANKS ? pl_fail(err, PL_EINVAL, "%u ranks are more than the %d that are possible", size, PL_LINK_RANKS)
                                    : pl_fail(err, PL_ENOMEM, "no memory for a communicator");
    }
    *p = (struct peers){.base = {.ops = &peers_ops,
                                 .rank = link->rank,
                                 .silent = link->rank,
                                 .sharing = 1,
                                 .size = link->size,
                                 .local_rank = link->local_rank,
                                 .local_size = link->local_size,
                                 .timeout_ms = timeout_ms},
                        .link = link};
    *out = &p->base;
    return PL_OK;
}
