/* spec: what a fine-tuning job is to do, as plain data, and the way from a request's method object to it and back.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/spec.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/json.h"
#include "core/base/mem.h"
#include "core/model/adapter.h"

static const char *const method_names[PL_METHOD_COUNT] = {"supervised", "dpo", "pretrain"};
static const char method_letters[PL_METHOD_COUNT + 1] = "sdp";

static const struct pl_hyper_row rows[] = {
#define AT(field) offsetof(struct pl_train_spec, field)
#define INT(m, g, f, n, lo, hi, a, h) {'I', m, g, n, NULL, h, AT(f), lo, hi},
#define REAL(m, g, f, n, lo, hi, a, h) {'R', m, g, n, NULL, h, AT(f), lo, hi},
#define BOOL(m, g, f, n, a, h) {'B', m, g, n, NULL, h, AT(f), 0, 1},
#define WORD(m, g, f, n, w, a, h) {'W', m, g, n, w, h, AT(f), 0, 0},
#define SET(m, g, f, n, a, h) {'S', m, g, n, NULL, h, AT(f), 0, 0},
#include "core/train/hyper.def"
#undef INT
#undef REAL
#undef BOOL
#undef WORD
#undef SET
};
enum { N_ROWS = PL_COUNT_OF(rows) };
_Static_assert(N_ROWS <= 64, "one bit each in automatic");

const struct pl_hyper_row *pl_hyper_rows(size_t *n)
{
    *n = N_ROWS;
    return rows;
}

/* What clients call the targets; a name may stand for several (GPT-2's attention is one product). */
static const struct {
    const char *name;
    pl_target target;
} targets[] = {
    {"q_proj", PL_TARGET_Q}, {"k_proj", PL_TARGET_K}, {"v_proj", PL_TARGET_V}, {"c_attn", PL_TARGET_QKV},
    {"o_proj", PL_TARGET_O}, {"gate_proj", PL_TARGET_GATE}, {"up_proj", PL_TARGET_UP}, {"down_proj", PL_TARGET_DOWN},
};
static const char target_words[] = "q_proj, k_proj, v_proj, c_attn (GPT-2's q, k and v), o_proj, gate_proj, up_proj, down_proj";

const char *pl_train_method_name(pl_train_method m)
{
    return method_names[m];
}

