/* server: what the request handlers share: configuration, models, counters, jobs. Read-only after start.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_SERVER_H
#define PL_SERVER_SERVER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "config/config.h"
#include "core/base/status.h"

struct pl_comm;
struct pl_metrics;
struct pl_registry;
struct pl_http;
struct pl_jobs;

struct pl_server {
    const struct pl_config *config;
    uint64_t start_ns;
    atomic_bool ready; /* the first model is in memory (release/acquire) */
    atomic_bool draining;
    struct pl_comm *world;   /* the other processes that hold parts of the model; NULL = none do */
    void (*lost)(void *arg); /* for engines: the device or a rank is lost, this process is to end */
    struct pl_registry *models;
    struct pl_metrics *metrics;
    const struct pl_http *http;
    struct pl_jobs *jobs;    /* NULL = the data directory cannot be used; jobs_error says why */
    struct pl_err jobs_error;
};

#endif
