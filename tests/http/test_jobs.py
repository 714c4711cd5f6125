"""The fine-tuning API with the unmodified OpenAI client and a worker that follows a script (tests/tools/fake_worker.py): states, events,
paging, and what survives which kill. What is refused: test_jobs_refused.py.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import time
from pathlib import Path

import openai
import pytest

from conftest import CHAT, GOOD, SLOW, WORKER, Daemon, client_of, make_model, upload
from conftest import until as soon

PATIENCE = 60  # seconds; workers stand back behind whatever else keeps the machine busy
LIVE = ("validating_files", "queued", "running")


def until(what, seconds=PATIENCE, step=0.02):
    return soon(what, seconds, step)


class Place:
    """A data directory and the daemons that use it one after another."""

    def __init__(self, start, directory, model):
        self.start, self.data, self.model = start, Path(directory) / "data", model
        self.data.mkdir(parents=True, exist_ok=True)
        self.daemon = None

    def run(self, *args):
        self.daemon = self.start("--data-dir", self.data, "--train-worker", WORKER, "--train-nice", 1, *args, model=self.model)
        self.client = client_of(self.daemon)
        return self.client

    def script(self, **what):
        temporary = self.data / "script.tmp"
        temporary.write_text(json.dumps(what))
        os.replace(temporary, self.data / "script")

    def kill(self):
        self.daemon.process.kill()
        self.daemon.process.wait()
        self.daemon.process.returncode = 0  # on purpose

    def seen(self, job):
        return json.loads(until(lambda: (self.data / "jobs" / job / "seen.json").exists() and (self.data / "jobs" / job / "seen.json").read_text()))

    def job(self, text=GOOD, **more):
        f = upload(self.client, text)
        return self.client.fine_tuning.jobs.create(model=self.daemon.model_id, training_file=f.id, **more)

    def wait(self, job, *states, seconds=PATIENCE):
        def there():
            now = self.client.fine_tuning.jobs.retrieve(job)
            assert now.status in (*states, *LIVE), (now.status, now.error)
            return now if now.status in states else None
        return until(there, seconds, 0.05)

    def events(self, job):
        return list(self.client.fine_tuning.jobs.list_events(job, limit=100))[::-1]


@pytest.fixture
def place(start, tmp_path, tiny):
    p = Place(start, tmp_path, tiny)
    Daemon.model_id = "tiny"
    yield p
    for folder in (p.data / "jobs").glob("*/worker.lock"):  # a test that failed may leave one
        assert os.system(f"flock -w {5 * SLOW} {folder} true") == 0, f"a worker is left in {folder}"


def alive(pid):
    """Neither gone nor a zombie, which it stays where nobody collects orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def messages(events):
    return [e.message for e in events if e.type == "message"]


