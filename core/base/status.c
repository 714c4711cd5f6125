/* status: result codes and error messages.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/base/log.h"

#define PL_LOG_MODULE "base"



static const char *const status_texts[PL_STATUS_COUNT] = {
    "ok",
#define X(name, text) text,
    PL_STATUS_LIST(X)
#undef X
};

const char *pl_status_text(pl_status code)
{
    return code <= 0 && code > -PL_STATUS_COUNT ? status_texts[-code] : "unknown status";
}

static void fill(struct pl_err *e, pl_status code, const char *param, const char *fmt, va_list ap)
    __attribute__((format(printf, 4, 0)));

static void fill(struct pl_err *e, pl_status code, const char *param, const char *fmt, va_list ap)
{
    if (e == NULL)
        return;
    e->code = code;
    snprintf(e->param, sizeof e->param, "%s", param);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
}

pl_status pl_fail(struct pl_err *e, pl_status code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fill(e, code, "", fmt, ap);
    va_end(ap);
    return code;
}

pl_status pl_fail_param(struct pl_err *e, pl_status code, const char *param, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fill(e, code, param, fmt, ap);
    va_end(ap);
    return code;
}

void pl_assert_failed(const char *cond, const char *file, int line)
{
    pl_log_error("assertion failed: %s at %s:%d", cond, file, line);
    abort();
}
