/* tiny_model: small random models of each architecture, whole with tokenizer and chat template.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/tools/tiny_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "tests/tools/tiny_vocab.h"

struct maker {
    struct gguf_out *out;
    const struct tiny_options *o;
    uint32_t n_vocab, head_dim;
};

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Each tensor has a stream of its own, so that an option that adds one leaves the others alone. */
static uint64_t stream(const struct maker *mk, const char *name)
{
    uint64_t h = 0xcbf29ce484222325u ^ mk->o->seed;
    for (; *name != '\0'; name++)
        h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return h;
}

/* Uniform in [-1, 1) with 23 random bits, exact in float32. */
static float uniform(uint64_t *state)
{
    return (float)((int32_t)(next(state) >> 40) - (1 << 23)) / (float)(1 << 23);
}

/* Where a block keeps its float16 scale and minimum, and what they must be for values of about 1: the other bytes of a
 * block (quants, inner scales) are random. min = ratio * scale centres the values. */
static const struct block {
    pl_dtype dtype;
    int scale_at, min_at;
    float divisor, ratio;
} blocks[] = {
    {PL_Q4_0, 0, -1, 8, 0},    {PL_Q4_1, 0, 2, 7.5f, -7.5f},  {PL_Q5_0, 0, -1, 16, 0},
    {PL_Q5_1, 0, 2, 15.5f, -15.5f}, {PL_Q8_0, 0, -1, 127, 0}, {PL_Q2_K, 80, 82, 30, 1.5f},
    {PL_Q3_K, 108, -1, 64, 0}, {PL_Q4_K, 0, 2, 500, 7.5f},    {PL_Q5_K, 0, 2, 1000, 15.5f},
    {PL_Q6_K, 208, -1, 2000, 0},
};

static const struct block *block_of(pl_dtype dtype)
{
    for (size_t i = 0; i < PL_COUNT_OF(blocks); i++) {
        if (blocks[i].dtype == dtype)
            return &blocks[i];
    }
    return NULL;
}

static void put_f16(uint8_t *p, float v)
{
    const uint16_t h = pl_f32_to_f16(v);
    memcpy(p, &h, sizeof h);
}

/* n random values of about ±size as the type holds them. */
static void fill(uint64_t *state, pl_dtype dtype, float size, uint8_t *bytes, size_t n)
{
    const struct block *b = block_of(dtype);
    if (b != NULL) {
        const size_t step = pl_dtype_block_bytes(dtype);
        const size_t n_bytes = pl_dtype_row_bytes(dtype, n);
        for (size_t i = 0; i < n_bytes; i++)
            bytes[i] = (uint8_t)(next(state) >> 56);
        for (size_t i = 0; i < n_bytes; i += step) {
            const float scale = size / b->divisor * (0.75f + 0.25f * uniform(state));
            put_f16(bytes + i + b->scale_at, scale);
            if (b->min_at >= 0)
                put_f16(bytes + i + b->min_at, scale * b->ratio);
        }
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const float v = size * uniform(state);
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        if (dtype == PL_F16)
            put_f16(bytes + 2 * i, v);
        else if (dtype == PL_BF16)
            memcpy(bytes + 2 * i, (uint16_t[]){(uint16_t)(bits >> 16)}, 2);
        else
            memcpy(bytes + 4 * i, &v, sizeof v);
    }
}

static const char *layer_name(char buf[64], int layer, const char *name)
{
    if (layer < 0)
        snprintf(buf, 64, "%s", name);
    else
        snprintf(buf, 64, "blk.%d.%s", layer, name);
    return buf;
}

/* A matrix whose products keep the size of what goes in, times gain. */
static void matrix(const struct maker *mk, int layer, const char *name, uint32_t rows, uint32_t cols, float size)
{
    char full[64];
    uint64_t state = stream(mk, layer_name(full, layer, name));
    const pl_dtype dtype = mk->o->dtype;
    uint8_t *bytes = pl_xmalloc(rows * pl_dtype_row_bytes(dtype, cols));
    fill(&state, dtype, size, bytes, (size_t)rows * cols);
    gguf_out_tensor(mk->out, full, dtype, cols, rows, bytes);
    free(bytes);
}

static void projection(const struct maker *mk, int layer, const char *name, uint32_t rows, uint32_t cols)
{
    matrix(mk, layer, name, rows, cols, sqrtf(3.0f / (float)cols));
}

