/* multipart: reads multipart/form-data piece by piece, whatever the pieces' borders, in bounded memory.
 *
 * Parts are parted by "\r\n--boundary". The bytes of that which have matched so far are known without being kept, so that a part's content
 * needs no buffer; only heads are collected.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/multipart.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/utf8.h"

enum { MAX_BOUNDARY = 70, MAX_NAME = 64, MAX_FILENAME = 255 };

typedef enum { PREAMBLE, CONTENT, AFTER, HEAD, EPILOGUE } state;

struct pl_multipart {
    struct pl_multipart_sink sink;
    state state;
    char delimiter[MAX_BOUNDARY + 5]; /* "\r\n--" boundary */
    size_t n_delimiter, back[MAX_BOUNDARY + 5]; /* back[k]: longest proper border of the first k bytes */
    size_t matched;
    char head[PL_MULTIPART_MAX_HEAD + 1]; /* HEAD: what has come; AFTER: too */
    size_t n_head;
    unsigned n_parts;
};

/* ---- heads --------------------------------------------------------------------------------------------------------- */

/* Finds parameter name in "form-data; name=\"x\"; filename=\"y\"". Returns 1, 0 = not there, -1 = malformed or longer than max. */
static int parameter(const char *value, const char *name, char *out, size_t max)
{
    const size_t n_name = strlen(name);
    for (const char *p = strchr(value, ';'); p != NULL && *p == ';';) {
        p += 1 + strspn(p + 1, " \t");
        const bool wanted = strncasecmp(p, name, n_name) == 0 && p[n_name] == '=';
        p += strcspn(p, "=;");
        if (*p != '=')
            continue;
        size_t n = 0;
        p++;
        const bool quoted = *p == '"';
        for (p += quoted; *p != '\0' && (quoted ? *p != '"' : strchr("; \t", *p) == NULL); p++) {
            if (quoted && *p == '\\' && (p[1] == '"' || p[1] == '\\'))
                p++;
            if (wanted && n == max)
                return -1;
            if (wanted)
                out[n++] = *p;
        }
        if (quoted && *p++ != '"')
            return -1;
        p += strspn(p, " \t");
        if (wanted) {
            out[n] = '\0';
            return 1;
        }
    }
    return 0;
}

/* Browsers and HTTP libraries write these three bytes as escapes in file names. */
static void unescape(char *s)
{
    char *to = s;
    for (; *s != '\0'; s++) {
        if (strncmp(s, "%22", 3) == 0)
            *to++ = '"', s += 2;
        else if (strncasecmp(s, "%0d", 3) == 0 || strncasecmp(s, "%0a", 3) == 0)
            *to++ = ' ', s += 2;
        else
            *to++ = *s;
    }
    *to = '\0';
}

static pl_status take_head(struct pl_multipart *m, struct pl_err *err)
{
    char *line = m->head, disposition[1024] = "", name[MAX_NAME + 1], filename[MAX_FILENAME + 1];
    m->head[m->n_head] = '\0';
    if (strlen(m->head) != m->n_head || !pl_utf8_valid(m->head, m->n_head))
        return pl_fail(err, PL_EINVAL, "a part's head has a NUL byte or is not UTF-8");
    for (char *next; *line != '\0'; line = next) {
        next = strstr(line, "\r\n");
        next = next != NULL ? (*next = '\0', next + 2) : line + strlen(line);
        static const char header[] = "content-disposition:";
        if (strncasecmp(line, header, sizeof header - 1) != 0)
            continue;
        if (strlen(line) >= sizeof disposition)
            return pl_fail(err, PL_EINVAL, "a part's Content-Disposition is too long");
        strcpy(disposition, line + sizeof header - 1);
    }
    const char *value = disposition + strspn(disposition, " \t");
    const int has_name = strncasecmp(value, "form-data", 9) == 0 ? parameter(value, "name", name, MAX_NAME) : 0;
    const int has_filename = parameter(value, "filename", filename, MAX_FILENAME);
    if (has_name != 1)
        return pl_fail(err, PL_EINVAL, "a part has no Content-Disposition: form-data with a name of at most %d bytes", MAX_NAME);
    if (has_filename < 0)
        return pl_fail_param(err, PL_EINVAL, name, "'%s': a file's name must have at most %d bytes", name, MAX_FILENAME);
    if (++m->n_parts > PL_MULTIPART_MAX_PARTS)
        return pl_fail(err, PL_EINVAL, "the form has more than %d parts", PL_MULTIPART_MAX_PARTS);
    if (has_filename == 1)
        unescape(filename);
    m->state = CONTENT;
    m->matched = 0;
    return m->sink.begin(m->sink.arg, name, has_filename == 1 ? filename : NULL, err);
}

/* ---- the body ------------------------------------------------------------------------------------------------------ */

static pl_status emit(struct pl_multipart *m, const char *bytes, size_t n, struct pl_err *err)
{
    return n > 0 && m->state == CONTENT ? m->sink.data(m->sink.arg, bytes, n, err) : PL_OK;
}

