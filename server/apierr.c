/* apierr: what a failed request is answered.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/apierr.h"

#include <stdio.h>
#include <string.h>

#include "server/http.h"

/* Clients send 408, 409, 429 and 5xx again by themselves: what is wrong with the request must be another 4xx. */
struct pl_apierr pl_apierr_of(pl_status code)
{
    switch ((pl_status_code)code) {
    case PL_OK: break;
    case PL_EINVAL:
    case PL_ERANGE: return (struct pl_apierr){400, "invalid_request_error", NULL, 0};
    case PL_ENOTSUP: return (struct pl_apierr){400, "invalid_request_error", "unsupported_parameter", 0};
    case PL_ENOENT: return (struct pl_apierr){404, "invalid_request_error", "model_not_found", 0};
    case PL_ETOOLONG: return (struct pl_apierr){400, "invalid_request_error", "context_length_exceeded", 0};
    case PL_EFULL: return (struct pl_apierr){429, "rate_limit_error", "rate_limit_exceeded", 1};
    case PL_ESTOPPED: return (struct pl_apierr){503, "server_error", "shutting_down", 1};
    case PL_ENOMEM:
    case PL_ENOPAGE: return (struct pl_apierr){503, "server_error", "out_of_memory", 1};
    case PL_EBUSY: return (struct pl_apierr){503, "server_error", "device_busy", 10};
    case PL_EDEVICE: return (struct pl_apierr){503, "server_error", "device_failed", 10};
    case PL_ERANK: return (struct pl_apierr){503, "server_error", "rank_lost", 10};
    case PL_EFORMAT: return (struct pl_apierr){500, "server_error", "invalid_output", 0};
    case PL_ENOSPC: return (struct pl_apierr){507, "server_error", "disk_full", 0};
    case PL_EIO: break;
    }
    return (struct pl_apierr){500, "server_error", NULL, 0};
}

static void add_string(struct pl_buf *out, const char *s)
{
    if (s == NULL || s[0] == '\0') {
        pl_buf_adds(out, "null");
        return;
    }
    pl_buf_addc(out, '"');
    pl_buf_add_json_lossy(out, s, strlen(s));
    pl_buf_addc(out, '"');
}

void pl_apierr_write_as(struct pl_buf *out, const struct pl_err *err, const char *type, const char *code, const char *more)
{
    pl_buf_adds(out, "{\"error\":{\"message\":");
    add_string(out, err->msg[0] != '\0' ? err->msg : pl_status_text(err->code));
    pl_buf_addf(out, ",\"type\":\"%s\",\"param\":", type);
    add_string(out, err->param);
    pl_buf_adds(out, ",\"code\":");
    add_string(out, code);
    pl_buf_adds(out, more != NULL ? more : "");
    pl_buf_adds(out, "}}");
}

void pl_apierr_write(struct pl_buf *out, const struct pl_err *err)
{
    struct pl_apierr a = pl_apierr_of(err->code);
    pl_apierr_write_as(out, err, a.type, a.code, NULL);
}

void pl_apierr_fill(struct pl_http_resp *resp, const struct pl_err *err, const char *code, const char *more)
{
    const char *type = resp->status >= 500 ? "server_error" : resp->status == 429 ? "rate_limit_error" : "invalid_request_error";
    resp->error = code != NULL ? code : type;
    snprintf(resp->param, sizeof resp->param, "%s", err->param);
    pl_buf_clear(&resp->body);
    pl_apierr_write_as(&resp->body, err, type, code, more);
}

void pl_apierr_note(struct pl_http_usage *usage, const struct pl_http_resp *resp)
{
    if (resp->error == NULL)
        return;
    usage->error = resp->error;
    memcpy(usage->param, resp->param, sizeof usage->param);
}

void pl_apierr_answer(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_err *err)
{
    struct pl_apierr a = pl_apierr_of(err->code);
    resp->status = a.http;
    resp->retry_after = a.retry_after;
    resp->final = a.http == 507; /* a full disk is still full a second later */
    pl_apierr_fill(resp, err, a.code, NULL);
    pl_apierr_note(req->usage, resp);
}

void pl_apierr_answer_as(struct pl_http_req *req, struct pl_http_resp *resp, int status, const char *code, const struct pl_err *err)
{
    resp->status = status;
    resp->final = status >= 500;
    pl_apierr_fill(resp, err, code, NULL);
    pl_apierr_note(req->usage, resp);
}