/* float32 values around `centre`. */
static void vector(const struct maker *mk, int layer, const char *name, uint32_t n, float centre, float size)
{
    char full[64];
    uint64_t state = stream(mk, layer_name(full, layer, name));
    float *v = pl_xcalloc(n, sizeof *v);
    for (uint32_t i = 0; i < n; i++)
        v[i] = centre + size * uniform(&state);
    gguf_out_tensor(mk->out, full, PL_F32, n, 1, v);
    free(v);
}

static void gain(const struct maker *mk, int layer, const char *name)
{
    vector(mk, layer, name, mk->o->n_embd, 1.0f, 0.25f);
}

static void bias(const struct maker *mk, int layer, const char *name, uint32_t n)
{
    vector(mk, layer, name, n, 0.0f, 0.25f);
}

static void llama_layer(const struct maker *mk, int i)
{
    const uint32_t C = mk->o->n_embd, F = mk->o->n_ff;
    const uint32_t Q = mk->o->n_heads * mk->head_dim, K = mk->o->n_kv_heads * mk->head_dim;
    gain(mk, i, "attn_norm.weight");
    projection(mk, i, "attn_q.weight", Q, C);
    projection(mk, i, "attn_k.weight", K, C);
    projection(mk, i, "attn_v.weight", K, C);
    projection(mk, i, "attn_output.weight", C, Q);
    gain(mk, i, "ffn_norm.weight");
    projection(mk, i, "ffn_gate.weight", F, C);
    projection(mk, i, "ffn_up.weight", F, C);
    projection(mk, i, "ffn_down.weight", C, F);
    if (!mk->o->biases)
        return;
    bias(mk, i, "attn_q.bias", Q);
    bias(mk, i, "attn_k.bias", K);
    bias(mk, i, "attn_v.bias", K);
    bias(mk, i, "attn_output.bias", C);
    bias(mk, i, "ffn_gate.bias", F);
    bias(mk, i, "ffn_up.bias", F);
    bias(mk, i, "ffn_down.bias", C);
}

static void gpt2_layer(const struct maker *mk, int i)
{
    const uint32_t C = mk->o->n_embd, F = mk->o->n_ff;
    gain(mk, i, "attn_norm.weight");
    bias(mk, i, "attn_norm.bias", C);
    projection(mk, i, "attn_qkv.weight", 3 * C, C);
    bias(mk, i, "attn_qkv.bias", 3 * C);
    projection(mk, i, "attn_output.weight", C, C);
    bias(mk, i, "attn_output.bias", C);
    gain(mk, i, "ffn_norm.weight");
    bias(mk, i, "ffn_norm.bias", C);
    projection(mk, i, "ffn_up.weight", F, C);
    bias(mk, i, "ffn_up.bias", F);
    projection(mk, i, "ffn_down.weight", C, F);
    bias(mk, i, "ffn_down.bias", C);
}

static void common_keys(const struct maker *mk, const char *norm_key)
{
    const struct tiny_options *o = mk->o;
    const struct {
        const char *key;
        uint32_t v;
    } keys[] = {
        {"block_count", o->n_layers},       {"context_length", o->n_ctx},      {"embedding_length", o->n_embd},
        {"feed_forward_length", o->n_ff},   {"attention.head_count", o->n_heads},
    };
    char key[96];
    gguf_out_str(mk->out, "general.architecture", o->arch);
    gguf_out_str(mk->out, "general.name", "tiny random model");
    for (size_t i = 0; i < PL_COUNT_OF(keys); i++) {
        snprintf(key, sizeof key, "%s.%s", o->arch, keys[i].key);
        gguf_out_u32(mk->out, key, keys[i].v);
    }
    snprintf(key, sizeof key, "%s.%s", o->arch, norm_key);
    gguf_out_f32(mk->out, key, 1e-5f);
}

