/* peers: a communicator over links.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_COMM_PEERS_H
#define PL_COMM_PEERS_H

#include "core/comm/comm.h"
#include "core/comm/link.h"

/* The link moves in, also on failure. */
pl_status pl_comm_peers_new(struct pl_comm **out, struct pl_link *link, int timeout_ms, struct pl_err *err) PL_MUST_CHECK;

#endif
