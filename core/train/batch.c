/* batch: which examples a step takes, and how they are packed into micro-batches.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/batch.h"

#include <stdlib.h>
#include <string.h>

#include "core/train/random.h"

static uint32_t unit_tokens(const struct pl_batch_plan *b, uint32_t unit)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < b->per_unit; i++)
        n += b->d->examples[unit * b->per_unit + i].n;
    return n;
}

pl_status pl_batch_init(struct pl_batch_plan *b, const struct pl_dataset *d, uint32_t micro_batch, uint32_t max_length, bool pack, uint32_t seed,
                        struct pl_err *err)
{
    *b = (struct pl_batch_plan){.d = d, .per_unit = d->pairs ? 2 : 1, .seed = seed, .epoch = UINT32_MAX - 1, .most_units = pack ? 0 : micro_batch};
    b->n_units = d->n / b->per_unit;
    for (uint32_t i = 0; i < d->n; i++)
        max_length = d->examples[i].n > max_length ? d->examples[i].n : max_length;
    const uint64_t capacity = (uint64_t)micro_batch * b->per_unit * max_length;
    if (capacity > 1u << 24)
        return pl_fail_param(err, PL_EINVAL, "micro_batch_size", "a micro-batch of %llu tokens is too large; lower micro_batch_size or max_length",
                             (unsigned long long)capacity);
    b->capacity = (uint32_t)capacity;
    uint32_t **const arrays[] = {&b->tokens, &b->pos, &b->start, &b->rows, &b->targets, &b->row_start};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
        if ((*arrays[i] = malloc((b->capacity + 2) * sizeof **arrays[i])) == NULL)
            goto no_memory;
    b->order = malloc((b->n_units + 1) * sizeof *b->order);
    b->units = malloc((b->n_units + 1) * sizeof *b->units);
    b->first = malloc((b->n_units + 2) * sizeof *b->first);
    if (b->order != NULL && b->units != NULL && b->first != NULL)
        return PL_OK;
no_memory:
    pl_batch_fini(b);
    return pl_fail(err, PL_ENOMEM, "no memory for batches of %u tokens", b->capacity);
}

void pl_batch_fini(struct pl_batch_plan *b)
{
    uint32_t *const arrays[] = {b->tokens, b->pos, b->start, b->rows, b->targets, b->row_start, b->order, b->units, b->first};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++)
        free(arrays[i]);
    *b = (struct pl_batch_plan){0};
}

static void shuffle(struct pl_batch_plan *b, uint32_t epoch)
{
    uint64_t state = pl_random_stream((uint64_t)b->seed << 32 | epoch, "order");
    for (uint32_t i = 0; i < b->n_units; i++)
        b->order[i] = i;
    for (uint32_t i = b->n_units; epoch != UINT32_MAX && i > 1; i--) {
        const uint32_t k = pl_random_below(&state, i), kept = b->order[i - 1];
        b->order[i - 1] = b->order[k];
        b->order[k] = kept;
    }
    b->epoch = epoch;
}

/* The longest first; of equal ones, the first of the file. */
static int by_length(const void *x, const void *y, void *arg)
{
    const struct pl_batch_plan *b = arg;
    const uint32_t i = *(const uint32_t *)x, k = *(const uint32_t *)y, n = unit_tokens(b, i), m = unit_tokens(b, k);
    return n != m ? (n < m ? 1 : -1) : (i > k) - (i < k);
}

/* Best fit, longest first: each unit goes where the least room is left after it. */
static pl_status pack_tight(struct pl_batch_plan *b, const uint32_t *taken, uint32_t n)
{
    uint32_t *sorted = malloc(3 * ((size_t)n + 1) * sizeof *sorted), *bin = sorted + n, *room = bin + n;
    if (sorted == NULL)
        return PL_ENOMEM;
    memcpy(sorted, taken, n * sizeof *sorted);
    qsort_r(sorted, n, sizeof *sorted, by_length, b);
    b->n_micro = 0;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t size = unit_tokens(b, sorted[i]);
        uint32_t best = b->n_micro;
        for (uint32_t k = 0; k < b->n_micro; k++)
            if (room[k] >= size && (best == b->n_micro || room[k] < room[best]))
                best = k;
        if (best == b->n_micro)
            room[b->n_micro++] = b->capacity;
        room[best] -= size;
        bin[i] = best;
    }
    uint32_t at = 0;
    for (uint32_t k = 0; k < b->n_micro; k++) {
        b->first[k] = at;
        for (uint32_t i = 0; i < n; i++)
            if (bin[i] == k)
                b->units[at++] = sorted[i];
    }
    b->first[b->n_micro] = at;
    free(sorted);
    return PL_OK;
}

pl_status pl_batch_take(struct pl_batch_plan *b, uint32_t epoch, uint32_t from, uint32_t n)
{
    if (b->epoch != epoch)
        shuffle(b, epoch);
    n = from + n > b->n_units ? b->n_units - from : n;
    b->n_tokens = b->n_loss_tokens = 0;
    for (uint32_t i = from; i < from + n; i++)
        for (uint32_t s = 0; s < b->per_unit; s++) {
            const struct pl_example *e = &b->d->examples[b->order[i] * b->per_unit + s];
            b->n_tokens += e->n;
            for (uint32_t k = 1; k < e->n; k++)
                b->n_loss_tokens += e->loss[k] != 0;
        }
    if (b->most_units == 0)
        return pack_tight(b, b->order + from, n);
    memcpy(b->units, b->order + from, n * sizeof *b->units);
    b->n_micro = (n + b->most_units - 1) / b->most_units;
    for (uint32_t i = 0; i < b->n_micro; i++)
        b->first[i] = i * b->most_units;
    b->first[b->n_micro] = n;
    return PL_OK;
}

void pl_batch_micro(struct pl_batch_plan *b, uint32_t i)
{
    uint32_t at = 0, rows = 0, seq = 0;
    for (uint32_t u = b->first[i]; u < b->first[i + 1]; u++)
        for (uint32_t s = 0; s < b->per_unit; s++, seq++) {
            const struct pl_example *e = &b->d->examples[b->units[u] * b->per_unit + s];
            b->start[seq] = at;
            b->row_start[seq] = rows;
            for (uint32_t k = 0; k < e->n; k++, at++) {
                b->tokens[at] = (uint32_t)e->ids[k];
                b->pos[at] = k;
                if (k > 0 && e->loss[k] != 0) {
                    b->rows[rows] = at - 1;
                    b->targets[rows++] = (uint32_t)e->ids[k];
                }
            }
        }
    b->start[seq] = at;
    b->row_start[seq] = rows;
    b->micro = (struct pl_micro){at, rows, b->tokens, b->pos, {seq, b->start}, b->rows, b->targets};
}
