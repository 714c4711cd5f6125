"""parleyd and llama-server in turn on loopback, under the same load: same prompts, same number of tokens in every answer.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import json
import os
import pathlib
import random
import resource
import socket
import statistics
import subprocess
import tempfile
import time

from peers import quantize, run, say

# One token each (and the blank before it) in the default model's vocabulary.
WORDS = ("time year people way day man thing woman life child world school state family student group country problem hand part place "
         "case week company system program question work government number night point home water room mother area money story fact "
         "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
         "member law car city").split()
SHORT, LONG, PREFIX, ANSWER = 20, 1000, 1500, 64  # tokens
MODEL = "bench"


def prompt(seed, n):
    r = random.Random(seed)
    return " ".join(r.choice(WORDS) for _ in range(n))


def body(text, n_tokens):
    return json.dumps({"model": MODEL, "prompt": text, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0,
                       "ignore_eos": True, "max_tokens": n_tokens})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def status_of(port, path="/health"):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as s:
        s.settimeout(2)
        s.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return int(s.recv(64).split()[1])
    return 0


class Server:
    """A running server; made by started()."""

    def __init__(self, name, command, log):
        self.name, self.log, self.port = name, log, free_port()
        begin = time.monotonic()
        self.process = subprocess.Popen([str(c) for c in [*command, "--port", self.port]], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while status_of(self.port) != 200:
            if self.process.poll() is not None or time.monotonic() - begin > 60:
                self.stop()
                raise RuntimeError(f"{name} did not start: {pathlib.Path(log.name).read_text(errors='replace')[-400:]}")
            time.sleep(0.002)
        self.ready_ms = (time.monotonic() - begin) * 1e3

    def peak_mb(self):
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def started(name, command):
    with tempfile.NamedTemporaryFile("w", prefix="server-", suffix=".log") as log:
        server = Server(name, command, log)
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def busy_neighbour():
    """One process that does nothing but compute."""
    process = subprocess.Popen(["sh", "-c", "while :; do :; done"], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def load(args, server, bodies, clients, seconds, answer=None):
    """The load generator's results. Answers of another length than wanted are an error: the speeds could not be compared."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write("\n".join(bodies) + "\n")
        f.flush()
        out = json.loads(run([args.build / "load", "--port", server.port, "--path", "/v1/completions", "--bodies", f.name, "--clients",
                              clients, "--requests", len(bodies), "--seconds", seconds], timeout=seconds + 30))
    if out["failed"]:
        raise RuntimeError(f"{server.name}: {out['failed']} of {len(bodies)} requests failed: {out['why']}")
    if answer and out["finished"] and out["completion_tokens"] != [answer, answer]:
        raise RuntimeError(f"{server.name} gave {out['completion_tokens']} tokens where {answer} were wanted")
    return out


def parleyd(args, *flags):
    return [args.parleyd, "--model", args.model, "--alias", MODEL, "--threads", args.threads, "--log-level", "warn", *flags]


def llama_server(args, model, slots, tokens):
    """A slot for each client, and room in each for the whole of a request."""
    return [args.llamacpp / "llama-server", "-m", model, "-a", MODEL, "-t", args.threads, "-np", slots, "-c", slots * (tokens + 32),
            "--no-webui"]


def servers(args, slots, tokens):
    """(name, command) of each that is compared."""
    return [("parleyd", parleyd(args)), ("llama-server", llama_server(args, args.model, slots, tokens)),
            ("llama-server Q4_0", llama_server(args, quantize(args.llamacpp, args.model, "Q4_0"), slots, tokens))]


# ---- cases: each takes args and whether to turn the order round, and gives {server: figures} ------------------------------

def in_turn(all_servers, reverse, measure):
    found = {}
    for name, command in all_servers[::-1] if reverse else all_servers:
        with started(name, command) as server:
            found[name] = {**measure(server), "ready_ms": server.ready_ms, "peak_mb": server.peak_mb()}
    return found


