/* check_metric: BLEU and ROUGE against sacrebleu and rouge_score (tests/oracle/make_metric.py). Runs in the repository's root.
 * SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/train/metric.h"

Suite *suite_metric(void);

static const pl_words_kind kinds[] = {PL_WORDS_13A, PL_WORDS_ZH, PL_WORDS_CHAR};

static json_t *cases(void)
{
    json_error_t e;
    json_t *doc = json_load_file("tests/oracle/fixtures/metric/cases.json", JSON_ALLOW_NUL, &e);
    ck_assert_msg(doc != NULL, "%s", e.text);
    return doc;
}

static const json_t *at(const json_t *a, size_t i, size_t k)
{
    return json_array_get(json_array_get(a, i), k);
}

static void check_words(pl_words_kind kind, const json_t *text, const json_t *words)
{
    struct pl_words w;
    ck_assert_int_eq(pl_words_split(&w, kind, json_string_value(text), json_string_length(text)), PL_OK);
    char *shown = json_dumps(text, JSON_ENCODE_ANY);
    ck_assert_msg(w.n == json_array_size(words), "%s, %s: %zu words, not %zu", pl_words_name(kind), shown, w.n, json_array_size(words));
    for (size_t i = 0; i < w.n; i++) {
        const json_t *word = json_array_get(words, i);
        ck_assert_msg(w.list[i].n == json_string_length(word) && memcmp(w.list[i].s, json_string_value(word), w.list[i].n) == 0,
                      "%s, %s: word %zu is '%.*s', not '%s'", pl_words_name(kind), shown, i, (int)w.list[i].n, w.list[i].s, json_string_value(word));
    }
    free(shown);
    pl_words_fini(&w);
}

START_TEST(words_are_those_of_sacrebleu_and_rouge_score)
{
    json_t *doc = cases();
    const json_t *pairs = json_object_get(doc, "pairs");
    for (size_t i = 0; i < json_array_size(pairs); i++)
        for (size_t k = 0; k < 2; k++) {
            check_words(PL_WORDS_ROUGE, at(pairs, i, k), at(json_object_get(doc, "rouge_words"), i, k));
            for (size_t j = 0; j < sizeof kinds / sizeof kinds[0]; j++) {
                const json_t *kind = json_object_get(json_object_get(doc, "kinds"), pl_words_name(kinds[j]));
                check_words(kinds[j], at(pairs, i, k), at(json_object_get(kind, "words"), i, k));
            }
        }
    json_decref(doc);
}
END_TEST

static void add(struct pl_metric *m, const json_t *pairs, size_t i, struct pl_rouge r[PL_ROUGE_COUNT])
{
    const json_t *answer = at(pairs, i, 0), *reference = at(pairs, i, 1);
    const size_t n_answer = json_string_length(answer), n_reference = json_string_length(reference);
    ck_assert_int_eq(pl_metric_add(m, json_string_value(answer), n_answer, json_string_value(reference), n_reference, r), PL_OK);
}

static void near(double got, const json_t *wanted, const char *what, size_t i)
{
    ck_assert_msg(fabs(got - json_number_value(wanted)) <= 1e-6, "%s of %zu is %.9f, not %.9f", what, i, got, json_number_value(wanted));
}

START_TEST(scores_are_those_of_sacrebleu_and_rouge_score)
{
    json_t *doc = cases();
    const pl_words_kind kind = kinds[_i];
    const json_t *pairs = json_object_get(doc, "pairs"), *wanted = json_object_get(json_object_get(doc, "kinds"), pl_words_name(kind));
    ck_assert_uint_gt(json_array_size(pairs), 60);
    for (size_t i = 0; i < json_array_size(pairs); i++) {
        struct pl_metric m = {.kind = kind};
        struct pl_rouge r[PL_ROUGE_COUNT];
        add(&m, pairs, i, r);
        near(pl_metric_bleu(&m), json_array_get(json_object_get(wanted, "bleu"), i), "BLEU", i);
        for (size_t k = 0; k < PL_ROUGE_COUNT; k++) {
            const json_t *score = at(json_object_get(wanted, "rouge"), i, k);
            near(r[k].precision, json_array_get(score, 0), "precision", i);
            near(r[k].recall, json_array_get(score, 1), "recall", i);
            near(r[k].f1, json_array_get(score, 2), "F1", i);
        }
    }
    size_t n;
    json_t *corpus;
    json_array_foreach(json_object_get(wanted, "corpora"), n, corpus)
    {
        struct pl_metric m = {.kind = kind};
        const json_t *which = json_object_get(corpus, "pairs");
        for (size_t i = 0; i < json_array_size(which); i++)
            add(&m, pairs, (size_t)json_integer_value(json_array_get(which, i)), NULL);
        near(pl_metric_bleu(&m), json_object_get(corpus, "bleu"), "corpus BLEU", n);
        for (size_t k = 0; k < PL_ROUGE_COUNT; k++)
            near(pl_metric_rouge(&m, (pl_rouge_kind)k), json_array_get(json_object_get(corpus, "rouge"), k), "corpus ROUGE", n);
    }
    json_decref(doc);
}
END_TEST

START_TEST(nothing_added_is_zero)
{
    const struct pl_metric m = {.kind = PL_WORDS_ZH};
    ck_assert(pl_metric_bleu(&m) == 0 && pl_metric_rouge(&m, PL_ROUGE_L) == 0);
}
END_TEST

Suite *suite_metric(void)
{
    Suite *s = suite_create("metric");
    TCase *tc = tcase_create("scores");
    tcase_add_test(tc, words_are_those_of_sacrebleu_and_rouge_score);
    tcase_add_loop_test(tc, scores_are_those_of_sacrebleu_and_rouge_score, 0, sizeof kinds / sizeof kinds[0]);
    tcase_add_test(tc, nothing_added_is_zero);
    suite_add_tcase(s, tc);
    return s;
}
