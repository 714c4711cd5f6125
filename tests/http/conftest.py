"""Starts parleyd for whole-server tests: a port of its own, ready by /health, ended by its process id.

PARLEYD=FILE runs another binary (build/asan/parleyd), PARLEY_SLOW=N stretches time limits N times (3 when nothing is said: the
machine may be small and busy; sanitizers take longer). PARLEY_TEST_DEVICE=cuda-emulated|cuda|… runs the daemons on that
device where a test does not choose one: cuda-emulated is the CUDA device on a CPU (tests/cuda_emu), for tiny models.
SPDX-License-Identifier: Apache-2.0
"""
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests/tools/fake_worker.py"  # for jobs that train nothing
PARLEYD = Path(os.environ.get("PARLEYD", ROOT / "build/release/parleyd"))
SLOW = float(os.environ.get("PARLEY_SLOW", "8" if "asan" in str(PARLEYD) or "tsan" in str(PARLEYD) else "3"))
DEVICE = os.environ.get("PARLEY_TEST_DEVICE", "")
EMULATED = PARLEYD.resolve().parent / "libparley_cuda_emu.so"


def device_args(device=DEVICE):
    if device == "cuda-emulated":
        assert EMULATED.is_file(), "run make cuda-emu"
        return ["--device", "cuda", "--cuda-library", str(EMULATED)]
    return ["--device", device] if device else []


NCCL = {"LD_LIBRARY_PATH": str(EMULATED.parent / "nccl_emu")}  # of a daemon whose ranks are threads on emulated GPUs


def until(what, seconds=5.0, step=0.02):
    """Calls what() until it gives something true; fails after a while."""
    end = time.monotonic() + seconds * SLOW
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds * SLOW} s: {what}"
        time.sleep(step)


class Daemon:
    def __init__(self, directory, *args, model=None, env=None, launcher=()):
        self.log_path = Path(directory) / f"parleyd-{time.monotonic_ns()}.log"
        data = [] if "--data-dir" in args else ["--data-dir", str(Path(directory) / f"data-{time.monotonic_ns()}")]
        device = [] if "--device" in args else device_args()
        command = [*map(str, launcher), str(PARLEYD), "--port", "0", *data, *device, *(["--model", str(model)] if model else []), *(a if isinstance(a, bytes) else str(a) for a in args)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PARLEY_")}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**clean, **(env or {})})
        self.port = None

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_listening(self):
        def found():
            assert self.process.poll() is None, self.log
            return re.search(r"listening on https?://127\.0\.0\.1:(\d+)", self.log)
        self.port = int(until(found, 20).group(1))
        return self

    def wait_ready(self):
        self.wait_listening()
        until(lambda: self.process.poll() is None and self.get("/health")[0] == 200, 60)
        return self

    def connect(self, timeout=20):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout * SLOW)

    def request(self, method, path, body=None, headers=None, timeout=60):
        """One request on a connection of its own: status, headers (lower case), body."""
        c = self.connect(timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            h = {"Content-Type": "application/json"} if data is not None else {}
            c.request(method, path, data, {**h, **(headers or {})})
            r = c.getresponse()
            return r.status, {k.lower(): v for k, v in r.getheaders()}, r.read()
        finally:
            c.close()

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, headers=None):
        return self.request("POST", path, body, headers)

    def raw(self, data, timeout=10, shut=False):
        """Sends bytes, reads until the server closes. (bytes, closed)"""
        with self.socket(timeout) as s:
            try:
                s.sendall(data)
                if shut:
                    s.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass
            out = b""
            try:
                while True:
                    piece = s.recv(65536)
                    if not piece:
                        return out, True
                    out += piece
            except TimeoutError:
                return out, False
            except ConnectionResetError:
                return out, True

    def socket(self, timeout=10):
        s = socket.create_connection(("127.0.0.1", self.port), timeout=timeout * SLOW)
        return s

    def metrics(self, headers=None):
        """Name with labels (model_name left out) -> value, added up over the models."""
        status, _, body = self.get("/metrics", headers)
        assert status == 200, body
        out = {}
        for line in body.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r',?model_name="[^"]*"', "", name).replace("{,", "{").replace("{}", "")
                out[name] = out.get(name, 0) + float(value)
        return out

    def idle(self):
        m = self.metrics()
        return (m["parley_num_requests_running"] == 0 and m["parley_num_requests_waiting"] == 0
                and m["parley_kv_cache_pages_held"] == 0)

    def stop(self, sig=signal.SIGTERM, seconds=30):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(seconds * SLOW)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def find_tool(name):
    for place in (os.environ.get("PARLEY_TOOLS"), PARLEYD.resolve().parent / "tests/tools", ROOT / "build/release/tests/tools",
                  PARLEYD.resolve().parent, ROOT / "build/release"):
        if place and (Path(place) / name).is_file():
            return Path(place) / name
    raise FileNotFoundError(f"{name} is not built: run make")


