/* chat: talk to a model in a terminal, through the same engine that serves.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "cli/cli.h"
#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/sched/engine.h"
#include "core/text/chat.h"

enum { MAX_TURNS = 1024, ARENA = 64 << 20 };

struct talk {
    struct cli_model m;
    struct pl_chat *chat;
    struct pl_engine *engine;
    struct pl_chat_message messages[MAX_TURNS]; /* content is owned */
    size_t n, n_kept; /* n_kept: the system message stays */
    float temperature;
    uint32_t max_tokens;
    uint64_t seed;
};

static void add(struct talk *t, const char *role, const char *text)
{
    char *copy = pl_xstrdup(text);
    t->messages[t->n++] = (struct pl_chat_message){.role = role, .content = copy, .n_content = strlen(copy)};
}

static void forget(struct talk *t, size_t keep)
{
    while (t->n > keep)
        free((void *)(uintptr_t)t->messages[--t->n].content);
}

static pl_status submit(struct talk *t, struct pl_reply *reply, struct pl_err *err)
{
    struct pl_arena *a = pl_arena_new(ARENA);
    struct pl_request *req = a != NULL ? pl_arena_zalloc(a, sizeof *req) : NULL;
    struct pl_prompt *prompt = a != NULL ? pl_arena_zalloc(a, sizeof *prompt) : NULL;
    struct pl_piece *pieces;
    struct pl_ids ids = {0};
    size_t n;
    pl_status st = req != NULL && prompt != NULL ? pl_chat_render(t->chat, t->messages, t->n, true, a, &pieces, &n, err)
                                                 : pl_fail(err, PL_ENOMEM, "out of memory");
    if (st == PL_OK)
        st = pl_tok_encode_pieces(t->m.tok, pieces, n, PL_TOK_SPECIAL | PL_TOK_BOS, 0, &ids, err);
    int32_t *copy = st == PL_OK ? pl_arena_alloc(a, ids.n * sizeof *copy + 1) : NULL;
    if (st == PL_OK && copy != NULL) {
        memcpy(copy, ids.v, ids.n * sizeof *copy);
        *prompt = (struct pl_prompt){copy, (uint32_t)ids.n};
        *req = (struct pl_request){.arena = a, .prompts = prompt, .n_prompts = 1, .n = 1, .max_tokens = t->max_tokens};
        req->sampling = (struct pl_sampling){.temperature = t->temperature, .top_p = 1, .repetition_penalty = 1, .seed = t->seed++, .n_top_logprobs = -1};
        st = pl_engine_submit(t->engine, req, reply, err);
    }
    pl_ids_fini(&ids);
    if (st != PL_OK)
        pl_arena_free(a);
    return st;
}

/* Prints the answer as it comes; false when there was none. */
static bool answer(struct talk *t)
{
    struct pl_err err = {0};
    struct pl_buf text;
    struct pl_event ev = {0};
    bool done = false, ok = true;
    struct pl_reply *reply = pl_reply_new(pl_reply_needs(1) + 64, NULL, NULL);
    pl_buf_init(&text, 0);
    if (reply == NULL || submit(t, reply, &err) != PL_OK) {
        fprintf(stderr, "parley: %s\n", err.msg);
        done = true;
        ok = false;
    }
    while (!done && pl_reply_wait(reply, -1))
        while (!done && pl_reply_next(reply, &ev)) {
            fwrite(ev.text, 1, ev.n_text, stdout);
            fflush(stdout);
            pl_buf_add(&text, ev.text, ev.n_text);
            done = ev.kind == PL_EV_DONE || ev.kind == PL_EV_ERROR;
            if (ev.kind == PL_EV_ERROR) {
                fprintf(stderr, "parley: %s\n", ev.error.msg);
                ok = false;
            }
        }
    if (ok) {
        putchar('\n');
        add(t, "assistant", pl_buf_str(&text));
    }
    pl_buf_fini(&text);
    pl_reply_unref(reply);
    return ok;
}

static bool start(struct talk *t, const char *path, const char *threads)
{
    struct pl_err err = {0};
    struct pl_gguf_str template;
    if (!cli_open(&t->m, path, &(struct cli_how){.threads = threads}, 512, 512))
        return false;
    const struct pl_engine_opts o = {.max_sequences = 1,
                                     .batch_tokens = 512, .max_context = pl_model_spec(t->m.model)->n_ctx, .kv_dtype = PL_F16, .queue_limit = 4};
    pl_status st = pl_gguf_string(t->m.gguf, "tokenizer.chat_template", &template);
    st = st == PL_OK ? pl_chat_new(&t->chat, template.s, template.n, t->m.tok, &err) : pl_fail(&err, PL_ENOTSUP, "the model has no chat template");
    if (st == PL_OK)
        st = pl_engine_new(&t->engine, &o, t->m.dev, t->m.model, t->m.tok, &err);
    if (st == PL_OK)
        st = pl_engine_start(t->engine, &err);
    if (st != PL_OK)
        fprintf(stderr, "parley: %s\n", err.msg);
    return st == PL_OK;
}

static void loop(struct talk *t)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while (fputs("> ", stdout), fflush(stdout), (n = getline(&line, &cap, stdin)) >= 0) {
        while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r'))
            line[--n] = '\0';
        if (strcmp(line, "/quit") == 0)
            break;
        if (strcmp(line, "/reset") == 0) {
            forget(t, t->n_kept);
        } else if (n > 0) {
            if (t->n + 2 > MAX_TURNS)
                forget(t, t->n_kept);
            add(t, "user", line);
            if (!answer(t))
                forget(t, t->n - 1);
        }
    }
    free(line);
}

int cli_chat(int argc, char **argv)
{
    const char *model = NULL, *system = NULL, *temperature = "0.7", *max_tokens = NULL, *seed = NULL, *threads = NULL;
    const struct cli_flag flags[] = {{"model", &model, NULL},           {"system", &system, NULL}, {"temperature", &temperature, NULL},
                                     {"max-tokens", &max_tokens, NULL}, {"seed", &seed, NULL},     {"threads", &threads, NULL}};
    if (!cli_flags(argc, argv, flags, PL_COUNT_OF(flags)))
        return 2;
    struct talk *t = pl_xcalloc(1, sizeof *t);
    t->temperature = strtof(temperature, NULL);
    t->max_tokens = max_tokens != NULL ? (uint32_t)strtoul(max_tokens, NULL, 10) : UINT32_MAX;
    if (seed != NULL)
        t->seed = strtoull(seed, NULL, 10);
    else if (getrandom(&t->seed, sizeof t->seed, 0) < 0)
        t->seed = 1;
    bool ok = start(t, model, threads);
    if (ok && system != NULL)
        add(t, "system", system);
    t->n_kept = t->n;
    if (ok)
        loop(t);
    forget(t, 0);
    pl_engine_free(t->engine);
    pl_chat_free(t->chat);
    cli_close(&t->m);
    free(t);
    return ok ? 0 : 1;
}
