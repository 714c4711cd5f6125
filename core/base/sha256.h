/* sha256: the hash of files and of what may not change unnoticed.
 * Thread: one at a time.  Owns: nothing.
 * Source: FIPS 180-4.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_SHA256_H
#define PL_BASE_SHA256_H

#include <stddef.h>
#include <stdint.h>

enum { PL_SHA256_HEX = 65 }; /* with the NUL */

struct pl_sha256 {
    uint32_t state[8];
    uint64_t n;
    unsigned char block[64];
};

void pl_sha256_init(struct pl_sha256 *h);
void pl_sha256_add(struct pl_sha256 *h, const void *bytes, size_t n);
/* Lower-case hexadecimal digits; ends the use of h. */
void pl_sha256_hex(struct pl_sha256 *h, char out[PL_SHA256_HEX]);

#endif