static void make_llama(const struct maker *mk)
{
    const struct tiny_options *o = mk->o;
    common_keys(mk, "attention.layer_norm_rms_epsilon");
    gguf_out_u32(mk->out, "llama.attention.head_count_kv", o->n_kv_heads);
    gguf_out_u32(mk->out, "llama.vocab_size", mk->n_vocab);
    gguf_out_u32(mk->out, "llama.rope.dimension_count", mk->head_dim);
    if (mk->head_dim * o->n_heads != o->n_embd) {
        gguf_out_u32(mk->out, "llama.attention.key_length", mk->head_dim);
        gguf_out_u32(mk->out, "llama.attention.value_length", mk->head_dim);
    }
    if (o->rope_base != 0)
        gguf_out_f32(mk->out, "llama.rope.freq_base", o->rope_base);
    if (o->rope_linear != 0) {
        gguf_out_str(mk->out, "llama.rope.scaling.type", "linear");
        gguf_out_f32(mk->out, "llama.rope.scaling.factor", o->rope_linear);
    }
    if (o->rope_factors)
        vector(mk, -1, "rope_freqs.weight", mk->head_dim / 2, 4.5f, 3.5f);
    matrix(mk, -1, "token_embd.weight", mk->n_vocab, o->n_embd, 0.5f);
    gain(mk, -1, "output_norm.weight");
    for (int i = 0; i < (int)o->n_layers; i++)
        llama_layer(mk, i);
}

static void make_gpt2(const struct maker *mk)
{
    const struct tiny_options *o = mk->o;
    common_keys(mk, "attention.layer_norm_epsilon");
    matrix(mk, -1, "token_embd.weight", mk->n_vocab, o->n_embd, 0.5f);
    matrix(mk, -1, "position_embd.weight", o->n_ctx, o->n_embd, 0.5f);
    gain(mk, -1, "output_norm.weight");
    bias(mk, -1, "output_norm.bias", o->n_embd);
    for (int i = 0; i < (int)o->n_layers; i++)
        gpt2_layer(mk, i);
}

struct tiny_options tiny_defaults(void)
{
    return (struct tiny_options){
        .arch = "llama",
        .tokenizer = "bpe",
        .pre = "smollm",
        .seed = 1,
        .dtype = PL_F32,
        .n_layers = 2,
        .n_embd = 64,
        .n_heads = 4,
        .n_kv_heads = 2,
        .n_ff = 160,
        .n_ctx = 512,
    };
}

static pl_status check(const struct tiny_options *o, uint32_t head_dim, struct pl_err *err)
{
    const bool gpt2 = strcmp(o->arch, "gpt2") == 0;
    const uint32_t block = pl_dtype_block(o->dtype);
    if (!gpt2 && strcmp(o->arch, "llama") != 0)
        return pl_fail(err, PL_EINVAL, "unknown architecture %s (llama, gpt2)", o->arch);
    if (strcmp(o->tokenizer, "bpe") != 0 && strcmp(o->tokenizer, "spm") != 0)
        return pl_fail(err, PL_EINVAL, "unknown tokenizer %s (bpe, spm)", o->tokenizer);
    if (block == 0 || o->n_embd % block != 0 || o->n_ff % block != 0 || o->n_heads * head_dim % block != 0)
        return pl_fail(err, PL_EINVAL, "sizes must be multiples of the type's block of %u", block);
    if (o->n_layers == 0 || o->n_heads == 0 || o->n_kv_heads == 0 || o->n_ctx == 0 || head_dim == 0 || head_dim % 2 != 0)
        return pl_fail(err, PL_EINVAL, "sizes must be above 0 and the head's even");
    if (gpt2 && (head_dim * o->n_heads != o->n_embd || o->rope_base != 0 || o->rope_linear != 0 || o->rope_factors))
        return pl_fail(err, PL_EINVAL, "gpt2 has heads of n_embd / n_heads and no rope");
    return PL_OK;
}

struct gguf_out *tiny_model(const struct tiny_options *o, struct pl_err *err)
{
    const uint32_t head_dim = o->head_dim != 0 ? o->head_dim : o->n_heads != 0 ? o->n_embd / o->n_heads : 0;
    if (check(o, head_dim, err) != PL_OK)
        return NULL;
    struct maker mk = {.out = gguf_out_new(), .o = o, .head_dim = head_dim};
    mk.n_vocab = strcmp(o->tokenizer, "bpe") == 0 ? tiny_vocab_bpe(mk.out, o->pre) : tiny_vocab_spm(mk.out);
    if (strcmp(o->arch, "gpt2") == 0)
        make_gpt2(&mk);
    else
        make_llama(&mk);
    if (o->untied)
        matrix(&mk, -1, "output.weight", mk.n_vocab, o->n_embd, sqrtf(12.0f / (float)o->n_embd));
    return mk.out;
}
