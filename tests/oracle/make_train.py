#!/usr/bin/env python3
# make_train: writes the fixtures that tests/unit/check_train.c compares the trainer with: every operation's result and
# gradients, loss and all gradients of whole tiny models, the losses of 20 steps, the same of DPO, gradients under dropout, and
# learning rates, from PyTorch, PEFT and transformers in float32.
# Each operation's PyTorch gradient is first checked against finite differences in float64.
#   make_train.py --bin DIR           fixtures/train/{ops,models,more}.{json,bin}; DIR holds make_model
#   make_train.py --bin DIR --check   makes them anew and compares with what is committed
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

import torch_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "train"


class Store:
    """Arrays one after another in a file, and what they are."""

    def __init__(self):
        self.blob, self.cases, self.at = [], [], 0

    def case(self, name, arrays, **more):
        list_ = {}
        for key, value in arrays.items():
            a = np.ascontiguousarray(value.detach().numpy() if torch.is_tensor(value) else value, dtype="<f4")
            list_[key] = [self.at, *a.shape]
            self.blob.append(a.tobytes())
            self.at += a.size
        self.cases.append({"name": name, **more, "arrays": list_})

    def save(self, stem):
        (FIXTURES / (stem + ".bin")).write_bytes(b"".join(self.blob))
        head = {"made_by": "tests/oracle/make_train.py", "torch": torch.__version__, "cases": self.cases}
        text = json.dumps(head, separators=(",", ":")).replace('{"name"', '\n{"name"')
        (FIXTURES / (stem + ".json")).write_text(text + "\n")


# ---- operations ----

def rms(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def rope(x, freq, pos, heads, interleaved):
    t = x.shape[0]
    x = x.view(t, heads, -1)
    n = freq.shape[0]
    angle = pos.to(x.dtype)[:, None] * freq[None]
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    rest = x[..., 2 * n:]
    if interleaved:
        a, b = x[..., 0:2 * n:2], x[..., 1:2 * n:2]
        turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = x[..., :n], x[..., n:2 * n]
        turned = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((turned, rest), -1).reshape(t, -1)


def attention(qkv, starts, heads, kv, dim):
    out = []
    for a, b in zip(starts, starts[1:]):
        q, k, v = qkv[a:b].split([heads * dim, kv * dim, kv * dim], 1)
        q, k, v = (x.view(b - a, -1, dim).transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // kv, 0) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(b - a, -1))
    return torch.cat(out)


def make_ops(store):
    torch.manual_seed(7)

    def op(name, fn, inputs, **more):
        """fn of named inputs; a random gradient is sent back from its result."""
        exact = [v.double().requires_grad_() for v in inputs.values()]
        assert torch.autograd.gradcheck(fn, exact, eps=1e-6, atol=1e-5), name
        leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
        out = fn(*leaves.values())
        dout = torch.randn_like(out)
        out.backward(dout)
        store.case(name, {**leaves, "out": out, "dout": dout, **{"d" + k: v.grad for k, v in leaves.items()}}, **more)

    r = torch.randn
    for t, n, k in ((7, 5, 3), (37, 83, 50), (1, 33, 129)):
        op("linear", lambda x, w, b: F.linear(x, w, b), {"x": r(t, k), "w": r(n, k), "b": r(n)})
    x, gain, bias = r(9, 37), r(37), r(37)
    op("norm_rms", lambda x, g: rms(x, g, 1e-5), {"x": x, "gain": gain}, eps=1e-5)
    op("norm_layer", lambda x, g, b: F.layer_norm(x, (37,), g, b, 1e-5), {"x": x, "gain": gain, "bias": bias}, eps=1e-5)
    op("glu_silu", lambda x: F.silu(x[:, :21]) * x[:, 21:], {"x": 3 * r(6, 42)})
    op("glu_gelu", lambda x: F.gelu(x[:, :21], approximate="tanh") * x[:, 21:], {"x": 3 * r(6, 42)})
    op("act_silu", lambda x: F.silu(x), {"x": 4 * r(5, 35)})
    op("act_gelu", lambda x: F.gelu(x, approximate="tanh"), {"x": 4 * r(5, 35)})
    pos = torch.tensor([0, 1, 2, 0, 5, 19])
    freq = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    for kind, pairs in (("interleaved", True), ("halves", False)):
        op("rope_" + kind, lambda x: rope(x, freq.to(x.dtype), pos, 3, pairs), {"x": r(6, 24)}, pos=pos.tolist(),
           freq=freq.tolist(), head_dim=8)
    starts = [0, 1, 70, 83]
    op("attn", lambda qkv: attention(qkv, starts, 4, 2, 6), {"qkv": r(83, 48)}, starts=starts, heads=4, head_dim=6)
    idx = torch.tensor([3, 0, 3, 9])
    op("embed", lambda w: F.embedding(idx, w), {"w": r(10, 18)}, idx=idx.tolist())
    rows = torch.tensor([1, 2, 6])
    op("gather", lambda x: x[rows], {"x": r(8, 19)}, rows=rows.tolist())
    targets, weight = torch.tensor([2, 0, 96, 41, 41]), torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0])
    op("head", lambda h, w: -(weight.to(h.dtype) * F.log_softmax(h @ w.T, -1)[torch.arange(5), targets]).sum().reshape(1),
       {"h": r(5, 20), "w": r(97, 20)}, targets=targets.tolist(), weight=weight.tolist())
    w, grad = r(53), [r(53) for _ in range(3)]
    p = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in grad:
        p.grad = g.clone()
        optimizer.step()
    store.case("adamw", {"w": w, "g0": grad[0], "g1": grad[1], "g2": grad[2], "out": p})


