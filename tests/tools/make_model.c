/* make_model: writes a tiny random model, whole with tokenizer and chat template, for tests.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/mem.h"
#include "tests/tools/tiny_model.h"

static const char usage[] =
    "usage: make_model --out FILE [options]\n"
    "  --arch llama|gpt2       architecture (llama)\n"
    "  --type TYPE             of the matrices: f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k (f32)\n"
    "  --seed N                same options, same bytes (1)\n"
    "  --tokenizer bpe|spm     byte-level BPE or SentencePiece with byte tokens (bpe)\n"
    "  --pre NAME              tokenizer.ggml.pre of bpe (smollm)\n"
    "  --layers N --embd N --heads N --kv-heads N --head-dim N --ff N --ctx N\n"
    "                          sizes (2 64 4 2 embd/heads 160 512; 256 wide with feed-forward 512 for K-quants)\n"
    "  --untied                an output head of its own\n"
    "  --biases                biases on all projections of llama\n"
    "  --rope-base X --rope-linear X --rope-factors\n"
    "                          rope variants of llama\n";

static bool parse_type(const char *s, pl_dtype *out)
{
    static const struct {
        const char *name;
        pl_dtype dtype;
    } types[] = {
#define X(name, number, elements, bytes) {#name, PL_##name},
        PL_DTYPE_LIST(X)
#undef X
    };
    for (size_t i = 0; i < PL_COUNT_OF(types); i++) {
        if (strcasecmp(types[i].name, s) == 0) {
            *out = types[i].dtype;
            return true;
        }
    }
    return false;
}

static bool parse_number(const char *s, double min, double max, double *out)
{
    char *end;
    *out = strtod(s, &end);
    return end != s && *end == '\0' && *out >= min && *out <= max;
}

int main(int argc, char **argv)
{
    enum { OUT = 256, ARCH, TYPE, SEED, TOKENIZER, PRE, UNTIED, BIASES, FACTORS, BASE, LINEAR, HELP, SIZE };
    struct tiny_options o = tiny_defaults();
    const char *out = NULL;
    bool embd_given = false, ff_given = false;
    uint32_t *const sizes[] = {&o.n_layers, &o.n_embd, &o.n_heads, &o.n_kv_heads, &o.head_dim, &o.n_ff, &o.n_ctx};
    static const struct option options[] = {
        {"out", 1, NULL, OUT},           {"arch", 1, NULL, ARCH},          {"type", 1, NULL, TYPE},
        {"seed", 1, NULL, SEED},         {"tokenizer", 1, NULL, TOKENIZER}, {"pre", 1, NULL, PRE},
        {"untied", 0, NULL, UNTIED},     {"biases", 0, NULL, BIASES},      {"rope-factors", 0, NULL, FACTORS},
        {"rope-base", 1, NULL, BASE},    {"rope-linear", 1, NULL, LINEAR}, {"help", 0, NULL, HELP},
        {"layers", 1, NULL, SIZE},       {"embd", 1, NULL, SIZE + 1},      {"heads", 1, NULL, SIZE + 2},
        {"kv-heads", 1, NULL, SIZE + 3}, {"head-dim", 1, NULL, SIZE + 4},  {"ff", 1, NULL, SIZE + 5},
        {"ctx", 1, NULL, SIZE + 6},      {NULL, 0, NULL, 0},
    };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        double v = 0;
        bool ok = true;
        switch (c) {
        case OUT: out = optarg; break;
        case ARCH: o.arch = optarg; break;
        case TYPE: ok = parse_type(optarg, &o.dtype); break;
        case SEED: ok = parse_number(optarg, 0, 1e15, &v); o.seed = (uint64_t)v; break;
        case TOKENIZER: o.tokenizer = optarg; break;
        case PRE: o.pre = optarg; break;
        case UNTIED: o.untied = true; break;
        case BIASES: o.biases = true; break;
        case FACTORS: o.rope_factors = true; break;
        case BASE: ok = parse_number(optarg, 1, 1e15, &v); o.rope_base = (float)v; break;
        case LINEAR: ok = parse_number(optarg, 1e-3, 1e6, &v); o.rope_linear = (float)v; break;
        case HELP: fputs(usage, stdout); return 0;
        default:
            if (c < SIZE) {
                fputs(usage, stderr);
                return 2;
            }
            ok = parse_number(optarg, 1, 65536, &v);
            *sizes[c - SIZE] = (uint32_t)v;
            embd_given |= c == SIZE + 1;
            ff_given |= c == SIZE + 5;
        }
        if (!ok) {
            fprintf(stderr, "make_model: bad value %s\n%s", optarg, usage);
            return 2;
        }
    }
    if (out == NULL || optind != argc) {
        fputs(usage, stderr);
        return 2;
    }
    if (pl_dtype_block(o.dtype) == 256) {
        o.n_embd = embd_given ? o.n_embd : 256;
        o.n_ff = ff_given ? o.n_ff : 512;
    }
    struct pl_err err;
    struct gguf_out *g = tiny_model(&o, &err);
    if (g == NULL) {
        fprintf(stderr, "make_model: %s\n", err.msg);
        return 2;
    }
    const int rc = gguf_out_save(g, out);
    if (rc != 0)
        fprintf(stderr, "make_model: %s: %s\n", out, strerror(errno));
    gguf_out_free(g);
    return rc != 0;
}
