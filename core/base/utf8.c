/* utf8: validation and stepping.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/utf8.h"

int pl_utf8_decode(const char *s, size_t n, uint32_t *cp)
{
    const unsigned char *p = (const unsigned char *)s;
    if (p[0] < 0x80) {
        *cp = p[0];
        return 1;
    }
    int len = p[0] >= 0xc2 && p[0] <= 0xdf ? 2 : (p[0] & 0xf0) == 0xe0 ? 3 : p[0] >= 0xf0 && p[0] <= 0xf4 ? 4 : -1;
    if (len < 0)
        return -1;
    uint32_t c = p[0] & (0x7fu >> len);
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n)
            return 0;
        unsigned char lo = 0x80, hi = 0xbf;
        if (i == 1) {
            lo = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : lo;
            hi = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : hi;
        }
        if (p[i] < lo || p[i] > hi)
            return -1;
        c = c << 6 | (p[i] & 0x3f);
    }
    *cp = c;
    return len;
}

size_t pl_utf8_encode(uint32_t cp, char out[4])
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    size_t len = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (size_t i = len - 1; i > 0; i--, cp >>= 6)
        out[i] = (char)(0x80 | (cp & 0x3f));
    out[0] = (char)((0xf00u >> len) | cp);
    return len;
}

size_t pl_utf8_count(const char *s)
{
    size_t n = 0;
    for (; *s != '\0'; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80; /* the first byte of each */
    return n;
}

bool pl_utf8_valid(const char *s, size_t n)
{
    uint32_t cp;
    for (size_t i = 0; i < n;) {
        int len = pl_utf8_decode(s + i, n - i, &cp);
        if (len <= 0)
            return false;
        i += (size_t)len;
    }
    return true;
}

size_t pl_utf8_tail(const char *s, size_t n)
{
    uint32_t cp;
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        unsigned char c = (unsigned char)s[n - back];
        if ((c & 0xc0) == 0x80)
            continue;
        return c >= 0xc0 && pl_utf8_decode(s + n - back, back, &cp) == 0 ? back : 0;
    }
    return 0;
}
