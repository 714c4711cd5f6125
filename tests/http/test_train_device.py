"""parley train and parley eval on the CUDA device, run on a CPU (tests/cuda_emu): the CPU's losses, the same bytes each time and after any
end, jobs that change the device on the way, and what is said where there is no GPU or no room on it.
SPDX-License-Identifier: Apache-2.0"""
import json
import os
import shutil
import signal
import subprocess

import pytest

import test_finetune_real as real
from conftest import EMULATED, SLOW, client_of, device_args, until, upload
from test_eval import figures
from test_train import PARLEY, base, lines, make_job, result, run, scores, steps_once, steps_written  # noqa: F401 (base is a fixture)

GPU = device_args("cuda-emulated")
KINDS = {"lora": {}, "full": {"peft": {"kind": "full"}}, "dpo": {}}


def job(folder, base, kind="lora", **more):
    """Nine steps, with a checkpoint after each third."""
    return make_job(folder, base, method="dpo" if kind == "dpo" else "supervised", n=12, epochs=3, more={
        "compute": {"precision": "f32", "micro_batch_size": 2}, "checkpoints": {"interval": 3, "keep_last": 9}, "evaluation": {"forgetting": False},
        **KINDS[kind], **more})


def on_gpu(folder, check=0, env=None):
    done = subprocess.run([PARLEY, "train", "--job", folder, *GPU], capture_output=True, text=True, timeout=120 * SLOW, env={**os.environ, **(env or {})})
    assert done.returncode == check, (done.returncode, done.stderr)
    return done


def agree(a, b):
    """Figures of both jobs' steps."""
    metrics = [lines(x, "metrics") for x in (a, b)]
    assert [x["step"] for x in metrics[0]] == [x["step"] for x in metrics[1]] and metrics[0]
    for x, y in zip(*metrics):
        for key in x.keys() - {"time", "tokens_per_second", "eta_seconds"}:
            if "loss" in key or "norm" in key:
                assert y[key] == pytest.approx(x[key], rel=1e-4, abs=1e-6), (key, x, y)


