"""Files and jobs under faults: full disks, no process to be had, a database that cannot be written, kills of the real worker and the daemon at
random moments. tools/preload/faults.c makes the system calls fail.

PARLEY_KILLS=N sets how many kills (`make faults`: 20), PARLEY_SEED=N replays a run's moments.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from errno import EAGAIN, ENOSPC
from pathlib import Path

import openai
import pytest

from conftest import GOOD, ROOT, Daemon, client_of, data_dir, find_tool, upload
from test_finetune_real import ROOM, finished, lines, method, result_of
from test_jobs import Place, alive, messages, until


class Faults:
    """The rules of a daemon that runs with the library, and what it flushed."""

    def __init__(self, directory):
        self.rules, self.log = directory / "faults", directory / "flushed"
        self.env = {"LD_PRELOAD": str(find_tool("faults.so").resolve()), "FAULTS": str(self.rules), "FAULTS_LOG": str(self.log),
                    "ASAN_OPTIONS": "verify_asan_link_order=0"}

    def set(self, *rules):
        temporary = self.rules.with_suffix(".tmp")
        temporary.write_text("".join(f"{call} {number} {text}\n" for call, number, text in rules))
        os.replace(temporary, self.rules)

    def flushed(self):
        return {line.split(" ", 1)[1] for line in self.log.read_text().splitlines()}


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path)


@pytest.fixture
def place(start, tmp_path, tiny, faults):
    p = Place(lambda *a, **k: start(*a, **k, env=faults.env), tmp_path, tiny)
    Daemon.model_id = "tiny"
    yield p


def last_steps(place, job):
    return [e.data["step"] for e in place.events(job) if e.type == "metrics"]


def test_a_full_disk_does_not_keep_the_daemon(place, faults):
    """SIGTERM ends it although the database cannot be written; nothing that the worker said is lost."""
    place.run("--drain-timeout", 5)
    place.script(steps=6, seconds=0.02, checkpoint_every=2, hang_at=4)
    job = place.job().id
    until(lambda: last_steps(place, job)[-1:] == [3])
    pid = place.seen(job)["pid"]
    faults.set(("write", ENOSPC, "parley.db"))
    assert place.daemon.stop(seconds=10) == 0
    assert not alive(pid)
    faults.set()
    place.script(steps=6, seconds=0.02, checkpoint_every=2)
    place.run()
    place.wait(job, "succeeded")
    assert last_steps(place, job) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rule, words", [(("fork", EAGAIN, ""), "cannot start a process"), (("write", ENOSPC, "job.json"), "No space left on device")])
def test_what_passes_is_tried_again(place, faults, rule, words):
    faults.set(rule)
    place.run()
    place.script(steps=4, seconds=0, checkpoint_every=2)
    job = place.job().id
    told = until(lambda: [e for e in place.events(job) if "could not be started" in e.message])
    assert words in told[0].message and told[0].level == "warn" and "stays queued" in told[0].message
    time.sleep(1.5)  # it is tried again, and says so once only
    assert place.client.fine_tuning.jobs.retrieve(job).status == "queued"
    faults.set()
    done = place.wait(job, "succeeded")
    assert done.error is None and last_steps(place, job) == [1, 2, 3, 4]
    told = messages(place.events(job))
    assert sum("could not be started" in m for m in told) == 1 and told.count("Fine-tuning job started") == 1, told


def test_a_job_that_waits_for_its_turn_again_lets_others_pass(place, faults):
    faults.set(("write", ENOSPC, "job.json"))
    place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    first = place.job().id
    until(lambda: any("could not be started" in e.message for e in place.events(first)))
    faults.set(("write", ENOSPC, f"{first}/job.json"))
    place.wait(place.job().id, "succeeded")
    faults.set()
    place.wait(first, "succeeded")


def test_every_folder_is_flushed(place, faults):
    """A job that was promised survives a power cut: its folder, the tuned model that it goes on from, and their entries."""
    c = place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    first = place.wait(place.job().id, "succeeded")
    place.script(steps=2, seconds=0.5, checkpoint_every=2)
    job = c.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=upload(c).id).id
    folder = place.data / "jobs" / job
    assert {str(folder), str(folder / "base"), str(folder.parent)} <= faults.flushed()
    place.wait(job, "succeeded")


def test_a_database_that_cannot_be_written(place, faults):
    """Clear errors, the daemon serves on, and nothing is half there."""
    c = place.run("--train-jobs", 0)
    f = upload(c)
    faults.set(("write", ENOSPC, "parley.db"))
    calls = [lambda: upload(c), lambda: c.fine_tuning.jobs.create(model="tiny", training_file=f.id), lambda: c.files.delete(f.id),
             lambda: c.uploads.create(bytes=1, filename="x", mime_type="x", purpose="batch")]
    for call in calls:
        with pytest.raises(openai.InternalServerError) as e:
            call()
        assert "free some space" in e.value.message and e.value.response.headers.get("x-should-retry") == "false", e.value.message
    assert c.files.list().data == [f] and c.fine_tuning.jobs.list().data == []
    assert c.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2).choices
    faults.set()
    for call in calls:
        call()
    until(lambda: not list((place.data / "uploads").iterdir()))


@pytest.mark.parametrize("where", ["/uploads/", "/uploads/part_"])
def test_a_disk_that_fills_up_while_uploading(place, faults, where):
    c = place.run("--train-jobs", 0)
    u = c.uploads.create(bytes=len(GOOD), filename="x", mime_type="x", purpose="fine-tune")
    first = c.uploads.parts.create(u.id, data=GOOD[:100].encode())
    faults.set(("write", ENOSPC, "/uploads/"))
    for call in (lambda: upload(c), lambda: c.uploads.parts.create(u.id, data=GOOD[100:].encode())):
        with pytest.raises(openai.InternalServerError) as e:
            call()
        assert e.value.status_code == 507 and e.value.body["code"] == "disk_full" and "the disk of the data directory is full" in e.value.message
    faults.set()
    rest = c.uploads.parts.create(u.id, data=GOOD[100:].encode())
    faults.set(("write", ENOSPC, "/uploads/"))
    with pytest.raises(openai.InternalServerError) as e:
        c.uploads.complete(u.id, part_ids=[first.id, rest.id])
    assert e.value.body["code"] == "disk_full"
    faults.set()
    done = c.uploads.complete(u.id, part_ids=[first.id, rest.id])  # nothing is lost
    assert c.files.content(done.file.id).read() == GOOD.encode()
    assert not list((place.data / "uploads").iterdir())


def real(place, *args):
    place.daemon = place.start("--data-dir", place.data, "--train-threads", 1, *ROOM, *args, model=place.model)
    place.client = client_of(place.daemon)
    return place.client


def create(c, seed=3, interval=7):
    return c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, lines(24)).id, validation_file=upload(c, lines(6)).id, suffix="real", seed=seed,
                                     method=method(checkpoints={"interval": interval}, compute={"threads": 1})).id


@pytest.mark.parametrize("full", ["/checkpoints/", "/state.bin", "progress.jsonl", "/jobs/"])
def test_a_disk_that_fills_up_while_checkpointing(place, faults, full):
    """The job waits, keeps its checkpoints, and ends with the bytes of an undisturbed run."""
    c = real(place)
    calm = create(c)
    assert finished(c, calm).status == "succeeded"
    job = create(c)
    folder = place.data / "jobs" / job
    until(lambda: (folder / "checkpoints/step-7").exists())
    faults.set(("write", ENOSPC, f"{job}/" if full == "/jobs/" else full))
    said = until(lambda: [e for e in place.events(job) if "no space left" in e.message.lower()])
    assert said[0].level in ("info", "warn") and "goes on from its last checkpoint" in said[0].message or "could not be started" in said[0].message
    assert c.fine_tuning.jobs.retrieve(job).status in ("queued", "running") and list((folder / "checkpoints").glob("step-*"))
    assert c.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2).choices
    faults.set()
    assert finished(c, job).status == "succeeded"
    assert result_of(place.daemon, job) == result_of(place.daemon, calm)
    assert last_steps_of(c, job) == list(range(1, 97))


def last_steps_of(c, job):
    return [e.data["step"] for e in c.fine_tuning.jobs.list_events(job, limit=1000) if e.type == "metrics"][::-1]


def test_a_long_check_does_not_keep_the_daemon(start, tmp_path, tiny):
    """Counting the tokens of a large file ends within a line when the daemon does, and is made anew by the next."""
    d = start("--data-dir", tmp_path / "data", "--train-jobs", 0, model=tiny)
    c = client_of(d)
    line = json.dumps({"messages": [{"role": "user", "content": "a lamp and " * 400}, {"role": "assistant", "content": "b" * 400}]}) + "\n"
    f = upload(c, line * 12000)
    job = c.fine_tuning.jobs.create(model="tiny", training_file=f.id).id
    time.sleep(0.3)
    assert c.fine_tuning.jobs.retrieve(job).status == "validating_files", "the file is too small for this test"
    before = time.monotonic()
    assert d.stop() == 0
    assert time.monotonic() - before < 2
    c = client_of(start("--data-dir", tmp_path / "data", "--train-jobs", 0, model=tiny))
    assert c.fine_tuning.jobs.retrieve(job).status == "validating_files"


def test_ended_jobs_keep_only_what_is_served(place):
    c = real(place)
    first = finished(c, create(c))
    second = c.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=upload(c, lines(24)).id, method=method(checkpoints={"interval": 50})).id
    assert finished(c, second).status == "succeeded"
    cancelled = create(c)
    until(lambda: list((place.data / "jobs" / cancelled / "checkpoints").glob("step-*/state.bin")))
    c.fine_tuning.jobs.cancel(cancelled)

    def left():
        return [p for p in (place.data / "jobs").rglob("*") if p.name in ("training.jsonl", "validation.jsonl", "state.bin", "base")]
    until(lambda: not left())
    for j in first.id, second:
        name = c.fine_tuning.jobs.checkpoints.list(j).data[0].fine_tuned_model_checkpoint
        assert c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2).choices


def test_the_data_of_unfinished_jobs_is_in_the_quota(start, tmp_path, tiny):
    d = start("--data-dir", tmp_path / "data", "--train-jobs", 0, "--files-quota-mb", 1, model=tiny)
    c = client_of(d)
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 50000}, {"role": "assistant", "content": "y"}]}) + "\n"
    jobs = []
    f = upload(c, line * 12)
    jobs += [c.fine_tuning.jobs.create(model="tiny", training_file=f.id, method={"type": "supervised", "supervised": {"hyperparameters": {"max_length": 64}}}).id
             for _ in range(2)]
    c.files.delete(f.id)  # the jobs, if they still wait, hold it
    for j in jobs:
        c.fine_tuning.jobs.pause(j) if c.fine_tuning.jobs.retrieve(j).status in ("validating_files", "queued") else None
    held = [j for j in jobs if c.fine_tuning.jobs.retrieve(j).status == "paused"]
    assert held
    with pytest.raises(openai.BadRequestError) as e:
        upload(c, line * 12)
    assert e.value.body["code"] == "file_quota_exceeded"
    for j in held:
        c.fine_tuning.jobs.cancel(j)
    until(lambda: not list((tmp_path / "data/jobs").glob("*/training.jsonl")))
    upload(c, line * 12)


def test_uploads_under_way_are_in_the_quota(start, tmp_path, tiny):
    d = start("--files-quota-mb", 4, model=tiny)
    s = d.socket()
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"y" * (3 << 20)
    s.sendall(f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {4 << 20}\r\n\r\n".encode() + body)
    c = client_of(d)
    until(lambda: sum(p.stat().st_size for p in data_dir(d).glob("uploads/*")) >= 3 << 20)
    with pytest.raises(openai.BadRequestError) as e:
        upload(c, b"x" * (2 << 20), purpose="batch")
    assert e.value.body["code"] == "file_quota_exceeded" and "uploads under way" in e.value.message
    s.close()

    def fits():
        try:
            return upload(c, b"x" * (2 << 20), purpose="batch")
        except openai.BadRequestError:
            return None
    until(fits)


def test_a_model_that_is_deleted_while_it_is_loaded(place, faults):
    c = real(place)
    job = finished(c, create(c, interval=48))
    name = next(p.fine_tuned_model_checkpoint for p in c.fine_tuning.jobs.checkpoints.list(job.id) if p.step_number == 48)
    faults.set(("read", 1500, "step-48/adapter_model"))  # milliseconds
    answers = []

    def ask():
        try:
            answers.append(c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2))
        except openai.APIStatusError as e:
            answers.append(e)
    t = threading.Thread(target=ask)
    t.start()
    time.sleep(0.5)
    c.models.delete(name)
    t.join()
    faults.set()
    assert answers and name not in [m.id for m in c.models.list()]
    with pytest.raises(openai.NotFoundError):
        c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2)


def test_a_whole_model_that_is_deleted_while_it_is_loaded(place, faults):
    """Nothing of it stays in memory, and who waited is told that it does not exist."""
    c = real(place)
    full = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate": 0.01}, "peft": {"kind": "full"}}}
    training = upload(c, lines(12)).id
    whole = finished(c, c.fine_tuning.jobs.create(model="tiny", training_file=training, method=full).id).fine_tuned_model
    adapter = finished(c, c.fine_tuning.jobs.create(model=whole, training_file=training, method=method()).id).fine_tuned_model
    assert c.chat.completions.create(model=adapter, messages=[{"role": "user", "content": "a"}], max_tokens=2).choices
    place.daemon.stop()
    c = real(place)
    until(lambda: {whole, adapter} <= {m.id for m in c.models.list()})
    faults.set(("read", 1500, "model.gguf"))
    said = []

    def ask(name):
        try:
            said.append(c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2).model)
        except openai.APIStatusError as e:
            said.append(e.status_code)
    threads = [threading.Thread(target=ask, args=[whole]) for _ in range(3)]
    for t in threads:
        t.start()
    time.sleep(0.5)
    c.models.delete(whole)
    for t in threads:
        t.join()
    faults.set()
    assert said == [404] * 3
    loads = lambda: "parley_model_loads_total{model_name=\"" + whole in place.daemon.get("/metrics")[2].decode()
    assert c.chat.completions.create(model=adapter, messages=[{"role": "user", "content": "a"}], max_tokens=2).choices  # by its own file of it
    assert loads()
    c.models.delete(adapter)
    until(lambda: not loads())
    assert [m.id for m in c.models.list()] == ["tiny"]


def test_adapters_make_room_for_each_other(place, models):
    """Any that a job made, the least recently used one first; when all are in use, that is said, and passes."""
    place.model = models("faults-slow", "--embd", 32, "--ff", 64, "--ctx", 16384)
    c = real(place, "--alias", "tiny", "--max-adapters", 1, "--speculation", "off")
    names = [finished(c, create(c, seed, interval=96)).fine_tuned_model for seed in (3, 4)]

    def ask(name, **more):
        return c.with_options(max_retries=0).completions.create(model=name, prompt="a", temperature=0, **more)
    texts = [ask(n, max_tokens=8).choices[0].text for n in names]
    assert [ask(n, max_tokens=8).choices[0].text for n in names] == texts
    assert [a["id"] for a in json.loads(place.daemon.get("/v1/lora_adapters")[2])["data"]] == names[1:]
    stream = ask(names[1], max_tokens=15000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="max-adapters") as e:
        ask(names[0], max_tokens=8)
    assert int(e.value.response.headers["retry-after"]) > 0
    assert ask(names[1], max_tokens=8).choices[0].text == texts[1]
    stream.close()
    until(lambda: place.daemon.idle())
    assert ask(names[0], max_tokens=8).choices[0].text == texts[0]
    assert {*names} <= {m.id for m in c.models.list()}
    place.daemon.stop()
    c = real(place, "--alias", "tiny", "--max-adapters", 1)  # more than there is place for: none is lost
    until(lambda: {*names} <= {m.id for m in c.models.list()})
    assert [ask(n, max_tokens=8).choices[0].text for n in names] == texts


def test_checkpoints_make_room_for_each_other(place):
    c = real(place, "--max-adapters", 3)
    job = finished(c, create(c, interval=16))
    names = [p.fine_tuned_model_checkpoint for p in c.fine_tuning.jobs.checkpoints.list(job.id)]
    assert len(names) >= 3
    for _ in range(2):
        for name in names:
            assert c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2).model == name
    loaded = [a["id"] for a in json.loads(place.daemon.get("/v1/lora_adapters")[2])["data"]]
    assert names[-1] in loaded and len(loaded) == 3
    assert {job.fine_tuned_model, *names} <= {m.id for m in c.models.list()}


@pytest.mark.parametrize("damage, words", [("cut", "adapter_model.safetensors"), ("shape", "adapter_model.safetensors"), ("gone", "adapter_model.safetensors"),
                                           ("config", "adapter_config.json")])
def test_a_damaged_checkpoint_is_refused(place, models, damage, words):
    """By name, with what is wrong with it; the daemon and the job's other models serve on."""
    c = real(place)
    job = finished(c, create(c, interval=48))
    name = next(p.fine_tuned_model_checkpoint for p in c.fine_tuning.jobs.checkpoints.list(job.id) if p.step_number == 48)
    folder = place.data / "jobs" / job.id / "checkpoints/step-48"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    else:
        other = ROOT / "tests/oracle/fixtures/adapter/llama-all"
        weights.write_bytes((other / weights.name).read_bytes())
        config.write_bytes((other / config.name).read_bytes())
    with pytest.raises(openai.APIStatusError) as e:
        c.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2)
    assert words in e.value.message and e.value.status_code in (400, 404, 500), e.value.message
    assert c.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "a"}], max_tokens=2).choices


