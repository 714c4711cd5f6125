/* check_schema: request bodies: every field of both endpoints with wrong types, values out of range and what is missing;
 * each is a 400 that names the field. Fields with a plain type are tried from the table itself; one with a shape of its own
 * must have rows here.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/schema.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/base/utf8.h"
#include "server/apierr.h"
#include "server/prompt.h"

Suite *suite_schema(void);

enum { C = PL_EP_CHAT, T = PL_EP_COMPLETIONS, BOTH = C | T };

static const char *const bases[] = {
    [C] = "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
    [T] = "{\"model\":\"m\",\"prompt\":\"x\"}",
};

/* The base body with members of `extra` (a JSON object) on top; a member "-name" takes that field away. */
static char *body_with(unsigned endpoint, const char *extra)
{
    json_t *body = json_loads(bases[endpoint], 0, NULL), *more = json_loads(extra, 0, NULL), *value;
    const char *key;
    ck_assert_msg(more != NULL, "not JSON: %s", extra);
    json_object_foreach(more, key, value)
    {
        if (key[0] == '-')
            json_object_del(body, key + 1);
        else
            json_object_set(body, key, value);
    }
    char *text = json_dumps(body, 0);
    json_decref(body);
    json_decref(more);
    return text;
}

/* Reads a body as the handlers do, messages too. On PL_OK *p is filled in. */
static pl_status read_body(struct pl_params *p, unsigned endpoint, const char *body, struct pl_err *err)
{
    *err = (struct pl_err){0};
    pl_status st = pl_params_read(p, endpoint, body, strlen(body), err);
    if (st == PL_OK && endpoint == C) {
        struct pl_chat_message *m;
        struct pl_arena *a = pl_arena_new(0);
        st = pl_prompt_messages(p->messages, a, &m, err);
        pl_arena_free(a);
        if (st != PL_OK)
            pl_params_fini(p);
    }
    return st;
}

static void refused(unsigned endpoint, const char *extra, const char *param)
{
    struct pl_params p;
    struct pl_err err;
    char *body = body_with(endpoint, extra);
    const pl_status st = read_body(&p, endpoint, body, &err);
    ck_assert_msg(st != PL_OK, "accepted: %s", body);
    ck_assert_msg(pl_apierr_of(st).http == 400, "answered %d: %s", pl_apierr_of(st).http, body);
    ck_assert_msg(strcmp(err.param, param) == 0, "param is '%s', not '%s': %s (%s)", err.param, param, body, err.msg);
    ck_assert_int_eq(err.code, st);
    ck_assert_msg(strlen(err.msg) > 10, "no message: %s", body);
    free(body);
}

static void accepted(unsigned endpoint, const char *extra)
{
    struct pl_params p;
    struct pl_err err;
    char *body = body_with(endpoint, extra);
    const pl_status st = read_body(&p, endpoint, body, &err);
    ck_assert_msg(st == PL_OK, "refused with %s: %s: %s", err.param, err.msg, body);
    pl_params_fini(&p);
    free(body);
}

/* ---- rows by hand -------------------------------------------------------------------------------------------------- */

struct row {
    unsigned endpoints;
    const char *extra, *param;
};

