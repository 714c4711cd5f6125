/* metric: how near answers are to references.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/metric.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Both texts of a pair, each word as a number; equal words have equal numbers. */
struct pair {
    uint32_t *answer, *reference;
    size_t n_answer, n_reference;
};

struct word {
    struct pl_word text;
    size_t at; /* in the answer, then the reference */
};

static int compare(struct pl_word a, struct pl_word b)
{
    const int c = memcmp(a.s, b.s, a.n < b.n ? a.n : b.n);
    return c != 0 ? c : (a.n > b.n) - (a.n < b.n);
}

static int by_text(const void *a, const void *b)
{
    return compare(((const struct word *)a)->text, ((const struct word *)b)->text);
}

static pl_status number(struct pair *p, const struct pl_words *answer, const struct pl_words *reference)
{
    const size_t n = answer->n + reference->n;
    struct word *all = malloc((n + 1) * sizeof *all);
    *p = (struct pair){.answer = malloc((n + 1) * sizeof *p->answer), .n_answer = answer->n, .n_reference = reference->n};
    if (all == NULL || p->answer == NULL) {
        free(all);
        free(p->answer);
        return PL_ENOMEM;
    }
    p->reference = p->answer + answer->n;
    for (size_t i = 0; i < n; i++)
        all[i] = (struct word){i < answer->n ? answer->list[i] : reference->list[i - answer->n], i};
    qsort(all, n, sizeof *all, by_text);
    uint32_t id = 0;
    for (size_t i = 0; i < n; i++) {
        id += i > 0 && compare(all[i - 1].text, all[i].text) != 0;
        p->answer[all[i].at] = id;
    }
    free(all);
    return PL_OK;
}

static int by_words(const void *a, const void *b, void *arg)
{
    return memcmp(*(uint32_t *const *)a, *(uint32_t *const *)b, *(const size_t *)arg * sizeof(uint32_t));
}

/* The n-grams of a text in order; NULL = no memory. */
static const uint32_t **grams(const uint32_t *words, size_t n_words, size_t order, size_t *n)
{
    *n = n_words >= order ? n_words - order + 1 : 0;
    const uint32_t **list = malloc((*n + 1) * sizeof *list);
    if (list == NULL)
        return NULL;
    for (size_t i = 0; i < *n; i++)
        list[i] = words + i;
    qsort_r(list, *n, sizeof *list, by_words, &order);
    return list;
}

/* How many n-grams the answer has, the reference has, and both (each as often as in the poorer). */
static pl_status match(const struct pair *p, size_t order, uint64_t *made, uint64_t *wanted, uint64_t *right)
{
    size_t n, m, i = 0, k = 0;
    const uint32_t **a = grams(p->answer, p->n_answer, order, &n), **b = grams(p->reference, p->n_reference, order, &m);
    *made = n;
    *wanted = m;
    *right = 0;
    const bool ok = a != NULL && b != NULL;
    while (ok && i < n && k < m) {
        const int c = memcmp(a[i], b[k], order * sizeof(uint32_t));
        *right += c == 0;
        i += c <= 0;
        k += c >= 0;
    }
    free(a);
    free(b);
    return ok ? PL_OK : PL_ENOMEM;
}

/* The length of the longest common subsequence. */
static pl_status common(const struct pair *p, uint64_t *length)
{
    uint32_t *row = calloc(p->n_reference + 1, sizeof *row);
    if (row == NULL)
        return PL_ENOMEM;
    for (size_t i = 0; i < p->n_answer; i++) {
        uint32_t corner = 0; /* of the row before, one to the left */
        for (size_t k = 0; k < p->n_reference; k++) {
            const uint32_t above = row[k + 1];
            row[k + 1] = p->answer[i] == p->reference[k] ? corner + 1 : above > row[k] ? above : row[k];
            corner = above;
        }
    }
    *length = row[p->n_reference];
    free(row);
    return PL_OK;
}

static struct pl_rouge score(uint64_t right, uint64_t made, uint64_t wanted)
{
    struct pl_rouge r = {.precision = made > 0 ? (double)right / (double)made : 0, .recall = wanted > 0 ? (double)right / (double)wanted : 0};
    const double sum = r.precision + r.recall;
    r.f1 = sum > 0 ? 2 * r.precision * r.recall / sum : 0;
    return r;
}

