/* dataset: the forms of a line, and what may stand in them.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "core/base/buf.h"
#include "core/base/json.h"
#include "core/train/dataset_int.h"

bool pl_data_bad(struct pl_data_fault *fault, int message, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(fault->reason, sizeof fault->reason, fmt, ap);
    va_end(ap);
    fault->message = message;
    return false;
}

/* The first member that is not one of names (NULL-terminated). */
static const char *stranger(const json_t *object, const char *const *names)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)object, key, v)
    {
        size_t i = 0;
        while (names[i] != NULL && strcmp(names[i], key) != 0)
            i++;
        if (names[i] == NULL)
            return key;
    }
    return NULL;
}

static bool is_empty(const json_t *v)
{
    return v == NULL || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0);
}

static bool read_parts(const json_t *v, int at, struct pl_chat_message *m, struct pl_arena *a, struct pl_data_fault *fault)
{
    struct pl_buf text;
    pl_buf_init(&text, 0);
    bool good = json_array_size(v) > 0 || pl_data_bad(fault, at, "'content' has no parts");
    for (size_t i = 0; i < json_array_size(v) && good; i++) {
        const json_t *part = json_array_get(v, i), *s = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (type == NULL || strcmp(type, "text") != 0 || !json_is_string(s))
            good = pl_data_bad(fault, at, "part %zu of 'content' is not {\"type\":\"text\",\"text\":…}; only text is supported", i);
        else
            pl_buf_add(&text, json_string_value(s), json_string_length(s));
    }
    if (good) {
        m->content = text.failed ? NULL : pl_arena_strndup(a, pl_buf_str(&text), text.len);
        m->n_content = text.len;
        good = m->content != NULL || pl_data_bad(fault, at, "out of memory");
    }
    pl_buf_fini(&text);
    return good;
}

static bool read_content(const json_t *v, int at, struct pl_chat_message *m, struct pl_arena *a, struct pl_data_fault *fault)
{
    if (json_is_array(v))
        return read_parts(v, at, m, a, fault);
    if (v == NULL)
        return pl_data_bad(fault, at, "'content' is missing");
    if (!json_is_string(v))
        return pl_data_bad(fault, at, "'content' must be a string or an array of text parts, not %s", pl_json_kind(v));
    m->content = json_string_value(v);
    m->n_content = json_string_length(v);
    return true;
}

static bool read_string(const json_t *message, const char *name, int at, const char **out, struct pl_data_fault *fault)
{
    const json_t *v = json_object_get(message, name);
    if (v == NULL || json_is_null(v))
        return true;
    *out = json_string_value(v);
    return *out != NULL || pl_data_bad(fault, at, "'%s' must be a string, not %s", name, pl_json_kind(v));
}

static bool read_weight(const json_t *v, int at, const char *role, bool *trained, struct pl_data_fault *fault)
{
    *trained = strcmp(role, "assistant") == 0;
    if (v == NULL || json_is_null(v))
        return true;
    if (!*trained)
        return pl_data_bad(fault, at, "'weight' belongs to messages of the assistant, not of the %s", role);
    if (!json_is_number(v) || (json_number_value(v) != 0 && json_number_value(v) != 1))
        return pl_data_bad(fault, at, "'weight' must be 0 or 1");
    *trained = json_number_value(v) != 0;
    return true;
}

