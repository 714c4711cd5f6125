/* check_draft: guessed tokens. What is found and when it is tried; and over a real (tiny) model, that every event of every
 * answer is the same, bit for bit, with guesses as without.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"
#include "core/sched/draft.h"
#include "core/sched/runner.h"
#include "core/text/tok.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"

Suite *suite_draft(void);

enum { MAX_SEQS = 8, MAX_OUT = 160, STEP_TOKENS = 64 };

/* ---- what is guessed --------------------------------------------------------------------------------------------------- */

START_TEST(finds)
{
    static const struct {
        int32_t tokens[12];
        uint32_t n, max, n_found, gram;
        int32_t found[5];
    } cases[] = {
        {{1, 2, 3, 4, 5, 1, 2, 3}, 8, 2, 2, 3, {4, 5}},
        {{1, 2, 3, 4, 5, 1, 2, 3}, 8, 5, 5, 3, {4, 5, 1, 2, 3}}, /* to the end and round again */
        {{1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3}, 11, 2, 2, 3, {4, 9}}, /* three beat a newer two */
        {{8, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3}, 11, 2, 2, 2, {7, 1}}, /* the newer two */
        {{6, 6, 6}, 3, 4, 4, 2, {6, 6, 6, 6}},
        {{6, 6, 6, 6}, 4, 4, 4, 3, {6, 6, 6, 6}},
        {{1, 2, 1, 2, 1}, 5, 4, 4, 3, {2, 1, 2, 1}},
        {{1, 2, 3, 4, 5, 6}, 6, 4, 0, 0, {0}},
        {{1, 2, 3, 1, 3}, 5, 4, 0, 0, {0}}, /* one token is not enough */
        {{1, 1}, 2, 4, 0, 0, {0}},
        {{1, 1, 1}, 3, 0, 0, 0, {0}},
    };
    struct pl_draft d;
    for (size_t i = 0; i < PL_COUNT_OF(cases); i++) {
        pl_draft_init(&d);
        ck_assert_uint_eq(pl_draft_find(&d, cases[i].tokens, cases[i].n, cases[i].max), cases[i].n_found);
        ck_assert_uint_eq(d.gram, cases[i].gram);
        ck_assert_mem_eq(d.ids, cases[i].found, cases[i].n_found * sizeof *d.ids);
    }
    int32_t *far = malloc((PL_DRAFT_WINDOW + 10) * sizeof *far);
    for (int32_t i = 0; i < PL_DRAFT_WINDOW + 10; i++)
        far[i] = i + 100;
    uint32_t n = PL_DRAFT_WINDOW + 4;
    memcpy(far + n - 3, far + 4, 3 * sizeof *far); /* the first tokens within the window */
    pl_draft_init(&d);
    ck_assert_uint_eq(pl_draft_find(&d, far, n, 100), PL_DRAFT_MAX);
    ck_assert_int_eq(d.ids[0], 107);
    ck_assert_uint_eq(pl_draft_find(&d, far, n - 3, 4), 0);
    memcpy(far + n - 3, far + 2, 3 * sizeof *far); /* the same, but too far back */
    ck_assert_uint_eq(pl_draft_find(&d, far, n, 4), 0);
    free(far);
}
END_TEST