static pl_status add_bleu(struct pl_metric *m, const struct pair *p)
{
    for (size_t order = 1; order <= PL_BLEU_ORDER; order++) {
        uint64_t made, wanted, right;
        const pl_status rc = match(p, order, &made, &wanted, &right);
        if (rc != PL_OK)
            return rc;
        m->made[order - 1] += made;
        m->right[order - 1] += right;
    }
    m->n_answer += p->n_answer;
    m->n_reference += p->n_reference;
    return PL_OK;
}

static pl_status add_rouge(struct pl_metric *m, const struct pair *p, struct pl_rouge out[PL_ROUGE_COUNT])
{
    uint64_t made, wanted, right = 0;
    for (size_t order = 1; order <= 2; order++) {
        const pl_status rc = match(p, order, &made, &wanted, &right);
        if (rc != PL_OK)
            return rc;
        out[order == 1 ? PL_ROUGE_1 : PL_ROUGE_2] = score(right, made, wanted);
    }
    const pl_status rc = common(p, &right);
    if (rc != PL_OK)
        return rc;
    out[PL_ROUGE_L] = score(right, p->n_answer, p->n_reference);
    for (int i = 0; i < PL_ROUGE_COUNT; i++) {
        m->rouge[i].precision += out[i].precision;
        m->rouge[i].recall += out[i].recall;
        m->rouge[i].f1 += out[i].f1;
    }
    return PL_OK;
}

static pl_status read_pair(struct pair *p, pl_words_kind kind, const char *answer, size_t n_answer, const char *reference, size_t n_reference)
{
    struct pl_words a = {0}, b = {0};
    pl_status rc = pl_words_split(&a, kind, answer, n_answer);
    if (rc == PL_OK)
        rc = pl_words_split(&b, kind, reference, n_reference);
    if (rc == PL_OK)
        rc = number(p, &a, &b);
    pl_words_fini(&a);
    pl_words_fini(&b);
    return rc;
}

pl_status pl_metric_add(struct pl_metric *m, const char *answer, size_t n_answer, const char *reference, size_t n_reference,
                        struct pl_rouge rouge[PL_ROUGE_COUNT])
{
    struct pair p;
    struct pl_rouge own[PL_ROUGE_COUNT];
    pl_status rc = read_pair(&p, m->kind, answer, n_answer, reference, n_reference);
    if (rc != PL_OK)
        return rc;
    rc = add_bleu(m, &p);
    if (rc == PL_OK && m->kind == PL_WORDS_13A) {
        free(p.answer);
        if ((rc = read_pair(&p, PL_WORDS_ROUGE, answer, n_answer, reference, n_reference)) != PL_OK)
            return rc;
    }
    if (rc == PL_OK)
        rc = add_rouge(m, &p, rouge != NULL ? rouge : own);
    free(p.answer);
    m->n++;
    return rc;
}

double pl_metric_bleu(const struct pl_metric *m)
{
    double logs = 0, smooth = 1;
    if (m->n_answer == 0 || m->right[0] == 0) /* longer n-grams only match where shorter ones do */
        return 0;
    for (int i = 0; i < PL_BLEU_ORDER; i++) {
        if (m->made[i] == 0)
            return 0;
        smooth *= m->right[i] == 0 ? 2 : 1;
        logs += log(m->right[i] == 0 ? 100 / (smooth * (double)m->made[i]) : 100 * (double)m->right[i] / (double)m->made[i]);
    }
    const double brevity = m->n_answer < m->n_reference ? exp(1 - (double)m->n_reference / (double)m->n_answer) : 1;
    return brevity * exp(logs / PL_BLEU_ORDER);
}

double pl_metric_rouge(const struct pl_metric *m, pl_rouge_kind kind)
{
    return m->n > 0 ? m->rouge[kind].f1 / m->n : 0;
}

static struct pl_metric_name named(const char *name, pl_words_kind words)
{
    struct pl_metric_name n;
    snprintf(n.s, sizeof n.s, "%s%s%s", name, words == PL_WORDS_13A ? "" : "_", words == PL_WORDS_13A ? "" : pl_words_name(words));
    return n;
}

struct pl_metric_name pl_metric_bleu_name(pl_words_kind words)
{
    return named("bleu", words);
}

struct pl_metric_name pl_metric_rouge_name(pl_words_kind words, pl_rouge_kind kind)
{
    static const char *const names[PL_ROUGE_COUNT] = {"rouge1", "rouge2", "rougeL"};
    return named(names[kind], words);
}
