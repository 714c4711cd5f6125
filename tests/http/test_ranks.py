"""A model cut over ranks: threads of the daemon, and processes under mpirun. What one rank answers, they answer too, with adapters, the prefix
cache and preemption; a rank that dies or stands still ends the requests with a clear error, and the daemon within its time.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from conftest import EMULATED, NCCL, PARLEYD, SLOW, Daemon, device_args, find_tool, until

SMOLLM2 = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "parley/SmolLM2-135M-Instruct.Q4_1.gguf"
SANITIZED = "asan" in str(PARLEYD) or "tsan" in str(PARLEYD)
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None or SANITIZED, reason="no mpirun, or a build whose sanitizer watches MPI too")
TIMEOUT = 3
GPUS_BY_HOST = ["--device", "cuda", "--cuda-library", str(EMULATED), "--rank-exchange", "host"]  # the stand-in for NCCL knows threads only


class Processes(Daemon):
    """A daemon of several processes; signals go to one rank."""

    def __init__(self, directory, n, *args, launcher=(), **options):
        super().__init__(directory, *args, launcher=[*MPIRUN, *launcher, "-n", n], **options)
        self.pids = {}

    def wait_ready(self):
        super().wait_ready()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            env = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)
            if "OMPI_COMM_WORLD_RANK" in env:
                self.pids[int(env["OMPI_COMM_WORLD_RANK"])] = int(pid)
        return self

    def stop(self, sig=signal.SIGTERM, seconds=30):
        if self.process.poll() is None:
            os.kill(self.pids[0], sig)
        return self.process.wait(seconds * SLOW)


WAYS = [pytest.param("threads", 2, id="threads-2"), pytest.param("threads", 3, id="threads-3"),
        pytest.param("mpi", 2, id="mpirun-2", marks=needs_mpi), pytest.param("mpi", 3, id="mpirun-3", marks=needs_mpi)]


@pytest.fixture
def launch(tmp_path):
    """launch(way, ranks, *args, model=…) -> a running daemon; way None = one rank. All must end well."""
    running = []

    def begin(way, n, *args, model):
        if way == "mpi":
            d = Processes(tmp_path, n, *args, model=model)
        else:
            d = Daemon(tmp_path, *args, *(["--tensor-parallel", n] if way else []), model=model)
        running.append(d)
        return d.wait_ready()
    yield begin
    for d in running:
        if d.process.poll() is None:
            assert d.stop() == 0, d.log
        assert "Sanitizer" not in d.log, d.log


def make_adapter(path, seed):
    """Random values for every projection, as PEFT saves them: the model of test_same_text."""
    shapes = {"self_attn.q_proj": (96, 96), "self_attn.k_proj": (48, 96), "self_attn.v_proj": (48, 96), "self_attn.o_proj": (96, 96),
              "mlp.gate_proj": (192, 96), "mlp.up_proj": (192, 96), "mlp.down_proj": (96, 192)}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
                                                          "target_modules": [name.split(".")[1] for name in shapes]}))
    numbers, head, data = random.Random(seed), {}, b""
    for layer in range(2):
        for name, (rows, cols) in shapes.items():
            for half, shape in (("A", (4, cols)), ("B", (rows, 4))):
                values = struct.pack(f"{shape[0] * shape[1]}f", *(numbers.uniform(-0.5, 0.5) for _ in range(shape[0] * shape[1])))
                head[f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight"] = {
                    "dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
                data += values
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(place / name, seed) for seed, name in enumerate(("a", "b", "late"))}


def complete(d, model, prompt, n=100):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": n, "ignore_eos": True, "logprobs": 1}
    status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert status == 200, text
    reply = json.loads(text)
    return reply["choices"][0]["logprobs"]["tokens"], reply["usage"]


# ---- the same answers ----------------------------------------------------------------------------------------------------------


def some_texts(d, names, late):
    """Requests for the base and adapters side by side, with prompts that begin alike; then an adapter that comes and goes; then again."""
    prompts = [(f"{i % 4}: " + "The quick brown fox jumps over the lazy dog. " * (4 + i % 3) + f"And {i}", names[i % len(names)]) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda p: complete(d, p[1], p[0])[0], prompts))
    for action, body in (("load", {"lora_name": "late", "lora_path": str(late)}), ("unload", {"lora_name": "late"})):
        status, _, text = d.post(f"/v1/{action}_lora_adapter", body)
        assert status == 200, text
        if action == "load":
            texts.append(complete(d, "late", prompts[0][0])[0])
    for _ in range(2):
        tokens, usage = complete(d, names[0], prompts[0][0])
        assert tokens == texts[0]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert d.metrics()["parley_num_preemptions_total"] > 0
    return texts


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, models):
    """What one rank answers, for each model once."""
    known = {}

    def get(name, model, args, *how):
        if name not in known:
            d = Daemon(tmp_path_factory.mktemp("one"), *args, model=model).wait_ready()
            known[name] = some_texts(d, *how)
            assert d.stop() == 0, d.log
        return known[name]
    return get


@pytest.mark.parametrize("way, n", WAYS)
def test_same_text(launch, one_rank, models, adapters, way, n):
    base, names = models("ranks-llama", "--heads", 12, "--kv-heads", 6, "--embd", 96, "--ff", 192), ["base", "a", "b"]
    args = ["--alias", "base", "--adapter", f"a={adapters['a']}", "--adapter", f"b={adapters['b']}", "--adapter-dir", adapters["a"].parent,
            "--kv-cache-mb", 1, "--kv-type", "f32", "--max-sequences", 12]
    d = launch(way, n, *args, model=base)
    assert some_texts(d, names, adapters["late"]) == one_rank("llama", base, args, names, adapters["late"])


@pytest.mark.parametrize("way, n", WAYS)
def test_same_text_with_biases(launch, models, way, n):
    gpt2 = models("ranks-gpt2", "--arch", "gpt2", "--heads", 6, "--kv-heads", 6, "--embd", 96, "--ff", 160)
    texts = []
    for start in ((None, 1), (way, n)):
        d = launch(*start, "--alias", "m", model=gpt2)
        texts.append([complete(d, "m", f"The {i} brown foxes", 40)[0] for i in range(4)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("way, n", WAYS)
def test_real_model(launch, way, n, tmp_path):
    if not SMOLLM2.is_file() or SANITIZED:
        pytest.skip("the default model is not here, or takes too long")
    body = {"model": "m", "messages": [{"role": "user", "content": "Name three colours and say why you like them."}],
            "max_tokens": 48, "temperature": 0, "logprobs": True}
    answers = []
    for start in ((None, 1), (way, n)):
        d = launch(*start, "--alias", "m", "--max-sequences", 4, model=SMOLLM2)
        status, _, text = d.request("POST", "/v1/chat/completions", body, timeout=300)
        assert status == 200, text
        answers.append(json.loads(text)["choices"][0])
        assert d.stop() == 0, d.log
    assert answers[0] == answers[1]  # to the last bit of the log-probabilities


def logits(model, *args, launcher=()):
    lines = b"".join(json.dumps({"tokens": [(i * 7919 + s * 31) % 300 for i in range(40)], "from": 20}).encode() + b"\n" for s in range(3))
    out = subprocess.run([*launcher, str(find_tool("logits")), "--model", str(model), "--threads", "1", "--kv-type", "f32", *map(str, args)],
                         input=lines, capture_output=True, timeout=120 * SLOW)
    assert out.returncode == 0, out.stderr
    values, data = [], out.stdout
    while data:
        rows, width = struct.unpack("II", data[:8])
        values += struct.unpack(f"{rows * width}f", data[8:8 + 4 * rows * width])
        data = data[8 + 4 * rows * width:]
    return values


MODELS = [("llama", ("--heads", 12, "--kv-heads", 6, "--embd", 96, "--ff", 192)),
          ("llama-biases", ("--heads", 12, "--kv-heads", 3, "--embd", 96, "--ff", 192, "--biases", "--untied", "--type", "bf16")),
          ("gpt2", ("--arch", "gpt2", "--heads", 6, "--kv-heads", 6, "--embd", 96, "--ff", 160)),
          ("q4_1", ("--heads", 9, "--kv-heads", 3, "--embd", 288, "--ff", 768, "--type", "q4_1"))]


@needs_mpi
@pytest.mark.parametrize("n", (2, 3))
@pytest.mark.parametrize("name, flags", MODELS, ids=[m[0] for m in MODELS])
def test_same_logits_by_processes(models, name, flags, n):
    """Threads are compared in tests/unit/check_ranks.c."""
    model = models(f"ranks-logits-{name}", *flags)
    one, several = logits(model), logits(model, "--mpi", launcher=[*MPIRUN, "-n", str(n)])
    scale = max(map(abs, one))
    assert len(one) == len(several) > 0
    assert max(abs(a - b) for a, b in zip(one, several)) <= (0 if name == "q4_1" else 1e-4 * scale)


# ---- a rank is lost ------------------------------------------------------------------------------------------------------------


def long_answer(d, stream):
    """Status and body of a request that would take long; None where the connection broke."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 6000, "temperature": 0, "ignore_eos": True, "stream": stream}
    try:
        status, _, text = d.request("POST", "/v1/completions", body, timeout=60)
    except OSError:
        return None
    except Exception:  # a body that ends too early
        return None
    return status, text


