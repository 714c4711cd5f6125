/* make_model: writes a tiny random model, whole with tokenizer and chat template, for tests.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

int main(int argc, char **argv)
{
    struct tiny_options o = tiny_defaults();
    struct pl_err err = {0};
    const char *out = NULL;
    const char **flags = pl_xcalloc((size_t)argc, sizeof *flags);
    size_t n = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            free(flags);
            return 0;
        }
        if (strcmp(argv[i], "--out") == 0 && i + 1 < argc)
            out = argv[++i];
        else
            flags[n++] = argv[i];
    }
    struct gguf_out *g = NULL;
    int rc = 2;
    if (out == NULL) {
        fputs(usage, stderr);
    } else if (tiny_options_flags(&o, flags, n, &err) != PL_OK || (g = tiny_model(&o, &err)) == NULL) {
        fprintf(stderr, "make_model: %s\n%s", err.msg, usage);
    } else if (gguf_out_save(g, out) != 0) {
        fprintf(stderr, "make_model: %s: %s\n", out, strerror(errno));
        rc = 1;
    } else {
        rc = 0;
    }
    gguf_out_free(g);
    free(flags);
    return rc;
}
