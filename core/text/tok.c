/* tok: text to token ids and back. Encoding and decoding on top of tok_bpe and tok_spm; tok_load.c fills the tables.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/tok.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/text/tok_int.h"

void pl_ids_fini(struct pl_ids *ids)
{
    free(ids->v);
    *ids = (struct pl_ids){0};
}

pl_status pl_ids_push(struct pl_ids *ids, int32_t id)
{
    if (ids->n == ids->cap) {
        size_t cap = ids->cap ? 2 * ids->cap : 64;
        int32_t *v = cap > ids->cap && cap < SIZE_MAX / sizeof *v ? realloc(ids->v, cap * sizeof *v) : NULL;
        if (v == NULL)
            return PL_ENOMEM;
        ids->v = v;
        ids->cap = cap;
    }
    ids->v[ids->n++] = id;
    return PL_OK;
}

/* ---- special tokens ------------------------------------------------------------------------------------------------ */

/* The first of special[lo, hi), which agree in their first `depth` bytes and are longer, whose next byte is at least c. */
static size_t lower_bound(const struct pl_tok *t, size_t lo, size_t hi, size_t depth, unsigned c)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2, len;
        if ((unsigned char)pl_tok_text(t, t->special[mid], &len)[depth] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

int32_t pl_tok_special_at(const struct pl_tok *t, const char *s, size_t n, size_t n_control, bool user)
{
    size_t lo = 0, hi = t->n_special, best_len = 0;
    int32_t best = -1;
    for (size_t depth = 0; lo < hi; depth++) {
        for (size_t len; lo < hi && (pl_tok_text(t, t->special[lo], &len), len == depth); lo++) {
            bool counts = t->type[t->special[lo]] == PL_TOK_USER ? user : depth <= n_control;
            if (counts && depth > best_len) { /* the first of equal ones */
                best = t->special[lo];
                best_len = depth;
            }
        }
        if (depth == n)
            break;
        unsigned c = (unsigned char)s[depth];
        lo = lower_bound(t, lo, hi, depth, c);
        hi = lower_bound(t, lo, hi, depth, c + 1);
    }
    return best;
}

/* ---- encoding ------------------------------------------------------------------------------------------------------ */

/* The joined text, and where it may hold special tokens. */
struct source {
    char *s;
    size_t n;
    size_t *trusted; /* [n_runs][2]: from, to of each run of trusted text, ascending */
    size_t n_runs;
};

/* How many bytes of trusted text there are from `at` on. *run only moves forward, as `at` does. */
static size_t trusted_bytes(const struct source *src, size_t *run, size_t at)
{
    while (*run < src->n_runs && src->trusted[2 * *run + 1] <= at)
        (*run)++;
    return *run < src->n_runs && src->trusted[2 * *run] <= at ? src->trusted[2 * *run + 1] - at : 0;
}

/* The special token at `at` that splits the text, -1 = none. Control tokens count only inside a trusted run. SentencePiece
 * finds user-defined tokens itself, as they are no border there. */
static int32_t special_at(const struct pl_tok *t, const struct source *src, size_t *run, size_t at)
{
    if (!t->special_start[(unsigned char)src->s[at]])
        return -1;
    return pl_tok_special_at(t, src->s + at, src->n - at, trusted_bytes(src, run, at), !t->spm);
}

/* Ordinary text in SentencePiece's form: a space in front, and U+2581, which stands for one in its files, as a space. */
static pl_status encode_spm(const struct pl_tok *t, const char *s, size_t n, size_t max, struct pl_ids *ids)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    if (t->space_prefix)
        pl_buf_addc(&b, ' ');
    for (size_t i = 0; i < n;) {
        bool space = n - i >= 3 && memcmp(s + i, "\xe2\x96\x81", 3) == 0;
        pl_buf_addc(&b, space ? ' ' : s[i]);
        i += space ? 3 : 1;
    }
    pl_status st = b.failed ? PL_ENOMEM : pl_tok_spm(t, pl_buf_str(&b), b.len, max, ids);
    pl_buf_fini(&b);
    return st;
}

static pl_status encode_source(const struct pl_tok *t, const struct source *src, size_t max, struct pl_ids *ids)
{
    size_t done = 0, run = 0;
    pl_status st = PL_OK;
    for (size_t at = 0; at <= src->n && st == PL_OK; at++) {
        int32_t id = at < src->n ? special_at(t, src, &run, at) : -1;
        if (id < 0 && at < src->n)
            continue;
        if (at > done)
            st = t->spm ? encode_spm(t, src->s + done, at - done, max, ids) : pl_tok_bpe(t, src->s + done, at - done, max, ids);
        if (st == PL_OK && id >= 0) {
            size_t n;
            (void)pl_tok_text(t, id, &n);
            st = pl_ids_push(ids, id);
            at += n - 1;
            done = at + 1;
        }
    }
    return st;
}