def lose(d, rank, sig):
    """Both kinds of requests run; then the rank is lost. Their ends, what health said meanwhile, seconds to the end, exit status."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(long_answer, d, stream) for stream in (True, False)]
        until(lambda: d.metrics()["parley_num_requests_running"] == 2, 20)
        os.kill(d.pids[rank], sig)
        began, health = time.monotonic(), set()
        while d.process.poll() is None and time.monotonic() - began < 40 * SLOW:
            try:
                c = d.connect(0.2)
                c.request("GET", "/health")
                health.add(c.getresponse().status)
                c.close()
            except OSError:
                pass
            time.sleep(0.02)
        return [w.result() for w in waiting], health, time.monotonic() - began, d.process.poll()


@needs_mpi
@pytest.mark.parametrize("sig", (signal.SIGKILL, signal.SIGSTOP), ids=("killed", "stopped"))
@pytest.mark.parametrize("rank", (0, 2))
def test_lost_rank(tmp_path, models, rank, sig):
    long = models("ranks-long", "--layers", 6, "--embd", 256, "--kv-heads", 4, "--ctx", 16384)
    d = Processes(tmp_path, 2 + (rank > 0), "--alias", "m", "--rank-timeout", TIMEOUT, "--context", 8192, model=long).wait_ready()
    try:
        (streamed, whole), health, seconds, status = lose(d, rank, sig)
    finally:
        if d.process.poll() is None:
            d.process.kill()
    assert status in (3, 128 + signal.SIGKILL), d.log
    assert seconds < (TIMEOUT if sig == signal.SIGSTOP else 0) + (5 if rank == 0 else 0) + 8 * SLOW, d.log
    if rank > 0:
        assert whole is not None and whole[0] == 503, d.log
        assert json.loads(whole[1])["error"] == {"message": "a rank that computes a part of the model was lost", "type": "server_error",
                                                 "param": None, "code": "rank_lost"}
        assert streamed is not None and b'"code":"rank_lost"' in streamed[1]
        assert 503 in health
    for pid in d.pids.values():
        until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", 5)


@needs_mpi
def test_lost_while_idle(tmp_path, tiny):
    """Nobody asks for anything, and yet it is noticed."""
    d = Processes(tmp_path, 2, "--alias", "m", "--rank-timeout", 1, model=tiny).wait_ready()
    time.sleep(2.5)
    assert d.get("/health")[0] == 200
    os.kill(d.pids[1], signal.SIGSTOP)
    assert d.process.wait(15 * SLOW) == 3, d.log
    assert "rank 1 of 2 has not answered" in d.log


@needs_mpi
@pytest.mark.parametrize("rank", (0, 1))
def test_late_failure(tmp_path, models, rank):
    """A rank whose GPU is lost while it computes: rank 0's clients have their answer before the processes end, whichever rank it is."""
    model = models("ranks-late", "--heads", 4, "--kv-heads", 2, "--embd", 64, "--ctx", 16384)
    faulty = ["-x", "PARLEY_EMU_FAULT=lost:600"]
    args = [str(a) for a in ("--port", "0", "--data-dir", tmp_path / "data", "--alias", "m", "--rank-timeout", 20, *GPUS_BY_HOST)]
    launcher = [*(faulty if rank == 0 else []), "-n", "1", str(PARLEYD), "--model", str(model), *args, ":", *(faulty if rank == 1 else [])]
    d = Processes(tmp_path, 1, "--alias", "m", "--rank-timeout", 20, *GPUS_BY_HOST, model=model, launcher=launcher).wait_ready()
    status, body = long_answer(d, False)
    assert status == 503 and json.loads(body)["error"]["code"] == ("rank_lost" if rank else "device_failed"), body
    began = time.monotonic()
    assert d.process.wait(20 * SLOW) == 3, d.log
    assert time.monotonic() - began < 5 + 3 * SLOW, "nobody waits for the timeout"
    assert "an illegal memory access was encountered" in d.log and f"rank {rank} of 2" in d.log, d.log


