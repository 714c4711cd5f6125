/* limits: what a request's head may look like.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/limits.h"

#include <string.h>
#include <strings.h>

static bool token_char(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c != '\0' && strchr("-_!#$%&'*+.^`|~", c) != NULL);
}

static bool same(const char *a, size_t n, const char *b)
{
    return n == strlen(b) && strncasecmp(a, b, n) == 0;
}

static void take_length(struct pl_head *h, const char *s, size_t n)
{
    uint64_t v = 0;
    h->n_length++;
    if (n == 0)
        h->bad_length = true;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9')
            h->bad_length = true;
        else if (__builtin_mul_overflow(v, 10u, &v) || __builtin_add_overflow(v, (uint64_t)(s[i] - '0'), &v))
            v = UINT64_MAX / 10 + 1; /* stays too large whatever follows */
    }
    h->length = v;
}

/* Takes "application/json", "application/json; charset=utf-8" and "application/<anything>+json". */
static bool json_type(const char *s, size_t n)
{
    const char *semi = memchr(s, ';', n);
    size_t n_type = semi != NULL ? (size_t)(semi - s) : n;
    while (n_type > 0 && (s[n_type - 1] == ' ' || s[n_type - 1] == '\t'))
        n_type--;
    const bool json = same(s, n_type, "application/json") ||
                      (n_type > 17 && strncasecmp(s, "application/", 12) == 0 && strncasecmp(s + n_type - 5, "+json", 5) == 0);
    if (!json || semi == NULL)
        return json;
    const char *p = semi + 1, *end = s + n;
    while (p < end && (*p == ' ' || *p == '\t'))
        p++;
    if (end - p < 8 || strncasecmp(p, "charset=", 8) != 0)
        return true; /* other parameters mean nothing for JSON */
    p += 8;
    size_t n_set = (size_t)(end - p);
    if (n_set >= 2 && p[0] == '"' && p[n_set - 1] == '"') {
        p++;
        n_set -= 2;
    }
    return same(p, n_set, "utf-8") || same(p, n_set, "utf8") || same(p, n_set, "us-ascii");
}

void pl_head_add(struct pl_head *h, const char *name, size_t n_name, const char *value, size_t n_value)
{
    static const char form[] = "multipart/form-data";
    h->n_headers++;
    if (n_name == 0)
        h->bad_name = true;
    for (size_t i = 0; i < n_name; i++)
        if (!token_char((unsigned char)name[i]))
            h->bad_name = true;
    for (size_t i = 0; i < n_value; i++) {
        const unsigned char c = (unsigned char)value[i];
        if ((c < 0x20 && c != '\t') || c == 0x7f)
            h->bad_value = true;
    }
    if (same(name, n_name, "content-length")) {
        take_length(h, value, n_value);
    } else if (same(name, n_name, "transfer-encoding")) {
        h->n_te++;
        h->chunked = same(value, n_value, "chunked");
    } else if (same(name, n_name, "host")) {
        h->n_host++;
    } else if (same(name, n_name, "authorization") || same(name, n_name, "x-api-key")) {
        h->n_auth++;
    } else if (same(name, n_name, "expect")) {
        h->expect_other = !same(value, n_value, "100-continue");
    } else if (same(name, n_name, "content-encoding")) {
        h->encoded = !same(value, n_value, "identity");
    } else if (same(name, n_name, "content-type")) {
        h->bad_type = n_value > 0 && !json_type(value, n_value);
        h->form = n_value > sizeof form - 1 && strncasecmp(value, form, sizeof form - 1) == 0;
    }
}

static bool refuse(struct pl_http_fault *f, int status, const char *code, const char *message)
{
    *f = (struct pl_http_fault){status, code, message, true};
    return false;
}

bool pl_head_check(const struct pl_head *h, const char *version, struct pl_http_fault *fault)
{
    const bool v11 = strcmp(version, "HTTP/1.1") == 0;
    if (!v11 && strcmp(version, "HTTP/1.0") != 0)
        return refuse(fault, 505, NULL, "Only HTTP/1.0 and HTTP/1.1 are spoken here.");
    if (h->n_headers > PL_LIMITS_HEADERS)
        return refuse(fault, 431, NULL, "The request has more than 100 header lines.");
    if (h->bad_name || h->bad_value)
        return refuse(fault, 400, NULL, "A header line has a name or value with characters that are not allowed there.");
    if (h->n_length > 1 || h->bad_length)
        return refuse(fault, 400, NULL, "Content-Length must be one decimal number.");
    if (h->n_te > 0 && h->n_length > 0)
        return refuse(fault, 400, NULL, "Content-Length and Transfer-Encoding exclude each other.");
    if (h->n_te > 1 || (h->n_te > 0 && !v11))
        return refuse(fault, 400, NULL, "Transfer-Encoding must come once, and only in HTTP/1.1.");
    if (h->n_te > 0 && !h->chunked)
        return refuse(fault, 501, NULL, "The only transfer coding understood is chunked.");
    if (h->n_host > 1 || (v11 && h->n_host == 0))
        return refuse(fault, 400, NULL, "HTTP/1.1 needs exactly one Host header.");
    if (h->n_auth > 1)
        return refuse(fault, 400, NULL, "Send one Authorization or one X-Api-Key header, not several.");
    return true;
}

/* An address, or a name that never leads to another machine. */
static bool is_local(const char *host, const char *own)
{
    const char *end = host[0] == '[' ? strchr(host, ']') : strrchr(host, ':');
    const size_t n = end != NULL ? (size_t)(end - host) : strlen(host);
    static const char top[] = ".localhost";
    if (host[0] == '[')
        return end != NULL && strspn(host + 1, "0123456789abcdefABCDEF:.") == n - 1;
    return (n > 0 && strspn(host, "0123456789.") == n) || same(host, n, top + 1) || same(host, n, own) ||
           (n >= sizeof top && strncasecmp(host + n - (sizeof top - 1), top, sizeof top - 1) == 0);
}

bool pl_head_check_browser(const char *method, const char *host, const char *site, const char *own, struct pl_http_fault *fault)
{
    const bool reads = strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
    if (host != NULL && !is_local(host, own))
        return refuse(fault, 403, "host_not_allowed", "This server listens on this machine only and asks for no key, so it answers to localhost and to "
                      "addresses, not to other names: set api-key, or have the proxy send Host: localhost.");
    if (site != NULL && !reads && strcasecmp(site, "cross-site") == 0)
        return refuse(fault, 403, "cross_site", "This server asks for no key, so it takes nothing that a browser sends for a page of another site: set "
                      "api-key, or have the proxy remove Sec-Fetch-Site.");
    return true;
}

bool pl_head_check_body(const struct pl_head *h, const char *method, uint64_t max_body, bool form, struct pl_http_fault *fault)
{
    if (h->length > max_body)
        return refuse(fault, 413, "request_too_large", form ? "The form is larger than this server accepts (max-file-mb)."
                                                            : "The request body is larger than this server accepts (max-body-mb).");
    if (h->expect_other)
        return refuse(fault, 417, NULL, "The only expectation understood is 100-continue.");
    if (h->encoded)
        return refuse(fault, 415, NULL, "The request body must not be compressed.");
    if (form && !h->form)
        return refuse(fault, 415, NULL, "The request body must be a form: send Content-Type: multipart/form-data.");
    if (!form && h->bad_type && strcmp(method, "POST") == 0)
        return refuse(fault, 415, NULL, "The request body must be JSON in UTF-8: send Content-Type: application/json.");
    return true;
}
