/* engine: the thread that owns scheduler, pages and device, and runs one iteration after another: admit, pick tokens up
 * to the batch budget (decodes first, then chunks of prefill), make pages, one forward pass, sample, push, wake.
 * Thread: submit, stats, cancel (through the reply) and stop from any thread; everything else happens on its own thread.
 * Owns: model and device caches are borrowed from the caller until pl_engine_free; requests move in on submit.
 * Fails: submit PL_EFULL (queue at its bound), PL_ETOOLONG (param "messages"/"prompt" is the caller's to set), PL_ESTOPPED, PL_ENOMEM,
 * PL_EDEVICE or PL_ERANK (the device, or a rank that has a part of the model, is lost: health is red until restart).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_ENGINE_H
#define PL_SCHED_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/hist.h"
#include "core/base/status.h"
#include "core/model/dtype.h"
#include "core/sample/sample.h"
#include "core/sched/reply.h"
#include "core/text/detok.h"

struct pl_engine;
struct pl_model;
struct pl_tok;
struct pl_arena;
struct pl_device;
struct pl_lora_set;
struct pl_served;
struct pl_pool;

enum { PL_ENGINE_MIN_PAGES = 2 /* of the cache */ };

struct pl_engine_opts {
    uint32_t max_sequences; /* running at once */
    uint32_t batch_tokens;  /* per iteration */
    uint32_t gap_ms;        /* an iteration with prompts takes about so long, or twice as long as without them, while anything decodes; 0 = any time */
    uint32_t max_context;   /* prompt + output of one sequence; <= the model's */
    uint32_t n_pages;       /* of PL_KV_PAGE tokens; 0 = a usual length for each of max_sequences, at least one max_context, at most half of free memory;
                               on a device with memory of its own device_percent of what is free there */
    uint32_t max_pages;     /* with n_pages 0: no more than so many; 0 = no such bound */
    uint32_t device_percent;
    pl_dtype kv_dtype;
    uint32_t queue_limit; /* waiting requests; a further one is PL_EFULL */
    uint32_t max_draft;   /* tokens guessed ahead for a sequence that decodes (draft.h), at most PL_DRAFT_MAX; 0 = none */
    uint32_t draft_sequences; /* as long as at most so many decode; at most PL_DRAFT_SEQS */
    void (*lost)(void *arg); /* called once, on the engine's thread, when the device or a rank is lost and all requests have ended; NULL = nobody */
    void *lost_arg;
    struct pl_pool *pool; /* borrowed: samples the rows of a step, beside the device that it computes for; engines that share it take
                           * turns, pass by pass. NULL = the engine's thread alone */
};

struct pl_prompt {
    const int32_t *ids;
    uint32_t n; /* at least 1 */
};

/* Plain data in one arena; the engine frees the arena when the reply's sequences have ended. */
struct pl_request {
    struct pl_arena *arena; /* holds this struct and all it points to */
    const struct pl_prompt *prompts;
    uint32_t n_prompts;
    uint32_t n; /* choices per prompt; choice = prompt * n + i; choice i of a prompt draws with seed + i */
    struct pl_sampling sampling;
    uint32_t max_tokens; /* 0 = none (prompt log-probabilities only), UINT32_MAX = to the end of the context */
    uint32_t min_tokens; /* end-of-generation tokens are banned before this many, and stop strings do not end the text */
    bool ignore_eos;
    const struct pl_stop *stops;
    uint32_t n_stops;
    bool include_stop;    /* let the matched stop string out */
    struct pl_served *adapter; /* one reference, which moves in too; NULL = the base model (adapters.h) */
    bool prompt_logprobs; /* PL_EV_PROMPT with sampling.n_top_logprobs alternatives; bypasses the prefix cache */
};

pl_status pl_engine_new(struct pl_engine **out, const struct pl_engine_opts *opts, struct pl_device *dev, struct pl_model *model,
                        const struct pl_tok *tok, struct pl_err *err) PL_MUST_CHECK;
pl_status pl_engine_start(struct pl_engine *e, struct pl_err *err) PL_MUST_CHECK;
/* On PL_OK the request's arena belongs to the engine and a reference to reply is taken; on failure both stay the caller's. */
pl_status pl_engine_submit(struct pl_engine *e, struct pl_request *req, struct pl_reply *reply, struct pl_err *err) PL_MUST_CHECK;
/* Takes no new requests from now on; returns true when all running ones finished within timeout_ms; what is left then is
 * ended with PL_ESTOPPED. */
bool pl_engine_drain(struct pl_engine *e, int timeout_ms);
void pl_engine_free(struct pl_engine *e);

/* Counters since start (monotonic) of one model: the base, or an adapter. */
struct pl_model_stats {
    uint64_t n_finished_stop, n_finished_length, n_cancelled, n_failed; /* requests' choices */
    uint64_t prompt_tokens, cached_tokens, generated_tokens;
    uint64_t prefix_queries, prefix_hits; /* tokens asked for, tokens found */
    struct pl_hist ttft, itl, e2e, queue_time, prefill_time, decode_time; /* seconds */
    struct pl_hist prompt_len, output_len;                                /* tokens */
};
void pl_model_stats_init(struct pl_model_stats *s);

/* The engine's own, and gauges. */
struct pl_engine_stats {
    struct pl_model_stats base;
    uint64_t n_submitted, n_refused; /* requests' choices */
    uint64_t draft_tokens, draft_accepted; /* guessed, and of these right */
    uint64_t n_preempted, n_steps;
    uint32_t running, waiting;
    uint32_t pages_total, pages_held, pages_cached;
    uint64_t last_step_ns; /* pl_now_ns() of the newest finished iteration, 0 = none yet */
    bool device_lost;
    struct pl_hist step_tokens;
};
void pl_engine_stats(struct pl_engine *e, struct pl_engine_stats *out);
uint32_t pl_engine_max_context(const struct pl_engine *e); /* also bounded by what all pages can hold */
/* Forward progress: false when something runs but no iteration finished within max_ms, or the device is lost. */
bool pl_engine_healthy(struct pl_engine *e, int max_ms);

/* Has task->run(task, e) called on the engine's thread, between two passes, soon; the task is left alone afterwards.
 * PL_ESTOPPED when the engine is going: it will not be called. */
struct pl_engine_task {
    struct pl_engine_task *next;
    void (*run)(struct pl_engine_task *task, struct pl_engine *e);
};
pl_status pl_engine_post(struct pl_engine *e, struct pl_engine_task *task) PL_MUST_CHECK;
/* On the engine's thread (in a task): as pl_model_adapter_add and remove. */
pl_status pl_engine_adapter_add(struct pl_engine *e, uint32_t slot, struct pl_lora_set *a, struct pl_err *err) PL_MUST_CHECK;
void pl_engine_adapter_remove(struct pl_engine *e, uint32_t slot);

#endif