#define MESSAGES(text) "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}," text "]}"
static const struct row refusals[] = {
    {BOTH, "{\"-model\":0}", "model"},
    {BOTH, "{\"model\":null}", "model"},
    {BOTH, "{\"model\":7}", "model"},
    {BOTH, "{\"model\":[\"m\"]}", "model"},
    {C, "{\"-messages\":0}", "messages"},
    {C, "{\"messages\":null}", "messages"},
    {C, "{\"messages\":[]}", "messages"},
    {C, "{\"messages\":\"hello\"}", "messages"},
    {C, "{\"messages\":{\"role\":\"user\",\"content\":\"x\"}}", "messages"},
    {C, MESSAGES("\"x\""), "messages[1]"},
    {C, MESSAGES("null"), "messages[1]"},
    {C, MESSAGES("{\"content\":\"x\"}"), "messages[1].role"},
    {C, MESSAGES("{\"role\":1,\"content\":\"x\"}"), "messages[1].role"},
    {C, MESSAGES("{\"role\":\"robot\",\"content\":\"x\"}"), "messages[1].role"},
    {C, MESSAGES("{\"role\":\"function\",\"name\":\"f\",\"content\":\"x\"}"), "messages[1].role"},
    {C, MESSAGES("{\"role\":\"User\",\"content\":\"x\"}"), "messages[1].role"},
    {C, MESSAGES("{\"role\":\"user\"}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":null}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"system\",\"content\":null}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":5}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":{\"type\":\"text\",\"text\":\"x\"}}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[\"x\"]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[{\"text\":\"x\"}]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":1}]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"file:///x\"}}]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":[{\"type\":\"refusal\",\"refusal\":\"x\"}]}"), "messages[1].content"},
    {C, MESSAGES("{\"role\":\"user\",\"content\":\"x\",\"name\":1}"), "messages[1].name"},
    {C, MESSAGES("{\"role\":\"tool\",\"content\":\"x\"}"), "messages[1].tool_call_id"},
    {C, MESSAGES("{\"role\":\"tool\",\"content\":\"x\",\"tool_call_id\":1}"), "messages[1].tool_call_id"},
    {C, MESSAGES("{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"a\"}]}"), "messages[1].tool_calls"},
    {C, MESSAGES("{\"role\":\"assistant\",\"function_call\":{\"name\":\"f\",\"arguments\":\"\"}}"), "messages[1].function_call"},
    {C, MESSAGES("{\"role\":\"assistant\",\"audio\":{\"id\":\"a\"}}"), "messages[1].audio"},
    {T, "{\"-prompt\":0}", "prompt"},
    {T, "{\"prompt\":null}", "prompt"},
    {T, "{\"prompt\":7}", "prompt"},
    {T, "{\"prompt\":{}}", "prompt"},
    {T, "{\"prompt\":true}", "prompt"},
    {BOTH, "{\"stream_options\":{}}", "stream_options"},
    {BOTH, "{\"stream_options\":{\"include_usage\":true}}", "stream_options"},
    {BOTH, "{\"stream\":false,\"stream_options\":{\"include_usage\":true}}", "stream_options"},
    {BOTH, "{\"stream\":true,\"stream_options\":true}", "stream_options"},
    {BOTH, "{\"stream\":true,\"stream_options\":[]}", "stream_options"},
    {BOTH, "{\"stream\":true,\"stream_options\":{\"include_usage\":1}}", "stream_options.include_usage"},
    {BOTH, "{\"stream\":true,\"stream_options\":{\"include_obfuscation\":true}}", "stream_options.include_obfuscation"},
    {BOTH, "{\"stop\":\"\"}", "stop"},
    {BOTH, "{\"stop\":1}", "stop"},
    {BOTH, "{\"stop\":{}}", "stop"},
    {BOTH, "{\"stop\":[\"a\",2]}", "stop"},
    {BOTH, "{\"stop\":[\"a\",null]}", "stop"},
    {BOTH, "{\"stop\":[\"a\",\"\"]}", "stop"},
    {BOTH, "{\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "stop"},
    {BOTH, "{\"logit_bias\":[]}", "logit_bias"},
    {BOTH, "{\"logit_bias\":\"5\"}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"a\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"-1\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"01\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"1e3\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"99999999999\":1}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"5\":\"1\"}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"5\":true}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"5\":null}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"5\":100.5}}", "logit_bias"},
    {BOTH, "{\"logit_bias\":{\"5\":-101}}", "logit_bias"},
    {C, "{\"logprobs\":1}", "logprobs"},
    {C, "{\"logprobs\":\"true\"}", "logprobs"},
    {C, "{\"top_logprobs\":2}", "top_logprobs"},
    {C, "{\"logprobs\":false,\"top_logprobs\":0}", "top_logprobs"},
    {T, "{\"logprobs\":true}", "logprobs"},
    {T, "{\"logprobs\":6}", "logprobs"},
    {T, "{\"logprobs\":-1}", "logprobs"},
    {T, "{\"logprobs\":1.0}", "logprobs"},
    {T, "{\"logprobs\":\"1\"}", "logprobs"},
    {C, "{\"metadata\":[]}", "metadata"},
    {C, "{\"metadata\":\"a\"}", "metadata"},
    {C, "{\"metadata\":{\"a\":1}}", "metadata"},
    {C, "{\"metadata\":{\"a\":\"\",\"b\":\"\",\"c\":\"\",\"d\":\"\",\"e\":\"\",\"f\":\"\",\"g\":\"\",\"h\":\"\",\"i\":\"\",\"j\":\"\",\"k\":\"\","
        "\"l\":\"\",\"m\":\"\",\"n\":\"\",\"o\":\"\",\"p\":\"\",\"q\":\"\"}}", "metadata"},
    {C, "{\"service_tier\":1}", "service_tier"},
    {C, "{\"service_tier\":\"priority\"}", "service_tier"},
    {C, "{\"max_tokens\":0}", "max_tokens"},
    {C, "{\"max_tokens\":1,\"min_tokens\":2}", "min_tokens"},
    {C, "{\"max_tokens\":5,\"max_completion_tokens\":1,\"min_tokens\":2}", "min_tokens"},
    {T, "{\"min_tokens\":17}", "min_tokens"},
    {T, "{\"n\":3,\"best_of\":2}", "best_of"},
    {T, "{\"n\":1,\"best_of\":2,\"stream\":true}", "best_of"},
    {T, "{\"suffix\":\"tail\"}", "suffix"},
    {C, "{\"store\":true}", "store"},
    {C, "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]}", "tools"},
    {C, "{\"tool_choice\":\"auto\"}", "tool_choice"},
    {C, "{\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"f\"}}}", "tool_choice"},
    {C, "{\"response_format\":{\"type\":\"json_object\"}}", "response_format"},
    {C, "{\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\",\"schema\":{}}}}", "response_format"},
    {C, "{\"modalities\":[\"text\",\"audio\"]}", "modalities"},
};

