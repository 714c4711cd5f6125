"""The programs that are measured: where they come from and how their benchmarks are read.

llama.cpp is built from the source package of llama-cpp-python (pinned version and SHA-256), unless a folder with its
programs is given. Another peer with the same benchmarks is taken from a folder only.
SPDX-License-Identifier: Apache-2.0
"""
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "parley"
VERSION, SHA256 = "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-quantize")


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, timeout=240, stderr=subprocess.PIPE):
    """Standard output of a program; its last words when it fails. Some leave logs where they run."""
    done = subprocess.run([str(c) for c in command], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                          timeout=timeout, cwd=tempfile.gettempdir())
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def build_llamacpp():
    """The folder with llama.cpp's programs, built there once."""
    home = CACHE / f"llama-cpp-python-{VERSION}"
    binaries = home / "build" / "bin"
    if all((binaries / t).exists() for t in TARGETS):
        return binaries
    for tool in ("cmake", "g++"):
        if not shutil.which(tool):
            sys.exit(f"compare: {tool} is missing: apt-get install cmake g++")
    say(f"building llama.cpp from llama-cpp-python {VERSION} (some minutes)")
    home.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", home,
         f"llama-cpp-python=={VERSION}"], timeout=600)
    archive = next(home.glob("llama_cpp_python-*.tar.gz"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"compare: {archive} does not have the pinned SHA-256")
    with tarfile.open(archive) as tar:
        tar.extractall(home, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(home)
    source = next(home.glob("llama_cpp_python-*/vendor/llama.cpp"))
    run(["cmake", "-S", source, "-B", home / "build", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF",
         "-DLLAMA_BUILD_TESTS=OFF"], timeout=600)
    run(["cmake", "--build", home / "build", "-j", os.cpu_count(), "--target", *TARGETS], timeout=7200)
    return binaries


def quantize(binaries, model, to):
    """The model again in another type, made by the peer from the same file."""
    info = os.stat(model)
    stamp = hashlib.sha256(f"{info.st_size} {info.st_mtime_ns}".encode()).hexdigest()[:12]  # another file of that name is made anew
    out = CACHE / f"{pathlib.Path(model).name.removesuffix('.gguf')}.{stamp}.to-{to}.gguf"
    if not out.exists():
        say(f"making {out.name}")
        part = out.with_suffix(".part")
        run([binaries / "llama-quantize", "--allow-requantize", model, part, to])
        part.rename(out)
    return out


def read_table(text):
    """Rows of llama-batched-bench's table, as {column: number}."""
    rows, columns = [], None
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if "S_TG t/s" in cells:
            columns = cells
        elif columns and len(cells) == len(columns) and re.fullmatch(r"\d+", cells[0]):
            rows.append(dict(zip(columns, map(float, cells))))
    return rows


class Peer:
    """llama.cpp, or a program with the same benchmarks, on one file."""

    def __init__(self, name, binaries, model, threads, repack=False):
        self.name, self.binaries, self.model, self.threads = name, pathlib.Path(binaries), model, threads
        usage = subprocess.run([self.binaries / "llama-bench", "--help"], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, timeout=30).stdout
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        mask = hex(sum(1 << c for c in cpus))
        self.pin = ["-C", mask, "--cpu-strict", "1"] if "--cpu-strict" in usage and len(cpus) == threads else []
        self.repack = repack and "--run-time-repack" in usage  # weights in another layout, where that makes it faster

    def prefill_and_one(self, prompts, gen):
        """{"prefill N": tok/s, "decode 1": tok/s}"""
        flags = ["-rtr", "1"] if self.repack else []
        rows = json.loads(run([self.binaries / "llama-bench", "-m", self.model, "-p", ",".join(map(str, prompts)), "-n", gen,
                               "-r", "2", "-t", self.threads, "-o", "json", *self.pin, *flags]))
        return {f"prefill {r['n_prompt']}" if r["n_prompt"] else "decode 1": r["avg_ts"] for r in rows}

    def streams(self, counts, context, gen):
        """{"decode N": tok/s} of N sequences side by side"""
        flags = ["-rtr"] if self.repack else []
        out = run([self.binaries / "llama-batched-bench", "-m", self.model, "-npp", context, "-ntg", gen, "-npl", ",".join(map(str, counts)),
                   "-c", max(counts) * (context + gen) + 1024, "-t", self.threads, *self.pin, *flags], stderr=subprocess.STDOUT)
        rows = read_table(out)
        if len(rows) != len(counts):
            raise RuntimeError(f"{self.name}: llama-batched-bench printed no table of {len(counts)} rows: {out.strip()[-400:]}")
        return {f"decode {r['B']:.0f}": r["S_TG t/s"] for r in rows}


class Parley:
    """`parley bench` on one file with one instruction set."""

    def __init__(self, name, binary, model, threads, device=None):
        self.name, self.facts = name, {}
        self.command = [binary, "bench", "--json", "--model", model, "--threads", threads, *(["--device", device] if device else [])]

    def bench(self, *flags):
        out = json.loads(run([*self.command, *flags]))
        self.facts = {k: v for k, v in out.items() if k not in ("prefill", "decode")}
        return out

    def prefill_and_one(self, prompts, gen):
        out = self.bench("--prompt", ",".join(map(str, prompts)), "--batch", "1", "--gen", gen, "--repeat", "3")
        return {**{f"prefill {r['tokens']}": r["tok_s"] for r in out["prefill"]}, "decode 1": out["decode"][0]["tok_s"]}

    def streams(self, counts, context, gen):
        out = self.bench("--prompt", "", "--batch", ",".join(map(str, counts)), "--context", context, "--gen", gen, "--repeat", "2")
        return {f"decode {r['batch']}": r["tok_s"] for r in out["decode"]}

    def contexts(self, lengths, gen):
        out = self.bench("--prompt", "", "--batch", "1", "--context", ",".join(map(str, lengths)), "--gen", gen, "--repeat", "2")
        return {f"context {r['context']}": r["tok_s"] for r in out["decode"]}
