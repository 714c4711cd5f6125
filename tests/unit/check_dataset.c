/* check_dataset: which tokens of a training file count in the loss, against fixtures written by hand for SmolLM2's template and others;
 * bad lines, each named with its reason; what is cut.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/dataset.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/mem.h"
#include "core/model/gguf.h"
#include "core/train/plan.h"
#include "tests/tools/tiny_vocab.h"

Suite *suite_dataset(void);

/* SmolLM2-135M-Instruct's own template (Apache-2.0). */
static const char smollm2[] =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
#define DEFAULT_SYSTEM "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

/* Writes earlier turns of the assistant shorter than the last one, as templates of thinking models do. */
static const char forgetful[] =
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('#')[1] }}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/* Closes a turn with no token that ends a generation. */
static const char plain[] =
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

struct world {
    struct pl_gguf *gguf;
    struct pl_tok *tok;
    void *bytes;
} bpe, spm;

static void open_world(struct world *w, bool is_bpe)
{
    size_t n;
    struct pl_err err = {0};
    struct gguf_out *o = gguf_out_new();
    if (is_bpe)
        tiny_vocab_bpe(o, "smollm");
    else
        tiny_vocab_spm(o);
    w->bytes = gguf_out_bytes(o, &n);
    gguf_out_free(o);
    ck_assert_msg(pl_gguf_open_memory(&w->gguf, w->bytes, n, &err) == PL_OK, "%s", err.msg);
    ck_assert_msg(pl_tok_load(&w->tok, w->gguf, &err) == PL_OK, "%s", err.msg);
}

static void close_world(struct world *w)
{
    pl_tok_free(w->tok);
    pl_gguf_close(w->gguf);
    free(w->bytes);
}

static void setup(void)
{
    open_world(&bpe, true);
    open_world(&spm, false);
}

static void teardown(void)
{
    close_world(&bpe);
    close_world(&spm);
}

/* ---- what comes out, as text with the loss in [ ] ------------------------------------------------------------------ */

struct shown {
    struct pl_buf text;
    const struct pl_tok *tok;
    uint32_t n;
};

static bool show(void *arg, const struct pl_example *e)
{
    struct shown *s = arg;
    bool in = false;
    if (s->n++ > 0)
        pl_buf_adds(&s->text, "~~");
    ck_assert_int_eq(e->loss[0], 0);
    for (uint32_t i = 0; i < e->n; i++) {
        size_t n;
        const char *bytes = pl_tok_bytes(s->tok, e->ids[i], true, &n);
        if ((e->loss[i] != 0) != in)
            pl_buf_addc(&s->text, in ? ']' : '[');
        in = e->loss[i] != 0;
        pl_buf_add(&s->text, bytes, n);
    }
    if (in)
        pl_buf_addc(&s->text, ']');
    return true;
}

static char *write_file(const char *text)
{
    char *path = pl_xstrdup("/tmp/parley-data-XXXXXX");
    const int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    return path;
}

static pl_status scan(const char *lines, struct pl_data_opts o, const char *template, struct shown *s, struct pl_data_report *r, struct pl_err *err)
{
    struct pl_chat *chat = NULL;
    char *path = write_file(lines);
    *err = (struct pl_err){0};
    if (template != NULL)
        ck_assert_int_eq(pl_chat_new(&chat, template, strlen(template), o.tok, err), PL_OK);
    o.chat = chat;
    *s = (struct shown){.tok = o.tok};
    pl_buf_init(&s->text, 0);
    const pl_status st = pl_data_scan(path, &o, show, s, r, err);
    pl_chat_free(chat);
    unlink(path);
    free(path);
    return st;
}

static void expect(const char *lines, struct pl_data_opts o, const char *template, const char *expected)
{
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    o.min_examples = 1;
    ck_assert_msg(scan(lines, o, template, &s, &r, &err) == PL_OK, "%s: %s", lines, err.msg);
    ck_assert_str_eq(pl_buf_str(&s.text), expected);
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
}

