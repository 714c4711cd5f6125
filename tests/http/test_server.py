"""The daemon's HTTP side: framing, limits, keys, hang-ups, draining, metrics.

SPDX-License-Identifier: Apache-2.0
"""
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time

import pytest

from conftest import SLOW, Daemon, until

HOST = b"Host: localhost\r\n"


def head(method, path, *lines, body=b""):
    size = [b"Content-Length: %d" % len(body)] if body else []
    return b"\r\n".join([b"%s %s HTTP/1.1" % (method.encode(), path.encode()), b"Host: localhost", *size, *lines, b"", b""]) + body


def statuses(answer):
    return [int(m) for m in re.findall(rb"(?:^|[}\n])HTTP/1\.1 (\d{3}) ", answer)]


def error_of(answer):
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]


def prompt(n=8):
    return " ".join(f"word{i}" for i in range(n))


def completion(max_tokens, stream=False, n=8, **more):
    return {"model": "long", "prompt": prompt(n), "max_tokens": max_tokens, "ignore_eos": True, "stream": stream, **more}


def bytes_of(body, path="/v1/completions"):
    data = json.dumps(body).encode()
    return head("POST", path, b"Content-Type: application/json", body=data)


# what every answer carries

def test_headers_on_every_answer(server):
    for method, path, status in (("GET", "/health", 200), ("GET", "/nope", 404), ("PUT", "/health", 405), ("GET", "/version", 200),
                                 ("POST", "/v1/completions", 400), ("GET", "/v1/models", 200)):
        got, headers, body = server.request(method, path, b"{" if method == "POST" else None)
        assert got == status
        assert re.fullmatch(r"req-[0-9a-f]{32}", headers["x-request-id"])
        assert headers["openai-processing-ms"].isdigit()
        assert headers["content-type"] == "application/json"
        if status >= 400:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert not [h for h in headers if h.startswith("access-control")]


def test_request_id_is_taken_over_when_plain(server):
    assert server.get("/health", {"X-Request-Id": "abc-1.2:3"})[1]["x-request-id"] == "abc-1.2:3"
    for bad in ("a b", "x" * 129, "<script>", '"'):
        assert server.get("/health", {"X-Request-Id": bad})[1]["x-request-id"].startswith("req-")


def test_unknown_path_and_method(server):
    status, headers, body = server.get("/v1/nope")
    assert status == 404 and json.loads(body)["error"]["code"] == "unknown_url"
    assert "GET /v1/nope" in json.loads(body)["error"]["message"]
    status, headers, _ = server.get("/v1/chat/completions")
    assert status == 405 and headers["allow"] == "POST, OPTIONS"
    status, headers, _ = server.request("DELETE", "/health")
    assert status == 405 and headers["allow"] == "GET, HEAD, OPTIONS"
    status, headers, body = server.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert status == 204 and headers["allow"] == "POST, OPTIONS" and body == b""
    assert not [h for h in headers if h.startswith("access-control")]


@pytest.mark.parametrize("path, meant", [("/chat/completions", "/v1/chat/completions"), ("/v1/v1/models", "/v1/models"), ("/models/a", "/v1/models/a"),
                                         ("/v1/embeddings", None), ("/", None), ("/v1/v1/", None)])
def test_base_urls_that_are_wrong(server, path, meant):
    """What a client asks for whose base URL lacks /v1, or has it twice."""
    said = json.loads(server.request("POST" if path.endswith("completions") else "GET", path)[2])["error"]["message"]
    assert f"did you mean {meant}?" in said if meant else "no such endpoint" in said, said


def test_head_has_no_body(server):
    answer, closed = server.raw(head("HEAD", "/health", b"Connection: close"))
    assert closed and statuses(answer) == [200] and answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("path", ["/health/", "//health", "/v1/../health", "/v1/%2e%2e/health", "/health;x=1", "/Health"])
def test_paths_match_exactly(server, path):
    assert server.get(path)[0] == 404


@pytest.mark.parametrize("path", ["/health%00", "/health%0", "/health%zz", "/%ff", "/a%0ab"])
def test_bad_escapes(server, path):
    answer, closed = server.raw(head("GET", path))
    assert closed and statuses(answer) == [400] and error_of(answer)["type"] == "invalid_request_error"


def test_query_is_not_path(server):
    assert server.get("/health?x=%00&y=/v1")[0] == 200


def test_model_ids_with_slashes(server):
    assert server.get("/v1/models/long")[0] == 200
    for path in ("/v1/models/a%2Fb%3Ac", "/v1/models/a/b:c"):
        status, _, body = server.get(path)
        assert status == 404 and "a/b:c" in json.loads(body)["error"]["message"]


# framing

