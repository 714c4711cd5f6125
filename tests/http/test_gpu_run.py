"""tests/gpu/run itself, on the emulated device: that the command stands ready for a GPU.

SPDX-License-Identifier: Apache-2.0
"""
import importlib.machinery
import importlib.util
import json
import signal
import subprocess
import sys
import time

from conftest import ROOT

RUN = [sys.executable, ROOT / "tests/gpu/run"]


def test_gpu_run_on_the_emulated_device(tmp_path):
    done = subprocess.run([*RUN, "--emulated", "--only", "models,ranks,bench,launches,train,peer,kernels,memcheck", "--out", tmp_path / "out"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    out = json.loads(done.stdout[done.stdout.index("{"):])
    assert out == json.loads((tmp_path / "out").read_text())
    assert all(step["ok"] for step in out["steps"].values())
    found = {**out["steps"]["models"]["nmse"], **out["steps"]["ranks"]["nmse"]}
    assert all(error <= (1e-5 if "of 7" in name or "bf16" not in name else 1e-4) for name, error in found.items()), found
    assert len(out["steps"]["models"]["nmse"]) == 4
    assert len(out["steps"]["ranks"]["nmse"]) == 2
    assert out["steps"]["launches"]["share_beside_bytes"] > 0
    assert "skipped" in out["steps"]["peer"] or out["steps"]["peer"]["decode_ratio"] > 0
    assert {m["shape"] for m in out["steps"]["bench"]["models"]} == {"tiny", "tiny:q4_k"}
    assert out["steps"]["train"]["losses_apart"] < 1e-4
    assert "skipped" in out["steps"]["memcheck"] and "skipped" in out["steps"]["kernels"]


def test_gpu_run_leaves_what_it_has_when_it_is_stopped(tmp_path):
    file = tmp_path / "out"
    with subprocess.Popen([*RUN, "--emulated", "--built", ROOT / "build/release", "--only", "memcheck,models", "--out", file], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as run:
        end = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < end and not (file.exists() and "nmse" in file.read_text()):
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate()
    kept = json.loads(file.read_text())
    assert run.returncode == 1 and json.loads(said) == kept
    assert kept["steps"]["memcheck"]["ok"] and kept["steps"]["models"]["error"] == "stopped" and len(kept["steps"]["models"]["nmse"]) > 0


def test_gpu_run_goes_on_after_a_step_that_fails(tmp_path):
    (tmp_path / "libparley_cuda_emu.so").write_text("no library")
    for name in ("parley", "ops", "logits", "make_model"):
        (tmp_path / name).symlink_to(ROOT / "build/release" / name)
    done = subprocess.run([*RUN, "--emulated", "--built", tmp_path, "--only", "launches,train,memcheck", "--seconds", "60", "--python", "no-python",
                           "--out", tmp_path / "out"], capture_output=True, text=True)
    steps = json.loads(done.stdout)["steps"]
    assert done.returncode == 1
    assert all("device cuda: " in steps[name]["error"] for name in ("launches", "train")) and steps["memcheck"]["ok"]


def test_gpu_run_begins_nothing_without_time(tmp_path):
    done = subprocess.run([*RUN, "--emulated", "--built", ROOT / "build/release", "--only", "models", "--seconds", "1", "--out", tmp_path / "out"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["steps"]["models"]["skipped"] == "no time left"


def test_gpu_run_reads_what_nsight_compute_says():
    loader = importlib.machinery.SourceFileLoader("gpu_run", str(ROOT / "tests/gpu/run"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_run", loader))
    loader.exec_module(module)
    head = '"ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"'
    row = '"{}","void <unnamed>::few<12, 1>({})","(128, 1, 1)","(512, 1, 1)","{}","{}","{}"'
    said = "\n".join(["==PROF== Connected", "{\"json\": 1}", head, row.format(0, "p", "gpu__time_duration.sum", "us", "5.5"),
                      row.format(0, "p", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "61.25"),
                      row.format(1, "p", "gpu__time_duration.sum", "ns", "7,500")])
    assert module.add_up(said) == [{"kernel": "few<12, 1>", "grid": "(512, 1, 1)", "block": "(128, 1, 1)", "calls": 2, "total_us": 13.0, "us": 7.5,
                                    "memory_percent": 61.25}]


def test_gpu_run_refuses_a_step_that_it_has_not():
    done = subprocess.run([*RUN, "--only", "sleep"], capture_output=True, text=True)
    assert done.returncode == 2 and "steps are" in done.stderr


def test_gpu_run_says_what_a_folder_of_programs_lacks(tmp_path):
    (tmp_path / "ops").touch()
    done = subprocess.run([*RUN, "--emulated", "--built", tmp_path, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and "lacks parley, logits, make_model, libparley_cuda_emu.so" in done.stderr and not (tmp_path / "out").exists()