bool pl_train_has_bf16(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

double pl_train_base_rate(const struct pl_train_spec *s)
{
    static const double from_nothing = 6e-4;
    static const double rates[PL_METHOD_COUNT][2] = {
        [PL_METHOD_SUPERVISED] = {[PL_PEFT_FULL] = 2e-5, [PL_PEFT_LORA] = 2e-4},
        [PL_METHOD_DPO] = {[PL_PEFT_FULL] = 1e-6, [PL_PEFT_LORA] = 1e-5},
        [PL_METHOD_PRETRAIN] = {[PL_PEFT_FULL] = 1e-4, [PL_PEFT_LORA] = 2e-4},
    };
    return s->scratch ? from_nothing : rates[s->method][s->peft];
}

static bool has(const struct pl_hyper_row *r, pl_train_method m)
{
    return strchr(r->methods, method_letters[m]) != NULL;
}

static bool in_group(size_t i, const char *group)
{
    return strcmp(rows[i].group, group) == 0;
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

struct where {
    char path[64];
    struct pl_err *err;
};

static pl_status bad(const struct where *w, const char *expected, const json_t *v)
{
    return pl_fail_param(w->err, PL_EINVAL, w->path, "'%s' must be %s, not %s", w->path, expected, pl_json_kind(v));
}

static pl_status read_number(const struct where *w, const struct pl_hyper_row *r, const json_t *v, void *field)
{
    const char *kind = r->kind == 'I' ? "an integer" : "a number";
    if (r->kind == 'I' ? !json_is_integer(v) : !json_is_number(v)) {
        char expected[40];
        snprintf(expected, sizeof expected, "%s or \"auto\"", kind);
        return bad(w, expected, v);
    }
    const double x = json_number_value(v);
    if (!(x >= r->min && x <= r->max))
        return pl_fail_param(w->err, PL_EINVAL, w->path, "'%s' must be %s from %.9g to %.9g, not %.9g", w->path, kind, r->min, r->max, x);
    if (r->kind == 'I')
        *(uint32_t *)field = (uint32_t)x;
    else
        *(double *)field = x;
    return PL_OK;
}

static pl_status read_word(const struct where *w, const char *words, const json_t *v, int *out)
{
    const char *s = json_string_value(v);
    if (s == NULL)
        return bad(w, "a string", v);
    int i = 0;
    for (const char *p = words; p != NULL; p = strchr(p, '|') != NULL ? strchr(p, '|') + 1 : NULL, i++) {
        const size_t n = strcspn(p, "|");
        if (strlen(s) == n && strncmp(p, s, n) == 0) {
            *out = i;
            return PL_OK;
        }
    }
    return pl_fail_param(w->err, PL_EINVAL, w->path, "'%s' must be one of %s, not \"%.60s\"", w->path, words, s);
}

static pl_status read_set(const struct where *w, const json_t *v, unsigned *out)
{
    if (!json_is_array(v) || json_array_size(v) == 0)
        return bad(w, "an array of projections that is not empty, or \"auto\"", v);
    *out = 0;
    for (size_t i = 0; i < json_array_size(v); i++) {
        const char *s = json_string_value(json_array_get(v, i));
        size_t k = 0;
        while (k < PL_COUNT_OF(targets) && (s == NULL || strcmp(s, targets[k].name) != 0))
            k++;
        if (k == PL_COUNT_OF(targets))
            return pl_fail_param(w->err, PL_EINVAL, w->path, "'%s' has \"%.40s\"; there are %s", w->path,
                                 s != NULL ? s : pl_json_kind(json_array_get(v, i)), target_words);
        *out |= 1u << targets[k].target;
    }
    return PL_OK;
}

static pl_status read_row(struct pl_train_spec *s, size_t i, const struct where *w, const json_t *v)
{
    const struct pl_hyper_row *r = &rows[i];
    void *field = (char *)s + r->offset;
    if (v == NULL || json_is_null(v) || (json_is_string(v) && strcmp(json_string_value(v), "auto") == 0))
        return PL_OK;
    s->automatic &= ~(UINT64_C(1) << i);
    switch (r->kind) {
    case 'W': return read_word(w, r->words, v, field);
    case 'S': return read_set(w, v, field);
    case 'B':
        if (!json_is_boolean(v))
            return bad(w, "true or false", v);
        *(bool *)field = json_is_true(v);
        return PL_OK;
    }
    return read_number(w, r, v, field);
}

static bool is_group(pl_train_method m, const char *name)
{
    for (size_t i = 0; i < N_ROWS; i++)
        if (has(&rows[i], m) && name[0] != '\0' && strcmp(rows[i].group, name) == 0)
            return true;
    return false;
}

/* Members of object (at path), which are the rows of group. */
static pl_status read_group(struct pl_train_spec *s, const json_t *object, const char *group, const char *path, struct pl_err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)object, key, v)
    {
        struct where w = {.err = err};
        size_t i = 0;
        snprintf(w.path, sizeof w.path, "%s.%.40s", path, key);
        while (i < N_ROWS && !(has(&rows[i], s->method) && strcmp(rows[i].group, group) == 0 && strcmp(rows[i].name, key) == 0))
            i++;
        pl_status st = PL_OK;
        if (i < N_ROWS)
            st = read_row(s, i, &w, v);
        else if (group[0] == '\0' && is_group(s->method, key) && json_is_object(v)) {
            s->scratch |= strcmp(key, "shape") == 0;
            st = read_group(s, v, key, w.path, err);
        }
        else if (group[0] == '\0' && is_group(s->method, key))
            st = json_is_null(v) ? PL_OK : bad(&w, "an object", v);
        else
            st = pl_fail_param(err, PL_EINVAL, w.path, "'%s' is not a setting of method %s", w.path, method_names[s->method]);
        if (st != PL_OK)
            return st;
    }
    return PL_OK;
}

