/* mpi: this process as one of those that mpirun (or srun) has started. MPI itself is in a library of its own, so that the programs
 * run where there is none.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/comm/peers.h"

/* dir, seen from the program's folder; "" = that folder itself */
static void *open_beside(const char *dir, const char *name)
{
    char path[PATH_MAX + 64];
    const ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
    if (n <= 0)
        return NULL;
    path[n] = '\0';
    char *slash = strrchr(path, '/');
    const size_t room = sizeof path - (size_t)(slash + 1 - path);
    if (snprintf(slash + 1, room, "%s%s", dir, name) >= (int)room || access(path, R_OK) != 0)
        return NULL;
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static void *open_library(const char *library)
{
    if (library != NULL)
        return dlopen(library, RTLD_NOW | RTLD_LOCAL);
    void *lib = open_beside("", PL_COMM_MPI_LIBRARY);
    if (lib == NULL)
        lib = open_beside("../lib/parley/", PL_COMM_MPI_LIBRARY);
    return lib != NULL ? lib : dlopen(PL_COMM_MPI_LIBRARY, RTLD_NOW | RTLD_LOCAL);
}

pl_status pl_comm_mpi_open(struct pl_comm **out, const char *library, int timeout_ms, struct pl_err *err)
{
    void *lib = open_library(library);
    if (lib == NULL)
        return pl_fail_param(err, PL_ENOTSUP, "ranks", "cannot load MPI: %.300s; build " PL_COMM_MPI_LIBRARY " with Open MPI's mpicc in the PATH",
                             dlerror());
    pl_link_mpi_open_fn *open_link;
    *(void **)&open_link = dlsym(lib, PL_LINK_MPI_OPEN);
    struct pl_link *link = NULL;
    char why[200] = "it is no library of parley's";
    if (open_link == NULL || open_link(&link, PL_LINK_VERSION, why, sizeof why) != 0)
        return pl_fail(err, PL_EIO, PL_COMM_MPI_LIBRARY ": %s", why);
    return pl_comm_peers_new(out, link, timeout_ms, err);
}