FRAMING = {
    "two lengths": (b"Content-Length: 3", b"Content-Length: 30"),
    "two equal lengths": (b"Content-Length: 3", b"Content-Length: 3"),
    "list of lengths": (b"Content-Length: 3, 3",),
    "length and chunked": (b"Content-Length: 3", b"Transfer-Encoding: chunked"),
    "two codings": (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "unknown coding": (b"Transfer-Encoding: xchunked",),
    "stacked codings": (b"Transfer-Encoding: gzip, chunked",),
    "chunked first": (b"Transfer-Encoding: chunked, identity",),
    "vertical tab": (b"Transfer-Encoding: \x0bchunked",),
    "blank before colon": (b"Content-Length : 3",),
    "coding, blank before colon": (b"Transfer-Encoding : chunked",),
    "two hosts": (b"Content-Length: 3", b"Host: other"),
    "two keys": (b"Content-Length: 3", b"Authorization: Bearer a", b"Authorization: Bearer b"),
    "two kinds of keys": (b"Content-Length: 3", b"Authorization: Bearer a", b"X-Api-Key: b"),
    "control character": (b"Content-Length: 3", b"X-Thing: a\x01b"),
    "eight-bit name": (b"Content-Length: 3", b"X-\xe4: a"),
    "negative length": (b"Content-Length: -1",),
    "hexadecimal length": (b"Content-Length: 0x3",),
    "plus": (b"Content-Length: +3",),
}


@pytest.mark.parametrize("name", FRAMING)
def test_doubtful_framing_is_refused_and_closed(server, name):
    smuggled = b"abcGET /version HTTP/1.1\r\n" + HOST + b"\r\n"
    answer, closed = server.raw(head("POST", "/v1/completions", *FRAMING[name]) + smuggled, timeout=5)
    assert closed
    assert statuses(answer)[0] in (400, 501)
    assert b'"version"' not in answer


def test_no_host(server):
    answer, closed = server.raw(b"GET /health HTTP/1.1\r\n\r\n")
    assert closed and statuses(answer) == [400] and "Host" in error_of(answer)["message"]


def test_blank_in_path(server):
    answer, closed = server.raw(b"GET /health x HTTP/1.1\r\n" + HOST + b"\r\n")
    assert closed and statuses(answer) == [400]


def test_many_headers(server):
    answer, closed = server.raw(head("GET", "/health", *[b"X-%d: a" % i for i in range(150)]))
    assert closed and statuses(answer) == [431] and error_of(answer)
    answer, closed = server.raw(head("GET", "/health", b"X: " + b"a" * 40000))
    assert closed and statuses(answer) == [431]
    answer, _ = server.raw(head("GET", "/health", b"X: " + b"a" * 15000, b"Connection: close"))
    assert statuses(answer) == [200]


def test_chunked_body(server):
    data = json.dumps(completion(2)).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(data[i:i + 7]), data[i:i + 7]) for i in range(0, len(data), 7))
    answer, _ = server.raw(head("POST", "/v1/completions", b"Transfer-Encoding: chunked", b"Connection: close") + pieces + b"0\r\n\r\n")
    assert statuses(answer) == [200]


def test_expect_continue(server):
    data = json.dumps(completion(1)).encode()
    with server.socket() as s:
        s.sendall(head("POST", "/v1/completions", b"Expect: 100-continue", b"Content-Length: %d" % len(data)))
        assert s.recv(1000).startswith(b"HTTP/1.1 100 ")
        s.sendall(data)
        assert b" 200 OK" in s.recv(100000)
    answer, closed = server.raw(head("POST", "/v1/completions", b"Expect: 200-ok", b"Content-Length: 3"))
    assert closed and statuses(answer) == [417]


def test_content_types(server):
    body = json.dumps(completion(1)).encode()
    for kind, status in ((None, 200), ("application/json", 200), ("application/json; charset=utf-8", 200), ("text/plain", 415),
                         ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415),
                         ("application/json; charset=utf-16", 415)):
        headers = {"Content-Type": kind} if kind else {}
        c = server.connect()
        c.request("POST", "/v1/completions", body, headers)
        r = c.getresponse()
        assert (r.status, kind) == (status, kind)
        json.loads(r.read())
        c.close()
    assert server.post("/v1/completions", body, {"Content-Encoding": "gzip"})[0] == 415


# sizes and deadlines

def test_declared_body_too_large(server):
    answer, closed = server.raw(head("POST", "/v1/completions", b"Content-Length: 1048577"))
    assert closed and statuses(answer) == [413] and error_of(answer)["code"] == "request_too_large"
    for n in (2**63 - 1, 2**63, 2**64 - 1):
        answer, closed = server.raw(head("POST", "/v1/completions", b"Content-Length: %d" % n))
        assert closed and statuses(answer) == [413]
    answer, closed = server.raw(head("POST", "/v1/completions", b"Expect: 100-continue", b"Content-Length: 9999999"))
    assert closed and statuses(answer) == [413]


