/* check_ranks: models cut over ranks, and the engine over them: the numbers of one rank, whatever the number of ranks, and a clear end when
 * a rank is lost.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/kv/kv.h"
#include "core/model/adapter.h"
#include "core/model/part.h"
#include "core/sched/adapters.h"
#include "core/sched/ranks.h"
#include "core/sched/reply_int.h"
#include "core/sched/runner.h"
#include "core/text/tok.h"
#include "tests/tools/emulated.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"
#include "tests/unit/on_ranks.h"

Suite *suite_ranks(void);

/* ---- models -------------------------------------------------------------------------------------------------------- */

struct cut_case {
    const char *flags[24];
    unsigned size;
    bool adapters;
};

#define LLAMA "--arch", "llama", "--heads", "12", "--kv-heads", "6", "--embd", "96", "--ff", "192", "--layers", "3"
#define GPT2 "--arch", "gpt2", "--heads", "6", "--kv-heads", "6", "--embd", "96", "--ff", "160", "--layers", "2"
static const struct cut_case cut_cases[] = {
    {{LLAMA, "--type", "f32"}, 2, true},
    {{LLAMA, "--type", "f32", "--biases", "--untied"}, 3, true},
    {{LLAMA, "--type", "bf16", "--biases", "--rope-factors"}, 5, false}, /* six heads over five ranks */
    {{LLAMA, "--type", "q4_1", "--head-dim", "32"}, 3, false},
    {{LLAMA, "--type", "q8_0", "--head-dim", "32", "--biases"}, 2, true},
    {{"--arch", "llama", "--heads", "9", "--kv-heads", "3", "--embd", "288", "--ff", "768", "--layers", "2", "--type", "q4_1"}, 3, true},
    {{"--arch", "llama", "--heads", "9", "--kv-heads", "3", "--embd", "288", "--ff", "768", "--layers", "2", "--type", "q4_1"}, 2, false},
    {{"--arch", "llama", "--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--embd", "256", "--ff", "768", "--layers", "2", "--type", "q4_k"}, 2, false},
    {{GPT2, "--type", "f32"}, 2, true},
    {{GPT2, "--type", "f32"}, 3, true},
    {{GPT2, "--type", "f16"}, 5, false},
    {{"--arch", "gpt2", "--heads", "6", "--kv-heads", "6", "--embd", "192", "--ff", "160", "--layers", "2", "--type", "q8_0"}, 3, false},
};

static void *build(const char *const *flags, size_t *n)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    size_t n_flags = 0;
    while (flags[n_flags] != NULL)
        n_flags++;
    ck_assert_msg(tiny_options_flags(&o, flags, n_flags, &err) == PL_OK, "%s", err.msg);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_msg(out != NULL, "%s", err.msg);
    void *bytes = gguf_out_bytes(out, n);
    gguf_out_free(out);
    return bytes;
}

/* Every target of every layer, of random values; the same for the same seed. */
static struct pl_adapter *random_adapter(const struct pl_spec *spec, uint64_t from)
{
    struct pl_adapter *a = pl_xcalloc(1, sizeof *a);
    a->arch = spec->arch;
    a->pairs = pl_xcalloc((size_t)spec->n_layers * PL_TARGET_COUNT, sizeof *a->pairs);
    uint64_t seed = from;
    for (uint32_t layer = 0; layer < spec->n_layers; layer++)
        for (int t = 0; t < PL_TARGET_COUNT; t++) {
            struct pl_target_place place;
            const uint32_t rank = 3 + layer;
            if (!pl_target_find(spec, (pl_target)t, &place))
                continue;
            a->pairs[a->n_pairs++] = (struct pl_lora_pair){.layer = layer,
                                                           .target = (pl_target)t,
                                                           .rank = rank,
                                                           .scale = 0.3f,
                                                           .a = random_floats(&seed, (size_t)rank * place.cols),
                                                           .b = random_floats(&seed, (size_t)rank * place.rows)};
        }
    return a;
}

static void free_adapter(struct pl_adapter *a)
{
    for (size_t i = 0; i < a->n_pairs; i++)
        free(a->pairs[i].a), free(a->pairs[i].b);
    free(a->pairs);
    free(a);
}

