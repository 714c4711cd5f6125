"""The same text whatever else runs: sixteen prompts at once, as many requests and as one, with chunked prefill, a cache that is
too small for all of them (so that sequences are preempted and computed again) and prefixes that are found in it, against each
prompt alone.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import os
from pathlib import Path

import pytest

from conftest import DEVICE, Daemon, until

REAL = Path(os.environ.get("PARLEY_TEST_MODEL") or Path.home() / ".cache/parley/SmolLM2-135M-Instruct.Q4_1.gguf")
TOPICS = ["rivers", "the moon", "bread", "chess", "winter", "trains", "music", "a lighthouse", "ants", "maps", "tea", "glass", "bridges", "salt", "kites", "clocks"]
# four of them share a long beginning
SHARED = "Here are the rules of the game. " + "Each player draws two cards and keeps one of them in the hand. " * 8


def messages(i):
    text = (SHARED if i % 4 == 0 else "") + f"Write a few sentences about {TOPICS[i]}. " + "Be exact and friendly. " * (i % 7 * 3)
    return [{"role": "user", "content": text}]


def answer(d, model, i, **options):
    body = {"model": model, "messages": messages(i), "temperature": 0, "max_tokens": 40, **options}
    status, _, text = d.request("POST", "/v1/chat/completions", body, timeout=300)
    assert status == 200, text
    return json.loads(text)


def content(reply):
    return reply["choices"][0]["message"]["content"]


def complete(d, prompts, max_tokens):
    """All prompts in one request, so that they are there together, however quick or slow the machine is."""
    body = {"model": "m", "prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert status == 200, text
    return [c["text"] for c in json.loads(text)["choices"]]


def compare(tmp_path, model, cache_mb, n_complete, **options):
    with_room = Daemon(tmp_path, "--alias", "m", "--max-sequences", "1", "--kv-cache-mb", str(cache_mb * 8), model=model).wait_ready()
    alone = [content(answer(with_room, "m", i, **options)) for i in range(16)]
    seeded = content(answer(with_room, "m", 1, temperature=0.9, seed=7, **options))
    prompts = [messages(i)[0]["content"] for i in range(16)]
    completed = [complete(with_room, [p], n_complete)[0] for p in prompts]
    assert with_room.stop() == 0

    crowded = Daemon(tmp_path, "--alias", "m", "--max-sequences", "16", "--batch-tokens", "48", "--kv-cache-mb", str(cache_mb), model=model).wait_ready()
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        futures = [pool.submit(answer, crowded, "m", i, **options) for i in range(16)]
        drawn = pool.submit(answer, crowded, "m", 1, temperature=0.9, seed=7, **options)
        together = [content(f.result()) for f in futures]
        assert content(drawn.result()) == seeded, "a seed gives the same text whatever else runs"
    assert together == alone
    # admission fills all but an eighth of the pages with prompts; before the first one ends each has grown by a page or more
    before = crowded.metrics()["parley_num_preemptions_total"]
    assert complete(crowded, prompts, n_complete) == completed
    assert crowded.metrics()["parley_num_preemptions_total"] > before
    # with nobody else there the second finds what the first computed, to the last token but one
    again = [answer(crowded, "m", 4, **options) for _ in range(2)]
    assert [content(a) for a in again] == [alone[4]] * 2
    assert again[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == again[1]["usage"]["prompt_tokens"] - 1
    until(crowded.idle)
    assert crowded.stop() == 0


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_real_model_together_as_alone(tmp_path):
    compare(tmp_path, REAL, 24, 80)


def test_tiny_model_together_as_alone(tmp_path, models):
    if DEVICE == "cuda-emulated":  # where every thread of a GPU takes its turn: as many tokens of cache, for answers of two or three pages
        model = models("tiniest-equality", "--ctx", "2048", "--layers", "2", "--embd", "64", "--heads", "2", "--kv-heads", "2", "--ff", "128")
        compare(tmp_path, model, 1, 80, max_tokens=80)
    else:
        model = models("tiny-equality", "--ctx", "2048", "--layers", "4", "--embd", "128", "--heads", "4", "--kv-heads", "2", "--ff", "256")
        compare(tmp_path, model, 2, 200, max_tokens=300)
