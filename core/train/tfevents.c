/* tfevents: TensorBoard event files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/tfevents.h"

#include <math.h>
#include <string.h>

#include "core/base/buf.h"

uint32_t pl_crc32c(const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

static uint32_t masked(const void *bytes, size_t n)
{
    const uint32_t crc = pl_crc32c(bytes, n);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/* Protocol-buffer fields: a tag of number << 3 | wire type, then the value. */
static void varint(struct pl_buf *b, uint64_t v)
{
    for (; v >= 128; v >>= 7)
        pl_buf_addc(b, (char)(v | 128));
    pl_buf_addc(b, (char)v);
}

static void put_double(struct pl_buf *b, unsigned field, double v)
{
    varint(b, field << 3 | 1);
    pl_buf_add(b, &v, sizeof v);
}

static void put_bytes(struct pl_buf *b, unsigned field, const void *bytes, size_t n)
{
    varint(b, field << 3 | 2);
    varint(b, n);
    pl_buf_add(b, bytes, n);
}

static pl_status record(FILE *f, struct pl_buf *event)
{
    const uint64_t n = event->len;
    const uint32_t head = masked(&n, sizeof n), body = masked(pl_buf_str(event), event->len);
    const bool ok = !event->failed && fwrite(&n, sizeof n, 1, f) == 1 && fwrite(&head, sizeof head, 1, f) == 1 &&
                    fwrite(pl_buf_str(event), 1, n, f) == n && fwrite(&body, sizeof body, 1, f) == 1 && fflush(f) == 0;
    pl_buf_fini(event);
    return ok ? PL_OK : PL_EIO;
}

pl_status pl_tf_begin(FILE *f, double wall_time)
{
    struct pl_buf e;
    pl_buf_init(&e, 0);
    put_double(&e, 1, wall_time);
    put_bytes(&e, 3, "brain.Event:2", 13);
    return record(f, &e);
}

pl_status pl_tf_scalars(FILE *f, double wall_time, int64_t step, const struct pl_tf_scalar *scalars, size_t n)
{
    struct pl_buf e, summary, value;
    pl_buf_init(&e, 0);
    pl_buf_init(&summary, 0);
    for (size_t i = 0; i < n; i++) {
        const float v = (float)scalars[i].value;
        if (isnan(scalars[i].value))
            continue;
        pl_buf_init(&value, 0);
        put_bytes(&value, 1, scalars[i].tag, strlen(scalars[i].tag));
        varint(&value, 2 << 3 | 5);
        pl_buf_add(&value, &v, sizeof v);
        put_bytes(&summary, 1, pl_buf_str(&value), value.len);
        pl_buf_fini(&value);
    }
    put_double(&e, 1, wall_time);
    varint(&e, 2 << 3);
    varint(&e, (uint64_t)step);
    put_bytes(&e, 5, pl_buf_str(&summary), summary.len);
    pl_buf_fini(&summary);
    return record(f, &e);
}
