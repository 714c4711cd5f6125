"""Devices: the whole daemon on the CUDA device, run on a CPU (tests/cuda_emu), gives the CPU's text; a GPU that is not there,
or cannot be used, is told in one line with exit status 2.

SPDX-License-Identifier: Apache-2.0
"""
import concurrent.futures
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import EMULATED, PARLEYD, ROOT, SLOW, device_args

ADAPTERS = ROOT / "tests/oracle/fixtures/adapter"
PROMPTS = ["Once upon a time", "again and again and again", "x", "The quick brown fox jumps over the lazy dog. " * 3]
MODELS = {
    "f32": ["--layers", 2],
    "q4_1, grouped heads": ["--layers", 2, "--type", "q4_1", "--heads", 4, "--kv-heads", 2],
    "gpt2": ["--layers", 2, "--arch", "gpt2"],
    "q8_0, untied": ["--layers", 2, "--type", "q8_0", "--untied"],
}


def answers(d):
    """For each prompt: the tokens, and by how much each led (nats)."""
    body = {"model": "m", "prompt": PROMPTS, "temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 2}
    status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert status == 200, text
    logprobs = [c["logprobs"] for c in json.loads(text)["choices"]]
    return [(p["tokens"], [max(t.values()) - min(t.values()) for t in p["top_logprobs"]]) for p in logprobs]


def agree(got, expected):
    """The same tokens, but that a token may differ which leads by less than what one more or less in a rounded activation does."""
    same = 0
    for (a, _), (b, leads) in zip(got, expected, strict=True):
        first = next((i for i in range(len(b)) if a[i] != b[i]), None)
        assert first is None or leads[first] < 0.02, (a, b, leads)
        same += first is None
    return same >= len(expected) - 1


@pytest.mark.parametrize("kind", MODELS)
def test_same_text_as_the_cpu(start, models, kind):
    model = models("device-" + kind.split(",")[0], *MODELS[kind])
    small = ["--alias", "m", "--batch-tokens", 32, "--max-sequences", 4]
    cpu = start(*small, "--device", "cpu", model=model)
    expected = answers(cpu)
    cuda = start(*small, *device_args("cuda-emulated"), model=model)
    assert "device: cuda:0 (emulated)" in cuda.log
    first = answers(cuda)
    assert agree(first, expected)
    assert answers(cuda) == first, "from cached pages"


def sampled(d, name, prompt):
    body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
    status, _, text = d.request("POST", "/v1/completions", body, timeout=300)
    assert status == 200, text
    lp = json.loads(text)["choices"][0]["logprobs"]
    return lp["tokens"], lp["token_logprobs"]


def test_several_models_on_one_gpu(start, models):
    """Two models with an adapter each, asked all at once, answer as each alone does, also when they take turns in the one place that there is; what the
    memory of the device does not take is refused without harm to the others."""
    shape = ["--embd", 32, "--ff", 64]
    files = {"one": models("device-one", *shape), "two": models("device-two", *shape, "--seed", 2), "three": models("device-three", *shape, "--seed", 3)}
    adapters = {"one": ("a", ADAPTERS / "llama-all"), "two": ("b", ADAPTERS / "llama-patterns")}
    small, gpu = ["--batch-tokens", 32, "--max-sequences", 4], device_args("cuda-emulated")
    expected = {}
    for name, (adapter, folder) in adapters.items():
        alone = start("--alias", name, *small, *gpu, "--adapter", f"{adapter}={folder}", model=files[name])
        expected |= {(m, p): sampled(alone, m, p) for m in (name, adapter) for p in PROMPTS[:2]}
        assert alone.stop() == 0
    assert len({json.dumps(expected[m, PROMPTS[0]]) for m in ("one", "a", "two", "b")}) == 4
    huge = models("device-huge", "--layers", 4, "--embd", 256, "--ff", 1024)
    d = start("--alias", "one", *small, *gpu, "--max-models", 1, "--add-model", f"two={files['two']}", "--add-model", f"three={files['three']}",
              "--add-model", f"huge={huge}", "--adapter", f"a={ADAPTERS / 'llama-all'}", "--adapter", f"b@two={ADAPTERS / 'llama-patterns'}", model=files["one"],
              env={"PARLEY_EMU_MEMORY_MB": "64"})

    def all_at_once():
        asked = list(expected)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda a: sampled(d, *a), asked)) == [expected[a] for a in asked]
    all_at_once()
    sampled(d, "three", "x")  # in the place of "two"
    assert "model two has left memory" in d.log
    all_at_once()
    assert d.post("/v1/completions", {"model": "huge", "prompt": "x"})[0] == 503
    all_at_once()
    assert d.log.count("model two is in memory") == 3 and d.get("/health")[0] == 200


