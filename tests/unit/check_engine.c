/* check_engine: the engine over a scripted model whose logits depend on a sequence's own tokens only. What comes out must
 * be the same whatever else runs, and every request gets its answers to the end.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"
#include "core/model/gguf.h"
#include "core/sched/pace.h"
#include "core/sched/plan.h"
#include "core/sched/reply_int.h"
#include "core/sched/runner.h"
#include "core/text/tok.h"
#include "tests/tools/tiny_model.h"

Suite *suite_engine(void);

enum { MAX_STEP = 64, MAX_OUT = 256, POISON = 77 };

/* ---- what the engine's thread allocates: the linker sends the library's calls here ------------------------------------- */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

static _Thread_local bool counting;
static atomic_uint allocations; /* each test is a process of its own */
static atomic_int n_good = INT_MAX, n_bad; /* allocations that succeed from now on, and that fail after these */
static _Thread_local bool spared;          /* of that: the test's own, libcheck allocates too */

static bool fails(void)
{
    atomic_fetch_add(&allocations, counting);
    return !spared && atomic_load(&n_good) != INT_MAX && atomic_fetch_sub(&n_good, 1) <= 0 && atomic_fetch_sub(&n_bad, 1) > 0;
}

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

/* ---- a model: the next token is a hash of all tokens before it, read from what was written into the pages ------------- */

struct script {
    uint32_t count_from, count_to; /* steps in which the engine's thread must not allocate */
    uint32_t n_vocab, n_pages;
    int32_t *cache; /* [page * PL_KV_PAGE + offset]: the token that was computed there */
    float *logits;
    atomic_int fail; /* PL_OK = it does not */
    atomic_uint steps, asked;
    atomic_int unprepared; /* pieces */
    uint32_t largest;
    uint32_t delay_ns; /* of each token in a pass */
};

static uint32_t next_token(const int32_t *tokens, uint32_t n, uint32_t n_vocab)
{
    uint64_t h = 1469598103934665603u;
    for (uint32_t i = 0; i < n; i++)
        h = (h ^ (uint64_t)tokens[i]) * 1099511628211u;
    return 100 + (uint32_t)((h >> 20) % (n_vocab - 120));
}

static pl_status forward(void *self, const struct pl_batch *b, const float **logits)
{
    struct script *s = self;
    uint32_t row = 0;
    int32_t tokens[2048];
    if (atomic_load(&s->fail) != PL_OK)
        return atomic_load(&s->fail);
    const uint32_t step = atomic_fetch_add(&s->steps, 1);
    counting = step >= s->count_from && step < s->count_to;
    s->largest = b->n_tokens > s->largest ? b->n_tokens : s->largest;
    for (const uint64_t until = pl_now_ns() + (uint64_t)s->delay_ns * b->n_tokens; pl_now_ns() < until;)
        usleep(100);
    for (uint32_t t = 0; t < b->n_tokens; t++)
        s->cache[b->slot[t]] = b->tokens[t];
    for (uint32_t q = 0; q < b->n_seqs; q++)
        for (uint32_t t = b->q_start[q]; t < b->q_start[q + 1]; t++) {
            if (row >= b->n_rows || b->rows[row] != t)
                continue;
            const uint32_t *pages = b->pages + b->page_start[q];
            float *out = s->logits + (size_t)row++ * s->n_vocab;
            for (uint32_t i = 0; i <= b->pos[t]; i++)
                tokens[i] = s->cache[pages[i / PL_KV_PAGE] * PL_KV_PAGE + i % PL_KV_PAGE];
            memset(out, 0, s->n_vocab * sizeof *out);
            out[next_token(tokens, b->pos[t] + 1, s->n_vocab)] = tokens[0] == POISON ? NAN : 10;
        }
    *logits = s->logits;
    return PL_OK;
}

static pl_status kv_copy(void *self, uint32_t from, uint32_t to)
{
    struct script *s = self;
    memcpy(s->cache + (size_t)to * PL_KV_PAGE, s->cache + (size_t)from * PL_KV_PAGE, PL_KV_PAGE * sizeof *s->cache);
    return atomic_load(&s->fail);
}