def test_sent_body_too_large(server):
    """The client gets to read the answer although it goes on sending."""
    answer, closed = server.raw(head("POST", "/v1/completions", body=b"x" * 3_000_000))
    assert closed and statuses(answer) == [413] and error_of(answer)["code"] == "request_too_large"
    chunks = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    answer, closed = server.raw(head("POST", "/v1/completions", b"Transfer-Encoding: chunked") + chunks * 3 + b"0\r\n\r\n")
    assert closed and statuses(answer) == [413] and error_of(answer)["code"] == "request_too_large"


def dribble(server, first, data, every, seconds):
    """Sends first at once, the rest byte by byte; how long until the server closes, and what it said."""
    begin = time.monotonic()
    with server.socket() as s:
        s.sendall(first)
        s.settimeout(0.01)
        for i in range(len(data)):
            try:
                s.sendall(data[i:i + 1])
            except OSError:
                pass  # closed: what it said is still to be read
            end = time.monotonic() + every
            while time.monotonic() < end:
                try:
                    answer = s.recv(4096)
                    return time.monotonic() - begin, answer
                except TimeoutError:
                    pass
                except OSError:
                    return time.monotonic() - begin, b""
            if time.monotonic() - begin > seconds:
                break
    pytest.fail("the server kept the connection")


def test_slow_head(server):
    """One byte every 0.2 s restarts an inactivity timer for ever; the deadline is for the whole head."""
    spent, answer = dribble(server, b"GET /health HTTP/1.1\r\nX-Long: ", b"a" * 1000, 0.2, 10 * SLOW)
    assert spent < 4 * SLOW and statuses(answer) == [408] and error_of(answer)["code"] == "request_timeout"
    spent, answer = dribble(server, b"", b"G" * 1000, 0.2, 10 * SLOW)
    assert spent < 4 * SLOW and answer == b""  # nothing was asked yet


def test_slow_body(server):
    with server.socket() as s:
        s.sendall(head("POST", "/v1/completions", b"Content-Length: 5000") + b"{")
        begin = time.monotonic()
        answer = s.recv(4096)
        assert statuses(answer) == [408] and time.monotonic() - begin < 5 * SLOW


def test_connection_limit(start, tiny):
    d = start("--max-connections", 10, model=tiny)
    idle = [d.socket() for _ in range(12)]
    until(lambda: d.get("/health")[0] == 200)  # liveness has room
    status, headers, body = d.get("/v1/models")
    assert status == 503 and headers["retry-after"] and json.loads(body)["error"]["code"] == "too_many_connections"
    for s in idle:
        s.close()
    until(lambda: d.get("/v1/models")[0] == 200)


# many requests on one connection

def test_keep_alive(server):
    c = server.connect()
    sock = None
    for _ in range(50):
        c.request("GET", "/health")
        r = c.getresponse()
        assert r.status == 200 and r.read() == b'{"status":"ok"}'
        assert sock in (None, c.sock)
        sock = c.sock
    c.close()


def test_pipelining_keeps_order(server):
    ask = [head("GET", "/health"), head("GET", "/v1/models/none"), bytes_of(completion(3)), head("GET", "/version")] * 5
    answer, closed = server.raw(b"".join(ask[:-1]) + head("GET", "/version", b"Connection: close"))
    assert closed and re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200", b"404", b"200", b"200"] * 5


def test_request_behind_a_stream(server):
    answer, _ = server.raw(bytes_of(completion(5, stream=True)) + head("GET", "/v1/models/none", b"Connection: close"))
    assert answer.index(b"data: [DONE]") < answer.index(b"HTTP/1.1 404")


def test_many_clients_at_once(server):
    """More streams and answers than the engine runs or queues: each gets all of its own or a 429."""
    failures = []

    def client(i):
        for k in range(4):
            n = 3 + (5 * i + k) % 17
            status, headers, body = server.post("/v1/completions", completion(n, stream=k % 2 == 0, n=1 + i))
            if status == 429:
                if int(headers["retry-after"]) < 1:
                    failures.append("429 without a delay")
            elif status != 200:
                failures.append(body)
            elif k % 2 == 0:
                if not body.endswith(b"data: [DONE]\n\n"):
                    failures.append(body[-100:])
            elif json.loads(body)["usage"]["completion_tokens"] != n:
                failures.append(body)
    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120 * SLOW)
        assert not t.is_alive()
    assert not failures
    until(server.idle)


