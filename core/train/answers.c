/* answers: what a model says to prompts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/answers.h"

#include <string.h>

#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/kv/kv.h"
#include "core/sched/adapters.h"

enum { AT_ONCE = 8, BATCH_TOKENS = 512, POLL_MS = 100 };

struct bench {
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_model *model;
    struct pl_engine *engine;
    struct pl_adapters *adapters;
    struct pl_served *served;
};

static void close_all(struct bench *b)
{
    pl_served_unref(b->served);
    if (b->adapters != NULL)
        pl_adapters_stop(b->adapters);
    pl_engine_free(b->engine);
    pl_adapters_free(b->adapters);
    pl_model_free(b->model);
    if (b->dev != NULL)
        b->dev->ops->close(b->dev);
    pl_pool_free(b->pool);
}

static pl_status open_all(struct bench *b, const struct pl_answers_opts *o, uint32_t longest, struct pl_err *err)
{
    pl_status rc = pl_pool_new(&b->pool, o->n_threads, err);
    if (rc == PL_OK)
        rc = pl_device_open(&b->dev, o->device, o->cuda_library, b->pool, err);
    if (rc == PL_OK)
        rc = pl_model_load(&b->model, o->gguf, b->dev, BATCH_TOKENS, AT_ONCE, err);
    if (rc != PL_OK)
        return rc;
    const uint32_t n_ctx = pl_model_spec(b->model)->n_ctx;
    struct pl_engine_opts e = {.max_sequences = AT_ONCE, .batch_tokens = BATCH_TOKENS, .kv_dtype = PL_F16, .queue_limit = AT_ONCE, .pool = b->pool};
    e.max_context = longest < n_ctx && o->max_tokens < n_ctx - longest ? longest + o->max_tokens : n_ctx;
    e.n_pages = AT_ONCE * (e.max_context / PL_KV_PAGE + 1);
    rc = pl_engine_new(&b->engine, &e, b->dev, b->model, o->tok, err);
    if (rc == PL_OK)
        rc = pl_engine_start(b->engine, err);
    if (rc == PL_OK && o->adapter != NULL)
        rc = pl_adapters_new(&b->adapters, b->engine, b->model, "", 1, err);
    if (rc == PL_OK && o->adapter != NULL)
        rc = pl_adapters_load(b->adapters, "adapter", o->adapter, false, err);
    if (rc == PL_OK && o->adapter != NULL)
        b->served = pl_adapters_find(b->adapters, "adapter");
    return rc;
}

static pl_status submit(struct bench *b, const struct pl_prompt *prompt, uint32_t max_tokens, struct pl_reply *reply, struct pl_err *err)
{
    struct pl_arena *a = pl_arena_new(0);
    struct pl_request *req = a != NULL ? pl_arena_zalloc(a, sizeof *req) : NULL;
    if (req == NULL) {
        pl_arena_free(a);
        return pl_fail(err, PL_ENOMEM, "out of memory");
    }
    *req = (struct pl_request){.arena = a, .prompts = prompt, .n_prompts = 1, .n = 1, .max_tokens = max_tokens};
    req->sampling = (struct pl_sampling){.top_p = 1, .repetition_penalty = 1, .n_top_logprobs = -1};
    if (b->served != NULL) /* the engine gives it back with the request */
        req->adapter = pl_adapters_find(b->adapters, "adapter");
    const pl_status rc = pl_engine_submit(b->engine, req, reply, err);
    if (rc != PL_OK) {
        pl_served_unref(req->adapter);
        pl_arena_free(a);
    }
    return rc;
}

/* Adds what is said until the end. */
static pl_status listen(const struct pl_answers_opts *o, struct pl_reply *reply, struct pl_buf *text, struct pl_err *err)
{
    struct pl_event ev;
    for (;;) {
        while (!pl_reply_wait(reply, POLL_MS))
            if (o->stop != NULL && *o->stop != 0)
                return PL_ESTOPPED;
        while (pl_reply_next(reply, &ev)) {
            pl_buf_add(text, ev.text, ev.n_text);
            if (ev.kind == PL_EV_ERROR)
                return pl_fail(err, ev.error.code, "%s", ev.error.msg);
            if (ev.kind == PL_EV_DONE)
                return text->failed ? pl_fail(err, PL_ENOMEM, "no memory for an answer") : PL_OK;
        }
    }
}

/* AT_ONCE are under way; they are listened to in order, and each has room for its whole answer. */
static pl_status ask_all(struct bench *b, const struct pl_answers_opts *o, const struct pl_prompt *prompts, uint32_t n, struct pl_buf *texts,
                         struct pl_err *err)
{
    struct pl_reply *replies[AT_ONCE] = {0};
    const uint32_t context = pl_engine_max_context(b->engine);
    pl_status rc = PL_OK;
    uint32_t asked = 0;
    for (uint32_t i = 0; i < n && rc == PL_OK; i++) {
        for (; asked < n && asked < i + AT_ONCE && rc == PL_OK; asked++) {
            struct pl_reply **reply = &replies[asked % AT_ONCE];
            if (prompts[asked].n >= context)
                continue;
            if ((*reply = pl_reply_new(pl_reply_needs(1) + context - prompts[asked].n, NULL, NULL)) == NULL)
                rc = pl_fail(err, PL_ENOMEM, "no memory for an answer");
            else
                rc = submit(b, &prompts[asked], o->max_tokens, *reply, err);
        }
        struct pl_reply **mine = &replies[i % AT_ONCE];
        if (rc == PL_OK && o->stop != NULL && *o->stop != 0)
            rc = PL_ESTOPPED;
        if (rc == PL_OK && *mine != NULL)
            rc = listen(o, *mine, &texts[i], err);
        if (rc == PL_OK) {
            pl_reply_unref(*mine);
            *mine = NULL;
        }
    }
    for (uint32_t i = 0; i < AT_ONCE; i++)
        if (replies[i] != NULL) {
            pl_reply_cancel(replies[i]);
            pl_reply_unref(replies[i]);
        }
    return rc;
}

pl_status pl_answers_make(const struct pl_answers_opts *o, const struct pl_prompt *prompts, uint32_t n, struct pl_buf *texts, struct pl_err *err)
{
    struct bench b = {0};
    uint32_t longest = 1;
    for (uint32_t i = 0; i < n; i++)
        longest = prompts[i].n > longest ? prompts[i].n : longest;
    pl_status rc = open_all(&b, o, longest, err);
    if (rc == PL_ENOMEM) /* the engine's own remedies are settings of a server */
        rc = pl_fail_param(err, rc, "answers", "device %s has no memory for the engine that answers and its cache: ask for no answers, or for shorter ones, "
                           "or take a device with more room", o->device);
    if (rc == PL_OK)
        rc = ask_all(&b, o, prompts, n, texts, err);
    close_all(&b);
    return rc;
}

void pl_answers_part(const struct pl_example *e, const struct pl_tok *tok, struct pl_prompt *prompt, struct pl_buf *reference)
{
    const uint32_t from = pl_data_prompt(e);
    uint32_t to = from;
    while (to < e->n && e->loss[to] != 0)
        to++;
    *prompt = (struct pl_prompt){e->ids, from};
    if (to > from && pl_tok_is_eog(tok, e->ids[to - 1]))
        to--;
    pl_tok_decode(tok, e->ids + from, to - from, false, reference);
}
