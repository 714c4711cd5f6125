#!/usr/bin/env python3
"""A worker that trains nothing: it speaks the protocol of `parley train --job FOLDER`, so that tests of jobs take no time and say when
what happens. FOLDER/../../script (a JSON file in the data directory) tells it how to behave:

  steps, seconds (of a step), checkpoint_every, fail {"code","param","message"} at step fail_at (0: before it says anything else), crash_at [steps: exit 9 the first time
  there], hang_at, ignore_term, hold_at (a step that waits until the script no longer says so), big (bytes of memory to take),
  whole (a GGUF file: the result is a copy of it), say (lines written as they are), exit (status), last (word before that)
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--job") + 1])
job = json.loads((folder / "job.json").read_text())
script = {"steps": 4, "seconds": 0.01, "checkpoint_every": 2}
name = folder.parent.parent / "script"
if name.exists():
    script.update(json.loads(name.read_text()))
progress = folder / "progress.jsonl"
stop = False


def on_term(*_):
    global stop
    stop = True


signal.signal(signal.SIGTERM, signal.SIG_IGN if script.get("ignore_term") else on_term)


def say(**line):
    with open(progress, "ab", buffering=0) as f:
        f.write((json.dumps(line) + "\n").encode())
        os.fsync(f.fileno())


def checkpoint(step):
    path = folder / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    say(type="checkpoint", step=step, path=f"checkpoints/step-{step}", metrics={"step": step, "train_loss": 2 - step / 10})


assert not any(k.startswith("PARLEY_") for k in os.environ), "the daemon's settings are not the worker's business"
(folder / "seen.tmp").write_text(json.dumps({"nice": os.nice(0), "pid": os.getpid(), "job": job, "argv": sys.argv,
                                               "training": Path(job["training_file"]).read_text(),
                                               "base": sorted(os.listdir(job["base_adapter"])) if job["base_adapter"] else None}))
os.replace(folder / "seen.tmp", folder / "seen.json")
if "exit" in script:
    print(script.get("last", "no training today"), file=sys.stderr)
    sys.exit(script["exit"])
if script.get("fail_at") == 0:
    say(type="failed", **script["fail"])
    sys.exit(2)
if "big" in script:
    try:
        bytearray(script["big"])
    except MemoryError:
        say(type="failed", code="out_of_memory", param=None, message="no memory for the activations")
        sys.exit(1)
done = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
first = done[-1] + 1 if done else 1
if first > 1 or progress.exists():  # what will be repeated is dropped
    said = [(x, json.loads(x)) for x in progress.read_text().splitlines(keepends=True) if x.endswith("\n")]
    lines = [x for x, line in said if line["type"] != "failed" and line.get("step", 0) < first]
    temporary = folder / "progress.tmp"
    temporary.write_text("".join(lines))
    os.replace(temporary, progress)
say(type="message", level="info", message=f"training from step {first}")
for line in script.get("say", []):
    with open(progress, "ab", buffering=0) as f:
        f.write((line + "\n").encode())
for step in range(first, script["steps"] + 1):
    time.sleep(script["seconds"])
    if stop:
        checkpoint(step - 1)
        sys.exit(75)
    while step == script.get("hold_at") and json.loads(name.read_text()).get("hold_at") == step and not stop:
        time.sleep(0.01)
    if step == script.get("hang_at"):
        while not stop:
            time.sleep(0.01)
        checkpoint(step - 1)
        sys.exit(75)
    marker = folder / f"crashed-{step}"
    if step in script.get("crash_at", []) and (script.get("crash_always") or not marker.exists()):
        marker.touch()
        print("something broke", file=sys.stderr)
        os._exit(9)
    if step == script.get("fail_at"):
        say(type="failed", **script["fail"])
        sys.exit(1)
    more = {"full_valid_loss": 1.5, "full_valid_mean_token_accuracy": 0.6} if step == script["steps"] else {}
    say(type="metrics", step=step, total_steps=script["steps"], epoch=step / script["steps"], train_loss=round(2 - step / 10, 4),
        train_mean_token_accuracy=0.5, learning_rate=1e-4, grad_norm=1.0, tokens_per_s=100.0, trained_tokens=step * 10,
        eta_s=int((script["steps"] - step) * script["seconds"]), **more)
    if step % script["checkpoint_every"] == 0:
        checkpoint(step)
result = folder / "result"
result.mkdir(exist_ok=True)
if "whole" in script:
    shutil.copy(script["whole"], result / "model.gguf")
else:
    (result / "adapter_config.json").write_text("{}")
    (result / "adapter_model.safetensors").write_text("")
rows = "".join(f"{s},{2 - s / 10},0.5,,\n" for s in range(1, script["steps"] + 1))
(folder / "results.csv").write_text("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n" + rows)
say(type="done", path="result", step=script["steps"], trained_tokens=script["steps"] * 10, metrics={"train_loss": 1.0})
