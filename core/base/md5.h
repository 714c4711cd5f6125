/* md5: the checksum that clients of uploads send along, against mistakes of transport; no protection against anybody.
 * Thread: one at a time.  Owns: nothing.
 * Source: RFC 1321.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_MD5_H
#define PL_BASE_MD5_H

#include <stddef.h>
#include <stdint.h>

enum { PL_MD5_HEX = 33 }; /* with the NUL */

struct pl_md5 {
    uint32_t state[4];
    uint64_t n;
    unsigned char block[64];
};

void pl_md5_init(struct pl_md5 *h);
void pl_md5_add(struct pl_md5 *h, const void *bytes, size_t n);
/* Lower-case hexadecimal digits; ends the use of h. */
void pl_md5_hex(struct pl_md5 *h, char out[PL_MD5_HEX]);

#endif