def back_to(folder, step):
    """The folder as it was when the checkpoint of that step had been written and nothing more."""
    for kept in (folder / "checkpoints").iterdir():
        if int(kept.name.split("-")[1]) > step:
            shutil.rmtree(kept)
    shutil.rmtree(folder / "result")
    (folder / "results.csv").unlink()
    said = (folder / "progress.jsonl").read_text().splitlines(True)
    assert json.loads(said[-1])["type"] == "done"
    (folder / "progress.jsonl").write_text("".join(said[:-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_the_cpu_and_the_same_bytes_twice(tmp_path, base, kind):
    cpu, gpu, again = (job(tmp_path / x, base, kind) for x in ("cpu", "gpu", "again"))
    run(cpu)
    on_gpu(gpu)
    agree(cpu, gpu)
    assert any("runs on cuda:0 (emulated)" in x["message"] for x in lines(gpu, "message"))
    on_gpu(again)
    assert result(again) == result(gpu) and scores(again) == scores(gpu)


def test_killed_it_ends_with_the_same_bytes(tmp_path, base):
    quiet, other = job(tmp_path / "quiet", base), job(tmp_path / "other", base)
    on_gpu(quiet)
    for steps, how in ((1, signal.SIGKILL), (4, signal.SIGTERM), (7, signal.SIGKILL)):
        p = subprocess.Popen([PARLEY, "train", "--job", other, *GPU], stderr=subprocess.DEVNULL)
        until(lambda: steps_written(other) >= steps or p.poll() is not None, 60)
        p.send_signal(how)
        assert p.wait(60) in (0, 75, -9)
    on_gpu(other)
    steps_once(other, 9)
    assert result(other) == result(quiet) and scores(other) == scores(quiet)


def test_a_gpu_that_is_lost(tmp_path, base):
    """The folder says so, and the next run goes on."""
    quiet, other = job(tmp_path / "quiet", base), job(tmp_path / "other", base)
    on_gpu(quiet)
    for waits in (30, 120):  # as the model is loaded; on the way
        done = on_gpu(other, check=1, env={"PARLEY_EMU_FAULT": f"lost:{waits}"})
        assert "illegal memory access" in done.stderr and "device failure" in done.stderr
        assert lines(other)[-1]["code"] == "device_lost"
    assert steps_written(other) > 0
    on_gpu(other)
    assert result(other) == result(quiet)
    back_to(other, 3)
    said = [on_gpu(other, check=1, env={"PARLEY_EMU_FAULT": f"lost:{waits}"}).stderr for waits in range(30, 40)]  # around the checkpoint's loading
    assert any("loading " in x for x in said) and not any("remove it" in x for x in said), said
    on_gpu(other)
    assert result(other) == result(quiet)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_job_that_changes_the_device(tmp_path, base, kind):
    cpu = job(tmp_path / "cpu", base, kind)
    run(cpu)
    moved = shutil.copytree(cpu, tmp_path / "moved")
    back_to(moved, 3)
    on_gpu(moved)
    agree(cpu, moved)
    assert any("checkpoint of step 3" in x["message"] for x in lines(moved, "message"))
    back_to(moved, 6)  # made on the GPU
    run(moved)
    agree(cpu, moved)
    steps_once(moved, 9)


def test_no_gpu(tmp_path, base):
    folder = job(tmp_path / "job", base)
    for args, env in ((GPU, {"PARLEY_EMU_FAULT": "no-driver"}), (["--device", "cuda:7", *GPU[2:]], {}), (["--device", "cuda", "--cuda-library", "/nowhere"], {}),
                      (["--device", "gpu"], {})):
        for command in (["train", "--job", folder], ["train", "--bench", "1x8x1", "--model", base], ["eval", "--model", base]):
            done = subprocess.run([PARLEY, *command, *args], capture_output=True, text=True, timeout=60 * SLOW, env={**os.environ, **env})
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and "device" in done.stderr and done.stdout == "", done
            if args[1].startswith("cuda"):
                assert "--device cpu" in done.stderr or "this machine has 2" in done.stderr
    assert lines(folder, "failed")[-1]["code"] == "device_not_available"
    run(folder)
    assert lines(folder, "done")


def test_a_gpu_without_bf16(tmp_path, base):
    """Whoever wrote bf16 into the job did not know it."""
    folder, plain = job(tmp_path / "job", base, compute={"precision": "bf16", "micro_batch_size": 2}), job(tmp_path / "plain", base)
    on_gpu(folder, env={"PARLEY_EMU_FAULT": "turing"})
    assert [x["message"] for x in lines(folder, "message") if x["level"] == "warn"] == [
        "cuda:0 (emulated) has no bf16 products: they are made in 32 bits"]
    run(plain)
    agree(plain, folder)


def test_auto_takes_the_cpu_without_a_gpu(tmp_path, base):
    folder = job(tmp_path / "job", base)
    done = subprocess.run([PARLEY, "train", "--job", folder, "--device", "auto", *GPU[2:]], capture_output=True, text=True, timeout=60 * SLOW,
                          env={**os.environ, "PARLEY_EMU_FAULT": "no-driver"})
    assert done.returncode == 0 and not any("runs on" in x["message"] for x in lines(folder, "message"))


def test_no_room_to_evaluate(tmp_path, base):
    """What is said names settings that there are."""
    short = {"PARLEY_EMU_MEMORY_MB": "40"}  # cuBLAS takes 32
    folder = job(tmp_path / "job", base, compute={"micro_batch_size": 1}, evaluation={"forgetting": True})
    on_gpu(folder, check=1, env=short)
    assert (lines(folder)[-1]["code"], lines(folder)[-1]["param"]) == ("out_of_memory", "forgetting") and "evaluation.forgetting" in lines(folder)[-1]["message"]
    done = subprocess.run([PARLEY, "eval", "--model", base, "--data", folder / "valid.jsonl", *GPU], capture_output=True, text=True, timeout=60 * SLOW,
                          env={**os.environ, **short})
    assert done.returncode == 1 and "lower max-length" in done.stderr and "batch" not in done.stderr, done


@pytest.mark.parametrize("megabytes, param, remedy", [(8, "device", "train an adapter"), (64, "micro_batch_size", "lower micro_batch_size or max_length, or set recompute")])
def test_no_room_on_the_gpu(tmp_path, megabytes, param, remedy):
    """Said before the first step, with what would help."""
    model = tmp_path / "base.gguf"
    subprocess.run([PARLEY.parent / "make_model", "--out", model, "--embd", "128", "--ff", "512"], check=True)
    folder = job(tmp_path / "job", model, "full", compute={"micro_batch_size": 12}, hyperparameters={"max_length": 256, "batch_size": 12})
    rows = [json.loads(x) for x in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps({**r, "completion": " word" * 200}) + "\n" for r in rows))
    done = on_gpu(folder, check=1, env={"PARLEY_EMU_MEMORY_MB": str(megabytes)})
    last = lines(folder)[-1]
    assert (last["type"], last["code"], last["param"]) == ("failed", "out_of_memory", param) and remedy in last["message"], last
    assert "MB left" in done.stderr and steps_written(folder) == 0


def test_no_room_that_others_have_taken(tmp_path, base):
    """That may pass: another code, and another status."""
    folder = job(tmp_path / "job", base)
    env = {"PARLEY_EMU_MEMORY_MB": "64"}
    for others in "63", "40":
        done = on_gpu(folder, check=2, env={**env, "PARLEY_EMU_OTHERS_MB": f"0:{others}"})
        assert lines(folder)[-1]["code"] == "device_busy" and "left by others" in done.stderr, done
    on_gpu(folder, env=env)
    answers = job(tmp_path / "answers", base, evaluation={"answers": 2, "forgetting": False})
    on_gpu(answers, check=2, env={**env, "PARLEY_EMU_OTHERS_MB": "0:62"})
    assert (lines(answers)[-1]["code"], lines(answers)[-1]["param"]) == ("device_busy", "answers")


def test_no_room_for_the_engine_that_answers(tmp_path, base):
    """Before the job it is said at once; after it, the model is there and the job is done."""
    first = job(tmp_path / "first", base, evaluation={"answers": 2, "forgetting": False})
    on_gpu(first, check=1, env={"PARLEY_EMU_MEMORY_MB": "8"})
    assert lines(first)[-1]["code"] == "out_of_memory" and lines(first)[-1]["param"] == "answers" and "ask for no answers" in lines(first)[-1]["message"]
    long = tmp_path / "long.gguf"
    subprocess.run([PARLEY.parent / "make_model", "--out", long, "--ctx", "8192", "--layers", "4", "--kv-heads", "4"], check=True)
    folder = job(tmp_path / "folder", long, evaluation={"answers": 2, "max_tokens": 4096, "forgetting": False})
    run(folder)
    back_to(folder, 9)
    on_gpu(folder, env={"PARLEY_EMU_MEMORY_MB": "40"})
    assert "could not be evaluated: device cuda has no memory" in lines(folder, "message")[-1]["message"] and lines(folder)[-1]["type"] == "done"


def test_a_model_from_nothing_that_no_gpu_holds(tmp_path):
    """Refused by what the GPU has, not by what the host has, and before its file is made."""
    def from_nothing(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"and the dogs saw {i} houses by the old garden"}) + "\n" for i in range(12)))
        (folder / "job.json").write_text(json.dumps({
            "id": "ftjob-1", "name": "ft:scratch", "base": None, "training_file": str(folder / "train.jsonl"), "seed": 1, "created_at": 1, "spec": {
                "type": "pretrain", "pretrain": {"shape": {"layers": 2, "width": 64, "heads": 2, "context": 64, "vocab_size": 260},
                                                 "hyperparameters": {"n_epochs": 1, "batch_size": 12}}}}))
        return folder
    folder = from_nothing("job")
    on_gpu(folder, check=1, env={"PARLEY_EMU_MEMORY_MB": "2"})
    last = lines(folder)[-1]
    assert "shape" in last["param"] and "lower layers, width, ff or vocab_size" in last["message"] and not (folder / "base.gguf").exists(), last
    on_gpu(from_nothing("fits"))


