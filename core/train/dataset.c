/* dataset: training files (JSONL) as token sequences with loss masks: lines, report, and what is kept.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/dataset.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/json.h"
#include "core/base/utf8.h"
#include "core/train/dataset_int.h"

static const char *const form_names[] = {
    [PL_DATA_NONE] = "unknown",           [PL_DATA_CHAT] = "fine-tune-chat", [PL_DATA_COMPLETION] = "fine-tune-completion",
    [PL_DATA_PREFERENCE] = "fine-tune-preference", [PL_DATA_TEXT] = "fine-tune-text",
};

const char *pl_data_form_name(pl_data_form f)
{
    return form_names[f];
}

void pl_data_report_fini(struct pl_data_report *r)
{
    free(r->faults);
    *r = (struct pl_data_report){0};
}

static void note(struct pl_data_report *r, const struct pl_data_fault *f)
{
    r->n_bad++;
    if (r->n_faults == PL_DATA_MAX_FAULTS)
        return;
    if ((r->n_faults & (r->n_faults - 1)) == 0) /* 0, 1, 2, 4, … */
        r->faults = pl_xrealloc(r->faults, (r->n_faults == 0 ? 1 : 2 * (size_t)r->n_faults) * sizeof *r->faults);
    r->faults[r->n_faults++] = *f;
}

void pl_data_describe(const struct pl_data_report *r, char *out, size_t n)
{
    size_t at = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < r->n_faults; i++) {
        char one[280];
        const struct pl_data_fault *f = &r->faults[i];
        const int len = f->message >= 0 ? snprintf(one, sizeof one, "%sExample %u, message %d %s", i > 0 ? ". " : "", f->line, f->message + 1, f->reason)
                                        : snprintf(one, sizeof one, "%sExample %u: %s", i > 0 ? ". " : "", f->line, f->reason);
        if (at + (size_t)len + 40 > n) {
            snprintf(out + at, n - at, "%s%u more bad line(s)", i > 0 ? ", and " : "", r->n_bad - i);
            return;
        }
        strcpy(out + at, one);
        at += (size_t)len;
    }
    if (r->n_bad > r->n_faults)
        snprintf(out + at, n - at, ", and %u more bad line(s)", r->n_bad - r->n_faults);
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

struct scan {
    const struct pl_data_opts *o;
    struct pl_data_report *r;
    struct pl_data_encoder e;
};

static bool is_object_line(const char *line, size_t n, struct pl_data_fault *f)
{
    const size_t skip = strspn(line, " \t");
    if (memchr(line, '\0', n) != NULL)
        return pl_data_bad(f, -1, "the line has a NUL byte");
    if (!pl_utf8_valid(line, n))
        return pl_data_bad(f, -1, "the line is not UTF-8");
    if (line[skip] != '{') {
        size_t head = strlen(line + skip) < 20 ? strlen(line + skip) : 20;
        head -= pl_utf8_tail(line + skip, head);
        return pl_data_bad(f, -1, "the line is not a dictionary (HINT: line starts with: \"%.*s...\")", (int)head, line + skip);
    }
    return true;
}

static bool fits_method(struct scan *s, pl_data_form form, struct pl_err *err)
{
    static const char *const wanted[] = {[PL_DATA_CHAT] = "supervised", [PL_DATA_COMPLETION] = "supervised' or 'pretrain",
                                         [PL_DATA_PREFERENCE] = "dpo", [PL_DATA_TEXT] = "pretrain"};
    static const unsigned methods[] = {[PL_DATA_CHAT] = 1 << PL_METHOD_SUPERVISED,
                                       [PL_DATA_COMPLETION] = 1 << PL_METHOD_SUPERVISED | 1 << PL_METHOD_PRETRAIN,
                                       [PL_DATA_PREFERENCE] = 1 << PL_METHOD_DPO,
                                       [PL_DATA_TEXT] = 1 << PL_METHOD_PRETRAIN};
    if ((s->o->tok == NULL && s->o->text == NULL) || (methods[form] >> s->o->method & 1) != 0)
        return true;
    (void)pl_fail(err, PL_EFORMAT, "The file is in the %s format, but the specified fine-tuning job is not using '%s' as the training method "
                  "(provided method=%s)", form_names[form], wanted[form], pl_train_method_name(s->o->method));
    return false;
}