# ---- whole models ----

SMALL = ["--layers", "2", "--embd", "32", "--heads", "4", "--kv-heads", "2", "--ff", "64"]
MODELS = [  # name, flags of make_model, adapter
    ("llama-full", SMALL, None),
    ("llama-full-untied-biases", ["--layers", "1", "--embd", "16", "--heads", "2", "--kv-heads", "1", "--ff", "40", "--untied", "--biases",
                                  "--rope-factors", "--rope-base", "50000"], None),
    ("gpt2-full", ["--arch", "gpt2", "--ctx", "64", *SMALL[:6], "--ff", "64"], None),
    ("llama-q4_1-lora", [*SMALL, "--type", "q4_1"], {"r": 4, "alpha": 8, "rslora": False}),
    ("llama-q4_k-lora-qv", ["--layers", "1", "--embd", "256", "--heads", "4", "--kv-heads", "1", "--ff", "256", "--type", "q4_k"],
     {"r": 3, "alpha": 5, "rslora": True, "targets": ["q_proj", "v_proj"]}),
    ("gpt2-q8_0-lora", ["--arch", "gpt2", "--ctx", "64", *SMALL[:6], "--ff", "64", "--type", "q8_0"], {"r": 4, "alpha": 4, "rslora": False}),
]
LENGTHS = [13, 2, 30, 19]  # packed
STEPS = 20
PLAN = {"learning_rate": 3e-3, "warmup_steps": 3, "min_ratio": 0.1, "schedule": "cosine", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
        "epsilon": 1e-8, "max_grad_norm": 1.0}


def rate(step):
    """The schedule of PLAN."""
    w = PLAN["warmup_steps"]
    if step < w:
        return PLAN["learning_rate"] * (step + 1) / (w + 1)
    done = (step - w) / (STEPS - w)
    return PLAN["learning_rate"] * (PLAN["min_ratio"] + (1 - PLAN["min_ratio"]) * (1 + np.cos(np.pi * done)) / 2)


