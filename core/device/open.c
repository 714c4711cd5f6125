/* open: a device by the name that an operator gives it.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/device/cuda.h"
#include "core/device/device.h"

#define PL_LOG_MODULE "device"

static void report(const char *message)
{
    pl_log_error("%s", message);
}

/* "cuda" or "cuda:INDEX" */
static bool is_cuda(const char *name, unsigned *index)
{
    char *end;
    if (strncmp(name, "cuda", 4) != 0 || (name[4] != ':' && name[4] != '\0'))
        return false;
    const unsigned long i = name[4] == '\0' ? 0 : strtoul(name + 5, &end, 10);
    *index = (unsigned)i;
    return name[4] == '\0' || (name[5] >= '0' && name[5] <= '9' && *end == '\0' && i < 1024);
}

pl_status pl_device_open(struct pl_device **out, const char *name, const char *cuda_library, struct pl_pool *pool, struct pl_err *err)
{
    struct pl_cuda_opts opts = {.report = report};
    struct pl_err why = {0};
    const char *library = cuda_library != NULL && cuda_library[0] != '\0' ? cuda_library : NULL;
    if (is_cuda(name, &opts.index)) {
        const pl_status rc = pl_cuda_load(out, library, &opts, &why);
        if (rc == PL_OK)
            return rc;
        const bool passing = rc == PL_ENOMEM || rc == PL_EDEVICE; /* no fault of the configuration */
        return pl_fail_param(err, passing ? rc : PL_EINVAL, "device", "device %s: %s", name, why.msg);
    }
    const bool any = strcmp(name, "auto") == 0;
    if (any && pl_cuda_load(out, library, &opts, &why) == PL_OK)
        return PL_OK;
    if (any)
        pl_log_info("device auto: the CPU, since %s", why.msg);
    const char *isa = any || strcmp(name, "cpu") == 0 ? NULL : strncmp(name, "cpu-", 4) == 0 ? name + 4 : name;
    const pl_status rc = pl_cpu_open(out, pool, isa, &why);
    return rc == PL_OK || rc == PL_ENOMEM ? rc : pl_fail_param(err, PL_EINVAL, "device", "device %s: %s", name, why.msg);
}
