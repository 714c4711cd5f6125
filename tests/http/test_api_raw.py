"""The generating endpoints byte for byte: events, error bodies, what clients can send that a library would not.

SPDX-License-Identifier: Apache-2.0
"""
import json
import re
import signal
import time

import pytest

from conftest import SLOW, Daemon, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def api(tmp_path_factory, tiny):
    d = Daemon(tmp_path_factory.mktemp("raw"), "--alias", "tiny", "--max-body-mb", 4, model=tiny).wait_ready()
    yield d
    assert d.process.poll() is None, d.log
    until(d.idle)
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


def chat(**options):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0, **options}


def text(**options):
    return {"model": "tiny", "prompt": "Hello world", "max_tokens": 8, "temperature": 0, **options}


def stream(api, path, body):
    status, headers, answer = api.post(path, {**body, "stream": True})
    assert status == 200, answer
    assert headers["content-type"] == "text/event-stream; charset=utf-8" and headers["cache-control"] == "no-cache"
    assert "content-length" not in headers
    assert answer.endswith(b"\n\ndata: [DONE]\n\n")
    events = answer.decode().removesuffix("\n\n").split("\n\n")  # strict: every chunk is whole characters
    assert all(re.fullmatch(r"data: [^\r\n]+", e) for e in events)
    return [e.removeprefix("data: ") for e in events[:-1]]