def quick(call, seconds=1.5):
    before = time.monotonic()
    call()
    assert time.monotonic() - before < seconds, "it waited"


def test_long_file_work_keeps_nobody(place, faults):
    """While large files are removed or copied, the store answers."""
    c = place.run()
    place.script(steps=2, seconds=0, checkpoint_every=2)
    job = place.wait(place.job().id, "succeeded")
    folder = place.data / "jobs" / job.id
    until(lambda: not (folder / "training.jsonl").exists())
    faults.set(("unlink", 2000, "/jobs/"))
    quick(lambda: c.models.delete(job.fine_tuned_model))
    for _ in range(5):
        quick(lambda: upload(c))
        time.sleep(0.3)
    until(lambda: not (folder / "result").exists())
    faults.set(("read", 2000, "results.csv"))
    job = place.job()
    until(lambda: (place.data / "jobs" / job.id / "results.csv").exists())
    for _ in range(5):
        quick(lambda: upload(c))
        time.sleep(0.3)
    place.wait(job.id, "succeeded")


def test_uploads_that_go_while_they_are_put_together(place, faults):
    """Cancelled, or forgotten: the answer says so, and no disk is blamed."""
    c = place.run("--train-jobs", 0)

    def completes(meanwhile):
        u = c.uploads.create(bytes=4, filename="x", mime_type="x", purpose="batch").id
        ids = [c.uploads.parts.create(u, data=data).id for data in (b"12", b"34")]
        faults.set(("read", 700, ids[0]))
        answers = []
        t = threading.Thread(target=lambda: answers.append(place.daemon.post(f"/v1/uploads/{u}/complete", {"part_ids": ids})))
        t.start()
        time.sleep(0.3)
        meanwhile(u)
        t.join()
        status, _, body = answers[0]
        assert c.files.list().data == [] and not list((place.data / "files").iterdir())
        return status, json.loads(body)["error"]

    def forget(u):
        with contextlib.closing(sqlite3.connect(place.data / "parley.db", timeout=10)) as db, db:
            db.execute("DELETE FROM uploads WHERE id=?", [u])
    status, error = completes(c.uploads.cancel)
    assert status == 400 and error["param"] == "upload_id" and "is cancelled" in error["message"], error
    status, error = completes(forget)
    assert status == 404 and error["param"] == "upload_id" and "No such Upload object" in error["message"], error


