/* logits: the model's next-token scores for given tokens, for comparison with a reference implementation.
 *   logits --model FILE [--adapter PATH] [--isa NAME] [--threads N] [--chunk N] [--kv-type TYPE] [--logprobs] [--ranks N | --mpi]
 * Standard input: a JSON object a line, {"tokens": [1, 2, …], "from": 0}. Standard output, for each line: uint32 rows,
 * uint32 vocabulary, then float32 [rows, vocabulary] in the machine's byte order; row i scores what follows token from + i.
 * --ranks: the model cut over N threads; --mpi: over the processes that mpirun has started. Rank 0 reads and writes.
 * SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/comm/link.h"
#include "core/model/adapter.h"
#include "tests/tools/run_model.h"

struct job {
    const char *model, *adapter, *isa;
    unsigned n_threads;
    uint32_t chunk;
    pl_dtype kv_type;
    bool logprobs, mpi;
    unsigned n_ranks;
};

enum { WAIT_MS = 120000 };

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

static int run_line(struct runner *r, const struct job *job, bool writes, const char *line)
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
    if (!bad && writes)
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

/* The next line of rank 0's input, on all ranks; false at its end. */
static bool next_line(struct pl_comm *c, char **line, size_t *cap)
{
    int64_t n = c->rank == 0 ? getline(line, cap, stdin) : 0;
    if (c->ops->broadcast(c, &n, sizeof n) != PL_OK || n <= 0)
        return false;
    if (*cap < (size_t)n + 1)
        *line = pl_xrealloc(*line, *cap = (size_t)n + 1);
    return c->ops->broadcast(c, *line, (size_t)n + 1) == PL_OK;
}

static int run(const struct job *job, struct pl_comm *comm)
{
    struct pl_err err = {0};
    struct pl_gguf *g = NULL;
    struct runner r = {0};
    char *line = NULL;
    size_t cap = 0;
    int bad = 0;
    if (pl_gguf_open(&g, job->model, &err) != PL_OK || runner_open_part(&r, g, comm, job->isa, job->n_threads, job->chunk, &err) != PL_OK) {
        fprintf(stderr, "logits: %s: %s\n", job->model, err.msg);
        bad = 1;
    }
    if (!bad && job->adapter != NULL && use_adapter(&r, job->adapter, &err) != PL_OK) {
        fprintf(stderr, "logits: %s\n", err.msg);
        bad = 1;
    }
    while (!bad && next_line(comm, &line, &cap))
        bad = run_line(&r, job, comm->rank == 0, line);
    if (bad)
        comm->ops->give_up(comm);
    free(line);
    runner_close(&r);
    pl_gguf_close(g);
    return bad;
}

struct place {
    const struct job *job;
    struct pl_comm *comm;
    pthread_t thread;
    int status;
};

static void *run_place(void *arg)
{
    struct place *p = arg;
    p->status = run(p->job, p->comm);
    return NULL;
}

static int run_threads(const struct job *job)
{
    struct pl_comm *comms[PL_LINK_RANKS];
    struct place places[PL_LINK_RANKS];
    struct pl_err err = {0};
    int bad = 0;
    if (pl_comm_threads_new(comms, job->n_ranks, WAIT_MS, &err) != PL_OK) {
        fprintf(stderr, "logits: %s\n", err.msg);
        return 1;
    }
    for (unsigned r = 0; r < job->n_ranks; r++)
        places[r] = (struct place){.job = job, .comm = comms[r]};
    for (unsigned r = 1; r < job->n_ranks; r++)
        if (pthread_create(&places[r].thread, NULL, run_place, &places[r]) != 0)
            abort();
    run_place(&places[0]);
    for (unsigned r = 1; r < job->n_ranks; r++)
        pthread_join(places[r].thread, NULL);
    for (unsigned r = 0; r < job->n_ranks; r++) {
        bad |= places[r].status;
        comms[r]->ops->close(comms[r]);
    }
    return bad;
}

static int run_process(const struct job *job)
{
    struct pl_comm *comm = NULL;
    struct pl_err err = {0};
    if (pl_comm_mpi_open(&comm, NULL, WAIT_MS, &err) != PL_OK) {
        fprintf(stderr, "logits: %s\n", err.msg);
        return 1;
    }
    const int status = run(job, comm);
    comm->ops->close(comm);
    return status;
}

int main(int argc, char **argv)
{
    bool bad = false;
    struct job job = {.chunk = 128, .kv_type = PL_F16, .n_ranks = 1};
    static const struct option options[] = {
        {"model", 1, NULL, 'm'},   {"isa", 1, NULL, 'i'},      {"threads", 1, NULL, 't'}, {"chunk", 1, NULL, 'c'},
        {"adapter", 1, NULL, 'a'}, {"kv-type", 1, NULL, 'k'}, {"logprobs", 0, NULL, 'l'},
        {"ranks", 1, NULL, 'r'},   {"mpi", 0, NULL, 'p'},      {NULL, 0, NULL, 0},
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
        case 'r': job.n_ranks = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'p': job.mpi = true; break;
        default: return 2;
        }
    }
    if (bad || job.model == NULL || job.chunk == 0 || optind != argc) {
        fputs("usage: logits --model FILE [--adapter PATH] [--isa NAME] [--threads N] [--chunk N] [--kv-type TYPE] [--logprobs]\n"
              "              [--ranks N | --mpi]\n",
              stderr);
        return 2;
    }
    return job.mpi ? run_process(&job) : job.n_ranks > 1 ? run_threads(&job) : run(&job, &pl_comm_single);
}
