"""The fine-tuning API's refusals: bad jobs, bad bodies, bad data, unknown names, keys, and a store that cannot be used. No job runs.

SPDX-License-Identifier: Apache-2.0
"""
import json

import pytest

from conftest import CHAT, WORKER, Daemon, client_of, until, upload


def bad_lines(c):
    return upload(c, CHAT + "\n" + '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":1}]}\n' * 11)


# create with these changes -> 400 with this param and message. TRAIN, TEXT, PAIRS, BATCH stand for uploaded files.
BAD_JOBS = [
    ({"model": None}, "model", "'model' is required"),
    ({"model": 7}, "model", "must be a string"),
    ({"model": "gpt-4o"}, "model", "not available for fine-tuning"),
    ({"training_file": None}, "training_file", "'training_file' is required"),
    ({"training_file": "file-none"}, "training_file", "there is no file 'file-none'"),
    ({"training_file": "BATCH"}, "training_file", "has purpose batch, not fine-tune"),
    ({"training_file": 3}, "training_file", "must be a string"),
    ({"validation_file": "file-none"}, "validation_file", "there is no file"),
    ({"suffix": ""}, "suffix", "1 to 64"),
    ({"suffix": "x" * 65}, "suffix", "1 to 64"),
    ({"suffix": "a:b"}, "suffix", "letters"),
    ({"suffix": "a b"}, "suffix", "letters"),
    ({"suffix": 1}, "suffix", "must be a string"),
    ({"seed": -1}, "seed", "0 to 2147483647"),
    ({"seed": 2 ** 31}, "seed", "0 to 2147483647"),
    ({"seed": "1"}, "seed", "must be an integer"),
    ({"seed": 1.5}, "seed", "must be an integer"),
    ({"metadata": []}, "metadata", "must be an object"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"k" * 65: "x"}}, "metadata", "more than 64"),
    ({"metadata": {"k": "x" * 513}}, "metadata", "at most 512"),
    ({"metadata": {"k": 1}}, "metadata", "must be a string"),
    ({"metadata": {"\u00e9" * 65: "x"}}, "metadata", "more than 64"),
    ({"metadata": {"k": "\u20ac" * 513}}, "metadata", "at most 512"),
    ({"integrations": [{"type": "tensorboard", "tensorboard": {}}]}, "integrations[0].tensorboard", "is not a member"),
    ({"integrations": [{"type": "tensorboard"}, {"type": "tensorboard", "run": 1}]}, "integrations[1].run", "is not a member"),
    ({"integrations": {}}, "integrations", "must be an array"),
    ({"integrations": [{"type": "tensorboard"}] * 6}, "integrations", "at most 5"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations[0].type", "not supported"),
    ({"integrations": [{}]}, "integrations[0].type", "must be a string"),
    ({"n_epochs": 3}, "n_epochs", "Unrecognized request argument supplied: n_epochs"),
    ({"method": "supervised"}, "method", "must be an object"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type", "not supported"),
    ({"method": {"type": "rlhf"}}, "method.type", "must be one of"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}}, "method.supervised.hyperparameters.n_epochs", "from 1 to 50"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}}, "method.supervised.hyperparameters.epochs", "not a setting"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", "to 2"),
    ({"method": {"type": "supervised", "supervised": {"peft": {"kind": "prefix"}}}}, "method.supervised.peft.kind", "full|lora"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "an integer or \"auto\""),
    ({"hyperparameters": {"batch_size": 1000}}, "hyperparameters.batch_size", "from 1 to 256"),
    ({"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised"}}, "hyperparameters", "the older form"),
]