def error(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    e = json.loads(body.decode())
    assert list(e) == ["error"] and list(e["error"]) == ["message", "type", "param", "code"]
    assert isinstance(e["error"]["message"], str) and e["error"]["message"]
    return status, e["error"]


# events

def test_chat_events(api):
    events = stream(api, CHAT, chat(ignore_eos=True))
    chunks = [json.loads(e) for e in events]
    head = events[0][:events[0].index('"choices"')]
    assert re.fullmatch(r'\{"id":"chatcmpl-[0-9a-f]{24}","object":"chat\.completion\.chunk","created":\d+,"model":"tiny",'
                        r'"system_fingerprint":"fp_[0-9a-f]+",', head)
    assert all(e.startswith(head) for e in events)
    assert events[0] == head + '"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}'
    assert events[-1] == head + '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}'
    for c in chunks[1:-1]:
        assert list(c["choices"][0]["delta"]) == ["content"] and c["choices"][0]["delta"]["content"]
        assert c["choices"][0]["finish_reason"] is None and "usage" not in c


def test_usage_events(api):
    events = [json.loads(e) for e in stream(api, CHAT, chat(stream_options={"include_usage": True}, service_tier="auto"))]
    assert all(e["usage"] is None and len(e["choices"]) == 1 for e in events[:-1])
    last = events[-1]
    assert last["choices"] == [] and last["id"] == events[0]["id"] and last["created"] == events[0]["created"]
    assert all(e["service_tier"] == "default" for e in events)
    u = last["usage"]
    assert u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"]
    assert 0 <= u["prompt_tokens_details"]["cached_tokens"] < u["prompt_tokens"] and u["completion_tokens_details"]["reasoning_tokens"] == 0
    without = [json.loads(e) for e in stream(api, CHAT, chat(stream_options={"include_usage": False}))]
    assert all(len(e["choices"]) == 1 and "usage" not in e for e in without)


def test_completion_events(api):
    events = stream(api, TEXT, text(ignore_eos=True, echo=True, logprobs=1))
    chunks = [json.loads(e)["choices"][0] for e in events]
    assert chunks[0]["text"] == "Hello world" and chunks[0]["logprobs"]["token_logprobs"][0] is None
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(set(c) == {"index", "text", "logprobs", "finish_reason"} for c in chunks)
    assert all(json.loads(e)["object"] == "text_completion" for e in events)


def test_characters_are_never_split(api):
    """A model forced to spell a character byte by byte: each piece is whole, the parts that stay unfinished become U+FFFD."""
    euro = json.loads(api.post("/tokenize", {"content": "€"})[2])["tokens"]
    assert len(euro) == 3
    bytes_of = dict(zip(euro, "€".encode()))
    characters = set()
    for seed in range(40):
        body = text(temperature=2, seed=seed, max_tokens=8, logit_bias={str(i): 100 for i in euro})
        pieces = [json.loads(e)["choices"][0]["text"] for e in stream(api, TEXT, body)]
        answer = json.loads(api.post(TEXT, {**body, "echo": True, "logprobs": 0})[2])["choices"][0]
        whole = answer["text"].removeprefix("Hello world")
        assert "".join(pieces) == whole
        spelled = [int(t.removeprefix("bytes:\\x"), 16) for t in answer["logprobs"]["tokens"][2:]]
        assert set(spelled) <= set(bytes_of.values())
        assert re.sub("\ufffd+", "\ufffd", bytes(spelled).decode(errors="replace")) == re.sub("\ufffd+", "\ufffd", whole)
        characters |= set(whole)
    assert "\ufffd" in characters and len(characters) > 1


def test_logprob_shapes(api):
    body = json.loads(api.post(CHAT, chat(logprobs=True, top_logprobs=2, n=2))[2])
    for c in body["choices"]:
        assert list(c["logprobs"]) == ["content", "refusal"] and c["logprobs"]["refusal"] is None
        for t in c["logprobs"]["content"]:
            assert list(t) == ["token", "logprob", "bytes", "top_logprobs"] and len(t["top_logprobs"]) == 2
            assert all(list(x) == ["token", "logprob", "bytes"] for x in t["top_logprobs"])
    raw = api.post(TEXT, text(logprobs=1, echo=True))[2].decode()
    assert re.search(r'"token_logprobs":\[null(,-\d+(\.\d{1,8})?(e-\d+)?)+\]', raw)  # short numbers
    for c in json.loads(raw)["choices"]:
        assert set(c["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert json.loads(api.post(CHAT, chat())[2])["choices"][0]["logprobs"] is None


def test_text_that_needs_escapes(api):
    prompt = 'a"b\\c\n\t\r\x01\x7f\u2028</script>😀'
    body = json.loads(api.post(TEXT, text(prompt=prompt, echo=True, max_tokens=0))[2])
    assert body["choices"][0]["text"] == prompt
    (echoed, *_) = [json.loads(e) for e in stream(api, TEXT, text(prompt=prompt, echo=True, max_tokens=0))]
    assert echoed["choices"][0]["text"] == prompt
    # token ids that are no characters
    ids = json.loads(api.post("/tokenize", {"content": "😀"})[2])["tokens"]
    assert json.loads(api.post(TEXT, text(prompt=ids[:2], echo=True, max_tokens=0))[2])["choices"][0]["text"] == "\ufffd\ufffd"


# errors

@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize", "/apply-template"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"{} {}", b'{"a":1,"a":2}', b'{"a":01}', b'{"a":NaN}', b'{"a":1e400}',
                                  b'{"a":9223372036854775808}', b"\xff\xfe{\x00}\x00", b'{"a":"\\ud800"}', b'{"a":"\xff"}', b'{"a":"\\u0000"}', b'{"a":1\0}', b'{"a":true}\0',
                                  b"[" * 100000, b'{"a":' * 65 + b"1" + b"}" * 65, b'{"x":[' + b"{}," * 70000 + b"{}]}",
                                  b'{"y":{' + b",".join(b'"%d":1' % i for i in range(270000)) + b"}}"],
                         ids=lambda b: repr(b[:20]))
def test_malformed(api, path, body):
    status, e = error(api.post(path, body, {"Content-Type": "application/json"}))
    assert status == 400 and e["type"] == "invalid_request_error" and e["param"] is None


def test_messages_for_people(api):
    """No word of the parser's own."""
    said = error(api.post(CHAT, b'{"a":"x\\u0000"}', {"Content-Type": "application/json"}))[1]["message"]
    assert "JSON_" not in said and "\\u0000" in said and "line 1" in said


def test_megabytes_are_the_requests_fault(start, tiny):
    """A 5xx would be sent again."""
    d = start("--alias", "tiny", model=tiny)
    for path in (CHAT, "/apply-template"):
        status, e = error(d.post(path, chat(messages=[{"role": "user", "content": "x " * 15_000_000}])))
        assert status == 400 and e["code"] == "context_length_exceeded" and e["param"] == "messages", e
    status, e = error(d.post("/tokenize", {"content": "a" * ((256 << 10) + 1)}))
    assert status == 400 and e["param"] == "content" and "256 KiB" in e["message"], e


PROMPTS = [[], [[]], ["a", 1], [1, "a"], [1.0], [-1], [10 ** 9], [2 ** 62], [True], [[1], "a", None], [[1, [2]]], [None], ["a"] * 129, {"a": 1}]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: repr(p)[:20])
def test_wrong_prompts(api, prompt):
    status, e = error(api.post(TEXT, text(prompt=prompt)))
    assert status == 400 and e["param"] == "prompt", e


