"""Memory that is not to be had ends a request, never the daemon.

SPDX-License-Identifier: Apache-2.0
"""
import http.client
import json
import mmap
import struct
from collections import Counter

import pytest

from conftest import PARLEYD, find_tool, until

REQUESTS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there"}], "stream": True, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a part"}]}], "stop": ["zzz"], "presence_penalty": 0.5}),
    ("/v1/completions", {"prompt": ["one prompt", "another"], "n": 2, "echo": True, "logprobs": 2, "logit_bias": {"5": 1}}),
    ("/v1/completions", {"prompt": "streamed", "stream": True, "stop": ["never", "nowhere"]}),
    ("/tokenize", {"content": "some words " * 40}),
    ("/v1/nowhere", {}),
]


def ask(d, path, fields):
    """The status, and the code of an error; the exception's name where no whole answer came."""
    try:
        status, _, body = d.post(path, {"model": "tiny", "max_tokens": 12, "temperature": 0.5, **fields} if "/v1/c" in path else fields)
    except (OSError, http.client.HTTPException) as e:
        return type(e).__name__
    if status == 200 and fields.get("stream"):
        text = body.decode()
        assert text.endswith("data: [DONE]\n\n"), text[-200:]
        return "failed in the stream" if '{"error"' in text else 200
    assert body, (status, path)
    return status if status == 200 else (status, json.loads(body)["error"]["code"])


@pytest.mark.skipif("asan" in str(PARLEYD) or "tsan" in str(PARLEYD), reason="sanitizers have a malloc of their own")
@pytest.mark.parametrize("one_in", [1000, 100, 20])
def test_no_allocation_is_taken_for_granted(start, tiny, tmp_path, one_in):
    word = tmp_path / "one_in"
    word.write_bytes(bytes(4096))
    d = start(model=tiny, env={"LD_PRELOAD": str(find_tool("memory.so")), "SHORT_OF_MEMORY": str(word)})
    reference = {"model": "tiny", "prompt": "the same again", "max_tokens": 20, "temperature": 0}
    text = json.loads(d.post("/v1/completions", reference)[2])["choices"][0]["text"]
    seen = Counter()
    with open(word, "r+b") as f, mmap.mmap(f.fileno(), 4096) as control:
        for _ in range(5):
            control[:4] = struct.pack("I", one_in)
            seen.update(ask(d, path, fields) for path, fields in REQUESTS for _ in range(3))
            control[:4] = struct.pack("I", 0)
            assert d.process.poll() is None, d.log
            status, _, body = d.post("/v1/completions", reference)
            assert status == 200 and json.loads(body)["choices"][0]["text"] == text
            until(d.idle)
    allowed = {200, (404, "unknown_url"), (404, "model_not_found"), (400, None), "failed in the stream", "RemoteDisconnected", "ConnectionResetError",
               "BrokenPipeError", "IncompleteRead", "BadStatusLine"}
    assert not [s for s in seen if s not in allowed and (not isinstance(s, tuple) or s[1] != "out_of_memory")], seen
    assert one_in == 1000 or sum(seen.values()) > seen[200] + seen[404, "unknown_url"], "nothing failed"
