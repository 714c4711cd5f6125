"""The official Python client, unmodified, against the daemon: what an application sees.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import math
import time

import openai
import pytest

from conftest import SLOW, Daemon, until

CONTEXT = 512  # of the tiny models


@pytest.fixture(scope="module", params=["bpe", "spm"])
def api(request, tmp_path_factory, models):
    """A daemon with a tiny model of each kind of tokenizer, and a client for it."""
    model = models("tiny-" + request.param, "--tokenizer", request.param)
    d = Daemon(tmp_path_factory.mktemp("api"), "--alias", "tiny", model=model).wait_ready()
    d.client = openai.OpenAI(base_url=f"http://127.0.0.1:{d.port}/v1", api_key="none", timeout=60 * SLOW, max_retries=0)
    yield d
    assert d.process.poll() is None, d.log
    until(d.idle)
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


@pytest.fixture
def client(api):
    return api.client


def ids_of(api, text, **options):
    status, _, body = api.post("/tokenize", {"content": text, **options})
    assert status == 200, body
    return json.loads(body)["tokens"]


def token(api, word):
    """The id of the token that is this word."""
    id = ids_of(api, word)[-1]  # after the space that SentencePiece adds
    assert json.loads(api.post("/detokenize", {"tokens": [id]})[2])["content"] == word
    return id


def only(api, *words):
    """A logit_bias that leaves nothing but these one-token words to choose from."""
    bias = {}
    for word in words:
        bias[str(token(api, word))] = 100
    return bias


USER = [{"role": "user", "content": "Hello"}]


def chat(client, messages=None, **options):
    return client.chat.completions.create(model="tiny", messages=messages or USER, **options)


def complete(client, prompt="Hello", **options):
    return client.completions.create(model="tiny", prompt=prompt, **options)


# chat, whole

def test_chat(client):
    before = int(time.time())
    r = chat(client, max_tokens=5, temperature=0)
    assert r.id.startswith("chatcmpl-") and r.object == "chat.completion" and r.model == "tiny"
    assert before <= r.created <= time.time() and r.system_fingerprint.startswith("fp_")
    assert [c.index for c in r.choices] == [0]
    message = r.choices[0].message
    assert message.role == "assistant" and isinstance(message.content, str) and message.refusal is None and message.tool_calls is None
    assert r.choices[0].logprobs is None and r.choices[0].finish_reason in ("stop", "length")
    assert r.usage.prompt_tokens > 20 and 1 <= r.usage.completion_tokens <= 5
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    assert r.usage.prompt_tokens_details.cached_tokens >= 0 and r.usage.completion_tokens_details.reasoning_tokens == 0
    assert chat(client, max_tokens=5).id != r.id


def test_service_tier_is_echoed(client):
    assert chat(client, max_tokens=1, service_tier="auto").service_tier == "default"
    assert [c.service_tier for c in chat(client, max_tokens=1, service_tier="default", stream=True)][0] == "default"
    assert chat(client, max_tokens=1).service_tier is None


def test_fields_without_effect_here(client):
    r = chat(client, max_tokens=2, temperature=0, user="u", metadata={"a": "b"}, store=False, safety_identifier="s", prompt_cache_key="k",
             response_format={"type": "text"}, modalities=["text"], tool_choice="none", tools=[], parallel_tool_calls=False,
             verbosity="medium", reasoning_effort="none", logit_bias={}, stop=None, seed=None,
             extra_body={"top_k": -1, "some_future_field": {"x": 1}})
    assert r.choices[0].message.content == chat(client, max_tokens=2, temperature=0).choices[0].message.content


def test_prefix_cache_is_reported(client):
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 3}]
    chat(client, messages, max_tokens=1)
    r = chat(client, messages, max_tokens=1)
    assert 0 < r.usage.prompt_tokens_details.cached_tokens < r.usage.prompt_tokens


def test_length(api, client):
    bias = only(api, "he", "in")
    r = chat(client, max_tokens=7, logit_bias=bias)
    assert r.choices[0].finish_reason == "length" and r.usage.completion_tokens == 7
    r = chat(client, max_tokens=7, max_completion_tokens=3, logit_bias=bias)
    assert r.usage.completion_tokens == 3
    r = chat(client, logit_bias=bias)  # without a limit: to the end of the context
    assert r.choices[0].finish_reason == "length" and r.usage.total_tokens == CONTEXT
    r = complete(client, logit_bias=bias)
    assert r.choices[0].finish_reason == "length" and r.usage.completion_tokens == 16


def test_end_of_text(api, client):
    eos = ids_of(api, "<|im_end|>", parse_special=True)
    assert len(eos) == 1
    bias = {str(eos[0]): 100}
    r = chat(client, max_tokens=9, logit_bias=bias)
    assert r.choices[0].finish_reason == "stop" and r.choices[0].message.content == "" and r.usage.completion_tokens == 1
    r = chat(client, max_tokens=9, logit_bias=bias, extra_body={"min_tokens": 4})
    assert r.choices[0].finish_reason == "stop" and r.usage.completion_tokens == 5
    r = chat(client, max_tokens=9, logit_bias=bias, extra_body={"ignore_eos": True})
    assert r.choices[0].finish_reason == "length" and r.usage.completion_tokens == 9


def test_roles_and_parts(client):
    text = chat(client, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello world"}], temperature=0, max_tokens=6)
    parts = chat(client, [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
                          {"role": "user", "content": [{"type": "text", "text": "Hello world"}], "name": "ann"}], temperature=0, max_tokens=6)
    assert parts.choices[0].message.content == text.choices[0].message.content
    assert parts.usage.prompt_tokens == text.usage.prompt_tokens
    longer = chat(client, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], max_tokens=1)
    assert longer.usage.prompt_tokens > 10


def test_user_text_yields_no_control_tokens(api, client):
    plain = chat(client, [{"role": "user", "content": ""}], max_tokens=1).usage.prompt_tokens
    sly = chat(client, [{"role": "user", "content": "<|im_end|>"}], max_tokens=1).usage.prompt_tokens
    assert sly - plain > 3  # as letters, not as the one control token
    assert len(ids_of(api, "<|im_end|>", parse_special=True)) == 1
    control = ids_of(api, "<|im_end|>", parse_special=True)[0]
    assert control not in ids_of(api, "<|im_end|>")
    r = complete(client, "<|im_end|>", max_tokens=1)
    assert r.usage.prompt_tokens > 3


# sampling

def test_seed(client):
    a, b = (chat(client, seed=17, max_tokens=12, temperature=1.5).choices[0].message.content for _ in "ab")
    assert a == b
    others = {chat(client, seed=s, max_tokens=12, temperature=1.5).choices[0].message.content for s in (18, -19, 2 ** 62)}
    assert len(others | {a}) == 4
    assert len({chat(client, max_tokens=12, temperature=1.5).choices[0].message.content for _ in range(4)}) > 1


def test_every_way_to_be_greedy(client):
    greedy = chat(client, temperature=0, max_tokens=10).choices[0].message.content
    for options in ({"top_p": 0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        assert chat(client, max_tokens=10, **options).choices[0].message.content == greedy, options


def test_penalties_and_bias_reach_the_sampler(api, client):
    bias = only(api, "he", "in", "er", "on")
    options = {"temperature": 0, "max_tokens": 24, "logit_bias": bias}
    plain = chat(client, **options).choices[0].message.content
    assert set(plain) <= set("heinro")
    for name, value in (("presence_penalty", 2), ("frequency_penalty", 2), ("frequency_penalty", -2)):
        texts = {plain, *(chat(client, **{name: v}, **options).choices[0].message.content for v in (value / 8, value))}
        assert len(texts) > 1 or name == "frequency_penalty" and value < 0, name
    assert chat(client, extra_body={"repetition_penalty": 1.9}, **options).choices[0].message.content != plain
    banned = token(api, "he")
    assert "he" not in chat(client, **{**options, "logit_bias": {**bias, str(banned): -100}}).choices[0].message.content


def test_n(client):
    r = chat(client, n=3, seed=5, max_tokens=8, temperature=1.5)
    assert [c.index for c in r.choices] == [0, 1, 2]
    texts = [c.message.content for c in r.choices]
    assert len(set(texts)) == 3
    assert [c.message.content for c in chat(client, n=3, seed=5, max_tokens=8, temperature=1.5).choices] == texts
    one = chat(client, seed=5, max_tokens=8, temperature=1.5)
    assert one.choices[0].message.content == texts[0]
    assert r.usage.prompt_tokens == one.usage.prompt_tokens  # counted once
    assert 3 <= r.usage.completion_tokens <= 24
    assert len(chat(client, n=128, max_tokens=1).choices) == 128


# stop strings

def test_stop(api, client):
    options = {"seed": 3, "max_tokens": 60, "logit_bias": only(api, "he", "in", "er", "on")}
    full = chat(client, **options).choices[0].message.content
    for stop in ("inhe", "er", "ono", ["xyz", "rin"], ["herer", "ine"], "h", ["nothing"]):
        found = [full.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in full]
        r = chat(client, stop=stop, **options).choices[0]
        if found:
            assert r.finish_reason == "stop" and r.message.content == full[:min(found)], stop
        else:
            assert r.finish_reason == "length" and r.message.content == full
        pieces = [c.choices[0].delta.content or "" for c in chat(client, stop=stop, stream=True, **options)]
        assert "".join(pieces) == r.message.content
        whole = ""
        for piece in pieces:  # what left early was right
            whole += piece
            assert full.startswith(whole)
    if "er" in full:
        r = chat(client, stop="er", extra_body={"include_stop_str_in_output": True}, **options)
        assert r.choices[0].message.content == full[:full.index("er") + 2]


# streams

def test_stream(client):
    options = {"seed": 9, "max_tokens": 20, "temperature": 1.2}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, **options))
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-") and all(c.object == "chat.completion.chunk" for c in chunks)
    first, *middle, last = [c.choices[0] for c in chunks]
    assert first.delta.role == "assistant" and first.delta.content == "" and first.finish_reason is None
    assert all(c.delta.role is None and c.delta.content and c.finish_reason is None for c in middle)
    assert last.delta.role is None and last.delta.content is None and last.finish_reason == whole.choices[0].finish_reason
    assert "".join(c.delta.content for c in middle) == whole.choices[0].message.content
    assert all(c.usage is None for c in chunks)


def test_stream_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, max_tokens=5, n=2, seed=1))
    assert all(c.usage is None and len(c.choices) == 1 for c in chunks[:-1])
    assert chunks[-1].choices == []
    u, whole = chunks[-1].usage, chat(client, max_tokens=5, n=2, seed=1).usage
    assert (u.prompt_tokens, u.completion_tokens, u.total_tokens) == (whole.prompt_tokens, whole.completion_tokens, whole.total_tokens)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, max_tokens=5))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens >= 1


def test_stream_accumulator(client):
    """The client's own accumulator concatenates what is repeated and misses what is not sent."""
    options = {"seed": 9, "max_tokens": 20, "n": 2, "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(model="tiny", messages=USER, stream_options={"include_usage": True}, **options) as stream:
        for _ in stream:
            pass
        got = stream.current_completion_snapshot  # get_final_completion() refuses what was cut by max_tokens
    want = chat(client, **options)
    for a, b in zip(got.choices, want.choices, strict=True):
        assert a.index == b.index and a.message.role == "assistant" and a.message.content == b.message.content
        assert a.finish_reason == b.finish_reason
        # after an earlier request the prompt is cached and computed in other batches: the last digit may differ
        assert [t.token for t in a.logprobs.content] == [t.token for t in b.logprobs.content]
        assert [t.logprob for t in a.logprobs.content] == pytest.approx([t.logprob for t in b.logprobs.content], abs=1e-3)
    assert got.usage.completion_tokens == want.usage.completion_tokens


def test_stream_n(client):
    whole = chat(client, n=4, seed=2, max_tokens=10)
    texts, roles, ends, order = [""] * 4, [0] * 4, [None] * 4, []
    for c in chat(client, n=4, seed=2, max_tokens=10, stream=True):
        (choice,) = c.choices
        i = choice.index
        order.append(i)
        assert ends[i] is None
        if choice.delta.role:
            assert texts[i] == ""
            roles[i] += 1
        texts[i] += choice.delta.content or ""
        ends[i] = choice.finish_reason
    assert roles == [1] * 4 and texts == [c.message.content for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert order != sorted(order)  # they run at the same time


def test_stream_that_is_left(api, client):
    stream = chat(client, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    until(api.idle)


def test_many_streams_at_once(api, client):
    options = {"max_tokens": 30, "temperature": 0}
    prompts = [f"{i} and {i * 7} makes" for i in range(12)]
    alone = [complete(client, p, **options).choices[0].text for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: "".join(c.choices[0].text for c in complete(client, p, stream=True, **options)), prompts))
    assert together == alone


# log-probabilities

def test_chat_logprobs(client):
    r = chat(client, temperature=0, max_tokens=6, logprobs=True, top_logprobs=20)
    entries = r.choices[0].logprobs.content
    assert r.choices[0].logprobs.refusal is None
    assert len(entries) in (r.usage.completion_tokens, r.usage.completion_tokens - 1)  # the end token has no text
    for e in entries:
        assert len(e.top_logprobs) == 20
        assert e.top_logprobs[0].logprob == e.logprob and e.top_logprobs[0].bytes == e.bytes  # greedy
        values = [t.logprob for t in e.top_logprobs]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1 + 1e-4
        assert bytes(e.bytes).decode(errors="replace") == e.token
    text = b"".join(bytes(e.bytes) for e in entries).decode(errors="replace")
    assert text.lstrip() == r.choices[0].message.content.lstrip()
    r = chat(client, max_tokens=2, logprobs=True)
    assert all(e.top_logprobs == [] for e in r.choices[0].logprobs.content)
    assert chat(client, max_tokens=2, logprobs=False).choices[0].logprobs is None


def test_chat_logprobs_do_not_depend_on_sampling(client):
    plain = chat(client, temperature=0, max_tokens=1, logprobs=True, top_logprobs=3).choices[0].logprobs.content[0]
    hot = chat(client, temperature=2, max_tokens=1, top_p=0, logprobs=True, top_logprobs=3, presence_penalty=2).choices[0].logprobs.content[0]
    assert [(t.bytes, t.logprob) for t in hot.top_logprobs] == [(t.bytes, pytest.approx(t.logprob, abs=1e-3)) for t in plain.top_logprobs]


def test_chat_logprobs_streamed(client):
    options = {"seed": 4, "max_tokens": 12, "logprobs": True, "top_logprobs": 1}
    whole = chat(client, **options).choices[0]
    tokens = []
    for c in chat(client, stream=True, **options):
        if c.choices[0].logprobs:
            tokens += c.choices[0].logprobs.content
    assert [t.token for t in tokens] == [t.token for t in whole.logprobs.content]


# completions

def test_completion(client):
    r = complete(client, "Hello world", max_tokens=4, temperature=0)
    assert r.id.startswith("cmpl-") and r.object == "text_completion" and r.model == "tiny" and r.system_fingerprint.startswith("fp_")
    assert r.choices[0].index == 0 and r.choices[0].logprobs is None and r.choices[0].finish_reason in ("stop", "length")
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens


def test_prompt_forms(api, client):
    options = {"max_tokens": 6, "temperature": 0}
    ids = ids_of(api, "Hello world", add_special=True)
    a = complete(client, "Hello world", **options).choices[0].text
    b = complete(client, "of the", **options).choices[0].text
    assert complete(client, ["Hello world"], **options).choices[0].text == a
    assert complete(client, ids, **options).choices[0].text == a
    r = complete(client, [ids, ids_of(api, "of the", add_special=True)], **options)
    assert [(c.index, c.text) for c in r.choices] == [(0, a), (1, b)]
    r = complete(client, ["Hello world", "of the"], n=2, **options)
    assert [(c.index, c.text) for c in r.choices] == [(0, a), (1, a), (2, b), (3, b)]
    assert r.usage.prompt_tokens == len(ids) + len(ids_of(api, "of the", add_special=True))
    assert complete(client, "", **options).usage.prompt_tokens == 1


def test_completion_stream(client):
    options = {"max_tokens": 10, "seed": 6, "n": 2}
    whole = complete(client, ["Hello", "of the"], **options)
    texts, ends = [""] * 4, [None] * 4
    for c in complete(client, ["Hello", "of the"], stream=True, **options):
        assert c.object == "text_completion" and len(c.choices) == 1
        texts[c.choices[0].index] += c.choices[0].text
        ends[c.choices[0].index] = c.choices[0].finish_reason
    assert texts == [c.text for c in whole.choices] and ends == [c.finish_reason for c in whole.choices]


def test_echo(api, client):
    prompt = "Hello  wörld, 你好 <|im_end|>"
    plain = complete(client, prompt, max_tokens=5, temperature=0).choices[0].text
    assert complete(client, prompt, max_tokens=5, temperature=0, echo=True).choices[0].text == prompt + plain
    r = complete(client, prompt, max_tokens=0, echo=True)
    assert r.choices[0].text == prompt and r.choices[0].finish_reason == "length" and r.usage.completion_tokens == 0
    assert complete(client, ids_of(api, "Hello world", add_special=True), max_tokens=0, echo=True).choices[0].text == "Hello world"
    streamed = [c.choices[0].text for c in complete(client, prompt, max_tokens=5, temperature=0, echo=True, stream=True)]
    assert "".join(streamed) == prompt + plain


def test_completion_logprobs(api, client):
    prompt = "Hello world and the"
    r = complete(client, prompt, max_tokens=6, temperature=0, logprobs=5, echo=True).choices[0]
    lp = r.logprobs
    ids = ids_of(api, prompt, add_special=True)
    n = len(lp.tokens)
    assert len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset) == n >= len(ids)
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None and lp.text_offset[0] == 0
    assert all(isinstance(v, float) and v <= 0 for v in lp.token_logprobs[1:])
    for token, value, top in list(zip(lp.tokens, lp.token_logprobs, lp.top_logprobs))[1:]:
        assert top[token] == pytest.approx(value) and 5 <= len(top) <= 6
    assert lp.text_offset == sorted(lp.text_offset)
    for token, at in list(zip(lp.tokens, lp.text_offset))[1:len(ids)]:
        assert r.text[at:].startswith(token) or r.text[at:].startswith(token.lstrip()), (token, at)
    assert lp.text_offset[len(ids)] == len(prompt)
    for token, value, top in list(zip(lp.tokens, lp.token_logprobs, lp.top_logprobs))[len(ids):]:
        assert value == max(top.values())  # greedy
    # the same prompt without echo; and scored alone, as evaluation harnesses do it
    only_new = complete(client, prompt, max_tokens=6, temperature=0, logprobs=5).choices[0].logprobs
    assert only_new.tokens == lp.tokens[len(ids):] and only_new.text_offset[0] == 0
    scored = complete(client, prompt, max_tokens=0, temperature=0, logprobs=0, echo=True).choices[0].logprobs
    assert scored.tokens == lp.tokens[:len(ids)]
    assert scored.token_logprobs[1:] == pytest.approx(lp.token_logprobs[1:len(ids)], abs=1e-3)
    streamed = [c.choices[0].logprobs for c in complete(client, prompt, max_tokens=6, temperature=0, logprobs=5, echo=True, stream=True)]
    assert [t for s in streamed if s for t in s.tokens] == lp.tokens
    assert [t for s in streamed if s for t in s.text_offset] == lp.text_offset


def test_best_of(client):
    options = {"max_tokens": 6, "seed": 8, "temperature": 1.5}
    every = complete(client, n=6, logprobs=0, **options).choices
    mean = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every if c.finish_reason == "length"}
    r = complete(client, n=2, best_of=6, **options)
    assert [c.index for c in r.choices] == [0, 1] and r.choices[0].logprobs is None
    assert {c.text for c in r.choices} <= {c.text for c in every}
    if len(mean) == 6:
        assert [c.text for c in r.choices] == sorted(mean, key=mean.get, reverse=True)[:2]
    assert r.usage.completion_tokens >= 12


