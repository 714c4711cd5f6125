"""Several whole models in one daemon: read when they are asked for, answering at once with their own vocabularies, leaving memory when others want
their place or nobody asked for long, and failing alone.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import os
import re
import shutil
import time

import pytest

from conftest import ROOT, SLOW, WORKER, Daemon, client_of, find_tool, until, upload

FIXTURES = ROOT / "tests/oracle/fixtures/adapter"
PROMPTS = ["Once upon a time", "The quick brown fox", "1, 2, 3, ", "Zwölf Boxkämpfer", "a " * 40, "fn main() {"]


@pytest.fixture(scope="session")
def three(models):
    """By name: other vocabularies, architectures and sizes."""
    return {"one": models("three-one", "--embd", 32, "--ff", 64), "two": models("three-two", "--tokenizer", "spm", "--seed", 2, "--layers", 3),
            "three": models("three-three", "--arch", "gpt2", "--seed", 3, "--ctx", 128)}


def complete(d, model, prompt="x", n=24, status=200, **options):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": n, "ignore_eos": True, "logprobs": 0, **options}
    got, headers, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert got == status, text
    return json.loads(text) if status == 200 else (json.loads(text)["error"], headers)


def tokens(reply):
    lp = reply["choices"][0]["logprobs"]
    return lp["tokens"], lp["token_logprobs"]


def further(three, *names):
    return [x for n in names for x in ("--add-model", f"{n}={three[n]}")]


def in_memory(d):
    """Name -> how often it was read."""
    text = d.get("/metrics")[2].decode()
    return {m[1]: int(m[2]) for m in re.finditer(r'^parley_model_loads_total{model_name="([^"]*)"} (\d+)$', text, re.M)}


def stream(d, model, n, prompt="Once"):
    c = d.connect(300)
    c.request("POST", "/v1/completions", json.dumps({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": n, "ignore_eos": True, "stream": True}),
              {"Content-Type": "application/json"})
    return c, c.getresponse()


def text_of(head, rest):
    events = [e for e in (head + rest).decode().split("\n\n") if e.startswith("data: {")]
    return "".join(json.loads(e[6:])["choices"][0]["text"] for e in events)


def test_interleaved_as_alone(start, three):
    expected = {}
    for name, path in three.items():
        alone = start("--alias", name, "--max-sequences", 1, "--speculation", "off", model=path)
        expected |= {(name, p): tokens(complete(alone, name, p)) for p in PROMPTS}
        assert alone.stop() == 0
    assert len({json.dumps(expected[n, PROMPTS[0]]) for n in three}) == 3
    d = start("--alias", "one", "--max-sequences", 4, "--batch-tokens", 32, *further(three, "two", "three"), model=three["one"])
    asked = list(expected) * 4
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda a: tokens(complete(d, *a)), asked))
    assert got == [expected[a] for a in asked]
    assert in_memory(d) == {"one": 1, "two": 1, "three": 1}
    listed = json.loads(d.get("/v1/models")[2])["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in listed] == [(n, n, None) for n in three] and listed[2]["max_model_len"] == 128
    assert listed[1] == json.loads(d.get("/v1/models/two")[2])
    error, _ = complete(d, "four", status=404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    prints = {complete(d, n)["system_fingerprint"] for n in three}
    assert len(prints) == 3


def test_the_other_routes_take_a_model(start, three):
    d = start("--alias", "one", *further(three, "two"), model=three["one"])
    ids = {}
    for model in (None, "one", "two"):
        body = {"content": "Hello world"} | ({"model": model} if model else {})
        status, _, text = d.post("/tokenize", body)
        assert status == 200, text
        ids[model] = json.loads(text)["tokens"]
        body = {"tokens": ids[model]} | ({"model": model} if model else {})
        assert json.loads(d.post("/detokenize", body)[2])["content"].strip() == "Hello world"
        body = {"messages": [{"role": "user", "content": "Hi"}]} | ({"model": model} if model else {})
        assert "Hi" in json.loads(d.post("/apply-template", body)[2])["prompt"]
    assert ids[None] == ids["one"] != ids["two"]
    for path, body in (("/tokenize", {"content": "x"}), ("/detokenize", {"tokens": [1]}), ("/apply-template", {"messages": [{"role": "user", "content": "x"}]})):
        assert d.post(path, body | {"model": "four"})[0] == 404 and d.post(path, body | {"model": 4})[0] == 400
    status, _, text = d.post("/v1/chat/completions", {"model": "two", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
    assert status == 200 and json.loads(text)["model"] == "two", text


def test_the_least_recently_used_makes_room(start, three):
    d = start("--alias", "one", "--max-models", 1, *further(three, "two", "three"), model=three["one"])
    first = {n: tokens(complete(d, n)) for n in three}
    assert in_memory(d) == {"one": 1, "three": 1}
    assert {n: tokens(complete(d, n)) for n in three} == first
    assert in_memory(d) == {"one": 1, "three": 2} and d.log.count("has left memory") == 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # all want the one place
        names = ["two", "three", "one"] * 10
        assert list(pool.map(lambda n: tokens(complete(d, n)), names)) == [first[n] for n in names]


def test_leaving_waits_for_a_stream(start, three, models):
    slow = models("models-slow", "--embd", 32, "--ff", 64, "--ctx", 16384, "--seed", 9)
    d = start("--alias", "one", "--max-models", 1, "--batch-tokens", 64, "--speculation", "off", "--add-model", f"slow={slow}", *further(three, "two"),
              model=three["one"])
    n = 3000
    whole = complete(d, "slow", "Once", n)["choices"][0]["text"]
    c, s = stream(d, "slow", n)
    head = s.readline()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(complete, d, "two")
        assert complete(d, "one")["model"] == "one"  # others go on
        assert "model slow has left memory" not in d.log and not waiting.done()
        assert text_of(head, s.read()) == whole
        assert waiting.result()["model"] == "two"
    assert in_memory(d) == {"one": 1, "two": 1}
    c.close()
    # a client that leaves while it waits, and a stream whose model is not there yet
    c, s = stream(d, "slow", n)
    head = s.readline()
    gone = d.connect(300)
    gone.request("POST", "/v1/completions", json.dumps({"model": "two", "prompt": "x"}), {"Content-Type": "application/json"})
    gone.close()
    c2 = d.connect(300)
    c2.request("POST", "/v1/completions", json.dumps({"model": "two", "prompt": "x", "max_tokens": 5, "ignore_eos": True, "stream": True}),
               {"Content-Type": "application/json"})
    assert text_of(head, s.read()) == whole
    s2 = c2.getresponse()
    assert s2.status == 200 and s2.getheader("Content-Type").startswith("text/event-stream") and s2.read().endswith(b"data: [DONE]\n\n")
    c.close(), c2.close()


def test_idle_models_leave(start, three):
    d = start("--alias", "one", "--model-idle-timeout", 1, *further(three, "two"), model=three["one"])
    before = tokens(complete(d, "two"))
    until(lambda: in_memory(d) == {"one": 1}, 20)
    assert tokens(complete(d, "two")) == before and in_memory(d) == {"one": 1, "two": 2}


def test_adapters_of_a_further_model(start, three, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(FIXTURES, folder)
    with_first = start("--alias", "one", "--adapter", f"a={folder / 'llama-all'}", model=three["one"])
    expected = {m: tokens(complete(with_first, m)) for m in ("one", "a")}
    d = start("--alias", "two", "--max-models", 1, "--adapter-dir", folder, *further(three, "one", "three"), "--adapter", f"a@one={folder / 'llama-all'}",
              model=three["two"])
    assert {m: tokens(complete(d, m)) for m in ("a", "one")} == expected
    listed = {m["id"]: (m["parent"], m["root"]) for m in json.loads(d.get("/v1/models")[2])["data"]}
    assert listed == {"two": (None, "two"), "one": (None, "one"), "a": ("one", "one"), "three": (None, "three")}
    for body, status, word in (({"lora_name": "b", "lora_path": "llama-all", "base_model_name": "one"}, 200, ""),
                               ({"lora_name": "b", "lora_path": "llama-all"}, 400, "belongs to another model"),
                               ({"lora_name": "c", "lora_path": "gpt2-all", "base_model_name": "one"}, 400, "belongs to a gpt2 model"),
                               ({"lora_name": "three", "lora_path": "llama-all", "base_model_name": "one"}, 400, "base model's name"),
                               ({"lora_name": "c", "lora_path": "llama-all", "base_model_name": "a"}, 400, "no whole model"),
                               ({"lora_name": "c", "lora_path": "llama-all", "base_model_name": 1}, 400, "must be a string")):
        got, _, text = d.post("/v1/load_lora_adapter", body)
        assert got == status and word in text.decode(), (body, text)
    assert [(x["id"], x["base_model_name"]) for x in json.loads(d.get("/v1/lora_adapters")[2])["data"]] == [("a", "one"), ("b", "one")]
    complete(d, "three")  # and the adapters leave with their model …
    assert json.loads(d.get("/v1/lora_adapters")[2])["data"] == []
    assert {m: tokens(complete(d, m)) for m in ("b", "one", "a")} == {"b": expected["a"], **expected}  # … and come back
    assert d.post("/v1/unload_lora_adapter", {"lora_name": "b"})[0] == 200
    complete(d, "b", status=404)
    complete(d, "three")
    complete(d, "b", status=404)


def test_a_broken_model_fails_alone(start, three, tmp_path):
    broken, missing, cut = tmp_path / "broken.gguf", tmp_path / "missing.gguf", tmp_path / "cut.gguf"
    broken.write_bytes(b"GGUF" + bytes(200))
    cut.write_bytes(three["three"].read_bytes()[:-100])
    d = start("--alias", "one", *(x for n, p in (("broken", broken), ("missing", missing), ("cut", cut)) for x in ("--add-model", f"{n}={p}")),
              "--adapter", f"x@two={tmp_path}", *further(three, "two"), model=three["one"])
    for name, word in (("broken", "broken.gguf"), ("missing", "missing.gguf"), ("cut", "cut.gguf"), ("x", "adapter_config.json")):
        error, headers = complete(d, name, status=500)
        assert error["code"] == "model_load_failed" and word in error["message"] and headers["x-should-retry"] == "false", error
    for name in "one", "two":
        assert complete(d, name)["model"] == name
    assert d.get("/health")[0] == 200 and "model broken cannot be served" in d.log
    assert [m["id"] for m in json.loads(d.get("/v1/models")[2])["data"]] == ["one", "two", "x"] and d.get("/v1/models/cut")[0] == 404
    shutil.copy(three["three"], missing)  # mended while the daemon runs
    assert complete(d, "missing")["model"] == "missing"
    assert "missing" in [m["id"] for m in json.loads(d.get("/v1/models")[2])["data"]]


def test_a_model_that_is_cut_off_while_it_serves(start, three, tmp_path):
    """`cp new.gguf model.gguf` cuts the file that the daemon has in memory: its clients are told, and it ends to be started again."""
    path = tmp_path / "model.gguf"
    shutil.copy(three["one"], path)
    d = start("--alias", "one", *further(three, "two"), model=path)
    complete(d, "one")
    os.truncate(path, 0)
    error, _ = complete(d, "one", status=503)
    assert error["code"] == "device_failed" and "cut off while it was used" in error["message"] and "renaming" in error["message"], error
    assert d.process.wait(20 * SLOW) == 3, d.log


def larger_than_memory(model, path):
    """The model as a file of more bytes than any machine has; most of it is a hole."""
    shutil.copy(model, path)
    try:
        os.truncate(path, 1 << 43)
    except OSError as e:
        pytest.skip(f"no sparse files here: {e}")
    return path


def test_no_memory_is_that_models_fault(start, three, tmp_path):
    huge = larger_than_memory(three["two"], tmp_path / "huge.gguf")
    d = start("--alias", "one", "--add-model", f"huge={huge}", *further(three, "two"), model=three["one"])
    complete(d, "two")
    error, headers = complete(d, "huge", status=503)
    assert error["code"] == "out_of_memory" and "MiB are free" in error["message"] and int(headers["retry-after"]) > 0
    assert in_memory(d) == {"one": 1}  # what nobody used made room, in vain
    assert complete(d, "one")["model"] == "one" and complete(d, "two")["model"] == "two"


def test_memory_of_a_model_that_is_done(start, three, tmp_path):
    """One that has answered all it was asked, but is held by a client that still reads, may leave in a moment: who lacks its memory waits for that."""
    huge = larger_than_memory(three["two"], tmp_path / "huge.gguf")
    d = start("--alias", "one", "--add-model", f"huge={huge}", *further(three, "two"), "--max-sequences", 128, model=three["one"])
    complete(d, "two")
    body = json.dumps({"model": "two", "prompt": ["x"] * 16, "n": 8, "max_tokens": 400, "ignore_eos": True, "logprobs": 5}).encode()
    with d.socket(60) as s, concurrent.futures.ThreadPoolExecutor(5) as pool:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: d.metrics()["parley_generation_tokens_total"] >= 51200 and d.idle(), 60)
        began = time.monotonic()
        waiting = [pool.submit(complete, d, "huge", status=503) for _ in range(5)]
        time.sleep(0.2)
        assert in_memory(d) == {"one": 1, "two": 1}
        while s.recv(1 << 20):
            pass
        assert all(w.result()[0]["code"] == "out_of_memory" for w in waiting) and time.monotonic() - began >= 0.2
    assert in_memory(d) == {"one": 1}


def test_stopping_while_one_waits(start, three, models):
    slow = models("models-slow", "--embd", 32, "--ff", 64, "--ctx", 16384, "--seed", 9)
    d = start("--alias", "one", "--max-models", 1, "--drain-timeout", 1, "--speculation", "off", "--add-model", f"slow={slow}", *further(three, "two"),
              model=three["one"])
    c, s = stream(d, "slow", 16000)
    s.readline()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(d.request, "POST", "/v1/completions", {"model": "two", "prompt": "x"})
        until(lambda: d.metrics()["parley_http_requests_active"] >= 3)
        assert d.stop() == 0
        try:
            assert waiting.result()[0] == 503
        except (ConnectionError, OSError, AssertionError):
            pass
    c.close()


def test_a_cache_of_nothing(start, three, models):
    """What the bound leaves of a model's cache is too little to answer with: that is said with what to set."""
    deep = models("models-deep", "--layers", 32, "--embd", 256, "--ff", 32)
    d = start("--alias", "one", "--model-kv-cache-mb", 1, "--kv-type", "f32", "--add-model", f"deep={deep}", *further(three, "two"), model=three["one"])
    complete(d, "two")
    error, headers = complete(d, "deep", status=503)
    assert error["param"] == "model-kv-cache-mb" and "model-kv-cache-mb is 1" in error["message"] and "raise it to 2" in error["message"], error
    assert in_memory(d) == {"one": 1, "two": 1}  # nobody makes room for it in vain


