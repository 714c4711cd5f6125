/* overhead: how much of the engine's time is in no operation of the device.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cli/overhead.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "cli/drive.h"
#include "cli/timed.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/order.h"
#include "core/sched/engine.h"

enum { LOG_SPANS = 1 << 18, ENGINE_TOKENS = 128, ENGINE_PROMPT = 16, ARENA = 1 << 20 };

/* One greedy stream of ENGINE_TOKENS through the engine. The answer is read once it is whole: nobody else runs meanwhile. */
static pl_status run_engine(struct pl_engine *e, uint32_t n_vocab, struct pl_err *err)
{
    struct pl_arena *a = pl_arena_new(ARENA);
    struct pl_reply *reply = pl_reply_new(pl_reply_needs(1) + ENGINE_TOKENS, NULL, NULL);
    struct pl_request *req = a != NULL ? pl_arena_zalloc(a, sizeof *req) : NULL;
    struct pl_prompt *prompt = a != NULL ? pl_arena_zalloc(a, sizeof *prompt) : NULL;
    int32_t *ids = a != NULL ? pl_arena_alloc(a, ENGINE_PROMPT * sizeof *ids) : NULL;
    pl_status st = PL_ENOMEM;
    if (reply != NULL && req != NULL && prompt != NULL && ids != NULL) {
        for (uint32_t i = 0; i < ENGINE_PROMPT; i++)
            ids[i] = (int32_t)((i + 1) * 7919u % n_vocab);
        *prompt = (struct pl_prompt){ids, ENGINE_PROMPT};
        *req = (struct pl_request){.arena = a, .prompts = prompt, .n_prompts = 1, .n = 1, .max_tokens = ENGINE_TOKENS, .ignore_eos = true,
                                   .sampling = {.top_p = 1, .repetition_penalty = 1, .n_top_logprobs = -1}};
        st = pl_engine_submit(e, req, reply, err);
    }
    if (st != PL_OK)
        pl_arena_free(a);
    for (struct pl_engine_stats s = {0}; st == PL_OK && s.base.n_finished_length + s.base.n_failed == 0; usleep(10000))
        pl_engine_stats(e, &s);
    for (struct pl_event ev; st == PL_OK && pl_reply_next(reply, &ev);)
        st = ev.kind == PL_EV_ERROR ? ev.error.code : st;
    pl_reply_unref(reply);
    return st;
}

static double time_clock(void)
{
    enum { READINGS = 20000 };
    uint64_t start = pl_now_ns(), end = start;
    for (int i = 0; i < READINGS; i++)
        end = pl_now_ns();
    return (double)(end - start) / READINGS;
}

/* Of each pass that decodes: the time from the end of the pass before to its own end, and what of it is in operations. The clock
 * is read twice around each operation; about one reading falls into it. */
static bool sum_up(struct overhead *out, const struct timed *t)
{
    double period[ENGINE_TOKENS], share[ENGINE_TOKENS], in_ops = 0, spans = 0, clock_ns = time_clock();
    uint64_t last_end = 0;
    size_t n = 0, passes = 0;
    for (size_t i = 0; i < t->n; i++) {
        const struct timed_span *s = &t->log[i];
        if (s->op != TIMED_STEP) {
            in_ops += (double)(s->end - s->start);
            spans++;
            continue;
        }
        if (passes++ > 1 && n < ENGINE_TOKENS) { /* the first is the prompt's, the second may find cold caches */
            period[n] = (double)(s->end - last_end) - 2 * spans * clock_ns;
            share[n] = 1 - (in_ops - spans * clock_ns) / period[n];
            n++;
        }
        last_end = s->end;
        in_ops = spans = 0;
    }
    if (n == 0 || t->full)
        return false;
    qsort(period, n, sizeof period[0], pl_by_value);
    qsort(share, n, sizeof share[0], pl_by_value);
    *out = (struct overhead){n, period[n / 2] * 1e-3, share[n / 2]};
    return true;
}

bool overhead_measure(struct overhead *out, struct cli_model *m)
{
    struct pl_err err = {0};
    struct pl_engine *e = NULL;
    struct timed *t = timed_begin(m->dev, LOG_SPANS);
    const struct pl_engine_opts opts = {.max_sequences = 1, .batch_tokens = DRIVE_TOKENS, .max_context = ENGINE_PROMPT + ENGINE_TOKENS + 1,
                                        .kv_dtype = PL_F16, .queue_limit = 1};
    pl_status st = t == NULL ? PL_ENOMEM : pl_engine_new(&e, &opts, m->dev, m->model, m->tok, &err);
    if (st == PL_OK)
        st = pl_engine_start(e, &err);
    if (st == PL_OK)
        st = run_engine(e, pl_model_spec(m->model)->n_vocab, &err);
    pl_engine_free(e);
    bool ok = st == PL_OK && sum_up(out, t);
    if (!ok)
        fprintf(stderr, "parley bench: the engine did not run: %s\n", err.msg[0] != '\0' ? err.msg : pl_status_text(st));
    timed_end(t);
    return ok;
}
