/* seq: one sequence (a choice of a request) and the job (the request) it belongs to, inside the engine.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/seq.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/sched/adapters.h"
#include "core/text/tok.h"

pl_status pl_job_new(struct pl_job **out, struct pl_request *req, struct pl_reply *reply, uint32_t max_context, struct pl_err *err)
{
    uint32_t n;
    if (req->n < 1 || req->n_prompts < 1 || __builtin_mul_overflow(req->n, req->n_prompts, &n) || n > 65536)
        return pl_fail(err, PL_EINVAL, "a request has at least one choice and at most 65536");
    if (pl_reply_capacity(reply) < pl_reply_needs(n))
        return pl_fail(err, PL_EINVAL, "the reply has too little room for %u choices", n);
    for (uint32_t i = 0; i < req->n_prompts; i++) {
        uint32_t len = req->prompts[i].n;
        if (len == 0)
            return pl_fail(err, PL_EINVAL, "the prompt is empty: it needs at least one token");
        if (len > max_context || (len == max_context && req->max_tokens > 0))
            return pl_fail(err, PL_ETOOLONG,
                           "the prompt has %u tokens, but prompt and answer together may have %u: shorten the prompt", len, max_context);
    }
    struct pl_job *job = calloc(1, sizeof *job + n * sizeof job->seqs[0]);
    if (job == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the request");
    job->req = req;
    job->reply = reply;
    job->submit_ns = pl_now_ns();
    job->n_seqs = job->n_live = n;
    for (uint32_t i = 0; i < n; i++) {
        struct pl_seq *s = &job->seqs[i];
        s->job = job;
        s->choice = i;
        s->n_prompt = pl_seq_prompt(s)->n;
        uint32_t room = max_context - s->n_prompt;
        s->max_new = req->max_tokens < room ? req->max_tokens : room;
    }
    pl_reply_ref(reply);
    *out = job;
    return PL_OK;
}

void pl_job_free(struct pl_job *job)
{
    for (uint32_t i = 0; i < job->n_seqs; i++)
        pl_seq_fini(&job->seqs[i]);
    pl_reply_unref(job->reply);
    pl_served_unref(job->req->adapter);
    pl_arena_free(job->req->arena);
    free(job);
}

void pl_job_forgo(struct pl_job *job)
{
    pl_reply_unref(job->reply);
    free(job);
}

pl_status pl_seq_prepare(struct pl_seq *s, const struct pl_tok *tok)
{
    const struct pl_request *req = s->job->req;
    const struct pl_prompt *prompt = pl_seq_prompt(s);
    struct pl_sampling sampling = req->sampling;
    sampling.seed += s->choice % req->n;
    s->tokens = malloc(((size_t)s->n_prompt + s->max_new) * sizeof *s->tokens);
    s->sampler = pl_sampler_new(&sampling, prompt->ids, prompt->n);
    if (req->prompt_logprobs)
        s->prompt_logprobs = calloc(s->n_prompt, sizeof *s->prompt_logprobs);
    const pl_status detok = pl_detok_init(&s->detok, tok, req->stops, req->n_stops);
    s->detok.include_stop = req->include_stop;
    if (detok != PL_OK || s->tokens == NULL || s->sampler == NULL || (req->prompt_logprobs && s->prompt_logprobs == NULL)) {
        pl_seq_fini(s);
        return PL_ENOMEM;
    }
    memcpy(s->tokens, prompt->ids, s->n_prompt * sizeof *s->tokens);
    s->n_tokens = s->n_prompt;
    pl_draft_init(&s->draft);
    return PL_OK;
}

void pl_seq_fini(struct pl_seq *s)
{
    PL_ASSERT(s->table.n_pages == 0);
    free(s->tokens);
    pl_sampler_free(s->sampler);
    pl_detok_fini(&s->detok);
    free(s->prompt_logprobs);
    s->tokens = NULL;
    s->sampler = NULL;
    s->prompt_logprobs = NULL;
}

pl_status pl_seq_push_prompt(struct pl_seq *s)
{
    struct pl_event ev = {.kind = PL_EV_PROMPT, .choice = s->choice, .n_prompt = s->n_prompt, .prompt_logprobs = s->prompt_logprobs};
    s->prompt_logprobs[0] = (struct pl_choice){.token = s->tokens[0]};
    if (!pl_reply_keep(s->job->reply, s->prompt_logprobs))
        return PL_ENOMEM;
    s->prompt_logprobs = NULL;
    return pl_reply_push(s->job->reply, &ev, "", 0) ? PL_OK : PL_ENOMEM;
}

pl_status pl_seq_append(struct pl_seq *s, const struct pl_tok *tok, const struct pl_choice *sampled, struct pl_buf *text, bool *over, pl_finish *finish)
{
    const struct pl_request *req = s->job->req;
    s->tokens[s->n_tokens++] = sampled->token;
    pl_sampler_accept(s->sampler, sampled->token);
    *finish = PL_FINISH_STOP;
    *over = !req->ignore_eos && pl_tok_is_eog(tok, sampled->token);
    if (*over)
        return PL_OK;
    pl_buf_clear(text);
    s->detok.n_stops = pl_seq_output(s) > req->min_tokens || req->min_tokens == 0 ? req->n_stops : 0;
    const bool stopped = pl_detok_push(&s->detok, sampled->token, text);
    const struct pl_event ev = {.kind = PL_EV_TOKEN, .choice = s->choice, .sampled = *sampled};
    if (text->failed || !pl_reply_push(s->job->reply, &ev, pl_buf_str(text), text->len))
        return PL_ENOMEM;
    *over = stopped || pl_seq_output(s) == s->max_new;
    *finish = stopped ? PL_FINISH_STOP : PL_FINISH_LENGTH;
    return PL_OK;
}

pl_status pl_seq_push_done(struct pl_seq *s, pl_finish finish, uint64_t now_ns, struct pl_buf *text)
{
    struct pl_event ev = {
        .kind = PL_EV_DONE,
        .choice = s->choice,
        .finish = finish,
        .stop_index = s->detok.matched,
        .n_prompt = s->n_prompt,
        .n_cached = s->n_cached,
        .n_completion = s->tokens != NULL ? pl_seq_output(s) : 0,
        .queue_ns = (s->admitted_ns != 0 ? s->admitted_ns : now_ns) - s->job->submit_ns,
        .ttft_ns = s->first_token_ns != 0 ? s->first_token_ns - s->job->submit_ns : 0,
        .total_ns = now_ns - s->job->submit_ns,
    };
    pl_buf_clear(text);
    if (s->tokens != NULL && s->detok.matched < 0)
        pl_detok_flush(&s->detok, text);
    if (s->tokens == NULL)
        ev.stop_index = -1;
    return !text->failed && pl_reply_push(s->job->reply, &ev, pl_buf_str(text), text->len) ? PL_OK : PL_ENOMEM;
}
