/* cuda: finds and loads the CUDA device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cuda.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/version.h"

/* Beside the program, links followed. */
static bool beside_program(char *path, size_t n)
{
    const ssize_t len = readlink("/proc/self/exe", path, n - 1);
    if (len <= 0)
        return false;
    path[len] = '\0';
    char *name = strrchr(path, '/') + 1;
    if ((size_t)(name - path) + sizeof PL_CUDA_LIBRARY > n)
        return false;
    memcpy(name, PL_CUDA_LIBRARY, sizeof PL_CUDA_LIBRARY);
    return access(path, R_OK) == 0;
}

static bool has_driver(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver != NULL)
        dlclose(driver);
    return driver != NULL;
}

pl_status pl_cuda_load(struct pl_device **out, const char *library, const struct pl_cuda_opts *opts, struct pl_err *err)
{
    char path[PATH_MAX];
    const char *name = library != NULL ? library : beside_program(path, sizeof path) ? path : PL_CUDA_LIBRARY;
    void *handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == NULL) {
        const char *why = dlerror();
        if (library == NULL && !has_driver())
            return pl_fail(err, PL_ENOTSUP, "this machine has no NVIDIA driver (libcuda.so.1): install one, or take --device cpu");
        return pl_fail(err, PL_ENOTSUP, "the CUDA device cannot be loaded: %s: build it with 'make cuda', or take --device cpu",
                       why != NULL ? why : name);
    }
    pl_cuda_open_fn *open = NULL;
    *(void **)&open = dlsym(handle, PL_CUDA_OPEN);
    if (open == NULL)
        return pl_fail(err, PL_ENOTSUP, "%s is not parley's CUDA device: it lacks " PL_CUDA_OPEN, name);
    return open(out, PL_CUDA_BUILD, opts, err);
}
