/* dataset: from a checked line to tokens, and which of them count in the loss.
 *
 *   prompt   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n          rendered up to the turn, with the generation prompt
 *   whole    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n      rendered with the turn
 *                                                                 |---- loss ----|          from where the two part, to the first
 *                                                                                           token that ends a generation
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "core/train/dataset_int.h"

struct rendered { /* pieces are slices of one text */
    struct pl_arena *arena;
    struct pl_piece *pieces;
    size_t n_pieces, n;
    const char *text;
};

struct span {
    size_t from, to; /* bytes of the whole text */
};

static pl_status render(struct rendered *r, struct pl_data_encoder *e, const struct pl_chat_message *m, size_t n, bool prompt,
                        struct pl_data_fault *fault)
{
    struct pl_err why = {0};
    *r = (struct rendered){.arena = pl_arena_new(0), .text = ""};
    if (r->arena == NULL)
        return pl_fail(e->err, PL_ENOMEM, "out of memory");
    const pl_status st = pl_chat_render(e->o->chat, m, n, prompt, r->arena, &r->pieces, &r->n_pieces, &why);
    if (st == PL_ENOMEM)
        return pl_fail(e->err, PL_ENOMEM, "out of memory");
    if (st != PL_OK) {
        pl_data_bad(fault, -1, "the chat template refuses it: %.150s", why.msg);
        return PL_EFORMAT;
    }
    for (size_t i = 0; i < r->n_pieces; i++)
        r->n += r->pieces[i].n;
    if (r->n_pieces > 0)
        r->text = r->pieces[0].s;
    return PL_OK;
}

static void rendered_fini(struct rendered *r)
{
    pl_arena_free(r->arena);
}

static size_t common(const struct rendered *a, const struct rendered *b)
{
    size_t n = 0;
    while (n < a->n && n < b->n && a->text[n] == b->text[n])
        n++;
    return n;
}

/* Hands an example over, cut to size. *any: it had a token with loss. */
static void give(struct pl_data_encoder *e, struct pl_ids *ids, uint8_t *loss, bool *any)
{
    struct pl_data_report *r = e->report;
    struct pl_example x = {.ids = ids->v, .loss = loss, .n = (uint32_t)ids->n, .line = e->line};
    uint32_t n_loss = 0;
    if (x.n > r->longest)
        r->longest = x.n;
    if (e->o->max_length > 0 && x.n > e->o->max_length) {
        x.n = e->o->max_length;
        r->n_cut++;
    }
    for (uint32_t i = 0; i < x.n; i++)
        n_loss += loss[i];
    *any = n_loss > 0;
    if (!*any)
        return;
    r->n_tokens += x.n;
    r->n_loss_tokens += n_loss;
    if (e->visit != NULL && !e->stopped)
        e->stopped = !e->visit(e->arg, &x);
}

static pl_status nothing_left(struct pl_data_encoder *e, struct pl_data_fault *fault)
{
    pl_data_bad(fault, -1, "no token with loss is left in the first %u tokens: raise max_length, or shorten the example", e->o->max_length);
    return PL_EFORMAT;
}

/* Where in text each token begins. SentencePiece puts a space before the text, the tokenizer a BOS. */
static bool align(const struct pl_tok *tok, const struct pl_ids *ids, const char *text, size_t n, size_t *starts)
{
    size_t at = 0;
    for (size_t i = 0; i < ids->n; i++) {
        size_t width;
        const char *s = pl_tok_bytes(tok, ids->v[i], true, &width);
        starts[i] = at;
        if (width <= n - at && memcmp(text + at, s, width) == 0)
            at += width;
        else if (width > 0 && s[0] == ' ' && width - 1 <= n - at && memcmp(text + at, s + 1, width - 1) == 0)
            at += width - 1;
        else if (i > 0 || ids->v[i] != pl_tok_bos(tok))
            return false;
    }
    return at == n;
}