# models

def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.object == "model" and model.owned_by and model.created > 1e9
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as e:
        client.models.retrieve("other/model:1")
    assert e.value.code == "model_not_found" and "other/model:1" in e.value.message


# errors, as the client raises them

@pytest.mark.parametrize("options, param", [
    ({"temperature": 2.5}, "temperature"), ({"n": 0}, "n"), ({"n": 129}, "n"), ({"top_logprobs": 2}, "top_logprobs"), ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"), ({"stream_options": {"include_usage": True}}, "stream_options"), ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"), ({"store": True}, "store"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"max_tokens": "5"}, "max_tokens"), ({"seed": 1.5}, "seed"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]}, "messages[0].content"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_request(client, options, param, stream):
    if stream and param == "stream_options":
        return
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, **{"messages": USER, "stream": stream, **options})
    assert e.value.param == param and e.value.type == "invalid_request_error" and e.value.status_code == 400
    assert param.split("[")[0] in e.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_context_length(api, client, stream):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, [{"role": "user", "content": "Hello " * 2000}], stream=stream)
    assert e.value.code == "context_length_exceeded" and e.value.param == "messages" and str(CONTEXT) in e.value.message
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, max_tokens=CONTEXT, stream=stream)
    used = chat(client, max_tokens=1).usage.prompt_tokens
    assert e.value.code == "context_length_exceeded" and str(used + CONTEXT) in e.value.message
    assert chat(client, max_tokens=CONTEXT - used).usage.total_tokens <= CONTEXT
    with pytest.raises(openai.BadRequestError):
        chat(client, max_tokens=CONTEXT - used + 1)
    id = token(api, "he")
    assert complete(client, [id] * (CONTEXT - 1), max_tokens=1).usage.prompt_tokens == CONTEXT - 1
    for n, max_tokens in ((CONTEXT, 1), (CONTEXT + 1, 1), (CONTEXT + 1, 0), (CONTEXT * 10, 1)):
        with pytest.raises(openai.BadRequestError) as e:
            complete(client, [id] * n, max_tokens=max_tokens)
        assert e.value.code == "context_length_exceeded" and e.value.param == "prompt"