def test_evaluation(tmp_path, base):
    """Loss, and answers by the engine on the same device."""
    folder = job(tmp_path / "job", base)
    args = "--model", base, "--data", folder / "valid.jsonl", "--precision", "f32", "--answers", 2, "--max-tokens", 4
    cpu, gpu = figures(*args), figures(*args, *GPU)
    for key in ("loss", "perplexity", "general_loss"):
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-5)
    assert gpu["answers"] == 2 and gpu["mean_token_accuracy"] == cpu["mean_token_accuracy"]


def test_bench(base):
    done = subprocess.run([PARLEY, "train", "--bench", "2x8x1", "--model", base, *GPU], capture_output=True, text=True, timeout=60 * SLOW)
    assert done.returncode == 0 and json.loads(done.stdout)["tok_s"] > 0, done


def test_jobs_of_a_daemon(start, tmp_path, tiny):
    """train-device is the worker's; the daemon itself serves from the CPU here."""
    d = start("--device", "cpu", "--train-device", "cuda:1", "--cuda-library", EMULATED, "--data-dir", tmp_path / "data", *real.ROOM[:2], model=tiny)
    c = client_of(d)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 2, "learning_rate": 0.02}, "peft": {"rank": 8},
                                                   "evaluation": {"forgetting": False}}}
    job = real.finished(c, c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, real.lines(24)).id, method=method).id, 300)
    said = [e.message for e in c.fine_tuning.jobs.list_events(job.id, limit=1000)]
    assert job.status == "succeeded" and "The job runs on cuda:1 (emulated)" in said, (job, said)
    assert real.ask(c, job.fine_tuned_model) == real.ANSWER
    assert d.stop() == 0
    d = start("--device", "cpu", "--train-device", "cuda", "--cuda-library", "/nowhere", "--train-device-wait", 0, "--data-dir", tmp_path / "data",
              *real.ROOM[:2], model=tiny)
    c = client_of(d)
    job = real.finished(c, c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, real.lines(24)).id, method=method).id)
    assert job.status == "failed" and job.error.code == "device_not_available" and "cannot be loaded" in job.error.message, job