static bool prepare(void *self)
{
    struct script *s = self;
    atomic_fetch_add(&s->asked, 1);
    if (atomic_load(&s->unprepared) == 0)
        return false;
    atomic_fetch_sub(&s->unprepared, 1);
    return true;
}

struct world {
    struct script script;
    struct pl_gguf *gguf;
    void *bytes;
    struct pl_tok *tok;
    struct pl_engine *engine;
};

static void new_engine(struct world *w, uint32_t n_pages, uint32_t max_sequences, uint32_t queue, uint32_t gap_ms)
{
    struct pl_err err = {0};
    const struct pl_engine_opts opts = {.max_sequences = max_sequences, .batch_tokens = MAX_STEP, .gap_ms = gap_ms, .max_context = 1024,
                                        .n_pages = n_pages, .queue_limit = queue};
    const struct pl_runner runner = {.self = &w->script, .forward = forward, .kv_copy = kv_copy, .prepare = prepare, .n_vocab = w->script.n_vocab};
    ck_assert_msg(pl_engine_new_with(&w->engine, &opts, &runner, w->tok, &err) == PL_OK, "%s", err.msg);
}

static void open_world(struct world *w, uint32_t n_pages, uint32_t max_sequences, uint32_t queue)
{
    struct pl_err err = {0};
    struct tiny_options o = tiny_defaults();
    struct gguf_out *out = tiny_model(&o, &err);
    size_t n;
    memset(w, 0, sizeof *w);
    w->bytes = gguf_out_bytes(out, &n);
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&w->gguf, w->bytes, n, &err), PL_OK);
    ck_assert_int_eq(pl_tok_load(&w->tok, w->gguf, &err), PL_OK);
    w->script.n_vocab = (uint32_t)pl_tok_count(w->tok);
    w->script.cache = calloc(n_pages * PL_KV_PAGE, sizeof(int32_t));
    w->script.logits = calloc((size_t)MAX_STEP * w->script.n_vocab, sizeof(float));
    new_engine(w, n_pages, max_sequences, queue, 0);
}

static void close_world(struct world *w)
{
    pl_engine_free(w->engine);
    pl_tok_free(w->tok);
    pl_gguf_close(w->gguf);
    free(w->bytes), free(w->script.cache), free(w->script.logits);
}

/* ---- requests ---------------------------------------------------------------------------------------------------------- */

static pl_status submit(struct world *w, int first, uint32_t n_prompt, uint32_t n, uint32_t max_tokens, struct pl_reply *reply, struct pl_err *err)
{
    struct pl_arena *a = pl_arena_new(0);
    struct pl_request *r = pl_arena_zalloc(a, sizeof *r);
    struct pl_prompt *p = pl_arena_zalloc(a, sizeof *p);
    int32_t *ids = pl_arena_alloc(a, n_prompt * sizeof *ids + 1);
    for (uint32_t i = 0; i < n_prompt; i++)
        ids[i] = i == 0 ? first : (int32_t)(i % 90); /* all prompts go on alike */
    *p = (struct pl_prompt){ids, n_prompt};
    *r = (struct pl_request){.arena = a, .prompts = p, .n_prompts = 1, .n = n, .max_tokens = max_tokens, .ignore_eos = true};
    r->sampling = (struct pl_sampling){.top_p = 1, .repetition_penalty = 1, .n_top_logprobs = -1};
    pl_status st = pl_engine_submit(w->engine, r, reply, err);
    if (st != PL_OK)
        pl_arena_free(a);
    return st;
}

struct answer {
    uint32_t n_done, n_tokens[8], cached[8];
    int32_t tokens[8][MAX_OUT];
    pl_finish finish;
    pl_status error;
};

