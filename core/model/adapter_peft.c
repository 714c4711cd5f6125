/* adapter_peft: reads and writes the folders of Hugging Face's PEFT library: adapter_config.json and
 * adapter_model.safetensors, the latter with names like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.
 * SPDX-License-Identifier: Apache-2.0 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/model/adapter_int.h"
#include "core/model/safetensors.h"

#define PL_LOG_MODULE "adapter"
#define CONFIG "adapter_config.json"
#define WEIGHTS "adapter_model.safetensors"

enum { MAX_CONFIG = 1 << 20, MATCH_LIMIT = 20000 };
#define ALPHA_LIMIT 1e9 /* also of ranks in a pattern, which are compared with the file's */

/* What stands in front of a layer's number, and the layers' common prefix in names of modules. */
static const struct {
    const char *arch, *layers;
} roots[] = {{"llama", "model.layers."}, {"gpt2", "transformer.h."}};

struct config {
    json_t *root;
    uint32_t rank;
    double alpha;
    bool rslora;
    const json_t *rank_pattern, *alpha_pattern; /* objects, or NULL */
    const char *layers;                         /* of roots */
};

const char *pl_adapter_layers(const char *arch)
{
    for (size_t i = 0; i < PL_COUNT_OF(roots); i++)
        if (strcmp(roots[i].arch, arch) == 0)
            return roots[i].layers;
    return "";
}

/* ---- adapter_config.json ------------------------------------------------------------------------------------------- */

/* Keys that change what an adapter computes in ways that this program lacks, and what each is. They must be off: absent,
 * null, false, "", [] or {}. */
static const struct {
    const char *key, *what;
} refused[] = {
    {"use_dora", "weight-decomposed adapters (DoRA) are"},
    {"modules_to_save", "an adapter that replaces whole modules is"},
    {"lora_bias", "an adapter with biases of its own is"},
    {"layer_replication", "an adapter that repeats layers is"},
    {"trainable_token_indices", "an adapter that changes token embeddings is"},
    {"target_parameters", "an adapter of parameters outside linear layers is"},
    {"alora_invocation_tokens", "an adapter that begins at certain tokens (aLoRA) is"},
    {"use_qalora", "a QA-LoRA adapter is"},
    {"use_bdlora", "a block-diagonal adapter (BD-LoRA) is"},
    {"arrow_config", "a routed set of adapters (Arrow) is"},
    {"kasa_config", "a KaSA adapter is"},
    {"velora_config", "a VeLoRA adapter is"},
    {"monteclora_config", "a MonteCLoRA adapter is"},
};

/* Initialisations after which the base model is not the one it was. PEFT can save such an adapter for the plain base. */
static const char *const changed_base[] = {"pissa", "olora", "corda", "loftq", "lora_ga"};

static bool is_off(const json_t *v)
{
    return v == NULL || json_is_null(v) || json_is_false(v) || (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_array(v) && json_array_size(v) == 0) || (json_is_object(v) && json_object_size(v) == 0);
}

static pl_status refuse_kinds(const json_t *root, struct pl_err *err)
{
    const char *kind = json_string_value(json_object_get(root, "peft_type"));
    if (kind == NULL)
        return pl_fail(err, PL_EFORMAT, "peft_type is missing or no text");
    if (strcmp(kind, "LORA") != 0)
        return pl_fail(err, PL_ENOTSUP, "peft_type is %.40s; only LORA is supported", kind);
    for (size_t i = 0; i < PL_COUNT_OF(refused); i++)
        if (!is_off(json_object_get(root, refused[i].key)))
            return pl_fail(err, PL_ENOTSUP, "%s is set: %s not supported", refused[i].key, refused[i].what);
    const json_t *bias = json_object_get(root, "bias");
    if (!is_off(bias) && (!json_is_string(bias) || strcmp(json_string_value(bias), "none") != 0))
        return pl_fail(err, PL_ENOTSUP, "bias is set: an adapter that changes biases is not supported; it must be \"none\"");
    const char *init = json_string_value(json_object_get(root, "init_lora_weights"));
    for (size_t i = 0; init != NULL && i < PL_COUNT_OF(changed_base); i++)
        if (strncasecmp(init, changed_base[i], strlen(changed_base[i])) == 0)
            return pl_fail(err, PL_ENOTSUP, "init_lora_weights is \"%.40s\", which changes the base model's weights: save the adapter with "
                                            "path_initial_model_for_weight_conversion", init);
    return PL_OK;
}

