/* ranks: what rank 0 tells the others, as messages of 32-bit words: what, number of words, the words. The first PL_FIRST words
 * travel together, so that a decode's message is one broadcast.
 *
 *   ROOM  page_size dtype percent
 *   START page_size n_pages dtype
 *   PASS  T S R P adapted | tokens[T] pos[T] slot[T] q_start[S + 1] ctx[S] page_start[S + 1] pages[P] rows[R] adapter[S]
 *   COPY  from to
 *   ADD   slot, bytes (two words); then the bytes themselves
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/ranks.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/model/adapter_wire.h"
#include "core/model/model.h"

#define PL_LOG_MODULE "ranks"

enum { FIRST_WORDS = 1024, HEAD = 2, PASS_HEAD = 5, BEAT_MS = 5000 };
typedef enum { MEET, ROOM, START, PASS, COPY, ADD, REMOVE, BEAT, STOP } pl_told;

/* ---- rank 0 -------------------------------------------------------------------------------------------------------- */

pl_status pl_leader_init(struct pl_leader *l, struct pl_comm *comm)
{
    *l = (struct pl_leader){.comm = comm, .timeout_ms = comm->timeout_ms};
    return pl_reserve_words(&l->words, &l->cap, FIRST_WORDS) ? PL_OK : PL_ENOMEM;
}

void pl_leader_fini(struct pl_leader *l)
{
    free(l->words);
    *l = (struct pl_leader){0};
}

static pl_status tell(struct pl_leader *l, pl_told what, size_t n_words)
{
    l->words[0] = what;
    l->words[1] = (uint32_t)n_words;
    const size_t n = HEAD + n_words;
    pl_status rc = l->comm->ops->broadcast(l->comm, l->words, FIRST_WORDS * sizeof *l->words);
    if (rc == PL_OK && n > FIRST_WORDS)
        rc = l->comm->ops->broadcast(l->comm, l->words + FIRST_WORDS, (n - FIRST_WORDS) * sizeof *l->words);
    l->told_ns = pl_now_ns();
    return rc;
}

/* The worst of all ranks' statuses. */
static pl_status agree(struct pl_comm *c, pl_status own)
{
    const pl_status rc = c->ops->agree(c, &own);
    return rc != PL_OK ? rc : own;
}

pl_status pl_rank_room(const struct pl_comm *comm, struct pl_device *dev, const struct pl_model *model, const struct pl_room *want, uint32_t *n_pages)
{
    const struct pl_kv_shape shape = pl_model_kv_part(model, want->page_size, 1, (pl_dtype)want->dtype);
    size_t free_bytes, total;
    const pl_status rc = dev->ops->memory(dev, &free_bytes, &total);
    if (rc != PL_OK)
        return rc;
    const uint64_t n = (uint64_t)free_bytes / comm->sharing / 100 * want->percent / dev->ops->kv_bytes(dev, &shape), most = INT32_MAX / want->page_size;
    *n_pages = (uint32_t)(n < most ? n : most);
    return PL_OK;
}

/* All have loaded when the first agreement is reached, and none has begun with its cache before the second. A rank that could not load
 * says so when they start. */
static pl_status agree_on_room(struct pl_comm *comm, struct pl_device *dev, const struct pl_model *model, const struct pl_room *want, uint32_t *n_pages)
{
    int least = INT32_MAX;
    pl_status rc = agree(comm, PL_OK);
    if (rc != PL_OK)
        return rc;
    const pl_status own = model != NULL ? pl_rank_room(comm, dev, model, want, n_pages) : PL_OK;
    if (model != NULL)
        least = own == PL_OK ? (int)*n_pages : 0;
    rc = comm->ops->agree(comm, &least);
    *n_pages = (uint32_t)least;
    return rc != PL_OK ? rc : own;
}

