"""parley export: a model folder that is read back without any library, and what it says of bad input. That transformers reads the same from such
folders is proved by tests/oracle/check_export.py and unit/check_export.c.
SPDX-License-Identifier: Apache-2.0"""
import json
import struct
import subprocess

import pytest

from conftest import ROOT, SLOW, find_tool

ADAPTER = ROOT / "tests/oracle/fixtures/adapter/llama-all"
SMALL = "--embd", 32, "--ff", 64, "--ctx", 64


def export(*args, check=0):
    done = subprocess.run([find_tool("parley"), "export", *map(str, args)], capture_output=True, text=True, timeout=60 * SLOW)
    assert done.returncode == check, (done.returncode, done.stderr)
    return done


def tensors(path):
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    assert header.pop("__metadata__") == {"format": "pt"}
    return {name: (t["dtype"], t["shape"], data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]) for name, t in header.items()}


def test_a_folder(models, tmp_path):
    model = models("export", *SMALL)
    said = export("--format", "safetensors", "--model", model, "--out", tmp_path / "plain").stdout
    assert said.endswith("a model folder with all tensors as f32, 0 of them merged in float32\n")
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hidden_size"] == 32 and config["torch_dtype"] == "float32"
    plain = tensors(tmp_path / "plain/model.safetensors")
    assert plain["model.embed_tokens.weight"][:2] == ("F32", [config["vocab_size"], 32]) and "lm_head.weight" not in plain
    assert plain["model.layers.1.self_attn.k_proj.weight"][1] == [16, 32] and len(plain) == 2 + 2 * 9
    words = json.loads((tmp_path / "plain/tokenizer.json").read_text())
    assert len(words["model"]["vocab"]) == config["vocab_size"] and [t["content"] for t in words["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert "<|im_start|>" in json.loads((tmp_path / "plain/tokenizer_config.json").read_text())["chat_template"]

    export("--format", "safetensors", "--model", model, "--adapter", ADAPTER, "--out", tmp_path / "merged", "--type", "bf16")
    merged = tensors(tmp_path / "merged/model.safetensors")
    assert merged.keys() == plain.keys() and {t[0] for t in merged.values()} == {"BF16"}
    high = {name: b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4)) for name, (_, _, data) in plain.items()}  # bf16, cut off
    far = {name for name, (_, _, data) in merged.items() if sum(abs(x - y) > 1 for x, y in zip(data[1::2], high[name][1::2])) > len(data) / 20}
    assert far and all("_proj." in name for name in far)


BAD = [
    (["--format", "onnx", "--model", "MODEL", "--out", "OUT"], 2, "--format safetensors"),
    (["--format", "safetensors", "--model", "MODEL"], 2, "--out is a folder"),
    (["--format", "safetensors", "--model", "MODEL", "--out", "OUT", "--type", "q8_0"], 2, "--type is auto, f32, f16 or bf16"),
    (["--model", "MODEL", "--out", "OUT"], 2, "--adapter PATH"),
    (["--model", "MODEL", "--adapter", ADAPTER, "--out", "FOLDER"], 1, "--format safetensors"),
    (["--format", "safetensors", "--model", "MODEL", "--out", "MODEL"], 1, "a file has that name"),
    (["--format", "safetensors", "--model", "MODEL", "--out", "/no/such/place"], 1, "cannot make the folder"),
    (["--format", "safetensors", "--model", "/no/such.gguf", "--out", "OUT"], 1, "no/such.gguf"),
    (["--format", "safetensors", "--model", "MODEL", "--out", "OUT", "--adapter", "/no/such"], 1, "/no/such"),
]


@pytest.mark.parametrize("args, status, words", BAD)
def test_bad_input(models, tmp_path, args, status, words):
    places = {"MODEL": models("export", *SMALL), "OUT": tmp_path / "out", "FOLDER": tmp_path}
    before = places["MODEL"].read_bytes()
    done = export(*(places.get(a, a) for a in args), check=status)
    assert words in done.stderr and not (tmp_path / "out").exists() and places["MODEL"].read_bytes() == before