static pl_status finish(pl_status st, size_t max, size_t n, struct pl_err *err)
{
    if (st == PL_OK && max > 0 && n > max)
        st = PL_ETOOLONG;
    if (st == PL_ETOOLONG)
        return pl_fail(err, PL_ETOOLONG, "the text has more than %zu tokens", max);
    if (st == PL_ERANGE)
        return pl_fail(err, PL_EINVAL, "the text has more than %d KiB of letters, of blanks or of signs with nothing else between them: break them up",
                       PL_TOK_MAX_WORD >> 10);
    return st == PL_OK ? PL_OK : pl_fail(err, st, "tokenizing: %s", pl_status_text(st));
}

pl_status pl_tok_encode_pieces(const struct pl_tok *t, const struct pl_piece *pieces, size_t n_pieces, unsigned flags, size_t max,
                               struct pl_ids *ids, struct pl_err *err)
{
    struct source src = {.trusted = calloc(2 * n_pieces + 2, sizeof(size_t))};
    struct pl_buf text;
    size_t first = ids->n;
    pl_buf_init(&text, 0);
    for (size_t i = 0; i < n_pieces && src.trusted != NULL; i++) {
        size_t from = text.len;
        pl_buf_add(&text, pieces[i].s, pieces[i].n);
        if (!pieces[i].trusted || pieces[i].n == 0)
            continue;
        if (src.n_runs > 0 && src.trusted[2 * src.n_runs - 1] == from)
            src.trusted[2 * src.n_runs - 1] = text.len;
        else {
            src.trusted[2 * src.n_runs] = from;
            src.trusted[2 * src.n_runs++ + 1] = text.len;
        }
    }
    if (!(flags & PL_TOK_SPECIAL))
        src.n_runs = 0;
    pl_status st = text.failed || src.trusted == NULL ? PL_ENOMEM : PL_OK;
    src.s = text.data;
    src.n = text.len;
    if (st == PL_OK && (flags & PL_TOK_BOS) && t->add_bos && t->bos >= 0) {
        size_t n;
        const char *bos = pl_tok_text(t, t->bos, &n);
        bool there = src.n_runs > 0 && src.trusted[0] == 0 && src.trusted[1] >= n && memcmp(src.s, bos, n) == 0;
        if (!there)
            st = pl_ids_push(ids, t->bos);
    }
    if (st == PL_OK && src.n > 0)
        st = encode_source(t, &src, max > 0 ? first + max : 0, ids);
    pl_buf_fini(&text);
    free(src.trusted);
    return finish(st, max, ids->n - first, err);
}

pl_status pl_tok_encode(const struct pl_tok *t, const char *s, size_t n, unsigned flags, size_t max, struct pl_ids *ids,
                        struct pl_err *err)
{
    struct pl_piece piece = {s, n, true};
    return pl_tok_encode_pieces(t, &piece, 1, flags, max, ids, err);
}

/* ---- decoding ------------------------------------------------------------------------------------------------------ */

const char *pl_tok_bytes(const struct pl_tok *t, int32_t id, bool special, size_t *n)
{
    *n = 0;
    if (id < 0 || id >= t->n || (!special && (t->type[id] == PL_TOK_CONTROL || t->type[id] == PL_TOK_UNKNOWN)))
        return "";
    return pl_tok_text(t, id, n);
}

void pl_tok_decode(const struct pl_tok *t, const int32_t *ids, size_t n, bool special, struct pl_buf *out)
{
    bool at_start = t->spm && t->space_prefix;
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *s = pl_tok_bytes(t, ids[i], special, &len);
        if (at_start && len > 0 && !pl_tok_is_control(t, ids[i])) {
            size_t skip = s[0] == ' ';
            pl_buf_add(out, s + skip, len - skip);
            at_start = false;
        } else {
            pl_buf_add(out, s, len);
        }
    }
}

int32_t pl_tok_count(const struct pl_tok *t)
{
    return t->n;
}

int32_t pl_tok_bos(const struct pl_tok *t)
{
    return t->bos;
}

int32_t pl_tok_eos(const struct pl_tok *t)
{
    return t->eos;
}

bool pl_tok_adds_bos(const struct pl_tok *t)
{
    return t->add_bos;
}

bool pl_tok_is_eog(const struct pl_tok *t, int32_t id)
{
    return id >= 0 && id < t->n && t->eog[id];
}

bool pl_tok_is_control(const struct pl_tok *t, int32_t id)
{
    return id >= 0 && id < t->n && t->type[id] == PL_TOK_CONTROL;
}

int32_t pl_tok_find(const struct pl_tok *t, const char *text, size_t n)
{
    int32_t id = n > 0 ? pl_tok_special_at(t, text, n, n, true) : -1;
    size_t len;
    if (id >= 0 && (pl_tok_text(t, id, &len), len == n))
        return id;
    return pl_tok_map_find(t, text, n);
}
