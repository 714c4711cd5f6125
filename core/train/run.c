/* run: a fine-tuning job from its folder to its result.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/machine.h"
#include "core/base/mem.h"
#include "core/base/pool.h"
#include "core/train/checkpoint.h"
#include "core/train/evaluate.h"
#include "core/train/job.h"
#include "core/train/optim.h"
#include "core/train/plan.h"
#include "core/train/random.h"
#include "core/train/report.h"
#include "core/train/save.h"
#include "core/train/objective.h"
#include "core/train/train.h"

enum { OTHERS_SHARE = 8 /* of a GPU's memory: with less than that, what others have does not decide whether an engine fits */ };
enum { EVAL_UNITS = 64 /* of the validation file, at each evaluation; all of it at checkpoints and ends of epochs */ };

struct run {
    const char *folder;
    const struct pl_train_options *options;
    struct pl_err *err;
    int lock;
    struct pl_train_job job;
    char base_id[PL_SHA256_HEX];
    char base[PATH_MAX]; /* the model's file: the job's, or made by this worker */
    struct pl_model_file model;
    struct pl_pool *pool;
    struct pl_device *dev;
    size_t left, total; /* bytes of a GPU's memory, before the job took any */
    struct pl_net *net;
    struct pl_dataset *training, *validation;
    struct pl_batch_plan train, valid;
    struct pl_objective step;
    struct pl_ckpt_state state;
    struct pl_report report;
    struct pl_train_metrics last; /* of the newest step */
    struct pl_scores before;
    bool wants_before; /* nobody has measured the model as it was */
    bool without_bf16; /* which was asked for */
    uint32_t epoch_steps, total_steps, saved_step, started_at;
    uint64_t started_ns;
};

/* ---- opening ------------------------------------------------------------------------------------------------------- */

static pl_status open_folder(struct run *r)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/job.json", r->folder);
    r->lock = open(path, O_RDONLY | O_CLOEXEC);
    if (r->lock < 0)
        return pl_fail(r->err, PL_EIO, "cannot open %s: %s", path, strerror(errno));
    if (flock(r->lock, LOCK_EX | LOCK_NB) != 0)
        return pl_fail(r->err, PL_EINVAL, "another worker runs the job in %s", r->folder);
    return pl_train_job_read(&r->job, r->folder, r->err);
}

static const char *device_name(const struct run *r)
{
    return r->options->device != NULL ? r->options->device : "cpu";
}

static bool on_gpu(const struct run *r)
{
    return r->dev->ops->memory != NULL;
}

/* First of all: a machine without the device is none for the job. */
static pl_status open_device(struct run *r)
{
    pl_status rc = pl_device_open(&r->dev, device_name(r), r->options->cuda_library, r->pool, r->err);
    if (rc == PL_OK && r->dev->ops->train == NULL)
        return pl_fail_param(r->err, PL_EINVAL, "device", "the device %s cannot train: take --device cpu", r->dev->ops->name);
    if (rc == PL_OK && on_gpu(r) && (rc = r->dev->ops->memory(r->dev, &r->left, &r->total)) != PL_OK)
        rc = pl_fail_param(r->err, rc, "device", "device %s: %s", device_name(r), pl_status_text(rc));
    return rc;
}

/* Bytes of memory that are left where the job computes; 0 = not known. */
static uint64_t room(const struct run *r)
{
    size_t left, total;
    if (!on_gpu(r))
        return pl_machine_memory();
    return r->dev->ops->memory(r->dev, &left, &total) == PL_OK ? left : 0;
}

/* Values for whatever is still "auto": a job folder that somebody wrote by hand. */
static pl_status resolve(struct run *r, struct pl_train_plan *plan)
{
    struct pl_train_base base = {.path = r->job.base, .kept = r->folder};
    if (!r->job.spec.scratch)
        base = pl_train_base_of(&r->model, r->base);
    const struct pl_train_place place = {.n_threads = pl_pool_cpus(), .bf16 = r->dev->ops->train->has_bf16(r->dev), .gpu = on_gpu(r),
                                         .available = pl_machine_memory(), .room = room(r)};
    const pl_status rc = pl_train_plan(plan, &r->job.spec, r->job.training_file, r->job.validation_file, &base, &place, r->err);
    if (rc == PL_OK)
        r->job.spec = plan->spec;
    return rc;
}

