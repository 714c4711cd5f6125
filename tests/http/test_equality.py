"""The same text whatever else runs: sixteen prompts at once, with chunked prefill, a cache that is too small for all of them
(so that sequences are preempted and computed again) and prefixes that are found in it, against each prompt alone.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import os
from pathlib import Path

import pytest

from conftest import Daemon, until

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


def compare(tmp_path, model, cache_mb, n_alone, **options):
    with_room = Daemon(tmp_path, "--alias", "m", "--max-sequences", "1", "--kv-cache-mb", str(cache_mb * 8), model=model).wait_ready()
    alone = [content(answer(with_room, "m", i, **options)) for i in range(n_alone)]
    seeded = content(answer(with_room, "m", 1, temperature=0.9, seed=7, **options))
    assert with_room.stop() == 0
    crowded = Daemon(tmp_path, "--alias", "m", "--max-sequences", "16", "--batch-tokens", "48", "--kv-cache-mb", str(cache_mb), model=model).wait_ready()
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        futures = [pool.submit(answer, crowded, "m", i, **options) for i in range(n_alone)]
        drawn = pool.submit(answer, crowded, "m", 1, temperature=0.9, seed=7, **options)
        together = [content(f.result()) for f in futures]
        assert content(drawn.result()) == seeded, "a seed gives the same text whatever else runs"
    m = crowded.metrics()
    again = answer(crowded, "m", 4, **options)
    until(crowded.idle)
    assert crowded.stop() == 0
    assert together == alone
    assert content(again) == alone[4]
    return m


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_real_model_together_as_alone(tmp_path):
    m = compare(tmp_path, REAL, 24, 16)
    print({k: v for k, v in m.items() if "preempt" in k or "prefix" in k})
    assert m["parley_num_preemptions_total"] > 0
    assert m["parley_prefix_cache_hits_total"] > 0


def test_tiny_model_together_as_alone(tmp_path, models):
    model = models("tiny-equality", "--ctx", "2048", "--layers", "4", "--embd", "128", "--heads", "4", "--kv-heads", "2", "--ff", "256")
    m = compare(tmp_path, model, 2, 16, max_tokens=300)  # long enough that they meet, however quick the machine is
    assert m["parley_num_preemptions_total"] > 0
