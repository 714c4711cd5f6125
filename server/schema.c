/* schema: reads a request's JSON body into plain values, by the table in fields.def.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/schema.h"

#include <math.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/mem.h"

#define PL_LOG_MODULE "api"

struct field {
    struct pl_field_row row;
    size_t offset;
    double def_real;
    int64_t def, min, max;
    pl_status (*read)(struct pl_params *p, const json_t *v, struct pl_err *err);
};

/* ---- fields with a shape of their own ------------------------------------------------------------------------------ */

static pl_status wrong_type(const char *name, const char *expected, const json_t *v, struct pl_err *err)
{
    return pl_fail_param(err, PL_EINVAL, name, "'%s' must be %s, not %s", name, expected, pl_json_kind(v));
}

static pl_status read_model(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    p->model = json_string_value(v);
    return p->model != NULL ? PL_OK : wrong_type("model", "a string", v, err);
}

static pl_status read_messages(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (!json_is_array(v))
        return wrong_type("messages", "an array of messages", v, err);
    if (json_array_size(v) == 0 || json_array_size(v) > PL_MAX_MESSAGES)
        return pl_fail_param(err, PL_EINVAL, "messages", "'messages' must have 1 to %d messages, not %zu", PL_MAX_MESSAGES,
                             json_array_size(v));
    p->messages = v;
    return PL_OK;
}

static pl_status read_prompt(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (!json_is_string(v) && !json_is_array(v))
        return wrong_type("prompt", "a string, an array of strings, an array of tokens, or an array of token arrays", v, err);
    p->prompt = v;
    return PL_OK;
}

static pl_status read_stream_options(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    const char *key;
    json_t *value;
    if (!json_is_object(v))
        return wrong_type("stream_options", "an object", v, err);
    json_object_foreach((json_t *)(uintptr_t)v, key, value)
    {
        bool usage = strcmp(key, "include_usage") == 0;
        if (json_is_null(value) || (!usage && strcmp(key, "include_obfuscation") != 0))
            continue;
        if (!json_is_boolean(value))
            return wrong_type(usage ? "stream_options.include_usage" : "stream_options.include_obfuscation", "a boolean", value, err);
        if (usage)
            p->include_usage = json_is_true(value);
        else if (json_is_true(value))
            return pl_fail_param(err, PL_ENOTSUP, "stream_options.include_obfuscation",
                                 "this server does not pad its streams: leave out 'stream_options.include_obfuscation'");
    }
    return PL_OK;
}

static pl_status add_stop(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (!json_is_string(v))
        return wrong_type("stop", "a string or an array of strings", v, err);
    size_t n = json_string_length(v);
    if (n == 0 || n > PL_MAX_STOP_BYTES)
        return pl_fail_param(err, PL_EINVAL, "stop", "a string in 'stop' must have 1 to %d bytes, not %zu", PL_MAX_STOP_BYTES, n);
    p->stops[p->n_stops] = json_string_value(v);
    p->stop_bytes[p->n_stops++] = n;
    return PL_OK;
}

static pl_status read_stop(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (!json_is_array(v))
        return add_stop(p, v, err);
    if (json_array_size(v) > PL_MAX_STOPS)
        return pl_fail_param(err, PL_EINVAL, "stop", "'stop' may have at most %d strings, not %zu", PL_MAX_STOPS, json_array_size(v));
    pl_status st = PL_OK;
    for (size_t i = 0; i < json_array_size(v) && st == PL_OK; i++)
        st = add_stop(p, json_array_get(v, i), err);
    return st;
}

static pl_status read_logit_bias(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    const char *key;
    json_t *value;
    if (!json_is_object(v))
        return wrong_type("logit_bias", "an object that maps token ids to numbers", v, err);
    if (json_object_size(v) > PL_MAX_BIAS)
        return pl_fail_param(err, PL_EINVAL, "logit_bias", "'logit_bias' may have at most %d tokens", PL_MAX_BIAS);
    json_object_foreach((json_t *)(uintptr_t)v, key, value)
    {
        size_t digits = strspn(key, "0123456789");
        if (digits == 0 || key[digits] != '\0' || digits > 9 || (digits > 1 && key[0] == '0'))
            return pl_fail_param(err, PL_EINVAL, "logit_bias", "a key of 'logit_bias' must be a token id such as \"42\", not \"%.40s\"", key);
        if (!json_is_number(value) || json_number_value(value) < -100 || json_number_value(value) > 100)
            return pl_fail_param(err, PL_EINVAL, "logit_bias", "the bias of token %s must be a number from -100 to 100", key);
    }
    p->logit_bias = v;
    return PL_OK;
}

/* A boolean for chat, a count for completions. */
static pl_status read_logprobs(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (p->endpoint == PL_EP_CHAT) {
        if (!json_is_boolean(v))
            return wrong_type("logprobs", "a boolean", v, err);
        p->top_logprobs_n = json_is_true(v) ? 0 : -1;
        return PL_OK;
    }
    if (!json_is_integer(v))
        return wrong_type("logprobs", "an integer", v, err);
    if (json_integer_value(v) < 0 || json_integer_value(v) > 5)
        return pl_fail_param(err, PL_EINVAL, "logprobs", "'logprobs' must be from 0 to 5, not %lld", (long long)json_integer_value(v));
    p->top_logprobs_n = (int)json_integer_value(v);
    return PL_OK;
}

