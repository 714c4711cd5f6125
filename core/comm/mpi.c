/* mpi: this process as one of those that mpirun (or srun) has started. MPI itself is in a library of its own, so that the programs
 * run where there is none.
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <stddef.h>

#include "core/base/library.h"
#include "core/comm/peers.h"

pl_status pl_comm_mpi_open(struct pl_comm **out, const char *library, int timeout_ms, struct pl_err *err)
{
    const char *why_not;
    void *lib = pl_library_open(PL_COMM_MPI_LIBRARY, library, &why_not);
    if (lib == NULL)
        return pl_fail_param(err, PL_ENOTSUP, "ranks", "cannot load MPI: %.300s; build " PL_COMM_MPI_LIBRARY " with Open MPI's mpicc in the PATH",
                             why_not);
    pl_link_mpi_open_fn *open_link;
    *(void **)&open_link = dlsym(lib, PL_LINK_MPI_OPEN);
    struct pl_link *link = NULL;
    char why[200] = "it is no library of parley's";
    if (open_link == NULL || open_link(&link, PL_LINK_VERSION, why, sizeof why) != 0)
        return pl_fail(err, PL_EIO, PL_COMM_MPI_LIBRARY ": %s", why);
    return pl_comm_peers_new(out, link, timeout_ms, err);
}