/* A model from nothing, in the job's folder, unless it is there. */
static pl_status make_base(struct run *r)
{
    struct pl_train_spec *s = &r->job.spec;
    struct pl_train_plan plan = {0};
    char origin[PL_SHA256_HEX];
    pl_status rc = s->automatic != 0 ? resolve(r, &plan) : PL_OK;
    if (rc == PL_OK)
        rc = pl_scratch_origin(s, r->job.training_file, r->job.base, origin, r->err);
    if (rc == PL_OK && !pl_scratch_is(r->base, origin)) {
        const struct pl_scratch_source from = {.training = r->job.training_file, .base = r->job.base, .kept = r->folder,
                                               .memory = pl_machine_memory(), .room = room(r)};
        if (plan.scratch.tok == NULL)
            rc = pl_scratch_open(&plan.scratch, s, &from, &plan.training, r->err);
        if (rc == PL_OK)
            rc = pl_scratch_write(&plan.scratch, r->base, s->seed, origin, r->err);
    }
    pl_train_plan_fini(&plan);
    return rc;
}

static pl_status open_base(struct run *r)
{
    struct pl_train_plan plan = {0};
    pl_status rc = PL_OK;
    if (r->job.base != NULL) {
        rc = pl_train_base_id(r->job.base, r->base_id, r->err);
        if (rc == PL_OK && r->job.base_id != NULL && strcmp(r->job.base_id, r->base_id) != 0)
            rc = pl_fail_param(r->err, PL_EINVAL, "base", "%s is not the model that this job was made for", r->job.base);
    }
    snprintf(r->base, sizeof r->base, "%s", r->job.base != NULL ? r->job.base : "");
    if (rc == PL_OK && r->job.spec.scratch) {
        snprintf(r->base, sizeof r->base, "%s/base.gguf", r->folder);
        rc = make_base(r);
        if (rc == PL_OK)
            rc = pl_train_base_id(r->base, r->base_id, r->err);
    }
    if (rc == PL_OK)
        rc = pl_model_file_open(&r->model, r->base, r->job.chat_template, "chat_template", r->err);
    if (rc == PL_OK && r->job.spec.automatic != 0) {
        rc = resolve(r, &plan);
        pl_train_plan_fini(&plan);
    } else if (rc == PL_OK && r->job.spec.max_length > r->model.spec.n_ctx) {
        rc = pl_fail_param(r->err, PL_EINVAL, "max_length", "'max_length' is %u but the model takes %u tokens", r->job.spec.max_length, r->model.spec.n_ctx);
    }
    return rc;
}

static pl_status read_data(struct run *r, const char *path, const char *param, uint32_t least, struct pl_dataset **out)
{
    const struct pl_train_spec *s = &r->job.spec;
    const struct pl_data_opts o = {.tok = r->model.tok, .chat = r->model.chat, .method = s->method, .train_on = (pl_train_on)s->train_on,
                                   .max_length = s->max_length, .min_examples = least};
    struct pl_data_report report = {0};
    const pl_status rc = pl_dataset_read(out, path, &o, &report, r->err);
    if (rc != PL_OK)
        snprintf(r->err->param, sizeof r->err->param, "%s", param);
    pl_data_report_fini(&report);
    return rc;
}

static pl_status open_net(struct run *r)
{
    const struct pl_train_spec *s = &r->job.spec;
    const struct pl_net_options o = {.full = s->peft == PL_PEFT_FULL, .rank = s->rank, .alpha = (float)s->alpha, .dropout = (float)s->dropout,
                                     .rslora = s->rslora, .targets = s->targets, .recompute = s->recompute, .seed = s->seed};
    const bool low = s->precision == PL_PRECISION_BF16;
    r->without_bf16 = low && !r->dev->ops->train->has_bf16(r->dev); /* whoever resolved "auto" need not know the device */
    pl_status rc = r->dev->ops->train->set_precision(r->dev, low && !r->without_bf16 ? PL_MM_BF16 : PL_MM_F32, r->err);
    if (rc == PL_OK)
        rc = pl_net_new(&r->net, r->model.gguf, r->dev, &o, r->err);
    if (rc != PL_OK || r->job.base_adapter == NULL)
        return rc;
    if (o.full)
        return pl_fail_param(r->err, PL_ENOTSUP, "peft", "a base with an adapter can be trained on as an adapter (peft kind lora), not in full");
    struct pl_adapter *a;
    rc = pl_adapter_read(&a, r->job.base_adapter, &r->net->spec, r->err);
    if (rc == PL_OK) {
        rc = pl_net_set_adapter(r->net, a, r->err);
        pl_adapter_free(a);
    }
    return rc;
}