static pl_status check_pattern(const json_t *root, const char *key, const json_t **out, struct pl_err *err)
{
    const json_t *v = json_object_get(root, key), *number;
    const char *name;
    *out = NULL;
    if (is_off(v))
        return PL_OK;
    if (!json_is_object(v))
        return pl_fail(err, PL_EFORMAT, "%s is no object", key);
    json_object_foreach((json_t *)(uintptr_t)v, name, number)
        if (!json_is_number(number) || !(json_number_value(number) > 0 && json_number_value(number) < ALPHA_LIMIT))
            return pl_fail(err, PL_EFORMAT, "%s: the value of \"%.100s\" is no number above 0 and below %g", key, name, ALPHA_LIMIT);
    *out = v;
    return PL_OK;
}

static pl_status take_config(struct config *c, struct pl_err *err)
{
    if (!json_is_object(c->root))
        return pl_fail(err, PL_EFORMAT, "it is no JSON object");
    pl_status rc = refuse_kinds(c->root, err);
    if (rc != PL_OK)
        return rc;
    const json_t *r = json_object_get(c->root, "r"), *alpha = json_object_get(c->root, "lora_alpha");
    const json_t *rslora = json_object_get(c->root, "use_rslora");
    if (!json_is_integer(r) || json_integer_value(r) < 1 || json_integer_value(r) > PL_ADAPTER_MAX_RANK)
        return pl_fail(err, PL_EFORMAT, "r must be a whole number from 1 to %d", PL_ADAPTER_MAX_RANK);
    if (!json_is_number(alpha) || !(json_number_value(alpha) > 0 && json_number_value(alpha) < ALPHA_LIMIT))
        return pl_fail(err, PL_EFORMAT, "lora_alpha must be a number above 0 and below %g", ALPHA_LIMIT);
    if (!is_off(rslora) && !json_is_true(rslora))
        return pl_fail(err, PL_EFORMAT, "use_rslora must be true or false");
    c->rank = (uint32_t)json_integer_value(r);
    c->alpha = json_number_value(alpha);
    c->rslora = json_is_true(rslora);
    if ((rc = check_pattern(c->root, "rank_pattern", &c->rank_pattern, err)) != PL_OK)
        return rc;
    return check_pattern(c->root, "alpha_pattern", &c->alpha_pattern, err);
}

/* The whole of a small regular file. */
static pl_status read_small(const char *path, struct pl_buf *text, struct pl_err *err)
{
    struct stat info;
    char block[8192];
    ssize_t n = -1;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return pl_fail(err, PL_EIO, "cannot be opened: %s", strerror(errno));
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode))
        while ((n = read(fd, block, sizeof block)) > 0 && !text->failed)
            pl_buf_add(text, block, (size_t)n);
    close(fd);
    if (text->failed)
        return pl_fail(err, PL_EFORMAT, "it is larger than %d bytes", MAX_CONFIG);
    return n == 0 ? PL_OK : pl_fail(err, PL_EIO, "it cannot be read, or is no regular file");
}

static pl_status read_config(struct config *c, const char *path, struct pl_err *err)
{
    struct pl_buf text;
    json_error_t why;
    pl_buf_init(&text, MAX_CONFIG);
    pl_status rc = read_small(path, &text, err);
    if (rc == PL_OK) {
        c->root = json_loadb(pl_buf_str(&text), text.len, JSON_REJECT_DUPLICATES, &why);
        rc = c->root != NULL ? take_config(c, err) : pl_fail(err, PL_EFORMAT, "it is no JSON: %.160s (line %d)", why.text, why.line);
    }
    pl_buf_fini(&text);
    return rc;
}

