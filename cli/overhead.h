/* overhead: how much of the engine's time is in no operation of the device: planning, sampling, text, waking up.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CLI_OVERHEAD_H
#define PL_CLI_OVERHEAD_H

#include "cli/cli.h"

struct overhead {
    size_t n_passes;
    double us;    /* from one pass's end to the next one's, median */
    double share; /* of that in no operation, median; what reading the clock takes is left out of both */
};

/* Runs one stream through the real engine. False, with a word on standard error, when that failed. */
bool overhead_measure(struct overhead *out, struct cli_model *m);

#endif