static pl_status give_text(const struct scan *s, const struct pl_data_line *l, struct pl_err *err)
{
    const size_t n = l->prompt.n + l->completion.n;
    char *text = malloc(n + 1);
    if (text == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    if (l->prompt.n > 0)
        memcpy(text, l->prompt.s, l->prompt.n);
    memcpy(text + l->prompt.n, l->completion.s, l->completion.n);
    const pl_status st = s->o->text(s->o->text_arg, text, n);
    free(text);
    return st == PL_OK ? PL_OK : pl_fail(err, st, "%s", pl_status_text(st));
}

/* PL_EFORMAT = the file as a whole cannot be used; a bad line is noted and PL_OK. */
static pl_status take_line(struct scan *s, char *line, size_t n, uint32_t number, struct pl_err *err)
{
    struct pl_data_fault f = {.line = number, .message = -1};
    struct pl_data_line l;
    struct pl_err why = {0};
    json_t *root = NULL;
    struct pl_arena *a = NULL;
    pl_status st = PL_OK;
    bool good = is_object_line(line, n, &f);
    if (good && pl_json_read(&root, "the line", line, n, &why) != PL_OK)
        good = pl_data_bad(&f, -1, "%.190s", why.msg);
    if (good) {
        a = pl_arena_new(0);
        good = a != NULL ? pl_data_parse(&l, root, a, &f) : pl_data_bad(&f, -1, "out of memory");
    }
    if (good && s->r->form == PL_DATA_NONE) {
        s->r->form = l.form;
        if (!fits_method(s, l.form, err))
            st = PL_EFORMAT;
    }
    if (good && st == PL_OK && s->r->form != l.form)
        good = pl_data_bad(&f, -1, "it is in the %s format, but the lines before are in the %s format", form_names[l.form], form_names[s->r->form]);
    if (good && st == PL_OK && s->o->tok != NULL) {
        s->e.line = number;
        const pl_status encoded = s->o->prompt_limit > 0 ? pl_data_encode_question(&s->e, &l, &f) : pl_data_encode(&s->e, &l, &f);
        good = encoded != PL_EFORMAT;
        st = good ? encoded : PL_OK;
    } else if (good && st == PL_OK && s->o->text != NULL) {
        st = give_text(s, &l, err);
    }
    s->r->n_lines++;
    if (good)
        s->r->n_examples++;
    else
        note(s->r, &f);
    pl_arena_free(a);
    json_decref(root);
    return st;
}

/* Reads a line of at most PL_DATA_MAX_LINE bytes; of a longer one only that much is kept. -1 = end of file. */
static ssize_t next_line(FILE *in, char *line, bool *too_long)
{
    size_t n = 0;
    int c;
    *too_long = false;
    while ((c = getc_unlocked(in)) != EOF && c != '\n') {
        if (n < PL_DATA_MAX_LINE)
            line[n++] = (char)c;
        else
            *too_long = true;
    }
    if (c == EOF && n == 0)
        return -1;
    n -= n > 0 && line[n - 1] == '\r';
    line[n] = '\0';
    return (ssize_t)n;
}

static pl_status scan_lines(struct scan *s, FILE *in, char *line, struct pl_err *err)
{
    bool too_long;
    ssize_t n;
    pl_status st = PL_OK;
    for (uint32_t number = 1; st == PL_OK && !s->e.stopped && (n = next_line(in, line, &too_long)) >= 0; number++) {
        struct pl_data_fault f = {.line = number, .message = -1};
        char *from = line;
        if (s->o->stop != NULL && atomic_load_explicit(s->o->stop, memory_order_relaxed))
            return pl_fail(err, PL_ESTOPPED, "the server is shutting down");
        if (number == 1 && n >= 3 && memcmp(line, "\xef\xbb\xbf", 3) == 0) /* a byte order mark */
            from += 3, n -= 3;
        if (too_long) {
            pl_data_bad(&f, -1, "the line is longer than %d MiB", PL_DATA_MAX_LINE >> 20);
            s->r->n_lines++;
            note(s->r, &f);
        } else if (strspn(from, " \t") < (size_t)n) { /* blank lines are passed over */
            st = take_line(s, from, (size_t)n, number, err);
        }
    }
    return st;
}

static pl_status verdict(const struct scan *s, struct pl_err *err)
{
    const struct pl_data_report *r = s->r;
    const char *which = s->o->min_examples > 1 ? "Training" : "Validation";
    if (r->n_bad > 0) {
        char lines[400];
        pl_data_describe(r, lines, sizeof lines);
        return pl_fail(err, PL_EFORMAT, "Invalid file format. %s", lines);
    }
    const uint32_t least = r->form == PL_DATA_TEXT || s->o->min_examples == 0 ? 1 : s->o->min_examples;
    if (r->n_examples < least)
        return pl_fail(err, PL_ERANGE, "%s file has %u example(s), but must have at least %u example%s", which, r->n_examples, least,
                       least == 1 ? "" : "s");
    return PL_OK;
}

pl_status pl_data_scan(const char *path, const struct pl_data_opts *o, pl_data_visit *visit, void *arg, struct pl_data_report *r,
                       struct pl_err *err)
{
    struct scan s = {.o = o, .r = r, .e = {.o = o, .report = r, .visit = visit, .arg = arg, .err = err}};
    *r = (struct pl_data_report){0};
    FILE *in = fopen(path, "re");
    char *line = malloc(PL_DATA_MAX_LINE + 2);
    pl_status st;
    if (in == NULL)
        st = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    else if (line == NULL)
        st = pl_fail(err, PL_ENOMEM, "out of memory");
    else
        st = scan_lines(&s, in, line, err);
    if (st == PL_OK && ferror(in))
        st = pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    if (in != NULL)
        fclose(in);
    free(line);
    if (st != PL_OK || s.e.stopped)
        return st;
    return verdict(&s, err);
}

/* ---- keeping ------------------------------------------------------------------------------------------------------- */

struct keeper {
    struct pl_dataset *d;
    uint32_t cap;
    bool failed;
};

static bool keep(void *arg, const struct pl_example *e)
{
    struct keeper *k = arg;
    struct pl_dataset *d = k->d;
    if (d->n == k->cap) {
        const uint32_t cap = k->cap == 0 ? 64 : 2 * k->cap;
        struct pl_example *all = realloc(d->examples, cap * sizeof *all);
        if (all == NULL)
            return !(k->failed = true);
        d->examples = all;
        k->cap = cap;
    }
    struct pl_example *x = &d->examples[d->n];
    x->ids = malloc(e->n * sizeof *x->ids + e->n); /* the mask lies behind the tokens */
    if (x->ids == NULL)
        return !(k->failed = true);
    x->loss = (uint8_t *)(x->ids + e->n);
    memcpy(x->ids, e->ids, e->n * sizeof *x->ids);
    memcpy(x->loss, e->loss, e->n);
    x->n = e->n;
    x->line = e->line;
    x->n_left_out = e->n_left_out;
    d->n++;
    return true;
}

pl_status pl_dataset_read(struct pl_dataset **out, const char *path, const struct pl_data_opts *o, struct pl_data_report *r, struct pl_err *err)
{
    struct keeper k = {.d = pl_xcalloc(1, sizeof *k.d)};
    pl_status st = pl_data_scan(path, o, keep, &k, r, err);
    if (st == PL_OK && k.failed)
        st = pl_fail(err, PL_ENOMEM, "no memory for the %u examples of %s", r->n_examples, path);
    if (st != PL_OK) {
        pl_dataset_free(k.d);
        return st;
    }
    k.d->pairs = r->form == PL_DATA_PREFERENCE;
    k.d->n_tokens = r->n_tokens;
    k.d->n_loss_tokens = r->n_loss_tokens;
    *out = k.d;
    return PL_OK;
}

pl_status pl_dataset_from_text(struct pl_dataset **out, const char *text, size_t n, const struct pl_data_opts *o, struct pl_err *err)
{
    struct keeper k = {.d = pl_xcalloc(1, sizeof *k.d)};
    struct pl_data_report r = {.form = PL_DATA_TEXT};
    struct pl_data_encoder e = {.o = o, .report = &r, .line = 1, .visit = keep, .arg = &k, .err = err};
    const struct pl_data_line l = {.form = PL_DATA_TEXT, .completion = {text, n}};
    struct pl_data_fault fault;
    pl_status st = pl_data_encode(&e, &l, &fault);
    if (st == PL_EFORMAT)
        st = pl_fail(err, PL_EFORMAT, "%s", fault.reason);
    else if (st == PL_OK && k.failed)
        st = pl_fail(err, PL_ENOMEM, "no memory for a text of %zu bytes", n);
    k.d->n_tokens = r.n_tokens;
    k.d->n_loss_tokens = r.n_loss_tokens;
    if (st == PL_OK)
        *out = k.d;
    else
        pl_dataset_free(k.d);
    return st;
}

uint32_t pl_data_prompt(const struct pl_example *e)
{
    uint32_t at = e->n;
    while (at > 0 && e->loss[at - 1] == 0)
        at--;
    while (at > 0 && e->loss[at - 1] != 0)
        at--;
    return at;
}

void pl_dataset_free(struct pl_dataset *d)
{
    if (d == NULL)
        return;
    for (uint32_t i = 0; i < d->n; i++)
        free(d->examples[i].ids);
    free(d->examples);
    free(d);
}
