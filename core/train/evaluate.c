/* evaluate: figures of a model beside its training loss.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/evaluate.h"

#include <math.h>
#include <stdlib.h>

#include "core/base/mem.h"
#include "core/train/general.h"
#include "core/train/objective.h"

struct pl_scores pl_scores_none(void)
{
    return (struct pl_scores){.valid_loss = NAN, .valid_accuracy = NAN, .perplexity = NAN, .general_loss = NAN, .bleu = NAN, .rouge = {NAN, NAN, NAN}};
}

static pl_status loss_of(double *loss, struct pl_net *n, const struct pl_dataset *d, uint32_t longest, struct pl_err *err)
{
    struct pl_batch_plan b;
    struct pl_objective step = {0};
    struct pl_objective_result r;
    pl_status rc = pl_batch_init(&b, d, 2, longest, true, 0, err);
    if (rc != PL_OK)
        return rc;
    rc = pl_objective_init(&step, n, 0, b.capacity, err);
    if (rc == PL_ENOMEM) /* which no smaller micro-batch of the job would help */
        rc = pl_fail_param(err, rc, "forgetting", "no memory for %u tokens of the general text at once: set evaluation.forgetting to false, or take a device "
                           "with more room", b.capacity);
    if (rc == PL_OK) {
        rc = pl_batch_take(&b, UINT32_MAX, 0, b.n_units);
        if (rc == PL_OK)
            rc = pl_objective_run(&step, &b, NULL, false, 0, &r);
        if (rc != PL_OK)
            rc = pl_fail(err, rc, "evaluating the general text: %s", pl_status_text(rc));
        else
            *loss = r.loss;
        pl_objective_fini(&step);
    }
    pl_batch_fini(&b);
    return rc;
}

pl_status pl_evaluate_general(double *loss, struct pl_net *n, const struct pl_tok *tok, const char *path, struct pl_err *err)
{
    const uint32_t piece = n->spec.n_ctx < PL_GENERAL_PIECE ? n->spec.n_ctx : PL_GENERAL_PIECE;
    const struct pl_data_opts o = {.tok = tok, .method = PL_METHOD_PRETRAIN, .max_length = piece};
    struct pl_dataset *d = NULL;
    char *text = NULL;
    size_t n_text;
    pl_status rc = pl_general_read(&text, &n_text, path, err);
    if (rc == PL_OK)
        rc = pl_dataset_from_text(&d, text, n_text, &o, err);
    if (rc == PL_OK)
        rc = loss_of(loss, n, d, piece, err);
    pl_dataset_free(d);
    free(text);
    return rc;
}

static void show_answer(FILE *f, const struct pl_example *e, const struct pl_buf *answer, const struct pl_buf *reference)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_addf(&b, "{\"line\":%u", e->line);
    if (e->n_left_out > 0)
        pl_buf_addf(&b, ",\"prompt_tokens_cut\":%u", e->n_left_out);
    pl_buf_adds(&b, ",\"answer\":\"");
    pl_buf_add_json_lossy(&b, pl_buf_str(answer), answer->len);
    pl_buf_adds(&b, "\",\"reference\":\"");
    pl_buf_add_json_lossy(&b, pl_buf_str(reference), reference->len);
    pl_buf_adds(&b, "\"}\n");
    fwrite(pl_buf_str(&b), 1, b.len, f);
    pl_buf_fini(&b);
}

static pl_status compare(struct pl_scores *s, const struct pl_answers_opts *o, const struct pl_dataset *d, uint32_t n, FILE *show, struct pl_err *err)
{
    const uint32_t every = d->pairs ? 2 : 1;
    struct pl_metric m = {.kind = s->words};
    n = n < d->n / every ? n : d->n / every;
    struct pl_prompt *prompts = pl_xcalloc(n + 1, sizeof *prompts);
    struct pl_buf *answers = pl_xcalloc(n + 1, sizeof *answers), *references = pl_xcalloc(n + 1, sizeof *references);
    for (uint32_t i = 0; i < n; i++) {
        pl_buf_init(&answers[i], 0);
        pl_buf_init(&references[i], 0);
        pl_answers_part(&d->examples[i * every], o->tok, &prompts[i], &references[i]);
        s->n_cut += d->examples[i * every].n_left_out > 0;
    }
    pl_status rc = pl_answers_make(o, prompts, n, answers, err);
    for (uint32_t i = 0; i < n && rc == PL_OK; i++) {
        rc = references[i].failed ? PL_ENOMEM : pl_metric_add(&m, pl_buf_str(&answers[i]), answers[i].len, pl_buf_str(&references[i]), references[i].len, NULL);
        if (rc != PL_OK)
            rc = pl_fail(err, rc, "no memory to compare the answers");
        else if (show != NULL)
            show_answer(show, &d->examples[i * every], &answers[i], &references[i]);
    }
    if (rc == PL_OK) {
        s->n_answers = m.n;
        s->bleu = pl_metric_bleu(&m);
        for (int k = 0; k < PL_ROUGE_COUNT; k++)
            s->rouge[k] = pl_metric_rouge(&m, (pl_rouge_kind)k);
    }
    for (uint32_t i = 0; i < n; i++) {
        pl_buf_fini(&answers[i]);
        pl_buf_fini(&references[i]);
    }
    free(prompts);
    free(answers);
    free(references);
    return rc;
}

pl_status pl_evaluate_answers(struct pl_scores *s, const struct pl_answers_opts *o, const char *path, const struct pl_data_opts *data, uint32_t n_ctx,
                              uint32_t n, FILE *show, struct pl_err *err)
{
    struct pl_data_opts last = *data;
    struct pl_data_report report = {0};
    struct pl_dataset *d = NULL;
    last.train_on = PL_TRAIN_ON_LAST;
    last.max_length = 0;
    last.prompt_limit = o->max_tokens < n_ctx / 2 ? n_ctx - o->max_tokens : (n_ctx + 1) / 2;
    pl_status rc = pl_dataset_read(&d, path, &last, &report, err);
    if (rc == PL_OK)
        rc = compare(s, o, d, n, show, err);
    pl_data_report_fini(&report);
    pl_dataset_free(d);
    return rc;
}
