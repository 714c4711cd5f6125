/* generate: from checked parameters to a running request, and from its events to bytes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/generate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "core/base/mem.h"
#include "core/sched/adapters.h"
#include "core/text/tok.h"
#include "server/apierr.h"
#include "server/prompt.h"
#include "server/server.h"

enum { STREAM_PIECE = 64 << 10, RING_SLACK = 64, ANSWER_MOST = 60 << 20 /* of a whole answer; http sends a little more */ };

/* ---- streams ------------------------------------------------------------------------------------------------------- */

/* The chunk's head up to the choice's members. */
static void open_chunk(struct pl_gen *g, uint32_t choice, struct pl_buf *out)
{
    pl_buf_add(out, g->prefix.data, g->prefix.len);
    pl_buf_addf(out, "%u", choice);
}

static void close_chunk(struct pl_gen *g, struct pl_gen_choice *c, const char *finish, struct pl_buf *out)
{
    pl_buf_adds(out, ",\"logprobs\":");
    pl_gen_take_logprobs(g, c, out);
    if (finish != NULL)
        pl_buf_addf(out, ",\"finish_reason\":\"%s\"}]", finish);
    else
        pl_buf_adds(out, ",\"finish_reason\":null}]");
    pl_buf_adds(out, g->include_usage ? ",\"usage\":null}\n\n" : "}\n\n");
}

static void text_chunk(struct pl_gen *g, uint32_t choice, const char *text, size_t n, const char *finish, struct pl_buf *out)
{
    open_chunk(g, choice, out);
    if (g->chat && n == 0 && finish != NULL) {
        pl_buf_adds(out, ",\"delta\":{}");
    } else {
        pl_buf_adds(out, g->chat ? ",\"delta\":{\"content\":\"" : ",\"text\":\"");
        pl_buf_add_json_lossy(out, text, n); /* an echoed prompt of token ids may be anything */
        pl_buf_adds(out, g->chat ? "\"}" : "\"");
    }
    close_chunk(g, &g->choices[choice], finish, out);
}

