/* check_record: steps that the CUDA device (emulated) records as graphs and repeats give the bits of steps that run kernel by
 * kernel, whatever the number of sequences and the length of their contexts; where recording fails, steps run as ever.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/fill.h"
#include "tests/tools/emulated.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"

Suite *suite_record(void);

enum { MOST = 20, MAX_TOKENS = 32 };

struct world {
    void *bytes;
    struct pl_gguf *g;
    struct runner r;
    uint32_t n_vocab;
};

/* False, with a line, where the emulated device was not built. */
static bool open_world(struct world *w, const char *const *flags, size_t n_flags)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    size_t n;
    ck_assert_int_eq(tiny_options_flags(&o, flags, n_flags, &err), PL_OK);
    struct gguf_out *out = tiny_model(&o, &err);
    *w = (struct world){.bytes = gguf_out_bytes(out, &n)};
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&w->g, w->bytes, n, &err), PL_OK);
    const pl_status rc = runner_open(&w->r, w->g, "cuda-emulated", 1, MAX_TOKENS, &err);
    if (rc == PL_ENOTSUP) {
        printf("record: skipped: %s\n", err.msg);
        runner_close(&w->r);
        pl_gguf_close(w->g);
        free(w->bytes);
        return false;
    }
    ck_assert_msg(rc == PL_OK, "%s", err.msg);
    w->n_vocab = pl_model_spec(w->r.model)->n_vocab;
    return true;
}

static void close_world(struct world *w)
{
    runner_close(&w->r);
    pl_gguf_close(w->g);
    free(w->bytes);
}

/* Sequences that are decoded side by side, token by token, and end one after the other. */
static float *decode(struct world *w, const uint32_t *lengths, uint32_t n_seqs, pl_dtype kv, size_t *n)
{
    struct run_seq seqs[MOST];
    int32_t tokens[MOST][256];
    *n = 0;
    for (uint32_t s = 0; s < n_seqs; s++)
        *n += (size_t)lengths[s] * w->n_vocab;
    float *logits = pl_xcalloc(*n, sizeof *logits), *at = logits;
    for (uint32_t s = 0; s < n_seqs; s++) {
        for (uint32_t i = 0; i < lengths[s]; i++)
            tokens[s][i] = (int32_t)((i * 7 + s * 13 + 3) % 90);
        seqs[s] = (struct run_seq){.tokens = tokens[s], .n = lengths[s], .chunk = 1, .logits = at};
        at += (size_t)lengths[s] * w->n_vocab;
    }
    ck_assert_int_eq(run_seqs(&w->r, seqs, n_seqs, kv), PL_OK);
    return logits;
}

static const uint32_t some[] = {133, 130, 9, 6, 3}, many[] = {6, 6, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2, 2};
static const struct {
    const char *flags[8];
    size_t n_flags;
    pl_dtype kv;
    const uint32_t *lengths;
    uint32_t n_seqs;
} cases[] = {
    {{"--layers", "2", "--heads", "4", "--kv-heads", "2"}, 6, PL_F16, some, PL_COUNT_OF(some)},
    {{"--layers", "2", "--type", "q4_1"}, 4, PL_Q8_0, some, PL_COUNT_OF(some)},
    {{"--layers", "2", "--arch", "gpt2"}, 4, PL_F32, some, PL_COUNT_OF(some)},
    {{"--layers", "1", "--type", "f16"}, 4, PL_BF16, many, PL_COUNT_OF(many)}, /* cuBLAS */
    {{"--layers", "2", "--type", "bf16"}, 4, PL_F16, many, PL_COUNT_OF(many)}, /* and what is rounded for it alone */
};

START_TEST(same_bits)
{
    struct world w;
    size_t n;
    if (!open_world(&w, cases[_i].flags, cases[_i].n_flags))
        return;
    const struct pl_device_ops *ops = w.r.dev->ops;
    float *recorded = decode(&w, cases[_i].lengths, cases[_i].n_seqs, cases[_i].kv, &n);
    const unsigned long launches = emulated_graph_launches();
    ck_assert_uint_gt(launches, cases[_i].lengths == some ? 120 : 0);
    float *again = decode(&w, cases[_i].lengths, cases[_i].n_seqs, cases[_i].kv, &n); /* another cache: nothing of the old one is used */
    ck_assert_uint_gt(emulated_graph_launches(), launches);
    const unsigned long before = emulated_graph_launches();
    ops->record_set(w.r.dev, false);
    float *plain = decode(&w, cases[_i].lengths, cases[_i].n_seqs, cases[_i].kv, &n);
    ck_assert_uint_eq(emulated_graph_launches(), before);
    ck_assert_mem_eq(recorded, plain, n * sizeof *plain);
    ck_assert_mem_eq(again, plain, n * sizeof *plain);
    free(recorded), free(again), free(plain);
    close_world(&w);
}
END_TEST

