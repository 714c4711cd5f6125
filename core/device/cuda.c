/* cuda: finds and loads the CUDA device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cuda.h"

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

#include "core/base/library.h"
#include "core/base/version.h"

#define NAME_IT "name " PL_CUDA_LIBRARY " with --cuda-library, or leave that out"

static bool has_driver(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver != NULL)
        dlclose(driver);
    return driver != NULL;
}

pl_status pl_cuda_load(struct pl_device **out, const char *library, const struct pl_cuda_opts *opts, struct pl_err *err)
{
    const char *said;
    void *handle = pl_library_open(PL_CUDA_LIBRARY, library, &said);
    if (handle == NULL) {
        char why[200];
        snprintf(why, sizeof why, "%s", said); /* the next dlopen takes it away */
        if (library == NULL && !has_driver())
            return pl_fail(err, PL_ENOTSUP, "this machine has no NVIDIA driver (libcuda.so.1): install one, or take --device cpu");
        return pl_fail(err, PL_ENOTSUP, "the CUDA device cannot be loaded: %s: %s, or take --device cpu", why,
                       library == NULL ? "build it with 'make cuda', and install it beside the program" : NAME_IT);
    }
    pl_cuda_open_fn *open = NULL;
    *(void **)&open = dlsym(handle, PL_CUDA_OPEN);
    if (open == NULL)
        return pl_fail(err, PL_ENOTSUP, "%s is not parley's CUDA device, it lacks " PL_CUDA_OPEN ": " NAME_IT, library != NULL ? library : PL_CUDA_LIBRARY);
    return open(out, PL_CUDA_BUILD, opts, err);
}
