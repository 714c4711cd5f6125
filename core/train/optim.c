/* optim: learning-rate schedules, clipping and AdamW over everything that a net trains.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/optim.h"

#include <math.h>

double pl_optim_rate(const struct pl_train_spec *s, uint32_t step, uint32_t total)
{
    const double warmup = s->warmup_steps, low = s->min_ratio;
    if (step < s->warmup_steps)
        return s->learning_rate * (step + 1) / (warmup + 1);
    const double rest = total > s->warmup_steps ? total - warmup : 1, done = (step - warmup) / rest;
    double ratio = 1;
    switch ((pl_train_schedule)s->schedule) {
    case PL_SCHEDULE_CONSTANT:
        break;
    case PL_SCHEDULE_LINEAR:
        ratio = low + (1 - low) * (1 - done);
        break;
    case PL_SCHEDULE_COSINE:
        ratio = low + (1 - low) * (1 + cos(M_PI * done)) / 2;
        break;
    case PL_SCHEDULE_WSD: {
        const double fall = s->decay_ratio * total, left = (double)total - step;
        ratio = fall > 0 && left < fall ? low + (1 - low) * left / fall : 1;
        break;
    }
    }
    return s->learning_rate * ratio;
}

static pl_view part(struct pl_dbuf *buf, size_t from, size_t n)
{
    /* tensors are padded to 16 values, so this is all of it, and the counts fit into 32 bits */
    return (pl_view){.buf = buf, .offset = from, .rows = (uint32_t)(n / 16), .cols = 16, .stride = 16};
}

pl_status pl_optim_step(struct pl_net *n, const struct pl_train_spec *s, uint32_t step, double rate, double *norm)
{
    double squares;
    pl_status rc = n->t->sum_squares(n->dev, part(n->g, 0, n->n_trained), &squares);
    *norm = sqrt(squares);
    struct pl_adamw o = {.rate = (float)rate, .beta1 = (float)s->beta1, .beta2 = (float)s->beta2, .eps = (float)s->epsilon, .scale = 1,
                         .correct1 = (float)(1 - pow(s->beta1, step + 1.0)), .correct2 = (float)(1 - pow(s->beta2, step + 1.0)),
                         .decay = (float)s->weight_decay};
    if (s->max_grad_norm > 0 && *norm > s->max_grad_norm)
        o.scale = (float)(s->max_grad_norm / *norm);
    if (rc == PL_OK)
        rc = n->t->adamw(n->dev, part(n->w, 0, n->n_decayed), part(n->g, 0, n->n_decayed), part(n->m, 0, n->n_decayed),
                         part(n->v, 0, n->n_decayed), &o);
    const size_t plain = n->n_trained - n->n_decayed;
    o.decay = 0;
    if (rc == PL_OK && plain > 0)
        rc = n->t->adamw(n->dev, part(n->w, n->n_decayed, plain), part(n->g, n->n_decayed, plain), part(n->m, n->n_decayed, plain),
                         part(n->v, n->n_decayed, plain), &o);
    return rc;
}