static pl_status open_batches(struct run *r)
{
    const struct pl_train_spec *s = &r->job.spec;
    const bool pack = s->packing == PL_PACKING_BFD;
    pl_status rc = pl_batch_init(&r->train, r->training, s->micro_batch, s->max_length, pack, s->seed, r->err);
    if (rc == PL_OK && r->validation != NULL)
        rc = pl_batch_init(&r->valid, r->validation, s->micro_batch, s->max_length, pack, 0, r->err);
    const uint32_t most = r->train.capacity > r->valid.capacity ? r->train.capacity : r->valid.capacity;
    if (rc == PL_OK)
        rc = pl_objective_init(&r->step, r->net, s->beta, most, r->err);
    r->epoch_steps = pl_train_epoch_steps(s, r->train.n_units);
    r->total_steps = pl_train_total_steps(s, r->train.n_units);
    return rc;
}

/* What a checkpoint and the run that goes on from it must have in common. */
static void make_fingerprint(struct run *r)
{
    struct pl_sha256 h;
    json_t *spec = pl_train_spec_json(&r->job.spec);
    char *text = json_dumps(spec, JSON_SORT_KEYS | JSON_COMPACT);
    pl_sha256_init(&h);
    pl_sha256_add(&h, text, text != NULL ? strlen(text) : 0);
    pl_sha256_add(&h, r->base_id, strlen(r->base_id));
    pl_sha256_add(&h, &r->job.spec.seed, sizeof r->job.spec.seed);
    for (uint32_t i = 0; i < r->training->n; i++) {
        pl_sha256_add(&h, r->training->examples[i].ids, r->training->examples[i].n * sizeof(int32_t));
        pl_sha256_add(&h, r->training->examples[i].loss, r->training->examples[i].n);
    }
    pl_sha256_add(&h, &r->net->n_trained, sizeof r->net->n_trained);
    pl_sha256_hex(&h, r->state.fingerprint);
    free(text);
    json_decref(spec);
}

static pl_status open_state(struct run *r)
{
    uint32_t n_bad;
    make_fingerprint(r);
    r->state.best_loss = INFINITY;
    if (r->job.spec.method == PL_METHOD_DPO) {
        r->state.n_reference = 2 * (r->train.n_units + r->valid.n_units);
        r->state.reference = pl_xcalloc(r->state.n_reference + 1, sizeof *r->state.reference);
    }
    pl_status rc = pl_ckpt_resume(r->folder, r->net, &r->state, &n_bad, r->err);
    if (rc != PL_OK)
        return rc;
    r->started_at = r->saved_step = r->state.step;
    rc = pl_report_open(&r->report, r->folder, r->state.step, r->job.created_at, r->options->progress_bar, r->err);
    if (rc == PL_OK && n_bad > 0)
        rc = pl_report_message(&r->report, "warn", r->err, "%u damaged checkpoint%s removed", n_bad, n_bad == 1 ? " was" : "s were");
    if (rc == PL_OK && r->state.step > 0)
        rc = pl_report_message(&r->report, "info", r->err, "Going on from the checkpoint of step %u", r->state.step);
    if (rc == PL_OK && on_gpu(r))
        rc = pl_report_message(&r->report, "info", r->err, "The job runs on %s", r->dev->ops->name);
    if (rc == PL_OK && r->without_bf16)
        rc = pl_report_message(&r->report, "warn", r->err, "%s has no bf16 products: they are made in 32 bits", r->dev->ops->name);
    if (rc != PL_OK || r->state.reference == NULL || r->state.step > 0)
        return rc;
    rc = pl_objective_reference(&r->step, &r->train, r->state.reference);
    if (rc == PL_OK && r->validation != NULL)
        rc = pl_objective_reference(&r->step, &r->valid, r->state.reference + 2 * (size_t)r->train.n_units);
    return rc == PL_OK ? rc : pl_fail(r->err, rc, "the reference pass: %s", pl_status_text(rc));
}