def test_the_whole_story(place):
    c = place.run()
    place.script(steps=6, seconds=0.02, checkpoint_every=2)
    training, validation = upload(c), upload(c, CHAT + "\n")
    made = c.fine_tuning.jobs.create(model="tiny", training_file=training.id, validation_file=validation.id, suffix="shop.v1", seed=7, metadata={"team": "a"},
                                     method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
                                     integrations=[{"type": "tensorboard"}])
    assert re.fullmatch(r"ftjob-[0-9a-f]{24}", made.id) and made.object == "fine_tuning.job" and made.status == "validating_files"
    assert made.model == "tiny" and made.seed == 7 and made.fine_tuned_model is None and made.finished_at is None and made.error is None
    assert made.training_file == training.id and made.validation_file == validation.id and made.result_files == [] and made.trained_tokens is None
    assert made.hyperparameters.n_epochs == 2 and made.hyperparameters.batch_size == "auto" and made.metadata == {"team": "a"}
    assert made.method.type == "supervised" and made.method.supervised.hyperparameters.n_epochs == 2 and made.organization_id == "parley"
    job = place.wait(made.id, "succeeded")
    assert job.fine_tuned_model == f"ft:tiny:parley:shop.v1:{made.id[6:14]}" and job.finished_at >= job.created_at and job.trained_tokens == 60
    assert job.hyperparameters.batch_size == 1 and job.hyperparameters.learning_rate_multiplier == 1 and "auto" not in json.dumps(job.method.to_dict())
    assert job.estimated_finish is None and job.to_dict()["total_steps"] == 6
    events = place.events(made.id)
    assert all(e.object == "fine_tuning.job.event" and e.id.startswith("ftevent-") and e.level in ("info", "warn", "error") for e in events)
    told = messages(events)
    for expected in (f"Created fine-tuning job: {made.id}", f"Validating training file: {training.id}", "Files validated, moving job to queued state",
                     "Fine-tuning job started", "training from step 1", "Checkpoint created at step 2", f"New fine-tuned model created: {job.fine_tuned_model}",
                     "The job has successfully completed"):
        assert told.count(expected) == 1, told
    steps = [e for e in events if e.type == "metrics"]
    assert [e.data["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].message == "Step 1/6: training loss=1.9" and steps[0].data["train_loss"] == 1.9 and steps[0].data["train_mean_token_accuracy"] == 0.5
    assert steps[5].message == "Step 6/6: training loss=1.4, full validation loss=1.5" and steps[5].data["full_valid_loss"] == 1.5
    points = list(c.fine_tuning.jobs.checkpoints.list(made.id))
    assert [p.step_number for p in points] == [6, 4, 2] and points[0].object == "fine_tuning.job.checkpoint" and points[0].id.startswith("ftckpt_")
    assert points[1].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4" and points[1].fine_tuning_job_id == made.id
    assert points[1].metrics.train_loss == 1.6 and points[1].metrics.step == 4
    (result,) = job.result_files
    csv = c.files.content(result).read().decode().splitlines()
    assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(csv) == 7
    assert c.files.retrieve(result).purpose == "fine-tune-results" and c.files.retrieve(result).filename == "step_metrics.csv"
    told = place.seen(made.id)
    assert told["nice"] == 1 and told["argv"][1:] == ["train", "--job", str(place.data / "jobs" / made.id)]
    assert told["job"]["name"] == job.fine_tuned_model and told["job"]["seed"] == 7 and "auto" not in json.dumps(told["job"]["spec"])
    assert told["training"] == GOOD and told["job"]["base"].endswith("tiny.gguf") and told["job"]["base_adapter"] is None


def test_paging_and_filter(place):
    c = place.run("--train-jobs", 0)
    f = upload(c)
    made = [c.fine_tuning.jobs.create(model="tiny", training_file=f.id, **({"metadata": {"n": str(i % 2), "x": "y"}} if i < 4 else {})).id for i in range(5)][::-1]
    assert [j.id for j in c.fine_tuning.jobs.list()] == made
    page = c.fine_tuning.jobs.list(limit=2)
    assert [j.id for j in page.data] == made[:2] and page.has_more
    assert [j.id for j in c.fine_tuning.jobs.list(limit=2)] == made
    assert [j.id for j in c.fine_tuning.jobs.list(after=made[3]).data] == made[4:]
    assert [j.id for j in c.fine_tuning.jobs.list(metadata={"n": "1"}).data] == [made[1], made[3]]
    assert [j.id for j in c.fine_tuning.jobs.list(metadata={"n": "1", "x": "z"}).data] == []
    assert json.loads(place.daemon.get("/v1/fine_tuning/jobs?metadata=null")[2])["data"][0]["id"] == made[0]
    assert len(json.loads(place.daemon.get("/v1/fine_tuning/jobs?metadata=null")[2])["data"]) == 1
    until(lambda: len(place.events(made[0])) == 3)
    first = c.fine_tuning.jobs.list_events(made[0], limit=1)
    assert first.data[0].message == "Files validated, moving job to queued state" and first.has_more and first.data[0].data["examples"] == 12
    raw = json.loads(place.daemon.get(f"/v1/fine_tuning/jobs/{made[0]}/events")[2])
    assert set(raw) == {"object", "data", "has_more"}
    raw = json.loads(place.daemon.get(f"/v1/fine_tuning/jobs/{made[0]}/checkpoints")[2])
    assert raw == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    until(lambda: place.daemon.metrics()['parley_jobs{status="queued"}'] == 5)
    m = place.daemon.metrics()
    assert m['parley_jobs{status="running"}'] == 0 and m["parley_files"] == 1 and m["parley_files_bytes"] == len(GOOD)


def test_one_after_another(place):
    place.run()
    place.script(steps=4, seconds=0.02, checkpoint_every=2)
    ids = [place.job().id for _ in range(3)]
    done = [place.wait(i, "succeeded") for i in ids]
    begun = [next(e.created_at for e in place.events(i) if e.message == "Fine-tuning job started") for i in ids]
    assert begun == sorted(begun) and [d.status for d in done] == ["succeeded"] * 3


def test_pause_resume_cancel(place):
    c = place.run()
    place.script(steps=6, seconds=0.02, checkpoint_every=2, hang_at=4)
    job = place.job()
    until(lambda: any(e.type == "metrics" and e.data["step"] == 3 for e in place.events(job.id)))
    assert c.fine_tuning.jobs.retrieve(job.id).status == "running"
    pid = place.seen(job.id)["pid"]
    assert c.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: not alive(pid))
    time.sleep(0.5)
    assert c.fine_tuning.jobs.retrieve(job.id).status == "paused"
    place.script(steps=6, seconds=0.02, checkpoint_every=2)
    assert c.fine_tuning.jobs.resume(job.id).status == "queued"
    done = place.wait(job.id, "succeeded")
    assert [e.data["step"] for e in place.events(job.id) if e.type == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert messages(place.events(job.id)).count("training from step 4") == 1 and done.trained_tokens == 60
    place.script(steps=6, seconds=0.02, checkpoint_every=2, hang_at=4, ignore_term=True)
    other = place.job()
    until(lambda: any(e.type == "metrics" and e.data["step"] == 3 for e in place.events(other.id)))
    pid = place.seen(other.id)["pid"]
    cancelled = c.fine_tuning.jobs.cancel(other.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    until(lambda: not alive(pid))
    assert any(e.level == "warn" and e.message == "Fine tuning process stopping due to job cancellation" for e in place.events(other.id))
    for call, state in (c.fine_tuning.jobs.cancel, job.id), (c.fine_tuning.jobs.pause, job.id), (c.fine_tuning.jobs.resume, other.id):
        with pytest.raises(openai.BadRequestError) as e:
            call(state)
        assert e.value.body["code"] == "invalid_job_state"


def test_paused_as_it_ends(place):
    """The pause was promised and stands; the worker that is done by then says so once only."""
    c = place.run()
    place.script(steps=3, seconds=0.3, ignore_term=True)
    job = place.job()
    until(lambda: any(e.type == "metrics" for e in place.events(job.id)))
    assert c.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: (place.data / "jobs" / job.id / "results.csv").exists())
    until(lambda: "worker gone, paused" in place.daemon.log)
    assert c.fine_tuning.jobs.retrieve(job.id).status == "paused"
    place.script(exit=0)
    assert c.fine_tuning.jobs.resume(job.id).status == "queued"
    assert len(place.wait(job.id, "succeeded").result_files) == 1


def test_a_check_that_nobody_makes(place):
    """As when the queue of checks was full: the supervisor finds the job."""
    place.run("--train-jobs", 0)
    job = place.job().id
    place.wait(job, "queued")
    with contextlib.closing(sqlite3.connect(place.data / "parley.db", timeout=10)) as db, db:
        db.execute("UPDATE jobs SET status='validating_files', validated=0 WHERE id=?", [job])
    place.wait(job, "queued")


def test_states_before_it_runs(place):
    c = place.run("--train-jobs", 0)
    a, b = place.job().id, place.job().id
    for i in a, b:
        place.wait(i, "queued")
    assert c.fine_tuning.jobs.pause(a).status == "paused" and c.fine_tuning.jobs.resume(a).status == "queued"
    assert c.fine_tuning.jobs.pause(a).status == "paused" and c.fine_tuning.jobs.cancel(a).status == "cancelled"
    assert c.fine_tuning.jobs.cancel(b).status == "cancelled"


@pytest.mark.parametrize("param", [None, ""])
def test_a_failure_in_the_worker(place, param):
    place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2, fail_at=3, fail={"code": "disk_full", "param": param, "message": "the checkpoint of step 2 cannot be written: no space"})
    job = place.wait(place.job().id, "failed")
    assert job.error.code == "disk_full" and job.error.param is None and "no space" in job.error.message and job.fine_tuned_model is None
    assert place.events(job.id)[-1].level == "error" and "no space" in place.events(job.id)[-1].message
    assert place.client.models.list().data


def test_a_crash_goes_on_from_the_checkpoint(place):
    place.run()
    place.script(steps=6, seconds=0, checkpoint_every=2, crash_at=[2, 4, 6])
    job = place.wait(place.job().id, "succeeded")
    events = place.events(job.id)
    assert [e.data["step"] for e in events if e.type == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert sum("exited with status 9; its last words: something broke" in e.message and e.level == "warn" for e in events) == 3
    assert [p.step_number for p in place.client.fine_tuning.jobs.checkpoints.list(job.id)] == [6, 4, 2]
    assert place.daemon.metrics()["parley_job_restarts_total"] == 3


def test_a_worker_that_always_crashes(place):
    place.run()
    place.script(steps=6, seconds=0, checkpoint_every=2, crash_at=[3], crash_always=True)
    job = place.wait(place.job().id, "failed")
    assert job.error.code == "worker_crashed" and "5 times without progress" in job.error.message


@pytest.mark.parametrize("status", [1, 127])
def test_a_worker_that_says_nothing(place, status):
    place.run()
    place.script(exit=status)
    job = place.job()
    until(lambda: place.client.fine_tuning.jobs.retrieve(job.id).to_dict()["waiting"])
    began = time.monotonic()
    job = place.wait(job.id, "failed")
    assert job.error.code == "worker_crashed" and "no training today" in job.error.message and job.to_dict()["waiting"] is None
    assert time.monotonic() - began > 10  # after pauses of 1, 2, 4 and 8 s


AWAY = {"code": "device_not_available", "param": "device", "message": "device cuda: no GPU can be used"}
FULL = {"code": "device_busy", "param": "device", "message": "the weights take 9 MB but cuda:0 has 3 MB left by others"}


def waiting(place, job, tries=1):
    def there():
        now = place.client.fine_tuning.jobs.retrieve(job)
        assert now.status in ("validating_files", "queued", "running") and now.error is None, now
        w = now.to_dict()["waiting"]
        return now.status == "queued" and w and w["attempts"] >= tries and w
    return until(there)


def test_a_job_waits_for_its_device(place):
    """Tried again after growing pauses, told once for each reason, and it runs when the device is there."""
    place.run("--train-device", "cuda")
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=AWAY, fail_at=0)
    job = place.job().id
    w = waiting(place, job, 3)
    assert (w["code"], w["message"], w["param"]) == (AWAY["code"], AWAY["message"], None) and w["attempts"] == 3
    assert w["retry_at"] - w["since"] >= 1 + 2 + 4 - 1 and w["since"] <= time.time()
    m = place.daemon.metrics()
    assert m['parley_jobs_waiting{reason="device_not_available"}'] == 1 and m['parley_jobs_waiting{reason="device_busy"}'] == 0
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=FULL, fail_at=0)
    assert until(lambda: (n := waiting(place, job, 4))["code"] == "device_busy" and n)["since"] == w["since"]
    place.script(steps=4, seconds=0, checkpoint_every=2)
    done = place.wait(job, "succeeded")
    assert done.to_dict()["waiting"] is None and [e.data["step"] for e in place.events(job) if e.type == "metrics"] == [1, 2, 3, 4]
    told = [e for e in place.events(job) if "waits for" in e.message]
    assert [e.level for e in told] == ["warn"] * 2 and AWAY["message"] in told[0].message and FULL["message"] in told[1].message
    said = messages(place.events(job))
    assert said.count("Fine-tuning job started") == 1 and not any("crash" in x or "failed" in x for x in said), said
    assert place.daemon.metrics()["parley_job_restarts_total"] == 0
    assert place.daemon.metrics()['parley_jobs_waiting{reason="device_busy"}'] == 0