@pytest.mark.parametrize("body, param", [
    (text(prompt=["a"] * 100, n=2), "n"), (text(prompt=["a", "b"], best_of=65), "n"), (text(logit_bias={"99999": 1}), "logit_bias"),
    (text(suffix="x"), "suffix"), (text(n=2, best_of=3, stream=True), "best_of"), (text(max_tokens=-1), "max_tokens"),
    (text(max_tokens=2 ** 31), "max_tokens"), (text(max_tokens=2 ** 31 - 1, n=128), "prompt"), (chat(top_k=-2), "top_k"),
    (chat(seed=True), "seed"), (chat(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), "messages[0].content"),
])
def test_wrong_values(api, body, param):
    path = CHAT if "messages" in body else TEXT
    for streamed in (False, True) if "best_of" not in body else (body.get("stream", False),):
        status, e = error(api.post(path, {**body, "stream": streamed}))
        assert status == 400 and e["param"] == param, e


def test_part_types_are_named(api):
    _, e = error(api.post(CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])))
    assert "image_url" in e["message"] and "passwd" not in e["message"]


def test_long_names_are_cut_whole(api):
    status, e = error(api.post(CHAT, chat(model="é" * 100000)))
    assert status == 404 and e["code"] == "model_not_found" and len(e["message"]) < 600
    status, e = error(api.post(CHAT, chat(messages=[{"role": "x" + "€" * 50000, "content": ""}])))
    assert status == 400 and e["param"] == "messages[0].role" and len(e["message"]) < 600


