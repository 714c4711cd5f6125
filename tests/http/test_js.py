"""The official JavaScript client, unmodified, through the whole story of a job (story.mjs), and the README's JavaScript example as pasted.

Needs node and the package: PARLEY_OPENAI_JS names a folder with node_modules/openai, else the one that deploy/check has fetched is used.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import CHAT, ROOT, SLOW, Daemon
from test_finetune_real import ANSWER, QUESTIONS, ROOM, lines
from test_jobs import WORKER
from test_readme import README, REAL, daemon  # noqa: F401 (daemon is a fixture)

VERSION = re.search(r"^openai_js_version=(.+)$", (ROOT / "deploy/check").read_text(), re.M)[1]
FETCHED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"parley/openai-js-{VERSION}"
PACKAGE = Path(os.environ.get("PARLEY_OPENAI_JS") or FETCHED) / "node_modules"
EXAMPLE = re.findall(r"```js\n(.*?)```", README, re.S)

pytestmark = pytest.mark.skipif(shutil.which("node") is None or not (PACKAGE / "openai").is_dir(),
                                reason="no node, or no openai package for it (sh deploy/check fetches both)")


def node(folder, script, *args):
    (folder / "node_modules").symlink_to(PACKAGE)
    (folder / "script.mjs").write_text(script)
    done = subprocess.run(["node", folder / "script.mjs", *map(str, args)], capture_output=True, text=True, timeout=180 * SLOW)
    assert done.returncode == 0, done.stderr
    return done.stdout


def story(d, folder, what, *files):
    return json.loads(node(folder, (ROOT / "tests/http/story.mjs").read_text(), f"http://127.0.0.1:{d.port}/v1", what, *files))


def test_the_version_is_the_pinned_one():
    assert json.loads((PACKAGE / "openai/package.json").read_text())["version"] == VERSION


def test_the_whole_story(start, tmp_path, tiny):
    d = start("--train-threads", 1, *ROOM, model=tiny)
    (tmp_path / "training.jsonl").write_text(lines(24))
    (tmp_path / "validation.jsonl").write_text(lines(6))
    said = story(d, tmp_path, "story", tmp_path / "training.jsonl", tmp_path / "validation.jsonl")
    assert said["files"][0] == {"bytes": len(lines(24)), "status": "processed", "filename": "training.jsonl"}
    job = said["job"]
    assert job["status"] == "succeeded" and job["fine_tuned_model"].startswith("ft:tiny:parley:js:") and job["metadata"] == {"from": "node"}
    assert job["hyperparameters"] == {"n_epochs": 8, "batch_size": 2, "learning_rate_multiplier": pytest.approx(100)} and job["trained_tokens"] > 0
    steps = [e["data"] for e in said["events"] if e["type"] == "metrics"][::-1]
    assert [s["step"] for s in steps] == list(range(1, 97)) and steps[-1]["train_loss"] < 0.2 * steps[0]["train_loss"]
    assert len({e["id"] for e in said["events"]}) == len(said["events"]) > 96
    points = said["checkpoints"]
    assert [p["step_number"] for p in points] == [96, 84, 72] and points[0]["metrics"]["step"] == 96
    assert said["answer"] == said["checkpoint_answer"] == said["streamed"] == ANSWER and "a lamp" in QUESTIONS
    assert "tiny" in said["models"] and job["fine_tuned_model"] in said["models"]
    assert said["csv"].startswith("step,train_loss") and len(said["csv"].splitlines()) == 97
    assert said["deleted"] == {"id": job["fine_tuned_model"], "object": "model", "deleted": True}
    assert said["gone"]["name"] == "NotFoundError" and said["gone"]["code"] == "model_not_found"


def test_pause_resume_cancel_and_paging(start, tmp_path, tiny):
    data = tmp_path / "data"
    data.mkdir()
    (data / "script").write_text(json.dumps({"steps": 10000, "seconds": 0.02, "checkpoint_every": 1000}))
    (tmp_path / "training.jsonl").write_text((CHAT + "\n") * 12)
    d = start("--data-dir", data, "--train-worker", WORKER, "--train-nice", 1, model=tiny)
    said = story(d, tmp_path, "control", tmp_path / "training.jsonl")
    assert said["paused"] == "paused" and said["resumed"] == "queued" and said["cancelled"] == "cancelled"
    assert said["again"]["name"] == "BadRequestError" and said["again"]["status"] == 400
    assert said["page"] == {"n": 2, "more": True, "next": 2} and said["list"] == ["four", "three", "two", "one"]
    assert said["unknown"] == {"name": "NotFoundError", "status": 404, "code": "fine_tune_not_found", "param": "fine_tuning_job_id"}
    assert said["bad"]["name"] == "BadRequestError" and said["bad"]["param"] == "seed"
    assert said["files"] == [said["file"]] and said["file_deleted"] == {"id": said["file"], "object": "file", "deleted": True}


def test_the_readme_example(daemon, tmp_path):
    assert len(EXAMPLE) == 1
    assert "The capital of Germany is Berlin" in node(tmp_path, EXAMPLE[0].replace(":8000", f":{daemon.port}"))