def test_others_run_while_a_job_waits_for_its_device(place):
    """And room that they leave is looked at without delay."""
    place.run("--train-device", "cuda", "--train-jobs", 2)
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=FULL, fail_at=0)
    began = time.monotonic()
    first = place.job().id
    waiting(place, first, 2)
    assert time.monotonic() - began > 1  # it has left no room itself
    waiting(place, first, 4)  # the next pause is 8 s
    place.script(steps=4, seconds=0.01, checkpoint_every=2)
    second = place.wait(place.job().id, "succeeded")
    began = time.monotonic()
    place.wait(first, "succeeded")
    assert time.monotonic() - began < 7 and second.finished_at


def test_a_job_that_waits_is_paused_resumed_and_cancelled(place):
    c = place.run("--train-device", "cuda")
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=AWAY, fail_at=0)
    a, b = place.job().id, place.job().id
    for job in a, b:
        waiting(place, job, 3)
    assert (paused := c.fine_tuning.jobs.pause(a)).status == "paused" and paused.to_dict()["waiting"] is None
    cancelled = c.fine_tuning.jobs.cancel(b)
    assert cancelled.status == "cancelled" and cancelled.finished_at and cancelled.to_dict()["waiting"] is None
    place.script(steps=4, seconds=0, checkpoint_every=2)
    time.sleep(5)
    assert [c.fine_tuning.jobs.retrieve(x).status for x in (a, b)] == ["paused", "cancelled"]
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=AWAY, fail_at=0)
    c.fine_tuning.jobs.resume(a)
    w = waiting(place, a)
    assert w["attempts"] <= 2 and w["retry_at"] - w["since"] <= 4  # begins anew
    place.script(steps=4, seconds=0, checkpoint_every=2)
    place.wait(a, "succeeded")