def pairs_from_halves(w, n_heads):
    """The inverse of torch_model.halves_from_pairs."""
    head = w.shape[0] // n_heads
    return w.reshape(n_heads, 2, head // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape).contiguous()


class Full:
    """Every tensor of the file as a leaf, in the file's own layout."""

    def __init__(self, path):
        f, self.leaves = torch_model.File(path), {}
        take, fill = f.take, torch_model.fill

        def taking(name):
            t = take(name)
            if t is not None and name != "rope_freqs.weight":
                self.leaves[name] = t.requires_grad_()
            return t
        f.take = taking
        try:
            torch_model.fill = lambda model, values: setattr(self, "keys", list(values))
            self.build(f)
            self.config = self.model.config
        finally:
            torch_model.fill = fill
        self.path = path

    def build(self, f):
        self.model = {"llama": torch_model.llama, "gpt2": torch_model.gpt2}[f.key("general.architecture")](f)

    def values(self):
        """The model's parameters as functions of the leaves."""
        f, kept = torch_model.File(self.path), {}
        f.take = lambda name: (f.left.pop(name, None), self.leaves.get(name))[1]
        fill = torch_model.fill
        try:
            torch_model.fill = lambda model, values: kept.update({k: v for k, v in values.items() if v is not None})
            {"llama": torch_model.llama, "gpt2": torch_model.gpt2}[f.key("general.architecture")](f)
        finally:
            torch_model.fill = fill
        return kept

    def logits(self, tokens):
        return torch.func.functional_call(self.model, self.values(), (tokens[None],)).logits[0]

    def parameters(self):
        return self.leaves

    def gradients(self):
        return {k: v.grad for k, v in self.leaves.items()}


class Lora:
    """PEFT on the de-quantized model; its values by the names of the file's tensors."""
    NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attn.c_attn": "attn_qkv",
             "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}

    def __init__(self, path, o):
        from peft import LoraConfig, get_peft_model
        base = torch_model.load(path)
        self.config = base.config
        llama = base.config.model_type == "llama"
        targets = o.get("targets") or (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] if llama
                                       else ["c_attn", "c_proj", "c_fc"])
        self.model = get_peft_model(base, LoraConfig(r=o["r"], lora_alpha=o["alpha"], use_rslora=o["rslora"], target_modules=targets,
                                                     fan_in_fan_out=not llama, task_type="CAUSAL_LM"))
        self.model.eval()  # GPT-2 has dropout of its own
        self.by_name = {}
        for key, p in self.model.named_parameters():
            if p.requires_grad:
                with torch.no_grad():
                    p.copy_(torch.randn_like(p) * 0.1)  # B is not zero, so that A has a gradient
                parts = key.split(".")
                layer = next(i for i in parts if i.isdigit())
                module = next(v for k, v in self.NAMES.items() if "." + k + "." in key)
                half = "lora_a" if "lora_A" in key else "lora_b"
                self.by_name[f"blk.{layer}.{module}.{half}"] = p

    def logits(self, tokens):
        return self.model(tokens[None]).logits[0]

    def parameters(self):
        return self.by_name

    def in_file_order(self, name, t):
        if name.endswith("attn_q.lora_b"):
            return pairs_from_halves(t, self.config.num_attention_heads)
        if name.endswith("attn_k.lora_b"):
            return pairs_from_halves(t, self.config.num_key_value_heads)
        return t

    def gradients(self):
        return {k: self.in_file_order(k, p.grad) for k, p in self.by_name.items()}


def loss_of(subject, examples):
    """Mean over all supervised tokens of the examples, each alone."""
    total, count = 0, 0
    for ids, mask in examples:
        logits = subject.logits(torch.tensor(ids))
        logp = F.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        keep = torch.tensor(mask[1:], dtype=torch.bool)
        total, count = total - logp[keep].sum(), count + int(keep.sum())
    return total / count