@needs_mpi
def test_file_that_one_rank_lacks(tmp_path, tiny):
    """Each process reads the model by itself: the one that cannot says why, and all end at once."""
    other = tmp_path / "empty"
    other.mkdir()
    launcher = ["-n", "1", str(PARLEYD), "--port", "0", "--data-dir", str(tmp_path / "data"), "--model", str(tiny), ":"]
    d = Processes(tmp_path, 1, "--model-dir", other, "--rank-timeout", 60, launcher=launcher)
    began = time.monotonic()
    assert d.process.wait(20 * SLOW) != 0
    assert time.monotonic() - began < 10 * SLOW
    assert f"rank 1 of 2: {other} holds no .gguf file" in d.log, d.log


# ---- on another device ---------------------------------------------------------------------------------------------------------


emulated = pytest.mark.skipif(SANITIZED, reason="the emulated device is not of this build")
GPUS = {**NCCL, "PARLEY_EMU_GPUS": "3"}


@emulated
@pytest.mark.parametrize("ranks, exchange", [(2, "nccl"), (3, "nccl"), (2, "host"), (3, "host")])
@pytest.mark.parametrize("type, agree", [("q4_0", 1e-3), ("f32", 1e-3)])
def test_ranks_on_cuda(start, models, type, agree, ranks, exchange):
    """Threads with a part of the model on an (emulated) GPU each, which exchange by (a stand-in of) NCCL or through the host's memory."""
    model = models(f"ranks-cuda-{type}", "--type", type, "--heads", 6, "--kv-heads", 3, "--embd", 192, "--ff", 192)
    body = {"model": "m", "prompt": ["One for all", "and all for one " * 9], "max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answers = []
    for n in (1, ranks):
        d = start("--alias", "m", "--tensor-parallel", n, "--rank-exchange", exchange, *device_args("cuda-emulated"), model=model, env=GPUS)
        answers.append(json.loads(d.post("/v1/completions", body)[2])["choices"])
    assert {"nccl": "exchange by NCCL", "host": "exchange through the host's memory"}[exchange] in d.log
    for one, several in zip(*answers, strict=True):
        assert one["text"] == several["text"]
        assert several["logprobs"]["token_logprobs"] == pytest.approx(one["logprobs"]["token_logprobs"], abs=agree)


@emulated
def test_exchange_is_chosen(start, tiny):
    """Between the GPUs where each rank has its own; ranks that share one, or are on a CPU, use the host's memory."""
    d = start("--tensor-parallel", 2, *device_args("cuda-emulated"), model=tiny, env=GPUS)
    assert "exchange by NCCL" in d.log
    d = start("--tensor-parallel", 2, "--device", "cuda:0", "--cuda-library", EMULATED, model=tiny)
    assert "exchange through the host's memory" in d.log
    assert json.loads(d.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 8})[2])["usage"]["completion_tokens"] > 0
    d = start("--tensor-parallel", 2, "--device", "cpu", model=tiny)
    assert "exchange in memory" in d.log


