/* prompt: from the messages or the prompt field of a request to token ids.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/prompt.h"

#include <stdio.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/text/tok.h"
#include "server/schema.h"
#include "server/instance.h"

/* ---- messages ------------------------------------------------------------------------------------------------------ */

struct where {
    size_t i;
    struct pl_err *err;
};

static pl_status bad(const struct where *w, pl_status code, const char *field, const char *what, const char *extra)
{
    char param[64];
    snprintf(param, sizeof param, "messages[%zu]%s%s", w->i, field[0] != '\0' ? "." : "", field);
    return pl_fail_param(w->err, code, param, "'%s' %s%.80s", param, what, extra);
}

/* One part of a content array: its text. */
static pl_status part_text(const struct where *w, const json_t *part, const char *role, const char **s, size_t *n)
{
    const json_t *type = json_object_get(part, "type"), *text;
    if (!json_is_object(part) || !json_is_string(type))
        return bad(w, PL_EINVAL, "content", "must have parts that are objects with a 'type'", "");
    const char *name = json_string_value(type);
    const char *field = strcmp(name, "refusal") == 0 && strcmp(role, "assistant") == 0 ? "refusal" : "text";
    if (strcmp(name, "text") != 0 && strcmp(field, "refusal") != 0)
        return bad(w, PL_ENOTSUP, "content", "has a part of a type that this server does not support; only text is: ", name);
    text = json_object_get(part, field);
    if (!json_is_string(text))
        return bad(w, PL_EINVAL, "content", "has a text part whose text is not a string", "");
    *s = json_string_value(text);
    *n = json_string_length(text);
    return PL_OK;
}

static pl_status read_content(const struct where *w, const json_t *v, struct pl_chat_message *m, struct pl_arena *a)
{
    bool assistant = strcmp(m->role, "assistant") == 0;
    if (v == NULL || json_is_null(v))
        return assistant ? PL_OK : bad(w, PL_EINVAL, "content", "is required", "");
    if (json_is_string(v)) {
        m->content = json_string_value(v);
        m->n_content = json_string_length(v);
        return PL_OK;
    }
    if (!json_is_array(v))
        return bad(w, PL_EINVAL, "content", "must be a string or an array of parts, not ", pl_json_kind(v));
    if (json_array_size(v) == 0)
        return bad(w, PL_EINVAL, "content", "must have at least one part", "");
    struct pl_buf text;
    pl_buf_init(&text, 0);
    pl_status st = PL_OK;
    for (size_t i = 0; i < json_array_size(v) && st == PL_OK; i++) {
        const char *s = "";
        size_t n = 0;
        if ((st = part_text(w, json_array_get(v, i), m->role, &s, &n)) == PL_OK)
            pl_buf_add(&text, s, n);
    }
    if (st == PL_OK) {
        m->content = text.failed ? NULL : pl_arena_strndup(a, pl_buf_str(&text), text.len);
        m->n_content = text.len;
        if (m->content == NULL)
            st = pl_fail(w->err, PL_ENOMEM, "out of memory");
    }
    pl_buf_fini(&text);
    return st;
}

static pl_status optional_string(const struct where *w, const json_t *message, const char *name, const char **out)
{
    const json_t *v = json_object_get(message, name);
    if (v == NULL || json_is_null(v))
        return PL_OK;
    if (!json_is_string(v))
        return bad(w, PL_EINVAL, name, "must be a string, not ", pl_json_kind(v));
    *out = json_string_value(v);
    return PL_OK;
}

