"""parley train: job folders run by hand. Kills, pauses, damage, files, and what the losses must be.
SPDX-License-Identifier: Apache-2.0"""
import json
import math
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import time

import pytest

from conftest import SLOW, until

PARLEY = pathlib.Path(os.environ.get("PARLEYD", "build/release/parleyd")).resolve().parent / "parley"
TOOLS = pathlib.Path(os.environ.get("PARLEY_TOOLS", "build/release")).resolve()
WORDS = "the cat sat on a mat and saw some dog in an old house by big blue sea".split()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    subprocess.run([TOOLS / "make_model", "--out", path], check=True)
    return path


def words(rng, least=2, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def make_job(folder, base, method="supervised", epochs=3, n=40, more=None):
    rng = random.Random(5)
    folder.mkdir(parents=True)
    chosen = lambda text: [{"role": "assistant", "content": text}]
    for name, count in (("train", n), ("valid", 10)):
        with open(folder / f"{name}.jsonl", "w") as f:
            for _ in range(count):
                if method == "dpo":
                    line = {"input": {"messages": [{"role": "user", "content": words(rng)}]}, "preferred_output": chosen("the " + words(rng)),
                            "non_preferred_output": chosen("sea " + words(rng))}
                else:
                    line = {"prompt": words(rng), "completion": words(rng)}
                f.write(json.dumps(line) + "\n")
    body = {"hyperparameters": {"n_epochs": epochs, "batch_size": 4, "learning_rate": 0.003}, "checkpoints": {"interval": 5},
            "peft": {"kind": "lora", "rank": 4, "dropout": 0.1}}
    for key, value in (more or {}).items():
        body.setdefault(key, {}).update(value) if isinstance(value, dict) else body.update({key: value})
    if body["peft"]["kind"] == "full":
        body["peft"] = {"kind": "full"}
    (folder / "job.json").write_text(json.dumps({
        "id": "ftjob-1", "name": "ft:x", "base": str(base), "base_adapter": None, "training_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "valid.jsonl"), "seed": 3, "created_at": 1700000000, "spec": {"type": method, method: body}}))
    return folder


def run(folder, check=0):
    done = subprocess.run([PARLEY, "train", "--job", folder], capture_output=True, text=True, timeout=120 * SLOW)
    assert done.returncode == check, (done.returncode, done.stderr)
    return done


def lines(folder, kind=None):
    every = [json.loads(x) for x in (folder / "progress.jsonl").read_text().splitlines()]
    return [x for x in every if kind in (None, x["type"])]


def result(folder):
    """Every byte that a finished job must have in common with another run of it."""
    files = {p.name: p.read_bytes() for p in sorted((folder / "result").iterdir())}
    files["results.csv"] = (folder / "results.csv").read_bytes()
    last = sorted((folder / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))[-1]
    files["state.bin"] = (last / "state.bin").read_bytes()
    return files


def steps_written(folder):
    path = folder / "progress.jsonl"
    return path.read_bytes().count(b'{"type":"metrics"') if path.exists() else 0


def steps_once(folder, total):
    assert [x["step"] for x in lines(folder, "metrics")] == list(range(1, total + 1))


def scores(folder):
    return [{k: v for k, v in x.items() if k != "time"} for x in lines(folder, "evaluation")]


@pytest.mark.parametrize("more", [{"evaluation": {"answers": 3, "max_tokens": 8}}, {"peft": {"kind": "full"}, "hyperparameters": {"n_epochs": 16}}],
                         ids=["lora", "full"])
def test_kills_at_random_moments_change_nothing(tmp_path, base, more):
    quiet = make_job(tmp_path / "quiet", base, epochs=50, more=more)
    run(quiet)
    total = lines(quiet, "metrics")[-1]["total_steps"]
    other = make_job(tmp_path / "other", base, epochs=50, more=more)
    for name in ("train", "valid"):  # the paths are not part of the job's identity
        assert (quiet / f"{name}.jsonl").read_bytes() == (other / f"{name}.jsonl").read_bytes()
    rng, kills = random.Random(11), 0
    for _ in range(20):  # by turns some steps further on, and at some moment of the start
        goal = steps_written(other) + rng.randint(1, total // 16) if kills % 2 == 0 else 0
        child = subprocess.Popen([PARLEY, "train", "--job", other], stderr=subprocess.DEVNULL)
        until(lambda: child.poll() is not None or steps_written(other) >= goal, 60, 0.002)
        time.sleep(rng.uniform(0, 0.02 if goal else 0.05))
        if child.poll() is not None:
            break
        child.kill()
        child.wait()
        kills += 1
    assert kills >= 3
    run(other)
    assert result(other) == result(quiet)
    steps_once(other, total)
    assert len(lines(other, "done")) == 1
    assert scores(other) == scores(quiet) and [x["step"] for x in scores(quiet)] == [0, total]
    assert [x["step"] for x in lines(other, "checkpoint")] == [x["step"] for x in lines(quiet, "checkpoint")]


def test_sigterm_pauses_and_the_next_run_goes_on(tmp_path, base):
    quiet = make_job(tmp_path / "quiet", base, epochs=40)
    run(quiet)
    other = make_job(tmp_path / "other", base, epochs=40)
    child = subprocess.Popen([PARLEY, "train", "--job", other], stderr=subprocess.DEVNULL)
    until((other / "checkpoints").exists, 20, 0.005)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30 * SLOW) == 75
    assert lines(other)[-1]["message"].startswith("Paused after step")
    run(other)
    assert result(other) == result(quiet)


def test_a_finished_job_stays_finished(tmp_path, base):
    folder = make_job(tmp_path / "job", base)
    run(folder)
    before = (folder / "progress.jsonl").read_bytes()
    run(folder)
    assert (folder / "progress.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path, base):
    quiet = make_job(tmp_path / "quiet", base)
    run(quiet)
    other = make_job(tmp_path / "other", base)
    run(other)
    done = (other / "progress.jsonl").read_text().splitlines(keepends=True)
    (other / "progress.jsonl").write_text("".join(done[:-1]))  # as if it had been killed before the last line
    shutil.rmtree(other / "result")
    state = other / "checkpoints" / "step-30" / "state.bin"
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(damaged)
    run(other)
    assert any("damaged" in x["message"] for x in lines(other, "message"))
    assert result(other) == result(quiet)
    steps_once(other, 30)


def test_a_checkpoint_of_another_job_is_refused(tmp_path, base):
    folder = make_job(tmp_path / "job", base)
    run(folder)
    (folder / "progress.jsonl").unlink()
    job = json.loads((folder / "job.json").read_text())
    job["seed"] = 4
    (folder / "job.json").write_text(json.dumps(job))
    assert "not a checkpoint of this job" in run(folder, 1).stderr
    assert lines(folder, "failed")[-1]["code"] == "invalid_job"


def test_two_workers_at_once_are_refused(tmp_path, base):
    folder = make_job(tmp_path / "job", base, epochs=50)
    first = subprocess.Popen([PARLEY, "train", "--job", folder], stderr=subprocess.DEVNULL)
    until((folder / "checkpoints").exists, 20, 0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        assert first.poll() is None and "another worker" in run(folder, 1).stderr
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60 * SLOW) == 0


def test_dpo_begins_at_ln_2_and_learns(tmp_path, base):
    folder = make_job(tmp_path / "job", base, "dpo", epochs=6, more={"hyperparameters": {"beta": 0.1}, "peft": {"dropout": 0}})
    run(folder)
    m = lines(folder, "metrics")
    assert abs(m[0]["train_loss"] - math.log(2)) < 1e-6
    assert m[0]["reward_margin"] == 0
    assert m[-1]["train_loss"] < 0.6 and m[-1]["reward_accuracy"] > 0.8


def test_full_tuning_gives_a_model_that_runs(tmp_path, base):
    folder = make_job(tmp_path / "job", base, epochs=6, more={"peft": {"kind": "full"}})
    run(folder)
    m = lines(folder, "metrics")
    assert m[-1]["train_loss"] < m[0]["train_loss"] - 1
    out = subprocess.run([PARLEY, "bench", "--model", folder / "result" / "model.gguf", "--prompt", "8", "--batch", "1", "--gen", "2", "--repeat", "1"],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("more", [{"compute": {"micro_batch_size": 1}}, {"compute": {"recompute": True}}, {"packing": {"mode": "none"}}],
                         ids=["micro-batches", "recompute", "no packing"])
def test_how_it_is_computed_hardly_changes_the_losses(tmp_path, base, more):
    losses = []
    for name, how in (("plain", {}), ("other", more)):
        how = {**how, "peft": {"dropout": 0}, "compute": {"precision": "f32", **how.get("compute", {})}}
        folder = make_job(tmp_path / name, base, more=how)
        run(folder)
        losses.append([x["train_loss"] for x in lines(folder, "metrics")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_early_stopping_serves_the_best(tmp_path, base):
    folder = make_job(tmp_path / "job", base, epochs=50, n=10, more={
        "early_stopping": {"patience": 3}, "hyperparameters": {"learning_rate": 0.05, "eval_interval": 1}, "final": "best"})
    run(folder)
    m = lines(folder, "metrics")
    assert len(m) < m[0]["total_steps"]
    best = min(m, key=lambda x: x["valid_loss"])
    done = lines(folder, "done")[0]
    assert done["step"] == best["step"]
    kept = folder / "checkpoints" / f"step-{best['step']}" / "adapter_model.safetensors"
    assert kept.read_bytes() == (folder / "result" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method, more", [("supervised", {}), ("supervised", {"peft": {"kind": "full"}}), ("dpo", {}), ("pretrain", None)],
                         ids=["lora", "full", "dpo", "pretrain"])
def test_the_model_is_measured_before_and_after(tmp_path, base, method, more):
    answers = {} if more is None else {"evaluation": {"answers": 4, "max_tokens": 6, "words": "char"}}
    folder = make_job(tmp_path / "job", base, method, epochs=6, more={"peft": {"dropout": 0}, **answers, **(more or {})})
    if more is None:
        for name in ("train", "valid"):
            rows = (folder / f"{name}.jsonl").read_text().splitlines()
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": json.loads(r)["prompt"]}) + "\n" for r in rows))
    run(folder)
    before, after = scores(folder)
    total = lines(folder, "metrics")[-1]
    assert before["step"] == 0 and after["step"] == total["step"] and "forgetting" not in before
    assert after["forgetting"] == pytest.approx(after["general_loss"] - before["general_loss"], abs=1e-6)
    assert after["valid_loss"] < before["valid_loss"] and after["valid_loss"] == total["full_valid_loss"]
    if method == "dpo":
        assert before["valid_loss"] == pytest.approx(math.log(2), abs=1e-6) and "perplexity" not in before
    else:
        assert after["perplexity"] == pytest.approx(math.exp(after["valid_loss"]), rel=1e-6) == total["full_valid_perplexity"]
    figures = {"bleu_char", "rouge1_char", "rouge2_char", "rougeL_char", "answers"}
    assert figures & after.keys() == figures & before.keys() == (set() if more is None else figures)
    if more is not None and method != "dpo":  # the tiny model has no words in common with anybody before
        assert after["rouge1_char"] > before["rouge1_char"]
    strip = lambda x: {k: v for k, v in x.items() if k != "type"}
    assert lines(folder, "done")[0]["evaluation"] == {"before": strip(before), "after": strip(after)}
    tags = events_of(folder)
    assert set(tags["evaluation/general_loss"]) == {0, total["step"]} and set(tags["evaluation/forgetting"]) == {total["step"]}
    by_hand = json.loads(subprocess.run([PARLEY, "eval", "--model", base, "--json"], capture_output=True, check=True).stdout)
    assert by_hand["general_loss"] == pytest.approx(before["general_loss"], rel=1e-5)


def test_no_figure_that_is_not_wanted(tmp_path, base):
    folder = make_job(tmp_path / "job", base, more={"evaluation": {"forgetting": False}})
    run(folder)
    assert all("general_loss" not in x and "forgetting" not in x and "valid_loss" in x for x in scores(folder))


def test_a_general_text_of_the_operator(tmp_path, base):
    folder = make_job(tmp_path / "job", base)
    (tmp_path / "general.txt").write_text("the dog saw the sea. " * 100)
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**job, "general_text": str(tmp_path / "general.txt")}))
    run(folder)
    by_hand = subprocess.run([PARLEY, "eval", "--model", base, "--general", tmp_path / "general.txt", "--json"], capture_output=True, check=True).stdout
    assert scores(folder)[0]["general_loss"] == pytest.approx(json.loads(by_hand)["general_loss"], rel=1e-5)


def test_a_pause_while_it_answers(tmp_path, base):
    folder = make_job(tmp_path / "job", base, more={"evaluation": {"answers": 1000, "max_tokens": 4000}})
    line = (folder / "valid.jsonl").read_text().splitlines()[0]
    (folder / "valid.jsonl").write_text((line + "\n") * 1000)
    child = subprocess.Popen([PARLEY, "train", "--job", folder], stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(10 * SLOW) == 75
    assert not (folder / "progress.jsonl").exists() or not lines(folder, "failed")


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def fields(data):
    """Number and value of each field of a protocol-buffer message."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        n = {1: 8, 5: 4}.get(kind) or varint()
        yield tag >> 3, data[at:at + n]
        at += n


def events_of(folder):
    """Tag -> step -> value."""
    data = next((folder / "tensorboard").iterdir()).read_bytes()
    at, found = 0, {}
    while at < len(data):
        n, head = struct.unpack_from("<QI", data, at)
        assert masked(data[at:at + 8]) == head
        event = data[at + 12:at + 12 + n]
        assert struct.unpack_from("<I", data, at + 12 + n)[0] == masked(event)
        at += 16 + n
        f = dict(fields(event))
        if 5 not in f:
            assert f[3] == b"brain.Event:2"
            continue
        for _, value in fields(f[5]):
            v = dict(fields(value))
            found.setdefault(v[1].decode(), {})[f[2]] = struct.unpack("<f", v[2])[0]
    return found


def test_event_files_can_be_read(tmp_path, base):
    assert crc32c(b"123456789") == 0xe3069283
    folder = make_job(tmp_path / "job", base)
    run(folder)
    assert events_of(folder)["train/loss"] == {x["step"]: pytest.approx(x["train_loss"], rel=1e-6) for x in lines(folder, "metrics")}


def test_results_csv(tmp_path, base):
    folder = make_job(tmp_path / "job", base)
    run(folder)
    rows = (folder / "results.csv").read_text().splitlines()
    assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(rows) == 31 and rows[1].endswith(",,") and rows[1].startswith("1,")
    assert rows[30].count(",") == 4 and not rows[30].endswith(",")


@pytest.mark.parametrize("edit, code, says", [
    (lambda j: j.update(base="/nowhere.gguf"), None, "nowhere.gguf"),
    (lambda j: j.update(base_id="0" * 64), None, "is not the model that this job was made for"),
    (lambda j: j.update(training_file="/nowhere.jsonl"), "invalid_training_file", "nowhere.jsonl"),
    # weights are multiplied by 1 - 10 × 1 at each step
    (lambda j: j["spec"]["supervised"].update(optimizer={"weight_decay": 1}, schedule={"kind": "constant", "warmup_steps": 0}, hyperparameters={
        "n_epochs": 50, "batch_size": 4, "learning_rate": 10}), "not_finite", "lower the learning rate"),
    (lambda j: j.update(general_text="/nowhere.txt"), None, "nowhere.txt"),
    (lambda j: j["spec"]["supervised"].update(evaluation={"answers": 1001}), None, "evaluation.answers"),
    (lambda j: j["spec"]["supervised"]["hyperparameters"].update(batch_size=0), None, "batch_size"),
])
def test_what_is_wrong_is_said(tmp_path, base, edit, code, says):
    folder = make_job(tmp_path / "job", base, epochs=50, more={"peft": {"kind": "full"}})
    job = json.loads((folder / "job.json").read_text())
    edit(job)
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run([PARLEY, "train", "--job", folder], capture_output=True, text=True, timeout=120 * SLOW)
    assert done.returncode == 1 and says in done.stderr
    if code is not None:
        assert lines(folder, "failed")[-1]["code"] == code