START_TEST(test_refusals)
{
    const struct row *r = &refusals[_i];
    for (unsigned ep = C; ep <= T; ep <<= 1)
        if (r->endpoints & ep)
            refused(ep, r->extra, r->param);
}
END_TEST

static const struct row acceptances[] = {
    {BOTH, "{}", NULL},
    {BOTH, "{\"stop\":[]}", NULL},
    {BOTH, "{\"stop\":\"a\"}", NULL},
    {BOTH, "{\"stop\":[\"a\",\"b\",\"c\",\"d\"]}", NULL},
    {BOTH, "{\"logit_bias\":{}}", NULL},
    {BOTH, "{\"logit_bias\":{\"0\":-100,\"17\":100,\"3\":0.5}}", NULL},
    {BOTH, "{\"stream\":true,\"stream_options\":{}}", NULL},
    {BOTH, "{\"stream\":true,\"stream_options\":{\"include_usage\":false,\"include_obfuscation\":false,\"x\":null}}", NULL},
    {BOTH, "{\"stream_options\":null}", NULL},
    {BOTH, "{\"something_else\":[1,{\"a\":null}],\"__proto__\":{}}", NULL},
    {C, "{\"logprobs\":true,\"top_logprobs\":20}", NULL},
    {C, "{\"logprobs\":true,\"top_logprobs\":0}", NULL},
    {C, "{\"service_tier\":\"auto\"}", NULL},
    {C, "{\"service_tier\":\"default\",\"metadata\":{\"a\":\"b\"},\"user\":\"u\"}", NULL},
    {C, MESSAGES("{\"role\":\"assistant\"}"), NULL},
    {C, MESSAGES("{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[],\"audio\":null}"), NULL},
    {C, MESSAGES("{\"role\":\"developer\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}],\"name\":\"n\"}"), NULL},
    {C, MESSAGES("{\"role\":\"assistant\",\"content\":[{\"type\":\"refusal\",\"refusal\":\"no\"}],\"refusal\":null}"), NULL},
    {C, MESSAGES("{\"role\":\"tool\",\"content\":\"\",\"tool_call_id\":\"c\"}"), NULL},
    {T, "{\"prompt\":\"\"}", NULL},
    {T, "{\"prompt\":[1,2]}", NULL},
    {T, "{\"prompt\":[\"a\",\"b\"]}", NULL},
    {T, "{\"prompt\":[[1],[2,3]]}", NULL},
    {T, "{\"logprobs\":0,\"echo\":true,\"max_tokens\":0}", NULL},
    {T, "{\"n\":2,\"best_of\":2,\"stream\":true}", NULL},
};

