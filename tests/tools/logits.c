/* logits: the model's next-token scores for given tokens, for comparison with a reference implementation.
 *   logits --model FILE [--adapter PATH] [--isa NAME] [--threads N] [--chunk N] [--kv-type TYPE] [--logprobs]
 * Standard input: a JSON object a line, {"tokens": [1, 2, …], "from": 0}. Standard output, for each line: uint32 rows,
 * uint32 vocabulary, then float32 [rows, vocabulary] in the machine's byte order; row i scores what follows token from + i.
 * SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/model/adapter.h"
#include "tests/tools/run_model.h"

struct job {
    const char *model, *adapter, *isa;
    unsigned n_threads;
    uint32_t chunk;
    pl_dtype kv_type;
    bool logprobs;
};

static void to_logprobs(float *row, size_t n)
{
    float max = row[0];
    double sum = 0;
    for (size_t i = 1; i < n; i++)
        max = row[i] > max ? row[i] : max;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)row[i] - (double)max);
    for (size_t i = 0; i < n; i++)
        row[i] = (float)((double)row[i] - (double)max - log(sum));
}

/* The tokens of a line; NULL, with a message, when it is not what this program reads. */
static int32_t *parse(const char *line, const struct pl_spec *spec, uint32_t *n, uint32_t *from)
{
    json_error_t e;
    json_t *root = json_loads(line, 0, &e);
    json_t *list = json_object_get(root, "tokens");
    const json_int_t start = json_integer_value(json_object_get(root, "from"));
    int32_t *tokens = NULL;
    const size_t count = json_array_size(list);
    if (count < 1 || count > spec->n_ctx || start < 0 || (size_t)start >= count) {
        fprintf(stderr, "logits: a line needs 1 to %u tokens and a `from` among them\n", spec->n_ctx);
        goto out;
    }
    tokens = pl_xcalloc(count, sizeof *tokens);
    for (size_t i = 0; i < count; i++) {
        const json_int_t id = json_integer_value(json_array_get(list, i));
        if (!json_is_integer(json_array_get(list, i)) || id < 0 || id >= spec->n_vocab) {
            fprintf(stderr, "logits: token %zu is no id below %u\n", i, spec->n_vocab);
            free(tokens);
            tokens = NULL;
            goto out;
        }
        tokens[i] = (int32_t)id;
    }
    *n = (uint32_t)count;
    *from = (uint32_t)start;
out:
    json_decref(root);
    return tokens;
}

static int run_line(struct runner *r, const struct job *job, const char *line)
{
    const struct pl_spec *spec = pl_model_spec(r->model);
    struct run_seq s = {.chunk = job->chunk, .adapter = job->adapter != NULL};
    int32_t *tokens = parse(line, spec, &s.n, &s.from);
    if (tokens == NULL)
        return 1;
    const uint32_t head[2] = {s.n - s.from, spec->n_vocab};
    const size_t V = spec->n_vocab, n = V * head[0];
    s.tokens = tokens;
    s.logits = pl_xcalloc(n, sizeof *s.logits);
    const pl_status rc = run_seqs(r, &s, 1, job->kv_type);
    int bad = rc != PL_OK;
    if (bad)
        fprintf(stderr, "logits: %s\n", pl_status_text(rc));
    for (size_t i = 0; i < head[0] && job->logprobs; i++)
        to_logprobs(s.logits + i * V, V);
    if (!bad)
        bad = fwrite(head, sizeof head, 1, stdout) != 1 || fwrite(s.logits, sizeof(float), n, stdout) != n || fflush(stdout) != 0;
    free(s.logits);
    free(tokens);
    return bad;
}

static pl_status use_adapter(struct runner *r, const char *path, struct pl_err *err)
{
    struct pl_adapter *a = NULL;
    struct pl_lora_set *set;
    pl_status rc = pl_adapter_read(&a, path, pl_model_spec(r->model), err);
    if (rc == PL_OK)
        rc = pl_model_adapter_make(&set, r->model, a, err);
    if (rc == PL_OK)
        rc = pl_model_adapter_add(r->model, 1, set, err);
    pl_adapter_free(a);
    return rc;
}

static int run(const struct job *job)
{
    struct pl_err err = {0};
    struct pl_gguf *g = NULL;
    struct runner r = {0};
    char *line = NULL;
    size_t cap = 0;
    int bad = 0;
    if (pl_gguf_open(&g, job->model, &err) != PL_OK || runner_open(&r, g, job->isa, job->n_threads, job->chunk, &err) != PL_OK) {
        fprintf(stderr, "logits: %s: %s\n", job->model, err.msg);
        bad = 1;
    }
    if (!bad && job->adapter != NULL && use_adapter(&r, job->adapter, &err) != PL_OK) {
        fprintf(stderr, "logits: %s\n", err.msg);
        bad = 1;
    }
    while (!bad && getline(&line, &cap, stdin) > 0)
        bad = run_line(&r, job, line);
    free(line);
    runner_close(&r);
    pl_gguf_close(g);
    return bad;
}

int main(int argc, char **argv)
{
    bool bad = false;
    struct job job = {.chunk = 128, .kv_type = PL_F16};
    static const struct option options[] = {
        {"model", 1, NULL, 'm'},   {"isa", 1, NULL, 'i'},      {"threads", 1, NULL, 't'}, {"chunk", 1, NULL, 'c'},
        {"adapter", 1, NULL, 'a'}, {"kv-type", 1, NULL, 'k'}, {"logprobs", 0, NULL, 'l'}, {NULL, 0, NULL, 0},
    };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm': job.model = optarg; break;
        case 'a': job.adapter = optarg; break;
        case 'i': job.isa = optarg; break;
        case 't': job.n_threads = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'c': job.chunk = (uint32_t)strtoul(optarg, NULL, 10); break;
        case 'k': bad |= !pl_kv_type(optarg, &job.kv_type); break;
        case 'l': job.logprobs = true; break;
        default: return 2;
        }
    }
    if (bad || job.model == NULL || job.chunk == 0 || optind != argc) {
        fputs("usage: logits --model FILE [--adapter PATH] [--isa NAME] [--threads N] [--chunk N] [--kv-type TYPE] [--logprobs]\n", stderr);
        return 2;
    }
    return run(&job);
}