/* What comes before a choice's first token: its role, or the prompt that is echoed. */
static void open_choice(struct pl_gen *g, uint32_t choice, struct pl_buf *out)
{
    struct pl_gen_choice *c = &g->choices[choice];
    if (c->opened)
        return;
    c->opened = true;
    if (g->chat) {
        open_chunk(g, choice, out);
        pl_buf_adds(out, ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
        close_chunk(g, c, NULL, out);
    } else if (g->echo) {
        uint32_t p = choice / g->best_of;
        text_chunk(g, choice, g->prompt_texts[p], g->prompt_bytes[p], NULL, out);
    }
}

static void end_stream(struct pl_gen *g, struct pl_buf *out)
{
    if (g->include_usage) {
        /* the prefix without its choice */
        size_t n = g->prefix.len - strlen("{\"index\":");
        pl_buf_add(out, g->prefix.data, n);
        pl_buf_adds(out, "],\"usage\":");
        pl_gen_add_usage(g, out);
        pl_buf_adds(out, "}\n\n");
    }
    pl_buf_adds(out, "data: [DONE]\n\n");
}

/* ---- events -------------------------------------------------------------------------------------------------------- */

static size_t held_by(const struct pl_gen_choice *c)
{
    return c->text.len + c->logprobs.len + c->lp_values.len + c->lp_top.len + c->lp_offsets.len;
}

static void on_token(struct pl_gen *g, const struct pl_event *ev, struct pl_buf *out)
{
    struct pl_gen_choice *c = &g->choices[ev->choice];
    c->sum_logprob += ev->sampled.logprob;
    c->n_completion++;
    g->completion_tokens++;
    if (g->stream)
        open_choice(g, ev->choice, out); /* first: the chunk with the role has no log-probabilities */
    if (g->logprobs)
        pl_gen_add_logprobs(g, c, &ev->sampled, true);
    if (!g->stream) {
        pl_buf_add(&c->text, ev->text, ev->n_text);
        return;
    }
    if (ev->n_text > 0 || c->n_logprobs > 0)
        text_chunk(g, ev->choice, ev->text, ev->n_text, NULL, out);
}

static void on_prompt(struct pl_gen *g, const struct pl_event *ev)
{
    struct pl_gen_choice *c = &g->choices[ev->choice];
    if (!g->logprobs)
        return;
    const uint32_t p = ev->choice / g->best_of;
    size_t n, tokens = 0;
    for (uint32_t i = 0; i < ev->n_prompt; i++) {
        const char *bytes = pl_tok_bytes(g->target.instance->tok, ev->prompt_logprobs[i].token, true, &n);
        tokens += pl_gen_chars(bytes, n);
    }
    c->n_chars = (int64_t)pl_gen_chars(g->prompt_texts[p], g->prompt_bytes[p]) - (int64_t)tokens;
    for (uint32_t i = 0; i < ev->n_prompt; i++)
        pl_gen_add_logprobs(g, c, &ev->prompt_logprobs[i], i > 0);
}

static void on_done(struct pl_gen *g, const struct pl_event *ev, struct pl_buf *out)
{
    struct pl_gen_choice *c = &g->choices[ev->choice];
    double ms = (double)ev->total_ns * 1e-6;
    c->done = true;
    c->finish = ev->finish;
    g->completion_tokens += ev->n_completion - c->n_completion;
    c->n_completion = ev->n_completion;
    g->n_done++;
    if (ev->choice % g->best_of == 0) {
        g->prompt_tokens += ev->n_prompt;
        g->cached_tokens += ev->n_cached;
    }
    if (ev->choice == 0) {
        g->queue_ms = (double)ev->queue_ns * 1e-6;
        g->ttft_ms = (double)ev->ttft_ns * 1e-6;
    }
    g->total_ms = ms > g->total_ms ? ms : g->total_ms;
    if (!g->stream) {
        pl_buf_add(&c->text, ev->text, ev->n_text);
        return;
    }
    open_choice(g, ev->choice, out);
    if (ev->n_text > 0 && g->chat)
        text_chunk(g, ev->choice, ev->text, ev->n_text, NULL, out);
    text_chunk(g, ev->choice, g->chat ? "" : ev->text, g->chat ? 0 : ev->n_text, pl_gen_finish_name(ev->finish), out);
}

/* ---- whole answers ------------------------------------------------------------------------------------------------- */

static void add_choice(struct pl_gen *g, uint32_t shown, uint32_t made, struct pl_buf *out)
{
    struct pl_gen_choice *c = &g->choices[made];
    pl_buf_addf(out, "%s{\"index\":%u,", shown > 0 ? "," : "", shown);
    if (g->chat) {
        pl_buf_adds(out, "\"message\":{\"role\":\"assistant\",\"content\":\"");
        pl_buf_add_json(out, pl_buf_str(&c->text), c->text.len);
        pl_buf_adds(out, "\",\"refusal\":null,\"annotations\":[]}");
    } else {
        pl_buf_adds(out, "\"text\":\"");
        if (g->echo)
            pl_buf_add_json_lossy(out, g->prompt_texts[made / g->best_of], g->prompt_bytes[made / g->best_of]);
        pl_buf_add_json(out, pl_buf_str(&c->text), c->text.len);
        pl_buf_addc(out, '"');
    }
    out->failed |= c->text.failed;
    pl_buf_adds(out, ",\"logprobs\":");
    pl_gen_take_logprobs(g, c, out);
    pl_buf_addf(out, ",\"finish_reason\":\"%s\"}", pl_gen_finish_name(c->finish));
}

/* The best `n` of a prompt's choices by mean log-probability, best first; ties by lower index. */
static uint32_t best_left(const struct pl_gen *g, uint32_t prompt, const bool *taken)
{
    uint32_t best = UINT32_MAX;
    double score = 0;
    for (uint32_t i = prompt * g->best_of; i < (prompt + 1) * g->best_of; i++) {
        double mean = g->choices[i].sum_logprob / (g->choices[i].n_completion > 0 ? g->choices[i].n_completion : 1);
        if (!taken[i] && (best == UINT32_MAX || mean > score)) {
            best = i;
            score = mean;
        }
    }
    return best;
}

static void whole_answer(struct pl_gen *g, struct pl_buf *out)
{
    bool taken[PL_MAX_CHOICES] = {false};
    pl_buf_addf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":\"", g->id, g->chat ? "chat.completion" : "text_completion",
                g->created);
    pl_buf_add_json(out, g->model, strlen(g->model));
    pl_buf_adds(out, "\",\"choices\":[");
    for (uint32_t i = 0, shown = 0; i < g->n_choices / g->best_of; i++)
        for (uint32_t k = 0; k < g->n; k++, shown++) {
            uint32_t made = g->best_of == g->n ? i * g->n + k : best_left(g, i, taken);
            taken[made] = true;
            add_choice(g, shown, made, out);
        }
    pl_buf_adds(out, "],\"usage\":");
    pl_gen_add_usage(g, out);
    pl_buf_addf(out, "%s,\"system_fingerprint\":\"%s\"}", g->has_tier ? ",\"service_tier\":\"default\"" : "", g->fingerprint);
}

