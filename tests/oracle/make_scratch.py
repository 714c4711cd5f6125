#!/usr/bin/env python3
# make_scratch: writes fixtures/train/scratch.json, which tests/http/test_scratch.py compares jobs with that make a model from
# nothing: the losses of 20 steps that PyTorch gets from the same first weights, on the tokens that Hugging Face's tokenizers
# give with the vocabulary in the file.
#   make_scratch.py --bin DIR           DIR holds parley
#   make_scratch.py --bin DIR --check   makes it anew and compares with what is committed
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import make_train
import torch_model

FIXTURE = make_train.FIXTURES / "scratch.json"
TEXTS = ["The lighthouse keeper writes down the wind and the rain, every evening, before the lamp is lit.",
         "Before the lamp is lit the keeper climbs the stairs; there are two hundred and twelve of them.",
         "When the rain comes in from the sea, the keeper writes, the gulls are quiet and the lamp seems brighter.",
         "Der Wärter schreibt jeden Abend auf, wie der Wind geht, und zündet dann die Lampe an.",
         "The wind went round at midnight, the keeper wrote, and the sea was quiet before the lamp went out."]
SHAPES = {"llama": {"architecture": "llama", "layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "ff": 96, "context": 64, "vocab_size": 300},
          "gpt2": {"architecture": "gpt2", "layers": 3, "width": 40, "heads": 4, "ff": 100, "context": 128, "tied": False, "chat_template": "chatml"}}
SEED = 11


def job(folder, shape):
    """All texts in each step, so that their order does not matter."""
    p = make_train.PLAN
    body = {"shape": shape, "hyperparameters": {"n_epochs": make_train.STEPS, "batch_size": len(TEXTS), "learning_rate": p["learning_rate"]},
            "schedule": {"kind": p["schedule"], "warmup_steps": p["warmup_steps"], "min_ratio": p["min_ratio"]},
            "optimizer": {k: p[k] for k in ("weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm")}, "compute": {"precision": "f32", "threads": 2}}
    with open(os.path.join(folder, "train.jsonl"), "w") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS)
    spec = {"id": "ftjob-1", "name": "ft:scratch", "base": None, "training_file": os.path.join(folder, "train.jsonl"), "validation_file": None, "seed": SEED,
            "created_at": 1700000000, "spec": {"type": "pretrain", "pretrain": body}}
    with open(os.path.join(folder, "job.json"), "w") as f:
        json.dump(spec, f)


def tokens(path):
    """Of each text, with the end; the vocabulary is the one that BpeTrainer learns."""
    f = torch_model.File(path)
    vocab, merges, kinds = (f.key("tokenizer.ggml." + k) for k in ("tokens", "merges", "token_type"))
    special = [t for t, k in zip(vocab, kinds) if k == 3]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=len(vocab), min_frequency=2, special_tokens=special, show_progress=False,
                                                           initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert learned.get_vocab() == {t: i for i, t in enumerate(vocab)}, "another vocabulary"
    assert f.key("tokenizer.ggml.eos_token_id") == 0 and special[0] == "<|endoftext|>" and len(merges) == len(vocab) - len(special) - 256
    return [learned.encode(t).ids + [0] for t in TEXTS]


def check_weights(path, shape):
    """They are as the paper has them."""
    f = torch_model.File(path)
    for name in list(f.left):
        w = f.take(name).numpy()
        if name.endswith("bias"):
            assert not w.any(), name
        elif "norm" in name:
            assert (w == 1).all(), name
        else:
            wanted = 0.02 / (math.sqrt(2 * shape["layers"]) if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1)
            assert abs(w.std() / wanted - 1) < 4 / math.sqrt(2 * w.size) and abs(w.mean()) < 4 * wanted / math.sqrt(w.size), (name, w.std(), wanted)
            assert np.abs(w).max() < 6 * wanted, name


def losses(subject, examples):
    params = subject.parameters()
    groups = [{"params": [p for p in params.values() if (p.dim() > 1) == matrix], "weight_decay": make_train.PLAN["weight_decay"] * matrix}
              for matrix in (True, False)]
    p = make_train.PLAN
    optimizer = torch.optim.AdamW(groups, lr=1, betas=(p["beta1"], p["beta2"]), eps=p["epsilon"])
    out = []
    for step in range(make_train.STEPS):
        for g in optimizer.param_groups:
            g["lr"] = make_train.rate(step)
        optimizer.zero_grad()
        loss = make_train.loss_of(subject, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), p["max_grad_norm"])
        optimizer.step()
        out.append(float(loss.detach()))
    return out


def make(bin_):
    cases = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            job(folder, shape)
            subprocess.run([os.path.join(bin_, "parley"), "train", "--job", folder], check=True, stderr=subprocess.DEVNULL)
            path = os.path.join(folder, "base.gguf")
            check_weights(path, shape)
            ids = tokens(path)
            subject = make_train.Full(path)
            with open(os.path.join(folder, "job.json")) as f:
                spec = json.load(f)["spec"]
            found = losses(subject, [(x, [0] + [1] * (len(x) - 1)) for x in ids])
        cases.append({"name": name, "texts": TEXTS, "seed": SEED, "spec": spec, "n_vocab": subject.config.vocab_size, "losses": found})
    return {"made_by": "tests/oracle/make_scratch.py", "torch": torch.__version__, "cases": cases}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bin", required=True)
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    made = make(args.bin)
    if not args.check:
        FIXTURE.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n")
        return
    good = all(old["spec"] == new["spec"] and np.allclose(old["losses"], new["losses"], rtol=1e-4)
               for old, new in zip(json.loads(FIXTURE.read_text())["cases"], made["cases"]))
    print("train scratch", "is the same" if good else "DIFFERS")
    sys.exit(not good)


if __name__ == "__main__":
    main()
