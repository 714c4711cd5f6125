/* pass: one forward pass: who gets tokens, their pages and guesses, and what is sampled from its logits.
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "core/base/clock.h"
#include "core/base/log.h"
#include "core/base/pool.h"
#include "core/sched/engine_int.h"

#define PL_LOG_MODULE "engine"

/* Pages for n guesses without taking from what the running sequences grow into next. */
static bool reserve_guesses(struct pl_engine *e, struct pl_seq *s, uint32_t n)
{
    uint32_t end = s->n_done + s->take + n;
    return end <= s->table.n_pages * PL_KV_PAGE ||
           (pl_kv_available(e->kv) > e->n_running && pl_kv_reserve(e->kv, &s->table, end) == PL_OK);
}

/* Guesses for sequences that decode, while these are few and the batch has room. */
static void guess(struct pl_engine *e, uint32_t n_seqs)
{
    uint32_t used = 0, n_decode = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        used += e->step.seqs[i]->take;
        n_decode += pl_seq_decodes(e->step.seqs[i]);
    }
    if (n_decode > e->opts.draft_sequences)
        return;
    for (uint32_t i = 0; i < n_seqs && used < e->opts.batch_tokens; i++) {
        struct pl_seq *s = e->step.seqs[i];
        if (!pl_seq_decodes(s))
            continue;
        size_t needs = pl_reply_needs(s->job->n_live), room = pl_reply_room(s->job->reply), most = e->opts.max_draft;
        size_t left = s->max_new - pl_seq_output(s) - 1, share = room > needs ? (room - needs) / s->job->n_live : 0;
        most = most < left ? most : left;
        most = most < share ? most : share;
        most = most < e->opts.batch_tokens - used ? most : e->opts.batch_tokens - used;
        uint32_t n = pl_draft_find(&s->draft, s->tokens, s->n_tokens, (uint32_t)most);
        n = pl_draft_worth(&s->draft, &e->cost, n, n_decode);
        s->draft.n = n > 0 && reserve_guesses(e, s, n) ? n : 0;
        used += s->draft.n;
    }
}

/* For what each running sequence takes; the newest make room for older ones. */
static void reserve_pages(struct pl_engine *e)
{
    for (uint32_t i = 0; i < e->n_running;) {
        struct pl_seq *s = e->running[i];
        pl_status st = PL_OK;
        while (s->take > 0 && (st = pl_kv_reserve(e->kv, &s->table, s->n_done + s->take)) == PL_ENOPAGE)
            pl_engine_preempt(e, e->running[e->n_running - 1]); /* maybe s itself, whose take is 0 then */
        i++;
        if (s->take > 0 && st == PL_ENOMEM) {
            pl_engine_fail_job(e, s->job, st, "out of memory");
            i = 0; /* others may have gone with it */
        }
    }
}

uint32_t pl_engine_plan(struct pl_engine *e)
{
    const uint64_t now = pl_now_ns();
    uint32_t n_decode = 0;
    for (uint32_t i = 0; i < e->n_running; i++) {
        struct pl_seq *s = e->running[i];
        const bool room = pl_seq_has_room(s);
        s->full_since = room ? 0 : s->full_since != 0 ? s->full_since : now;
        e->step.plan[i] = (struct pl_plan_item){.left = room ? s->n_tokens - s->n_done : 0};
        n_decode += e->step.plan[i].left == 1;
    }
    (void)pl_plan(e->step.plan, e->n_running, e->opts.batch_tokens, pl_pace_room(&e->pace, e->opts.gap_ms * UINT64_C(1000000), n_decode));
    for (uint32_t i = 0; i < e->n_running; i++)
        e->running[i]->take = e->step.plan[i].take, e->running[i]->draft.n = 0;
    reserve_pages(e);
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->n_running; i++)
        if (e->running[i]->take > 0)
            e->step.seqs[n++] = e->running[i];
    if (e->opts.max_draft > 0)
        guess(e, n);
    return n;
}

static void count_token(struct pl_engine *e, struct pl_seq *s)
{
    uint64_t now = pl_now_ns();
    struct pl_model_stats *st = pl_engine_count(e, s->job);
    st->generated_tokens++;
    if (s->first_token_ns == 0) {
        s->first_token_ns = now;
        pl_hist_add(&st->ttft, (double)(now - s->job->submit_ns) * 1e-9);
        pl_hist_add(&st->prefill_time, (double)(now - s->admitted_ns) * 1e-9);
    } else {
        pl_hist_add(&st->itl, (double)(now - s->last_token_ns) * 1e-9);
    }
    pl_engine_count_end(s->job);
    s->last_token_ns = now;
}

struct pass {
    struct pl_engine *e;
    const float *logits; /* NULL = the runner has sampled */
};

static const float *logits_of(const struct pass *p, size_t row)
{
    return p->logits + row * p->e->runner.n_vocab;
}

