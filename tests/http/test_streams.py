"""Hundreds of streams at once on one daemon: all are taken, wait their turn parked, and finish.

SPDX-License-Identifier: Apache-2.0
"""
import json
import resource
import selectors
import socket

import pytest

from conftest import PARLEYD, SLOW, until

N, TOKENS = 400, 24


def request(max_tokens, stream=True):
    body = json.dumps({"model": "long", "prompt": "a b c", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def descriptors():
    """descriptors(n): the limit on open files, as it was again after the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_hundreds_of_streams(start, long, descriptors):
    descriptors(256)  # the daemon raises its own limit
    d = start("--max-sequences", 16, "--speculation", "off", model=long)
    descriptors(min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 2 * N + 100))
    assert "max-connections lowered" not in d.log
    memory = d.metrics()["process_resident_memory_bytes"]
    # the sixteen places are taken by long answers, so that every stream waits first; no streams, which would be parked unread
    busy = [d.socket(60) for _ in range(16)]
    for s in busy:
        s.sendall(request(15000, stream=False))
    until(lambda: d.metrics()["parley_num_requests_running"] == 16)
    got = {}
    for _ in range(N):
        s = socket.create_connection(("127.0.0.1", d.port), timeout=60 * SLOW)
        s.sendall(request(TOKENS))
        got[s] = b""
    until(lambda: d.metrics()["parley_num_requests_waiting"] == N, 20)
    grown = (d.metrics()["process_resident_memory_bytes"] - memory) / N
    assert d.get("/v1/models")[0] == 200
    for s in busy:
        s.close()
    with selectors.DefaultSelector() as ready:
        for s in got:
            ready.register(s, selectors.EVENT_READ)
        while ready.get_map():
            events = ready.select(60 * SLOW)
            assert events, f"{len(ready.get_map())} streams stand still"
            for key, _ in events:
                piece = key.fileobj.recv(65536)
                got[key.fileobj] += piece
                if not piece:
                    ready.unregister(key.fileobj)
                    key.fileobj.close()
    for answer in got.values():
        assert answer.startswith(b"HTTP/1.1 200 ") and b"data: [DONE]" in answer and b'"finish_reason":"length"' in answer
    if not any(k in str(PARLEYD) for k in ("asan", "tsan")):
        print(f"a parked stream takes {grown / 1024:.0f} KiB")
        assert grown < 128 << 10, f"a parked stream takes {grown / 1024:.0f} KiB"
    until(d.idle)


def test_answers_are_bounded(start, models):
    """What many choices and log-probabilities add up to is refused before it fills the memory; the same as a stream is not."""
    d = start(model=models("wordy", "--ctx", 4096))
    body = {"model": "wordy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2000, "ignore_eos": True, "n": 40, "logprobs": True, "top_logprobs": 20}
    status, _, text = d.request("POST", "/v1/chat/completions", body, timeout=120)
    assert status == 400 and json.loads(text)["error"]["param"] == "n" and "60 MiB" in json.loads(text)["error"]["message"], text[:300]
    until(d.idle)
    body = {"model": "wordy", "prompt": [7] * 4000, "max_tokens": 1, "n": 120, "echo": True, "logprobs": 1}
    status, _, text = d.request("POST", "/v1/completions", body)
    assert status == 400 and "4000 prompt tokens" in json.loads(text)["error"]["message"], text[:300]
    assert d.request("POST", "/v1/completions", {**body, "n": 2}, timeout=120)[0] == 200
