/* export_folder: writes a model as config.json and model.safetensors of Hugging Face's transformers.
 * Source: huggingface/transformers, models/llama and models/gpt2, modeling_rope_utils.py.
 * SPDX-License-Identifier: Apache-2.0 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/model/adapter_int.h"
#include "core/model/export.h"
#include "core/model/safetensors.h"

#define F16_MOST 65504.0f

/* Tensors outside the projections, of which PL_ADAPTER_TARGETS tells: name in GGUF, module in transformers. */
static const struct {
    const char *arch;
    bool layer; /* of each layer */
    const char *gguf, *module;
} others[] = {
    {"llama", false, "token_embd", "model.embed_tokens"}, {"llama", false, "output_norm", "model.norm"},
    {"llama", false, "output", "lm_head"},                {"llama", true, "attn_norm", "input_layernorm"},
    {"llama", true, "ffn_norm", "post_attention_layernorm"},
    {"gpt2", false, "token_embd", "transformer.wte"},     {"gpt2", false, "position_embd", "transformer.wpe"},
    {"gpt2", false, "output_norm", "transformer.ln_f"},   {"gpt2", false, "output", "lm_head"},
    {"gpt2", true, "attn_norm", "ln_1"},                  {"gpt2", true, "ffn_norm", "ln_2"},
};

/* A tensor to be. */
struct part {
    char name[128];
    const struct pl_gguf_tensor *t; /* NULL = zeros */
    const struct pl_lora_pair *pair; /* NULL = none */
    uint32_t heads;                  /* rows are to be brought into halves; 0 = not */
    bool transposed;
    uint32_t rows, cols; /* in GGUF's order; rows 1 = a vector */
};

struct folder {
    const struct pl_gguf *g;
    const struct pl_spec *spec;
    const struct pl_adapter *a;
    bool gpt2;
    bool attention_bias, mlp_bias; /* llama: a projection has one */
    struct part *parts;
    size_t n;
};

/* ---- tensors ------------------------------------------------------------------------------------------------------- */

/* "blk.<layer>.<stem>.<kind>", or the same without the first two; kind: weight or bias. */
static bool cut_name(struct pl_gguf_str name, long *layer, char stem[64], const char **kind)
{
    char s[96];
    int at = 0;
    if (name.n >= sizeof s)
        return false;
    memcpy(s, name.s, name.n);
    s[name.n] = '\0';
    *layer = -1;
    if (strncmp(s, "blk.", 4) == 0 && sscanf(s, "blk.%9ld.%n", layer, &at) != 1)
        return false;
    char *dot = strrchr(s, '.');
    *kind = dot == NULL ? NULL : strcmp(dot, ".weight") == 0 ? "weight" : strcmp(dot, ".bias") == 0 ? "bias" : NULL;
    if (*kind == NULL || dot < s + at || dot - (s + at) >= 64)
        return false;
    *dot = '\0';
    strcpy(stem, s + at);
    return true;
}

static const struct pl_lora_pair *pair_of(const struct pl_adapter *a, uint32_t layer, pl_target target)
{
    for (size_t i = 0; a != NULL && i < a->n_pairs; i++)
        if (a->pairs[i].layer == layer && a->pairs[i].target == target)
            return &a->pairs[i];
    return NULL;
}

static struct part *add_part(struct folder *f, uint64_t rows, uint64_t cols)
{
    struct part *p = &f->parts[f->n++];
    *p = (struct part){.rows = (uint32_t)rows, .cols = (uint32_t)cols};
    return p;
}

static void add_projection(struct folder *f, const struct pl_gguf_tensor *t, uint32_t layer, pl_target target, const char *module, const char *kind)
{
    const bool bias = kind[0] == 'b';
    struct part *p = add_part(f, bias ? 1 : t->ne[1], t->ne[0]);
    snprintf(p->name, sizeof p->name, "%s%u.%s.%s", pl_adapter_layers(f->spec->arch), layer, module, kind);
    p->t = t;
    p->pair = bias ? NULL : pair_of(f->a, layer, target);
    p->heads = pl_target_heads(f->spec, target);
    p->transposed = f->gpt2 && !bias;
    if (bias && strncmp(module, "self_attn.", 10) == 0)
        f->attention_bias = true;
    else if (bias)
        f->mlp_bias = true;
}

