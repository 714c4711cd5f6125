"""tests/gpu/run itself, on the emulated device: that the command stands ready for a GPU.

SPDX-License-Identifier: Apache-2.0
"""
import json
import subprocess
import sys

from conftest import ROOT


def test_gpu_run_on_the_emulated_device():
    done = subprocess.run([sys.executable, ROOT / "tests/gpu/run", "--emulated", "--only", "models,ranks,bench,launches,train,peer,memcheck"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    out = json.loads(done.stdout[done.stdout.index("{"):])
    assert all(step["ok"] for step in out["steps"].values())
    found = {**out["steps"]["models"]["nmse"], **out["steps"]["ranks"]["nmse"]}
    assert all(error <= (1e-5 if "of 7" in name or "bf16" not in name else 1e-4) for name, error in found.items()), found
    assert len(out["steps"]["models"]["nmse"]) == 4
    assert len(out["steps"]["ranks"]["nmse"]) == 2
    assert out["steps"]["launches"]["share_beside_bytes"] > 0
    assert "skipped" in out["steps"]["peer"] or out["steps"]["peer"]["decode_ratio"] > 0
    assert {m["shape"] for m in out["steps"]["bench"]["models"]} == {"tiny", "tiny:q4_k"}
    assert out["steps"]["train"]["losses_apart"] < 1e-4
    assert "skipped" in out["steps"]["memcheck"]


def test_gpu_run_refuses_a_step_that_it_has_not():
    done = subprocess.run([sys.executable, ROOT / "tests/gpu/run", "--only", "sleep"], capture_output=True, text=True)
    assert done.returncode == 2 and "steps are" in done.stderr