def test_large_bodies_are_bounded_together(server):
    """Sixteen times the largest one are kept at a time, beside 256 KiB of each; what is larger than that waits its turn, small ones never."""
    body = json.dumps(completion(1, user="x" * 1000_000)).encode()
    request = bytes_of(completion(1, user="x" * 1000_000))
    held = []
    try:
        for _ in range(30):
            s = server.socket()
            s.sendall(request[:-1])  # all but the end
            s.settimeout(0.3)
            try:
                answer = s.recv(4096)
            except TimeoutError:
                held.append(s)
                continue
            assert b" 503 " in answer and b"too_many_large_requests" in answer and b"Retry-After: 1\r\n" in answer, answer
            s.close()
            break
        assert 20 < len(held) < 25, len(held)
        assert server.post("/v1/completions", completion(1))[0] == 200
    finally:
        for s in held:
            s.close()
    until(lambda: server.request("POST", "/v1/completions", body)[0] == 200)


# keys

def test_no_keys_needed_by_default(server):
    for path in ("/v1/models", "/metrics", "/version"):
        assert server.get(path)[0] == 200


BAD_KEYS = [{}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic dTpzZWNyZXQta2V5"},
            {"Authorization": "secret-key"}, {"Authorization": "Bearer secret-key-x"}, {"Authorization": "Bearer secret-ke"},
            {"Authorization": "Bearer  secret-key"}, {"X-Api-Key": "nope"}, {"X-Api-Key": ""}, {"Authorization": "Bearer " + "k" * 5000}]


BROWSER = {  # what a page in a browser on this machine could make it send: another's name for the daemon, or for another site
    "a name that was made to point here": ("GET", "/v1/models", b"evil.example:8000", None, "host_not_allowed"),
    "a name that begins like localhost": ("GET", "/v1/models", b"localhost.evil.example", None, "host_not_allowed"),
    "a name that ends like localhost": ("GET", "/v1/models", b"evillocalhost", None, "host_not_allowed"),
    "no name": ("GET", "/v1/models", b":80", None, "host_not_allowed"),
    "half an address": ("GET", "/v1/models", b"[::1", None, "host_not_allowed"),
    "a form across sites": ("POST", "/v1/files", b"localhost", b"cross-site", "cross_site"),
    "a body without type across sites": ("POST", "/v1/fine_tuning/jobs", b"127.0.0.1", b"Cross-Site", "cross_site"),
}


@pytest.mark.parametrize("name", BROWSER)
def test_pages_of_others_are_refused_without_keys(server, name):
    method, path, host, site, code = BROWSER[name]
    lines = [b"%s %s HTTP/1.1" % (method.encode(), path.encode()), b"Host: " + host, *([b"Sec-Fetch-Site: " + site] if site else []), b"", b""]
    answer, closed = server.raw(b"\r\n".join(lines))
    assert closed and statuses(answer) == [403] and error_of(answer)["code"] == code and error_of(answer)["type"] == "permission_error"
    assert "api-key" in error_of(answer)["message"]