static pl_status read_metadata(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    const char *key;
    json_t *value;
    (void)p;
    if (!json_is_object(v))
        return wrong_type("metadata", "an object of strings", v, err);
    if (json_object_size(v) > 16)
        return pl_fail_param(err, PL_EINVAL, "metadata", "'metadata' may have at most 16 entries");
    json_object_foreach((json_t *)(uintptr_t)v, key, value)
    {
        if (!json_is_string(value))
            return wrong_type("metadata", "an object of strings", v, err);
    }
    return PL_OK;
}

static pl_status read_service_tier(struct pl_params *p, const json_t *v, struct pl_err *err)
{
    if (!json_is_string(v))
        return wrong_type("service_tier", "a string", v, err);
    if (strcmp(json_string_value(v), "auto") != 0 && strcmp(json_string_value(v), "default") != 0)
        return pl_fail_param(err, PL_EINVAL, "service_tier", "'service_tier' must be \"auto\" or \"default\": this server has one tier");
    p->has_tier = true;
    return PL_OK;
}

/* ---- the table ----------------------------------------------------------------------------------------------------- */

static const struct field fields[] = {
#define C PL_EP_CHAT
#define T PL_EP_COMPLETIONS
#define UNSET PL_PARAM_UNSET
#define AT(name) offsetof(struct pl_params, name)
#define REAL(ep, n, d, lo, hi) {.row = {#n, 'R', ep, lo, hi, NULL}, .offset = AT(n), .def_real = d},
#define INT(ep, n, d, lo, hi) {.row = {#n, 'I', ep, (double)(lo), (double)(hi), NULL}, .offset = AT(n), .def = d, .min = lo, .max = hi},
#define BOOL(ep, n, d) {.row = {#n, 'B', ep, 0, 0, NULL}, .offset = AT(n), .def = d},
#define OWN(ep, n) {.row = {#n, 'O', ep, 0, 0, NULL}, .read = read_##n},
#define TEXT(ep, n) {.row = {#n, 'T', ep, 0, 0, NULL}},
#define ONLY(ep, n, v) {.row = {#n, 'N', ep, 0, 0, v}},
#include "server/fields.def"
#undef C
#undef T
#undef REAL
#undef INT
#undef BOOL
#undef OWN
#undef TEXT
#undef ONLY
};

const struct pl_field_row *pl_fields(size_t *n)
{
    static struct pl_field_row rows[PL_COUNT_OF(fields)];
    for (size_t i = 0; i < PL_COUNT_OF(fields); i++)
        rows[i] = fields[i].row;
    *n = PL_COUNT_OF(fields);
    return rows;
}

static pl_status read_number(const struct field *f, void *at, const json_t *v, struct pl_err *err)
{
    const char *name = f->row.name;
    if (f->row.kind == 'R') {
        double x = json_number_value(v);
        if (!json_is_number(v))
            return wrong_type(name, "a number", v, err);
        if (!(x >= f->row.min && x <= f->row.max))
            return pl_fail_param(err, PL_EINVAL, name, "'%s' must be from %g to %g, not %g", name, f->row.min, f->row.max, x);
        *(double *)at = x;
        return PL_OK;
    }
    int64_t x = json_integer_value(v);
    if (!json_is_integer(v))
        return wrong_type(name, "an integer", v, err);
    if (x < f->min || x > f->max)
        return pl_fail_param(err, PL_EINVAL, name, "'%s' must be from %lld to %lld, not %lld", name, (long long)f->min,
                             (long long)f->max, (long long)x);
    *(int64_t *)at = x;
    return PL_OK;
}

static pl_status read_only(const struct field *f, const json_t *v, struct pl_err *err)
{
    json_t *allowed = json_loads(f->row.only, JSON_DECODE_ANY, NULL);
    bool same = allowed != NULL && json_equal(v, allowed);
    json_decref(allowed);
    if (same)
        return PL_OK;
    if (strcmp(f->row.only, "null") == 0)
        return pl_fail_param(err, PL_ENOTSUP, f->row.name, "'%s' is not supported by this server: leave it out", f->row.name);
    return pl_fail_param(err, PL_ENOTSUP, f->row.name, "'%s' is not supported by this server: leave it out, or set it to %s", f->row.name,
                         f->row.only);
}

static pl_status read_field(struct pl_params *p, const struct field *f, const json_t *v, struct pl_err *err)
{
    void *at = (char *)p + f->offset;
    switch (f->row.kind) {
    case 'R':
    case 'I': return read_number(f, at, v, err);
    case 'B':
        if (!json_is_boolean(v))
            return wrong_type(f->row.name, "a boolean", v, err);
        *(bool *)at = json_is_true(v);
        return PL_OK;
    case 'O': return f->read(p, v, err);
    case 'N': return read_only(f, v, err);
    default: return json_is_string(v) ? PL_OK : wrong_type(f->row.name, "a string", v, err);
    }
}