@pytest.fixture
def slowly(tmp_path):
    """Reads of files with some text in their path take long: the environment for a daemon, and the function that says so."""
    rules = tmp_path / "faults"
    env = {"LD_PRELOAD": str(find_tool("faults.so").resolve()), "FAULTS": str(rules), "ASAN_OPTIONS": "verify_asan_link_order=0"}
    return env, lambda ms, text: rules.write_text(f"read {ms} {text}\n")


def asked(d, path, body):
    """A request that nobody waits for yet."""
    c = d.connect(300)
    c.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return c


def answer(c):
    r = c.getresponse()
    text = r.read()
    c.close()
    return r.status, json.loads(text)


def test_reading_adapters_keeps_nobody_waiting(start, three, slowly):
    """Operators' adapters that take long to read leave the threads of HTTP to others."""
    env, slow = slowly
    d = start("--alias", "one", "--adapter-dir", FIXTURES, model=three["one"], env=env)
    before = tokens(complete(d, "one"))
    slow(int(1000 * SLOW), "llama-all/adapter_config.json")
    loads = [asked(d, "/v1/load_lora_adapter", {"lora_name": f"a{i}", "lora_path": "llama-all"}) for i in range(8)]
    gone = asked(d, "/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": "llama-all"})
    assert tokens(complete(d, "one")) == before and d.get("/health")[0] == 200 and complete(d, "a7", status=404)
    assert "adapter a0: " not in d.log  # none of them was there yet
    assert d.post("/v1/unload_lora_adapter", {"lora_name": "a0"})[0] == 404
    gone.close()
    slow(0, "-")
    assert [answer(c)[0] for c in loads] == [200] * 8
    names = {m["id"] for m in json.loads(d.get("/v1/models")[2])["data"]}
    assert {"one", *(f"a{i}" for i in range(8))} <= names
    first = tokens(complete(d, "a0"))
    assert first != before and all(tokens(complete(d, f"a{i}")) == first for i in range(8))