@pytest.fixture(scope="module")
def idle(tmp_path_factory, tiny):
    d = Daemon(tmp_path_factory.mktemp("idle"), "--train-jobs", 0, "--train-worker", WORKER, model=tiny).wait_ready()
    c = client_of(d)
    pair = {"input": {"messages": [{"role": "user", "content": "a"}]}, "preferred_output": [{"role": "assistant", "content": "b"}],
            "non_preferred_output": [{"role": "assistant", "content": "c"}]}
    d.files = {"TRAIN": upload(c).id, "BATCH": upload(c, "x", purpose="batch").id, "PAIRS": upload(c, (json.dumps(pair) + "\n") * 10).id,
               "TEXT": upload(c, '{"text":"a b c d"}\n').id, "FEW": upload(c, (CHAT + "\n") * 7).id,
               "LONG": upload(c, (CHAT + "\n") * 10 + json.dumps({"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]}) + "\n").id}
    yield d
    assert d.stop() == 0, d.log
    assert "Sanitizer" not in d.log, d.log


@pytest.mark.parametrize("change, param, message", BAD_JOBS)
def test_bad_jobs(idle, change, param, message):
    body = {"model": "tiny", "training_file": "TRAIN", **change}
    body = {k: idle.files.get(v, v) if isinstance(v, str) else v for k, v in body.items() if v is not None}
    for path in "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/validate":
        status, _, answer = idle.post(path, body)
        error = json.loads(answer)["error"]
        assert status == 400 and error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error", error
        if param == "model" and body.get("model") == "gpt-4o":
            assert error["code"] == "model_not_available"


def test_limits_are_in_characters(idle):
    c = client_of(idle)
    metadata = {"\u20ac" * 64: "\u00e9" * 512}
    job = c.fine_tuning.jobs.create(model="tiny", training_file=idle.files["TRAIN"], metadata=metadata)
    assert c.fine_tuning.jobs.retrieve(job.id).metadata == metadata
    assert [j.id for j in c.fine_tuning.jobs.list(metadata=metadata)] == [job.id]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model":"a","model":"b"}', b'{"model":"\xff"}'])
def test_bad_bodies(idle, body):
    assert idle.post("/v1/fine_tuning/jobs", body)[0] == 400


# What only the model's tokenizer and the whole file tell: the job fails with this error.
DPO = {"type": "dpo"}
BAD_DATA = [
    ("FEW", {}, "invalid_n_examples", "training_file", "Training file has 7 example(s), but must have at least 10 examples"),
    ("TRAIN", {"method": DPO}, "invalid_training_file", "training_file", "is in the fine-tune-chat format, but the specified fine-tuning job is not using 'supervised' "
     "as the training method (provided method=dpo)"),
    ("PAIRS", {}, "invalid_training_file", "training_file", "(provided method=supervised)"),
    ("TEXT", {}, "invalid_training_file", "training_file", "not using 'pretrain'"),
    ("LONG", {}, "invalid_training_file", "training_file", "Example 11: no token with loss is left in the first 512 tokens"),
    ("TRAIN", {"validation_file": "PAIRS"}, "invalid_validation_file", "validation_file", "fine-tune-preference"),
    ("TRAIN", {"method": {"type": "supervised", "supervised": {"hyperparameters": {"max_length": 1024}}}}, "invalid_hyperparameters",
     "method.supervised.hyperparameters.max_length", "the model takes 512 tokens"),
    ("TRAIN", {"method": {"type": "supervised", "supervised": {"hyperparameters": {"max_length": 16}}}}, "invalid_training_file", "training_file",
     "no token with loss is left in the first 16 tokens"),
    ("TRAIN", {"method": {"type": "supervised", "supervised": {"final": "best"}}}, "invalid_hyperparameters", "method.supervised.final", "validation_file"),
    ("TRAIN", {"method": {"type": "supervised", "supervised": {"peft": {"targets": ["c_attn"]}}}}, "invalid_hyperparameters", "method.supervised.peft.targets",
     "architecture llama"),
]


@pytest.mark.parametrize("file, more, code, param, message", BAD_DATA)
def test_bad_data(idle, file, more, code, param, message):
    body = {"model": "tiny", "training_file": idle.files[file], **{k: idle.files.get(v, v) if isinstance(v, str) else v for k, v in more.items()}}
    status, headers, answer = idle.post("/v1/fine_tuning/jobs/validate", body)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and error["code"] == code and message in error["message"], error
    line = until(lambda: [x for x in idle.log.splitlines() if headers["x-request-id"] in x])[0]  # though another thread has answered
    assert f"error={code} param={param}" in line
    c = client_of(idle)
    job = c.fine_tuning.jobs.create(**body)
    job = until(lambda: (j := c.fine_tuning.jobs.retrieve(job.id)).status == "failed" and j, 60)
    assert job.error.code == code and job.error.param == param and message in job.error.message and job.finished_at
    if "no token" in message:
        assert job.error.to_dict()["lines"][0]["line"] == (11 if file == "LONG" else 1)


def test_the_wrong_order_of_lines(idle):
    c = client_of(idle)
    f = upload(c, '{"text":"a b"}\n' * 12)
    ok = c.fine_tuning.jobs.create(model="tiny", training_file=f.id, method={"type": "pretrain"})
    until(lambda: c.fine_tuning.jobs.retrieve(ok.id).status == "queued", 60)
    assert c.fine_tuning.jobs.retrieve(ok.id).method.to_dict()["pretrain"]["hyperparameters"]["n_epochs"] == 1
    pairs = c.fine_tuning.jobs.create(model="tiny", training_file=idle.files["PAIRS"], method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}})
    until(lambda: c.fine_tuning.jobs.retrieve(pairs.id).status == "queued", 60)
    assert c.fine_tuning.jobs.retrieve(pairs.id).method.dpo.hyperparameters.beta == 0.2


@pytest.mark.parametrize("method, path", [("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/events"), ("GET", "/checkpoints")])
def test_unknown_jobs(idle, method, path):
    status, _, body = idle.request(method, f"/v1/fine_tuning/jobs/ftjob-none{path}")
    error = json.loads(body)["error"]
    assert status == 404 and error["code"] == "fine_tune_not_found" and error["param"] == "fine_tuning_job_id"


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs/a/b", "/v1/fine_tuning/jobs/a/b/cancel", "/v1/fine_tuning/jobs//cancel", "/v1/fine_tuning", "/v1/files/a/b"])
def test_paths_that_are_not(idle, path):
    assert idle.get(path)[0] == 404


def test_methods_that_are_not(idle):
    for path, allow in ("/v1/files", "POST, GET, HEAD, OPTIONS"), ("/v1/fine_tuning/jobs/x/cancel", "POST, OPTIONS"), ("/v1/files/x", "GET, HEAD, DELETE, OPTIONS"):
        status, headers, _ = idle.request("PUT", path)
        assert status == 405 and headers["allow"] == allow


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=-1", "limit=1001", "limit=1e3", "after=nobody", "limit=99999999999999999999"])
def test_bad_queries(idle, query):
    for path in "/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{client_of(idle).fine_tuning.jobs.create(model='tiny', training_file=idle.files['TRAIN']).id}/events":
        status, _, body = idle.get(f"{path}?{query}")
        assert status == 400 and json.loads(body)["error"]["param"] == query.split("=")[0], body


def test_scope(start, tiny):
    d = start("--api-key", "user-key-1", "--admin-key", "admin-key-1", model=tiny)
    for method, path in (("GET", "/v1/fine_tuning/jobs"), ("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/fine_tuning/jobs/validate"), ("GET", "/v1/fine_tuning/jobs/x"),
                         ("POST", "/v1/fine_tuning/jobs/x/cancel"), ("GET", "/v1/fine_tuning/jobs/x/events"), ("GET", "/v1/fine_tuning/jobs/x/checkpoints"),
                         ("DELETE", "/v1/models/x")):
        assert d.request(method, path)[0] == 401
        assert d.request(method, path, headers={"Authorization": "Bearer user-key-1"})[0] == 403
        assert d.request(method, path, headers={"Authorization": "Bearer admin-key-1"})[0] in (200, 400, 404)


def test_a_general_text_that_is_not_there(start, tmp_path, tiny):
    d = start("--train-general-text", tmp_path / "nowhere.txt", model=tiny)
    status, _, body = d.get("/v1/files")
    assert status == 503 and "nowhere.txt" in json.loads(body)["error"]["message"] and d.get("/v1/models")[0] == 200


def test_a_corrupted_store(start, tmp_path, tiny):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/parley.db").write_bytes(b"not a database" * 1000)
    d = start("--data-dir", tmp_path / "data", model=tiny)
    status, _, body = d.get("/v1/files")
    assert status == 503 and "database" in json.loads(body)["error"]["message"]
    assert d.get("/v1/models")[0] == 200