/* ---- producer ------------------------------------------------------------------------------------------------------ */

static void note_usage(struct pl_gen *g)
{
    double decode_ms = g->total_ms - g->ttft_ms;
    g->usage->prompt_tokens = g->prompt_tokens;
    g->usage->cached_tokens = g->cached_tokens;
    g->usage->completion_tokens = g->completion_tokens;
    g->usage->queue_ms = g->queue_ms;
    g->usage->ttft_ms = g->ttft_ms;
    snprintf(g->usage->model, sizeof g->usage->model, "%s", g->model);
    g->usage->tok_s = g->completion_tokens > 1 && decode_ms > 0 ? (g->completion_tokens - 1) / decode_ms * 1000 : 0;
}

static pl_produced on_error(struct pl_gen *g, const struct pl_err *err, struct pl_buf *out)
{
    struct pl_apierr a = pl_apierr_of(err->code);
    g->usage->error = a.code != NULL ? a.code : a.type;
    if (!g->any_output) {
        g->base.status = a.http;
        g->base.retry_after = a.retry_after;
        g->base.stream = false;
        pl_buf_clear(out);
        pl_apierr_write(out, err);
        return PL_PRODUCE_END;
    }
    pl_buf_adds(out, "data: ");
    pl_apierr_write(out, err);
    pl_buf_adds(out, "\n\ndata: [DONE]\n\n");
    return PL_PRODUCE_END;
}

static pl_produced too_large(struct pl_gen *g, struct pl_buf *out)
{
    struct pl_err err = {0};
    err.code = pl_fail_param(&err, PL_EINVAL, "n", "the answer is larger than the %d MiB that one may have: ask for fewer choices, tokens or "
                             "log-probabilities, or for a stream", ANSWER_MOST >> 20);
    return on_error(g, &err, out);
}

static pl_produced produce(struct pl_producer *self, struct pl_buf *out)
{
    struct pl_gen *g = (struct pl_gen *)self;
    struct pl_event ev;
    size_t start = out->len;
    while (g->n_done < g->n_choices && out->len - start < STREAM_PIECE && pl_reply_next(g->reply, &ev)) {
        const size_t before = ev.kind != PL_EV_ERROR ? held_by(&g->choices[ev.choice]) : 0;
        switch (ev.kind) {
        case PL_EV_TOKEN: on_token(g, &ev, out); break;
        case PL_EV_PROMPT: on_prompt(g, &ev); break;
        case PL_EV_DONE: on_done(g, &ev, out); break;
        case PL_EV_ERROR: return on_error(g, &ev.error, out);
        }
        g->any_output |= out->len > start;
        g->n_held += held_by(&g->choices[ev.choice]) - before; /* of a stream it goes up and down */
        if (!g->stream && g->n_held > ANSWER_MOST)
            return too_large(g, out);
    }
    bool over = g->n_done == g->n_choices;
    if (over)
        note_usage(g);
    if (over && g->stream)
        end_stream(g, out);
    else if (over)
        whole_answer(g, out);
    g->base.status = 200;
    return over ? PL_PRODUCE_END : out->len > start ? PL_PRODUCE_MORE : PL_PRODUCE_WAIT;
}

