/* server: what the request handlers share: configuration, model, tokenizer, template, engine. Read-only after start.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_SERVER_H
#define PL_SERVER_SERVER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "config/config.h"
#include "core/base/status.h"

struct pl_comm;
struct pl_tok;
struct pl_chat;
struct pl_model;
struct pl_engine;
struct pl_adapters;
struct pl_metrics;
struct pl_http;
struct pl_jobs;

struct pl_server {
    const struct pl_config *config;
    atomic_bool ready; /* model loaded and warm: what comes below is valid (release/acquire) */
    atomic_bool draining;
    struct pl_comm *world;   /* the other processes that hold parts of the model; NULL = none do */
    void (*lost)(void *arg); /* for the engine: the device or a rank is lost, this process is to end */
    const char *model_path;
    const char *model_id;    /* what /v1/models shows: --alias, else the file name without .gguf */
    char fingerprint[32];    /* "fp_" + hash of weights file, build and kernels */
    time_t created;          /* model file's time */
    const struct pl_tok *tok;
    const struct pl_chat *chat; /* NULL = the model has no template: /v1/chat/completions answers 400 */
    const struct pl_model *model;
    struct pl_engine *engine;
    struct pl_adapters *adapters;
    struct pl_metrics *metrics;
    const struct pl_http *http;
    struct pl_jobs *jobs;    /* NULL = the data directory cannot be used; jobs_error says why */
    struct pl_err jobs_error;
};

#endif
