"""Adapters beside the base model: chosen by name, mixed in one batch, loaded and unloaded while requests run, never mixed in the
prefix cache. The adapters are those that PEFT has saved for tiny models (tests/oracle/make_adapter.py).

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import os
import re
import shutil

import pytest

from conftest import DEVICE, ROOT, SLOW, Daemon, device_args, until

FIXTURES = ROOT / "tests/oracle/fixtures/adapter"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="session")
def base(models):
    return models("adapter-base", "--embd", 32, "--ff", 64)


def complete(d, model, prompt=PROMPT, max_tokens=24, **options):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **options}
    status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert status == 200, text
    return json.loads(text)


def text_of(reply):
    return reply["choices"][0]["text"]


def tokens_of(reply):
    """What is sampled and its log-probabilities: closer than text, which a tiny model's bytes hide."""
    lp = reply["choices"][0]["logprobs"]
    return lp["tokens"], lp["token_logprobs"]


def two(*more):
    return ["--alias", "base", "--adapter", f"a={FIXTURES / 'llama-all'}", "--adapter", f"b={FIXTURES / 'llama-patterns'}", *more]


def test_chosen_by_name(start, base):
    d = start(*two("--adapter", f"a:2={FIXTURES / 'llama-all.gguf'}"), model=base)
    listed = json.loads(d.get("/v1/models")[2])["data"]
    assert [m["id"] for m in listed] == ["base", "a", "b", "a:2"]
    assert [(m["parent"], m["root"]) for m in listed] == [(None, "base")] + [("base", "base")] * 3
    assert listed[1].keys() == listed[0].keys()
    assert json.loads(d.get("/v1/models/a%3A2")[2]) == listed[3]
    replies = {m: complete(d, m, logprobs=1) for m in ("base", "a", "b", "a:2")}
    assert all(r["model"] == m for m, r in replies.items())
    assert tokens_of(replies["a"]) == tokens_of(replies["a:2"])
    assert len({json.dumps(tokens_of(replies[m])) for m in ("base", "a", "b")}) == 3
    prints = {m: r["system_fingerprint"] for m, r in replies.items()}
    assert prints["a"] == prints["a:2"] and len(set(prints.values())) == 3
    chat = json.loads(d.post("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})[2])
    assert chat["model"] == "a"
    for path, body in (("/v1/completions", {"model": "c", "prompt": "x"}),
                       ("/v1/chat/completions", {"model": "A", "messages": [{"role": "user", "content": "Hi"}]})):
        status, _, text = d.post(path, body)
        error = json.loads(text)["error"]
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert d.get("/v1/models/c")[0] == 404


def jobs():
    """Models, prompts and options that make all kinds of steps: long and short prompts, repetition for guesses, sampling."""
    out = []
    for i in range(18):
        prompt = (PROMPT[: 30 * (i % 5)] + f"Number {i}. " + "again and " * (i % 4 * 5)).strip()
        out.append((("base", "a", "b")[i % 3], prompt, dict(max_tokens=20 + 5 * (i % 6), logprobs=2, **({"temperature": 0.8, "seed": i} if i % 5 == 4 else {}))))
    return out


@pytest.mark.parametrize("device", ["cpu", "cpu-avx2", "cpu-ref"] if not DEVICE else [DEVICE])
def test_mixed_batch(start, base, device):
    """Base and two adapters at once, with few pages, small steps and guesses: each answer is what it is alone."""
    if device == "cpu-avx2" and " avx2 " not in open("/proc/cpuinfo").read():
        pytest.skip("not on this processor")
    alone = start(*two(*device_args(device), "--max-sequences", 1, "--speculation", "off"), model=base)
    expected = [tokens_of(complete(alone, m, p, **o)) for m, p, o in jobs()]
    crowd = start(*two(*device_args(device), "--max-sequences", 16, "--batch-tokens", 48, "--kv-cache-mb", 1, "--speculation-max-seqs", 16), model=base)
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        futures = [pool.submit(complete, crowd, m, p, **o) for m, p, o in jobs() * 3]
        got = [tokens_of(f.result()) for f in futures]
    assert got == expected * 3


def test_prefix_cache_is_not_shared(start, base):
    d = start(*two("--adapter-dir", FIXTURES), model=base)

    def cached(model):
        reply = complete(d, model, logprobs=0)
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"], tokens_of(reply)
    first = {m: cached(m) for m in ("base", "a", "b")}
    again = {m: cached(m) for m in ("base", "a", "b")}
    assert [first[m][0] for m in first] == [0, 0, 0]
    assert all(again[m][0] > 0 and again[m][1] == first[m][1] for m in again)
    # with log-probabilities of the prompt nothing is looked up, but what is computed is kept, under the right name
    complete(d, "a", "x" * 200, echo=True, logprobs=0, max_tokens=1)
    assert complete(d, "b", "x" * 200)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert complete(d, "a", "x" * 200)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # another adapter under the same name, in the same slot
    assert d.post("/v1/unload_lora_adapter", {"lora_name": "a"})[0] == 200
    assert d.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "llama-patterns"})[0] == 200
    n, tokens = cached("a")
    assert n == 0 and tokens == first["b"][1]