def test_a_job_whose_gpu_comes_and_goes(start, tmp_path, tiny):
    """No GPU, a full one, one that is lost on the way: the bytes are those of a quiet run."""
    says = tmp_path / "fault"

    def fault(text):
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", says)

    worker = tmp_path / "worker"  # which gets nothing of the daemon's environment that is called PARLEY_…
    worker.write_text(f'#!/bin/sh\nPARLEY_EMU_FAULT=@{says} PARLEY_EMU_MEMORY_MB=64 exec {PARLEY.resolve()} "$@"\n')
    worker.chmod(0o755)
    d = start("--device", "cpu", "--train-device", "cuda", "--cuda-library", EMULATED, "--train-worker", worker, "--data-dir", tmp_path / "data",
              "--train-threads", 1, *real.ROOM[:2], model=tiny)
    c = client_of(d)
    jobs = c.fine_tuning.jobs
    file = upload(c, real.lines(24)).id
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 2}, "checkpoints": {"interval": 5, "keep_last": 2},
                                                   "evaluation": {"forgetting": False}}}

    def waits(job, code):
        until(lambda: (jobs.retrieve(job).to_dict()["waiting"] or {}).get("code") == code, 60)

    fault("no-driver")
    job = jobs.create(model="tiny", training_file=file, method=method, seed=5).id
    waits(job, "device_not_available")
    fault("others:0:63")
    waits(job, "device_busy")
    fault("lost:200")
    waits(job, "device_lost")
    says.unlink()
    assert d.metrics()["parley_job_restarts_total"] >= 1
    done = real.finished(c, job, 300)
    assert done.status == "succeeded" and done.to_dict()["waiting"] is None, done
    said = [e for e in jobs.list_events(job, limit=1000)][::-1]
    assert [e.data["step"] for e in said if e.type == "metrics"] == list(range(1, 49))
    assert sum(e.message == "Fine-tuning job started" for e in said) == 1
    quiet = real.finished(c, jobs.create(model="tiny", training_file=file, method=method, seed=5).id, 300)
    assert real.result_of(d, job) == real.result_of(d, quiet.id)