/* Reads to the last terminal event; slow: a pause at each. */
static void collect(struct pl_reply *reply, uint32_t n, struct answer *a)
{
    struct pl_event ev;
    memset(a, 0, sizeof *a);
    while (a->n_done < n && a->error == 0) {
        ck_assert_msg(pl_reply_wait(reply, 20000), "no answer");
        while (pl_reply_next(reply, &ev)) {
            if (ev.kind == PL_EV_TOKEN)
                a->tokens[ev.choice][a->n_tokens[ev.choice]++] = ev.sampled.token;
            if (ev.kind == PL_EV_DONE)
                a->n_done++, a->finish = ev.finish, a->cached[ev.choice] = ev.n_cached;
            if (ev.kind == PL_EV_ERROR)
                a->error = ev.error.code;
        }
    }
    ck_assert(!pl_reply_next(reply, &ev)); /* exactly one end for each choice */
}

static void expect(const struct world *w, const struct answer *a, uint32_t choice, int first, uint32_t n_prompt, uint32_t n)
{
    int32_t tokens[2048];
    for (uint32_t i = 0; i < n_prompt; i++)
        tokens[i] = i == 0 ? first : (int32_t)(i % 90);
    ck_assert_uint_eq(a->n_tokens[choice], n);
    for (uint32_t i = 0; i < n; i++) {
        tokens[n_prompt + i] = (int32_t)next_token(tokens, n_prompt + i, w->script.n_vocab);
        ck_assert_int_eq(a->tokens[choice][i], tokens[n_prompt + i]);
    }
}

static void start(struct world *w)
{
    struct pl_err err;
    ck_assert_int_eq(pl_engine_start(w->engine, &err), PL_OK);
}

static struct pl_reply *new_reply(uint32_t n)
{
    struct pl_reply *r = pl_reply_new(pl_reply_needs(n) + 8, NULL, NULL);
    ck_assert_ptr_nonnull(r);
    return r;
}

/* ---- tests ------------------------------------------------------------------------------------------------------------- */

/* Many sequences, few pages: preempted, computed again, found in the cache; n > 1; the same tokens in the end. */
START_TEST(together)
{
    struct world w;
    struct pl_err err;
    struct pl_reply *replies[24];
    struct answer a;
    open_world(&w, _i == 0 ? 16 : _i == 1 ? 24 : 512, 8, 64);
    for (int i = 0; i < 24; i++) {
        replies[i] = new_reply(1 + i % 3);
        ck_assert_int_eq(submit(&w, i % 5, 20 + (uint32_t)i * 7, 1 + (uint32_t)i % 3, 40, replies[i], &err), PL_OK);
    }
    start(&w);
    for (int i = 0; i < 24; i++) {
        collect(replies[i], 1 + (uint32_t)i % 3, &a);
        ck_assert_int_eq(a.error, 0);
        ck_assert_int_eq(a.finish, PL_FINISH_LENGTH);
        for (uint32_t k = 0; k < 1 + (uint32_t)i % 3; k++)
            expect(&w, &a, k, i % 5, 20 + (uint32_t)i * 7, 40);
        pl_reply_unref(replies[i]);
    }
    struct pl_engine_stats st;
    ck_assert(pl_engine_drain(w.engine, 5000));
    pl_engine_stats(w.engine, &st);
    ck_assert_uint_eq(st.base.n_finished_length, 48);
    ck_assert(_i == 2 || st.n_preempted > 0);
    ck_assert(_i != 2 || st.base.prefix_hits > 0);
    ck_assert_uint_le(w.script.largest, MAX_STEP);
    close_world(&w);
}
END_TEST

/* From one step to the next of sequences that only decode, nothing is allocated: not for tokens, text, pages or events. The
 * second run counts from the first step on, to prove that what is allocated there is seen. */
START_TEST(steady)
{
    struct world w;
    struct pl_err err = {0};
    struct pl_reply *replies[4];
    struct answer a;
    open_world(&w, 128, 4, 16);
    w.script.count_from = _i == 0 ? 40 : 0; /* each slot of a ring has been used by then */
    w.script.count_to = 240;
    for (int i = 0; i < 4; i++) {
        replies[i] = pl_reply_new(pl_reply_needs(1) + 300, NULL, NULL);
        for (int k = 0; k < 300; k++) {
            const struct pl_event ev = {.kind = PL_EV_TOKEN};
            ck_assert(pl_reply_push(replies[i], &ev, "warm", 4));
        }
        for (struct pl_event ev; pl_reply_next(replies[i], &ev);)
            ;
        ck_assert_int_eq(submit(&w, i, 20, 1, 250, replies[i], &err), PL_OK);
    }
    ck_assert_int_eq(pl_engine_start(w.engine, &err), PL_OK);
    for (int i = 0; i < 4; i++) {
        collect(replies[i], 1, &a);
        expect(&w, &a, 0, i, 20, 250);
        pl_reply_unref(replies[i]);
    }
    ck_assert_uint_ge(atomic_load(&w.script.steps), 250);
    ck_assert((atomic_load(&allocations) > 0) == (_i == 1));
    close_world(&w);
}
END_TEST