def test_load_and_unload(start, base, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(FIXTURES, folder)
    outside = tmp_path / "outside"
    shutil.copytree(FIXTURES / "llama-all", outside)
    os.symlink(outside, folder / "link")
    (folder / "empty").mkdir()
    d = start("--alias", "base", "--adapter-dir", folder, "--max-adapters", 3, model=base)

    def load(name, path, **more):
        status, _, text = d.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})
        return status, json.loads(text)
    plain = tokens_of(complete(d, "base", logprobs=0))
    status, model = load("one", "llama-all")
    assert status == 200 and (model["id"], model["parent"], model["object"]) == ("one", "base", "model")
    assert load("two", folder / "llama-patterns")[0] == 200
    assert load("three", "sub/../llama-all.gguf")[0] == 400  # no folder "sub"
    assert load("three", "./llama-all.gguf")[0] == 200
    assert [m["id"] for m in json.loads(d.get("/v1/models")[2])["data"]] == ["base", "one", "two", "three"]
    one, two_, three = (tokens_of(complete(d, m, logprobs=0)) for m in ("one", "two", "three"))
    assert one == three != two_ != plain != one
    status, error = load("four", "llama-all")
    assert status == 400 and "max-adapters" in error["error"]["message"]
    assert d.post("/v1/unload_lora_adapter", {"lora_name": "three"})[0] == 200
    assert d.post("/v1/completions", {"model": "three", "prompt": "x"})[0] == 404
    status, _, text = d.post("/v1/unload_lora_adapter", {"lora_name": "three"})
    assert status == 404 and json.loads(text)["error"]["param"] == "lora_name"
    until(lambda: len(json.loads(d.get("/v1/lora_adapters")[2])["data"]) == 2)
    listed = json.loads(d.get("/v1/lora_adapters")[2])["data"]
    assert listed[0]["path"] == str(folder / "llama-all") and listed[0]["status"] == "loaded" and listed[0]["max_rank"] == 4
    for name, path, more, param, word in (
            ("one", "llama-all", {}, "lora_name", "unload it first"),
            ("base", "llama-all", {}, "lora_name", "base model's name"),
            ("", "llama-all", {}, "lora_name", "not empty"),
            ("x" * 256, "llama-all", {}, "lora_name", "255 bytes"),
            ("a\nb", "llama-all", {}, "lora_name", "control characters"),
            ("x", "", {}, "lora_path", "not empty"),
            ("x", "missing", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", "..", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", "../outside", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", outside, {}, "lora_path", "inside the server's adapter-dir"),
            ("x", "link", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", "/etc/passwd", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", ".", {}, "lora_path", "inside the server's adapter-dir"),
            ("x", "empty", {}, "lora_path", "adapter_config.json"),
            ("x", "gpt2-all", {}, "lora_path", "belongs to a gpt2 model"),
            ("x", "gpt2-all.gguf", {}, "lora_path", "gpt2"),
            ("x", "logits.bin", {}, "lora_path", "not a GGUF file"),
            ("x", "llama-all", {"load_inplace": 1}, "load_inplace", "boolean"),
            ("x", "llama-all", {"base_model_name": "y"}, "base_model_name", "no whole model 'y'"),
            ("x", "llama-all", {"rank": 4}, "rank", "not a field")):
        status, error = load(name, path, **more)
        assert status == 400 and error["error"]["param"] == param and word in error["error"]["message"], (name, path, error)
    for body in ({}, {"lora_name": 7, "lora_path": "x"}, {"lora_name": "x"}, {"lora_name": "x", "lora_path": None}, [1]):
        assert d.post("/v1/load_lora_adapter", body)[0] == 400
    assert d.post("/v1/unload_lora_adapter", {})[0] == 400
    # in place: the name means the new values at once, the old ones go
    assert load("one", "llama-patterns", load_inplace=True)[0] == 200
    assert tokens_of(complete(d, "one", logprobs=0)) == two_
    assert tokens_of(complete(d, "base", logprobs=0)) == plain
    shutil.rmtree(folder / "llama-patterns")  # it is in memory
    assert tokens_of(complete(d, "two", logprobs=0)) == two_


def test_who_may(start, base):
    d = start(*two("--api-key", "user-key-1", "--admin-key", "admin-key-1", "--adapter-dir", FIXTURES), model=base)
    user, admin = ({"Authorization": f"Bearer {k}"} for k in ("user-key-1", "admin-key-1"))
    for method, path, body in (("POST", "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "llama-all"}),
                               ("GET", "/v1/lora_adapters", None),
                               ("POST", "/v1/unload_lora_adapter", {"lora_name": "c"})):
        assert d.request(method, path, body)[0] == 401
        assert d.request(method, path, body, user)[0] == 403
        assert d.request(method, path, body, admin)[0] == 200
    assert [m["id"] for m in json.loads(d.get("/v1/models", user)[2])["data"]] == ["base", "a", "b"]
    off = start("--alias", "base", model=base)
    status, _, text = off.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(FIXTURES / "llama-all")})
    assert status == 403 and "--adapter-dir" in json.loads(text)["error"]["message"]


