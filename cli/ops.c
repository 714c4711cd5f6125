/* ops: where the time of a forward pass goes, operation by operation, beside what the machine can do at most; and how much of
 * the engine's time is in no operation.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cli/ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/drive.h"
#include "cli/overhead.h"
#include "cli/peak.h"
#include "cli/timed.h"
#include "core/base/mem.h"
#include "core/model/weights.h"

enum { MAX_ROWS = 64, LOG_SPANS = 1 << 18, CONTEXT = 16 };

static const struct work {
    const char *name;
    uint32_t n_seqs, n_tokens, passes; /* n_tokens: of each sequence */
} works[] = {{"1 stream", 1, 1, 96}, {"16 streams", 16, 1, 32}, {"prefill of 512", 1, 512, 4}};

struct known { /* a weight of the model */
    const struct pl_weight *w;
    const char *name;
    uint64_t bytes; /* in the file */
    bool quantized;
};

struct row { /* all calls of one operation with one shape */
    const char *name;
    struct timed_span first;
    uint32_t calls;
    uint64_t ns;
    double operations, bytes;
    bool quantized;
};

struct ops {
    struct cli_model m;
    struct drive d;
    struct peak peak;
    struct known *known;
    size_t n_known;
    bool json;
};

/* ---- what the weights are called ------------------------------------------------------------------------------------- */

static void know(struct ops *o, const struct pl_weight *w, const char *name, const char *tensor)
{
    const struct pl_gguf_tensor *t = w != NULL ? pl_gguf_tensor(o->m.gguf, tensor) : NULL;
    if (t == NULL)
        return;
    struct known *k = o->n_known > 0 && o->known[o->n_known - 1].w == w ? &o->known[o->n_known - 1] : &o->known[o->n_known++];
    *k = (struct known){w, name, k->bytes + t->n_bytes, pl_dtype_block(t->dtype) > 1}; /* parts of one weight follow each other */
}

static void know_weights(struct ops *o)
{
    const struct pl_model *m = o->m.model;
    char tensor[64];
    o->known = pl_xcalloc(16 * ((size_t)m->spec.n_layers + 1), sizeof *o->known);
#define VECTOR_ROW(w, field, name)
#define MATRIX_ROW(w, field, name) know(o, w, #field, name);
#define X(kind, field, arch, name, rows, cols, need, cut) kind##_ROW(m->top.field, field, name)
    PL_TOP_WEIGHTS(X)
#undef X
    for (uint32_t i = 0; i < m->spec.n_layers; i++) {
#define X(kind, field, arch, name, rows, cols, need, cut)                                                                   \
    snprintf(tensor, sizeof tensor, "blk.%u.%s", i, name);                                                             \
    kind##_ROW(m->layers[i].field, field, tensor)
        PL_LAYER_WEIGHTS(X)
#undef X
    }
}

static const struct known *find(const struct ops *o, const struct pl_weight *w)
{
    for (size_t i = 0; i < o->n_known; i++)
        if (o->known[i].w == w)
            return &o->known[i];
    return NULL;
}

/* ---- the rows of a table --------------------------------------------------------------------------------------------- */

/* Arithmetic of one call, and bytes that have to move: weights as the file has them, float32 activations, cached keys and
 * values. */
static void add_work(const struct ops *o, struct row *r, const struct timed_span *s, const struct known *k)
{
    const struct pl_spec *spec = pl_model_spec(o->m.model);
    double rows = s->rows, cols = s->cols, out = 4 * rows * cols;
    switch (s->op) {
    case TIMED_matmul:
    case TIMED_matmul_glu:
        r->operations += 2 * rows * cols * s->inner;
        r->bytes += (s->op == TIMED_matmul ? out : out / 2) + 4 * rows * s->inner + (k != NULL ? (double)k->bytes : 0);
        break;
    case TIMED_attn:
        r->operations += 4.0 * spec->n_heads * spec->head_dim * (double)s->scores;
        r->bytes += 2 * out + 4.0 * spec->n_kv_heads * spec->head_dim * (double)s->cells; /* keys and values in 16 bits */
        break;
    case TIMED_kv_write: r->bytes += 2 * out - 4.0 * rows * spec->n_kv_heads * spec->head_dim; break; /* the same */
    default: r->bytes += 2 * out; break;
    }
}

