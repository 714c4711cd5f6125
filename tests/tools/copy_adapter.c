/* copy_adapter: reads an adapter and writes it as a PEFT folder, for tests of both.
 *   copy_adapter MODEL ADAPTER FOLDER
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "core/model/adapter.h"
#include "core/model/gguf.h"
#include "core/model/weights.h"

int main(int argc, char **argv)
{
    struct pl_err err = {0};
    struct pl_gguf *g = NULL;
    struct pl_adapter *a = NULL;
    struct pl_spec spec;
    unsigned arch;
    if (argc != 4) {
        fputs("usage: copy_adapter MODEL ADAPTER FOLDER\n", stderr);
        return 2;
    }
    pl_status rc = pl_gguf_open(&g, argv[1], &err);
    if (rc == PL_OK)
        rc = pl_spec_read(&spec, &arch, g, &err);
    if (rc == PL_OK)
        rc = pl_adapter_read(&a, argv[2], &spec, &err);
    if (rc == PL_OK) {
        const struct pl_adapter_info info = {.base = argv[1], .rank = a->pairs[0].rank, .alpha = a->pairs[0].alpha};
        rc = pl_adapter_write(argv[3], a, &spec, &info, &err);
    }
    if (rc != PL_OK)
        fprintf(stderr, "copy_adapter: %s\n", err.msg);
    pl_adapter_free(a);
    pl_gguf_close(g);
    return rc != PL_OK;
}
