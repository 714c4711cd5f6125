/* plan: a job before it runs: both files checked, every "auto" given its value, and what the job will take.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/plan.h"

#include <string.h>

#include "core/device/train.h"
#include "core/model/adapter.h"

enum { ROWS_OF_CPU = 256 /* of the head, at once */ };

static pl_status scan(const char *path, const char *param, const struct pl_data_opts *o, struct pl_data_report *r, struct pl_err *err)
{
    pl_data_report_fini(r);
    const pl_status st = pl_data_scan(path, o, NULL, NULL, r, err);
    if (st != PL_OK && err != NULL)
        strcpy(err->param, param);
    return st;
}

static uint64_t trained_params(const struct pl_train_spec *s, const struct pl_train_base *base)
{
    if (s->peft == PL_PEFT_FULL)
        return base->n_params;
    uint64_t n = 0;
    struct pl_target_place place;
    for (int t = 0; t < PL_TARGET_COUNT; t++)
        if ((s->targets >> t & 1) != 0 && pl_target_find(base->spec, (pl_target)t, &place))
            n += (uint64_t)base->spec->n_layers * s->rank * ((uint64_t)place.rows + place.cols);
    return n;
}

/* Weights, and for each trained one value, gradient and two moments; activations of a micro-batch: what the backward pass of a layer
 * reads (inputs of norms and products, q, k, v, gate, up and their product), and the logits of a block of rows. A processor has frozen weights
 * twice, in the file and rearranged; a GPU expands a piece of one at a time, the head as a whole, rounds what a product reads, and makes more
 * logits at once. */
static uint64_t memory(const struct pl_train_plan *p, const struct pl_train_base *base)
{
    const struct pl_spec *m = base->spec;
    const uint64_t sequences = p->spec.method == PL_METHOD_DPO ? 2 : 1;
    const uint64_t tokens = sequences * p->spec.micro_batch * p->spec.max_length;
    const uint64_t q = (uint64_t)m->n_heads * m->head_dim, kv = (uint64_t)m->n_kv_heads * m->head_dim;
    const uint64_t layer = 5 * (uint64_t)m->n_embd + 2 * q + 2 * kv + (m->gated ? 3 : 2) * (uint64_t)m->n_ff;
    const uint64_t layers = p->spec.recompute ? m->n_layers * (uint64_t)m->n_embd + layer : m->n_layers * layer;
    const uint64_t rows = p->place.gpu ? PL_CUDA_LOGITS_AT_ONCE / m->n_vocab + 1 : ROWS_OF_CPU, logits = (tokens < rows ? tokens : rows) * m->n_vocab;
    const uint64_t weights = p->spec.peft == PL_PEFT_FULL ? 0 : (p->place.gpu ? 1 : 2) * base->n_file;
    const uint64_t widest = (m->gated ? 2 : 1) * (uint64_t)m->n_ff > q + 2 * kv ? (m->gated ? 2 : 1) * (uint64_t)m->n_ff : q + 2 * kv;
    const uint64_t one = p->spec.precision == PL_PRECISION_BF16 ? 2 : 4, rounded = one == 2 ? 2 * tokens * widest : 0;
    const uint64_t work = p->place.gpu ? one * (PL_CUDA_PANEL + (uint64_t)m->n_vocab * m->n_embd + rounded)
                                       : (p->training.n_tokens + p->validation.n_tokens) * 5; /* the files' tokens are the host's */
    return weights + 16 * p->n_trained_params + 4 * (tokens * layers + 2 * logits) + work;
}

struct pl_train_base pl_train_base_of(const struct pl_model_file *f, const char *path)
{
    return (struct pl_train_base){.path = path, .tok = f->tok, .chat = f->chat, .spec = &f->spec, .n_ctx = f->spec.n_ctx, .n_params = f->n_params,
                                  .n_file = f->n_bytes};
}