def test_without_graphs(start, models):
    """Recorded steps give what steps that run kernel by kernel give; where recording fails it is told once, and all goes on."""
    args = ["--alias", "m", "--batch-tokens", 32, "--max-sequences", 4, "--speculation", "off", *device_args("cuda-emulated")]
    model = models("device-f32", *MODELS["f32"])
    recorded = answers(start(*args, model=model))
    assert answers(start(*args, "--cuda-graphs", "off", model=model)) == recorded
    d = start(*args, model=model, env={"PARLEY_EMU_FAULT": "graphs"})
    assert answers(d) == recorded and d.log.count("cannot be recorded as a CUDA graph") == 1


def test_fp8_cache(start, tiny):
    """On a GPU; refused where there is none."""
    d = start("--alias", "m", "--kv-type", "fp8", *device_args("cuda-emulated"), model=tiny)
    assert len(answers(d)) == len(PROMPTS)
    line = refused("--device", "cpu", "--kv-type", "fp8", model=tiny)
    assert "has no KV cache of type fp8: take --kv-type q8_0" in line and "\n" not in line, line


def test_second_gpu_and_cache_size(start, tiny):
    d = start("--alias", "m", "--device", "cuda:1", "--cuda-library", EMULATED, "--cuda-memory-percent", 2, "--kv-type", "q8_0", model=tiny)
    assert "cuda:1 (emulated)" in d.log
    assert len(answers(d)) == len(PROMPTS)


def refused(*args, model, env=None, program=PARLEYD):
    done = subprocess.run([program, "--port", "0", "--model", str(model), *map(str, args)], capture_output=True, text=True, timeout=60 * SLOW,
                          env={"PATH": "/usr/bin:/bin", **(env or {})})
    errors = [line for line in done.stderr.splitlines() if " error " in f" {line.lower()} "]
    assert done.returncode == 2, done.stderr
    return "\n".join(errors or done.stderr.splitlines()[-1:])


@pytest.mark.parametrize("fault, index, says", [
    ("no-driver", 0, "no NVIDIA driver: install"),
    ("old-driver", 0, "the NVIDIA driver is for CUDA 11.4, parley needs 13.0: update the driver"),
    ("no-gpu", 0, "no GPU can be used (no CUDA-capable device is detected): look at nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu"),
    ("old-gpu", 0, "GPU 0, emulated, has compute capability 7.0: parley needs 7.5 or newer; take another GPU or --device cpu"),
    ("no-cublas", 0, "libcublas.so.13 is missing: install CUDA 13's cuBLAS"),
    ("", 7, "there is no GPU 7: this machine has 2"),
])
def test_gpu_that_cannot_be_used(tiny, fault, index, says):
    line = refused("--device", f"cuda:{index}", "--cuda-library", EMULATED, model=tiny, env={"PARLEY_EMU_FAULT": fault})
    assert says in line and "\n" not in line, line


LARGE = ["--type", "f32", "--layers", 4, "--embd", 256, "--ff", 1024, "--heads", 8, "--kv-heads", 4]


@pytest.mark.parametrize("env, says", [
    ({"PARLEY_EMU_MEMORY_MB": "3"}, "cuda:0 (emulated) has 3 of 3 MiB free, the weights of the model take 15: take a file of the same model as Q5_K, use a larger GPU, "
                                    "or --device cpu"),
    ({"PARLEY_EMU_MEMORY_MB": "1"}, "take 15: use a larger GPU"),
    ({"PARLEY_EMU_MEMORY_MB": "6"}, "a file of the same model as Q8_0, cut it by --tensor-parallel 4 on as many such GPUs, use"),
    ({"PARLEY_EMU_MEMORY_MB": "9"}, "cut it by --tensor-parallel 2 on as many such GPUs"),
    ({"PARLEY_EMU_MEMORY_MB": "32", "PARLEY_EMU_OTHERS_MB": "0:20"}, "has 12 of 32 MiB free, the weights of the model take 15: end what else uses the GPU (nvidia-smi lists it), "
                                                                     "take a file"),
])
def test_model_that_does_not_fit(start, models, env, says):
    """With its size, what is free, and every way out that there is."""
    line = refused(*device_args("cuda-emulated"), model=models("device-large", *LARGE), env=env)
    assert says in line and "\n" not in line, line


def test_what_is_said_to_fit_does(start, models):
    env = {"PARLEY_EMU_MEMORY_MB": "6", "PARLEY_EMU_GPUS": "4"}
    model = models("device-large", *LARGE)
    ranks = int(re.search(r"--tensor-parallel (\d+)", refused(*device_args("cuda-emulated"), model=model, env=env))[1])
    d = start("--alias", "m", "--batch-tokens", 16, "--max-sequences", 2, "--tensor-parallel", ranks, "--rank-exchange", "host", *device_args("cuda-emulated"), model=model, env=env)
    assert d.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 2})[0] == 200