def test_a_job_does_not_wait_for_ever(place):
    """The time goes on while no daemon runs; each restart tries at once."""
    place.run("--train-device", "cuda", "--train-device-wait", 30)
    place.script(steps=4, seconds=0, checkpoint_every=2, fail=AWAY, fail_at=0)
    job = place.job().id
    since = waiting(place, job, 2)["since"]
    place.kill()
    place.run("--train-device", "cuda", "--train-device-wait", 30)
    assert waiting(place, job, 3)["since"] == since
    failed = place.wait(job, "failed")
    assert (failed.error.code, failed.error.param) == ("device_not_available", "device") and AWAY["message"] in failed.error.message
    assert "train-device-wait" in failed.error.message and failed.to_dict()["waiting"] is None and 30 <= failed.finished_at - since <= 30 + PATIENCE


def test_a_device_that_is_lost_again_and_again(place):
    place.run("--train-device", "cuda")
    place.script(steps=6, seconds=0, checkpoint_every=2, fail={"code": "device_lost", "param": None, "message": "step 3: device failure"}, fail_at=3)
    job = place.job().id
    assert waiting(place, job)["code"] == "device_lost"
    failed = place.wait(job, "failed")
    assert failed.error.code == "device_lost" and "5 times without progress" in failed.error.message
    told = [e.message for e in place.events(job) if "The device was lost" in e.message]
    assert len(told) == 4 and place.daemon.metrics()["parley_job_restarts_total"] == 4, told


