"""Models from nothing: the API's story to a file that parleyd serves, what PyTorch makes of the same first weights, kills, and refusals.
SPDX-License-Identifier: Apache-2.0
"""
import json
import math
import random
import subprocess
import time

import openai
import pytest

from conftest import ROOT, Daemon, client_of, data_dir, until, upload
from test_finetune_real import ROOM, finished
from test_train import PARLEY, lines, result, run, steps_written

VERSE = ("The boats go out before the light, the nets are folded on the deck, and every lamp along the quay is put out one by one until the water, "
         "grey and slow, has nothing left to carry home but names of men and names of boats and one old bell.")
TEXT = "".join(json.dumps({"text": VERSE}) + "\n" for _ in range(32))
SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "context": 128}


def method(shape, **more):
    return {"type": "pretrain", "pretrain": {"shape": shape, "hyperparameters": {"n_epochs": 15, "batch_size": 4, "learning_rate": 0.01}, **more}}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """A daemon, and a job that has made a model."""
    d = Daemon(tmp_path_factory.mktemp("scratch"), "--data-dir", tmp_path_factory.mktemp("data") / "d", "--train-threads", 1, *ROOM, model=tiny).wait_ready()
    c = client_of(d)
    job = c.fine_tuning.jobs.create(model="scratch", training_file=upload(c, TEXT).id, validation_file=upload(c, TEXT.split("\n")[0] + "\n").id,
                                    suffix="bell", seed=5, method=method(SHAPE))
    d.client, d.job = c, finished(c, job.id)
    assert d.job.status == "succeeded", (d.job, d.log)
    until(lambda: not (data_dir(d) / "jobs" / d.job.id / "base.gguf").exists())  # its first weights
    d.file = data_dir(d) / "jobs" / d.job.id / "result/model.gguf"
    yield d
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


def test_it_learned_the_text(made):
    job = made.job.to_dict()
    assert job["model"] == "scratch" and job["fine_tuned_model"].startswith("ft:scratch:parley:bell:")
    shape = job["method"]["pretrain"]["shape"]
    assert shape == {"architecture": "llama", **SHAPE, "ff": 192, "tied": True, "tokenizer": "bpe", "chat_template": "none", "vocab_size": shape["vocab_size"]}
    assert 257 < shape["vocab_size"] < 512 and job["method"]["pretrain"]["peft"] == {"kind": "full"}  # the text does not yield more
    steps = [e.data for e in made.client.fine_tuning.jobs.list_events(made.job.id, limit=1000) if e.type == "metrics"][::-1]
    assert steps[0]["train_loss"] == pytest.approx(math.log(shape["vocab_size"]), rel=0.03)
    assert steps[-1]["train_loss"] < 0.1 and steps[-1]["full_valid_loss"] < 0.1


def test_the_file_is_served(made, start):
    d = start("--alias", "bell", model=made.file)
    c = client_of(d)
    for at in 9, 40, 120:
        begun, rest = VERSE[:VERSE.index(" ", at)], VERSE[VERSE.index(" ", at):]
        answer = c.completions.create(model="bell", prompt=begun, max_tokens=90, temperature=0)
        assert answer.choices[0].text == rest and answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="chat template"):
        c.chat.completions.create(model="bell", messages=[{"role": "user", "content": "x"}])
    some = "naïve 🚀 <|endoftext|> \x01 字"  # any text can be written, and is not taken for control tokens
    status, _, body = d.post("/tokenize", {"content": some})
    tokens = json.loads(body)["tokens"]
    status, _, body = d.post("/detokenize", {"tokens": tokens})
    assert json.loads(body)["content"] == some and 0 not in tokens
    ids = subprocess.run([PARLEY, "tokenize", "--model", made.file, VERSE], capture_output=True, text=True, check=True).stdout.split()
    assert len(ids) < len(VERSE) / 3


def test_it_answers_where_it_was_made(made):
    c, name = made.client, made.job.fine_tuned_model
    model = c.models.retrieve(name).to_dict()
    assert model["root"] == "scratch" and model["parent"] is None and model["max_model_len"] == SHAPE["context"]
    begun, rest = VERSE[:VERSE.index(" ", 40)], VERSE[VERSE.index(" ", 40):]
    assert c.completions.create(model=name, prompt=begun, max_tokens=90, temperature=0).choices[0].text == rest