/* A prompt that ends inside a page, or leaves another one there, is computed from there on. */
START_TEST(beginnings)
{
    static const struct {
        int first;
        uint32_t n, cached;
    } prompts[] = {{1, 50, 0}, {1, 40, 39}, {1, 50, 49}, {1, 90, 50}, {1, 96, 90}, {1, 96, 95}, {2, 96, 0}, {2, 10, 9}};
    struct world w;
    struct pl_err err;
    struct answer a;
    open_world(&w, 64, 4, 16);
    start(&w);
    for (size_t i = 0; i < PL_COUNT_OF(prompts); i++) {
        struct pl_reply *r = new_reply(2);
        ck_assert_int_eq(submit(&w, prompts[i].first, prompts[i].n, 2, 20, r, &err), PL_OK);
        collect(r, 2, &a);
        expect(&w, &a, 0, prompts[i].first, prompts[i].n, 20);
        expect(&w, &a, 1, prompts[i].first, prompts[i].n, 20);
        ck_assert_uint_eq(a.cached[0], prompts[i].cached);
        ck_assert_uint_eq(a.cached[1], prompts[i].n - 1);
        pl_reply_unref(r);
    }
    close_world(&w);
}
END_TEST

/* All that can be asked for. */
static pl_status submit_rich(struct world *w, struct pl_reply *reply, struct pl_err *err)
{
    static const struct pl_stop stop = {"never to be seen", 16};
    struct pl_arena *a = pl_arena_new(0);
    struct pl_request *r = a != NULL ? pl_arena_zalloc(a, sizeof *r) : NULL;
    struct pl_prompt *p = r != NULL ? pl_arena_zalloc(a, sizeof *p) : NULL;
    int32_t *ids = p != NULL ? pl_arena_alloc(a, 40 * sizeof *ids) : NULL;
    if (ids == NULL) {
        pl_arena_free(a);
        return PL_ENOMEM;
    }
    for (int32_t i = 0; i < 40; i++)
        ids[i] = i;
    *p = (struct pl_prompt){ids, 40};
    *r = (struct pl_request){.arena = a, .prompts = p, .n_prompts = 1, .n = 2, .max_tokens = 120, .ignore_eos = true, .stops = &stop, .n_stops = 1,
                             .prompt_logprobs = true};
    r->sampling = (struct pl_sampling){.top_p = 1, .repetition_penalty = 1.01f, .presence_penalty = 0.1f, .n_top_logprobs = 2};
    const pl_status st = pl_engine_submit(w->engine, r, reply, err);
    if (st != PL_OK)
        pl_arena_free(a);
    return st;
}

/* Whichever allocation of a request fails, alone (0) or with all that follow (1), the request ends, whole or with an error, and the next one is
 * answered. */