def test_no_such_worker(start, tmp_path, tiny):
    d = start("--train-worker", "/no/such/program", model=tiny)
    c = client_of(d)
    made = c.fine_tuning.jobs.create(model="tiny", training_file=upload(c).id)
    job = until(lambda: (j := c.fine_tuning.jobs.retrieve(made.id)).status == "failed" and j)
    assert job.error.code == "worker_not_started" and "train-worker" in job.error.message


def test_memory_is_bounded(place):
    place.run("--train-memory-mb", 300)
    place.script(big=1 << 30)
    job = place.wait(place.job().id, "failed")
    assert job.error.code == "out_of_memory"


def test_what_a_worker_may_not_say(place):
    place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2, say=["not json", "[]", '{"type":"magic"}', '{"type":"metrics"}', '{"type":"message"}',
                                                           '{"type":"checkpoint","step":1,"path":"../../secret"}', '{"type":"checkpoint","step":1,"path":"/etc"}', ""])
    job = place.wait(place.job().id, "succeeded")
    assert [p.step_number for p in place.client.fine_tuning.jobs.checkpoints.list(job.id)] == [2]


def test_words_in_any_language(place):
    """An event's message is cut between two characters, and one that was cut before still comes through."""
    place.run()
    place.script(steps=1, seconds=0, say=[json.dumps({"type": "message", "level": "info", "message": "x" * i + "\u20ac" * 600}) for i in range(3)])
    job = place.wait(place.job().id, "succeeded")
    long = [m for m in messages(place.events(job.id)) if "\u20ac" in m]
    assert long == ["x" * i + "\u20ac" * ((1023 - i) // 3) for i in range(3)]
    place.script(exit=7, last="\u20ac" * 100)
    job = place.wait(place.job().id, "failed")
    assert "\u20ac" * 66 in job.error.message and "\u20ac" * 66 in place.events(job.id)[-1].message


def test_stopping_the_daemon_interrupts(place):
    place.run()
    place.script(steps=6, seconds=0.02, checkpoint_every=2, hang_at=4)
    job = place.job()
    until(lambda: any(e.type == "metrics" and e.data["step"] == 3 for e in place.events(job.id)))
    pid = place.seen(job.id)["pid"]
    assert place.daemon.stop() == 0
    assert not alive(pid)
    place.script(steps=6, seconds=0.02, checkpoint_every=2)
    place.run()
    place.wait(job.id, "succeeded")
    events = place.events(job.id)
    assert [e.data["step"] for e in events if e.type == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert "The job was interrupted; it goes on from its last checkpoint" in messages(events) and "training from step 4" in messages(events)


def test_a_worker_that_does_not_stop_in_time(place):
    """The daemon ends it, which is no crash of the worker."""
    c = place.run("--drain-timeout", 1)
    place.script(steps=1000, seconds=0.05, checkpoint_every=2, ignore_term=True)
    job = place.job()
    until(lambda: any(e.type == "metrics" for e in place.events(job.id)))
    place.daemon.stop()
    place.script(steps=1, seconds=0)
    c = place.run("--train-jobs", 0)
    assert c.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert messages(place.events(job.id))[-1] == "The job was interrupted; it goes on from its last checkpoint"
    assert place.daemon.metrics()["parley_job_restarts_total"] == 0


def test_a_killed_daemon_takes_its_worker_over(place):
    place.run()
    place.script(steps=20, seconds=0.01, checkpoint_every=10, hold_at=15)
    job = place.job()
    until(lambda: any(e.type == "metrics" and e.data["step"] >= 3 for e in place.events(job.id)))
    pid = place.seen(job.id)["pid"]
    place.kill()
    time.sleep(0.3)
    assert alive(pid)  # the worker did not notice
    place.run()
    assert f"worker {pid} still runs and is taken over" in until(lambda: "taken over" in place.daemon.log and place.daemon.log)
    place.script()
    place.wait(job.id, "succeeded")
    assert [e.data["step"] for e in place.events(job.id) if e.type == "metrics"] == list(range(1, 21))
    assert place.seen(job.id)["pid"] == pid


def test_both_killed(place):
    place.run()
    place.script(steps=20, seconds=0.01, checkpoint_every=4, hold_at=8)
    job = place.job()
    until(lambda: any(e.type == "metrics" and e.data["step"] >= 6 for e in place.events(job.id)))
    pid = place.seen(job.id)["pid"]
    place.kill()
    os.kill(pid, signal.SIGKILL)
    place.script(steps=20, seconds=0.01, checkpoint_every=4)
    place.run()
    place.wait(job.id, "succeeded")
    events = place.events(job.id)
    assert [e.data["step"] for e in events if e.type == "metrics"] == list(range(1, 21))
    assert len([m for m in messages(events) if m.startswith("training from step")]) == 2


def test_finished_while_nobody_looked(place):
    place.run()
    place.script(steps=10, seconds=0.01, checkpoint_every=4, hold_at=6)
    job = place.job()
    until(lambda: any(e.type == "metrics" for e in place.events(job.id)))
    pid = place.seen(job.id)["pid"]
    place.kill()
    place.script()
    until(lambda: not alive(pid))
    place.run()
    done = place.wait(job.id, "succeeded")
    assert [e.data["step"] for e in place.events(job.id) if e.type == "metrics"] == list(range(1, 11)) and len(done.result_files) == 1


def test_half_a_job_is_swept(place):
    place.run("--train-jobs", 0)
    kept = place.job().id
    unfinished = place.data / "jobs" / ("ftjob-" + "0" * 24)
    unfinished.mkdir()
    (unfinished / "training.jsonl").write_text("x")
    place.kill()
    place.run("--train-jobs", 0)
    assert os.listdir(place.data / "jobs") == [kept]


def test_killed_while_jobs_are_made(place):
    """No job that was promised is lost, none is there twice."""
    place.run("--train-jobs", 0)
    f = upload(place.client)
    promised = []
    for _ in range(3):
        for _ in range(4):
            promised.append(place.client.fine_tuning.jobs.create(model="tiny", training_file=f.id).id)
        place.kill()
        place.run("--train-jobs", 0)
    assert [j.id for j in place.client.fine_tuning.jobs.list(limit=100)] == promised[::-1]
    for i in promised:
        place.wait(i, "queued")


def test_random_kills(place):
    """Worker, daemon or both, at random moments: every job finishes once, with every step once."""
    rng = random.Random(6)
    place.script(steps=30, seconds=0.03, checkpoint_every=5)
    place.run("--train-jobs", 2)
    jobs = [place.job().id for _ in range(3)]
    killed = dict.fromkeys(jobs, 0)
    for _ in range(8):
        time.sleep(rng.uniform(0.05, 0.5))
        # a job is given up after five crashes without progress, and on a busy machine none of them may have made any
        workers = [j for j in jobs if killed[j] < 4 and (place.data / "jobs" / j / "seen.json").exists()]
        who = rng.choice(["worker", "daemon", "both"])
        if who != "worker":
            place.kill()
        if who != "daemon" and workers:
            job = rng.choice(workers)
            killed[job] += 1
            victim = place.seen(job)["pid"]
            try:
                if b"fake_worker" in Path(f"/proc/{victim}/cmdline").read_bytes():
                    os.kill(victim, signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError):
                pass
        if who != "worker":
            place.run("--train-jobs", 2)
    for i in jobs:
        place.wait(i, "succeeded")
        events = place.events(i)
        assert [e.data["step"] for e in events if e.type == "metrics"] == list(range(1, 31))
        assert messages(events).count("The job has successfully completed") == 1
    assert len(place.client.fine_tuning.jobs.list(limit=100).data) == 3
    assert sorted(f.purpose for f in place.client.files.list()) == ["fine-tune"] * 3 + ["fine-tune-results"] * 3


def test_a_deleted_file_does_no_harm(place):
    c = place.run()
    place.script(steps=4, seconds=0.1, checkpoint_every=2)
    job = place.job()
    c.files.delete(job.training_file)
    place.wait(job.id, "succeeded")


def test_deleting_a_model(place):
    c = place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2)
    job = place.wait(place.job().id, "succeeded")
    folder = place.data / "jobs" / job.id
    deleted = c.models.delete(job.fine_tuned_model)
    assert deleted.deleted and deleted.id == job.fine_tuned_model and deleted.object == "model"
    assert list(c.fine_tuning.jobs.checkpoints.list(job.id)) == []
    until(lambda: not (folder / "result").exists() and not os.listdir(folder / "checkpoints"))
    with pytest.raises(openai.NotFoundError):
        c.models.delete(job.fine_tuned_model)
    with pytest.raises(openai.BadRequestError):
        c.models.delete("tiny")
    assert c.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.fine_tuned_model


def test_a_checkpoint_that_is_deleted_while_its_job_runs(place):
    """Its name is gone at once; the worker can go on from it until the job has ended."""
    c = place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2, hold_at=3)
    job = place.job()
    (point,) = until(lambda: list(c.fine_tuning.jobs.checkpoints.list(job.id)))
    folder = place.data / "jobs" / job.id / "checkpoints/step-2"
    c.models.delete(point.fine_tuned_model_checkpoint)
    assert list(c.fine_tuning.jobs.checkpoints.list(job.id)) == [] and folder.exists()
    os.kill(place.seen(job.id)["pid"], signal.SIGKILL)
    place.script(steps=4, seconds=0, checkpoint_every=2)
    place.wait(job.id, "succeeded")
    assert messages(place.events(job.id)).count("training from step 3") == 1
    assert [p.step_number for p in c.fine_tuning.jobs.checkpoints.list(job.id)] == [4]
    until(lambda: os.listdir(folder.parent) == ["step-4"])


def test_deleted_and_killed(place):
    """The files of what was deleted go after a kill, too."""
    c = place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2)
    jobs = [place.wait(place.job().id, "succeeded") for _ in range(2)]
    c.models.delete(jobs[0].fine_tuned_model)
    c.models.delete(f"{jobs[1].fine_tuned_model}:ckpt-step-2")
    place.kill()
    place.run()
    gone = [place.data / "jobs" / jobs[0].id / "result", *((place.data / "jobs" / j.id / "checkpoints/step-2") for j in jobs)]
    until(lambda: not any(p.exists() for p in gone))
    assert (place.data / "jobs" / jobs[1].id / "result").exists() and (place.data / "jobs" / jobs[1].id / "checkpoints/step-4").exists()


