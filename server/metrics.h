/* metrics: HTTP counters of the daemon, and the Prometheus text of everything (format version 0.0.4).
 * Thread: any.  Owns: its counters.  Fails: rendering never; what does not fit is `other`.
 * Source: prometheus.io, exposition formats; the names of vLLM's metrics, with the prefix parley_.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_METRICS_H
#define PL_SERVER_METRICS_H

#include "core/base/buf.h"

struct pl_metrics;
struct pl_server;

struct pl_metrics *pl_metrics_new(void);
void pl_metrics_free(struct pl_metrics *m);
/* A request is over. pattern: a route's, NULL = none; status 499 = the client left before an answer. */
void pl_metrics_request(struct pl_metrics *m, const char *pattern, const char *method, int status, double seconds);
/* The method if it is a known one, else "other": labels and log lines take no words from clients. */
const char *pl_metrics_method(const char *method);
void pl_metrics_render(struct pl_metrics *m, const struct pl_server *s, struct pl_buf *out);

#endif