def test_jobs_go_on_while_a_model_is_read(start, tiny, three, slowly):
    """Jobs go on, and are told of, while the registry's thread is held up by a file; what they made is served when that is over."""
    env, slow = slowly
    d = start("--alias", "one", "--train-worker", WORKER, *further(three, "two"), model=tiny, env=env)
    c = client_of(d)
    file = upload(c)
    slow(600_000, three["two"].name)
    waits = asked(d, "/v1/completions", {"model": "two", "prompt": "x", "max_tokens": 1})
    until(lambda: d.metrics()["parley_http_requests_active"] >= 2)
    time.sleep(0.5)  # for the registry's thread to begin
    jobs = [c.fine_tuning.jobs.create(model="one", training_file=file.id) for _ in range(3)]
    def trained(job):
        return "training from step 1" in str([e.message for e in c.fine_tuning.jobs.list_events(job.id, limit=100)])
    def made():
        return [m.id for m in c.models.list() if m.id.startswith("ft:")]
    until(lambda: all(map(trained, jobs)) and len(made()) == 3, 60)
    assert d.log.count("is in memory") == 0 and not any("succeeded" in line for line in d.log.splitlines())
    assert c.fine_tuning.jobs.cancel(jobs[2].id).status == "cancelled"
    states = [c.fine_tuning.jobs.retrieve(j.id).status for j in jobs]
    assert states == ["running", "running", "cancelled"], states
    slow(0, "-")
    assert answer(waits)[0] == 200
    until(lambda: all(c.fine_tuning.jobs.retrieve(j.id).status == "succeeded" for j in jobs[:2]), 60)
    until(lambda: d.log.count("is not served: ") == 2)  # the script's adapters are empty files
    assert made() == []  # nor the one that was cancelled meanwhile