def test_unknown_model(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as e:
            client.chat.completions.create(model="gpt-9", messages=USER, stream=stream)
        assert e.value.code == "model_not_found" and e.value.param == "model" and "gpt-9" in e.value.message


def test_request_id(client):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=USER, max_tokens=1)
    assert raw.headers["x-request-id"].startswith("req-") and raw.parse()._request_id == raw.headers["x-request-id"]


def test_authentication(start, tiny):
    d = start("--api-key", "open-sesame", model=tiny)
    url = f"http://127.0.0.1:{d.port}/v1"
    assert openai.OpenAI(base_url=url, api_key="open-sesame", max_retries=0).models.list().data
    with pytest.raises(openai.AuthenticationError) as e:
        openai.OpenAI(base_url=url, api_key="wrong-sesame", max_retries=0).chat.completions.create(model="tiny", messages=USER)
    assert e.value.code == "invalid_api_key" and e.value.status_code == 401


def test_rate_limit(start, long):
    d = start("--max-sequences", 1, "--queue-limit", 1, "--speculation", "off", model=long)  # else the long answer is soon over
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{d.port}/v1", api_key="x", max_retries=0, timeout=120 * SLOW)
    body = json.dumps({"model": "long", "prompt": "a", "max_tokens": 15000, "ignore_eos": True}).encode()
    with d.socket() as runs, d.socket() as waits:
        for s, state in ((runs, "running"), (waits, "waiting")):
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: d.metrics()[f"parley_num_requests_{state}"] == 1)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as e:
                client.completions.create(model="long", prompt="b", max_tokens=1, stream=stream)
            assert e.value.status_code == 429 and e.value.code == "rate_limit_exceeded" and e.value.type == "rate_limit_error"
            assert int(e.value.response.headers["retry-after"]) >= 1
    until(d.idle, 60)
    assert client.completions.create(model="long", prompt="a", max_tokens=1).choices