def test_unload_waits_for_its_requests(start, models):
    """A stream goes on to its end with the adapter that it began with; meanwhile its name means nothing, or something else."""
    big = models("adapter-slow", "--embd", 32, "--ff", 64, "--ctx", 16384)
    d = start(*two("--adapter-dir", FIXTURES, "--batch-tokens", 64, "--speculation", "off"), model=big)
    n = 400 if DEVICE == "cuda-emulated" else 3000
    expected = text_of(complete(d, "a", "Once", n))
    expected_b = text_of(complete(d, "b", "Once", n))
    assert expected != expected_b
    connections = [d.connect(300) for _ in range(3)]
    streams = []
    for c in connections:
        c.request("POST", "/v1/completions", json.dumps({"model": "a", "prompt": "Once", "temperature": 0, "max_tokens": n, "ignore_eos": True,
                                                         "stream": True}), {"Content-Type": "application/json"})
        streams.append(c.getresponse())
    heads = [s.readline() for s in streams]
    assert d.post("/v1/unload_lora_adapter", {"lora_name": "a"})[0] == 200
    assert d.post("/v1/completions", {"model": "a", "prompt": "x"})[0] == 404
    listed = json.loads(d.get("/v1/lora_adapters")[2])["data"]
    assert d.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "llama-patterns"})[0] == 200
    texts = []
    reload_text = text_of(complete(d, "a", "Once", n))
    streams[2].close(), connections[2].close()  # one client leaves
    for head, s in list(zip(heads, streams))[:2]:
        events = [e for e in (head + s.read()).decode().split("\n\n") if e.startswith("data: {")]
        texts.append("".join(json.loads(e[6:])["choices"][0]["text"] for e in events))
    assert texts == [expected] * 2
    assert reload_text == expected_b
    assert [(x["id"], x["status"]) for x in listed][0] == ("a", "unloading") and listed[0]["requests"] >= 2
    until(lambda: [x["id"] for x in json.loads(d.get("/v1/lora_adapters")[2])["data"]] == ["b", "a"])
    assert "adapter a has left" in d.log