static pl_status read_type(struct pl_train_spec *s, const json_t *method, struct pl_err *err)
{
    static const char *const later[] = {"reinforcement", "reward", "adversarial"};
    const json_t *type = json_object_get(method, "type");
    const struct where w = {"method.type", err};
    if (!json_is_string(type))
        return bad(&w, "a string: supervised, dpo or pretrain", type);
    const char *name = json_string_value(type);
    for (size_t i = 0; i < PL_METHOD_COUNT; i++)
        if (strcmp(name, method_names[i]) == 0) {
            s->method = (pl_train_method)i;
            return PL_OK;
        }
    for (size_t i = 0; i < PL_COUNT_OF(later); i++)
        if (strcmp(name, later[i]) == 0)
            return pl_fail_param(err, PL_ENOTSUP, w.path, "method %s is not supported by this server; it has supervised, dpo and pretrain", name);
    return pl_fail_param(err, PL_EINVAL, w.path, "'method.type' must be one of supervised, dpo, pretrain, not \"%.60s\"", name);
}

/* Full tuning has no adapters; only a model from nothing has its shape in the job. */
static bool applies(const struct pl_train_spec *s, size_t i)
{
    if (in_group(i, "shape") && !s->scratch)
        return false;
    return has(&rows[i], s->method) && (s->peft == PL_PEFT_LORA || !in_group(i, "peft") || strcmp(rows[i].name, "kind") == 0);
}

/* A learning rate and a multiplier that contradict each other, and settings without effect. */
static pl_status check_pairs(const struct pl_train_spec *s, struct pl_err *err)
{
    const double from_multiplier = s->learning_rate_multiplier * pl_train_base_rate(s);
    uint64_t given = 0;
    char path[64];
    if (s->scratch && s->peft != PL_PEFT_FULL)
        return pl_fail_param(err, PL_EINVAL, "method.pretrain.peft.kind",
                             "'method.pretrain.peft.kind' must be full for a model from nothing: leave it out, or leave out method.pretrain.shape");
    for (size_t i = 0; i < N_ROWS; i++)
        if (!(s->automatic >> i & 1) && has(&rows[i], s->method) && (s->scratch || !in_group(i, "shape"))) {
            snprintf(path, sizeof path, "method.%s.%s.%s", method_names[s->method], rows[i].group, rows[i].name);
            if (!applies(s, i))
                return pl_fail_param(err, PL_EINVAL, path, "'%s' has no effect with peft.kind full: leave it out", path);
            if (rows[i].offset == offsetof(struct pl_train_spec, learning_rate))
                given |= 1;
            if (rows[i].offset == offsetof(struct pl_train_spec, learning_rate_multiplier))
                given |= 2;
        }
    if (given == 3 && fabs(s->learning_rate - from_multiplier) > 1e-6 * from_multiplier) {
        snprintf(path, sizeof path, "method.%s.hyperparameters.learning_rate", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "'learning_rate' is %.9g but learning_rate_multiplier × %g makes %.9g: give one of them",
                             s->learning_rate, pl_train_base_rate(s), from_multiplier);
    }
    return PL_OK;
}

static pl_status read_method(struct pl_train_spec *s, const json_t *method, struct pl_err *err)
{
    if (!json_is_object(method))
        return pl_fail_param(err, PL_EINVAL, "method", "'method' must be an object, not %s", pl_json_kind(method));
    pl_status st = read_type(s, method, err);
    if (st != PL_OK)
        return st;
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)method, key, v)
    {
        struct where w = {.err = err};
        snprintf(w.path, sizeof w.path, "method.%.40s", key);
        if (strcmp(key, "type") == 0 || json_is_null(v))
            continue;
        if (strcmp(key, method_names[s->method]) != 0)
            return pl_fail_param(err, PL_EINVAL, w.path, "'%s' does not belong to a method of type %s", w.path, method_names[s->method]);
        if (!json_is_object(v))
            return bad(&w, "an object", v);
        if ((st = read_group(s, v, "", w.path, err)) != PL_OK)
            return st;
    }
    return PL_OK;
}