static void expect_fault(const char *lines, struct pl_data_opts o, const char *template, uint32_t line, int message, const char *reason)
{
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    o.min_examples = 1;
    ck_assert_msg(scan(lines, o, template, &s, &r, &err) == PL_EFORMAT, "%s: %s", lines, err.msg);
    ck_assert_msg(r.n_faults > 0, "%s: %s", lines, err.msg);
    ck_assert_msg(r.faults[0].line == line && r.faults[0].message == message && strstr(r.faults[0].reason, reason) != NULL,
                  "%s: line %u, message %d: %s", lines, r.faults[0].line, r.faults[0].message, r.faults[0].reason);
    ck_assert_ptr_nonnull(strstr(err.msg, "Invalid file format. Example "));
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
}

#define U(text) "{\"role\":\"user\",\"content\":\"" text "\"}"
#define A(text) "{\"role\":\"assistant\",\"content\":\"" text "\"}"
#define S(text) "{\"role\":\"system\",\"content\":\"" text "\"}"
#define SKIP(text) "{\"role\":\"assistant\",\"content\":\"" text "\",\"weight\":0}"
#define CHAT(m) "{\"messages\":[" m "]}\n"

START_TEST(masks_of_chats)
{
    const struct pl_data_opts o = {.tok = bpe.tok};
    expect(CHAT(U("Hello") "," A("the world")), o, smollm2,
           DEFAULT_SYSTEM "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[the world<|im_end|>]\n");
    expect(CHAT(S("be it") "," U("a") "," A("b") "," U("c") "," A("d")), o, smollm2,
           "<|im_start|>system\nbe it<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
           "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n");
    expect(CHAT(S("s") "," U("a") "," SKIP("b") "," U("c") "," A("d")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
           "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n");
    /* what looks like a special token in a text is text */
    expect(CHAT(S("s") "," U("<|im_end|>") "," A("x<|im_end|>y")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n[x<|im_end|>y<|im_end|>]\n");
    /* two turns of the assistant in a row, text parts, an empty answer */
    expect(CHAT(S("s") "," U("a") "," A("b") "," A("c")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
           "<|im_start|>assistant\n[c<|im_end|>]\n");
    expect("{\"messages\":[" S("s") "," U("a") ",{\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"he\"},{\"type\":\"text\","
           "\"text\":\"llo\"}]}],\"tools\":[],\"parallel_tool_calls\":true}\n", o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n");
    expect(CHAT(S("s") "," U("a") "," A("")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[<|im_end|>]\n");
    expect(CHAT(S("s") "," U("h\\u00e9") "," A("\\u4f60\\u597d")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n[你好<|im_end|>]\n");
}
END_TEST

START_TEST(masks_by_train_on)
{
    struct pl_data_opts o = {.tok = bpe.tok, .train_on = PL_TRAIN_ON_LAST};
    static const char chat[] = CHAT(S("s") "," U("a") "," A("b") "," U("c") "," A("d"));
    expect(chat, o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
           "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n");
    expect(CHAT(S("s") "," U("a") "," A("b") "," U("c") "," SKIP("d")), o, smollm2,
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
           "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n");
    o.train_on = PL_TRAIN_ON_ALL;
    expect(CHAT(S("s") "," U("a") "," A("b")), o, smollm2,
           "<|im_start|>[system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n]");
}
END_TEST

/* Tokens before the last answer, which one token ends and one follows. */
static uint32_t prompt_of(const char *chat, struct pl_data_opts o)
{
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    o.prompt_limit = 0;
    o.min_examples = 1;
    ck_assert_int_eq(scan(chat, o, smollm2, &s, &r, &err), PL_OK);
    const uint32_t n = (uint32_t)(r.n_tokens - r.n_loss_tokens) - 1;
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    return n;
}

#define TURN(role, text) "<|im_start|>" role "\n" text "<|im_end|>\n"

/* Of a prompt that is too long the oldest turns are left out, then the begin of the last one; the answer stays whole. */
START_TEST(prompts_that_are_too_long)
{
    struct pl_data_opts o = {.tok = bpe.tok, .train_on = PL_TRAIN_ON_LAST, .max_length = 4 /* does not count */};
    static const char chat[] = CHAT(S("s") "," U("a") "," A("b") "," A("b") "," U("c") "," A("d") "," U("e") "," A("the end"));
    static const char last[] = TURN("user", "e") "<|im_start|>assistant\n[the end<|im_end|>]\n";
    char expected[400];
    struct pl_data_opts whole = o;
    whole.max_length = 0;
    o.prompt_limit = prompt_of(chat, whole);
    snprintf(expected, sizeof expected,
             TURN("system", "s") TURN("user", "a") TURN("assistant", "b") TURN("assistant", "b") TURN("user", "c") TURN("assistant", "d") "%s", last);
    expect(chat, o, smollm2, expected);
    o.prompt_limit--;
    snprintf(expected, sizeof expected, TURN("system", "s") TURN("user", "c") TURN("assistant", "d") "%s", last);
    expect(chat, o, smollm2, expected);
    o.prompt_limit = prompt_of(CHAT(S("s") "," U("c") "," A("d") "," U("e") "," A("x")), whole) - 1;
    snprintf(expected, sizeof expected, TURN("system", "s") "%s", last);
    expect(chat, o, smollm2, expected);
    o.prompt_limit = prompt_of(CHAT(S("s") "," U("e") "," A("x")), whole) - 1;
    expect(chat, o, smollm2, expected + strlen("<|im_start|>"));
    o.prompt_limit = 1;
    expect(chat, o, smollm2, strchr(last, '[') - 1);
    /* the last answer that counts, with what follows it */
    o.prompt_limit = prompt_of(CHAT(S("s") "," U("c") "," A("x")), whole);
    expect(CHAT(S("s") "," U("a") "," A("b") "," U("c") "," A("d") "," U("e") "," SKIP("f")), o, smollm2,
           TURN("system", "s") TURN("user", "c") "<|im_start|>assistant\n[d<|im_end|>]\n" TURN("user", "e") TURN("assistant", "f"));
    /* what was left out is told */
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    o.min_examples = 1;
    ck_assert_int_eq(scan(chat, o, smollm2, &s, &r, &err), PL_OK);
    ck_assert_uint_eq(r.n_cut, 1);
    ck_assert_uint_eq(r.n_examples, 1);
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    o.prompt_limit = 2;
    expect("{\"prompt\":\"wxyz\",\"completion\":\"v\"}\n", o, NULL, "yz[v<|im_end|>]");
}
END_TEST

START_TEST(masks_of_odd_templates)
{
    const struct pl_data_opts o = {.tok = bpe.tok};
    /* the first answer is written otherwise once there is a second: two examples */
    expect(CHAT(U("a") "," A("t#b") "," U("c") "," A("u#d")), o, forgetful,
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[t#b<|im_end|>]\n~~"
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[u#d<|im_end|>]\n");
    /* no closing token: the EOS takes its place */
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    struct pl_data_opts one = o;
    one.min_examples = 1;
    ck_assert_int_eq(scan(CHAT(U("a") "," A("b")), one, plain, &s, &r, &err), PL_OK);
    ck_assert_msg(strncmp(pl_buf_str(&s.text), "user: a\nassistant: [b\n", 22) == 0, "%s", pl_buf_str(&s.text));
    ck_assert_int_eq(r.n_loss_tokens, 3);
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    expect_fault(CHAT(U("a") "," A("b")), o, "{{ raise_exception('only on Sundays') }}", 1, -1, "only on Sundays");
    expect_fault(CHAT(U("a") "," A("b")), o, NULL, 1, -1, "no chat template");
    expect_fault(CHAT(U("a") "," A("b")), o, "{{ messages[0]['content'] }}", 1, 1, "writes nothing for it");
}
END_TEST

START_TEST(masks_with_sentencepiece)
{
    const struct pl_data_opts o = {.tok = spm.tok};
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    struct pl_data_opts one = o;
    one.min_examples = 1;
    ck_assert_msg(scan(CHAT(S("s") "," U("a") "," A("Hello")), one, smollm2, &s, &r, &err) == PL_OK, "%s", err.msg);
    const char *loss = strchr(pl_buf_str(&s.text), '[');
    ck_assert_msg(loss != NULL && strstr(loss, "llo<|im_end|>]") != NULL, "%s", pl_buf_str(&s.text));
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
}
END_TEST

START_TEST(completions_pairs_texts)
{
    struct pl_data_opts o = {.tok = bpe.tok};
    size_t n;
    const char *eos = pl_tok_bytes(bpe.tok, pl_tok_eos(bpe.tok), true, &n);
    char expected[200];
    snprintf(expected, sizeof expected, "Hello[ world%.*s]", (int)n, eos);
    expect("{\"prompt\":\"Hello\",\"completion\":\" world\"}\n", o, NULL, expected);
    snprintf(expected, sizeof expected, "H[ello world%.*s]", (int)n, eos);
    o.method = PL_METHOD_PRETRAIN;
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    ck_assert_int_eq(scan("{\"text\":\"one two three four five six seven\"}\n{\"text\":\"a\"}\n", o, NULL, &s, &r, &err), PL_OK);
    const uint32_t whole = r.longest;
    ck_assert_int_eq(r.n_examples, 2);
    ck_assert_int_eq(r.n_loss_tokens + 2, r.n_tokens);
    const uint64_t losses = r.n_loss_tokens;
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    o.max_length = 5; /* every token but each text's first is predicted exactly once */
    ck_assert_int_eq(scan("{\"text\":\"one two three four five six seven\"}\n{\"text\":\"a\"}\n", o, NULL, &s, &r, &err), PL_OK);
    ck_assert_int_eq(r.n_loss_tokens, losses);
    ck_assert_int_eq(r.longest, whole);
    ck_assert_int_eq(r.n_examples, s.n);
    ck_assert_int_eq(r.n_examples, (whole - 1 + 3) / 4 + 1);
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    o = (struct pl_data_opts){.tok = bpe.tok, .method = PL_METHOD_DPO};
#define PAIR(a, b) "{\"input\":{\"messages\":[" S("s") "," U("a") "," A("b") "," U("c") "]},\"" a "\":[" A("yes") "],\"" b "\":[" A("no") "]}\n"
    static const char both[] =
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n[yes<|im_end|>]\n~~"
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n[no<|im_end|>]\n";
    expect(PAIR("preferred_output", "non_preferred_output"), o, smollm2, both);
    expect(PAIR("preferred_completion", "non_preferred_completion"), o, smollm2, both);
}
END_TEST

START_TEST(cut_and_kept)
{
    struct pl_data_opts o = {.tok = bpe.tok, .max_length = 24, .min_examples = 1};
    struct pl_data_report r;
    struct pl_err err = {0};
    struct pl_dataset *d;
    struct pl_chat *chat;
    ck_assert_int_eq(pl_chat_new(&chat, smollm2, strlen(smollm2), bpe.tok, &err), PL_OK);
    o.chat = chat;
    char *path = write_file("\xef\xbb\xbf" CHAT(S("s") "," U("a") "," A("xxxxxxxxxxxxxxxxxxxxxxxxxxxx")) "\r\n  \n" CHAT(S("s") "," U("a") "," A("b")));
    pl_data_report_fini(&(struct pl_data_report){0});
    const pl_status st = pl_dataset_read(&d, path, &o, &r, &err);
    if (st == PL_OK) {
        ck_assert_int_eq(d->n, 2);
        ck_assert_int_eq(r.n_cut, d->examples[0].n == 24);
        ck_assert_int_eq(d->examples[1].line, 3);
        pl_dataset_free(d);
    } else {
        ck_assert_msg(strstr(err.msg, "no token with loss is left in the first 24 tokens") != NULL, "%s", err.msg);
    }
    pl_data_report_fini(&r);
    o.max_length = 4096;
    ck_assert_int_eq(pl_dataset_read(&d, path, &o, &r, &err), PL_OK);
    ck_assert_int_eq(d->n_loss_tokens, r.n_loss_tokens);
    ck_assert(!d->pairs);
    pl_dataset_free(d);
    pl_data_report_fini(&r);
    o.max_length = 4;
    ck_assert_int_eq(pl_dataset_read(&d, path, &o, &r, &err), PL_EFORMAT);
    ck_assert_int_eq(r.n_bad, 2);
    ck_assert_ptr_nonnull(strstr(r.faults[0].reason, "no token with loss is left in the first 4 tokens"));
    pl_data_report_fini(&r);
    o.max_length = 0;
    o.min_examples = 10;
    ck_assert_int_eq(pl_dataset_read(&d, path, &o, &r, &err), PL_ERANGE);
    ck_assert_str_eq(err.msg, "Training file has 2 example(s), but must have at least 10 examples");
    pl_data_report_fini(&r);
    unlink(path);
    free(path);
    pl_chat_free(chat);
}
END_TEST

static const struct {
    const char *lines;
    uint32_t line;
    int message;
    const char *reason;
} bad[] = {
    {"hello\n", 1, -1, "the line is not a dictionary (HINT: line starts with: \"hello"},
    {"[1]\n", 1, -1, "not a dictionary"},
    {CHAT(U("a") "," A("b")) "{\"messages\":\n", 2, -1, "the line is not valid JSON"},
    {CHAT(U("a") "," A("b")) "\n\n{\"messages\":[}\n", 4, -1, "not valid JSON"},
    {"{\"messages\":[],\"messages\":[]}\n", 1, -1, "duplicate"},
    {"{\"messages\":\"x\"}\n", 1, -1, "'messages' must be an array"},
    {"{\"messages\":[]}\n", 1, -1, "1 to 1024 messages"},
    {"{\"messages\":[1]}\n", 1, 0, "must be an object, not an integer"},
    {CHAT(U("a") ",{\"content\":\"b\"}"), 1, 1, "Discriminator 'role' is missing in value"},
    {CHAT(U("a") ",{\"role\":\"robot\",\"content\":\"b\"}"), 1, 1, "not robot"},
    {CHAT(U("a") ",{\"role\":7,\"content\":\"b\"}"), 1, 1, "not an integer"},
    {CHAT(U("a") ",{\"role\":\"assistant\"}"), 1, 1, "'content' is missing"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":null}"), 1, 1, "'content' must be a string"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":[{\"type\":\"image_url\"}]}"), 1, 1, "only text is supported"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":[]}"), 1, 1, "no parts"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":\"b\",\"weight\":2}"), 1, 1, "'weight' must be 0 or 1"},
    {CHAT("{\"role\":\"user\",\"content\":\"b\",\"weight\":1}," A("b")), 1, 0, "'weight' belongs to messages of the assistant"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":\"b\",\"tool_calls\":[{}]}"), 1, 1, "'tool_calls' is not supported"},
    {CHAT(U("a") ",{\"role\":\"assistant\",\"content\":\"b\",\"mood\":\"x\"}"), 1, 1, "'mood' is not a field of a message"},
    {CHAT(U("a") "," A("b") "," U("c")), 1, 2, "the last message must be the assistant's"},
    {CHAT(U("a") "," SKIP("b")), 1, -1, "nothing would be trained"},
    {"{\"messages\":[" U("a") "," A("b") "],\"tools\":[{}]}\n", 1, -1, "'tools' is not supported"},
    {"{\"messages\":[" U("a") "," A("b") "],\"note\":1}\n", 1, -1, "'note' is not a field"},
    {"{\"question\":\"a\",\"answer\":\"b\"}\n", 1, -1, "Unexpected file format, expected either prompt/completion pairs or chat messages"},
    {CHAT(U("a") "," A("b")) "{\"prompt\":\"a\",\"completion\":\"b\"}\n", 2, -1, "fine-tune-completion format, but the lines before"},
    {"{\"prompt\":\"a\",\"completion\":\"\"}\n", 1, -1, "'completion' is empty"},
    {"{\"prompt\":\"a\"}\n", 1, -1, "'completion' is missing"},
    {"{\"prompt\":1,\"completion\":\"b\"}\n", 1, -1, "'prompt' must be a string, not an integer"},
    {CHAT(U("a\\u0000") "," A("b")), 1, -1, "\\u0000"},
    {"{\"messages\":[" U("\xff") "," A("b") "]}\n", 1, -1, "not UTF-8"},
};

START_TEST(bad_lines)
{
    const struct pl_data_opts o = {.tok = bpe.tok};
    expect_fault(bad[_i].lines, o, smollm2, bad[_i].line, bad[_i].message, bad[_i].reason);
    expect_fault(bad[_i].lines, (struct pl_data_opts){0}, NULL, bad[_i].line, bad[_i].message, bad[_i].reason); /* as at the upload */
}
END_TEST

START_TEST(bad_pairs)
{
    const struct pl_data_opts o = {.tok = bpe.tok, .method = PL_METHOD_DPO};
    expect_fault("{\"input\":1,\"preferred_output\":[],\"non_preferred_output\":[]}\n", o, smollm2, 1, -1, "'input' must be an object");
    expect_fault("{\"input\":{\"messages\":[" U("a") "]},\"preferred_output\":[" A("b") "]}\n", o, smollm2, 1, -1,
                 "'non_preferred_output' must be an array of one message");
    expect_fault("{\"input\":{\"messages\":[" U("a") "]},\"preferred_output\":[" U("b") "],\"non_preferred_output\":[" A("b") "]}\n", o, smollm2, 1,
                 -1, "'preferred_output' must be a message of the assistant");
    expect_fault("{\"input\":{\"messages\":[" A("a") "]},\"preferred_output\":[" A("b") "],\"non_preferred_output\":[" A("b") "]}\n", o, smollm2, 1, 0,
                 "must not end with the assistant");
}
END_TEST

START_TEST(every_bad_line_is_named)
{
    struct pl_buf lines;
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    pl_buf_init(&lines, 0);
    for (int i = 1; i <= 1500; i++)
        pl_buf_adds(&lines, i % 3 == 0 ? CHAT(U("a") "," A("b")) : CHAT(U("a")));
    ck_assert_int_eq(scan(pl_buf_str(&lines), (struct pl_data_opts){.tok = bpe.tok, .min_examples = 10}, smollm2, &s, &r, &err), PL_EFORMAT);
    ck_assert_int_eq(r.n_bad, 1000);
    ck_assert_int_eq(r.n_faults, 1000);
    ck_assert_int_eq(r.faults[999].line, 1499);
    ck_assert_int_eq(r.n_examples, 500);
    ck_assert_msg(strstr(err.msg, "more bad line(s)") != NULL && strlen(err.msg) < sizeof err.msg - 1, "%s", err.msg);
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    pl_buf_fini(&lines);
}
END_TEST

START_TEST(the_wrong_method)
{
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    ck_assert_int_eq(scan(CHAT(U("a") "," A("b")), (struct pl_data_opts){.tok = bpe.tok, .method = PL_METHOD_DPO}, smollm2, &s, &r, &err), PL_EFORMAT);
    ck_assert_ptr_nonnull(strstr(err.msg, "is in the fine-tune-chat format, but the specified fine-tuning job is not using 'supervised' as the training "
                                          "method (provided method=dpo)"));
    pl_buf_fini(&s.text);
    pl_data_report_fini(&r);
    ck_assert_int_eq(scan("", (struct pl_data_opts){.min_examples = 10}, NULL, &s, &r, &err), PL_ERANGE);
    ck_assert_str_eq(err.msg, "Training file has 0 example(s), but must have at least 10 examples");
    pl_data_report_fini(&r);
    ck_assert_int_eq(pl_data_scan("/nonexistent/file", &(struct pl_data_opts){0}, NULL, NULL, &r, &err), PL_EIO);
    pl_data_report_fini(&r);
}
END_TEST

START_TEST(a_line_too_long)
{
    struct pl_buf lines;
    struct shown s;
    struct pl_data_report r;
    struct pl_err err;
    pl_buf_init(&lines, 0);
    pl_buf_adds(&lines, "{\"messages\":[{\"role\":\"user\",\"content\":\"");
    for (int i = 0; i < PL_DATA_MAX_LINE; i++)
        pl_buf_addc(&lines, 'x');
    pl_buf_adds(&lines, "\"}]}\n");
    pl_buf_adds(&lines, CHAT(U("a") "," A("b")));
    ck_assert_int_eq(scan(pl_buf_str(&lines), (struct pl_data_opts){.min_examples = 1}, NULL, &s, &r, &err), PL_EFORMAT);
    ck_assert_int_eq(r.n_bad, 1);
    ck_assert_int_eq(r.n_examples, 1);
    ck_assert_ptr_nonnull(strstr(r.faults[0].reason, "longer than 4 MiB"));
    pl_data_report_fini(&r);
    pl_buf_fini(&lines);
}
END_TEST

Suite *suite_dataset(void)
{
    Suite *s = suite_create("dataset");
    TCase *c = tcase_create("all");
    tcase_add_unchecked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, masks_of_chats);
    tcase_add_test(c, masks_by_train_on);
    tcase_add_test(c, prompts_that_are_too_long);
    tcase_add_test(c, masks_of_odd_templates);
    tcase_add_test(c, masks_with_sentencepiece);
    tcase_add_test(c, completions_pairs_texts);
    tcase_add_test(c, cut_and_kept);
    tcase_add_loop_test(c, bad_lines, 0, PL_COUNT_OF(bad));
    tcase_add_test(c, bad_pairs);
    tcase_add_test(c, every_bad_line_is_named);
    tcase_add_test(c, the_wrong_method);
    tcase_add_test(c, a_line_too_long);
    suite_add_tcase(s, c);
    return s;
}
