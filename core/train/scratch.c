/* scratch: a model from nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/scratch.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/machine.h"
#include "core/base/mem.h"
#include "core/model/weights.h"
#include "core/text/tok.h"
#include "core/text/tok_train.h"
#include "core/train/job.h"
#include "core/train/random.h"

#define SHAPE "method.pretrain.shape"
#define ORIGIN "parley.origin"
#define KEPT "%s/" PL_SCRATCH_TOKENIZER

static const double DEVIATION = 0.02, TWO_PI = 6.283185307179586;
enum { MIN_COUNT = 2 /* a pair that stands once teaches nothing */ };
static const float EPSILON = 1e-5f, ROPE_BASE = 10000;

static const char *const specials[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}; /* the first ends texts */
enum { CONTROL_TOKEN = 3, NORMAL_TOKEN = 1 };                                           /* of tokenizer.ggml.token_type */

static const char chatml[] = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
                             "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/* ---- weights -------------------------------------------------------------------------------------------------------- */

struct tensor {
    enum { MATRIX, VECTOR } kind;
    const char *name;
    uint32_t rows, cols;
};

typedef void visit_tensor(void *arg, const char *name, const struct tensor *t);

/* Every weight that a model of this shape must have, and the head if it has one of its own. */
static void each_tensor(const struct pl_spec *s, unsigned arch, visit_tensor *visit, void *arg)
{
    enum { MUST, MAY };
    const uint32_t V = s->n_vocab, C = s->n_embd, P = s->n_ctx, F = s->n_ff, W = s->rope_dims / 2;
    const uint32_t Q = s->n_heads * s->head_dim, K = s->n_kv_heads * s->head_dim;
    (void)W;
#define X(kind, field, archs, name, rows, cols, need, cut)                                                             \
    if (((archs) & arch) != 0 && (need == MUST || (!s->tied && strcmp(#field, "head") == 0)))                          \
        visit(arg, name, &(struct tensor){kind, name, rows, cols});
    PL_TOP_WEIGHTS(X)
#undef X
    for (uint32_t i = 0; i < s->n_layers; i++) {
        char full[64];
#define X(kind, field, archs, name, rows, cols, need, cut)                                                             \
    if (((archs) & arch) != 0 && need == MUST) {                                                                       \
        snprintf(full, sizeof full, "blk.%u.%s", i, name);                                                             \
        visit(arg, full, &(struct tensor){kind, name, rows, cols});                                                    \
    }
        PL_LAYER_WEIGHTS(X)
#undef X
    }
}

static unsigned model_of(struct pl_spec *m, const struct pl_train_spec *s)
{
    *m = (struct pl_spec){.n_layers = s->shape_layers, .n_embd = s->shape_width, .n_heads = s->shape_heads, .n_kv_heads = s->shape_kv_heads,
                          .head_dim = s->shape_width / s->shape_heads, .n_ff = s->shape_ff, .n_ctx = s->shape_context, .n_vocab = s->shape_vocab,
                          .tied = s->shape_tied};
    return s->shape_arch == PL_SHAPE_GPT2 ? PL_ARCH_GPT2 : PL_ARCH_LLAMA;
}

static void count_params(void *arg, const char *name, const struct tensor *t)
{
    (void)name;
    *(uint64_t *)arg += (uint64_t)t->rows * t->cols;
}

uint64_t pl_scratch_params(const struct pl_train_spec *s)
{
    struct pl_spec m;
    uint64_t n = 0;
    const unsigned arch = model_of(&m, s);
    each_tensor(&m, arch, count_params, &n);
    return n;
}

static void add_tensor(void *arg, const char *name, const struct tensor *t)
{
    struct pl_gguf_tensor x = {.name = {name, strlen(name)}, .dtype = PL_F32, .n_dims = t->kind == MATRIX ? 2 : 1, .ne = {t->cols, t->rows, 1, 1}};
    pl_gguf_out_tensor(arg, &x);
}

struct first_values {
    const struct pl_scratch *x;
    uint32_t seed;
    size_t tensor; /* that state belongs to */
    uint64_t state;
};

static bool ends_with(struct pl_gguf_str s, const char *end)
{
    const size_t n = strlen(end);
    return s.n >= n && memcmp(s.s + s.n - n, end, n) == 0;
}

/* Pairs of normal values from pairs of even ones (Box and Muller). */
static pl_status first_row(void *arg, size_t tensor, uint64_t row, float *out)
{
    struct first_values *v = arg;
    const struct pl_gguf_tensor *t = &v->x->out.tensors[tensor].t;
    const size_t n = t->ne[0];
    if (t->n_dims == 1) {
        for (size_t i = 0; i < n; i++)
            out[i] = ends_with(t->name, ".weight") ? 1 : 0;
        return PL_OK;
    }
    if (row == 0) {
        char name[72];
        snprintf(name, sizeof name, "%.*s", (int)t->name.n, t->name.s);
        v->state = pl_random_stream(v->seed, name);
    }
    const bool residual = ends_with(t->name, ".attn_output.weight") || ends_with(t->name, ".ffn_down.weight");
    const double deviation = residual ? DEVIATION / sqrt(2.0 * v->x->model.n_layers) : DEVIATION;
    for (size_t i = 0; i < n; i += 2) {
        const double radius = deviation * sqrt(-2 * log(1 - pl_random_unit(&v->state))), angle = TWO_PI * pl_random_unit(&v->state);
        out[i] = (float)(radius * cos(angle));
        if (i + 1 < n)
            out[i + 1] = (float)(radius * sin(angle));
    }
    return PL_OK;
}

pl_status pl_scratch_write(struct pl_scratch *x, const char *path, uint32_t seed, const char *origin, struct pl_err *err)
{
    struct first_values v = {.x = x, .seed = seed};
    pl_gguf_out_str(&x->out, ORIGIN, origin, strlen(origin));
    return pl_gguf_out_write(&x->out, path, first_row, &v, err);
}

/* ---- keys ----------------------------------------------------------------------------------------------------------- */

/* A key of the hyper-parameters: behind the architecture's name. */
static const char *key(char out[80], const char *arch, const char *rest)
{
    snprintf(out, 80, "%s.%s", arch, rest);
    return out;
}

static void put_shape(struct pl_gguf_out *o, const struct pl_train_spec *s)
{
    const bool gpt2 = s->shape_arch == PL_SHAPE_GPT2;
    const char *arch = gpt2 ? "gpt2" : "llama";
    const struct {
        const char *name;
        uint32_t value;
    } numbers[] = {
        {"block_count", s->shape_layers}, {"context_length", s->shape_context}, {"embedding_length", s->shape_width},
        {"feed_forward_length", s->shape_ff}, {"attention.head_count", s->shape_heads}, {"attention.head_count_kv", s->shape_kv_heads},
        {"vocab_size", s->shape_vocab},
    };
    char name[80];
    pl_gguf_out_str(o, "general.architecture", arch, strlen(arch));
    for (size_t i = 0; i < PL_COUNT_OF(numbers); i++)
        pl_gguf_out_u32(o, key(name, arch, numbers[i].name), numbers[i].value);
    pl_gguf_out_f32(o, key(name, arch, gpt2 ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon"), EPSILON);
    if (gpt2)
        return;
    pl_gguf_out_u32(o, key(name, arch, "rope.dimension_count"), s->shape_width / s->shape_heads);
    pl_gguf_out_f32(o, key(name, arch, "rope.freq_base"), ROPE_BASE);
}

static void put_tokenizer(struct pl_gguf_out *o, const struct pl_bpe *b)
{
    struct pl_buf text;
    const int32_t n = (int32_t)pl_bpe_n_tokens(b);
    pl_buf_init(&text, 0);
    pl_gguf_out_str(o, "tokenizer.ggml.model", "gpt2", 4);
    pl_gguf_out_str(o, "tokenizer.ggml.pre", "gpt-2", 5);
    pl_gguf_out_strs(o, "tokenizer.ggml.tokens", (uint64_t)n);
    for (int32_t id = 0; id < n; id++) {
        pl_buf_clear(&text);
        if (id < (int32_t)b->n_special)
            pl_buf_adds(&text, specials[id]);
        else
            pl_bpe_text(b, id, &text);
        pl_gguf_out_strs_item(o, pl_buf_str(&text), text.len);
    }
    pl_gguf_out_i32s(o, "tokenizer.ggml.token_type", (uint64_t)n);
    for (int32_t id = 0; id < n; id++)
        pl_gguf_out_i32s_item(o, id < (int32_t)b->n_special ? CONTROL_TOKEN : NORMAL_TOKEN);
    pl_gguf_out_strs(o, "tokenizer.ggml.merges", b->n_merges);
    for (uint32_t i = 0; i < b->n_merges; i++) {
        pl_buf_clear(&text);
        pl_bpe_text(b, b->merges[i].left, &text);
        pl_buf_addc(&text, ' ');
        pl_bpe_text(b, b->merges[i].right, &text);
        pl_gguf_out_strs_item(o, pl_buf_str(&text), text.len);
    }
    pl_gguf_out_u32(o, "tokenizer.ggml.bos_token_id", 0);
    pl_gguf_out_u32(o, "tokenizer.ggml.eos_token_id", 0);
    pl_gguf_out_bool(o, "tokenizer.ggml.add_bos_token", false);
    o->keys.failed |= text.failed;
    pl_buf_fini(&text);
}

static void put_template(struct pl_scratch *x, const struct pl_gguf *base, const struct pl_train_spec *s)
{
    static const char name[] = "tokenizer.chat_template";
    struct pl_gguf_str own;
    if (s->shape_chat == PL_SHAPE_CHAT_ML)
        pl_buf_adds(&x->template, chatml);
    else if (s->shape_chat == PL_SHAPE_CHAT_BASE && pl_gguf_string(base, name, &own) == PL_OK)
        pl_buf_add(&x->template, own.s, own.n);
    if (x->template.len > 0)
        pl_gguf_out_str(&x->out, name, x->template.data, x->template.len);
}

/* ---- the tokenizer -------------------------------------------------------------------------------------------------- */

struct reader {
    struct pl_tok_trainer *trainer; /* NULL = only counted */
    uint64_t n_bytes, n_learned;
    bool full;
};

static pl_status take_text(void *arg, const char *s, size_t n)
{
    struct reader *r = arg;
    r->n_bytes += n;
    if (r->full || r->trainer == NULL)
        return PL_OK;
    const pl_status st = pl_tok_trainer_add(r->trainer, s, n);
    r->full = st == PL_EFULL;
    r->n_learned += r->full ? 0 : n;
    return r->full ? PL_OK : st;
}

static pl_status read_texts(struct reader *reader, const struct pl_train_spec *s, const struct pl_scratch_source *from, struct pl_data_report *r,
                            struct pl_err *err)
{
    const struct pl_data_opts o = {.text = take_text, .text_arg = reader, .method = s->method, .min_examples = PL_DATA_MIN_EXAMPLES, .stop = from->stop};
    const pl_status st = pl_data_scan(from->training, &o, NULL, NULL, r, err);
    if (st != PL_OK && err != NULL)
        strcpy(err->param, "training_file");
    return st;
}

/* The system would rather end the process than refuse memory, so that it is asked first. */
static pl_status check_learning(const struct reader *reader, uint64_t memory, struct pl_err *err)
{
    const uint64_t need = pl_tok_trainer_memory(reader->trainer), there = pl_machine_memory(), most = memory > 0 && memory < there ? memory : there;
    if (need <= most)
        return PL_OK;
    return pl_fail(err, PL_ENOMEM, "to learn a tokenizer from this text takes up to %llu MiB of memory, but %llu MiB are there: try again when more is free, "
                   "give less text, or take tokenizer \"base\"", (unsigned long long)(need >> 20) + 1, (unsigned long long)(most >> 20));
}

/* asked: vocab_size was given, and is a promise. */
static pl_status learn(struct pl_scratch *x, struct pl_train_spec *s, const struct reader *reader, bool asked, const struct pl_scratch_source *from,
                       struct pl_err *err)
{
    struct pl_bpe b;
    pl_status st = check_learning(reader, from->memory, err);
    if (st == PL_OK)
        st = pl_tok_trainer_learn(&b, reader->trainer, pl_train_shape_specials(s), s->shape_vocab, MIN_COUNT, from->stop, err);
    if (st != PL_OK)
        return st;
    const uint32_t n = pl_bpe_n_tokens(&b);
    if (n < s->shape_vocab && asked)
        st = pl_fail_param(err, PL_EINVAL, SHAPE ".vocab_size", "'vocab_size' is %u, but the text of the training file yields %u tokens at most: ask for "
                           "no more than that, for \"auto\", or give more text", s->shape_vocab, n);
    s->shape_vocab = n;
    x->tokenizer_bytes = reader->n_learned;
    if (st == PL_OK)
        put_tokenizer(&x->out, &b);
    pl_bpe_fini(&b);
    return st;
}

static pl_status check_room(const struct pl_train_spec *s, uint64_t room, struct pl_err *err)
{
    const uint64_t params = pl_scratch_params(s);
    if (room == 0 || params < room / 16)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, SHAPE, "a model of this shape has %llu parameters and takes more than %.1f GiB to train, but %.1f GiB are there: "
                         "lower layers, width, ff or vocab_size", (unsigned long long)params, (double)params * 16 / (1 << 30), (double)room / (1 << 30));
}

/* What a learned tokenizer depends on. */
static pl_status tokenizer_origin(const struct pl_train_spec *s, const char *training, char hex[PL_SHA256_HEX], struct pl_err *err)
{
    const uint32_t numbers[] = {pl_train_shape_specials(s), s->shape_vocab, MIN_COUNT};
    char id[PL_SHA256_HEX];
    struct pl_sha256 h;
    const pl_status st = pl_train_base_id(training, id, err);
    if (st != PL_OK)
        return st;
    pl_sha256_init(&h);
    pl_sha256_add(&h, numbers, sizeof numbers);
    pl_sha256_add(&h, id, strlen(id));
    pl_sha256_hex(&h, hex);
    return PL_OK;
}

pl_status pl_scratch_keep(const struct pl_scratch *x, const struct pl_train_spec *s, const char *training, const char *folder, struct pl_err *err)
{
    char origin[PL_SHA256_HEX], path[PATH_MAX];
    struct pl_gguf_out o;
    if (x->tokenizer_bytes == 0)
        return PL_OK;
    pl_status st = tokenizer_origin(s, training, origin, err);
    snprintf(path, sizeof path, KEPT, folder);
    pl_gguf_out_init(&o);
    pl_gguf_out_keys_of(&o, x->gguf, "tokenizer.", "tokenizer.chat_template");
    pl_gguf_out_str(&o, ORIGIN, origin, strlen(origin));
    if (st == PL_OK)
        st = pl_gguf_out_write(&o, path, NULL, NULL, err);
    pl_gguf_out_fini(&o);
    return st;
}

static bool take_kept(struct pl_scratch *x, const struct pl_train_spec *s, const struct pl_scratch_source *from)
{
    char origin[PL_SHA256_HEX], path[PATH_MAX];
    struct pl_gguf *kept;
    snprintf(path, sizeof path, KEPT, from->kept != NULL ? from->kept : "");
    if (from->kept == NULL || s->shape_tokenizer != PL_SHAPE_BPE || tokenizer_origin(s, from->training, origin, NULL) != PL_OK ||
        !pl_scratch_is(path, origin) || pl_gguf_open(&kept, path, NULL) != PL_OK)
        return false;
    pl_gguf_out_keys_of(&x->out, kept, "tokenizer.", "tokenizer.chat_template");
    pl_gguf_close(kept);
    return true;
}

static pl_status take_base(struct pl_scratch *x, struct pl_train_spec *s, const struct pl_gguf *base, uint32_t asked, struct pl_err *err)
{
    uint64_t n = 0;
    (void)pl_gguf_array_len(base, "tokenizer.ggml.tokens", &n);
    s->shape_vocab = (uint32_t)n;
    pl_gguf_out_keys_of(&x->out, base, "tokenizer.", "tokenizer.chat_template");
    if (asked == 0 || asked == n)
        return PL_OK;
    return pl_fail_param(err, PL_EINVAL, SHAPE ".vocab_size", "'vocab_size' is %u, but the base's tokenizer has %llu tokens: leave it out, or take "
                         "tokenizer \"bpe\"", asked, (unsigned long long)n);
}

/* Gives the shape its values, and puts the tokenizer's keys. */
static pl_status make_tokenizer(struct pl_scratch *x, struct pl_train_spec *s, const struct pl_scratch_source *from, const struct pl_gguf *base,
                                struct pl_data_report *r, struct pl_err *err)
{
    struct reader reader = {0};
    struct pl_train_facts f = {0};
    struct pl_train_spec early = *s;
    const uint32_t asked = s->shape_vocab;                   /* 0 = auto */
    pl_status st = pl_train_shape_resolve(&early, &f, err); /* what is wrong or too large without the file is said without it */
    if (st == PL_OK)
        st = check_room(&early, from->room, err);
    if (st == PL_OK && asked > 0 && take_kept(x, s, from))
        return pl_train_shape_resolve(s, &f, err);
    if (st == PL_OK && s->shape_tokenizer == PL_SHAPE_BPE)
        st = pl_tok_trainer_new(&reader.trainer, "gpt-2", err);
    if (st == PL_OK)
        st = read_texts(&reader, s, from, r, err);
    f.text_bytes = reader.n_bytes;
    if (st == PL_OK)
        st = pl_train_shape_resolve(s, &f, err);
    if (st == PL_OK)
        st = reader.trainer != NULL ? learn(x, s, &reader, asked > 0, from, err) : take_base(x, s, base, asked, err);
    pl_tok_trainer_free(reader.trainer);
    return st == PL_OK ? check_room(s, from->room, err) : st;
}

/* ---- all of it ------------------------------------------------------------------------------------------------------ */

static pl_status check_specials(const struct pl_scratch *x, const struct pl_train_spec *s, struct pl_err *err)
{
    for (uint32_t i = 1; i < PL_COUNT_OF(specials) && s->shape_chat == PL_SHAPE_CHAT_ML; i++)
        if (!pl_tok_is_control(x->tok, pl_tok_find(x->tok, specials[i], strlen(specials[i]))))
            return pl_fail_param(err, PL_EINVAL, SHAPE ".chat_template", "chat_template \"chatml\" needs the control token %s, which the base's tokenizer "
                                 "lacks: take \"base\" or \"none\", or tokenizer \"bpe\"", specials[i]);
    return PL_OK;
}

static pl_status open_keys(struct pl_scratch *x, const struct pl_train_spec *s, struct pl_err *err)
{
    unsigned arch;
    pl_gguf_out_head(&x->out, &x->head);
    if (x->head.failed)
        return pl_fail(err, PL_ENOMEM, "no memory for the vocabulary");
    pl_status st = pl_gguf_open_memory(&x->gguf, x->head.data, x->head.len, err);
    if (st == PL_OK)
        st = pl_tok_load(&x->tok, x->gguf, err);
    if (st == PL_OK)
        st = check_specials(x, s, err);
    if (st == PL_OK && x->template.len > 0)
        st = pl_chat_new(&x->chat, x->template.data, x->template.len, x->tok, err);
    if (st == PL_OK)
        st = pl_spec_read(&x->model, &arch, x->gguf, err);
    if (st != PL_OK)
        return st;
    x->model.n_vocab = s->shape_vocab;
    x->model.tied = s->shape_tied;
    each_tensor(&x->model, arch, add_tensor, &x->out);
    x->n_params = pl_scratch_params(s);
    return PL_OK;
}

pl_status pl_scratch_open(struct pl_scratch *x, struct pl_train_spec *s, const struct pl_scratch_source *from, struct pl_data_report *r,
                          struct pl_err *err)
{
    struct pl_gguf *base = NULL;
    *x = (struct pl_scratch){0};
    pl_gguf_out_init(&x->out);
    pl_buf_init(&x->head, 0);
    pl_buf_init(&x->template, 0);
    pl_status st = PL_OK;
    if (s->shape_tokenizer == PL_SHAPE_BASE)
        st = from->base != NULL ? pl_gguf_open(&base, from->base, err)
                                : pl_fail_param(err, PL_EINVAL, "base", "tokenizer \"base\" needs a model: name its GGUF file in 'base'");
    if (st == PL_OK)
        st = make_tokenizer(x, s, from, base, r, err);
    if (st == PL_OK) {
        put_shape(&x->out, s);
        put_template(x, base, s);
        st = open_keys(x, s, err);
    }
    pl_gguf_close(base);
    if (st != PL_OK)
        pl_scratch_fini(x);
    return st;
}

void pl_scratch_fini(struct pl_scratch *x)
{
    pl_chat_free(x->chat);
    pl_tok_free(x->tok);
    pl_gguf_close(x->gguf);
    pl_buf_fini(&x->head);
    pl_buf_fini(&x->template);
    pl_gguf_out_fini(&x->out);
    *x = (struct pl_scratch){0};
}

pl_status pl_scratch_origin(const struct pl_train_spec *s, const char *training, const char *base, char hex[PL_SHA256_HEX], struct pl_err *err)
{
    const char *const files[] = {training, s->shape_tokenizer == PL_SHAPE_BASE ? base : NULL};
    struct pl_sha256 h;
    json_t *spec = pl_train_spec_json(s);
    char *text = json_dumps(spec, JSON_SORT_KEYS | JSON_COMPACT);
    pl_status st = text != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "out of memory");
    pl_sha256_init(&h);
    pl_sha256_add(&h, text, text != NULL ? strlen(text) : 0);
    pl_sha256_add(&h, &s->seed, sizeof s->seed);
    for (size_t i = 0; i < PL_COUNT_OF(files) && st == PL_OK; i++) {
        char id[PL_SHA256_HEX] = "";
        if (files[i] != NULL)
            st = pl_train_base_id(files[i], id, err);
        pl_sha256_add(&h, id, strlen(id));
    }
    pl_sha256_hex(&h, hex);
    free(text);
    json_decref(spec);
    return st;
}

bool pl_scratch_is(const char *path, const char *origin)
{
    struct pl_gguf *g;
    struct pl_gguf_str s;
    if (pl_gguf_open(&g, path, NULL) != PL_OK)
        return false;
    const bool same = pl_gguf_string(g, ORIGIN, &s) == PL_OK && s.n == strlen(origin) && memcmp(s.s, origin, s.n) == 0;
    pl_gguf_close(g);
    return same;
}