START_TEST(test_acceptances)
{
    const struct row *r = &acceptances[_i];
    for (unsigned ep = C; ep <= T; ep <<= 1)
        if (r->endpoints & ep)
            accepted(ep, r->extra);
}
END_TEST

/* ---- rows from the table ------------------------------------------------------------------------------------------- */

/* What a field needs beside it to be judged alone. */
static const char *company(const char *name)
{
    if (strcmp(name, "top_logprobs") == 0)
        return "\"logprobs\":true,";
    if (strcmp(name, "min_tokens") == 0)
        return "\"max_tokens\":2147483647,";
    return "";
}

static void try_value(const struct pl_field_row *f, unsigned ep, const char *value, bool good)
{
    char extra[512];
    snprintf(extra, sizeof extra, "{%s\"%s\":%s}", company(f->name), f->name, value);
    if (good)
        accepted(ep, extra);
    else
        refused(ep, extra, f->name);
}

static void try_number(const struct pl_field_row *f, unsigned ep, double v, bool good)
{
    char text[64];
    if (v < -9e15 || v > 9e15) /* cannot be told from its neighbours as a double */
        return;
    snprintf(text, sizeof text, f->kind == 'I' ? "%.0f" : "%.17g", v);
    try_value(f, ep, text, good);
}

static void try_field(const struct pl_field_row *f, unsigned ep)
{
    const struct { const char *value; char kind; } kinds[] = {
        {"true", 'B'}, {"\"x\"", 'T'}, {"\"1\"", 'T'}, {"1.0", 'R'}, {"1", 'I'}, {"[]", '-'}, {"{}", '-'}, {"[1]", '-'}, {"{\"a\":1}", '-'},
    };
    try_value(f, ep, "null", true);
    if (f->kind == 'N')
        try_value(f, ep, f->only, true);
    for (size_t i = 0; i < PL_COUNT_OF(kinds); i++) {
        json_t *value = json_loads(kinds[i].value, JSON_DECODE_ANY, NULL), *only = f->only ? json_loads(f->only, JSON_DECODE_ANY, NULL) : NULL;
        const bool good = f->kind == 'N' ? json_equal(value, only) : f->kind == kinds[i].kind || (f->kind == 'R' && kinds[i].kind == 'I');
        json_decref(value);
        json_decref(only);
        try_value(f, ep, kinds[i].value, good);
    }
    if (f->kind == 'R' || f->kind == 'I') {
        const double step = f->kind == 'I' ? 1 : 1e-6;
        try_number(f, ep, f->min, !(strcmp(f->name, "max_tokens") == 0 && ep == C));
        try_number(f, ep, f->max, true);
        try_number(f, ep, f->min - step, false);
        try_number(f, ep, f->max + step, false);
        try_number(f, ep, -4e15, f->min < -4e15);
        try_number(f, ep, 4e15, f->max > 4e15);
    }
}