pl_status pl_train_spec_read(struct pl_train_spec *s, const json_t *method, const json_t *hyperparameters, struct pl_err *err)
{
    pl_status st = PL_OK;
    *s = (struct pl_train_spec){.peft = PL_PEFT_LORA, .learning_rate_multiplier = 1};
    s->automatic = N_ROWS == 64 ? UINT64_MAX : (UINT64_C(1) << N_ROWS) - 1;
    if (method != NULL && !json_is_null(method))
        st = read_method(s, method, err);
    for (size_t i = 0; i < N_ROWS; i++) {
        const uint64_t bit = UINT64_C(1) << i;
        if (!has(&rows[i], s->method) || (in_group(i, "shape") && !s->scratch))
            s->automatic &= ~bit;
        if ((s->automatic & bit) != 0 && rows[i].offset == offsetof(struct pl_train_spec, peft) && s->scratch)
            s->peft = PL_PEFT_FULL;
    }
    if (st != PL_OK)
        return st;
    if (hyperparameters != NULL && !json_is_null(hyperparameters)) {
        if (!json_is_object(hyperparameters))
            return pl_fail_param(err, PL_EINVAL, "hyperparameters", "'hyperparameters' must be an object, not %s", pl_json_kind(hyperparameters));
        if (method != NULL && !json_is_null(method))
            return pl_fail_param(err, PL_EINVAL, "hyperparameters", "'hyperparameters' is the older form: put them into 'method' alone");
        if ((st = read_group(s, hyperparameters, "hyperparameters", "hyperparameters", err)) != PL_OK)
            return st;
    }
    return check_pairs(s, err);
}

/* ---- what auto means ----------------------------------------------------------------------------------------------- */

static double clamp(double v, double low, double high)
{
    v = floor(v);
    return v < low ? low : v > high ? high : v;
}

static double at_least_1(double v)
{
    return v < 1 ? 1 : floor(v);
}

static double per(double total, double n)
{
    return n > 0 ? ceil(total / n) : total;
}

uint32_t pl_train_epoch_steps(const struct pl_train_spec *s, uint32_t n_examples)
{
    return n_examples / s->batch_size + (n_examples % s->batch_size != 0);
}

uint32_t pl_train_total_steps(const struct pl_train_spec *s, uint32_t n_examples)
{
    return s->n_epochs * pl_train_epoch_steps(s, n_examples);
}

static double per_epoch(const struct pl_train_spec *s, const struct pl_train_facts *f)
{
    return at_least_1(pl_train_epoch_steps(s, f->n_examples));
}

static double steps(const struct pl_train_spec *s, const struct pl_train_facts *f)
{
    return s->n_epochs * per_epoch(s, f);
}

static unsigned all_targets(const struct pl_train_facts *f)
{
    unsigned all = 0;
    struct pl_target_place place;
    for (int t = 0; t < PL_TARGET_COUNT; t++)
        if (pl_target_find(f->model, (pl_target)t, &place))
            all |= 1u << t;
    return all;
}

/* Heads of about 64 values, an even number of them if the width allows. */
static double auto_heads(uint32_t width)
{
    uint32_t heads = width / 64 > 0 ? width / 64 : 1;
    while (heads > 1 && (width % heads != 0 || width / heads % 2 != 0))
        heads--;
    return heads;
}

static double auto_ff(const struct pl_train_spec *s)
{
    return s->shape_arch == PL_SHAPE_GPT2 ? 4.0 * s->shape_width : ceil(s->shape_width * 8.0 / 3 / 32) * 32;
}

/* One function for each row: the row's expression. */
#define RULE(field, type, a)                                                                                           \
    static type auto_##field(const struct pl_train_spec *s, const struct pl_train_facts *f)                            \
    {                                                                                                                  \
        (void)s, (void)f;                                                                                              \
        return (type)(a);                                                                                              \
    }
#define INT(m, g, f, n, lo, hi, a, h) RULE(f, uint32_t, a)
#define REAL(m, g, f, n, lo, hi, a, h) RULE(f, double, a)
#define BOOL(m, g, f, n, a, h) RULE(f, bool, a)
#define WORD(m, g, f, n, w, a, h) RULE(f, int, a)
#define SET(m, g, f, n, a, h) RULE(f, unsigned, a)
#include "core/train/hyper.def"
#undef INT
#undef REAL
#undef BOOL
#undef WORD
#undef SET

