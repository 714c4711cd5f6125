/* tokenize: POST /tokenize, /detokenize and /apply-template.
 *   /tokenize        {"content": text, "add_special": bool, "parse_special": bool}   -> {"tokens": [...], "count", "max_model_len"}
 *   /detokenize      {"tokens": [...]}                                              -> {"content": text}
 *   /apply-template  {"messages": [...], "add_generation_prompt": bool}             -> {"prompt": text}
 * each with "model" too; without it the first model is meant.
 * Thread: microhttpd's workers.  Owns: nothing beyond the call.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>

#include "core/base/mem.h"
#include "server/api/api.h"
#include "server/apierr.h"
#include "server/generate.h"
#include "server/models.h"
#include "server/prompt.h"
#include "server/server.h"

enum { MAX_CONTENT = 4 << 20 /* bytes */, MAX_TOKENS = 1 << 20 };

static pl_status read_bool(const json_t *root, const char *name, bool *v, struct pl_err *err)
{
    const json_t *x = json_object_get(root, name);
    if (x == NULL || json_is_null(x))
        return PL_OK;
    if (!json_is_boolean(x))
        return pl_fail_param(err, PL_EINVAL, name, "'%s' must be a boolean, not %s", name, pl_json_kind(x));
    *v = json_is_true(x);
    return PL_OK;
}

static pl_status tokenize(const struct pl_instance *m, const json_t *root, struct pl_buf *out, struct pl_err *err)
{
    bool add_special = false, parse_special = false;
    const json_t *content = json_object_get(root, "content");
    if (!json_is_string(content))
        return pl_fail_param(err, PL_EINVAL, "content", "'content' must be a string; it is %s", pl_json_kind(content));
    if (json_string_length(content) > MAX_CONTENT)
        return pl_fail_param(err, PL_EINVAL, "content", "'content' has %zu bytes; at most %d are possible: send it in pieces", json_string_length(content),
                             MAX_CONTENT);
    pl_status st = read_bool(root, "add_special", &add_special, err);
    if (st == PL_OK)
        st = read_bool(root, "parse_special", &parse_special, err);
    if (st != PL_OK)
        return st;
    struct pl_ids ids = {0};
    st = pl_tok_encode(m->tok, json_string_value(content), json_string_length(content),
                       (add_special ? PL_TOK_BOS : 0u) | (parse_special ? PL_TOK_SPECIAL : 0u), MAX_TOKENS, &ids, err);
    if (st == PL_OK) {
        pl_buf_adds(out, "{\"tokens\":[");
        for (size_t i = 0; i < ids.n; i++)
            pl_buf_addf(out, "%s%d", i > 0 ? "," : "", ids.v[i]);
        pl_buf_addf(out, "],\"count\":%zu,\"max_model_len\":%u}", ids.n, pl_engine_max_context(m->engine));
    } else {
        snprintf(err->param, sizeof err->param, "content");
    }
    pl_ids_fini(&ids);
    return st;
}

static pl_status detokenize(const struct pl_instance *m, const json_t *root, struct pl_buf *out, struct pl_err *err)
{
    const json_t *tokens = json_object_get(root, "tokens");
    if (!json_is_array(tokens) || json_array_size(tokens) > MAX_TOKENS)
        return pl_fail_param(err, PL_EINVAL, "tokens", "'tokens' must be an array of at most %d token ids; it is %s", MAX_TOKENS,
                             pl_json_kind(tokens));
    const size_t n = json_array_size(tokens);
    int32_t *ids = malloc(n * sizeof *ids + 1);
    if (ids == NULL)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(tokens, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= pl_tok_count(m->tok)) {
            free(ids);
            return pl_fail_param(err, PL_EINVAL, "tokens", "element %zu of 'tokens' must be a token id from 0 to %d", i,
                                 pl_tok_count(m->tok) - 1);
        }
        ids[i] = (int32_t)json_integer_value(id);
    }
    struct pl_buf text;
    pl_buf_init(&text, 0);
    pl_tok_decode(m->tok, ids, n, true, &text);
    pl_buf_adds(out, "{\"content\":\"");
    pl_buf_add_json_lossy(out, pl_buf_str(&text), text.len);
    pl_buf_adds(out, "\"}");
    out->failed |= text.failed;
    pl_buf_fini(&text);
    free(ids);
    return PL_OK;
}

static pl_status apply_template(const struct pl_instance *m, const json_t *root, struct pl_buf *out, struct pl_err *err)
{
    bool add = true;
    const json_t *messages = json_object_get(root, "messages");
    if (!json_is_array(messages) || json_array_size(messages) == 0 || json_array_size(messages) > PL_MAX_MESSAGES)
        return pl_fail_param(err, PL_EINVAL, "messages", "'messages' must be an array of 1 to %d messages; it is %s", PL_MAX_MESSAGES,
                             pl_json_kind(messages));
    pl_status st = read_bool(root, "add_generation_prompt", &add, err);
    if (st != PL_OK)
        return st;
    struct pl_arena *a = pl_arena_new(PL_GEN_ARENA);
    struct pl_piece *pieces;
    size_t n;
    st = a != NULL ? pl_prompt_render(m, messages, add, a, &pieces, &n, err) : pl_fail(err, PL_ENOMEM, "out of memory");
    if (st == PL_OK) {
        pl_buf_adds(out, "{\"prompt\":\"");
        for (size_t i = 0; i < n; i++)
            pl_buf_add_json(out, pieces[i].s, pieces[i].n);
        pl_buf_adds(out, "\"}");
    }
    pl_arena_free(a);
    return st;
}

static void answer(struct pl_http_req *req, struct pl_http_resp *resp, pl_http_handler *self,
                   pl_status (*fn)(const struct pl_instance *m, const json_t *root, struct pl_buf *out, struct pl_err *err))
{
    json_t *root = NULL;
    struct pl_err err = {0};
    struct pl_target t;
    pl_status st = pl_json_read(&root, "the body", req->body, req->n_body, &err);
    const json_t *model = json_object_get(root, "model");
    if (st == PL_OK && model != NULL && !json_is_null(model) && !json_is_string(model))
        st = pl_fail_param(&err, PL_EINVAL, "model", "'model' must be a string, not %s", pl_json_kind(model));
    if (st == PL_OK && pl_models_find(req, resp, json_string_value(model), false, self, &t)) {
        st = fn(t.instance, root, &resp->body, &err);
        pl_registry_release(req->server->models, &t);
    }
    json_decref(root);
    if (st != PL_OK)
        pl_apierr_answer(req, resp, &err);
}

void pl_api_tokenize(struct pl_http_req *req, struct pl_http_resp *resp)
{
    answer(req, resp, pl_api_tokenize, tokenize);
}

void pl_api_detokenize(struct pl_http_req *req, struct pl_http_resp *resp)
{
    answer(req, resp, pl_api_detokenize, detokenize);
}

void pl_api_apply_template(struct pl_http_req *req, struct pl_http_resp *resp)
{
    answer(req, resp, pl_api_apply_template, apply_template);
}
