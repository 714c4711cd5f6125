#!/usr/bin/env python3
"""Proves `parley export --format safetensors` by the transformers library: what it reads from the folder has the tokens, the prompts and the logits
of parley on the GGUF file (of PEFT, where an adapter was merged), and model.safetensors has the bytes that the library itself writes of the model.
Writes fixtures/export/cases.json, which tests/unit/check_export.c reads. Needs torch, transformers, tokenizers and gguf.

    check_export.py --bin DIR [--check] [--model FILE.gguf]     --check: compares with the committed file, writes nothing; a real model too
"""
import argparse
import hashlib
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tokenizer_texts as texts
import torch_model

HERE = pathlib.Path(__file__).parent
FILE = HERE / "fixtures" / "export" / "cases.json"
SMALL = ["--embd", "32", "--ff", "64", "--ctx", "64"]
CASES = [  # name, flags of make_model, type, an adapter of fixtures/adapter
    ("llama", SMALL, "f32", None),
    ("llama-untied-biases-linear", SMALL + ["--untied", "--biases", "--rope-base", "50000", "--rope-linear", "2.5"], "f32", None),
    ("llama-factors-wide-heads", SMALL + ["--rope-factors", "--rope-linear", "2", "--head-dim", "32", "--rope-base", "500000"], "f32", None),
    ("llama-spm", SMALL + ["--tokenizer", "spm", "--kv-heads", "4"], "bf16", None),
    ("llama-q8_0", SMALL + ["--type", "q8_0", "--pre", "llama-bpe"], "f16", None),
    ("gpt2", SMALL + ["--arch", "gpt2", "--pre", "gpt-2"], "f32", None),
    ("gpt2-untied", SMALL + ["--arch", "gpt2", "--untied", "--pre", "qwen2"], "f16", None),
    ("llama-all", SMALL, "f32", "llama-all"),
    ("gpt2-all", SMALL + ["--arch", "gpt2"], "f32", "gpt2-all"),
]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CHAT = [{"role": "user", "content": "Hello, world! 1234"}, {"role": "assistant", "content": "He said: \u00e9"}, {"role": "user", "content": " and you?"}]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tool(args, name, *flags, data=None):
    return subprocess.run([pathlib.Path(args.bin) / name, *map(str, flags)], input=data, stdout=subprocess.PIPE, check=True).stdout


def ours(args, model, tokens, adapter):
    """parley's logits."""
    out = tool(args, "logits", "--model", model, "--isa", "ref", "--kv-type", "f32", *(["--adapter", adapter] if adapter else []),
               data=(json.dumps({"tokens": tokens}) + "\n").encode())
    n, v = struct.unpack("II", out[:8])
    return np.frombuffer(out[8:], dtype=np.float32).reshape(n, v)


def tokens_of(args, model, all_texts):
    data = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in all_texts)
    lines = tool(args, "encode", model, data=data).decode().split("\n")[:-1]
    return [([int(i) for i in x.split("|")[0].split()], bytes.fromhex(x.split("|")[1]).decode(errors="replace")) for x in lines]


def check_tokenizer(args, model, folder, all_texts):
    tok, f = AutoTokenizer.from_pretrained(folder), torch_model.File(model)
    spm = f.key("tokenizer.ggml.model") == "llama"
    for text, (ids, back) in zip(all_texts, tokens_of(args, model, all_texts)):
        got = tok.encode(text, add_special_tokens=False)
        assert got == ids, (folder, text[:80], got[:20], ids[:20])
        if not spm or not set(got) & set(tok.all_special_ids):  # after a control token the library leaves SentencePiece's space
            assert tok.decode(got) == back, (folder, text[:80])
    bos = f.key("tokenizer.ggml.bos_token_id")
    assert (tok.encode("Hello")[0] == bos) == bool(f.key("tokenizer.ggml.add_bos_token", spm))
    assert tok.bos_token_id == bos and tok.eos_token_id == f.key("tokenizer.ggml.eos_token_id")
    template = f.key("tokenizer.chat_template")
    assert tok.chat_template == template
    said = tok.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert said.endswith("<|im_start|>assistant\n") and CHAT[0]["content"] in said
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tok.eos_token_id in (ends if isinstance(ends, list) else [ends])


def check_logits(args, model, folder, most, adapter):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = [int(t) for t in np.random.default_rng(3).integers(0, loaded.config.vocab_size, 40)]
    with torch.no_grad():
        theirs = loaded(torch.tensor([tokens])).logits[0].numpy()
    want = ours(args, model, tokens, adapter)
    off = float(np.abs(theirs - want).max() / np.abs(want).max())
    assert off < most, (folder, off)
    return off


def check_bytes(model, folder, kind, work):
    """The library's own file of the same model."""
    torch_model.load(model).to(DTYPES[kind]).save_pretrained(work / "theirs")
    assert sha(work / "theirs/model.safetensors") == sha(folder / "model.safetensors"), folder


def one(args, work, name, flags, kind, adapter):
    model, folder = work / f"{name}.gguf", work / name
    tool(args, "make_model", *flags, "--out", model)
    adapter = HERE / "fixtures/adapter" / adapter if adapter else None
    tool(args, "parley", "export", "--format", "safetensors", "--model", model, "--out", folder, "--type", kind, *(["--adapter", adapter] if adapter else []))
    check_tokenizer(args, model, folder, texts.BASE + texts.mixtures(150))
    most = 3e-2 if "q8_0" in flags else {"f32": 2e-5, "f16": 4e-3, "bf16": 3e-2}[kind]  # with quantized weights parley rounds activations too
    off = check_logits(args, model, folder, most, adapter)
    if not adapter:
        check_bytes(model, folder, kind, work)
    print(f"export {name}: tokens equal, logits off by {off:.1e} of the largest")
    return {"name": name, "flags": flags, "type": kind, "adapter": adapter.name if adapter else None,
            "config": json.loads((folder / "config.json").read_text()), "sha256": {p.name: sha(p) for p in sorted(folder.iterdir()) if p.name != "config.json"}}


def real(args, work):
    folder = work / "real"
    tool(args, "parley", "export", "--format", "safetensors", "--model", args.model, "--out", folder)
    check_tokenizer(args, args.model, folder, texts.BASE + texts.mixtures(400))
    check_bytes(args.model, folder, "f16", work)
    print(f"export of the real model: tokens equal, logits off by {check_logits(args, args.model, folder, 0.1, None):.1e} of the largest")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bin", required=True)
    p.add_argument("--check", action="store_true")
    p.add_argument("--model")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        cases = [one(args, pathlib.Path(work), *case) for case in CASES]
        if args.model:
            real(args, pathlib.Path(work))
    text = json.dumps({"made_by": "tests/oracle/check_export.py", "cases": cases}, indent=None, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n"
    if args.check:
        same = FILE.read_text() == text
        print(f"export fixtures: {'equal' if same else 'DIFFER'}")
        sys.exit(not same)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text)


if __name__ == "__main__":
    main()