/* The validation file's questions, answered by the base with an adapter or none. */
static pl_status answer(struct run *r, const struct pl_gguf *gguf, const char *adapter, struct pl_scores *scores)
{
    const struct pl_train_spec *s = &r->job.spec;
    const struct pl_answers_opts o = {.gguf = gguf, .tok = r->model.tok, .adapter = adapter, .n_threads = s->threads, .max_tokens = s->answer_tokens,
                                      .device = device_name(r), .cuda_library = r->options->cuda_library,
                                      .stop = r->options->stop};
    const struct pl_data_opts data = {.tok = r->model.tok, .chat = r->model.chat, .method = s->method, .min_examples = 1};
    scores->words = (pl_words_kind)s->words;
    if (s->n_answers == 0 || r->job.validation_file == NULL)
        return PL_OK;
    const pl_status rc = pl_evaluate_answers(scores, &o, r->job.validation_file, &data, r->model.spec.n_ctx, s->n_answers, NULL, r->err);
    if (rc != PL_ENOMEM || r->total - r->left <= r->total / OTHERS_SHARE)
        return rc;
    return r->err->code = PL_EBUSY;
}

static pl_status open_all(struct run *r)
{
    pl_status rc = open_base(r);
    if (rc == PL_OK)
        rc = read_data(r, r->job.training_file, "training_file", PL_DATA_MIN_EXAMPLES, &r->training);
    if (rc == PL_OK && r->job.validation_file != NULL)
        rc = read_data(r, r->job.validation_file, "validation_file", 1, &r->validation);
    r->before = pl_scores_none();
    r->wants_before = !pl_report_has_scores(r->folder);
    if (rc == PL_OK && r->wants_before) /* now, while there are no gradients in memory */
        rc = answer(r, r->model.gguf, r->job.base_adapter, &r->before);
    if (rc == PL_OK)
        rc = open_net(r);
    if (rc == PL_OK)
        rc = open_batches(r);
    return rc != PL_OK ? rc : open_state(r);
}

static void close_net(struct run *r)
{
    pl_net_free(r->net);
    if (r->dev != NULL)
        r->dev->ops->close(r->dev);
    pl_pool_free(r->pool);
    r->net = NULL;
    r->dev = NULL;
    r->pool = NULL;
}

static void close_all(struct run *r)
{
    pl_report_close(&r->report);
    pl_ckpt_state_fini(&r->state);
    pl_objective_fini(&r->step);
    pl_batch_fini(&r->train);
    pl_batch_fini(&r->valid);
    pl_dataset_free(r->training);
    pl_dataset_free(r->validation);
    close_net(r);
    pl_model_file_close(&r->model);
    pl_train_job_fini(&r->job);
    if (r->lock >= 0)
        close(r->lock);
}

/* ---- steps --------------------------------------------------------------------------------------------------------- */

static bool due(uint32_t step, uint32_t interval)
{
    return interval > 0 && step % interval == 0;
}

static pl_status evaluate(struct run *r, uint32_t n_units, double *loss, double *accuracy)
{
    struct pl_objective_result e;
    const double *reference = r->state.reference != NULL ? r->state.reference + 2 * (size_t)r->train.n_units : NULL;
    pl_status rc = pl_batch_take(&r->valid, UINT32_MAX, 0, n_units);
    if (rc == PL_OK)
        rc = pl_objective_run(&r->step, &r->valid, reference, false, 0, &e);
    if (rc != PL_OK)
        return pl_fail(r->err, rc, "evaluating: %s", pl_status_text(rc));
    *loss = e.loss;
    *accuracy = e.accuracy;
    return PL_OK;
}

/* Measures what is due after the step of m, and keeps the score of early stopping. *better: a new best. */
static pl_status evaluate_due(struct run *r, struct pl_train_metrics *m, bool ends, bool *better)
{
    const struct pl_train_spec *s = &r->job.spec;
    const bool all = ends || due(m->step, r->epoch_steps) || due(m->step, s->checkpoint_interval);
    *better = false;
    if (r->validation == NULL || !(all || due(m->step, s->eval_interval)))
        return PL_OK;
    pl_status rc = evaluate(r, EVAL_UNITS, &m->valid_loss, &m->valid_accuracy);
    if (rc == PL_OK && r->valid.n_units <= EVAL_UNITS) {
        m->full_valid_loss = m->valid_loss;
        m->full_valid_accuracy = m->valid_accuracy;
    } else if (rc == PL_OK && all) {
        rc = evaluate(r, r->valid.n_units, &m->full_valid_loss, &m->full_valid_accuracy);
    }
    if (rc != PL_OK)
        return rc;
    m->full_valid_perplexity = s->method == PL_METHOD_DPO ? NAN : exp(m->full_valid_loss);
    *better = m->valid_loss < r->state.best_loss - s->min_delta;
    r->state.n_bad = *better ? 0 : r->state.n_bad + 1;
    if (*better) {
        r->state.best_loss = m->valid_loss;
        r->state.best_step = m->step;
    }
    r->state.stopped = s->patience > 0 && r->state.n_bad >= s->patience;
    return PL_OK;
}

