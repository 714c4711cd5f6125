#!/usr/bin/env python3
# check_training: whole jobs on a real model beside PyTorch + PEFT in float32: the same dialogues (rendered by Jinja2, cut by Hugging Face
# tokenizers, masked here), the same order, the same first weights. Losses of every step must agree to 1e-3; what comes out is read by
# PEFT; the event files by TensorBoard's own reader; `parley eval` and its answers are measured again by PyTorch, sacrebleu and rouge_score.
#   check_training.py --bin DIR --model FILE [--only NAME]...
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import jinja2
import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import torch_model
from make_logits import tokenizer_of

DATA = pathlib.Path(__file__).resolve().parents[2] / "data"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH, SEED, TOLERANCE = 20, 2, 5, 1e-3
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "max_grad_norm": 1.0, "weight_decay": 0.1}
M64 = (1 << 64) - 1


def next_random(state):
    z = state[0] = (state[0] + 0x9e3779b97f4a7c15) & M64
    z = ((z ^ z >> 30) * 0xbf58476d1ce4e5b9) & M64
    z = ((z ^ z >> 27) * 0x94d049bb133111eb) & M64
    return z ^ z >> 31


def order_of(n, seed, epoch=0):
    """The order of an epoch, from core/train/random.h and batch.c by hand."""
    h = 0xcbf29ce484222325 ^ (seed << 32 | epoch)
    for c in b"order":
        h = ((h ^ c) * 0x100000001b3) & M64
    state = [next_random([h])]
    order = list(range(n))
    for i in range(n, 1, -1):
        k = (next_random(state) >> 32) * i >> 32
        order[i - 1], order[k] = order[k], order[i - 1]
    return order


def rate_of(kind, step, total, top, warmup, low, decay=0.2):
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    done, fall = (step - warmup) / (total - warmup), decay * total
    return top * {"constant": 1.0, "linear": low + (1 - low) * (1 - done), "cosine": low + (1 - low) * (1 + math.cos(math.pi * done)) / 2,
                  "wsd": low + (1 - low) * min(1, (total - step) / fall)}[kind]


class Text:
    def __init__(self, path):
        self.tok, template, self.eog = tokenizer_of(path)
        self.template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        self.begin = self.tok.encode("<|im_start|>assistant\n", add_special_tokens=False).ids

    def dialogue(self, messages):
        """Tokens, and which of them count: each answer with its <|im_end|>."""
        ids = self.tok.encode(self.template.render(messages=messages), add_special_tokens=False).ids
        mask, inside = [], False
        for i, t in enumerate(ids):
            mask.append(inside)
            if inside and t == self.eog:
                inside = False
            if ids[i - len(self.begin) + 1:i + 1] == self.begin:
                inside = True
        return ids, mask


def log_probs(model, ids, mask):
    """Log-probabilities of the tokens that count, and whether each was the likeliest."""
    at = [i for i in range(1, len(ids)) if mask[i]]
    rows = F.log_softmax(model(torch.tensor([ids])).logits[0][[i - 1 for i in at]], -1)
    want = torch.tensor([ids[i] for i in at])
    return rows.gather(1, want[:, None])[:, 0], rows.argmax(-1) == want


def mean_loss(model, examples):
    each = [log_probs(model, *e)[0] for e in examples]
    return -sum(x.sum() for x in each) / sum(len(x) for x in each)


def dpo_loss(model, pairs, reference, beta):
    total = 0
    for (chosen, rejected), (a, b) in zip(pairs, reference):
        z = beta * ((log_probs(model, *chosen)[0].sum() - a) - (log_probs(model, *rejected)[0].sum() - b))
        total = total - F.logsigmoid(z)
    return total / len(pairs)