def test_storm(start, base):
    """Loading, replacing and unloading while requests of all kinds run: each answer is one that its name could mean."""
    d = start(*two("--adapter-dir", FIXTURES, "--max-sequences", 8, "--batch-tokens", 32), model=base)
    prompts = [f"Story {i}. " + "and so on " * i for i in range(6)]
    by = {m: [tokens_of(complete(d, m, p, logprobs=0)) for p in prompts] for m in ("base", "a", "b")}

    def ask(i):
        name = ("base", "b", "moving")[i % 3]
        body = {"model": name, "prompt": prompts[i % 6], "temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 0}
        status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
        if status == 404 and name == "moving":
            return True
        assert status == 200, text
        got = tokens_of(json.loads(text))
        return got in ([by[name][i % 6]] if name != "moving" else [by["a"][i % 6], by["b"][i % 6]])

    def move(i):
        if i % 3 == 2:
            return d.post("/v1/unload_lora_adapter", {"lora_name": "moving"})[0] in (200, 404)
        body = {"lora_name": "moving", "lora_path": ("llama-all", "llama-patterns")[i % 2], "load_inplace": True}
        return d.post("/v1/load_lora_adapter", body)[0] in (200, 400)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda i: move(i // 4) if i % 4 == 0 else ask(i), range(240)))
    assert all(results)
    until(d.idle)
    names = [x["id"] for x in json.loads(d.get("/v1/lora_adapters")[2])["data"]]
    assert len(names) <= 3


def test_metrics_by_model(start, base):
    d = start(*two(), model=base)
    complete(d, "a", max_tokens=5)
    complete(d, "a", max_tokens=5)
    complete(d, "base", max_tokens=3)
    until(d.idle)
    text = d.get("/metrics")[2].decode()

    def value(name, model):
        return float(re.search(rf'^parley_{name}{{model_name="{model}"[^}}]*}} (\S+)$', text, re.M).group(1))
    assert [value("generation_tokens_total", m) for m in ("base", "a", "b")] == [3, 10, 0]
    assert [value("time_to_first_token_seconds_count", m) for m in ("base", "a", "b")] == [1, 2, 0]
    assert value("prompt_tokens_total", "a") == 2 * value("prompt_tokens_total", "base") > 0
    assert value("adapter_requests", "a") == 0 and value("adapters_loaded", "base") == 2
    assert len(re.findall(r"^# TYPE parley_generation_tokens_total ", text, re.M)) == 1


def test_bad_adapters_at_start(base, tmp_path):
    for value, word in ((f"x={tmp_path / 'missing'}", "missing"), (f"x={FIXTURES / 'gpt2-all'}", "belongs to a gpt2 model"),
                        (f"base={FIXTURES / 'llama-all'}", "base model's name"), ("justpath", "NAME=PATH")):
        d = Daemon(tmp_path, "--alias", "base", "--adapter", value, model=base)
        assert d.process.wait(60 * SLOW) == 2, d.log
        assert word in d.log, d.log
    d = Daemon(tmp_path, "--alias", "base", "--adapter", f"x={FIXTURES / 'llama-all'}", "--adapter", f"x={FIXTURES / 'llama-all'}", model=base)
    assert d.process.wait(60 * SLOW) == 2 and "there already" in d.log, d.log
