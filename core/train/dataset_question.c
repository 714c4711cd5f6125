/* dataset: examples whose last answer is to be given again: what stands before it is made to fit.
 *
 *   system | user 1 | assistant 1 | user 2 | assistant 2 | user 3 | assistant 3
 *          |--- left out first ---|--- then this -------|        |-- the answer that counts
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/train/dataset_int.h"

/* The examples of a line: one, or both of a pair. */
struct held {
    struct pl_example x[2];
    uint32_t n;
    bool failed;
};

static bool hold(void *arg, const struct pl_example *e)
{
    struct held *h = arg;
    struct pl_example *x = &h->x[h->n];
    if (h->n == PL_COUNT_OF(h->x))
        return true;
    *x = *e;
    x->ids = malloc(e->n * sizeof *x->ids + e->n);
    if (x->ids == NULL)
        return !(h->failed = true);
    x->loss = (uint8_t *)(x->ids + e->n);
    memcpy(x->ids, e->ids, e->n * sizeof *x->ids);
    memcpy(x->loss, e->loss, e->n);
    h->n++;
    return true;
}

static void let_go(struct held *h)
{
    for (uint32_t i = 0; i < h->n; i++)
        free(h->x[i].ids);
    *h = (struct held){0};
}

static uint32_t longest_prompt(const struct held *h)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < h->n; i++) {
        const uint32_t n = pl_data_prompt(&h->x[i]);
        most = n > most ? n : most;
    }
    return most;
}

/* Leaves the oldest question and its answers out. False: nothing but the last one is there. */
static bool drop_turn(struct pl_data_line *l)
{
    const bool pair = l->form == PL_DATA_PREFERENCE;
    size_t first = 0, next, last = l->n_messages;
    if (l->form != PL_DATA_CHAT && !pair)
        return false;
    while (!pair && last > 0 && !l->trained[last - 1]) /* the answer that counts is before last */
        last--;
    last -= !pair;
    while (first < last && (strcmp(l->messages[first].role, "system") == 0 || strcmp(l->messages[first].role, "developer") == 0))
        first++;
    for (next = first + 1; next < last && strcmp(l->messages[next].role, "user") != 0;)
        next++;
    if (next >= last)
        return false;
    memmove(l->messages + first, l->messages + next, (l->n_messages - next) * sizeof *l->messages);
    memmove(l->trained + first, l->trained + next, (l->n_messages - next) * sizeof *l->trained);
    l->n_messages -= next - first;
    return true;
}

static pl_status encode_once(struct pl_data_encoder *e, const struct pl_data_line *l, struct held *h, struct pl_data_fault *fault)
{
    struct pl_data_opts o = *e->o;
    struct pl_data_encoder inner = *e;
    o.max_length = 0;
    inner.o = &o;
    inner.visit = hold;
    inner.arg = h;
    const pl_status st = pl_data_encode(&inner, l, fault);
    return st == PL_OK && h->failed ? pl_fail(e->err, PL_ENOMEM, "out of memory") : st;
}

pl_status pl_data_encode_question(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault)
{
    const struct pl_data_report before = *e->report;
    const uint32_t most = e->o->prompt_limit;
    struct pl_data_line now = *l;
    struct held h = {0};
    uint32_t whole[PL_COUNT_OF(h.x)] = {0};
    pl_status st = encode_once(e, &now, &h, fault);
    for (uint32_t i = 0; i < h.n; i++)
        whole[i] = pl_data_prompt(&h.x[i]);
    while (st == PL_OK && longest_prompt(&h) > most && drop_turn(&now)) {
        let_go(&h);
        *e->report = before;
        st = encode_once(e, &now, &h, fault);
    }
    for (uint32_t i = 0; i < h.n && st == PL_OK; i++) {
        struct pl_example x = h.x[i];
        const uint32_t n = pl_data_prompt(&x), over = n > most ? n - most : 0;
        x.ids += over;
        x.loss += over;
        x.n -= over;
        x.n_left_out = whole[i] - (n - over);
        e->report->n_cut += x.n_left_out > 0;
        if (e->visit != NULL && !e->stopped)
            e->stopped = !e->visit(e->arg, &x);
    }
    let_go(&h);
    return st;
}