@pytest.mark.parametrize("host", [b"localhost", b"LocalHost:8000", b"chat.localhost", b"127.0.0.1:80", b"192.168.0.7", b"[::1]", b"[fe80::1]:8000"])
@pytest.mark.parametrize("site", [b"same-origin", b"none", b"same-site"])
def test_pages_of_this_machine_are_answered(server, host, site):
    answer, _ = server.raw(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: %s\r\nSec-Fetch-Site: %s\r\n\r\n" % (host, site))
    assert statuses(answer) == [200]


def test_links_and_probes_need_no_name_of_this_machine(server):
    for extra in (b"GET /health HTTP/1.1\r\nHost: probe.example", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site"):
        assert statuses(server.raw(extra + b"\r\nConnection: close\r\n\r\n")[0]) == [200]


def test_a_key_or_another_address_lets_any_name_in(start, tiny):
    keyed = start("--api-key", "secret-key", model=tiny)
    other = {"Host": "models.example", "Sec-Fetch-Site": "cross-site"}
    assert keyed.get("/v1/models", {"Authorization": "Bearer secret-key", **other})[0] == 200
    assert keyed.get("/v1/models", other)[0] == 401
    named = start("--host", "localhost", "--admin-key", "boss-key-1234567", model=tiny)
    assert named.get("/metrics", {"Authorization": "Bearer boss-key-1234567", **other})[0] == 200
    assert named.get("/v1/models", other)[0] == 403
    everywhere = start("--host", "0.0.0.0", model=tiny, ready=False)
    until(lambda: "ready:" in everywhere.log, 20)
    everywhere.port = int(re.search(r"listening on http://0\.0\.0\.0:(\d+)", everywhere.log).group(1))
    assert everywhere.get("/v1/models", other)[0] == 200


def test_api_key(start, tiny):
    d = start("--api-key", "secret-key", model=tiny)
    assert d.get("/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/version", "/v1/models/tiny"):
        assert d.get(path, {"Authorization": "Bearer secret-key"})[0] == 200, path
        assert d.get(path, {"X-Api-Key": "secret-key"})[0] == 200, path
        bodies = set()
        for bad in BAD_KEYS:
            status, headers, body = d.get(path, bad)
            assert status == 401 and headers["www-authenticate"] == "Bearer", (path, bad)
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
            bodies.add(body)
        assert len(bodies) == 1  # nothing tells one failure from another
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template"):
        assert d.post(path, {})[0] == 401
        assert d.post(path, {}, {"Authorization": "Bearer secret-key"})[0] == 400
    assert "secret-key" not in d.log


def test_admin_key(start, tiny):
    d = start("--api-key", "user-key-1234567", "--admin-key", "boss-key-1234567", model=tiny)
    assert d.get("/metrics", {"Authorization": "Bearer boss-key-1234567"})[0] == 200
    assert d.get("/v1/models", {"Authorization": "Bearer boss-key-1234567"})[0] == 200
    assert d.get("/v1/models", {"Authorization": "Bearer user-key-1234567"})[0] == 200
    assert d.get("/metrics", {"Authorization": "Bearer user-key-1234567"})[0] == 403
    assert d.get("/metrics")[0] == 401


def test_admin_key_alone(start, tiny):
    d = start("--admin-key", "boss-key-1234567", model=tiny)
    assert d.get("/v1/models")[0] == 200
    assert d.get("/metrics")[0] == 401
    assert d.get("/metrics", {"X-Api-Key": "boss-key-1234567"})[0] == 200


# peers that leave

def leave_after(server, body, seconds):
    s = server.socket()
    s.sendall(bytes_of(body))
    time.sleep(seconds)
    return s


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abrupt", [False, True])
def test_leaving_while_generating(server, stream, abrupt):
    s = leave_after(server, completion(15000, stream=stream), 0)
    until(lambda: server.metrics()["parley_num_requests_running"] == 1)
    if stream:
        assert b" 200 OK" in s.recv(1000)
    if abrupt:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of a goodbye
    s.close()
    until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_prefill(server, stream):
    # a prompt of its own, which no cache shortens; enough to generate, so that it is seen however fast the prompt was
    s = leave_after(server, completion(1000, stream=stream, prompt=f"{stream} {prompt(2500)}"), 0)
    until(lambda: server.metrics()["parley_num_requests_running"] == 1)
    s.close()
    until(server.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_queued(server, stream):
    busy = [leave_after(server, completion(15000), 0) for _ in range(4)]
    until(lambda: server.metrics()["parley_num_requests_running"] == 4)
    waiting = [leave_after(server, completion(10, stream=stream), 0) for _ in range(3)]
    until(lambda: server.metrics()["parley_num_requests_waiting"] == 3)
    for s in waiting:
        s.close()
    until(lambda: server.metrics()["parley_num_requests_waiting"] == 0)
    assert server.metrics()["parley_num_requests_running"] == 4
    for s in busy:
        s.close()
    until(server.idle)


def test_half_closed_stream_goes_on(server):
    """shutdown(SHUT_WR) after the request is legal; a stream that runs is not ended for it."""
    with server.socket() as s:
        s.sendall(head("POST", "/v1/completions", b"Connection: close", body=json.dumps(completion(400, stream=True)).encode()))
        first = s.recv(2000)
        assert b" 200 OK" in first
        s.shutdown(socket.SHUT_WR)
        rest = b""
        while piece := s.recv(65536):
            rest += piece
        assert b"data: [DONE]" in first + rest
    until(server.idle)


def test_queue_full(server):
    busy = [leave_after(server, completion(15000), 0) for _ in range(4)]
    until(lambda: server.metrics()["parley_num_requests_running"] == 4)
    waiting = [leave_after(server, completion(10), 0) for _ in range(8)]
    until(lambda: server.metrics()["parley_num_requests_waiting"] == 8)
    for stream in (False, True):
        begin = time.monotonic()
        status, headers, body = server.post("/v1/completions", completion(10, stream=stream))
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert headers["content-type"] == "application/json" and json.loads(body)["error"]["code"]
        assert time.monotonic() - begin < 5 * SLOW
    assert server.get("/health")[0] == 200
    for s in busy + waiting:
        s.close()
    until(server.idle)


def test_reader_that_stops(server):
    """A peer that takes nothing holds one request and bounded memory, and gives both back when it goes."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect(("127.0.0.1", server.port))
    s.sendall(bytes_of(completion(15000, stream=True)))
    until(lambda: server.metrics()["parley_num_requests_running"] == 1)
    time.sleep(0.5)
    assert server.post("/v1/completions", completion(3))[0] == 200  # nobody else notices
    s.close()
    until(server.idle)


def test_random_leaving(server):
    import random
    r = random.Random(7)

    def client(seed):
        mine = random.Random(seed)
        for _ in range(12):
            s = leave_after(server, completion(mine.choice([5, 500, 8000]), stream=mine.random() < 0.5, n=mine.choice([4, 300])),
                            mine.random() * 0.08)
            s.close()
    threads = [threading.Thread(target=client, args=(r.random(),)) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120 * SLOW)
        assert not t.is_alive()
    until(server.idle)
    until(lambda: server.metrics()["parley_http_requests_active"] == 1)  # this one


# metrics, version, log

def test_metrics_are_valid(server):
    server.post("/v1/completions", completion(4))
    _, headers, body = server.get("/metrics")
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    kinds, seen = {}, set()
    for line in body.decode().splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in kinds and line.split(" ", 3)[3], line
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        else:
            m = re.fullmatch(r'([a-z0-9_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\})? (\S+)', line)
            assert m, line
            float(m[3])
            assert line.rsplit(" ", 1)[0] not in seen, line
            seen.add(line.rsplit(" ", 1)[0])
            base = re.sub(r"_(bucket|sum|count)$", "", m[1]) if m[1] not in kinds else m[1]
            assert base in kinds, line
            assert kinds[base] != "counter" or base.endswith("_total"), line
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
                 "request_success_total", "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
                 "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
                 "request_generation_tokens", "iteration_tokens_total", "http_requests_total", "http_request_duration_seconds",
                 "http_connections", "log_lines_dropped_total"):
        assert "parley_" + name in kinds
    assert "process_start_time_seconds" in kinds


def test_metrics_count(server):
    before = server.metrics()
    for _ in range(3):
        assert server.post("/v1/completions", completion(6, n=40))[0] == 200
    server.get("/nothing/here")
    after = {}

    def more(name):
        return after.get(name, 0) - before.get(name, 0)

    def counted():  # an answer may arrive before it is counted
        after.update(server.metrics())
        return more('parley_http_requests_total{method="GET",path="other",status="404"}') and \
            more('parley_http_requests_total{method="POST",path="/v1/completions",status="200"}') >= 3 and more("parley_e2e_request_latency_seconds_count") >= 3
    until(counted)
    assert more("parley_generation_tokens_total") == 18
    assert more('parley_request_success_total{finished_reason="length"}') == 3
    assert more("parley_e2e_request_latency_seconds_count") == 3
    assert more("parley_time_to_first_token_seconds_count") == 3
    assert more("parley_inter_token_latency_seconds_count") == 15
    assert more("parley_prefix_cache_hits_total") > 0
    assert more('parley_http_requests_total{method="POST",path="/v1/completions",status="200"}') == 3
    assert more('parley_http_requests_total{method="GET",path="other",status="404"}') == 1
    assert more('parley_http_request_duration_seconds_count{path="/v1/completions"}') == 3


def test_version(server):
    v = json.loads(server.get("/version")[2])
    assert re.fullmatch(r"\d+\.\d+\.\d+", v["version"]) and v["model"] == "long" and re.fullmatch(r"fp_[0-9a-f]{16}", v["system_fingerprint"])


def test_one_log_line_per_request_without_prompt(server):
    ident = f"line-{time.monotonic_ns()}"
    secret = "canaryword"
    body = completion(4, prompt=f"{secret} {secret}")
    assert server.post("/v1/completions", body, {"X-Request-Id": ident})[0] == 200
    line = until(lambda: [x for x in server.log.splitlines() if ident in x])
    assert len(line) == 1
    event = json.loads(line[0])
    assert event["level"] == "info" and event["msg"] == "request" and event["id"] == ident and event["status"] == 200
    assert event["method"] == "POST" and event["path"] == "/v1/completions"
    assert event["model"] == "long"
    assert event["prompt"] > 0 and event["completion"] == 4 and event["cached"] >= 0
    assert event["queue_ms"] >= 0 and event["ttft_ms"] > 0 and event["tok_s"] > 0 and event["total_ms"] >= event["ttft_ms"]
    assert secret not in server.log


def test_log_lines_say_what_was_wrong(server):
    """The field at fault, and a path that is none: as it was asked for, without its query."""
    def event(path, body):
        ident = f"wrong-{time.monotonic_ns()}"
        server.post(path, body, {"X-Request-Id": ident})
        return json.loads(until(lambda: [x for x in server.log.splitlines() if ident in x])[0])
    e = event("/v1/completions", completion(4, temperature=3))
    assert e["status"] == 400 and e["error"] == "invalid_request_error" and e["param"] == "temperature"
    assert event("/v1/em%22be%C3%A9ddings?key=secret", {})["path"] == '/v1/em"beéddings'
    assert len(event("/" + "%C3%A9" * 1000, {})["path"]) <= 51
    assert "param" not in event("/v1/completions", "{")


def test_log_line_of_a_client_that_left(server):
    """What only the end would tell is left out: a time to the first token of 0.0 would be a lie."""
    ident = f"left-{time.monotonic_ns()}"
    with server.socket() as s:
        s.sendall(head("POST", "/v1/completions", b"X-Request-Id: " + ident.encode(), body=json.dumps(completion(8000, stream=True)).encode()))
        assert b" 200 OK" in s.recv(2000)
    e = json.loads(until(lambda: [x for x in server.log.splitlines() if ident in x])[0])
    assert e["error"] == "client_closed" and e["model"] == "long" and e["prompt"] > 0 and e["completion"] > 0
    assert not {"cached", "queue_ms", "ttft_ms", "tok_s"} & set(e)
    until(server.idle)


# starting and stopping

def test_health_while_loading(tmp_path, models):
    """Listens before the model is there: probes get 503 loading, requests 503 with a delay. The process is held in its
    load by being slow to read: a large model."""
    big = models("big", "--layers", 8, "--embd", 512, "--ff", 2048, "--ctx", 2048)
    d = Daemon(tmp_path, model=big).wait_listening()
    seen = set()
    while True:
        status, headers, body = d.get("/health")
        state = json.loads(body)["status"]
        if state == "loading":
            assert status == 503
            s2, h2, b2 = d.post("/v1/completions", completion(1))
            if s2 == 503:
                assert h2["retry-after"] and json.loads(b2)["error"]["code"] == "model_loading"
                seen.add("refused")
            assert d.get("/metrics")[0] == 200
        seen.add(state)
        if state == "ok":
            break
    assert d.stop() == 0
    assert "ok" in seen
    if "loading" not in seen:
        pytest.skip("the model was loaded before the first probe")


def test_sigterm_finishes_running_streams(start, long):
    d = start("--drain-timeout", 300, "--speculation", "off", model=long)
    with d.socket(60) as s:
        s.sendall(bytes_of(completion(10000, stream=True)))
        got = s.recv(2000)
        assert b" 200 OK" in got
        d.process.send_signal(signal.SIGTERM)
        until(lambda: d.get("/health")[0] == 503)
        status, _, body = d.get("/health")
        if status == 503:
            assert json.loads(body) == {"status": "draining"}
        status, headers, body = d.post("/v1/completions", completion(1))
        assert status == 503 and headers["retry-after"] and json.loads(body)["error"]["code"] == "shutting_down"
        while piece := s.recv(65536):
            got += piece
            if b"data: [DONE]" in got:
                break
        assert b"data: [DONE]" in got and b'"error"' not in got
        assert got.count(b"data: {") >= 100
    assert d.process.wait(20 * SLOW) == 0, d.log


def test_drain_timeout_ends_streams_with_an_error(start, long):
    d = start("--drain-timeout", 1, "--speculation", "off", model=long)
    with d.socket(60) as s:
        s.sendall(bytes_of(completion(16000, stream=True)))
        got = s.recv(2000)
        d.process.send_signal(signal.SIGTERM)
        try:
            while piece := s.recv(65536):
                got += piece
        except ConnectionResetError:
            pass
    assert b'data: {"error"' in got
    assert d.process.wait(20 * SLOW) == 0, d.log


def test_second_signal_ends_at_once(start, long):
    d = start("--drain-timeout", 300, "--speculation", "off", model=long)
    s = leave_after(d, completion(16000, stream=True), 0)
    until(lambda: d.metrics()["parley_num_requests_running"] == 1)
    begin = time.monotonic()
    d.process.send_signal(signal.SIGTERM)
    until(lambda: "draining" in d.log)
    d.process.send_signal(signal.SIGINT)
    assert d.process.wait(10 * SLOW) == 0, d.log
    assert time.monotonic() - begin < 5 * SLOW
    s.close()


def test_stops_with_everything_parked(start, long):
    """Queued requests are parked connections; each must be woken before the HTTP library stops, or it aborts."""
    d = start("--drain-timeout", 1, "--max-sequences", 2, "--queue-limit", 100, "--speculation", "off", model=long)
    # those that run are no streams, whose places would be given to others while nobody reads
    many = [leave_after(d, completion(16000, stream=i >= 2 and i % 2 == 0), 0) for i in range(40)]
    until(lambda: d.metrics()["parley_num_requests_waiting"] >= 30)
    d.process.send_signal(signal.SIGTERM)
    assert d.process.wait(20 * SLOW) == 0, d.log
    for s in many:
        s.close()


def refused(tmp_path, *args, model=None):
    d = Daemon(tmp_path, *args, model=model)
    code = d.process.wait(20 * SLOW)
    return code, d.log


def test_start_errors(tmp_path, start, tiny):
    code, log = refused(tmp_path)
    assert code == 2 and "--model" in log
    code, log = refused(tmp_path, model=tmp_path / "none.gguf")
    assert code == 2 and "none.gguf" in log
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    code, log = refused(tmp_path, model=tmp_path / "bad.gguf")
    assert code == 2 and "bad.gguf" in log
    code, log = refused(tmp_path, "--host", "no.such.host.invalid", model=tiny)
    assert code == 2 and "no.such.host.invalid" in log
    code, log = refused(tmp_path, "--api-key", "the-same-key", "--admin-key", "the-same-key", model=tiny)
    assert code == 2 and "admin-key" in log
    code, log = refused(tmp_path, "--tls-cert", "/nonexistent.pem", model=tiny)
    assert code == 2 and "tls-key" in log
    for name in (b"a\xff", "a\nb", "a" * 1000):  # the list of models and the metrics would be no text, or a flood
        code, log = refused(tmp_path, "--alias", name, model=tiny)
        assert code == 2 and "alias" in log and "UTF-8" in log
    d = start(model=tiny)
    code, log = refused(tmp_path, "--port", d.port, model=tiny)
    assert code == 2 and str(d.port) in log and "--port" in log


def test_variables_that_are_no_settings(start, tiny):
    """An api-key under a wrong name leaves the daemon open: the log says so, without the key."""
    d = start(model=tiny, env={"PARLEY_APIKEY": "very-secret", "PARLEY_SERVICE_HOST": "10.0.0.1", "PARLEY_QUEUE_LIMIT": "7"})
    assert "PARLEY_APIKEY is no setting; did you mean PARLEY_API_KEY?" in d.log and "very-secret" not in d.log
    assert "PARLEY_SERVICE_HOST is no setting\n" in d.log and d.log.count("is no setting") == 2


def test_model_dir(tmp_path, start, tiny):
    directory = tmp_path / "models"
    directory.mkdir()
    code, log = refused(tmp_path, "--model-dir", directory)
    assert code == 2 and str(directory) in log
    (directory / "one.gguf").symlink_to(tiny)
    d = start("--model-dir", directory)
    assert json.loads(d.get("/v1/models")[2])["data"][0]["id"] == "one"
    (directory / "two.gguf").symlink_to(tiny)
    code, log = refused(tmp_path, "--model-dir", directory)
    assert code == 2 and "one.gguf" in log and "two.gguf" in log
    d = start("--alias", "org/name:tag", model=tiny)
    assert json.loads(d.get("/v1/models/org%2Fname%3Atag")[2])["id"] == "org/name:tag"


def test_unix_socket(tmp_path, start, tiny):
    path = tmp_path / "p.sock"
    d = start("--unix-socket", path, model=tiny, ready=False)
    until(lambda: "ready:" in d.log, 20)

    def ask():
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            s.sendall(head("GET", "/health", b"Connection: close"))
            return s.recv(4096)
    assert b'{"status":"ok"}' in ask()
    code, log = refused(tmp_path, "--unix-socket", path, model=tiny)
    assert code == 2 and "another server" in log
    assert b'{"status":"ok"}' in ask()
    d.process.kill()
    d.process.wait()
    assert path.exists()
    second = start("--unix-socket", path, model=tiny, ready=False)  # what a killed daemon left is no obstacle
    until(lambda: "ready:" in second.log, 20)
    assert b'{"status":"ok"}' in ask()
    assert second.stop() == 0 and not path.exists()
    d.process.returncode = 0  # killed on purpose


def test_tls(tmp_path, start, tiny):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2",
                           "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True)
    assert made.returncode == 0, made.stderr
    key.chmod(0o644)
    code, log = refused(tmp_path, "--tls-cert", cert, "--tls-key", key, model=tiny)
    assert code == 2 and "chmod" in log
    key.chmod(0o600)
    d = start("--tls-cert", cert, "--tls-key", key, model=tiny, ready=False).wait_listening()
    until(lambda: "ready:" in d.log, 20)
    trust = ssl.create_default_context(cafile=str(cert))
    for stream in (False, True):
        with trust.wrap_socket(d.socket(), server_hostname="127.0.0.1") as s:
            s.sendall(head("POST", "/v1/completions", b"Connection: close", body=json.dumps({**completion(5, stream=stream), "model": "tiny"}).encode()))
            answer = b""
            while piece := s.recv(65536):
                answer += piece
            assert statuses(answer) == [200] and (b"data: [DONE]" in answer) == stream
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        with old.wrap_socket(d.socket()) as s:
            s.sendall(head("GET", "/health"))


def test_alive_at_the_end(server):
    """After all of the above on one daemon: healthy, idle, nothing held, greedy text as ever."""
    assert server.get("/health")[0] == 200
    until(server.idle)
    texts = {json.loads(server.post("/v1/completions", completion(12, temperature=0))[2])["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