/* A tensor that the model does not use (rotation factors are in config.json) becomes none. */
static void add_tensor(struct folder *f, const struct pl_gguf_tensor *t)
{
    long layer;
    char stem[64];
    const char *kind;
    struct pl_target_place place;
    if (!cut_name(t->name, &layer, stem, &kind) || layer >= (long)f->spec->n_layers)
        return;
    for (uint32_t k = 0; layer >= 0 && k < PL_TARGET_COUNT; k++)
        if (pl_target_find(f->spec, (pl_target)k, &place) && strcmp(stem, place.gguf) == 0) {
            add_projection(f, t, (uint32_t)layer, (pl_target)k, place.module, kind);
            return;
        }
    for (size_t i = 0; i < PL_COUNT_OF(others); i++) {
        if (strcmp(others[i].arch, f->spec->arch) != 0 || others[i].layer != (layer >= 0) || strcmp(others[i].gguf, stem) != 0)
            continue;
        struct part *p = add_part(f, t->n_dims > 1 ? t->ne[1] : 1, t->ne[0]);
        if (layer >= 0)
            snprintf(p->name, sizeof p->name, "%s%ld.%s.%s", pl_adapter_layers(f->spec->arch), layer, others[i].module, kind);
        else
            snprintf(p->name, sizeof p->name, "%s.%s", others[i].module, kind);
        p->t = t;
        return;
    }
}

/* transformers' Llama has biases on all projections of the attention (of the feed-forward part), or on none. */
static void add_missing_biases(struct folder *f)
{
    const size_t n_real = f->n;
    for (uint32_t layer = 0; layer < f->spec->n_layers; layer++)
        for (uint32_t k = 0; k < PL_TARGET_COUNT; k++) {
            struct pl_target_place place;
            char name[128];
            bool there = false;
            if (!pl_target_find(f->spec, (pl_target)k, &place) || !(strncmp(place.module, "self_attn.", 10) == 0 ? f->attention_bias : f->mlp_bias))
                continue;
            snprintf(name, sizeof name, "%s%u.%s.bias", pl_adapter_layers(f->spec->arch), layer, place.module);
            for (size_t i = 0; i < n_real && !there; i++)
                there = strcmp(f->parts[i].name, name) == 0;
            if (!there)
                strcpy(add_part(f, 1, place.rows)->name, name);
        }
}

static pl_status check_values(const struct part *p, pl_dtype dtype, const float *v, struct pl_err *err)
{
    for (size_t i = 0; dtype == PL_F16 && i < (size_t)p->rows * p->cols; i++)
        if (v[i] > F16_MOST || v[i] < -F16_MOST)
            return pl_fail(err, PL_EINVAL, "%s holds %g, which f16 cannot: take --type bf16 or f32", p->name, (double)v[i]);
    return PL_OK;
}

/* in -> out, both [rows * cols], as transformers has them. */
static const float *arrange(const struct folder *f, const struct part *p, const float *in, float *out)
{
    if (p->heads > 0) {
        pl_adapter_rows_to_halves(in, out, p->heads, f->spec->head_dim, p->rows > 1 ? p->cols : 1);
        return out;
    }
    if (!p->transposed)
        return in;
    for (size_t r = 0; r < p->rows; r++)
        for (size_t c = 0; c < p->cols; c++)
            out[c * p->rows + r] = in[r * p->cols + c];
    return out;
}

static pl_status put_part(const struct folder *f, struct pl_st_writer *w, size_t i, pl_dtype dtype, struct pl_err *err)
{
    const struct part *p = &f->parts[i];
    const size_t n = (size_t)p->rows * p->cols;
    float *values = calloc(n, sizeof *values), *out = malloc(n * sizeof *out);
    pl_status rc = values != NULL && out != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory for %s", p->name);
    for (uint64_t row = 0; rc == PL_OK && p->t != NULL && row < p->rows; row++)
        pl_export_row(p->t, p->pair, row, values + row * p->cols);
    if (rc == PL_OK)
        rc = check_values(p, dtype, values, err);
    if (rc == PL_OK)
        rc = pl_st_writer_put(w, i, arrange(f, p, values, out), err);
    free(values);
    free(out);
    return rc;
}