def test_template_errors_name_messages(start, tiny, tmp_path):
    template = tmp_path / "picky.jinja"
    template.write_text("{{ raise_exception('Roles must take turns') if messages[0]['role'] != 'user' else messages[0]['content'] }}")
    d = start("--alias", "tiny", "--chat-template", template, model=tiny)
    status, e = error(d.post(CHAT, chat(messages=[{"role": "assistant", "content": "a"}])))
    assert status == 400 and e["param"] == "messages" and "Roles must take turns" in e["message"]
    assert d.post(CHAT, chat())[0] == 200
    assert json.loads(d.post("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})[2]) == {"prompt": "Hi"}


def test_unknown_fields_are_logged_by_name_only(api):
    secret = "do-not-log-this"
    assert api.post(CHAT, chat(one_field=secret, **{"bad\n\x1b[31mname": 1, "x" * 5000: 2}))[0] == 200
    until(lambda: "one_field" in api.log)
    assert secret not in api.log and "\x1b" not in api.log and "x" * 100 not in api.log
    assert "Hello" not in api.log  # nor any prompt


def test_error_in_a_stream(start, long):
    """What fails after the first event is told as an event, and [DONE] follows."""
    d = start("--drain-timeout", 0, "--speculation", "off", model=long)
    data = json.dumps({"model": "long", "prompt": "a", "stream": True, "max_tokens": 9000, "ignore_eos": True}).encode()
    with d.socket(30) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        got = s.recv(65536)
        assert got.startswith(b"HTTP/1.1 200")
        while b"data: " not in got:
            got += s.recv(65536)
        d.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 30 * SLOW
        while time.monotonic() < end and (piece := s.recv(65536)):
            got += piece
            if b"[DONE]" in got:
                break
    tail = got[got.rindex(b'data: {"error"'):].decode()
    event = json.loads(tail[len("data: "):tail.index("\n\n")])
    assert event["error"]["code"] == "shutting_down" and event["error"]["type"] == "server_error"
    assert "\n\ndata: [DONE]\n\n" in tail
    assert d.process.wait(30 * SLOW) == 0


# tokens and templates

@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_tokenize_round_trip(start, models, kind):
    d = start("--alias", "tiny", model=models("tiny-" + kind, "--tokenizer", kind))
    for content in ("", "Hello world", "  two  spaces ", "a\n\n\tb", "Zażółć 你好 😀 ✓ \u0301", "<|im_end|> <s> </s> <0x41>", "x" * 5000, "\x00"[:0] + "\x7f"):
        status, _, body = d.post("/tokenize", {"content": content})
        answer = json.loads(body)
        assert status == 200 and set(answer) == {"tokens", "count", "max_model_len"}
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
        assert json.loads(d.post("/detokenize", {"tokens": answer["tokens"]})[2]) == {"content": content}
    status, e = error(d.post("/tokenize", {"content": "a " * (2 << 20) + "a"}))
    assert status == 400 and e["param"] == "content" and "4194305 bytes" in e["message"]
    special = json.loads(d.post("/tokenize", {"content": "<|im_start|>", "parse_special": True})[2])["tokens"]
    assert json.loads(d.post("/detokenize", {"tokens": special})[2]) == {"content": "<|im_start|>"}
    with_bos = json.loads(d.post("/tokenize", {"content": "Hello", "add_special": True})[2])["tokens"]
    without = json.loads(d.post("/tokenize", {"content": "Hello", "add_special": None})[2])["tokens"]
    assert with_bos[-len(without):] == without and (len(with_bos) == len(without) + 1) == (kind == "spm")


@pytest.mark.parametrize("path, body, param", [
    ("/tokenize", {}, "content"), ("/tokenize", {"content": None}, "content"), ("/tokenize", {"content": ["a"]}, "content"),
    ("/tokenize", {"content": "a" * 300_000}, "content"),
    (TEXT, {"model": "tiny", "prompt": "a" * 300_000}, "prompt"),
    ("/tokenize", {"content": 1}, "content"), ("/tokenize", {"content": "a", "add_special": 1}, "add_special"),
    ("/tokenize", {"content": "a", "parse_special": "yes"}, "parse_special"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"), ("/detokenize", {"tokens": [1.0]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [10 ** 6]}, "tokens"), ("/detokenize", {"tokens": [True]}, "tokens"),
    ("/apply-template", {}, "messages"), ("/apply-template", {"messages": []}, "messages"), ("/apply-template", {"messages": "a"}, "messages"),
    ("/apply-template", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/apply-template", {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": 1}, "add_generation_prompt"),
])
def test_wrong_token_requests(api, path, body, param):
    status, e = error(api.post(path, body))
    assert status == 400 and e["param"] == param, e


def test_apply_template(api):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there<|im_end|>"}]}]
    want = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|><|im_end|>\n"
    assert json.loads(api.post("/apply-template", {"messages": messages, "add_generation_prompt": False})[2]) == {"prompt": want}
    assert json.loads(api.post("/apply-template", {"messages": messages})[2]) == {"prompt": want + "<|im_start|>assistant\n"}