static bool read_message(const json_t *v, int at, struct pl_chat_message *m, bool *trained, struct pl_arena *a, struct pl_data_fault *fault)
{
    static const char *const names[] = {"role", "content", "name", "weight", "tool_call_id", "tool_calls", "function_call", "refusal", "audio", NULL};
    static const char *const refused[] = {"tool_calls", "function_call", "refusal", "audio"};
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
    if (!json_is_object(v))
        return pl_data_bad(fault, at, "it must be an object, not %s", pl_json_kind(v));
    const json_t *role = json_object_get(v, "role");
    if (role == NULL)
        return pl_data_bad(fault, at, "Discriminator 'role' is missing in value");
    for (size_t i = 0; i < PL_COUNT_OF(roles); i++)
        if (json_is_string(role) && strcmp(json_string_value(role), roles[i]) == 0)
            m->role = roles[i];
    if (m->role == NULL)
        return pl_data_bad(fault, at, "'role' must be system, developer, user, assistant or tool, not %s%.60s",
                           json_is_string(role) ? "" : pl_json_kind(role), json_is_string(role) ? json_string_value(role) : "");
    const char *odd = stranger(v, names);
    if (odd != NULL)
        return pl_data_bad(fault, at, "'%.60s' is not a field of a message", odd);
    for (size_t i = 0; i < PL_COUNT_OF(refused); i++)
        if (!is_empty(json_object_get(v, refused[i])))
            return pl_data_bad(fault, at, "'%s' is not supported by this server", refused[i]);
    return read_string(v, "name", at, &m->name, fault) && read_string(v, "tool_call_id", at, &m->tool_call_id, fault) &&
           read_weight(json_object_get(v, "weight"), at, m->role, trained, fault) &&
           read_content(json_object_get(v, "content"), at, m, a, fault);
}

static bool read_messages(struct pl_data_line *l, const json_t *list, struct pl_arena *a, struct pl_data_fault *fault)
{
    const size_t n = json_array_size(list);
    if (!json_is_array(list))
        return pl_data_bad(fault, -1, "'messages' must be an array, not %s", pl_json_kind(list));
    if (n == 0 || n > PL_DATA_MAX_MESSAGES)
        return pl_data_bad(fault, -1, "'messages' must have 1 to %d messages, not %zu", PL_DATA_MAX_MESSAGES, n);
    l->messages = pl_arena_zalloc(a, (n + 1) * sizeof *l->messages);
    l->trained = pl_arena_zalloc(a, (n + 1) * sizeof *l->trained);
    l->n_messages = n;
    if (l->messages == NULL || l->trained == NULL)
        return pl_data_bad(fault, -1, "out of memory");
    for (size_t i = 0; i < n; i++)
        if (!read_message(json_array_get(list, i), (int)i, &l->messages[i], &l->trained[i], a, fault))
            return false;
    return true;
}

static bool no_tools(const json_t *v, struct pl_data_fault *fault)
{
    static const char *const refused[] = {"tools", "functions"};
    for (size_t i = 0; i < PL_COUNT_OF(refused); i++)
        if (!is_empty(json_object_get(v, refused[i])))
            return pl_data_bad(fault, -1, "'%s' is not supported by this server", refused[i]);
    return true;
}

static bool parse_chat(struct pl_data_line *l, const json_t *root, struct pl_arena *a, struct pl_data_fault *fault)
{
    if (!no_tools(root, fault) || !read_messages(l, json_object_get(root, "messages"), a, fault))
        return false;
    bool any = false;
    for (size_t i = 0; i < l->n_messages; i++)
        any = any || l->trained[i];
    const int last = (int)l->n_messages - 1;
    if (strcmp(l->messages[last].role, "assistant") != 0)
        return pl_data_bad(fault, last, "the last message must be the assistant's, not the %s's", l->messages[last].role);
    return any || pl_data_bad(fault, -1, "no message of the assistant has weight 1: nothing would be trained");
}

static bool read_text(const json_t *root, const char *name, struct pl_data_text *t, struct pl_data_fault *fault)
{
    const json_t *v = json_object_get(root, name);
    if (!json_is_string(v))
        return pl_data_bad(fault, -1, v == NULL ? "'%s' is missing%s" : "'%s' must be a string, not %s", name, v == NULL ? "" : pl_json_kind(v));
    *t = (struct pl_data_text){json_string_value(v), json_string_length(v)};
    return true;
}

static bool parse_completion(struct pl_data_line *l, const json_t *root, struct pl_data_fault *fault)
{
    if (!read_text(root, "prompt", &l->prompt, fault) || !read_text(root, "completion", &l->completion, fault))
        return false;
    return l->completion.n > 0 || pl_data_bad(fault, -1, "'completion' is empty: nothing would be trained");
}