def test_storm(start, models):
    """Models that want one place, adapters that come, are replaced and go, clients that leave, and who looks on: each answer is one that its name
    could mean."""
    shape = ["--embd", 32, "--ff", 64]
    files = {"one": models("three-one", *shape), "two": models("storm-two", *shape, "--seed", 2), "three": models("storm-three", *shape, "--seed", 3)}
    folders = ["llama-all", "llama-patterns"]
    d = start("--alias", "one", "--max-models", 1, "--max-adapters", 3, "--model-idle-timeout", 1, "--max-sequences", 8, "--batch-tokens", 32,
              "--adapter-dir", FIXTURES, *further(files, "two", "three"), "--adapter", f"a@two={FIXTURES / 'llama-all'}", "--adapter", f"b@two={FIXTURES / 'llama-patterns'}",
              model=files["one"])
    expected = {n: [tokens(complete(d, n, "x", 8))] for n in ("one", "two", "three", "a", "b")}
    expected["moving"] = []
    for folder in folders:
        assert d.post("/v1/load_lora_adapter", {"lora_name": "moving", "lora_path": folder, "base_model_name": "three", "load_inplace": True})[0] == 200
        expected["moving"] += [tokens(complete(d, "moving", "x", 8))]

    def act(i):
        if i % 7 == 3:
            body = {"lora_name": "moving", "lora_path": folders[i % 2], "base_model_name": "three", "load_inplace": True}
            status, _, text = d.post("/v1/load_lora_adapter", body)
            return status == 200 or b"was deleted as it was replaced" in text
        if i % 14 == 5:
            return d.post("/v1/unload_lora_adapter", {"lora_name": "moving"})[0] in (200, 404)
        if i % 7 == 6:
            return all(d.get(path)[0] == 200 for path in ("/metrics", "/v1/models", "/v1/lora_adapters", "/health"))
        name = [*expected][i % 6]
        body = {"model": name, "prompt": "x", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
        if i % 11 == 9:
            asked(d, "/v1/completions", {**body, "max_tokens": 90, "stream": i % 2 == 0}).close()
            return True
        status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
        return tokens(json.loads(text)) in expected[name] if status == 200 else status == 404 and name == "moving"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(act, range(200)))
    until(d.idle, 20)