/* Whether a key of rank_pattern or alpha_pattern, a regular expression, means the module: all of its name, or what follows
 * a dot. */
static pl_status matches(const char *pattern, const char *module, bool *yes, struct pl_err *err)
{
    char whole[512];
    int code;
    size_t at;
    *yes = false;
    if (snprintf(whole, sizeof whole, "^(.*\\.)?(%s)$", pattern) >= (int)sizeof whole)
        return pl_fail(err, PL_EFORMAT, "the pattern \"%.60s…\" is too long", pattern);
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)whole, PCRE2_ZERO_TERMINATED, PCRE2_DOLLAR_ENDONLY, &code, &at, NULL);
    if (re == NULL)
        return pl_fail(err, PL_EFORMAT, "the pattern \"%.100s\" is no regular expression", pattern);
    pcre2_match_data *md = pcre2_match_data_create_from_pattern(re, NULL);
    pcre2_match_context *mc = pcre2_match_context_create(NULL);
    int found = PCRE2_ERROR_NOMEMORY;
    if (md != NULL && mc != NULL) {
        pcre2_set_match_limit(mc, MATCH_LIMIT);
        pcre2_set_depth_limit(mc, MATCH_LIMIT);
        found = pcre2_match(re, (PCRE2_SPTR)module, PCRE2_ZERO_TERMINATED, 0, 0, md, mc);
    }
    pcre2_match_data_free(md);
    pcre2_match_context_free(mc);
    pcre2_code_free(re);
    *yes = found > 0;
    return found > 0 || found == PCRE2_ERROR_NOMATCH ? PL_OK
                                                     : pl_fail(err, PL_EFORMAT, "the pattern \"%.100s\" cannot be matched", pattern);
}

/* *v = what the first pattern that means the module says, else it stays. */
static pl_status pattern_value(const json_t *patterns, const char *module, double *v, struct pl_err *err)
{
    const char *key;
    json_t *number;
    json_object_foreach((json_t *)(uintptr_t)patterns, key, number)
    {
        bool yes;
        const pl_status rc = matches(key, module, &yes, err);
        if (rc != PL_OK || yes) {
            *v = json_number_value(number);
            return rc;
        }
    }
    return PL_OK;
}

static pl_status read_alpha(void *self, const struct pl_target_place *place, uint32_t layer, uint32_t rank, float *alpha, struct pl_err *err)
{
    const struct config *c = self;
    char module[128];
    double stated = c->rank, value = c->alpha;
    snprintf(module, sizeof module, "%s%u.%s", c->layers, layer, place->module);
    pl_status rc = c->rank_pattern != NULL ? pattern_value(c->rank_pattern, module, &stated, err) : PL_OK;
    if (rc == PL_OK && c->alpha_pattern != NULL)
        rc = pattern_value(c->alpha_pattern, module, &value, err);
    if (rc == PL_OK && stated != rank)
        rc = pl_fail(err, PL_EFORMAT, "%s has rank %u in " WEIGHTS ", but " CONFIG " says %g", module, rank, stated);
    *alpha = (float)value;
    return rc;
}

/* ---- adapter_model.safetensors ------------------------------------------------------------------------------------- */

static const char *skip(const char *s, const char *prefix)
{
    const size_t n = strlen(prefix);
    return strncmp(s, prefix, n) == 0 ? s + n : NULL;
}