START_TEST(no_memory)
{
    struct world w;
    struct pl_err err;
    struct answer a;
    bool untouched = false;
    open_world(&w, 64, 4, 16);
    start(&w);
    for (int good = 0; !untouched; good++) {
        struct pl_reply *r = new_reply(2);
        atomic_store(&n_bad, _i == 0 ? 1 : INT_MAX);
        atomic_store(&n_good, good);
        const pl_status st = submit_rich(&w, r, &err);
        spared = true;
        if (st == PL_OK)
            collect(r, 2, &a);
        const int left = atomic_exchange(&n_good, INT_MAX);
        untouched = left > 0;
        pl_reply_unref(r);
        ck_assert(st == PL_OK || st == PL_ENOMEM);
        ck_assert(st != PL_OK || a.error == PL_OK || a.error == PL_ENOMEM);
        ck_assert(!untouched || (st == PL_OK && a.error == PL_OK));
        for (uint32_t k = 0; k < 2 && st == PL_OK && a.error == PL_OK; k++)
            expect(&w, &a, k, 0, 40, 120);
        r = new_reply(1);
        ck_assert_int_eq(submit(&w, 3, 30, 1, 4, r, &err), PL_OK);
        collect(r, 1, &a);
        expect(&w, &a, 0, 3, 30, 4);
        pl_reply_unref(r);
        spared = false;
    }
    struct pl_engine_stats stats;
    ck_assert(pl_engine_drain(w.engine, 5000));
    do
        pl_engine_stats(w.engine, &stats);
    while (stats.pages_held > 0); /* the test's time limit ends it */
    close_world(&w);
}
END_TEST

START_TEST(refusals)
{
    struct world w;
    struct pl_err err;
    struct pl_reply *r[4];
    struct answer a;
    open_world(&w, 8, 4, 2);
    for (int i = 0; i < 4; i++)
        r[i] = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 256, 1, 1, r[0], &err), PL_ETOOLONG); /* all pages hold 256 tokens */
    ck_assert_int_eq(submit(&w, 1, 0, 1, 1, r[0], &err), PL_EINVAL);
    ck_assert_int_eq(submit(&w, 1, 10, 50, 1, r[0], &err), PL_EINVAL); /* the reply has no room for 50 choices */
    ck_assert_int_eq(submit(&w, 1, 10, 1, 5, r[0], &err), PL_OK);
    ck_assert_int_eq(submit(&w, 2, 250, 1, UINT32_MAX, r[1], &err), PL_OK);
    ck_assert_int_eq(submit(&w, 3, 10, 1, 5, r[2], &err), PL_EFULL);
    start(&w);
    collect(r[0], 1, &a);
    expect(&w, &a, 0, 1, 10, 5);
    collect(r[1], 1, &a); /* to the end of what fits */
    expect(&w, &a, 0, 2, 250, 6);
    ck_assert_int_eq(submit(&w, POISON, 10, 1, 5, r[2], &err), PL_OK);
    ck_assert_int_eq(submit(&w, 4, 10, 1, 5, r[3], &err), PL_OK);
    collect(r[2], 1, &a);
    ck_assert_int_eq(a.error, PL_EFORMAT); /* its own failure, nobody else's */
    collect(r[3], 1, &a);
    expect(&w, &a, 0, 4, 10, 5);
    atomic_store(&w.script.fail, PL_ENOMEM);
    for (int i = 2; i < 4; i++) {
        pl_reply_unref(r[i]);
        r[i] = new_reply(2);
        ck_assert_int_eq(submit(&w, 4, 10, 2, 5, r[i], &err), PL_OK);
        collect(r[i], 2, &a);
        ck_assert_int_eq(a.error, PL_ENOMEM); /* that pass's failure, not the device's */
        atomic_store(&w.script.fail, i == 2 ? PL_ENOMEM : PL_OK);
    }
    pl_reply_unref(r[3]);
    r[3] = new_reply(1);
    ck_assert_int_eq(submit(&w, 4, 10, 1, 5, r[3], &err), PL_OK);
    collect(r[3], 1, &a);
    expect(&w, &a, 0, 4, 10, 5);
    ck_assert(pl_engine_healthy(w.engine, 1000));
    atomic_store(&w.script.fail, PL_EDEVICE);
    pl_reply_unref(r[0]);
    r[0] = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 10, 1, 5, r[0], &err), PL_OK);
    collect(r[0], 1, &a);
    ck_assert_int_eq(a.error, PL_EDEVICE);
    ck_assert_int_eq(submit(&w, 1, 10, 1, 5, r[0], &err), PL_EDEVICE);
    ck_assert(!pl_engine_healthy(w.engine, 1000));
    for (int i = 0; i < 4; i++)
        pl_reply_unref(r[i]);
    close_world(&w);
}
END_TEST