@emulated
@pytest.mark.parametrize("ranks, how, says", [(3, "absent:300", "the other ranks have not come for 3.0 s"), (2, "stuck:300", "the other ranks have not come for 3.0 s"),
                                              (3, "error:300", "NCCL failed")])
def test_nccl_fails_while_it_runs(tmp_path, models, ranks, how, says):
    """A rank that does not come, an exchange that does not end, an error that NCCL reports: noticed within the timeout, and clients get their answers."""
    model = models("ranks-nccl-long", "--heads", 6, "--kv-heads", 3, "--embd", 96, "--ctx", 16384)
    d = Daemon(tmp_path, "--alias", "m", "--tensor-parallel", ranks, "--rank-timeout", TIMEOUT, *device_args("cuda-emulated"), model=model,
               env={**GPUS, "PARLEY_EMU_NCCL": how}).wait_ready()
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        streamed, whole = (w.result() for w in [pool.submit(long_answer, d, stream) for stream in (True, False)])
    assert whole[0] == 503 and json.loads(whole[1])["error"]["code"] == "rank_lost", d.log
    assert b'"code":"rank_lost"' in streamed[1] or streamed[0] == 503
    assert d.process.wait(20 * SLOW) == 3, d.log
    assert time.monotonic() - began < TIMEOUT + 8 * SLOW, d.log
    assert says in d.log