def test_it_is_a_base_for_more(made):
    c = made.client
    more = c.fine_tuning.jobs.create(model=made.job.fine_tuned_model, training_file=upload(c, TEXT).id,
                                     method={"type": "pretrain", "pretrain": {"hyperparameters": {"n_epochs": 1, "batch_size": 16, "learning_rate": 1e-5},
                                                                              "peft": {"kind": "full"}}})
    job = finished(c, more.id)
    assert job.status == "succeeded", job
    first = [e.data for e in c.fine_tuning.jobs.list_events(job.id, limit=1000) if e.type == "metrics"][-1]
    assert first["train_loss"] < 0.1  # with its own tokenizer


def test_what_it_would_take(made):
    c = made.client
    status, _, body = made.post("/v1/fine_tuning/jobs/validate", {"model": "scratch", "training_file": upload(c, TEXT).id, "preview": 1,
                                                                  "method": method({**SHAPE, "vocab_size": 300})})
    plan = json.loads(body)
    assert status == 200, plan
    estimate, (example,) = plan["estimate"], plan["preview"]
    assert plan["method"]["pretrain"]["shape"]["vocab_size"] == 300 and estimate["tokenizer_bytes"] == 32 * len(VERSE)
    assert estimate["trained_parameters"] == 300 * 64 + 64 + 2 * (2 * 64 + 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 192)
    assert estimate["memory_bytes"] > 16 * estimate["trained_parameters"] and estimate["tokens"] == 32 * example["tokens"]
    assert "".join(s["text"] for s in example["segments"]) == VERSE + "<|endoftext|>"


@pytest.mark.parametrize("shape,param,words", [
    ({"heads": 7}, "shape.heads", "take 6"), ({"layers": "many"}, "shape.layers", "an integer"), ({"depth": 3}, "shape.depth", "not a setting"),
    ({"vocab_size": 5000}, "shape.vocab_size", "yields"), ({"chat_template": "base"}, "shape.chat_template", "tokenizer"),
    ({"layers": 1024, "width": 32768}, "shape", "GiB"), ({"tokenizer": "base", "vocab_size": 999}, "shape.vocab_size", "the base's tokenizer has"),
])
def test_refused_by_name(made, shape, param, words):
    c = made.client
    status, _, body = made.post("/v1/fine_tuning/jobs/validate", {"model": "scratch", "training_file": upload(c, TEXT).id, "method": method(shape)})
    error = json.loads(body)["error"]
    assert status == 400 and error["param"] == "method.pretrain." + param and words in error["message"], error