static bool same_kind(const struct row *r, const char *name, const struct timed_span *s)
{
    return strcmp(r->name, name) == 0 && r->first.rows == s->rows && r->first.cols == s->cols && r->first.inner == s->inner;
}

/* Sums the log up; returns how many rows there are. *step_ns: of all passes. */
static size_t sum_up(const struct ops *o, const struct timed *t, struct row *rows, uint64_t *step_ns)
{
    size_t n = 0;
    *step_ns = 0;
    for (size_t i = 0; i < t->n; i++) {
        const struct timed_span *s = &t->log[i];
        const struct known *k = s->inner > 0 ? find(o, s->w) : NULL; /* a product's */
        const char *name = k == NULL ? timed_names[s->op] : strcmp(k->name, "embed") == 0 ? "head" : k->name;
        if (s->op == TIMED_STEP) {
            *step_ns += s->end - s->start;
            continue;
        }
        size_t at = 0;
        while (at < n && !same_kind(&rows[at], name, s))
            at++;
        if (at == MAX_ROWS)
            continue; /* shows as time in no operation */
        if (at == n)
            rows[n++] = (struct row){.name = name, .first = *s, .quantized = k != NULL && k->quantized};
        rows[at].calls++;
        rows[at].ns += s->end - s->start;
        add_work(o, &rows[at], s, k);
    }
    return n;
}

static int by_time(const void *a, const void *b)
{
    uint64_t x = ((const struct row *)a)->ns, y = ((const struct row *)b)->ns;
    return (x < y) - (x > y);
}

static void print_row(const struct ops *o, const struct row *r, uint32_t passes, uint64_t step_ns, const char *comma)
{
    const char *isa = o->m.dev->ops->name;
    bool avx512 = strstr(isa, "avx512") != NULL, vnni = strstr(isa, "avxvnni") != NULL;
    double int8 = avx512 ? o->peak.int8_avx512 : vnni ? o->peak.int8_avxvnni : o->peak.int8_avx2, fma = avx512 ? o->peak.fma_avx512 : o->peak.fma_avx2;
    double peak = r->quantized ? int8 : fma, gops = r->operations / (double)r->ns, gbs = r->bytes / (double)r->ns;
    char shape[64];
    int n = snprintf(shape, sizeof shape, "%u x %u", r->first.rows, r->first.cols);
    if (r->first.inner > 0)
        snprintf(shape + n, sizeof shape - (size_t)n, " x %u", r->first.inner);
    double share = (double)r->ns / (double)step_ns, of_peak = peak > 0 ? gops / peak : 0, of_read = o->peak.read_gbs > 0 ? gbs / o->peak.read_gbs : 0;
    double percent = o->json ? 1 : 100;
    printf(o->json ? "%s{\"op\": \"%s\", \"shape\": \"%s\", \"calls\": %u, \"us\": %.2f, \"share\": %.4f, \"gops\": %.2f, \"of_peak\": %.4f, "
                     "\"gbs\": %.2f, \"of_read\": %.4f}"
                   : "%s| %s | %s | %u | %.1f | %.1f %% | %.1f | %.1f %% | %.1f | %.1f %% |\n",
           comma, r->name, shape, r->calls / passes, (double)r->ns * 1e-3 / passes, percent * share, gops, percent * of_peak, gbs, percent * of_read);
}