static void free_gen(struct pl_producer *self)
{
    struct pl_gen *g = (struct pl_gen *)self;
    if (g->n_done < g->n_choices && g->reply != NULL) {
        pl_reply_cancel(g->reply);
        g->prompt_tokens = g->n_planned;
        note_usage(g);
        g->usage->cut = true;
    }
    pl_reply_unref(g->reply);
    for (uint32_t i = 0; i < g->n_choices; i++) {
        struct pl_gen_choice *c = &g->choices[i];
        struct pl_buf *bufs[] = {&c->text, &c->logprobs, &c->lp_values, &c->lp_top, &c->lp_offsets};
        for (size_t k = 0; k < PL_COUNT_OF(bufs); k++)
            pl_buf_fini(bufs[k]);
    }
    pl_buf_fini(&g->prefix);
    free(g->model);
    pl_arena_free(g->arena);
    pl_registry_release(g->models, &g->target);
    free(g);
}

static void wake(void *conn)
{
    pl_http_wake(conn);
}

/* ---- start --------------------------------------------------------------------------------------------------------- */

/* An adapter's values are part of what the fingerprint stands for. */
static bool take_model(struct pl_gen *g, const char *model)
{
    const char *own = g->target.instance->fingerprint;
    g->model = strdup(model);
    snprintf(g->fingerprint, sizeof g->fingerprint, "%s", own);
    if (g->target.adapter != NULL)
        snprintf(g->fingerprint, sizeof g->fingerprint, "fp_%016llx", strtoull(own + 3, NULL, 16) ^ (unsigned long long)g->target.adapter->hash);
    return g->model != NULL;
}

static void name_generation(struct pl_gen *g)
{
    unsigned char raw[12] = {0};
    struct timespec now;
    char *at = g->id + snprintf(g->id, sizeof g->id, "%s-", g->chat ? "chatcmpl" : "cmpl");
    if (getrandom(raw, sizeof raw, 0) != (ssize_t)sizeof raw) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        memcpy(raw, &now, sizeof raw);
    }
    for (size_t i = 0; i < sizeof raw; i++)
        at += sprintf(at, "%02x", raw[i]);
    g->created = (long long)time(NULL);
    pl_buf_addf(&g->prefix, "data: {\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":\"", g->id,
                g->chat ? "chat.completion.chunk" : "text_completion", g->created);
    pl_buf_add_json(&g->prefix, g->model, strlen(g->model));
    pl_buf_addf(&g->prefix, "\",%s\"system_fingerprint\":\"%s\",\"choices\":[{\"index\":", g->has_tier ? "\"service_tier\":\"default\"," : "",
                g->fingerprint);
}

