/* limits: what a request's head may look like. The HTTP library takes framing that two parsers can read in two ways
 * (several Content-Length, Content-Length beside Transfer-Encoding, unknown codings, blanks before the colon); such heads
 * are refused here before anything is done with them, and the connection is closed.
 * Thread: any; a head belongs to one.  Owns: nothing.
 * Source: RFC 9110 and RFC 9112 (sections 3.2, 5, 6).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_LIMITS_H
#define PL_SERVER_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PL_LIMITS_HEADERS = 100 };

/* A ready-made refusal. message is a literal: nothing of the request is repeated. */
struct pl_http_fault {
    int status;
    const char *code; /* NULL = null in the body */
    const char *message;
    bool close;
};

struct pl_head {
    unsigned n_headers, n_length, n_te, n_host, n_auth;
    bool bad_name, bad_value, bad_length, chunked, expect_other, encoded, bad_type, form;
    uint64_t length; /* of the body, UINT64_MAX = more than fits */
};

/* Takes one header line. */
void pl_head_add(struct pl_head *h, const char *name, size_t n_name, const char *value, size_t n_value);
/* True when the head may be served; else *fault says why not. */
bool pl_head_check(const struct pl_head *h, const char *version, struct pl_http_fault *fault);
/* The same for what is said of the body. form: it is to be multipart/form-data, else JSON. */
bool pl_head_check_body(const struct pl_head *h, const char *method, uint64_t max_body, bool form, struct pl_http_fault *fault);

/* What no key protects, on a daemon that only this machine reaches: a browser here reaches it too, for whatever page is open. Refuses a name that
 * somebody else has made point here (the page reads what it wants then), and what a page of another site sends. host, site: the headers Host and
 * Sec-Fetch-Site, NULL = absent (no browser). own: the name that the daemon was told to listen on. */
bool pl_head_check_browser(const char *method, const char *host, const char *site, const char *own, struct pl_http_fault *fault);

#endif