/* Why a tensor is none of ours. */
static pl_status refuse_tensor(const char *name, const struct pl_spec *spec, struct pl_err *err)
{
    for (size_t i = 0; i < PL_COUNT_OF(roots); i++)
        if (strcmp(roots[i].arch, spec->arch) != 0 && strstr(name, roots[i].layers) != NULL)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s belongs to a %s model, the base model is %s: the adapter was made for another base model",
                           PL_ADAPTER_NAME, name, roots[i].arch, spec->arch);
    static const struct {
        const char *part, *what;
    } known[] = {
        {".lora_embedding_", "adapted embeddings are"}, {"lm_head.", "an adapted output head is"},
        {"embed_tokens.", "adapted embeddings are"},    {".wte.", "adapted embeddings are"},
        {".lora_magnitude_vector", "DoRA is"},          {".lora_E", "AdaLoRA is"},
        {"modules_to_save", "replacing modules is"},    {".bias", "adapted biases are"},
        {".base_layer.", "changed base weights are"},
    };
    for (size_t i = 0; i < PL_COUNT_OF(known); i++)
        if (strstr(name, known[i].part) != NULL)
            return pl_fail(err, PL_ENOTSUP, "tensor %.*s: %s not supported; train with target_modules among the layers' attention and feed-forward weights",
                           PL_ADAPTER_NAME, name, known[i].what);
    return pl_fail(err, PL_EFORMAT, "tensor %.*s is no lora_A or lora_B of a weight that a %s model has", PL_ADAPTER_NAME, name, spec->arch);
}

/* base_model.model.<layers><layer>.<module>.lora_A.weight */
static bool parse_name(const char *name, const struct config *c, const struct pl_spec *spec, unsigned *layer, pl_target *target, pl_lora_half *half)
{
    const char *s = skip(name, "base_model.model.");
    int n = 0;
    if (s == NULL || (s = skip(s, c->layers)) == NULL || *s < '0' || *s > '9' || sscanf(s, "%9u.%n", layer, &n) != 1 || n == 0)
        return false;
    for (uint32_t t = 0; t < PL_TARGET_COUNT; t++) {
        struct pl_target_place place;
        *target = (pl_target)t;
        const char *rest = pl_target_find(spec, *target, &place) ? skip(s + n, place.module) : NULL;
        if (rest != NULL && (strcmp(rest, ".lora_A.weight") == 0 || strcmp(rest, ".lora_B.weight") == 0)) {
            *half = rest[6] == 'A' ? PL_LORA_A : PL_LORA_B;
            return true;
        }
    }
    return false;
}

static pl_status collect(struct pl_adapter_parts *p, const struct pl_safetensors *st, const struct config *c, struct pl_err *err)
{
    for (size_t i = 0; i < pl_safetensors_n(st); i++) {
        const struct pl_st_tensor *t = pl_safetensors_at(st, i);
        unsigned layer;
        pl_target target;
        pl_lora_half half;
        if (!parse_name(t->name, c, p->spec, &layer, &target, &half))
            return refuse_tensor(t->name, p->spec, err);
        if (t->n_dims != 2)
            return pl_fail(err, PL_EFORMAT, "tensor %.*s is no matrix", PL_ADAPTER_NAME, t->name);
        const pl_status rc = pl_adapter_parts_add(p, t->name, strlen(t->name), layer, target, half, t->dims[0], t->dims[1], t, err);
        if (rc != PL_OK)
            return rc;
    }
    return PL_OK;
}

static void read_tensor(const void *tensor, float *out)
{
    pl_st_read_f32(tensor, out);
}

static char *join(const char *folder, const char *file)
{
    char *path = NULL;
    return asprintf(&path, "%s/%s", folder, file) < 0 ? NULL : path;
}