def train(model, loss_of, units, schedule, top):
    """STEPS steps of AdamW by PyTorch: the losses before each."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": OPTIMIZER["weight_decay"]},
                                   {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=1, betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]), eps=OPTIMIZER["epsilon"])
    order, losses = order_of(len(units), SEED), []
    for step in range(STEPS):
        for g in optimizer.param_groups:
            g["lr"] = rate_of(schedule, step, STEPS, top, 3, 0.1)
        optimizer.zero_grad()
        loss = loss_of(order[step * BATCH:(step + 1) * BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def first_adapter(args, folder):
    """A PEFT model whose adapter is not nothing, so that both of its halves have gradients; saved by PEFT."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(torch_model.load(args.model), config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_((torch.rand(p.shape, generator=random) * 2 - 1) * (0.02 if "lora_B" in name else p.shape[1] ** -0.5))
    model.save_pretrained(folder)
    return model.eval()


def run_job(args, folder, name, lines, method, kind, schedule, top, adapter):
    job = folder / name
    job.mkdir()
    (job / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    peft_of = {"kind": "full"} if kind == "full" else {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0}
    spec = {"peft": peft_of, "hyperparameters": {"n_epochs": 1, "batch_size": BATCH, "learning_rate": top}, "optimizer": OPTIMIZER,
            "schedule": {"kind": schedule, "warmup_steps": 3, "min_ratio": 0.1}, "compute": {"precision": "f32", "threads": args.threads},
            "evaluation": {"forgetting": False}}
    (job / "job.json").write_text(json.dumps({
        "id": "ftjob-1", "name": "ft:x", "base": str(args.model), "base_adapter": str(adapter) if adapter else None, "validation_file": None,
        "training_file": str(job / "train.jsonl"), "seed": SEED, "created_at": 1700000000, "spec": {"type": method, method: spec}}))
    subprocess.run([args.bin / "parley", "train", "--job", job], check=True)
    said = [json.loads(x) for x in (job / "progress.jsonl").read_text().splitlines()]
    return job, [x for x in said if x["type"] == "metrics"]


def events_agree(job, metrics):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(job / "tensorboard"))
    events.Reload()
    for tag, name in (("train/loss", "train_loss"), ("train/learning_rate", "learning_rate"), ("train/grad_norm", "grad_norm")):
        got = [(e.step, e.value) for e in events.Scalars(tag)]
        if [s for s, _ in got] != [m["step"] for m in metrics] or any(abs(v - m[name]) > 1e-6 * abs(m[name]) for (_, v), m in zip(got, metrics)):
            return False
    return True