/* Prompts that came as text are echoed as they came, others as their tokens' text. */
static pl_status copy_echo(struct pl_gen *g, const json_t *given, const struct pl_prompt *prompts, uint32_t n, struct pl_err *err)
{
    g->arena = pl_arena_new(PL_GEN_ARENA);
    if (g->arena != NULL) {
        g->prompt_texts = pl_arena_zalloc(g->arena, n * sizeof *g->prompt_texts);
        g->prompt_bytes = pl_arena_zalloc(g->arena, n * sizeof *g->prompt_bytes);
    }
    if (g->arena == NULL || g->prompt_texts == NULL || g->prompt_bytes == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    for (uint32_t i = 0; i < n; i++) {
        const json_t *one = json_is_array(given) && n > 1 ? json_array_get(given, i) : given;
        if (json_is_array(one) && json_array_size(one) == 1 && json_is_string(json_array_get(one, 0)))
            one = json_array_get(one, 0);
        if (!json_is_string(one)) {
            g->prompt_texts[i] = pl_prompt_text(g->target.instance, &prompts[i], g->arena, &g->prompt_bytes[i]);
            continue;
        }
        g->prompt_bytes[i] = json_string_length(one);
        g->prompt_texts[i] = pl_arena_strndup(g->arena, json_string_value(one), g->prompt_bytes[i]);
        if (g->prompt_texts[i] == NULL)
            return pl_fail(err, PL_ENOMEM, "out of memory");
    }
    return PL_OK;
}

static pl_status fill_bias(struct pl_request *r, const struct pl_params *p, uint32_t n_vocab, struct pl_err *err)
{
    const char *key;
    json_t *value;
    struct pl_logit_bias *bias = pl_arena_alloc(r->arena, (json_object_size(p->logit_bias) + 1) * sizeof *bias);
    if (bias == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    json_object_foreach((json_t *)(uintptr_t)p->logit_bias, key, value)
    {
        long id = strtol(key, NULL, 10);
        if (id >= (long)n_vocab)
            return pl_fail_param(err, PL_EINVAL, "logit_bias", "token %ld of 'logit_bias' is not one of the model's %u", id, n_vocab);
        bias[r->sampling.n_bias++] = (struct pl_logit_bias){(int32_t)id, (float)json_number_value(value)};
    }
    r->sampling.bias = bias;
    return PL_OK;
}

static pl_status fill_stops(struct pl_request *r, const struct pl_params *p, struct pl_err *err)
{
    struct pl_stop *stops = pl_arena_alloc(r->arena, sizeof *stops * PL_MAX_STOPS);
    for (size_t i = 0; stops != NULL && i < p->n_stops; i++) {
        stops[i] = (struct pl_stop){pl_arena_strndup(r->arena, p->stops[i], p->stop_bytes[i]), p->stop_bytes[i]};
        if (stops[i].s == NULL)
            stops = NULL;
    }
    r->stops = stops;
    r->n_stops = (uint32_t)p->n_stops;
    return stops != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
}

static pl_status check_length(const struct pl_instance *m, const struct pl_params *p, const struct pl_request *r, struct pl_err *err)
{
    uint32_t context = pl_engine_max_context(m->engine);
    for (uint32_t i = 0; i < r->n_prompts && r->max_tokens != UINT32_MAX; i++)
        if ((uint64_t)r->prompts[i].n + r->max_tokens > context)
            return pl_fail_param(err, PL_ETOOLONG, p->endpoint == PL_EP_CHAT ? "messages" : "prompt",
                                 "This model's maximum context length is %u tokens. However, you requested %llu tokens (%u in the prompt, %u "
                                 "for the answer). Shorten the prompt or lower max_tokens.",
                                 context, (unsigned long long)r->prompts[i].n + r->max_tokens, r->prompts[i].n, r->max_tokens);
    return PL_OK;
}

static pl_status fill_request(struct pl_request *r, const struct pl_gen *g, const struct pl_params *p, struct pl_err *err)
{
    struct pl_sampling *s = &r->sampling;
    *s = (struct pl_sampling){
        .temperature = (float)p->temperature,
        .top_p = (float)p->top_p,
        .min_p = (float)p->min_p,
        .top_k = p->top_k > 0 ? (uint32_t)p->top_k : 0,
        .repetition_penalty = (float)p->repetition_penalty,
        .presence_penalty = (float)p->presence_penalty,
        .frequency_penalty = (float)p->frequency_penalty,
        .n_top_logprobs = p->top_logprobs_n,
    };
    if (p->seed != PL_PARAM_UNSET)
        s->seed = (uint64_t)p->seed;
    else if (getrandom(&s->seed, sizeof s->seed, 0) != (ssize_t)sizeof s->seed)
        return pl_fail(err, PL_EIO, "the system gives no random numbers");
    if (g->best_of > g->n && s->n_top_logprobs < 0)
        s->n_top_logprobs = 0; /* to choose by */
    r->n = g->best_of;
    r->max_tokens = p->max_tokens != PL_PARAM_UNSET ? (uint32_t)p->max_tokens : UINT32_MAX;
    r->min_tokens = (uint32_t)p->min_tokens;
    r->ignore_eos = p->ignore_eos;
    r->include_stop = p->include_stop_str_in_output;
    r->prompt_logprobs = p->echo && p->top_logprobs_n >= 0;
    if (r->prompt_logprobs && (uint64_t)g->n_planned * g->best_of * sizeof(struct pl_choice) > ANSWER_MOST)
        return pl_fail_param(err, PL_EINVAL, "n", "log-probabilities of %u prompt tokens, for each of %u choices, are more than this server keeps: lower 'n' "
                             "or shorten the prompts", g->n_planned, g->best_of);
    pl_status st = fill_stops(r, p, err);
    if (st == PL_OK && p->logit_bias != NULL)
        st = fill_bias(r, p, g->target.instance->file.spec.n_vocab, err);
    return st == PL_OK ? check_length(g->target.instance, p, r, err) : st;
}

static pl_status start(struct pl_gen *g, struct pl_http_req *req, const struct pl_params *p, struct pl_arena *a, const struct pl_prompt *prompts,
                       uint32_t n_prompts, struct pl_err *err)
{
    struct pl_request *r = pl_arena_zalloc(a, sizeof *r);
    if (r == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    r->arena = a;
    r->adapter = g->target.adapter;
    r->prompts = prompts;
    r->n_prompts = n_prompts;
    for (uint32_t i = 0; i < n_prompts; i++)
        g->n_planned += prompts[i].n;
    pl_status st = fill_request(r, g, p, err);
    if (st == PL_OK && g->echo)
        st = copy_echo(g, p->prompt, prompts, n_prompts, err);
    if (st != PL_OK)
        return st;
    g->reply = pl_reply_new(pl_reply_needs(g->n_choices) + RING_SLACK, wake, req->conn);
    if (g->reply == NULL || g->prefix.failed)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    st = pl_engine_submit(g->target.instance->engine, r, g->reply, err);
    if (st == PL_OK)
        g->target.adapter = NULL;
    if (st == PL_ETOOLONG)
        snprintf(err->param, sizeof err->param, "%s", g->chat ? "messages" : "prompt");
    return st;
}

void pl_gen_start(struct pl_http_req *req, struct pl_http_resp *resp, const struct pl_params *p, struct pl_target *t, struct pl_arena *a,
                  const struct pl_prompt *prompts, uint32_t n_prompts)
{
    struct pl_err err = {0};
    uint32_t n = (uint32_t)p->n, best_of = p->endpoint == PL_EP_COMPLETIONS && p->best_of != PL_PARAM_UNSET ? (uint32_t)p->best_of : n;
    struct pl_gen *g = NULL;
    if (best_of * n_prompts > PL_MAX_CHOICES)
        err.code = pl_fail_param(&err, PL_EINVAL, "n", "%u prompts with %u choices each are more than the %d that one request may have",
                                 n_prompts, best_of, PL_MAX_CHOICES);
    else if ((g = calloc(1, sizeof *g + best_of * n_prompts * sizeof g->choices[0])) == NULL)
        err.code = pl_fail(&err, PL_ENOMEM, "out of memory");
    if (g != NULL) {
        g->base = (struct pl_producer){.produce = produce, .free = free_gen, .stream = p->stream};
        g->models = req->server->models;
        g->target = *t;
        *t = (struct pl_target){0};
        g->usage = req->usage;
        g->chat = p->endpoint == PL_EP_CHAT;
        g->stream = p->stream;
        g->include_usage = p->include_usage;
        g->logprobs = p->top_logprobs_n >= 0;
        g->echo = p->echo;
        g->has_tier = p->has_tier;
        g->n = n;
        g->best_of = best_of;
        g->n_choices = best_of * n_prompts;
        if (!take_model(g, p->model)) {
            err.code = pl_fail(&err, PL_ENOMEM, "out of memory");
        } else {
            name_generation(g);
            err.code = start(g, req, p, a, prompts, n_prompts, &err);
        }
    }
    if (err.code == PL_OK) {
        resp->producer = &g->base;
        return;
    }
    if (g != NULL) {
        g->n_done = g->n_choices; /* nothing runs */
        free_gen(&g->base);
    }
    pl_registry_release(req->server->models, t);
    pl_arena_free(a);
    pl_apierr_answer(req, resp, &err);
}