pl_status pl_adapter_read_peft(struct pl_adapter **out, const char *folder, const struct pl_spec *spec, struct pl_err *err)
{
    struct config c = {.layers = pl_adapter_layers(spec->arch)};
    struct pl_safetensors *st = NULL;
    struct pl_adapter_parts parts = {0};
    struct pl_err cause = {0};
    char *config = join(folder, CONFIG), *weights = join(folder, WEIGHTS);
    pl_status rc = config != NULL && weights != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
    if (rc != PL_OK)
        goto out;
    if ((rc = read_config(&c, config, &cause)) != PL_OK) {
        rc = pl_fail(err, rc, "%.180s: %.310s", config, cause.msg);
        goto out;
    }
    if ((rc = pl_safetensors_open(&st, weights, err)) != PL_OK)
        goto out;
    const struct pl_adapter_reader reader = {.read = read_tensor, .alpha = read_alpha, .self = &c, .rslora = c.rslora, .halves = true};
    if ((rc = pl_adapter_parts_init(&parts, spec, &cause)) == PL_OK && (rc = collect(&parts, st, &c, &cause)) == PL_OK)
        rc = pl_adapter_assemble(out, &parts, &reader, &cause);
    if (rc != PL_OK)
        rc = pl_fail(err, rc, "%.180s: %.310s", weights, cause.msg);
out:
    pl_adapter_parts_fini(&parts);
    pl_safetensors_close(st);
    json_decref(c.root);
    free(config);
    free(weights);
    return rc;
}

/* ---- writing ------------------------------------------------------------------------------------------------------- */

static void add_text(struct pl_buf *b, const char *s)
{
    pl_buf_addc(b, '"');
    pl_buf_add_json_lossy(b, s, strlen(s));
    pl_buf_addc(b, '"');
}

/* Nine digits give back the same float; a whole number is shown as one. */
static void add_number(struct pl_buf *b, double v)
{
    if (v == (double)(long)v)
        pl_buf_addf(b, "%ld", (long)v);
    else
        pl_buf_addf(b, "%.9g", v);
}

/* "rank_pattern": the pairs whose rank (or alpha) is not the folder's. */
static void add_pattern(struct pl_buf *b, const char *key, const struct pl_adapter *a, const struct pl_spec *spec, const struct pl_adapter_info *info)
{
    const bool ranks = key[0] == 'r';
    const char *comma = "";
    pl_buf_addf(b, "  \"%s\": {", key);
    for (size_t i = 0; i < a->n_pairs; i++) {
        const struct pl_lora_pair *p = &a->pairs[i];
        struct pl_target_place place = {0};
        PL_ASSERT(pl_target_find(spec, p->target, &place));
        if (ranks ? p->rank == info->rank : p->alpha == info->alpha)
            continue;
        pl_buf_addf(b, "%s\n    \"%s%u.%s\": ", comma, pl_adapter_layers(spec->arch), p->layer, place.module);
        add_number(b, ranks ? (double)p->rank : (double)p->alpha);
        comma = ",";
    }
    pl_buf_addf(b, "%s},\n", *comma != '\0' ? "\n  " : "");
}

/* Keys in the order of their bytes, as PEFT writes them. */
static void add_config(struct pl_buf *b, const struct pl_adapter *a, const struct pl_spec *spec, const struct pl_adapter_info *info)
{
    unsigned targets = info->targets;
    for (size_t i = 0; i < a->n_pairs; i++)
        targets |= 1u << a->pairs[i].target;
    pl_buf_adds(b, "{\n");
    add_pattern(b, "alpha_pattern", a, spec, info);
    pl_buf_adds(b, "  \"base_model_name_or_path\": ");
    add_text(b, info->base);
    pl_buf_addf(b, ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": %s,\n  \"inference_mode\": true,\n  \"init_lora_weights\": true,\n",
                strcmp(spec->arch, "gpt2") == 0 ? "true" : "false");
    pl_buf_adds(b, "  \"lora_alpha\": ");
    add_number(b, (double)info->alpha);
    pl_buf_adds(b, ",\n  \"lora_dropout\": ");
    add_number(b, (double)info->dropout);
    pl_buf_addf(b, ",\n  \"modules_to_save\": null,\n  \"peft_type\": \"LORA\",\n  \"r\": %u,\n", info->rank);
    add_pattern(b, "rank_pattern", a, spec, info);
    pl_buf_adds(b, "  \"target_modules\": [");
    const char *comma = "";
    for (uint32_t t = 0; t < PL_TARGET_COUNT; t++) {
        struct pl_target_place place;
        if ((targets & 1u << t) == 0 || !pl_target_find(spec, (pl_target)t, &place))
            continue;
        pl_buf_addf(b, "%s\n    \"%s\"", comma, place.name);
        comma = ",";
    }
    pl_buf_addf(b, "\n  ],\n  \"task_type\": \"CAUSAL_LM\",\n  \"use_dora\": false,\n  \"use_rslora\": %s\n}\n", a->rslora ? "true" : "false");
}