static pl_status check_facts(const struct pl_train_spec *s, const struct pl_train_facts *f, struct pl_err *err)
{
    char path[64];
    if (s->max_length > f->n_ctx) {
        snprintf(path, sizeof path, "method.%s.hyperparameters.max_length", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "'max_length' is %u but the model takes %u tokens", s->max_length, f->n_ctx);
    }
    if (s->peft == PL_PEFT_LORA && (s->targets & ~all_targets(f)) != 0) {
        snprintf(path, sizeof path, "method.%s.peft.targets", method_names[s->method]);
        for (size_t i = 0; i < PL_COUNT_OF(targets); i++)
            if ((s->targets & ~all_targets(f) & 1u << targets[i].target) != 0)
                return pl_fail_param(err, PL_EINVAL, path, "'targets' has %s, which a model of architecture %s does not have", targets[i].name,
                                     f->model->arch);
    }
    if (s->micro_batch > s->batch_size) {
        snprintf(path, sizeof path, "method.%s.compute.micro_batch_size", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "'micro_batch_size' is %u but a step has %u examples", s->micro_batch, s->batch_size);
    }
    if (s->final == PL_FINAL_BEST && !f->validation) {
        snprintf(path, sizeof path, "method.%s.final", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "final \"best\" needs a validation_file");
    }
    if (s->n_answers > 0 && !f->validation) {
        snprintf(path, sizeof path, "method.%s.evaluation.answers", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "'answers' needs a validation_file with the examples to be answered");
    }
    if (s->patience > 0 && !f->validation) {
        snprintf(path, sizeof path, "method.%s.early_stopping.patience", method_names[s->method]);
        return pl_fail_param(err, PL_EINVAL, path, "early stopping needs a validation_file");
    }
    return PL_OK;
}

/* Gives the automatic rows of a group (NULL = all) their values. */
static void resolve_rows(struct pl_train_spec *s, const struct pl_train_facts *f, const char *group)
{
    size_t i = 0;
#define SET_ROW(f_)                                                                                                    \
    if ((s->automatic >> i & 1) && (group == NULL || in_group(i, group))) {                                            \
        s->f_ = auto_##f_(s, f);                                                                                       \
        s->automatic &= ~(UINT64_C(1) << i);                                                                           \
    }                                                                                                                  \
    i++;
#define INT(m, g, f_, n, lo, hi, a, h) SET_ROW(f_)
#define REAL(m, g, f_, n, lo, hi, a, h) SET_ROW(f_)
#define BOOL(m, g, f_, n, a, h) SET_ROW(f_)
#define WORD(m, g, f_, n, w, a, h) SET_ROW(f_)
#define SET(m, g, f_, n, a, h) SET_ROW(f_)
#include "core/train/hyper.def"
#undef INT
#undef REAL
#undef BOOL
#undef WORD
#undef SET
}

pl_status pl_train_spec_resolve(struct pl_train_spec *s, const struct pl_train_facts *f, struct pl_err *err)
{
    resolve_rows(s, f, NULL);
    s->learning_rate_multiplier = s->learning_rate / pl_train_base_rate(s);
    return check_facts(s, f, err);
}

/* ---- shapes -------------------------------------------------------------------------------------------------------- */

#define SHAPE "method.pretrain.shape."

uint32_t pl_train_shape_specials(const struct pl_train_spec *s)
{
    return s->shape_chat == PL_SHAPE_CHAT_ML ? 3 : 1;
}