pl_status pl_leader_room(struct pl_leader *l, struct pl_device *dev, struct pl_model *model, const struct pl_room *want, uint32_t *n_pages)
{
    l->comm->timeout_ms = PL_RANKS_LOADING * l->timeout_ms;
    memcpy(l->words + HEAD, want, sizeof *want);
    pl_status rc = tell(l, ROOM, sizeof *want / sizeof *l->words);
    if (rc == PL_OK)
        rc = agree_on_room(l->comm, dev, model, want, n_pages);
    l->comm->timeout_ms = l->timeout_ms;
    return rc;
}

pl_status pl_leader_start(struct pl_leader *l, const struct pl_kv_shape *cache, pl_status own)
{
    l->comm->timeout_ms = PL_RANKS_LOADING * l->timeout_ms;
    l->words[HEAD] = cache->page_size;
    l->words[HEAD + 1] = cache->n_pages;
    l->words[HEAD + 2] = cache->dtype;
    pl_status rc = tell(l, START, 3);
    if (rc == PL_OK)
        rc = agree(l->comm, own);
    l->comm->timeout_ms = l->timeout_ms;
    return rc;
}

static uint32_t *put(uint32_t *at, const void *from, size_t n)
{
    memcpy(at, from, n * sizeof *at);
    return at + n;
}

pl_status pl_leader_pass(struct pl_leader *l, const struct pl_batch *b)
{
    const uint32_t T = b->n_tokens, S = b->n_seqs, R = b->n_rows, P = b->page_start[S];
    const size_t n = PASS_HEAD + 3 * (size_t)T + 4 * (size_t)S + 2 + P + R;
    const pl_status rc = pl_reserve_words(&l->words, &l->cap, HEAD + n) ? PL_OK : PL_ENOMEM;
    if (rc != PL_OK)
        return rc;
    const uint32_t head[PASS_HEAD] = {T, S, R, P, b->adapter != NULL};
    uint32_t *at = put(l->words + HEAD, head, PASS_HEAD);
    at = put(at, b->tokens, T);
    at = put(at, b->pos, T);
    at = put(at, b->slot, T);
    at = put(at, b->q_start, S + 1);
    at = put(at, b->ctx, S);
    at = put(at, b->page_start, S + 1);
    at = put(at, b->pages, P);
    at = put(at, b->rows, R);
    if (b->adapter != NULL)
        put(at, b->adapter, S);
    return tell(l, PASS, n);
}

pl_status pl_leader_kv_copy(struct pl_leader *l, uint32_t from, uint32_t to)
{
    l->words[HEAD] = from;
    l->words[HEAD + 1] = to;
    return tell(l, COPY, 2);
}

pl_status pl_leader_adapter_add(struct pl_leader *l, uint32_t slot, const struct pl_adapter_wire *wire)
{
    const uint64_t n = wire->n;
    l->words[HEAD] = slot;
    memcpy(l->words + HEAD + 1, &n, sizeof n);
    pl_status rc = tell(l, ADD, 3);
    if (rc == PL_OK)
        rc = l->comm->ops->broadcast(l->comm, wire->bytes, wire->n);
    return rc == PL_OK ? agree(l->comm, PL_OK) : rc;
}

pl_status pl_leader_adapter_remove(struct pl_leader *l, uint32_t slot)
{
    l->words[HEAD] = slot;
    return tell(l, REMOVE, 1);
}

int pl_leader_beat_ms(const struct pl_leader *l)
{
    return l->timeout_ms / 3 < BEAT_MS ? l->timeout_ms / 3 : BEAT_MS;
}

pl_status pl_leader_beat(struct pl_leader *l)
{
    if (pl_now_ns() - l->told_ns < (uint64_t)pl_leader_beat_ms(l) * 900000)
        return PL_OK;
    const pl_status rc = tell(l, BEAT, 0);
    return rc == PL_OK ? agree(l->comm, PL_OK) : rc;
}