static pl_status read_message(const struct where *w, const json_t *v, struct pl_chat_message *m, struct pl_arena *a)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
    if (!json_is_object(v))
        return bad(w, PL_EINVAL, "", "must be an object, not ", pl_json_kind(v));
    const json_t *role = json_object_get(v, "role");
    if (!json_is_string(role))
        return bad(w, PL_EINVAL, "role", "must be a string; it is ", pl_json_kind(role));
    for (size_t i = 0; i < PL_COUNT_OF(roles); i++)
        if (strcmp(json_string_value(role), roles[i]) == 0)
            m->role = roles[i];
    if (m->role == NULL)
        return bad(w, PL_EINVAL, "role", "must be system, developer, user, assistant or tool, not ", json_string_value(role));
    static const char *const refused[] = {"tool_calls", "function_call", "audio"};
    for (size_t i = 0; i < PL_COUNT_OF(refused); i++) {
        const json_t *x = json_object_get(v, refused[i]);
        if (x != NULL && !json_is_null(x) && !(json_is_array(x) && json_array_size(x) == 0))
            return bad(w, PL_ENOTSUP, refused[i], "is not supported by this server", "");
    }
    pl_status st = optional_string(w, v, "name", &m->name);
    if (st == PL_OK)
        st = optional_string(w, v, "tool_call_id", &m->tool_call_id);
    if (st == PL_OK && strcmp(m->role, "tool") == 0 && m->tool_call_id == NULL)
        st = bad(w, PL_EINVAL, "tool_call_id", "is required for a tool's message", "");
    return st == PL_OK ? read_content(w, json_object_get(v, "content"), m, a) : st;
}

