/* metric: how near answers are to references: BLEU of a corpus as sacrebleu defines it (one reference, order 4, exponential
 * smoothing, case kept), ROUGE-1, -2 and -L (sentence level, no stemming) as Google's rouge_score does.
 *
 * The words: "13a" is sacrebleu's tokenizer of that name for BLEU and rouge_score's own for ROUGE, which knows the letters a to z
 * and digits alone. "zh" (every Chinese character a word, the rest as 13a) and "char" (every character) are sacrebleu's, for both.
 * Thread: any.  Owns: nothing between calls.  Fails: PL_ENOMEM.
 * Source: Papineni et al. 2002, "BLEU"; Post 2018, "A Call for Clarity in Reporting BLEU Scores"; Lin 2004, "ROUGE".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_TRAIN_METRIC_H
#define PL_TRAIN_METRIC_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

/* In the order of the words in hyper.def. */
typedef enum { PL_WORDS_13A, PL_WORDS_ZH, PL_WORDS_CHAR, PL_WORDS_ROUGE } pl_words_kind;

struct pl_rouge {
    double precision, recall, f1;
};
typedef enum { PL_ROUGE_1, PL_ROUGE_2, PL_ROUGE_L, PL_ROUGE_COUNT } pl_rouge_kind;

enum { PL_BLEU_ORDER = 4 };

/* Sums over the pairs so far; starts as {.kind = …}. */
struct pl_metric {
    pl_words_kind kind; /* 13a, zh or char */
    uint32_t n;
    uint64_t right[PL_BLEU_ORDER], made[PL_BLEU_ORDER]; /* n-grams of the answers, and those that the references have too */
    uint64_t n_answer, n_reference;                     /* words */
    struct pl_rouge rouge[PL_ROUGE_COUNT];
};

/* UTF-8. The pair's own ROUGE is left in rouge, unless that is NULL. */
pl_status pl_metric_add(struct pl_metric *m, const char *answer, size_t n_answer, const char *reference, size_t n_reference,
                        struct pl_rouge rouge[PL_ROUGE_COUNT]) PL_MUST_CHECK;
double pl_metric_bleu(const struct pl_metric *m);                      /* 0 to 100 */
double pl_metric_rouge(const struct pl_metric *m, pl_rouge_kind kind); /* mean F1, 0 to 1 */
const char *pl_words_name(pl_words_kind kind);                         /* "13a" */
/* How a figure of these words is called: "bleu" and "bleu_zh", "rougeL" and "rougeL_char". */
struct pl_metric_name {
    char s[16];
};
struct pl_metric_name pl_metric_bleu_name(pl_words_kind words);
struct pl_metric_name pl_metric_rouge_name(pl_words_kind words, pl_rouge_kind kind);

/* What metric.c counts: a text's words. */
struct pl_word {
    const char *s;
    size_t n;
};
struct pl_words {
    char *text; /* in which they lie */
    struct pl_word *list;
    size_t n;
};
pl_status pl_words_split(struct pl_words *w, pl_words_kind kind, const char *s, size_t n) PL_MUST_CHECK;
void pl_words_fini(struct pl_words *w);

#endif
