/* buf: a growing byte string.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/buf.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/utf8.h"

void pl_buf_init(struct pl_buf *b, size_t limit)
{
    *b = (struct pl_buf){.limit = limit};
}

void pl_buf_fini(struct pl_buf *b)
{
    free(b->data);
    *b = (struct pl_buf){.limit = b->limit};
}

void pl_buf_clear(struct pl_buf *b)
{
    b->len = 0;
    b->failed = false;
    if (b->data != NULL)
        b->data[0] = '\0';
}

static bool grow(struct pl_buf *b, size_t n)
{
    if (b->failed || n > SIZE_MAX / 4 - b->len || (b->limit != 0 && b->len + n > b->limit)) {
        b->failed = true;
        return false;
    }
    size_t need = b->len + n + 1;
    if (need <= b->cap)
        return true;
    size_t cap = b->cap * 2 > need ? b->cap * 2 : need;
    if (cap < 256)
        cap = 256;
    char *p = realloc(b->data, cap);
    if (p == NULL) {
        b->failed = true;
        return false;
    }
    b->data = p;
    b->cap = cap;
    return true;
}

void pl_buf_add(struct pl_buf *b, const void *bytes, size_t n)
{
    if (!grow(b, n))
        return;
    if (n > 0)
        memcpy(b->data + b->len, bytes, n);
    b->len += n;
    b->data[b->len] = '\0';
}

void pl_buf_adds(struct pl_buf *b, const char *s)
{
    pl_buf_add(b, s, strlen(s));
}

void pl_buf_addc(struct pl_buf *b, char c)
{
    pl_buf_add(b, &c, 1);
}

void pl_buf_addu(struct pl_buf *b, uint64_t v)
{
    char digits[20];
    size_t at = sizeof digits;
    do
        digits[--at] = (char)('0' + v % 10);
    while ((v /= 10) > 0);
    pl_buf_add(b, digits + at, sizeof digits - at);
}

void pl_buf_addf(struct pl_buf *b, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    const size_t room = b->cap - b->len; /* 0 while empty */
    const int n = vsnprintf(room > 0 ? b->data + b->len : NULL, room, fmt, ap);
    if (n >= 0 && grow(b, (size_t)n)) {
        if ((size_t)n >= room)
            vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    } else if (room > 0) {
        b->data[b->len] = '\0'; /* again */
    }
    va_end(again);
    va_end(ap);
}

void pl_buf_drop(struct pl_buf *b, size_t n)
{
    if (n == 0)
        return;
    memmove(b->data, b->data + n, b->len - n + 1);
    b->len -= n;
}

const char *pl_buf_str(const struct pl_buf *b)
{
    return b->data != NULL ? b->data : "";
}

char *pl_buf_take(struct pl_buf *b)
{
    pl_buf_add(b, "", 0); /* so that there is a string to take */
    char *p = b->data;
    *b = (struct pl_buf){.limit = b->limit};
    return p;
}

void pl_buf_add_json(struct pl_buf *b, const char *s, size_t n)
{
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        pl_buf_add(b, s + from, i - from);
        from = i + 1;
        switch (c) {
        case '"': pl_buf_adds(b, "\\\""); break;
        case '\\': pl_buf_adds(b, "\\\\"); break;
        case '\n': pl_buf_adds(b, "\\n"); break;
        case '\r': pl_buf_adds(b, "\\r"); break;
        case '\t': pl_buf_adds(b, "\\t"); break;
        default: pl_buf_addf(b, "\\u%04x", c);
        }
    }
    pl_buf_add(b, s + from, n - from);
}

void pl_buf_add_json_lossy(struct pl_buf *b, const char *s, size_t n)
{
    size_t from = 0, i = 0;
    while (i < n) {
        uint32_t cp;
        const int len = pl_utf8_decode(s + i, n - i, &cp);
        if (len > 0) {
            i += (size_t)len;
            continue;
        }
        pl_buf_add_json(b, s + from, i - from);
        pl_buf_adds(b, "\xef\xbf\xbd");
        from = ++i;
    }
    pl_buf_add_json(b, s + from, n - from);
}