pl_status pl_prompt_messages(const json_t *messages, struct pl_arena *a, struct pl_chat_message **out, struct pl_err *err)
{
    size_t count = json_array_size(messages);
    struct pl_chat_message *m = *out = pl_arena_zalloc(a, count * sizeof *m);
    if (m == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    for (size_t i = 0; i < count; i++) {
        struct where w = {i, err};
        pl_status st = read_message(&w, json_array_get(messages, i), &m[i], a);
        if (st != PL_OK)
            return st;
    }
    return PL_OK;
}

pl_status pl_prompt_render(const struct pl_instance *m, const json_t *messages, bool add_generation_prompt, struct pl_arena *a,
                           struct pl_piece **pieces, size_t *n, struct pl_err *err)
{
    struct pl_chat_message *list;
    pl_status st = pl_prompt_messages(messages, a, &list, err);
    if (st != PL_OK)
        return st;
    if (m->chat == NULL)
        return pl_fail_param(err, PL_ENOTSUP, "messages",
                             "the model has no chat template: use /v1/completions, or start the server with --chat-template FILE");
    return pl_chat_render(m->chat, list, json_array_size(messages), add_generation_prompt, a, pieces, n, err);
}

static pl_status keep_ids(const int32_t *ids, size_t n, struct pl_arena *a, struct pl_prompt *out, struct pl_err *err)
{
    int32_t *v = pl_arena_alloc(a, n * sizeof *v + 1);
    if (v == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    memcpy(v, ids, n * sizeof *v);
    *out = (struct pl_prompt){v, (uint32_t)n};
    return PL_OK;
}

static pl_status keep(struct pl_ids *ids, struct pl_arena *a, struct pl_prompt *out, struct pl_err *err)
{
    const pl_status st = keep_ids(ids->v, ids->n, a, out, err);
    pl_ids_fini(ids);
    return st;
}

/* What the tokenizer said, of that field. */
static pl_status too_long(pl_status st, const char *param, uint32_t max, struct pl_err *err)
{
    if (st == PL_ETOOLONG)
        return pl_fail_param(err, st, param, "the prompt has more than the %u tokens that this model's context allows: shorten '%s'", max,
                             param);
    if (st == PL_EINVAL)
        snprintf(err->param, sizeof err->param, "%s", param);
    return st;
}

pl_status pl_prompt_chat(const struct pl_instance *m, const json_t *messages, bool add_generation_prompt, uint32_t max,
                         struct pl_arena *a, struct pl_prompt *out, struct pl_err *err)
{
    struct pl_piece *pieces;
    size_t n;
    struct pl_ids ids = {0};
    pl_status st = pl_prompt_render(m, messages, add_generation_prompt, a, &pieces, &n, err);
    if (st != PL_OK)
        return st;
    st = pl_tok_encode_pieces(m->tok, pieces, n, PL_TOK_SPECIAL | PL_TOK_BOS, max, &ids, err);
    if (st == PL_OK && ids.n == 0)
        st = pl_fail_param(err, PL_EINVAL, "messages", "the chat template makes an empty prompt of these messages");
    if (st != PL_OK) {
        pl_ids_fini(&ids);
        return too_long(st, "messages", max, err);
    }
    return keep(&ids, a, out, err);
}

/* ---- completions --------------------------------------------------------------------------------------------------- */

static pl_status from_text(const struct pl_instance *m, const json_t *v, uint32_t max, struct pl_arena *a, struct pl_prompt *out,
                           struct pl_err *err)
{
    struct pl_ids ids = {0};
    pl_status st = pl_tok_encode(m->tok, json_string_value(v), json_string_length(v), PL_TOK_BOS, max, &ids, err);
    if (st == PL_OK && ids.n == 0) {
        int32_t bos = pl_tok_bos(m->tok) >= 0 ? pl_tok_bos(m->tok) : pl_tok_eos(m->tok); /* something to begin with */
        pl_ids_fini(&ids);
        if (bos >= 0)
            return keep_ids(&bos, 1, a, out, err);
        st = pl_fail_param(err, PL_EINVAL, "prompt", "'prompt' is empty, and the model has no token to begin a text with");
    }
    if (st != PL_OK) {
        pl_ids_fini(&ids);
        return too_long(st, "prompt", max, err);
    }
    return keep(&ids, a, out, err);
}

static pl_status from_ids(const struct pl_instance *m, const json_t *v, uint32_t max, struct pl_arena *a, struct pl_prompt *out,
                          struct pl_err *err)
{
    size_t n = json_array_size(v);
    uint32_t vocab = m->file.spec.n_vocab;
    if (n == 0)
        return pl_fail_param(err, PL_EINVAL, "prompt", "'prompt' has an empty array of tokens");
    if (n > max)
        return too_long(PL_ETOOLONG, "prompt", max, err);
    int32_t *ids = pl_arena_alloc(a, n * sizeof *ids);
    if (ids == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(v, i);
        if (!json_is_integer(id))
            return pl_fail_param(err, PL_EINVAL, "prompt", "token %zu of 'prompt' must be an integer, not %s", i, pl_json_kind(id));
        if (json_integer_value(id) < 0 || json_integer_value(id) >= (json_int_t)vocab)
            return pl_fail_param(err, PL_EINVAL, "prompt", "token %lld of 'prompt' is not one of the model's %u",
                                 (long long)json_integer_value(id), vocab);
        ids[i] = (int32_t)json_integer_value(id);
    }
    *out = (struct pl_prompt){ids, (uint32_t)n};
    return PL_OK;
}

pl_status pl_prompt_completion(const struct pl_instance *m, const json_t *prompt, uint32_t max, struct pl_arena *a,
                               struct pl_prompt **out, uint32_t *n, struct pl_err *err)
{
    bool list = json_is_array(prompt) && !json_is_integer(json_array_get(prompt, 0));
    size_t count = list ? json_array_size(prompt) : 1;
    if (count == 0 || count > PL_MAX_CHOICES)
        return pl_fail_param(err, PL_EINVAL, "prompt", "'prompt' must have 1 to %d prompts, not %zu", PL_MAX_CHOICES, count);
    *out = pl_arena_zalloc(a, count * sizeof **out);
    *n = (uint32_t)count;
    if (*out == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    pl_status st = PL_OK;
    for (size_t i = 0; i < count && st == PL_OK; i++) {
        const json_t *one = list ? json_array_get(prompt, i) : prompt;
        if (json_is_string(one))
            st = from_text(m, one, max, a, &(*out)[i], err);
        else if (json_is_array(one))
            st = from_ids(m, one, max, a, &(*out)[i], err);
        else
            st = pl_fail_param(err, PL_EINVAL, "prompt", "prompt %zu must be a string or an array of tokens, not %s", i, pl_json_kind(one));
    }
    return st;
}

const char *pl_prompt_text(const struct pl_instance *m, const struct pl_prompt *p, struct pl_arena *a, size_t *n)
{
    struct pl_buf text;
    pl_buf_init(&text, 0);
    bool bos = p->n > 0 && pl_tok_adds_bos(m->tok) && p->ids[0] == pl_tok_bos(m->tok);
    pl_tok_decode(m->tok, p->ids + bos, p->n - bos, true, &text);
    const char *copy = text.failed ? NULL : pl_arena_strndup(a, pl_buf_str(&text), text.len);
    *n = copy != NULL ? text.len : 0;
    pl_buf_fini(&text);
    return copy != NULL ? copy : "";
}