def step_losses(subject, examples):
    """20 steps of AdamW, each on two examples in turn."""
    params = subject.parameters()
    groups = [{"params": [p for p in params.values() if p.dim() > 1], "weight_decay": PLAN["weight_decay"]},
              {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1, betas=(PLAN["beta1"], PLAN["beta2"]), eps=PLAN["epsilon"])
    losses = []
    for step in range(STEPS):
        for g in optimizer.param_groups:
            g["lr"] = rate(step)
        optimizer.zero_grad()
        first = step * 2 % len(examples)
        loss = loss_of(subject, examples[first:first + 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), PLAN["max_grad_norm"])
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make_models(store, bin_):
    for i, (name, flags, adapter) in enumerate(MODELS):
        with tempfile.TemporaryDirectory() as d:
            path = os.path.join(d, "m.gguf")
            subprocess.run([os.path.join(bin_, "make_model"), *flags, "--out", path], check=True)
            torch.manual_seed(i)
            subject = Lora(path, adapter) if adapter else Full(path)
            rng = np.random.default_rng(i)
            examples = [(rng.integers(0, subject.config.vocab_size, n).tolist(), [0, *(rng.random(n - 1) < 0.6).astype(int).tolist()])
                        for n in LENGTHS]
            examples[1][1][1] = 1  # of the shortest, at least one token counts
            loss = loss_of(subject, examples)
            loss.backward()
            arrays = {"d " + k: v.clone() for k, v in subject.gradients().items()}
            if adapter:
                arrays |= {k: subject.in_file_order(k, p).detach().clone() for k, p in subject.parameters().items()}
            store.case(name, arrays, flags=flags, adapter=adapter, examples=[{"ids": a, "loss": b} for a, b in examples], loss=float(loss.detach()),
                       step_losses=step_losses(subject, examples), plan=PLAN)


# ---- DPO, dropout, schedules ----

PRODUCTS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]  # as core/model/adapter.h orders them
N_TARGETS = 8