/* Guesses start at once, grow while they hold, stop when they do not or cost too much, and are tried again more and more rarely. */
START_TEST(worth)
{
    struct pl_draft d;
    struct pl_draft_cost c;
    pl_draft_init(&d);
    pl_draft_cost_init(&c);
    d.gram = 3;
    uint32_t first = pl_draft_worth(&d, &c, 4, 1), tries = 0, last_half = 0;
    ck_assert_uint_ge(first, 1);
    ck_assert_uint_eq(pl_draft_worth(&d, &c, 0, 1), 0);
    ck_assert_uint_eq(pl_draft_worth(&d, &c, 4, PL_DRAFT_SEQS + 1), 0);
    for (int i = 0; i < 20; i++)
        pl_draft_learn(&d, 4, 4);
    ck_assert_uint_eq(pl_draft_worth(&d, &c, 4, 1), 4);
    ck_assert_uint_ge(pl_draft_worth(&d, &c, 4, 1), pl_draft_worth(&d, &c, 4, 4)); /* more wait for it */
    struct pl_draft_cost dear = c;
    dear.slope[1] = 1; /* a guess costs a whole pass */
    ck_assert_uint_eq(pl_draft_worth(&d, &dear, 4, 1), 0);
    for (int i = 0; i < 4000; i++) {
        uint32_t n = pl_draft_worth(&d, &c, 4, 1);
        if (n > 0)
            pl_draft_learn(&d, n, 0);
        tries += n > 0;
        last_half += n > 0 && i >= 2000;
    }
    ck_assert_uint_gt(tries, 8);
    ck_assert_uint_lt(tries, 60);
    ck_assert_uint_ge(last_half, 6);
    ck_assert_uint_le(last_half, 2000 / PL_DRAFT_REST + 1);
    for (int i = 0; i < 40; i++)
        pl_draft_learn(&d, 2, 2);
    ck_assert_uint_ge(pl_draft_worth(&d, &c, 4, 1), first); /* it holds again */
    d.gram = 2;
    ck_assert_uint_eq(pl_draft_worth(&d, &c, 4, 1), first); /* what was learnt about three says nothing of two */
}
END_TEST

START_TEST(cost)
{
    struct pl_draft_cost c;
    pl_draft_cost_init(&c);
    float start = c.slope[2];
    pl_draft_cost_learn(&c, 2, 4, 5000); /* compared with nothing */
    ck_assert(c.slope[2] == start);
    for (int i = 0; i < 100; i++) {
        pl_draft_cost_learn(&c, 2, 0, 1000);
        pl_draft_cost_learn(&c, 2, 4, 1400);
        pl_draft_cost_learn(&c, PL_DRAFT_SEQS + 1, 4, 1400); /* not kept */
    }
    ck_assert_float_eq_tol(c.slope[2], 0.1f, 0.001f);
    ck_assert(c.slope[1] == start);
    pl_draft_cost_learn(&c, 2, 0, 1000000000); /* the machine slept */
    ck_assert_float_le(c.base_ns[2], 1200);
    for (int i = 0; i < 100; i++)
        pl_draft_cost_learn(&c, 2, 1, 1);
    ck_assert_float_ge(c.slope[2], 0);
}
END_TEST

/* ---- the engine with and without ------------------------------------------------------------------------------------------ */

struct world {
    void *bytes;
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    struct runner r;
};

static void open_world(struct world *w)
{
    struct pl_err err = {0};
    struct tiny_options o = tiny_defaults();
    o.n_ctx = 512;
    struct gguf_out *out = tiny_model(&o, &err);
    size_t n;
    *w = (struct world){.bytes = gguf_out_bytes(out, &n)};
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&w->gguf, w->bytes, n, &err), PL_OK);
    ck_assert_int_eq(pl_tok_load(&w->tok, w->gguf, &err), PL_OK);
    ck_assert_msg(runner_open(&w->r, w->gguf, NULL, 1, STEP_TOKENS, &err) == PL_OK, "%s", err.msg);
}

static void close_world(struct world *w)
{
    runner_close(&w->r);
    pl_tok_free(w->tok);
    pl_gguf_close(w->gguf);
    free(w->bytes);
}

struct pass {
    struct pl_model *model;
    struct pl_device *dev;
    struct pl_kvdev *kv;
    uint32_t max_pos; /* what no token's place may reach */
};

/* A pass that costs about the same whatever is in it, so that guessing pays and does not stop. */
static pl_status forward(void *self, const struct pl_batch *b, const float **logits)
{
    struct pass *p = self;
    usleep(400);
    for (uint32_t t = 0; t < b->n_tokens; t++)
        ck_assert_uint_lt(b->pos[t], p->max_pos);
    return pl_model_forward(p->model, p->kv, b, logits);
}

static void free_pass(void *self)
{
    struct pass *p = self;
    p->dev->ops->kv_free(p->dev, p->kv);
    free(p);
}

/* One run: the same prompt, or several that differ in their first token, one after the other's submission. */
struct job {
    struct pl_sampling sampling;
    struct pl_stop stops[2];
    uint32_t n_stops, n_prompts, n_prompt, n, max_tokens, min_tokens;
    uint32_t n_pages, max_sequences, draft_sequences, ring; /* ring: events beyond what is needed at least */
    bool heed_eos, prompt_logprobs;
};