def test_cache_that_does_not_fit(start, tiny):
    """The line says how much would fit and what to change, and that does fit."""
    small = {"PARLEY_EMU_MEMORY_MB": "32"}
    args = ["--alias", "m", *device_args("cuda-emulated")]
    line = refused(*args, "--kv-cache-mb", 4096, model=tiny, env=small)
    assert "no memory for a KV cache of 4096 MiB, which is 16777216 tokens: cuda:0 (emulated) has" in line and "\n" not in line, line
    for what in (r"has \d+ MiB left for it, \d+ tokens:", "so that --cuda-memory-percent decides", r"with --kv-type q8_0 as many tokens take 2304 MiB", r"a lower --batch-tokens \(now 512\)"):
        assert re.search(what, line), (what, line)
    assert "--context" not in line, "one context fits"
    fits = int(re.search(r"lower --kv-cache-mb to (\d+)", line)[1])
    assert fits >= 1
    d = start(*args, "--kv-cache-mb", fits, model=tiny, env=small)
    assert d.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 2})[0] == 200


def test_context_that_does_not_fit(start, models):
    """Where not even one context's cache fits, the line says which does."""
    model, small = models("device-long", "--ctx", 4096, "--kv-heads", 4, "--embd", 128, "--layers", 8), {"PARLEY_EMU_MEMORY_MB": "20"}
    args = ["--batch-tokens", 32, "--max-sequences", 4, *device_args("cuda-emulated")]
    line = refused("--kv-cache-mb", 64, *args, model=model, env=small)
    mb, context = map(int, re.search(r"lower --kv-cache-mb to (\d+) and --context to (\d+)", line).groups())
    assert mb >= 1 and 256 <= context < 4096
    d = start("--kv-cache-mb", mb, "--context", context, *args, model=model, env=small)
    assert f"context {context}" in d.log


def test_no_room_for_any_cache(models):
    model = models("device-long", "--ctx", 4096, "--kv-heads", 4, "--embd", 128, "--layers", 8)
    line = refused("--kv-type", "f32", "--cuda-memory-percent", 1, "--batch-tokens", 32, "--max-sequences", 32, *device_args("cuda-emulated"), model=model,
                   env={"PARLEY_EMU_MEMORY_MB": "20"})
    assert "MiB left for the KV cache after the weights, too little for a cache of 2 pages" in line and "\n" not in line, line
    for remedy in ("lower --batch-tokens", "--kv-type q8_0", "raise --cuda-memory-percent", "--device cpu"):
        assert remedy in line


def test_no_room_for_a_set_size(models):
    """Where a set size cannot be had, the share of the memory is not at fault. Each token of a batch takes less than two pages, so that one of these
    batches leaves less than that."""
    model = models("device-long", "--ctx", 4096, "--kv-heads", 4, "--embd", 128, "--layers", 8)
    args = ["--kv-type", "f32", "--kv-cache-mb", 64, "--max-sequences", 4, *device_args("cuda-emulated")]
    lines = [refused(*args, "--batch-tokens", n, model=model, env={"PARLEY_EMU_MEMORY_MB": "25"}) for n in range(56, 76)]
    short = [line for line in lines if "too little for a cache of 2 pages" in line]
    assert short and all("lower --batch-tokens" in line and "--cuda-memory-percent" not in line for line in short), lines


def test_cache_that_the_machine_has_no_memory_for(tiny):
    line = refused("--kv-cache-mb", 16777216, "--device", "cpu", model=tiny)
    assert "no memory for a KV cache of 16777216 MiB" in line and re.search(r"this machine has \d+ MiB left for it, \d+ tokens: lower --kv-cache-mb to \d+", line), line


def test_adapters_without_pools(models):
    model = models("adapter-base", "--embd", 32, "--ff", 64)
    line = refused("--adapter", f"a={ADAPTERS / 'llama-all'}", *device_args("cuda-emulated"), model=model, env={"PARLEY_EMU_FAULT": "pools"})
    assert "has no pools of memory, which adapters need" in line and "\n" not in line, line


def test_batches_that_do_not_fit(start, models):
    """The memory that batches are worked on with is counted before the cache takes the rest; what the error names does fit."""
    model, small = models("device-f16", "--layers", 2, "--type", "f16"), {"PARLEY_EMU_MEMORY_MB": "48"}
    line = refused("--batch-tokens", 4096, *device_args("cuda-emulated"), model=model, env=small)
    assert "batches of 4096 tokens take" in line and "\n" not in line, line
    fits = int(re.search(r"lower --batch-tokens to (\d+)", line)[1])
    assert fits >= 64 and f"{fits}, and --max-sequences to no more than that, or" in line
    assert f"{fits} tokens per iteration" in start("--batch-tokens", fits, *device_args("cuda-emulated"), model=model, env=small).log