def make_model(directory, name, *args):
    path = Path(directory) / name
    subprocess.run([str(find_tool("make_model")), "--out", str(path), *map(str, args)], check=True, timeout=60 * SLOW)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Makes tiny models by their options, once each."""
    directory = tmp_path_factory.mktemp("models")
    made = {}

    def get(name, *args):
        if name not in made:
            made[name] = make_model(directory, f"{name}.gguf", *args)
        return made[name]
    return get


@pytest.fixture(scope="session")
def tiny(models):
    return models("tiny")


@pytest.fixture(scope="session")
def long(models):
    """Wide and deep enough that thousands of tokens take seconds."""
    return models("long", "--layers", 6, "--embd", 256, "--ctx", 16384)


@pytest.fixture
def start(tmp_path):
    """start(*args, model=…) -> a running Daemon; all are ended after the test, and must have ended well."""
    running = []

    def begin(*args, model=None, ready=True, env=None):
        d = Daemon(tmp_path, *args, model=model, env=env)
        running.append(d)
        return d.wait_ready() if ready else d
    yield begin
    for d in running:
        code = d.process.poll()
        if code is None:
            code = d.stop()
            assert code == 0, f"exit status {code}\n{d.log}"
        assert "Sanitizer" not in d.log, d.log


@pytest.fixture(scope="module")
def server(tmp_path_factory, long):
    """One daemon shared by a module's tests; short deadlines, short queue, no guesses, so that a long answer lasts."""
    d = Daemon(tmp_path_factory.mktemp("server"), "--log-level", "debug", "--header-timeout", 2, "--max-body-mb", 1,
               "--max-sequences", 4, "--queue-limit", 8, "--speculation", "off", "--log-format", "json", model=long).wait_ready()
    yield d
    assert d.process.poll() is None, d.log
    until(d.idle)
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


# ---- files -------------------------------------------------------------------------------------------------------------

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the world"}]})
GOOD = (CHAT + "\n") * 12


def client_of(d, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{d.port}/v1", api_key=key, max_retries=0, timeout=120 * SLOW)


def upload(c, text=GOOD, purpose="fine-tune", name="data.jsonl", **more):
    return c.files.create(file=(name, io.BytesIO(text.encode(errors="surrogateescape") if isinstance(text, str) else text)), purpose=purpose, **more)


def data_dir(d):
    return Path(re.search(r"files and jobs in (\S+)", d.log).group(1))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, tiny):
    """One for a module's tests, with little room: 4 MiB a file, 16 MiB together."""
    d = Daemon(tmp_path_factory.mktemp("files"), "--max-file-mb", 4, "--files-quota-mb", 16, model=tiny).wait_ready()
    yield d
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


@pytest.fixture
def client(daemon):
    """Its client; the test's files are deleted, and it must have ended its uploads."""
    c = client_of(daemon)
    yield c
    for f in c.files.list():
        c.files.delete(f.id)
    until(lambda: os.listdir(data_dir(daemon) / "uploads") == [])