def distance(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def check_job(args, text, name, method, kind, schedule, top):
    lines = [json.loads(x) for x in (DATA / "northlight-train.jsonl").read_text().splitlines()[:STEPS * BATCH]]
    if method == "dpo":  # the next line's answer is the one not preferred
        lines = [{"input": {"messages": x["messages"][:-1]}, "preferred_output": x["messages"][-1:], "non_preferred_output": y["messages"][-1:]}
                 for x, y in zip(lines, lines[1:] + lines[:1])]
    with tempfile.TemporaryDirectory() as d:
        folder = pathlib.Path(d)
        adapter = folder / "first" if kind == "lora" else None
        model = first_adapter(args, adapter) if adapter else torch_model.load(args.model)
        job, metrics = run_job(args, folder, name, lines, method, kind, schedule, top, adapter)
        ours = [m["train_loss"] for m in metrics]
        if method == "dpo":
            of = lambda x, out: text.dialogue(x["input"]["messages"] + x[out])
            pairs = [tuple((ids, [m and i >= first for i, m in enumerate(mask)]) for ids, mask, first in (
                (*of(x, out), len(text.dialogue(x["input"]["messages"])[0])) for out in ("preferred_output", "non_preferred_output"))) for x in lines]
            with torch.no_grad():
                reference = [tuple(log_probs(model, *e)[0].sum() for e in pair) for pair in pairs]
            theirs = train(model, lambda units: dpo_loss(model, [pairs[i] for i in units], [reference[i] for i in units], 0.1), pairs, schedule, top)
        else:
            examples = [text.dialogue(x["messages"]) for x in lines]
            theirs = train(model, lambda units: mean_loss(model, [examples[i] for i in units]), examples, schedule, top)
        off, good = distance(ours, theirs), events_agree(job, metrics)
        says = f"losses {ours[0]:.6f} to {ours[-1]:.6f}, PyTorch {theirs[0]:.6f} to {theirs[-1]:.6f}, at most {off:.1e} apart; "
        if kind == "lora":  # what was learned: parley's file in PEFT
            mine, first = load_file(job / "result" / "adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
            peft.PeftModel.from_pretrained(torch_model.load(args.model), job / "result")
            their = peft.get_peft_model_state_dict(model)
            assert mine.keys() == their.keys()
            moved = math.sqrt(sum(float((their[k] - first[k]).pow(2).sum()) for k in mine))
            apart = math.sqrt(sum(float((their[k] - mine[k]).pow(2).sum()) for k in mine)) / moved
            says += f"the adapters' changes {apart:.1e} apart; "
            good &= apart < 0.05
        print(f"training oracle: {name}: {says}event file {'read by TensorBoard' if good else 'or adapter DIFFERS'}", flush=True)
        return good and len(ours) == STEPS and off <= TOLERANCE


def check_eval(args, text):
    """parley eval, with and without an adapter, and the answers it gives."""
    import sacrebleu
    from rouge_score import rouge_scorer
    lines = [json.loads(x)["messages"] for x in (DATA / "northlight-validation.jsonl").read_text().splitlines()]
    examples, good = [text.dialogue(m) for m in lines], True
    with tempfile.TemporaryDirectory() as d:
        folder = pathlib.Path(d)
        models = {"base": torch_model.load(args.model), "adapter": first_adapter(args, folder / "first")}
        for name, model in models.items():
            command = [args.bin / "parley", "eval", "--model", args.model, "--data", DATA / "northlight-validation.jsonl", "--precision", "f32", "--json",
                       "--answers", "6", "--max-tokens", "48", "--show", folder / "said.jsonl", *(["--adapter", folder / "first"] if name != "base" else [])]
            ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            with torch.no_grad():
                each = [log_probs(model, *e) for e in examples]
            count = sum(len(p) for p, _ in each)
            loss, right = -float(sum(p.sum() for p, _ in each)) / count, float(sum(r.sum() for _, r in each)) / count
            said = [json.loads(x) for x in (folder / "said.jsonl").read_text().splitlines()]
            answers, references = [x["answer"] for x in said], [x["reference"] for x in said]
            bleu = sacrebleu.corpus_bleu(answers, [references]).score
            scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
            rouge = {k: sum(scorer.score(b, a)[k].fmeasure for a, b in zip(answers, references)) / len(said) for k in ("rouge1", "rouge2", "rougeL")}
            fine = (abs(ours["loss"] / loss - 1) < 1e-4 and abs(ours["mean_token_accuracy"] - right) < 2e-3 and ours["loss_tokens"] == count
                    and references == [m[-1]["content"] for m in lines[:6]] and abs(ours["bleu"] - bleu) < 1e-5 and all(abs(ours[k] - v) < 1e-6 for k, v in rouge.items()))
            print(f"training oracle: eval, {name}: loss {ours['loss']:.6f}, PyTorch {loss:.6f}; token accuracy {ours['mean_token_accuracy']:.4f} and {right:.4f}; "
                  f"BLEU {ours['bleu']:.4f}, sacrebleu {bleu:.4f}; ROUGE-L {ours['rougeL']:.4f}, rouge_score {rouge['rougeL']:.4f}", flush=True)
            good &= fine
    return good


JOBS = {  # method, kind, schedule, learning rate
    "lora": ("supervised", "lora", "cosine", 5e-4),
    "full": ("supervised", "full", "linear", 2e-5),
    "dpo-lora": ("dpo", "lora", "wsd", 1e-4),
    "dpo-full": ("dpo", "full", "constant", 2e-6),
}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bin", required=True, type=pathlib.Path)
    p.add_argument("--model", required=True, type=pathlib.Path)
    p.add_argument("--only", action="append", choices=[*JOBS, "eval"])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    text = Text(args.model)
    good = True
    for name in args.only or [*JOBS, "eval"]:
        good &= check_eval(args, text) if name == "eval" else check_job(args, text, name, *JOBS[name])
    print("training oracle:", "passed" if good else "FAILED")
    sys.exit(not good)


if __name__ == "__main__":
    main()