def test_a_tuned_model_as_base(place):
    c = place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2)
    first = place.wait(place.job().id, "succeeded")
    second = c.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=upload(c).id)
    assert second.model == first.fine_tuned_model
    c.models.delete(first.fine_tuned_model)  # its files stay with the job that began from them
    done = place.wait(second.id, "succeeded")
    assert done.fine_tuned_model.startswith("ft:tiny:parley::")
    seen = place.seen(second.id)
    assert seen["job"]["base_adapter"] == str(place.data / "jobs" / second.id / "base") and seen["base"] == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(openai.BadRequestError) as e:
        c.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=upload(c).id)
    assert e.value.body["code"] == "model_not_available"


NEW_IN = {4: "".join(f"ALTER TABLE jobs DROP COLUMN {x};" for x in ("waits", "waits_message", "waits_since", "retry_at", "tries")),
          3: "ALTER TABLE jobs DROP COLUMN tidied; DROP TABLE uploads; DROP TABLE parts; DROP TABLE permissions;", 2: "ALTER TABLE jobs DROP COLUMN base_id;"}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_database_of_an_older_version(place, version):
    place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    job = place.wait(place.job().id, "succeeded")
    place.daemon.stop()
    with contextlib.closing(sqlite3.connect(place.data / "parley.db")) as db:
        db.executescript("".join(NEW_IN[v] for v in range(4, version, -1)) + f"PRAGMA user_version={version}")
    for _ in range(2):
        c = place.run()
        assert [j.id for j in c.fine_tuning.jobs.list()] == [job.id]
        assert "made for another" not in place.daemon.log and "another model" not in place.daemon.log
        place.daemon.stop()