static pl_status append_eos(const struct pl_tok *tok, struct pl_ids *ids, struct pl_err *err)
{
    if (pl_tok_eos(tok) < 0)
        return PL_OK;
    int32_t *v = realloc(ids->v, (ids->n + 1) * sizeof *v);
    if (v == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    v[ids->n++] = pl_tok_eos(tok);
    ids->v = v;
    ids->cap = ids->n;
    return PL_OK;
}

/* Marks the tokens that begin in s up to the first end of a generation. True when there was one. */
static bool mark(const struct pl_tok *tok, const struct pl_ids *ids, const size_t *starts, struct span s, uint8_t *loss)
{
    for (size_t i = 1; i < ids->n; i++) {
        if (starts[i] < s.from || starts[i] >= s.to)
            continue;
        loss[i] = 1;
        if (pl_tok_is_eog(tok, ids->v[i]))
            return true;
    }
    return false;
}

/* Tokens of pieces with borders where spans marked in cut begin. */
static pl_status encode_parts(const struct pl_tok *tok, const struct pl_piece *pieces, size_t n_pieces, unsigned flags, const struct span *spans,
                              const bool *cut, size_t n_spans, struct pl_ids *ids, struct pl_err *err)
{
    struct pl_piece *part = malloc((n_pieces + 1) * sizeof *part);
    if (part == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    pl_status st = PL_OK;
    size_t at = 0, k = 0, inside = 0; /* bytes before; piece, and how much of it is done */
    for (size_t i = 0; i <= n_spans && st == PL_OK; i++) {
        if (i < n_spans && !cut[i])
            continue;
        const size_t to = i < n_spans ? spans[i].from : SIZE_MAX;
        size_t n = 0;
        while (k < n_pieces && at < to) {
            const size_t left = pieces[k].n - inside, take = left < to - at ? left : to - at;
            part[n++] = (struct pl_piece){pieces[k].s + inside, take, pieces[k].trusted};
            at += take;
            inside = take == left ? 0 : inside + take;
            k += take == left;
        }
        st = pl_tok_encode_pieces(tok, part, n, flags, 0, ids, err);
        flags &= ~(unsigned)PL_TOK_BOS;
    }
    free(part);
    return st;
}

/* The same, so that the tokens of each span are those that follow its prompt: where a token of the whole would reach over the border, as it
 * can when the prompt ends in a space, the text is cut there. *starts: free(). */
static pl_status encode_spans(struct pl_data_encoder *e, const struct pl_piece *pieces, size_t n_pieces, const char *text, size_t n, unsigned flags,
                              const struct span *spans, size_t n_spans, struct pl_ids *ids, size_t **starts, struct pl_data_fault *fault)
{
    const struct pl_tok *tok = e->o->tok;
    bool *cut = calloc(n_spans + 1, sizeof *cut), again = false;
    pl_status st = cut != NULL ? PL_OK : pl_fail(e->err, PL_ENOMEM, "out of memory");
    do {
        ids->n = 0;
        free(*starts);
        *starts = NULL;
        if (st == PL_OK)
            st = encode_parts(tok, pieces, n_pieces, flags, spans, cut, n_spans, ids, e->err);
        if (st == PL_OK && (*starts = malloc((ids->n + 1) * sizeof **starts)) == NULL)
            st = pl_fail(e->err, PL_ENOMEM, "out of memory");
        if (st == PL_OK && !align(tok, ids, text, n, *starts)) {
            pl_data_bad(fault, -1, "its text has characters that the model's vocabulary cannot write");
            st = PL_EFORMAT;
        }
        bool more = false;
        for (size_t s = 0, i = 0; s < n_spans && st == PL_OK && !again; s++) {
            while (i < ids->n && (*starts)[i] < spans[s].from)
                i++;
            cut[s] = i < ids->n && (*starts)[i] > spans[s].from;
            more = more || cut[s];
        }
        again = more;
    } while (again && st == PL_OK);
    free(cut);
    return st;
}

/* Tokens of pieces, with loss on the spans; everywhere when n_spans is 0. end: EOS when no token of the last span ends a generation,
 * or (n_spans 0) always. */
static pl_status encode(struct pl_data_encoder *e, const struct pl_piece *pieces, size_t n_pieces, const char *text, size_t n, unsigned flags,
                        const struct span *spans, size_t n_spans, bool end, bool *any, struct pl_data_fault *fault)
{
    const struct pl_tok *tok = e->o->tok;
    struct pl_ids ids = {0};
    size_t *starts = NULL;
    uint8_t *loss = NULL;
    bool closed = false;
    pl_status st = n_spans > 0 ? encode_spans(e, pieces, n_pieces, text, n, flags, spans, n_spans, &ids, &starts, fault)
                               : pl_tok_encode_pieces(tok, pieces, n_pieces, flags, 0, &ids, e->err);
    if (st == PL_OK && (loss = calloc(ids.n + 2, 1)) == NULL)
        st = pl_fail(e->err, PL_ENOMEM, "out of memory");
    if (st != PL_OK)
        goto out;
    if (n_spans == 0 && ids.n > 0)
        memset(loss + 1, 1, ids.n - 1);
    for (size_t i = 0; i < n_spans; i++)
        closed = mark(tok, &ids, starts, spans[i], loss);
    const size_t before = ids.n;
    if (end && !closed && (st = append_eos(tok, &ids, e->err)) != PL_OK)
        goto out;
    if (ids.n > before && before > 0)
        loss[before] = 1;
    give(e, &ids, loss, any);
out:
    pl_ids_fini(&ids);
    free(starts);
    free(loss);
    return st;
}

/* ---- chats --------------------------------------------------------------------------------------------------------- */

static bool counts(const struct pl_data_encoder *e, const bool *trained, size_t n, size_t i)
{
    if (e->o->train_on == PL_TRAIN_ON_LAST)
        for (size_t k = i + 1; k < n; k++)
            if (trained[k])
                return false;
    return trained[i];
}

/* The turn of message i. *apart: what follows changes how the template writes it, so that it must be an example of its own, which is
 * left in *turn. */
static pl_status find_turn(struct pl_data_encoder *e, const struct pl_chat_message *m, size_t i, const struct rendered *whole, struct span *s,
                           bool *apart, struct rendered *turn, struct pl_data_fault *fault)
{
    struct rendered prompt;
    pl_status st = render(&prompt, e, m, i, true, fault);
    *turn = (struct rendered){0};
    if (st == PL_OK)
        st = render(turn, e, m, i + 1, false, fault);
    if (st == PL_OK) {
        *s = (struct span){common(&prompt, turn), turn->n};
        *apart = common(turn, whole) < turn->n;
        if (s->from >= s->to) {
            pl_data_bad(fault, (int)i, "the chat template writes nothing for it: nothing would be trained");
            st = PL_EFORMAT;
        }
    }
    rendered_fini(&prompt);
    return st;
}

static pl_status encode_rendered(struct pl_data_encoder *e, const struct rendered *r, const struct span *spans, size_t n, bool *any,
                                 struct pl_data_fault *fault)
{
    const bool end = n == 0 || spans[n - 1].to == r->n;
    return encode(e, r->pieces, r->n_pieces, r->text, r->n, PL_TOK_SPECIAL | PL_TOK_BOS, spans, n, end && n > 0, any, fault);
}

static pl_status encode_chat(struct pl_data_encoder *e, const struct pl_chat_message *m, size_t n, const bool *trained, struct pl_data_fault *fault)
{
    struct rendered whole, turn = {0};
    struct span *spans = malloc(n * sizeof *spans);
    size_t n_spans = 0;
    bool any = false;
    uint32_t n_given = 0;
    pl_status st = render(&whole, e, m, n, false, fault);
    if (st == PL_OK && spans == NULL)
        st = pl_fail(e->err, PL_ENOMEM, "out of memory");
    if (st == PL_OK && e->o->train_on == PL_TRAIN_ON_ALL) {
        st = encode_rendered(e, &whole, NULL, 0, &any, fault);
        n_given = any;
        goto out;
    }
    for (size_t i = 0; i < n && st == PL_OK; i++) {
        bool apart = false;
        struct span s;
        if (!counts(e, trained, n, i))
            continue;
        st = find_turn(e, m, i, &whole, &s, &apart, &turn, fault);
        if (st == PL_OK && apart) {
            st = encode_rendered(e, &turn, &s, 1, &any, fault);
            n_given += st == PL_OK && any;
        } else if (st == PL_OK) {
            spans[n_spans++] = s;
        }
        rendered_fini(&turn);
    }
    if (st == PL_OK && n_spans > 0) {
        st = encode_rendered(e, &whole, spans, n_spans, &any, fault);
        n_given += st == PL_OK && any;
    }
out:
    rendered_fini(&whole);
    free(spans);
    if (st == PL_OK && n_given == 0)
        return nothing_left(e, fault);
    e->report->n_examples += st == PL_OK ? n_given - 1 : 0; /* the line itself is counted by the caller */
    return st;
}

/* ---- the other forms ----------------------------------------------------------------------------------------------- */

static pl_status encode_pair(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault)
{
    struct pl_data_opts last = *e->o;
    struct pl_data_encoder both = *e;
    last.train_on = PL_TRAIN_ON_LAST;
    both.o = &last;
    pl_status st = PL_OK;
    for (size_t i = 0; i < 2 && st == PL_OK; i++) {
        l->messages[l->n_messages] = l->output[i];
        l->trained[l->n_messages] = true;
        st = encode_chat(&both, l->messages, l->n_messages + 1, l->trained, fault);
    }
    e->stopped = both.stopped;
    return st;
}

static pl_status encode_completion(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault)
{
    const struct pl_piece pieces[] = {{l->prompt.s, l->prompt.n, false}, {l->completion.s, l->completion.n, false}};
    const size_t n = l->prompt.n + l->completion.n;
    const struct span completion = {l->prompt.n, n};
    const bool all = e->o->method == PL_METHOD_PRETRAIN || e->o->train_on == PL_TRAIN_ON_ALL;
    bool any = false;
    char *text = malloc(n + 1);
    if (text == NULL)
        return pl_fail(e->err, PL_ENOMEM, "out of memory");
    memcpy(text, l->prompt.s, l->prompt.n);
    memcpy(text + l->prompt.n, l->completion.s, l->completion.n);
    const pl_status st = encode(e, pieces, 2, text, n, PL_TOK_BOS, &completion, all ? 0 : 1, true, &any, fault);
    free(text);
    return st == PL_OK && !any ? nothing_left(e, fault) : st;
}

/* Cut into pieces of max_length, each beginning with the last token of the one before. */
static pl_status encode_text(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault)
{
    struct pl_ids ids = {0};
    pl_status st = pl_tok_encode(e->o->tok, l->completion.s, l->completion.n, PL_TOK_BOS, 0, &ids, e->err);
    if (st == PL_OK)
        st = append_eos(e->o->tok, &ids, e->err);
    uint8_t *loss = st == PL_OK ? malloc(ids.n + 1) : NULL;
    if (st == PL_OK && loss == NULL)
        st = pl_fail(e->err, PL_ENOMEM, "out of memory");
    if (st == PL_OK) {
        struct pl_data_report *r = e->report;
        const size_t step = e->o->max_length > 0 ? e->o->max_length : ids.n > 1 ? ids.n : 2;
        memset(loss, 1, ids.n + 1);
        if (ids.n > r->longest)
            r->longest = (uint32_t)ids.n;
        if (ids.n < 2) {
            pl_data_bad(fault, -1, "'text' has no second token: nothing would be trained");
            st = PL_EFORMAT;
        }
        const uint32_t longest = r->longest;
        for (size_t at = 0; at + 1 < ids.n && st == PL_OK; at += step - 1) {
            struct pl_ids piece = {.v = ids.v + at, .n = ids.n - at < step ? ids.n - at : step};
            bool any;
            loss[at] = 0;
            give(e, &piece, loss + at, &any);
            loss[at] = 1;
            r->n_examples++;
        }
        r->n_examples -= st == PL_OK; /* the line itself is counted by the caller */
        r->longest = longest;
    }
    free(loss);
    pl_ids_fini(&ids);
    return st;
}

pl_status pl_data_encode(struct pl_data_encoder *e, const struct pl_data_line *l, struct pl_data_fault *fault)
{
    if ((l->form == PL_DATA_CHAT || l->form == PL_DATA_PREFERENCE) && e->o->chat == NULL) {
        pl_data_bad(fault, -1, "the model has no chat template: use prompt/completion pairs, or give the server a --chat-template");
        return PL_EFORMAT;
    }
    switch (l->form) {
    case PL_DATA_CHAT: return encode_chat(e, l->messages, l->n_messages, l->trained, fault);
    case PL_DATA_PREFERENCE: return encode_pair(e, l, fault);
    case PL_DATA_COMPLETION: return encode_completion(e, l, fault);
    default: return encode_text(e, l, fault);
    }
}