/* A client that reads nothing stops its own sequences, not the others; one that leaves frees its pages. */
START_TEST(slow_and_gone)
{
    struct world w;
    struct pl_err err;
    struct answer a;
    struct pl_engine_stats st;
    open_world(&w, 256, 8, 64);
    start(&w);
    struct pl_reply *slow = new_reply(1), *gone = new_reply(2), *quick = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 30, 1, 200, slow, &err), PL_OK);
    ck_assert_int_eq(submit(&w, 2, 30, 2, 900, gone, &err), PL_OK);
    ck_assert_int_eq(submit(&w, 3, 30, 1, 200, quick, &err), PL_OK);
    collect(quick, 1, &a);
    expect(&w, &a, 0, 3, 30, 200);
    pl_reply_cancel(gone);
    collect(gone, 2, &a);
    ck_assert_int_eq(a.finish, PL_FINISH_CANCELLED);
    collect(slow, 1, &a); /* goes on where it stopped */
    expect(&w, &a, 0, 1, 30, 200);
    ck_assert(pl_engine_drain(w.engine, 5000));
    pl_engine_stats(w.engine, &st);
    ck_assert_uint_eq(st.base.n_cancelled, 2);
    struct pl_reply *late = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 30, 1, 1, late, &err), PL_ESTOPPED);
    pl_reply_unref(slow), pl_reply_unref(gone), pl_reply_unref(quick), pl_reply_unref(late);
    close_world(&w);
}
END_TEST

/* A client that reads nothing does not keep the only place; what it had comes out whole when it reads again. */
START_TEST(parked)
{
    struct world w;
    struct pl_err err;
    struct answer a;
    struct pl_engine_stats st;
    open_world(&w, 256, 1, 64);
    start(&w);
    struct pl_reply *slow = new_reply(1), *next = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 30, 1, 200, slow, &err), PL_OK);
    ck_assert(pl_reply_wait(slow, 5000)); /* it has the place */
    ck_assert_int_eq(submit(&w, 2, 30, 1, 50, next, &err), PL_OK);
    ck_assert_msg(pl_reply_wait(next, 5000), "the next request got no place");
    collect(next, 1, &a);
    expect(&w, &a, 0, 2, 30, 50);
    ck_assert_int_eq(a.finish, PL_FINISH_LENGTH);
    pl_engine_stats(w.engine, &st);
    ck_assert_uint_eq(st.n_preempted, 1);
    ck_assert_uint_eq(st.base.n_finished_length, 1);
    collect(slow, 1, &a);
    expect(&w, &a, 0, 1, 30, 200);
    ck_assert_int_eq(a.finish, PL_FINISH_LENGTH);
    pl_reply_unref(slow), pl_reply_unref(next);
    close_world(&w);
}
END_TEST

/* Draining ends what does not finish in time. */
START_TEST(drain)
{
    struct world w;
    struct pl_err err;
    struct answer a;
    open_world(&w, 256, 8, 64);
    start(&w);
    struct pl_reply *never_read = new_reply(1);
    ck_assert_int_eq(submit(&w, 1, 30, 1, 900, never_read, &err), PL_OK);
    ck_assert(!pl_engine_drain(w.engine, 50));
    collect(never_read, 1, &a);
    ck_assert_int_eq(a.error, PL_ESTOPPED);
    pl_reply_unref(never_read);
    close_world(&w);
}
END_TEST

struct client {
    struct world *w;
    int id;
};

static void *client_main(void *arg)
{
    struct client *c = arg;
    struct pl_err err;
    struct answer *a = malloc(sizeof *a);
    for (int i = 0; i < 30; i++) {
        struct pl_reply *r = new_reply(2);
        uint32_t n = 5 + (uint32_t)(i * 13 + c->id) % 100;
        if (submit(c->w, c->id, n, 2, 20, r, &err) == PL_OK) {
            if (i % 5 == 0)
                pl_reply_cancel(r);
            collect(r, 2, a);
            if (i % 5 != 0)
                expect(c->w, a, 1, c->id, n, 20);
        }
        pl_reply_unref(r);
    }
    free(a);
    return NULL;
}