static pl_status save_checkpoint(struct run *r)
{
    if (r->saved_step == r->state.step)
        return PL_OK;
    pl_status rc = pl_report_flush(&r->report, r->err);
    if (rc == PL_OK)
        rc = pl_ckpt_write(r->folder, r->net, r->model.gguf, r->base, &r->state, r->err);
    if (rc == PL_OK)
        rc = pl_report_checkpoint(&r->report, &r->last, r->err);
    if (rc != PL_OK)
        return rc;
    r->saved_step = r->state.step;
    pl_ckpt_prune(r->folder, r->job.spec.keep_last, r->state.best_step);
    return PL_OK;
}

static struct pl_train_metrics no_metrics(void)
{
    return (struct pl_train_metrics){.train_loss = NAN, .train_accuracy = NAN, .learning_rate = NAN, .grad_norm = NAN, .tokens_per_s = NAN,
                                     .eta_s = NAN, .valid_loss = NAN, .valid_accuracy = NAN, .full_valid_loss = NAN, .full_valid_accuracy = NAN,
                                     .full_valid_perplexity = NAN,
                                     .reward_accuracy = NAN, .reward_margin = NAN, .reward_chosen = NAN, .reward_rejected = NAN};
}

/* Losses, gradients and the optimizer of the next step. */
static pl_status make_step(struct run *r, struct pl_train_metrics *m)
{
    const struct pl_train_spec *s = &r->job.spec;
    const uint32_t step = r->state.step, epoch = step / r->epoch_steps, from = step % r->epoch_steps * s->batch_size;
    const uint64_t start = pl_now_ns();
    uint64_t stream = (uint64_t)s->seed << 32 | step;
    struct pl_objective_result e;
    *m = no_metrics();
    pl_status rc = pl_batch_take(&r->train, epoch, from, s->batch_size);
    if (rc == PL_OK)
        rc = pl_objective_run(&r->step, &r->train, r->state.reference, true, s->dropout > 0 ? pl_random_next(&stream) | 1 : 0, &e);
    m->learning_rate = pl_optim_rate(s, step, r->total_steps);
    if (rc == PL_OK && !isfinite(e.loss))
        return pl_fail_param(r->err, PL_ERANGE, "learning_rate", "the loss of step %u is not finite; lower the learning rate", step + 1);
    if (rc == PL_OK)
        rc = pl_optim_step(r->net, s, step, m->learning_rate, &m->grad_norm);
    if (rc == PL_ENOMEM)
        return pl_fail_param(r->err, rc, "micro_batch_size", "no memory for step %u; lower micro_batch_size or max_length, or set recompute", step + 1);
    if (rc != PL_OK)
        return pl_fail(r->err, rc, "step %u: %s", step + 1, pl_status_text(rc));
    if (!isfinite(m->grad_norm))
        return pl_fail_param(r->err, PL_ERANGE, "learning_rate", "the gradients of step %u are not finite; lower the learning rate", step + 1);
    r->state.step = m->step = step + 1;
    r->state.trained_tokens += e.n_tokens;
    m->trained_tokens = r->state.trained_tokens;
    m->total_steps = r->total_steps;
    m->epoch = (double)m->step / r->epoch_steps;
    m->train_loss = e.loss;
    m->train_accuracy = e.accuracy;
    if (r->state.reference != NULL) {
        m->reward_accuracy = e.reward_accuracy;
        m->reward_margin = e.reward_margin;
        m->reward_chosen = e.reward_chosen;
        m->reward_rejected = e.reward_rejected;
    }
    const double seconds = (double)(pl_now_ns() - start) * 1e-9, run = (double)(pl_now_ns() - r->started_ns) * 1e-9;
    m->tokens_per_s = (double)e.n_tokens / (seconds > 1e-9 ? seconds : 1e-9);
    m->eta_s = run / (m->step - r->started_at) * (r->total_steps - m->step);
    return PL_OK;
}