static pl_status write_weights(const struct folder *f, const char *path, pl_dtype dtype, struct pl_err *err)
{
    const struct pl_st_meta meta = {"format", "pt"};
    struct pl_st_tensor *tensors = pl_xcalloc(f->n + 1, sizeof *tensors);
    struct pl_st_writer *w = NULL;
    for (size_t i = 0; i < f->n; i++) {
        const struct part *p = &f->parts[i];
        const bool vector = p->rows == 1;
        tensors[i] = (struct pl_st_tensor){.name = p->name, .dtype = dtype, .n_dims = vector ? 1 : 2};
        tensors[i].dims[0] = vector || p->transposed ? p->cols : p->rows;
        tensors[i].dims[1] = p->transposed ? p->rows : p->cols;
    }
    pl_status rc = pl_st_writer_new(&w, path, tensors, f->n, &meta, 1, err);
    for (size_t i = 0; rc == PL_OK && i < f->n; i++)
        rc = put_part(f, w, i, dtype, err);
    if (rc == PL_OK)
        rc = pl_st_writer_commit(w, err);
    pl_st_writer_free(w);
    free(tensors);
    return rc;
}

/* ---- config.json --------------------------------------------------------------------------------------------------- */

/* The shortest number that is the same float. */
static json_t *real(float v)
{
    char s[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, (double)v);
        if (strtof(s, NULL) == v)
            break;
    }
    return json_real(strtod(s, NULL));
}

static json_t *token_id(const struct pl_gguf *g, const char *key)
{
    uint32_t id;
    return pl_gguf_u32(g, key, &id) == PL_OK && id != UINT32_MAX ? json_integer(id) : json_null();
}

/* Factors of each frequency, which transformers takes in the form of "longrope": the same ones for short and long texts. */
static json_t *rope_scaling(const struct folder *f)
{
    const struct pl_gguf_tensor *t = pl_gguf_tensor(f->g, "rope_freqs.weight");
    const float linear = f->spec->rope_factor;
    if (t == NULL)
        return linear == 1 ? json_null() : json_pack("{s:s, s:o}", "rope_type", "linear", "factor", real(linear));
    float *factors = pl_xcalloc(t->ne[0], sizeof *factors);
    json_t *list = json_array();
    pl_dequant_row(t->dtype, t->data, factors, t->ne[0]);
    for (uint64_t i = 0; i < t->ne[0]; i++)
        json_array_append_new(list, real(factors[i] * linear));
    free(factors);
    return json_pack("{s:s, s:O, s:o, s:f, s:I}", "rope_type", "longrope", "short_factor", list, "long_factor", list, "attention_factor", 1.0,
                     "original_max_position_embeddings", (json_int_t)f->spec->n_ctx);
}

static json_t *llama_config(const struct folder *f)
{
    const struct pl_spec *s = f->spec;
    return json_pack("{s:[s], s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:b, s:b}", "architectures", "LlamaForCausalLM", "model_type",
                     "llama", "hidden_act", "silu", "hidden_size", (json_int_t)s->n_embd, "intermediate_size", (json_int_t)s->n_ff, "num_hidden_layers",
                     (json_int_t)s->n_layers, "num_attention_heads", (json_int_t)s->n_heads, "num_key_value_heads", (json_int_t)s->n_kv_heads, "head_dim",
                     (json_int_t)s->head_dim, "max_position_embeddings", (json_int_t)s->n_ctx, "rms_norm_eps", real(s->norm_eps), "rope_theta",
                     real(s->rope_base), "rope_scaling", rope_scaling(f), "attention_bias", f->attention_bias, "mlp_bias", f->mlp_bias);
}

static json_t *gpt2_config(const struct folder *f)
{
    const struct pl_spec *s = f->spec;
    return json_pack("{s:[s], s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:o}", "architectures", "GPT2LMHeadModel", "model_type", "gpt2", "activation_function",
                     "gelu_new", "n_embd", (json_int_t)s->n_embd, "n_inner", (json_int_t)s->n_ff, "n_layer", (json_int_t)s->n_layers, "n_head",
                     (json_int_t)s->n_heads, "n_positions", (json_int_t)s->n_ctx, "layer_norm_epsilon", real(s->norm_eps));
}