static pl_status check_heads(const struct pl_train_spec *s, struct pl_err *err)
{
    const uint32_t width = s->shape_width, heads = s->shape_heads, kv = s->shape_kv_heads, size = width / heads;
    uint32_t near = heads < width ? heads : width;
    while (width % near != 0)
        near--;
    if (width % heads != 0)
        return pl_fail_param(err, PL_EINVAL, SHAPE "heads", "'heads' is %u, but width %u is no multiple of it: take %u", heads, width, near);
    if (s->shape_arch == PL_SHAPE_LLAMA && size % 2 != 0)
        return pl_fail_param(err, PL_EINVAL, SHAPE "heads", "'heads' is %u, so that a head of width %u has %u values, and rotary positions need an even "
                             "number: change heads or width, or take architecture gpt2", heads, width, size);
    if (size > PL_MAX_HEAD_DIM)
        return pl_fail_param(err, PL_EINVAL, SHAPE "heads", "'heads' is %u, so that a head of width %u has %u values; at most %d are supported: take "
                             "more heads", heads, width, size, PL_MAX_HEAD_DIM);
    if (heads % kv != 0)
        return pl_fail_param(err, PL_EINVAL, SHAPE "kv_heads", "'kv_heads' is %u, but heads %u is no multiple of it", kv, heads);
    if (heads / kv > PL_MAX_QUERIES_PER_KV)
        return pl_fail_param(err, PL_EINVAL, SHAPE "kv_heads", "'kv_heads' is %u; with %u heads at least %u are needed", kv, heads,
                             (heads + PL_MAX_QUERIES_PER_KV - 1) / PL_MAX_QUERIES_PER_KV);
    if (s->shape_arch == PL_SHAPE_GPT2 && kv != heads)
        return pl_fail_param(err, PL_EINVAL, SHAPE "kv_heads", "'kv_heads' is %u, but gpt2 has as many as heads, %u: leave it out, or take architecture llama",
                             kv, heads);
    return PL_OK;
}

pl_status pl_train_shape_resolve(struct pl_train_spec *s, const struct pl_train_facts *f, struct pl_err *err)
{
    resolve_rows(s, f, "shape");
    const uint32_t least = 256 + pl_train_shape_specials(s);
    if (s->shape_tokenizer == PL_SHAPE_BPE && s->shape_chat == PL_SHAPE_CHAT_BASE)
        return pl_fail_param(err, PL_EINVAL, SHAPE "chat_template", "chat_template \"base\" needs tokenizer \"base\": take \"chatml\" or \"none\"");
    if (s->shape_tokenizer == PL_SHAPE_BPE && s->shape_vocab < least)
        return pl_fail_param(err, PL_EINVAL, SHAPE "vocab_size", "'vocab_size' is %u; the bytes and control tokens alone are %u", s->shape_vocab, least);
    return check_heads(s, err);
}

/* ---- writing ------------------------------------------------------------------------------------------------------- */

static json_t *set_json(unsigned set)
{
    json_t *a = json_array();
    for (size_t i = 0; i < PL_COUNT_OF(targets); i++)
        if ((set >> targets[i].target & 1) != 0)
            json_array_append_new(a, json_string(targets[i].name));
    return a;
}

static json_t *word_json(const char *words, int i)
{
    for (; i > 0; i--)
        words = strchr(words, '|') + 1;
    return json_stringn(words, strcspn(words, "|"));
}

static json_t *row_json(const struct pl_train_spec *s, size_t i)
{
    const void *field = (const char *)s + rows[i].offset;
    if (s->automatic >> i & 1)
        return json_string("auto");
    switch (rows[i].kind) {
    case 'I': return json_integer(*(const uint32_t *)field);
    case 'R': return json_real(*(const double *)field);
    case 'B': return json_boolean(*(const bool *)field);
    case 'W': return word_json(rows[i].words, *(const int *)field);
    }
    return set_json(*(const unsigned *)field);
}

json_t *pl_train_spec_json(const struct pl_train_spec *s)
{
    json_t *all = json_object(), *inner = json_object();
    for (size_t i = 0; i < N_ROWS; i++) {
        if (!applies(s, i))
            continue;
        json_t *group = inner;
        if (rows[i].group[0] != '\0' && (group = json_object_get(inner, rows[i].group)) == NULL) {
            json_object_set_new(inner, rows[i].group, json_object());
            group = json_object_get(inner, rows[i].group);
        }
        json_object_set_new(group, rows[i].name, row_json(s, i));
    }
    json_object_set_new(all, "type", json_string(method_names[s->method]));
    json_object_set_new(all, method_names[s->method], inner);
    return all;
}

json_t *pl_train_spec_hyperparameters(const struct pl_train_spec *s)
{
    static const char *const names[] = {"n_epochs", "batch_size", "learning_rate_multiplier", "beta"};
    json_t *all = json_object();
    for (size_t k = 0; k < PL_COUNT_OF(names); k++)
        for (size_t i = 0; i < N_ROWS; i++)
            if (has(&rows[i], s->method) && strcmp(rows[i].name, names[k]) == 0)
                json_object_set_new(all, names[k], row_json(s, i));
    return all;
}