static bool stop_wanted(const struct run *r)
{
    return r->options->stop != NULL && *r->options->stop != 0;
}

static pl_status train(struct run *r)
{
    const struct pl_train_spec *s = &r->job.spec;
    r->started_ns = pl_now_ns();
    while (r->state.step < r->total_steps && !r->state.stopped && !stop_wanted(r)) {
        struct pl_train_metrics m;
        bool better;
        pl_status rc = make_step(r, &m);
        if (rc == PL_OK)
            rc = evaluate_due(r, &m, m.step == r->total_steps, &better);
        if (rc == PL_OK)
            rc = pl_report_metrics(&r->report, &m, r->err);
        if (rc != PL_OK)
            return rc;
        r->last = m;
        const bool ends = m.step == r->total_steps || r->state.stopped;
        if (ends || due(m.step, s->checkpoint_interval) || (better && s->final == PL_FINAL_BEST))
            if ((rc = save_checkpoint(r)) != PL_OK)
                return rc;
    }
    return PL_OK;
}

/* ---- before and after ---------------------------------------------------------------------------------------------- */

/* What the net as it is tells by itself. */
static pl_status score(struct run *r, struct pl_scores *s)
{
    pl_status rc = PL_OK;
    if (r->validation != NULL)
        rc = evaluate(r, r->valid.n_units, &s->valid_loss, &s->valid_accuracy);
    if (rc == PL_OK && r->validation != NULL && r->job.spec.method != PL_METHOD_DPO)
        s->perplexity = exp(s->valid_loss);
    if (rc == PL_OK && r->job.spec.forgetting)
        rc = pl_evaluate_general(&s->general_loss, r->net, r->model.tok, r->job.general_text, r->err);
    return rc;
}

/* What a model is worth is told beside the job; that it cannot be told does not end it, unless a setting is wrong. */
static pl_status forgive(struct run *r, pl_status rc)
{
    if (rc == PL_OK || rc == PL_ESTOPPED || rc == PL_ENOSPC || r->err->param[0] != '\0')
        return rc;
    const struct pl_err why = *r->err;
    *r->err = (struct pl_err){0};
    return pl_report_message(&r->report, "warn", r->err, "The model could not be evaluated: %s", why.msg);
}

static pl_status score_before(struct run *r)
{
    if (!r->wants_before || r->state.step > 0)
        return PL_OK;
    const pl_status rc = score(r, &r->before);
    return rc != PL_OK ? rc : pl_report_scores(&r->report, 0, &r->before, r->err);
}

/* Of what lies in the folder result. Takes the net down, so that there is room for the engine. That there is none all the same, or no GPU
 * any more, is nobody's setting: the model is there. */
static pl_status score_after(struct run *r, const char *result)
{
    char path[PATH_MAX + 16];
    struct pl_scores s = pl_scores_none();
    struct pl_gguf *tuned = NULL;
    pl_status rc = score(r, &s);
    if (rc == PL_OK && r->job.spec.n_answers > 0) {
        close_net(r);
        snprintf(path, sizeof path, "%s/model.gguf", result);
        if (r->job.spec.peft == PL_PEFT_FULL)
            rc = pl_gguf_open(&tuned, path, r->err);
        if (rc == PL_OK)
            rc = answer(r, tuned != NULL ? tuned : r->model.gguf, tuned != NULL ? NULL : result, &s);
        pl_gguf_close(tuned);
        if (rc == PL_ENOMEM || rc == PL_EBUSY || rc == PL_EDEVICE)
            r->err->param[0] = '\0';
    }
    return rc != PL_OK ? rc : pl_report_scores(&r->report, r->last.step, &s, r->err);
}

/* ---- the end ------------------------------------------------------------------------------------------------------- */