struct outcome {
    struct pl_buf events[MAX_SEQS]; /* of each choice, all that a client can tell, but for times */
    struct pl_buf text[MAX_SEQS];
    uint32_t n_tokens[MAX_SEQS];
    pl_finish finish[MAX_SEQS];
    struct pl_engine_stats stats;
};

static struct job plain_job(void)
{
    return (struct job){.sampling = {.top_p = 1, .repetition_penalty = 1, .n_top_logprobs = 3, .seed = 11},
                        .n_prompts = 1, .n_prompt = 40, .n = 1, .max_tokens = 100,
                        .n_pages = 64, .max_sequences = 4, .draft_sequences = 4, .ring = 300};
}

static struct pl_request *make_request(const struct world *w, const struct job *j)
{
    struct pl_arena *a = pl_arena_new(0);
    struct pl_request *r = pl_arena_zalloc(a, sizeof *r);
    struct pl_prompt *p = pl_arena_zalloc(a, j->n_prompts * sizeof *p);
    for (uint32_t k = 0; k < j->n_prompts; k++) {
        int32_t *ids = pl_arena_alloc(a, j->n_prompt * sizeof *ids);
        for (uint32_t i = 0; i < j->n_prompt; i++)
            ids[i] = i == 0 ? 70 + (int32_t)k : 100 + (int32_t)(i % 7); /* a refrain */
        ids[0] = ids[0] < pl_tok_count(w->tok) ? ids[0] : 0;
        p[k] = (struct pl_prompt){ids, j->n_prompt};
    }
    *r = (struct pl_request){.arena = a, .prompts = p, .n_prompts = j->n_prompts, .n = j->n, .sampling = j->sampling,
                             .max_tokens = j->max_tokens, .min_tokens = j->min_tokens, .ignore_eos = !j->heed_eos,
                             .stops = j->stops, .n_stops = j->n_stops, .prompt_logprobs = j->prompt_logprobs};
    return r;
}

static void note_choice(struct pl_buf *b, const struct pl_choice *c)
{
    pl_buf_addf(b, "%d %a", c->token, (double)c->logprob);
    for (uint32_t i = 0; i < c->n_top; i++)
        pl_buf_addf(b, " %d:%a", c->top[i].id, (double)c->top[i].logprob);
    pl_buf_addc(b, '\n');
}

static void note(struct outcome *o, const struct pl_event *ev)
{
    struct pl_buf *b = &o->events[ev->choice];
    pl_buf_addf(b, "%d ", ev->kind);
    if (ev->kind == PL_EV_TOKEN)
        note_choice(b, &ev->sampled), o->n_tokens[ev->choice]++;
    if (ev->kind == PL_EV_PROMPT)
        for (uint32_t i = 0; i < ev->n_prompt; i++)
            note_choice(b, &ev->prompt_logprobs[i]);
    if (ev->kind == PL_EV_DONE) {
        pl_buf_addf(b, "finish %d stop %d prompt %u completion %u", ev->finish, ev->stop_index, ev->n_prompt, ev->n_completion);
        o->finish[ev->choice] = ev->finish;
    }
    pl_buf_addf(b, "[%zu]", ev->n_text);
    pl_buf_add(b, ev->text, ev->n_text);
    pl_buf_add(&o->text[ev->choice], ev->text, ev->n_text);
}