/* ---- what one graph is good for ---- */

enum { CONTEXT = 416, PAGE = 32, CACHES = 2 };

/* Tokens [from, from + n) of cache `c`'s own text; logits NULL = nothing is asked for, else n is 1. */
static void pass(struct world *w, struct pl_kvdev *kv, uint32_t c, uint32_t from, uint32_t n, float *logits)
{
    const uint32_t q_start[] = {0, n}, ctx = from + n, page_start[] = {0, (ctx + PAGE - 1) / PAGE}, row = 0;
    uint32_t pos[MAX_TOKENS], pages[CONTEXT / PAGE];
    int32_t tokens[MAX_TOKENS];
    const float *got;
    for (uint32_t i = 0; i < n; i++) {
        pos[i] = from + i;
        tokens[i] = (int32_t)((pos[i] * 7 + c * 31) % 90);
    }
    for (uint32_t i = 0; i < page_start[1]; i++)
        pages[i] = i;
    const struct pl_batch b = {.n_tokens = n, .n_seqs = 1, .n_rows = logits != NULL, .tokens = tokens, .pos = pos, .slot = pos, .q_start = q_start,
                               .ctx = &ctx, .page_start = page_start, .pages = pages, .rows = &row};
    ck_assert_int_eq(pl_model_forward(w->r.model, kv, &b, &got), PL_OK);
    if (logits != NULL)
        memcpy(logits, got, w->n_vocab * sizeof *logits);
}

/* A graph has room for two or four spans of 128 positions; of the four the step that it is made of may have three. A key comes twice before it
 * has a graph. */
static const struct {
    uint32_t cache, pos;
} steps[] = {{0, 140}, {0, 141}, {0, 142}, {0, 300}, {0, 301}, {0, 302}, {0, 400}, {1, 140}, {1, 141}, {1, 142}, {1, 400}};
enum { STEPS = PL_COUNT_OF(steps), OF_GRAPHS = 7 };

/* Decodes by turns from two caches that are there at the same time. */
static float *take_turns(struct world *w)
{
    const struct pl_device_ops *ops = w->r.dev->ops;
    const struct pl_kv_shape shape = pl_model_kv_part(w->r.model, PAGE, CONTEXT / PAGE, PL_F16);
    float *logits = pl_xcalloc((size_t)STEPS * w->n_vocab, sizeof *logits);
    struct pl_kvdev *kv[CACHES];
    for (uint32_t c = 0; c < CACHES; c++) {
        ck_assert_int_eq(ops->kv_new(w->r.dev, &shape, &kv[c]), PL_OK);
        for (uint32_t from = 0; from < CONTEXT; from += MAX_TOKENS)
            pass(w, kv[c], c, from, MAX_TOKENS, NULL);
    }
    for (uint32_t i = 0; i < STEPS; i++)
        pass(w, kv[steps[i].cache], steps[i].cache, steps[i].pos, 1, logits + (size_t)i * w->n_vocab);
    for (uint32_t c = 0; c < CACHES; c++)
        ops->kv_free(w->r.dev, kv[c]);
    return logits;
}

START_TEST(other_caches_and_contexts)
{
    static const char *const flags[] = {"--layers", "2", "--heads", "4", "--kv-heads", "2", "--ctx", "512"};
    struct world w;
    if (!open_world(&w, flags, PL_COUNT_OF(flags)))
        return;
    const unsigned long before = emulated_graph_launches();
    float *recorded = take_turns(&w);
    const unsigned long launches = emulated_graph_launches() - before;
    w.r.dev->ops->record_set(w.r.dev, false);
    float *plain = take_turns(&w);
    for (uint32_t i = 0; i < STEPS; i++)
        ck_assert_msg(memcmp(recorded + (size_t)i * w.n_vocab, plain + (size_t)i * w.n_vocab, w.n_vocab * sizeof *plain) == 0, "step %u", i);
    ck_assert_uint_eq(launches, OF_GRAPHS);
    free(recorded), free(plain);
    close_world(&w);
}
END_TEST

/* ---- how many kernels a step is made of ---- */