KILLS = int(os.environ.get("PARLEY_KILLS", "5"))
SEED = int(os.environ.get("PARLEY_SEED", random.randrange(1 << 30)))


def kill_worker(place, job):
    lock = place.data / "jobs" / job / "worker.lock"
    pid = lock.read_text() if lock.exists() else ""
    try:
        if pid and b"train" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
            return True
    except (ProcessLookupError, FileNotFoundError):
        pass
    return False


def progress(place, job):
    path = place.data / "jobs" / job / "progress.jsonl"
    return path.read_bytes().count(b'"type":"metrics"') if path.exists() else 0


def test_kills_at_random_moments(start, tmp_path, tiny):
    """The real worker, the daemon, or both: every job finishes, none is lost or there twice, and each adapter has the undisturbed run's bytes."""
    print(f"PARLEY_SEED={SEED} PARLEY_KILLS={KILLS}")
    rng = random.Random(SEED)
    calm = Place(start, tmp_path / "calm", tiny)
    place = Place(start, tmp_path / "kills", tiny)
    seeds = [3, 4, 5]
    real(calm)
    want = [create(calm.client, seed=s, interval=5) for s in seeds]
    for j in want:
        assert finished(calm.client, j).status == "succeeded"
    real(place, "--train-jobs", 2)
    jobs = [create(place.client, seed=s, interval=5) for s in seeds]
    kills, without = {"worker": 0, "daemon": 0, "both": 0}, dict.fromkeys(jobs, (0, 0))  # kills since a step further than ever
    while sum(kills.values()) < KILLS:
        time.sleep(rng.uniform(0, 0.6))
        if all(place.client.fine_tuning.jobs.retrieve(j).status == "succeeded" for j in jobs):
            jobs.append(create(place.client, seed=3, interval=5))  # it was too quick: there is more to kill
            want.append(want[0])
            without[jobs[-1]] = (0, 0)
        who = rng.choice(list(kills))
        victims = []
        for j in jobs:
            n, best = without[j]
            now = progress(place, j)
            without[j] = (0, now) if now > best else (n, best)
            if without[j][0] < 3:  # a job is given up after five crashes without progress
                victims.append(j)
        if who != "worker":
            place.kill()
        hit = False
        for j in rng.sample(victims, len(victims)) if who != "daemon" else []:
            if kill_worker(place, j):
                without[j] = (without[j][0] + 1, without[j][1])
                hit = True
                break
        if who != "worker":
            real(place, "--train-jobs", 2)
        kills[who] += who == "daemon" or hit
        kills["daemon"] += who == "both" and not hit
    print(kills)
    c = place.client
    for job, calm_job in zip(jobs, want):
        done = finished(c, job)
        assert done.status == "succeeded" and len(done.result_files) == 1, (done, SEED)
        assert result_of(place.daemon, job) == result_of(calm.daemon, calm_job), SEED
        assert last_steps_of(c, job) == list(range(1, 97)), SEED
        told = messages(c.fine_tuning.jobs.list_events(job, limit=1000))
        assert told.count("The job has successfully completed") == 1 and told.count("Fine-tuning job started") == 1, (told, SEED)
    assert sorted(j.id for j in c.fine_tuning.jobs.list(limit=100)) == sorted(jobs)
    assert sum(f.purpose == "fine-tune-results" for f in c.files.list()) == len(jobs)
    assert {c.fine_tuning.jobs.retrieve(j).fine_tuned_model for j in jobs} <= {m.id for m in c.models.list()}
