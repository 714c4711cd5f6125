/* check_attn: a sequence's logits have the same bits alone, in chunks of any size, among fifteen others and on any number of threads,
 * for every cache type and instruction set, with contexts of several segments of attention. The cache's memory is there when asked for.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/device/cpu/cpu.h"
#include "tests/tools/run_model.h"
#include "tests/tools/tiny_model.h"

Suite *suite_attn(void);

enum { LENGTH = 570, OTHERS = 15, BATCH_TOKENS = 340, MAX_VOCAB = 4096 };

static const char *const isas[] = {"ref", "avx2", "avxvnni", "avx512"};
static const struct {
    const char *name;
    pl_dtype type;
} types[] = {
    {"f32", PL_F32}, {"f16", PL_F16}, {"bf16", PL_BF16}, {"q8_0", PL_Q8_0}, /* those of the CPU */
};

struct loaded {
    void *bytes;
    struct pl_gguf *g;
};

static void build(struct loaded *m, const char *head_dim)
{
    const char *const flags[] = {"--ctx", "1024", "--layers", "2", "--head-dim", head_dim, "--seed", "21"};
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    size_t n;
    ck_assert_int_eq(tiny_options_flags(&o, flags, PL_COUNT_OF(flags), &err), PL_OK);
    struct gguf_out *out = tiny_model(&o, &err);
    ck_assert_ptr_nonnull(out);
    m->bytes = gguf_out_bytes(out, &n);
    gguf_out_free(out);
    ck_assert_int_eq(pl_gguf_open_memory(&m->g, m->bytes, n, &err), PL_OK);
}

static void unbuild(struct loaded *m)
{
    pl_gguf_close(m->g);
    free(m->bytes);
}

static int32_t token(uint32_t seq, uint32_t i, size_t V)
{
    return (int32_t)((seq * 131 + i * 37 + i * i) % V);
}

/* The sequence's logits from `from` on, alone or with others that go at a pace of their own. Returns the size of the vocabulary; 0
 * when the processor lacks the instruction set. */
static size_t logits(const struct loaded *m, const char *isa, pl_dtype kv_type, unsigned threads, uint32_t chunk, uint32_t n_others, uint32_t n,
                   uint32_t from, float *out)
{
    struct runner r;
    struct pl_err err;
    const pl_status rc = runner_open(&r, m->g, isa, threads, BATCH_TOKENS, &err);
    ck_assert(rc == PL_OK || rc == PL_ENOTSUP);
    if (rc != PL_OK)
        return 0;
    const size_t V = pl_model_spec(r.model)->n_vocab;
    ck_assert_uint_le(V, MAX_VOCAB);
    struct run_seq seqs[1 + OTHERS];
    int32_t *tokens[1 + OTHERS];
    for (uint32_t s = 0; s <= n_others; s++) {
        const uint32_t at = (s + n_others / 2) % (n_others + 1), length = at == 0 ? n : 1 + at * 97 % n; /* ours is in the middle */
        tokens[s] = pl_xcalloc(length, sizeof *tokens[s]);
        for (uint32_t i = 0; i < length; i++)
            tokens[s][i] = token(at, i, V);
        seqs[s] = (struct run_seq){.tokens = tokens[s], .n = length, .chunk = at == 0 ? chunk : 1 + at % 3 * 9, .from = at == 0 ? from : length - 1};
        seqs[s].logits = at == 0 ? out : pl_xcalloc(V, sizeof(float));
    }
    ck_assert_int_eq(run_seqs(&r, seqs, n_others + 1, kv_type), PL_OK);
    for (uint32_t s = 0; s <= n_others; s++) {
        free(tokens[s]);
        if (seqs[s].logits != out)
            free(seqs[s].logits);
    }
    runner_close(&r);
    return V;
}