START_TEST(test_every_field)
{
    size_t n;
    const struct pl_field_row *f = &pl_fields(&n)[_i];
    for (unsigned ep = C; ep <= T; ep <<= 1) {
        if (!(f->endpoints & ep))
            continue;
        size_t rows = 0;
        for (size_t i = 0; i < PL_COUNT_OF(refusals); i++) {
            const size_t len = strlen(f->name);
            rows += (refusals[i].endpoints & ep) && strncmp(refusals[i].param, f->name, len) == 0 &&
                    strchr(".[", refusals[i].param[len]) != NULL;
        }
        if (f->kind == 'O')
            ck_assert_msg(rows >= 2, "'%s' needs rows of wrong values in this file", f->name);
        else
            try_field(f, ep);
    }
}
END_TEST

START_TEST(test_fields_of_the_other_endpoint_are_unknown)
{
    accepted(C, "{\"prompt\":7,\"echo\":7,\"best_of\":\"x\",\"suffix\":\"x\"}");
    accepted(T, "{\"messages\":7,\"tools\":7,\"top_logprobs\":\"x\"}");
}
END_TEST

/* ---- whole bodies -------------------------------------------------------------------------------------------------- */

static const char *const malformed[] = {
    "", " ", "{", "}", "[", "nul", "{\"model\":\"m\"", "{\"model\":\"m\",}", "{\"model\":\"m\" \"a\":1}", "{'model':'m'}",
    "{\"model\":\"m\",\"n\":01}", "{\"model\":\"m\",\"n\":+1}", "{\"model\":\"m\",\"n\":.5}", "{\"model\":\"m\",\"n\":NaN}",
    "{\"model\":\"m\",\"n\":Infinity}", "{\"model\":\"m\",\"temperature\":1e400}", "{\"model\":\"m\",\"seed\":9223372036854775808}",
    "{\"model\":\"m\"} {}", "{\"model\":\"m\"}x", "// x\n{}", "\xef\xbb\xbf{}", "{\"model\":\"m\",\"model\":\"m\"}",
    "{\"model\":\"\\ud800\"}", "{\"model\":\"\xff\"}", "{\"model\":\"\xc0\xaf\"}", "{\"model\":\"a\x01\"}", "{\"model\":\"\\u0000\"}",
    "{\"\\u0000\":1}", "\"text\"", "[]", "[{\"model\":\"m\"}]", "null", "17", "true",
};

START_TEST(test_malformed)
{
    struct pl_err err = {0};
    for (unsigned ep = C; ep <= T; ep <<= 1) {
        struct pl_params p;
        ck_assert_int_eq(pl_params_read(&p, ep, malformed[_i], strlen(malformed[_i]), &err), PL_EINVAL);
        ck_assert_str_eq(err.param, "");
        ck_assert_int_gt(strlen(err.msg), 10);
    }
}
END_TEST

static pl_status read_repeated(const char *before, const char *piece, size_t count, const char *after, struct pl_err *err)
{
    struct pl_buf b;
    struct pl_params p;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, before);
    for (size_t i = 0; i < count; i++)
        pl_buf_adds(&b, piece);
    pl_buf_adds(&b, after);
    const pl_status st = pl_params_read(&p, C, pl_buf_str(&b), b.len, err);
    if (st == PL_OK)
        pl_params_fini(&p);
    pl_buf_fini(&b);
    return st;
}