/* Content or preamble up to the next delimiter. *used: bytes taken. */
static pl_status take_content(struct pl_multipart *m, const char *bytes, size_t n, size_t *used, struct pl_err *err)
{
    size_t i = 0;
    pl_status st = PL_OK;
    while (i < n && st == PL_OK) {
        if (m->matched == 0) {
            const char *cr = memchr(bytes + i, '\r', n - i);
            const size_t plain = cr != NULL ? (size_t)(cr - bytes) - i : n - i;
            st = emit(m, bytes + i, plain, err);
            i += plain;
            if (i == n)
                break;
        }
        while (m->matched > 0 && m->delimiter[m->matched] != bytes[i] && st == PL_OK) {
            const size_t keep = m->back[m->matched];
            st = emit(m, m->delimiter, m->matched - keep, err);
            m->matched = keep;
        }
        if (st != PL_OK)
            break;
        if (m->delimiter[m->matched] != bytes[i]) {
            st = emit(m, bytes + i++, 1, err);
            continue;
        }
        i++;
        if (++m->matched < m->n_delimiter)
            continue;
        if (m->state == CONTENT)
            st = m->sink.end(m->sink.arg, err);
        m->state = AFTER;
        m->n_head = 0;
        break;
    }
    *used = i;
    return st;
}

/* After a delimiter: "--" ends the form, a line end begins a part. */
static pl_status take_after(struct pl_multipart *m, char c, struct pl_err *err)
{
    m->head[m->n_head++] = c;
    if (m->n_head == 1 && (c == '-' || c == '\r' || c == ' ' || c == '\t')) {
        m->n_head -= c == ' ' || c == '\t'; /* padding */
        return PL_OK;
    }
    if (m->n_head == 2 && memcmp(m->head, "--", 2) == 0)
        m->state = EPILOGUE;
    else if (m->n_head == 2 && memcmp(m->head, "\r\n", 2) == 0)
        m->state = HEAD;
    else
        return pl_fail(err, PL_EINVAL, "a boundary of the form is followed by something else than a line end");
    m->n_head = 0;
    return PL_OK;
}

static pl_status take_head_byte(struct pl_multipart *m, char c, struct pl_err *err)
{
    if (m->n_head == PL_MULTIPART_MAX_HEAD)
        return pl_fail(err, PL_EINVAL, "a part's head is longer than %d bytes", PL_MULTIPART_MAX_HEAD);
    m->head[m->n_head++] = c;
    if (m->n_head == 2 && memcmp(m->head, "\r\n", 2) == 0) {
        m->n_head = 0;
        return take_head(m, err);
    }
    if (m->n_head >= 4 && memcmp(m->head + m->n_head - 4, "\r\n\r\n", 4) == 0) {
        m->n_head -= 2;
        return take_head(m, err);
    }
    return PL_OK;
}

pl_status pl_multipart_take(struct pl_multipart *m, const char *bytes, size_t n, struct pl_err *err)
{
    pl_status st = PL_OK;
    for (size_t i = 0, used; i < n && st == PL_OK; i += used) {
        used = 1;
        switch (m->state) {
        case PREAMBLE:
        case CONTENT: st = take_content(m, bytes + i, n - i, &used, err); break;
        case AFTER: st = take_after(m, bytes[i], err); break;
        case HEAD: st = take_head_byte(m, bytes[i], err); break;
        case EPILOGUE: used = n - i; break;
        }
    }
    return st;
}

pl_status pl_multipart_finish(const struct pl_multipart *m, struct pl_err *err)
{
    return m->state == EPILOGUE ? PL_OK : pl_fail(err, PL_EINVAL, "the form ends before its last boundary");
}

pl_status pl_multipart_new(struct pl_multipart **out, const char *content_type, const struct pl_multipart_sink *sink, struct pl_err *err)
{
    static const char form[] = "multipart/form-data";
    char boundary[MAX_BOUNDARY + 1];
    const size_t n = sizeof form - 1;
    if (content_type == NULL || strncasecmp(content_type, form, n) != 0 || strchr("; \t", content_type[n]) == NULL)
        return pl_fail(err, PL_EINVAL, "the body must be a form: send Content-Type: multipart/form-data");
    if (parameter(content_type, "boundary", boundary, MAX_BOUNDARY) != 1 || boundary[0] == '\0' || strpbrk(boundary, "\r\n") != NULL)
        return pl_fail(err, PL_EINVAL, "Content-Type: multipart/form-data needs a boundary of 1 to %d characters", MAX_BOUNDARY);
    struct pl_multipart *m = calloc(1, sizeof *m);
    if (m == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    m->sink = *sink;
    strcpy(m->delimiter, "\r\n--");
    strcat(m->delimiter, boundary);
    m->n_delimiter = strlen(m->delimiter);
    for (size_t i = 1, k = 0; i < m->n_delimiter; i++) {
        while (k > 0 && m->delimiter[i] != m->delimiter[k])
            k = m->back[k];
        k += m->delimiter[i] == m->delimiter[k];
        m->back[i + 1] = k;
    }
    m->matched = 2; /* the first delimiter needs no line end before it */
    *out = m;
    return PL_OK;
}

void pl_multipart_free(struct pl_multipart *m)
{
    free(m);
}