/* Makes the model that the shape describes; what is automatic in it is said from here on. */
static pl_status open_scratch(struct pl_train_plan *p, struct pl_train_spec *asked, const char *training, const struct pl_train_place *place,
                              struct pl_err *err)
{
    const struct pl_scratch_source from = {.training = training, .base = p->base.path, .kept = p->base.kept,
                                           .memory = place->available, .room = place->room, .stop = p->base.stop};
    const pl_status st = pl_scratch_open(&p->scratch, asked, &from, &p->training, err);
    p->spec = *asked;
    p->base = (struct pl_train_base){.path = from.base, .stop = from.stop, .tok = p->scratch.tok, .chat = p->scratch.chat, .spec = &p->scratch.model,
                                     .n_ctx = p->scratch.model.n_ctx, .n_params = p->scratch.n_params};
    return st;
}

static pl_status check_room(const struct pl_train_plan *p, const struct pl_train_place *place, struct pl_err *err)
{
    if (!p->spec.scratch || place->room == 0 || p->memory <= place->room)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, "method.pretrain.shape", "a model of this shape (%llu parameters) takes about %.1f GiB to train with micro-batches "
                         "of %u × %u tokens, but %.1f GiB are there: lower layers, width, ff or vocab_size, or compute.micro_batch_size and "
                         "hyperparameters.max_length", (unsigned long long)p->n_trained_params, (double)p->memory / (1 << 30), p->spec.micro_batch,
                         p->spec.max_length, (double)place->room / (1 << 30));
}

static pl_status check_files(struct pl_train_plan *p, const struct pl_train_spec *asked, const char *training, const char *validation,
                             const struct pl_train_place *place, struct pl_err *err)
{
    const struct pl_train_base *base = &p->base;
    struct pl_data_opts o = {.tok = base->tok, .chat = base->chat, .method = asked->method, .train_on = (pl_train_on)asked->train_on,
                             .min_examples = PL_DATA_MIN_EXAMPLES, .stop = base->stop};
    struct pl_train_facts f = {.model = base->spec, .n_ctx = base->n_ctx, .n_threads = place->n_threads, .validation = validation != NULL,
                               .bf16 = place->bf16};
    /* The first reading tells the longest example, which decides max_length; cut to that, the second counts what is left. */
    pl_status st = scan(training, "training_file", &o, &p->training, err);
    if (st != PL_OK)
        return st;
    f.n_examples = p->training.n_examples;
    f.longest = p->training.longest;
    if ((st = pl_train_spec_resolve(&p->spec, &f, err)) != PL_OK)
        return st;
    o.max_length = p->spec.max_length;
    if (f.longest > o.max_length) {
        if ((st = scan(training, "training_file", &o, &p->training, err)) != PL_OK)
            return st;
        f.n_examples = p->training.n_examples;
        p->spec = *asked;
        if ((st = pl_train_spec_resolve(&p->spec, &f, err)) != PL_OK)
            return st;
    }
    if (validation != NULL) {
        o.min_examples = 1;
        if ((st = scan(validation, "validation_file", &o, &p->validation, err)) != PL_OK)
            return st;
    }
    p->epoch_steps = pl_train_epoch_steps(&p->spec, f.n_examples);
    p->total_steps = pl_train_total_steps(&p->spec, f.n_examples);
    return PL_OK;
}

pl_status pl_train_plan(struct pl_train_plan *p, const struct pl_train_spec *asked, const char *training, const char *validation,
                        const struct pl_train_base *base, const struct pl_train_place *place, struct pl_err *err)
{
    struct pl_train_spec spec = *asked;
    *p = (struct pl_train_plan){.spec = spec, .base = *base, .place = *place};
    pl_status st = spec.scratch ? open_scratch(p, &spec, training, place, err) : PL_OK;
    if (st == PL_OK)
        st = check_files(p, &spec, training, validation, place, err);
    if (st != PL_OK)
        return st;
    p->trained_tokens = p->spec.n_epochs * p->training.n_tokens;
    p->n_trained_params = trained_params(&p->spec, &p->base);
    p->memory = memory(p, &p->base);
    /* forward 2, backward of inputs 2, of weights 2 operations for each parameter and token */
    p->flops = (double)p->trained_tokens * (4.0 * (double)p->base.n_params + 2.0 * (double)p->n_trained_params);
    return check_room(p, place, err);
}

void pl_train_plan_fini(struct pl_train_plan *p)
{
    pl_data_report_fini(&p->training);
    pl_data_report_fini(&p->validation);
    pl_scratch_fini(&p->scratch);
}