def test_another_model_than_before(place):
    """A job and its model belong to the base they were made for."""
    c = place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    made = place.wait(place.job().id, "succeeded")
    place.daemon.stop()
    c = place.run("--train-jobs", 0)
    waiting = place.job().id
    place.wait(waiting, "queued")
    place.daemon.stop()
    mine, place.model = place.model, make_model(place.data, "tiny.gguf", "--seed", "77")
    c = place.run()
    place.wait(waiting, "paused")
    assert "made for another model" in messages(place.events(waiting))[-1] and place.events(waiting)[-1].level == "warn"
    until(lambda: f"{made.fine_tuned_model} is not served: it is an adapter of another model" in place.daemon.log, 20)
    with pytest.raises(openai.APIStatusError) as e:
        c.chat.completions.create(model=made.fine_tuned_model, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    assert "another model" in str(e.value)
    with pytest.raises(openai.BadRequestError, match="it is an adapter of 'tiny' as that was then, which this server does not have") as e:
        c.fine_tuning.jobs.create(model=made.fine_tuned_model, training_file=upload(c).id)
    assert e.value.body["code"] == "model_not_available" and e.value.body["param"] == "model"
    place.daemon.stop()
    place.model = mine
    c = place.run()
    c.fine_tuning.jobs.resume(waiting)
    place.wait(waiting, "succeeded")


def test_a_whole_tuned_model_as_base(place):
    """An adapter of a whole tuned model belongs to that model, also when that is deleted, and never to the one that the daemon began with."""
    c = place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2, whole=str(make_model(place.data, "other.gguf", "--seed", "78")))
    first = place.wait(place.job().id, "succeeded").fine_tuned_model
    place.script(steps=4, seconds=0, checkpoint_every=2)
    second = place.wait(c.fine_tuning.jobs.create(model=first, training_file=upload(c).id).id, "succeeded")
    third = place.wait(c.fine_tuning.jobs.create(model=second.fine_tuned_model, training_file=upload(c).id).id, "succeeded")
    base = [place.data / "jobs" / j.id / "base" for j in (second, third)]
    jobs = [place.seen(j.id)["job"] for j in (second, third)]
    assert [j["base"] for j in jobs] == [str(b / "model.gguf") for b in base] and jobs[0]["base_id"] == jobs[1]["base_id"]
    assert [j["base_adapter"] for j in jobs] == [None, str(base[1])]
    assert third.fine_tuned_model.startswith("ft:tiny:parley::")

    def parents():
        return {m.id: m.to_dict()["parent"] for m in c.models.list()}
    assert parents() == {"tiny": None, first: "tiny", second.fine_tuned_model: first, third.fine_tuned_model: first}
    c.models.delete(first)
    for _ in range(2):
        until(lambda: parents() == {"tiny": None, second.fine_tuned_model: first, third.fine_tuned_model: first})
        with pytest.raises(openai.APIStatusError) as e:  # the script's adapters are empty files
            c.chat.completions.create(model=second.fine_tuned_model, messages=[{"role": "user", "content": "a"}], max_tokens=1)
        assert e.value.body["code"] == "model_load_failed" and "adapter" in str(e.value)
        place.daemon.stop()
        c = place.run()