START_TEST(threads)
{
    struct world w;
    struct client clients[6];
    pthread_t ids[6];
    struct pl_engine_stats st;
    open_world(&w, 40, 6, 64);
    start(&w);
    for (int i = 0; i < 6; i++) {
        clients[i] = (struct client){&w, i};
        ck_assert_int_eq(pthread_create(&ids[i], NULL, client_main, &clients[i]), 0);
    }
    for (int i = 0; i < 6; i++)
        pthread_join(ids[i], NULL);
    ck_assert(pl_engine_drain(w.engine, 5000));
    pl_engine_stats(w.engine, &st);
    ck_assert_uint_eq(st.n_submitted, st.base.n_finished_length + st.base.n_cancelled);
    close_world(&w);
}
END_TEST

START_TEST(plans)
{
    uint64_t seed = (uint64_t)_i + 1;
    struct pl_plan_item items[40];
    for (int round = 0; round < 2000; round++) {
        uint32_t n = (uint32_t)(seed >> 40) % 40, budget = 40 + (uint32_t)(seed >> 20) % 500, used = 0, decodes = 0, starved = 0;
        for (uint32_t i = 0; i < n; i++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            items[i] = (struct pl_plan_item){.left = (seed >> 60) < 9 ? 1 : (uint32_t)(seed >> 33) % 3000};
        }
        const uint32_t beside = (uint32_t)(seed >> 50) % 600;
        uint32_t prefills = 0;
        ck_assert_uint_le(used = pl_plan(items, n, budget, beside), budget);
        for (uint32_t i = 0; i < n; i++) {
            used -= items[i].take;
            ck_assert_uint_le(items[i].take, items[i].left);
            decodes += items[i].left == 1;
            ck_assert(items[i].left != 1 || items[i].take == 1); /* decodes always run: the budget covers them */
            if (items[i].left > 1) { /* prefills: the oldest first, and no later one while an earlier one is cut */
                ck_assert(!starved || items[i].take == 0);
                starved |= items[i].take < items[i].left;
                prefills += items[i].take;
            }
        }
        ck_assert_uint_eq(used, 0);
        ck_assert(decodes == 0 || prefills <= beside);
        ck_assert(!starved || decodes + prefills == budget || (decodes > 0 && prefills == beside)); /* all that is allowed */
        seed = seed * 6364136223846793005u + 1442695040888963407u;
    }
}
END_TEST

/* A pass takes FIXED_NS and TOKEN_NS for each token; prompts without end beside n sequences that decode. */
static uint32_t settle(struct pl_pace *p, uint64_t gap_ns, uint32_t n_decode, float fixed_ns, float token_ns)
{
    for (int i = 0; i < 100; i++)
        pl_pace_learn_plain(p, (uint64_t)(fixed_ns + token_ns * (float)n_decode));
    for (int i = 0; i < 100; i++) {
        const uint32_t n = n_decode + pl_pace_room(p, gap_ns, n_decode);
        pl_pace_learn(p, n, (uint64_t)(fixed_ns + token_ns * (float)n));
    }
    return n_decode + pl_pace_room(p, gap_ns, n_decode);
}

