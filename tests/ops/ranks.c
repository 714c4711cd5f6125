/* ranks: rows that lie apart, to and from the host; and NCCL itself with one rank, which is all that one GPU allows: it is found, it starts, its calls
 * are enqueued and end, and nobody else's values come in.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/ranks.h"

#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/comm/comm.h"
#include "tests/tools/emulated.h"

enum { ROWS = 37, COLS = 50, WIDE = 64, FIRST = 5, PATIENCE_MS = 60000 };

struct counts {
    unsigned *passed, *failed;
    const char *device;
};

static void expect(const struct counts *c, bool ok, const char *what)
{
    ++*(ok ? c->passed : c->failed);
    if (!ok)
        printf("%s: ranks: %s\n", c->device, what);
}

static float value(uint32_t row, uint32_t col)
{
    return (float)row * 100 + (float)col;
}

/* COLS columns, from FIRST on, of a matrix of WIDE; everything else stays 0. */
static void rows_apart(const struct counts *c, struct pl_device *dev, struct pl_dbuf *buf)
{
    static float rows[ROWS * COLS], all[ROWS * WIDE];
    const pl_view v = {buf, FIRST, ROWS, COLS, WIDE};
    bool same = true;
    for (uint32_t i = 0; i < ROWS * COLS; i++)
        rows[i] = value(i / COLS, i % COLS);
    expect(c, dev->ops->put_rows(dev, v, rows) == PL_OK && dev->ops->get(dev, buf, 0, all, ROWS * WIDE) == PL_OK, "rows are put");
    for (uint32_t i = 0; i < ROWS * WIDE; i++) {
        const uint32_t col = i % WIDE;
        same &= all[i] == (col >= FIRST && col < FIRST + COLS ? value(i / WIDE, col - FIRST) : 0);
    }
    expect(c, same, "rows are where they belong");
    memset(all, 0, sizeof all);
    expect(c, dev->ops->get_rows(dev, v, all) == PL_OK && memcmp(all, rows, sizeof rows) == 0, "rows are fetched");
    const pl_view beyond = {buf, WIDE, ROWS, COLS, WIDE};
    expect(c, dev->ops->put_rows(dev, beyond, rows) != PL_OK && dev->ops->get_rows(dev, beyond, all) != PL_OK, "rows beyond the buffer are refused");
}

static void alone(const struct counts *c, struct pl_device *dev, struct pl_dbuf *buf, struct pl_comm *host)
{
    static float before[ROWS * WIDE], after[ROWS * WIDE];
    static const uint32_t first[] = {0, WIDE};
    const pl_view v = {buf, 0, ROWS, WIDE, WIDE};
    struct pl_comm *comm = host;
    struct pl_err err = {0};
    const pl_status met = pl_comm_meet(&comm, host, dev, PL_EXCHANGE_DEVICES, PL_OK, &err);
    expect(c, met == PL_OK && comm != host, met == PL_OK ? "NCCL is used" : err.msg);
    if (met != PL_OK)
        return;
    bool ok = dev->ops->get(dev, buf, 0, before, ROWS * WIDE) == PL_OK && dev->ops->step_begin(dev, NULL) == PL_OK;
    ok = ok && comm->ops->all_reduce(comm, dev, v) == PL_OK && comm->ops->all_gather(comm, dev, v, first) == PL_OK;
    ok = ok && comm->ops->gather(comm, dev, v, v, first) == PL_OK && dev->ops->step_end(dev) == PL_OK;
    expect(c, ok && dev->ops->get(dev, buf, 0, after, ROWS * WIDE) == PL_OK, "exchanges end");
    expect(c, memcmp(before, after, sizeof before) == 0, "values are one's own");
}

void ops_ranks(const char *only, unsigned *passed, unsigned *failed, unsigned *skipped)
{
    static const char *const devices[] = {"ref", "cuda-emulated", "cuda"};
    for (size_t i = 0; i < PL_COUNT_OF(devices); i++) {
        const struct counts c = {passed, failed, devices[i]};
        struct pl_pool *pool = NULL;
        struct pl_device *dev = NULL;
        struct pl_dbuf *buf = NULL;
        struct pl_comm *host = NULL;
        struct pl_err err = {0};
        uint32_t version = 0;
        if (only != NULL && strcmp(only, devices[i]) != 0)
            continue;
        if (pl_pool_new(&pool, 1, &err) != PL_OK || device_open(&dev, pool, devices[i], &err) != PL_OK ||
            dev->ops->buf_new(dev, ROWS * WIDE, &buf) != PL_OK) {
            ++*skipped; /* the operation table has said why */
            pl_pool_free(pool);
            continue;
        }
        rows_apart(&c, dev, buf);
        if (strcmp(devices[i], "cuda-emulated") == 0)
            (void)!emulated_nccl();
        if (dev->ops->links != NULL && dev->ops->links->find(dev, &version, &err) != PL_OK) {
            ++*skipped;
            printf("%s: ranks: %s\n", devices[i], err.msg);
        } else if (dev->ops->links != NULL && pl_comm_threads_new(&host, 1, PATIENCE_MS, &err) == PL_OK) {
            alone(&c, dev, buf, host);
        }
        dev->ops->buf_free(dev, buf);
        dev->ops->close(dev);
        if (host != NULL)
            host->ops->close(host);
        pl_pool_free(pool);
    }
}