START_TEST(test_bounded)
{
    struct pl_err err = {0};
    ck_assert_int_eq(read_repeated("", "[", 65, "", &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "deep"));
    ck_assert_int_eq(read_repeated("", "[", 5000000, "", &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "deep"));
    ck_assert_int_eq(read_repeated("{\"x\":[", "{},", 100000, "{}]}", &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "objects"));
    ck_assert_int_eq(read_repeated("{\"x\":[", "1,", 2000000, "1]}", &err), PL_EINVAL);
    ck_assert_ptr_nonnull(strstr(err.msg, "values"));
    /* brackets inside strings are text */
    ck_assert_int_eq(read_repeated("{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"", "[{,\\\"", 200000, "\"}]}", &err), PL_OK);
    /* just inside the depth */
    ck_assert_int_eq(read_repeated("{\"model\":\"m\",\"messages\":[{}],\"x\":", "[", 63,
        "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}", &err),
                     PL_OK);
    /* messages */
    ck_assert_int_eq(read_repeated("{\"model\":\"m\",\"messages\":[", "{},", PL_MAX_MESSAGES, "{}]}", &err), PL_EINVAL);
    ck_assert_str_eq(err.param, "messages");
}
END_TEST

START_TEST(test_long_stop)
{
    char extra[PL_MAX_STOP_BYTES + 32];
    snprintf(extra, sizeof extra, "{\"stop\":\"%0*d\"}", PL_MAX_STOP_BYTES, 0);
    accepted(T, extra);
    snprintf(extra, sizeof extra, "{\"stop\":\"%0*d\"}", PL_MAX_STOP_BYTES + 1, 0);
    refused(T, extra, "stop");
}
END_TEST

START_TEST(test_values)
{
    struct pl_params p;
    struct pl_err err;
    ck_assert_int_eq(read_body(&p, C, bases[C], &err), PL_OK);
    ck_assert(p.temperature == 1 && p.top_p == 1 && p.min_p == 0 && p.repetition_penalty == 1 && p.presence_penalty == 0);
    ck_assert(p.n == 1 && p.top_k == 0 && p.min_tokens == 0 && p.max_tokens == PL_PARAM_UNSET && p.seed == PL_PARAM_UNSET);
    ck_assert(!p.stream && !p.include_usage && !p.ignore_eos && p.add_generation_prompt && p.top_logprobs_n == -1 && p.n_stops == 0);
    pl_params_fini(&p);
    ck_assert_int_eq(read_body(&p, T, bases[T], &err), PL_OK);
    ck_assert_int_eq(p.max_tokens, 16);
    ck_assert(!p.echo && p.best_of == PL_PARAM_UNSET);
    pl_params_fini(&p);

    char *body = body_with(C, "{\"temperature\":0.5,\"top_p\":0,\"max_tokens\":9,\"max_completion_tokens\":7,\"n\":3,\"seed\":-5,\"stop\":[\"a\",\"bc\"],"
                              "\"logprobs\":true,\"top_logprobs\":4,\"stream\":true,\"stream_options\":{\"include_usage\":true},"
                              "\"frequency_penalty\":-2,\"service_tier\":\"auto\",\"logit_bias\":{\"4\":1}}");
    ck_assert_int_eq(read_body(&p, C, body, &err), PL_OK);
    ck_assert(p.temperature == 0.5 && p.top_p == 0 && p.frequency_penalty == -2);
    ck_assert(p.max_tokens == 7 && p.n == 3 && p.seed == -5 && p.top_logprobs_n == 4);
    ck_assert(p.stream && p.include_usage && p.has_tier && p.n_stops == 2 && p.stop_bytes[1] == 2);
    ck_assert_str_eq(p.stops[1], "bc");
    ck_assert_int_eq(json_object_size(p.logit_bias), 1);
    pl_params_fini(&p);
    free(body);
}
END_TEST

/* ---- error bodies -------------------------------------------------------------------------------------------------- */

START_TEST(test_error_codes)
{
    static const struct { pl_status code; int http; const char *type; } rows[] = {
        {PL_EINVAL, 400, "invalid_request_error"}, {PL_ERANGE, 400, "invalid_request_error"}, {PL_ENOTSUP, 400, "invalid_request_error"},
        {PL_ETOOLONG, 400, "invalid_request_error"}, {PL_ENOENT, 404, "invalid_request_error"}, {PL_EFULL, 429, "rate_limit_error"},
        {PL_ESTOPPED, 503, "server_error"}, {PL_ENOMEM, 503, "server_error"}, {PL_ENOPAGE, 503, "server_error"},
        {PL_EDEVICE, 503, "server_error"}, {PL_ERANK, 503, "server_error"}, {PL_ENOSPC, 507, "server_error"},
        {PL_EBUSY, 503, "server_error"}, {PL_EFORMAT, 500, "server_error"}, {PL_EIO, 500, "server_error"}, {PL_OK, 500, "server_error"},
    };
    ck_assert_int_eq(PL_COUNT_OF(rows), PL_STATUS_COUNT); /* each status has a row */
    for (size_t i = 0; i < PL_COUNT_OF(rows); i++) {
        const struct pl_apierr a = pl_apierr_of(rows[i].code);
        ck_assert_int_eq(a.http, rows[i].http);
        ck_assert_str_eq(a.type, rows[i].type);
        ck_assert(a.retry_after > 0 ? a.http == 429 || a.http == 503 : a.http != 429 && a.http != 503);
    }
}
END_TEST

START_TEST(test_error_body)
{
    struct pl_buf b;
    struct pl_err err;
    pl_buf_init(&b, 0);
    char name[800] = "";
    for (int i = 0; i < 199; i++)
        strcat(name, "\xe2\x82\xac");
    pl_err_set(&err, PL_EINVAL, "stop", "a\"b\\c\n%s", name); /* cut in the middle of a character */
    pl_apierr_write(&b, &err);
    ck_assert(pl_utf8_valid(pl_buf_str(&b), b.len));
    json_t *root = json_loads(pl_buf_str(&b), JSON_REJECT_DUPLICATES, NULL), *e = json_object_get(root, "error");
    ck_assert_ptr_nonnull(e);
    ck_assert_int_eq(json_object_size(root), 1);
    ck_assert_int_eq(json_object_size(e), 4);
    ck_assert_ptr_nonnull(strstr(json_string_value(json_object_get(e, "message")), "a\"b\\c\n\xe2\x82\xac"));
    ck_assert_str_eq(json_string_value(json_object_get(e, "param")), "stop");
    ck_assert_str_eq(json_string_value(json_object_get(e, "type")), "invalid_request_error");
    ck_assert(json_is_null(json_object_get(e, "code")));
    json_decref(root);
    pl_buf_clear(&b);
    pl_err_set(&err, PL_ENOMEM, "", "%s", "");
    pl_apierr_write(&b, &err);
    ck_assert_str_eq(pl_buf_str(&b), "{\"error\":{\"message\":\"out of memory\",\"type\":\"server_error\",\"param\":null,\"code\":\"out_of_memory\"}}");
    pl_buf_fini(&b);
}
END_TEST

Suite *suite_schema(void)
{
    size_t n;
    (void)pl_fields(&n);
    Suite *s = suite_create("schema");
    TCase *t = tcase_create("fields");
    tcase_add_loop_test(t, test_refusals, 0, (int)PL_COUNT_OF(refusals));
    tcase_add_loop_test(t, test_acceptances, 0, (int)PL_COUNT_OF(acceptances));
    tcase_add_loop_test(t, test_every_field, 0, (int)n);
    tcase_add_test(t, test_fields_of_the_other_endpoint_are_unknown);
    tcase_add_test(t, test_values);
    tcase_add_test(t, test_long_stop);
    suite_add_tcase(s, t);
    t = tcase_create("bodies");
    tcase_add_loop_test(t, test_malformed, 0, (int)PL_COUNT_OF(malformed));
    tcase_add_test(t, test_bounded);
    suite_add_tcase(s, t);
    t = tcase_create("errors");
    tcase_add_test(t, test_error_codes);
    tcase_add_test(t, test_error_body);
    suite_add_tcase(s, t);
    return s;
}