def streams(clients, tokens, n_requests, seconds):
    def case(args, reverse):
        def measure(server):
            load(args, server, [body(prompt(-1, SHORT), 4)], 1, 30)
            return load(args, server, [body(prompt(i, tokens), ANSWER) for i in range(n_requests)], clients, seconds, ANSWER)
        found = servers(args, clients, tokens + ANSWER)
        if clients <= 4:
            found.append(("parleyd, no guesses", parleyd(args, "--speculation", "off")))
        return in_turn(found, reverse, measure)
    return case


def shared_prefix(args, reverse):
    """First text of prompts that begin with the same 1,500 tokens, and of short ones, one client."""
    start = prompt(7, PREFIX)

    def measure(server):
        load(args, server, [body(start, 4)], 1, 60)
        short = load(args, server, [body(prompt(1000 + i, SHORT), 8) for i in range(12)], 1, 60, 8)
        warm = load(args, server, [body(start + " " + prompt(2000 + i, 10), 8) for i in range(12)], 1, 60, 8)
        return {"short_first_ms": short["first_ms"]["p50"], "warm_first_ms": warm["first_ms"]["p50"]}
    return in_turn(servers(args, 1, PREFIX + 100), reverse, measure)


def busy(args, reverse):
    """Output of four clients undisturbed, and beside a process that keeps one processor busy."""
    def measure(server):
        bodies = [body(prompt(i, SHORT), ANSWER) for i in range(16)]
        load(args, server, bodies[:4], 4, 20)
        alone = load(args, server, bodies, 4, 20, ANSWER)
        with busy_neighbour():
            beside = load(args, server, bodies, 4, 20, ANSWER)
        return {"alone_tok_s": alone["tok_s"], "beside_tok_s": beside["tok_s"], "kept": beside["tok_s"] / alone["tok_s"]}
    return in_turn(servers(args, 4, SHORT + ANSWER), reverse, measure)


def small_requests(args, reverse):
    def measure(server):
        rates = {}
        for path in ("/health", "/v1/models"):
            command = [args.build / "load", "--port", server.port, "--get", path, "--clients", 8, "--seconds"]
            run([*command, 0.3])
            rates[path] = json.loads(run([*command, 1.5]))["requests_s"]
        return rates
    return in_turn(servers(args, 8, 64)[:2], reverse, measure)


def many_streams(args, reverse):
    """2,000 streams at once; each finishes."""
    n = 2000

    def measure(server):
        bodies = [body(prompt(i, 5), 4) for i in range(n)]
        return load(args, server, bodies, n, 150, 4)
    return in_turn([("parleyd", parleyd(args, "--queue-limit", 4000, "--max-connections", 4096))], reverse, measure)


def ready(args, reverse):
    """From the start of the process to the first 200 of /health, the file in the page cache."""
    args.model.read_bytes()
    times = {}
    for _ in range(5):
        for name, command in servers(args, 1, 1024)[:2]:
            with started(name, command) as server:
                times.setdefault(name, []).append(server.ready_ms)
    return {name: {"ready_ms": statistics.median(t)} for name, t in times.items()}


def cases(args):
    """Name -> case."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = {}
    for n, requests in ((1, 4), (4, 12), (8, 16), (16, 32), (64, 64)):
        found[f"short {n}"] = streams(n, SHORT, requests, 45)
    for n, requests in ((1, 2), (4, 8), (8, 8), (16, 16), (64, 64)):
        found[f"long {n}"] = streams(n, LONG, requests, 60)
    found.update({"prefix": shared_prefix, "busy": busy, "small requests": small_requests, "many streams": many_streams, "ready": ready})
    if args.quick:
        found = {k: v for k, v in found.items() if k in ("short 1", "short 16", "prefix", "small requests", "ready")}
    return found


def one_round(args, case, index):
    found = case(args, index % 2 == 1)
    say("http: " + "; ".join(f"{name} " + ", ".join(f"{k} {v:.1f}" for k, v in f.items() if k in
                             ("tok_s", "warm_first_ms", "kept", "/health", "/v1/models", "finished", "ready_ms"))
                             for name, f in found.items()))
    return found
