/* apierr: what a failed request is answered: HTTP status, and OpenAI's error body {"error":{message,type,param,code}}.
 * Thread: any.  Owns: nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_APIERR_H
#define PL_SERVER_APIERR_H

#include "core/base/buf.h"
#include "core/base/status.h"

struct pl_http_req;
struct pl_http_resp;
struct pl_http_usage;

struct pl_apierr {
    int http;
    const char *type;
    const char *code; /* NULL = null */
    int retry_after;  /* seconds; 0 = none */
};

struct pl_apierr pl_apierr_of(pl_status code);
/* The body; out is appended to. Bytes of the message that are no UTF-8 (a cut character) become U+FFFD. */
void pl_apierr_write(struct pl_buf *out, const struct pl_err *err);
/* The same under another type and code; code NULL = null. more: further members of the error as JSON text (",\"lines\":[]"), NULL = none. */
void pl_apierr_write_as(struct pl_buf *out, const struct pl_err *err, const char *type, const char *code, const char *more);
/* The body of resp, whose status is set, where the request is out of reach (another thread answers); the log line is told by resp. */
void pl_apierr_fill(struct pl_http_resp *resp, const struct pl_err *err, const char *code, const char *more);
/* What pl_apierr_fill has left in resp goes to the request's log line. */
void pl_apierr_note(struct pl_http_usage *usage, const struct pl_http_resp *resp);
/* A whole answer; the request's log line is told too. */
void pl_apierr_answer(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_err *err);
/* The same with a status and code of its own (a literal): where the status code's usual ones do not say it. */
void pl_apierr_answer_as(struct pl_http_req *req, struct pl_http_resp *resp, int status, const char *code, const struct pl_err *err);

#endif
