/* gen_text: the parts that chat's and completions' bodies are put together from. Everything is written straight into a
 * buffer: no JSON tree is built for a token.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/text/tok.h"
#include "server/generate.h"

void pl_gen_add_real(struct pl_buf *out, double v)
{
    /* JSON has no infinity: OpenAI writes -9999.0 for a token that cannot come */
    if (!(v > -9999))
        v = -9999;
    if (v == -9999)
        pl_buf_adds(out, "-9999.0");
    else
        pl_buf_addf(out, "%.8g", v == 0 ? 0.0 : v);
}

/* bytes_form: a token that is no whole characters as bytes:\xNN…, as the older endpoint has it, else with U+FFFD. */
void pl_gen_add_token_string(struct pl_buf *out, const struct pl_instance *m, int32_t id, bool bytes_form)
{
    size_t n;
    const char *bytes = pl_tok_bytes(m->tok, id, true, &n);
    pl_buf_addc(out, '"');
    if (pl_utf8_valid(bytes, n)) {
        pl_buf_add_json(out, bytes, n);
    } else if (bytes_form) {
        pl_buf_adds(out, "bytes:");
        for (size_t i = 0; i < n; i++)
            pl_buf_addf(out, "\\\\x%02x", (unsigned char)bytes[i]);
    } else {
        pl_buf_add_json_lossy(out, bytes, n);
    }
    pl_buf_addc(out, '"');
}

static void add_entry(struct pl_buf *out, const struct pl_instance *m, int32_t id, double logprob)
{
    size_t n;
    const char *bytes = pl_tok_bytes(m->tok, id, true, &n);
    pl_buf_adds(out, "{\"token\":");
    pl_gen_add_token_string(out, m, id, false);
    pl_buf_adds(out, ",\"logprob\":");
    pl_gen_add_real(out, logprob);
    pl_buf_adds(out, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++)
        pl_buf_addf(out, "%s%u", i > 0 ? "," : "", (unsigned char)bytes[i]);
    pl_buf_addc(out, ']');
}

static void add_chat(struct pl_gen *g, struct pl_gen_choice *c, const struct pl_choice *t)
{
    struct pl_buf *out = &c->logprobs;
    if (c->n_logprobs > 0)
        pl_buf_addc(out, ',');
    add_entry(out, g->target.instance, t->token, t->logprob);
    pl_buf_adds(out, ",\"top_logprobs\":[");
    for (uint32_t i = 0; i < t->n_top; i++) {
        if (i > 0)
            pl_buf_addc(out, ',');
        add_entry(out, g->target.instance, t->top[i].id, t->top[i].logprob);
        pl_buf_addc(out, '}');
    }
    pl_buf_adds(out, "]}");
}

static bool same_text(const struct pl_instance *m, int32_t a, int32_t b)
{
    size_t na, nb;
    const char *ta = pl_tok_bytes(m->tok, a, true, &na), *tb = pl_tok_bytes(m->tok, b, true, &nb);
    return na == nb && memcmp(ta, tb, na) == 0;
}

/* An object's members, closing brace and all: the best alternatives and the chosen token, which is always there. Of several
 * tokens with one text the likeliest is shown: an object has each key once. */
static void add_alternatives(struct pl_buf *out, const struct pl_instance *m, const struct pl_choice *t)
{
    for (uint32_t i = 0; i <= t->n_top; i++) {
        const struct pl_top one = i < t->n_top ? t->top[i] : (struct pl_top){t->token, t->logprob};
        bool seen = false;
        for (uint32_t k = 0; k < i && !seen; k++)
            seen = same_text(m, t->top[k].id, one.id);
        if (seen)
            continue;
        pl_buf_adds(out, i > 0 ? "," : "");
        pl_gen_add_token_string(out, m, one.id, true);
        pl_buf_addc(out, ':');
        pl_gen_add_real(out, one.logprob);
    }
    pl_buf_addc(out, '}');
}

/* The four parallel arrays of /v1/completions. known = false: the first token of a prompt, which nothing predicts. */
static void add_completion(struct pl_gen *g, struct pl_gen_choice *c, const struct pl_choice *t, bool known)
{
    const char *comma = c->n_logprobs > 0 ? "," : "";
    pl_buf_adds(&c->logprobs, comma);
    pl_gen_add_token_string(&c->logprobs, g->target.instance, t->token, true);
    pl_buf_adds(&c->lp_values, comma);
    if (known)
        pl_gen_add_real(&c->lp_values, t->logprob);
    else
        pl_buf_adds(&c->lp_values, "null");
    pl_buf_adds(&c->lp_top, comma);
    pl_buf_adds(&c->lp_top, known ? "{" : "null");
    if (known)
        add_alternatives(&c->lp_top, g->target.instance, t);
    pl_buf_addf(&c->lp_offsets, "%s%lld", comma, (long long)(c->n_chars > 0 ? c->n_chars : 0));
    size_t n;
    const char *bytes = pl_tok_bytes(g->target.instance->tok, t->token, true, &n);
    c->n_chars += (int64_t)pl_gen_chars(bytes, n);
}

size_t pl_gen_chars(const char *s, size_t n)
{
    size_t chars = 0;
    for (size_t i = 0; i < n; i++)
        chars += (s[i] & 0xc0) != 0x80;
    return chars;
}

void pl_gen_add_logprobs(struct pl_gen *g, struct pl_gen_choice *c, const struct pl_choice *t, bool known)
{
    if (g->chat)
        add_chat(g, c, t);
    else
        add_completion(g, c, t, known);
    c->n_logprobs++;
}

void pl_gen_take_logprobs(struct pl_gen *g, struct pl_gen_choice *c, struct pl_buf *out)
{
    if (!g->logprobs || (c->n_logprobs == 0 && g->stream)) {
        pl_buf_adds(out, "null");
        return;
    }
    if (g->chat) {
        pl_buf_addf(out, "{\"content\":[%s],\"refusal\":null}", pl_buf_str(&c->logprobs));
    } else {
        pl_buf_addf(out, "{\"tokens\":[%s],\"token_logprobs\":[%s],\"top_logprobs\":[%s],\"text_offset\":[%s]}", pl_buf_str(&c->logprobs),
                    pl_buf_str(&c->lp_values), pl_buf_str(&c->lp_top), pl_buf_str(&c->lp_offsets));
    }
    out->failed |= c->logprobs.failed || c->lp_values.failed || c->lp_top.failed || c->lp_offsets.failed;
    pl_buf_clear(&c->logprobs);
    pl_buf_clear(&c->lp_values);
    pl_buf_clear(&c->lp_top);
    pl_buf_clear(&c->lp_offsets);
    c->n_logprobs = 0;
}

void pl_gen_add_usage(const struct pl_gen *g, struct pl_buf *out)
{
    pl_buf_addf(out,
                "{\"prompt_tokens\":%u,\"completion_tokens\":%u,\"total_tokens\":%u,\"prompt_tokens_details\":{\"cached_tokens\":%u,"
                "\"audio_tokens\":0},\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0,"
                "\"accepted_prediction_tokens\":0,\"rejected_prediction_tokens\":0}}",
                g->prompt_tokens, g->completion_tokens, g->prompt_tokens + g->completion_tokens, g->cached_tokens);
}

const char *pl_gen_finish_name(pl_finish f)
{
    return f == PL_FINISH_LENGTH ? "length" : "stop";
}