def test_a_base_stays_as_long_as_something_is_served_on_it(place):
    """A job's own copy of the whole model under its adapters, and its checkpoints, which go on from it when that model is deleted and nobody
    has asked for them yet."""
    c = place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2, whole=str(make_model(place.data, "other.gguf", "--seed", "78")))
    whole = place.wait(place.job().id, "succeeded").fine_tuned_model

    def cancelled(**script):
        place.script(steps=4, seconds=0, **script)
        job = c.fine_tuning.jobs.create(model=whole, training_file=upload(c).id).id
        until(lambda: any(e.type == "metrics" and e.data["step"] >= 2 for e in place.events(job)))
        c.fine_tuning.jobs.cancel(job)
        until(lambda: not (place.data / "jobs" / job / "training.jsonl").exists())
        return place.data / "jobs" / job
    nothing, one = cancelled(checkpoint_every=9, hold_at=3), cancelled(checkpoint_every=2, hold_at=3)
    until(lambda: not (nothing / "base").exists())
    assert os.listdir(one / "base") == ["model.gguf"]
    c.models.delete(whole)
    place.daemon.stop()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    c = place.run()
    (point,) = c.fine_tuning.jobs.checkpoints.list(one.name)
    done = place.wait(c.fine_tuning.jobs.create(model=point.fine_tuned_model_checkpoint, training_file=upload(c).id).id, "succeeded")
    assert place.seen(done.id)["job"]["base"] == str(place.data / "jobs" / done.id / "base/model.gguf")
    c.models.delete(point.fine_tuned_model_checkpoint)
    until(lambda: not (one / "base").exists())
    until(lambda: os.listdir(place.data / "jobs" / done.id / "base") == ["model.gguf"])


def test_bases_whose_files_are_gone(place):
    """Refused at once and by name, by the dry run as well; what goes after that fails the job with code and param."""
    more = make_model(place.data, "more.gguf", "--seed", "79")
    c = place.run("--add-model", f"more={more}")
    place.script(steps=2, seconds=0, checkpoint_every=2)
    made = place.wait(place.job().id, "succeeded")
    for name in os.listdir(place.data / "jobs" / made.id / "result"):
        (place.data / "jobs" / made.id / "result" / name).unlink()
    more.unlink()
    f = upload(c).id
    for model, words in (made.fine_tuned_model, "its files are not there any more"), ("more", "more.gguf cannot be read"):
        for path in "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/validate":
            status, _, answer = place.daemon.post(path, {"model": model, "training_file": f})
            error = json.loads(answer)["error"]
            assert status == 400 and (error["code"], error["param"]) == ("model_not_available", "model") and words in error["message"], error


def test_a_whole_tuned_model_beside_ranks(place):
    """The other ranks have parts of the first model only: it says what to do, and answers without them."""
    c = place.run("--tensor-parallel", 2)
    place.script(steps=2, seconds=0, checkpoint_every=2, whole=str(place.model))
    made = place.wait(place.job().id, "succeeded")
    assert any(e.level == "warn" and "need one rank" in e.message for e in place.events(made.id))
    ask = {"model": made.fine_tuned_model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with pytest.raises(openai.BadRequestError) as e:
        c.chat.completions.create(**ask)
    assert "without --tensor-parallel" in e.value.body["message"] and e.value.body["param"] == "model"
    place.daemon.stop()
    c = place.run()
    assert c.chat.completions.create(**ask).model == made.fine_tuned_model


def test_dry_run(place):
    place.run("--train-threads", 2)
    f = upload(place.client, (CHAT + "\n") * 40)
    status, _, body = place.daemon.post("/v1/fine_tuning/jobs/validate", {"model": "tiny", "training_file": f.id, "preview": 2,
                                                                          "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}})
    answer = json.loads(body)
    assert status == 200 and answer["valid"] and answer["object"] == "fine_tuning.validation", body
    assert answer["estimate"]["examples"] == 40 and answer["estimate"]["total_steps"] == 120 and answer["estimate"]["memory_bytes"] > 0
    assert answer["method"]["supervised"]["hyperparameters"]["batch_size"] == 1 and answer["method"]["supervised"]["compute"]["threads"] == 2
    assert [p["line"] for p in answer["preview"]] == [1, 2]
    segments = answer["preview"][0]["segments"]
    assert [s["loss"] for s in segments] == [False, True, False] and segments[1]["text"] == "the world<|im_end|>" and segments[2]["text"] == "\n"
    assert "".join(s["text"] for s in segments).endswith("<|im_start|>assistant\nthe world<|im_end|>\n")
    assert place.client.fine_tuning.jobs.list().data == []
