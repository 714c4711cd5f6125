/* md5: RFC 1321.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/md5.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static uint32_t rotate(uint32_t x, unsigned by)
{
    return x << by | x >> (32 - by);
}

static void take_block(struct pl_md5 *h, const unsigned char *p)
{
    static const unsigned char shifts[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
    uint32_t a = h->state[0], b = h->state[1], c = h->state[2], d = h->state[3], words[16];
    for (size_t i = 0; i < 16; i++)
        words[i] = p[4 * i] | (uint32_t)p[4 * i + 1] << 8 | (uint32_t)p[4 * i + 2] << 16 | (uint32_t)p[4 * i + 3] << 24;
    for (unsigned i = 0; i < 64; i++) {
        uint32_t f;
        unsigned k;
        switch (i / 16) {
        case 0: f = (b & c) | (~b & d), k = i; break;
        case 1: f = (d & b) | (~d & c), k = (5 * i + 1) % 16; break;
        case 2: f = b ^ c ^ d, k = (3 * i + 5) % 16; break;
        default: f = c ^ (b | ~d), k = 7 * i % 16; break;
        }
        const uint32_t constant = (uint32_t)(uint64_t)(fabs(sin((double)i + 1)) * 4294967296.0);
        const uint32_t next = b + rotate(a + f + words[k] + constant, shifts[i / 16][i % 4]);
        a = d;
        d = c;
        c = b;
        b = next;
    }
    h->state[0] += a;
    h->state[1] += b;
    h->state[2] += c;
    h->state[3] += d;
}

void pl_md5_init(struct pl_md5 *h)
{
    *h = (struct pl_md5){.state = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}};
}

void pl_md5_add(struct pl_md5 *h, const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    while (n > 0) {
        const size_t at = h->n % 64, take = n < 64 - at ? n : 64 - at;
        memcpy(h->block + at, p, take);
        h->n += take;
        p += take;
        n -= take;
        if (h->n % 64 == 0)
            take_block(h, h->block);
    }
}

void pl_md5_hex(struct pl_md5 *h, char out[PL_MD5_HEX])
{
    static const unsigned char end[64] = {0x80};
    const uint64_t bits = h->n * 8;
    unsigned char length[8];
    pl_md5_add(h, end, (h->n % 64 < 56 ? 56 : 120) - h->n % 64);
    for (size_t i = 0; i < 8; i++)
        length[i] = (unsigned char)(bits >> 8 * i);
    pl_md5_add(h, length, sizeof length);
    for (size_t i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", h->state[i / 4] >> 8 * (i % 4) & 0xff);
}