pl_status pl_ranks_meet(struct pl_comm **out, struct pl_comm *host, struct pl_device *dev, pl_exchange exchange, pl_status own, struct pl_err *err)
{
    const int timeout_ms = host->timeout_ms;
    uint32_t words[FIRST_WORDS] = {MEET, 0};
    *out = host;
    host->timeout_ms = PL_RANKS_LOADING * timeout_ms + (host->rank > 0 ? PL_RANKS_GRACE_MS : 0);
    pl_status rc = host->ops->broadcast(host, words, sizeof words);
    if (rc != PL_OK)
        rc = pl_fail(err, rc, "ranks could not meet: %s", pl_status_text(rc));
    else if (words[0] != MEET)
        rc = PL_ESTOPPED;
    else
        rc = pl_comm_meet(out, host, dev, exchange, own, err);
    host->timeout_ms = (*out)->timeout_ms = timeout_ms;
    return rc;
}

void pl_ranks_stop(struct pl_comm *comm)
{
    uint32_t words[FIRST_WORDS] = {STOP, 0};
    if (comm->ops->broadcast(comm, words, sizeof words) != PL_OK)
        pl_log_warn("the other ranks could not be told to stop");
}

/* ---- the others ---------------------------------------------------------------------------------------------------- */

struct follower {
    struct pl_comm *comm;
    struct pl_device *dev;
    struct pl_model *model; /* NULL = could not be loaded */
    struct pl_kvdev *kv;
    uint32_t n_pages; /* of it that were written to */
    uint32_t *words;
    size_t cap;
    int timeout_ms;
};

static pl_status listen_to(struct follower *f)
{
    pl_status rc = f->comm->ops->broadcast(f->comm, f->words, FIRST_WORDS * sizeof *f->words);
    if (rc != PL_OK)
        return rc;
    const size_t n = HEAD + (size_t)f->words[1];
    rc = pl_reserve_words(&f->words, &f->cap, n) ? PL_OK : PL_ENOMEM;
    if (rc == PL_OK && n > FIRST_WORDS)
        rc = f->comm->ops->broadcast(f->comm, f->words + FIRST_WORDS, (n - FIRST_WORDS) * sizeof *f->words);
    return rc;
}

static pl_status start(struct follower *f, pl_status loaded)
{
    pl_status rc = loaded;
    if (rc == PL_OK) {
        const struct pl_kv_shape shape = pl_model_kv_part(f->model, f->words[HEAD], f->words[HEAD + 1], (pl_dtype)f->words[HEAD + 2]);
        rc = f->dev->ops->kv_new(f->dev, &shape, &f->kv);
        if (rc != PL_OK)
            pl_log_error("rank %u: no memory for a KV cache of %u pages: lower kv-cache-mb", f->comm->rank, shape.n_pages);
    }
    const pl_status all = agree(f->comm, rc);
    f->comm->timeout_ms = f->timeout_ms;
    return all == PL_ERANK ? all : PL_OK; /* rank 0 knows how it went, and says stop */
}

static pl_status room(struct follower *f)
{
    struct pl_room want;
    uint32_t n_pages = 0;
    memcpy(&want, f->words + HEAD, sizeof want);
    const pl_status rc = agree_on_room(f->comm, f->dev, f->model, &want, &n_pages);
    return rc == PL_ERANK ? rc : PL_OK; /* rank 0 learns of all else by the number */
}

static pl_status pass(struct follower *f)
{
    const uint32_t *w = f->words + HEAD, T = w[0], S = w[1], R = w[2], P = w[3];
    const bool adapted = w[4] != 0;
    struct pl_batch b = {.n_tokens = T, .n_seqs = S, .n_rows = R};
    const float *logits;
    w += PASS_HEAD;
    b.tokens = (const int32_t *)w;
    b.pos = w + T;
    b.slot = b.pos + T;
    b.q_start = b.slot + T;
    b.ctx = b.q_start + S + 1;
    b.page_start = b.ctx + S;
    b.pages = b.page_start + S + 1;
    b.rows = b.pages + P;
    b.adapter = adapted ? b.rows + R : NULL;
    const pl_status rc = pl_model_forward(f->model, f->kv, &b, &logits);
    f->n_pages = pl_batch_pages(&b, f->n_pages);
    if (rc == PL_OK && f->dev->ops->kv_prepare != NULL)
        (void)f->dev->ops->kv_prepare(f->dev, f->kv, f->n_pages + PL_RANKS_PAGES_AHEAD);
    return rc;
}