static bool report_work(struct ops *o, const struct work *w, const char *comma)
{
    struct row rows[MAX_ROWS];
    uint64_t step_ns, in_ops = 0;
    uint32_t start = w->n_tokens == 1 ? CONTEXT : 0;
    bool ok = drive_fill(&o->d, w->n_seqs, 0, start) && drive_step(&o->d, w->n_seqs, start, w->n_tokens, true); /* not counted */
    struct timed *t = ok ? timed_begin(o->m.dev, LOG_SPANS) : NULL;
    for (uint32_t i = 0; t != NULL && i < w->passes; i++)
        ok &= drive_step(&o->d, w->n_seqs, w->n_tokens == 1 ? start + i : 0, w->n_tokens, true);
    if (t == NULL || !ok || t->full) {
        fputs("parley bench: a forward pass failed, or there is no memory to time it\n", stderr);
        timed_end(t);
        return false;
    }
    size_t n = sum_up(o, t, rows, &step_ns);
    timed_end(t);
    qsort(rows, n, sizeof rows[0], by_time);
    for (size_t i = 0; i < n; i++)
        in_ops += rows[i].ns;
    double us = (double)step_ns * 1e-3 / w->passes, rest = (double)(step_ns - in_ops) * 1e-3 / w->passes;
    if (o->json)
        printf("%s{\"name\": \"%s\", \"sequences\": %u, \"tokens\": %u, \"passes\": %u, \"us\": %.2f, \"rest_us\": %.2f, \"ops\": [", comma, w->name,
               w->n_seqs, w->n_tokens, w->passes, us, rest);
    else
        printf("\n%s: %.0f us a pass, of these %.0f in no operation\n\n| operation | shape | calls | us | share | GOP/s | of peak | GB/s | of reading |\n"
               "|---|---|---|---|---|---|---|---|---|\n", w->name, us, rest);
    for (size_t i = 0; i < n; i++)
        print_row(o, &rows[i], w->passes, step_ns, o->json && i > 0 ? ", " : "");
    if (o->json)
        printf("]}");
    return true;
}

/* ---- the whole ------------------------------------------------------------------------------------------------------- */

static bool report(struct ops *o)
{
    const struct peak *p = &o->peak;
    if (o->json) {
        printf("{");
        cli_print_text("model", pl_model_spec(o->m.model)->name);
        printf(", \"device\": \"%s\", \"threads\": %u, \"peaks\": {\"int8_avx512\": %.1f, \"int8_avxvnni\": %.1f, \"int8_avx2\": %.1f, \"fma_avx512\": %.1f, "
               "\"fma_avx2\": %.1f, \"read_gbs\": %.2f}, ", o->m.dev->ops->name, pl_pool_size(o->m.pool),
               p->int8_avx512, p->int8_avxvnni, p->int8_avx2, p->fma_avx512, p->fma_avx2, p->read_gbs);
    } else {
        printf("%s, %s, %u threads; at most: int8 %.0f GOP/s (AVX-VNNI %.0f, AVX2 %.0f), float32 %.0f GFLOP/s (AVX2 %.0f), reading %.1f GB/s\n",
               pl_model_spec(o->m.model)->name, o->m.dev->ops->name, pl_pool_size(o->m.pool), p->int8_avx512, p->int8_avxvnni, p->int8_avx2,
               p->fma_avx512, p->fma_avx2, p->read_gbs);
    }
    struct overhead e;
    bool ok = overhead_measure(&e, &o->m);
    if (ok)
        printf(o->json ? "\"engine\": {\"passes\": %zu, \"us\": %.2f, \"overhead\": %.4f}, "
                       : "\nEngine, 1 stream: median of %zu passes %.0f us; %.2f %% of it in no operation\n", e.n_passes, e.us,
               o->json ? e.share : 100 * e.share);
    ok = ok && drive_open(&o->d, &o->m, DRIVE_TOKENS, works[1].n_seqs, works[2].n_tokens, PL_F16);
    if (o->json && ok)
        printf("\"batches\": [");
    for (size_t i = 0; ok && i < PL_COUNT_OF(works); i++)
        ok = report_work(o, &works[i], o->json && i > 0 ? ", " : "");
    if (o->json && ok)
        printf("]}\n");
    drive_close(&o->d);
    return ok;
}

int cli_ops(const char *model, const struct cli_how *how, bool json)
{
    struct ops *o = pl_xcalloc(1, sizeof *o);
    bool ok = cli_open(&o->m, model, how, DRIVE_TOKENS, DRIVE_SEQS);
    o->json = json;
    if (ok) {
        ok = peak_measure(&o->peak, pl_pool_size(o->m.pool));
        if (!ok)
            fputs("parley bench: no AVX2, or no memory or threads to measure the machine with\n", stderr);
        know_weights(o);
        ok = ok && report(o);
        cli_close(&o->m);
    }
    free(o->known);
    free(o);
    return ok ? 0 : 1;
}
