/* status: result codes and error messages.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/status.h"

#include <errno.h>
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

pl_status pl_status_of_errno(int why)
{
    if (why == ENOSPC || why == EDQUOT || why == EFBIG)
        return PL_ENOSPC;
    return why == ENOMEM ? PL_ENOMEM : PL_EIO;
}

void pl_err_set(struct pl_err *e, pl_status code, const char *param, const char *fmt, ...)
{
    if (e == NULL)
        return;
    e->code = code;
    snprintf(e->param, sizeof e->param, "%s", param);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
}

void pl_assert_failed(const char *cond, const char *file, int line)
{
    pl_log_error("assertion failed: %s at %s:%d", cond, file, line);
    abort();
}
