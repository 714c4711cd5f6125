/* pretok: cuts text into the fragments inside which byte pairs may be merged, by the pre-tokenizer that a GGUF file names.
 * The patterns are those that the models' own tokenizer files publish; white space is spelled out as Unicode's
 * White_Space because PCRE2's \s differs from it in a few characters.
 * SPDX-License-Identifier: Apache-2.0 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/utf8.h"
#include "core/text/tok_int.h"

#define SPACE "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define S "[" SPACE "]"
#define NOT_S "[^" SPACE "]"
#define TAIL S "+(?!" NOT_S ")|" S "+"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|" TAIL
#define LLAMA3(digits)                                                                                                 \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|" S \
    "*[\\r\\n]+|" TAIL

enum { MAX_STAGES = 2 };

/* Each stage cuts the fragments of the one before. */
static const struct {
    const char *name;
    const char *stages[MAX_STAGES];
    bool ignore_merges;
} known[] = {
    {"gpt-2", {GPT2}, false},
    {"default", {GPT2}, false},
    {"phi-2", {GPT2}, false},
    {"olmo", {GPT2}, false},
    {"jais", {GPT2}, false},
    {"mpt", {GPT2}, false},
    {"smollm", {"\\p{N}", GPT2}, false},
    {"starcoder", {"\\p{N}", GPT2}, false},
    {"refact", {"\\p{N}", GPT2}, false},
    {"command-r", {"\\p{N}", GPT2}, false},
    {"codeshell", {"\\p{N}", GPT2}, false},
    {"exaone", {"\\p{N}", GPT2}, false},
    {"minerva-7b", {"\\p{N}", GPT2}, false},
    {"llama-bpe", {LLAMA3("{1,3}")}, true},
    {"llama3", {LLAMA3("{1,3}")}, true},
    {"llama-v3", {LLAMA3("{1,3}")}, true},
    {"falcon3", {LLAMA3("{1,3}")}, true},
    {"dbrx", {LLAMA3("{1,3}")}, false},
    {"smaug-bpe", {LLAMA3("{1,3}")}, false},
    {"qwen2", {LLAMA3("")}, false},
    {"stablelm2", {LLAMA3("")}, false},
    {"deepseek-r1-qwen", {LLAMA3("")}, false},
};

struct pl_pretok {
    size_t kind; /* of known */
    pcre2_code *stages[MAX_STAGES];
};

pl_status pl_pretok_new(struct pl_pretok **out, const char *name, size_t n_name, bool *ignore_merges, struct pl_err *err)
{
    size_t k = 0, n_known = sizeof known / sizeof known[0];
    while (k < n_known && (strlen(known[k].name) != n_name || memcmp(known[k].name, name, n_name) != 0))
        k++;
    if (k == n_known)
        return pl_fail(err, PL_ENOTSUP, "the pre-tokenizer \"%.*s\" (key tokenizer.ggml.pre) is not supported",
                       (int)(n_name < 80 ? n_name : 80), name);
    struct pl_pretok *p = calloc(1, sizeof *p);
    if (p == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the pre-tokenizer");
    p->kind = k;
    for (size_t i = 0; i < MAX_STAGES && known[k].stages[i] != NULL; i++) {
        int code;
        PCRE2_SIZE at;
        p->stages[i] = pcre2_compile((PCRE2_SPTR)known[k].stages[i], PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
        if (p->stages[i] == NULL) {
            pl_pretok_free(p);
            return pl_fail(err, PL_ENOMEM, "the pre-tokenizer's pattern cannot be compiled (PCRE2 error %d at %zu)", code, at);
        }
        (void)pcre2_jit_compile(p->stages[i], PCRE2_JIT_COMPLETE); /* without it matching is only slower */
    }
    *ignore_merges = known[k].ignore_merges;
    *out = p;
    return PL_OK;
}

void pl_pretok_free(struct pl_pretok *p)
{
    if (p == NULL)
        return;
    for (size_t i = 0; i < MAX_STAGES; i++)
        pcre2_code_free(p->stages[i]);
    free(p);
}

bool pl_pretok_pattern(const struct pl_pretok *p, size_t stage, struct pl_buf *out)
{
    const char *s = stage < MAX_STAGES ? known[p->kind].stages[stage] : NULL;
    if (s == NULL)
        return false;
    for (const char *space; (space = strstr(s, SPACE)) != NULL; s = space + strlen(SPACE)) {
        pl_buf_add(out, s, (size_t)(space - s));
        pl_buf_adds(out, "\\s");
    }
    pl_buf_adds(out, s);
    return true;
}

struct cut {
    const struct pl_pretok *p;
    pl_status (*fn)(void *arg, const char *s, size_t n);
    void *arg;
};

/* Cuts one fragment (valid UTF-8) by stage `stage`; what lies between two matches is a fragment as well. There are two stages at most,
 * and so is the depth of the recursion. */
static pl_status cut_stage(const struct cut *c, size_t stage, const char *s, size_t n)
{
    if (stage == MAX_STAGES || c->p->stages[stage] == NULL)
        return c->fn(c->arg, s, n);
    pcre2_match_data *m = pcre2_match_data_create(1, NULL);
    if (m == NULL)
        return PL_ENOMEM;
    pl_status st = PL_OK;
    size_t done = 0;
    while (done < n && st == PL_OK) {
        int found = pcre2_match(c->p->stages[stage], (PCRE2_SPTR)s, n, done, PCRE2_NO_UTF_CHECK, m, NULL);
        PCRE2_SIZE *at = pcre2_get_ovector_pointer(m);
        if (found < 0 && found != PCRE2_ERROR_NOMATCH) {
            st = PL_ERANGE; /* the matcher's own limits */
            break;
        }
        size_t from = found < 0 ? n : at[0], to = found < 0 ? n : at[1];
        if (from > done)
            st = cut_stage(c, stage + 1, s + done, from - done);
        if (st == PL_OK && to > from)
            st = cut_stage(c, stage + 1, s + from, to - from);
        done = to > done ? to : done + 1;
    }
    pcre2_match_data_free(m);
    return st;
}

/* The length of the longest beginning of s that is valid UTF-8, or of the one that is not. */
static size_t run_length(const char *s, size_t n, bool *valid)
{
    uint32_t cp;
    size_t i = 0;
    *valid = pl_utf8_decode(s, n, &cp) > 0;
    for (int len; i < n && ((len = pl_utf8_decode(s + i, n - i, &cp)) > 0) == *valid;)
        i += len > 0 ? (size_t)len : 1;
    return i;
}

/* Bytes that are no UTF-8 are fragments of their own; the patterns see the runs of characters between them. Validity is
 * settled here, once: PCRE2 would check the rest of the text anew for each match. */
pl_status pl_pretok_split(const struct pl_pretok *p, const char *s, size_t n, pl_status (*fn)(void *arg, const char *s, size_t n),
                          void *arg)
{
    struct cut c = {p, fn, arg};
    pl_status st = PL_OK;
    for (size_t i = 0, len; i < n && st == PL_OK; i += len) {
        bool valid;
        len = run_length(s + i, n - i, &valid);
        st = valid ? cut_stage(&c, 0, s + i, len) : fn(arg, s + i, len);
    }
    return st;
}
