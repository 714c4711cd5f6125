/* chat: the model's own chat template, from messages to prompt pieces.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/text/chat.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

struct pl_chat {
    struct pl_jinja *template;
    char *bos, *eos; /* as text, "" = none */
};

static char *token_text(const struct pl_tok *tok, int32_t id)
{
    size_t n = 0;
    const char *s = id >= 0 ? pl_tok_bytes(tok, id, true, &n) : "";
    char *copy = malloc(n + 1);
    if (copy != NULL) {
        memcpy(copy, s, n);
        copy[n] = '\0';
    }
    return copy;
}

pl_status pl_chat_new(struct pl_chat **out, const char *source, size_t n, const struct pl_tok *tok, struct pl_err *err)
{
    struct pl_chat *c = calloc(1, sizeof *c);
    pl_status st = c != NULL ? pl_jinja_compile(&c->template, source, n, err) : pl_fail(err, PL_ENOMEM, "no memory for the chat template");
    if (st == PL_OK) {
        c->bos = token_text(tok, pl_tok_bos(tok));
        c->eos = token_text(tok, pl_tok_eos(tok));
        if (c->bos == NULL || c->eos == NULL)
            st = pl_fail(err, PL_ENOMEM, "no memory for the chat template");
    }
    if (st == PL_OK)
        *out = c;
    else
        pl_chat_free(c);
    return st;
}

void pl_chat_free(struct pl_chat *c)
{
    if (c == NULL)
        return;
    pl_jinja_free(c->template);
    free(c->bos);
    free(c->eos);
    free(c);
}

static struct pl_jval *text(struct pl_arena *a, const char *s, bool user)
{
    return pl_jval_str(a, s, strlen(s), user);
}

static pl_status add_message(struct pl_arena *a, struct pl_jval *list, const struct pl_chat_message *m)
{
    struct pl_jval *d = pl_jval_dict(a);
    const char *role = strcmp(m->role, "developer") == 0 ? "system" : m->role;
    struct pl_jval *content = m->content != NULL ? pl_jval_str(a, m->content, m->n_content, true) : pl_jval_none(a);
    pl_status st = pl_jval_set(a, d, "role", text(a, role, false));
    if (st == PL_OK)
        st = pl_jval_set(a, d, "content", content);
    if (st == PL_OK && m->name != NULL)
        st = pl_jval_set(a, d, "name", text(a, m->name, true));
    if (st == PL_OK && m->tool_call_id != NULL)
        st = pl_jval_set(a, d, "tool_call_id", text(a, m->tool_call_id, true));
    return st == PL_OK ? pl_jval_append(a, list, d) : st;
}

pl_status pl_chat_render(const struct pl_chat *c, const struct pl_chat_message *messages, size_t n_messages, bool add_generation_prompt,
                         struct pl_arena *a, struct pl_piece **pieces, size_t *n_pieces, struct pl_err *err)
{
    struct pl_jval *vars = pl_jval_dict(a), *list = pl_jval_list(a);
    struct pl_jinja_out out;
    pl_status st = PL_OK;
    for (size_t i = 0; i < n_messages && st == PL_OK; i++)
        st = add_message(a, list, &messages[i]);
    if (st == PL_OK && (pl_jval_set(a, vars, "messages", list) != PL_OK ||
                        pl_jval_set(a, vars, "add_generation_prompt", pl_jval_bool(a, add_generation_prompt)) != PL_OK ||
                        pl_jval_set(a, vars, "bos_token", text(a, c->bos, false)) != PL_OK ||
                        pl_jval_set(a, vars, "eos_token", text(a, c->eos, false)) != PL_OK ||
                        pl_jval_set(a, vars, "tools", pl_jval_none(a)) != PL_OK))
        st = PL_ENOMEM;
    if (st != PL_OK)
        return pl_fail(err, st, "no memory for the prompt");
    st = pl_jinja_render(c->template, vars, NULL, a, &out, err);
    if (st == PL_ENOMEM && pl_arena_full(a))
        return pl_fail_param(err, PL_ETOOLONG, "messages", "the messages are too long for the chat template: shorten 'messages'");
    if (st != PL_OK) { /* whatever the template cannot do with these messages is the messages' fault to its caller */
        if (err != NULL && st != PL_ENOMEM) {
            strcpy(err->param, "messages");
            err->code = st = PL_EINVAL;
        }
        return st;
    }
    struct pl_piece *p = pl_arena_alloc(a, (out.n_pieces + 1) * sizeof *p);
    if (p == NULL)
        return pl_fail(err, PL_ENOMEM, "no memory for the prompt");
    for (size_t i = 0, from = 0; i < out.n_pieces; from = out.ends[i++])
        p[i] = (struct pl_piece){out.text + from, out.ends[i] - from, out.trusted[i]};
    *pieces = p;
    *n_pieces = out.n_pieces;
    return PL_OK;
}
