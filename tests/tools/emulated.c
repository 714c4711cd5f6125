/* emulated: the CUDA device on a CPU, as a device like any other.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/tools/emulated.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/device/cuda.h"

static void report(const char *message)
{
    fprintf(stderr, "%s\n", message);
}

static const char *library(void)
{
    static char path[PATH_MAX];
    const char *given = getenv("PARLEY_TEST_CUDA_LIBRARY");
    if (given != NULL)
        return given;
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    path[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(path, '/');
    if (slash != NULL)
        snprintf(slash + 1, sizeof path - (size_t)(slash + 1 - path), "libparley_cuda_emu.so");
    return path;
}

pl_status emulated_open(struct pl_device **out, struct pl_err *err)
{
    const struct pl_cuda_opts opts = {.report = report};
    return pl_cuda_load(out, library(), &opts, err);
}

void emulated_reverse(bool reverse)
{
    void *handle = dlopen(library(), RTLD_NOW | RTLD_NOLOAD);
    void (*set)(bool) = NULL;
    if (handle == NULL)
        return;
    *(void **)&set = dlsym(handle, "emu_set_reverse");
    set(reverse);
    dlclose(handle);
}

static unsigned long count_of(const char *name)
{
    void *handle = dlopen(library(), RTLD_NOW | RTLD_NOLOAD);
    unsigned long (*count)(void) = NULL;
    if (handle == NULL)
        return 0;
    *(void **)&count = dlsym(handle, name);
    const unsigned long n = count();
    dlclose(handle);
    return n;
}

unsigned long emulated_graph_launches(void)
{
    return count_of("emu_graph_launches");
}

unsigned long emulated_launches(void)
{
    return count_of("emu_launches");
}

bool device_is_cuda(const char *name)
{
    return name != NULL && strncmp(name, "cuda", 4) == 0;
}

pl_status device_open_for(struct pl_device **out, struct pl_pool *pool, const char *name, unsigned rank, struct pl_err *err)
{
    const struct pl_cuda_opts opts = {.report = report, .index = rank};
    if (!device_is_cuda(name))
        return pl_cpu_open(out, pool, name, err);
    return pl_cuda_load(out, strcmp(name, "cuda") == 0 ? NULL : library(), &opts, err);
}

pl_status device_open(struct pl_device **out, struct pl_pool *pool, const char *name, struct pl_err *err)
{
    return device_open_for(out, pool, name, 0, err);
}

/* A library that is loaded already is found by its name alone. */
bool emulated_nccl(void)
{
    char path[PATH_MAX + 32];
    const char *device = library(), *slash = strrchr(device, '/');
    snprintf(path, sizeof path, "%.*s/nccl_emu/libnccl.so.2", slash != NULL ? (int)(slash - device) : 0, device);
    return access(device, R_OK) == 0 && dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) != NULL;
}