@emulated
@pytest.mark.parametrize("ranks, kv_heads", [(2, 4), (3, 4)])
def test_cache_of_several_gpus(start, models, ranks, kv_heads):
    """Each GPU's memory is used: the cache has room for more tokens with more ranks; where heads do not divide, the fullest GPU decides."""
    model = models(f"ranks-room-{kv_heads}", "--heads", kv_heads, "--kv-heads", kv_heads, "--embd", 64, "--ctx", 512)
    pages = []
    for n in (1, ranks):
        d = start("--tensor-parallel", n, *device_args("cuda-emulated"), "--cuda-memory-percent", 20, model=model,
                  env={**GPUS, "PARLEY_EMU_MEMORY_MB": "64"})
        pages.append(int(d.log.split("cache ")[1].split(" pages")[0]))
    most = -(-kv_heads // ranks)
    assert pages[1] == pytest.approx(pages[0] * kv_heads / most, rel=0.15)


@emulated
@pytest.mark.parametrize("signalled", (False, True))
def test_rank_that_hangs_while_loading(tmp_path, tiny, signalled):
    """Nobody waits for it longer than for any rank, and a signal ends the daemon at once."""
    d = Daemon(tmp_path, "--tensor-parallel", 2, "--rank-timeout", 60 if signalled else 1, *device_args("cuda-emulated"), model=tiny,
               env={**GPUS, "PARLEY_EMU_FAULT": "hang:1"}).wait_listening()
    began = time.monotonic()
    if signalled:
        time.sleep(1)
        d.process.send_signal(signal.SIGTERM)
    assert d.process.wait(30 + 5 * SLOW) == (0 if signalled else 3), d.log
    assert time.monotonic() - began < (2 + SLOW if signalled else 22 + 4 * SLOW), d.log
    assert ("while loading" if signalled else "rank 1 does not end: it is left where it stands") in d.log


@needs_mpi
def test_signal_while_loading(tmp_path, tiny):
    d = Processes(tmp_path, 2, *GPUS_BY_HOST, "--rank-timeout", 60, model=tiny, launcher=["-x", "PARLEY_EMU_FAULT=hang:1"])
    d.wait_listening()
    time.sleep(0.5)
    children = Path(f"/proc/{d.process.pid}/task/{d.process.pid}/children").read_text().split()
    first = min(map(int, children))
    os.kill(first, signal.SIGTERM)
    began = time.monotonic()
    d.process.wait(30 * SLOW)
    assert time.monotonic() - began < 3 + 2 * SLOW, d.log
    assert "while loading: leaving" in d.log


# ---- bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, line", [
    (["--tensor-parallel", "0"], "tensor-parallel must be a whole number from 1 to 64"),
    (["--tensor-parallel", "65"], "tensor-parallel must be a whole number from 1 to 64"),
    (["--tensor-parallel", "5"], "possible numbers of ranks are 1, 2, 3"),
    (["--tensor-parallel", "2", "--rank-timeout", "0"], "rank-timeout must be a whole number from 1 to 3600"),
    (["--ranks", "fork"], "ranks must be one of"),
    (["--tensor-parallel", "2", "--add-model", "more=m.gguf"], "these need one rank, but the first model is cut over 2: start parleyd as one process without"),
])
def test_bad_numbers(start, models, args, line):
    d = start(*args, model=models("ranks-three", "--heads", 6, "--kv-heads", 3, "--embd", 96), ready=False)
    assert d.process.wait(20 * SLOW) == 2, d.log
    assert line in d.log.splitlines()[-2 if "stopped" in d.log else -1], d.log