static void run(const struct world *w, const struct job *j, uint32_t max_draft, struct outcome *o)
{
    struct pl_err err = {0};
    struct pass *p = calloc(1, sizeof *p);
    const struct pl_engine_opts opts = {.max_sequences = j->max_sequences, .batch_tokens = STEP_TOKENS, .max_context = 400,
                                        .n_pages = j->n_pages, .queue_limit = 4, .max_draft = max_draft, .draft_sequences = j->draft_sequences};
    const struct pl_kv_shape shape = pl_model_kv_shape(w->r.model, PL_KV_PAGE, j->n_pages, PL_F16);
    const struct pl_runner runner = {.self = p, .forward = forward, .free = free_pass, .n_vocab = pl_model_spec(w->r.model)->n_vocab};
    const uint32_t n = j->n_prompts * j->n;
    struct pl_engine *e;
    struct pl_reply *reply = pl_reply_new(pl_reply_needs(n) + j->ring, NULL, NULL);
    struct pl_event ev;
    memset(o, 0, sizeof *o);
    *p = (struct pass){w->r.model, w->r.dev, NULL, j->n_prompt + j->max_tokens};
    ck_assert_int_eq(w->r.dev->ops->kv_new(w->r.dev, &shape, &p->kv), PL_OK);
    ck_assert_msg(pl_engine_new_with(&e, &opts, &runner, w->tok, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(pl_engine_start(e, &err), PL_OK);
    ck_assert_msg(pl_engine_submit(e, make_request(w, j), reply, &err) == PL_OK, "%s", err.msg);
    for (uint32_t done = 0; done < n;) {
        ck_assert_msg(pl_reply_wait(reply, 20000), "no answer");
        while (pl_reply_next(reply, &ev)) {
            ck_assert_int_ne(ev.kind, PL_EV_ERROR);
            note(o, &ev);
            done += ev.kind == PL_EV_DONE;
        }
    }
    ck_assert(pl_engine_drain(e, 5000));
    pl_engine_stats(e, &o->stats);
    for (int i = 0; i < 5000 && o->stats.pages_held > 0; i++) { /* gauges follow at the end of the iteration */
        usleep(1000);
        pl_engine_stats(e, &o->stats);
    }
    pl_engine_free(e);
    pl_reply_unref(reply);
}

static void drop(struct outcome *o)
{
    for (int i = 0; i < MAX_SEQS; i++)
        pl_buf_fini(&o->events[i]), pl_buf_fini(&o->text[i]);
}

/* Runs it without and with guesses; everything must be the same. *with is the caller's. */
static void compare(const struct world *w, const struct job *j, struct outcome *with)
{
    struct outcome without;
    run(w, j, 0, &without);
    run(w, j, 4, with);
    for (uint32_t i = 0; i < j->n_prompts * j->n; i++) {
        ck_assert_str_eq(pl_buf_str(&with->events[i]), pl_buf_str(&without.events[i]));
        ck_assert_uint_eq(with->events[i].len, without.events[i].len);
    }
    ck_assert_uint_eq(without.stats.draft_tokens, 0);
    ck_assert_uint_le(with->stats.draft_accepted, with->stats.draft_tokens);
    ck_assert_uint_eq(with->stats.base.generated_tokens, without.stats.base.generated_tokens);
    ck_assert_uint_eq(with->stats.pages_held, 0);
    drop(&without);
}

START_TEST(same_tokens)
{
    struct world w;
    struct outcome o;
    struct job j[10];
    open_world(&w);
    for (int i = 0; i < 10; i++)
        j[i] = plain_job();
    j[1].sampling.temperature = 0.3f;
    j[2].sampling.temperature = 1, j[2].sampling.top_k = 3, j[2].sampling.top_p = 0.9f;
    j[3].sampling.frequency_penalty = 0.02f, j[3].sampling.presence_penalty = 0.1f;
    j[4].sampling.temperature = 0.4f, j[4].sampling.repetition_penalty = 1.02f;
    j[5].heed_eos = true, j[5].min_tokens = 20;
    j[6].prompt_logprobs = true;
    j[7].sampling.temperature = 0.3f, j[7].n = 3;
    j[8].sampling.temperature = 2, j[8].sampling.top_k = 4;
    j[9].sampling.temperature = 4;
    uint64_t accepted = 0, rejected = 0;
    for (int i = 0; i < 10; i++) {
        compare(&w, &j[i], &o);
        accepted += o.stats.draft_accepted;
        rejected += o.stats.draft_tokens - o.stats.draft_accepted;
        if (i == 0) {
            ck_assert_uint_gt(o.stats.draft_accepted, 20);
            ck_assert_uint_lt(o.stats.n_steps, 80); /* 100 tokens */
            /* only guesses that did not hold are computed in vain */
            ck_assert_uint_eq((uint64_t)o.stats.step_tokens.sum, 40 + 99 + o.stats.draft_tokens - o.stats.draft_accepted);
        }
        drop(&o);
    }
    ck_assert_uint_gt(accepted, 0);
    ck_assert_uint_gt(rejected, 40);
    close_world(&w);
}
END_TEST

/* Every length: the last token comes at each place of a step. */
START_TEST(every_length)
{
    struct world w;
    struct outcome o;
    uint64_t accepted = 0;
    open_world(&w);
    for (uint32_t n = 1; n <= 48; n++) {
        struct job j = plain_job();
        j.max_tokens = n;
        compare(&w, &j, &o);
        ck_assert_uint_eq(o.n_tokens[0], n);
        ck_assert_int_eq(o.finish[0], PL_FINISH_LENGTH);
        accepted += o.stats.draft_accepted;
        drop(&o);
    }
    ck_assert_uint_gt(accepted, 48);
    close_world(&w);
}
END_TEST

/* A ring with room for few events: a step never brings more than there is room for. */
START_TEST(small_rings)
{
    struct world w;
    struct outcome o;
    open_world(&w);
    for (uint32_t ring = 0; ring < 12; ring++) {
        struct job j = plain_job();
        j.ring = ring;
        j.max_tokens = 50;
        compare(&w, &j, &o);
        ck_assert(ring > 0 || o.stats.draft_tokens == 0);
        ck_assert(ring < 4 || o.stats.draft_accepted > 0);
        drop(&o);
    }
    close_world(&w);
}
END_TEST

/* Stop strings that match at every place of the text: the text ends there, and guesses that were right after it count for nothing. */
START_TEST(stops)
{
    struct world w;
    struct outcome whole, o;
    struct job j = plain_job();
    uint64_t accepted = 0;
    uint32_t n_stopped = 0;
    open_world(&w);
    j.sampling.temperature = 0.4f, j.sampling.repetition_penalty = 1.02f; /* text that is not all U+FFFD */
    compare(&w, &j, &whole);
    for (size_t at = 8; at + 6 < whole.text[0].len; at += 3) {
        const char *s = pl_buf_str(&whole.text[0]) + at;
        bool ascii = true;
        for (int i = 0; i < 5; i++)
            ascii = ascii && s[i] > 0;
        if (!ascii)
            continue;
        struct job k = j;
        k.stops[0] = (struct pl_stop){.s = s, .n = 5};
        k.stops[1] = (struct pl_stop){.s = "never there", .n = 11};
        k.n_stops = 2;
        k.min_tokens = (uint32_t)at % 4 * 10;
        compare(&w, &k, &o);
        n_stopped += o.finish[0] == PL_FINISH_STOP;
        accepted += o.stats.draft_accepted;
        drop(&o);
    }
    ck_assert_uint_gt(n_stopped, 5);
    ck_assert_uint_gt(accepted, 5);
    drop(&whole);
    close_world(&w);
}
END_TEST

/* Too few pages for all, a full ring now and then, more sequences than may guess. */
START_TEST(crowded)
{
    struct world w;
    struct outcome o;
    struct job j = plain_job();
    open_world(&w);
    j.n_prompts = 6;
    j.max_sequences = 6;
    j.draft_sequences = 16;
    j.n_pages = 13;
    j.sampling.temperature = _i % 2 == 0 ? 0 : 0.3f;
    j.ring = _i < 2 ? 3000 : 40;
    compare(&w, &j, &o);
    ck_assert_uint_gt(o.stats.n_preempted, 0);
    ck_assert_uint_gt(o.stats.draft_accepted, 0);
    drop(&o);
    j.draft_sequences = 0;
    compare(&w, &j, &o);
    ck_assert_uint_eq(o.stats.draft_tokens, 0);
    drop(&o);
    j.draft_sequences = 16;
    j.ring = 0; /* no room for more than one event at a time */
    j.max_tokens = 20;
    compare(&w, &j, &o);
    drop(&o);
    close_world(&w);
}
END_TEST

Suite *suite_draft(void)
{
    Suite *s = suite_create("draft");
    TCase *t = tcase_create("draft");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, finds);
    tcase_add_test(t, worth);
    tcase_add_test(t, cost);
    tcase_add_test(t, same_tokens);
    tcase_add_test(t, every_length);
    tcase_add_test(t, stops);
    tcase_add_test(t, small_rings);
    tcase_add_loop_test(t, crowded, 0, 4);
    suite_add_tcase(s, t);
    return s;
}
