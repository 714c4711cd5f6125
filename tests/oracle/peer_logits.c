/* peer_logits: what tests/tools/logits does, by llama.cpp, so that both can be measured against one reference.
 *   cc peer_logits.c -I$LLAMA/include -I$LLAMA/ggml/include -L$LLAMA/build/bin -Wl,-rpath,$LLAMA/build/bin \
 *      -lllama -lggml -lggml-base -ljansson -o peer_logits
 *   peer_logits FILE THREADS    (JSON lines in, float32 rows out, as for logits; every row from `from` on)
 * SPDX-License-Identifier: Apache-2.0 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "llama.h"

static void quiet(enum ggml_log_level level, const char *text, void *arg)
{
    (void)arg;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

static int run_line(struct llama_context *ctx, const char *line, uint32_t n_vocab)
{
    json_t *root = json_loads(line, 0, NULL);
    json_t *list = json_object_get(root, "tokens");
    const size_t n = json_array_size(list), from = (size_t)json_integer_value(json_object_get(root, "from"));
    if (n == 0 || from >= n)
        return 1;
    struct llama_batch b = llama_batch_init((int32_t)n, 0, 1);
    for (size_t i = 0; i < n; i++) {
        b.token[i] = (llama_token)json_integer_value(json_array_get(list, i));
        b.pos[i] = (llama_pos)i;
        b.n_seq_id[i] = 1;
        b.seq_id[i][0] = 0;
        b.logits[i] = i >= from;
    }
    b.n_tokens = (int32_t)n;
    llama_memory_clear(llama_get_memory(ctx), true);
    int bad = llama_decode(ctx, b) != 0;
    const uint32_t head[2] = {(uint32_t)(n - from), n_vocab};
    if (!bad)
        bad = fwrite(head, sizeof head, 1, stdout) != 1;
    for (size_t i = from; i < n && !bad; i++)
        bad = fwrite(llama_get_logits_ith(ctx, (int32_t)i), sizeof(float), n_vocab, stdout) != n_vocab;
    fflush(stdout);
    llama_batch_free(b);
    json_decref(root);
    return bad;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: peer_logits FILE THREADS\n", stderr);
        return 2;
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_batch = 1024;
    params.n_threads = params.n_threads_batch = (int32_t)strtol(argv[2], NULL, 10);
    struct llama_context *ctx = model != NULL ? llama_init_from_model(model, params) : NULL;
    char *line = NULL;
    size_t cap = 0;
    int bad = ctx == NULL;
    while (!bad && getline(&line, &cap, stdin) > 0)
        bad = run_line(ctx, line, (uint32_t)llama_vocab_n_tokens(llama_model_get_vocab(model)));
    free(line);
    if (ctx != NULL)
        llama_free(ctx);
    llama_model_free(model);
    return bad;
}
