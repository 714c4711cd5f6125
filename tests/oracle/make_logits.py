#!/usr/bin/env python3
# make_logits: writes the fixtures that tests/unit/check_model.c compares the forward pass with, and measures the
# full-vocabulary divergence from the float32 reference beside llama.cpp's. Needs torch, transformers and gguf.
#   make_logits.py tiny  --bin DIR                             fixtures/logits/tiny.{json,bin}
#   make_logits.py real  --bin DIR --model FILE [--peer PROG]  fixtures/logits/smollm2.{json,bin}
#   make_logits.py full  --bin DIR --model FILE [--peer PROG]  prints the divergences over every position of the
#                                                              fixture's texts and the whole vocabulary, writes nothing
# DIR holds make_model and logits (make builds them); PROG is peer_logits.c built against llama.cpp.
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch

import torch_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "logits"
TOP = 256
NEW_TOKENS = 64
POSITIONS = 10  # of each prompt with its continuation

K = ["--layers", "1"]
TINY = [  # name, flags of make_model
    ("llama-f32", []),
    ("llama-untied-bias-linear", ["--untied", "--biases", "--rope-base", "50000", "--rope-linear", "2.5"]),
    ("llama-factors-wide-heads", ["--rope-factors", "--head-dim", "32", "--rope-base", "500000", "--seed", "5"]),
    ("llama-spm-mha", ["--tokenizer", "spm", "--kv-heads", "4", "--seed", "6"]),
    ("gpt2-f32", ["--arch", "gpt2"]),
    ("gpt2-untied-f16", ["--arch", "gpt2", "--untied", "--type", "f16", "--ctx", "64"]),
    ("gpt2-q8_0", ["--arch", "gpt2", "--type", "q8_0", "--ctx", "64"]),
] + [("llama-" + t, ["--type", t]) for t in ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")] \
  + [("llama-" + t, ["--type", t] + K) for t in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a C function that reverses a string in place.",
    "def fibonacci(n):\n    # finish this Python function",
    "Quelle est la différence entre un volcan et une montagne ? Réponds en français.",
    "What is 17 + 26? Show your steps.",
    "A train travels 180 km in 3 hours. What is its average speed?",
    "Give me a list of five fruits that are red.",
    "Name the planets of the solar system in order from the Sun.",
    "Write a short poem about the sea.",
    "Translate to Spanish: The library opens at nine in the morning.",
    "Summarize this text: The honey bee lives in colonies. Each colony has one queen, thousands of workers and a few hundred "
    "drones. The workers gather nectar and pollen, feed the brood and defend the hive.",
    "Rewrite this sentence more politely: Send me the report now.",
    "What does HTTP status code 404 mean?",
    "SELECT name FROM users WHERE -- explain what a WHERE clause does",
    "Who wrote Romeo and Juliet, and when?",
    "Erkläre kurz, was ein Algorithmus ist.",
    "Is a tomato a fruit or a vegetable? Answer with one word, then explain.",
    "Return a JSON object with the keys name and age for a person called Ada who is 36.",
    "How do I boil an egg? Number the steps.",
]


def run(program, lines, on_rows):
    """Feeds JSON lines to a program and hands each answer [rows, vocabulary] to on_rows(i, rows)."""
    with tempfile.TemporaryFile("w+") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
        f.seek(0)
        child = subprocess.Popen(program, stdin=f, stdout=subprocess.PIPE)
        for i in range(len(lines)):
            n, v = struct.unpack("II", child.stdout.read(8))
            on_rows(i, np.frombuffer(child.stdout.read(4 * n * v), dtype=np.float32).reshape(n, v))
        assert child.wait() == 0


def log_softmax(x):
    return torch.log_softmax(torch.tensor(np.asarray(x), dtype=torch.float64), -1)


def kl(ref, rows):
    ours = log_softmax(rows)
    return (ref.exp() * (ref - ours)).sum(-1)