/* Those of a step of one token at pos; with this many layers. */
static unsigned long kernels(const char *layers, uint32_t pos)
{
    const char *const flags[] = {"--layers", layers, "--heads", "4", "--kv-heads", "2", "--ctx", "512", "--type", "bf16"};
    struct pl_kvdev *kv;
    struct world w;
    if (!open_world(&w, flags, PL_COUNT_OF(flags)))
        return 0;
    const struct pl_device_ops *ops = w.r.dev->ops;
    const struct pl_kv_shape shape = pl_model_kv_part(w.r.model, PAGE, CONTEXT / PAGE, PL_F16);
    float *logits = pl_xcalloc(w.n_vocab, sizeof *logits);
    ck_assert_int_eq(ops->kv_new(w.r.dev, &shape, &kv), PL_OK);
    const unsigned long before = emulated_launches();
    pass(&w, kv, 0, pos, 1, logits);
    const unsigned long n = emulated_launches() - before;
    ops->kv_free(w.r.dev, kv);
    free(logits);
    close_world(&w);
    return n;
}

/* A norm, a product, the write into the cache, attention in one or two, a product; a norm and two products. Beside the layers: the embedding, a
 * norm and the last product. Each costs a step some microseconds, whatever it does. */
START_TEST(few_kernels)
{
    static const struct {
        uint32_t pos;
        unsigned long layer, step;
    } expected[] = {{100, 8, 3}, {300, 9, 3}};
    for (size_t i = 0; i < PL_COUNT_OF(expected); i++) {
        const unsigned long one = kernels("1", expected[i].pos), three = kernels("3", expected[i].pos);
        if (one == 0)
            return;
        ck_assert_uint_eq(three - one, 2 * expected[i].layer);
        ck_assert_uint_eq(one, expected[i].layer + expected[i].step);
    }
}
END_TEST

START_TEST(no_graphs)
{
    struct world w;
    size_t n;
    ck_assert_int_eq(setenv("PARLEY_EMU_FAULT", "graphs", 1), 0);
    if (!open_world(&w, cases[0].flags, cases[0].n_flags))
        return;
    static const uint32_t lengths[] = {9, 6, 3};
    float *failing = decode(&w, lengths, 3, PL_F16, &n);
    ck_assert_uint_eq(emulated_graph_launches(), 0);
    w.r.dev->ops->record_set(w.r.dev, false);
    float *plain = decode(&w, lengths, 3, PL_F16, &n);
    ck_assert_mem_eq(failing, plain, n * sizeof *plain);
    free(failing), free(plain);
    close_world(&w);
}
END_TEST

START_TEST(filling)
{
    static const int32_t tokens[] = {5, 6, 7};
    static const uint32_t pos[] = {40, 0, 3}, slot[] = {72, 0, 35}, q_start[] = {0, 1, 2, 3}, ctx[] = {41, 1, 4}, rows[] = {0, 1, 2};
    static const uint32_t page_start[] = {0, 2, 3, 4}, pages[] = {9, 2, 0, 1}, adapter[] = {0, 1, 0};
    struct pl_batch b = {.n_tokens = 3, .n_seqs = 3, .n_rows = 3, .tokens = tokens, .pos = pos, .slot = slot, .q_start = q_start, .ctx = ctx,
                         .page_start = page_start, .pages = pages, .rows = rows}, f;
    struct pl_fill fill = {0};
    ck_assert(pl_fill_decodes(&b) && pl_fill(&fill, &b, 8, &f));
    ck_assert(f.n_tokens == 8 && f.n_seqs == 8 && f.n_rows == 8);
    ck_assert_mem_eq(f.tokens, tokens, sizeof tokens);
    ck_assert_mem_eq(f.pos, pos, sizeof pos);
    ck_assert_mem_eq(f.slot, slot, sizeof slot);
    ck_assert_mem_eq(f.ctx, ctx, sizeof ctx);
    ck_assert_mem_eq(f.pages, pages, sizeof pages);
    ck_assert_mem_eq(f.page_start, page_start, sizeof page_start);
    for (uint32_t i = 0; i < 8; i++)
        ck_assert(f.q_start[i + 1] == i + 1 && f.rows[i] == i && f.page_start[i] < f.page_start[i + 1]);
    for (uint32_t i = 3; i < 8; i++)
        ck_assert(f.slot[i] == PL_NO_ROW && f.pos[i] == 0 && f.ctx[i] == 1 && f.pages[f.page_start[i]] == 0);
    b.adapter = adapter;
    ck_assert(!pl_fill_decodes(&b));
    b.adapter = NULL, b.n_rows = 2;
    ck_assert(!pl_fill_decodes(&b));
    pl_fill_fini(&fill);
}
END_TEST

Suite *suite_record(void)
{
    Suite *s = suite_create("record");
    TCase *t = tcase_create("record");
    tcase_set_timeout(t, 300);
    tcase_add_loop_test(t, same_bits, 0, (int)PL_COUNT_OF(cases));
    tcase_add_test(t, other_caches_and_contexts);
    tcase_add_test(t, few_kernels);
    tcase_add_test(t, no_graphs);
    tcase_add_test(t, filling);
    suite_add_tcase(s, t);
    return s;
}