static void use_adapter(struct runner *r, uint32_t slot)
{
    struct pl_adapter *a = random_adapter(pl_model_spec(r->model), 1000 + slot);
    struct pl_lora_set *set;
    struct pl_err err;
    ck_assert_msg(pl_model_adapter_make(&set, r->model, a, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(pl_model_adapter_add(r->model, slot, set, &err), PL_OK);
    free_adapter(a);
}

enum { N_SEQS = 3, N_TOKENS = 40 };

struct cut_run {
    const struct pl_gguf *g;
    bool adapters;
    float *logits[N_SEQS];
    const char *device;
};

static void run_part(struct rank *r)
{
    struct cut_run *run = r->shared;
    struct runner m;
    struct pl_err err = {0};
    struct run_seq seqs[N_SEQS];
    int32_t tokens[N_SEQS][N_TOKENS];
    ck_assert_msg(runner_open_part(&m, run->g, r->comm, run->device, 1, 64, &err) == PL_OK, "%s", err.msg);
    const uint32_t V = pl_model_spec(m.model)->n_vocab;
    for (uint32_t slot = 1; run->adapters && slot < N_SEQS; slot++)
        use_adapter(&m, slot);
    for (uint32_t s = 0; s < N_SEQS; s++) {
        for (uint32_t t = 0; t < N_TOKENS; t++)
            tokens[s][t] = (int32_t)((t * 7919 + s * 104729 + 5) % V);
        seqs[s] = (struct run_seq){.tokens = tokens[s], .n = N_TOKENS, .chunk = s == 0 ? 1 : 17 + s, .from = s == 1 ? 0 : N_TOKENS - 4,
                                   .adapter = run->adapters ? s : 0, .logits = r->comm->rank == 0 ? run->logits[s] : NULL};
    }
    ck_assert_int_eq(run_seqs(&m, seqs, N_SEQS, PL_F32), PL_OK);
    runner_close(&m);
}

/* How far the logits may lie apart, as a share of the largest. Where activations are rounded to 8 bits, the CPU sums nothing over ranks: the same
 * bits. A GPU rounds those of 16-bit weights to their type, where there are many rows: two sums next to each other may become numbers next
 * to each other, which lie 2^-11 (f16) or 2^-8 (bf16) apart, and what follows from them twice that. */
static double bound_of(const struct pl_gguf *g, const char *device)
{
    const pl_dtype dtype = pl_gguf_tensor(g, "blk.0.ffn_up.weight")->dtype;
    if (device == NULL)
        return pl_dtype_block(dtype) > 1 ? 0 : 1e-4;
    return dtype == PL_BF16 ? 0x1p-7 : dtype == PL_F16 ? 0x1p-10 : 1e-4;
}

static void compare_parts(const struct cut_case *c, const char *device)
{
    struct pl_err err = {0};
    struct pl_gguf *g;
    size_t n;
    void *bytes = build(c->flags, &n);
    ck_assert_msg(pl_gguf_open_memory(&g, bytes, n, &err) == PL_OK, "%s", err.msg);
    struct pl_spec spec;
    unsigned arch;
    ck_assert_int_eq(pl_model_check(&spec, &arch, NULL, g, &err), PL_OK);
    struct cut_run whole = {g, c->adapters, {NULL}, device}, parts = whole;
    const size_t all = (size_t)N_TOKENS * spec.n_vocab;
    for (int s = 0; s < N_SEQS; s++)
        whole.logits[s] = pl_xcalloc(all, sizeof(float)), parts.logits[s] = pl_xcalloc(all, sizeof(float));
    on_ranks(1, TIMEOUT_MS, run_part, &whole);
    on_ranks(c->size, TIMEOUT_MS, run_part, &parts);
    double scale = 0, worst = 0, apart = 0;
    for (int s = 0; s < N_SEQS; s++)
        for (size_t i = 0; i < all; i++) {
            scale = fmax(scale, fabs((double)whole.logits[s][i]));
            worst = fmax(worst, fabs((double)whole.logits[s][i] - (double)parts.logits[s][i]));
            apart = s > 0 ? fmax(apart, fabs((double)whole.logits[s][i] - (double)whole.logits[0][i])) : apart;
        }
    ck_assert_msg(worst <= bound_of(g, device) * scale && scale > 0, "%g of %g", worst, scale);
    ck_assert_double_gt(apart, 0.01 * scale); /* sequences differ, and so do adapters */
    for (int s = 0; s < N_SEQS; s++)
        free(whole.logits[s]), free(parts.logits[s]);
    pl_gguf_close(g);
    free(bytes);
}

START_TEST(parts_give_the_logits_of_the_whole)
{
    compare_parts(&cut_cases[_i], NULL);
}
END_TEST

static const struct cut_case gpu_cases[] = {
    {{LLAMA, "--type", "f32", "--biases", "--untied"}, 2, true},
    {{LLAMA, "--type", "bf16"}, 3, false},
    {{LLAMA, "--type", "q8_0", "--head-dim", "32"}, 3, false},
    {{GPT2, "--type", "f16"}, 3, true},
};

START_TEST(parts_on_gpus_give_the_logits_of_the_whole)
{
    setenv("PARLEY_EMU_GPUS", "3", 1);
    compare_parts(&gpu_cases[_i], GPUS);
}
END_TEST

static const struct refusal {
    const char *flags[24];
    unsigned size;
    const char *possible;
    bool sums; /* on a device that does not round activations */
} refusals[] = {
    {{LLAMA, "--type", "f32"}, 7, "ranks are 1, 2, 3, 4, 5, 6", false},
    {{LLAMA, "--type", "q4_1", "--head-dim", "32", "--ff", "96"}, 7, "ranks are 1, 2, 3, 4, 5, 6", false},
    {{LLAMA, "--type", "q4_1", "--head-dim", "32", "--ff", "96"}, 4, "ranks are 1, 2, 3", true}, /* three blocks */
    {{LLAMA, "--type", "q4_1", "--head-dim", "8"}, 4, "ranks are 1, 3", true},                   /* 16 inputs of a head, blocks of 32 */
};

START_TEST(impossible_numbers_of_ranks)
{
    const struct refusal *c = &refusals[_i];
    struct pl_err err = {0};
    struct pl_gguf *g;
    struct pl_spec spec;
    struct pl_part part;
    const struct pl_device_ops ops = {.rounds_inputs = !c->sums};
    const struct pl_device dev = {&ops};
    unsigned arch;
    size_t n;
    void *bytes = build(c->flags, &n);
    ck_assert_msg(pl_gguf_open_memory(&g, bytes, n, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(pl_model_check(&spec, &arch, NULL, g, &err), PL_OK);
    ck_assert_int_eq(pl_part_make(&part, &spec, arch, g, &dev, 0, c->size, &err), PL_EINVAL);
    ck_assert_str_eq(err.param, "tensor-parallel");
    ck_assert_msg(strstr(err.msg, c->possible) != NULL && strlen(strstr(err.msg, c->possible)) == strlen(c->possible), "%s", err.msg);
    pl_gguf_close(g);
    free(bytes);
}
END_TEST

/* ---- the engine ---------------------------------------------------------------------------------------------------- */

struct world {
    unsigned size;
    struct pl_gguf *g;
    struct pl_tok *tok;
    void *bytes;
    struct pl_comm *comms[MOST_RANKS];
    struct runner runners[MOST_RANKS];
    pthread_t threads[MOST_RANKS];
    struct pl_engine *engine;
    atomic_uint lost;
    atomic_bool halt; /* ranks other than 0 stop in the middle */
    bool short_of_memory; /* rank 0 has none for a pass */
    struct pl_device_ops ops; /* its device's then */
};

struct place {
    struct world *w;
    unsigned rank;
};

/* A device that stands still when the world says so. */
static struct world *halting;
static pl_status (*real_norm)(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps);
static pl_status norm_or_halt(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    while (atomic_load(&halting->halt) && atomic_load(&halting->lost) == 0)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return real_norm(dev, kind, out, x, gain, bias, eps);
}

static pl_status no_memory(struct pl_device *dev, const struct pl_batch *b)
{
    (void)dev, (void)b;
    return PL_ENOMEM;
}

static void *follow(void *arg)
{
    struct place p = *(struct place *)arg;
    struct runner *r = &p.w->runners[p.rank];
    struct pl_err err = {0};
    free(arg);
    pl_status rc = runner_open_part(r, p.w->g, p.w->comms[p.rank], NULL, 1, 64, &err);
    static struct pl_device_ops ops;
    if (p.w == halting && p.rank == 1) {
        ops = *r->dev->ops;
        real_norm = ops.norm;
        ops.norm = norm_or_halt;
        r->dev->ops = &ops;
    }
    rc = pl_rank_follow(p.w->comms[p.rank], r->dev, r->model, rc);
    ck_assert(rc == PL_OK || atomic_load(&p.w->halt));
    return NULL;
}

static void count_loss(void *arg)
{
    struct world *w = arg;
    atomic_fetch_add(&w->lost, 1);
}

static void open_world(struct world *w, unsigned size, uint32_t n_pages, int timeout_ms)
{
    static const char *const flags[] = {LLAMA, "--type", "f32", "--ctx", "512", NULL};
    struct pl_err err = {0};
    size_t n;
    w->size = size;
    w->bytes = build(flags, &n);
    ck_assert_int_eq(pl_gguf_open_memory(&w->g, w->bytes, n, &err), PL_OK);
    ck_assert_int_eq(pl_tok_load(&w->tok, w->g, &err), PL_OK);
    ck_assert_int_eq(pl_comm_threads_new(w->comms, size, timeout_ms, &err), PL_OK);
    for (unsigned r = 1; r < size; r++) {
        struct place *p = pl_xmalloc(sizeof *p);
        *p = (struct place){w, r};
        ck_assert_int_eq(pthread_create(&w->threads[r], NULL, follow, p), 0);
    }
    ck_assert_msg(runner_open_part(&w->runners[0], w->g, w->comms[0], NULL, 1, 64, &err) == PL_OK, "%s", err.msg);
    if (w->short_of_memory) {
        w->ops = *w->runners[0].dev->ops;
        w->ops.step_begin = no_memory;
        w->runners[0].dev->ops = &w->ops;
    }
    const struct pl_engine_opts opts = {.max_sequences = 8, .batch_tokens = 64, .max_context = 400, .n_pages = n_pages, .kv_dtype = PL_F32,
                                        .queue_limit = 64, .max_draft = 4, .draft_sequences = 4, .lost = count_loss, .lost_arg = w};
    ck_assert_msg(pl_engine_new_ranks(&w->engine, &opts, w->runners[0].dev, w->runners[0].model, w->comms[0], w->tok, &err) == PL_OK, "%s", err.msg);
    ck_assert_int_eq(pl_engine_start(w->engine, &err), PL_OK);
}

static void close_world(struct world *w)
{
    pl_engine_free(w->engine);
    pl_ranks_stop(w->comms[0]);
    for (unsigned r = 1; r < w->size; r++)
        pthread_join(w->threads[r], NULL);
    for (unsigned r = 0; r < w->size; r++) {
        runner_close(&w->runners[r]);
        w->comms[r]->ops->close(w->comms[r]);
    }
    pl_tok_free(w->tok);
    pl_gguf_close(w->g);
    free(w->bytes);
}

enum { N_JOBS = 16, OUT = 40 };

static struct pl_reply *submit(struct world *w, int job, struct pl_served *adapter)
{
    struct pl_arena *a = pl_arena_new(0);
    struct pl_request *r = pl_arena_zalloc(a, sizeof *r);
    struct pl_prompt *p = pl_arena_zalloc(a, sizeof *p);
    struct pl_reply *reply = pl_reply_new(pl_reply_needs(1) + 8, NULL, NULL);
    struct pl_err err = {0};
    const uint32_t n = 20 + (uint32_t)job * 9;
    int32_t *ids = pl_arena_alloc(a, n * sizeof *ids);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = 100 + (int32_t)((i < 64 ? i : i + (uint32_t)job) * 7919 % 200); /* they begin alike */
    *p = (struct pl_prompt){ids, n};
    *r = (struct pl_request){.arena = a, .prompts = p, .n_prompts = 1, .n = 1, .max_tokens = OUT, .ignore_eos = true, .adapter = adapter};
    r->sampling = (struct pl_sampling){.top_p = 1, .repetition_penalty = 1, .n_top_logprobs = -1};
    ck_assert_msg(pl_engine_submit(w->engine, r, reply, &err) == PL_OK, "%s", err.msg);
    return reply;
}

struct answer {
    uint32_t n, n_cached;
    int32_t tokens[OUT];
    pl_status error;
    char message[512];
};

static void collect(struct pl_reply *reply, struct answer *a)
{
    struct pl_event ev;
    bool done = false;
    *a = (struct answer){0};
    while (!done) {
        ck_assert_msg(pl_reply_wait(reply, 60000), "no answer");
        while (pl_reply_next(reply, &ev)) {
            if (ev.kind == PL_EV_TOKEN && a->n < OUT)
                a->tokens[a->n++] = ev.sampled.token;
            if (ev.kind == PL_EV_DONE)
                done = true, a->n_cached = ev.n_cached;
            if (ev.kind == PL_EV_ERROR) {
                done = true, a->error = ev.error.code;
                snprintf(a->message, sizeof a->message, "%s", ev.error.msg);
            }
        }
    }
    pl_reply_unref(reply);
}

/* Adapters as the server adds them: made on this thread, added on the engine's. */
struct adding {
    struct pl_engine_task task;
    struct pl_lora_set *set;
    uint32_t slot;
    pl_status rc;
    atomic_bool done;
};

static void add_now(struct pl_engine_task *task, struct pl_engine *e)
{
    struct adding *a = (struct adding *)task;
    struct pl_err err = {0};
    if (a->set == NULL)
        pl_engine_adapter_remove(e, a->slot);
    else
        a->rc = pl_engine_adapter_add(e, a->slot, a->set, &err);
    atomic_store(&a->done, true);
}

static void change_adapter(struct world *w, uint32_t slot, bool add)
{
    struct pl_model *m = w->runners[0].model;
    struct adding a = {.task.run = add_now, .slot = slot};
    struct pl_err err = {0};
    if (add) {
        struct pl_adapter *values = random_adapter(pl_model_spec(m), 1000 + slot);
        ck_assert_msg(pl_model_adapter_make(&a.set, m, values, &err) == PL_OK, "%s", err.msg);
        free_adapter(values);
    }
    ck_assert_int_eq(pl_engine_post(w->engine, &a.task), PL_OK);
    while (!atomic_load(&a.done))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    ck_assert_int_eq(a.rc, PL_OK);
}

/* Requests without and with adapters in one batch, with few pages, twice: what is preempted is computed again, what is in the cache is found. */
static void serve(struct world *w, struct answer *answers, struct pl_engine_stats *st)
{
    struct pl_adapters *owner = NULL;
    struct pl_err err = {0};
    struct pl_served served[2] = {{.slot = 0}};
    struct pl_reply *replies[2 * N_JOBS];
    ck_assert_int_eq(pl_adapters_new(&owner, w->engine, w->runners[0].model, "base", 4, &err), PL_OK);
    for (uint32_t i = 0; i < 2; i++) {
        served[i] = (struct pl_served){.id = i + 1, .slot = i + 1, .owner = owner, .refs = 4 * N_JOBS, .state = PL_SERVED_LISTED};
        pthread_mutex_init(&served[i].lock, NULL);
        pl_model_stats_init(&served[i].stats);
        change_adapter(w, i + 1, true);
    }
    for (int i = 0; i < 2 * N_JOBS; i++)
        replies[i] = submit(w, i % N_JOBS, i % 3 == 0 ? NULL : &served[i % 3 - 1]);
    for (int i = 0; i < 2 * N_JOBS; i++)
        collect(replies[i], &answers[i]);
    change_adapter(w, 2, false);
    change_adapter(w, 2, true);
    ck_assert(pl_engine_drain(w->engine, 5000));
    pl_engine_stats(w->engine, st);
    pl_adapters_stop(owner);
    pl_adapters_free(owner);
}

START_TEST(the_engine_gives_the_same_text)
{
    static struct answer whole[2 * N_JOBS], parts[2 * N_JOBS];
    static struct world one, several;
    struct pl_engine_stats st;
    open_world(&one, 1, 20, TIMEOUT_MS);
    serve(&one, whole, &st);
    close_world(&one);
    open_world(&several, 2 + (unsigned)_i, 20, TIMEOUT_MS);
    serve(&several, parts, &st);
    close_world(&several);
    ck_assert_uint_gt(st.n_preempted, 0);
    ck_assert_uint_gt(st.base.prefix_hits, 0);
    for (int i = 0; i < 2 * N_JOBS; i++) {
        ck_assert_int_eq(parts[i].error, 0);
        ck_assert_uint_eq(parts[i].n, OUT);
        for (int t = 0; t < OUT; t++)
            ck_assert_msg(parts[i].tokens[t] == whole[i].tokens[t], "request %d, token %d of %d", i, t, OUT);
    }
    ck_assert(memcmp(whole[0].tokens, whole[N_JOBS].tokens, sizeof whole[0].tokens) != 0); /* the adapter's text is another */
}
END_TEST

/* A rank that stands still in the middle: what runs ends with the reason, and nothing more is taken. */
START_TEST(a_rank_that_hangs_ends_the_requests)
{
    static struct world w;
    struct answer a;
    struct pl_err err = {0};
    pl_log_setup(PL_LOG_ERROR, false, -1);
    halting = &w;
    open_world(&w, 3, 64, 500);
    collect(submit(&w, 0, NULL), &a);
    ck_assert_int_eq(a.error, 0);
    struct pl_reply *reply = submit(&w, 5, NULL);
    ck_assert(pl_engine_healthy(w.engine, 30000));
    atomic_store(&w.halt, true);
    const uint64_t began = pl_now_ns();
    collect(reply, &a);
    ck_assert_int_eq(a.error, PL_ERANK);
    ck_assert_msg(strstr(a.message, "rank") != NULL, "%s", a.message);
    ck_assert_double_lt((double)(pl_now_ns() - began) / 1e9, 10);
    while (atomic_load(&w.lost) == 0)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    ck_assert(!pl_engine_healthy(w.engine, 30000));
    struct pl_request request = {.n = 1, .n_prompts = 1};
    ck_assert_int_eq(pl_engine_submit(w.engine, &request, NULL, &err), PL_ERANK);
    close_world(&w);
    ck_assert_uint_eq(atomic_load(&w.lost), 1);
}
END_TEST

START_TEST(a_pass_without_memory_ends_the_requests)
{
    static struct world w = {.short_of_memory = true};
    struct answer a;
    pl_log_setup(PL_LOG_ERROR, false, -1);
    open_world(&w, 2, 64, TIMEOUT_MS);
    atomic_store(&w.halt, true); /* the follower may end now */
    collect(submit(&w, 0, NULL), &a);
    ck_assert_int_eq(a.error, PL_ERANK); /* the others are in that pass: there is no later */
    close_world(&w);
    ck_assert_uint_eq(atomic_load(&w.lost), 1);
}
END_TEST

/* Nothing runs, and yet a rank that has gone is noticed. */
START_TEST(an_idle_engine_notices_too)
{
    static struct world w;
    pl_log_setup(PL_LOG_ERROR, false, -1);
    open_world(&w, 2, 64, 600);
    nanosleep(&(struct timespec){.tv_sec = 1, .tv_nsec = 500000000}, NULL); /* longer than the timeout: both are there */
    ck_assert(pl_engine_healthy(w.engine, 30000));
    atomic_store(&w.halt, true); /* the follower may end now */
    w.comms[1]->ops->give_up(w.comms[1]);
    for (int i = 0; i < 5000 && atomic_load(&w.lost) == 0; i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    ck_assert_uint_eq(atomic_load(&w.lost), 1);
    close_world(&w);
}
END_TEST

Suite *suite_ranks(void)
{
    Suite *s = suite_create("ranks");
    TCase *model = tcase_create("models"), *engine = tcase_create("engine");
    tcase_set_timeout(model, 180), tcase_set_timeout(engine, 240);
    tcase_add_loop_test(model, parts_give_the_logits_of_the_whole, 0, (int)PL_COUNT_OF(cut_cases));
    tcase_add_loop_test(model, impossible_numbers_of_ranks, 0, (int)PL_COUNT_OF(refusals));
    if (emulated_nccl())
        tcase_add_loop_test(model, parts_on_gpus_give_the_logits_of_the_whole, 0, (int)PL_COUNT_OF(gpu_cases));
    else
        fputs("ranks: not on emulated GPUs, which make cuda-emu builds\n", stderr);
    tcase_add_loop_test(engine, the_engine_gives_the_same_text, 0, 2);
    tcase_add_test(engine, a_rank_that_hangs_ends_the_requests);
    tcase_add_test(engine, a_pass_without_memory_ends_the_requests);
    tcase_add_test(engine, an_idle_engine_notices_too);
    suite_add_tcase(s, model);
    suite_add_tcase(s, engine);
    return s;
}
