/* ops: where the time of a forward pass goes, operation by operation.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_OPS_H
#define PL_CLI_OPS_H

#include <stdbool.h>

struct cli_how;

/* `parley bench --ops`. Returns the exit status. */
int cli_ops(const char *model, const struct cli_how *how, bool json);

#endif
