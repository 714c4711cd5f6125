#!/usr/bin/env python3
# make_adapter: writes the fixtures that tests/unit/check_adapter.c reads: adapters that the PEFT library has saved, the same
# as GGUF files, and the logits that PEFT computes with them. Needs torch, transformers, peft and gguf.
#   make_adapter.py tiny --bin DIR [--llama-cpp DIR]    fixtures/adapter
#   make_adapter.py real --bin DIR --model FILE         prints how far parley is from PEFT on a real model, both for an
#                                                       adapter that PEFT has written and for one that parley has; and the
#                                                       same for the tiny models
# --bin has make_model, logits and copy_adapter (make builds them). --llama-cpp is a source tree whose convert_lora_to_gguf.py
# must agree with the GGUF files of llama models that are written here.
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file

import torch_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "adapter"
SMALL = ["--embd", "32", "--ff", "64", "--ctx", "64"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name, flags of make_model, LoraConfig, type of the values; the first of each architecture also as a GGUF file
TINY = [
    ("llama-all", SMALL, dict(r=4, lora_alpha=8, target_modules=LLAMA), torch.float32),
    ("llama-patterns", SMALL, dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"],
                                   rank_pattern={"layers.1.self_attn.q_proj": 5, "k_proj": 2},
                                   alpha_pattern={r".*\.0\.self_attn\.k_proj": 7, "down_proj": 1}), torch.float32),
    ("llama-bf16", SMALL + ["--kv-heads", "4"], dict(r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"]), torch.bfloat16),
    ("llama-q8_0", SMALL + ["--type", "q8_0"], dict(r=2, lora_alpha=4, target_modules=LLAMA), torch.float16),
    ("gpt2-all", SMALL + ["--arch", "gpt2"], dict(r=4, lora_alpha=8, fan_in_fan_out=True,
                                                  target_modules=["c_attn", "c_proj", "c_fc"]), torch.float32),
    ("gpt2-mlp", SMALL + ["--arch", "gpt2"], dict(r=3, lora_alpha=3, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"],
                                                  use_rslora=True), torch.float32),
]
GGUF = ("llama-all", "gpt2-all")
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attn.c_attn": "attn_qkv",
         "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def adapt(model, config, dtype, seed, strength):
    """A PEFT model whose adapter is random instead of trained, and strong enough to be seen."""
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(((torch.rand(p.shape, generator=random) * 2 - 1) * strength / p.shape[1] ** 0.5).to(dtype))
    return model


def save(model, folder, dtype):
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if dtype != torch.float32:
        path = folder / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def pairs_from_halves(w, n_heads):
    head = w.shape[0] // n_heads
    return w.reshape(n_heads, 2, head // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape).contiguous()


def write_gguf(folder, path, config):
    """As llama.cpp's converter does it: rows of q and k of llama models in pairs."""
    out = json.loads((folder / "adapter_config.json").read_text())
    arch = "gpt2" if config.model_type == "gpt2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(out["lora_alpha"]))
    for name, value in sorted(load_file(folder / "adapter_model.safetensors").items()):
        parts = name.removeprefix("base_model.model.").removeprefix("model.").removeprefix("transformer.").split(".")
        module, half = ".".join(parts[2:-2]), parts[-2].lower()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": getattr(config, "num_key_value_heads", None)}.get(module)
        if half == "lora_b" and heads:
            value = pairs_from_halves(value, heads)
        writer.add_tensor(f"blk.{parts[1]}.{NAMES[module]}.weight.{half}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path):
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def check_converter(args, folder, path, config):
    with tempfile.TemporaryDirectory() as d:
        base, out = pathlib.Path(d) / "base", pathlib.Path(d) / "out.gguf"
        base.mkdir()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(base)
        subprocess.run([sys.executable, os.path.join(args.llama_cpp, "convert_lora_to_gguf.py"), "--base", base, "--outtype", "f32",
                        "--outfile", out, folder], check=True)
        theirs, ours = tensors(out), tensors(path)
        assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
        assert all(np.array_equal(theirs[k], ours[k]) for k in ours)
        fields = gguf.GGUFReader(out).fields
        for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
            assert fields[key].contents() == gguf.GGUFReader(path).fields[key].contents(), key
    print(path.name, "is what llama.cpp's converter writes", file=sys.stderr)


def make_base(args, flags, folder):
    path = os.path.join(folder, "m.gguf")
    subprocess.run([os.path.join(args.bin, "make_model"), *flags, "--out", path], check=True)
    return path


def make_tiny(args):
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    cases, blob = [], b""
    for i, (name, flags, config, dtype) in enumerate(TINY):
        with tempfile.TemporaryDirectory() as d:
            base = torch_model.load(make_base(args, flags, d))
        base.config.name_or_path = base.name_or_path = "tiny"
        V = base.config.vocab_size
        tokens = [int(t) for t in np.random.default_rng(i).integers(0, V, 40)]
        plain = logits_of(base, tokens)
        model = adapt(base, config, dtype, i, 1.5)
        folder = FIXTURES / name
        save(model, folder, dtype)
        positions = [0, 11, 39]
        logits = logits_of(model, tokens)
        change = float((logits - plain).norm() / plain.norm())
        assert change > 0.05, (name, change)
        if name in GGUF:
            write_gguf(folder, FIXTURES / (name + ".gguf"), base.config)
            if args.llama_cpp and base.config.model_type == "llama":
                check_converter(args, folder, FIXTURES / (name + ".gguf"), base.config)
        cases.append({"name": name, "flags": flags, "n_vocab": V, "tokens": tokens, "positions": positions, "offset": len(blob) // 4,
                      "quantized": "q8_0" in flags, "gguf": name in GGUF, "f32": dtype == torch.float32})
        blob += logits[positions].numpy().astype("<f4").tobytes()
        print(f"{name}: relative change of the logits {change:.3f}", file=sys.stderr)
    (FIXTURES / "logits.bin").write_bytes(blob)
    (FIXTURES / "cases.json").write_text(json.dumps(
        {"made_by": "tests/oracle/make_adapter.py tiny", "peft": peft.__version__, "torch": torch.__version__, "cases": cases},
        separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")


def ours(args, model, adapter, tokens, *more):
    line = json.dumps({"tokens": tokens, "from": 0}) + "\n"
    flags = ["--adapter", str(adapter)] if adapter else []
    out = subprocess.run([os.path.join(args.bin, "logits"), "--model", model, *flags, *more], input=line.encode(), check=True,
                         stdout=subprocess.PIPE).stdout
    n, v = struct.unpack("II", out[:8])
    return torch.from_numpy(np.frombuffer(out[8:], dtype=np.float32).reshape(n, v).copy())


def mean_kl(ref, logits):
    p, q = torch.log_softmax(ref.double(), -1), torch.log_softmax(logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def relative(ref, logits):
    return float((logits - ref).norm() / ref.norm())


def compare(args, name, path, config, dtype, tokens, strength, quantized):
    """PEFT's logits beside parley's with the same folder; then of a folder that parley has written, by both."""
    with tempfile.TemporaryDirectory() as d:
        folder, copy = pathlib.Path(d) / "a", pathlib.Path(d) / "b"
        base = torch_model.load(path)
        plain = logits_of(base, tokens)
        base_kl = mean_kl(plain, ours(args, path, None, tokens, "--kv-type", "f32"))
        model = adapt(base, config, dtype, 7, strength)
        save(model, folder, dtype)
        ref = logits_of(model, tokens)
        got = ours(args, path, folder, tokens, "--kv-type", "f32")
        subprocess.run([os.path.join(args.bin, "copy_adapter"), path, folder, copy], check=True)
        again = logits_of(peft.PeftModel.from_pretrained(torch_model.load(path), copy).eval(), tokens)
        kl, change = mean_kl(ref, got), mean_kl(plain, ref)
        exact = torch.equal(again, ref)
        print(f"{name:16} adapter moves the output by KL {change:.4f}; parley from PEFT {kl:.6f}, without the adapter {base_kl:.6f}; "
              f"relative error {relative(ref, got):.2e}; written by parley, read by PEFT: "
              f"{'the same logits' if exact else f'relative error {relative(ref, again):.2e}'}")
        near = kl <= 2 * base_kl + 0.005 if quantized else relative(ref, got) < 1e-4  # int8 activations account for the former
        return near and change > 10 * kl and relative(ref, again) < 1e-6


def check_real(args):
    good = True
    for name, flags, config, dtype in TINY:
        with tempfile.TemporaryDirectory() as d:
            path = make_base(args, flags, d)
            tokens = [int(t) for t in np.random.default_rng(3).integers(0, 200, 40)]
            good &= compare(args, name, path, config, dtype, tokens, 1.5, "q8_0" in flags)
    tokens = [c["prompt"] + c["continuation"] for c in json.loads((FIXTURES.parent / "logits" / "smollm2.json").read_text())["cases"]]
    for name, config in (("SmolLM2 r 16 all", dict(r=16, lora_alpha=32, target_modules=LLAMA)),
                         ("SmolLM2 r 8 q v", dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_rslora=True))):
        good &= compare(args, name, args.model, config, torch.float32, sum(tokens[:3], []), 0.7, True)
    print("adapter oracle:", "passed" if good else "FAILED")
    return good


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("what", choices=("tiny", "real"))
    ap.add_argument("--bin", required=True)
    ap.add_argument("--model")
    ap.add_argument("--llama-cpp")
    args = ap.parse_args()
    if args.what == "tiny":
        make_tiny(args)
    elif not args.model:
        ap.error("--model is needed")
    else:
        sys.exit(not check_real(args))


if __name__ == "__main__":
    main()
