/* gen_text: the parts that chat's and completions' bodies are put together from. Everything is written straight into a
 * buffer: no JSON tree is built for a token.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "core/base/utf8.h"
#include "core/text/tok.h"
#include "server/generate.h"
#include "server/server.h"

void pl_gen_add_real(struct pl_buf *out, double v)
{
    /* JSON has no infinity: OpenAI writes -9999.0 for a token that cannot come */
    if (!(v > -9999))
        v = -9999;
    pl_buf_addf(out, "%.8g", v == 0 ? 0.0 : v);
}

/* bytes_form: a token that is no whole characters as bytes:\xNN…, as the older endpoint has it, else with U+FFFD. */
void pl_gen_add_token_string(struct pl_buf *out, const struct pl_server *s, int32_t id, bool bytes_form)
{
    size_t n;
    const char *bytes = pl_tok_bytes(s->tok, id, true, &n);
    pl_buf_addc(out, '"');
    if (pl_utf8_valid(bytes, n)) {
        pl_buf_add_json(out, bytes, n);
    } else if (bytes_form) {
        pl_buf_adds(out, "bytes:");
        for (size_t i = 0; i < n; i++)
            pl_buf_addf(out, "\\\\x%02x", (unsigned char)bytes[i]);
    } else {
        for (size_t i = 0; i < n;) {
            uint32_t cp;
            int len = pl_utf8_decode(bytes + i, n - i, &cp);
            if (len > 0)
                pl_buf_add_json(out, bytes + i, (size_t)len);
            else
                pl_buf_adds(out, "\xef\xbf\xbd");
            i += len > 0 ? (size_t)len : 1;
        }
    }
    pl_buf_addc(out, '"');
}

static void add_entry(struct pl_buf *out, const struct pl_server *s, int32_t id, double logprob)
{
    size_t n;
    const char *bytes = pl_tok_bytes(s->tok, id, true, &n);
    pl_buf_adds(out, "{\"token\":");
    pl_gen_add_token_string(out, s, id, false);
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
    add_entry(out, g->server, t->token, t->logprob);
    pl_buf_adds(out, ",\"top_logprobs\":[");
    for (uint32_t i = 0; i < t->n_top; i++) {
        if (i > 0)
            pl_buf_addc(out, ',');
        add_entry(out, g->server, t->top[i].id, t->top[i].logprob);
        pl_buf_addc(out, '}');
    }
    pl_buf_adds(out, "]}");
}

/* The four parallel arrays of /v1/completions. known = false: the first token of a prompt, which nothing predicts. */
static void add_completion(struct pl_gen *g, struct pl_gen_choice *c, const struct pl_choice *t, bool known)
{
    const char *comma = c->n_logprobs > 0 ? "," : "";
    pl_buf_adds(&c->logprobs, comma);
    pl_gen_add_token_string(&c->logprobs, g->server, t->token, true);
    pl_buf_adds(&c->lp_values, comma);
    if (known)
        pl_gen_add_real(&c->lp_values, t->logprob);
    else
        pl_buf_adds(&c->lp_values, "null");
    pl_buf_adds(&c->lp_top, comma);
    pl_buf_adds(&c->lp_top, known ? "{" : "null");
    bool own = false;
    for (uint32_t i = 0; known && i < t->n_top; i++) {
        pl_buf_adds(&c->lp_top, i > 0 ? "," : "");
        pl_gen_add_token_string(&c->lp_top, g->server, t->top[i].id, true);
        pl_buf_addc(&c->lp_top, ':');
        pl_gen_add_real(&c->lp_top, t->top[i].logprob);
        own |= t->top[i].id == t->token;
    }
    if (known && t->n_top > 0 && !own) { /* the chosen token is always there */
        pl_buf_addc(&c->lp_top, ',');
        pl_gen_add_token_string(&c->lp_top, g->server, t->token, true);
        pl_buf_addc(&c->lp_top, ':');
        pl_gen_add_real(&c->lp_top, t->logprob);
    }
    if (known)
        pl_buf_addc(&c->lp_top, '}');
    pl_buf_addf(&c->lp_offsets, "%s%zu", comma, c->n_chars);
    size_t n;
    const char *bytes = pl_tok_bytes(g->server->tok, t->token, true, &n);
    for (size_t i = 0; i < n; i++)
        c->n_chars += (bytes[i] & 0xc0) != 0x80;
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