static bool parse_text(struct pl_data_line *l, const json_t *root, struct pl_data_fault *fault)
{
    if (!read_text(root, "text", &l->completion, fault))
        return false;
    return l->completion.n > 0 || pl_data_bad(fault, -1, "'text' is empty");
}

static bool parse_output(struct pl_data_line *l, size_t i, const json_t *root, const char *name, const char *other, struct pl_arena *a,
                         struct pl_data_fault *fault)
{
    const json_t *v = json_object_get(root, name) != NULL ? json_object_get(root, name) : json_object_get(root, other);
    bool trained;
    if (!json_is_array(v) || json_array_size(v) != 1)
        return pl_data_bad(fault, -1, "'%s' must be an array of one message of the assistant", name);
    if (!read_message(json_array_get(v, 0), -1, &l->output[i], &trained, a, fault)) {
        char why[sizeof fault->reason];
        strcpy(why, fault->reason);
        return pl_data_bad(fault, -1, "'%s': %.150s", name, why);
    }
    return strcmp(l->output[i].role, "assistant") == 0 || pl_data_bad(fault, -1, "'%s' must be a message of the assistant, not of the %s", name,
                                                                      l->output[i].role);
}

static bool parse_preference(struct pl_data_line *l, const json_t *root, struct pl_arena *a, struct pl_data_fault *fault)
{
    static const char *const names[] = {"messages", "tools", "parallel_tool_calls", NULL};
    const json_t *input = json_object_get(root, "input");
    if (!json_is_object(input))
        return pl_data_bad(fault, -1, "'input' must be an object with 'messages', not %s", pl_json_kind(input));
    const char *odd = stranger(input, names);
    if (odd != NULL)
        return pl_data_bad(fault, -1, "'%.60s' is not a field of 'input'", odd);
    if (!no_tools(input, fault) || !read_messages(l, json_object_get(input, "messages"), a, fault) ||
        !parse_output(l, 0, root, "preferred_output", "preferred_completion", a, fault) ||
        !parse_output(l, 1, root, "non_preferred_output", "non_preferred_completion", a, fault))
        return false;
    const int last = (int)l->n_messages - 1;
    return strcmp(l->messages[last].role, "assistant") != 0 || pl_data_bad(fault, last, "the input must not end with the assistant");
}

bool pl_data_parse(struct pl_data_line *l, const json_t *root, struct pl_arena *a, struct pl_data_fault *fault)
{
    static const struct {
        pl_data_form form;
        const char *sign, *names[6];
    } forms[] = {
        {PL_DATA_CHAT, "messages", {"messages", "tools", "parallel_tool_calls", "functions", NULL}},
        {PL_DATA_PREFERENCE, "input", {"input", "preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion", NULL}},
        {PL_DATA_COMPLETION, "completion", {"prompt", "completion", NULL}},
        {PL_DATA_COMPLETION, "prompt", {"prompt", "completion", NULL}},
        {PL_DATA_TEXT, "text", {"text", NULL}},
    };
    *l = (struct pl_data_line){0};
    size_t i = 0;
    while (i < PL_COUNT_OF(forms) && json_object_get(root, forms[i].sign) == NULL)
        i++;
    if (i == PL_COUNT_OF(forms))
        return pl_data_bad(fault, -1, "Unexpected file format, expected either prompt/completion pairs or chat messages "
                           "(or preference pairs, or text)");
    l->form = forms[i].form;
    const char *odd = stranger(root, forms[i].names);
    if (odd != NULL)
        return pl_data_bad(fault, -1, "'%.60s' is not a field of the %s format", odd, pl_data_form_name(l->form));
    switch (l->form) {
    case PL_DATA_CHAT: return parse_chat(l, root, a, fault);
    case PL_DATA_PREFERENCE: return parse_preference(l, root, a, fault);
    case PL_DATA_COMPLETION: return parse_completion(l, root, fault);
    default: return parse_text(l, root, fault);
    }
}