@emulated
@pytest.mark.parametrize("ranks, args, env, says", [
    (3, [], {"PARLEY_EMU_GPUS": "2"}, "rank 2 of 3: device cuda:2: there is no GPU 2: this machine has 2, numbered from 0; CUDA_VISIBLE_DEVICES may hide others "
                                      "(each rank takes a GPU of its own: start as many ranks as there are GPUs, or let them share one with --device cuda:0)"),
    (2, [], {"PARLEY_EMU_FAULT": "mixed"}, "rank 0 computes on cuda:0 (emulated) of compute capability 8.0, rank 1 on cuda:1 (emulated) of 9.0: ranks need GPUs of one kind: "
                                           "choose equal ones with CUDA_VISIBLE_DEVICES, or start fewer ranks"),
    (2, ["--rank-exchange", "host"], {"PARLEY_EMU_FAULT": "mixed"}, "ranks need GPUs of one kind"),
    (2, [], {"PARLEY_EMU_OTHERS_MB": "1:1024"}, "rank 1 of 2: cuda:1 (emulated) has 0 of 1024 MiB free, the weights of the model take 0 on each rank: end what else uses the GPU "
                                                "(nvidia-smi lists it)"),
    (3, ["--batch-tokens", 8192, "--kv-cache-mb", 1], {"PARLEY_EMU_OTHERS_MB": "1:1000"}, "a rank could not load its part of the model: its own line in the log"),
    (2, ["--kv-cache-mb", 4096], {}, "which is 11184800 tokens: cuda:0 (emulated), with the other ranks' GPUs, has 14"),
    (2, ["--kv-cache-mb", 4096, "--device", "cuda:0"], {}, "cuda:0 (emulated), with the other ranks' GPUs, has 7"),
    (2, ["--kv-cache-mb", 1000], {"PARLEY_EMU_OTHERS_MB": "1:900"}, "no memory for a KV cache of 1000 MiB"),
    (4, [], {}, "possible numbers of ranks are 1, 2, 3"),
    (2, [], {"LD_LIBRARY_PATH": "/nowhere"}, "NCCL, by which GPUs exchange, cannot be loaded: libnccl.so.2: cannot open shared object file: No such file or directory: "
                                             "install NVIDIA's libnccl2 (or the Python package nvidia-nccl-cu13, with its folder in LD_LIBRARY_PATH), or take "
                                             "--rank-exchange host"),
    (2, [], {"PARLEY_EMU_NCCL": "old"}, "libnccl.so.2 is version 2.10, parley needs 2.18: install NVIDIA's libnccl2"),
    (3, [], {"PARLEY_EMU_NCCL": "init"}, "rank 0 of 3, cuda:0 (emulated): NCCL failed, starting: unhandled system error: start with NCCL_DEBUG=INFO to see "
                                              "why, or take --rank-exchange host"),
    (2, ["--device", "cuda:0", "--rank-exchange", "nccl"], {}, "rank-exchange is nccl, but ranks 0 and 1 share cuda:0 (emulated), and NCCL wants a GPU for each rank: start "
                                                               "fewer ranks, or take --rank-exchange host"),
    (2, ["--device", "cpu", "--rank-exchange", "nccl"], {}, "rank-exchange is nccl, but ranks compute on cpu-"),
    (2, ["--rank-exchange", "rdma"], {}, "rank-exchange must be one of"),
])
def test_gpus_that_cannot_be_ranks(tmp_path, models, ranks, args, env, says):
    model = models("ranks-three", "--heads", 6, "--kv-heads", 3, "--embd", 96)
    device = [] if "--device" in args else ["--device", "cuda"]
    d = Daemon(tmp_path, "--tensor-parallel", ranks, *device, "--cuda-library", EMULATED, *args, model=model, env={**GPUS, **env})
    assert d.process.wait(20 * SLOW) == 2, d.log
    errors = [line for line in d.log.splitlines() if " error main: " in line or " must be " in line]
    assert len(errors) == 1 and says in errors[0], d.log


@needs_mpi
@pytest.mark.parametrize("n, args, line", [(2, ["--tensor-parallel", "3"], "tensor-parallel is 3, but 2 processes were started"),
                                           (4, [], "possible numbers of ranks are 1, 2, 3"),
                                           (2, ["--add-model", "more=m.gguf"], "these need one rank")])
def test_bad_numbers_of_processes(tmp_path, models, n, args, line):
    d = Processes(tmp_path, n, *args, model=models("ranks-three", "--heads", 6, "--kv-heads", 3, "--embd", 96))
    assert d.process.wait(30 * SLOW) == 2, d.log
    assert line in d.log