static pl_status write_config(const struct folder *f, const char *path, pl_dtype dtype, struct pl_err *err)
{
    json_t *c = f->gpt2 ? gpt2_config(f) : llama_config(f);
    json_object_set_new(c, "vocab_size", json_integer(f->spec->n_vocab));
    json_object_set_new(c, "tie_word_embeddings", json_boolean(f->spec->tied));
    json_object_set_new(c, "bos_token_id", token_id(f->g, "tokenizer.ggml.bos_token_id"));
    json_object_set_new(c, "eos_token_id", token_id(f->g, "tokenizer.ggml.eos_token_id"));
    json_object_set_new(c, "torch_dtype", json_string(dtype == PL_F32 ? "float32" : dtype == PL_F16 ? "float16" : "bfloat16"));
    char *text = json_dumps(c, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    const pl_status rc = text != NULL ? pl_newfile_write(path, text, strlen(text), err) : pl_fail(err, PL_ENOMEM, "out of memory");
    free(text);
    json_decref(c);
    return rc;
}

/* ---- the whole ----------------------------------------------------------------------------------------------------- */

static pl_status check_model(const struct folder *f, struct pl_err *err)
{
    const struct pl_spec *s = f->spec;
    if (f->gpt2 && (s->n_kv_heads != s->n_heads || s->head_dim * s->n_heads != s->n_embd))
        return pl_fail(err, PL_ENOTSUP, "transformers' GPT-2 has no grouped heads and none of another width than n_embd / n_head (keys "
                       "gpt2.attention.head_count_kv and key_length): export to GGUF instead");
    if (!f->gpt2 && s->rope_dims != s->head_dim)
        return pl_fail(err, PL_ENOTSUP, "transformers' Llama rotates whole heads, this model %u of %u values (key llama.rope.dimension_count): export to "
                       "GGUF instead", s->rope_dims, s->head_dim);
    return PL_OK;
}

static void choose_type(const struct pl_gguf *g, int *type)
{
    const struct pl_gguf_tensor *t = pl_gguf_tensor(g, "blk.0.attn_output.weight");
    if (*type == PL_EXPORT_AUTO)
        *type = t->dtype == PL_F32 || t->dtype == PL_BF16 ? (int)t->dtype : PL_F16;
}

pl_status pl_export_folder(const char *folder, const struct pl_gguf *g, const struct pl_spec *spec, const struct pl_adapter *a, int *type,
                           struct pl_err *err)
{
    const size_t n = pl_gguf_n_tensors(g) + (size_t)spec->n_layers * PL_TARGET_COUNT;
    struct folder f = {.g = g, .spec = spec, .a = a, .gpt2 = strcmp(spec->arch, "gpt2") == 0};
    char *config = NULL, *weights = NULL;
    pl_status rc = check_model(&f, err);
    if (rc != PL_OK)
        return rc;
    choose_type(g, type);
    if (*type != PL_F32 && *type != PL_F16 && *type != PL_BF16)
        return pl_fail(err, PL_EINVAL, "a folder takes the types f32, f16 and bf16");
    if (asprintf(&config, "%s/config.json", folder) < 0)
        return pl_fail(err, PL_ENOMEM, "out of memory");
    if (asprintf(&weights, "%s/model.safetensors", folder) < 0) {
        free(config);
        return pl_fail(err, PL_ENOMEM, "out of memory");
    }
    f.parts = pl_xcalloc(n, sizeof *f.parts);
    for (size_t i = 0; i < pl_gguf_n_tensors(g); i++)
        add_tensor(&f, pl_gguf_tensor_at(g, i));
    if (!f.gpt2)
        add_missing_biases(&f);
    rc = write_weights(&f, weights, (pl_dtype)*type, err);
    if (rc == PL_OK)
        rc = write_config(&f, config, (pl_dtype)*type, err);
    free(f.parts);
    free(config);
    free(weights);
    return rc;
}
