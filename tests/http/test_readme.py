"""The README's curl lines and its Python example, pasted as they stand (only the port differs), with the default model.

SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SLOW, Daemon

REAL = Path(os.environ.get("PARLEY_TEST_MODEL") or Path.home() / ".cache/parley/SmolLM2-135M-Instruct.Q4_1.gguf")
README = (ROOT / "README.md").read_text()
BLOCKS = [b for b in re.findall(r"```sh\n(.*?)```", README, re.S) if "curl" in b]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
LINES = [line for b in BLOCKS for line in re.findall(r"^(?:[A-Z]+=[^\n]*\n)?curl(?:[^\n]*\\\n)*[^\n]*$", b, re.M)]


def write_adapter(folder):
    """The smallest adapter of SmolLM2, which changes nothing."""
    shapes = {"lora_A": (1, 576), "lora_B": (576, 1)}
    header = {f"base_model.model.model.layers.0.self_attn.q_proj.{k}.weight": {"dtype": "F32", "shape": s, "data_offsets": [2304 * i, 2304 * i + 2304]}
              for i, (k, s) in enumerate(shapes.items())}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4608))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there")
    folder = tmp_path_factory.mktemp("readme")
    write_adapter(folder / "sales")
    d = Daemon(folder, "--alias", "SmolLM2-135M-Instruct", "--adapter-dir", folder, model=REAL).wait_ready()
    yield d
    assert d.stop() == 0


def test_there_are_lines():
    assert len(LINES) >= 9


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_curl(daemon, line):
    out = subprocess.run(["sh", "-c", line.replace(":8000", f":{daemon.port}")], capture_output=True, text=True, timeout=60 * SLOW)
    assert out.returncode == 0 and out.stdout, out.stderr
    assert '"error"' not in out.stdout, out.stdout
    if "What is the capital of Germany?" in line:
        assert "The capital of Germany is Berlin." in out.stdout
    if "/detokenize" in line:
        assert "Hello world" in out.stdout
    if "stream" in line:
        assert out.stdout.endswith("data: [DONE]\n\n")


def test_python(daemon):
    code = PYTHON[0].replace(":8000", f":{daemon.port}")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60 * SLOW)
    assert "The capital of Germany is Berlin." in out.stdout, out.stderr


def test_the_story_of_a_job(tmp_path, models):
    """The second Python example against a small random model: the real one would take minutes."""
    d = Daemon(tmp_path, "--alias", "SmolLM2-135M-Instruct", model=models("wide", "--ctx", 2048)).wait_ready()
    code = PYTHON[1].replace(":8000", f":{d.port}").replace('"data/', f'"{ROOT}/data/')
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240 * SLOW)
    assert out.returncode == 0 and "succeeded The job has successfully completed" in out.stdout, out.stderr + out.stdout
    assert d.stop() == 0