struct out_tensor {
    char name[128];
    float *ordered; /* a copy in Hugging Face's order, or NULL */
};

static pl_status write_weights(const char *path, const struct pl_adapter *a, const struct pl_spec *spec, struct pl_err *err)
{
    const struct pl_st_meta meta = {"format", "pt"};
    struct pl_st_tensor *tensors = pl_xcalloc(2 * a->n_pairs + 1, sizeof *tensors);
    struct out_tensor *own = pl_xcalloc(2 * a->n_pairs + 1, sizeof *own);
    pl_status rc = PL_OK;
    for (size_t i = 0; i < a->n_pairs && rc == PL_OK; i++) {
        const struct pl_lora_pair *p = &a->pairs[i];
        struct pl_target_place place = {0};
        PL_ASSERT(pl_target_find(spec, p->target, &place));
        for (int half = 0; half < 2; half++) {
            snprintf(own[2 * i + half].name, sizeof own->name, "base_model.model.%s%u.%s.lora_%c.weight", pl_adapter_layers(spec->arch), p->layer,
                     place.module, "AB"[half]);
            tensors[2 * i + half] = (struct pl_st_tensor){.name = own[2 * i + half].name, .dtype = PL_F32, .n_dims = 2};
        }
        struct pl_st_tensor *ta = &tensors[2 * i], *tb = ta + 1;
        ta->dims[0] = tb->dims[1] = p->rank;
        ta->dims[1] = place.cols;
        tb->dims[0] = place.rows;
        ta->data = p->a;
        tb->data = p->b;
        const uint32_t heads = pl_target_heads(spec, p->target);
        if (heads == 0)
            continue;
        float *ordered = own[2 * i].ordered = malloc((size_t)place.rows * p->rank * sizeof *ordered);
        if (ordered == NULL)
            rc = pl_fail(err, PL_ENOMEM, "out of memory");
        else
            pl_adapter_rows_to_halves(p->b, ordered, heads, spec->head_dim, p->rank);
        tb->data = ordered;
    }
    if (rc == PL_OK)
        rc = pl_safetensors_write(path, tensors, 2 * a->n_pairs, &meta, 1, err);
    for (size_t i = 0; i < a->n_pairs; i++)
        free(own[2 * i].ordered);
    free(own);
    free(tensors);
    return rc;
}

pl_status pl_adapter_write(const char *dir, const struct pl_adapter *a, const struct pl_spec *spec, const struct pl_adapter_info *info,
                           struct pl_err *err)
{
    struct pl_buf text;
    char *config = join(dir, CONFIG), *weights = join(dir, WEIGHTS);
    pl_status rc = config != NULL && weights != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
    pl_buf_init(&text, 0);
    if (rc == PL_OK && mkdir(dir, 0777) != 0 && errno != EEXIST)
        rc = pl_fail(err, pl_status_of_errno(errno), "cannot make the folder %.200s: %s", dir, strerror(errno));
    if (rc == PL_OK)
        rc = write_weights(weights, a, spec, err);
    if (rc == PL_OK) {
        add_config(&text, a, spec, info);
        rc = text.failed ? pl_fail(err, PL_ENOMEM, "out of memory") : pl_newfile_write(config, text.data, text.len, err);
    }
    pl_buf_fini(&text);
    free(config);
    free(weights);
    return rc;
}