def test_steps_take_no_memory(start, models):
    """A prompt that fills a batch, and answers, with nothing left beside the cache."""
    d = start("--alias", "m", "--batch-tokens", 64, "--max-sequences", 4, *device_args("cuda-emulated"), "--cuda-memory-percent", 100,
              model=models("device-f16", "--layers", 2, "--type", "f16"), env={"PARLEY_EMU_MEMORY_MB": "64"})
    assert len(answers(d)) == len(PROMPTS)


@pytest.mark.parametrize("status, says", [(3, "no memory for a pass"), (13, "a product by cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED (13)")])
def test_cublas_fails(start, models, status, says):
    """For want of memory only what was computed ends, else the daemon."""
    model = models("device-f16", "--layers", 2, "--type", "f16")
    d = start("--alias", "m", "--batch-tokens", 64, *device_args("cuda-emulated"), model=model, env={"PARLEY_EMU_FAULT": f"blas:{status}"})
    assert d.post("/v1/completions", {"model": "m", "prompt": PROMPTS[3], "max_tokens": 2})[0] in (500, 503)
    assert says in d.log
    if status == 3:
        assert d.get("/health")[0] == 200 and d.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 2})[0] == 200
    else:
        assert d.process.wait(10) == 3


@pytest.mark.parametrize("folder", ["bin", "lib", "lib/parley"])
def test_installed_library_is_found(tmp_path, tiny, folder):
    """Beside the program, in ../lib and in ../lib/parley, whatever the loader's path is."""
    for name in ("bin", folder):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(PARLEYD, tmp_path / "bin/parleyd")
    shutil.copy(EMULATED, tmp_path / folder / "libparley_cuda.so")
    assert "there is no GPU 7: this machine has 2" in refused("--device", "cuda:7", model=tiny, program=tmp_path / "bin/parleyd")


def test_lost_while_it_runs(start, tiny):
    """What runs ends with an error, and so does what comes later; health turns red, and the process ends for its supervisor to start it again."""
    d = start("--alias", "m", *device_args("cuda-emulated"), model=tiny, env={"PARLEY_EMU_FAULT": "lost:300"})
    for _ in range(100):
        status, _, text = d.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 20, "ignore_eos": True})
        if status != 200:
            break
    assert status in (500, 503), text
    assert d.post("/v1/completions", {"model": "m", "prompt": "x"})[0] == 503 and d.get("/health")[0] == 503
    assert d.log.count("cuda:0 (emulated) failed: ") == 1 and "illegal memory access" in d.log
    assert d.process.wait(10) == 3


def test_no_library(tmp_path, tiny):
    """A wrong path, something else, a build without CUDA; the driver, without which the library does not help either, comes first."""
    anything = next(Path("/lib").glob("*-linux-gnu/libm.so.6"))
    (tmp_path / "libcuda.so.1").symlink_to(anything)
    for args, env, says in [
        (["--cuda-library", "/nowhere/libparley_cuda.so"], {}, "the CUDA device cannot be loaded: /nowhere/libparley_cuda.so: cannot open shared object file: No such file or "
                                                               "directory: name libparley_cuda.so with --cuda-library, or leave that out, or take --device cpu"),
        (["--cuda-library", anything], {}, f"{anything} is not parley's CUDA device, it lacks pl_cuda_open: name libparley_cuda.so with --cuda-library"),
        ([], {}, "this machine has no NVIDIA driver (libcuda.so.1): install one, or take --device cpu"),
        ([], {"LD_LIBRARY_PATH": str(tmp_path)}, "the CUDA device cannot be loaded: libparley_cuda.so: cannot open shared object file: No such file or directory: build it with "
                                                 "'make cuda', and install it beside the program, or take --device cpu"),
    ]:
        program = tmp_path / "parleyd"
        if not program.exists():
            shutil.copy(PARLEYD, program)  # beside it there is no library
        line = refused("--device", "cuda", *args, model=tiny, env=env, program=program)
        assert says in line and "\n" not in line, line


def test_auto(start, tiny):
    """A GPU where there is one, else the CPU with a line that says why."""
    d = start("--device", "auto", "--cuda-library", EMULATED, model=tiny, env={"PARLEY_EMU_FAULT": "no-driver"})
    assert "device auto: the CPU, since this machine has no NVIDIA driver" in d.log and "device: cpu-" in d.log
    d = start("--device", "auto", "--cuda-library", EMULATED, model=tiny)
    assert "device: cuda:0 (emulated)" in d.log


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:N", "cuda:1000", "cuda1", "gpu"])
def test_bad_names(tiny, name):
    assert "device must be one of" in refused("--device", name, model=tiny)