/* Passes with prompts come to take the time that is allowed, or twice that of those without. */
START_TEST(paces)
{
    const uint64_t ms = 1000000;
    struct pl_pace p = {0};
    ck_assert_uint_eq(pl_pace_room(&p, 0, 5), UINT32_MAX);
    ck_assert_uint_eq(pl_pace_room(&p, 10 * ms, 5), PL_PACE_LEAST); /* nothing is known yet */
    const uint32_t small = settle(&p, 10 * ms, 2, 1e6f, 0.2e6f); /* 1 + 45 * 0.2 = 10 */
    ck_assert(small == 44 || small == 45);
    ck_assert_uint_eq(pl_pace_room(&p, 10 * ms, 40), PL_PACE_LEAST);
    const uint32_t before = pl_pace_room(&p, 10 * ms, 2);
    pl_pace_learn(&p, 3, 3 * ms); /* tells nothing about many */
    ck_assert_uint_eq(pl_pace_room(&p, 10 * ms, 2), before);
    pl_pace_learn(&p, 45, 1000 * ms); /* something else had the machine */
    ck_assert_uint_ge(pl_pace_room(&p, 10 * ms, 2) * 3, before * 2);
    ck_assert_uint_lt(pl_pace_room(&p, 10 * ms, 2), before);
    pl_pace_learn_plain(&p, 1000 * ms);
    ck_assert_uint_le(pl_pace_room(&p, 10 * ms, 2), before);
    p = (struct pl_pace){0};
    const uint32_t many = settle(&p, 10 * ms, 40, 1e6f, 0.5e6f); /* twice 1 + 40 * 0.5 = 1 + 82 * 0.5 */
    ck_assert(many == 81 || many == 82);
    p = (struct pl_pace){0};
    const uint32_t large = settle(&p, 10 * ms, 1, 40e6f, 0.05e6f); /* reading the weights takes longest: 40.05 ms, for 801 tokens more */
    ck_assert_uint_ge(large, 790);
    ck_assert_uint_le(large, 812);
}
END_TEST

/* Beside a sequence that decodes, a prompt takes the least piece when passes are slower than allowed, and all of the step when nothing is set. */
START_TEST(steps_aside)
{
    struct world w;
    struct pl_err err;
    struct pl_reply *r[2] = {new_reply(1), new_reply(1)};
    struct answer a;
    open_world(&w, 128, 4, 16);
    w.script.delay_ns = 200000;
    pl_engine_free(w.engine);
    new_engine(&w, 128, 4, 16, _i == 0 ? 0 : 1);
    ck_assert_int_eq(submit(&w, 1, 1, 1, 60, r[0], &err), PL_OK);
    ck_assert_int_eq(submit(&w, 2, 700, 1, 5, r[1], &err), PL_OK);
    start(&w);
    for (int i = 0; i < 2; i++) {
        collect(r[i], 1, &a);
        expect(&w, &a, 0, 1 + i, i == 0 ? 1 : 700, i == 0 ? 60 : 5);
        pl_reply_unref(r[i]);
    }
    ck_assert_uint_eq(w.script.largest, _i == 0 ? MAX_STEP : 1 + PL_PACE_LEAST);
    close_world(&w);
}
END_TEST

/* While there is nothing else to do, and after each pass, the runner prepares, until it has nothing left. */
START_TEST(prepares)
{
    struct world w;
    struct pl_err err;
    struct answer a;
    struct pl_reply *r = new_reply(1);
    open_world(&w, 128, 4, 16);
    atomic_store(&w.script.unprepared, 50);
    start(&w);
    for (int i = 0; i < 5000 && atomic_load(&w.script.unprepared) > 0; i++)
        usleep(1000);
    ck_assert_int_eq(atomic_load(&w.script.unprepared), 0);
    usleep(20000);
    ck_assert_uint_le(atomic_load(&w.script.asked), 51); /* it sleeps again */
    atomic_store(&w.script.unprepared, 10);
    ck_assert_int_eq(submit(&w, 1, 30, 1, 20, r, &err), PL_OK);
    collect(r, 1, &a);
    expect(&w, &a, 0, 1, 30, 20);
    ck_assert_int_eq(atomic_load(&w.script.unprepared), 0);
    pl_reply_unref(r);
    close_world(&w);
}
END_TEST

Suite *suite_engine(void)
{
    Suite *s = suite_create("engine");
    TCase *t = tcase_create("engine");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, together, 0, 3);
    tcase_add_loop_test(t, steady, 0, 2);
    tcase_add_test(t, beginnings);
    tcase_add_loop_test(t, no_memory, 0, 2);
    tcase_add_test(t, refusals);
    tcase_add_test(t, slow_and_gone);
    tcase_add_test(t, parked);
    tcase_add_test(t, drain);
    tcase_add_test(t, threads);
    tcase_add_loop_test(t, plans, 0, 4);
    tcase_add_test(t, paces);
    tcase_add_loop_test(t, steps_aside, 0, 2);
    tcase_add_test(t, prepares);
    suite_add_tcase(s, t);
    return s;
}