def make_tiny(args):
    cases, blob = [], b""
    for i, (name, flags) in enumerate(TINY):
        with tempfile.TemporaryDirectory() as d:
            path = os.path.join(d, "m.gguf")
            subprocess.run([os.path.join(args.bin, "make_model"), *flags, "--out", path], check=True)
            model = torch_model.load(path)
        V = model.config.vocab_size
        tokens = [int(t) for t in np.random.default_rng(i).integers(0, V, 48)]
        positions = [0, 15, 33, 47]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        quantized = any("q" in f[:1] for f in flags)
        cases.append({"name": name, "flags": flags, "n_vocab": V, "tokens": tokens, "positions": positions,
                      "offset": len(blob) // 4, "quantized": quantized})
        blob += logits[positions].numpy().astype("<f4").tobytes()
    (FIXTURES / "tiny.bin").write_bytes(blob)
    (FIXTURES / "tiny.json").write_text(json.dumps(
        {"made_by": "tests/oracle/make_logits.py tiny", "torch": torch.__version__, "cases": cases}, indent=None,
        separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")


def tokenizer_of(path):
    """The file's own byte-level BPE by the tokenizers library; special tokens are found in the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    f = torch_model.File(path)
    tokens, merges, types = (f.key("tokenizer.ggml." + k) for k in ("tokens", "merges", "token_type"))
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, types) if k == 3])
    return tok, f.key("tokenizer.chat_template"), f.key("tokenizer.ggml.eos_token_id")


def greedy(model, prompt, stop):
    """Up to NEW_TOKENS greedy tokens, each with the gap between the two best log-probabilities."""
    out, margins, past, feed = [], [], None, torch.tensor([prompt])
    with torch.no_grad():
        while len(out) < NEW_TOKENS:
            step = model(feed, past_key_values=past, use_cache=True)
            past = step.past_key_values
            best = step.logits[0, -1].topk(2)
            out.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 4))
            if out[-1] == stop:
                break
            feed = torch.tensor([[out[-1]]])
    return out, margins


def references(args):
    """Every prompt with its greedy continuation, and the float32 log-probabilities at the measured positions."""
    import jinja2
    model = torch_model.load(args.model)
    tok, template, stop = tokenizer_of(args.model)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    cases, refs = [], []
    for text in PROMPTS:
        chat = template.render(messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
                               add_generation_prompt=True, bos_token="", eos_token="")
        prompt = tok.encode(chat, add_special_tokens=False).ids
        out, margins = greedy(model, prompt, stop)
        tokens = prompt + out
        with torch.no_grad():
            full = model(torch.tensor([tokens[:-1]])).logits[0].double()
        assert [int(i) for i in full[len(prompt) - 1:].argmax(-1)] == out or min(margins) < 1e-3
        positions = sorted({int(p) for p in np.linspace(1, len(tokens) - 2, POSITIONS)})
        refs.append(torch.log_softmax(full[positions], -1))
        cases.append({"text": text, "prompt": prompt, "continuation": out, "margins": margins, "positions": positions})
        print(f"{len(out):3} {tok.decode(out)[:100]!r}", file=sys.stderr, flush=True)
    return cases, refs


def every_position(args):
    """The fixture's texts, with the float32 log-probabilities at each of their positions."""
    model = torch_model.load(args.model)
    cases, refs = json.loads((FIXTURES / "smollm2.json").read_text())["cases"], []
    for c in cases:
        tokens = (c["prompt"] + c["continuation"])[:-1]
        c["positions"] = list(range(len(tokens)))
        with torch.no_grad():
            refs.append(torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1))
    return cases, refs


def measure(program, cases, refs):
    """Mean divergence from the reference over all measured positions, and how often the best token differs."""
    total, wrong = [], 0

    def on_rows(i, rows):
        nonlocal wrong
        ref = refs[i]
        rows = rows[cases[i]["positions"]]
        total.append(kl(ref, rows))
        wrong += int((ref.argmax(-1).numpy() != rows.argmax(-1)).sum())
    run(program, [{"tokens": (c["prompt"] + c["continuation"])[:-1]} for c in cases], on_rows)
    every = torch.cat(total)
    return {"mean_kl": float(every.mean()), "max_kl": float(every.max()), "positions": len(every), "other_top1": wrong}


def measure_all(args, cases, refs):
    ours = os.path.join(args.bin, "logits")
    found = {f"parley {isa} kv {kv}": measure([ours, "--model", args.model, "--isa", isa, "--kv-type", kv], cases, refs)
             for isa, kv in (("ref", "f32"), ("avx2", "f16"), ("avx512", "f16"), ("avx512", "f32"))}
    if args.peer:
        found["llama.cpp"] = measure([args.peer, args.model, "2"], cases, refs)
    for name, m in found.items():
        print(f"{name:24} mean KL {m['mean_kl']:.6f}  max {m['max_kl']:.4f}  other top-1 {m['other_top1']} of {m['positions']}")
    return found


def make_real(args):
    cases, refs = references(args)
    found = measure_all(args, cases, refs)
    blob = b""
    for ref in refs:
        for row in ref:
            best = row.topk(TOP)
            tail = 1.0 - float(best.values.exp().sum())
            blob += best.indices.numpy().astype("<u2").tobytes() + best.values.numpy().astype("<f4").tobytes()
            blob += struct.pack("<f", max(tail, 0.0))
    (FIXTURES / "smollm2.bin").write_bytes(blob)
    doc = {"made_by": "tests/oracle/make_logits.py real", "model": os.path.basename(args.model),
           "reference": f"transformers LlamaForCausalLM, float32, de-quantized by gguf; torch {torch.__version__}", "top": TOP}
    if args.peer:
        doc["peer"] = {"name": "llama.cpp", **found["llama.cpp"], "how":
                       "tests/oracle/peer_logits.c on libllama of llama_cpp_python 0.3.36, CPU, same file, same positions, "
                       "full vocabulary, default context settings (f16 cache)"}
        top = measure_top([args.peer, args.model, "2"], cases, refs)
        doc["peer"]["mean_kl_top"] = top
    doc["cases"] = cases
    (FIXTURES / "smollm2.json").write_text(json.dumps(doc, ensure_ascii=False, separators=(",", ":")).replace(
        '{"text"', '\n{"text"') + "\n")


def measure_top(program, cases, refs):
    """As check_model.c measures: the TOP best tokens one by one, the rest as one."""
    total = []

    def on_rows(i, rows):
        ours = log_softmax(rows[cases[i]["positions"]])
        best = refs[i].topk(TOP)
        p, q = best.values, ours.gather(1, best.indices)
        p_rest, q_rest = 1 - p.exp().sum(-1), 1 - q.exp().sum(-1)
        total.append((p.exp() * (p - q)).sum(-1) + p_rest * (p_rest / q_rest).log())
    run(program, [{"tokens": (c["prompt"] + c["continuation"])[:-1]} for c in cases], on_rows)
    return float(torch.cat(total).mean())


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("what", choices=("tiny", "real", "full"))
    ap.add_argument("--bin", required=True)
    ap.add_argument("--model")
    ap.add_argument("--peer")
    args = ap.parse_args()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    if args.what == "tiny":
        make_tiny(args)
    elif not args.model:
        ap.error("--model is needed")
    elif args.what == "real":
        make_real(args)
    else:
        measure_all(args, *every_position(args))


if __name__ == "__main__":
    main()