@pytest.mark.parametrize("what", ["first", "further", "adapter"])
def test_stopping_while_one_is_read(tmp_path, three, slowly, what):
    env, slow = slowly
    args = ["--alias", "one", "--add-model", f"two={three['two']}", "--adapter-dir", FIXTURES, "--drain-timeout", 300]
    slow(600_000, {"first": three["one"].name, "further": three["two"].name, "adapter": "adapter_config.json"}[what])
    d = Daemon(tmp_path, *args, model=three["one"], env=env).wait_listening()
    if what == "first":
        until(lambda: d.get("/health")[0] == 503)
    else:
        d.wait_ready()
        waits = [asked(d, "/v1/completions", {"model": "two", "prompt": "x"}) if what == "further" else
                 asked(d, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "llama-all"}) for _ in range(3)]
        until(lambda: d.metrics()["parley_http_requests_active"] >= 4)
        time.sleep(0.5 * SLOW)  # for the registry's thread to begin
    assert d.stop(seconds=8) == 0, d.log
    if what != "first":
        for c in waits:
            status, body = answer(c)
            assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert "stopped in the middle of reading" in d.log


def test_wrong_settings(three, tmp_path):
    for args, word in ((["--adapter", "\udcff@two=/x", "--add-model", f"two={three['two']}"], "UTF-8"), (["--adapter", "\udcff=/x"], "UTF-8"),
                       (["--adapter", "a\tb@two=/x", "--add-model", f"two={three['two']}"], "control characters"),
                       (["--add-model", f"\udcfe={three['two']}"], "UTF-8"), (["--adapter", "@one=/x"], "1 to 255"),
                       (["--max-adapters", 1, "--add-model", f"two={three['two']}", "--adapter", "a@two=/x", "--adapter", "b@two=/x"], "max-adapters (1)"),
                       (["--add-model", f"one={three['two']}"], "already"), (["--add-model", f"ft:x={three['two']}"], "ft:"), (["--add-model", "x"], "NAME=PATH"),
                       (["--adapter", "a@four=/x"], "no model 'four'"), (["--adapter", "two=/x", "--add-model", f"two={three['two']}"], "base model's name")):
        d = Daemon(tmp_path, "--alias", "one", *args, model=three["one"])
        assert d.process.wait(60 * SLOW) == 2, d.log
        assert word in d.log, d.log