static pl_status finish(struct run *r)
{
    char from[PATH_MAX], to[PATH_MAX];
    pl_status rc = PL_OK;
    snprintf(from, sizeof from, "%s/.result", r->folder);
    snprintf(to, sizeof to, "%s/result", r->folder);
    if (r->state.stopped)
        rc = pl_report_message(&r->report, "info", r->err, "Stopped early: no better validation loss in %u evaluations", r->state.n_bad);
    r->last.step = r->state.step;
    r->last.trained_tokens = r->state.trained_tokens;
    if (rc == PL_OK && r->job.spec.final == PL_FINAL_BEST && r->state.best_step > 0 && r->state.best_step != r->state.step) {
        rc = pl_ckpt_values(r->folder, r->state.best_step, r->net, r->err);
        r->last.step = r->state.best_step;
    }
    pl_ckpt_remove(from);
    pl_ckpt_remove(to);
    if (rc == PL_OK && mkdir(from, 0750) != 0)
        rc = pl_fail(r->err, pl_status_of_errno(errno), "cannot make %s: %s", from, strerror(errno));
    if (rc == PL_OK)
        rc = pl_save_model(from, r->net, r->model.gguf, r->base, r->err);
    if (rc == PL_OK)
        rc = pl_ckpt_publish(from, to, r->folder, r->err);
    if (rc == PL_OK)
        rc = pl_report_csv(r->folder, r->err);
    if (rc == PL_OK)
        rc = forgive(r, score_after(r, to));
    return rc != PL_OK ? rc : pl_report_done(&r->report, &r->last, r->err);
}

/* The code of a "failed" line. */
static const char *code_of(const struct pl_err *e, bool has_device)
{
    if (!has_device)
        return e->code == PL_ENOMEM ? "device_busy" : "device_not_available";
    if (strcmp(e->param, "training_file") == 0)
        return e->code == PL_ERANGE ? "invalid_n_examples" : "invalid_training_file";
    if (strcmp(e->param, "validation_file") == 0)
        return "invalid_validation_file";
    switch (e->code) {
    case PL_EDEVICE:
        return "device_lost";
    case PL_EBUSY:
        return "device_busy";
    case PL_ENOMEM:
        return "out_of_memory";
    case PL_EIO:
        return "storage_error";
    case PL_ERANGE:
        return "not_finite";
    case PL_ENOTSUP:
        return "unsupported";
    default:
        return "invalid_job";
    }
}

pl_train_exit pl_train_run(const char *folder, const struct pl_train_options *options, struct pl_err *err)
{
    struct pl_err own = {0};
    struct run r = {.folder = folder, .options = options, .err = err != NULL ? err : &own, .lock = -1, .report = {.fd = -1}, .last = no_metrics()};
    pl_train_exit result = PL_TRAIN_FAILED;
    bool has_device = true;
    pl_status rc = open_folder(&r);
    if (rc != PL_OK) { /* nobody's folder, or another worker's: nothing is written */
        close_all(&r);
        return PL_TRAIN_FAILED;
    }
    if (pl_report_is_done(folder)) {
        close_all(&r);
        return PL_TRAIN_DONE;
    }
    rc = pl_pool_new(&r.pool, r.job.spec.threads, r.err);
    if (rc == PL_OK)
        has_device = (rc = open_device(&r)) == PL_OK;
    if (rc == PL_OK)
        rc = open_all(&r);
    if (rc == PL_OK)
        rc = forgive(&r, score_before(&r));
    if (rc == PL_OK)
        rc = train(&r);
    if (rc == PL_OK && r.state.step < r.total_steps && !r.state.stopped) {
        rc = save_checkpoint(&r);
        if (rc == PL_OK)
            rc = pl_report_message(&r.report, "info", r.err, "Paused after step %u of %u", r.state.step, r.total_steps);
        if (rc == PL_OK)
            result = PL_TRAIN_PAUSED;
    } else if (rc == PL_OK && (rc = finish(&r)) == PL_OK) {
        result = PL_TRAIN_DONE;
    }
    if (rc != PL_OK && r.err->msg[0] == '\0')
        (void)!pl_fail(r.err, rc, "%s", pl_status_text(rc));
    if (rc == PL_ESTOPPED) /* while it answered: the next run begins with that */
        result = PL_TRAIN_PAUSED;
    else if (rc == PL_ENOSPC)
        result = PL_TRAIN_NO_SPACE;
    else if (rc != PL_OK)
        pl_report_failed(folder, code_of(r.err, has_device), r.err);
    if (!has_device || rc == PL_EBUSY)
        result = PL_TRAIN_NO_DEVICE;
    close_all(&r);
    return result;
}