static void set_defaults(struct pl_params *p)
{
    p->top_logprobs_n = -1;
    for (size_t i = 0; i < PL_COUNT_OF(fields); i++) {
        const struct field *f = &fields[i];
        void *at = (char *)p + f->offset;
        if (f->row.kind == 'R')
            *(double *)at = f->def_real;
        else if (f->row.kind == 'I')
            *(int64_t *)at = f->def;
        else if (f->row.kind == 'B')
            *(bool *)at = f->def != 0;
    }
}

static void note_unknown(const struct pl_params *p)
{
    const char *key;
    json_t *value;
    char names[256] = "";
    size_t used = 0, unknown = 0;
    json_object_foreach(p->root, key, value)
    {
        size_t i = 0;
        while (i < PL_COUNT_OF(fields) && (strcmp(fields[i].row.name, key) != 0 || !(fields[i].row.endpoints & p->endpoint)))
            i++;
        if (i < PL_COUNT_OF(fields))
            continue;
        unknown++;
        size_t n = strspn(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.");
        if (n > 0 && n <= 64 && key[n] == '\0' && used + n + 2 < sizeof names) {
            memcpy(names + used, key, n);
            used += n;
            names[used++] = ' ';
            names[used] = '\0';
        }
    }
    if (unknown > 0)
        pl_log_info("ignored %zu unknown field(s) of a request: %s", unknown, names);
}

/* ---- whole bodies -------------------------------------------------------------------------------------------------- */

static pl_status missing(const char *name, struct pl_err *err)
{
    return pl_fail_param(err, PL_EINVAL, name, "'%s' is required", name);
}

/* What no field alone can tell. */
static pl_status check_together(struct pl_params *p, struct pl_err *err)
{
    bool chat = p->endpoint == PL_EP_CHAT;
    if (p->model == NULL)
        return missing("model", err);
    if (chat && p->messages == NULL)
        return missing("messages", err);
    if (!chat && p->prompt == NULL)
        return missing("prompt", err);
    const json_t *options = json_object_get(p->root, "stream_options");
    if (options != NULL && !json_is_null(options) && !p->stream)
        return pl_fail_param(err, PL_EINVAL, "stream_options", "'stream_options' is only allowed when 'stream' is true");
    if (chat && p->top_logprobs != PL_PARAM_UNSET) {
        if (p->top_logprobs_n < 0)
            return pl_fail_param(err, PL_EINVAL, "top_logprobs", "'top_logprobs' needs 'logprobs' to be true");
        p->top_logprobs_n = (int)p->top_logprobs;
    }
    if (chat && p->max_tokens == 0)
        return pl_fail_param(err, PL_EINVAL, "max_tokens", "'max_tokens' must be at least 1");
    if (p->max_completion_tokens != PL_PARAM_UNSET)
        p->max_tokens = p->max_completion_tokens;
    if (!chat && p->best_of != PL_PARAM_UNSET && p->best_of < p->n)
        return pl_fail_param(err, PL_EINVAL, "best_of", "'best_of' (%lld) must be at least 'n' (%lld)", (long long)p->best_of,
                             (long long)p->n);
    if (!chat && p->best_of != PL_PARAM_UNSET && p->best_of > p->n && p->stream)
        return pl_fail_param(err, PL_EINVAL, "best_of", "'best_of' above 'n' cannot be streamed: the best choice is known at the end only");
    if (!chat && p->max_tokens == PL_PARAM_UNSET)
        p->max_tokens = PL_COMPLETIONS_MAX_TOKENS;
    if (p->max_tokens != PL_PARAM_UNSET && p->min_tokens > p->max_tokens)
        return pl_fail_param(err, PL_EINVAL, "min_tokens", "'min_tokens' (%lld) is more than the %lld that may come", (long long)p->min_tokens,
                             (long long)p->max_tokens);
    return PL_OK;
}

pl_status pl_params_read(struct pl_params *p, unsigned endpoint, const char *body, size_t n, struct pl_err *err)
{
    *p = (struct pl_params){.endpoint = endpoint};
    pl_status st = pl_json_read(&p->root, "the body", body, n, err);
    if (st != PL_OK)
        return st;
    set_defaults(p);
    for (size_t i = 0; i < PL_COUNT_OF(fields) && st == PL_OK; i++) {
        const json_t *v = fields[i].row.endpoints & endpoint ? json_object_get(p->root, fields[i].row.name) : NULL;
        if (v != NULL && !json_is_null(v))
            st = read_field(p, &fields[i], v, err);
    }
    if (st == PL_OK)
        st = check_together(p, err);
    if (st == PL_OK)
        note_unknown(p);
    else
        pl_params_fini(p);
    return st;
}

void pl_params_fini(struct pl_params *p)
{
    json_decref(p->root);
    p->root = NULL;
}