/* Whether tokens that end a text may not be the one with this index. */
static bool bans_end(const struct pl_seq *s, uint32_t index)
{
    return s->job->req->ignore_eos || index < s->job->req->min_tokens;
}

/* Samples the row that follows the sequence's last token; changes nothing of the sequence. */
static void sample(const struct pass *p, const struct pl_seq *s, size_t row, struct pl_sample_scratch *scratch, struct pl_sampled *out)
{
    const struct pl_engine *e = p->e;
    const uint32_t index = pl_seq_output(s);
    const bool ban = bans_end(s, index);
    if (p->logits == NULL)
        out->status = pl_drawn_choice(&e->draws.rows[row], &e->drawn[row], &out->choice);
    else
        out->status = pl_sample(s->sampler, scratch, logits_of(p, row), e->runner.n_vocab, index, ban ? e->eog : NULL, ban ? e->n_eog : 0, &out->choice);
}

/* What the runner is to make of the logits behind the token at pos, a known one or a guess. */
static pl_status draw_row(struct pl_engine *e, const struct pl_seq *s, uint32_t pos)
{
    const int32_t top = s->job->req->sampling.n_top_logprobs;
    if (pos + 1 < s->n_tokens)
        pl_draws_given(&e->draws, s->tokens[pos + 1], top > 0 ? top : 0);
    else if (s->max_new == 0)
        pl_draws_given(&e->draws, 0, -1);
    else {
        const uint32_t n_guesses = pos + 1 - s->n_tokens, index = pl_seq_output(s) + n_guesses;
        const bool ban = bans_end(s, index);
        return pl_draws_sample(&e->draws, s->sampler, s->draft.ids, n_guesses, index, ban ? e->eog : NULL, ban ? e->n_eog : 0);
    }
    return PL_OK;
}

static pl_status draw_rows(struct pl_engine *e, struct pl_batch *b)
{
    pl_status st = PL_OK;
    e->draws.n_rows = e->draws.n_edits = 0;
    for (uint32_t i = 0, row = 0; i < b->n_seqs; i++)
        for (; row < b->n_rows && b->rows[row] < b->q_start[i + 1] && st == PL_OK; row++)
            st = draw_row(e, e->step.seqs[i], b->pos[b->rows[row]]);
    b->draws = &e->draws;
    b->drawn = e->drawn;
    return st;
}

/* st: of what came out for one of its sequences. */
static void fail_job(struct pl_engine *e, struct pl_job *job, pl_status st)
{
    pl_engine_fail_job(e, job, st, st == PL_ENOMEM ? "out of memory" : "the model's output is not a number for this request");
}

/* Appends what was sampled. Returns whether the sequence goes on; if not, it and maybe its job are gone. *token is what came
 * out, -1 when nothing did. */
static bool append(struct pl_engine *e, struct pl_seq *s, const struct pl_sampled *sampled, int32_t *token)
{
    pl_finish finish;
    bool over = false;
    pl_status st = sampled->status;
    *token = st == PL_OK ? sampled->choice.token : -1;
    if (st == PL_OK) {
        count_token(e, s);
        st = pl_seq_append(s, e->tok, &sampled->choice, &e->text, &over, &finish);
    }
    if (st != PL_OK)
        fail_job(e, s->job, st);
    else if (over)
        pl_engine_end_seq(e, s, finish);
    return st == PL_OK && !over;
}

/* The token after the sequence's last one, and as long as what comes out is what was guessed, the row after that guess: its
 * keys and values are those of the token. The first other token stays, the places of the guesses after it are written again. */
static void take_tokens(const struct pass *p, struct pl_seq *s, struct pl_sampled *sampled, size_t row)
{
    struct pl_engine *e = p->e;
    const uint32_t n = s->draft.n;
    uint32_t held = 0;
    int32_t guesses[PL_DRAFT_MAX], token;
    memcpy(guesses, s->draft.ids, sizeof guesses);
    s->draft.n = 0;
    bool on;
    while ((on = append(e, s, sampled, &token)) && held < n && token == guesses[held]) {
        held++;
        s->n_done++;
        pl_kv_commit(e->kv, &s->table, s->tokens, s->n_done);
        sample(p, s, row + held, e->scratch[0], sampled);
    }
    if (n == 0)
        return;
    held += !on && held < n && token == guesses[held]; /* the guess that ended the text */
    if (on)
        pl_draft_learn(&s->draft, n, held);
    e->stats.draft_tokens += n;
    e->stats.draft_accepted += held;
}