class Masked(torch.nn.Module):
    """Dropout whose choices are those of core/device/cpu/train.c: a hash of key, row of the micro-batch and column."""

    def __init__(self, key, share, at):
        super().__init__()
        self.key, self.share, self.at = key, share, at  # at: the first row of the example at hand

    def forward(self, x):
        rows, cols = x.shape[-2:]
        at = np.arange(self.at[0] * cols, (self.at[0] + rows) * cols, dtype=np.uint64)
        z = np.uint64(self.key) + at * np.uint64(0x9e3779b97f4a7c15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
        kept = (z >> np.uint64(32)) >= np.uint64(int(self.share * 2 ** 32))
        return x * torch.from_numpy(kept.reshape(rows, cols)).to(x.dtype) / (1 - self.share)


def tiny_subject(d, i, bin_, flags, adapter):
    path = os.path.join(d, "m.gguf")
    subprocess.run([os.path.join(bin_, "make_model"), *flags, "--out", path], check=True)
    torch.manual_seed(i)
    return Lora(path, adapter) if adapter else Full(path)


def random_examples(rng, vocab, lengths):
    examples = [(rng.integers(0, vocab, n).tolist(), [0, *(rng.random(n - 1) < 0.6).astype(int).tolist()]) for n in lengths]
    for _, mask in examples:
        mask[-1] = 1
    return examples


def as_json(examples):
    return [{"ids": a, "loss": b} for a, b in examples]


def values_of(subject, adapter):
    return {k: subject.in_file_order(k, p).detach().clone() for k, p in subject.parameters().items()} if adapter else {"none": np.zeros(1)}


def sum_logp(subject, example):
    ids, mask = example
    logp = F.log_softmax(subject.logits(torch.tensor(ids))[:-1], -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return logp[torch.tensor(mask[1:], dtype=torch.bool)].sum()


def make_dpo(store, bin_, i, name, flags, adapter, beta):
    with tempfile.TemporaryDirectory() as d:
        subject = tiny_subject(d, i, bin_, flags, adapter)
        examples = random_examples(np.random.default_rng(i), subject.config.vocab_size, [9, 14, 21, 6, 12, 12])
        values = values_of(subject, adapter)
        reference = [float(sum_logp(subject, e).detach()) for e in examples]
        losses, params = [], subject.parameters()
        groups = [{"params": [p for p in params.values() if p.dim() > 1], "weight_decay": PLAN["weight_decay"]},
                  {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1, betas=(PLAN["beta1"], PLAN["beta2"]), eps=PLAN["epsilon"])
        for step in range(STEPS):
            for g in optimizer.param_groups:
                g["lr"] = rate(step)
            optimizer.zero_grad()
            loss = 0
            for k in range(0, len(examples), 2):
                z = beta * ((sum_logp(subject, examples[k]) - reference[k]) - (sum_logp(subject, examples[k + 1]) - reference[k + 1]))
                loss = loss - F.logsigmoid(z) / (len(examples) // 2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(params.values()), PLAN["max_grad_norm"])
            optimizer.step()
            losses.append(float(loss.detach()))
        assert abs(losses[0] - np.log(2)) < 1e-6 and losses[-1] < 0.9 * losses[0], losses
        store.case(name, values, kind="dpo", flags=flags, adapter=adapter, examples=as_json(examples), beta=beta, reference=reference, losses=losses, plan=PLAN)


def make_dropout(store, bin_, i, name, flags, adapter, key):
    with tempfile.TemporaryDirectory() as d:
        subject = tiny_subject(d, i, bin_, flags, adapter)
        at = [0]
        for module_name, module in subject.model.named_modules():
            if hasattr(module, "lora_dropout"):
                layer, target = next(int(x) for x in module_name.split(".") if x.isdigit()), module_name.split(".")[-1]
                product = next(k for k, names in enumerate(PRODUCTS) if target in names)
                own = key + (layer * len(PRODUCTS) + product) * N_TARGETS + PRODUCTS[product].index(target) + 1
                module.lora_dropout["default"] = Masked(own, adapter["dropout"], at)
        logits = subject.logits

        def placed(tokens):
            out = logits(tokens)
            at[0] += len(tokens)
            return out
        subject.logits = placed
        examples = random_examples(np.random.default_rng(i), subject.config.vocab_size, [13, 2, 30])
        loss = loss_of(subject, examples)
        loss.backward()
        arrays = {"d " + k: v.clone() for k, v in subject.gradients().items()} | values_of(subject, adapter)
        store.case(name, arrays, kind="dropout", flags=flags, adapter=adapter, examples=as_json(examples), key=key, loss=float(loss.detach()))


def make_rates(store):
    import transformers as t
    top, total, warmup, low, fall = 2.0, 40, 6, 0.1, 0.25
    for name, begin in (
            ("constant", lambda o: t.get_constant_schedule_with_warmup(o, warmup)),
            ("linear", lambda o: t.get_polynomial_decay_schedule_with_warmup(o, warmup, total, lr_end=low * top, power=1)),
            ("cosine", lambda o: t.get_scheduler("cosine_with_min_lr", o, warmup, total, {"min_lr_rate": low})),
            ("wsd", lambda o: t.get_wsd_schedule(o, warmup, int(fall * total), num_training_steps=total, decay_type="linear", min_lr_ratio=low))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=top)
        schedule, rates = begin(optimizer), []
        for _ in range(total):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        store.case(name, {"rates": np.array(rates)}, kind="rates", learning_rate=top, total=total, warmup_steps=warmup, min_ratio=low, decay_ratio=fall)


def make_more(store, bin_):
    make_dpo(store, bin_, 20, "llama-full-dpo", SMALL, None, 0.5)
    make_dpo(store, bin_, 21, "gpt2-full-dpo", ["--arch", "gpt2", "--ctx", "64", *SMALL[:6], "--ff", "64"], None, 0.1)
    make_dpo(store, bin_, 22, "llama-q8_0-lora-dpo", [*SMALL, "--type", "q8_0"], {"r": 4, "alpha": 8, "rslora": False}, 0.3)
    make_dropout(store, bin_, 23, "llama-lora-dropout", SMALL, {"r": 4, "alpha": 8, "rslora": False, "dropout": 0.25}, 123456789012345)
    make_rates(store)


def same(a, b):
    x, y = np.frombuffer(a, "<f4"), np.frombuffer(b, "<f4")
    return len(x) == len(y) and np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bin", required=True)
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    ok = True
    for stem, make in (("ops", make_ops), ("models", lambda s: make_models(s, args.bin)), ("more", lambda s: make_more(s, args.bin))):
        store = Store()
        make(store)
        if args.check:
            good = same((FIXTURES / (stem + ".bin")).read_bytes(), b"".join(store.blob))
            print("train", stem, "is the same" if good else "DIFFERS")
            ok &= good
        else:
            store.save(stem)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