static pl_status make_adapter(const struct follower *f, uint32_t slot, const void *bytes, size_t n)
{
    struct pl_adapter a = {0};
    struct pl_lora_set *set = NULL;
    struct pl_err err = {0};
    pl_status rc = pl_adapter_unpack(&a, bytes, n, pl_model_spec(f->model), &err);
    if (rc == PL_OK)
        rc = pl_model_adapter_make(&set, f->model, &a, &err);
    if (rc == PL_OK && (rc = pl_model_adapter_add(f->model, slot, set, &err)) != PL_OK)
        pl_model_adapter_free(f->model, set);
    free(a.pairs);
    if (rc != PL_OK)
        pl_log_error("rank %u: an adapter cannot be added: %s", f->comm->rank, err.msg);
    return rc;
}

/* What every rank could add stays; else nobody keeps it. */
static pl_status add_adapter(struct follower *f)
{
    const uint32_t slot = f->words[HEAD];
    uint64_t n;
    memcpy(&n, f->words + HEAD + 1, sizeof n);
    void *bytes = malloc(n);
    if (bytes == NULL)
        return PL_ENOMEM; /* it cannot even be listened to */
    pl_status rc = f->comm->ops->broadcast(f->comm, bytes, n);
    if (rc == PL_OK) {
        const pl_status own = make_adapter(f, slot, bytes, n), all = agree(f->comm, own);
        if (own == PL_OK && all != PL_OK)
            pl_model_adapter_remove(f->model, slot);
        rc = all == PL_ERANK ? all : PL_OK;
    }
    free(bytes);
    return rc;
}

/* Until rank 0 says stop, or something fails. */
static pl_status replay(struct follower *f, pl_status loaded)
{
    for (;;) {
        pl_status rc = listen_to(f);
        if (rc != PL_OK)
            return rc;
        switch ((pl_told)f->words[0]) {
        case MEET: rc = PL_EFORMAT; break; /* they have met */
        case ROOM: rc = room(f); break;
        case START: rc = start(f, loaded); break;
        case PASS: rc = pass(f); break;
        case COPY: rc = f->dev->ops->kv_copy(f->dev, f->kv, f->words[HEAD], f->words[HEAD + 1]); break;
        case ADD: rc = add_adapter(f); break;
        case REMOVE: pl_model_adapter_remove(f->model, f->words[HEAD]); break;
        case BEAT: rc = agree(f->comm, PL_OK); break;
        case STOP: return PL_OK;
        }
        if (rc != PL_OK)
            return rc;
    }
}

pl_status pl_rank_follow(struct pl_comm *comm, struct pl_device *dev, struct pl_model *model, pl_status loaded)
{
    struct follower f = {.comm = comm, .dev = dev, .model = model, .timeout_ms = comm->timeout_ms + PL_RANKS_GRACE_MS};
    comm->timeout_ms = PL_RANKS_LOADING * comm->timeout_ms + PL_RANKS_GRACE_MS;
    pl_status rc = pl_reserve_words(&f.words, &f.cap, FIRST_WORDS) ? PL_OK : PL_ENOMEM;
    if (rc == PL_OK)
        rc = replay(&f, loaded);
    if (rc != PL_OK) {
        if (loaded == PL_OK)
            pl_log_error("rank %u of %u stops: %s", comm->rank, comm->size, pl_status_text(rc));
        comm->ops->give_up(comm);
    }
    if (f.kv != NULL)
        dev->ops->kv_free(dev, f.kv);
    free(f.words);
    return rc;
}