/* Log-probabilities of prompt tokens: row k of this step tells those of token n_done + k + 1. */
static pl_status take_prompt_rows(const struct pass *p, struct pl_seq *s, size_t row)
{
    const struct pl_engine *e = p->e;
    int32_t top = s->job->req->sampling.n_top_logprobs;
    for (uint32_t k = 0; k < s->take; k++) {
        uint32_t next = s->n_done + k + 1;
        if (next >= s->n_prompt)
            break;
        struct pl_choice *const to = &s->prompt_logprobs[next];
        const pl_status st = p->logits == NULL
                                 ? pl_drawn_choice(&e->draws.rows[row + k], &e->drawn[row + k], to)
                                 : pl_logprobs(logits_of(p, row + k), e->runner.n_vocab, s->tokens[next], top > 0 ? (uint32_t)top : 0, to);
        if (st != PL_OK)
            return st;
    }
    return s->n_done + s->take >= s->n_prompt ? pl_seq_push_prompt(s) : PL_OK;
}

static bool is_complete(const struct pl_seq *s)
{
    return s->n_done + s->take == s->n_tokens;
}

/* The row that follows the last token of the step's sequence i. */
static size_t last_row(const struct pass *p, size_t i)
{
    const struct pl_seq *s = p->e->step.seqs[i];
    return p->e->step.first_row[i] + (pl_seq_wants_all_rows(s) ? s->take - 1 : 0);
}

static void sample_item(void *pass, size_t i, unsigned worker)
{
    const struct pass *p = pass;
    const struct pl_seq *s = p->e->step.seqs[i];
    if (is_complete(s) && s->max_new > 0)
        sample(p, s, last_row(p, i), p->e->scratch[worker], &p->e->sampled[i]);
}

/* What came out of the forward pass for the step's sequence i. */
static void take_result(const struct pass *p, size_t i)
{
    struct pl_engine *e = p->e;
    struct pl_seq *s = e->step.seqs[i];
    const bool all = pl_seq_wants_all_rows(s), complete = is_complete(s);
    const size_t last = last_row(p, i);
    pl_status st = all ? take_prompt_rows(p, s, e->step.first_row[i]) : PL_OK;
    s->n_done += s->take;
    s->take = 0;
    pl_kv_commit(e->kv, &s->table, s->tokens, s->n_done);
    if (st != PL_OK)
        fail_job(e, s->job, st);
    else if (complete && s->max_new == 0)
        pl_engine_end_seq(e, s, PL_FINISH_LENGTH);
    else if (complete)
        take_tokens(p, s, &e->sampled[i], last);
}

static void finish_step(struct pl_engine *e, uint32_t n_tokens)
{
    struct pl_engine_stats *st = &e->stats;
    st->n_steps++;
    st->last_step_ns = pl_now_ns();
    pl_hist_add(&st->step_tokens, n_tokens);
}

/* The pass took ns. */
static void learn_cost(struct pl_engine *e, uint32_t n_seqs, uint32_t n_tokens, uint64_t ns)
{
    for (uint32_t i = 0; i < n_seqs; i++)
        if (!pl_seq_decodes(e->step.seqs[i])) {
            pl_pace_learn(&e->pace, n_tokens, ns);
            return;
        }
    pl_pace_learn_plain(&e->pace, ns);
    pl_draft_cost_learn(&e->cost, n_seqs, n_tokens - n_seqs, ns);
}

/* There is no memory for what the pass needs beside its cache; nothing else is wrong with the device. */
static void refuse_pass(struct pl_engine *e, uint32_t n_seqs)
{
    pl_log_warn("no memory for a pass of %u sequences: they end; lower --batch-tokens, --cuda-memory-percent or --kv-cache-mb", n_seqs);
    for (uint32_t i = 0; i < n_seqs; i++)
        if (e->step.seqs[i] != NULL)
            pl_engine_fail_job(e, e->step.seqs[i]->job, PL_ENOMEM, "there is no memory for this batch now; try again later");
}

void pl_engine_run(struct pl_engine *e, uint32_t n_seqs)
{
    struct pl_batch b;
    const float *logits = NULL;
    pl_status st = pl_step_build(&e->step, n_seqs, &b);
    if (st == PL_OK && e->runner.samples && b.n_rows > 0)
        st = draw_rows(e, &b);
    pl_pool_turn(e->opts.pool);
    uint64_t began = pl_now_ns();
    if (st == PL_OK)
        st = e->runner.forward(e->runner.self, &b, &logits);
    if (st != PL_OK) {
        pl_pool_turn_end(e->opts.pool);
        if (st == PL_ENOMEM)
            refuse_pass(e, n_seqs);
        else
            pl_engine_lose(e, st);
        return;
    }
    learn_cost(e, n_seqs, b.n_tokens, pl_now_ns() - began);
    struct pass p = {e, logits};
    if (e->n_workers > 1 && b.n_rows > 1 && logits != NULL)
        pl_pool_run(e->opts.pool, sample_item, &p, n_seqs);
    else
        for (uint32_t i = 0; i < n_seqs; i++)
            sample_item(&p, i, 0);
    pl_pool_turn_end(e->opts.pool);
    for (uint32_t i = 0; i < n_seqs; i++)
        if (e->step.seqs[i] != NULL) /* else a request that failed took it along */
            take_result(&p, i);
    finish_step(e, b.n_tokens);
}