START_TEST(bits_depend_on_the_sequence_alone)
{
    static const struct {
        unsigned threads;
        uint32_t chunk, others;
    } ways[] = {{1, 1, 0}, {2, 1, 0}, {5, 1, 0}, {2, 5, 0}, {2, 33, 0}, {1, 300, 0}, {2, 1, OTHERS}, {3, 40, OTHERS}, {1, 7, 1}};
    static const char *const dims[] = {"16", "64", "80"};
    const char *isa = isas[_i / (int)PL_COUNT_OF(types)];
    const pl_dtype type = types[_i % (int)PL_COUNT_OF(types)].type;
    const bool slow = strcmp(isa, "ref") == 0;
    for (size_t d = slow ? 1 : 0; d < (slow ? 2 : PL_COUNT_OF(dims)); d++) {
        const uint32_t n = slow ? 290 : LENGTH, from = n - 40; /* the newest tokens see everything before them */
        struct loaded m;
        build(&m, dims[d]);
        float *first = pl_xcalloc((size_t)(n - from) * MAX_VOCAB, sizeof *first), *again = pl_xcalloc((size_t)(n - from) * MAX_VOCAB, sizeof *again);
        const size_t V = logits(&m, isa, type, 2, 64, 0, n, from, first), size = (n - from) * V * sizeof *first;
        for (size_t w = 0; V > 0 && w < PL_COUNT_OF(ways); w++) {
            logits(&m, isa, type, ways[w].threads, ways[w].chunk, ways[w].others, n, from, again);
            ck_assert_msg(memcmp(first, again, size) == 0, "%s, cache %s, heads of %s: %u threads, chunks of %u, %u others: other bits", isa,
                          types[_i % (int)PL_COUNT_OF(types)].name, dims[d], ways[w].threads, ways[w].chunk, ways[w].others);
        }
        free(first);
        free(again);
        unbuild(&m);
    }
}
END_TEST

/* Memory of the first pages, in whole blocks, is there after so many pieces, and what is in it stays. */
START_TEST(prepared)
{
    enum { PAGES = 200, FIRST = 30, WHOLE = 32 };
    struct pl_pool *pool;
    struct pl_device *dev;
    struct pl_kvdev *kv;
    struct pl_err err;
    const struct pl_kv_shape shape = {5, 3, 64, PL_CPU_PAGE, PAGES, PL_F32}; /* 245,760 bytes a page */
    ck_assert_int_eq(pl_pool_new(&pool, 1, &err), PL_OK);
    ck_assert_int_eq(pl_device_open(&dev, "cpu", "", pool, &err), PL_OK);
    ck_assert_int_eq(dev->ops->kv_new(dev, &shape, &kv), PL_OK);
    kv->data[FIRST * kv->page_bytes / 2] = 42;
    size_t pieces = 0;
    while (dev->ops->kv_prepare(dev, kv, FIRST))
        pieces++;
    ck_assert_uint_eq(pieces, (WHOLE * kv->page_bytes + PL_CPU_HUGE_PAGE - 1) / PL_CPU_HUGE_PAGE);
    ck_assert_uint_eq(kv->data[FIRST * kv->page_bytes / 2], 42);
    for (size_t at = 0; at < WHOLE * kv->page_bytes; at += PL_CPU_HUGE_PAGE) {
        unsigned char present;
        ck_assert_int_eq(mincore(kv->data + at, (size_t)sysconf(_SC_PAGESIZE), &present), 0);
        ck_assert_int_eq(present & 1, 1);
    }
    ck_assert(!dev->ops->kv_prepare(dev, kv, FIRST / 2));
    while (dev->ops->kv_prepare(dev, kv, 4 * PAGES)) /* as many as there are */
        pieces++;
    ck_assert_uint_eq(pieces, (kv->bytes + PL_CPU_HUGE_PAGE - 1) / PL_CPU_HUGE_PAGE);
    dev->ops->kv_free(dev, kv);
    dev->ops->close(dev);
    pl_pool_free(pool);
}
END_TEST

Suite *suite_attn(void)
{
    Suite *s = suite_create("attn");
    TCase *tc = tcase_create("bits");
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, bits_depend_on_the_sequence_alone, 0, PL_COUNT_OF(isas) * PL_COUNT_OF(types));
    tcase_add_test(tc, prepared);
    suite_add_tcase(s, tc);
    return s;
}