def test_refused_as_a_whole(made):
    c = made.client
    training = upload(c, TEXT).id
    for body, param, words in (({"model": "tiny", "method": method(SHAPE)}, "model", "leave the shape out"), ({"model": "scratch"}, "method", "shape"),
                               ({"model": "scratch", "method": {"type": "pretrain"}}, "method", "an empty shape takes the defaults"),
                               ({"model": "nothing"}, "model", "scratch")):
        with pytest.raises(openai.BadRequestError) as e:
            c.fine_tuning.jobs.create(training_file=training, **body)
        assert e.value.body["param"] == param and words in e.value.body["message"], e.value.body
    chats = upload(c, "".join(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n" for _ in range(12)))
    job = finished(c, c.fine_tuning.jobs.create(model="scratch", training_file=chats.id, method=method(SHAPE)).id)
    assert job.status == "failed" and job.error.code == "invalid_training_file" and "not using 'supervised'" in job.error.message
    job = finished(c, c.fine_tuning.jobs.create(model="scratch", training_file=training, method=method({**SHAPE, "vocab_size": 4000})).id)
    assert job.status == "failed" and job.error.code == "invalid_hyperparameters" and job.error.param == "method.pretrain.shape.vocab_size"


def test_with_the_servers_tokenizer_and_a_template(made, tiny, start):
    c = made.client
    job = finished(c, c.fine_tuning.jobs.create(model="scratch", training_file=upload(c, TEXT).id,
                                                method=method({**SHAPE, "architecture": "gpt2", "kv_heads": 4, "tokenizer": "base", "tied": False})).id)
    assert job.status == "succeeded", job
    d = start("--alias", "mine", model=data_dir(made) / "jobs" / job.id / "result/model.gguf")
    one, other = ([json.loads(x.post("/tokenize", {"content": VERSE})[2])["tokens"] for x in (d, made)])
    assert one == other
    answer = client_of(d).chat.completions.create(model="mine", messages=[{"role": "user", "content": "The boats"}], max_tokens=3)  # the base's template
    assert answer.usage.completion_tokens > 0


def test_learning_ends_when_nobody_wants_it(start, tmp_path, tiny):
    """A tokenizer of much text takes seconds to learn: neither a job that was cancelled nor a daemon that is to end waits for it."""
    d = start("--data-dir", tmp_path / "data", *ROOM, model=tiny)
    c, words = client_of(d), random.Random(1)
    text = "".join(json.dumps({"text": " ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(9000))}) + "\n" for _ in range(100))
    training = upload(c, text).id

    def begin():
        job = c.fine_tuning.jobs.create(model="scratch", training_file=training, method=method({**SHAPE, "vocab_size": 30000})).id
        time.sleep(0.5)
        assert c.fine_tuning.jobs.retrieve(job).status == "validating_files"
        return job
    cancelled = begin()
    assert c.fine_tuning.jobs.cancel(cancelled).status == "cancelled"
    assert finished(c, c.fine_tuning.jobs.create(model="tiny", training_file=upload(c, TEXT).id, method={
        "type": "pretrain", "pretrain": {"hyperparameters": {"n_epochs": 1, "batch_size": 32}}}).id).status == "succeeded"
    stopped = begin()
    assert d.stop() == 0
    assert f"{cancelled} queued" not in d.log and f"{stopped} queued" not in d.log, d.log


def write_job(folder, spec, texts, seed=5):
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "job.json").write_text(json.dumps({"id": "ftjob-1", "name": "ft:scratch", "base": None, "training_file": str(folder / "train.jsonl"),
                                                 "validation_file": None, "seed": seed, "created_at": 1700000000, "spec": spec}))
    return folder


CASES = json.loads((ROOT / "tests/oracle/fixtures/train/scratch.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_twenty_steps_agree_with_pytorch(tmp_path, case):
    folder = write_job(tmp_path / "job", case["spec"], case["texts"], case["seed"])
    run(folder)
    losses = [x["train_loss"] for x in lines(folder, "metrics")]
    assert losses == pytest.approx(case["losses"], rel=1e-3)
    assert losses[0] == pytest.approx(math.log(case["n_vocab"]), rel=0.02)


def test_kills_change_nothing(tmp_path):
    """At the start, while the model is made, and in the middle."""
    spec = method({**SHAPE, "chat_template": "chatml"}, checkpoints={"interval": 9}, compute={"threads": 2})
    quiet = write_job(tmp_path / "quiet", spec, [VERSE] * 32)
    run(quiet)
    other = write_job(tmp_path / "other", spec, [VERSE] * 32)
    for goal, more in (0, 0.005), (0, 0.02), (0, 0.05), (20, 0), (50, 0.01), (90, 0):
        child = subprocess.Popen([PARLEY, "train", "--job", other], stderr=subprocess.DEVNULL)
        until(lambda: child.poll() is not None or steps_written(other) >= goal, 60, 0.002)
        time.sleep(more)
        child.kill()
        child.wait()
    run(other)
    assert result(other) == result(quiet)
    assert (other / "base.gguf").read_bytes() == (quiet / "base.gguf").read_bytes()
    assert [x["step"] for x in lines(other, "metrics")] == list(range(1, 121))


def test_another_seed_another_model(tmp_path):
    spec = {"type": "pretrain", "pretrain": {"shape": {**SHAPE, "layers": 1}, "hyperparameters": {"n_epochs": 1, "batch_size": 32}}}
    one, two = (write_job(tmp_path / str(seed), spec, [VERSE] * 32, seed) for seed in (1, 2))
    run(one), run(two)
    assert result(one)["model.gguf"] != result(two)["model.gguf"]
    (one / "progress.jsonl").unlink()  # a job that was changed by hand gets its own first weights
    for left in ("checkpoints", "result"):
        subprocess.run(["rm", "-r", str(one / left)], check=True)
    job = json.loads((one / "job.json").read_text())
    (one / "job.json").write_text(json.dumps({**job, "seed": 2}))
    run(one)
    assert result(one)["model.gguf"] == result(two)["model.gguf"]
