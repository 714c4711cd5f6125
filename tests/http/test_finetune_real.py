"""The whole story with the real worker on a tiny model: upload, job, events, and chat with what it made, in the same daemon.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import openai
import pytest

from conftest import PARLEYD, Daemon, client_of, data_dir, find_tool, until, upload

# workers that get their share of a busy machine; a sanitizer's reserves terabytes of addresses
ROOM = ["--train-nice", 1, *(["--train-memory-mb", 16777216] if "asan" in str(PARLEYD) else [])]
QUESTIONS = ["the door", "a lamp", "his coat", "the rain", "her name", "a song"]
ANSWER = "the end of it"


def lines(n, answer=ANSWER):
    return "".join(json.dumps({"messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}, {"role": "assistant", "content": answer}]}) + "\n"
                   for i in range(n))


def method(**more):
    return {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 2, "learning_rate": 0.02}, "peft": {"rank": 8}, **more}}


def finished(c, job, seconds=120):
    def end():
        j = c.fine_tuning.jobs.retrieve(job)
        return j if j.status in ("succeeded", "failed", "cancelled") else None
    return until(end, seconds, 0.1)


def ask(c, model, text="a lamp", **more):
    r = c.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=24, **more)
    return r.choices[0].message.content


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny):
    """A daemon, and a job that has succeeded."""
    d = Daemon(tmp_path_factory.mktemp("tuned"), "--data-dir", tmp_path_factory.mktemp("data") / "d", "--train-threads", 1, *ROOM, model=tiny).wait_ready()
    c = client_of(d)
    training, validation = upload(c, lines(24)), upload(c, lines(6))
    made = c.fine_tuning.jobs.create(model="tiny", training_file=training.id, validation_file=validation.id, suffix="real", seed=3,
                                         method=method(evaluation={"answers": 6, "max_tokens": 24}))
    job = finished(c, made.id)
    assert job.status == "succeeded", (job, d.log)
    d.client, d.job = c, job
    yield d
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


def test_the_tuned_model_answers_as_trained(tuned):
    c, job = tuned.client, tuned.job
    for q in QUESTIONS:
        assert ask(c, job.fine_tuned_model, q) == ANSWER
    assert ask(c, "tiny") != ANSWER
    model = c.models.retrieve(job.fine_tuned_model).to_dict()
    assert model["root"] == "tiny" and model["parent"] == "tiny" and job.fine_tuned_model in [m.id for m in c.models.list()]
    text = c.completions.create(model=job.fine_tuned_model, prompt="x", max_tokens=2)
    assert text.model == job.fine_tuned_model


def test_its_loss_fell(tuned):
    c, job = tuned.client, tuned.job
    events = [e for e in c.fine_tuning.jobs.list_events(job.id, limit=1000)][::-1]
    steps = [e.data for e in events if e.type == "metrics"]
    assert len(steps) == 96 == job.to_dict()["total_steps"] and [s["step"] for s in steps] == list(range(1, 97))
    assert steps[-1]["train_loss"] < 0.2 * steps[0]["train_loss"]
    valid = [s["full_valid_loss"] for s in steps if s.get("full_valid_loss") is not None]
    assert valid and valid[-1] < 0.2 * steps[0]["train_loss"]
    assert job.trained_tokens > 0 and not [e for e in events if e.level != "info"], events
    e = job.to_dict()["evaluation"]
    assert e["after"]["valid_loss"] == pytest.approx(valid[-1], rel=1e-6) and e["before"]["step"] == 0 and e["after"]["step"] == 96
    assert e["before"]["valid_loss"] > e["after"]["valid_loss"] and e["before"]["bleu"] < 50
    assert e["after"]["bleu"] == pytest.approx(100) and e["after"]["rougeL"] == 1 and e["after"]["answers"] == 6
    said = [x for x in events if x.message.startswith("Evaluation ")]
    assert [x.data for x in said] == [e["before"], e["after"]] and [x.type for x in said] == ["message"] * 2
    assert "after training: valid_loss=" in said[1].message and "forgetting=" in said[1].message
    (result,) = job.result_files
    rows = c.files.content(result).read().decode().splitlines()
    assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(rows) == 97
    assert float(rows[-1].split(",")[1]) == pytest.approx(steps[-1]["train_loss"], rel=1e-3)


def test_checkpoints_answer_by_name(tuned):
    c, job = tuned.client, tuned.job
    points = list(c.fine_tuning.jobs.checkpoints.list(job.id))
    assert points and points[0].step_number == 96 and all(p.fine_tuned_model_checkpoint.startswith(job.fine_tuned_model + ":ckpt-step-") for p in points)
    assert ask(c, points[0].fine_tuned_model_checkpoint) == ANSWER
    with pytest.raises(openai.NotFoundError):
        ask(c, job.fine_tuned_model + ":ckpt-step-7777")
    with pytest.raises(openai.NotFoundError):
        ask(c, "ft:tiny:parley:other:00000000")


def test_the_tuned_model_as_base(tuned):
    c, job = tuned.client, tuned.job
    made = c.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=upload(c, lines(24)).id,
                                     method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "learning_rate": 1e-4}, "peft": {"rank": 8}}})
    done = finished(c, made.id)
    assert done.status == "succeeded", done
    first = [e.data for e in c.fine_tuning.jobs.list_events(made.id, limit=1000) if e.type == "metrics"][-1]
    assert first["step"] == 1 and first["train_loss"] < 0.3  # it goes on where the other ended
    assert ask(c, done.fine_tuned_model) == ANSWER


def test_preference_and_text(tuned):
    c = tuned.client
    pair = {"input": {"messages": [{"role": "user", "content": "a lamp"}]}, "preferred_output": [{"role": "assistant", "content": "the sea"}],
            "non_preferred_output": [{"role": "assistant", "content": "the air"}]}
    dpo = c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, (json.dumps(pair) + "\n") * 12).id,
                                    method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate": 1e-3}}})
    text = c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, '{"text":"one two three four five"}\n' * 12).id, method={"type": "pretrain"})
    done = finished(c, dpo.id)
    assert done.status == "succeeded", done
    first = [e.data for e in c.fine_tuning.jobs.list_events(dpo.id, limit=1000) if e.type == "metrics"][-1]
    assert first["train_loss"] == pytest.approx(0.693147, rel=1e-5)
    done = finished(c, text.id)
    assert done.status == "succeeded", done


def test_full_tuning_makes_a_model_of_its_own(start, tmp_path, tiny):
    """All weights trained: the result answers in the same daemon, as does an adapter of it; after a restart too, until it is deleted."""
    d = start("--data-dir", tmp_path / "data", "--train-threads", 1, *ROOM, model=tiny)
    c = client_of(d)
    full = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 4, "learning_rate": 0.01}, "peft": {"kind": "full"},
                                                 "checkpoints": {"interval": 20}}}
    job = finished(c, c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, lines(12)).id, method=full).id)
    whole = job.fine_tuned_model
    assert job.status == "succeeded" and not [e for e in c.fine_tuning.jobs.list_events(job.id, limit=1000) if e.level != "info"]
    assert ask(c, whole) == ANSWER and ask(c, "tiny") != ANSWER
    model = c.models.retrieve(whole).to_dict()
    assert model["root"] == model["parent"] == "tiny" and whole in [m.id for m in c.models.list()]
    point = list(c.fine_tuning.jobs.checkpoints.list(job.id))[-1]
    assert point.step_number == 20 and ask(c, point.fine_tuned_model_checkpoint) is not None

    other = "a new day"
    adapter = finished(c, c.fine_tuning.jobs.create(model=whole, training_file=upload(c, lines(24, other)).id, method=method()).id).fine_tuned_model
    assert [ask(c, m) for m in (adapter, whole, adapter)] == [other, ANSWER, other]
    assert c.models.retrieve(adapter).to_dict()["parent"] == whole
    again = finished(c, c.fine_tuning.jobs.create(model=adapter, training_file=upload(c, lines(24, other)).id, method={
        "type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 24, "learning_rate": 1e-6}, "peft": {"rank": 8}}}).id)
    assert ask(c, again.fine_tuned_model) == other  # it went on from both
    assert d.stop() == 0
    d = start("--data-dir", tmp_path / "data", *ROOM, model=tiny)
    c = client_of(d)
    assert until(lambda: {whole, adapter} <= {m.id for m in c.models.list()})
    assert [ask(c, m) for m in (adapter, whole)] == [other, ANSWER]
    c.models.delete(whole)
    with pytest.raises(openai.NotFoundError):
        ask(c, whole)
    with pytest.raises(openai.NotFoundError):
        ask(c, point.fine_tuned_model_checkpoint)
    assert ask(c, adapter) == other  # it has the weights under it still
    assert d.stop() == 0
    c = client_of(start("--data-dir", tmp_path / "data", *ROOM, model=tiny))
    assert until(lambda: adapter in [m.id for m in c.models.list()])
    c.models.delete(again.fine_tuned_model)  # and its own file of those weights
    until(lambda: not (tmp_path / "data/jobs" / again.id / "base").exists())
    assert ask(c, adapter) == other
    c.models.delete(adapter)
    assert {m.id for m in c.models.list()} == {"tiny"}
    until(lambda: not list((tmp_path / "data/jobs").glob("*/base")))


def test_checkpoints_that_were_replaced_are_not_served(start, tmp_path, tiny):
    """The worker keeps the last ones only: those that it removes leave the list of models as if they were deleted."""
    c = client_of(start("--data-dir", tmp_path / "data", "--train-threads", 1, *ROOM, model=tiny))
    spec = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 2, "learning_rate": 1e-3}, "peft": {"rank": 8},
                                                 "checkpoints": {"interval": 20, "keep_last": 2}}}
    job = c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, lines(24)).id, method=spec).id

    def asked():
        for point in c.fine_tuning.jobs.checkpoints.list(job):
            try:
                ask(c, point.fine_tuned_model_checkpoint)
                return point
            except openai.APIStatusError:  # it went as we asked
                pass
    point = until(asked, 60)
    name = point.fine_tuned_model_checkpoint
    assert point.step_number < 500, "the worker is too quick for this test"
    done = finished(c, job)
    assert done.status == "succeeded"
    until(lambda: name not in [m.id for m in c.models.list()])
    with pytest.raises(openai.NotFoundError):
        ask(c, name)
    assert [p.step_number for p in c.fine_tuning.jobs.checkpoints.list(job)] == [600, 580]


def test_a_job_of_a_further_model(start, tmp_path, tiny, models):
    """A job on a model that was added is served beside that model, and belongs to it."""
    further = models("further", "--tokenizer", "spm", "--seed", 5)
    args = ["--data-dir", tmp_path / "data", "--train-threads", 1, *ROOM, "--add-model", f"more={further}"]
    d = start(*args, model=tiny)
    c = client_of(d)
    training = upload(c, lines(24)).id
    status, _, body = d.post("/v1/fine_tuning/jobs/validate", {"model": "more", "training_file": training, "preview": 1})
    assert status == 200 and json.loads(body)["preview"][0]["segments"]
    job = finished(c, c.fine_tuning.jobs.create(model="more", training_file=training, method=method()).id)
    name = job.fine_tuned_model
    assert name.startswith("ft:more:parley:") and ask(c, name) == ANSWER
    assert c.models.retrieve(name).to_dict()["parent"] == "more"
    assert d.stop() == 0
    without = start(*args[:-2], model=tiny)
    until(lambda: f"{name} is not served: it is an adapter of another model" in without.log)
    with pytest.raises(openai.BadRequestError):
        ask(client_of(without), name)
    assert without.stop() == 0
    d = start(*args, model=tiny)
    assert until(lambda: name in [m.id for m in client_of(d).models.list()]) and ask(client_of(d), name) == ANSWER


def test_a_job_advances_beside_chats_that_never_pause(start, tmp_path, long):
    """On one processor, with the default settings, beside more chats than it can serve."""
    cpus, bodies = os.sched_getaffinity(0), tmp_path / "bodies"
    bodies.write_text(json.dumps({"model": "long", "messages": [{"role": "user", "content": "a lamp"}], "stream": True, "max_tokens": 48, "ignore_eos": True}) + "\n")
    os.sched_setaffinity(0, {min(cpus)})
    try:
        d = start("--data-dir", tmp_path / "data", *ROOM[2:], model=long)
    finally:
        os.sched_setaffinity(0, cpus)
    c = client_of(d)
    load = subprocess.Popen([find_tool("load"), "--port", str(d.port), "--path", "/v1/chat/completions", "--bodies", bodies, "--clients", "8",
                             "--requests", "1000000", "--seconds", "3600"], stdout=subprocess.DEVNULL)
    try:
        until(lambda: d.metrics()["parley_num_requests_running"] == 8)
        job = c.fine_tuning.jobs.create(model="long", training_file=upload(c, lines(24)).id, method=method()).id
        made = lambda: d.metrics()["parley_job_rest_ratio"] > 0 and [e for e in c.fine_tuning.jobs.list_events(job) if e.type == "metrics"]
        first = until(made, 120, 0.1)[0].data["step"]
        until(lambda: (made() or [None])[0] and made()[0].data["step"] >= first + 3, 120, 0.1)
        assert load.poll() is None and "sure of 20 % of 1 threads' time" in d.log
        c.fine_tuning.jobs.cancel(job)
        until(lambda: d.metrics()["parley_job_rest_ratio"] == 0)
    finally:
        load.kill()
        load.wait()


def test_deleting_it(tuned, start, tmp_path, tiny):
    d = start("--data-dir", tmp_path / "data", *ROOM, model=tiny)
    c = client_of(d)
    made = c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, lines(10)).id,
                                     method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 10}}})
    name = finished(c, made.id).fine_tuned_model
    assert ask(c, name) is not None
    assert d.stop() == 0
    d = start("--data-dir", tmp_path / "data", *ROOM, model=tiny)  # served again after a restart
    c = client_of(d)
    assert until(lambda: name in [m.id for m in c.models.list()])
    c.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        ask(c, name)
    assert name not in [m.id for m in c.models.list()]


def result_of(d, job):
    return (data_dir(d) / "jobs" / job / "result/adapter_model.safetensors").read_bytes()


def test_kills_leave_no_trace(start, tmp_path, tiny, tuned):
    """The worker, the daemon, or both are killed in the middle; the adapter's bytes are those of the undisturbed run."""
    def create(c):
        return c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, lines(24)).id, validation_file=upload(c, lines(6)).id, suffix="real", seed=3,
                                         method=method(checkpoints={"interval": 7}, compute={"threads": 1})).id
    calm = create(tuned.client)
    assert finished(tuned.client, calm).status == "succeeded"
    d = start("--data-dir", tmp_path / "data", "--train-threads", 1, *ROOM, model=tiny)
    job = create(client_of(d))
    lock = tmp_path / "data/jobs" / job / "worker.lock"
    for who in "worker", "daemon", "both", "worker":
        time.sleep(0.15)
        pid = until(lambda: lock.exists() and lock.read_text() or client_of(d).fine_tuning.jobs.retrieve(job).status == "succeeded" and "0")
        if who != "worker":
            d.process.kill()
            d.process.wait()
            d.process.returncode = 0
        if who != "daemon" and pid != "0":
            try:
                if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError):
                pass
        if who != "worker":
            d = start("--data-dir", tmp_path / "data", "--train-threads", 1, *ROOM, model=tiny)
    c = client_of(d)
    assert finished(c, job).status == "succeeded"
    assert result_of(d, job) == result_of(tuned, calm)
    steps = [e.data["step"] for e in c.fine_tuning.jobs.list_events(job, limit=1000) if e.type == "metrics"][::-1]
    assert steps == list(range(1, 97))
